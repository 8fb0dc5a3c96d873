"""What the tests of clients share: settings, and an optimizer that keeps a diary."""

from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from adam3_optax import adam3w, bfloat16_parameters
from tests.settings import BF16, F32, STORAGE, normal

RATE = 0.05


class Setting(NamedTuple):
    """An optimizer, the dtype of its parameters, and how near its updates come.

    The compiler may contract a product and a sum in one program and not in another,
    and an ulp turn a rounding: of a moment in float8, or of a parameter in bfloat16.
    """

    name: str
    dtype: Any
    optimizer: Callable[[], Any]
    atol: float


FLOAT32 = Setting("float32", F32, lambda: adam3w(RATE), 1e-6 * RATE)
FLOAT8 = Setting("float8", F32, lambda: adam3w(RATE, **STORAGE["float8"]), 0.1 * RATE)
BFLOAT16 = Setting("bfloat16", BF16, lambda: bfloat16_parameters(adam3w(RATE)), 2.0**-7)


IN_FLOAT32 = FLOAT32, FLOAT8
ALL = FLOAT32, FLOAT8, BFLOAT16


class DiaryState(NamedTuple):
    inner: Any
    calls: jax.Array


class Diary:
    """An optimizer that notes what it is given, and what it gives back.

    It works wherever a client calls it: in `jit`, loops and scans, on many devices.
    """

    def __init__(self, inner: Any) -> None:
        self.inner = optax.with_extra_args_support(inner)
        self.optimizer = optax.GradientTransformationExtraArgs(self.init, self.update)
        self.structure: Any = None
        self.calls: dict[int, Any] = {}

    def init(self, params: Any) -> DiaryState:
        return DiaryState(self.inner.init(params), jnp.zeros((), jnp.int32))

    def update(self, g: Any, state: DiaryState, params: Any, **extra: Any) -> Any:
        updates, inner = self.inner.update(g, state.inner, params, **extra)
        self.structure = jax.tree.structure((g, params))
        leaves = jax.tree.leaves((g, params)), jax.tree.leaves(updates)
        jax.debug.callback(self.note, state.calls, *leaves)
        return updates, DiaryState(inner, state.calls + 1)

    def note(self, call: Any, given: Any, updates: Any) -> None:
        # A copy, for donated buffers are used again.
        self.calls[int(call)] = jax.tree.map(np.array, (given, updates))

    def assert_alone(self, atol: float) -> None:
        """Asserts that the optimizer alone, given the same, gives the same back."""
        jax.effects_barrier()
        assert sorted(self.calls) == list(range(len(self.calls)))
        assert len(self.calls) >= 5
        update, state = jax.jit(self.inner.update), None
        for _, (given, updates) in sorted(self.calls.items()):
            g, params = jax.tree.unflatten(self.structure, map(jnp.asarray, given))
            state = self.inner.init(params) if state is None else state
            want, state = update(g, state, params)
            for x, y in zip(updates, jax.tree.leaves(want), strict=True):
                assert x.dtype == y.dtype
                x, y = x.astype(np.float32), np.asarray(y, np.float32)
                np.testing.assert_allclose(x, y, rtol=1e-4, atol=atol)


Train = Callable[[Any, Any], Iterable[Any]]


def trains(*settings: Setting) -> Callable[[Train], Any]:
    """Makes a test, with each setting, of a function that trains.

    It takes an optimizer and the dtype of parameters, and returns the losses.
    """

    def test_of(train: Train) -> Any:
        @pytest.mark.parametrize("setting", settings, ids=lambda x: x.name)
        def test(setting: Setting) -> None:
            check(train, setting)

        return test

    return test_of


def check(train: Train, setting: Setting) -> None:
    """Trains with a setting: the loss falls, and the updates are those expected."""
    diary = Diary(setting.optimizer())
    losses = [float(x) for x in train(diary.optimizer, setting.dtype)]
    assert np.isfinite(losses).all()
    assert losses[-1] < 0.9 * losses[0], losses
    diary.assert_alone(setting.atol)


# A problem of least squares, for clients that have none of their own.
X = normal(64, 16, seed=0)
Y = jnp.tanh(X @ normal(16, 1, seed=1))


def mean_square(found: Any) -> jax.Array:
    return jnp.mean((found.astype(F32) - Y) ** 2)


def client(name: str) -> Any:
    """Returns a module of a client, or skips the test where it cannot be imported."""
    return pytest.importorskip(name, exc_type=ImportError)
