"""Stochastic rounding: random bits from integers alone, and float32 to bfloat16."""

import math
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from adam3_optax._rule import Moments

Key = np.ndarray  # two numbers of 32 bits


def leaf_key(leaf: int, purpose: int = 0) -> Key:
    """Returns the key of a leaf, odd numbers: each rounds with bits of its own.

    Purposes are 0, the moments; 1, the parameters; and 2, their way into bfloat16.
    """
    return np.random.SeedSequence((leaf, purpose)).generate_state(2) | np.uint32(1)


def random_bits(
    count: jax.typing.ArrayLike, key: Key | jax.typing.ArrayLike, like: jax.Array
) -> jax.Array:
    """Returns 32 random bits for each element; the upper 24 are good.

    They have the shape of `like`, and its sharding.

    They depend on the count (1 or more), the key and the element's index alone. So the
    state holds no key, a resumed run repeats the straight one, and all shards and
    replicas agree. This is integer arithmetic, which XLA fuses and every backend
    supports.
    """
    count = jnp.asarray(count).astype(jnp.uint32)
    seed = _mix(count)
    # Use one of the key's two numbers: which one depends on the count, so XLA cannot
    # compute it ahead of time. If it could, each leaf's kernel would contain a constant
    # of its own, leaves of one shape could not share a kernel, and 1,000 leaves would
    # compile several times slower.
    own = lax.dynamic_index_in_dim(jnp.asarray(key), count % 2, keepdims=False)
    # Start from the leaf's own number. If leaves shared a sum of the seed and the rows,
    # XLA on a GPU would merge their kernels, and take twice as long to compile.
    index = seed * own
    # On explicit meshes a sharding is part of a type. Without it each device would
    # compute the bits of the whole leaf.
    where = jax.typeof(like).sharding
    for axis in range(like.ndim):
        stride = _product(like.shape[axis + 1 :])
        along = lax.broadcasted_iota(jnp.uint32, like.shape, axis, out_sharding=where)
        index += along * stride
    return _mix(index)


def for_moments(bits: jax.Array) -> Moments[jax.Array]:
    """Returns random bits for each moment, from one draw.

    If it is multiplied by odd numbers, the upper bits, which rounding uses, have
    nothing to do with each other.
    """
    return Moments(bits, bits * np.uint32(0x9E3779B1), bits * np.uint32(0x85EBCA77))


def _product(sizes: Sequence[Any]) -> jax.Array:
    """Returns the product of sizes modulo 2³²; some may be symbolic (`jax.export`)."""
    known = [size for size in sizes if isinstance(size, int)]
    product = jnp.uint32(math.prod(known) % 2**32)
    for size in sizes:
        if not isinstance(size, int):
            product *= jnp.asarray(size).astype(jnp.uint32)
    return product


def _mix(x: jax.Array) -> jax.Array:
    """Scatters 32 bits: the `lowbias32` finalizer found by C. Wellons."""
    x = (x ^ (x >> 16)) * jnp.uint32(0x7FEB352D)
    x = (x ^ (x >> 15)) * jnp.uint32(0x846CA68B)
    return x ^ (x >> 16)


def to_bfloat16(x: jax.Array, bits: jax.Array) -> jax.Array:
    """Rounds float32 to one of its two bfloat16 neighbours, and to x on average."""
    # The upper half of a float32 is a bfloat16. If 16 random bits are added to the
    # lower half, it carries into the upper one with exactly the right probability.
    pattern = lax.bitcast_convert_type(x, jnp.uint32)
    size = pattern & 0x7FFFFFFF  # without the sign, patterns are in the order of |x|
    carried = pattern + jnp.where(size < _LARGEST, bits >> 16, 0)
    rounded = lax.bitcast_convert_type((carried >> 16).astype(jnp.uint16), jnp.bfloat16)
    # A NaN may be a NaN by its lower half alone, which is cut off. So NaN is chosen
    # explicitly. The choice comes last because XLA on a CPU repeats a conversion, and
    # all that leads to it, for each use of its result.
    return jnp.where(size > INFINITY, _NAN, rounded)


_LARGEST = np.uint32(0x7F7F0000)  # of bfloat16: nothing is carried past it
INFINITY = np.uint32(0x7F800000)
_NAN = np.array(np.nan, jnp.bfloat16)  # of NumPy, which `jax_debug_nans` lets pass


def to_integer(root: jax.Array, power: int, bits: jax.Array) -> jax.Array:
    """Rounds root >= 0 to a neighbouring integer k; kᵖ is rootᵖ on average, p <= 3."""
    # A root within some ulps of an integer is that integer. So a moment that is loaded
    # and stored again does not change. The tolerance must stay this small: with more,
    # an average whose decay is near 1 would not move.
    ulps = 1e-6 * root
    k = jnp.floor(root + ulps)
    f = jnp.where(root - k < ulps, 0.0, root - k)
    # Round up with probability ((k+f)ᵖ - kᵖ) / ((k+1)ᵖ - kᵖ). Both differences are
    # expanded, so that no digits cancel, and compared without a division.
    rise, span = f, jnp.ones_like(f)
    if power == 2:
        rise, span = f * (2 * k + f), 2 * k + 1
    elif power == 3:
        rise, span = f * (3 * k * (k + f) + f**2), 3 * k * (k + 1) + 1
    draw = (bits >> 8).astype(jnp.float32)  # float32 holds 24 bits exactly
    return jnp.where(draw * span < rise * 2.0**24, k + 1, k)


@jax.custom_jvp
def straight_through(x: jax.Array, loaded: jax.Array) -> jax.Array:
    """Returns `loaded`, which is x but for rounding, with the derivative of x."""
    del x
    return loaded


@straight_through.defjvp
def _straight_through_jvp(primals: Any, tangents: Any) -> tuple[jax.Array, jax.Array]:
    return straight_through(*primals), tangents[0]
