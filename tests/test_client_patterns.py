"""AdaM3 in the ways that big_vision and PureJaxRL use an optimizer.

Their programs are rebuilt here in few lines, from the sources at the commits that
docs/clients.md names.
"""

import functools
import operator
from collections.abc import Callable
from importlib import import_module
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax.training.train_state import TrainState
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

import adam3_optax
from adam3_optax import adam3w
from tests.clients import BFLOAT16, FLOAT8, FLOAT32, RATE, Setting, X, Y
from tests.settings import F32, STORAGE

pytestmark = pytest.mark.usefixtures("standard_promotion")
nn: Any = import_module("flax.linen")  # not all of it is typed as exported


class Boxed(nn.Module):  # type: ignore[misc]
    """Two layers whose parameters say by logical names how they are split."""

    @nn.compact  # type: ignore[untyped-decorator]
    def __call__(self, x: jax.Array) -> jax.Array:
        def named(*names: str | None) -> Any:
            return nn.with_logical_partitioning(nn.initializers.lecun_normal(), names)

        first = nn.Dense(32, kernel_init=named("embed", "mlp"))
        last = nn.Dense(1, kernel_init=named("mlp", None))
        return last(jnp.tanh(first(x)))


# big_vision: the optimizer is named by a string below the module optax, between masks
# made from regular expressions; shardings are found for any leaf by its shape.


def by_pattern(params: Any, chosen: Callable[[str], bool]) -> Any:
    return jax.tree_util.tree_map_with_path(
        lambda path, _: chosen(jax.tree_util.keystr(path, simple=True, separator="/")),
        params,
    )


def big_vision(name: str, params: Any, **settings: Any) -> Any:
    frozen = by_pattern(params, lambda path: path.endswith("Dense_1/bias"))
    live = jax.tree.map(operator.not_, frozen)
    kernels = by_pattern(params, lambda path: path.endswith("kernel"))
    factory = operator.attrgetter(name)(optax)
    schedule = optax.linear_schedule(1.0, 0.5, 20)
    return optax.chain(
        optax.masked(optax.clip_by_global_norm(1.0), live),
        optax.masked(factory(**settings), live),
        optax.scale(RATE),
        optax.add_decayed_weights(1e-3, kernels),
        optax.masked(optax.scale_by_schedule(schedule), live),
        optax.masked(optax.set_to_zero(), frozen),
        optax.scale(-1.0),
    )


def fully_sharded(mesh: Any, x: Any) -> NamedSharding:
    spec: list[str | None] = [None] * x.ndim
    for axis in np.argsort(x.shape)[::-1]:
        if x.shape[axis] % mesh.size == 0:
            spec[axis] = "data"
            break
    return NamedSharding(mesh, P(*spec))


def test_big_vision(monkeypatch: pytest.MonkeyPatch) -> None:
    # The line: big_vision looks for its optimizers below optax.
    monkeypatch.setattr(optax, "adam3", adam3_optax, raising=False)
    model, mesh = Boxed(), jax.make_mesh((8,), ("data",), axis_types=(AxisType.Auto,))

    def init(key: Any) -> Any:
        return nn.unbox(model.init(key, X)["params"])

    shape = jax.eval_shape(lambda key: model.init(key, X)["params"], jax.random.key(0))
    optimizer = big_vision("adam3.scale_by_adam3", nn.unbox(shape), **STORAGE["float8"])
    shapes = {
        "params": nn.unbox(shape),
        "opt": nn.unbox(jax.eval_shape(optimizer.init, shape)),
    }
    where = jax.tree.map(functools.partial(fully_sharded, mesh), shapes)
    params = jax.jit(init, out_shardings=where["params"])(jax.random.key(0))
    opt = jax.jit(optimizer.init, out_shardings=where["opt"])(params)

    @functools.partial(jax.jit, out_shardings=(where, None), donate_argnums=0)
    def step(state: Any) -> Any:
        def loss(params: Any) -> jax.Array:
            y: Any = model.apply({"params": params}, X)
            return jnp.mean((y - Y) ** 2)

        value, gradients = jax.value_and_grad(loss)(state["params"])
        updates, opt = optimizer.update(gradients, state["opt"], state["params"])
        params = optax.apply_updates(state["params"], updates)
        return {"params": params, "opt": opt}, value

    state, losses = {"params": params, "opt": opt}, []
    for _ in range(15):
        state, value = step(state)
        losses.append(float(value))
    assert losses[-1] < 0.7 * losses[0]
    np.testing.assert_array_equal(state["params"]["Dense_1"]["bias"], jnp.zeros(1))
    # What big_vision asks the state for: the one count of a schedule.
    assert optax.tree.get(state["opt"], "ScaleByScheduleState").count == 15
    kernel = optax.tree.get(state["opt"], "ScaleByAdam3State").m["Dense_0"]["kernel"]
    assert kernel.sharding.shard_shape((16, 32)) == (16, 4)


# PureJaxRL: training is one program of nested scans, and seeds are a vmap around it.
# The others are slow; `make test-clients` runs them.
SLOW = [pytest.param(x, marks=pytest.mark.slow) for x in (FLOAT32, BFLOAT16)]


@pytest.mark.parametrize("setting", [FLOAT8, *SLOW], ids=lambda x: x.name)
def test_purejaxrl(setting: Setting) -> None:
    # float32 with a rate that falls over the 80 steps.
    rate = optax.linear_schedule(RATE, 0.0, 80)
    inner = adam3w(rate) if setting is FLOAT32 else setting.optimizer()

    def train(key: Any) -> Any:
        policy = nn.Dense(4, param_dtype=setting.dtype)
        key, start = jax.random.split(key)
        optimizer = optax.chain(optax.clip_by_global_norm(0.5), inner)
        params = policy.init(start, X[:1])
        state = TrainState.create(apply_fn=policy.apply, params=params, tx=optimizer)

        def loss(params: Any, x: Any, action: Any, reward: Any) -> jax.Array:
            logits: Any = policy.apply(params, x)
            logits = jax.nn.log_softmax(logits.astype(F32))
            chosen = jnp.take_along_axis(logits, action[:, None], 1)[:, 0]
            return -jnp.mean(chosen * (reward - reward.mean()))

        def minibatch(state: Any, batch: Any) -> Any:
            gradients = jax.grad(loss)(state.params, *batch)
            return state.apply_gradients(grads=gradients), None

        def update(carry: Any, _: Any) -> Any:
            state, key = carry
            key, seen, acted = jax.random.split(key, 3)
            x = jax.random.normal(seen, (64, 16))
            logits: Any = policy.apply(state.params, x)
            action = jax.random.categorical(acted, logits)
            reward = (action == jnp.argmax(x[:, :4], 1)).astype(F32)
            batch = x.reshape(4, 16, 16), action.reshape(4, 16), reward.reshape(4, 16)
            state, _ = jax.lax.scan(minibatch, state, batch)
            return (state, key), reward.mean()

        (state, _), rewards = jax.lax.scan(update, (state, key), length=20)
        return state.params, rewards

    keys = jax.random.split(jax.random.key(0), 3)
    params, rewards = jax.jit(jax.vmap(train))(keys)
    assert bool(jnp.all(rewards[:, -5:].mean(1) > rewards[:, :5].mean(1) + 0.1))
    assert all(x.dtype == setting.dtype for x in jax.tree.leaves(params))
