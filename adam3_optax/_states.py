"""Where states of AdaM3, or of Adam, are inside an optimizer's state."""

from collections.abc import Iterator, Mapping
from typing import Any

import jax
import optax

_INJECTED = (optax.InjectHyperparamsState, optax.InjectStatefulHyperparamsState)


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
