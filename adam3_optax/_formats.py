"""How a moment is stored between steps: in float32, bfloat16, float8, or not at all.

Each is one array of the parameter's shape for each leaf. The rule sees arrays of
float32 or float64 only. To add a format, write a subclass of `Format` and enter it in
`SETTINGS`.
"""

import abc
import dataclasses
from typing import Any, ClassVar, Literal

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax import Array

from adam3_optax import _rounding, _xla
from adam3_optax._rule import Form, Moments, Sigma
from adam3_optax._trees import CAST

# None, "float32", "bfloat16", "float8", or the dtype of that name.
DTypeSetting = jax.typing.DTypeLike | None
Field = Any  # m, v or s of a state: a tree like the parameters, or EmptyState
Name = Literal["m", "v", "s"]
NAMES: Moments[Name] = Moments("m", "v", "s")


@dataclasses.dataclass(frozen=True)
class Format(abc.ABC):
    """How the leaves of one moment are stored.

    Formats are compared by value, so that functions compiled for one are used again.

    Attributes:
        dtypes: All that its leaves may have. Every format must name them.
        rounds: Whether it rounds, and needs random bits.
    """

    dtypes: ClassVar[tuple[np.dtype[Any], ...]]
    rounds: ClassVar[bool] = True

    def zeros(self, params: Any) -> Field:
        """Returns a moment before the first step, sharded as the parameters are."""

        def zero(param: Array) -> Array:
            wide = computed_in(param)
            dtype = wide if wide in self.dtypes else self.dtypes[0]
            return jnp.zeros_like(param, dtype=dtype)

        return jax.tree.map(zero, params)

    @abc.abstractmethod
    def load(self, stored: Any, sigma: Any) -> Array:
        """Returns the moment of a leaf, in float32 or wider.

        Args:
            stored: The leaf.
            sigma: A `Sigma`, of v as stored at the same time; None if none needs it.
        """

    @abc.abstractmethod
    def store(self, x: Array, sigma: Any, bits: Any) -> Any:
        """Returns a moment as a stored leaf.

        Args:
            x: The moment, in float32, or in float64 if it is stored so.
            sigma: A `Sigma`, of the new v as stored; None if no format needs it.
            bits: 32 random bits for each element; None if no format rounds.
        """

    def within(self, g: Array) -> Array:
        """Returns a gradient, clipped to what v can hold the square of."""
        return g


class Wide(Format):
    """Stored as it is computed: float32, or float64 for float64 parameters."""

    dtypes: ClassVar[Any] = (np.dtype(np.float32), np.dtype(np.float64))
    rounds = False

    def load(self, stored: Any, sigma: Any) -> Array:
        return jnp.asarray(stored)

    def store(self, x: Array, sigma: Any, bits: Any) -> Any:
        return x


class Float32(Wide):
    """Stored in float32, also for float64 parameters."""

    dtypes = Wide.dtypes[:1]


class BFloat16(Format):
    """Stored in bfloat16, rounded stochastically: to nearest, slow averages freeze."""

    dtypes = (jnp.dtype(jnp.bfloat16),)

    def load(self, stored: Any, sigma: Any) -> Array:
        return jnp.asarray(stored).astype(jnp.float32)

    def store(self, x: Array, sigma: Any, bits: Any) -> Any:
        return _rounding.to_bfloat16(x, bits)


