"""The arithmetic: against a float64 reference, against Adam, by hand, by properties."""

from functools import cache, partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from adam3_optax import scale_by_adam3
from adam3_optax._rule import coefficients
from tests import reference
from tests.reference import Setting
from tests.settings import EACH_FORM, FORMS

SETTINGS = [
    Setting(form, *rest)
    for form in FORMS
    for rest in (
        (),
        (0.9, 0.95, 0.95, 0.1, 0.5),
        (0.8, 0.99, 0.9, -0.3, 2.0, 1e-6, 1e-10),
        (0.95, 0.9999, 0.999, 1.0, float("inf")),
        (0.0, 0.5, 0.0, 0.01, 1.0),
    )
]


def skewed_gradients(steps: int, size: int, seed: int = 0) -> Any:
    """Heavy-tailed, skewed noise about a mean, spanning 1e-4 to 30 in scale."""
    rng = np.random.default_rng(seed)
    scale = np.geomspace(1e-4, 30.0, size)
    noise = rng.exponential(size=(steps, size)) ** 1.5 * rng.choice([1, 1, 1, -1], size)
    return scale * (noise - rng.normal(size=size)) + scale * rng.standard_t(
        3, (steps, size)
    )


@cache
def optimizer_of(**kwargs: Any) -> optax.GradientTransformationExtraArgs:
    return scale_by_adam3(**kwargs)


@partial(jax.jit, static_argnums=0)
def step(optimizer: Any, g: jax.Array, state: Any) -> Any:
    return optimizer.update(g, state)


def run(optimizer: Any, gradients: Any, dtype: Any = jnp.float32) -> Any:
    """Returns the states and updates after each gradient, from a jitted step."""
    gradients = np.asarray(gradients, dtype)
    state = optimizer.init(gradients[0])
    trail = []
    for g in gradients:
        u, state = step(optimizer, g, state)
        trail.append((state, u))
    return jax.tree.map(lambda *x: np.stack(x), *trail)


def updates(gradients: Any, **kwargs: Any) -> Any:
    return np.asarray(run(optimizer_of(**kwargs), gradients)[1])


def stack(steps: Any) -> reference.Step:
    return reference.Step(*map(np.stack, zip(*steps, strict=True)))


# The reference.


@pytest.mark.parametrize("h", SETTINGS)
def test_follows_the_reference(h: Setting, x64: None) -> None:
    gradients = skewed_gradients(400, 64).astype(np.float32).astype(np.float64)
    expected = stack(reference.steps(gradients, h))
    bounds = stack(reference.float32_bounds(gradients, h))
    wide, narrow = (
        run(optimizer_of(**h._asdict()), gradients, x) for x in (np.float64, np.float32)
    )
    for i, (want, bound) in enumerate(zip(expected, bounds, strict=True)):
        got, low = ([*state[:3], u][i] for state, u in (wide, narrow))
        assert (got.dtype, low.dtype) == (np.float64, np.float32)
        # Relative to the element's own scale over time: a value that crosses zero has
        # no relative error of its own.
        scale = np.abs(want).max(axis=0)
        assert np.all(np.abs(got - want) <= 1e-12 * scale)
        np.testing.assert_array_less(np.abs(low - want), bound + 1e-30)
    # The bound says something: a step is known to about four digits or better.
    assert np.median(bounds.u / np.abs(expected.u).max(axis=0)) < 2e-4


# b1 = b2 = b3 = lam = 1/2, tau = 2, eps = 0, gradients 2, -1, 4: m, v, s and u.
S = -0.125 + 2**0.5, -0.25 + (12 / 7) ** 3 / 2
HAND_WORKED = {
    "cubic": [
        (1.0, 2.0, 0.5, (2 + 0.25) / 2),
        (0.0, 1.5, -0.25, -0.125 / 2**0.5),
        (2.0, 8.75, 3.875, (16 / 7 + 1) / 10**0.5),  # s is clipped to tau
    ],
    "stabilized": [
        (1.0, 2.0, 0.5, (2 + 0.25) / 2),
        (0.0, 1.5, -0.25, -0.125 / 2**0.5),
        (2.0, 8.75, S[0], (16 / 7 + S[0] / 2) / 10**0.5),
    ],
    "standardized": [
        (1.0, 2.0, 0.0, 2 / 2),  # d = 0 at the first step
        (0.0, 1.5, -0.5, (-1 / 6) / 2**0.5),
        (2.0, 8.75, S[1], (16 / 7 + S[1] / 0.875 / 10 / 2) / 10**0.5),
    ],
}


