"""What the compilers of TPUs and GPUs say. `make test-compiled` installs them."""

import sys
from functools import cache, partial
from importlib import import_module
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import optax
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from adam3_optax import adam3w, bfloat16_state, state_shardings
from tests.settings import FORMS, UNBOUNDED

sys.path.insert(0, str(Path(__file__).parent.parent / "benchmarks"))
compiled: Any = import_module("compiled")
compiled_text: Any = import_module("compiled_text")
compiled_devices: Any = import_module("compiled_devices")
instructions: Any = import_module("instructions")

PRESENT = compiled_devices.present()
if not PRESENT:
    pytest.skip("no compiler is here: make test-compiled", allow_module_level=True)
NEEDS_TPU = pytest.mark.skipif(
    compiled.MESH not in PRESENT, reason="no compiler of TPUs: make test-compiled"
)
pytestmark = pytest.mark.usefixtures("standard_promotion")
EACH_DEVICE = pytest.mark.parametrize("device", PRESENT)
ONE = compiled.trees("float32")["one"]()


@cache
def on_one(device: str) -> NamedSharding:
    return NamedSharding(compiled.mesh_of(device, "2x2", 1), P())


def counted(device: str, arm: str) -> dict[str, Any]:
    optimizer = compiled.optimizers(device)[arm]()
    return compiled.measured(optimizer, ONE, on_one(device))


@EACH_DEVICE
@pytest.mark.parametrize(
    ("arm", "floor"),
    [
        ("optax.adam", 28),
        ("adam3 cubic, float32", 36),
        ("adam3 cubic, bfloat16 m, s", 28),
        *((f"adam3 {x}, bfloat16", 24) for x in FORMS),
        *((f"adam3 {x}, float8", 20) for x in FORMS),
        *((f"adam3 {x}, float8 all", 18) for x in UNBOUNDED),
        ("adam3 None, float32", 28),
        ("adam3 None, bfloat16", 20),
        ("adam3 None, float8", 18),
        ("adam3 None, float8 all", 16),
    ],
)
def test_bytes_are_at_their_floor(device: str, arm: str, floor: float) -> None:
    found = counted(device, arm)
    assert found["hbm"] == pytest.approx(floor, abs=0.01)
    assert found["floor"] == pytest.approx(floor, abs=0.01)
    assert found["temporary"] < 0.01
    # One reads and writes the leaf. Where bits are drawn, another numbers its rows.
    assert found["kernels"] == (1 if "float32" in arm or "optax" in arm else 2)


@EACH_DEVICE
@pytest.mark.parametrize(("inner", "floor"), [(optax.adam, 20), (optax.lion, 16)])
def test_averages_of_any_optimizer(device: str, inner: Any, floor: float) -> None:
    found = compiled.measured(bfloat16_state(inner(1e-3)), ONE, on_one(device))
    assert found["hbm"] == pytest.approx(floor, abs=0.01)
    assert found["floor"] == pytest.approx(floor, abs=0.01)
    assert found["temporary"] < 0.01


@pytest.mark.skipif(not instructions.can_count(), reason="needs nvidia-cuda-nvdisasm")
@pytest.mark.parametrize(
    ("arm", "most"),
    [
        ("adam3 None, bfloat16", 68),
        ("adam3 cubic, bfloat16", 93),
        ("adam3 standardized, bfloat16", 108),
        ("adam3 None, float8", 90),
        ("adam3 cubic, float8", 130),
        ("adam3 standardized, float8", 145),
    ],
)
def test_instructions_a_parameter_on_an_h100(arm: str, most: float) -> None:
    optimizer = compiled.optimizers()[arm]()
    assert 0.8 * most < instructions.counted(optimizer, compiled_devices.H100) <= most


@pytest.mark.parametrize("device", [x for x in ("v5e", "h100") if x in PRESENT])
@pytest.mark.parametrize("arm", compiled.wrapped())
def test_bfloat16_parameters_are_written_in_the_same_pass(
    device: str, arm: str
) -> None:
    params = compiled.trees("bfloat16")["one"]()
    found = compiled.measured(compiled.wrapped()[arm](), params, on_one(device))
    more, temporary = 0, 0
    # A TPU writes three moments in float32 and these in one kernel, but the parameter
    # in another.
    if device == "v5e" and "int" in arm[:4] and arm.endswith("cubic, float32"):
        more, temporary = 10, 4
    assert found["hbm"] == pytest.approx(found["floor"] + more, abs=0.1)
    assert found["temporary"] == pytest.approx(temporary, abs=0.01)


@NEEDS_TPU
@pytest.mark.parametrize("axes", compiled.AXES)
@pytest.mark.parametrize("split", compiled.SPLITS)
@pytest.mark.parametrize(
    ("storage", "size"),
    [("float32", 36), ("bfloat16", 24), ("float8", 20), ("float8 all", 18)],
)
def test_nothing_travels(storage: str, size: int, split: str, axes: str) -> None:
    mesh = compiled.mesh_of(compiled.MESH, "4x4", 16, compiled.AXES[axes])
    where = NamedSharding(mesh, compiled.SPLITS[split])
    optimizer = compiled.optimizers()[f"adam3 cubic, {storage}"]()
    found = compiled.measured(optimizer, ONE, where)
    assert found["hbm"] == pytest.approx(size, abs=0.01)
    assert found["temporary"] < 0.1
    assert found["collectives"] == {}


@NEEDS_TPU
@pytest.mark.parametrize(
    ("setting", "size", "temporary"),
    [("float32", 12, 12.9), ("bfloat16", 6, 6.5), ("float8", 4, 4.5)],
)
def test_state_may_live_on_the_host(setting: str, size: int, temporary: float) -> None:
    device = on_one(compiled.MESH)
    optimizer = adam3w(1e-3, **compiled.common.SETTINGS[setting])
    params = [jax.ShapeDtypeStruct((4096, 1024), jnp.float32, sharding=device)] * 16
    on_device = state_shardings(optimizer, params, device)
    on_host = state_shardings(optimizer, params, device, memory_kind="pinned_host")
    state = jax.tree.map(
        lambda x, where: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=where),
        jax.eval_shape(optimizer.init, params),
        on_host,
    )
    update = compiled.common.step_of(optimizer)

    @partial(jax.jit, donate_argnums=(0, 1), out_shardings=(device, on_host))
    def step(params: Any, state: Any, gradients: Any) -> Any:
        return update(params, jax.device_put(state, on_device), gradients)

    program: Any = step.lower(params, state, params).compile()
    memory, count = program.memory_analysis(), 16 * 4096 * 1024
    for kind in ("argument", "output", "alias"):
        found = getattr(memory, f"host_{kind}_size_in_bytes") / count
        assert found == pytest.approx(size, rel=0.01)
    assert memory.temp_size_in_bytes / count == pytest.approx(temporary, abs=0.1)
    # Memory space 5 is the host's. All of the state goes in, and comes out.
    travelled = 0
    for x in compiled_text.computations(program.as_text())["ENTRY"]:
        if x.operation.endswith("-start") and "S(5)" in x.type:
            arrays = [y for y in compiled_text.ARRAY.findall(x.type) if y[1]]
            sizes = [compiled_text.nbytes(*y, everywhere=True) for y in arrays]
            travelled += min(sizes)
    assert travelled / count == pytest.approx(2 * size, rel=0.01)
    # Without moving it in, JAX refuses to mix the two memories.
    with pytest.raises(ValueError, match="memory_space of all inputs"):
        jax.jit(update).lower(params, state, params)
