"""How a moment is stored between steps: in float32, in bfloat16, in 8 bits, or not.

The rule sees arrays of float32 or float64 only. To add a format, write a subclass of
`Format` and enter it in `SETTINGS`.
"""

import abc
import dataclasses
from collections.abc import Callable, Sequence
from typing import Any, ClassVar, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax import lax

from adam3_optax import _boxes, _rounding
from adam3_optax._rule import Form, Moments

NAMES = Moments("m", "v", "s")

# None, "float32", "bfloat16", "int8", or the dtype of that name.
DTypeSetting = jax.typing.DTypeLike | None
Field = Any  # m, v or s of a state: all leaves of one moment


class Int8(NamedTuple):
    """A moment of 8-bit codes: in a state, a struct of trees like the parameters.

    Attributes:
        codes: int8 (uint8 for v), in the parameters' shapes; small leaves float32.
        scale: float32, one number a row: the parameters' shapes with a last axis of 1.
            For a leaf that is stored in float32, one number in all, 0.
    """

    codes: Any
    scale: Any


Stored = tuple[jax.Array, ...]  # one leaf of a field: an array for each of its trees
Again = Callable[[], jax.Array]


@dataclasses.dataclass(frozen=True)
class Format(abc.ABC):
    """How one moment is stored: as a field of the state, made of leaves.

    Formats are compared by value, so that functions compiled for one are used again.
    No two of them may have the same struct and the same dtypes.

    Attributes:
        moment: Its name: "m", "v" or "s".
        struct: The type of the field: a NamedTuple of trees, of which the first has the
            parameters' shapes. None if the field is one such tree itself.
        dtypes: All that its leaves may have. Every format must name them.
    """

    moment: str
    struct: ClassVar[Any] = None
    dtypes: ClassVar[tuple[Any, ...]]

    @abc.abstractmethod
    def zeros(self, params: optax.Params) -> Field:
        """Returns the field before the first step.

        Its arrays are strongly typed, sharded as the parameters are, and in buffers of
        their own.
        """

    @abc.abstractmethod
    def load(self, stored: Stored) -> jax.Array:
        """Returns a leaf's moment, in float32 or wider."""

    @abc.abstractmethod
    def store(self, x: jax.Array, old: Stored, bits: jax.Array, again: Again) -> Stored:
        """Returns a moment as a stored leaf.

        Args:
            x: The moment, in float32 or wider.
            old: The leaf before. The new one has its dtypes.
            bits: 32 random bits for each element.
            again: Computes x once more, for formats that read x in two passes. If both
                passes used x itself, XLA might keep all of it in memory in between.
        """

    def in_turn(self, new: Stored, old: Stored, later: Stored) -> tuple[Stored, Stored]:
        """Returns `new`, and `later`, to be read after `new` is written.

        So on a CPU, if that saves memory; elsewhere one kernel writes all moments.

        Args:
            new: A leaf's moment after the step, as stored.
            old: The same moment before the step.
            later: Another moment of the leaf before the step: the next to be updated.
        """
        return new, later

    def fits(self, field: Field) -> bool:
        """Returns whether a field is of this format."""
        # The type tells, not the leaves: a field may have none.
        struct = type(field) if type(field) in [f.struct for f in FORMATS] else None
        dtypes = {jnp.result_type(x) for x in jax.tree.leaves(field)}
        return struct is self.struct and dtypes <= set(map(jnp.dtype, self.dtypes))

    def trees(self, field: Field) -> Sequence[Any]:
        """Returns the trees that a field is made of, each like the parameters."""
        return field if self.struct else (field,)

    def split(self, treedef: Any, field: Field) -> list[Stored]:
        """Returns the stored leaves, in the order of the gradients', still in boxes."""
        columns = [treedef.flatten_up_to(tree) for tree in self.trees(field)]
        return [tuple(x[i] for x in columns) for i in range(treedef.num_leaves)]

    def join(self, treedef: Any, leaves: Sequence[Stored]) -> Field:
        """Returns the field made of stored leaves."""
        width = len(self.struct._fields) if self.struct else 1
        trees = [treedef.unflatten([x[i] for x in leaves]) for i in range(width)]
        return self.struct(*trees) if self.struct else trees[0]


