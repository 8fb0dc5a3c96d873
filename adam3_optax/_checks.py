"""Checks of the states and trees that users pass."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from adam3_optax import _boxes


def check_state(state: Any, kind: type, remedy: str) -> None:
    """Raises if a state is not of a kind, or is of several optimizers."""
    if not isinstance(state, kind):
        raise TypeError(
            f"the state must be a {kind.__name__}, got {type(state).__name__}. Was it "
            f"made by this optimizer's init? {remedy}"
        )
    check_not_stacked(state)


def check_not_stacked(state: Any) -> None:
    """Raises if a state is of several optimizers."""
    if jnp.ndim(state.count):
        raise ValueError(
            f"the state's count has shape {jnp.shape(state.count)}: it is the state of "
            "several optimizers, as made by jax.vmap. Use it inside jax.vmap."
        )


def check_boolean(path: tuple[Any, ...], x: Any) -> None:
    """Raises if a leaf of a mask is no boolean, or has no value yet."""
    dtype = getattr(x, "dtype", np.dtype(type(x)))
    is_boolean = np.dtype(bool) == dtype and np.shape(x) == ()
    if not is_boolean or isinstance(x, jax.core.Tracer):
        raise TypeError(
            f"mask{jax.tree_util.keystr(path)} must be a boolean that does not depend "
            f"on traced values, got {x!r}"
        )


def full_mask(mask: Any, params: Any) -> Any:
    """Returns a mask with a boolean for each parameter.

    Raises:
        TypeError: A leaf of the mask is no boolean.
        ValueError: The mask is no tree like the parameters, nor a prefix of it.
    """
    jax.tree.map_with_path(check_boolean, mask)
    try:
        return jax.tree.map(
            lambda choice, part: jax.tree.map(
                lambda _: bool(choice), part, is_leaf=_boxes.is_box
            ),
            mask,
            params,
        )
    except ValueError as error:
        raise ValueError(
            f"mask must be a tree like params, or a prefix: {error}"
        ) from error


def leaves_like(treedef: Any, tree: Any, name: str, model: str) -> list[Any]:
    """Returns the leaves of a tree that must be like another one, the model."""
    try:
        leaves: list[Any] = treedef.flatten_up_to(tree)
    except ValueError as error:
        raise ValueError(f"{name} must be a tree like {model}: {error}") from error
    return leaves
