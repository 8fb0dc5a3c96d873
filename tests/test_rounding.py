"""Stochastic rounding: unbiased, between neighbours, and the same for the same step."""

import itertools
from typing import Any

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from adam3_optax import _rounding
from adam3_optax._rounding import for_moments, leaf_key, random_bits, to_bfloat16
from adam3_optax._xla import _by_integers, from_float8

DRAWS = 100_000


def floats(patterns: Any) -> Any:
    return np.asarray(patterns, np.uint32).view(np.float32)


def drawn(count: Any, leaf: int = 0, moment: int = 0) -> Any:
    key = leaf_key((jax.tree_util.SequenceKey(leaf),), "moments")
    return lambda x: for_moments(random_bits(count, key, jnp.asarray(x)))[moment]


def fixed(bits: int) -> Any:
    return jnp.uint32(bits)


@pytest.mark.parametrize(
    "value", [1 + 2**-9, 1 + 2**-16, -3.14159, 1e-30, 6.5e37, 0.999, -1e-3]
)
def test_bfloat16_is_unbiased(value: float) -> None:
    x = np.float32(value)
    rounded = to_bfloat16(jnp.full(DRAWS, x), drawn(7)(np.zeros(DRAWS)))
    draws = np.asarray(rounded, np.float64)
    gap = np.ptp(draws)
    # Two values a gap apart, drawn with chance p, have the standard error below.
    p = abs(draws.mean() - draws.min()) / gap if gap else 0.0
    error = gap * np.sqrt(p * (1 - p) / DRAWS)
    assert abs(draws.mean() - x) <= 4.5 * error + 2e-5 * gap + 1e-45


def test_bfloat16_rounds_to_a_neighbour_at_every_exponent() -> None:
    # Both signs, all exponents, the lowest, middle and highest mantissas of bfloat16.
    signs, exponents = np.array([0, 1]) << 31, np.arange(1, 255) << 23
    mantissas = np.array([0, 1, 63, 64, 126, 127]) << 16
    low = np.array([0, 1, 0x7FFF, 0x8000, 0x8001, 0xFFFF])
    patterns = (
        signs[:, None, None, None] | exponents[:, None, None] | mantissas[:, None] | low
    ).ravel()
    x = floats(patterns)
    below = floats(patterns & 0xFFFF0000)
    with np.errstate(over="ignore"):
        above = floats((patterns & 0xFFFF0000) + 0x10000)
    above = np.where(np.isfinite(above), above, below)
    seen = []
    for step in range(40):
        y = np.asarray(to_bfloat16(jnp.asarray(x), drawn(step)(x)), np.float32)
        exact = (patterns & 0xFFFF) == 0
        assert np.all((y == below) | ((y == above) & ~exact))
        seen.append(y == above)
    share = np.mean(seen, axis=0)
    middle = ((patterns & 0xFFFF) == 0x8000) & (above != below)
    assert abs(share[middle].mean() - 0.5) < 0.01


@pytest.mark.parametrize("upper", [0x3F80, 0xBF80, 0x0080, 0x4049, 0x7F7E, 0xC2F7])
def test_bfloat16_carries_for_every_low_half(upper: int) -> None:
    # The chance of the upper neighbour is low/65536 to the digit: of the 65,536 values
    # of the random half, just those from 65,536 - low on carry.
    low = np.arange(65536, dtype=np.uint32)
    x = jnp.asarray(floats((np.uint32(upper) << 16) | low))
    for r in [
        0,
        1,
        2,
        255,
        256,
        0x7FFF,
        0x8000,
        0xFFFE,
        0xFFFF,
        *range(3, 65536, 2311),
    ]:
        y = np.asarray(to_bfloat16(x, fixed(r << 16 | 0xABC)))
        got = y.view(np.uint16)
        np.testing.assert_array_equal(got, upper + (low + r >= 65536))


def test_bfloat16_keeps_the_special_values() -> None:
    largest = float(ml_dtypes.finfo(ml_dtypes.bfloat16).max)
    x = [np.inf, -np.inf, np.nan, 0.0, -0.0, largest, -largest]
    for r in (0, 0xFFFFFFFF):
        y = np.asarray(to_bfloat16(jnp.asarray(x, jnp.float32), fixed(r)), np.float32)
        np.testing.assert_array_equal(y, np.asarray(x, np.float32))
        assert np.signbit(y[4])
        # Also those NaN whose bits a carry would turn into zero or an infinity.
        nans = floats([0x7F800001, 0x7FFFFFFF, 0xFF800001, 0xFFFFFFFF])
        y = np.asarray(to_bfloat16(jnp.asarray(nans), fixed(r)), np.float32)
        assert np.isnan(y).all()
        # Past it, nothing finite becomes infinite.
        past = jnp.asarray([np.finfo(np.float32).max, -np.finfo(np.float32).max])
        y = np.asarray(to_bfloat16(past, fixed(r)), np.float32)
        np.testing.assert_array_equal(y, [largest, -largest])


