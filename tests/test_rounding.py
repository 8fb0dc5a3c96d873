"""Stochastic rounding: unbiased, between neighbours, and the same for the same step."""

import itertools
from typing import Any

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest

from adam3_optax import _rounding
from adam3_optax._rounding import for_moments, leaf_key, random_bits, to_bfloat16
from adam3_optax._xla import _by_integers, from_float8

ENDS = 0, 0xFFFFFFFF  # the least and the greatest random bits


def floats(patterns: Any) -> Any:
    return np.asarray(patterns, np.uint32).view(np.float32)


def drawn(count: Any, leaf: int = 0, moment: int = 0) -> Any:
    key = leaf_key((jax.tree_util.SequenceKey(leaf),), "moments")
    return lambda x: for_moments(random_bits(count, key, jnp.asarray(x)))[moment]


def neighbours(known: Any, x: Any) -> tuple[Any, Any]:
    """Returns the nearest of the known numbers at or below x, and at or above."""
    below = known[np.searchsorted(known, x, "right") - 1]
    return below, known[np.searchsorted(known, x)]


# bfloat16, the upper half of a float32.


@pytest.mark.parametrize("upper", [0x3F80, 0xBF80, 0x0080, 0x4049, 0x7F7E, 0xC2F7])
def test_bfloat16_carries_for_every_low_half(upper: int) -> None:
    # The chance of the upper neighbour is low/65536 to the digit: of the 65,536 values
    # of the random half, just those from 65,536 - low on carry.
    low = np.arange(65536, dtype=np.uint32)
    x = jnp.asarray(floats((np.uint32(upper) << 16) | low))
    ends = [0, 1, 2, 255, 256, 0x7FFF, 0x8000, 0xFFFE, 0xFFFF]
    for r in (*ends, *range(3, 65536, 2311)):
        y = np.asarray(to_bfloat16(x, jnp.uint32(r << 16 | 0xABC)))
        np.testing.assert_array_equal(y.view(np.uint16), upper + (low + r >= 65536))


def test_bfloat16_keeps_the_special_values() -> None:
    largest = float(ml_dtypes.finfo(ml_dtypes.bfloat16).max)
    most = float(np.finfo(np.float32).max)  # nothing finite becomes infinite
    x = [np.inf, -np.inf, np.nan, 0.0, -0.0, largest, -largest, most, -most]
    # Also those NaN whose bits a carry would turn into zero or an infinity.
    nans = floats([0x7F800001, 0x7FFFFFFF, 0xFF800001, 0xFFFFFFFF])
    for r in map(jnp.uint32, ENDS):
        y = np.asarray(to_bfloat16(jnp.asarray(x, jnp.float32), r), np.float32)
        np.testing.assert_array_equal(y, [*x[:7], largest, -largest])
        assert np.signbit(y[4])
        assert np.isnan(to_bfloat16(jnp.asarray(nans), r)).all()


# float8_e4m3fn. Only the upper 20 bits are used, so that 2^20 draws are all there are.

ALL_20 = np.arange(1 << 20, dtype=np.uint32) << 12
FLOAT8 = np.arange(256, dtype=np.uint8).view(ml_dtypes.float8_e4m3fn)
FINITE = FLOAT8.astype(np.float64)
FINITE = np.unique(FINITE[np.isfinite(FINITE)])


def to_float8(x: Any, bits: Any, exponent: int = 0) -> Any:
    x, bits = np.broadcast_arrays(np.float32(x), np.uint32(bits))
    code = _rounding.to_float8(jnp.asarray(x), exponent, jnp.asarray(bits))
    return np.asarray(code.astype(jnp.float32), np.float64)


@pytest.mark.parametrize("exponent", [0, 2])
def test_float8_is_a_neighbour(exponent: int) -> None:
    rng = np.random.default_rng(0)
    x = rng.choice([-1, 1], 100_000) * 10 ** rng.uniform(-6, 2.7, 100_000)
    x = x.astype(np.float32)
    known = neighbours(FINITE, np.clip(x * np.float64(2.0**exponent), -448, 448))
    for bits in (*ENDS, rng.integers(1 << 32, size=100_000)):
        got = to_float8(x, bits, exponent)
        assert np.all((got == known[0]) | (got == known[1]))
        assert np.all(np.signbit(got) == np.signbit(x))


def test_float8_is_unbiased() -> None:
    parts = np.array([0.0, 1e-3, 0.1, 0.37, 0.5, 0.9, 0.999])
    for y in np.ravel(2.0 ** np.arange(-9, 9)[:, None] * (1 + parts)):
        y = float(np.float32(min(y, 448.0)))
        assert abs(to_float8(y, ALL_20).mean() - y) <= 2e-6 * y
    # Below 2^-9. A float32 near 2^-6 has 20 bits there, so half a unit is the limit.
    for y in 2.0**-9 * np.array([1e-6, 1e-3, 0.3, 0.5, 0.777, 0.9999], np.float32):
        assert abs(to_float8(y, ALL_20).mean() - y) <= 2.0**-21 * 2.0**-9


