"""Checkpoints keep every bit of a narrow state, its dtypes and its shardings."""

from pathlib import Path
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

from adam3_optax import adam3w, state_shardings
from tests.settings import each_storage


def template_of(storage: Any, devices: int) -> Any:
    """Returns what parameters and state are, and how they lie on some devices."""
    optimizer = adam3w(third_moment="cubic", **storage)
    mesh = jax.make_mesh(
        (devices,), ("x",), axis_types=(AxisType.Auto,), devices=jax.devices()[:devices]
    )
    shapes = {"w": (16, 32), "odd": (3, 5)}
    params = {k: jax.ShapeDtypeStruct(shape, "float32") for k, shape in shapes.items()}
    where = {"w": NamedSharding(mesh, P("x")), "odd": NamedSharding(mesh, P())}
    return jax.tree.map(
        lambda x, sharding: x.update(sharding=sharding),
        (params, jax.eval_shape(optimizer.init, params)),
        (where, state_shardings(optimizer, params, where)),
    )


def filled(template: Any) -> Any:
    """Returns arrays for a template, of random numbers."""
    normal = np.random.default_rng(0).normal
    return jax.tree.map(
        lambda x: jax.device_put(
            (50 * normal(size=x.shape)).astype(x.dtype), x.sharding
        ),
        template,
    )


def bits(tree: Any) -> list[Any]:
    return [(x.dtype, np.asarray(x).tobytes()) for x in jax.tree.leaves(tree)]


@each_storage("default", "bfloat16", "smallest")
def test_orbax_restores_onto_fewer_devices(storage: Any, tmp_path: Path) -> None:
    tree, fewer = filled(template_of(storage, 8)), template_of(storage, 2)
    with ocp.CheckpointManager(tmp_path) as manager:
        manager.save(5, args=ocp.args.StandardSave(tree))
    # What a killed run leaves is no checkpoint, and nobody needs to write to restore.
    (tmp_path / "6.orbax-checkpoint-tmp").mkdir()
    before = {x: x.stat().st_mtime_ns for x in tmp_path.rglob("*")}
    options = ocp.CheckpointManagerOptions(read_only=True)
    with ocp.CheckpointManager(tmp_path, options=options) as manager:
        assert manager.latest_step() == 5
        found = manager.restore(5, args=ocp.args.StandardRestore(fewer))
        assert not manager.save(7, args=ocp.args.StandardSave(tree))
    assert {x: x.stat().st_mtime_ns for x in tmp_path.rglob("*")} == before
    assert bits(found) == bits(tree)
    for x, wanted in zip(jax.tree.leaves(found), jax.tree.leaves(fewer), strict=True):
        assert x.sharding == wanted.sharding
