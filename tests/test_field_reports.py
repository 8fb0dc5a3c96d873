"""Faults that users of optimizers have reported in public, each tried on ours."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

import adam3_optax
from adam3_optax import adam3w, bfloat16_parameters
from tests.settings import BF16, F32, STORAGE, first_step, step

FLOAT8 = STORAGE["float8"]
OPTIMIZERS: dict[str, Any] = {
    "float32": adam3w(1e-2),
    "None": adam3w(1e-2, third_moment=None, weight_decay=lambda _: 0.1),
    "float8": adam3w(1e-2, third_moment="standardized", **FLOAT8),
    "int16": bfloat16_parameters(optax.sgd(0.1)),
    "int8": bfloat16_parameters(optax.sgd(0.1), "int8"),
    "no remainder": bfloat16_parameters(optax.sgd(0.1), None),
}
pytestmark = pytest.mark.usefixtures("standard_promotion")


# A parameter class that validates what it holds.


@jax.tree_util.register_dataclass
@dataclasses.dataclass
class Layer:
    w: Any

    def __post_init__(self) -> None:
        # JAX itself puts its own things into a tree: objects, tuples and shardings.
        if self.w is None or isinstance(self.w, bool | int | float | str):
            raise TypeError(type(self.w))


@pytest.mark.parametrize("name", OPTIMIZERS)
@pytest.mark.parametrize("dtype", [F32, BF16])
def test_a_class_that_validates_trains(name: str, dtype: Any) -> None:
    optimizer, params = OPTIMIZERS[name], Layer(jnp.ones((4, 32), dtype))
    assert isinstance(jax.eval_shape(optimizer.init, params), tuple)
    params, _ = step(optimizer, params, optimizer.init(params), params)
    assert (params.w < 1).all()


def test_what_is_made_of_such_a_class() -> None:
    params = {"a": Layer(jnp.ones((4, 32))), "b": Layer(jnp.ones(3))}
    form: Any = {"third_moment": "standardized"}
    optimizer = adam3w(1e-2, mask={"a": True, "b": False}, **form)
    updates, state = first_step(optimizer, params)
    known: Any = {"b1": 0.9, "b2": 0.999, "b3": 0.999, "lam": 0.01, "tau": 1.0}
    report = adam3_optax.third_moment_report(state, **known, **form)
    assert report.names == ("['a'].w", "['b'].w")
    assert adam3_optax.lost_updates_report(params, updates).names == report.names
    narrow: Any = adam3_optax.convert_state(state, **form, **FLOAT8)
    assert narrow[0].m["a"].w.dtype == jnp.float8_e4m3fn
    adam: Any = adam3_optax.to_adam_state(narrow)
    back: Any = adam3_optax.from_adam_state(adam, third_moment=None)
    assert back[0].v["b"].w.shape == (3,)
    for remainder in ("int16", "int8", None):
        wrapped = bfloat16_parameters(optax.sgd(0.1), remainder)
        for mask in (None, {"a": True, "b": False}):
            start = wrapped.init(params)
            low, kept = adam3_optax.to_bfloat16_parameters(params, start, mask)
            assert low["a"].w.dtype == BF16
            wide = adam3_optax.to_float32_parameters(low, kept)
            np.testing.assert_array_equal(wide["b"].w, params["b"].w)
    mesh = jax.make_mesh((4,), ("x",), axis_types=(AxisType.Auto,))
    everywhere = NamedSharding(mesh, P())
    where = adam3_optax.state_shardings(optimizer, params, everywhere)
    assert where[0].m["a"].w == everywhere


# A state that a loader has cast.


@pytest.mark.parametrize("field", ["m", "v", "s", "count"])
@pytest.mark.parametrize("storage", ["default", "bfloat16", "float8", "smallest"])
def test_a_cast_state_is_refused(storage: str, field: str) -> None:
    # Else codes of float8, cast to float32, would be read as moments.
    optimizer, params = adam3w(1e-2, **STORAGE[storage]), {"w": jnp.ones((4, 8))}
    state: Any = optimizer.init(params)
    old = getattr(state[0], field)
    remedy = "integer" if field == "count" else "convert_state"
    others = {jnp.dtype(x) for x in (F32, BF16, jnp.float16, jnp.float8_e5m2)}
    for dtype in others - {x.dtype for x in jax.tree.leaves(old)}:
        cast = jax.tree.map(lambda x, d=dtype: x.astype(d), old)
        wrong = (state[0]._replace(**{field: cast}), *state[1:])
        said = rf"the state's {field}.*{remedy}.*cast"
        with pytest.raises(ValueError, match=said):
            optimizer.update(params, wrong, params)


@pytest.mark.parametrize("remainder", ["int16", "int8"])
def test_a_cast_remainder_is_refused(remainder: Any) -> None:
    optimizer = bfloat16_parameters(optax.sgd(0.1), remainder)
    params = jnp.ones((4, 8), BF16)
    state = optimizer.init(params)
    cast = state._replace(remainder=state.remainder.astype(F32))
    message = "remainder float32.*restore it in its dtypes"
    with pytest.raises(ValueError, match=message):
        optimizer.update(params, cast, params)
    cast = state._replace(steps=state.steps.astype(BF16))
    with pytest.raises(ValueError, match="count must be an integer, not bfloat16"):
        optimizer.update(params, cast, params)


# An ensemble whose members are split over an explicit mesh.


@pytest.mark.parametrize("name", OPTIMIZERS)
@pytest.mark.parametrize("axis", [None, "e"])
def test_members_may_be_split_over_a_mesh(name: str, axis: Any) -> None:
    if axis and jax.__version_info__ < (0, 10):
        pytest.skip("JAX 0.8 refuses the name on an explicit mesh")
    optimizer = OPTIMIZERS[name]
    members = jnp.arange(1.0, 129.0).reshape(4, 1, 32)
    members = members.astype(BF16 if "int" in name or "no" in name else F32)
    mesh = jax.make_mesh((4,), ("e",), axis_types=(AxisType.Explicit,))
    here = NamedSharding(mesh, P("e"))
    init = jax.vmap(optimizer.init, spmd_axis_name=axis)
    update = jax.vmap(optimizer.update, spmd_axis_name=axis)
    with jax.set_mesh(mesh):
        p = jax.device_put(members, here)
        state = jax.jit(init, out_shardings=here)(p)
        updates, _ = jax.jit(update)(p, state, p)
        split = jax.shard_map(update, in_specs=P("e"), out_specs=P("e"))
        same, _ = jax.jit(split)(p, state, p)
    for found in (updates, same):
        for got, member in zip(np.asarray(found), members, strict=True):
            alone, _ = first_step(optimizer, member)
            np.testing.assert_allclose(got, alone, rtol=1e-5)


# Parameters that are called as a field of the state is.


def test_a_parameter_may_be_called_v() -> None:
    params = {"v": jnp.ones(3), "m": jnp.ones(2)}
    state = adam3w(1e-2, third_moment=None).init(params)

    def is_field(path: Any, _: Any) -> bool:
        return isinstance(path[-1], optax.tree_utils.NamedTupleKey)

    found = optax.tree.get(state, "v", filtering=is_field)
    assert set(found) == {"v", "m"}
    new: Any = optax.tree.set(state, is_field, v=jax.tree.map(jnp.ones_like, found))
    np.testing.assert_array_equal(new[0].v["v"], 1)
    np.testing.assert_array_equal(new[0].m["v"], 0)


@pytest.mark.parametrize("remainder", ["int16", "int8", None])
def test_the_count_is_found_inside_the_wrapper(remainder: Any) -> None:
    optimizer = bfloat16_parameters(adam3w(1e-2, third_moment=None), remainder)
    assert optax.tree.get(optimizer.init(jnp.ones(3, BF16)), "count") == 0


# Random bits of one's own.


@pytest.mark.parametrize(
    ("make", "dtype"),
    [
        (lambda: adam3w(1e-2, third_moment=None, m_dtype="bfloat16"), F32),
        (lambda: bfloat16_parameters(optax.sgd(1e-3), None), BF16),
    ],
)
def test_groups_of_a_partition_round_apart(make: Any, dtype: Any) -> None:
    optimizer = optax.partition({"x": make(), "y": make()}, {"a": "x", "b": "y"})
    g = jnp.full((64, 64), 1.0034, dtype)
    updates, _ = first_step(optimizer, {"a": g, "b": g})
    # Of two neighbours each, drawn independently.
    a, b = (np.ravel(updates[k] == updates[k].min()) for k in "ab")
    assert 0 < a.mean() < 1
    assert abs(np.corrcoef(a, b)[0, 1]) < 0.1
