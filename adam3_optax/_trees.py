"""The trees that users pass: checks of them, and states inside of states."""

from collections.abc import Iterator, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.tree_util import PyTreeDef

from adam3_optax import _boxes

_INJECTED = (optax.InjectHyperparamsState, optax.InjectStatefulHyperparamsState)


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


def choices(mask: Any, params: Any) -> list[bool]:
    """Returns a mask's boolean for each parameter; None chooses all.

    Nothing but arrays is put into a tree like the parameters': there are classes that
    check what they hold.

    Raises:
        TypeError: A leaf of the mask is no boolean.
        ValueError: The mask is no tree like the parameters, nor a prefix of it.
    """
    treedef: PyTreeDef
    paths, treedef = jax.tree.flatten_with_path(True if mask is None else mask)
    for path, x in paths:
        check_boolean(path, x)
    try:
        parts = treedef.flatten_up_to(params)
    except ValueError as error:
        raise ValueError(
            f"mask must be a tree like params, or a prefix: {error}"
        ) from error
    return [
        bool(choice)
        for (_, choice), part in zip(paths, parts, strict=True)
        for _ in jax.tree.leaves(part, is_leaf=_boxes.is_box)
    ]


def leaves_like(treedef: PyTreeDef, tree: Any, name: str, model: str) -> list[Any]:
    """Returns the leaves of a tree that must be like another one, the model."""
    try:
        return treedef.flatten_up_to(tree)
    except ValueError as error:
        raise ValueError(f"{name} must be a tree like {model}: {error}") from error


def find(state: optax.OptState, kind: type) -> list[tuple[str, Any, Mapping[str, Any]]]:
    """Returns every state of a kind inside a state: in chains, masks and so on.

    Each comes with its path and the hyperparameters that are injected around it.
    """
    found = list(_walk("", state, {}, kind))
    if not found:
        raise ValueError(f"there is no {kind.__name__} in the optimizer's state")
    return found


def _walk(
    path: str, state: Any, known: Mapping[str, Any], kind: type
) -> Iterator[tuple[str, Any, Mapping[str, Any]]]:
    def is_node(x: object) -> bool:
        return isinstance(x, (kind, *_INJECTED))

    for keys, node in jax.tree.leaves_with_path(state, is_leaf=is_node):
        where = path + jax.tree_util.keystr(keys)
        if isinstance(node, kind):
            yield where, node, known
        elif isinstance(node, _INJECTED):
            inner = {**known, **node.hyperparams}
            yield from _walk(f"{where}.inner_state", node.inner_state, inner, kind)
