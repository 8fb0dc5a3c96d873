"""How a moment rests between steps: in float32, in bfloat16, or in 8 bits with scales.

The rule sees float32 arrays alone and never knows. To add a format, write a class with
the methods of `Float` and enter it in `FORMATS`.
"""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from adam3_optax import _rounding
from adam3_optax._rounding import RandomBits

POWERS = {"m": 1, "v": 2, "s": 3}  # of the gradient, in each moment

DTypeSetting = Any  # None, "float32", "bfloat16", "int8", or the dtype of that name


class Int8(NamedTuple):
    """A moment of 8-bit codes: a struct of trees, each like the parameters.

    Attributes:
        codes: int8 (uint8 for v), in the parameters' shapes; small leaves float32.
        scale: float32, one number a row: the parameters' shapes with a last axis of 1.
            For a leaf that rests in float32, one number in all, 0.
    """

    codes: Any
    scale: Any


class Float:
    """At rest as it is computed: float32, or float64 for float64 parameters."""

    dtypes: tuple[Any, ...] = (jnp.float32, jnp.float64)

    def __init__(self, moment: str) -> None:
        self.moment = moment

    def zeros(self, params: Any) -> Any:
        """Returns the moment before the first step, as a field of the state.

        Strongly typed, sharded as the parameters are, and in buffers of its own.
        """
        return jax.tree.map(lambda p: jnp.zeros_like(p, dtype=self._dtype(p)), params)

    def _dtype(self, param: Any) -> Any:
        computed = computed_in(param)
        return computed if computed in self.dtypes else self.dtypes[0]

    def fits(self, field: Any) -> bool:
        """Returns whether a field of a state is of this format."""
        leaves = jax.tree.leaves(field)
        return not isinstance(field, Int8) and all(
            jnp.result_type(x) in self.dtypes for x in leaves
        )

    def structure(self, field: Any) -> Any:
        """Returns the structure of the parameters, from that of the field."""
        return jax.tree.structure(field)

    def split(self, treedef: Any, field: Any) -> Sequence[Any]:
        """Returns the leaves at rest, in the order of the gradients'."""
        return treedef.flatten_up_to(field)

    def join(self, treedef: Any, rests: Sequence[Any]) -> Any:
        """Returns the field of the state again."""
        return treedef.unflatten(rests)

    def shape(self, rest: Any) -> tuple[int, ...]:
        """Returns the moment's shape."""
        return jnp.shape(rest)

    def load(self, rest: Any) -> jax.Array:
        """Returns the moment, in float32 or wider."""
        return jnp.asarray(rest).astype(computed_in(rest))

    def store(self, x: jax.Array, rest: Any, bits: RandomBits) -> Any:
        """Returns the moment at rest, in the type of `rest`, where it rested before."""
        return narrowed(x, jnp.result_type(rest))

    def in_turn(self, rest: Any, x: jax.Array) -> tuple[Any, jax.Array]:
        """Returns both; what is made of this x is computed after `rest`."""
        return rest, x


class Float32(Float):
    """At rest in float32, also for float64 parameters."""

    dtypes = (jnp.float32,)


class BFloat16(Float):
    """At rest in bfloat16, rounded stochastically: to nearest, slow averages freeze."""

    dtypes = (jnp.bfloat16,)

    def store(self, x: jax.Array, rest: Any, bits: RandomBits) -> Any:
        # No derivative passes through the bits.
        x = lax.stop_gradient(narrowed(x, jnp.float32))
        return _rounding.to_bfloat16(x, bits)


