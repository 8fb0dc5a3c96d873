"""How moments are stored: the quantiser against an oracle, and its invariants.

The invariants of 8-bit rows, each with its number in a test below:
  1. A row of zeros stays a row of zeros.
  2. What was stored once is stored again as the same codes.
  3. A stored moment has the sign of the moment, or is 0.
  4. In units of the root, the error is less than one step of the row's scale.
  5. A v that is not 0 is not stored as 0.
  6. The largest element of a row is stored to rounding.
  7. Scaling a row by a power of 2 scales what is stored, and changes no code.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

import adam3_optax
from adam3_optax import _rule, _storage, scale_by_adam3
from adam3_optax._rounding import for_moments, leaf_key, random_bits
from adam3_optax._storage import Int8, format_for
from tests.settings import EACH_FORM, STORAGE, each_storage

MOMENTS = pytest.mark.parametrize("moment", ["m", "v", "s"])
POWER = {"m": 1, "v": 2, "s": 3}
LARGEST = {"m": 127, "v": 255, "s": 127}
EACH_ROUNDED = each_storage("bfloat16", "int8")


def bits(count: Any, leaf: int = 0, moment: int = 0) -> Any:
    return lambda x: for_moments(random_bits(count, leaf_key(leaf), jnp.asarray(x)))[
        moment
    ]


def zeros(f: Any, x: Any) -> Any:
    """Returns a stored array of zeros."""
    (stored,) = f.split(jax.tree.structure(0), f.zeros(x))
    return stored


def store(moment: str, x: Any, seed: int = 0) -> Int8:
    """Returns an array as 8-bit rows."""
    f, x = format_for(moment, "int8"), jnp.asarray(x, jnp.float32)
    return Int8(*map(np.asarray, f.store(x, zeros(f, x), bits(seed)(x), lambda: x)))


def load(moment: str, stored: Int8) -> Any:
    return np.asarray(format_for(moment, "int8").load(tuple(stored)), np.float64)


def loaded(name: str, state: Any, treedef: Any = None) -> list[Any]:
    """Returns the leaves of a moment of a state, as the rule sees them."""
    field = getattr(state, name)
    f = _storage.format_of(name, field)
    treedef = jax.tree.structure(0) if treedef is None else treedef
    return [np.asarray(f.load(x), np.float64) for x in f.split(treedef, field)]


def oracle(moment: str, row: Any) -> Any:
    """Returns, for each element, the codes it may get: by trying all, in float64."""
    power, largest = POWER[moment], LARGEST[moment]
    row = np.asarray(row, np.float64)
    scale = np.max(np.abs(row)) ** (1 / power) / largest
    codes = np.arange(-largest if moment != "v" else 0, largest + 1)
    values = np.sign(codes) * (np.abs(codes) * scale) ** power
    allowed = []
    for x in row:
        # Within float32's rounding of a code's value, either side of it will do.
        error = 1e-5 * np.abs(x)
        below = codes[values <= x - error].max(initial=codes[0])
        above = codes[values >= x + error].min(initial=codes[-1])
        choice = set(range(below, above + 1))
        if moment == "v" and x > 0:
            choice = {max(c, 1) for c in choice}
        allowed.append(choice)
    return allowed


# Rows of 16 in gradient units, spanning what a float32 cube can hold.
ROOTS = st.floats(-100, 100, width=32).filter(lambda x: x == 0 or abs(x) > 1e-3)
ROWS = hnp.arrays(np.float32, (3, 16), elements=ROOTS)


def moment_of(moment: str, roots: Any) -> Any:
    return roots ** POWER[moment] if moment != "m" else roots


@MOMENTS
@given(roots=ROWS, seed=st.integers(0, 2**31 - 1))
def test_codes_are_those_of_the_oracle(moment: str, roots: Any, seed: int) -> None:
    x = moment_of(moment, roots)
    codes = store(moment, x, seed).codes
    for row, got in zip(x, codes, strict=True):
        if np.any(row):
            for allowed, code in zip(oracle(moment, row), got, strict=True):
                assert int(code) in allowed


@MOMENTS
@given(roots=ROWS, seed=st.integers(0, 2**31 - 1))
def test_invariants(moment: str, roots: Any, seed: int) -> None:
    roots[0] = 0.0
    x = moment_of(moment, roots)
    rest = store(moment, x, seed)
    back = load(moment, rest)
    assert not rest.codes[0].any()  # 1
    assert not back[0].any()
    again = store(moment, back, seed ^ 1)
    np.testing.assert_array_equal(again.codes, rest.codes)  # 2
    np.testing.assert_allclose(again.scale, rest.scale, rtol=1e-6)
    assert np.all((np.sign(back) == np.sign(x)) | (back == 0))  # 3
    power = 1 / POWER[moment]
    error = np.abs(np.abs(back) ** power - np.abs(x.astype(np.float64)) ** power)
    assert np.all(error <= rest.scale * (1 + 1e-4) + 1e-30)  # 4
    if moment == "v":
        assert np.all((rest.codes > 0) == (x > 0))  # 5
    top = np.argmax(np.abs(x), axis=1)[:, None]
    np.testing.assert_allclose(
        np.take_along_axis(back, top, 1), np.take_along_axis(x, top, 1), rtol=1e-5
    )  # 6
    scaled = store(moment, x * np.float32(2.0 ** (6 * 3)), seed)
    np.testing.assert_array_equal(scaled.codes, rest.codes)  # 7


def test_the_cube_root_is_as_near_as_it_says() -> None:
    # Of every exponent, 128 mantissas.
    patterns = np.arange(0x00800000, 0x7F800000, 65521, dtype=np.uint32)
    x = patterns.view(np.float32)
    got = np.asarray(_storage._cbrt(jnp.asarray(x)), np.float64)
    assert np.max(np.abs(got / np.cbrt(x.astype(np.float64)) - 1)) < 3e-7
    assert _storage._cbrt(jnp.zeros(())) == 0


def test_the_chances_are_right_in_the_moment() -> None:
    # Elements of mixed scale: the mean over draws is the moment, not the moment's root.
    rng = np.random.default_rng(0)
    roots = rng.normal(size=(4, 64)) * rng.choice([0.3, 1.0, 3.0], (4, 64))
    for moment in ("m", "v", "s"):
        x = moment_of(moment, roots).astype(np.float32)
        f = format_for(moment, "int8")
        old, seeds = zeros(f, jnp.asarray(x)), jnp.arange(2000)

        def one(seed: Any, f: Any = f, x: Any = x, old: Any = old) -> Any:
            x = jnp.asarray(x)
            return f.load(f.store(x, old, bits(seed)(x), lambda: x))

        many = jax.vmap(one)
        draws = np.asarray(jax.jit(many)(seeds), np.float64)
        power, size = POWER[moment], np.abs(x.astype(np.float64))
        scale = np.max(size, 1, keepdims=True) ** (1 / power) / LARGEST[moment]
        k = np.floor(size ** (1 / power) / scale)
        low, high = (k * scale) ** power, ((k + 1) * scale) ** power
        # Of two values with mean x, the variance is (high - x)(x - low).
        error = np.sqrt(np.maximum((high - size) * (size - low), 0) / len(draws))
        close = np.abs(np.abs(draws.mean(0)) - size) <= 5 * error + 1e-3 * size
        assert np.all(close | ((moment == "v") & (k == 0)))  # those rise to code 1


@EACH_ROUNDED
@pytest.mark.parametrize(
    ("spread", "largest_update", "bounds"),
    [
        (0.0, 2, {"m": 0.02, "v": 0.05, "s": 0.10}),
        (1.0, 8, {"m": 0.05, "v": 0.05, "s": 0.15}),
    ],
)
def test_slow_averages_move(
    storage: Any,
    spread: float,
    largest_update: float,
    bounds: dict[str, float],
    x64: None,
) -> None:
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
    for moment, bound in bounds.items():
        unit = np.asarray(scale, np.float64) ** POWER[moment]
        got = loaded(moment, low)[0] / unit
        ratio = np.mean(got) / np.mean(getattr(full, moment) / unit)
        print(storage, f"log-spread {spread}: bias of {moment} {ratio - 1:+.4f}")
        assert abs(ratio - 1) < bound
    ours_largest, exact_largest = (float(np.max(x)) for x in largest)
    assert ours_largest < largest_update * exact_largest


@EACH_ROUNDED
def test_pure_decay(storage: Any) -> None:
    # 1,000 steps without gradient, but for the first element of each row, which goes on
    # receiving one and holds the scale up.
    shape = (64, 256)
    optimizer = scale_by_adam3(**storage)
    state = optimizer.init(jnp.zeros(shape))
    rng = np.random.default_rng(0)
    g = jnp.asarray(rng.normal(size=shape) + 2.0, jnp.float32)
    for _ in range(3):
        _, state = optimizer.update(g, state)
    lone = jnp.zeros(shape).at[:, 0].set(2.0)
    step = jax.jit(
        lambda s: jax.lax.scan(
            lambda s, _: (optimizer.update(lone, s)[1], None), s, None, 1000
        )[0]
    )
    end = step(state)
    for moment in ("v", "s"):
        before, after = (loaded(moment, x)[0][:, 1:] for x in (state, end))
        ratio = np.mean(after) / np.mean(before)
        assert abs(ratio / 0.999**1000 - 1) < 0.05


@functools.cache
def moved_without_gradient(name: str, b1: float) -> Any:
    """Returns how far elements move of which most steps have no gradient.

    Half the columns get gradients for 20 steps and then none, the others go on.
    """
    shape, dead = (16, 64), jnp.arange(64) >= 32
    optimizer = scale_by_adam3(b1=b1, third_moment="standardized", **STORAGE[name])

    def body(carry: Any, i: Any) -> Any:
        at, state = carry
        g = jax.random.normal(jax.random.fold_in(jax.random.key(0), i), shape)
        g = jnp.where(dead & (i >= 20), 0.0, g)
        u, state = optimizer.update(g, state)
        return (at + u, state), jnp.max(jnp.abs(u[:, 32:]))

    start = jnp.zeros(shape), optimizer.init(jnp.zeros(shape))
    (at, _), largest = jax.jit(jax.lax.scan, static_argnums=0)(
        body, start, jnp.arange(4000)
    )
    assert np.max(largest[-100:]) < 0.2
    return np.abs(np.asarray(at)[:, 32:])


@pytest.mark.parametrize("name", ["bfloat16", "int8"])
@pytest.mark.parametrize("b1", [0.9, 0.99])
def test_what_gets_no_gradient_comes_to_rest(name: str, b1: float) -> None:
    # A moment that froze would move these for ever, and ever faster.
    narrow, wide = (moved_without_gradient(x, b1) for x in (name, "default"))
    assert narrow.mean() < 1.5 * wide.mean()
    assert narrow.max() < 3 * wide.max()


def test_which_leaves_have_codes() -> None:
    # And what rests in float32 costs no more than float32.
    optimizer = scale_by_adam3(**STORAGE["int8"])
    for shape, coded in {
        (): False,
        (64,): False,
        (4, 1): False,
        (4, 15): False,
        (4, 16): True,
        (2, 3, 4, 16): True,
        (0, 16): True,
    }.items():
        state = optimizer.init(jnp.zeros(shape))
        for name in "mvs":
            codes, scale = getattr(state, name)
            assert (codes.dtype != jnp.float32) == coded
            assert scale.shape == ((*shape[:-1], 1) if coded else (1,) * len(shape))


@EACH_ROUNDED
def test_the_optimizer_draws_apart(storage: Any) -> None:
    # One number a row holds the scale up; the others are alike in all three moments.
    # And m is so small that its rounding does not show in g - m, and so in s. At the
    # second step, with the same gradient, what differs from the first is the rounding.
    optimizer = scale_by_adam3(b1=1 - 2**-14, b2=0.5, b3=0.5, **storage)
    g = jnp.full((64, 64), 1.0034).at[:, 0].set(2.5)
    treedef: Any = jax.tree.structure({"a": 0, "b": 0})
    masks = []
    for count in (0, 1):
        state = optimizer.init({"a": g, "b": g})._replace(count=jnp.int32(count))
        _, state = optimizer.update({"a": g, "b": g}, state)
        for name in "mvs":
            for x in loaded(name, state, treedef):
                x = x[:, 1:]
                masks.append((x > x.mean()).ravel())
    assert len(masks) == 12
    for i, a in enumerate(masks):
        assert 0 < a.mean() < 1
        for b in masks[:i]:
            assert abs(np.corrcoef(a, b)[0, 1]) < 0.08


@EACH_ROUNDED
def test_derivatives_stop_at_narrow_state(storage: Any) -> None:
    optimizer, wide = scale_by_adam3(**storage), scale_by_adam3()

    def second_update(optimizer: Any, first: Any, second: Any) -> Any:
        _, state = optimizer.update(first, optimizer.init(first))
        return optimizer.update(second, state)[0].sum()

    g = jnp.linspace(0.1, 1, 64).reshape(4, 16)
    first, second = jax.grad(second_update, (1, 2))(optimizer, g, g[::-1])
    assert not np.any(first)
    # Within the update rounding counts as the identity, which it is on average.
    expected = jax.grad(second_update, 2)(wide, g, g[::-1])
    np.testing.assert_allclose(second, expected, rtol=0.2)


@EACH_FORM
@EACH_ROUNDED
def test_the_update_is_that_of_the_stored_moments(form: Any, storage: Any) -> None:
    b: Any = _rule.Moments(0.9, 0.99, 0.98)
    h = _rule.Hyperparameters(b, 0.5, 1.0, 1e-8, 0.0)
    rest: Any = {"b3": b.s, **h._asdict(), "third_moment": form, **storage}
    del rest["b"]
    optimizer = scale_by_adam3(b.m, b.v, **rest)
    f = format_for("s", storage["s_dtype"])
    record = _rule.FORMS[form]
    rng = np.random.default_rng(0)
    state: Any = optimizer.init(jnp.zeros((8, 32)))
    for count in range(1, 6):
        g = jnp.asarray(rng.normal(size=(8, 32)), jnp.float32)
        old_m, old_s = (jnp.asarray(loaded(x, state)[0], jnp.float32) for x in "ms")
        updates, state = optimizer.update(g, state)
        m, v, s = (jnp.asarray(loaded(x, state)[0], jnp.float32) for x in "mvs")
        k = _rule.coefficients(h, jnp.int32(count), jnp.float32)
        expected = _rule.direction(m, v, record.term(v, s, k), k)
        np.testing.assert_allclose(updates, expected, rtol=1e-5, atol=1e-6)
        # And s is about m before rounding: seldom does an ulp turn the rounding. In the
        # first step the deviation from m̂ is nothing but ulps.
        if count == 1:
            continue
        s_t = _rule.update_s(g, _rule.update_m(g, old_m, k), old_s, k, record)
        drawn = bits(count, 0, 2)(g)
        kept = f.load(f.store(s_t, zeros(f, g), drawn, s_t.copy))
        assert np.mean(np.isclose(kept, s, rtol=1e-4, atol=0)) > 0.97


def test_a_format_is_added_in_one_place(monkeypatch: pytest.MonkeyPatch) -> None:
    class Truncated(_storage.OneArray):
        """Stored in float16, the root of v in units of 1/1024."""

        dtypes = (jnp.float16,)

        def load(self, stored: Any) -> jax.Array:
            return (stored[0].astype(jnp.float32) / 1024) ** 2

        def store(self, x: jax.Array, old: Any, bits: Any, again: Any) -> Any:
            return ((jnp.sqrt(x) * 1024).astype(jnp.float16),)

    monkeypatch.setitem(_storage.SETTINGS, "float16", Truncated)
    monkeypatch.setattr(_storage, "FORMATS", (*_storage.FORMATS, Truncated))
    params = jnp.linspace(0.1, 1.0, 32).reshape(2, 16)
    new, old = scale_by_adam3(v_dtype="float16"), scale_by_adam3()
    (_, low), (_, full) = (o.update(params, o.init(params)) for o in (new, old))
    assert low.v.dtype == jnp.float16
    updates, low = jax.jit(new.update)(params, low)
    expected, full = old.update(params, full)
    np.testing.assert_allclose(updates, expected, rtol=1e-2)
    converted: Any = adam3_optax.convert_state(low)
    np.testing.assert_allclose(converted.v, full.v, rtol=1e-2)
