"""The arithmetic: against a float64 reference, against Adam, by hand, by properties."""

from functools import cache, partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from adam3_optax import ScaleByAdam3State, scale_by_adam3
from adam3_optax._rule import coefficients, standard_deviation
from tests import reference
from tests.reference import Setting
from tests.settings import BOUNDED, EACH_FORM, FORMS, UNBOUNDED

ULP = 2.0**-23

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


def make(h: Setting) -> optax.GradientTransformationExtraArgs:
    chosen: Any = h._asdict()
    return scale_by_adam3(**chosen)


def run(
    optimizer: optax.GradientTransformation, gradients: Any, dtype: Any = jnp.float32
) -> tuple[Any, Any]:
    """Returns the states and updates after each gradient, from a jitted step."""
    gradients = np.asarray(gradients, dtype)
    state = optimizer.init(gradients[0])
    trail = []
    for g in gradients:
        u, state = step(optimizer, g, state)
        trail.append((state, u))
    return jax.tree.map(lambda *x: np.stack(x), *trail)


@partial(jax.jit, static_argnums=0)
def step(optimizer: Any, g: jax.Array, state: Any) -> Any:
    return optimizer.update(g, state)


def stack(steps: Any) -> reference.Step:
    return reference.Step(*map(np.stack, zip(*steps, strict=True)))


@pytest.mark.parametrize("h", SETTINGS)
def test_float64_follows_the_reference(h: Setting, x64: None) -> None:
    gradients = skewed_gradients(400, 64)
    expected = stack(reference.steps(gradients, h))
    state, u = run(make(h), gradients, jnp.float64)
    for got, want in zip((state.m, state.v, state.s, u), expected, strict=True):
        assert got.dtype == jnp.float64
        # Relative to the element's own scale over time: a value that crosses zero has
        # no relative error of its own.
        scale = np.abs(want).max(axis=0)
        assert np.all(np.abs(got - want) <= 1e-12 * scale)
        np.testing.assert_allclose(got, want, rtol=1e-9, atol=1e-14 * scale.min())


@pytest.mark.parametrize("h", SETTINGS)
def test_float32_stays_within_the_derived_bound(h: Setting) -> None:
    gradients = skewed_gradients(400, 64).astype(np.float32).astype(np.float64)
    expected = stack(reference.steps(gradients, h))
    bounds = stack(reference.float32_bounds(gradients, h))
    state, u = run(make(h), gradients)
    for got, want, bound in zip(
        (state.m, state.v, state.s, u), expected, bounds, strict=True
    ):
        error = np.abs(np.asarray(got, np.float64) - want)
        np.testing.assert_array_less(error, bound + 1e-30)
    # The bound says something: a step is known to about four digits or better.
    assert np.median(bounds.u / np.abs(expected.u).max(axis=0)) < 2e-4


HAND_WORKED = {  # b1 = b2 = b3 = lam = 1/2, tau = 2, eps = 0, gradients 2, -1, 4
    "cubic": (
        (1.0, 2.0, 0.5, (2 + 0.25) / 2),
        (0.0, 1.5, -0.25, -0.125 / 2**0.5),
        (2.0, 8.75, 3.875, (16 / 7 + 1) / 10**0.5),  # s is clipped to tau
    ),
    "stabilized": (
        (1.0, 2.0, 0.5, (2 + 0.25) / 2),
        (0.0, 1.5, -0.25, -0.125 / 2**0.5),
        (2.0, 8.75, -0.125 + 2**0.5, (16 / 7 + (-0.125 + 2**0.5) / 2) / 10**0.5),
    ),
    "standardized": (
        (1.0, 2.0, 0.0, 2 / 2),  # d = 0 at the first step
        (0.0, 1.5, -0.5, (-1 / 6) / 2**0.5),
        (
            2.0,
            8.75,
            -0.25 + (12 / 7) ** 3 / 2,
            (16 / 7 + (-0.25 + (12 / 7) ** 3 / 2) / 0.875 / 10 / 2) / 10**0.5,
        ),
    ),
}


@pytest.mark.parametrize("third_moment", HAND_WORKED)
def test_first_three_steps_by_hand(third_moment: Any) -> None:
    h = Setting(third_moment, 0.5, 0.5, 0.5, 0.5, 2.0, 0.0)
    state, u = run(make(h), [2.0, -1.0, 4.0])
    got = np.stack([state.m, state.v, state.s, u], axis=1)
    np.testing.assert_allclose(got, HAND_WORKED[third_moment], rtol=1e-6)
    by_reference = stack(reference.steps(np.array([2.0, -1.0, 4.0]), h))
    np.testing.assert_allclose(np.stack(by_reference, 1), HAND_WORKED[third_moment])
    assert state.count.tolist() == [1, 2, 3]


# lam = 0 is Adam, and so is no third moment.


