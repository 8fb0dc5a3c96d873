"""How moments are stored: right on average, in the gradient's own unit, in few bytes.

The codes themselves are in `test_rounding.py`, and the limits in `test_not_finite.py`.
"""

import itertools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import adam3_optax
from adam3_optax import Float8Warning, _formats, _rule, adam3, scale_by_adam3
from tests import settings
from tests.settings import (
    BF16,
    F32,
    F64,
    FORMS,
    STORAGE,
    first_step,
    loaded,
    noise,
    run,
)

EACH_ROUNDED = settings.each_storage("bfloat16", "float8")
FLOAT8, SMALLEST = STORAGE["float8"], STORAGE["smallest"]


# Settings.


def test_every_leaf_of_a_moment_is_one_array_like_its_parameter() -> None:
    # So the bytes of a state are those of its dtypes.
    params = {"w": jnp.ones((3, 5)), "b": jnp.ones(2, BF16)}
    params["e"] = jnp.ones((0, 4), jnp.float16)
    float8: Any = jnp.float8_e4m3fn
    dtypes = {None: F32, "float32": F32, "bfloat16": BF16, "float8": float8}
    for storage in STORAGE.values():
        optimizer = scale_by_adam3(**storage)
        state = optimizer.init(params)
        _, after = jax.eval_shape(optimizer.update, params, state)
        fields = "mv" if storage.get("third_moment", "") is None else "mvs"
        for one, name in itertools.product((state, after), fields):
            setting = storage.get(f"{name}_dtype")
            dtype = jnp.uint8 if (name, setting) == ("v", "float8") else dtypes[setting]
            like = jax.tree.map(lambda x, d=dtype: jnp.zeros(x.shape, d), params)
            assert settings.types(getattr(one, name)) == settings.types(like)
            assert settings.types(one.count) == settings.types(jnp.int32(0))
    # Dtypes are settings, too.
    named: Any = {"m_dtype": float8, "v_dtype": np.float32, "s_dtype": jnp.bfloat16}
    mixed = scale_by_adam3(**settings.MIXED).init(params)
    assert settings.types(scale_by_adam3(**named).init(params)) == settings.types(mixed)


KNOWN = "must be one of None, 'float32', 'bfloat16', 'float8', got "
REFUSED: list[tuple[dict[str, Any], str]] = [
    *(({"v_dtype": x}, KNOWN) for x in ("float8_e5m2", F64, abs, "", "float8_e4m3fn")),
    ({"s_dtype": jnp.float16}, f"{KNOWN}'float16' .in which"),
    # What `optax.inject_hyperparams` makes of a dtype, for it is callable.
    *(({"m_dtype": x}, "static_args='m_dtype'") for x in (1, True, jnp.ones(()))),
    ({"m_dtype": jnp.int8}, f"{KNOWN}'int8'.* use 'float8'"),
    ({"v_dtype": "float8", "third_moment": "standardized"}, "Use v_dtype='bfloat16'"),
    (
        {"s_dtype": "bfloat16", "third_moment": None},
        "must be None with third_moment=No",
    ),
]


@pytest.mark.parametrize(("chosen", "message"), REFUSED)
def test_a_setting_that_is_refused_says_what_to_do(chosen: Any, message: str) -> None:
    with pytest.raises((TypeError, ValueError), match=f"^._dtype.*{message}"):
        scale_by_adam3(**chosen)


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
            scale_by_adam3(b1, b2, b3=b3, **FLOAT8)
    assert [x.filename for x in caught] == [__file__]
    for b1, b2, b3 in ((0.9, 0.999, 0.999), (0.9, 0.95, 0.95), (0.0, 0.999, 0.999)):
        scale_by_adam3(b1, b2, b3=b3, **FLOAT8)  # warnings are errors here
        scale_by_adam3(0.99, b2, b3=b3, m_dtype="bfloat16", v_dtype="float8")
        scale_by_adam3(0.9, jnp.float32(b2), b3=b3, **FLOAT8)  # unknown, if traced


# Averages.


