"""The mathematics of AdaM3 on one array: no trees, no storage, no Optax.

Letters are those of `docs/algorithm.md`. Arrays come in the type computed in (float32
or float64), and results have the same type.
"""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any, Generic, Literal, NamedTuple, TypeVar

import jax
import jax.numpy as jnp

ThirdMoment = Literal["cubic", "stabilized", "standardized"]
Scalar = float | jax.Array

T = TypeVar("T")
U = TypeVar("U")


class Moments(NamedTuple, Generic[T]):
    """One thing for each moment: an array, a format, a name."""

    m: T
    v: T
    s: T

    def map(self, f: Callable[..., U], *others: "Moments[Any]") -> "Moments[U]":
        """Returns f of each moment's things."""
        return Moments(*map(f, self, *others))

    @staticmethod
    def columns(rows: "Sequence[Moments[U]]") -> "Moments[list[U]]":
        """Returns a list for each moment, from moments of several leaves."""
        return Moments(*([row[i] for row in rows] for i in range(3)))


class Hyperparameters(NamedTuple):
    """What the user chose: Python floats, or traced scalars. b is (b1, b2, b3)."""

    b: Moments[Scalar]
    lam: Scalar
    tau: Scalar
    eps: Scalar
    eps_root: Scalar


class Coefficients(NamedTuple):
    """The scalars of step t, in the type computed in.

    For each moment, a = 1 - b is the weight of the new, and c = 1/(1 - bᵗ) corrects the
    bias. So k.b.m is b1, and k.a.m is 1 - b1.
    """

    b: Moments[Scalar]
    a: Moments[Scalar]
    c: Moments[jax.Array]
    lam: Scalar
    tau: Scalar
    eps: Scalar
    eps_root: Scalar


@dataclasses.dataclass(frozen=True)
class Form:
    """A form of the third moment: all that tells it from the others.

    Attributes:
        deviation: Returns d, from the gradient and m_t.
        power: Returns what s averages, from d.
        term: Returns b_t, from v_t and s_t.
        skewness_power: Skewness without a scale is ŝ/σ^p, σ = sqrt(v̂). This is p.
        bounded: Whether tau bounds that skewness, so that b_t is at most |lam|·tau·σ.
            If not, tau bounds s.
    """

    deviation: Callable[[jax.Array, jax.Array, Coefficients], jax.Array]
    power: Callable[[jax.Array, Coefficients], jax.Array]
    term: Callable[[jax.Array, jax.Array, Coefficients], jax.Array]
    skewness_power: float
    bounded: bool


def coefficients(
    h: Hyperparameters, t: jax.Array, dtype: jax.typing.DTypeLike
) -> Coefficients:
    """Returns the scalars of step `t` (counted from 1) in the type computed in."""

    def cast(x: Scalar) -> Scalar:
        return x if isinstance(x, float) else x.astype(dtype)

    # For Python numbers 1 - b is computed in double precision, before it is rounded.
    # At b = 0.99999, 1 - float32(b) is wrong by 1e-3.
    a = h.b.map(lambda b: cast(1.0 - b))
    # The reciprocal is computed here. If the rule divided, XLA would replace the
    # division by a reciprocal for some shapes only, and results would depend on them.
    c = a.map(lambda a: 1.0 / _one_minus_power(a, t.astype(dtype)))
    return Coefficients(h.b.map(cast), a, c, *map(cast, h[1:]))


def update_m(g: jax.Array, m: jax.Array, k: Coefficients) -> jax.Array:
    """Returns m_t from the gradient and m of step t - 1."""
    return k.a.m * g + k.b.m * m


def update_v(g: jax.Array, v: jax.Array, k: Coefficients) -> jax.Array:
    """Returns v_t from the gradient and v of step t - 1."""
    # This is the average of g², with g² clipped to `limit` if g is finite. Clipping g
    # itself would make XLA fuse the sum in another order, and v would differ from
    # optax.adam's in the last bit.
    limit = float(jnp.finfo(g.dtype).max) / 4
    average = k.a.v * g**2 + k.b.v * v
    clipped = jnp.minimum(average, k.a.v * limit + k.b.v * v)
    return jnp.where(jnp.isinf(g), average, clipped)


def update_s(
    g: jax.Array, m: jax.Array, s: jax.Array, k: Coefficients, form: Form
) -> jax.Array:
    """Returns s_t from the gradient, m_t, and s of step t - 1."""
    return k.a.s * form.power(form.deviation(g, m, k), k) + k.b.s * s


