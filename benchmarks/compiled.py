"""What a training step will move on a TPU and on an H100, by their own compilers.

The compilers run without a device. Counted is what their program moves, and sends on
meshes; the temporary memory is their own number. On GPUs instructions are counted, too,
on one matrix in float32. Nothing is timed but compiling, in CPU seconds.

    python benchmarks/compiled.py --devices v5e --trees one --only float8
"""

import argparse
import contextlib
import functools
import itertools
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

sys.path.insert(0, str(Path(__file__).parent))
import common
import compiled_devices
import compiled_text

import adam3_optax

MESH = "v5e"  # the device whose slice of 4 x 4 is asked
BOTH = ("x", "y")
SPLITS = {"rows": PartitionSpec(BOTH), "columns": PartitionSpec(None, BOTH)}
SPLITS |= {"both": PartitionSpec(*BOTH)}
AXES = {"Auto": AxisType.Auto, "Explicit": AxisType.Explicit}
TREES = ("one", "gpt2")
STATES = ("float32", "bfloat16", "float8")  # inside `bfloat16_parameters`
trees = common.trees


def optimizers(device: str = compiled_devices.H100) -> common.Makers:
    """Returns functions that make the optimizers, by name."""
    make = functools.partial
    mu = {"mu_dtype": jnp.bfloat16}
    return {
        common.BASELINE: make(optax.adam, common.RATE),
        "optax.contrib.ademamix": make(optax.contrib.ademamix, common.RATE),
        "optax.adamw, mu bfloat16": make(optax.adamw, common.RATE, **mu),
        "bfloat16_state(optax.adamw)": lambda: adam3_optax.bfloat16_state(
            optax.adamw(common.RATE)
        ),
        **common.ours(adam3_optax.adam3),
        **common.peers(fused=device in compiled_devices.GPUS),
    }


def wrapped() -> common.Makers:
    """Returns functions that make ours, wrapped in `bfloat16_parameters`."""
    every, made = optimizers(), {}
    for form, state in itertools.product((None, "cubic"), STATES):
        inner = f"adam3 {form}, {state}"
        for x in ("int16", "int8", None):
            make = functools.partial(adam3_optax.bfloat16_parameters, remainder=x)
            made[f"{x} remainder over {inner}"] = lambda f=make, y=every[inner]: f(y())
    return made


def compiled(optimizer: Any, params: Any, shardings: Any, options: Any = None) -> Any:
    """Returns a compiled step that overwrites parameters and state.

    Also the bytes that it must move: gradient, parameter and state read, the latter two
    written. `options` are the compiler's.
    """
    step = jax.jit(common.step_of(optimizer), donate_argnums=(0, 1))

    def placed(x: Any, where: Any) -> Any:
        return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=where)

    state = jax.eval_shape(optimizer.init, params)
    floor = 3 * common.nbytes(params) + 2 * common.nbytes(state)
    if shardings.spec:
        where = adam3_optax.state_shardings(optimizer, params, shardings)
    else:
        where = jax.tree.map(lambda _: shardings, state)
    params = jax.tree.map(lambda x: placed(x, shardings), params)
    state = jax.tree.map(placed, state, where)
    # Not before: `state_shardings` runs `init`, and there is no device to run it on.
    with jax.sharding.use_abstract_mesh(shardings.mesh.abstract_mesh):
        lowered = step.lower(params, state, params)
    return lowered.compile(options), floor


def measured(optimizer: Any, params: Any, shardings: Any) -> dict[str, Any]:
    """Returns what the compiler says of a step: on each device, bytes a parameter."""
    start = time.process_time()
    program, floor = compiled(optimizer, params, shardings)
    seconds = time.process_time() - start
    memory: Any = program.memory_analysis()
    held = memory.argument_size_in_bytes + memory.output_size_in_bytes
    held += memory.temp_size_in_bytes - memory.alias_size_in_bytes
    count = common.elements(params)
    here = count / shardings.mesh.size
    found = {
        "floor": floor / count,
        "temporary": memory.temp_size_in_bytes / here,
        "peak": held / here,
        "compile_cpu_seconds": seconds,
    }
    try:
        hbm, kernels, collectives = compiled_text.moved(program.as_text())
    except ValueError as error:
        return found | {"error": str(error)}
    return found | {"hbm": hbm / here, "kernels": kernels, "collectives": collectives}