class OneArray(Format):
    """Stored as one array a leaf, in the first of its dtypes that is computed in."""

    def zeros(self, params: optax.Params) -> Field:
        def zero(param: jax.Array) -> jax.Array:
            wide = computed_in(param)
            dtype = wide if wide in self.dtypes else self.dtypes[0]
            return jnp.zeros_like(param, dtype=dtype)

        return jax.tree.map(zero, params)

    def load(self, stored: Stored) -> jax.Array:
        return jnp.asarray(stored[0]).astype(computed_in(*stored))

    def store(self, x: jax.Array, old: Stored, bits: jax.Array, again: Again) -> Stored:
        return (narrowed(x, jnp.result_type(*old)),)


class Wide(OneArray):
    """Stored as it is computed: float32, or float64 for float64 parameters."""

    dtypes = (jnp.float32, jnp.float64)


class Float32(OneArray):
    """Stored in float32, also for float64 parameters."""

    dtypes = (jnp.float32,)


class BFloat16(OneArray):
    """Stored in bfloat16, rounded stochastically: to nearest, slow averages freeze."""

    dtypes = (jnp.bfloat16,)

    def store(self, x: jax.Array, old: Stored, bits: jax.Array, again: Again) -> Stored:
        return (_rounding.to_bfloat16(narrowed(x, jnp.float32), bits),)

    def in_turn(self, new: Stored, old: Stored, later: Stored) -> tuple[Stored, Stored]:
        return lax.platform_dependent(
            new, later, cpu=_barrier, default=lambda new, later: (new, later)
        )


class Int8Rows(Format):
    """Stored as 8-bit roots, in units of the gradient, with a scale for each row.

    m, sqrt(v) and the signed cbrt(s) become codes. A code counts multiples of its row's
    scale, which is the row's largest root divided by the largest code. Rounding makes
    the moment, not its root, right on average. A nonzero v has a code of at least 1,
    because an update divides by it. If a whole row decays, only its scale changes, so
    pure decay is exact.

    Leaves of fewer than two axes, or with rows of fewer than 16 elements, are stored in
    float32. These are most biases and norms: about a per cent of a model.
    """

    struct = Int8
    dtypes = (jnp.int8, jnp.uint8, jnp.float32)

    @property
    def power(self) -> int:
        """The power of the gradient in the moment."""
        return {"m": 1, "v": 2, "s": 3}[self.moment]

    @property
    def code_dtype(self) -> Any:
        # v has no sign, so the sign's bit doubles its codes.
        return jnp.uint8 if self.moment == "v" else jnp.int8

    def fits(self, field: Field) -> bool:
        # The codes of v are of another dtype than those of m and s.
        other = jnp.int8 if self.moment == "v" else jnp.uint8
        dtypes = [jnp.result_type(x) for x in jax.tree.leaves(field)]
        return super().fits(field) and other not in dtypes

    def zeros(self, params: optax.Params) -> Field:
        def codes(param: jax.Array) -> jax.Array:
            dtype = jnp.float32 if _is_small(param) else self.code_dtype
            return jnp.zeros_like(param, dtype)

        def scale(item: Any) -> Any:
            param = _boxes.opened(item)
            small = _is_small(param)
            # Made from the parameter's maxima, because these have the scale's shape and
            # sharding. Maxima of constant zeros would be computed by the compiler.
            made = jnp.zeros_like(_maxima(jnp.asarray(param), None if small else -1))
            # The last axis of a scale is 1 and cannot be split. So a parameter's box is
            # kept only if it does not split that axis.
            is_kept = _boxes.is_box(item) and not small
            is_kept = is_kept and not _boxes.names_last_axis(item)
            return _boxes.refilled(item, made) if is_kept else made

        return Int8(
            jax.tree.map(codes, params),
            jax.tree.map(scale, params, is_leaf=_boxes.is_box),
        )

    def load(self, stored: Stored) -> jax.Array:
        codes, scale = stored
        if not self._in_rows(codes):
            return codes
        return (codes.astype(jnp.float32) * scale) ** self.power

    def store(self, x: jax.Array, old: Stored, bits: jax.Array, again: Again) -> Stored:
        x = narrowed(x, jnp.float32)
        if not self._in_rows(old[0]):
            return x, old[1]
        # Without stop_gradient the scale would carry half of a derivative.
        x, x_again = lax.stop_gradient((x, narrowed(again(), jnp.float32)))
        largest = float(jnp.iinfo(self.code_dtype).max)
        scale = _root(_maxima(jnp.abs(x_again), -1), self.power) / largest
        root = _root(jnp.abs(x), self.power) * (1.0 / jnp.where(scale > 0, scale, 1.0))
        codes = jnp.minimum(_rounding.to_integer(root, self.power, bits), largest)
        if self.moment == "v":
            codes = jnp.where(x > 0, jnp.maximum(codes, 1.0), codes)
        else:
            codes = jnp.where(x < 0, -codes, codes)
        # The conversion comes last. On a TPU the codes could not be written over the
        # old ones if a choice between codes came after it.
        return codes.astype(self.code_dtype), scale

    def in_turn(self, new: Stored, old: Stored, later: Stored) -> tuple[Stored, Stored]:
        if not self._in_rows(old[0]):
            return new, later
        return lax.platform_dependent(
            new,
            old,
            later,
            cpu=_one_at_a_time,
            default=lambda new, old, later: (new, later),
        )

    def _in_rows(self, codes: jax.Array) -> bool:
        """Returns whether a leaf is stored in codes, not in float32."""
        return codes.dtype == self.code_dtype


