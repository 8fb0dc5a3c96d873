"""How moments are stored: right on average, in the gradient's own unit, to its limits.

The codes themselves are in `test_rounding.py`.
"""

import functools
import warnings
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import adam3_optax
from adam3_optax import Float8Warning, _formats, _rule, scale_by_adam3
from adam3_optax._rounding import for_moments, leaf_key, random_bits
from tests.settings import EACH_FORM, FORMS, STORAGE, each_storage

EACH_ROUNDED = each_storage("bfloat16", "float8")
POWER = {"m": 1, "v": 2, "s": 3}
M_S: dict[str, Any] = {"m_dtype": "float8", "v_dtype": "bfloat16", "s_dtype": "float8"}
ALL: dict[str, Any] = {**M_S, "v_dtype": "float8"}
BOTH = pytest.mark.parametrize("storage", [M_S, ALL], ids=["v bfloat16", "all"])


def loaded(state: Any, form: Any = "cubic") -> Any:
    """Returns the moments of a state of one leaf, as numbers."""
    record = None if form is None else _rule.FORMS[form]
    formats = _formats.formats_of(state.moments, record)
    found = _formats.loaded(formats, state.moments)
    return _rule.Moments(*(np.asarray(x, np.float64) for x in found))


def without_s(storage: dict[str, Any]) -> dict[str, Any]:
    return {k: x for k, x in storage.items() if k != "s_dtype"} | {"third_moment": None}


def run(optimizer: Any, gradient: Any, shape: Any, steps: int, first: int = 0) -> Any:
    """Returns updates and the last state, of gradients that are a function of i."""

    def body(state: Any, i: Any) -> Any:
        u, state = optimizer.update(gradient(i), state)
        return state, u

    state = optimizer.init(jnp.zeros(shape))
    steps_ = jnp.arange(first, first + steps)
    state, updates = jax.jit(lambda s: jax.lax.scan(body, s, steps_))(state)
    return np.asarray(updates, np.float64), state


def noise(i: Any, shape: Any = (16, 256)) -> Any:
    return jax.random.normal(jax.random.fold_in(jax.random.key(0), i), shape)


# Settings.


def test_what_is_accepted() -> None:
    params = {"w": jnp.ones((4, 8)), "b": jnp.ones(()), "e": jnp.ones((0, 3))}
    for setting in ("float8", "float8_e4m3fn", jnp.float8_e4m3fn):
        state: Any = scale_by_adam3(
            m_dtype=setting, s_dtype=setting, v_dtype="float8"
        ).init(params)
        for field, dtype in zip(state, (jnp.float8_e4m3fn, jnp.uint8) * 2, strict=True):
            if field is state.count:
                continue
            dtype = jnp.uint8 if field is state.v else jnp.float8_e4m3fn
            for x, p in zip(*map(jax.tree.leaves, (field, params)), strict=True):
                assert (x.shape, x.dtype) == (p.shape, dtype)


@pytest.mark.parametrize(
    ("storage", "size"),
    [(M_S, 4), (ALL, 3), (without_s(M_S), 3), (without_s(ALL), 2)],
)
def test_bytes_of_every_leaf(storage: Any, size: int) -> None:
    for shape in ((), (3,), (5, 7), (2, 3, 4)):
        state = scale_by_adam3(**storage).init(jnp.zeros(shape))
        held = sum(x.nbytes for x in jax.tree.leaves(state[:3]))
        assert held == size * int(np.prod(shape))


def test_int8_names_float8() -> None:
    for setting in ("int8", jnp.int8):
        with pytest.raises(ValueError, match=r"m_dtype must be .* use 'float8'"):
            scale_by_adam3(m_dtype=setting)
    for setting in ("float8_e4m3fn", jnp.float8_e4m3fn):
        with pytest.raises(ValueError, match="v_dtype must be one of"):
            scale_by_adam3(v_dtype=setting)


def test_a_skewness_over_a_noisy_v_is_refused() -> None:
    with pytest.raises(ValueError, match=r"v_dtype='float8' .* Use v_dtype='bfloat16'"):
        scale_by_adam3(v_dtype="float8", third_moment="standardized")


