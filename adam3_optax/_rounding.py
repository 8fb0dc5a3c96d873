"""Stochastic rounding: random bits from integers alone, and float32 to bfloat16."""

import math
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

RandomBits = Callable[[jax.Array], jax.Array]


def stream(number: int) -> np.ndarray:
    """Returns what tells the randomness of one moment of one leaf from the others'."""
    return np.random.SeedSequence(number).generate_state(2)


def random_bits(
    count: jax.typing.ArrayLike, stream: jax.typing.ArrayLike
) -> RandomBits:
    """Returns a function that makes 32 random bits for each element of an array.

    They depend on the count, the stream and the element's index alone. So the state
    needs no key, a resumed run repeats the straight one, and replicas and shards agree.
    Plain integer arithmetic fuses, and lowers everywhere.
    """
    count = jnp.asarray(count).astype(jnp.uint32)
    seed = _mix(count * np.uint32(0x9E3779B9))
    # One of two constants, by the parity of the count. The compiler cannot fold the
    # choice, so that leaves of one shape share one kernel: a number of the leaf's own
    # inside it makes compiling 1,000 leaves several times slower.
    own = lax.dynamic_index_in_dim(jnp.asarray(stream), count % 2, keepdims=False)

    def bits(x: jax.Array) -> jax.Array:
        index = seed
        for axis in range(x.ndim):
            stride = jnp.uint32(math.prod(x.shape[axis + 1 :]) % 2**32)
            index += lax.broadcasted_iota(jnp.uint32, x.shape, axis) * stride
        return _mix(index ^ own)

    return bits


def _mix(x: jax.Array) -> jax.Array:
    """Scatters 32 bits: the `lowbias32` finalizer found by C. Wellons."""
    x = (x ^ (x >> 16)) * jnp.uint32(0x7FEB352D)
    x = (x ^ (x >> 15)) * jnp.uint32(0x846CA68B)
    return x ^ (x >> 16)


def to_bfloat16(x: jax.Array, bits: RandomBits) -> jax.Array:
    """Rounds float32 to one of its two bfloat16 neighbours, and to x on average."""
    # The upper half of a float32 is a bfloat16. Adding 16 random bits to the lower half
    # carries into the upper with just the right probability.
    pattern = lax.bitcast_convert_type(x, jnp.uint32)
    size = pattern & 0x7FFFFFFF  # without the sign; in the order of |x|
    carried = pattern + jnp.where(size < _LARGEST, bits(x) >> 16, 0)
    rounded = lax.bitcast_convert_type((carried >> 16).astype(jnp.uint16), jnp.bfloat16)
    # The bits that make it a NaN may all be in the lower half. And this choice comes
    # last, for a conversion the compiler repeats, with all before it, for every reader.
    return jnp.where(size > _INFINITY, jnp.bfloat16(jnp.nan), rounded)


_LARGEST = np.uint32(0x7F7F0000)  # of bfloat16: nothing is carried past it
_INFINITY = np.uint32(0x7F800000)


def to_integer(root: jax.Array, power: int, bits: RandomBits) -> jax.Array:
    """Rounds root >= 0 to a neighbouring integer k; kᵖ is rootᵖ on average, p ≤ 3."""
    # Within some ulps of an integer it is that integer: what was stored once stays as
    # it is. Not within more, or an average whose decay is near 1 would not move.
    ulps = 1e-6 * root
    k = jnp.floor(root + ulps)
    f = jnp.where(root - k < ulps, 0.0, root - k)
    # The chance of k + 1 is ((k+f)ᵖ - kᵖ) / ((k+1)ᵖ - kᵖ), here without cancellation,
    # and without a division.
    rise, span = f, jnp.ones_like(f)
    if power == 2:
        rise, span = f * (2 * k + f), 2 * k + 1
    elif power == 3:
        rise, span = f * (3 * k * (k + f) + f**2), 3 * k * (k + 1) + 1
    draw = (bits(root) >> 8).astype(jnp.float32)  # 24 bits: float32 holds those
    return jnp.where(draw * span < rise * 2.0**24, k + 1, k)
