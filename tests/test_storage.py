"""How moments rest: types, bytes, the quantiser against an oracle, and its invariants.

The invariants of 8-bit rows, each with its number in a test below:
  1. A row of zeros stays a row of zeros.
  2. What was stored once is stored again as the same codes.
  3. A stored moment has the sign of the moment, or is 0.
  4. In units of the root, the error is less than one step of the row's scale.
  5. A v that is not 0 is not stored as 0.
  6. The largest element of a row is stored to rounding.
  7. Scaling a row by a power of 2 scales what is stored, and changes no code.
"""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from adam3_optax import _storage, scale_by_adam3
from adam3_optax._rounding import random_bits

MOMENTS = pytest.mark.parametrize("moment", ["m", "v", "s"])
POWER = {"m": 1, "v": 2, "s": 3}
LARGEST = {"m": 127, "v": 255, "s": 127}
ALL = {
    setting: dict.fromkeys(("m_dtype", "v_dtype", "s_dtype"), setting)
    for setting in (None, "float32", "bfloat16", "int8")
}


def store(moment: str, x: Any, seed: int = 0) -> Any:
    """Returns an array as 8-bit rows."""
    f = _storage.resting(moment, "int8")
    x = jnp.asarray(x, jnp.float32)
    (rest,) = f.split(jax.tree.structure(0), f.zeros(x))
    return jax.tree.map(np.asarray, f.store(x, rest, random_bits(seed)))


def load(moment: str, rest: Any) -> Any:
    return np.asarray(_storage.resting(moment, "int8").load(rest), np.float64)


def oracle(moment: str, row: Any) -> Any:
    """Returns, for each element, the codes it may get: by trying all, in float64."""
    power, largest = POWER[moment], LARGEST[moment]
    row = np.asarray(row, np.float64)
    scale = np.max(np.abs(row)) ** (1 / power) / largest
    codes = np.arange(-largest if moment != "v" else 0, largest + 1)
    values = np.sign(codes) * (np.abs(codes) * scale) ** power
    allowed = []
    for x in row:
        below = codes[values <= x + 1e-4 * np.abs(x)].max()
        above = codes[values >= x - 1e-4 * np.abs(x)].min()
        choice = {below, above}
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


@given(roots=ROWS)
def test_m_is_rounded_to_nearest(roots: Any) -> None:
    rest = store("m", roots)
    assert np.all(np.abs(load("m", rest) - roots) <= 0.5001 * rest.scale)


@MOMENTS
@given(roots=ROWS, seed=st.integers(0, 2**31 - 1))
def test_invariants(moment: str, roots: Any, seed: int) -> None:
    roots[0] = 0.0
    x = moment_of(moment, roots)
    rest = store(moment, x, seed)
    back = load(moment, rest)
    assert not rest.codes[0].any()  # 1
    assert not back[0].any()
    again = store(moment, back, seed + 1)
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


def test_the_chances_are_right_in_the_moment() -> None:
    # Elements of mixed scale: the mean over draws is the moment, not the moment's root.
    rng = np.random.default_rng(0)
    roots = rng.normal(size=(4, 64)) * rng.choice([0.3, 1.0, 3.0], (4, 64))
    for moment in ("v", "s"):
        x = moment_of(moment, roots).astype(np.float32)
        draws = np.stack([load(moment, store(moment, x, i)) for i in range(2000)])
        power, size = POWER[moment], np.abs(x.astype(np.float64))
        scale = np.max(size, 1, keepdims=True) ** (1 / power) / LARGEST[moment]
        k = np.floor(size ** (1 / power) / scale)
        low, high = (k * scale) ** power, ((k + 1) * scale) ** power
        # Of two values with mean x, the variance is (high - x)(x - low).
        error = np.sqrt(np.maximum((high - size) * (size - low), 0) / len(draws))
        close = np.abs(np.abs(draws.mean(0)) - size) <= 5 * error + 1e-3 * size
        assert np.all(close | ((moment == "v") & (k == 0)))  # those rise to code 1


@pytest.mark.parametrize("setting", ["bfloat16", "int8"])
@pytest.mark.parametrize(("spread", "largest_update"), [(0.0, 2), (1.0, 8)])
def test_slow_averages_move(setting: str, spread: float, largest_update: float) -> None:
    # b = .999, constant-mean noise, 3,000 steps, 16,384 elements: of equal scale, and
    # of scales whose logarithms have a standard deviation of 1.
    shape = (64, 256)
    ours, exact = scale_by_adam3(**ALL[setting]), scale_by_adam3()
    scale = jnp.exp(spread * jax.random.normal(jax.random.key(1), shape))

    def step(states: Any, key: jax.Array) -> Any:
        g = scale * (1.0 + jax.random.exponential(key, shape))
        results = [o.update(g, s) for o, s in zip((ours, exact), states, strict=True)]
        return [s for _, s in results], [jnp.max(jnp.abs(u)) for u, _ in results]

    states = [o.init(jnp.zeros(shape)) for o in (ours, exact)]
    keys = jax.random.split(jax.random.key(0), 3000)
    (low, full), largest = jax.jit(lambda s: jax.lax.scan(step, s, keys))(states)
    for moment, bound in (("m", 0.02), ("v", 0.05), ("s", 0.10)):
        f = _storage.resting(moment, setting)
        (rest,) = f.split(jax.tree.structure(0), getattr(low, moment))
        unit = scale ** POWER[moment]
        ratio = np.mean(f.load(rest) / unit) / np.mean(getattr(full, moment) / unit)
        assert abs(ratio - 1) < bound
    assert np.max(largest[0]) < largest_update * np.max(largest[1])


@pytest.mark.parametrize("setting", ["bfloat16", "int8"])
def test_pure_decay(setting: str) -> None:
    # 1,000 steps without gradient, but for the first element of each row, which goes on
    # receiving one and holds the scale up.
    shape = (64, 256)
    optimizer = scale_by_adam3(**ALL[setting])
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
    for moment in ("v", "s"):
        f = _storage.resting(moment, setting)
        (before,) = f.split(jax.tree.structure(0), getattr(state, moment))
        (after,) = f.split(jax.tree.structure(0), getattr(step(state), moment))
        ratio = np.mean(f.load(after)[:, 1:]) / np.mean(f.load(before)[:, 1:])
        assert abs(ratio / 0.999**1000 - 1) < 0.05
