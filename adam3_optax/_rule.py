"""The mathematics of AdaM3 on one array: no trees, no storage, no Optax.

Letters are those of `docs/algorithm.md`. Arrays come in the type computed in (float32
or float64), and results have the same type.
"""

import dataclasses
from collections.abc import Callable
from typing import Any, Generic, Literal, NamedTuple, TypeVar

import jax.numpy as jnp
from jax import Array

ThirdMoment = Literal["cubic", "stabilized", "standardized"]
Scalar = float | Array

T = TypeVar("T")


class Moments(NamedTuple, Generic[T]):
    """One thing for each moment: an array, a format, a name."""

    m: T
    v: T
    s: T


class Coefficients(NamedTuple):
    """The scalars of step t, in the type computed in.

    a1 = 1 - b1 is the weight of the new, and c1 = 1/(1 - b1ᵗ) corrects the bias of m.
    Those with 2 are of v, and those with 3 of s. eps_root is None if it is the number
    0, so that nothing is added.
    """

    b1: Scalar
    b2: Scalar
    b3: Scalar
    a1: Scalar
    a2: Scalar
    a3: Scalar
    c1: Array
    c2: Array
    c3: Array
    lam: Scalar
    tau: Scalar
    eps: Scalar
    eps_root: Scalar | None


class Sigma(NamedTuple):
    """sqrt(v), without bias correction, and its inverse: the unit of a float8 state."""

    value: Array
    inverse: Array


@dataclasses.dataclass(frozen=True)
class Form:
    """A form of the third moment: all that tells it from the others.

    Attributes:
        deviation: Returns d, from the gradient and m_t.
        power: Returns what s averages, from d.
        term: Returns b_t, from s_t, v_t, and sqrt(v_t) if that is known already.
        skewness_power: Skewness without a scale is ŝ/σ^p, σ = sqrt(v̂). This is p.
        bounded: Whether tau bounds that skewness, so that b_t is at most |lam|·tau·σ.
            If not, tau bounds s.
    """

    deviation: Callable[[Array, Array, Coefficients], Array]
    power: Callable[[Array, Coefficients], Array]
    term: Callable[[Array, Array, Sigma | None, Coefficients], Array]
    skewness_power: float
    bounded: bool


def coefficients(h: tuple[Scalar, ...], t: Array, dtype: Any) -> Coefficients:
    """Returns the scalars of step t (counted from 1), in the type computed in.

    h is (b1, b2, b3, lam, tau, eps, eps_root): Python floats, or traced scalars.
    """

    def cast(x: Scalar) -> Any:
        return x if isinstance(x, float) else x.astype(dtype)

    # For Python numbers 1 - b is computed in double precision, before it is rounded.
    # At b = 0.99999, 1 - float32(b) is wrong by 1e-3.
    a = [cast(1.0 - b) for b in h[:3]]
    # The reciprocal is computed here. If the rule divided, XLA would replace the
    # division by a reciprocal for some shapes only, and results would depend on them.
    c = [1.0 / _one_minus_power(x, t.astype(dtype)) for x in a]
    k = [*map(cast, h[:3]), *a, *c, *map(cast, h[3:])]
    if isinstance(h[-1], float) and h[-1] == 0.0:
        k[-1] = None
    return Coefficients(*k)


def update_m(g: Array, m: Array, k: Coefficients) -> Array:
    """Returns m_t from the gradient and m of step t - 1."""
    return k.a1 * g + k.b1 * m


def update_v(g: Array, v: Array, k: Coefficients) -> Array:
    """Returns v_t from the gradient and v of step t - 1."""
    # This is the average of g², with g² clipped to `limit` if g is finite. If g itself
    # were clipped, or the minimum left out, XLA would fuse the sum in another order in
    # some programs, and v would differ from optax.adam's in the last bit.
    limit = float(jnp.finfo(g.dtype).max) / 4
    average = k.a2 * g**2 + k.b2 * v
    is_clipped = (jnp.abs(g) > limit**0.5) & (jnp.abs(g) < jnp.inf)
    return jnp.where(is_clipped, jnp.minimum(average, k.a2 * limit + k.b2 * v), average)


def update_s(g: Array, m: Array, s: Array, k: Coefficients, form: Form) -> Array:
    """Returns s_t from the gradient, m_t, and s of step t - 1."""
    return k.a3 * form.power(form.deviation(g, m, k), k) + k.b3 * s


