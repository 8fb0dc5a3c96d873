"""Stochastic rounding, and the random bits for it: from integers alone."""

import hashlib
import math
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array, lax
from jax.typing import ArrayLike

from adam3_optax import _xla
from adam3_optax._rule import Moments

Key = np.ndarray  # two numbers of 32 bits
Purpose = Literal["moments", "parameters", "state", "conversion"]


def leaf_key(path: tuple[Any, ...], purpose: Purpose) -> Key:
    """Returns the key of a leaf, odd numbers: each rounds with bits of its own.

    It is made of the leaf's path in the tree. So the leaves of two groups of
    `optax.partition` have keys of their own, too.
    """
    name = f"{purpose}: {jax.tree_util.keystr(path)}".encode()
    digest = hashlib.blake2b(name, digest_size=8).digest()
    return np.frombuffer(digest, "<u4").astype(np.uint32) | np.uint32(1)


def random_bits(count: ArrayLike, key: ArrayLike, like: Array) -> Array:
    """Returns 32 random bits for each element; the upper 24 are good.

    They have the shape of `like`, and its sharding.

    They depend on the count (1 or more), the key and the element's index alone. So the
    state holds no key, a resumed run repeats the straight one, and all shards and
    replicas agree. This is integer arithmetic, which XLA fuses and every backend
    supports.
    """
    count = jnp.asarray(count).astype(jnp.uint32)
    # Use one of the key's two numbers: which one depends on the count, so XLA cannot
    # compute the product ahead of time. If it could, or knew the numbers, each leaf's
    # kernel would contain constants of its own, leaves of one shape could not share a
    # kernel, and many leaves would compile several times slower. They are chosen, not
    # looked up, because a count that is split over an explicit mesh cannot index.
    key = _xla.opaque(jnp.asarray(key))
    # Start from the leaf's own number. If leaves shared a sum of the seed and the rows,
    # XLA on a GPU would merge their kernels, and take twice as long to compile. For the
    # same reason nothing is multiplied inside the sum but the strides.
    index = _mixed(count) * jnp.where(count % 2 == 1, key[1], key[0])
    # On explicit meshes a sharding is part of a type. Without it each device would
    # compute the bits of the whole leaf.
    where = jax.typeof(like).sharding
    for axis in range(like.ndim):
        stride: Any = math.prod(like.shape[axis + 1 :])
        is_symbol = not isinstance(stride, int)  # of `jax.export`
        stride = jnp.asarray(stride if is_symbol else np.uint32(stride % 2**32))
        along = lax.broadcasted_iota(jnp.uint32, like.shape, axis, out_sharding=where)
        index += along * stride.astype(jnp.uint32)
    # Neighbours differ in their lower bits alone. This product carries them upwards.
    # Without it the bits of near elements fail tests of pairs.
    return _mixed(index * _GOLDEN)


def _mixed(x: Array) -> Array:
    """Scatters 32 bits upwards, by constants that C. Wellons found (`lowbias32`)."""
    x = (x ^ (x >> 16)) * jnp.uint32(0x7FEB352D)
    return (x ^ (x >> 15)) * jnp.uint32(0x846CA68B)


def for_moments(bits: Array) -> Moments[Array]:
    """Returns random bits for each moment, from one draw.

    The draw is multiplied by odd numbers. So the upper bits of the results, which
    rounding uses, have nothing to do with each other.
    """
    return Moments(bits, bits * _GOLDEN, bits * jnp.uint32(0x85EBCA77))


_GOLDEN = np.uint32(0x9E3779B1)  # 2³² divided by the golden ratio, made odd


def to_bfloat16(x: Array, bits: Array) -> Array:
    """Rounds float32 to one of its two bfloat16 neighbours, and to x on average."""
    # The upper half of a float32 is a bfloat16. If 16 random bits are added to the
    # lower half, it carries into the upper one with exactly the right probability.
    # Nothing is carried past the largest bfloat16.
    drawn = jnp.where(jnp.abs(x) < _LARGEST, bits, np.uint32(0)) >> 16
    carried = lax.bitcast_convert_type(x, jnp.uint32) + drawn
    rounded = lax.bitcast_convert_type((carried >> 16).astype(jnp.uint16), jnp.bfloat16)
    # A NaN may be a NaN by its lower half alone, which is cut off. So NaN is chosen
    # explicitly. The choice comes last because XLA on a CPU repeats a conversion, and
    # all that leads to it, for each use of its result.
    return jnp.where(jnp.isnan(x), _NAN, rounded)


