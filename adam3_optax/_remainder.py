"""A float32 in two halves: a bfloat16, and the remainder that its rounding leaves.

Splitting and joining are done on integers, because XLA on a GPU drops a conversion to
bfloat16 and back. In a pattern of 32 bits the first is the sign. The other 31 grow with
the absolute value. Derivatives are those of arithmetic without rounding.
"""

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array, lax

from adam3_optax._rounding import Key, random_bits, straight_through, to_bfloat16

_SIZE = np.uint32(0x7FFFFFFF)  # all but the sign
_INFINITY = np.uint32(0x7F800000)
_NAN = np.uint32(0x7FC00000)

Remainder = Array | None  # int16, int8, or none
Parts = tuple[Array, Remainder]


def join(param: Array, rest: Remainder) -> Array:
    """Returns the float32 of which a parameter and its remainder are the halves."""
    pattern = _pattern(param)
    if rest is not None:
        size = pattern & _SIZE
        # Not below 0: a remainder may be older than its parameter, which may be 0 now.
        whole = jnp.maximum(size.astype(jnp.int32) + _lower(rest), 0)
        whole = jnp.where(size < _INFINITY, whole.astype(jnp.uint32), size)
        pattern = (pattern ^ size) | whole
    return straight_through(param.astype(jnp.float32), _number(pattern))


# Jitted, as is `land`, so that an eager update costs one call a leaf.
@jax.jit
def split(master: Array, rest: Remainder, count: Array, key: Key) -> Parts:
    """Returns a float32 as a parameter and a remainder, in the dtype of the old one."""
    upper, rest = _parted(master, rest, count, key)
    param = lax.bitcast_convert_type((upper >> 16).astype(jnp.uint16), jnp.bfloat16)
    return straight_through(master.astype(jnp.bfloat16), param), rest


@jax.jit
def land(param: Array, master: Array, rest: Remainder, count: Array, key: Key) -> Parts:
    """Returns the update that leads a parameter to a new master, and the remainder."""
    upper, rest = _parted(master, rest, count, key)
    old = _pattern(param)
    # 0 where nothing changes, because inf - inf is NaN.
    u = jnp.where(upper == old, 0.0, _number(upper) - _number(old))
    return straight_through(master - param.astype(jnp.float32), u), rest


def _parted(master: Array, rest: Remainder, count: Array, key: Key) -> Parts:
    """Returns the pattern of a float32's nearest bfloat16, and the remainder."""
    if rest is None:
        bits = random_bits(count, key, master)
        return _pattern(to_bfloat16(master, bits)), None
    pattern = _pattern(master)
    size = pattern & _SIZE
    if rest.dtype == jnp.int8:
        # Random bits below the last that is kept carry with the right probability.
        carried = (pattern + (random_bits(count, key, master) >> 24)) >> 8 << 8
        pattern = jnp.where(size < _INFINITY, carried, pattern)
    pattern = jnp.where(size > _INFINITY, _NAN, pattern)
    # The lower half, as a signed number. What is left is the upper half, rounded; a tie
    # goes away from 0. So the parameter is made from the remainder. If both were made
    # from the pattern, a TPU would need two kernels, and compute the whole step twice.
    width = jnp.iinfo(rest.dtype).bits
    lower = (pattern >> (16 - width)).astype(f"uint{width}")
    rest = lax.bitcast_convert_type(lower, rest.dtype)
    return pattern - _lower(rest).astype(jnp.uint32), rest


def _lower(rest: Array) -> Array:
    """Returns what a remainder adds to the pattern of its parameter."""
    return rest.astype(jnp.int32) << (16 - jnp.iinfo(rest.dtype).bits)


def _pattern(x: Array) -> Array:
    """Returns the 32 bits of a float32, or of a bfloat16 as float32."""
    if x.dtype == jnp.bfloat16:
        return lax.bitcast_convert_type(x, jnp.uint16).astype(jnp.uint32) << 16
    return lax.bitcast_convert_type(x, jnp.uint32)


def _number(pattern: Array) -> Array:
    return lax.bitcast_convert_type(pattern, jnp.float32)
