"""What a training step will move on a TPU and on an H100, by their own compilers.

The compilers run without a device. In the program that they make it is counted how many
bytes a step moves, and on meshes what devices send to each other; they say themselves
how much temporary memory it needs. Nothing is timed but the compilers. Results are
added to results.jsonl.

    python benchmarks/compiled.py --devices v5e --trees one --only float8

With --compile-time it takes the time of the compilers alone: the tree of GPT-2 small,
in a process for each optimizer and round.
"""

import argparse
import functools
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import jax
import optax
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec
from rich.console import Console

sys.path.insert(0, str(Path(__file__).parent))
import common
import compiled_devices
import compiled_text

import adam3_optax

MESH = "v5e"  # the device whose slice of 4 x 4 is asked
SPLITS = {
    "rows": PartitionSpec(("x", "y"), None),
    "columns": PartitionSpec(None, ("x", "y")),
    "both": PartitionSpec("x", "y"),
}
ROUNDS = 5  # of compile times
Say = Callable[[str], None]
AXES = {"Auto": AxisType.Auto, "Explicit": AxisType.Explicit}


def optimizers(device: str = compiled_devices.H100) -> dict[str, Callable[[], Any]]:
    """Returns functions that make the optimizers, by name."""
    every = common.optimizers()
    others = ("optax.adam", "optax.contrib.ademamix")
    adamw = functools.partial(optax.adamw, common.RATE, mu_dtype="bfloat16")
    made = {name: every[name] for name in others} | {"optax.adamw, mu bfloat16": adamw}
    made |= {name: make for name, make in every.items() if name.startswith("adam3")}
    try:
        import flashoptim_jax
    except ImportError:
        return made
    peer = functools.partial(
        flashoptim_jax.flash_adam, common.RATE, master_weight_bits=None
    )
    made["flashoptim, int8"] = functools.partial(peer, fused=False)
    if device in compiled_devices.GPUS:  # its kernel is written for them
        made["flashoptim, int8, own kernel"] = functools.partial(peer, fused=True)
    return made


def wrapped() -> dict[str, Callable[[], Any]]:
    """Returns functions that make ours, wrapped in `bfloat16_parameters`."""
    every = optimizers()
    states = ("float32", "bfloat16", "float8")
    inners = [f"adam3 {form}, {x}" for form in (None, "cubic") for x in states]

    def make(inner: str, remainder: Any) -> Any:
        return adam3_optax.bfloat16_parameters(every[inner](), remainder)

    return {
        f"{remainder} remainder over {inner}": functools.partial(make, inner, remainder)
        for inner in inners
        for remainder in ("int16", "int8", None)
    }


def trees(dtype: str) -> dict[str, Callable[[], Any]]:
    """Returns functions that make the trees of parameters' shapes, by name."""

    def of(*shape: int) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(shape, dtype)

    def gpt2() -> Any:
        width, norm = 768, {"scale": of(768), "bias": of(768)}
        widths = [(width, 3 * width), (width, width)]
        widths += [(width, 4 * width), (4 * width, width)]
        layers = [{"kernel": of(i, o), "bias": of(o)} for i, o in widths]
        blocks = [{"norms": [norm, norm], "layers": layers}] * 12
        embeddings = {"tokens": of(50257, width), "positions": of(1024, width)}
        return {**embeddings, "blocks": blocks, "norm": norm}

    return {"one": lambda: of(16384, 16384), "gpt2": gpt2}


def compiled(
    optimizer: Any, params: Any, shardings: Any, options: Any = None
) -> tuple[Any, int]:
    """Returns a compiled step that overwrites parameters and state.

    Also the bytes that it must move: gradient, parameter and state read, the latter two
    written. `options` are the compiler's.
    """
    if hasattr(optimizer, "step"):  # flashoptim's interface
        step = jax.jit(optimizer.step, donate_argnums=(0, 1))
    else:
        step = common.donated_step(optimizer)

    def placed(tree: Any, shardings: Any) -> Any:
        return jax.tree.map(
            lambda x, where: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=where),
            tree,
            shardings,
        )

    state = jax.eval_shape(optimizer.init, params)
    floor = 3 * common.nbytes(params) + 2 * common.nbytes(state)
    if shardings.spec:
        where = adam3_optax.state_shardings(optimizer, params, shardings)
    else:
        where = jax.tree.map(lambda _: shardings, state)
    params = placed(params, jax.tree.map(lambda _: shardings, params))
    # Not before: `state_shardings` runs `init`, and there is no device to run it on.
    with jax.sharding.use_abstract_mesh(shardings.mesh.abstract_mesh):
        lowered = step.lower(params, placed(state, where), params)
    return lowered.compile(options), floor


