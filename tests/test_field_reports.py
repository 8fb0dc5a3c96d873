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
from tests.settings import BF16, STORAGE, step

REMAINDERS = pytest.mark.parametrize("remainder", ["int16", "int8", None])
FLOAT8 = STORAGE["float8"]


# A parameter class that validates what it holds.


@jax.tree_util.register_dataclass
@dataclasses.dataclass
class Layer:
    w: Any

    def __post_init__(self) -> None:
        # JAX itself puts its own things into a tree: objects, tuples and shardings.
        if self.w is None or isinstance(self.w, bool | int | float | str):
            raise TypeError(type(self.w))


OPTIMIZERS: dict[str, Any] = {
    "float32": adam3w(1e-2, third_moment="cubic"),
    "None": adam3w(1e-2, third_moment=None),
    "float8": adam3w(1e-2, third_moment="standardized", **FLOAT8),
    "scheduled decay": adam3w(1e-2, third_moment=None, weight_decay=lambda _: 0.1),
    "int16": bfloat16_parameters(optax.adamw(1e-2)),
    "int8": bfloat16_parameters(optax.adamw(1e-2), "int8"),
    "no remainder": bfloat16_parameters(optax.adamw(1e-2), None),
}


@pytest.mark.parametrize("name", OPTIMIZERS)
@pytest.mark.parametrize("dtype", [jnp.float32, BF16])
def test_a_class_that_validates_trains(
    name: str, dtype: Any, standard_promotion: None
) -> None:
    optimizer, params = OPTIMIZERS[name], Layer(jnp.ones((4, 32), dtype))
    state = optimizer.init(params)
    assert isinstance(jax.eval_shape(optimizer.init, params), tuple)
    for _ in range(2):
        params, state = step(optimizer, params, state, params)
    plain, _ = optimizer.update(
        jnp.ones((4, 32), dtype), optimizer.init(jnp.ones((4, 32), dtype)), params.w
    )
    assert plain.shape == params.w.shape
    assert (params.w < 1).all()


def test_what_is_made_of_such_a_class(standard_promotion: None) -> None:
    params = {"a": Layer(jnp.ones((4, 32))), "b": Layer(jnp.ones(3))}
    optimizer = adam3w(1e-2, third_moment="standardized", mask={"a": True, "b": False})
    updates, state = optimizer.update(params, optimizer.init(params), params)
    report = adam3_optax.third_moment_report(
        state,
        b1=0.9,
        b2=0.999,
        b3=0.999,
        lam=0.01,
        tau=1.0,
        third_moment="standardized",
    )
    assert report.names == ("['a'].w", "['b'].w")
    assert adam3_optax.lost_updates_report(params, updates).names == report.names
    narrow: Any = adam3_optax.convert_state(
        state, third_moment="standardized", **FLOAT8
    )
    assert narrow[0].m["a"].w.dtype == jnp.float8_e4m3fn
    adam: Any = adam3_optax.to_adam_state(narrow)
    back: Any = adam3_optax.from_adam_state(adam, third_moment=None)
    assert back[0].v["b"].w.shape == (3,)
    for remainder in ("int16", "int8", None):
        wrapped = bfloat16_parameters(optax.sgd(0.1), remainder)
        for mask in (None, {"a": True, "b": False}):
            low, kept = adam3_optax.to_bfloat16_parameters(
                params, wrapped.init(params), mask
            )
            assert low["a"].w.dtype == BF16
            wide = adam3_optax.to_float32_parameters(low, kept)
            np.testing.assert_array_equal(wide["b"].w, params["b"].w)
    mesh = jax.make_mesh((4,), ("x",), axis_types=(AxisType.Auto,))
    everywhere = NamedSharding(mesh, P())
    where = adam3_optax.state_shardings(optimizer, params, everywhere)
    assert where[0].m["a"].w == everywhere


# A state that a loader has cast.


@pytest.mark.parametrize("storage", ["default", "bfloat16", "float8", "smallest"])
@pytest.mark.parametrize("dtype", [BF16, jnp.float16, jnp.float8_e5m2])
@pytest.mark.parametrize("field", ["m", "v", "s", "count"])
def test_a_cast_state_is_refused(storage: str, dtype: Any, field: str) -> None:
    optimizer = adam3w(1e-2, third_moment="cubic", **STORAGE[storage])
    params = {"w": jnp.ones((4, 8))}
    state: Any = optimizer.init(params)
    old = getattr(state[0], field)
    cast = jax.tree.map(lambda x: x.astype(dtype), old)
    if jax.tree.leaves(old)[0].dtype == dtype:  # nothing was cast
        optimizer.update(params, state, params)
        return
    state = (state[0]._replace(**{field: cast}), *state[1:])
    remedy = "integer" if field == "count" else "convert_state"
    with pytest.raises(ValueError, match=rf"the state's {field}.*{remedy}") as caught:
        optimizer.update(params, state, params)
    assert "cast" in str(caught.value)


def test_a_float8_state_cast_to_float32_is_refused() -> None:
    # Its codes would be read as moments.
    optimizer = adam3w(1e-2, third_moment="cubic", **FLOAT8)
    params = jnp.ones((4, 8))
    state: Any = optimizer.init(params)
    cast: Any = optax.tree.cast(state, jnp.float32)
    for count, said in (
        (cast[0].count, "count must be an integer"),
        (state[0].count, "m is not"),
    ):
        kept = (cast[0]._replace(count=count), *cast[1:])
        with pytest.raises(ValueError, match=rf"the state's {said}.*optax\.tree\.cast"):
            optimizer.update(params, kept, params)


