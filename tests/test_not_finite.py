"""Gradients of every size: finite ones never spoil the state, and others show in it."""

from typing import Any

import jax.numpy as jnp
import numpy as np
import optax
import pytest

import adam3_optax
from adam3_optax import Float8Warning, scale_by_adam3
from tests import settings
from tests.settings import EACH_FORM, F32, STORAGE, loaded, noise, run, without_s

GOOD = jnp.asarray(np.random.default_rng(0).normal(size=(3, 32)), F32)
MAXIMUM = float(jnp.finfo(F32).max)
FLOAT8, SMALLEST = STORAGE["float8"], STORAGE["smallest"]
EACH_FLOAT8 = pytest.mark.parametrize(
    "storage", [FLOAT8, SMALLEST], ids=["v bfloat16", "all"]
)
NARROW = ["float32", "bfloat16", "float8"]


def stored(setting: Any, form: Any) -> dict[str, Any]:
    """Returns the settings; 8 bits for v where the form allows it."""
    v = "bfloat16" if setting == "float8" and form in settings.BOUNDED else setting
    return {"third_moment": form, **settings.all_at(setting), "v_dtype": v}


def assert_finite_state(state: Any, form: Any) -> None:
    assert all(np.isfinite(x).all() for x in loaded(state, form))


# What is not finite.


@EACH_FORM
@pytest.mark.parametrize("setting", NARROW)
def test_a_gradient_that_is_not_finite_shows_in_every_moment(
    form: Any, setting: Any
) -> None:
    optimizer = scale_by_adam3(b1=0.8, b2=0.95, b3=0.9, **stored(setting, form))
    bad = GOOD.at[1, 5:8].set(jnp.array([jnp.nan, jnp.inf, -jnp.inf]))
    _, state = optimizer.update(GOOD, optimizer.init(GOOD))
    for g in (bad, GOOD):  # and it stays, for the user to see
        updates, state = optimizer.update(g, state)
        assert not np.isfinite(updates[1, 5:8]).any()
        for x in loaded(state, form):
            finite = np.isfinite(x)
            assert not finite[1, 5:8].any()
            assert finite.sum() == finite.size - 3


# Large and small.

SIZES = [MAXIMUM, 1e30, 1e20, 1e18, 1e9, 1e-6, 1e-12, 1e-20, 1e-38, 1e-45]


@EACH_FORM
@pytest.mark.parametrize("setting", NARROW)
def test_no_finite_gradient_poisons_the_state(form: Any, setting: Any) -> None:
    # Each size with a constant and an alternating sign, and once.
    patterns = [np.ones(60), np.resize([1.0, -1.0], 60), np.eye(1, 60)[0]]
    with np.errstate(under="ignore"):
        sizes = np.array(SIZES, np.float32)
        gradients = jnp.asarray(np.stack(patterns, 1)[:, :, None] * sizes, F32)
    optimizer = scale_by_adam3(**stored(setting, form))
    u, state = run(optimizer, lambda i: gradients[i], (3, len(SIZES)), 60)
    assert_finite_state(state, form)
    # At the largest number itself, m̂ may round up to infinity; the state does not.
    assert np.all(np.isfinite(u[:, :, 1:]))
    if setting == "float32":
        full = [1e-6 <= size <= 1e18 for size in SIZES]
        np.testing.assert_allclose(u[:, 0, full], 1.0, rtol=0.03)


@EACH_FORM
def test_gradients_of_every_size_give_no_nan_in_float8(form: Any) -> None:
    # sigma³ overflows above 7e12, and 0 times infinity would be NaN for ever.
    # A sigma near 1e14 cubes to infinity while s is still large enough to be seen.
    sizes = jnp.array([1e13, 1e14, 1e15, 1e18, 1e30, 1e-13, 1e-18, 1e-30])
    sizes = sizes[:, None, None]
    optimizer, shape = scale_by_adam3(third_moment=form, **FLOAT8), (8, 16, 256)
    updates, state = run(optimizer, lambda i: sizes * noise(i)[None], shape, 20)
    assert np.isfinite(updates).all()
    assert_finite_state(state, form)
    # And later gradients of usual size are seen again.
    assert_finite_state(optimizer.update(jnp.ones(shape), state)[1], form)