@pytest.mark.parametrize("form", [*FORMS, None])
def test_adams_moments_bit_for_bit(form: Any, standard_promotion: None) -> None:
    gradients = skewed_gradients(300, 64)
    ours, u = run(scale_by_adam3(lam=0.0, third_moment=form), gradients)
    adam, u_adam = run(optax.scale_by_adam(), gradients)
    np.testing.assert_array_equal(ours.m, adam.mu)
    np.testing.assert_array_equal(ours.v, adam.nu)
    # Optax's 1 - b2ᵗ is inexact by up to 1.3e-5 at b2 = .999.
    np.testing.assert_allclose(u, u_adam, rtol=2e-5)


@pytest.mark.parametrize("form", [FORMS[0], None])
def test_adams_updates_to_some_ulps(form: Any) -> None:
    # One sign, few steps: what remains is the error of the correction, in units in the
    # last place of the update, not that of long sums.
    gradients = np.abs(skewed_gradients(10, 512)).astype(np.float32)
    exact = stack(reference.steps(gradients, Setting(lam=0.0))).u
    _, u = run(scale_by_adam3(lam=0.0, third_moment=form), gradients)
    assert np.max(np.abs(u / exact - 1)) < 8 * ULP


@EACH_FORM
def test_wide_gradients_do_not_poison_a_narrow_state(form: Any, x64: None) -> None:
    optimizer = scale_by_adam3(b2=0.9, b3=0.9, third_moment=form)
    state = optimizer.init(jnp.ones(3, jnp.float32))
    for g in (jnp.array([1e14, 1e21, 1e200]), *[jnp.full(3, -1e-3)] * 3):
        u, state = step(optimizer, g, state)
        assert u.dtype == g.dtype == jnp.float64
        assert np.isfinite(u).all()
        for moment in state[:3]:
            assert moment.dtype == jnp.float32
            assert np.isfinite(moment).all()


@EACH_FORM
def test_derivatives_by_a_decay_of_zero(form: Any) -> None:
    def loss(decays: Any) -> jax.Array:
        optimizer = scale_by_adam3(**decays, lam=0.5, tau=0.7, third_moment=form)
        state, total = optimizer.init(jnp.zeros(2)), jnp.zeros(())
        for g in ([1.0, -2.0], [3.0, -1.0], [-2.0, 0.5]):
            u, state = optimizer.update(jnp.array(g), state)
            total += u @ jnp.array([1.0, 2.0])
        return total

    derivative = jax.jit(jax.grad(loss))
    half = dict.fromkeys(("b1", "b2", "b3"), jnp.float32(0.5))
    for name in half:
        at_zero, beside = (
            derivative(half | {name: jnp.float32(b)})[name] for b in (0.0, 1e-4)
        )
        np.testing.assert_allclose(at_zero, beside, rtol=0.02, atol=1e-3)


@pytest.mark.parametrize("b", [0.0, 0.5, 0.9, 0.999, 0.9999, 0.99999])
def test_bias_corrections_keep_their_digits(b: float) -> None:
    # 3 ulp, the bound that `reference.float32_bounds` builds on; the subtraction
    # 1 - b**t is off by thousands at b = .99999.
    h = (b, b, b, 0.0, 1.0, 0.0, 0.0)
    ts = np.unique(np.concatenate([np.arange(1, 50), np.geomspace(50, 2**31 - 1, 200)]))
    ts = ts.astype(np.int32)
    got = jax.vmap(lambda t: coefficients(h, t, jnp.float32).c1)(jnp.asarray(ts))
    exact = -np.expm1(ts * np.log1p(-(1 - b))) if b else np.ones(len(ts))
    assert np.max(np.abs(got * exact - 1)) <= 3 * ULP


# Properties.

FLOATS = st.floats(-100, 100, width=32).filter(lambda x: x == 0 or abs(x) > 1e-4)
SIZES = st.sampled_from([1, 2, 5, 9])  # few, for each is compiled
SEQUENCES = SIZES.flatmap(lambda n: hnp.arrays(np.float32, (4, n), elements=FLOATS))


@cache
def optimizer_of(**kwargs: Any) -> optax.GradientTransformationExtraArgs:
    return scale_by_adam3(**kwargs)


def updates(gradients: Any, **kwargs: Any) -> Any:
    return np.asarray(run(optimizer_of(**kwargs), gradients)[1])


@EACH_FORM
@given(gradients=SEQUENCES, seed=st.integers(0, 2**16))
def test_permuted_leaves_permute_the_updates(
    form: Any, gradients: Any, seed: int
) -> None:
    order = np.random.default_rng(seed).permutation(gradients.shape[1])
    plain = updates(gradients, third_moment=form)
    permuted = updates(gradients[:, order], third_moment=form)
    np.testing.assert_array_equal(permuted, plain[:, order])


