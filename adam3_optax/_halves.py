"""A float32 in two halves: a bfloat16, and the remainder that its rounding leaves.

All of it is done on integers, because XLA on a GPU drops a conversion to bfloat16 and
back. In a pattern of 32 bits the first is the sign. Without it, patterns are in the
order of sizes.
"""

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from adam3_optax import _rounding

_SIGN, _SIZE = np.uint32(0x80000000), np.uint32(0x7FFFFFFF)
_INFINITY, _NAN = np.uint32(0x7F800000), np.uint32(0x7FC00000)

Remainder = jax.Array | None  # int16, int8, or none


def join(param: jax.Array, rest: Remainder) -> jax.Array:
    """Returns the float32 of which a parameter and its remainder are the halves."""
    pattern = _pattern(param)
    if rest is None:
        return _number(pattern)
    size = pattern & _SIZE
    lower = rest.astype(jnp.int32) << (8 if rest.dtype == jnp.int8 else 0)
    # Never below 0: a remainder may be older than its parameter, which may be 0 now.
    whole = jnp.maximum(size.astype(jnp.int32) + lower, 0).astype(jnp.uint32)
    return _number((pattern ^ size) | jnp.where(size < _INFINITY, whole, size))


# Jitted, as is `land`, so that an update that is not costs one call a leaf.
@jax.jit
def split(
    master: jax.Array, rest: Remainder, count: jax.Array, key: _rounding.Key
) -> tuple[jax.Array, Remainder]:
    """Returns a float32 as a parameter and a remainder, in the dtype of the old one."""
    pattern = _kept(master, rest, count, key)
    param = _upper(pattern)
    upper = lax.bitcast_convert_type((param >> 16).astype(jnp.uint16), jnp.bfloat16)
    return upper, _lower(pattern, param, rest)


@jax.jit
def land(
    param: jax.Array,
    master: jax.Array,
    rest: Remainder,
    count: jax.Array,
    key: _rounding.Key,
) -> tuple[jax.Array, Remainder]:
    """Returns the update that leads a parameter to a new master, and the remainder."""
    pattern = _kept(master, rest, count, key)
    old = _number(_pattern(param))
    u = _number(_upper(pattern)) - old
    # What `optax.apply_updates` makes of it, to nearest even: nearly always the upper
    # half. The remainder is that of the parameter which will be there.
    landed = _pattern(lax.reduce_precision(old + u, 8, 7))
    return u, _lower(pattern, landed, rest)


def _pattern(x: jax.Array) -> jax.Array:
    """Returns the 32 bits of a float32, or of a bfloat16 as float32."""
    if x.dtype == jnp.bfloat16:
        return lax.bitcast_convert_type(x, jnp.uint16).astype(jnp.uint32) << 16
    return lax.bitcast_convert_type(x, jnp.uint32)


def _number(pattern: jax.Array) -> jax.Array:
    return lax.bitcast_convert_type(pattern, jnp.float32)


def _kept(
    master: jax.Array, rest: Remainder, count: jax.Array, key: _rounding.Key
) -> jax.Array:
    """Returns the pattern of a float32 in as many bits as are kept: 32, 24 or 16."""
    pattern = _pattern(master)
    if rest is not None and rest.dtype == jnp.int16:
        return pattern
    bits = _rounding.random_bits(count, key, master)
    if rest is None:
        return _pattern(_rounding.to_bfloat16(master, bits))
    # Random bits below the last that is kept carry with the right probability.
    carried = (pattern + (bits >> 24)) >> 8 << 8
    return jnp.where((pattern & _SIZE) < _INFINITY, carried, pattern)


def _upper(pattern: jax.Array) -> jax.Array:
    """Returns the pattern of the nearest bfloat16, as float32; of NaN a quiet one.

    A tie goes away from 0. To the even one, a remainder could be 2^15, which int16 does
    not hold.
    """
    rounded = (pattern + 0x8000) >> 16 << 16
    return jnp.where((pattern & _SIZE) > _INFINITY, _NAN, rounded)


def _lower(pattern: jax.Array, param: jax.Array, rest: Remainder) -> Remainder:
    """Returns the remainder of a pattern, given that of its parameter.

    If the parameter is far away, it is the largest that there is; and 0 if the
    parameter has another sign or is not finite.
    """
    if rest is None:
        return None
    size = param & _SIZE
    lower = (pattern & _SIZE).astype(jnp.int32) - size.astype(jnp.int32)
    fits = (pattern ^ param < _SIGN) & (size < _INFINITY)
    lower = jnp.where(fits, jnp.clip(lower, -(2**15), 2**15 - 1), 0)
    return (lower >> 8 if rest.dtype == jnp.int8 else lower).astype(rest.dtype)