class Absent(Format):
    """Not stored: s of Adam is 0. One node without children stands for all leaves."""

    struct = optax.EmptyState
    dtypes = ()

    def zeros(self, params: optax.Params) -> Field:
        return optax.EmptyState()

    def load(self, stored: Stored) -> jax.Array:
        return jnp.zeros(())

    def store(self, x: jax.Array, old: Stored, bits: jax.Array, again: Again) -> Stored:
        return ()


# What users pass as m_dtype, v_dtype and s_dtype.
SETTINGS: dict[str | None, type[Format]] = {
    None: Wide,
    "float32": Float32,
    "bfloat16": BFloat16,
    "int8": Int8Rows,
}
FORMATS: tuple[type[Format], ...] = (*SETTINGS.values(), Absent)


def format_for(moment: str, setting: DTypeSetting) -> Format:
    """Returns the format of a moment, from a user's setting."""
    name = f"{moment}_dtype"
    if isinstance(
        setting, bool | int | float | complex | np.number | np.ndarray | jax.Array
    ):
        raise TypeError(
            f"{name} must be None, a string or a dtype, got {setting!r}. With "
            f"optax.inject_hyperparams, pass a string, or static_args={name!r}."
        )
    if setting is None or isinstance(setting, str):
        known = setting
    else:
        try:
            known = jnp.dtype(setting).name
        except TypeError:
            known = repr(setting)
    if known not in SETTINGS:
        allowed = ", ".join(map(repr, SETTINGS))
        why = " (in which (g - m)³ underflows at |g| = 1e-3)" * (known == "float16")
        raise ValueError(f"{name} must be one of {allowed}, got {known!r}{why}")
    return SETTINGS[known](moment)


def formats_for(
    form: Form | None, m: DTypeSetting, v: DTypeSetting, s: DTypeSetting
) -> Moments[Format]:
    """Returns the formats of all moments, from a user's settings."""
    formats = NAMES.map(format_for, Moments(m, v, s))
    if form is not None:
        return formats
    if s is not None:
        raise ValueError(
            f"s_dtype must be None with third_moment=None, which has no s; got {s!r}"
        )
    return formats._replace(s=Absent("s"))


def format_of(moment: str, field: Field) -> Format:
    """Returns the format in which a field of a state is stored."""
    found = next((f(moment) for f in FORMATS if f(moment).fits(field)), None)
    if found is None:
        types = sorted({str(jnp.result_type(x)) for x in jax.tree.leaves(field)})
        raise ValueError(
            f"the state's {moment} is of {', '.join(types)}; it must be stored in "
            "float32, float64, bfloat16 or int8"
        )
    return found