@EACH_FORM
@given(gradients=hnp.arrays(np.float32, (4, 9), elements=FLOATS), cut=SIZES)
def test_split_leaves_split_the_updates(form: Any, gradients: Any, cut: int) -> None:
    whole = updates(gradients, third_moment=form)
    parts = [
        updates(part, third_moment=form) for part in np.split(gradients, [cut], axis=1)
    ]
    # A leaf of one element is compiled to scalar code, which rounds on its own.
    ulps = 4 if cut == 1 else 0
    np.testing.assert_allclose(
        np.concatenate(parts, axis=1), whole, rtol=ulps * ULP, atol=ulps * ULP
    )


@EACH_FORM
@given(gradients=hnp.arrays(np.float32, (4, 12), elements=FLOATS))
def test_reshaped_leaves_reshape_the_updates(form: Any, gradients: Any) -> None:
    flat = updates(gradients, third_moment=form)
    for shape in ((3, 4), (12, 1), (2, 3, 2)):
        shaped = updates(gradients.reshape(4, *shape), third_moment=form)
        np.testing.assert_array_equal(shaped.reshape(4, 12), flat)


@EACH_FORM
@given(gradients=SEQUENCES)
def test_negated_gradients_negate_the_updates(form: Any, gradients: Any) -> None:
    np.testing.assert_array_equal(
        updates(-gradients, third_moment=form),
        -updates(gradients, third_moment=form),
    )


