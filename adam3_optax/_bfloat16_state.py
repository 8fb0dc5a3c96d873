"""Averages in bfloat16: the state of any optimizer."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax import Array
from jax.tree_util import GetAttrKey

from adam3_optax import _rounding, _trees

# Fields of states that hold averages or sums of gradients, or of powers of them.
AVERAGES = (
    "mu|nu|nu_max|trace|ema|m|v|s|n|m1|m2|e_g|e_x|diff|exp_avg|exp_avg_sq|"
    "grad_sum|grad_sum_sq|sum_of_squares|v_row|v_col"
)


class BFloat16State(NamedTuple):
    """The state of `bfloat16_state`.

    Attributes:
        inner_state: That of the wrapped optimizer, with its averages in bfloat16.
        steps: How many were taken: int32, of shape (). Stays at its maximum.
    """

    inner_state: optax.OptState
    steps: Array


def bfloat16_state(
    inner: optax.GradientTransformation,
    where: Callable[[Any, Any], bool] | None = None,
) -> optax.GradientTransformationExtraArgs:
    """Stores the averages of any optimizer in bfloat16, right on average.

    Rounded to nearest, as by `mu_dtype`, an average of decay 0.997 or more freezes. So
    it is rounded stochastically. `inner` computes in float32.

    Args:
        inner: Any optimizer of Optax's kind. For `adam3w`, its `m_dtype`, `v_dtype` and
            `s_dtype` move fewer bytes.
        where: Which leaves of float32 with an axis become bfloat16: a function of a
            leaf's path in the inner state, and of the leaf. By default those in a tree
            like the parameters', in a field that `docs/low_precision.md` lists.

    Returns:
        A `GradientTransformationExtraArgs` with a `BFloat16State`. Updates, and their
        derivatives through steps, are those of `inner` but for the rounding.

    Raises:
        ValueError: At init, if nothing becomes bfloat16; at update, a state of others.
        TypeError: `inner` is no optimizer; at update, a state of another kind.

    Example:
        >>> import jax.numpy as jnp, optax
        >>> from adam3_optax import bfloat16_state
        >>> state = bfloat16_state(optax.lion(1e-4)).init(jnp.ones((2, 3)))
        >>> optax.tree.get(state, "mu").dtype.name
        'bfloat16'

    Source:
        `docs/low_precision.md`.
    """
    wrapped = _trees.optimizer(inner)

    def init(params: optax.Params) -> BFloat16State:
        state = wrapped.init(params)
        leaves, treedef = jax.tree.flatten(state)
        chosen = _chosen(state, jax.tree.structure(params), where)
        if not any(chosen) and any(map(_is_wide, jax.tree.leaves(params))):
            raise ValueError(
                "no leaf of inner's state is known as an average, so none would become "
                "bfloat16: leave out bfloat16_state, or choose leaves by its `where`"
            )
        new = [x.astype(jnp.bfloat16) if chosen[i] else x for i, x in enumerate(leaves)]
        return BFloat16State(jax.tree.unflatten(treedef, new), jnp.zeros((), jnp.int32))

    def leaves_of(params: optax.Params) -> Any:
        """Returns those of inner's own state, and of the one with narrow averages."""
        return [jax.tree.leaves(x) for x in (wrapped.init(params), init(params)[0])]

    def update(updates: Any, state: Any, params: Any = None, **extra_args: Any) -> Any:
        _trees.check_state(
            state, BFloat16State, "docs/low_precision.md has the way in."
        )
        own, made = jax.eval_shape(leaves_of, updates if params is None else params)
        old, treedef = jax.tree.flatten_with_path(state.inner_state)
        if [jnp.result_type(x) for _, x in old] != [x.dtype for x in made]:
            raise ValueError(f"the state is not as init makes it. {_trees.CAST}")
        steps = optax.safe_increment(state.steps)
        narrow = [own[i].dtype != x.dtype for i, x in enumerate(made)]
        wide = [
            x.astype(jnp.float32) if narrow[i] else x for i, (_, x) in enumerate(old)
        ]
        wide = jax.tree.unflatten(treedef, wide)
        us, inner_state = wrapped.update(updates, wide, params, **extra_args)
        new = _trees.leaves_like(treedef, inner_state, "the new state", "the old one")
        for i, (path, _) in enumerate(old):
            new[i] = _rounded(path, new[i], steps) if narrow[i] else new[i]
        return us, BFloat16State(jax.tree.unflatten(treedef, new), steps)

    return optax.GradientTransformationExtraArgs(init, update)


def _chosen(state: Any, params: Any, where: Any) -> list[bool]:
    """Returns, for each leaf of the inner state, whether it becomes bfloat16."""

    def is_like_params(x: Any) -> bool:
        """Returns whether x is the parameters' tree, of arrays or of lists of them."""
        try:
            parts = params.flatten_up_to(x)
        except ValueError:
            return False
        paths = [path for path, _ in jax.tree.leaves_with_path(parts)]
        return not any(isinstance(key, GetAttrKey) for path in paths for key in path)

    # The search for a field ends where the parameters' own fields begin.
    chosen = []
    for path, part in jax.tree.leaves_with_path(state, is_leaf=is_like_params):
        field = ([""] + [key.name for key in path if isinstance(key, GetAttrKey)])[-1]
        is_average = is_like_params(part) and re.fullmatch(AVERAGES, field)
        for keys, x in jax.tree.leaves_with_path(part):
            pick = where((*path, *keys), x) if where else is_average
            chosen.append(_is_wide(x) and bool(pick))
    return chosen


def _is_wide(x: Any) -> bool:
    return bool(jnp.ndim(x)) and jnp.result_type(x) == jnp.float32


def _rounded(path: Any, x: Array, steps: Array) -> Array:
    """Rounds an average to bfloat16, right on average, with the derivative of x."""
    bits = _rounding.random_bits(steps, _rounding.leaf_key(path, "state"), x)
    rounded = _rounding.to_bfloat16(x, bits).astype(jnp.float32)
    return _rounding.straight_through(x, rounded).astype(jnp.bfloat16)
