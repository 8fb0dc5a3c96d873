"""Averages in bfloat16: the state of any optimizer."""

from __future__ import annotations

import functools
import re
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax.tree_util import GetAttrKey

from adam3_optax import _remainder, _rounding, _trees

# Fields of states that hold averages or sums of gradients, or of powers of them.
AVERAGES = re.compile(
    "mu|nu|nu_max|trace|ema|m|v|s|n|m1|m2|e_g|e_x|exp_avg|exp_avg_sq|"
    "grad_sum_sq|sum_of_squares|v_row|v_col"
)


class BFloat16State(NamedTuple):
    """The state of `bfloat16_state`.

    Attributes:
        inner_state: That of the wrapped optimizer, with its averages in bfloat16.
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
        inner: Any optimizer of Optax's kind. Give `adam3w` its `m_dtype`, `v_dtype` and
            `s_dtype` instead: they move fewer bytes.
        where: Which leaves of float32 with an axis become bfloat16, by a leaf's path in
            the inner state and the leaf. By default those in a tree like the
            parameters', in a field that `docs/low_precision.md` lists.

    Returns:
        A `GradientTransformationExtraArgs` with a `BFloat16State`. Updates and their
        derivatives are those of `inner`, from averages that were rounded.

    Raises:
        ValueError: At init, nothing becomes bfloat16; at update, a state does not fit.
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
    inner = _trees.optimizer(inner)

    def narrowed(params: optax.Params) -> Any:
        """Returns a new inner state's leaves, and these with averages in bfloat16."""
        leaves, treedef = jax.tree.flatten(state := inner.init(params))
        chosen = _chosen(state, jax.tree.structure(params), where)
        if not any(chosen) and any(map(_is_wide, jax.tree.leaves(params))):
            raise ValueError(
                "no leaf of inner's state is known as an average, so none would become "
                "bfloat16: leave out bfloat16_state, or choose leaves by its `where`"
            )
        new = [x.astype(jnp.bfloat16) if chosen[i] else x for i, x in enumerate(leaves)]
        return leaves, new, treedef

    def init(params: optax.Params) -> BFloat16State:
        _, leaves, treedef = narrowed(params)
        state = jax.tree.unflatten(treedef, leaves)
        return BFloat16State(state, jnp.zeros((), jnp.int32))

    def update(updates: Any, state: Any, params: Any = None, **extra_args: Any) -> Any:
        _trees.check_state(state, BFloat16State, "docs/low_precision.md has the way in")
        like = updates if params is None else params
        wide, made = jax.eval_shape(lambda like: narrowed(like)[:2], like)
        leaves, treedef = jax.tree.flatten(state.inner_state)
        if [jnp.result_type(x) for x in leaves] != [x.dtype for x in made]:
            raise ValueError(f"the state is not as init makes it. {_trees.CAST}")
        steps = optax.safe_increment(state.steps)
        leaves = [x.astype(wide[i].dtype) for i, x in enumerate(leaves)]
        old = jax.tree.unflatten(treedef, leaves)
        us, new = inner.update(updates, old, params, **extra_args)
        for i, (path, x) in enumerate(jax.tree.leaves_with_path(new)):
            stays = wide[i].dtype == made[i].dtype
            key = _rounding.leaf_key(path, "state")
            leaves[i] = x if stays else _remainder.split(x, None, steps, key)[0]
        new = jax.tree.unflatten(treedef, leaves)
        # A CPU writes each array in a kernel of its own, whatever waits for what.
        us = jax.lax.platform_dependent(us, new, cpu=lambda us, _: us, default=_after)
        return us, BFloat16State(new, steps)

    return optax.GradientTransformationExtraArgs(init, update)


def _chosen(state: Any, params: Any, where: Any) -> list[bool]:
    """Returns, for each leaf of the inner state, whether it becomes bfloat16."""
    is_like, chosen = functools.partial(_is_like, params), []
    # The search for a field ends where the parameters' own fields begin.
    for path, tree in jax.tree.leaves_with_path(state, is_leaf=is_like):
        fields = ["", *(key.name for key in path if isinstance(key, GetAttrKey))]
        is_average = is_like(tree) and AVERAGES.fullmatch(fields[-1])
        for keys, x in jax.tree.leaves_with_path(tree):
            pick = where((*path, *keys), x) if where else is_average
            chosen.append(_is_wide(x) and bool(pick))
    return chosen


def _after(updates: Any, state: Any) -> Any:
    """Returns updates that wait for the averages, and are NaN where these are.

    So a TPU writes both in one kernel. Else it would read all of the state twice.
    """
    us, treedef = jax.tree.flatten(updates)
    is_like = functools.partial(_is_like, treedef)
    for tree in filter(is_like, jax.tree.leaves(state, is_leaf=is_like)):
        for i, x in enumerate(_trees.leaves_like(treedef, tree, "state", "updates")):
            if getattr(x, "dtype", 0) == jnp.bfloat16 and x.shape == us[i].shape:
                us[i] = jnp.where(jnp.isnan(x), jnp.nan, us[i])
    return jax.tree.unflatten(treedef, us)


def _is_like(params: Any, x: Any) -> bool:
    """Returns whether x is the parameters' tree, with arrays or lists of them."""
    try:
        parts = jax.tree.leaves_with_path(params.flatten_up_to(x))
    except ValueError:
        return False
    return not any(isinstance(key, GetAttrKey) for path, _ in parts for key in path)


def _is_wide(x: Any) -> bool:
    return bool(jnp.ndim(x)) and jnp.result_type(x) == jnp.float32
