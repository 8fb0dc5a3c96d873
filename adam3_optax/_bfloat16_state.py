"""Averages in bfloat16: the state of any optimizer."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from adam3_optax import _adam3, _bfloat16, _formats, _remainder, _rounding, _trees, _xla

# Fields of states that may be rounded: averages, sums and maxima.
_AVERAGES = re.compile(
    "mu|nu|nu_max|trace|ema|m|v|s|n|m1|m2|e_g|e_x|exp_avg|exp_avg_sq|"
    "grad_sum_sq|sum_of_squares|v_row|v_col"
)


class BFloat16State(NamedTuple):
    """The state of `bfloat16_state`.

    Attributes:
        inner_state: The state of the wrapped optimizer, with averages in bfloat16.
        steps: How many were taken: int32, of shape (). Stays at its maximum.
    """

    inner_state: optax.OptState
    steps: jax.Array


def bfloat16_state(
    inner: optax.GradientTransformation,
    where: Callable[[Any, Any], bool] | None = None,
) -> optax.GradientTransformationExtraArgs:
    """Stores the averages of any optimizer in bfloat16.

    Rounded to nearest, as by `mu_dtype`, slow averages stop short of their target. So
    they are rounded stochastically. `inner` always computes in float32 or wider.

    Args:
        inner: Any optimizer of Optax's kind that has averages.
        where: `where(path, leaf)` says whether a leaf of the inner state is an average.
            It gets `ShapeDtypeStruct`s of float32 with an axis. By default averages are
            the fields that `docs/low_precision.md` lists, where they have a parameter.

    Returns:
        A `GradientTransformationExtraArgs` with a `BFloat16State`. Updates have the
        gradients' dtype, and come from rounded averages. Derivatives ignore rounding.

    Raises:
        ValueError: At init, no averages, or `bfloat16_parameters` inside; at update, a
            state that was cast, or is of several optimizers.
        TypeError: `inner` is no optimizer, `where` no function; another kind of state.

    Example:
        >>> import adam3_optax, jax.numpy as jnp, optax
        >>> state = adam3_optax.bfloat16_state(optax.lion(1e-4)).init(jnp.ones((2, 3)))
        >>> optax.tree.get(state, "mu").dtype.name
        'bfloat16'
    """
    inner = _adam3.in_float32(_trees.optimizer(inner))
    if where is not None and not callable(where):
        raise TypeError(f"where must be a function of path and leaf: {where!r}")

    def init(params: optax.Params) -> BFloat16State:
        params = jax.tree.map(_formats.widened, params)
        state = inner.init(params)
        paths = _chosen(state, params, where)
        if not paths and _chosen(params, params, lambda path, x: True):
            raise ValueError(
                "inner has no averages for bfloat16, unless `where` chooses some. For "
                "adam3w use m_dtype. Put this inside of optax.flatten and lookahead."
            )
        new = _mapped(lambda _, x: x.astype(jnp.bfloat16), state, paths)
        return BFloat16State(new, jnp.zeros((), jnp.int32))

    def update(updates: Any, state: Any, params: Any = None, **extra_args: Any) -> Any:
        _trees.check_state(state, BFloat16State, "docs/low_precision.md has the way in")
        steps = optax.safe_increment(state.steps)
        paths = _chosen(state.inner_state, updates, where)

        def rounded(path: Any, x: Any) -> Any:
            key = _rounding.leaf_key(path, "state")
            return _remainder.split(x.astype(jnp.float32), None, steps, key)[0]

        old = _mapped(lambda _, x: x.astype(jnp.float32), state.inner_state, paths)
        params = jax.tree.map(_formats.widened, params)
        us, new = inner.update(updates, old, params, **extra_args)
        new = _mapped(rounded, new, paths)
        us = jax.lax.platform_dependent(us, new, tpu=_xla.after, default=lambda u, _: u)
        return us, BFloat16State(new, steps)

    return optax.GradientTransformationExtraArgs(init, update)


def _chosen(state: Any, params: Any, where: Any) -> set[Any]:
    """Returns the paths of the leaves that become bfloat16."""
    places, found = {path for path, _ in jax.tree.leaves_with_path(params)}, set()
    for path, x in jax.tree.leaves_with_path(state, is_leaf=_is_kept):
        if isinstance(x, _bfloat16.BFloat16ParametersState):
            raise ValueError("put bfloat16_parameters around bfloat16_state")
        if getattr(x, "ndim", 0) and x.dtype in (jnp.float32, jnp.bfloat16):
            field, _ = _trees.place(path, places)
            leaf = jax.ShapeDtypeStruct(x.shape, jnp.float32)
            if where(path, leaf) if callable(where) else _AVERAGES.fullmatch(field):
                found.add(path)
    return found


def _is_kept(x: Any) -> bool:
    # The last are standard deviations, from a difference that rounding makes negative.
    own = BFloat16State, _bfloat16.BFloat16ParametersState, _adam3.ScaleByAdam3State
    return isinstance(x, own) or type(x).__name__.startswith("ScaleByRStdDev")


def _mapped(f: Any, tree: Any, paths: set[Any]) -> Any:
    return jax.tree.map_with_path(lambda p, x: f(p, x) if p in paths else x, tree)
