"""Measures what the third moment does in a run, from the optimizer's state alone."""

from __future__ import annotations

import dataclasses
import functools
import inspect
import math
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax import Array, lax

from adam3_optax import _formats, _rule, _trees
from adam3_optax import _hyperparameters as hp
from adam3_optax._adam3 import ScaleByAdam3State, adam3w, stored_leaves
from adam3_optax._reports import Report, check_countable, counts_of, percent
from adam3_optax._rule import FORMS, Coefficients, Form, ThirdMoment

_QUANTILES = [0.5, 0.999]  # the median, and the tail
_LAST = 2**31 - 1  # the largest bit pattern of a float32 that is not negative


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Statistics:
    """Statistics of one leaf, or of all, over the elements that have had a gradient.

    Scalars of shape () and type float32; NaN where no element has had a gradient.

    Attributes:
        skewness: Median of |ŝ|/v̂^(3/2); of |ŝ|/v̂^(3/4) in the stabilized form.
        skewness_tail: Its 0.999 quantile.
        ratio: Median of |b_t|/|m̂|, the skewness term against the momentum.
        ratio_tail: Its 0.999 quantile; inf where m̂ is 0 and b_t is not.
        clipped: Share of elements whose term is clipped at tau.
        without_effect: Share of elements whose term is at most half a unit in the last
            place of m̂, so that m̂ + b_t rounds to m̂, or to its neighbour at most.
        elements: How many elements have had a gradient.
        state_bytes: Bytes in which m, v and s are stored: a Python int.
    """

    skewness: Array
    skewness_tail: Array
    ratio: Array
    ratio_tail: Array
    clipped: Array
    without_effect: Array
    elements: Array
    state_bytes: Any = dataclasses.field(metadata={"static": True})


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class ThirdMomentReport(Report):
    """What `third_moment_report` found.

    If the state holds several states of AdaM3, a leaf's name begins with the path of
    the one that it belongs to.

    Attributes:
        lam: The largest |lam| of these states at the step: 0 is Adam.
        third_moment: The form.
    """

    lam: Array
    third_moment: ThirdMoment = dataclasses.field(metadata={"static": True})

    topic = "third_moment"
    columns = (
        ("elements", lambda x: f"{int(x.elements):,}"),
        ("skewness", lambda x: f"{float(x.skewness):.1e}"),
        ("(tail)", lambda x: f"{float(x.skewness_tail):.1e}"),
        ("|b|/|m|", lambda x: f"{float(x.ratio):.1e}"),
        ("(tail)", lambda x: f"{float(x.ratio_tail):.1e}"),
        ("clipped", lambda x: percent(x.clipped)),
        ("no effect", lambda x: percent(x.without_effect)),
        ("bytes", lambda x: f"{x.state_bytes:,}"),
    )

    def verdict(self) -> str:
        """Returns one sentence: whether the third moment does anything here.

        It says the first of these that holds: no element has had a gradient; NaN in
        0.1% of elements or more; lam = 0; no effect on half of the elements or more; a
        median ratio |b_t|/|m̂| above 1; half or more clipped; a median ratio below
        0.001; none of these.
        """
        x = self.on_host().overall
        ratio, clipped, silent = map(float, (x.ratio, x.clipped, x.without_effect))
        found, nothing = f"median ratio {ratio:.0e}", "third moment changes nothing"
        if not x.elements:
            return "No element has had a gradient yet: there is nothing to say."
        if math.isnan(x.ratio_tail):
            return "The state holds NaN: there is nothing to say of the third moment."
        if not float(self.lam):
            return f"The {nothing}, for lam is 0: this step is Adam's."
        if silent >= 0.5:
            where = "" if silent == 1 else f" in {percent(silent)} of the elements"
            remedy = "a larger lam or tau, or more skewed gradients, would change that"
            if not FORMS[self.third_moment].bounded:
                remedy = "rescale the loss, or use third_moment='standardized'"
            return (
                f"With these gradients the {nothing}{where}: "
                f"{found}, 0.999 quantile {x.ratio_tail:.0e}; {remedy}."
            )
        if ratio > 1:
            return (
                f"The skewness term outweighs the momentum: {found}; a smaller lam or "
                "tau would change that."
            )
        if clipped >= 0.5:
            return (
                f"The skewness term is clipped in {percent(clipped)} of the elements, "
                f"where only its sign counts: {found}."
            )
        if ratio < 1e-3:
            return f"The third moment hardly shifts the momentum: {found}, too little."
        return (
            f"The third moment shifts the momentum: {found}, by {percent(ratio)} of "
            "it. Only a run with lam=0 tells whether that helps."
        )


