"""AdaM3 in the ways that MaxText, big_vision and PureJaxRL use an optimizer.

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
from flax.linen.spmd import logical_to_mesh_sharding
from flax.training.train_state import TrainState
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

import adam3_optax
from adam3_optax import adam3w, state_shardings
from tests.clients import BFLOAT16, FLOAT8, FLOAT32, RATE, Setting, X, Y
from tests.settings import F32, STORAGE, moments

pytestmark = pytest.mark.usefixtures("standard_promotion")
nn: Any = import_module("flax.linen")  # not all of it is typed as exported
# The others are slow; `make test-clients` runs them.
FLOAT8_QUICKLY = pytest.mark.parametrize(
    "setting",
    [
        FLOAT8,
        pytest.param(FLOAT32, marks=pytest.mark.slow),
        pytest.param(BFLOAT16, marks=pytest.mark.slow),
    ],
    ids=lambda x: x.name,
)
RULES = (("embed", "fsdp"), ("mlp", "tensor"))


class Boxed(nn.Module):  # type: ignore[misc]
    """Two layers whose parameters say by logical names how they are split."""

    dtype: Any = F32

    @nn.compact  # type: ignore[untyped-decorator]
    def __call__(self, x: jax.Array) -> jax.Array:
        def named(*names: str | None) -> Any:
            return nn.with_logical_partitioning(nn.initializers.lecun_normal(), names)

        first = nn.Dense(32, param_dtype=self.dtype, kernel_init=named("embed", "mlp"))
        last = nn.Dense(1, param_dtype=self.dtype, kernel_init=named("mlp", None))
        return last(jnp.tanh(first(x)))


def mesh_of(*names: str) -> jax.sharding.Mesh:
    shape = (2,) * len(names) if len(names) == 3 else (8,)
    return jax.make_mesh(shape, names, axis_types=(AxisType.Auto,) * len(names))


def unboxed(tree: Any) -> Any:
    def is_box(x: Any) -> bool:
        return isinstance(x, nn.LogicallyPartitioned)

    return jax.tree.map(lambda x: x.value if is_box(x) else x, tree, is_leaf=is_box)


# MaxText: a TrainState that is never whole on one device, sharded by its boxes.


def split_over_data(shape: Any, where: NamedSharding) -> NamedSharding:
    """Returns a sharding that also splits the first axis which "data" divides."""
    spec = [*where.spec, *[None] * (len(shape.shape) - len(where.spec))]
    for axis, size in enumerate(where.shard_shape(shape.shape)):
        if size % where.mesh.shape["data"] == 0 and spec[axis] != "tensor":
            taken = () if spec[axis] is None else (spec[axis],)
            spec[axis] = ("data", *taken)
            break
    return NamedSharding(where.mesh, P(*spec))


@pytest.mark.parametrize("zero_1", [False, True])
@FLOAT8_QUICKLY
def test_maxtext_state(setting: Setting, zero_1: bool) -> None:
    model, mesh = Boxed(setting.dtype), mesh_of("data", "fsdp", "tensor")
    mask = functools.partial(
        jax.tree_util.tree_map_with_path, lambda path, _: "bias" not in str(path[-1])
    )
    bias_free = adam3w(RATE, weight_decay=0.1, mask=mask)
    optimizer = bias_free if setting.name == "float32" else setting.optimizer()

    def init(key: Any) -> TrainState:
        params = model.init(key, X)
        return TrainState.create(apply_fn=model.apply, params=params, tx=optimizer)

    with jax.set_mesh(mesh), nn.logical_axis_rules(RULES):
        shapes = jax.eval_shape(init, jax.random.key(0))
        specs = nn.get_partition_spec(shapes)
        where = logical_to_mesh_sharding(specs, mesh, RULES)
        if zero_1:
            split = jax.tree.map(
                split_over_data, unboxed(shapes).opt_state, where.opt_state
            )
            where = where.replace(opt_state=split)
        state = unboxed(jax.jit(init, out_shardings=where)(jax.random.key(0)))
        data = NamedSharding(mesh, P("data"))
        replicated = NamedSharding(mesh, P())

        @functools.partial(
            jax.jit,
            in_shardings=(where, data, data),
            out_shardings=(where, replicated),
            donate_argnums=0,
        )
        def step(state: Any, x: Any, y: Any) -> Any:
            def loss(params: Any) -> jax.Array:
                return jnp.mean((state.apply_fn(params, x).astype(F32) - y) ** 2)

            value, gradients = jax.value_and_grad(loss)(state.params)
            return state.apply_gradients(grads=gradients), value

        losses = []
        for _ in range(12):
            state, value = step(state, X, Y)
            losses.append(float(value))
    assert losses[-1] < 0.7 * losses[0]
    m = optax.tree.get(state.opt_state, "ScaleByAdam3State").m
    first = jax.tree.leaves(m, is_leaf=lambda x: hasattr(x, "sharding"))
    large = [x for x in first if x.shape == (16, 32)]
    assert large
    assert all(x.sharding.shard_shape(x.shape)[1] == 16 for x in large)
    if zero_1:
        assert all(x.sharding.shard_shape(x.shape)[0] == 4 for x in large)


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


@pytest.mark.parametrize("narrow", [False, True])
def test_big_vision(narrow: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    # The line: big_vision looks for its optimizers below optax.
    monkeypatch.setattr(optax, "adam3", adam3_optax, raising=False)
    settings = STORAGE["float8"] if narrow else {}
    model, mesh = Boxed(), mesh_of("data")

    def init(key: Any) -> Any:
        return nn.unbox(model.init(key, X)["params"])

    shape = jax.eval_shape(lambda key: model.init(key, X)["params"], jax.random.key(0))
    optimizer = big_vision("adam3.scale_by_adam3", nn.unbox(shape), **settings)
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
    counts = [
        x.count
        for x in jax.tree.leaves(
            state["opt"], is_leaf=lambda x: isinstance(x, optax.ScaleByScheduleState)
        )
        if isinstance(x, optax.ScaleByScheduleState)
    ]
    assert [int(x) for x in counts] == [15]
    kernel = jax.tree.leaves(moments(state["opt"])[0])
    assert any(x.sharding.shard_shape(x.shape) == (16, 4) for x in kernel)


# PureJaxRL: training is one program of nested scans, and seeds are a vmap around it.


@FLOAT8_QUICKLY
def test_purejaxrl(setting: Setting) -> None:
    inner = setting.optimizer() if setting.name != "float32" else None

    def rate(count: Any) -> Any:
        return RATE * (1.0 - count / 80)

    def train(key: Any) -> Any:
        policy = nn.Dense(4, param_dtype=setting.dtype)
        key, start = jax.random.split(key)
        optimizer = optax.chain(
            optax.clip_by_global_norm(0.5), inner or adam3w(rate, eps=1e-5)
        )
        state = TrainState.create(
            apply_fn=policy.apply, params=policy.init(start, X[:1]), tx=optimizer
        )

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
            split = jax.tree.map(
                lambda a: a.reshape(4, 16, *a.shape[1:]), (x, action, reward)
            )
            state, _ = jax.lax.scan(minibatch, state, split)
            return (state, key), reward.mean()

        (state, _), rewards = jax.lax.scan(update, (state, key), length=20)
        return state.params, rewards

    keys = jax.random.split(jax.random.key(0), 3)
    params, rewards = jax.jit(jax.vmap(train))(keys)
    assert bool(jnp.all(rewards[:, -5:].mean(1) > rewards[:, :5].mean(1) + 0.1))
    assert all(x.dtype == setting.dtype for x in jax.tree.leaves(params))
    alone = jax.jit(train)(keys[1])[1]
    np.testing.assert_allclose(rewards[1, :3], alone[:3], atol=0.1)


def test_adam3_and_its_shardings_fit_a_boxed_state() -> None:
    # What `nn.get_partition_spec` reads from the boxes is what `state_shardings` says.
    mesh, optimizer = mesh_of("data", "fsdp", "tensor"), adam3w(RATE)
    shapes = jax.eval_shape(Boxed().init, jax.random.key(0), X)
    specs = nn.get_partition_spec(jax.eval_shape(optimizer.init, shapes))
    where = logical_to_mesh_sharding(specs, mesh, RULES)
    params = logical_to_mesh_sharding(nn.get_partition_spec(shapes), mesh, RULES)
    assert state_shardings(optimizer, unboxed(shapes), params)[0].m == where[0].m
