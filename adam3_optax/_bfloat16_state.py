"""Averages in bfloat16: the state of any optimizer."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from optax import ScaleByRStdDevState

from adam3_optax import _formats, _remainder, _rounding, _trees, _xla
from adam3_optax._adam3 import ScaleByAdam3State, in_float32
from adam3_optax._bfloat16 import BFloat16ParametersState

# Fields of states that hold averages or sums of gradients, or of powers of them.
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


# Of the last one, the difference of averages is used. Rounded, it may be negative.
_LEFT = BFloat16State, ScaleByAdam3State, BFloat16ParametersState, ScaleByRStdDevState


def bfloat16_state(
    inner: optax.GradientTransformation,
    where: Callable[[Any, Any], bool] | None = None,
) -> optax.GradientTransformationExtraArgs:
    """Stores the averages of any optimizer in bfloat16, right on average.

    Rounded to nearest, as by `mu_dtype`, an average of decay 0.997 or more freezes. So
    it is rounded stochastically. `inner` computes in float32, whatever it is given.

    Args:
        inner: Any optimizer of Optax's kind but `adam3w`, which has its own `m_dtype`.
        where: `where(path, array)` says whether an array of the inner state, of float32
            and with an axis, is an average; it may use the shape. By default it is what
            stands for a parameter, in a field that `docs/low_precision.md` lists.

    Returns:
        A `GradientTransformationExtraArgs` with a `BFloat16State`. Updates have the
        gradients' dtype; with their derivatives they are those of `inner`.

    Raises:
        ValueError: At init, no averages, or `bfloat16_parameters` inside.
        TypeError: `inner` is no optimizer; at update, a state of another kind.

    Example:
        >>> import adam3_optax, jax.numpy as jnp, optax
        >>> state = adam3_optax.bfloat16_state(optax.lion(1e-4)).init(jnp.ones((2, 3)))
        >>> optax.tree.get(state, "mu").dtype.name
        'bfloat16'
    """
    inner = in_float32(_trees.optimizer(inner))

    def init(params: optax.Params) -> BFloat16State:
        state = inner.init(jax.tree.map(_formats.widened, params))
        paths = _averages(state, params, where)
        if not paths and any(map(np.ndim, jax.tree.leaves(params))):
            raise ValueError(
                "inner's state has no averages of float32. Choose leaves by `where`; "
                "for adam3w use m_dtype; wrap once, inside of flatten and lookahead"
            )
        new = _mapped(lambda _, x: x.astype(jnp.bfloat16), state, paths)
        return BFloat16State(new, jnp.zeros((), jnp.int32))

    def update(updates: Any, state: Any, params: Any = None, **extra_args: Any) -> Any:
        _trees.check_state(state, BFloat16State, "docs/low_precision.md has the way in")
        steps = optax.safe_increment(state.steps)
        like = updates if params is None else params
        paths = _averages(state.inner_state, like, where)

        def stored(path: Any, x: Any) -> Any:
            key = _rounding.leaf_key(path, "state")
            return _remainder.split(x.astype(jnp.float32), None, steps, key)[0]

        old = _mapped(lambda _, x: x.astype(jnp.float32), state.inner_state, paths)
        params = jax.tree.map(_formats.widened, params)
        us, new = inner.update(updates, old, params, **extra_args)
        new = _mapped(stored, new, paths)
        us = jax.lax.platform_dependent(us, new, tpu=_xla.after, default=lambda u, _: u)
        return us, BFloat16State(new, steps)

    return optax.GradientTransformationExtraArgs(init, update)


def _averages(state: Any, params: Any, where: Any) -> set[Any]:
    """Returns the paths of a state's averages."""
    places = {path for path, _ in jax.tree.leaves_with_path(params)}

    def is_average(path: Any, x: Any) -> Any:
        if isinstance(x, BFloat16ParametersState):
            raise ValueError("put bfloat16_parameters around bfloat16_state")
        can = getattr(x, "ndim", 0) and x.dtype in (jnp.float32, jnp.bfloat16)
        field, _ = _trees.place(path, places)
        return can and (where(path, x) if where else _AVERAGES.fullmatch(field))

    leaves = jax.tree.leaves_with_path(state, is_leaf=lambda x: isinstance(x, _LEFT))
    return {path for path, x in leaves if is_average(path, x)}


def _mapped(f: Any, tree: Any, paths: set[Any]) -> Any:
    return jax.tree.map_with_path(lambda p, x: f(p, x) if p in paths else x, tree)