def _barrier(new: Stored, later: Stored) -> tuple[Stored, Stored]:
    """Returns both; what is computed from `later` is computed after `new`."""
    ordered: tuple[Stored, Stored] = lax.optimization_barrier((new, later))
    # In `jax.shard_map` a barrier makes all its results vary between devices, if one
    # operand does. Then leave it out, because `later` must keep its type.
    types = [jax.tree.map(jax.typeof, x) for x in (ordered, (new, later))]
    return ordered if types[0] == types[1] else (new, later)


def apart(old: Moments[Stored]) -> Moments[Stored]:
    """Returns old moments. Off a CPU, what is made of them is not shared with others.

    A CPU writes to memory what a second pass needs. There, sharing saves time.
    """

    def apart_from_others(old: Moments[Stored]) -> Moments[Stored]:
        # One by one, because in `jax.shard_map` they may vary over different axes.
        return jax.tree.map(lax.optimization_barrier, old)

    return lax.platform_dependent(old, cpu=lambda x: x, default=apart_from_others)


def _one_at_a_time(new: Stored, old: Stored, later: Stored) -> tuple[Stored, Stored]:
    """Returns `new` and `later` of rows in int8, in an order that saves memory.

    The maximum of a row needs the whole moment in float32. If the moments of a leaf are
    stored one after the other, these copies use the same memory.
    """
    codes, scale = new
    # A scale is never negative, so these choices change nothing. They are for JAX 0.10,
    # whose CPU compiler drops the barrier. Without the first it would compute the codes
    # anew for each use. Without the second it would compute all maxima first.
    codes = jnp.where(scale < 0, old[0], codes)
    later = tuple(
        jnp.where(scale < 0, 0, x) if jax.typeof(x) == jax.typeof(scale) else x
        for x in later
    )
    return _barrier((codes, scale), later)


def computed_in(*arrays: jax.typing.ArrayLike) -> np.dtype[Any]:
    """Returns float64 if one of the arrays has it, else float32."""
    wide = any(jnp.result_type(x) == jnp.float64 for x in arrays)
    return np.dtype(np.float64 if wide else np.float32)


def narrowed(x: jax.Array, dtype: jax.typing.DTypeLike) -> jax.Array:
    """Returns a moment in a dtype; what is finite stays finite in a narrower one."""
    if jnp.finfo(dtype).bits < jnp.finfo(x.dtype).bits:
        bound = float(jnp.finfo(dtype).max) / 4
        x = jnp.where(jnp.isfinite(x), jnp.clip(x, -bound, bound), x)
    return x.astype(dtype)


def _is_small(param: jax.typing.ArrayLike) -> bool:
    """Returns whether int8 leaves a parameter's moments in float32."""
    if not jnp.issubdtype(jnp.result_type(param), jnp.floating) or jnp.ndim(param) < 2:
        return True
    try:
        return jnp.shape(param)[-1] < 16
    except Exception as error:  # this dimension is a symbol of unknown range
        raise ValueError(
            f"int8 must know whether rows of the shape {jnp.shape(param)} have 16 "
            "elements or more. Say so in jax.export.symbolic_shape, as in "
            "constraints=['d >= 16']."
        ) from error


def _maxima(x: jax.Array, axis: int | None) -> jax.Array:
    """Returns the largest elements along an axis, or in all, in float32."""
    return jnp.max(x, axis, keepdims=True, initial=0).astype(jnp.float32)


def _root(x: jax.Array, power: int) -> jax.Array:
    """Returns the root of x >= 0."""
    return x if power == 1 else jnp.sqrt(x) if power == 2 else _cbrt(x)


def _cbrt(x: jax.Array) -> jax.Array:
    """Returns the cube root of x >= 0 within 3e-7: several times faster than XLA's."""
    # First guess x^(-1/3): multiply the exponent by -1/3, by dividing the bits. It is
    # within 3.5%. Then take two steps of third order towards 1/y³ = x. They need no
    # division, and nothing in them overflows.
    third = lax.bitcast_convert_type(x, jnp.uint32) // 3
    y = lax.bitcast_convert_type(jnp.uint32(0x54A24000) - third, jnp.float32)
    for _ in range(2):
        error = 1.0 - (x * y) * (y * y)
        y += y * error * (1 / 3 + error * (2 / 9))
    return x * y * y
