"""Stochastic rounding: random bits from integers alone, and float32 to bfloat16."""

import math
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

RandomBits = Callable[[jax.Array], jax.Array]


def random_bits(*identity: jax.Array | int) -> RandomBits:
    """Returns a function that makes 32 random bits for each element of an array.

    They depend on the identity (integers: count, leaf, moment) and on the element's
    index alone. So the state needs no key, a resumed run repeats the straight one, and
    replicas and shards agree. Plain integer arithmetic fuses, and lowers everywhere.
    """

    def bits(x: jax.Array) -> jax.Array:
        seed = jnp.uint32(0)
        for part in identity:
            seed = _mix(seed + jnp.asarray(part).astype(jnp.uint32) * _GOLDEN)
        index = jnp.uint32(0)
        for axis in range(x.ndim):
            stride = jnp.uint32(math.prod(x.shape[axis + 1 :]) % 2**32)
            index += lax.broadcasted_iota(jnp.uint32, x.shape, axis) * stride
        return _mix(index * _GOLDEN + seed)

    return bits


_GOLDEN = np.uint32(0x9E3779B9)  # odd, so that no two indices below 2³² collide


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
    rounded = _upper_half(pattern + (bits(x) >> 16))
    # Nothing is carried past the largest finite number, nor from infinities and NaN.
    kept = jnp.where(jnp.isnan(x), x.astype(jnp.bfloat16), _upper_half(pattern))
    return jnp.where(jnp.isfinite(rounded), rounded, kept)


def _upper_half(pattern: jax.Array) -> jax.Array:
    return lax.bitcast_convert_type((pattern >> 16).astype(jnp.uint16), jnp.bfloat16)


def to_integer(root: jax.Array, power: int, bits: RandomBits) -> jax.Array:
    """Rounds root >= 0 to an integer neighbour k; kᵖ is rootᵖ on average, p = 2, 3."""
    # Within 1e-4 of an integer it is that integer: what was stored once stays as it is.
    k = jnp.floor(root + 1e-4)
    f = jnp.where(root - k < 1e-4, 0.0, root - k)
    # The chance of k + 1 is ((k+f)ᵖ - kᵖ) / ((k+1)ᵖ - kᵖ), here without cancellation.
    if power == 2:
        f = f * (2 * k + f) / (2 * k + 1)
    else:
        f = f * (3 * k * (k + f) + f**2) / (3 * k * (k + 1) + 1)
    uniform = ((bits(root) >> 8).astype(jnp.float32) + 0.5) * 2.0**-24  # in (0, 1)
    return jnp.where(uniform < f, k + 1, k)