def direction(m: Array, v: Array, b: Any, sigma: Any, k: Coefficients) -> Array:
    """Returns u_t = (m̂ + b_t) / (sqrt(v̂ + eps_root) + eps)."""
    if sigma is not None and k.eps_root is None:
        root = sigma.value * jnp.sqrt(k.c2)  # a root of each element less
    else:
        root = jnp.sqrt(v * k.c2 if k.eps_root is None else v * k.c2 + k.eps_root)
    return (m * k.c1 + b) / (root + k.eps)


def standard_deviation(v: Array, sigma: Any, k: Coefficients) -> tuple[Array, ...]:
    """Returns σ = sqrt(v̂), 1/σ, and whether v̂ is large enough for a skewness.

    Below 2²⁴ times the smallest normal number, d³ has long become 0. There the skewness
    is 0 by definition, whatever σ is.
    """
    v_hat, root = v * k.c2, jnp.sqrt(k.c2)
    seen = v_hat > 2.0**24 * jnp.finfo(v.dtype).tiny
    if sigma is not None:
        return sigma.value * root, sigma.inverse * (1.0 / root), seen
    # This inner `where` keeps NaN out of the derivative.
    found = jnp.sqrt(jnp.where(seen, v_hat, 1.0))
    return found, 1.0 / found, seen


def skewness(inverse: Array, s: Array, k: Coefficients, power: float = 3.0) -> Array:
    """Returns ŝ/σ^p from 1/σ."""
    # Several factors 1/σ instead of one division: σ³ overflows before the result does,
    # and the derivative of the division would square it.
    x = s * k.c3 * inverse
    return x * inverse * inverse if power == 3.0 else x * inverse ** (power - 1.0)


def _about_m(g: Array, m: Array, k: Coefficients) -> Array:
    """Returns d = g - m_t: about the updated m, without bias correction."""
    return g - m


def _about_m_hat(g: Array, m: Array, k: Coefficients) -> Array:
    """Returns d = g - m̂. As d_1 = 0, the first steps do not pollute s."""
    return g - m * k.c1


def _cube(d: Array, k: Coefficients) -> Array:
    """Returns d³."""
    return _within(d, 1 / 3) ** 3


def _signed_three_halves(d: Array, k: Coefficients) -> Array:
    """Returns sign(d)·(|d| + eps)^(3/2)."""
    # a·sqrt(a), because a general power is several times slower. The `where` defines
    # the derivative at d = 0 as 0, also with eps = 0.
    a = jnp.where(d == 0, 1.0, _within(jnp.abs(d) + k.eps, 2 / 3))
    return jnp.sign(d) * (a * jnp.sqrt(a))


def _clipped(s: Array, v: Array, sigma: Sigma | None, k: Coefficients) -> Array:
    """Returns b_t = lam·clip(s, -tau, tau)."""
    return k.lam * jnp.clip(s, -k.tau, k.tau)


def _standardized(s: Array, v: Array, sigma: Sigma | None, k: Coefficients) -> Array:
    """Returns b_t = lam·σ·clip(ŝ/σ³, -tau, tau), and 0 where v̂ is (nearly) 0."""
    deviation, inverse, seen = standard_deviation(v, sigma, k)
    # An infinite tau would let a skewness pass that has overflowed.
    tau = jnp.minimum(k.tau, float(jnp.finfo(v.dtype).max))
    clipped = jnp.clip(skewness(inverse, s, k), -tau, tau)
    return k.lam * jnp.where(seen, deviation * clipped, 0.0)


FORMS: dict[ThirdMoment, Form] = {
    "cubic": Form(_about_m, _cube, _clipped, 3.0, bounded=False),
    "stabilized": Form(_about_m, _signed_three_halves, _clipped, 1.5, bounded=False),
    "standardized": Form(_about_m_hat, _cube, _standardized, 3.0, bounded=True),
}


def _one_minus_power(a: Scalar, t: Array) -> Array:
    """Returns 1 - bᵗ for a = 1 - b, with the digits that the subtraction would lose."""
    # b = 0 has no logarithm. Step 1 is a case of its own for its derivative's sake.
    log_b = jnp.log1p(-jnp.where(a < 1.0, a, 0.0))
    later = jnp.where(a < 1.0, -jnp.expm1(t * log_b), 1.0)
    return jnp.where(t == 1.0, a, later)


def _within(x: Array, root: float) -> Array:
    """Clips x to half of max^root, so that x^(1/root) and its averages stay finite.

    Half, for two reasons. max^(1/3), rounded to float32, cubes to infinity. And the
    rounded weights b and 1 - b may add up to more than 1.
    """
    bound = float(jnp.finfo(x.dtype).max) ** root / 2
    return jnp.clip(x, -bound, bound)