@EACH_FORM
def test_the_edge_of_float32(form: Any) -> None:
    # With the maximum itself m̂, rounded, may be infinite. The documentation says so.
    # And |d| + eps may overflow.
    g = jnp.asarray([3e38, -3e38, 1.0], F32)
    for b1, eps in ((0.0, 1e-8), (0.5, 1e26), (0.85, MAXIMUM), (0.93, 1e-8)):
        optimizer = scale_by_adam3(b1=b1, b3=0.9, eps=eps, third_moment=form)
        updates, state = run(optimizer, lambda i: g, (3,), 10)
        assert np.isfinite(updates).all()
        assert_finite_state(state, form)


def test_a_square_counts_as_a_quarter_of_the_maximum_at_most() -> None:
    # More could round up to infinity, in the average or in its correction.
    optimizer, b2, v = scale_by_adam3(b2=0.9, lam=0.0), 0.9, 0.0
    state = optimizer.init(jnp.zeros(()))
    for g, square in ((1e30, None), (1.0, 1.0), (-1e30, None), (1e19, None)):
        _, state = optimizer.update(jnp.float32(g), state)
        v = b2 * v + (1 - b2) * (square or MAXIMUM / 4)
        np.testing.assert_allclose(state.v, v, rtol=1e-6)


@EACH_FORM
def test_no_clip_is_no_infinity(form: Any) -> None:
    # After an isolated gradient s decays more slowly than v, until the skewness
    # overflows.
    def updates(lam: Any, tau: Any) -> Any:
        rest: Any = {"lam": lam, "tau": tau, "third_moment": form}
        optimizer = scale_by_adam3(b2=0.95, b3=0.97, **rest)
        return run(optimizer, lambda i: jnp.where(i == 1, 1.0, 0.0), (), 3000)[0]

    for tau in (float("inf"), jnp.float32(jnp.inf)):
        assert np.isfinite(updates(0.01, tau)).all()
        assert np.abs(updates(0.0, tau)).max() <= 1.01


# In float8. The page on low precision names each limit.


@EACH_FORM
def test_gradients_of_every_usual_size(form: Any) -> None:
    sizes = jnp.array([1e-6, 1e-3, 1.0])[:, None, None]
    options: Any = {"b3": 0.95, "b2": 0.95, "third_moment": form, "eps": 1e-12}

    def gradient(i: Any) -> Any:
        return sizes * (noise(i)[None] ** 2 - 0.5)

    ours, _ = run(scale_by_adam3(**options, **FLOAT8), gradient, (3, 16, 256), 60)
    exact, _ = run(scale_by_adam3(**options), gradient, (3, 16, 256), 60)
    for x, y in zip(ours.swapaxes(0, 1), exact.swapaxes(0, 1), strict=True):
        assert np.sqrt(np.mean((x - y) ** 2) / np.mean(y**2)) < 0.15
        assert abs(np.sum(x * y) / np.sum(y**2) - 1) < 0.02


@EACH_FLOAT8
def test_a_spike(storage: Any) -> None:
    sizes = jnp.array([1e3, 1e5, 1e8])[:, None, None]

    def gradient(i: Any) -> Any:
        return jnp.where(i == 500, sizes, 1.0) * noise(i)[None]

    shape = 3, 16, 256
    ours, _ = run(scale_by_adam3(**without_s(storage)), gradient, shape, 700)
    exact, _ = run(scale_by_adam3(third_moment=None), gradient, shape, 700)
    largest, expected = (np.abs(u[500:]).max((0, 2, 3)) for u in (ours, exact))
    # 8 bits for v make steps longer, now and then by half.
    factor = 1.15 if storage is FLOAT8 else 2.2
    assert np.all(largest < factor * expected)


def test_v_of_8_bits_beyond_its_range() -> None:
    # Beyond 2^27 a gradient counts as 2^27, so steps stay as long as they should be.
    # Below, v is too large, and steps are shorter.
    sizes = jnp.array([1e9, 1e20, 1e-12])[:, None]
    optimizer = scale_by_adam3(eps=0.0, **without_s(SMALLEST))
    updates, _ = run(optimizer, lambda i: jnp.tile(sizes, 256), (3, 256), 300)
    found = np.abs(updates[100:]).mean((0, 2))
    assert np.all(found >= [0.7, 0.7, 0.0])
    assert np.all(found <= [1.5, 1.5, 0.2])


def test_s_beyond_448_is_cut_off() -> None:
    # In the first step of the cubic form s/sigma³ is 2,305 with these decays.
    adam3_optax._hyperparameters._warn.cache_clear()
    g = jnp.ones((4, 64))
    with pytest.warns(Float8Warning):
        optimizer = scale_by_adam3(0.9, 0.999, b3=0.9, **FLOAT8)
    wide = scale_by_adam3(0.9, 0.999, b3=0.9)
    (_, state), (_, exact) = (settings.first_step(x, g) for x in (optimizer, wide))
    ratio = loaded(state).s / np.asarray(exact.s)
    np.testing.assert_allclose(ratio, 448 / 2305, rtol=0.02)