@pytest.mark.parametrize("third_moment", HAND_WORKED)
def test_first_three_steps_by_hand(third_moment: Any) -> None:
    h = Setting(third_moment, 0.5, 0.5, 0.5, 0.5, 2.0, 0.0)
    state, u = run(optimizer_of(**h._asdict()), [2.0, -1.0, 4.0])
    got = np.stack([*state[:3], u], axis=1)
    np.testing.assert_allclose(got, HAND_WORKED[third_moment], rtol=1e-6)
    by_reference = stack(reference.steps(np.array([2.0, -1.0, 4.0]), h))
    np.testing.assert_allclose(np.stack(by_reference, 1), HAND_WORKED[third_moment])


# lam = 0 is Adam, and so is no third moment.


@pytest.mark.parametrize(("form", "b2"), [*((x, 0.999) for x in FORMS), (None, 0.95)])
def test_adams_moments_bit_for_bit(
    form: Any, b2: float, standard_promotion: None
) -> None:
    gradients = skewed_gradients(300, 64)
    ours, u = run(scale_by_adam3(b2=b2, b3=0.9, lam=0.0, third_moment=form), gradients)
    adam, u_adam = run(optax.scale_by_adam(b2=b2), gradients)
    np.testing.assert_array_equal(ours.m, adam.mu)
    np.testing.assert_array_equal(ours.v, adam.nu)
    # Optax's 1 - b2ᵗ is inexact by up to 1.3e-5 at b2 = .999.
    np.testing.assert_allclose(u, u_adam, rtol=2e-5)


def test_bias_corrections_keep_their_digits() -> None:
    # 3 ulp, the bound that `reference.float32_bounds` builds on; the subtraction
    # 1 - b**t is off by thousands at b = .99999.
    ts = np.unique(np.geomspace(1, 2**31 - 1, 300).astype(np.int32))
    for b in (0.0, 0.5, 0.9, 0.999, 0.9999, 0.99999):
        h = (b, b, b, 0.0, 1.0, 0.0, 0.0)
        got = jax.vmap(lambda t, h=h: coefficients(h, t, jnp.float32).c1)(ts)
        exact = -np.expm1(ts * np.log1p(-(1 - b))) if b else np.ones(len(ts))
        assert np.max(np.abs(got * exact - 1)) <= 3 * 2.0**-23


# Properties.


@EACH_FORM
def test_each_element_steps_as_if_alone(form: Any) -> None:
    # In another order, in another shape, in leaves of its own, with the other sign.
    gradients = skewed_gradients(4, 12)
    plain = updates(gradients, third_moment=form)
    order = np.random.default_rng(0).permutation(12)
    shaped = updates(gradients.reshape(4, 2, 3, 2), third_moment=form)
    halves = np.split(gradients, [7], axis=1)
    parts = [updates(half, third_moment=form) for half in halves]
    for got, want in (
        (updates(gradients[:, order], third_moment=form), plain[:, order]),
        (updates(-gradients, third_moment=form), -plain),
        (shaped.reshape(4, 12), plain),
        (np.concatenate(parts, axis=1), plain),
    ):
        np.testing.assert_array_equal(got, want)


# Derivatives through steps.


@EACH_FORM
@pytest.mark.parametrize("eps", [1e-8, 0.0])
def test_derivatives_near_zero_gradient(form: Any, eps: float) -> None:
    # Where the value is fine, but the derivative of a quotient or root divides by v² or
    # by a root of v, which underflow sooner. All powers of ten are tried, and 0, where
    # the root has an infinite slope. And infinity times the zero derivative of a bound
    # that does not act is NaN; a Python inf is seen, a traced one is not.
    def total(g: jax.Array, tau: jax.Array) -> jax.Array:
        optimizer = scale_by_adam3(eps=eps, eps_root=1e-8, tau=tau, third_moment=form)
        swap = lambda state, g: optimizer.update(g, state)[::-1]  # noqa: E731
        start = optimizer.init(g), jnp.stack([g, g, -g, g])
        return jax.lax.scan(swap, *start)[1].sum()

    derivative = jax.jit(jax.grad(total))
    sizes = jnp.append(10.0 ** jnp.arange(-37, 12, dtype=jnp.float32), jnp.zeros(1))
    for tau in (1.0, jnp.inf):
        found = derivative(sizes, jnp.float32(tau))
        assert np.all(np.isfinite(found))
        assert found[-1] > 1e3  # 1/sqrt(eps_root), less the term's, which is 0
