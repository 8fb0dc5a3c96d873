"""The arms: rules of an update, with the numbers that each may be tuned in.

A rule makes a direction of descent. Decoupled weight decay and the learning rate come
after it, the same for all: update = -lr·(direction + weight_decay·parameters), which is
the convention of `optax.adamw`.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from adam3_optax import ScaleByAdam3State, ThirdMoment, scale_by_adam3
from study import moments
from study.moments import Scalars

Numbers = dict[str, Any]  # hyperparameters by name: floats or traced scalars
Tree = Any
SHARED = ("lr", "warm_up", "b2", "weight_decay")  # every rule has them
ADAM = {"b1": 0.9, "eps": 1e-8}
ADAM3 = {**ADAM, "b3": 0.999, "lam": 0.01, "tau": 1.0}
MULTIPLICATIVE = {**ADAM3, "lam": 0.3, "tau": 10.0}


NUMBERS = ("b1", "b2", "b3", "lam", "tau", "eps")  # hyperparameters of AdaM3


class Setting(NamedTuple):
    """What a rule may depend on.

    Attributes:
        h: Hyperparameters.
        key: For the rule's own random numbers.
        steps: Of the whole run.
        scale: Root mean square of the task's gradient where training begins.
    """

    h: Numbers
    key: jax.Array
    steps: int
    scale: float


class Rule(NamedTuple):
    """A rule.

    Attributes:
        numbers: Those it has besides the shared ones, with their defaults.
        make: From a setting, the direction.
        term: How the skewness term is measured: by a form of the third moment, as
            "multiplicative", or None where there is no third moment.
        fades: Whether lam falls to 0.
    """

    numbers: dict[str, float]
    make: Callable[[Setting], optax.GradientTransformation]
    term: str | None = None
    fades: bool = False


def optimizer(rule: Rule, setting: Setting) -> optax.GradientTransformation:
    """Returns a rule's direction with decay and learning rate."""
    h = setting.h
    return optax.chain(
        rule.make(setting),
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


# --- The rules ----------------------------------------------------------------------


def _adam(x: Setting, *, nesterov: bool = False) -> optax.GradientTransformation:
    """Returns Adam."""
    h = x.h
    return optax.scale_by_adam(h["b1"], h["b2"], h["eps"], nesterov=nesterov)


def _adam3(form: ThirdMoment, sign: float = 1.0) -> Callable[[Setting], Any]:
    """Returns what makes AdaM3; with sign -1, the one that goes the other way."""

    def make(x: Setting) -> optax.GradientTransformation:
        h = x.h
        chosen = {name: h[name] for name in NUMBERS} | {"lam": sign * h["lam"]}
        return scale_by_adam3(**chosen, third_moment=form)

    return make


def _belief(x: Setting) -> optax.GradientTransformation:
    """Returns AdaBelief, with Optax's eps."""
    return optax.scale_by_belief(x.h["b1"], x.h["b2"])


def _ademamix(x: Setting) -> optax.GradientTransformation:
    """Returns AdEMAMix; its b3 is the decay of its slow momentum."""
    h = x.h
    return optax.contrib.scale_by_ademamix(
        h["b1"], h["b2"], h["b3"], h["alpha"], h["eps"]
    )


def _lion(x: Setting) -> optax.GradientTransformation:
    """Returns Lion."""
    return optax.scale_by_lion(x.h["b1"], x.h["b2"])


def _muon(x: Setting) -> optax.GradientTransformation:
    """Returns Optax's Muon, in updates of root mean square .2.

    All matrices take part, embedding and output, too; for the rest it is NAdam.
    """
    muon = optax.contrib.muon(
        1.0, beta=x.h["beta"], adam_b2=x.h["b2"], consistent_rms=0.2
    )
    return optax.chain(muon, optax.scale(-1.0))  # the learning rate comes later


def _fading(x: Setting) -> optax.GradientTransformation:
    """Returns the standardized form with lam falling linearly to 0."""
    fading = optax.linear_schedule(1.0, 0.0, x.steps)
    h = x.h

    def lam(count: jax.Array) -> jax.Array:
        return h["lam"] * fading(count)

    chosen: Any = {name: h[name] for name in NUMBERS} | {"lam": lam}
    return scale_by_adam3(**chosen, third_moment="standardized")


def _ends(x: Setting) -> optax.GradientTransformation:
    """Returns the standardized form on embedding and output, and Adam elsewhere."""
    return optax.partition(
        {"ends": _adam3("standardized")(x), "rest": _adam(x)}, _end_or_rest
    )


def _end_or_rest(params: Tree) -> Tree:
    """Returns a label for each leaf."""

    def label(path: Any, _: Any) -> str:
        return "ends" if path[0].key in ("embed", "output") else "rest"

    return jax.tree.map_with_path(label, params)


def _cubic_at_scale_1(x: Setting) -> optax.GradientTransformation:
    """Returns the cubic form, on gradients that begin with a root mean square of 1.

    Its eps, too, is relative to those.
    """
    return optax.chain(optax.scale(1 / x.scale), _adam3("cubic")(x))


Direction = Callable[..., jax.Array]  # from m, v, s, scalars and a key


def _by_direction(direction: Direction) -> Callable[[Setting], Any]:
    """Returns what makes a rule of the standardized moments and another direction."""

    def make(x: Setting) -> optax.GradientTransformation:
        inner = _adam3("standardized")(x)

        def update(
            updates: Tree, state: ScaleByAdam3State, params: Tree = None
        ) -> tuple[Tree, ScaleByAdam3State]:
            # The direction that comes with the moments is dropped by the compiler.
            _, state = inner.update(updates, state, params)
            k = moments.scalars(x.h, state.count)
            leaves, treedef = jax.tree.flatten(state.m)
            vs, ss = jax.tree.leaves(state.v), jax.tree.leaves(state.s)
            key = jax.random.fold_in(x.key, state.count)
            keys = jax.random.split(key, len(leaves))
            found = [
                direction(m, v, s, k, key)
                for m, v, s, key in zip(leaves, vs, ss, keys, strict=True)
            ]
            return treedef.unflatten(found), state

        return optax.GradientTransformation(inner.init, update)

    return make


def random_sign(m: Any, v: Any, s: Any, k: Scalars, key: Any) -> jax.Array:
    """Returns the standardized direction with s flipped in half of the elements."""
    sign = jax.random.rademacher(key, s.shape, s.dtype)
    b = moments.term("standardized", v, s * sign, k)
    return moments.direction(m, v, b, k)


def agreeing(m: Any, v: Any, s: Any, k: Scalars, key: Any) -> jax.Array:
    """Returns Adam's, longer where the skewness agrees with it, shorter elsewhere."""
    del key
    skew = moments.skewness(v, s, k) * jnp.sign(m)
    return moments.adam(m, v, k) * (1.0 + k.lam * jnp.clip(skew, -k.tau, k.tau))


def magnitude(m: Any, v: Any, s: Any, k: Scalars, key: Any) -> jax.Array:
    """Returns Adam's, longer by the size of the skewness, whatever its sign."""
    del key
    size = jnp.minimum(jnp.abs(moments.skewness(v, s, k)), k.tau)
    return moments.adam(m, v, k) * (1.0 + k.lam * size)


RULES: dict[str, Rule] = {
    "adamw": Rule(ADAM, _adam),
    "nadamw": Rule(ADAM, lambda x: _adam(x, nesterov=True)),
    # The loss reads the smoothing; see `training.Program.halves`.
    "smoothed": Rule({**ADAM, "smoothing": 0.1}, _adam),
    "cubic": Rule(ADAM3, _adam3("cubic"), "cubic"),
    "stabilized": Rule(ADAM3, _adam3("stabilized"), "stabilized"),
    "standardized": Rule(ADAM3, _adam3("standardized"), "standardized"),
    "negative": Rule(ADAM3, _adam3("standardized", -1.0), "standardized"),
    "random_sign": Rule(ADAM3, _by_direction(random_sign), "standardized"),
    "adabelief": Rule({"b1": 0.9}, _belief),
    "ademamix": Rule({**ADAM, "b3": 0.99, "alpha": 5.0}, _ademamix),
    "lion": Rule({"b1": 0.9}, _lion),
    "muon": Rule({"beta": 0.95}, _muon),
    "agreeing": Rule(MULTIPLICATIVE, _by_direction(agreeing), "multiplicative"),
    "magnitude": Rule(MULTIPLICATIVE, _by_direction(magnitude), "multiplicative"),
    "fading": Rule(ADAM3, _fading, "standardized", fades=True),
    "ends": Rule(ADAM3, _ends, "standardized"),
    "cubic_at_scale_1": Rule(ADAM3, _cubic_at_scale_1, "cubic"),
}


# --- What is logged of the third moment ---------------------------------------------


def mechanism(rule: Rule, state: Tree, x: Setting) -> dict[str, jax.Array]:
    """Returns |b_t|/|m̂|, its median and .999 quantile, and the share clipped at tau.

    Over the elements that have had a gradient; nothing without a third moment.
    """
    if rule.term is None:
        return {}
    [found] = [y for y in jax.tree.leaves(state, is_leaf=_is_state) if _is_state(y)]
    m, v, s = (flat(tree) for tree in found[:3])
    h = x.h
    if rule.fades:
        # The lam of the update that made this state.
        fading = optax.linear_schedule(1.0, 0.0, x.steps)
        h = {**h, "lam": h["lam"] * fading(found.count - 1)}
    k = moments.scalars(h, found.count)
    skewed = s if rule.term in ("cubic", "stabilized") else moments.skewness(v, s, k)
    if rule.term == "multiplicative":
        ratio = jnp.abs(k.lam * jnp.clip(skewed, -k.tau, k.tau))
    else:
        b = moments.term(rule.term, v, s, k)  # type: ignore[arg-type]
        ratio = jnp.abs(b) / jnp.abs(m * k.m)
    seen = (m != 0) & (v > 0)
    middle, tail = _quantiles(ratio, seen, (0.5, 0.999))
    clipped = (seen & (jnp.abs(skewed) >= k.tau)).sum() / jnp.maximum(seen.sum(), 1)
    return {"ratio": middle, "ratio_tail": tail, "clipped": clipped}


def agreement(shadows: ScaleByAdam3State, h: Numbers) -> jax.Array:
    """Returns the correlation of two estimates of the skewness.

    Pearson's, of γ clipped to ±1, over the elements that have had a gradient in both;
    NaN where one of the estimates is constant.

    Args:
        shadows: Two states of the standardized form, along a leading axis.
        h: Their hyperparameters.
    """
    k = moments.scalars(h, shadows.count[0])
    v, s = (
        jnp.concatenate([y.reshape(2, -1) for y in jax.tree.leaves(tree)], axis=1)
        for tree in (shadows.v, shadows.s)
    )
    seen = (v > 0).all(axis=0)
    weights = seen / jnp.maximum(seen.sum(), 1)
    skew = jnp.clip(moments.skewness(v, s, k), -1.0, 1.0)
    a, b = skew - (weights[None] * skew).sum(axis=1, keepdims=True)
    spread = jnp.sqrt((weights * a * a).sum() * (weights * b * b).sum())
    return (weights * a * b).sum() / spread


def flat(tree: Tree) -> jax.Array:
    """Returns all elements of a tree in one vector."""
    return jnp.concatenate([jnp.ravel(y) for y in jax.tree.leaves(tree)])


def _is_state(x: Any) -> bool:
    """Returns whether x is a state of AdaM3."""
    return isinstance(x, ScaleByAdam3State)


def _quantiles(
    x: jax.Array, seen: jax.Array, wanted: tuple[float, ...]
) -> list[jax.Array]:
    """Returns quantiles (the element below) of the elements seen; NaN without any."""
    ordered = jnp.sort(jnp.where(seen, x, jnp.inf))
    count = seen.sum()
    return [
        jnp.where(count > 0, ordered[(q * (count - 1)).astype(int)], jnp.nan)
        for q in wanted
    ]
