"""What the third moment does in a run: a pure function of the optimizer's state."""

import dataclasses
import math
from collections.abc import Mapping
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax import lax

from adam3_optax import _hyperparameters as hp
from adam3_optax import _rule
from adam3_optax._rule import ThirdMoment
from adam3_optax._storage import computed_in, format_of
from adam3_optax._transform import ScaleByAdam3State

MEDIAN, TAIL = 0.5, 0.999

_CHECKS: dict[str, hp.Check] = {
    "b1": hp.decay,
    "b2": hp.decay,
    "b3": hp.decay,
    "lam": hp.finite,
    "tau": hp.threshold,
}
_INJECTED = optax.InjectHyperparamsState | optax.InjectStatefulHyperparamsState
_LAST = 2**31 - 1  # beyond the bit pattern of every number and NaN of float32

_Rest = tuple[Any, ...]  # m, v and s of a leaf, at rest


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Statistics:
    """Of one leaf, or of all, over the elements that have had a gradient.

    Scalars of shape () and type float32; NaN where no element has had a gradient.

    Attributes:
        skewness: Median of |ŝ|/v̂^(3/2); of |ŝ|/v̂^(3/4) in the stabilized form.
        skewness_tail: Its .999 quantile.
        ratio: Median of |b_t|/|m̂|, the skewness term against the momentum.
        ratio_tail: Its .999 quantile; inf where m̂ is 0 and b_t is not.
        clipped: Share of elements whose term is clipped at tau.
        without_effect: Share of elements whose term is at most half a unit in the last
            place of m̂, so that m̂ + b_t rounds to m̂, or to its neighbour at most.
        elements: How many elements have had a gradient.
        state_bytes: Bytes in which m, v and s rest: a Python int.
    """

    skewness: jax.Array
    skewness_tail: jax.Array
    ratio: jax.Array
    ratio_tail: jax.Array
    clipped: jax.Array
    without_effect: jax.Array
    elements: jax.Array
    state_bytes: Any = dataclasses.field(metadata={"static": True})

    def _at(self, row: int) -> "Statistics":
        # Of the last axis, for `jax.vmap` over reports puts another before it.
        arrays = {f.name: getattr(self, f.name) for f in dataclasses.fields(self)}
        sizes = arrays.pop("state_bytes")
        chosen = {name: x[..., row] for name, x in arrays.items()}
        return Statistics(**chosen, state_bytes=sizes[row])

    def _floats(self) -> dict[str, float]:
        return {f.name: float(getattr(self, f.name)) for f in dataclasses.fields(self)}


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class ThirdMomentReport:
    """What `third_moment_report` found: a pytree, so that it leaves jit.

    Attributes:
        rows: Statistics with arrays in place of scalars: of all elements together, then
            of each leaf. `overall` and `leaves` take them apart.
        names: The path of each leaf in the parameters; where the state holds several
            states of AdaM3, after the path of its own.
        lam: The largest |lam| of these states at the step: 0 is Adam.
        third_moment: The form.
    """

    rows: Statistics
    lam: jax.Array
    names: tuple[str, ...] = dataclasses.field(metadata={"static": True})
    third_moment: ThirdMoment = dataclasses.field(metadata={"static": True})

    @property
    def overall(self) -> Statistics:
        """The statistics of all elements together."""
        return self.rows._at(0)

    @property
    def leaves(self) -> dict[str, Statistics]:
        """The statistics of each leaf, by its name."""
        return {name: self.rows._at(i) for i, name in enumerate(self.names, start=1)}

    def scalars(
        self, prefix: str = "third_moment/", *, leaves: bool = False
    ) -> dict[str, float]:
        """Returns the statistics as a flat dict of floats, for any logger.

        Args:
            prefix: Stands before each name, as in `third_moment/ratio`.
            leaves: Whether to add those of each leaf, as `third_moment/ratio['w']`.

        Returns:
            Eight floats, and eight more for each leaf.
        """
        report = jax.device_get(self)
        named = {"": report.overall, **(report.leaves if leaves else {})}
        return {
            f"{prefix}{name}{leaf}": value
            for leaf, statistics in named.items()
            for name, value in statistics._floats().items()
        }

    def table(self) -> str:
        """Returns a table as text: a line for each leaf, and one for all."""
        report = jax.device_get(self)
        headings = ("leaf", "elements", "skewness", "(tail)", "|b|/|m|", "(tail)")
        rows = [(*headings, "clipped", "no effect", "bytes")]
        for name, x in [*report.leaves.items(), ("all", report.overall)]:
            sizes = (x.skewness, x.skewness_tail, x.ratio, x.ratio_tail)
            shares = (x.clipped, x.without_effect)
            rows.append(
                (
                    name,
                    f"{int(x.elements):,}",
                    *(f"{float(size):.1e}" for size in sizes),
                    *(_percent(share) for share in shares),
                    f"{x.state_bytes:,}",
                )
            )
        widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
        return "\n".join(
            "  ".join(
                [row[0].ljust(widths[0]), *map(str.rjust, row[1:], widths[1:])],
            )
            for row in rows
        )

    def verdict(self) -> str:
        """Returns one sentence: whether the third moment does anything here.

        It says the first of these that holds: no element has had a gradient; NaN in .1%
        of elements or more; lam = 0; no effect on half of the elements or more; a
        median ratio |b_t|/|m̂| above 1; half or more clipped; one below .001; or else.
        """
        x = self.overall
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
            where = "" if silent == 1 else f" in {_percent(silent)} of the elements"
            remedy = (
                "a larger lam or tau, or more skewed gradients, would change that"
                if self.third_moment == "standardized"
                else "rescale the loss, or use third_moment='standardized'"
            )
            return (
                f"With these gradients the third moment changes nothing{where}: "
                f"{found}, .999 quantile {tail:.0e}; {remedy}."
            )
        if ratio > 1:
            return f"The skewness term outweighs the momentum: {found}."
        if clipped >= 0.5:
            return (
                f"The skewness term is clipped in {_percent(clipped)} of the elements, "
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
) -> ThirdMomentReport:
    """Measures what the third moment does, from the state after a step.

    Pure, and runs under jit. It sees the moments as they rest, from which the update
    was made. Quantiles are found by bisection: 31 passes over the elements that count
    and compare, with no sort, so that sharded leaves stay where they are. Temporary
    memory is 8 bytes an element. `docs/diagnostics.md` has the time measured; call it
    now and then, not at each step.

    A state does not know its hyperparameters, and with other ones these numbers would
    be wrong. So all must be given, as to the optimizer; but what is not given is taken
    from a state of `optax.inject_hyperparams` that holds a number of that name. They
    hold for every AdaM3 in the state: where several differ, pass their states one by
    one. So too with a state that is stacked over members of an ensemble: pass one
    member's.

    Args:
        state: An optimizer's state, with AdaM3's anywhere in it (in chains, masks,
            partitions, injected hyperparameters, multi-step states), at rest in any
            way, sharded in any way.
        b1: Decay of the first moment, as given to the optimizer.
        b2: Decay of the second moment.
        b3: Decay of the third moment.
        lam: Weight of the skewness term; a schedule is taken at the step that made the
            state.
        tau: Its threshold, likewise.
        third_moment: The form: `"cubic"`, `"stabilized"` or `"standardized"`.

    Returns:
        A `ThirdMomentReport`: statistics overall and of each leaf, with `scalars()`
        for a logger, `table()` to print, and `verdict()`, a sentence. Quantiles are
        those of the inverted distribution function, and infinite ratios (m̂ = 0) count
        as the largest. Counts above 2²⁴ are rounded to float32, so that a rank may be
        off by one in ten million for each leaf.

    Raises:
        ValueError: No AdaM3 state in `state`, or a stacked one; a hyperparameter
            missing or out of range; a leaf of 2³² elements or more; a moment of another
            type.
        TypeError: A hyperparameter that is no number.

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
    third_moment = hp.form(third_moment)
    chosen = {"b1": b1, "b2": b2, "b3": b3, "lam": lam, "tau": tau}
    given = {name: value for name, value in chosen.items() if value is not None}
    found = _states("", state, {})
    if not found:
        raise ValueError("there is no ScaleByAdam3State in the optimizer's state")
    names: list[str] = []
    rests: list[_Rest] = []
    scalars: list[_rule.Coefficients] = []
    indices: list[int] = []
    lams = []
    for path, adam3, injected in found:
        if jnp.ndim(adam3.count):
            raise ValueError(
                f"the state's count has shape {jnp.shape(adam3.count)}: it is of "
                "several optimizers; pass the state of one"
            )
        taken = jnp.maximum(adam3.count, 1)
        h = _hyperparameters(given, injected, taken - 1)
        lams.append(jnp.abs(jnp.asarray(h.lam, jnp.float32)))
        # Made here, from Python floats where they are known: 1 - b loses digits in jit.
        made: dict[Any, int] = {}
        for name, rest in _leaves(adam3):
            dtype = computed_in(*jax.tree.leaves(rest))
            if dtype not in made:
                made[dtype] = len(scalars)
                scalars.append(_rule.coefficients(h, taken, dtype))
            names.append((path + name if len(found) > 1 else name) or "params")
            rests.append(rest)
            indices.append(made[dtype])
    return ThirdMomentReport(
        _statistics(rests, scalars, tuple(indices), third_moment),
        jnp.max(jnp.stack(lams)),
        tuple(names),
        third_moment,
    )


def _states(
    path: str, state: optax.OptState, injected: Mapping[str, Any]
) -> list[tuple[str, ScaleByAdam3State, Mapping[str, Any]]]:
    """Returns every state of AdaM3, its path, and the hyperparameters around it."""

    def is_node(x: Any) -> bool:
        return isinstance(x, ScaleByAdam3State | _INJECTED)

    found = []
    nodes: Any = jax.tree.leaves_with_path(state, is_leaf=is_node)
    for keys, node in nodes:
        where = path + jax.tree_util.keystr(keys)
        if isinstance(node, ScaleByAdam3State):
            found.append((where, node, injected))
        elif isinstance(node, _INJECTED):
            inner = {**injected, **node.hyperparams}
            found += _states(f"{where}.inner_state", node.inner_state, inner)
    return found


def _hyperparameters(
    given: Mapping[str, Any], injected: Mapping[str, Any], count: jax.Array
) -> _rule.Hyperparameters:
    """Returns those of the step that made a state; what is given goes before."""
    missing = [name for name in _CHECKS if name not in given and name not in injected]
    if missing:
        raise ValueError(
            f"{', '.join(missing)} must be given, as to the optimizer: its state does "
            "not hold them"
        )
    known = {**injected, **given}
    values = {
        name: hp.at(check, name, hp.scheduled(check, name, known[name]), count)
        for name, check in _CHECKS.items()
    }
    return _rule.Hyperparameters(**values, eps=0.0, eps_root=0.0)


def _leaves(state: ScaleByAdam3State) -> list[tuple[str, _Rest]]:
    """Returns the path of each leaf, and its m, v and s at rest."""
    formats = [format_of(*pair) for pair in zip("mvs", state[:3], strict=True)]
    treedef = formats[0].structure(state.m)
    numbered = treedef.unflatten(range(treedef.num_leaves))
    paths: Any = jax.tree.leaves_with_path(numbered)
    fields = zip(formats, state[:3], strict=True)
    rests = zip(*(f.split(treedef, field) for f, field in fields), strict=True)
    pairs = zip(paths, rests, strict=True)
    leaves = [(jax.tree_util.keystr(path), rest) for (path, _), rest in pairs]
    for name, rest in leaves:
        if math.prod(formats[0].shape(rest[0])) >= 2**32:
            raise ValueError(
                f"params{name} has 2³² elements or more: too many to count"
            )
    return leaves


@partial(jax.jit, static_argnums=(2, 3))
def _statistics(
    rests: list[_Rest],
    scalars: list[_rule.Coefficients],
    indices: tuple[int, ...],
    third_moment: ThirdMoment,
) -> Statistics:
    """Returns the statistics, as arrays: of all leaves together, then of each."""
    pairs = zip(rests, indices, strict=True)
    measured = [_measure(rest, scalars[i], third_moment) for rest, i in pairs]
    counts = _table([_counts(list(x[2:])) for x in measured], 3)
    counts = jnp.concatenate([counts.sum(0, keepdims=True), counts])
    elements, clipped, without_effect = counts.T
    found = _quantiles([x[:2] for x in measured], elements)
    sizes = [_bytes(rest) for rest in rests]
    return Statistics(
        skewness=found[:, 0, 0],
        skewness_tail=found[:, 0, 1],
        ratio=found[:, 1, 0],
        ratio_tail=found[:, 1, 1],
        clipped=clipped / elements,
        without_effect=without_effect / elements,
        elements=elements,
        state_bytes=(sum(sizes), *sizes),
    )


def _measure(
    rest: _Rest, k: _rule.Coefficients, third_moment: ThirdMoment
) -> tuple[jax.Array, ...]:
    """Returns, of each element, what is counted.

    The bit patterns of its skewness and its ratio, whether it has had a gradient, and
    if so, whether its term is clipped, and whether the term is without effect.
    """
    pairs = zip("mvs", rest, strict=True)
    m, v, s = (format_of(*pair).load(pair[1]).astype(k.c1.dtype) for pair in pairs)
    seen = (m != 0) | (v != 0)
    size = jnp.abs(m * k.c1)
    b = jnp.abs(_rule.skewness_term(v, s, k, third_moment))
    ratio = b / jnp.where(b == 0, 1.0, size)
    # As in the rule: where v̂ is smaller, d³ has long underflowed.
    v_hat = v * k.c2
    small = v_hat <= 2.0**24 * jnp.finfo(v.dtype).tiny
    r = 1.0 / jnp.sqrt(jnp.where(small, 1.0, v_hat))
    # One factor after the other, for r³ alone overflows.
    skewness = jnp.abs(s * k.c3) * r
    skewness *= jnp.sqrt(r) if third_moment == "stabilized" else r * r
    skewness = jnp.where(small, 0.0, skewness)
    compared = skewness if third_moment == "standardized" else jnp.abs(s)
    # Not m̂ + b == m̂: the compiler may fuse the sum, and round it in another way.
    unit = jnp.nextafter(size, jnp.inf) - size
    return (
        _pattern(skewness, seen),
        _pattern(ratio, seen),
        seen,
        seen & (compared > k.tau),
        seen & (b <= unit / 2),
    )


def _pattern(x: jax.Array, seen: jax.Array) -> jax.Array:
    """Returns integers ordered as x >= 0 is, NaN at the end, then what is not seen."""
    bits = lax.bitcast_convert_type(x.astype(jnp.float32), jnp.int32)
    return jnp.where(seen, bits & _LAST, _LAST)  # NaN may have a sign


def _counts(masks: list[jax.Array]) -> list[jax.Array]:
    """Returns how many are true in each mask, exact before it is rounded to float32.

    In one pass for all, which compiles and runs many times faster than one for each. Of
    a sharded leaf, one number for each device is all that travels.
    """
    counted = lax.reduce(
        [mask.astype(jnp.uint32) for mask in masks],
        [jnp.uint32(0)] * len(masks),
        lambda x, y: [a + b for a, b in zip(x, y, strict=True)],
        range(masks[0].ndim),
    )
    return [count.astype(jnp.float32) for count in counted]


def _quantiles(patterns: list[tuple[jax.Array, ...]], elements: jax.Array) -> jax.Array:
    """Returns, of all leaves and of each, of both patterns, the median and the tail.

    A quantile is the smallest value with a share of q at or below it. Halving the range
    of the bit patterns finds it, in 31 passes and without a sort.
    """
    shares = jnp.array([[MEDIAN, TAIL]], jnp.float32)
    wanted = jnp.ceil(shares * elements[:, None])[:, None]

    def halve(_: Any, bounds: tuple[jax.Array, jax.Array]) -> Any:
        low, high = bounds
        middle = low + (high - low) // 2

        def below(i: int, leaf: tuple[jax.Array, ...]) -> list[jax.Array]:
            """Returns a leaf's counts at or below the bounds of all, and its own."""
            rows = (middle[0], middle[i])
            pairs = [(x, row[j]) for row in rows for j, x in enumerate(leaf)]
            return _counts([x <= two[q] for x, two in pairs for q in range(2)])

        found = [below(i, leaf) for i, leaf in enumerate(patterns, start=1)]
        counts = _table(found, 2, 2, 2)
        overall = counts[:, 0].sum(0, keepdims=True)
        counts = jnp.concatenate([overall, counts[:, 1]])
        enough = counts >= wanted
        return jnp.where(enough, low, middle + 1), jnp.where(enough, middle, high)

    shape = (len(patterns) + 1, 2, 2)
    bounds = jnp.zeros(shape, jnp.int32), jnp.full(shape, _LAST, jnp.int32)
    bits = lax.fori_loop(0, 31, halve, bounds)[1]
    found = lax.bitcast_convert_type(bits, jnp.float32)
    return jnp.where(elements[:, None, None] > 0, found, jnp.nan)


def _table(rows: list[list[jax.Array]], *shape: int) -> jax.Array:
    """Returns rows of counts as an array, also if there are none."""
    return jnp.array(rows, jnp.float32).reshape(-1, *shape)


def _bytes(rest: _Rest) -> int:
    """Returns the bytes in which the moments of a leaf rest."""
    return sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(rest))


def _percent(share: Any) -> str:
    """Returns a share in per cent; 0% and 100% are said of none and of all alone."""
    x = float(share)
    if math.isnan(x):
        return "nan"
    if x in (0, 1):
        return f"{x:.0%}"
    return "<0.1%" if x < 0.001 else ">99.9%" if x > 0.999 else f"{x:.1%}"
