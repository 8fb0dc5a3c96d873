"""A training step lowers for TPU, CUDA, ROCm and CPU, without the hardware."""

import re
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import export
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

from adam3_optax import state_shardings
from tests.settings import FORMS, STORAGE, assert_same, each_storage, mesh_of, on
from tests.test_sharding import BATCHES, BOTH, PARAMS, make, step

PLATFORMS = "tpu", "cuda", "rocm", "cpu"
BATCH = jax.tree.map(jnp.asarray, BATCHES[0])


def assert_portable(exported: export.Exported) -> None:
    """Asserts that a program asks nothing of the host, and no other precision."""
    module = exported.mlir_module()
    assert exported.platforms == PLATFORMS
    # StableHLO's own operations alone, and notes on where arrays lie.
    called = re.findall(r"custom_call @(\w+)|call_target_name = \"(\w+)\"", module)
    assert {name or other for name, other in called} <= {"Sharding"}
    assert not re.search(r"callback|infeed|outfeed|send|recv", module)
    assert not re.search(r"\bf64\b|xf64>", module)
    assert not re.search(r"tensor<[^>]*\?", module)
    assert not exported.ordered_effects
    assert not exported.unordered_effects
    assert not exported.disabled_safety_checks
    dtypes = {str(x.dtype) for x in (*exported.in_avals, *exported.out_avals)}
    assert dtypes <= {"float32", "bfloat16", "float8_e4m3fn", "uint8", "int32"}


@pytest.mark.parametrize(
    ("form", "name"),
    [*((form, "default") for form in FORMS), (FORMS[0], "smallest"), (None, "adam")],
)
def test_training_lowers_for_every_platform(form: Any, name: str) -> None:
    optimizer = make(STORAGE[name], form)

    init, update_and_apply = jax.jit(optimizer.init), jax.jit(partial(step, optimizer))
    state = init(PARAMS)
    exported_init = export.export(init, platforms=PLATFORMS)(PARAMS)
    exported = export.export(update_and_apply, platforms=PLATFORMS)(
        PARAMS, state, BATCH
    )
    assert_portable(exported_init)
    assert_portable(exported)
    if name == "default":
        return
    # What was lowered is the program: run on the CPU, it gives the same bits. The form
    # does not matter for that.
    want = PARAMS, state
    got = PARAMS, exported_init.call(PARAMS)
    for _ in range(3):
        got, want = exported.call(*got, BATCH), update_and_apply(*want, BATCH)
    assert_same(got, want)


@each_storage("float8")
def test_sharded_training_lowers_for_every_platform(storage: Any) -> None:
    optimizer, mesh = make(storage), mesh_of(AxisType.Auto)
    where = on(mesh, BOTH)
    where_state = state_shardings(optimizer, PARAMS, where)
    jitted = jax.jit(
        partial(step, optimizer),
        in_shardings=(where, where_state, NamedSharding(mesh, P("data"))),
        out_shardings=(where, where_state),
    )
    state = jax.eval_shape(optimizer.init, PARAMS)
    exported = export.export(jitted, platforms=PLATFORMS)(PARAMS, state, BATCH)
    assert_portable(exported)
    assert exported.nr_devices == 8


@pytest.mark.parametrize(
    "function",
    [
        lambda x: jnp.linalg.cholesky(x[None, None])[0, 0],
        lambda x: x.astype(jnp.float16),
    ],
)
def test_what_is_not_portable_is_seen(function: Any) -> None:
    exported = export.export(jax.jit(function), platforms=PLATFORMS)(jnp.ones(()))
    with pytest.raises(AssertionError):
        assert_portable(exported)


def test_jax_itself_refuses_to_export_a_callback() -> None:
    def function(x: Any) -> Any:
        return jax.pure_callback(np.sin, x, x)

    with pytest.raises(NotImplementedError):
        export.export(jax.jit(function), platforms=PLATFORMS)(jnp.ones(()))


def test_float64_and_dynamic_shapes_are_seen(x64: None) -> None:
    def exported(x: Any) -> export.Exported:
        return export.export(jax.jit(jnp.tanh), platforms=PLATFORMS)(x)

    assert_portable(exported(jnp.ones(4, jnp.float32)))
    rows = export.symbolic_shape("n, 4")
    for x in (jnp.ones(4), jax.ShapeDtypeStruct(rows, jnp.float32)):
        with pytest.raises(AssertionError):
            assert_portable(exported(x))