def direction(
    m: jax.Array, v: jax.Array, b: jax.Array | float, k: Coefficients
) -> jax.Array:
    """Returns u_t = (m̂ + b_t) / (sqrt(v̂ + eps_root) + eps)."""
    return (m * k.c.m + b) / (jnp.sqrt(v * k.c.v + k.eps_root) + k.eps)


def standard_deviation(v: jax.Array, k: Coefficients) -> tuple[jax.Array, jax.Array]:
    """Returns σ = sqrt(v̂), and whether v̂ is large enough for a skewness.

    Below 2²⁴ times the smallest normal number, d³ has long become 0. There the skewness
    is 0 by definition, and σ is returned as 1, so that no division gives NaN.
    """
    v_hat = v * k.c.v
    seen = v_hat > 2.0**24 * jnp.finfo(v.dtype).tiny
    # This inner `where` keeps NaN out of the derivative.
    return jnp.sqrt(jnp.where(seen, v_hat, 1.0)), seen


def skewness(
    sigma: jax.Array, s: jax.Array, k: Coefficients, power: float = 3.0
) -> jax.Array:
    """Returns ŝ/σ^p."""
    # Several factors 1/σ instead of one division: σ³ overflows before the result does,
    # and the derivative of the division would square it.
    r = 1.0 / sigma
    x = s * k.c.s * r
    return x * r * r if power == 3.0 else x * r ** (power - 1.0)


def _about_m(g: jax.Array, m: jax.Array, k: Coefficients) -> jax.Array:
    """Returns d = g - m_t: about the updated m, without bias correction."""
    return g - m


def _about_m_hat(g: jax.Array, m: jax.Array, k: Coefficients) -> jax.Array:
    """Returns d = g - m̂. As d_1 = 0, the first steps do not pollute s."""
    return g - m * k.c.m


def _cube(d: jax.Array, k: Coefficients) -> jax.Array:
    """Returns d³."""
    return _within(d, 1 / 3) ** 3


def _signed_three_halves(d: jax.Array, k: Coefficients) -> jax.Array:
    """Returns sign(d)·(|d| + eps)^(3/2)."""
    # a·sqrt(a), because a general power is several times slower. The `where` defines
    # the derivative at d = 0 as 0, also with eps = 0.
    a = jnp.where(d == 0, 1.0, _within(jnp.abs(d) + k.eps, 2 / 3))
    return jnp.sign(d) * (a * jnp.sqrt(a))


def _clipped(v: jax.Array, s: jax.Array, k: Coefficients) -> jax.Array:
    """Returns b_t = lam·clip(s, -tau, tau)."""
    return k.lam * jnp.clip(s, -k.tau, k.tau)


def _standardized(v: jax.Array, s: jax.Array, k: Coefficients) -> jax.Array:
    """Returns b_t = lam·σ·clip(ŝ/σ³, -tau, tau), and 0 where v̂ is (nearly) 0."""
    sigma, seen = standard_deviation(v, k)
    # An infinite tau would let a skewness pass that has overflowed.
    tau = jnp.minimum(k.tau, float(jnp.finfo(v.dtype).max))
    clipped = jnp.clip(skewness(sigma, s, k), -tau, tau)
    return k.lam * jnp.where(seen, sigma * clipped, 0.0)


FORMS: dict[ThirdMoment, Form] = {
    "cubic": Form(_about_m, _cube, _clipped, 3.0, bounded=False),
    "stabilized": Form(_about_m, _signed_three_halves, _clipped, 1.5, bounded=False),
    "standardized": Form(_about_m_hat, _cube, _standardized, 3.0, bounded=True),
}


def _one_minus_power(a: Scalar, t: jax.Array) -> jax.Array:
    """Returns 1 - bᵗ for a = 1 - b, with the digits that the subtraction would lose."""
    # b = 0 has no logarithm. Step 1 is a case of its own for its derivative's sake.
    log_b = jnp.log1p(-jnp.where(a < 1.0, a, 0.0))
    later = jnp.where(a < 1.0, -jnp.expm1(t * log_b), 1.0)
    return jnp.where(t == 1.0, a, later)


def _within(x: jax.Array, root: float) -> jax.Array:
    """Clips x to half of max^root, so that x^(1/root) and its averages stay finite.

    Half, for two reasons. max^(1/3), rounded to float32, cubes to infinity. And the
    rounded weights b and 1 - b may add up to more than 1.
    """
    bound = float(jnp.finfo(x.dtype).max) ** root / 2
    return jnp.clip(x, -bound, bound)
