"""An update that is not jitted compiles nothing after its first step."""

from typing import Any
from unittest import mock

import jax
import optax
import pytest

from adam3_optax import adam3w
from tests.settings import EACH_STORAGE, PARAMS


@EACH_STORAGE
@pytest.mark.parametrize("make", [adam3w, optax.inject_hyperparams(adam3w)])
@pytest.mark.usefixtures("standard_promotion")
def test_only_the_first_step_compiles(make: Any, storage: Any) -> None:
    work = mock.Mock()  # hears of what JAX traces and compiles
    jax.monitoring.register_event_duration_secs_listener(work)
    for steps in (2, 4):  # of two optimizers with the same settings
        work.reset_mock()
        optimizer = make(1e-3, **storage)
        state = optimizer.init(PARAMS)
        for _ in range(steps):
            _, state = optimizer.update(PARAMS, state, PARAMS)
    work.assert_not_called()
    jax.jit(lambda x: x + 1)(1.0)
    work.assert_called()
