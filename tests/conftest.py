"""What every test runs under: strict promotion, eight CPU devices, x64 on request."""

import os
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from functools import partial

import jax
import pytest

# `make test-gpu` sets this to "cuda" or "rocm". What has no place of its own then lies
# on the GPU; a mesh is still made of the CPU's eight devices, for they are the default.
GPU = os.environ.get("ADAM3_TEST_GPU")

jax.config.update("jax_platforms", f"cpu,{GPU}" if GPU else "cpu")
jax.config.update("jax_num_cpu_devices", 8)
if GPU:
    jax.config.update("jax_default_device", jax.devices(GPU)[0])
    # Not TensorFloat-32, which has 10 bits.
    jax.config.update("jax_default_matmul_precision", "highest")
# Our code must not lean on implicit promotion. Where Optax's or Flax's own code does,
# the test takes `standard_promotion`.
jax.config.update("jax_numpy_dtype_promotion", "strict")
jax.config.update("jax_numpy_rank_promotion", "raise")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Runs the examples of docstrings as users do, with JAX's standard promotion."""
    for item in items:
        if isinstance(item, pytest.DoctestItem):
            run = partial(with_standard_promotion, item.runtest)
            setattr(item, "runtest", run)  # noqa: B010  # mypy forbids to assign it


def with_standard_promotion(run: Callable[[], None]) -> None:
    with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
        run()


@pytest.fixture
def on_cpu() -> Iterator[None]:
    """For what is compared with the CPU's devices, of which every mesh is made."""
    with jax.default_device(jax.devices("cpu")[0]) if GPU else nullcontext():
        yield


@pytest.fixture
def standard_promotion() -> Iterator[None]:
    """For tests that run others' code which mixes types or ranks."""
    with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
        yield


@pytest.fixture
def x64() -> Iterator[None]:
    """For tests in double precision."""
    with jax.enable_x64(True):
        yield
