"""What is written for XLA's compilers alone. It changes results by rounding at most.

An accelerator writes all moments of a leaf in one kernel. A CPU has a kernel for each.
So a CPU needs an order, or it keeps what two kernels share in memory.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array, lax

from adam3_optax import _trees


def in_order(stored: Any, later: Any) -> tuple[Any, Any]:
    """Returns both. On a CPU, what is computed from `later` waits for `stored`.

    What was computed from `later` before is computed again, not kept.
    """
    return lax.platform_dependent(stored, later, cpu=_barrier, default=lambda *x: x)


def _barrier(stored: Any, later: Any) -> tuple[Any, Any]:
    ordered = lax.optimization_barrier((stored, later))
    # In `jax.shard_map` a barrier makes all its results vary between devices, if one
    # operand does. Then leave it out, because `later` must keep its type.
    types = [jax.tree.map(jax.typeof, x) for x in (ordered, (stored, later))]
    return ordered if types[0] == types[1] else (stored, later)


def opaque(x: Array) -> Array:
    """Returns x, a constant, as something that XLA reads and does not compute with.

    So kernels that differ in it alone are one. On a TPU each would be two, so there it
    stays a constant.
    """
    return lax.platform_dependent(x, tpu=lambda x: x, default=lax.optimization_barrier)


def after(updates: Any, state: Any) -> Any:
    """Returns updates that wait for the averages.

    So a TPU writes both in one kernel. Else it would read all of the state twice.
    """
    leaves, treedef = jax.tree.flatten_with_path(updates)
    us: dict[Any, Any] = dict(leaves)
    for path, x in jax.tree.leaves_with_path(state):
        _, place = _trees.place(path, us)
        can = place in us and jnp.result_type(x) == jnp.bfloat16
        if can and jax.typeof(x.astype(us[place].dtype)) == jax.typeof(us[place]):
            never = (x > 0) & (x < 0)  # XLA does not know that
            us[place] = jnp.where(never, jnp.zeros_like(us[place]), us[place])
    return jax.tree.unflatten(treedef, us.values())


def inverse_root(x: Array) -> tuple[Array, Array]:
    """Returns sqrt(x) and 1/sqrt(x) of x > 0, in the way that is fastest.

    They differ by rounding between platforms.
    """

    def by_root(x: Array) -> tuple[Array, Array]:
        root = jnp.sqrt(x)
        return root, 1.0 / root

    def by_inverse(x: Array) -> tuple[Array, Array]:
        inverse = lax.rsqrt(x)
        return x * inverse, inverse

    return lax.platform_dependent(x, cpu=by_root, default=by_inverse)


def from_float8(code: Array) -> Array:
    """Returns float8_e4m3fn as float32. XLA's own conversion is slow on a CPU."""
    default = functools.partial(lax.convert_element_type, new_dtype=jnp.float32)
    return lax.platform_dependent(code, cpu=_by_integers, default=default)


def _by_integers(code: Array) -> Array:
    # The exponent's and the mantissa's bits move to their place in a float32. Below 8
    # the exponent is 0: the number is the mantissa in units of 2^-9.
    moved = lax.bitcast_convert_type(code, jnp.uint8).astype(jnp.uint32) << 20
    size = moved & np.uint32(0x07F00000)
    is_tiny = size < np.uint32(8 << 20)
    bias = jnp.where(is_tiny, np.uint32(121 << 23), np.uint32(120 << 23))
    x = lax.bitcast_convert_type(size + bias, jnp.float32)
    x -= jnp.where(is_tiny, np.float32(2.0**-6), np.float32(0.0))
    x = jnp.where(size == np.uint32(127 << 20), np.float32(np.nan), x)
    pattern = lax.bitcast_convert_type(x, jnp.uint32)
    sign = moved & np.uint32(1 << 27)
    return lax.bitcast_convert_type(pattern | (sign << 4), jnp.float32)