_LARGEST = np.float32(jnp.finfo(jnp.bfloat16).max)
_NAN = np.array(np.nan, jnp.bfloat16)  # of NumPy, which `jax_debug_nans` lets pass


def to_float8(x: Array, exponent: int, bits: Array) -> Array:
    """Rounds x·2ᵉ to one of its two float8_e4m3fn neighbours, and right on average.

    What is beyond 448 becomes 448; NaN stays NaN.

    Args:
        x: In float32.
        exponent: e, a number. It costs nothing.
        bits: 32 random bits for each element.
    """
    size = jnp.minimum(jnp.abs(x), np.float32(448.0 * 2.0**-exponent))
    # A float8 has 3 bits of mantissa, and a float32 has 20 more. If 20 random bits are
    # added to these, they carry with exactly the right probability, at powers of two,
    # too. Below 2^-6 the neighbours lie 2^-9 apart, as they do between 2^-6 and 2^-5.
    # So the number is shifted there.
    shift = np.float32(2.0 ** (-6 - exponent))
    is_tiny = size < shift
    shifted = size + jnp.where(is_tiny, shift, np.float32(0.0))
    carried = lax.bitcast_convert_type(shifted, jnp.uint32) + (bits >> 12)
    # The exponent's bias is 127 in a float32, and 7 in a float8.
    bias = np.uint32((127 - 7 - exponent) << 3)
    code = (carried >> 20) - jnp.where(is_tiny, bias + np.uint32(8), bias)
    sign = (lax.bitcast_convert_type(x, jnp.uint32) >> 24) & np.uint32(128)
    # NaN exceeds 127, the code of NaN. The conversion comes last: a TPU would copy the
    # result of a choice after it.
    code = jnp.minimum(code, np.uint32(127)) | sign
    return lax.bitcast_convert_type(code.astype(jnp.uint8), jnp.float8_e4m3fn)


# The codes of a v of 8 bits: 7 of exponent and 1 of mantissa. Code 0 is 0, and code 255
# is what is not finite.
_FIRST = 2 * 55 - 1  # so that code 1 is 2^-72
_NOT_FINITE = 255


def to_unsigned_float8(x: Array, bits: Array) -> Array:
    """Rounds x >= 0 to one of its two neighbours 2ᵏ and 1.5·2ᵏ, right on average."""
    pattern = lax.bitcast_convert_type(x, jnp.uint32)
    carried = ((pattern + (bits >> 10)) >> 22).astype(jnp.int32) - _FIRST
    # What is not 0 has a code of at least 1, because an update divides by it.
    least = jnp.minimum(pattern, np.uint32(1)).astype(jnp.int32)
    code = jnp.minimum(jnp.maximum(carried, least), _NOT_FINITE - 1)
    return jnp.where(x < jnp.inf, code, _NOT_FINITE).astype(jnp.uint8)


def from_unsigned_float8(code: Array) -> Array:
    """Returns the number of a code, in float32."""
    pattern = (code.astype(jnp.uint32) + np.uint32(_FIRST)) << 22
    x = lax.bitcast_convert_type(pattern, jnp.float32)
    x = jnp.where(code == _NOT_FINITE, np.float32(np.nan), x)
    return jnp.where(code == 0, np.float32(0.0), x)


@jax.custom_jvp
def straight_through(x: Array, loaded: Array) -> Array:
    """Straight-through estimator: the value of `loaded`, the derivative of x."""
    return loaded


@straight_through.defjvp
def _straight_through_jvp(primals: Any, tangents: Any) -> tuple[Array, Array]:
    return straight_through(*primals), tangents[0]


@jax.custom_jvp
def without_derivative(x: Array) -> Array:
    """Returns x. To ask for its derivative is an error."""
    return x


@without_derivative.defjvp
def _no_jvp(primals: Any, tangents: Any) -> tuple[Array, Array]:
    raise TypeError(
        "a float8 state has no derivative: its tangents would be float8, too. To "
        "differentiate through steps, store m, v and s in 'float32' or 'bfloat16'."
    )