class Int8Rows(Float):
    """At rest as 8-bit roots, in gradient units, with a scale for each row.

    m, sqrt(v) and the signed cbrt(s) become codes: multiples of the scale, which is the
    largest root of the row over the largest code. They are rounded so that the moment,
    not its root, is right on average, and those of a nonzero v to at least 1, for an
    update divides by it. Pure decay of a whole row moves its scale alone, and is exact.

    Leaves of fewer than two axes, or whose rows have fewer than 16 elements, rest in
    float32: most biases and norms, a per cent of a model, and rows too short for a
    scale.
    """

    def __init__(self, moment: str) -> None:
        super().__init__(moment)
        self.power = POWERS[moment]
        # v has no sign, and gets twice the codes for it.
        self.dtype, self.largest = (
            (jnp.uint8, 255.0) if self.power == 2 else (jnp.int8, 127.0)
        )

    def zeros(self, params: Any) -> Any:
        codes = jax.tree.map(lambda p: jnp.zeros_like(p, dtype=self._dtype(p)), params)

        def scale(param: Any, code: jax.Array) -> jax.Array:
            # Shaped and sharded like the maxima that it will be made from. Those of
            # zeros the compiler would compute while it compiles `init`.
            axis = -1 if code.dtype == self.dtype else None
            return jnp.zeros_like(_maxima(jnp.asarray(param), axis))

        return Int8(codes, jax.tree.map(scale, params, codes))

    def _dtype(self, param: Any) -> Any:
        if not jnp.issubdtype(jnp.result_type(param), jnp.floating):
            raise ValueError(
                f"{self.moment}_dtype='int8' needs real floating parameters, got "
                f"{jnp.result_type(param)}; leave such leaves out with optax.masked"
            )
        small = jnp.ndim(param) < 2 or jnp.shape(param)[-1] < 16
        return jnp.float32 if small else self.dtype

    def fits(self, field: Any) -> bool:
        if not isinstance(field, Int8):
            return False
        codes = jax.tree.leaves(field.codes)
        return all(jnp.result_type(x) in (self.dtype, jnp.float32) for x in codes)

    def structure(self, field: Any) -> Any:
        return jax.tree.structure(field.codes)

    def split(self, treedef: Any, field: Any) -> Sequence[Any]:
        parts = (treedef.flatten_up_to(part) for part in field)
        return [Int8(*rest) for rest in zip(*parts, strict=True)]

    def join(self, treedef: Any, rests: Sequence[Any]) -> Any:
        codes, scale = zip(*rests, strict=True) if rests else ((), ())
        return Int8(treedef.unflatten(codes), treedef.unflatten(scale))

    def shape(self, rest: Any) -> tuple[int, ...]:
        return jnp.shape(rest.codes)

    def load(self, rest: Any) -> jax.Array:
        if rest.codes.dtype != self.dtype:
            return rest.codes
        return (rest.codes.astype(jnp.float32) * rest.scale) ** self.power

    def store(self, x: jax.Array, rest: Any, bits: RandomBits) -> Any:
        x = narrowed(x, jnp.float32)
        if rest.codes.dtype != self.dtype:
            return Int8(x, rest.scale)
        x = lax.stop_gradient(x)  # no derivative passes through the codes
        size = jnp.abs(x)
        scale = _root(_maxima(size, -1), self.power) / self.largest
        root = _root(size, self.power) * (1.0 / jnp.where(scale > 0, scale, 1.0))
        codes = jnp.minimum(_rounding.to_integer(root, self.power, bits), self.largest)
        codes = codes.astype(self.dtype)
        # A choice comes last: a conversion the compiler repeats, with all before it,
        # for every reader of the codes.
        if self.power == 2:
            codes = jnp.where((x > 0) & (codes == 0), jnp.ones_like(codes), codes)
        else:
            codes = jnp.where(x < 0, -codes, codes)
        return Int8(codes, scale)

    def in_turn(self, rest: Any, x: jax.Array) -> tuple[Any, jax.Array]:
        if rest.codes.dtype != self.dtype:
            return rest, x
        # A row's maximum needs the moment in float32, whole. With one moment after the
        # other, such copies share their memory.
        return lax.optimization_barrier((rest, x))