# float8_e4m3fn. Only the upper 20 bits are used, so that 2^20 draws are all there are.

ALL_20 = np.arange(1 << 20, dtype=np.uint32) << 12
FINITE = np.arange(256, dtype=np.uint8).view(ml_dtypes.float8_e4m3fn).astype(np.float32)
FINITE = np.unique(FINITE[np.isfinite(FINITE)])


def neighbours(known: Any, x: float) -> tuple[float, float]:
    return known[known <= x].max(), known[known >= x].min()


def to_float8(x: Any, bits: Any, exponent: int = 0) -> Any:
    x, bits = np.broadcast_arrays(np.float32(x), np.uint32(bits))
    code = _rounding.to_float8(jnp.asarray(x), exponent, jnp.asarray(bits))
    return np.asarray(code.astype(jnp.float32), np.float64)


@given(
    x=st.floats(-500, 500, width=32),
    bits=st.integers(0, 2**32 - 1),
    exponent=st.sampled_from([0, 2]),
)
def test_float8_is_a_neighbour(x: float, bits: int, exponent: int) -> None:
    y = np.clip(x * 2.0**exponent, -448, 448)
    got = to_float8(x, bits, exponent)
    assert got in neighbours(FINITE, y)
    assert np.signbit(got) == np.signbit(x)


@pytest.mark.parametrize("exponent", [0, 2])
def test_what_is_a_float8_stays(exponent: int) -> None:
    for bits in (0, 0xFFFFFFFF):
        got = to_float8(FINITE * 2.0**-exponent, bits, exponent)
        np.testing.assert_array_equal(got, FINITE)


@pytest.mark.parametrize("exponent", range(-9, 9))
def test_float8_is_unbiased_in_every_binade(exponent: int) -> None:
    for part in (0.0, 1e-3, 0.1, 0.37, 0.5, 0.9, 0.999):
        y = float(np.float32(min(2.0**exponent * (1 + part), 448.0)))
        assert abs(to_float8(y, ALL_20).mean() - y) <= 2e-6 * y


def test_float8_is_unbiased_below_the_smallest() -> None:
    # A float32 near 2^-6 has 20 bits below 2^-9, so half a unit of these is the limit.
    for part in (1e-6, 1e-3, 0.3, 0.5, 0.777, 0.9999):
        y = float(np.float32(part * 2.0**-9))
        assert abs(to_float8(y, ALL_20).mean() - y) <= 2.0**-21 * 2.0**-9


def test_float8_keeps_the_special_values() -> None:
    for bits in (0, 0xFFFFFFFF):
        got = to_float8([0.0, -0.0, 1e30, -1e30, np.inf, np.nan], bits)
        np.testing.assert_array_equal(got, [0, 0, 448, -448, 448, np.nan])
        assert np.signbit(got[1])
        assert np.isnan(to_float8(floats([0x7FFFFFFF, 0xFFFFFFFF]), bits)).all()


def test_float8_is_read_alike_on_every_platform() -> None:
    codes = np.arange(256, dtype=np.uint8).view(ml_dtypes.float8_e4m3fn)
    for read in (_by_integers, from_float8, lambda x: x.astype(jnp.float32)):
        got = np.asarray(read(jnp.asarray(codes)))
        np.testing.assert_array_equal(got, codes.astype(np.float32))
        finite = np.isfinite(got)
        assert (np.signbit(got) == np.signbit(codes.astype(np.float32)))[finite].all()


# The unsigned float of v: 7 bits of exponent and 1 of mantissa.

CODES = np.arange(256, dtype=np.uint8)
STEPS = CODES.astype(np.float64) - 1
VALUES = 2.0 ** (np.floor(STEPS / 2) - 72) * (1 + 0.5 * (STEPS % 2))
VALUES[0], VALUES[255] = 0.0, np.nan


def to_unsigned(x: Any, bits: Any) -> Any:
    x, bits = np.broadcast_arrays(np.float32(x), np.uint32(bits))
    return np.asarray(_rounding.to_unsigned_float8(jnp.asarray(x), jnp.asarray(bits)))


def test_the_codes_of_v() -> None:
    got = _rounding.from_unsigned_float8(jnp.asarray(CODES))
    np.testing.assert_array_equal(np.asarray(got, np.float64), VALUES)
    for bits in (0, 0xFFFFFFFF):
        np.testing.assert_array_equal(to_unsigned(VALUES, bits), CODES)
        ends = [1e-30, 2.0**-80, 1e17, 1e38, np.inf, np.nan]
        np.testing.assert_array_equal(
            to_unsigned(ends, bits), [1, 1, 254, 254, 255, 255]
        )


@given(x=st.floats(2.0**-72, 2.0**54, width=32), bits=st.integers(0, 2**32 - 1))
def test_a_code_of_v_is_a_neighbour(x: float, bits: int) -> None:
    assert VALUES[to_unsigned(x, bits)] in neighbours(VALUES[:255], x)