@EACH_FORM
def test_denormals_and_zeros(form: Any) -> None:
    # A v below the smallest normal number is 0 or is not, by platform. Nothing moves.
    g = jnp.tile(jnp.array([0.0, 1e-44, 1e-38, 1e-23])[:, None], 32)
    for storage in (FLOAT8, stored("float8", form)):
        optimizer = scale_by_adam3(**{**storage, "third_moment": form})
        updates, state = run(optimizer, lambda i: g, g.shape, 5)
        assert np.abs(updates).max() < 1e-6
        assert not updates[:, 0].any()
        assert_finite_state(state, form)
        assert not any(x[0].any() for x in loaded(state, form))


@EACH_FLOAT8
def test_a_gradient_that_falls_by_six_decades(storage: Any) -> None:
    def gradient(i: Any) -> Any:
        return 10.0 ** (-6 * jnp.clip((i - 100) / 1000, 0, 1)) * noise(i)

    options: Any = {"b2": 0.99, "eps": 1e-12}
    ours, state = run(
        scale_by_adam3(**options, **without_s(storage)), gradient, (16, 256), 3000
    )
    exact, full = run(
        scale_by_adam3(**options, third_moment=None), gradient, (16, 256), 3000
    )
    late = slice(2500, None)
    slope = np.sum(ours[late] * exact[late]) / np.sum(exact[late] ** 2)
    # v cannot follow so fast. While it only decays, the noise of its 8 bits grows.
    assert abs(slope - 1) < (0.01 if storage is FLOAT8 else 0.8)
    mean = np.mean(loaded(state, None).v) / np.mean(np.asarray(full.v))
    assert abs(mean - 1) < 0.03


@EACH_FLOAT8
def test_rows_that_are_seldom_hit(storage: Any) -> None:
    # Once in 10,000 steps. Nothing explodes, and the first hit moves them as it should.
    def gradient(i: Any) -> Any:
        return jnp.where(i % 10_000 == 9_000, 1.0, 0.0) * (1 + noise(i, (4, 64)))

    ours, _ = run(scale_by_adam3(**without_s(storage)), gradient, (4, 64), 30_000)
    exact, _ = run(scale_by_adam3(third_moment=None), gradient, (4, 64), 30_000)
    assert np.abs(ours).max() < 1.6 * np.abs(exact).max()
    moved, expected = ours.sum(0), exact.sum(0)
    slope = np.sum(moved * expected) / np.sum(expected**2)
    assert abs(slope - 1) < (0.03 if storage is FLOAT8 else 0.15)


def test_changes_from_outside_scale_m_and_s() -> None:
    optimizer = scale_by_adam3(**FLOAT8)
    _, state = run(optimizer, noise, (16, 256), 50)
    before = loaded(state)
    gone = loaded(state._replace(v=jnp.zeros_like(state.v)))
    assert np.abs(gone.m).max() < 1e-15 * np.abs(before.m).max()
    assert np.abs(gone.s).max() < 1e-15 * np.abs(before.s).max()
    doubled = loaded(state._replace(v=4 * state.v))
    np.testing.assert_allclose(doubled.m, 2 * before.m, rtol=1e-6)
    np.testing.assert_allclose(doubled.s, 8 * before.s, rtol=1e-6)
    # The remedy: change v in float32, and convert back.
    wide: Any = adam3_optax.convert_state(state, third_moment="cubic")
    wide = wide._replace(v=4 * wide.v)
    after = loaded(adam3_optax.convert_state(wide, third_moment="cubic", **FLOAT8))
    assert abs(np.sum(after.m * before.m) / np.sum(before.m**2) - 1) < 0.01


def test_decays_that_change_by_injection() -> None:
    def rising(count: Any) -> Any:
        return 0.5 + 0.4 * jnp.minimum(count / 100, 1.0)

    def made(**storage: Any) -> Any:
        inject = optax.inject_hyperparams(
            scale_by_adam3, static_args=("third_moment", *FLOAT8)
        )
        return inject(rising, 0.99, b3=0.9, third_moment="standardized", **storage)

    ours, _ = run(made(**FLOAT8), noise, (16, 256), 200)
    exact, _ = run(made(), noise, (16, 256), 200)
    assert abs(np.sum(ours * exact) / np.sum(exact**2) - 1) < 0.01
    assert np.abs(ours).max() < 1.1 * np.abs(exact).max()