@dataclasses.dataclass(frozen=True)
class Float8(Format):
    """m or s in float8_e4m3fn, in units of sigma = sqrt(v) as stored.

    By the Cauchy-Schwarz inequality |m_t| <= C·sqrt(v_t), where b1² < b2 and
    C = (1-b1)/sqrt((1-b2)·(1-b1²/b2)). That is 7.3 for (0.9, 0.999). So m/sigma has a
    fixed range, and needs no scale. s/sigma³ is the skewness itself.

    Attributes:
        power: Of sigma, in the unit: 1 for m; 3 for s, or 3/2 if s averages |d|^(3/2).
        exponent: x·2^exponent/sigma^power is the number that is rounded. The exponent
            is 2 for m, so that m ends at 112 sigma.
    """

    power: float
    exponent: int

    dtypes = (jnp.dtype(jnp.float8_e4m3fn),)

    def load(self, stored: Any, sigma: Any) -> Array:
        x = _xla.from_float8(stored).astype(sigma.value.dtype)
        if self.power == 1.0:
            return x * (sigma.value * 2.0**-self.exponent)
        # One factor after the other, and sigma within what float32 can cube: infinity
        # times 0 would be NaN, and NaN would stay.
        value = jnp.minimum(sigma.value, 2.0**39)
        return x * value * (value * value if self.power == 3.0 else jnp.sqrt(value))

    def store(self, x: Array, sigma: Any, bits: Any) -> Any:
        # The inverse is wider than x where v is float64.
        x = _rounding.without_derivative(x).astype(sigma.inverse.dtype) * sigma.inverse
        if self.power != 1.0:
            x *= sigma.inverse
            x *= sigma.inverse if self.power == 3.0 else jnp.sqrt(sigma.value)
        return _rounding.to_float8(x.astype(jnp.float32), self.exponent, bits)


class UnsignedFloat8(Format):
    """v in 8 bits: a float with 7 bits of exponent and 1 of mantissa.

    From 2^-72 to 1.5·2^54. What is less, but not 0, becomes 2^-72.
    """

    dtypes = (np.dtype(np.uint8),)

    def load(self, stored: Any, sigma: Any) -> Array:
        return _rounding.from_unsigned_float8(jnp.asarray(stored))

    def store(self, x: Array, sigma: Any, bits: Any) -> Any:
        return _rounding.to_unsigned_float8(_rounding.without_derivative(x), bits)

    def within(self, g: Array) -> Array:
        # A larger gradient counts as 2^27 in m and s, too. Else m/sigma had no bound.
        is_larger = (jnp.abs(g) > 2.0**27) & (jnp.abs(g) < jnp.inf)
        return jnp.where(is_larger, jnp.sign(g) * 2.0**27, g)


class Absent(Format):
    """Not stored: s of Adam is 0. One node without children stands for all leaves."""

    dtypes = ()
    rounds = False

    def zeros(self, params: Any) -> Field:
        return optax.EmptyState()

    def load(self, stored: Any, sigma: Any) -> Array:
        return jnp.zeros(())

    def store(self, x: Array, sigma: Any, bits: Any) -> Any:
        return None


# What users pass as m_dtype, v_dtype and s_dtype. "float8" depends on the moment.
SETTINGS: dict[Any, Any] = {None: Wide(), "float32": Float32(), "bfloat16": BFloat16()}
SETTINGS["float8"] = None
_WHY_NOT = {
    "float16": " (in which (g - m)³ underflows at |g| = 1e-3)",
    "int8": ". For 8 bits use 'float8', which needs no scales",
}


def format_for(moment: Name, setting: DTypeSetting, form: Form | None) -> Format:
    """Returns the format of a moment, from a user's setting."""
    name, known = f"{moment}_dtype", setting
    if isinstance(setting, int | float | complex | np.number | np.ndarray | Array):
        raise TypeError(
            f"{name} must be None, a string or a dtype, got {setting!r}. With "
            f"optax.inject_hyperparams, pass a string, or static_args={name!r}."
        )
    if setting is not None and not isinstance(setting, str):
        try:
            known = jnp.dtype(setting).name
        except TypeError:
            known = repr(setting)
    if known == "float8_e4m3fn" and moment != "v":  # v in 8 bits is no such float
        known = "float8"
    if known not in SETTINGS:
        allowed, why = ", ".join(map(repr, SETTINGS)), _WHY_NOT.get(str(known), "")
        raise ValueError(f"{name} must be one of {allowed}, got {known!r}{why}")
    return SETTINGS[known] or _float8(moment, form)


