"""State where parameters carry sharding metadata: Linen, NNX and the like."""

import functools
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from flax.training import train_state
from jax.sharding import AxisType

import adam3_optax
from adam3_optax import adam3w, convert_state, state_shardings, to_adam_state
from tests.settings import BF16, STORAGE, assert_close, assert_same, structure, types
from tests.test_sharding import collectives

FLOAT8 = adam3w(0.1, weight_decay=0.5, **STORAGE["float8"])
BOTH, ROWS, COLUMNS = ("x", "y"), ("x", None), (None, "x")
AUTO, EXPLICIT = AxisType.Auto, AxisType.Explicit


def mesh_of(devices: int, kind: AxisType) -> jax.sharding.Mesh:
    y = 2 if devices == 8 else 1
    return jax.make_mesh((devices // y, y), ("x", "y"), axis_types=(kind, kind))


def drawn(_: Any, shape: Any, dtype: Any = jnp.float32, **__: Any) -> jax.Array:
    """Initializes by NumPy's numbers; those of `jax.random` would be compiled."""
    return jnp.asarray(np.random.default_rng(0).normal(size=shape), dtype)


def boxed(names: Any = BOTH) -> dict[str, Any]:
    """Returns Linen parameters in boxes: a kernel, and a bias along its last axis."""
    return {
        "kernel": nn.Partitioned(drawn(0, (16, 32)), names=names),
        "bias": nn.Partitioned(drawn(1, (32,)), names=names[1:]),
    }


class Model(nnx.Module):
    def __init__(self, names: Any) -> None:
        split = functools.partial(nnx.with_partitioning, drawn)
        inits: Any = {"kernel_init": split(names), "bias_init": split(names[1:])}
        self.linear = nnx.Linear(16, 32, rngs=nnx.Rngs(0), **inits)


# A `TrainState`, sharded by its boxes as in Flax's own examples: shapes, then shardings
# by the boxes, then a compiled init.


def nnx_boxed(names: Any) -> Any:
    return nnx.state(Model(names), nnx.Param)


def narrow_boxed(names: Any) -> Any:
    return jax.tree.map(lambda x: x.astype(BF16), boxed(names))


@pytest.mark.parametrize(
    ("make", "devices", "kind", "names"),
    [
        (boxed, 8, AUTO, BOTH),
        (boxed, 8, EXPLICIT, BOTH),
        (boxed, 1, EXPLICIT, ROWS),
        (nnx_boxed, 8, AUTO, BOTH),
        (narrow_boxed, 8, AUTO, COLUMNS),
    ],
)
def test_a_train_state_as_flax_examples_make_it(
    make: Any, devices: int, kind: AxisType, names: Any, standard_promotion: None
) -> None:
    optimizer = FLOAT8
    if make is narrow_boxed:
        optimizer = adam3_optax.bfloat16_parameters(FLOAT8)

    def init() -> Any:
        params = make(names)
        return train_state.TrainState.create(apply_fn=init, params=params, tx=optimizer)

    def step(state: Any) -> Any:
        return state.apply_gradients(grads=jax.tree.map(jnp.sin, state.params))

    with jax.set_mesh(mesh_of(1, AUTO)):
        want = jax.jit(step)(jax.jit(step)(jax.jit(init)()))
    mesh = mesh_of(devices, kind)
    with jax.set_mesh(mesh):
        shapes = jax.eval_shape(init)
        sharding_of = nnx.get_named_sharding if make is nnx_boxed else nn.get_sharding
        where: Any = sharding_of(shapes, mesh)
        # The boxes say what `state_shardings` says.
        ours = state_shardings(optimizer, shapes.params, where.params)
        assert jax.tree.leaves(m_of(ours)) == jax.tree.leaves(m_of(where.opt_state))
        state = jax.jit(init, out_shardings=where)()
        jitted = jax.jit(step, out_shardings=where, donate_argnums=0)
        assert not collectives(jitted.lower(state).compile().as_text() or "")
        state = jitted(jitted(state))
    assert_close(numbers(state), numbers(want))


def numbers(state: Any) -> list[Any]:
    """Returns parameters and moments; of a bfloat16 and its remainder, their sum."""
    params, opt_state = state.params, state.opt_state
    if isinstance(opt_state, adam3_optax.BFloat16ParametersState):
        params = adam3_optax.to_float32_parameters(params, opt_state)
        opt_state = opt_state.inner_state
    return jax.tree.leaves(jax.device_get((params, opt_state)))


def m_of(state: Any) -> Any:
    return optax.tree.get(state, "ScaleByAdam3State").m


# Any step, boxed or not.


def test_boxes_change_no_number() -> None:
    params = boxed()
    plain = nn.meta.unbox(params)
    state, expected = FLOAT8.init(params), FLOAT8.init(plain)
    for _ in range(3):
        got, state = FLOAT8.update(params, state, params)
        want, expected = FLOAT8.update(plain, expected, plain)
    assert structure(got) == structure(params)
    assert types(state) == types(FLOAT8.init(params))
    assert_same(nn.meta.unbox((got, state)), (want, expected))
    # Boxed and plain trees may meet: NNX keeps boxes and passes plain trees.
    want, _ = FLOAT8.update(plain, expected, plain)
    for of_params in (params, plain):
        mixed, after = FLOAT8.update(plain, state, of_params)
        assert_same(mixed, want)
        assert types(after) == types(state)


def matrices(params: Any) -> Any:
    """A mask of leaves: where it is False, `optax.masked` leaves an empty box."""
    return jax.tree.map(lambda x: x.ndim > 1, params)


@pytest.mark.parametrize("name", ["default", "float8", "adam"])
def test_empty_boxes_pass_through(name: str) -> None:
    params = boxed() | {"none": nn.Partitioned(None, names=(None,))}
    settings: Any = {"third_moment": "cubic"} | STORAGE[name]
    optimizer = optax.masked(adam3w(0.1, **settings), matrices)
    state = optimizer.init(params)
    for _ in range(2):
        updates, state = optimizer.update(params, state, params)
    assert_same(updates["bias"], params["bias"])
    assert types(state) == types(optimizer.init(params))
    # So do shardings, conversions and reports.
    boxes = nn.get_sharding(params, mesh_of(4, AUTO))
    where = state_shardings(optimizer, params, boxes)
    jax.jit(optimizer.init, out_shardings=where)(params)
    wide = convert_state(state, third_moment=settings["third_moment"])
    back = adam3_optax.from_adam_state(to_adam_state(state), **settings)
    for other in (convert_state(wide, **settings), back):
        assert types(other) == types(state)
    if name != "adam":
        known: Any = {"b1": 0.9, "b2": 0.999, "b3": 0.999, "lam": 0.01, "tau": 1.0}
        report = adam3_optax.third_moment_report(state, **known, third_moment="cubic")
        assert list(report.leaves) == ["['kernel']"]


def test_a_box_may_hold_a_gradient_of_none() -> None:
    params = boxed() | {"integer": nn.Partitioned(jnp.arange(3), names=(None,))}
    gradients = params | {"integer": params["integer"].replace(value=None)}
    optimizer = adam3w(0.1, mask=matrices, **STORAGE["float8"])
    updates, state = optimizer.update(gradients, optimizer.init(params), params)
    assert updates["integer"].value is None
    assert types(state) == types(optimizer.init(params))


# NNX.


def nnx_step(model: Model, optimizer: Any) -> None:
    params = nnx.state(model, nnx.Param)
    optimizer.update(model, jax.tree.map(jnp.sin, params))


def nnx_pair(names: Any, transformation: Any = FLOAT8) -> tuple[Model, Any]:
    model = Model(names)
    return model, nnx.Optimizer(model, transformation, wrt=nnx.Param)


def nnx_after_two_steps(make: Any, first: Any, second: Any) -> Any:
    model, optimizer = made = make()
    first(*made)
    second(*made)
    m = optimizer.opt_state[0].m["linear"]["kernel"]
    assert m[...].sharding.spec == model.linear.kernel[...].sharding.spec
    return jax.device_get(nnx.state(model))


# Without `jit` each operation is a program of its own.
@pytest.mark.parametrize(
    ("how", "devices", "kind"),
    [
        ("jit", 8, AUTO),
        ("jit", 8, EXPLICIT),
        ("jit", 1, EXPLICIT),
        ("eager", 8, AUTO),
        ("eager", 1, EXPLICIT),
        pytest.param("eager", 8, EXPLICIT, marks=pytest.mark.slow),
    ],
)
def test_nnx_under_a_mesh(how: str, devices: int, kind: AxisType) -> None:
    names = BOTH if devices == 8 else ROWS
    make: Any = functools.partial(nnx_pair, names)
    make_jitted, jitted = nnx.jit(make), nnx.jit(nnx_step)
    with jax.set_mesh(mesh_of(1, AUTO)):
        want = nnx_after_two_steps(make, jitted, jitted)
    with jax.set_mesh(mesh_of(devices, kind)):
        if how == "jit":
            got = nnx_after_two_steps(make_jitted, jitted, jitted)
        else:
            got = nnx_after_two_steps(make, nnx_step, jitted)
    assert_close(got, want)


def test_nnx_with_float8_on_the_matrices_alone() -> None:
    parts = {True: FLOAT8, False: optax.sgd(0.1)}
    with jax.set_mesh(mesh_of(4, AUTO)):
        model, optimizer = nnx_pair(COLUMNS, optax.partition(parts, matrices))
        nnx_step(model, optimizer)
        merged = nnx.merge(*nnx.split(optimizer))
        nnx.jit(nnx_step)(model, merged)
    assert optax.tree.get(merged.opt_state, "ScaleByAdam3State").count == 2
