"""The trees that users pass: checks of them, and states inside of states."""

from collections.abc import Callable, Iterator, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.tree_util import PyTreeDef

CAST = "If it was cast, by a loader or optax.tree.cast, restore it in its dtypes."
_INJECTED = (optax.InjectHyperparamsState, optax.InjectStatefulHyperparamsState)


def optimizer(inner: Any) -> optax.GradientTransformationExtraArgs:
    """Returns a checked optimizer, as one that takes extra arguments."""
    if not (hasattr(inner, "init") and hasattr(inner, "update")):
        raise TypeError(f"inner must be an optimizer like optax.sgd(0.1): {inner!r}")
    return optax.with_extra_args_support(inner)


def check_state(state: Any, kind: type, remedy: str) -> None:
    """Raises if a state is not of a kind, or is of several optimizers."""
    if isinstance(state, str | dict):
        remedy = "A state dict is restored by flax.serialization.from_state_dict."
    if not isinstance(state, kind):
        raise TypeError(
            f"the state must be a {kind.__name__}, got {type(state).__name__}. Was it "
            f"made by this optimizer's init? {remedy}"
        )
    check_not_stacked(state)


def check_not_stacked(state: Any) -> None:
    """Raises if a state is of several optimizers, or if its count was cast."""
    count = state[-1]  # the last field of each of our states
    if jnp.ndim(count):
        raise ValueError(
            f"the state's count has shape {jnp.shape(count)}: it is the state of "
            "several optimizers, as made by jax.vmap. Use it inside jax.vmap."
        )
    dtype = jnp.result_type(count)
    if not jnp.issubdtype(dtype, jnp.integer):
        raise ValueError(f"the state's count must be an integer, not {dtype}. {CAST}")


def choices(mask: Any, params: Any) -> list[bool]:
    """Returns a mask's boolean for each parameter; None chooses all.

    Raises:
        TypeError: A leaf of the mask is no boolean, or has no value yet.
        ValueError: The mask is no tree like the parameters, nor a prefix of it.
    """
    mask = True if mask is None else mask
    for path, x in jax.tree.leaves_with_path(mask):
        dtype = getattr(x, "dtype", np.dtype(type(x)))
        is_boolean = np.dtype(bool) == dtype and np.shape(x) == ()
        if not is_boolean or isinstance(x, jax.core.Tracer):
            raise TypeError(
                f"mask{jax.tree_util.keystr(path)} must be a boolean that does not "
                f"depend on traced values, got {x!r}"
            )
    return [bool(x) for x in spread(mask, params, "mask")]


def spread(prefix: Any, params: Any, name: str) -> list[Any]:
    """Returns the leaf that a prefix of a tree has for each parameter.

    A list, for nothing but arrays is put into a tree like the parameters': there are
    classes that check what they hold.
    """
    leaves, treedef = jax.tree.flatten(prefix)
    parts = leaves_like(treedef, params, name, "params, or a prefix of it")
    pairs = zip(leaves, parts, strict=True)
    return [x for x, part in pairs for _ in jax.tree.leaves(part)]


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

    def walk(path: str, state: Any, known: Mapping[str, Any]) -> Iterator[Any]:
        for keys, node in jax.tree.leaves_with_path(
            state, is_leaf=lambda x: isinstance(x, (kind, *_INJECTED))
        ):
            where = path + jax.tree_util.keystr(keys)
            if isinstance(node, kind):
                yield where, node, known
            elif isinstance(node, _INJECTED):
                inner = {**known, **node.hyperparams}
                yield from walk(f"{where}.inner_state", node.inner_state, inner)

    found = list(walk("", state, {}))
    if not found:
        raise ValueError(f"there is no {kind.__name__} in the optimizer's state")
    return found


def replaced(state: optax.OptState, kind: type, convert: Callable[[Any], Any]) -> Any:
    """Returns a state, with every state of a kind inside of it converted."""

    def replace(x: Any) -> Any:
        return convert(x) if isinstance(x, kind) else x

    return jax.tree.map(replace, state, is_leaf=lambda x: isinstance(x, kind))


def place(path: Any, places: Any) -> tuple[str, Any]:
    """Returns a leaf's field in the inner state, and the path of its parameter.

    The path ends in both. A list of arrays for each parameter has no such place.
    """
    for i in range(1, len(path) + 1):
        if path[i:] in places and hasattr(path[i - 1], "name"):
            return path[i - 1].name, path[i:]
    return "", None
