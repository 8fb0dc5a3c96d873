"""Measures what the third moment does in a run, from the optimizer's state alone."""

import functools
import inspect
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax import lax

from adam3_optax import _hyperparameters as hp
from adam3_optax import _rule
from adam3_optax._boxes import is_box, opened
from adam3_optax._checks import check_not_stacked
from adam3_optax._counts import as_table, check_countable, counts_of
from adam3_optax._optimizers import adam3w
from adam3_optax._rule import FORMS, Coefficients, Form, Moments, ThirdMoment
from adam3_optax._states import find
from adam3_optax._storage import NAMES, Absent, Format, Stored, computed_in, format_of
from adam3_optax._third_moment import Statistics, ThirdMomentReport
from adam3_optax._transform import ScaleByAdam3State

_MEDIAN, _TAIL = 0.5, 0.999
_LAST = 2**31 - 1  # the largest bit pattern of a float32 that is not negative
_REMEDY = f"build the optimizer with another one: {', '.join(FORMS)}"


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
    found = find(state, ScaleByAdam3State)
    names: list[str] = []
    formats: list[Moments[Format]] = []
    leaves: list[tuple[Moments[Stored], Coefficients]] = []
    lams = []
    for path, adam3, injected in found:
        taken = _steps_taken(adam3)
        h = _of_the_last_step(given, injected, taken - 1)
        lams.append(jnp.abs(jnp.asarray(h.lam, jnp.float32)))
        # Not inside jit, where Python floats become float32 and 1 - b loses digits.
        coefficients = functools.cache(functools.partial(_rule.coefficients, h, taken))
        these = NAMES.map(format_of, adam3.moments)
        for name, stored in _leaves(these, adam3):
            names.append((path + name if len(found) > 1 else name) or "params")
            formats.append(these)
            dtype = computed_in(*jax.tree.leaves(stored))
            leaves.append((stored, coefficients(dtype)))
    # NaN and inf are results here, not faults.
    with jax.debug_nans(False), jax.debug_infs(False):
        rows = _statistics(leaves, tuple(formats), FORMS[third_moment])
    lam = jnp.max(jnp.stack(lams))
    return ThirdMomentReport(rows, tuple(names), lam, third_moment)


def _steps_taken(state: ScaleByAdam3State) -> jax.Array:
    """Returns the number of the step that made a state, at least 1."""
    check_not_stacked(state)
    if isinstance(format_of("s", state.s), Absent):
        raise ValueError(f"the state has no third moment to report on; {_REMEDY}")
    return jnp.maximum(state.count, 1)


def _of_the_last_step(
    given: Mapping[str, Any], injected: Mapping[str, Any], count: jax.Array
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
    *b, lam, tau = (hp.value_at(name, known[name])(count) for name in needed)
    return _rule.Hyperparameters(Moments(*b), lam, tau, eps=0.0, eps_root=0.0)


def _leaves(
    formats: Moments[Format], state: ScaleByAdam3State
) -> list[tuple[str, Moments[Stored]]]:
    """Returns the path of each leaf, and its stored m, v and s."""
    treedef: Any = jax.tree.structure(formats.m.trees(state.m)[0], is_leaf=is_box)
    numbered = treedef.unflatten(range(treedef.num_leaves))
    paths = [jax.tree_util.keystr(x) for x, _ in jax.tree.leaves_with_path(numbered)]
    fields = opened(state.moments)
    columns = formats.map(lambda f, field: f.split(treedef, field), fields)
    leaves = list(zip(paths, map(Moments, *columns), strict=True))
    for name, stored in leaves:
        check_countable(name, stored.m[0])
    return leaves


@functools.partial(jax.jit, static_argnums=(1, 2))
def _statistics(
    leaves: list[tuple[Moments[Stored], Coefficients]],
    formats: tuple[Moments[Format], ...],
    form: Form,
) -> Statistics:
    """Returns the statistics, as arrays: of all leaves together, then of each."""
    pairs = zip(formats, leaves, strict=True)
    measured = [
        _measure(f.map(lambda f, x: f.load(x), stored), k, form)
        for f, (stored, k) in pairs
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


def _measure(
    moments: Moments[jax.Array], k: Coefficients, form: Form
) -> tuple[jax.Array, ...]:
    """Returns, of each element, what is counted.

    The bit patterns of its skewness and its ratio, whether it has had a gradient, and
    if so, whether its term is clipped and whether its term is without effect.
    """
    m, v, s = (x.astype(k.c.m.dtype) for x in moments)
    seen = (m != 0) | (v != 0)
    size = jnp.abs(m * k.c.m)
    b = jnp.abs(form.term(v, s, k))
    ratio = b / jnp.where(b == 0, 1.0, size)
    sigma, large = _rule.standard_deviation(v, k)
    skewness = jnp.abs(_rule.skewness(sigma, s, k, form.skewness_power))
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


def _pattern(x: jax.Array, seen: jax.Array) -> jax.Array:
    """Returns integers in the order of x >= 0; then come NaN and what is not seen."""
    bits = lax.bitcast_convert_type(x.astype(jnp.float32), jnp.int32)
    return jnp.where(seen, bits & _LAST, _LAST)  # without the sign that a NaN may have


def _quantiles(patterns: list[tuple[jax.Array, ...]], elements: jax.Array) -> jax.Array:
    """Returns, of all leaves and of each, of both patterns, the median and the tail.

    A quantile is the smallest value with a share of q at or below it. Halving the range
    of the bit patterns finds it, in 31 passes and without a sort.
    """
    shares = jnp.array([[_MEDIAN, _TAIL]], jnp.float32)
    wanted = jnp.ceil(shares * elements[:, None])[:, None]

    def halve(_: Any, bounds: tuple[jax.Array, jax.Array]) -> Any:
        low, high = bounds
        middle = low + (high - low) // 2

        def below(i: int, leaf: tuple[jax.Array, ...]) -> list[jax.Array]:
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