FORMATS: dict[str | None, Callable[[str], Float]] = {
    None: Float,
    "float32": Float32,
    "bfloat16": BFloat16,
    "int8": Int8Rows,
}


def resting(moment: str, setting: DTypeSetting) -> Float:
    """Returns the format of a moment, from a user's setting."""
    name = f"{moment}_dtype"
    if isinstance(
        setting, bool | int | float | complex | np.number | np.ndarray | jax.Array
    ):
        raise TypeError(
            f"{name} must be None, a string or a dtype, got {setting!r}. With "
            f"optax.inject_hyperparams, pass a string, or static_args={name!r}."
        )
    known = setting
    if isinstance(setting, type | np.dtype):
        try:
            known = jnp.dtype(setting).name
        except TypeError:
            known = repr(setting)
    elif not isinstance(setting, str | None):
        known = repr(setting)
    if known not in FORMATS:
        allowed = ", ".join(map(repr, FORMATS))
        why = (
            ": in float16, (g - m)³ underflows at |g| = 1e-3"
            if known == "float16"
            else ""
        )
        raise ValueError(f"{name} must be one of {allowed}, got {known!r}{why}")
    return FORMATS[known](moment)


def format_of(moment: str, field: Any) -> Float:
    """Returns the format in which a field of a state is."""
    formats = (resting(moment, setting) for setting in FORMATS)
    found = next((f for f in formats if f.fits(field)), None)
    if found is None:
        types = sorted({str(jnp.result_type(x)) for x in jax.tree.leaves(field)})
        raise ValueError(
            f"the state's {moment} is of {', '.join(types)}; it rests in float32, "
            "float64, bfloat16 or int8"
        )
    return found


def computed_in(*arrays: Any) -> np.dtype[Any]:
    """Returns float64 if one of the arrays has it, else float32."""
    wide = any(jnp.result_type(x) == jnp.float64 for x in arrays)
    return np.dtype(np.float64 if wide else np.float32)


def narrowed(x: jax.Array, dtype: Any) -> jax.Array:
    """Returns a moment in a type; what is finite stays finite in a narrower one."""
    if jnp.finfo(dtype).bits < jnp.finfo(x.dtype).bits:
        bound = float(jnp.finfo(dtype).max) / 4
        x = jnp.where(jnp.isfinite(x), jnp.clip(x, -bound, bound), x)
    return x.astype(dtype)


@jax.custom_jvp
def as_it_rests(x: jax.Array, rest: jax.Array) -> jax.Array:
    """Returns `rest`, which is x but for rounding, with the derivative of x."""
    del x
    return rest


@as_it_rests.defjvp
def _as_it_rests_jvp(primals: Any, tangents: Any) -> Any:
    return as_it_rests(*primals), tangents[0]


def _maxima(x: jax.Array, axis: int | None) -> jax.Array:
    """Returns the largest elements along an axis, or in all, in float32."""
    return jnp.max(x, axis, keepdims=True, initial=0).astype(jnp.float32)


def _root(x: jax.Array, power: int) -> jax.Array:
    """Returns the root of x >= 0."""
    match power:
        case 1:
            return x
        case 2:
            return jnp.sqrt(x)
    return _cbrt(x)


def _cbrt(x: jax.Array) -> jax.Array:
    """Returns the cube root of x >= 0 within 3e-7: several times faster than XLA's."""
    # y is x^(-1/3): minus a third of the exponent, which is within 3.5%, and two steps
    # of third order on 1/y³ = x. They need no division, and nothing in them overflows.
    third = lax.bitcast_convert_type(x, jnp.uint32) // 3
    y = lax.bitcast_convert_type(jnp.uint32(0x54A24000) - third, jnp.float32)
    for _ in range(2):
        error = 1.0 - (x * y) * (y * y)
        y += y * error * (1 / 3 + error * (2 / 9))
    return jnp.where(x > 0, x * y * y, 0.0)
