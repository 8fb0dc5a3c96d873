"""What users pass as hyperparameters: numbers, arrays and schedules, checked."""

import math
import sys
import threading
import warnings
from collections.abc import Callable
from types import FrameType
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from adam3_optax._rule import THIRD_MOMENTS, Scalar, ThirdMoment

ScalarOrSchedule = jax.typing.ArrayLike | Callable[[Any], Any]
Check = Callable[[str, jax.typing.ArrayLike], Scalar]


class BlowUpWarning(UserWarning):
    """The third moment outlives the second: see `docs/algorithm.md`, section 4.

    After an isolated gradient s decays as b3ᵗ but sqrt(v) as b2^(t/2). Where
    b3 > sqrt(b2), the cubic and stabilized forms then take steps of hundreds of
    learning rates. b3 <= sqrt(b2) prevents that for |g| up to about 30, and b3 <= b2 up
    to about 1e4. In the standardized form the term is at most |lam|·tau at any |g|.
    """


def decay(name: str, value: jax.typing.ArrayLike) -> Scalar:
    """Returns a checked decay rate, in [0, 1)."""
    b = _exact(name, value)
    if isinstance(b, float) and not 0.0 <= b < 1.0:
        raise ValueError(f"{name} must be in [0, 1), got {b}")
    return b


def epsilon(name: str, value: jax.typing.ArrayLike) -> Scalar:
    """Returns a checked eps or eps_root, in [0, inf)."""
    eps = _exact(name, value)
    if isinstance(eps, float) and not 0.0 <= eps < math.inf:
        raise ValueError(f"{name} must be in [0, inf), got {eps}")
    return eps


def finite(name: str, value: jax.typing.ArrayLike) -> Scalar:
    """Returns a checked number, finite in float32."""
    x = _scalar(name, value)
    if isinstance(x, float) and not abs(x) <= float(np.finfo(np.float32).max):
        raise ValueError(f"{name} must be finite (in float32), got {x}")
    return x


def threshold(name: str, value: jax.typing.ArrayLike) -> Scalar:
    """Returns a checked tau, in (0, inf]: infinity means no clip."""
    x = _scalar(name, value)
    if isinstance(x, float) and not x > 0.0:
        raise ValueError(
            f"{name} must be in (0, inf] (to end the term, take lam to 0), got {x}"
        )
    return x


def scheduled(check: Check, name: str, value: ScalarOrSchedule) -> ScalarOrSchedule:
    """Returns a schedule as it is, and all else checked."""
    return value if callable(value) else check(name, value)


def at(check: Check, name: str, value: ScalarOrSchedule, count: jax.Array) -> Scalar:
    """Returns what `scheduled` returned, at the count before the step."""
    return check(name, value(count) if callable(value) else value)


def form(third_moment: ThirdMoment) -> ThirdMoment:
    """Returns a checked name of a form of the third moment."""
    if not isinstance(third_moment, str) or third_moment not in THIRD_MOMENTS:
        allowed = ", ".join(map(repr, THIRD_MOMENTS))
        raise ValueError(f"third_moment must be one of {allowed}, got {third_moment!r}")
    return third_moment


def warn_of_blow_up(
    b2: Scalar, b3: Scalar, lam: ScalarOrSchedule, third_moment: ThirdMoment
) -> None:
    """Warns, once for each pair of decays, where s outlives sqrt(v)."""
    if third_moment == "standardized" or (isinstance(lam, float) and lam == 0):
        return
    # The margin keeps b3 = sqrt(b2), rounded to float32 on its way here, silent.
    known = isinstance(b2, float) and isinstance(b3, float)
    if known and b3 * b3 > b2 * (1 + 1e-6):
        # Once, for `optax.inject_hyperparams` rebuilds the optimizer at every trace. If
        # the warning is an error, it has not been given.
        with _lock:
            if (b2, b3) not in _warned:
                _warn(b2, b3)
                _warned.add((b2, b3))


_lock = threading.Lock()
_warned: set[tuple[Scalar, Scalar]] = set()


def _warn(b2: Scalar, b3: Scalar) -> None:
    warnings.warn(
        f"b3 = {b3:g} exceeds sqrt(b2) = {math.sqrt(b2):g}: the third moment outlives "
        "the second, and an isolated gradient can be followed by steps of hundreds of "
        "learning rates. Use b3 <= sqrt(b2), or third_moment='standardized', whose "
        "term is bounded.",
        BlowUpWarning,
        stacklevel=_frames_inside() + 1,
    )


def _frames_inside() -> int:
    """Returns how many of the innermost frames are this package's, or Optax's."""
    inside = 0
    frame: FrameType | None = sys._getframe(1)
    while frame and frame.f_globals["__name__"].split(".")[0] in (__package__, "optax"):
        inside, frame = inside + 1, frame.f_back
    return inside


def _exact(name: str, value: jax.typing.ArrayLike) -> Scalar:
    """Returns a scalar that half precision would ruin: .999 in bfloat16 is 1."""
    x = _scalar(name, value)
    dtype = jnp.result_type(value)
    if jnp.issubdtype(dtype, jnp.floating) and jnp.finfo(dtype).bits < 32:
        raise ValueError(
            f"{name} must be a Python number or an array of float32 or wider, got "
            f"{dtype}, in which its value is already lost. With "
            "optax.inject_hyperparams, pass hyperparam_dtype=jnp.float32."
        )
    return x


def _scalar(name: str, value: jax.typing.ArrayLike) -> Scalar:
    """Returns a Python float, or the traced scalar where there is no value yet."""
    wanted = f"{name} must be a real number or a scalar array, got"
    if callable(value):
        raise TypeError(
            f"{wanted} {value!r}. For a schedule of it, use optax.inject_hyperparams."
        )
    if isinstance(value, bool) or not isinstance(
        value, int | float | np.generic | np.ndarray | jax.Array
    ):
        raise TypeError(f"{wanted} {value!r}")
    dtype = value.dtype if hasattr(value, "dtype") else np.dtype(type(value))
    if not (jnp.issubdtype(dtype, jnp.floating) or jnp.issubdtype(dtype, jnp.integer)):
        raise TypeError(f"{wanted} {value!r}, of type {dtype}")
    if np.shape(value) != ():
        raise ValueError(f"{wanted} an array of shape {np.shape(value)}")
    if isinstance(value, jax.core.Tracer):
        return value if jnp.issubdtype(dtype, jnp.floating) else value.astype(float)
    try:
        return float(value)
    except OverflowError:
        return math.inf if value > 0 else -math.inf