@pytest.mark.parametrize(
    ("decays", "said"),
    [
        ((0.99, 0.999, 0.999), "b1 = 0.99 is slow"),
        ((0.0, 0.99999, 0.9), "can exceed 112"),
        ((0.98, 0.95, 0.9), "can exceed 112"),  # b1² > b2: no bound at all
        ((0.9, 0.999, 0.9), "is 2305 at step 1"),
    ],
)
def test_decays_that_are_too_slow_warn_once(decays: Any, said: str) -> None:
    b1, b2, b3 = decays
    adam3_optax._hyperparameters._warn.cache_clear()
    with pytest.warns(Float8Warning, match=said) as caught:  # noqa: PT031
        for _ in range(2):
            scale_by_adam3(b1, b2, b3=b3, **M_S)
    assert len(caught) == 1
    assert caught[0].filename == __file__


@pytest.mark.parametrize(
    "decays", [(0.9, 0.999, 0.999), (0.9, 0.95, 0.95), (0.0, 0.999, 0.999)]
)
def test_usual_decays_do_not_warn(decays: Any) -> None:
    b1, b2, b3 = decays
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        scale_by_adam3(b1, b2, b3=b3, **M_S)
        scale_by_adam3(0.99, b2, b3=b3, m_dtype="bfloat16", v_dtype="float8")


@pytest.mark.parametrize(
    ("b1", "b2", "largest"), [(0.9, 0.999, 7.3), (0.9, 0.95, 1.16), (0.0, 0.999, 31.7)]
)
def test_m_is_bounded_by_the_root_of_v(b1: float, b2: float, largest: float) -> None:
    # The gradients that reach the bound: g_i grows as (b2/b1)^i. And it is the bound.
    bound = (1 - b1) / np.sqrt((1 - b2) * (1 - b1**2 / b2))
    assert bound == pytest.approx(largest, rel=0.01)
    m, v, worst = 0.0, 0.0, 0.0
    for g in (b2 / b1) ** np.arange(-200.0, 1) if b1 else [1.0]:
        m, v = b1 * m + (1 - b1) * g, b2 * v + (1 - b2) * g * g
        worst = max(worst, m / np.sqrt(v))
    assert 0.98 * bound < worst < bound * (1 + 1e-9)


# Averages.


@EACH_ROUNDED
@pytest.mark.parametrize("spread", [0.0, 1.0])
def test_slow_averages_move(storage: Any, spread: float, x64: None) -> None:
    # b = .999, constant-mean noise, 3,000 steps, 4,096 elements: of equal scale, and
    # of scales whose logarithms have a standard deviation of 1. Against float64.
    shape = (16, 256)
    ours, exact = scale_by_adam3(**storage), scale_by_adam3()
    keys = jax.random.split(jax.random.key(1), 3001)
    scale = jnp.exp(spread * jax.random.normal(keys[0], shape, jnp.float32))

    def step(states: Any, key: jax.Array) -> Any:
        g = scale * (1 + jax.random.exponential(key, shape, jnp.float32))
        low, lows = ours.update(g, states[0])
        full, fulls = exact.update(g.astype(jnp.float64), states[1])
        return (lows, fulls), (jnp.max(jnp.abs(low)), jnp.max(jnp.abs(full)))

    states = ours.init(jnp.zeros(shape, jnp.float32)), exact.init(jnp.zeros(shape))
    assert states[1].v.dtype == jnp.float64
    (low, full), largest = jax.jit(lambda s: jax.lax.scan(step, s, keys[1:]))(states)
    found = loaded(low)
    for moment, power in POWER.items():
        unit = np.asarray(scale, np.float64) ** power
        got, want = getattr(found, moment) / unit, getattr(full, moment) / unit
        assert abs(np.mean(got) / np.mean(want) - 1) < 0.02
    ours_largest, exact_largest = (float(np.max(x)) for x in largest)
    assert ours_largest < 1.6 * exact_largest


