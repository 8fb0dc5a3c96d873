"""The mathematics of AdaM3 on one array: no trees, no storage, no Optax.

Letters are those of `docs/algorithm.md`. Every function takes arrays that already have
the type computed in (float32 or float64) and returns the same type.
"""

from typing import Literal, NamedTuple, get_args

import jax
import jax.numpy as jnp

ThirdMoment = Literal["cubic", "stabilized", "standardized"]
THIRD_MOMENTS: tuple[ThirdMoment, ...] = get_args(ThirdMoment)

Scalar = float | jax.Array


class Hyperparameters(NamedTuple):
    """What the user chose: Python floats, or traced scalars."""

    b1: Scalar
    b2: Scalar
    b3: Scalar
    lam: Scalar
    tau: Scalar
    eps: Scalar
    eps_root: Scalar


class Coefficients(NamedTuple):
    """The scalars of step t: a = 1 - b weighs the new, c = 1/(1 - bᵗ) corrects."""

    b1: Scalar
    b2: Scalar
    b3: Scalar
    lam: Scalar
    tau: Scalar
    eps: Scalar
    eps_root: Scalar
    a1: Scalar
    a2: Scalar
    a3: Scalar
    c1: jax.Array
    c2: jax.Array
    c3: jax.Array


def coefficients(
    h: Hyperparameters, t: jax.Array, dtype: jax.typing.DTypeLike
) -> Coefficients:
    """Returns the scalars of step `t` (counted from 1) in the type computed in."""

    def cast(x: Scalar) -> Scalar:
        return x if isinstance(x, float) else x.astype(dtype)

    # 1 - b is taken before rounding, for Python numbers in double precision. At
    # b = .99999, 1 - float32(b) is off by 1e-3.
    a1, a2, a3 = (cast(1.0 - b) for b in (h.b1, h.b2, h.b3))
    # The reciprocal is taken here, for XLA takes it for some shapes, not for others.
    c1, c2, c3 = (1.0 / _one_minus_power(a, t.astype(dtype)) for a in (a1, a2, a3))
    chosen = Hyperparameters(*map(cast, h))
    return Coefficients(*chosen, a1=a1, a2=a2, a3=a3, c1=c1, c2=c2, c3=c3)


def update_m(g: jax.Array, m: jax.Array, k: Coefficients) -> jax.Array:
    """Returns m_t from the gradient and m of step t - 1."""
    return k.a1 * g + k.b1 * m


def update_v(g: jax.Array, v: jax.Array, k: Coefficients) -> jax.Array:
    """Returns v_t from the gradient and v of step t - 1."""
    # The minimum is that of g² clipped to `limit`. Clipping g itself would make the
    # compiler fuse the sum in another order, and v differ from optax.adam's by an ulp.
    limit = float(jnp.finfo(g.dtype).max) / 4
    return jnp.minimum(k.a2 * g**2 + k.b2 * v, k.a2 * limit + k.b2 * v)


def update_s(
    g: jax.Array, m: jax.Array, s: jax.Array, k: Coefficients, third_moment: ThirdMoment
) -> jax.Array:
    """Returns s_t from the gradient, m_t, and s of step t - 1."""
    # About the updated m_t, uncorrected; corrected in the standardized form, so that
    # d_1 = 0 and the first steps do not pollute s.
    d = g - (m * k.c1 if third_moment == "standardized" else m)
    return k.a3 * _third_power(d, k.eps, third_moment) + k.b3 * s


def skewness_term(
    v: jax.Array, s: jax.Array, k: Coefficients, third_moment: ThirdMoment
) -> jax.Array:
    """Returns b_t, which is added to the bias-corrected momentum."""
    if third_moment != "standardized":
        return k.lam * jnp.clip(s, -k.tau, k.tau)
    # 0, as is its derivative, where v̂ is 0 or so small that d³ has long underflowed.
    # The inner `where` keeps NaN out of the derivative; so do three factors 1/σ, for
    # the derivative of one division would square σ³.
    v_hat = v * k.c2
    seen = v_hat > 2.0**24 * jnp.finfo(v.dtype).tiny
    sigma = jnp.sqrt(jnp.where(seen, v_hat, 1.0))
    r = 1.0 / sigma
    skewness = s * k.c3 * r * r * r
    return k.lam * jnp.where(seen, sigma * jnp.clip(skewness, -k.tau, k.tau), 0.0)


def direction(
    m: jax.Array,
    v: jax.Array,
    s: jax.Array,
    k: Coefficients,
    third_moment: ThirdMoment,
) -> jax.Array:
    """Returns u_t = (m̂ + b_t) / (sqrt(v̂ + eps_root) + eps)."""
    b = skewness_term(v, s, k, third_moment)
    return (m * k.c1 + b) / (jnp.sqrt(v * k.c2 + k.eps_root) + k.eps)


def _one_minus_power(a: Scalar, t: jax.Array) -> jax.Array:
    """Returns 1 - bᵗ for a = 1 - b, with the digits that the subtraction would lose."""
    # b = 0 has no logarithm; t = 1 apart gives its derivative, too.
    log_b = jnp.log1p(-jnp.where(a < 1.0, a, 0.0))
    later = jnp.where(a < 1.0, -jnp.expm1(t * log_b), 1.0)
    return jnp.where(t == 1.0, a, later)


def _third_power(d: jax.Array, eps: Scalar, third_moment: ThirdMoment) -> jax.Array:
    """Returns what s averages: d³, or sign(d)·(|d| + eps)^(3/2)."""
    if third_moment != "stabilized":
        return _within(d, 1 / 3) ** 3
    # a·sqrt(a), for a general power is several times slower. The `where` defines the
    # derivative at d = 0 as 0, also with eps = 0.
    a = jnp.where(d == 0, 1.0, jnp.abs(_within(d, 2 / 3)) + eps)
    return jnp.sign(d) * (a * jnp.sqrt(a))


def _within(x: jax.Array, root: float) -> jax.Array:
    """Clips to half of max^root, so that x^(1/root) and its averages stay finite.

    Half, because max^(1/3) rounded to float32 already cubes to infinity, and because
    the rounded weights b and 1 - b may add up to more than 1.
    """
    bound = float(jnp.finfo(x.dtype).max) ** root / 2
    return jnp.clip(x, -bound, bound)
