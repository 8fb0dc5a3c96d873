"""One finite outlier in a row of int8: its neighbours stand still, unless clipped.

The experiment is that of `benchmarks/outlier.py`, cut short, with its law and seed.
"""

import functools
import importlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest

BENCHMARKS = Path(__file__).resolve().parent.parent / "benchmarks"
STEPS = 1_000  # after the spike


@pytest.fixture(scope="module")
def outlier() -> Iterator[Any]:
    """The script, which runs Optax's own code."""
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(BENCHMARKS))
        with jax.numpy_dtype_promotion("standard"):
            yield importlib.import_module("outlier")


@pytest.fixture(scope="module")
def after(outlier: Any) -> Any:
    """Returns the mean |u| of the spike's neighbours: at it, and at each step after."""

    @functools.cache
    def mean(setting: str, spike: float) -> Any:
        return np.asarray(outlier.sizes(optimizer(setting), STEPS, spike)[0])

    optimizer = functools.cache(outlier.optimizer_of)
    return mean


def test_float32_does_not_notice(after: Any) -> None:
    np.testing.assert_array_equal(after("float32", 1e6), after("float32", 1e2))
    assert np.all(np.abs(after("float32", 1e6) - 0.5) < 0.05)


def test_int8_neighbours_stand_still(after: Any) -> None:
    assert np.all(after("int8", 1e6)[10:] < 0.05)
    assert np.all(after("int8", 1e10)[10:] < 1e-4)


def test_a_spike_of_100_does_nothing(after: Any) -> None:
    np.testing.assert_allclose(after("int8", 1e2), after("float32", 1e2), atol=0.02)


def test_clipping_cures_it(after: Any) -> None:
    # The spike's own step counts as one of gradient 0, which m forgets in 20 steps.
    clipped, full = after("int8, clipped", 1e6), after("float32", 1e6)
    np.testing.assert_allclose(clipped[20:], full[20:], atol=0.02)
    assert np.all(clipped > 0.4)


def test_the_rule_of_thumb(outlier: Any) -> None:
    # With b2 = .99 the whole of it takes 1,000 steps.
    optimizer = outlier.optimizer_of("int8", b2=0.99, b3=0.99)
    mean = np.asarray(outlier.sizes(optimizer, 1_500, 1e6)[0])
    measured = outlier.steps_to_half(mean, np.full_like(mean, 0.5))
    assert 0.8 < measured / outlier.rule_of_thumb(1e6, 0.99) < 1
    assert outlier.rule_of_thumb(1e2, 0.99) == 0