@pytest.mark.slow
@BOTH
def test_averages_over_200_000_steps(storage: Any) -> None:
    def gradient(i: Any) -> Any:
        key = jax.random.fold_in(jax.random.key(1), i)
        return 1 + jax.random.exponential(key, (64, 64))

    def body(carry: Any, i: Any) -> Any:
        states, sums = carry
        g = gradient(i)
        (u, low), (exact, full) = (both[i].update(g, states[i]) for i in range(2))
        states = low, full
        rows = [_formats.loaded(formats[i], states[i].moments) for i in range(2)]
        means = jnp.array([[jnp.mean(x) for x in row] for row in rows])
        slope = jnp.array([jnp.sum(u * exact), jnp.sum(exact * exact)])
        counted = jnp.where(i < 10_000, 0.0, 1.0)
        new = (sums[0] + counted * means, sums[1] + counted * slope)
        return (states, new), None

    both = scale_by_adam3(**storage), scale_by_adam3()
    states = tuple(o.init(jnp.zeros((64, 64))) for o in both)
    formats = [_formats.formats_of(s.moments, _rule.FORMS["cubic"]) for s in states]
    start = states, (jnp.zeros((2, 3)), jnp.zeros(2))
    steps = jnp.arange(200_000)
    run = jax.jit(lambda c: jax.lax.scan(body, c, steps)[0])
    _, (means, slope) = run(start)
    print(means[0] / means[1] - 1, slope[0] / slope[1] - 1)
    np.testing.assert_allclose(means[0], means[1], rtol=5e-3)
    if storage is M_S:
        assert abs(slope[0] / slope[1] - 1) < 5e-3


@each_storage("bfloat16", "float8", "smallest")
def test_pure_decay_is_right_on_average(storage: Any) -> None:
    rng = np.random.default_rng(0)
    start = jnp.asarray(rng.normal(size=(64, 256)) + 2.0, jnp.float32)

    def gradient(i: Any) -> Any:
        return jnp.where(i < 3, start, 0.0)

    for steps, names in ((23, "m"), (1003, "vs")):
        _, narrow = run(scale_by_adam3(**storage), gradient, start.shape, steps)
        _, wide = run(scale_by_adam3(), gradient, start.shape, steps)
        for name in names:
            got, want = (np.mean(getattr(loaded(x), name)) for x in (narrow, wide))
            assert abs(got / want - 1) < 0.02, name


@functools.cache
def moved_without_gradient(name: str, b1: float) -> Any:
    """Returns how far elements move of which most steps have no gradient.

    Half the columns get gradients for 20 steps and then none, the others go on.
    """
    shape, dead = (16, 64), jnp.arange(64) >= 32
    optimizer = scale_by_adam3(b1=b1, third_moment="standardized", **STORAGE[name])

    def body(carry: Any, i: Any) -> Any:
        at, state = carry
        g = jnp.where(dead & (i >= 20), 0.0, noise(i, shape))
        u, state = optimizer.update(g, state)
        return (at + u, state), jnp.max(jnp.abs(u[:, 32:]))

    start = jnp.zeros(shape), optimizer.init(jnp.zeros(shape))
    (at, _), largest = jax.jit(jax.lax.scan, static_argnums=0)(
        body, start, jnp.arange(4000)
    )
    assert np.max(largest[-100:]) < 0.2
    return np.abs(np.asarray(at)[:, 32:])


@pytest.mark.parametrize("name", ["bfloat16", "float8"])
def test_what_gets_no_gradient_comes_to_rest(name: str) -> None:
    # A moment that froze would move these for ever, and ever faster.
    narrow, wide = (moved_without_gradient(x, 0.9) for x in (name, "default"))
    assert narrow.mean() < 1.5 * wide.mean()
    assert narrow.max() < 3 * wide.max()


# One step.


@EACH_ROUNDED
def test_the_optimizer_draws_apart(storage: Any) -> None:
    # Leaves, steps and moments round with bits of their own. The state is made anew for
    # each step, of the same gradient, so that what differs is the rounding.
    optimizer = scale_by_adam3(b2=0.9, b3=0.9, **storage)
    g = jnp.full((64, 64), 1.0034)
    masks = []
    for count in (0, 1):
        state = optimizer.init({"a": g, "b": g})._replace(count=jnp.int32(count))
        _, state = optimizer.update({"a": g, "b": g}, state)
        for name in "mvs":
            for x in jax.tree.leaves(getattr(state, name)):
                x = np.asarray(x, np.float64)
                masks.append((x > x.mean()).ravel())
    assert len(masks) == 12
    for i, a in enumerate(masks):
        assert 0 < a.mean() < 1
        for b in masks[:i]:
            # m and s of one leaf share the unit, and so a little of v's rounding.
            assert abs(np.corrcoef(a, b)[0, 1]) < 0.35 if i - 6 < 6 else 0.08