def third_moment_report(
    state: optax.OptState,
    *,
    b1: jax.typing.ArrayLike | None = None,
    b2: jax.typing.ArrayLike | None = None,
    b3: jax.typing.ArrayLike | None = None,
    lam: optax.ScalarOrSchedule | None = None,
    tau: optax.ScalarOrSchedule | None = None,
    third_moment: ThirdMoment,
    **others: Any,
) -> ThirdMomentReport:
    """Measures what the third moment does, from the state after a step.

    It is pure and runs under jit. It reads the stored moments, from which the update
    was made. It finds quantiles by bisection: 31 passes over the elements, each of
    which compares and counts. There is no sort, so sharded leaves stay where they are.
    It needs 8 bytes of temporary memory an element. `docs/diagnostics.md` has times;
    call it now and then, not at each step.

    A state does not know its hyperparameters, and with wrong ones these numbers would
    be wrong. So give all of them, as to the optimizer. What is not given is taken
    from a state of `optax.inject_hyperparams` that holds a number of that name. What is
    given is taken for every AdaM3 in the state. If theirs differ, pass these states one
    by one. If a state is stacked over an ensemble, pass the state of one member.

    Args:
        state: An optimizer's state, with AdaM3's anywhere in it (in chains, masks,
            partitions, injected hyperparameters, multi-step states), stored and sharded
            in any way.
        b1: Decay of the first moment, as given to the optimizer.
        b2: Decay of the second moment.
        b3: Decay of the third moment.
        lam: Weight of the skewness term; a schedule is taken at the step that made the
            state.
        tau: Its threshold, likewise.
        third_moment: The form, as given to the optimizer; not None.
        **others: Other arguments of `adam3w`. They have no effect, so that the dict
            which made the optimizer can be passed here, too.

    Returns:
        A `ThirdMomentReport`: statistics overall and of each leaf, with `scalars()`
        for a logger, `table()` to print, and `verdict()`, a sentence. Quantiles are
        those of the inverted distribution function, and infinite ratios (m̂ = 0) count
        as the largest. Counts above 2²⁴ are rounded to float32, so that a rank may be
        off by one in ten million for each leaf.

    Raises:
        ValueError: No AdaM3 state in `state`, a stacked one, or one without a third
            moment; a hyperparameter missing or out of range; a leaf of 2³² elements or
            more; a moment of another type.
        TypeError: A hyperparameter that is no number; an argument that `adam3w` does
            not have.

    Example:
        Gradients of the size of a language model's: the cubic form is Adam.

        >>> import jax, jax.numpy as jnp
        >>> from adam3_optax import adam3, third_moment_report
        >>> settings = dict(b1=0.9, b2=0.999, b3=0.999, lam=0.01, tau=1.0)
        >>> optimizer = adam3(1e-3, **settings, third_moment="cubic")
        >>> params = jnp.zeros(1000)
        >>> state = optimizer.init(params)
        >>> for i in range(10):
        ...     g = 1e-4 * jax.random.normal(jax.random.key(i), params.shape)
        ...     updates, state = optimizer.update(g, state)
        >>> report = third_moment_report(state, **settings, third_moment="cubic")
        >>> report.verdict()[:53]
        'With these gradients the third moment changes nothing'
        >>> sorted(report.scalars())[:2]
        ['third_moment/clipped', 'third_moment/elements']

    Source:
        `docs/algorithm.md`, sections 1, 2 and 4.
    """
    unknown = others.keys() - inspect.signature(adam3w).parameters
    if unknown:
        raise TypeError(f"adam3w has no argument {', '.join(sorted(unknown))}")
    form = hp.form(third_moment)
    chosen = {"b1": b1, "b2": b2, "b3": b3, "lam": lam, "tau": tau}
    given = {name: value for name, value in chosen.items() if value is not None}
    found = _trees.find(state, ScaleByAdam3State)
    if form is None or any(isinstance(x.s, optax.EmptyState) for _, x, _ in found):
        raise ValueError(
            f"no third moment to report on; give the optimizer one: {', '.join(FORMS)}"
        )
    names, leaves, lams = [], [], []
    for path, adam3, injected in found:
        _trees.check_not_stacked(adam3)
        known = {**injected, **given}
        missing = ", ".join(name for name in chosen if name not in known)
        if missing:
            raise ValueError(f"{missing} must be given, as to the optimizer")
        t = jnp.maximum(adam3.count, 1)
        h = (*(hp.value_at(x, known[x])(t - 1) for x in chosen), 0.0, 0.0)
        lams.append(jnp.abs(jnp.asarray(h[3], jnp.float32)))
        # Not inside jit, where Python floats become float32 and 1 - b loses digits.
        coefficients = functools.cache(functools.partial(_rule.coefficients, h, t))
        for keys, stored in stored_leaves(adam3):
            name = jax.tree_util.keystr(keys)
            check_countable(name, stored.m)
            names.append((path + name if len(found) > 1 else name) or "params")
            leaves.append((stored, coefficients(_formats.computed_in(*stored))))
    # NaN and inf are results here, not faults.
    with jax.debug_nans(False), jax.debug_infs(False):
        rows = _statistics(leaves, form)
    return ThirdMomentReport(rows, tuple(names), jnp.stack(lams).max(), third_moment)