@pytest.mark.parametrize("remainder", ["int16", "int8"])
def test_a_cast_remainder_is_refused(remainder: Any) -> None:
    optimizer = bfloat16_parameters(optax.sgd(0.1), remainder)
    params = jnp.ones((4, 8), BF16)
    state = optimizer.init(params)
    cast = state._replace(remainder=state.remainder.astype(jnp.float32))
    with pytest.raises(
        ValueError, match=r"remainder float32.*restore it in its dtypes"
    ):
        optimizer.update(params, cast, params)
    cast = state._replace(steps=state.steps.astype(BF16))
    with pytest.raises(ValueError, match=r"count must be an integer, not bfloat16"):
        optimizer.update(params, cast, params)


# An ensemble whose members are split over an explicit mesh.

MEMBERS: dict[str, Any] = {
    **{
        k: adam3w(1e-2, third_moment="cubic", **STORAGE[k])
        for k in ("default", "float8")
    },
    "None": adam3w(1e-2, third_moment=None),
    **{
        f"remainder {x}": bfloat16_parameters(optax.sgd(0.1), x)
        for x in ("int16", "int8", None)
    },
}


@pytest.mark.parametrize("name", MEMBERS)
# JAX 0.8 refuses the name on an explicit mesh.
@pytest.mark.parametrize(
    "spmd_axis_name", [None, "e"][: 1 + (jax.__version_info__ >= (0, 10))]
)
def test_members_may_be_split_over_a_mesh(
    name: str, spmd_axis_name: Any, standard_promotion: None
) -> None:
    optimizer = MEMBERS[name]
    dtype = BF16 if "remainder" in name else jnp.float32
    mesh = jax.make_mesh((4,), ("e",), axis_types=(AxisType.Explicit,))
    here = NamedSharding(mesh, P("e"))
    members = jnp.arange(1.0, 129.0).reshape(4, 1, 32).astype(dtype)
    init = jax.vmap(optimizer.init, spmd_axis_name=spmd_axis_name)
    update = jax.vmap(optimizer.update, spmd_axis_name=spmd_axis_name)
    with jax.set_mesh(mesh):
        p = jax.device_put(members, here)
        state = jax.jit(init, out_shardings=here)(p)
        updates, state = jax.jit(update)(p, state, p)
    for i in range(4):
        alone, _ = optimizer.update(members[i], optimizer.init(members[i]), members[i])
        np.testing.assert_allclose(np.asarray(updates)[i], alone, rtol=1e-5)


def test_members_may_be_split_by_shard_map(standard_promotion: None) -> None:
    optimizer = MEMBERS["float8"]
    mesh = jax.make_mesh((4,), ("e",), axis_types=(AxisType.Explicit,))
    members = jnp.arange(1.0, 129.0).reshape(4, 1, 32)

    def train(p: Any) -> Any:
        state = jax.vmap(optimizer.init)(p)
        return jax.vmap(optimizer.update)(p, state, p)[0]

    with jax.set_mesh(mesh):
        split = jax.shard_map(train, in_specs=P("e"), out_specs=P("e"))
        updates = jax.jit(split)(jax.device_put(members, NamedSharding(mesh, P("e"))))
    np.testing.assert_allclose(np.asarray(updates), train(members), rtol=1e-5)


# Parameters that are called as a field of the state is.


def test_a_parameter_may_be_called_v(standard_promotion: None) -> None:
    params = {"v": jnp.ones(3), "m": jnp.ones(2)}
    state = adam3w(1e-2, third_moment=None).init(params)

    def is_field(path: Any, _: Any) -> bool:
        return isinstance(path[-1], optax.tree_utils.NamedTupleKey)

    with pytest.raises(KeyError):  # of Optax: two things are called v
        optax.tree.get(state, "v")
    found = optax.tree.get(state, "v", filtering=is_field)
    assert set(found) == {"v", "m"}
    new: Any = optax.tree.set(state, is_field, v=jax.tree.map(jnp.ones_like, found))
    np.testing.assert_array_equal(new[0].v["v"], 1)
    np.testing.assert_array_equal(new[0].m["v"], 0)


@REMAINDERS
def test_the_count_is_found_inside_the_wrapper(remainder: Any) -> None:
    optimizer = bfloat16_parameters(adam3w(1e-2, third_moment=None), remainder)
    state = optimizer.init(jnp.ones(3, BF16))
    assert optax.tree.get(state, "count") == 0


# Random bits of one's own.


def test_groups_of_a_partition_round_apart() -> None:
    def group() -> Any:
        return adam3w(1e-2, third_moment=None, m_dtype="bfloat16")

    optimizer = optax.partition({"x": group(), "y": group()}, {"a": "x", "b": "y"})
    g = jnp.full((64, 64), 1.0034)
    params = {"a": g, "b": g}
    _, state = optimizer.update(params, optimizer.init(params), params)
    moments = [x for x in jax.tree.leaves(state) if x.ndim and x.dtype == BF16]
    a, b = (np.asarray(x, np.float32) for x in moments)
    assert 0.4 < np.mean(a != b) < 0.6  # two neighbours, drawn independently


def test_groups_of_wrapped_parameters_round_apart(standard_promotion: None) -> None:
    def group() -> Any:
        return bfloat16_parameters(optax.sgd(1e-3), None)

    optimizer = optax.partition({"x": group(), "y": group()}, {"a": "x", "b": "y"})
    params = {"a": jnp.ones((64, 64), BF16), "b": jnp.ones((64, 64), BF16)}
    updates, _ = optimizer.update(
        jax.tree.map(jnp.ones_like, params), optimizer.init(params), params
    )
    a, b = updates["a"] != 0, updates["b"] != 0
    assert a.any()
    assert b.any()
    assert abs(np.corrcoef(np.ravel(a), np.ravel(b))[0, 1]) < 0.1
