"""State where parameters carry sharding metadata: Linen, NNX and the like."""

import functools
import pickle
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import orbax.checkpoint as ocp
import pytest
from flax import nnx, serialization
from flax.training import train_state
from jax.sharding import AxisType

from adam3_optax import (
    adam3w,
    convert_state,
    from_adam_state,
    scale_by_adam3,
    state_shardings,
    third_moment_report,
    to_adam_state,
)
from tests.settings import STORAGE, assert_close, assert_same, structure, types
from tests.test_sharding import collectives

FLOAT8 = STORAGE["float8"]
NAMES = {"rows": ("x", None), "columns": (None, "x"), "both": ("x", "y")}
EACH_NAMES = pytest.mark.parametrize("names", NAMES.values(), ids=NAMES)
KINDS = AxisType.Auto, AxisType.Explicit
EACH_KIND = pytest.mark.parametrize("kind", KINDS)
MESHES = [
    *((8, kind, names) for kind in KINDS for names in NAMES.values()),
    (1, AxisType.Explicit, NAMES["rows"]),
]
EACH_MESH = pytest.mark.parametrize(("devices", "kind", "names"), MESHES)
# Without `jit` each operation is a program of its own, so one case takes seconds.
QUICK = [(8, AxisType.Auto, NAMES["both"]), (1, AxisType.Explicit, NAMES["rows"])]
EACH_EAGER_MESH = pytest.mark.parametrize(
    ("devices", "kind", "names"),
    [
        pytest.param(*mesh, marks=[] if mesh in QUICK else pytest.mark.slow)
        for mesh in MESHES
    ],
)