@EACH_FORM
@EACH_ROUNDED
def test_the_update_is_that_of_the_stored_moments(form: Any, storage: Any) -> None:
    h = (0.9, 0.99, 0.98, 0.5, 1.0, 1e-8, 0.0)
    b1, b2, b3, lam, tau, *_ = h
    rest: Any = {"b3": b3, "lam": lam, "tau": tau, "third_moment": form, **storage}
    optimizer = scale_by_adam3(b1, b2, **rest)
    record = _rule.FORMS[form]
    formats = _formats.formats_for(record, *storage.values())
    rng = np.random.default_rng(0)
    state: Any = optimizer.init(jnp.zeros((8, 32)))
    for count in range(1, 6):
        g = jnp.asarray(rng.normal(size=(8, 32)), jnp.float32)
        old = _formats.loaded(formats, state.moments)
        updates, state = optimizer.update(g, state)
        m, v, s = _formats.loaded(formats, state.moments)
        k = _rule.coefficients(h, jnp.int32(count), jnp.float32)
        b = record.term(s, v, None, k)
        expected = _rule.direction(m, v, b, None, k)
        np.testing.assert_allclose(updates, expected, rtol=1e-5, atol=1e-6)
        # And s is about m before rounding: seldom does an ulp turn the rounding. In the
        # first step the deviation from m̂ is nothing but ulps.
        if count == 1:
            continue
        s_t = _rule.update_s(g, _rule.update_m(g, old.m, k), old.s, k, record)
        drawn = for_moments(random_bits(count, leaf_key((), "moments"), g)).s
        sigma = _formats.sigma_of(v)
        kept = formats.s.load(formats.s.store(s_t, sigma, drawn), sigma)
        assert np.mean(np.isclose(kept, s, rtol=1e-4, atol=0)) > 0.97


def test_where_nothing_rounds_no_bits_are_made() -> None:
    optimizer, g = scale_by_adam3(), jnp.ones((4, 4))
    for made, expected in ((optimizer, False), (scale_by_adam3(**M_S), True)):
        jaxpr = jax.make_jaxpr(made.update)(g, made.init(g))
        assert ("iota" in str(jaxpr)) is expected


@pytest.mark.parametrize("name", ["m_dtype", "v_dtype", "s_dtype"])
def test_a_derivative_through_float8_is_an_error(name: str) -> None:
    optimizer = scale_by_adam3(eps_root=1e-8, **{name: "float8"})  # type: ignore[arg-type]

    def second_update(g: Any) -> Any:
        _, state = optimizer.update(g, optimizer.init(g))
        return optimizer.update(g, state)[0].sum()

    with pytest.raises(TypeError, match=r"float8 state has no derivative.*'bfloat16'"):
        jax.grad(second_update)(jnp.ones((4, 16)))
    # What does not depend on the steps may be differentiated beside them.
    state = optimizer.init(jnp.ones(3))

    def beside(x: Any) -> Any:
        updates, _ = optimizer.update(jnp.ones(3), state)
        return (x * updates).sum()

    assert np.isfinite(jax.grad(beside)(jnp.ones(3))).all()


@EACH_FORM
def test_derivatives_of_bfloat16_state_stay(form: Any) -> None:
    narrow = scale_by_adam3(b3=0.9, third_moment=form, **STORAGE["bfloat16"])
    wide = scale_by_adam3(b3=0.9, third_moment=form)

    def second_update(optimizer: Any, first: Any, second: Any) -> Any:
        _, state = optimizer.update(first, optimizer.init(first))
        return optimizer.update(second, state)[0].sum()

    g = jnp.linspace(0.1, 1, 64).reshape(4, 16)
    first, second = jax.grad(second_update, (1, 2))(narrow, g, g[::-1])
    assert not np.any(first)
    # Within the update rounding counts as the identity, which it is on average.
    expected = jax.grad(second_update, 2)(wide, g, g[::-1])
    np.testing.assert_allclose(second, expected, rtol=0.2, atol=0.05)


# Limits. The page on low precision names each.


