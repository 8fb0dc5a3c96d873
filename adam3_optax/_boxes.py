"""Boxes: how Flax and haliax put sharding metadata around an array of parameters."""

import sys
from typing import Any

import jax

_KINDS = (
    ("flax.core.meta", "AxisMetadata"),  # Linen
    ("flax.nnx", "Variable"),
    ("haliax", "NamedArray"),
)


def is_box(x: object) -> bool:
    """Returns whether x is a box that holds one array."""
    return _is_known(x) and len(jax.tree.leaves(x)) == 1


def is_place(x: object) -> bool:
    """Returns whether x is the place of one gradient: None, or a box of at most one.

    A box may be empty: it holds None, or what `optax.masked` leaves to others.
    """
    return x is None or (_is_known(x) and len(jax.tree.leaves(x)) < 2)


def opened(tree: Any) -> Any:
    """Returns a tree with arrays in place of the boxes that hold them."""
    places = jax.tree.structure(tree, is_leaf=is_box)
    return jax.tree.unflatten(places, jax.tree.leaves(tree))


def refilled(tree: Any, arrays: Any) -> Any:
    """Returns a tree with its boxes around other arrays: the inverse of `opened`.

    The arrays may come as a list. Where the tree has none, neither may they.
    """
    return jax.tree.unflatten(jax.tree.structure(tree), jax.tree.leaves(arrays))


def _is_known(x: object) -> bool:
    # Not imported: if its module is not loaded, there is no such box.
    kinds = [getattr(sys.modules.get(module), name, ()) for module, name in _KINDS]
    return isinstance(x, tuple(kind for kind in kinds if kind))