def measured(optimizer: Any, params: Any, shardings: Any) -> dict[str, Any]:
    """Returns what the compiler says of a step: on each device, bytes a parameter."""
    start = time.process_time()
    program, floor = compiled(optimizer, params, shardings)
    seconds = time.process_time() - start
    moved = compiled_text.moved(program.as_text())
    memory: Any = program.memory_analysis()
    held = memory.argument_size_in_bytes + memory.output_size_in_bytes
    held += memory.temp_size_in_bytes - memory.alias_size_in_bytes
    count = common.elements(params)
    here = count / shardings.mesh.size
    return {
        "leaves": len(jax.tree.leaves(params)),
        "parameters": count,
        "hbm": moved.hbm / here,
        "floor": floor / count,
        "kernels": moved.kernels,
        "temporary": memory.temp_size_in_bytes / here,
        "peak": held / here,
        "collectives": moved.collectives,
        "compile_cpu_seconds": seconds,
    }


def cells(options: argparse.Namespace) -> Iterator[tuple[dict[str, Any], Any]]:
    """Returns all that is asked: its name, and a function that measures it."""
    for device in options.devices:
        one = mesh_of(device, "2x2", 1)
        everywhere = NamedSharding(one, PartitionSpec())
        chosen = common.chosen(options, optimizers(device))
        few = {arm: make for arm, make in chosen.items() if is_of_few(arm)}
        for dtype in options.dtypes:
            for name in options.trees:
                params = trees(dtype)[name]()
                # What a process does once is done before the first is timed.
                measured(optax.adam(common.RATE), params, everywhere)
                arms = chosen if name == "one" else few
                if (dtype, name) == ("bfloat16", "one"):
                    arms = common.chosen(options, wrapped())
                for arm, make in arms.items():
                    cell = {"device": device, "dtype": dtype, "tree": name, "arm": arm}
                    yield cell, functools.partial(measured, make(), params, everywhere)
        if device == MESH and options.mesh:
            yield from mesh_cells(few)


def is_of_few(arm: str) -> bool:
    """Returns whether an optimizer is compiled for every tree, type and mesh."""
    return arm == common.BASELINE or arm.startswith(("adam3 None", "adam3 cubic"))


def mesh_cells(chosen: dict[str, Any]) -> Iterator[tuple[dict[str, Any], Any]]:
    """Returns the same for one matrix on a mesh."""
    params = trees("float32")["one"]()
    for axes, axis_type in AXES.items():
        mesh = mesh_of(MESH, "4x4", 16, axis_type)
        for split, spec in SPLITS.items():
            for arm, make in chosen.items():
                where = NamedSharding(mesh, spec)
                cell = {"device": MESH, "dtype": "float32", "tree": "one", "arm": arm}
                cell |= {"axes": axes, "split": split}
                yield cell, functools.partial(measured, make(), params, where)


def counts(options: argparse.Namespace, say: Say) -> Iterator[dict[str, Any]]:
    """Yields a row of the record for all that is asked."""
    for cell, measure in cells(options):
        name = ", ".join(cell.values())
        try:
            result = measure()
        except Exception as error:  # a compiler may refuse; others go on
            why = (str(error) or repr(error)).splitlines()[0]
            say(f"{name}: not compiled: {why}")
            yield {"measure": "compiled", **cell, "error": why}
            continue
        say(
            f"{name}: {result['hbm']:.1f} B of {result['floor']:.1f}, "
            f"{result['kernels']} kernels, {result['temporary']:.2f} B temporary "
            f"{result['collectives'] or ''}"
        )
        yield {"measure": "compiled", **cell, **result}