@EACH_FORM
@pytest.mark.parametrize("scale", [1e-6, 1e-3, 1.0])
def test_gradients_of_every_usual_size(form: Any, scale: float) -> None:
    options: Any = {"b3": 0.95, "b2": 0.95, "third_moment": form, "eps": 1e-12}

    def gradient(i: Any) -> Any:
        return scale * (noise(i) ** 2 - 0.5)

    ours, _ = run(scale_by_adam3(**options, **M_S), gradient, (16, 256), 60)
    exact, _ = run(scale_by_adam3(**options), gradient, (16, 256), 60)
    error = np.sqrt(np.mean((ours - exact) ** 2) / np.mean(exact**2))
    slope = np.sum(ours * exact) / np.sum(exact**2)
    assert error < 0.15
    assert abs(slope - 1) < 0.02


@EACH_FORM
@pytest.mark.parametrize("size", [1e13, 1e14, 1e18, 1e30, 1e-13, 1e-18, 1e-30])
def test_gradients_of_every_size_give_no_nan(form: Any, size: float) -> None:
    # sigma³ overflows above 7e12, and 0 times infinity would be NaN for ever.
    optimizer = scale_by_adam3(third_moment=form, **M_S)
    updates, state = run(optimizer, lambda i: size * noise(i), (16, 256), 20)
    assert np.isfinite(updates).all()
    assert all(np.isfinite(x).all() for x in loaded(state, form))
    # And later gradients of usual size are seen again.
    later = optimizer.update(jnp.ones((16, 256)), state)[1]
    assert all(np.isfinite(x).all() for x in loaded(later, form))


@BOTH
@pytest.mark.parametrize("size", [1e3, 1e5, 1e8])
def test_a_spike(storage: Any, size: float) -> None:
    def gradient(i: Any) -> Any:
        return jnp.where(i == 500, size, 1.0) * noise(i)

    ours, _ = run(scale_by_adam3(**without_s(storage)), gradient, (16, 256), 700)
    exact, _ = run(scale_by_adam3(third_moment=None), gradient, (16, 256), 700)
    # 8 bits for v make steps longer, now and then by half.
    factor = 1.15 if storage is M_S else 2.2
    assert np.abs(ours[500:]).max() < factor * np.abs(exact[500:]).max()


@BOTH
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
    assert abs(slope - 1) < (0.01 if storage is M_S else 0.8)
    mean = np.mean(loaded(state, None).v) / np.mean(np.asarray(full.v))
    assert abs(mean - 1) < 0.03


@BOTH
def test_rows_that_are_seldom_hit(storage: Any) -> None:
    # Once in 10,000 steps. Nothing explodes, and the first hit moves them as it should.
    def gradient(i: Any) -> Any:
        return jnp.where(i % 10_000 == 9_000, 1.0, 0.0) * (1 + noise(i, (4, 64)))

    ours, _ = run(scale_by_adam3(**without_s(storage)), gradient, (4, 64), 30_000)
    exact, _ = run(scale_by_adam3(third_moment=None), gradient, (4, 64), 30_000)
    assert np.abs(ours).max() < 1.6 * np.abs(exact).max()
    moved, expected = ours.sum(0), exact.sum(0)
    slope = np.sum(moved * expected) / np.sum(expected**2)
    assert abs(slope - 1) < (0.03 if storage is M_S else 0.15)


def test_v_of_8_bits_beyond_its_range() -> None:
    # Beyond 2^27 a gradient counts as 2^27, so steps stay as long as they should be.
    # Below, v is too large, and steps are shorter.
    for size, low, high in ((1e9, 0.7, 1.5), (1e20, 0.7, 1.5), (1e-12, 0.0, 0.2)):
        optimizer, g = scale_by_adam3(eps=0.0, **without_s(ALL)), jnp.ones((4, 64))
        updates, _ = run(optimizer, lambda i, c=size, g=g: c * g, g.shape, 300)
        assert low <= np.abs(updates[100:]).mean() <= high, size


