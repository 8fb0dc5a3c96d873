"""Measures how many updates are lost when they are added to the parameters."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
import optax
from jax import Array, lax

from adam3_optax import _boxes
from adam3_optax._formats import computed_in
from adam3_optax._reports import Report, check_countable, counts_of, percent
from adam3_optax._trees import leaves_like


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class LostUpdates:
    """The lost updates of one leaf, or of all leaves.

    Only finite parameters whose update is not 0 count. The fields are scalars of shape
    () and type float32. They are NaN where nothing counts.

    Attributes:
        lost: Share of updates that round away: the parameter stays what it is.
        elements: How many updates count.
    """

    lost: Array
    elements: Array


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class LostUpdatesReport(Report):
    """What `lost_updates_report` found."""

    topic = "updates"
    columns = (
        ("updates", lambda x: f"{int(x.elements):,}"),
        ("lost", lambda x: percent(x.lost)),
    )

    def verdict(self) -> str:
        """Returns one sentence: whether this run loses updates.

        It says the first of these that holds: all updates are 0; 1% or more are lost;
        neither.
        """
        x = self.on_host().overall
        if not float(x.elements):
            return "All updates are 0: there is nothing to say."
        if float(x.lost) >= 0.01:
            return (
                f"{percent(x.lost)} of the updates are lost when they are added to the "
                "parameters; adam3_optax.bfloat16_parameters keeps what is rounded off."
            )
        return "The updates arrive: fewer than 1% of them are lost."


def lost_updates_report(
    params: optax.Params, updates: optax.Updates
) -> LostUpdatesReport:
    """Measures how many updates round away when they are added to the parameters.

    A bfloat16 parameter does not change if its update is below 1/512 of it. Of every
    other update at least half arrives, because sums are rounded to nearest. Pass the
    parameters before a step, and the updates of any optimizer, before
    `optax.apply_updates` adds them. The function is pure and runs under jit.

    `bfloat16_parameters` emits updates that arrive. To learn what it saves, give it the
    updates of its inner optimizer, or the difference of `to_float32_parameters` before
    and after a step.

    Args:
        params: The parameters before the step, of bfloat16, float32 or float64.
        updates: A tree like them. Where it has None, nothing is counted.

    Returns:
        A `LostUpdatesReport`: shares overall and of each leaf, with `scalars()` for a
        logger, `table()` to print, and `verdict()`, a sentence.

    Raises:
        ValueError: Updates of another structure or shape; parameters of another dtype;
            a leaf of 2³² elements or more.

    Example:
        A bfloat16 next to 1 is 1.0078; an update of 0.001 does not reach it.

        >>> import jax.numpy as jnp
        >>> from adam3_optax import lost_updates_report
        >>> params = {"w": jnp.ones(8, jnp.bfloat16), "b": jnp.ones(8)}
        >>> updates = {"w": jnp.full(8, 1e-3), "b": jnp.full(8, 1e-3)}
        >>> report = lost_updates_report(params, updates)
        >>> report.verdict()[:29]
        '50.0% of the updates are lost'
        >>> float(report.leaves["['w']"].lost)
        1.0

    Source:
        `docs/low_precision.md`.
    """
    leaves, treedef = jax.tree.flatten_with_path(_boxes.opened(params))
    us = leaves_like(treedef, _boxes.opened(updates), "updates", "params")
    names, pairs = [], []
    for (path, param), u in zip(leaves, us, strict=True):
        if not jax.tree.leaves(u):
            continue
        name = jax.tree_util.keystr(path)
        param, u = jnp.asarray(param), jnp.asarray(u)
        if u.shape != param.shape:
            raise ValueError(f"updates{name} has shape {u.shape}, not {param.shape}")
        if param.dtype not in (jnp.bfloat16, jnp.float32, jnp.float64):
            raise ValueError(
                f"params{name} must be bfloat16, float32 or float64, got {param.dtype}"
            )
        check_countable(name, param)
        names.append(name or "params")
        pairs.append((param, u))
    # NaN is a result here, not a fault.
    with jax.debug_nans(False):
        return LostUpdatesReport(_shares(pairs), tuple(names))


@jax.jit
def _shares(pairs: list[tuple[Array, Array]]) -> LostUpdates:
    """Returns the shares, as arrays: of all leaves together, then of each."""
    masks = []
    for param, u in pairs:
        dtype, kind = computed_in(param, u), jnp.finfo(param.dtype)
        old, u = param.astype(dtype), u.astype(dtype)
        # Rounded as the parameter is. XLA on a GPU would drop a conversion and back.
        new = lax.reduce_precision(old + u, kind.nexp, kind.nmant)
        counted = (u != 0) & jnp.isfinite(old)
        masks.append([counted, counted & (new == old)])
    elements, lost = counts_of(masks, 2).T
    return LostUpdates(lost / elements, elements)
