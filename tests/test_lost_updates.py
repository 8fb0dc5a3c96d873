"""`lost_updates_report`: its counts, by arithmetic of NumPy, and its words."""

from typing import Any

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import optax
import pytest
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

from adam3_optax import (
    adam3w,
    bfloat16_parameters,
    lost_updates_report,
    to_float32_parameters,
)
from tests.settings import mesh_of

pytestmark = pytest.mark.usefixtures("standard_promotion")
rng: np.random.Generator
DTYPES: dict[str, Any] = {
    "bfloat16": ml_dtypes.bfloat16,
    "float32": np.float32,
}


@pytest.fixture(autouse=True)
def seeded() -> None:
    """The data of a test do not depend on the tests before it."""
    global rng
    rng = np.random.default_rng(0)


def expected(param: Any, u: Any) -> tuple[float, int]:
    new = (param.astype(np.float64) + u.astype(np.float64)).astype(param.dtype)
    old, u = param.astype(np.float64), u.astype(np.float64)
    counted = u != 0
    # Of what is not lost, at least half arrives.
    arrives = np.abs(new.astype(np.float64) - old) >= np.abs(u) / 2
    assert np.array_equal(arrives[counted], (new != param)[counted])
    return (new == param)[counted].mean(), int(counted.sum())


@pytest.mark.parametrize("u_dtype", ["bfloat16", "float32"])
@pytest.mark.parametrize("dtype", DTYPES)
def test_shares_are_those_of_the_sums(dtype: str, u_dtype: str) -> None:
    param = rng.normal(size=(64, 128)).astype(DTYPES[dtype])
    unit = 2.0 ** -(jnp.finfo(dtype).nmant + 1)
    u = (param.astype(np.float64) * unit * rng.uniform(0, 3, param.shape)) * (
        rng.uniform(size=param.shape) < 0.8
    )
    u = u.astype(DTYPES[u_dtype])
    for report in (lost_updates_report, jax.jit(lost_updates_report)):
        found = report({"w": jnp.asarray(param)}, {"w": jnp.asarray(u)})
        x = found.leaves["['w']"]
        lost, count = expected(param, u)
        assert 0.1 < lost < 0.9
        got = float(x.lost), int(x.elements)
        assert got == pytest.approx((lost, count), rel=1e-6)


def test_what_optax_adds_is_what_counts() -> None:
    params = jnp.asarray(rng.normal(size=4096), jnp.bfloat16)
    u = jnp.asarray(rng.normal(size=4096) * 3e-3, jnp.float32)
    stays = optax.apply_updates(params, u) == params
    assert float(lost_updates_report(params, u).overall.lost) == pytest.approx(
        float(stays.mean()), rel=1e-6
    )


def test_overall_is_over_all_elements_and_none_is_left_out() -> None:
    params = {"a": jnp.ones(30, jnp.bfloat16), "b": jnp.ones(10), "c": None}
    updates = {"a": jnp.full(30, 1e-3), "b": jnp.full(10, 1e-3), "c": None}
    found = lost_updates_report(params, updates)
    assert float(found.overall.lost) == 0.75
    assert int(found.overall.elements) == 40
    assert list(found.leaves) == ["['a']", "['b']"]
    assert list(lost_updates_report(params, {**updates, "a": None}).leaves) == ["['b']"]


def test_words_and_numbers() -> None:
    params = jnp.ones(100, jnp.bfloat16)

    def of(*updates: float) -> Any:
        return lost_updates_report(params, jnp.resize(jnp.array(updates), (100,)))

    assert of(0.0).verdict() == "All updates are 0: there is nothing to say."
    assert of(1e-3).verdict() == (
        "100% of the updates are lost when they are added to the parameters; "
        "adam3_optax.bfloat16_parameters keeps what is rounded off."
    )
    assert of(1.01 * 2**-7).verdict() == (
        "The updates arrive: fewer than 1% of them are lost."
    )
    some = of(1e-3, 1.0)
    assert some.scalars() == {
        "updates/lost": 0.5,
        "updates/elements": 100.0,
    }
    assert some.table().splitlines() == [
        "leaf    updates   lost",
        "params      100  50.0%",
        "all         100  50.0%",
    ]


