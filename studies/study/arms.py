"""The arms: rules of an update, with the numbers that each may be tuned in.

A rule makes a direction of descent. Decoupled weight decay and the learning rate come
after it, the same for all: update = -lr·(direction + weight_decay·parameters), which is
the convention of `optax.adamw`. Letters are those of `docs/algorithm.md`.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from adam3_optax import ThirdMoment, scale_by_adam3, third_moment_report

Numbers = dict[str, Any]  # hyperparameters by name: floats or traced scalars
Tree = Any
ADAM = {"b1": 0.9, "eps": 1e-8}
ADAM3 = {**ADAM, "b3": 0.999, "lam": 0.01, "tau": 1.0}
OF_REPORT = ("b1", "b2", "b3", "lam", "tau")


class Setting(NamedTuple):
    """What a rule may depend on."""

    h: Numbers
    key: jax.Array  # for the rule's own random numbers
    steps: int  # of the whole run
    scale: float  # root mean square of the task's gradient where training begins


class Rule(NamedTuple):
    """A rule."""

    numbers: dict[str, float]  # those besides the shared ones, with their defaults
    make: Callable[[Setting], Any]  # returns the direction, as Optax's
    term: ThirdMoment | None = None  # the form by which its skewness term is measured


def optimizer(rule: str, setting: Setting) -> optax.GradientTransformation:
    """Returns a rule's direction with decay and learning rate."""
    h = setting.h
    return optax.chain(
        RULES[rule].make(setting),
        optax.add_decayed_weights(h["weight_decay"]),
        optax.scale_by_learning_rate(schedule(h["lr"], h["warm_up"], setting.steps)),
    )


def schedule(lr: Any, warm_up: Any, steps: int) -> Callable[[jax.Array], jax.Array]:
    """Returns a linear warm-up over a share of the steps, then a cosine to 0."""

    def rate(count: jax.Array) -> jax.Array:
        done = (count.astype(jnp.float32) + 1.0) / (steps + 1.0)
        rising = done / jnp.maximum(warm_up, 1e-6)
        falling = 0.5 + 0.5 * jnp.cos(jnp.pi * (done - warm_up) / (1.0 - warm_up))
        return lr * jnp.where(done < warm_up, rising, falling)

    return rate


def _adam(x: Setting, *, nesterov: bool = False) -> Any:
    h = x.h
    return optax.scale_by_adam(h["b1"], h["b2"], h["eps"], nesterov=nesterov)


def _adam3(x: Setting, form: ThirdMoment, factor: float = 1.0) -> Any:
    """Returns a form of AdaM3, its lam times a factor."""
    chosen = {name: x.h[name] for name in (*OF_REPORT, "eps")}
    return scale_by_adam3(**chosen | {"lam": factor * x.h["lam"]}, third_moment=form)


def _cubic_at_scale_1(x: Setting) -> Any:
    """Returns the cubic form on gradients, and so an eps, in units of their start."""
    return optax.chain(optax.scale(1 / x.scale), _adam3(x, "cubic"))


def _random_sign(x: Setting) -> Any:
    """Returns the standardized form with -lam, and so -s, in half of the elements."""
    plus, minus = (_adam3(x, "standardized", factor) for factor in (1.0, -1.0))

    def update(gradients: Tree, state: Any, params: Tree = None) -> tuple[Tree, Any]:
        key = jax.random.fold_in(x.key, state.count + 1)
        flipped, _ = minus.update(gradients, state, params)
        found, state = plus.update(gradients, state, params)
        leaves, treedef = jax.tree.flatten(found)
        keys = treedef.unflatten(jax.random.split(key, len(leaves)))

        def choose(key: jax.Array, a: jax.Array, b: jax.Array) -> jax.Array:
            return jnp.where(jax.random.rademacher(key, a.shape, a.dtype) > 0, a, b)

        return jax.tree.map(choose, keys, found, flipped), state

    return optax.GradientTransformation(plus.init, update)


def _magnitude(x: Setting) -> Any:
    """Returns Adam's direction times 1 + lam·min(|γ|, tau): without the sign of γ."""
    inner = _adam3(x, "standardized", 0.0)

    def update(gradients: Tree, state: Any, params: Tree = None) -> tuple[Tree, Any]:
        found, state = inner.update(gradients, state, params)

        def longer(u: jax.Array, v: jax.Array, s: jax.Array) -> jax.Array:
            size = jnp.minimum(jnp.abs(skewness(v, s, x.h, state.count)), x.h["tau"])
            return u * (1.0 + x.h["lam"] * size)

        return jax.tree.map(longer, found, state.v, state.s), state

    return optax.GradientTransformation(inner.init, update)


def skewness(v: jax.Array, s: jax.Array, h: Numbers, t: jax.Array) -> jax.Array:
    """Returns γ = ŝ/v̂^(3/2) of standardized moments after step t, 0 where v̂ is 0."""

    def unbiased(moment: jax.Array, b: Any) -> jax.Array:
        # expm1 keeps the digits that 1 - bᵗ would lose.
        return moment / -jnp.expm1(t.astype(jnp.float32) * jnp.log1p(b - 1.0))

    v_hat, s_hat = unbiased(v, h["b2"]), unbiased(s, h["b3"])
    seen = v_hat > 2.0**24 * jnp.finfo(jnp.float32).tiny  # else its cube is 0
    # Three factors, for σ³ may overflow where the skewness does not.
    r = 1.0 / jnp.sqrt(jnp.where(seen, v_hat, 1.0))
    return jnp.where(seen, s_hat * r * r * r, 0.0)


RULES: dict[str, Rule] = {
    "adamw": Rule(ADAM, _adam),
    "nadamw": Rule(ADAM, lambda x: _adam(x, nesterov=True)),
    # The loss reads the smoothing; see `training.Program`.
    "smoothed": Rule({**ADAM, "smoothing": 0.1}, _adam),
    "cubic": Rule(ADAM3, lambda x: _adam3(x, "cubic"), "cubic"),
    "stabilized": Rule(ADAM3, lambda x: _adam3(x, "stabilized"), "stabilized"),
    "standardized": Rule(ADAM3, lambda x: _adam3(x, "standardized"), "standardized"),
    "negative": Rule(ADAM3, lambda x: _adam3(x, "standardized", -1.0), "standardized"),
    "random_sign": Rule(ADAM3, _random_sign, "standardized"),
    "magnitude": Rule(ADAM3, _magnitude),
    "cubic_at_scale_1": Rule(ADAM3, _cubic_at_scale_1, "cubic"),
}


def mechanism(rule: str, state: Tree, h: Numbers) -> dict[str, jax.Array]:
    """Returns |b_t|/|m̂|, its median and tail, and the share clipped at tau."""
    chosen, form = {name: h.get(name) for name in OF_REPORT}, RULES[rule].term
    if form is None:
        return {}
    found = third_moment_report(state, **chosen, third_moment=form).overall
    return {x: getattr(found, x) for x in ("ratio", "ratio_tail", "clipped")}