@pytest.mark.parametrize("x", [1.0, 1.25, 1.4999, 1.5, 1.9, 2.0, 3e-7, 1e9])
def test_the_codes_of_v_are_unbiased(x: float) -> None:
    x = float(np.float32(x))
    draws = np.arange(1 << 22, dtype=np.uint32) << 10
    assert abs(VALUES[to_unsigned(x, draws)].mean() - x) <= 2e-6 * x


# Random bits.


def test_random_bits_are_uniform_and_independent() -> None:
    x = jnp.zeros((1000, 1000))
    streams = [
        np.asarray(drawn(*which)(x)).ravel()
        for which in itertools.product((1, 2, 3), (0, 1), (0, 1, 2))
    ]
    for bits in streams:
        each = np.unpackbits(bits.view(np.uint8)).reshape(-1, 32).mean(axis=0)
        assert np.max(np.abs(each - 0.5)) < 0.0025  # 5 standard errors
        counts = np.bincount(bits >> 20, minlength=4096)
        chi2 = np.sum((counts - counts.mean()) ** 2) / counts.mean()
        assert abs(chi2 - 4095) < 5 * np.sqrt(2 * 4095)
        assert np.diff(np.sort(bits)).all()  # the hash is a bijection of the index
        centred = bits / 2**32 - 0.5
        for lag in (1, 2, 1000, 1001):  # neighbours in rows and columns
            assert abs(12 * np.mean(centred[lag:] * centred[:-lag])) < 5e-3
    between = np.corrcoef(np.stack(streams) / 2**32) - np.eye(len(streams))
    assert np.max(np.abs(between)) < 5e-3


def z_of(counts: Any) -> float:
    """Returns by how many standard deviations a chi-square is off."""
    mean, free = counts.mean(), counts.size - 1
    return float((np.sum((counts - mean) ** 2) / mean - free) / np.sqrt(2 * free))


def z_of_pairs(a: Any, b: Any) -> float:
    """Tests the upper 6 bits of two streams, as pairs."""
    both = ((a >> 26).astype(np.int64) << 6) | (b >> 26)
    return z_of(np.bincount(both, minlength=1 << 12))


LAGS = (1, 2, 3, 4, 5, 7, 8, 16, 64, 100, 256, 768, 1024, 4096, 16384, 65536, 1 << 20)


@pytest.mark.parametrize(
    "size", [1 << 20, pytest.param(1 << 22, marks=pytest.mark.slow)]
)
def test_pairs_of_random_bits_are_uniform(size: int) -> None:
    # Of elements, of moments, of steps and of leaves. 5 would be a failure; what this
    # package had before, without the first product, gives 1,055.
    which = ((1, 0), (2, 0), (3, 0), (1000, 0), (1, 1), (2, 7))
    like = np.zeros(size, np.float32)
    made = [[np.asarray(drawn(*x, moment)(like)) for moment in range(3)] for x in which]
    worst = 0.0
    for streams in made:
        for bits in streams:
            worst = max(worst, abs(z_of(np.bincount(bits >> 20, minlength=4096))))
            for lag in (x for x in LAGS if x < size):
                worst = max(worst, abs(z_of_pairs(bits[lag:], bits[:-lag])))
        for a, b in itertools.combinations(streams, 2):
            worst = max(worst, abs(z_of_pairs(a, b)))
    for one, other in itertools.combinations(made, 2):
        for a, b in itertools.product(one, other):
            worst = max(worst, abs(z_of_pairs(a, b)))
    assert worst < 5


def test_the_test_of_pairs_can_fail() -> None:
    # Without the first product.
    bits = np.asarray(_rounding._mixed(jnp.arange(1 << 18, dtype=jnp.uint32)))
    assert abs(z_of_pairs(bits[768:], bits[:-768])) > 20


@pytest.mark.parametrize(
    ("which", "expected"),
    [
        ((1, 0, 0), [2180511761, 139476888, 3287487837, 2781937956]),
        ((2, 0, 0), [303370054, 2755949493, 1472573493, 1129680695]),
        ((3, 1, 2), [3996223450, 3449732952, 3243396189, 313301968]),
    ],
)
def test_random_bits_are_the_same_in_every_release(
    which: tuple[int, int, int], expected: list[int]
) -> None:
    # A run that is resumed with a newer release goes on as it would have done.
    bits = drawn(*which)(jnp.zeros((2, 2)))
    assert bits.ravel().tolist() == expected


def test_random_bits_depend_on_the_index_not_on_the_layout() -> None:
    flat = drawn(5)(jnp.zeros(24))
    np.testing.assert_array_equal(drawn(5)(jnp.zeros((2, 3, 4))).ravel(), flat)
    np.testing.assert_array_equal(jax.jit(drawn(5))(jnp.zeros((4, 6))).ravel(), flat)
    batched = jax.vmap(drawn(5))(jnp.zeros((3, 24)))
    np.testing.assert_array_equal(batched, np.tile(flat, (3, 1)))
    assert drawn(5)(jnp.zeros(())).shape == ()
