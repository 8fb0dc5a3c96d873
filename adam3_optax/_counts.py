"""Counts over the elements of leaves, for the reports."""

import math
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax


def counts_of(masks: list[jax.Array]) -> list[jax.Array]:
    """Returns how many are true in each mask, exact before it is rounded to float32.

    One pass counts all masks, which compiles and runs many times faster than one pass
    each. Each device of a sharded leaf sends one number only.
    """
    counted = lax.reduce(
        [mask.astype(jnp.uint32) for mask in masks],
        [jnp.uint32(0)] * len(masks),
        lambda x, y: [a + b for a, b in zip(x, y, strict=True)],
        range(masks[0].ndim),
    )
    return [count.astype(jnp.float32) for count in counted]


def as_table(rows: list[list[jax.Array]], *shape: int) -> jax.Array:
    """Returns rows of counts as an array, also if there are none."""
    return jnp.array(rows, jnp.float32).reshape(-1, *shape)


def check_countable(name: str, x: Any) -> None:
    """Raises if a leaf has too many elements for a count of 32 bits."""
    shape = jnp.shape(x)
    known = all(isinstance(size, int) for size in shape)  # `jax.export` has others
    if known and math.prod(shape) >= 2**32:
        raise ValueError(f"params{name} has 2³² elements or more: too many to count")
