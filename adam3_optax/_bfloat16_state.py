"""Averages in bfloat16: the state of any optimizer."""

from __future__ import annotations

import operator
import re
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.tree_util import keystr

from adam3_optax import _remainder, _rounding, _trees, _xla
from adam3_optax._adam3 import ScaleByAdam3State

# Fields of states that hold averages or sums of gradients, or of powers of them.
_AVERAGES = re.compile(
    "mu|nu|nu_max|trace|m|v|s|n|m1|m2|e_g|e_x|exp_avg|exp_avg_sq|"
    "grad_sum_sq|sum_of_squares|v_row|v_col"
)
_TYPES = jnp.float32, jnp.bfloat16


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
    """Stores the averages of any optimizer in bfloat16, right on average.

    Rounded to nearest, as by `mu_dtype`, an average of decay 0.997 or more freezes. So
    it is rounded stochastically, and `inner` computes in float32.

    Args:
        inner: Any optimizer of Optax's kind but `adam3w`, which has its own `m_dtype`.
        where: `where(path, array)` says whether an array of the inner state is an
            average. It is called for arrays of float32 and bfloat16 that have an axis,
            and may use their shapes. By default an average is what stands for a
            parameter, in a field that `docs/low_precision.md` lists.

    Returns:
        A `GradientTransformationExtraArgs` with a `BFloat16State`. Updates and their
        derivatives are those of `inner`, from averages that were rounded.

    Raises:
        ValueError: At init, a state without averages; at update, averages of float32.
        TypeError: `inner` is no optimizer; at update, a state of another kind.

    Example:
        >>> import adam3_optax, jax.numpy as jnp, optax
        >>> state = adam3_optax.bfloat16_state(optax.lion(1e-4)).init(jnp.ones((2, 3)))
        >>> optax.tree.get(state, "mu").dtype.name
        'bfloat16'
    """
    inner = _trees.optimizer(inner)

    def init(params: optax.Params) -> BFloat16State:
        state = inner.init(params)
        new = _averages(state, params, where, lambda path, x: x.astype(jnp.bfloat16))
        stays = map(operator.is_, jax.tree.leaves(state), jax.tree.leaves(new))
        if all(stays) and any(map(_is_wide, jax.tree.leaves(params))):
            raise ValueError(
                "inner's state has no averages for bfloat16. Choose leaves by `where`; "
                "for adam3w use m_dtype; put this inside of optax.flatten and lookahead"
            )
        return BFloat16State(new, jnp.zeros((), jnp.int32))

    def update(updates: Any, state: Any, params: Any = None, **extra_args: Any) -> Any:
        _trees.check_state(state, BFloat16State, "docs/low_precision.md has the way in")
        steps = optax.safe_increment(state.steps)
        params_like = updates if params is None else params

        def widened(path: Any, x: Any) -> Any:
            if _is_wide(x):
                raise ValueError(f"inner_state{keystr(path)} is float32. {_trees.CAST}")
            return x.astype(jnp.float32)

        def rounded(path: Any, x: Any) -> Any:
            key = _rounding.leaf_key(path, "state")
            return _remainder.split(x, None, steps, key)[0] if _is_wide(x) else x

        old = _averages(state.inner_state, params_like, where, widened)
        us, new = inner.update(updates, old, params, **extra_args)
        new = _averages(new, params_like, where, rounded)
        us = jax.lax.platform_dependent(us, new, tpu=_xla.after, default=lambda u, _: u)
        return us, BFloat16State(new, steps)

    return optax.GradientTransformationExtraArgs(init, update)


def _averages(state: Any, params: Any, where: Any, f: Any) -> Any:
    """Returns a state with f(path, x) in place of each average x."""
    places = {path for path, _ in jax.tree.leaves_with_path(params)}
    own = BFloat16State, ScaleByAdam3State  # have formats of their own

    def replaced(path: Any, x: Any) -> Any:
        can = not isinstance(x, own) and np.ndim(x) and jnp.result_type(x) in _TYPES
        field, _ = _trees.place(path, places)
        pick = where or (lambda path, x: _AVERAGES.fullmatch(field))
        return f(path, x) if can and pick(path, x) else x

    return jax.tree.map_with_path(replaced, state, is_leaf=lambda x: isinstance(x, own))


def _is_wide(x: Any) -> bool:
    return bool(np.ndim(x)) and jnp.result_type(x) == jnp.float32
