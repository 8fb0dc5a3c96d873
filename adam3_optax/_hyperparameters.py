"""What users pass as hyperparameters: numbers, arrays and schedules, checked."""

import functools
import math
import sys
import warnings
from collections.abc import Callable
from types import FrameType
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from adam3_optax._formats import Float8, Format
from adam3_optax._rule import FORMS, Form, Moments, Scalar, ThirdMoment

ScalarOrSchedule = jax.typing.ArrayLike | Callable[[Any], Any]


class BlowUpWarning(UserWarning):
    """The third moment outlives the second: see `docs/algorithm.md`, section 4.

    After an isolated gradient s decays as b3ᵗ but sqrt(v) as b2^(t/2). Where
    b3 > sqrt(b2), the cubic and stabilized forms then take steps of hundreds of
    learning rates. b3 <= sqrt(b2) prevents that for |g| up to about 30, and b3 <= b2 up
    to about 1e4. In the standardized form the term is at most |lam|·tau at any |g|.
    """


class Float8Warning(UserWarning):
    """These decays are too slow for a float8 moment: see `docs/low_precision.md`.

    The error of m, relative to the update, grows with b1: 9% at 0.9, 27% at 0.99, 84%
    at 0.999. From 0.99 on store m in bfloat16. The largest m/sqrt(v) is bounded where
    b1² < b2, and the largest s/sqrt(v)³ of the cubic form grows as b2 nears 1. What is
    beyond the largest float8 is cut off.
    """


class _Range(NamedTuple):
    """The values that are allowed, in words and as a test."""

    words: str
    holds: Callable[[float], bool]
    exact: bool = False  # whether half precision would ruin it: 0.999 becomes 1


_MAXIMUM = float(np.finfo(np.float32).max)
_DECAY = _Range("in [0, 1)", lambda x: 0.0 <= x < 1.0, exact=True)
_EPSILON = _Range(
    "in [0, inf) (finite in float32)", lambda x: 0.0 <= x <= _MAXIMUM, exact=True
)
_FINITE = _Range("finite (in float32)", lambda x: abs(x) <= _MAXIMUM)
_THRESHOLD = _Range("in (0, inf] (to end the term, take lam to 0)", lambda x: x > 0.0)
_RANGES = {
    **dict.fromkeys(["b1", "b2", "b3"], _DECAY),
    **dict.fromkeys(["eps", "eps_root"], _EPSILON),
    **dict.fromkeys(["lam", "learning_rate", "weight_decay"], _FINITE),
    "tau": _THRESHOLD,
}


def number(name: str, value: Any) -> Scalar:
    """Returns a checked hyperparameter: a float, or a scalar that is traced.

    A traced scalar has no value yet, so only its dtype and shape are checked.
    """
    wanted = f"{name} must be a real number or a scalar array, got"
    if callable(value):
        raise TypeError(
            f"{wanted} {value!r}. For a schedule of it, use optax.inject_hyperparams."
        )
    numeric = isinstance(value, int | float | np.generic | np.ndarray | Array)
    dtype = getattr(value, "dtype", np.dtype(type(value)))
    floating = jnp.issubdtype(dtype, jnp.floating)
    if not numeric or not (floating or jnp.issubdtype(dtype, jnp.integer)):
        raise TypeError(f"{wanted} {value!r}")
    if np.shape(value) != ():
        raise ValueError(f"{wanted} an array of shape {np.shape(value)}")
    allowed = _RANGES[name]
    if allowed.exact and floating and jnp.finfo(dtype).bits < 32:
        raise ValueError(
            f"{name} must be a Python number or an array of float32 or wider, got "
            f"{dtype}, in which its value is already lost. With "
            "optax.inject_hyperparams, pass hyperparam_dtype=jnp.float32."
        )
    if isinstance(value, jax.core.Tracer):
        return value if floating else value.astype(float)
    try:
        x = float(value)
    except OverflowError:  # a Python int with hundreds of digits
        x = math.inf if value > 0 else -math.inf
    if not allowed.holds(x):
        raise ValueError(f"{name} must be {allowed.words}, got {x}")
    return x