@EACH_ROUNDED
def test_slow_averages_move(storage: Any, x64: None) -> None:
    # b = .999, constant-mean noise, 3,000 steps, 4,096 elements: of equal scale, and
    # of scales whose logarithms have a standard deviation of 1. Against float64.
    shape = (2, 16, 256)
    ours, exact = scale_by_adam3(**storage), scale_by_adam3()
    keys = jax.random.split(jax.random.key(1), 3001)
    spread = jnp.array([0.0, 1.0], F32)[:, None, None]
    scale = jnp.exp(spread * jax.random.normal(keys[0], shape, F32))

    def step(states: Any, key: jax.Array) -> Any:
        g = scale * (1 + jax.random.exponential(key, shape, F32))
        low, lows = ours.update(g, states[0])
        full, fulls = exact.update(g.astype(F64), states[1])
        return (lows, fulls), [jnp.max(jnp.abs(u), (1, 2)) for u in (low, full)]

    states = ours.init(jnp.zeros(shape, F32)), exact.init(jnp.zeros(shape))
    assert states[1].v.dtype == F64
    (low, full), largest = jax.jit(lambda s: jax.lax.scan(step, s, keys[1:]))(states)
    for got, want, power in zip(loaded(low), full.moments, (1, 2, 3), strict=True):
        unit = np.asarray(scale, np.float64) ** power
        mean, expected = (np.mean(x / unit, (1, 2)) for x in (got, want))
        np.testing.assert_allclose(mean, expected, rtol=0.02)
    ours_largest, exact_largest = (np.asarray(x).max(0) for x in largest)
    assert np.all(ours_largest < 1.6 * exact_largest)


@pytest.mark.slow
@pytest.mark.parametrize("storage", [FLOAT8, SMALLEST], ids=["v bfloat16", "all"])
def test_averages_over_200_000_steps(storage: Any) -> None:
    both = scale_by_adam3(**storage), scale_by_adam3()
    states = tuple(o.init(jnp.zeros((64, 64))) for o in both)
    formats = [_formats.formats_of(s.moments, _rule.FORMS["cubic"]) for s in states]

    def body(carry: Any, i: Any) -> Any:
        states, sums = carry
        key = jax.random.fold_in(jax.random.key(1), i)
        g = 1 + jax.random.exponential(key, (64, 64))
        (u, low), (exact, full) = (both[i].update(g, states[i]) for i in range(2))
        states = low, full
        rows = [_formats.loaded(formats[i], states[i].moments) for i in range(2)]
        means = jnp.array([[jnp.mean(x) for x in row] for row in rows])
        slope = jnp.array([jnp.sum(u * exact), jnp.sum(exact * exact)])
        counted = jnp.where(i < 10_000, 0.0, 1.0)
        return (states, (sums[0] + counted * means, sums[1] + counted * slope)), None

    start = states, (jnp.zeros((2, 3)), jnp.zeros(2))
    scanned = jax.jit(lambda c: jax.lax.scan(body, c, jnp.arange(200_000))[0])
    _, (means, slope) = scanned(start)
    print(means[0] / means[1] - 1, slope[0] / slope[1] - 1)
    np.testing.assert_allclose(means[0], means[1], rtol=5e-3)
    # Eight bits of v make updates longer, 3 to 8%.
    assert abs(slope[0] / slope[1] - 1) < (5e-3 if storage is FLOAT8 else 0.1)


@settings.each_storage("bfloat16", "float8", "smallest")
def test_pure_decay_is_right_on_average(storage: Any) -> None:
    start = noise(0, (64, 256)) + 2.0

    def gradient(i: Any) -> Any:
        return jnp.where(i < 3, start, 0.0)

    for steps, names in ((23, "m"), (1003, "vs")):
        _, narrow = run(scale_by_adam3(**storage), gradient, start.shape, steps)
        _, wide = run(scale_by_adam3(), gradient, start.shape, steps)
        for name in names:
            got, want = (np.mean(getattr(loaded(x), name)) for x in (narrow, wide))
            assert abs(got / want - 1) < 0.02, name


# One step.


@EACH_ROUNDED
def test_leaves_steps_and_moments_draw_apart(storage: Any) -> None:
    # The state is made anew for each step, of the same gradient, so that what differs
    # is the rounding.
    optimizer = scale_by_adam3(b2=0.9, b3=0.9, **storage)
    g = jnp.full((64, 64), 1.0034)
    masks = []
    for count in (0, 1):
        state = optimizer.init({"a": g, "b": g})._replace(count=jnp.int32(count))
        _, state = optimizer.update({"a": g, "b": g}, state)
        for name, leaf in itertools.product("mvs", "ab"):
            x = np.asarray(getattr(state, name)[leaf], np.float64)
            masks.append(((count, leaf), (x > x.mean()).ravel()))
    for (one, a), (other, b) in itertools.combinations(masks, 2):
        # Moments of one leaf and step share the unit, and so a little of v's rounding.
        bound = 0.35 if one == other else 0.08
        assert abs(np.corrcoef(a, b)[0, 1]) < bound