@functools.partial(jax.jit, static_argnums=1)
def _statistics(leaves: list[tuple[Any, Coefficients]], form: Form) -> Statistics:
    """Returns the statistics, as arrays: of all leaves together, then of each."""
    measured = [_measure(stored, k, form) for stored, k in leaves]
    elements, clipped, without_effect = counts_of([x[1] for x in measured], 3).T
    found = _quantiles([x[0] for x in measured], elements)
    skewness, tail, ratio, ratio_tail = found.T
    sizes = [sum(x.nbytes for x in jax.tree.leaves(stored)) for stored, _ in leaves]
    shares = clipped / elements, without_effect / elements
    total = (sum(sizes), *sizes)
    return Statistics(skewness, tail, ratio, ratio_tail, *shares, elements, total)


def _measure(stored: Any, k: Coefficients, form: Form) -> tuple[list[Array], ...]:
    """Returns, of each element of a leaf, what is counted.

    First the bit patterns of its skewness and of its ratio, each for two quantiles.
    Then whether it has had a gradient, and if so, whether its term is clipped and
    whether its term is without effect.
    """
    loaded = _formats.loaded(_formats.formats_of(stored, form), stored)
    m, v, s = (x.astype(k.c1.dtype) for x in loaded)
    seen = (m != 0) | (v != 0)
    size = jnp.abs(m * k.c1)
    b = jnp.abs(form.term(s, v, None, k))
    ratio = b / jnp.where(b == 0, 1.0, size)
    _, inverse, large = _rule.standard_deviation(v, None, k)
    skewness = jnp.abs(_rule.skewness(inverse, s, k, form.skewness_power))
    skewness = jnp.where(large, skewness, 0.0)
    clipped = (skewness if form.bounded else jnp.abs(s)) > k.tau
    # Not m̂ + b == m̂, which XLA may fuse and round in another way than the step does.
    unit = jnp.nextafter(size, jnp.inf) - size

    def pattern(x: Array) -> Array:
        """Returns integers in the order of x >= 0; then come NaN and what is unseen."""
        bits = lax.bitcast_convert_type(x.astype(jnp.float32), jnp.int32)
        return jnp.where(seen, bits & _LAST, _LAST)  # a NaN may have a sign

    patterns = [pattern(skewness)] * 2 + [pattern(ratio)] * 2
    return patterns, [seen, seen & clipped, seen & (b <= unit / 2)]


def _quantiles(patterns: list[list[Array]], elements: Array) -> Array:
    """Returns, of all leaves and of each, of both patterns, the median and the tail.

    A quantile is the smallest value with a share of q at or below it. Its bit pattern
    is found bit by bit, in 31 passes and without a sort.
    """
    wanted = jnp.ceil(elements[:, None] * jnp.array([2 * _QUANTILES], jnp.float32))

    def refine(i: Any, found: Array) -> Array:
        bit = 1 << (30 - i)
        middle = found + (bit - 1)

        def below(i: int, leaf: list[Array]) -> list[Array]:
            """Returns what is at or below the bounds of all, and a leaf's own."""
            rows = middle[0], middle[i]
            return [x <= row[j] for row in rows for j, x in enumerate(leaf)]

        masks = [below(i, leaf) for i, leaf in enumerate(patterns, start=1)]
        counts = counts_of(masks, 2, 4)
        counts = jnp.concatenate([counts[:1, 0], counts[1:, 1]])
        return jnp.where(counts < wanted, found + bit, found)

    found = lax.fori_loop(0, 31, refine, jnp.zeros_like(wanted, jnp.int32))
    values = lax.bitcast_convert_type(found, jnp.float32)
    return jnp.where(elements[:, None] > 0, values, jnp.nan)