def cells(device: str, options: argparse.Namespace) -> Iterator[Any]:
    """Yields all that is asked of a device: its name, and what measures it."""
    everywhere = NamedSharding(mesh_of(device, "2x2", 1), PartitionSpec())
    chosen = common.chosen(options, optimizers(device))
    kept = (common.BASELINE, "adam3 None", "adam3 cubic")  # for all trees and meshes
    few = {x: y for x, y in chosen.items() if x.startswith(kept)}
    for dtype, name, arms in (
        ("float32", "one", chosen),
        ("float32", "gpt2", few),
        ("bfloat16", "one", common.chosen(options, wrapped())),
        ("bfloat16", "gpt2", few),
    ):
        params = trees(dtype)[name]()
        for arm, make in arms.items() if name in options.trees else ():
            cell = {"device": device, "dtype": dtype, "tree": name, "arm": arm}
            yield cell, functools.partial(measured, make(), params, everywhere)
    if device != MESH or "one" not in options.trees:
        return
    params = trees("float32")["one"]()
    for axes, split in itertools.product(AXES, SPLITS):
        where = NamedSharding(mesh_of(MESH, "4x4", 16, AXES[axes]), SPLITS[split])
        for arm, make in few.items():
            cell = {"device": MESH, "dtype": "float32", "tree": "one", "arm": arm}
            cell |= {"axes": axes, "split": split}
            yield cell, functools.partial(measured, make(), params, where)


def counts(options: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """Yields a row of the record for all that is asked."""
    import instructions

    for device in options.devices:
        can_count = device in instructions.CHIPS and instructions.can_count()
        for cell, measure in cells(device, options):
            try:
                result = measure()
                is_one = (cell["dtype"], cell["tree"]) == ("float32", "one")
                if can_count and is_one and "error" not in result:
                    optimizer = optimizers(device)[cell["arm"]]()
                    with contextlib.suppress(ValueError):  # a kernel has loops
                        result["instructions"] = instructions.counted(optimizer, device)
            except Exception as error:  # a compiler may refuse; others go on
                result = {"error": (str(error) or repr(error)).splitlines()[0]}
            yield {"measure": "compiled", **cell, **result}


def mesh_of(device: str, shape: str, count: int, axes: Any = AxisType.Auto) -> Mesh:
    """Returns a mesh of the first devices of a slice."""
    devices = compiled_devices.devices(device, shape)[:count]
    side = int(count**0.5)
    return jax.make_mesh((side, side), BOTH, (axes, axes), devices=devices)


def main(argv: list[str] | None = None) -> None:
    """Asks the compilers, and writes a record."""
    parser = common.Parser("compiled.py", __doc__, "compiled")
    add = parser.add_argument
    add("--devices", nargs="+", help="some of v4, v5e, v5p, v6e, h100 and a100")
    add("--trees", nargs="+", choices=TREES, default=TREES)
    options = parser.parse_args(argv)
    jax.config.update("jax_enable_compilation_cache", False)  # compiling is timed
    present = compiled_devices.present()
    jax.config.update("jax_platforms", "cpu")  # of this machine; it is not asked
    if not present:
        print("Nothing is counted: neither libtpu nor jax-cuda13-plugin is installed.")
        return
    parser.check_only(options.only, [*optimizers(), *wrapped()])
    options.devices = options.devices or [x for x in (MESH, "h100") if x in present]
    if unknown := set(options.devices) - set(present):
        parser.error(f"no compiler for {', '.join(unknown)}; for {', '.join(present)}")
    parser.record(options.out, counts(options))


if __name__ == "__main__":
    main()
