"""Where states of AdaM3, or of Adam, are inside an optimizer's state."""

from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import optax

_INJECTED = (optax.InjectHyperparamsState, optax.InjectStatefulHyperparamsState)


class Found(NamedTuple):
    """A state that was found, its path, and the hyperparameters injected around it."""

    path: str
    state: Any
    hyperparams: Mapping[str, Any]


def find(state: optax.OptState, kind: type) -> list[Found]:
    """Returns every state of a kind: in chains, masks, multi-step states and so on."""
    found = list(_walk(Found("", state, {}), kind))
    if not found:
        raise ValueError(f"there is no {kind.__name__} in the optimizer's state")
    return found


def _walk(outer: Found, kind: type) -> Any:
    """Yields the states of a kind inside another one."""

    def is_node(x: object) -> bool:
        return isinstance(x, (kind, *_INJECTED))

    for keys, node in jax.tree.leaves_with_path(outer.state, is_leaf=is_node):
        path = outer.path + jax.tree_util.keystr(keys)
        if isinstance(node, kind):
            yield Found(path, node, outer.hyperparams)
        elif isinstance(node, _INJECTED):
            known = {**outer.hyperparams, **node.hyperparams}
            yield from _walk(
                Found(f"{path}.inner_state", node.inner_state, known), kind
            )