@settings.EACH_FORM
@EACH_ROUNDED
def test_the_update_is_that_of_the_stored_moments(form: Any, storage: Any) -> None:
    h = (0.9, 0.99, 0.98, 0.5, 1.0, 1e-8, 0.0)
    rest: Any = {"b3": h[2], "lam": h[3], "tau": h[4], "third_moment": form, **storage}
    optimizer = scale_by_adam3(*h[:2], **rest)
    state: Any = optimizer.init(jnp.zeros((8, 32)))
    for count in range(1, 6):
        updates, state = optimizer.update(noise(count, (8, 32)), state)
        m, v, s = (jnp.asarray(x, F32) for x in loaded(state, form))
        k = _rule.coefficients(h, jnp.int32(count), F32)
        b = _rule.FORMS[form].term(s, v, None, k)
        expected = _rule.direction(m, v, b, None, k)
        np.testing.assert_allclose(updates, expected, rtol=1e-5, atol=1e-6)


def test_s_is_about_m_before_rounding() -> None:
    g = noise(0)
    _, narrow = first_step(scale_by_adam3(m_dtype="bfloat16"), g)
    _, wide = first_step(scale_by_adam3(), g)
    np.testing.assert_allclose(narrow.s, wide.s, rtol=1e-6)


@pytest.mark.parametrize("name", ["m_dtype", "v_dtype", "s_dtype"])
def test_a_derivative_through_float8_is_an_error(name: str) -> None:
    # Its tangents would be float8, too: NaN after a few steps, and no error.
    optimizer = scale_by_adam3(eps_root=1e-8, **{name: "float8"})  # type: ignore[arg-type]

    def second_update(g: Any) -> Any:
        _, state = first_step(optimizer, g)
        return optimizer.update(g, state)[0].sum()

    for derivative in (jax.grad(second_update), jax.jit(jax.grad(second_update))):
        with pytest.raises(TypeError, match=r"float8 state has no deriv.*'bfloat16'"):
            derivative(jnp.ones((4, 16)))


@settings.EACH_FORM
def test_derivatives_of_bfloat16_state_stay(form: Any) -> None:
    narrow = scale_by_adam3(b3=0.9, third_moment=form, **STORAGE["bfloat16"])
    wide = scale_by_adam3(b3=0.9, third_moment=form)

    def second_update(optimizer: Any, first: Any, second: Any) -> Any:
        _, state = first_step(optimizer, first)
        return optimizer.update(second, state)[0].sum()

    g = jnp.linspace(0.1, 1, 64).reshape(4, 16)
    first, second = jax.grad(second_update, (1, 2))(narrow, g, g[::-1])
    assert not np.any(first)
    # Within the update rounding counts as the identity, which it is on average.
    expected = jax.grad(second_update, 2)(wide, g, g[::-1])
    np.testing.assert_allclose(second, expected, rtol=0.2, atol=0.05)


# Memory of the compiled step.


@pytest.mark.parametrize(
    ("form", "name", "leaves"),
    [
        *((form, "float8", 1) for form in FORMS),
        (FORMS[-1], "float8", 4),
        *((FORMS[0], name, 1) for name in ("default", "bfloat16", "smallest")),
    ],
)
def test_temporary_memory(form: Any, name: str, leaves: int) -> None:
    # Bytes a parameter beyond arguments and results. One more copy of a moment in
    # float32 would cost 4.
    params = [jnp.zeros((1024, 1024 // leaves))] * leaves
    optimizer = adam3(1e-3, third_moment=form, **STORAGE[name])
    donated: Any = jax.jit(settings.step, static_argnums=0, donate_argnums=(1, 2))
    state = optimizer.init(params)
    compiled = donated.lower(optimizer, params, state, params).compile()
    analysis: Any = compiled.memory_analysis()
    # The CPU compilers before JAX 0.12 drop the barriers, and keep what is shared.
    older = {"default": 0.01, "bfloat16": 10.6}.get(name, 28.6)
    bound = 0.01 if jax.__version_info__ >= (0, 12) else older
    assert analysis.temp_size_in_bytes / 2**20 < bound
    kept = sum(x.nbytes for x in jax.tree.leaves((params, state)))
    assert analysis.alias_size_in_bytes >= kept - 8  # all are donated, but the counts