@pytest.mark.parametrize("form", BOUNDED)
@given(
    gradients=SEQUENCES.map(lambda g: np.where(np.abs(g) < 1, 1 + np.abs(g), g)),
    exponent=st.integers(-30, 30),
)
def test_a_bounded_term_is_free_of_scale(
    form: Any, gradients: Any, exponent: int
) -> None:
    # (1-b3)·d³ is a normal float32 for |d| from 2.3e-12, and d is clipped at 3.5e12:
    # gradients of 1 to 100, times 2⁻³⁰ to 2³⁰, keep within, and powers of 2 are exact.
    plain, scaled = (
        updates(g, third_moment=form, lam=0.1, eps=0.0)
        for g in (gradients, gradients * np.float32(2.0**exponent))
    )
    np.testing.assert_allclose(scaled, plain, rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("form", UNBOUNDED)
def test_the_other_forms_are_not(form: Any) -> None:
    gradients = skewed_gradients(30, 8)
    plain = updates(gradients, third_moment=form, lam=1.0, eps=0.0)
    scaled = updates(0.25 * gradients, third_moment=form, lam=1.0, eps=0.0)
    assert np.max(np.abs(scaled - plain)) > 0.01


@pytest.mark.parametrize("form", BOUNDED)
@given(gradients=SEQUENCES, lam=st.floats(0, 2), tau=st.floats(0.01, 10))
def test_a_bounded_term_moves_at_most_lam_tau(
    form: Any, gradients: Any, lam: float, tau: float
) -> None:
    g = jnp.asarray(gradients)
    with_term, without = (
        bounded(form, g, jnp.float32(x), jnp.float32(tau)) for x in (lam, 0)
    )
    rounding = 4 * ULP * (lam * tau + np.abs(without))
    assert np.all(np.abs(with_term - without) <= lam * tau + rounding)


@partial(jax.jit, static_argnums=0)
def bounded(form: Any, g: jax.Array, lam: jax.Array, tau: jax.Array) -> jax.Array:
    return along(scale_by_adam3(lam=lam, tau=tau, third_moment=form), g)


def along(optimizer: Any, gradients: jax.Array) -> jax.Array:
    """Returns the updates, from a scan."""
    swap = lambda state, g: optimizer.update(g, state)[::-1]  # noqa: E731
    return jax.lax.scan(swap, optimizer.init(gradients[0]), gradients)[1]


@pytest.mark.parametrize(
    ("third_moment", "b3", "largest"),
    [
        ("cubic", 0.999, 318),
        ("stabilized", 0.999, 293),
        ("standardized", 0.999, 1),
        ("cubic", 0.95**0.5, 1.01),
        ("stabilized", 0.95**0.5, 1.01),
    ],
)
@pytest.mark.filterwarnings("ignore::adam3_optax.BlowUpWarning")
def test_blow_up_after_an_isolated_gradient(
    third_moment: Any, b3: float, largest: float
) -> None:
    # A gradient of 1, then none: with b3 > sqrt(b2) s outlives sqrt(v), and the cubic
    # update reaches 318 learning rates 785 steps later. Adam's is at most 1.
    gradients = np.eye(1, 2000).T
    u = updates(gradients, b2=0.95, b3=b3, third_moment=third_moment)
    np.testing.assert_allclose(u.max(), largest, rtol=0.01)


@pytest.mark.parametrize(
    ("kwargs", "at", "total"),
    [
        ({"lam": 0.0}, 2000, 30),
        ({"third_moment": "cubic"}, 2000, 30),
        ({"third_moment": "standardized"}, 2000, 329),
        ({"third_moment": "standardized"}, 0, -293),
        ({"third_moment": "standardized", "b2": 0.95}, 2000, 12),
        ({"third_moment": "standardized", "eps": 1e-3}, 2000, 98),
    ],
)
def test_drift_after_an_isolated_gradient(
    kwargs: dict[str, Any], at: int, total: float
) -> None:
    # Published, too: bounded in each step, the standardized term is not so in sum.
    gradients = jnp.zeros((60_000, 1)).at[at].set(1.0)
    u = along(scale_by_adam3(**kwargs), gradients)
    np.testing.assert_allclose(u.sum(), total, rtol=0.02)


RANGE: list[Any] = [
    np.finfo(np.float32).max, 1e30, 1e18, 1e9, 1e-6, 1e-12, 1e-20, 1e-38, 1e-45
]  # fmt: skip


@EACH_FORM
def test_no_finite_gradient_poisons_the_state(form: Any) -> None:
    # Sizes, each with a constant and an alternating sign, and once: 27 elements.
    patterns = [np.ones(60), np.resize([1.0, -1.0], 60), np.eye(1, 60)[0]]
    gradients = np.stack(patterns, 1)[:, :, None] * np.array(RANGE, np.float32)
    with np.errstate(under="ignore"):
        gradients = gradients.astype(np.float32).reshape(60, -1)
    state, u = run(scale_by_adam3(third_moment=form), gradients)
    for x in state[:3]:
        assert np.all(np.isfinite(x))
    u = u.reshape(60, 3, -1)
    # At the largest number itself, m̂ may round up to infinity; the state does not.
    assert np.all(np.isfinite(u[:, :, 1:]))
    full = [1e-6 <= size <= 1e18 for size in RANGE]
    np.testing.assert_allclose(u[:, 0, full], 1.0, rtol=0.03)


@pytest.mark.parametrize("b2", [0.5, 0.9, 0.999])
def test_a_square_counts_as_a_quarter_of_the_maximum_at_most(b2: float) -> None:
    # More could round up to infinity, in the average or in its correction.
    quarter = float(np.finfo(np.float32).max) / 4
    gradients = [[1e30], [1.0], [-1e30], [1e19]]
    state, _ = run(scale_by_adam3(b2=b2, lam=0.0), gradients)
    v = 0.0
    for got, square in zip(state.v, (quarter, 1.0, quarter, quarter), strict=True):
        v = b2 * v + (1 - b2) * square
        np.testing.assert_allclose(got, v, rtol=1e-6)


def test_where_a_skewness_begins() -> None:
    # Above 2²⁴ times the smallest normal number, and not at it.
    edge = np.float32(2.0**24) * np.finfo(np.float32).tiny
    v = np.stack([0 * edge, edge / 2, edge, np.nextafter(edge, np.float32(1))])
    h = (0.0, 0.0, 0.0, 0.1, 1.0, 0.0, 0.0)
    k = coefficients(h, jnp.int32(1), jnp.float32)
    sigma, inverse, seen = standard_deviation(jnp.asarray(v), None, k)
    assert seen.tolist() == [False, False, False, True]
    np.testing.assert_allclose(sigma, [1.0, 1.0, 1.0, float(edge) ** 0.5], rtol=1e-6)
    np.testing.assert_allclose(sigma * inverse, 1.0, rtol=1e-6)


@EACH_FORM
def test_an_overflow_is_forgotten(form: Any) -> None:
    # An infinite v or s would stay so, and the parameter would never move again.
    gradients = jnp.ones((4001, 1)).at[0].set(1e30)
    u = along(scale_by_adam3(b2=0.9, b3=0.9, third_moment=form), gradients)
    np.testing.assert_allclose(u[-1], 1.0, rtol=0.02)


@EACH_FORM
@pytest.mark.parametrize("kwargs", [{}, {"tau": float("inf")}, {"eps": 0.0}])
def test_derivatives_at_zero_gradient(form: Any, kwargs: dict[str, Any]) -> None:
    optimizer: Any = scale_by_adam3(eps_root=1e-8, third_moment=form, **kwargs)

    def last_update(g: jax.Array) -> jax.Array:
        m, v, s = jnp.zeros((3, 2))
        state = ScaleByAdam3State(m, v, s, jnp.int32(0))
        for _ in range(3):
            u, state = optimizer.update(g, state)
        return u.sum()

    derivative = jax.jit(jax.grad(last_update))(jnp.array([0.0, 1.0]))
    assert np.all(np.isfinite(derivative))
    assert derivative[0] > 1e3  # 1/sqrt(eps_root), less the term's, which is 0
