"""Measures what the third moment does in a run, from the optimizer's state alone."""

import dataclasses
import functools
import inspect
import math
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax import Array, lax

from adam3_optax import _formats, _rule, _trees
from adam3_optax import _hyperparameters as hp
from adam3_optax._adam3 import ScaleByAdam3State, adam3w, stored_leaves
from adam3_optax._formats import Format
from adam3_optax._reports import Report, as_table, check_countable, counts_of, percent
from adam3_optax._rule import FORMS, Coefficients, Form, Moments, ThirdMoment

_MEDIAN, _TAIL = 0.5, 0.999
_LAST = 2**31 - 1  # the largest bit pattern of a float32 that is not negative
_REMEDY = f"build the optimizer with another one: {', '.join(FORMS)}"


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Statistics:
    """Of one leaf, or of all, over the elements that have had a gradient.

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

    def _at(self, row: int) -> "Statistics":
        # The last axis has the rows. `jax.vmap` puts another axis before it.
        one = jax.tree.map(lambda x: x[..., row], self)
        return dataclasses.replace(one, state_bytes=self.state_bytes[row])


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class ThirdMomentReport(Report):
    """What `third_moment_report` found.

    Where the state holds several states of AdaM3, a leaf's name comes after the path of
    its own.

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
        ratio, tail = float(x.ratio), float(x.ratio_tail)
        silent, clipped = float(x.without_effect), float(x.clipped)
        found = f"median ratio {ratio:.0e}"
        if not float(x.elements):
            return "No element has had a gradient yet: there is nothing to say."
        if math.isnan(tail):
            return "The state holds NaN: there is nothing to say of the third moment."
        if not float(self.lam):
            return (
                "The third moment changes nothing, for lam is 0: this step is Adam's."
            )
        if silent >= 0.5:
            where = "" if silent == 1 else f" in {percent(silent)} of the elements"
            remedy = (
                "a larger lam or tau, or more skewed gradients, would change that"
                if FORMS[self.third_moment].bounded
                else "rescale the loss, or use third_moment='standardized'"
            )
            return (
                f"With these gradients the third moment changes nothing{where}: "
                f"{found}, 0.999 quantile {tail:.0e}; {remedy}."
            )
        if ratio > 1:
            return f"The skewness term outweighs the momentum: {found}."
        if clipped >= 0.5:
            return (
                f"The skewness term is clipped in {percent(clipped)} of the elements, "
                f"where only its sign counts: {found}."
            )
        if ratio < 1e-3:
            return f"The third moment hardly shifts the momentum: {found}."
        return f"The third moment shifts the momentum: {found}."