def _float8(moment: Name, form: Form | None) -> Format:
    power = form.skewness_power if form else 3.0
    return {"m": Float8(1.0, 2), "v": UnsignedFloat8(), "s": Float8(power, 0)}[moment]


def formats_for(form: Form | None, *settings: DTypeSetting) -> Moments[Format]:
    """Returns the formats of m, v and s, from a user's settings for them."""
    m, v, s = (format_for(*pair, form) for pair in zip(NAMES, settings, strict=True))
    if form is None and settings[2] is not None:
        raise ValueError("s_dtype must be None with third_moment=None, which has no s")
    if form is not None and form.bounded and isinstance(v, UnsignedFloat8):
        raise ValueError(
            "v_dtype='float8' is too noisy for third_moment='standardized': its "
            "skewness would be 30 to 64% too large. Use v_dtype='bfloat16'."
        )
    return Moments(m, v, Absent() if form is None else s)


def formats_of(fields: Moments[Field], form: Form | None) -> Moments[Format]:
    """Returns the formats in which the fields of a state are stored."""

    def find(name: Name, field: Field) -> Format:
        for f in (*SETTINGS.values(), Absent()):
            if fits(f or _float8(name, form), field):
                return f or _float8(name, form)
        types = sorted({str(jnp.result_type(x)) for x in jax.tree.leaves(field)})
        raise ValueError(
            f"the state's {name} is of {', '.join(types)}; it must be stored in "
            f"float32, float64, bfloat16 or float8. {CAST}"
        )

    return Moments(*map(find, NAMES, fields))


def fits(f: Format, field: Field) -> bool:
    """Returns whether a field is of a format."""
    # The type tells, not the leaves: a field may have none.
    if isinstance(f, Absent) or isinstance(field, optax.EmptyState):
        return isinstance(f, Absent) and isinstance(field, optax.EmptyState)
    return {jnp.result_type(x) for x in jax.tree.leaves(field)} <= set(f.dtypes)


def loaded(formats: Moments[Format], stored: Moments[Any]) -> Moments[Array]:
    """Returns the moments of a leaf, as they are stored, in float32 or wider."""
    v = formats.v.load(stored.v, None)
    sigma = sigma_of(v) if needs_sigma(formats) else None
    return Moments(formats.m.load(stored.m, sigma), v, formats.s.load(stored.s, sigma))


def needs_sigma(formats: Moments[Format]) -> bool:
    """Returns whether a moment is stored in units of sigma."""
    return any(isinstance(f, Float8) for f in formats)


def sigma_of(v: Array) -> Sigma:
    """Returns sqrt(v) and its inverse, of v as stored, with a floor at 2^-60."""
    return Sigma(*_xla.inverse_root(jnp.maximum(v, 2.0**-120)))


def computed_in(*arrays: jax.typing.ArrayLike) -> np.dtype[Any]:
    """Returns float64 if one of the arrays has it, else float32."""
    wide = any(jnp.result_type(x) == jnp.float64 for x in arrays)
    return np.dtype(np.float64 if wide else np.float32)


def widened(x: Any) -> Any:
    """Returns a floating array in float32, or in float64 if it is float64; else x."""
    dtype = getattr(x, "dtype", np.dtype(type(x)))
    floating = jnp.issubdtype(dtype, jnp.floating)
    return jnp.asarray(x).astype(computed_in(x)) if floating else x


def narrowed(x: Array, dtype: jax.typing.DTypeLike) -> Array:
    """Returns a moment in a dtype; what is finite stays finite in a narrower one."""
    if jnp.finfo(dtype).bits < jnp.finfo(x.dtype).bits:
        bound = float(jnp.finfo(dtype).max) / 4
        x = jnp.where(jnp.isfinite(x), jnp.clip(x, -bound, bound), x)
    return x.astype(dtype)