def compile_times(options: argparse.Namespace, say: Say) -> Iterator[dict[str, Any]]:
    """Yields the CPU seconds of each round; all optimizers take turns."""
    for device in options.devices:
        arms = filter(is_of_few, common.chosen(options, optimizers(device)))
        seconds: dict[str, list[float]] = {arm: [] for arm in arms}
        for arm in [*seconds] * ROUNDS:
            command = [sys.executable, __file__, "--child", device, arm]
            done = subprocess.run(command, check=True, stdout=subprocess.PIPE)
            seconds[arm].append(float(done.stdout))
        for arm, found in seconds.items():
            say(f"{device}, {arm}: {statistics.median(found):.1f} CPU seconds")
            yield {"measure": "compile", "device": device, "arm": arm, "seconds": found}


def compile_seconds(device: str, arm: str) -> float:
    """Returns the CPU seconds of tracing, lowering and compiling, in this process."""
    compiled_devices.present()
    jax.config.update("jax_platforms", "cpu")
    where = NamedSharding(mesh_of(device, "2x2", 1), PartitionSpec())
    # What a process does once is done before.
    measured(optax.adam(common.RATE), trees("float32")["one"](), where)
    params = trees("float32")["gpt2"]()
    return measured(optimizers(device)[arm](), params, where)["compile_cpu_seconds"]


def mesh_of(
    device: str, shape: str, count: int, axes: AxisType = AxisType.Auto
) -> Mesh:
    """Returns a mesh of the first devices of a slice."""
    devices = compiled_devices.devices(device, shape)[:count]
    side = int(count**0.5)
    return jax.make_mesh((side, side), ("x", "y"), (axes, axes), devices=devices)


def parsed(argv: list[str] | None) -> tuple[common.Parser, argparse.Namespace]:
    """Returns the arguments."""
    raw = argparse.RawDescriptionHelpFormatter
    parser = common.Parser("compiled.py", description=__doc__, formatter_class=raw)
    add = parser.add_argument
    folder = Path("benchmarks", "records", f"{datetime.now(UTC).date()}_compiled")
    add("--out", type=Path, default=folder, help=f"the record; default: {folder}")
    add("--devices", nargs="+", help="some of v4, v5e, v5p, v6e, h100 and a100")
    add("--trees", nargs="+", choices=[*trees("float32")], default=[*trees("float32")])
    add("--dtypes", nargs="+", choices=common.DTYPES, default=[*common.DTYPES])
    add("--only", default="", help="optimizers whose names contain this, and Adam")
    add("--no-mesh", dest="mesh", action="store_false", help="leave the meshes out")
    add("--compile-time", action="store_true", help="take this alone")
    return parser, parser.parse_args(argv)


def main(argv: list[str] | None = None) -> int:
    """Asks the compilers, and returns the exit status."""
    parser, options = parsed(argv)
    console = Console(highlight=False)
    say = functools.partial(console.print, markup=False, soft_wrap=True)
    present = compiled_devices.present()
    jax.config.update("jax_platforms", "cpu")  # of this machine; it is not asked
    if not present:
        say("Nothing is counted: neither libtpu nor jax-cuda13-plugin is installed.")
        return 0
    known = [name for device in present for name in optimizers(device)]
    common.check_only(parser, options.only, dict.fromkeys([*known, *wrapped()]))
    options.devices = options.devices or [x for x in (MESH, "h100") if x in present]
    if unknown := set(options.devices) - set(present):
        parser.error(f"no compiler for {', '.join(unknown)}; for {', '.join(present)}")
    try:
        record = common.Record(options.out, common.facts())
        for row in (compile_times if options.compile_time else counts)(options, say):
            record.append(row)
    except (OSError, ValueError) as error:
        parser.error(str(error))
    except KeyboardInterrupt:
        say(f"Interrupted. What was counted is in {options.out / 'results.jsonl'}")
        return 130
    say(f"Record: {record.path}")
    return 0


if __name__ == "__main__":
    if sys.argv[1:2] == ["--child"]:
        print(compile_seconds(*sys.argv[2:]))
    else:
        sys.exit(main())