def value_at(
    name: str, value: ScalarOrSchedule
) -> Callable[[jax.typing.ArrayLike], Scalar]:
    """Returns a checked hyperparameter as a function of the count before the step.

    A number or array is checked at once, a schedule at each step.
    """
    if callable(value):
        return lambda count: number(name, value(count))
    constant = number(name, value)
    return lambda count: constant


def form(third_moment: ThirdMoment | None) -> Form | None:
    """Returns the form of the third moment of a checked name; None if there is none."""
    if not isinstance(third_moment, str | None) or third_moment not in (*FORMS, None):
        allowed = ", ".join(map(repr, (*FORMS, None)))
        raise ValueError(f"third_moment must be one of {allowed}, got {third_moment!r}")
    return FORMS[third_moment] if third_moment else None


def warn_of_blow_up(
    b2: Scalar, b3: Scalar, lam: ScalarOrSchedule, form: Form | None
) -> None:
    """Warns, once for each pair of decays, if s outlives sqrt(v)."""
    if form is None or form.bounded or not isinstance(b2, float):
        return
    weight = None if callable(lam) else number("lam", lam)
    if not isinstance(b3, float) or (isinstance(weight, float) and weight == 0.0):
        return
    # The margin: sqrt(b2), rounded to float32 on its way here, is not too large.
    if b3 * b3 > b2 * (1 + 1e-6):
        _warn(
            f"b3 = {b3:g} exceeds sqrt(b2) = {math.sqrt(b2):g}: the third moment "
            "outlives the second, and an isolated gradient can be followed by steps of "
            "hundreds of learning rates. Use b3 <= sqrt(b2), or "
            "third_moment='standardized', whose term is bounded.",
            BlowUpWarning,
        )


def warn_of_float8(
    b1: Scalar, b2: Scalar, b3: Scalar, form: Form | None, formats: Moments[Format]
) -> None:
    """Warns, once for each set of decays, if they are too slow for float8."""
    if isinstance(formats.m, Float8) and isinstance(b1, float):
        remedy = "Use m_dtype='bfloat16'."
        if b1 >= 0.99:
            _warn(
                f"b1 = {b1:g} is slow for a float8 m, whose error grows to 27% of the "
                f"update at 0.99 and 84% at 0.999. {remedy}",
                Float8Warning,
            )
        elif isinstance(b2, float):
            room = (1 - b2) * (1 - b1**2 / b2) if b1**2 < b2 else 0.0
            if (1 - b1) ** 2 > 112**2 * room:
                _warn(
                    f"with b1 = {b1:g} and b2 = {b2:g}, |m|/sqrt(v) can exceed 112, "
                    f"where a float8 m ends. {remedy}",
                    Float8Warning,
                )
    if isinstance(formats.s, Float8) and form is FORMS["cubic"]:
        if not all(isinstance(b, float) for b in (b1, b2, b3)):
            return
        first = (1 - b3) * b1**3 / (1 - b2) ** 1.5  # s/sqrt(v)³ at step 1
        if first > 448:
            _warn(
                f"with b1 = {b1:g}, b2 = {b2:g} and b3 = {b3:g}, s/sqrt(v)³ is "
                f"{first:.0f} at step 1, and a float8 s ends at 448. Use "
                "s_dtype='bfloat16'.",
                Float8Warning,
            )


# Cached, so that it warns once: `optax.inject_hyperparams` builds the optimizer at
# every trace. If warnings are errors, this raises, and nothing is cached.
@functools.cache
def _warn(message: str, category: type[Warning]) -> None:
    warnings.warn(message, category, stacklevel=_frames_inside() + 1)


def _frames_inside() -> int:
    """Returns how many of the innermost frames are this package's, or Optax's."""
    inside, names = 0, (__package__, "optax")
    frame: FrameType | None = sys._getframe(1)
    while frame and frame.f_globals.get("__name__", "").split(".")[0] in names:
        inside, frame = inside + 1, frame.f_back
    return inside