def test_shards_send_one_count_each() -> None:
    mesh = mesh_of(AxisType.Auto)
    where = NamedSharding(mesh, P("data", "model"))
    params = jnp.asarray(rng.normal(size=(64, 128)), jnp.bfloat16)
    u = jnp.full((64, 128), 1e-3)
    want = lost_updates_report(params, u)
    with jax.set_mesh(mesh):
        placed = jax.device_put((params, u), where)
        compiled = jax.jit(lost_updates_report).lower(*placed).compile()
        assert "[64,128]" not in str(compiled.as_text())
        got = compiled(*placed)
    assert got.scalars() == want.scalars()


def test_it_says_what_the_wrapper_saves() -> None:
    params = jnp.asarray(rng.normal(size=(64, 64)), jnp.bfloat16)
    optimizer = bfloat16_parameters(adam3w(1e-4))
    state = optimizer.init(params)
    before = to_float32_parameters(params, state)
    u, after = optimizer.update(params, state, params)
    new = optax.apply_updates(params, u)
    difference = to_float32_parameters(new, after) - before
    assert float(lost_updates_report(params, difference).overall.lost) > 0.8
    assert float(lost_updates_report(params, u).overall.lost) == 0


def test_bad_input_is_named() -> None:
    with pytest.raises(ValueError, match=r"updates\['w'\] has shape \(3,\)"):
        lost_updates_report({"w": jnp.ones(2)}, {"w": jnp.ones(3)})
    half = {"w": jnp.ones(2, jnp.float16)}
    with pytest.raises(ValueError, match=r"params\['w'\] must be bfloat16, float32 or"):
        lost_updates_report(half, half)
    big = jax.ShapeDtypeStruct((2**16, 2**16), jnp.bfloat16)
    with pytest.raises(ValueError, match="elements or more"):
        jax.eval_shape(lost_updates_report, {"w": big}, {"w": big})


def test_parameters_that_are_infinite_do_not_count() -> None:
    params = jnp.array([jnp.inf, -jnp.inf, jnp.nan, 1.0], jnp.bfloat16)
    found = lost_updates_report(params, jnp.full(4, 1.0)).overall
    assert (float(found.elements), float(found.lost)) == (1.0, 0.0)


@pytest.mark.parametrize("strict", [False, True])
def test_it_runs_under_the_flags_for_debugging(strict: bool) -> None:
    params = {"w": jnp.ones(8, jnp.bfloat16), "zero": jnp.ones(8), "scalar": 1.0}
    updates = {"w": jnp.full(8, 1e-3), "zero": jnp.zeros(8), "scalar": 1e-9}
    with (
        jax.debug_nans(True),
        jax.numpy_dtype_promotion("strict" if strict else "standard"),
    ):
        found = lost_updates_report(params, updates)
        assert found.verdict().startswith("100% of the updates are lost")
        assert np.isnan(found.on_host().leaves["['zero']"].lost)
        assert "nan" in found.table()


@pytest.mark.usefixtures("on_cpu")
def test_it_is_exported_with_sizes_that_are_not_known_yet() -> None:
    [n] = jax.export.symbolic_shape("n")
    shape = jax.ShapeDtypeStruct((n, 3), jnp.bfloat16)

    def lost(params: Any, updates: Any) -> jax.Array:
        return lost_updates_report(params, updates).overall.lost

    exported = jax.export.export(jax.jit(lost))(shape, shape)
    params = jnp.ones((4, 3), jnp.bfloat16)
    assert float(exported.call(params, params * 1e-3)) == 1.0


def test_updates_of_another_structure_are_named() -> None:
    with pytest.raises(ValueError, match="updates must be a tree like params"):
        lost_updates_report({"w": jnp.ones(3), "b": jnp.ones(3)}, {"w": jnp.ones(3)})