def test_s_beyond_448_is_cut_off() -> None:
    # In the first step of the cubic form s/sigma³ is 2,305 with these decays.
    adam3_optax._hyperparameters._warn.cache_clear()
    g = jnp.ones((4, 64))
    with pytest.warns(Float8Warning):
        optimizer = scale_by_adam3(0.9, 0.999, b3=0.9, **M_S)
    _, state = optimizer.update(g, optimizer.init(g))
    _, exact = (wide := scale_by_adam3(0.9, 0.999, b3=0.9)).update(g, wide.init(g))
    ratio = loaded(state).s / np.asarray(exact.s)
    np.testing.assert_allclose(ratio, 448 / 2305, rtol=0.02)
    # Later, with usual gradients, it is what it should be.
    _, state = run(optimizer, lambda i: noise(i) ** 2, (16, 256), 300)
    _, exact = run(wide, lambda i: noise(i) ** 2, (16, 256), 300)
    assert abs(loaded(state).s.mean() / np.asarray(exact.s).mean() - 1) < 0.05


def test_denormals_and_zeros() -> None:
    # A v below the smallest normal number is 0 or is not, by platform. Nothing moves.
    for size in (0.0, 1e-23, 1e-38, 1e-44):
        optimizer, g = scale_by_adam3(**M_S), jnp.ones((2, 8))
        updates, state = run(optimizer, lambda i, c=size, g=g: c * g, g.shape, 5)
        assert np.abs(updates).max() < 1e-6
        assert all(np.isfinite(x).all() for x in loaded(state))


def test_changes_from_outside_scale_m_and_s() -> None:
    optimizer = scale_by_adam3(**M_S)
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
    after = loaded(adam3_optax.convert_state(wide, third_moment="cubic", **M_S))
    assert abs(np.sum(after.m * before.m) / np.sum(before.m**2) - 1) < 0.01


def test_decays_that_change_by_injection() -> None:
    def rising(count: Any) -> Any:
        return 0.5 + 0.4 * jnp.minimum(count / 100, 1.0)

    def made(**storage: Any) -> Any:
        inject = optax.inject_hyperparams(
            scale_by_adam3, static_args=("third_moment", *M_S)
        )
        return inject(rising, 0.99, b3=0.9, third_moment="standardized", **storage)

    ours, _ = run(made(**M_S), noise, (16, 256), 200)
    exact, _ = run(made(), noise, (16, 256), 200)
    assert abs(np.sum(ours * exact) / np.sum(exact**2) - 1) < 0.01
    assert np.abs(ours).max() < 1.1 * np.abs(exact).max()


@pytest.mark.parametrize("form", [*FORMS, None])
def test_float64_parameters(form: Any, x64: None) -> None:
    storage = M_S if form else without_s(M_S)
    optimizer = scale_by_adam3(**{**storage, "third_moment": form, "v_dtype": None})
    g = jnp.asarray(np.random.default_rng(0).normal(size=(8, 8)))
    state = optimizer.init(g)
    updates, state = optimizer.update(g, state)
    assert updates.dtype == state.v.dtype == jnp.float64
    assert state.m.dtype == jnp.float8_e4m3fn
    np.testing.assert_allclose(np.abs(updates), 1.0, atol=0.1)


# A format of one's own.


def test_a_format_is_added_in_one_place(monkeypatch: pytest.MonkeyPatch) -> None:
    class Truncated(_formats.Format):
        """Stored in float16, the root of v in units of 1/1024."""

        dtypes = (np.dtype(np.float16),)

        def load(self, stored: Any, sigma: Any) -> jax.Array:
            return (stored.astype(jnp.float32) / 1024) ** 2

        def store(self, x: jax.Array, sigma: Any, bits: Any) -> Any:
            return (jnp.sqrt(x) * 1024).astype(jnp.float16)

    monkeypatch.setitem(_formats.SETTINGS, "float16", Truncated())
    params = jnp.linspace(0.1, 1.0, 32).reshape(2, 16)
    new, old = scale_by_adam3(v_dtype="float16"), scale_by_adam3()
    (_, low), (_, full) = (o.update(params, o.init(params)) for o in (new, old))
    assert low.v.dtype == jnp.float16
    updates, low = jax.jit(new.update)(params, low)
    expected, full = old.update(params, full)
    np.testing.assert_allclose(updates, expected, rtol=1e-2)
    converted: Any = adam3_optax.convert_state(low, third_moment="cubic")
    np.testing.assert_allclose(converted.v, full.v, rtol=1e-2)
