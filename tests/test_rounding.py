"""Stochastic rounding: unbiased, between neighbours, and the same for the same step."""

import itertools
from typing import Any

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest

from adam3_optax._rounding import (
    for_moments,
    leaf_key,
    random_bits,
    to_bfloat16,
    to_integer,
)

DRAWS = 100_000


def floats(patterns: Any) -> Any:
    return np.asarray(patterns, np.uint32).view(np.float32)


def drawn(count: Any, leaf: int = 0, moment: int = 0) -> Any:
    return lambda x: for_moments(random_bits(count, leaf_key(leaf), jnp.asarray(x)))[
        moment
    ]


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


@pytest.mark.parametrize("power", [1, 2, 3])
def test_integers_are_unbiased_in_the_power(power: int) -> None:
    for root in (0.0, 0.2, 0.9, 1.5, 17.3, 99.99, 126.5):
        whole = to_integer(
            jnp.full(DRAWS, root, jnp.float32), power, drawn(1)(np.zeros(DRAWS))
        )
        draws = np.asarray(whole, np.float64)
        assert set(np.unique(draws)) <= {np.floor(root), np.ceil(root)}
        powers = draws**power
        error = powers.std() / np.sqrt(DRAWS)
        assert (
            abs(powers.mean() - np.float32(root) ** power) <= 4.5 * error + 1e-3 * root
        )


def test_whole_numbers_stay() -> None:
    k = jnp.arange(256.0)
    for power in (1, 2, 3):
        for rounding_error in (1.0, 1 - 2e-7, 1 + 2e-7):
            for r in (0, 0xFFFFFFFF):
                got = to_integer(k * jnp.float32(rounding_error), power, fixed(r))
                np.testing.assert_array_equal(got, k)


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


@pytest.mark.parametrize(
    ("which", "expected"),
    [
        ((1, 0, 0), [3333438471, 621211005, 1360183060, 4123696902]),
        ((2, 0, 0), [1016336091, 3833868886, 2756201615, 2079194376]),
        ((3, 1, 2), [3870740177, 438529973, 680172028, 1892655453]),
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


@pytest.mark.parametrize("power", [1, 2, 3])
@pytest.mark.parametrize("b", [0.999, 0.99999])
def test_a_slow_decay_moves(power: int, b: float) -> None:
    # Stored, loaded and multiplied by b, 1/(1 - b) times over: 1/e is left on average.
    # No band around the integers may hold it, however narrow.
    steps = round(1 / (1 - b))
    start = jnp.repeat(jnp.float32([2, 7, 20, 80]), 512)

    def body(i: Any, k: Any) -> Any:
        root = k * jnp.float32(b ** (1 / power))
        return to_integer(root, power, drawn(i)(root))

    left = jax.lax.fori_loop(0, steps, body, start).reshape(4, 512) ** power
    kept = np.mean(left, 1) / np.asarray(start[::512]) ** power
    error = 5 * np.std(left, 1) / np.sqrt(512) / np.asarray(start[::512]) ** power
    assert np.all(np.abs(kept - b**steps) < error + 0.01)
