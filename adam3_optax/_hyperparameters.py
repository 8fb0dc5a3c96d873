"""What users pass as hyperparameters: numbers, arrays and schedules, checked."""

import functools
import inspect
import math
import sys
import warnings
from collections.abc import Callable
from typing import Any, ParamSpec, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax import Array

from adam3_optax._formats import Float8, Format
from adam3_optax._rule import FORMS, Form, Moments, Scalar, ThirdMoment

_Parameters = ParamSpec("_Parameters")
_Result = TypeVar("_Result")


class BlowUpWarning(UserWarning):
    """The third moment outlives the second: see `docs/algorithm.md`, section 4.

    After an isolated gradient s decays as b3ᵗ but sqrt(v) as b2^(t/2). Where
    b3 > sqrt(b2), the cubic and stabilized forms then take steps of hundreds of
    learning rates. b3 <= sqrt(b2) prevents that for |g| up to about 30, and b3 <= b2 up
    to about 1e4. In the standardized form the term is at most |lam|·tau at any |g|.
    """


class Float8Warning(UserWarning):
    """These decays are too slow for a float8 moment: see `docs/low_precision.md`.

    The error of m, relative to the update, grows with b1: 9% at 0.9, 27% at 0.99, 90%
    at 0.999. From 0.99 on store m in bfloat16. The largest m/sqrt(v) is bounded where
    b1² < b2, and the largest s/sqrt(v)³ of the cubic form grows as b2 nears 1. What is
    beyond the largest float8 is cut off.
    """


# What is allowed: in words, the least and the greatest.
_MAXIMUM = float(np.finfo(np.float32).max)
_DECAY = "in [0, 1)", 0.0, math.nextafter(1.0, 0.0)
_EPSILON = "in [0, inf) (finite in float32)", 0.0, _MAXIMUM
_FINITE = "finite (in float32)", -_MAXIMUM, _MAXIMUM
_RANGES = dict.fromkeys(["b1", "b2", "b3"], _DECAY)
_RANGES |= dict.fromkeys(["eps", "eps_root"], _EPSILON)
_RANGES |= dict.fromkeys(["lam", "learning_rate", "weight_decay"], _FINITE)
_RANGES["tau"] = "in (0, inf] (for no skewness term: lam=0)", math.ulp(0.0), math.inf
_EXACT = "b1", "b2", "b3", "eps", "eps_root"  # in half precision 0.999 becomes 1


def number(name: str, value: Any) -> Scalar:
    """Returns a checked hyperparameter: a float, or a scalar that is traced.

    A traced scalar has no value yet, so only its dtype and shape are checked.
    """
    wanted = f"{name} must be a real number or a scalar array, got"
    numeric = isinstance(value, int | float | np.generic | np.ndarray | Array)
    dtype = getattr(value, "dtype", np.dtype(type(value)))
    floating = jnp.issubdtype(dtype, jnp.floating)
    if not numeric or not (floating or jnp.issubdtype(dtype, jnp.integer)):
        remedy = ". For a schedule of it, use optax.inject_hyperparams."
        raise TypeError(f"{wanted} {value!r}{remedy if callable(value) else ''}")
    if np.shape(value) != ():
        raise ValueError(f"{wanted} an array of shape {np.shape(value)}")
    if name in _EXACT and floating and jnp.finfo(dtype).bits < 32:
        raise ValueError(
            f"{name} must be of float32 or wider, got {dtype}, in which its value is "
            "lost. With optax.inject_hyperparams, pass hyperparam_dtype=jnp.float32."
        )
    if isinstance(value, jax.core.Tracer):
        return value if floating else value.astype(float)
    try:
        x = float(value)
    except OverflowError:  # a Python int with hundreds of digits
        x = math.inf if value > 0 else -math.inf
    words, least, greatest = _RANGES[name]
    if not least <= x <= greatest:
        raise ValueError(f"{name} must be {words}, got {x}")
    return x


_UNLIKE_OPTAX = "Name all after b2; mu_dtype is m_dtype here; there is no nesterov."


def named(make: Callable[_Parameters, _Result]) -> Callable[_Parameters, _Result]:
    """Makes an optimizer's function say what stands for an argument of Optax's."""

    @functools.wraps(make)
    def checked(*args: _Parameters.args, **kwargs: _Parameters.kwargs) -> _Result:
        try:
            inspect.signature(make).bind(*args, **kwargs)
        except TypeError as error:
            raise TypeError(f"{make.__name__}: {error}. {_UNLIKE_OPTAX}") from None
        return make(*args, **kwargs)

    return checked


def value_at(name: str, value: optax.ScalarOrSchedule) -> Callable[[Any], Scalar]:
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


def warn_of_blow_up(b2: Scalar, b3: Scalar, lam: Any, form: Form | None) -> None:
    """Warns, once for each pair of decays, if s outlives sqrt(v)."""
    weight = None if callable(lam) else number("lam", lam)
    is_zero = isinstance(weight, float) and weight == 0.0
    if is_zero or form is None or form.bounded:
        return
    # The margin: sqrt(b2), rounded to float32 on its way here, is not too large.
    if isinstance(b2, float) and isinstance(b3, float) and b3 * b3 > b2 * (1 + 1e-6):
        _warn(
            f"b3 = {b3:g} exceeds sqrt(b2) = {math.sqrt(b2):g}: the third moment "
            "outlives the second, and after an isolated gradient steps can be hundreds "
            "of learning rates. Use b3 <= sqrt(b2), or third_moment='standardized'.",
            BlowUpWarning,
        )


def warn_of_float8(
    b1: Scalar, b2: Scalar, b3: Scalar, form: Form | None, formats: Moments[Format]
) -> None:
    """Warns, once for each set of decays, if they are too slow for float8."""
    why = {}
    if isinstance(formats.m, Float8) and isinstance(b1, float):
        if b1 >= 0.99:
            why["m"] = f"b1 = {b1:g} is slow, and errors are 27% of an update or more"
        elif isinstance(b2, float):
            room = (1 - b2) * (1 - b1**2 / b2) if b1**2 < b2 else 0.0
            if (1 - b1) ** 2 > 112**2 * room:
                why["m"] = f"with b1 = {b1:g}, b2 = {b2:g} |m|/sqrt(v) can exceed 112"
    is_known = all(isinstance(b, float) for b in (b1, b2, b3))
    if isinstance(formats.s, Float8) and form is FORMS["cubic"] and is_known:
        first = (1 - b3) * b1**3 / (1 - b2) ** 1.5  # s/sqrt(v)³ at step 1
        if first > 448:
            why["s"] = f"with its decays s/sqrt(v)³ is {first:.0f} at step 1, past 448"
    for name, reason in why.items():
        remedy = f"Use {name}_dtype='bfloat16'."
        _warn(f"float8 does not fit this {name}: {reason}. {remedy}", Float8Warning)


# Cached, so that it warns once: `optax.inject_hyperparams` builds the optimizer at
# every trace. If warnings are errors, this raises, and nothing is cached.
@functools.cache
def _warn(message: str, category: type[Warning]) -> None:
    # At the user's line, so the innermost frames of this package and Optax are skipped.
    level, names = 1, (__package__, "optax")
    frame: Any = sys._getframe()
    while frame and frame.f_globals.get("__name__", "").split(".")[0] in names:
        level, frame = level + 1, frame.f_back
    warnings.warn(message, category, stacklevel=level)