def mesh_of(devices: int, kind: AxisType) -> jax.sharding.Mesh:
    y = 2 if devices == 8 else 1
    return jax.make_mesh((devices // y, y), ("x", "y"), axis_types=(kind, kind))


def boxed(names: Any) -> dict[str, Any]:
    """Returns Linen parameters in boxes: a kernel, and a bias along its last axis."""
    rng = np.random.default_rng(0)
    return {
        "kernel": nn.Partitioned(jnp.float32(rng.normal(size=(16, 32))), names=names),
        "bias": nn.Partitioned(jnp.float32(rng.normal(size=32)), names=names[1:]),
    }


# Linen.


@functools.cache
def linen_on_one_device() -> Any:
    """Returns parameters and state after two steps, without boxes."""
    params, optimizer = nn.meta.unbox(boxed(NAMES["rows"])), adam3w(0.1, **FLOAT8)
    update = jax.jit(optimizer.update)
    state = optimizer.init(params)
    for _ in range(2):
        updates, state = update(jax.tree.map(jnp.sin, params), state, params)
        params = optax.apply_updates(params, updates)
    return jax.device_get((params, state))


@EACH_MESH
def test_linen_as_its_examples_do(devices: int, kind: AxisType, names: Any) -> None:
    # As in Flax's lm1b: shapes, then shardings by the boxes, then a compiled init.
    mesh = mesh_of(devices, kind)
    optimizer = adam3w(0.1, **FLOAT8)

    def init() -> Any:
        return train_state.TrainState.create(
            apply_fn=lambda: None, params=boxed(names), tx=optimizer
        )

    def step(state: Any) -> Any:
        return state.apply_gradients(grads=jax.tree.map(jnp.sin, state.params))

    with jax.set_mesh(mesh):
        shardings = nn.get_sharding(jax.eval_shape(init), mesh)
        state = jax.jit(init, out_shardings=shardings)()
        jitted = jax.jit(step, out_shardings=shardings, donate_argnums=0)
        state = jitted(jitted(state))
    found = nn.meta.unbox((state.params, state.opt_state))
    assert_close(jax.device_get(found), linen_on_one_device())
    m = state.opt_state[0].m["kernel"].value
    assert m.sharding.shard_shape(m.shape) == tuple(
        size // (mesh.shape[name] if name else 1)
        for size, name in zip((16, 32), names, strict=True)
    )


@EACH_NAMES
def test_linen_state_is_split_further_for_zero1(names: Any) -> None:
    # As MaxText does it: a data axis joins the first axis that it divides.
    mesh = jax.make_mesh((2, 2, 2), ("data", "x", "y"), axis_types=(AxisType.Auto,) * 3)
    params, optimizer = boxed(names), adam3w(0.1, **FLOAT8)
    state = jax.eval_shape(optimizer.init, params)

    def split(x: Any, sharding: Any) -> Any:
        sizes, spec = sharding.shard_shape(x.shape), sharding.spec
        for i, (size, name) in enumerate(zip(sizes, spec, strict=False)):
            if size % 2 == 0:
                joined = ("data",) if name is None else ("data", name)
                spec = type(spec)(*spec[:i], joined, *spec[i + 1 :])
                return sharding.update(spec=spec)
        return sharding

    shapes = nn.meta.unbox(state)
    where = jax.tree.map(split, shapes, nn.get_sharding(state, mesh))
    made = jax.jit(lambda: nn.meta.unbox(optimizer.init(params)), out_shardings=where)()
    plain = nn.meta.unbox(params)
    updates, _ = jax.jit(optimizer.update, out_shardings=(None, where))(
        plain, made, plain
    )
    expected, _ = jax.jit(optimizer.update)(plain, optimizer.init(plain), plain)
    assert_close(jax.device_get(updates), jax.device_get(expected))


@EACH_KIND
@EACH_NAMES
def test_devices_tell_each_other_nothing(kind: AxisType, names: Any) -> None:
    mesh, params, optimizer = mesh_of(8, kind), boxed(names), adam3w(0.1, **FLOAT8)
    where: Any = nn.get_sharding(params, mesh)
    where_state = nn.get_sharding(jax.eval_shape(optimizer.init, params), mesh)
    # The boxes say what `state_shardings` says.
    ours = state_shardings(optimizer, params, where)
    assert jax.tree.leaves(where_state[0].moments) == jax.tree.leaves(ours[0].moments)
    placed: Any = jax.device_put(params, where)
    state = jax.jit(optimizer.init, out_shardings=where_state)(placed)
    update = jax.jit(optimizer.update, out_shardings=(where, where_state))
    text = update.lower(placed, state, placed).compile().as_text() or ""
    assert not collectives(text)


def test_boxes_change_no_number() -> None:
    params = boxed(NAMES["both"])
    plain = nn.meta.unbox(params)
    optimizer = adam3w(0.1, **FLOAT8)
    states = optimizer.init(params), optimizer.init(plain)
    for _ in range(3):
        got, boxed_state = optimizer.update(params, states[0], params)
        want, plain_state = optimizer.update(plain, states[1], plain)
        states = boxed_state, plain_state
    assert structure(got) == structure(params)
    assert_same(nn.meta.unbox(got), want)
    assert_same(nn.meta.unbox(states[0]), states[1])
    assert types(states[0]) == types(optimizer.init(params))
    # Boxed and plain trees may meet: NNX keeps boxes and passes plain trees.
    mixed, state = optimizer.update(plain, states[0], plain)
    assert_same(mixed, optimizer.update(plain, states[1], plain)[0])
    assert types(state) == types(states[0])


def test_optax_finds_the_parameters_in_the_state() -> None:
    params, optimizer = boxed(NAMES["both"]), adam3w(0.1, **FLOAT8)
    state = optimizer.init(params)
    for rest in ((), (params,)):
        mapped = optax.tree.map_params(
            optimizer, lambda x, *_: jnp.ones_like(x), state, *rest
        )
        assert structure(mapped) == structure(state)
        assert mapped[0].count == 0
        assert all(bool(jnp.all(x == 1)) for x in jax.tree.leaves(mapped[0].moments))


def test_checkpoints_and_conversions_keep_boxes(tmp_path: Any) -> None:
    params, optimizer = boxed(NAMES["both"]), adam3w(0.1, **FLOAT8)
    _, state = optimizer.update(params, optimizer.init(params), params)
    new = optimizer.init(params)
    restored = [
        pickle.loads(pickle.dumps(state)),
        serialization.from_bytes(new, serialization.to_bytes(state)),
        serialization.from_state_dict(new, serialization.to_state_dict(state)),
    ]
    with ocp.StandardCheckpointer() as checkpointer:
        checkpointer.save(tmp_path / "state", state)
        checkpointer.wait_until_finished()
        shapes = jax.tree.map(ocp.utils.to_shape_dtype_struct, state)
        restored.append(checkpointer.restore(tmp_path / "state", shapes))
    for x in restored:
        assert_same(x, state)
    wide = convert_state(state)
    assert structure(wide[0].s) == structure(params)
    again = convert_state(wide, **FLOAT8)
    assert structure(again) == structure(state)
    assert_close(nn.meta.unbox(convert_state(again)), nn.meta.unbox(wide), rtol=1e-5)
    back = from_adam_state(to_adam_state(state), **FLOAT8)
    assert structure(back) == structure(state)
    report = third_moment_report(
        state, b1=0.9, b2=0.999, b3=0.999, lam=0.01, tau=1.0, third_moment="cubic"
    )
    assert len(report.leaves) == 2


def test_masks_and_gradients_of_none_in_boxes() -> None:
    params = boxed((None, "x")) | {"integer": nn.Partitioned(jnp.arange(3), (None,))}
    gradients = params | {"integer": params["integer"].replace(value=None)}
    optimizer = adam3w(0.1, weight_decay=0.5, mask=lambda p: jax.tree.map(
        lambda x: x.ndim > 1, p), **FLOAT8)  # fmt: skip
    updates, state = optimizer.update(gradients, optimizer.init(params), params)
    assert updates["integer"].value is None
    assert structure(state) == structure(optimizer.init(params))
    frozen = optax.masked(scale_by_adam3(**FLOAT8), {
        "kernel": True, "bias": False, "integer": False,
    })  # fmt: skip
    updates, _ = frozen.update(params, frozen.init(params))
    assert_same(updates["bias"], params["bias"])


def matrices(params: Any) -> Any:
    """A mask of leaves: where it is False, `optax.masked` leaves an empty box."""
    return jax.tree.map(lambda x: x.ndim > 1, params)


@pytest.mark.parametrize("storage", [{}, FLOAT8, {"third_moment": None}])
def test_empty_boxes_pass_through(storage: Any) -> None:
    params = boxed(NAMES["both"]) | {"none": nn.Partitioned(None, names=(None,))}
    optimizer = optax.masked(adam3w(0.1, **storage), matrices)
    state = optimizer.init(params)
    for _ in range(2):
        updates, state = optimizer.update(params, state, params)
    assert structure(state) == structure(optimizer.init(params))
    assert_same(updates["bias"], params["bias"])
    form = storage.get("third_moment", "cubic")
    kept = {k: v for k, v in storage.items() if k != "third_moment"}
    wide = convert_state(state, third_moment=form)
    assert structure(convert_state(wide, third_moment=form, **kept)) == structure(state)
    adam = to_adam_state(state)
    back = from_adam_state(adam, third_moment=form, **kept)
    assert structure(back) == structure(state)
    if form is not None:
        known: Any = {"b1": 0.9, "b2": 0.999, "b3": 0.999, "lam": 0.01, "tau": 1.0}
        report = third_moment_report(state, **known, third_moment=form)
        assert len(report.leaves) == 1


def test_empty_boxes_on_a_mesh() -> None:
    mesh, params = mesh_of(4, AxisType.Auto), boxed(("x", None))
    optimizer = optax.masked(adam3w(0.1, **FLOAT8), matrices)
    where = state_shardings(optimizer, params, nn.get_sharding(params, mesh))
    state = jax.jit(optimizer.init, out_shardings=where)(params)
    assert structure(state) == structure(optimizer.init(params))


def test_plain_gradients_decay_parameters_in_boxes() -> None:
    params, optimizer = boxed((None, "x")), adam3w(0.1, weight_decay=0.5, **FLOAT8)
    plain = nn.meta.unbox(params)
    got, _ = optimizer.update(plain, optimizer.init(params), params)
    want, _ = optimizer.update(plain, optimizer.init(plain), plain)
    assert_same(got, want)


# NNX.


def drawn(_: Any, shape: Any, dtype: Any, **__: Any) -> jax.Array:
    """Initializes by NumPy's numbers; those of `jax.random` would be compiled."""
    return jnp.asarray(np.random.default_rng(0).normal(size=shape), dtype)


class Model(nnx.Module):
    def __init__(self, names: Any) -> None:
        split = functools.partial(nnx.with_partitioning, drawn)
        self.linear = nnx.Linear(
            16,
            32,
            kernel_init=split(names),
            bias_init=split(names[1:]),
            rngs=nnx.Rngs(0),
        )


def nnx_step(model: Model, optimizer: Any) -> None:
    params = nnx.state(model, nnx.Param)
    optimizer.update(model, jax.tree.map(jnp.sin, params))


def nnx_pair(names: Any) -> tuple[Model, Any]:
    model = Model(names)
    return model, nnx.Optimizer(model, adam3w(0.1, **FLOAT8), wrt=nnx.Param)


@functools.cache
def nnx_on_one_device(names: Any) -> list[Any]:
    """Returns the model before, after one and after two steps."""
    with jax.set_mesh(mesh_of(1, AxisType.Auto)):
        model, optimizer = nnx_pair(names)
        found = [jax.device_get(nnx.state(model))]
        for _ in range(2):
            nnx_step(model, optimizer)
            found.append(jax.device_get(nnx.state(model)))
    return found


def assert_nnx_steps(made: Any, names: Any, steps: list[Any]) -> None:
    """Asserts the results of one device, and an m that lies as its parameter does."""
    for step in steps:
        step(*made)
    m = made[1].opt_state[0].m["linear"]["kernel"]
    assert m[...].sharding.spec == made[0].linear.kernel[...].sharding.spec
    expected = nnx_on_one_device(names)[len(steps)]
    assert_close(jax.device_get(nnx.state(made[0])), expected)


@EACH_MESH
def test_nnx_in_nnx_jit_under_a_mesh(devices: int, kind: AxisType, names: Any) -> None:
    make: Any = nnx.jit(functools.partial(nnx_pair, names))
    with jax.set_mesh(mesh_of(devices, kind)):
        assert_nnx_steps(make(), names, [nnx.jit(nnx_step)])


@EACH_EAGER_MESH
def test_nnx_eagerly_under_a_mesh(devices: int, kind: AxisType, names: Any) -> None:
    with jax.set_mesh(mesh_of(devices, kind)):
        assert_nnx_steps(nnx_pair(names), names, [nnx_step, nnx.jit(nnx_step)])


@EACH_NAMES
@EACH_KIND
def test_nnx_state_is_sharded_by_its_boxes(kind: AxisType, names: Any) -> None:
    # As tunix does it: the boxes of the state say where it lies, and nothing else.
    with jax.set_mesh(mesh_of(8, kind)):
        model = Model(names)
        optimizer = nnx.Optimizer(model, adam3w(0.1, **FLOAT8), wrt=nnx.Param)
        state = nnx.state(optimizer, nnx.optimizer.OptState)
        specs = nnx.get_partition_spec(state)
        if kind == AxisType.Auto:
            state = jax.jit(lambda x: jax.lax.with_sharding_constraint(x, specs))(state)
        else:
            state = jax.tree.map(jax.device_put, state, specs)
        nnx.update(optimizer, state)
        nnx.jit(nnx_step)(model, optimizer)
    assert optimizer.opt_state[0].count == 1


@EACH_NAMES
def test_nnx_params_in_a_train_state(names: Any) -> None:
    # As Flax's gemma example does it: shapes, their named shardings, a compiled init.
    mesh = mesh_of(8, AxisType.Auto)

    def init() -> Any:
        params = nnx.state(Model(names), nnx.Param)
        return train_state.TrainState.create(
            apply_fn=lambda: None, params=params, tx=adam3w(0.1, **FLOAT8)
        )

    def step(state: Any) -> Any:
        return state.apply_gradients(grads=jax.tree.map(jnp.sin, state.params))

    with jax.set_mesh(mesh_of(1, AxisType.Auto)):
        expected = jax.device_get(jax.jit(step)(jax.jit(init)()))
    with jax.set_mesh(mesh):
        shardings = nnx.get_named_sharding(jax.eval_shape(init), mesh)
        state = jax.jit(init, out_shardings=shardings)()
        state = jax.jit(step, out_shardings=shardings, donate_argnums=0)(state)
    got, want = (jax.tree.leaves(jax.device_get(x)) for x in (state, expected))
    for x, y in zip(got, want, strict=True):
        np.testing.assert_allclose(x, y, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("how", ["masked", "partition"])
def test_nnx_with_float8_on_the_matrices_alone(how: str) -> None:
    ours = adam3w(0.1, **FLOAT8)
    others = {True: ours, False: optax.sgd(0.1)}
    transformation = {
        "masked": optax.masked(ours, matrices),
        "partition": optax.partition(others, matrices),
    }[how]
    with jax.set_mesh(mesh_of(4, AxisType.Auto)):
        model = Model((None, "x"))
        optimizer = nnx.Optimizer(model, transformation, wrt=nnx.Param)
        nnx_step(model, optimizer)
        nnx.jit(nnx_step)(model, optimizer)


def test_nnx_states_split_and_merge() -> None:
    with jax.set_mesh(mesh_of(4, AxisType.Auto)):
        model = Model((None, "x"))
        optimizer = nnx.Optimizer(model, adam3w(0.1, **FLOAT8), wrt=nnx.Param)
        merged = nnx.merge(*nnx.split(optimizer))
        nnx_step(model, merged)
    assert merged.opt_state[0].count == 1


# Others.


def test_haliax() -> None:
    hax = pytest.importorskip("haliax", exc_type=ImportError)
    axes = hax.make_axes(Embed=16, Mlp=32)
    params = {"kernel": hax.ones(axes)}
    optimizer = adam3w(0.1, **FLOAT8)
    state = optimizer.init(params)
    for _ in range(2):
        updates, state = optimizer.update(params, state, params)
    assert updates["kernel"].axes == params["kernel"].axes
    assert state[0].m["kernel"].axes == params["kernel"].axes
    plain = {"kernel": params["kernel"].array}
    expected = optimizer.init(plain)
    for _ in range(2):
        want, expected = optimizer.update(plain, expected, plain)
    np.testing.assert_array_equal(updates["kernel"].array, want["kernel"])
    # As levanter does it: a compiled init whose shardings come from the axes' names.
    mesh = jax.make_mesh((4,), ("x",), axis_types=(AxisType.Auto,))
    with jax.set_mesh(mesh), hax.axis_mapping({"Mlp": "x"}):
        state = hax.named_jit(
            optimizer.init, axis_resources={"Mlp": "x"}, out_axis_resources={"Mlp": "x"}
        )(params)
        assert state[0].m["kernel"].array.sharding.spec == jax.P(None, "x")
