"""An update that is not jitted compiles nothing after its first step."""

from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
import optax
import pytest

from adam3_optax import adam3w
from tests.settings import EACH_STORAGE, FORMS, GRADIENTS, PARAMS

EVENTS = {
    "traces": "/jax/core/compile/jaxpr_trace_duration",
    "compilations": "/jax/core/compile/backend_compile_duration",
}


@pytest.fixture
def work() -> Iterator[dict[str, int]]:
    """Counts traces and compilations."""
    counts = dict.fromkeys(EVENTS, 0)

    def listen(event: str, duration_secs: float, **kwargs: Any) -> None:
        for name, wanted in EVENTS.items():
            counts[name] += event == wanted

    jax.monitoring.register_event_duration_secs_listener(listen)
    yield counts
    jax.monitoring.unregister_event_duration_listener(listen)


def train(optimizer: Any, steps: int) -> None:
    state = optimizer.init(PARAMS)
    for g in GRADIENTS[:steps]:
        updates, state = optimizer.update(g, state, PARAMS)
    jax.block_until_ready(updates)


def plain(storage: Any, form: Any) -> Any:
    return adam3w(1e-3, b3=0.9, third_moment=form, **storage)


def injected(storage: Any, form: Any) -> Any:
    made = optax.inject_hyperparams(adam3w)
    return made(1e-3, b3=0.9, third_moment=form, **storage)


def scheduled(storage: Any, form: Any) -> Any:
    made = optax.inject_hyperparams(adam3w)
    rate = optax.linear_schedule(1e-3, 0.0, 10)
    return made(rate, b3=0.9, lam=rate, third_moment=form, **storage)


@EACH_STORAGE
@pytest.mark.parametrize("make", [plain, injected, scheduled])
def test_nothing_is_compiled_after_the_first_step(
    make: Any, storage: Any, work: dict[str, int], standard_promotion: None
) -> None:
    form = None if storage.get("third_moment", "") is None else FORMS[-1]
    storage = {k: v for k, v in storage.items() if k != "third_moment"}
    train(make(storage, form), 2)
    before = dict(work)
    train(make(storage, form), 4)  # a second optimizer of the same settings
    assert work == before


def test_what_is_compiled_is_seen(work: dict[str, int]) -> None:
    train(plain({}, FORMS[0]), 1)
    before = dict(work)
    jax.jit(lambda x: jnp.sin(x) + 1)(jnp.ones(3))
    assert work["traces"] > before["traces"]
    assert work["compilations"] > before["compilations"]