def third_moment_report(
    state: optax.OptState,
    *,
    b1: jax.typing.ArrayLike | None = None,
    b2: jax.typing.ArrayLike | None = None,
    b3: jax.typing.ArrayLike | None = None,
    lam: hp.ScalarOrSchedule | None = None,
    tau: hp.ScalarOrSchedule | None = None,
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
    from a state of `optax.inject_hyperparams` that holds a number of that name. They
    hold for every AdaM3 in the state. If several differ, pass their states one by one.
    If a state is stacked over the members of an ensemble, pass one member's.

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
    if hp.form(third_moment) is None:
        raise ValueError(
            f"third_moment=None has no third moment to report on; {_REMEDY}"
        )
    chosen = {"b1": b1, "b2": b2, "b3": b3, "lam": lam, "tau": tau}
    given = {name: value for name, value in chosen.items() if value is not None}
    found = _trees.find(state, ScaleByAdam3State)
    names: list[str] = []
    formats: list[Moments[Format]] = []
    leaves: list[tuple[Moments[Any], Coefficients]] = []
    lams = []
    for path, adam3, injected in found:
        taken = _steps_taken(adam3)
        h = _of_the_last_step(given, injected, taken - 1)
        lams.append(jnp.abs(jnp.asarray(h.lam, jnp.float32)))
        # Not inside jit, where Python floats become float32 and 1 - b loses digits.
        coefficients = functools.cache(functools.partial(_rule.coefficients, h, taken))
        these = _formats.formats_of(adam3.moments, FORMS[third_moment])
        for keys, stored in stored_leaves(adam3):
            name = jax.tree_util.keystr(keys)
            check_countable(name, stored.m)
            names.append((path + name if len(found) > 1 else name) or "params")
            formats.append(these)
            dtype = _formats.computed_in(*stored)
            leaves.append((stored, coefficients(dtype)))
    # NaN and inf are results here, not faults.
    with jax.debug_nans(False), jax.debug_infs(False):
        rows = _statistics(leaves, tuple(formats), FORMS[third_moment])
    lam = jnp.max(jnp.stack(lams))
    return ThirdMomentReport(rows, tuple(names), lam, third_moment)


def _steps_taken(state: ScaleByAdam3State) -> Array:
    """Returns the number of the step that made a state, at least 1."""
    _trees.check_not_stacked(state)
    if isinstance(state.s, optax.EmptyState):
        raise ValueError(f"the state has no third moment to report on; {_REMEDY}")
    return jnp.maximum(state.count, 1)


def _of_the_last_step(
    given: Mapping[str, Any], injected: Mapping[str, Any], count: Array
) -> _rule.Hyperparameters:
    """Returns the hyperparameters of the last step; given ones override injected."""
    needed = ("b1", "b2", "b3", "lam", "tau")
    known = {**injected, **given}
    missing = [name for name in needed if name not in known]
    if missing:
        raise ValueError(
            f"{', '.join(missing)} must be given, as to the optimizer: its state does "
            "not hold them"
        )
    values = (hp.value_at(name, known[name])(count) for name in needed)
    return _rule.Hyperparameters(*values, 0.0, 0.0)


@functools.partial(jax.jit, static_argnums=(1, 2))
def _statistics(
    leaves: list[tuple[Moments[Any], Coefficients]],
    formats: tuple[Moments[Format], ...],
    form: Form,
) -> Statistics:
    """Returns the statistics, as arrays: of all leaves together, then of each."""
    pairs = zip(formats, leaves, strict=True)
    measured = [
        _measure(_formats.loaded(f, stored), k, form) for f, (stored, k) in pairs
    ]
    counts = as_table([counts_of(list(x[2:])) for x in measured], 3)
    counts = jnp.concatenate([counts.sum(0, keepdims=True), counts])
    elements, clipped, without_effect = counts.T
    found = _quantiles([x[:2] for x in measured], elements)
    sizes = [sum(x.nbytes for x in jax.tree.leaves(stored)) for stored, _ in leaves]
    shares = clipped / elements, without_effect / elements
    skewness, tail, ratio, ratio_tail = found.reshape(-1, 4).T
    total = (sum(sizes), *sizes)
    return Statistics(skewness, tail, ratio, ratio_tail, *shares, elements, total)


def _measure(moments: Moments[Array], k: Coefficients, form: Form) -> tuple[Array, ...]:
    """Returns, of each element, what is counted.

    The bit patterns of its skewness and its ratio, whether it has had a gradient, and
    if so, whether its term is clipped and whether its term is without effect.
    """
    m, v, s = (x.astype(k.c1.dtype) for x in moments)
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
    return (
        _pattern(skewness, seen),
        _pattern(ratio, seen),
        seen,
        seen & clipped,
        seen & (b <= unit / 2),
    )


def _pattern(x: Array, seen: Array) -> Array:
    """Returns integers in the order of x >= 0; then come NaN and what is not seen."""
    bits = lax.bitcast_convert_type(x.astype(jnp.float32), jnp.int32)
    return jnp.where(seen, bits & _LAST, _LAST)  # without the sign that a NaN may have


def _quantiles(patterns: list[tuple[Array, ...]], elements: Array) -> Array:
    """Returns, of all leaves and of each, of both patterns, the median and the tail.

    A quantile is the smallest value with a share of q at or below it. Halving the range
    of the bit patterns finds it, in 31 passes and without a sort.
    """
    shares = jnp.array([[_MEDIAN, _TAIL]], jnp.float32)
    wanted = jnp.ceil(shares * elements[:, None])[:, None]

    def halve(_: Any, bounds: tuple[Array, Array]) -> Any:
        low, high = bounds
        middle = low + (high - low) // 2

        def below(i: int, leaf: tuple[Array, ...]) -> list[Array]:
            """Returns a leaf's counts at or below the bounds of all, and its own."""
            rows = (middle[0], middle[i])
            pairs = [(x, row[j]) for row in rows for j, x in enumerate(leaf)]
            return counts_of([x <= two[q] for x, two in pairs for q in range(2)])

        found = [below(i, leaf) for i, leaf in enumerate(patterns, start=1)]
        counts = as_table(found, 2, 2, 2)
        overall = counts[:, 0].sum(0, keepdims=True)
        counts = jnp.concatenate([overall, counts[:, 1]])
        enough = counts >= wanted
        return jnp.where(enough, low, middle + 1), jnp.where(enough, middle, high)

    shape = (len(patterns) + 1, 2, 2)
    bounds = jnp.zeros(shape, jnp.int32), jnp.full(shape, _LAST, jnp.int32)
    bits = lax.fori_loop(0, 31, halve, bounds)[1]
    found = lax.bitcast_convert_type(bits, jnp.float32)
    return jnp.where(elements[:, None, None] > 0, found, jnp.nan)