def test_float8_keeps_the_special_values() -> None:
    for bits in ENDS:
        got = to_float8([0.0, -0.0, 1e30, -1e30, np.inf, np.nan], bits)
        np.testing.assert_array_equal(got, [0, 0, 448, -448, 448, np.nan])
        assert np.signbit(got[1])
        assert np.isnan(to_float8(floats([0x7FFFFFFF, 0xFFFFFFFF]), bits)).all()
        for exponent in (0, 2):  # what is a float8 stays
            stays = to_float8(FINITE * 2.0**-exponent, bits, exponent)
            np.testing.assert_array_equal(stays, FINITE)


def test_float8_is_read_alike_on_every_platform() -> None:
    expected = FLOAT8.astype(np.float32)
    finite = np.isfinite(expected)
    for read in (_by_integers, from_float8, lambda x: x.astype(jnp.float32)):
        got = np.asarray(read(jnp.asarray(FLOAT8)))
        np.testing.assert_array_equal(got, expected)
        assert (np.signbit(got) == np.signbit(expected))[finite].all()


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
    ends = [1e-30, 2.0**-80, 1e17, 1e38, np.inf, np.nan]
    rng = np.random.default_rng(0)
    x = (2.0 ** rng.uniform(-72, 54.5, 100_000)).astype(np.float32)
    below, above = neighbours(VALUES[:255], np.float64(x))
    for bits in ENDS:
        np.testing.assert_array_equal(to_unsigned(VALUES, bits), CODES)
        coded = to_unsigned(ends, bits)
        np.testing.assert_array_equal(coded, [1, 1, 254, 254, 255, 255])
        got = VALUES[to_unsigned(x, bits)]
        assert np.all((got == below) | (got == above))


def test_the_codes_of_v_are_unbiased() -> None:
    draws = np.arange(1 << 22, dtype=np.uint32) << 10
    for x in np.array([1.0, 1.25, 1.4999, 1.5, 1.9, 2.0, 3e-7, 1e9], np.float32):
        mean = VALUES[to_unsigned(x, draws)].mean()
        assert abs(mean - np.float64(x)) <= 2e-6 * np.float64(x)


# Random bits.


def z_of(counts: Any) -> float:
    """Returns by how many standard deviations a chi-square is off."""
    mean, free = counts.mean(), counts.size - 1
    return abs((np.sum((counts - mean) ** 2) / mean - free) / np.sqrt(2 * free))


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
    streams = [np.asarray(drawn(*x, i)(like)) for x in which for i in range(3)]
    found = [z_of_pairs(a, b) for a, b in itertools.combinations(streams, 2)]
    for bits in streams:
        assert np.diff(np.sort(bits)).all()  # the hash is a bijection of the index
        each = np.unpackbits(bits.view(np.uint8)).reshape(-1, 32).mean(axis=0)
        assert np.max(np.abs(each - 0.5)) < 0.0025  # 5 standard errors
        found.append(z_of(np.bincount(bits >> 20, minlength=4096)))
        found += [z_of_pairs(bits[lag:], bits[:-lag]) for lag in LAGS if lag < size]
    assert max(found) < 5


def test_the_test_of_pairs_can_fail() -> None:
    # Without the first product.
    bits = np.asarray(_rounding._mixed(jnp.arange(1 << 18, dtype=jnp.uint32)))
    assert z_of_pairs(bits[768:], bits[:-768]) > 20


def test_random_bits_are_the_same_in_every_release() -> None:
    # A run that is resumed with a newer release goes on as it would have done.
    for which, expected in (
        ((1, 0, 0), [2180511761, 139476888, 3287487837, 2781937956]),
        ((2, 0, 0), [303370054, 2755949493, 1472573493, 1129680695]),
        ((3, 1, 2), [3996223450, 3449732952, 3243396189, 313301968]),
    ):
        assert drawn(*which)(jnp.zeros((2, 2))).ravel().tolist() == expected


def test_random_bits_depend_on_the_index_not_on_the_layout() -> None:
    flat = drawn(5)(jnp.zeros(24))
    np.testing.assert_array_equal(drawn(5)(jnp.zeros((2, 3, 4))).ravel(), flat)
    np.testing.assert_array_equal(jax.jit(drawn(5))(jnp.zeros((4, 6))).ravel(), flat)
    batched = jax.vmap(drawn(5))(jnp.zeros((3, 24)))
    np.testing.assert_array_equal(batched, np.tile(flat, (3, 1)))


def test_the_index_is_taken_modulo_two_to_the_32() -> None:
    # Strides must not overflow on the way there. That of rows of 2³² elements is 0.
    key = leaf_key((), "moments")
    for shape in ((2, 2**16, 2**16), (2**17, 2**16, 3)):
        leaf = jax.ShapeDtypeStruct(shape, jnp.float32)
        program = jax.make_jaxpr(lambda x: random_bits(1, key, x))(leaf)
        assert program.out_avals[0].shape == shape
        assert "4294967296" not in str(program)
