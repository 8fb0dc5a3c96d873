"""The formulas of AdaM3 that the variants of the rule are made of.

Letters are those of `docs/algorithm.md`. The moments themselves come from the package:
what is here begins with m, v and s of step t. All is in float32.
"""

from typing import Any, NamedTuple, get_args

import jax
import jax.numpy as jnp

from adam3_optax import ThirdMoment

FORMS: tuple[ThirdMoment, ...] = get_args(ThirdMoment)
# Below this v̂ the cubes of deviations are 0, and so is the skewness by definition.
SMALLEST = 2.0**24 * float(jnp.finfo(jnp.float32).tiny)


class Scalars(NamedTuple):
    """The scalars of step t: hyperparameters, and for each moment 1/(1 - bᵗ)."""

    m: jax.Array
    v: jax.Array
    s: jax.Array
    lam: jax.Array
    tau: jax.Array
    eps: jax.Array


def scalars(h: dict[str, Any], t: jax.Array) -> Scalars:
    """Returns the scalars of step `t` (counted from 1)."""

    def correction(b: Any) -> jax.Array:
        # expm1 keeps the digits that 1 - bᵗ would lose; b = 0 has log b = -inf.
        log_b = jnp.log1p(jnp.asarray(b, jnp.float32) - 1.0)
        return -1.0 / jnp.expm1(t.astype(jnp.float32) * log_b)

    corrections = (correction(h[name]) for name in ("b1", "b2", "b3"))
    rest = (jnp.asarray(h[name], jnp.float32) for name in ("lam", "tau", "eps"))
    return Scalars(*corrections, *rest)


def adam(m: jax.Array, v: jax.Array, k: Scalars) -> jax.Array:
    """Returns Adam's direction."""
    return direction(m, v, 0.0, k)


def direction(m: jax.Array, v: jax.Array, b: Any, k: Scalars) -> jax.Array:
    """Returns the direction with the term b: (m̂ + b) / (sqrt(v̂) + eps)."""
    return (m * k.m + b) / (jnp.sqrt(v * k.v) + k.eps)


def skewness(v: jax.Array, s: jax.Array, k: Scalars) -> jax.Array:
    """Returns the skewness γ = ŝ/v̂^(3/2) of standardized moments, 0 where v̂ is 0."""
    seen = v * k.v > SMALLEST
    # Three factors, for σ³ may overflow where the skewness does not.
    r = 1.0 / _sigma(v, k)
    return jnp.where(seen, s * k.s * r * r * r, 0.0)


def term(form: ThirdMoment, v: jax.Array, s: jax.Array, k: Scalars) -> jax.Array:
    """Returns the term b_t of a form: lam·clip(s, ±tau), or lam·σ·clip(γ, ±tau)."""
    if form != "standardized":
        return k.lam * jnp.clip(s, -k.tau, k.tau)
    return k.lam * _sigma(v, k) * jnp.clip(skewness(v, s, k), -k.tau, k.tau)


def _sigma(v: jax.Array, k: Scalars) -> jax.Array:
    """Returns σ = sqrt(v̂), and 1 where v̂ is too small for a skewness."""
    v_hat = v * k.v
    return jnp.sqrt(jnp.where(v_hat > SMALLEST, v_hat, 1.0))
