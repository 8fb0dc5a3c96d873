"""What the benchmarks share: optimizers and trees by name, the step, the record."""

import argparse
import contextlib
import functools
import json
import os
import platform
import sys
from collections.abc import Callable, Iterable
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path
from typing import Any, NamedTuple, NoReturn, get_args

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx
from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TextColumn,
    TimeElapsedColumn,
)

import adam3_optax

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "tools"))
from machine import cpu_model, git, usable_cores

BASELINE = "optax.adam"
RATE = 1e-3
DTYPES = ("float32", "bfloat16")
FORMS: tuple[adam3_optax.ThirdMoment, ...] = get_args(adam3_optax.ThirdMoment)
MOMENTS = ("m_dtype", "v_dtype", "s_dtype")
SETTINGS: dict[str, dict[str, Any]] = {  # how m, v and s are stored
    "float32": {},
    "bfloat16 m, s": {"m_dtype": "bfloat16", "s_dtype": "bfloat16"},
    "bfloat16": dict.fromkeys(MOMENTS, "bfloat16"),
    "float8": dict.fromkeys(MOMENTS, "float8") | {"v_dtype": "bfloat16"},
    "float8 all": dict.fromkeys(MOMENTS, "float8"),
}
TREES = ("one", "transformer", "large", "small", "tiny")  # from few leaves to many
MULTIPLE = 80_000  # of it "one" and "large" can be made

# Tracing and compiling are measured, so nothing may come from an earlier process.
jax.config.update("jax_enable_compilation_cache", False)


# --- What is measured ---------------------------------------------------------------


class Sizes(NamedTuple):
    """How large the trees are."""

    parameters: int = 20_000_000  # in "one", and in "large"
    large: int = 200  # leaves
    small: int = 300
    tiny: int = 2000
    compiled: int = 1000  # leaves as in "tiny", of which the compile time is taken
    width: int = 512  # of the transformer
    layers: int = 6
    vocabulary: int = 16_384


QUICK = Sizes(MULTIPLE, 4, 2, 3, 3, width=64, layers=1, vocabulary=64)


def tree_of(name: str, sizes: Sizes, dtype: str) -> Any:
    """Returns the shapes and types of a tree of parameters."""
    if name == "transformer":
        tree = transformer(sizes.width, sizes.layers, sizes.vocabulary)
        return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, dtype), tree)
    count, shape = {
        "one": (1, (sizes.parameters // 5000, 5000)),
        "large": (sizes.large, (sizes.parameters // sizes.large // 400, 400)),
        "small": (sizes.small, (25, 40)),
        "tiny": (sizes.tiny, (4, 16)),
        "compiled": (sizes.compiled, (4, 16)),
        "warm-up": (8, (4, 16)),
    }[name]
    return {f"leaf_{i}": jax.ShapeDtypeStruct(shape, dtype) for i in range(count)}


def transformer(width: int, layers: int, vocabulary: int) -> Any:
    """Returns the shapes of a language model's parameters: biases, norms and all."""

    def block(rngs: nnx.Rngs) -> nnx.Dict[Any]:
        return nnx.Dict(
            norm_1=nnx.LayerNorm(width, rngs=rngs),
            attend=nnx.MultiHeadAttention(width // 64, width, rngs=rngs),
            norm_2=nnx.LayerNorm(width, rngs=rngs),
            up=nnx.Linear(width, 4 * width, rngs=rngs),
            down=nnx.Linear(4 * width, width, rngs=rngs),
        )

    def model() -> nnx.Dict[Any]:
        rngs = nnx.Rngs(0)
        return nnx.Dict(
            embed=nnx.Embed(vocabulary, width, rngs=rngs),
            position=nnx.Embed(512, width, rngs=rngs),
            blocks=nnx.List(block(rngs) for _ in range(layers)),
            norm=nnx.LayerNorm(width, rngs=rngs),
        )

    return nnx.to_pure_dict(nnx.state(nnx.eval_shape(model), nnx.Param))


def optimizers() -> dict[str, Callable[[], Any]]:
    """Returns functions that make the optimizers, by name."""
    others: dict[str, Callable[[], Any]] = {
        "optax.sgd": functools.partial(optax.sgd, RATE),
        "optax.sgd, momentum": functools.partial(optax.sgd, RATE, momentum=0.9),
        BASELINE: functools.partial(optax.adam, RATE),
        "optax.adamw": functools.partial(optax.adamw, RATE),
        "optax.adabelief": functools.partial(optax.adabelief, RATE),
        "optax.contrib.ademamix": functools.partial(optax.contrib.ademamix, RATE),
    }
    ours: dict[str, Callable[[], Any]] = {
        f"adam3 {form}, {name}": functools.partial(
            adam3_optax.adam3, RATE, third_moment=form, **setting
        )
        for form in FORMS
        for name, setting in SETTINGS.items()
        if (form, name) != ("standardized", "float8 all")  # which is refused
    }
    none: dict[str, Callable[[], Any]] = {
        f"adam3 None, {name}": functools.partial(
            adam3_optax.adam3,
            RATE,
            third_moment=None,
            **{k: x for k, x in setting.items() if k != "s_dtype"},
        )
        for name, setting in SETTINGS.items()
        if name != "bfloat16 m, s"
    }
    return others | none | ours


def flattened() -> dict[str, Callable[[], Any]]:
    """Returns some on all leaves joined to one vector, for trees of small leaves."""
    every = optimizers()
    names = (BASELINE, *(f"adam3 {form}, float32" for form in FORMS))

    def flat(make: Callable[[], Any]) -> Any:
        return optax.flatten(make())

    return {f"optax.flatten({x})": functools.partial(flat, every[x]) for x in names}


def donated_step(optimizer: Any) -> Any:
    """Returns a fresh jitted step, which overwrites parameters and state."""

    @functools.partial(jax.jit, donate_argnums=(0, 1))
    def step(params: Any, state: Any, gradients: Any) -> Any:
        updates, state = optimizer.update(gradients, state, params)
        return optax.apply_updates(params, updates), state

    return step


# --- Counts -------------------------------------------------------------------------


def elements(tree: Any) -> int:
    """Returns how many numbers are in a tree of arrays or of shapes."""
    return sum(x.size for x in jax.tree.leaves(tree))


def nbytes(tree: Any) -> int:
    """Returns the bytes of a tree of arrays or of shapes."""
    leaves = jax.tree.leaves(tree)
    return sum(x.size * jnp.dtype(x.dtype).itemsize for x in leaves)


def compiled_counts(compiled: Any) -> dict[str, float | None]:
    """Returns what XLA says of a compiled step; None where it does not say."""
    cost = compiled.cost_analysis()
    cost = cost[0] if isinstance(cost, list) else cost
    memory = compiled.memory_analysis()
    return {
        "xla_bytes": cost.get("bytes accessed") if cost else None,
        "temporary_bytes": memory.temp_size_in_bytes if memory else None,
    }


def quartiles(values: Any) -> list[float]:
    """Returns the first quartile, the median and the third."""
    return [float(f"{x:.5g}") for x in np.percentile(values, (25, 50, 75))]


# --- The record ---------------------------------------------------------------------


SAME = ("device", "cpu", "cores", "python", "jax", "jaxlib", "optax")


def facts() -> dict[str, Any]:
    """Returns what the numbers depend on, besides the code that is measured."""
    device = jax.devices()[0]
    packages = ("jax", "jaxlib", "libtpu", "jax-cuda13-plugin", "optax", "flax")
    packages += ("numpy", "torch", "flashoptim-jax")
    versions: dict[str, str | None] = dict.fromkeys(packages)
    for package in packages:
        with contextlib.suppress(metadata.PackageNotFoundError):
            versions[package] = metadata.version(package)
    settings = ("XLA_FLAGS", "JAX_PLATFORMS", "OMP_NUM_THREADS")
    return {
        "device": device.device_kind,
        "platform": device.platform,
        "runtime": device.client.platform_version.splitlines()[0],
        "cpu": cpu_model(),
        "cores": usable_cores(),
        "python": platform.python_version(),
        **versions,
        "adam3_optax": adam3_optax.__version__,
        "commit": git("rev-parse", "HEAD"),
        "changed": bool(git("status", "--porcelain", "adam3_optax", "benchmarks/*.py")),
        "environment": {x: os.environ[x] for x in settings if x in os.environ},
        "load": [round(x, 2) for x in os.getloadavg()],
    }


class Record:
    """A file of JSON lines, to which lines are added and from which none are taken."""

    def __init__(
        self, folder: Path, known: dict[str, Any], name: str = "results.jsonl"
    ) -> None:
        """Opens it and writes the line of this run.

        Raises:
            ValueError: There are runs of another device or of other versions in it.
        """
        self.path = folder / name
        self.run = datetime.now(UTC).isoformat(timespec="milliseconds")
        for run in read(self.path):
            for name in SAME:
                if run["measure"] == "run" and run[name] != known[name]:
                    raise ValueError(
                        f"{self.path} holds runs with {name} = {run[name]}, and this "
                        f"one has {known[name]}; take another folder with --out"
                    )
        folder.mkdir(parents=True, exist_ok=True)
        script = Path(sys.argv[0]).name
        command = " ".join(["python", f"benchmarks/{script}", *sys.argv[1:]])
        self.append({"measure": "run", "command": command, **known})

    def append(self, line: dict[str, Any]) -> None:
        """Adds a line, which is on the disk when this returns."""
        with self.path.open("a", encoding="utf-8") as file:
            file.write(json.dumps({"run": self.run, **line}) + "\n")


def read(path: Path) -> list[dict[str, Any]]:
    """Returns the lines of a record, none where there is no file.

    Raises:
        ValueError: A line is not of a record.
    """
    lines = path.read_text(encoding="utf-8").splitlines() if path.exists() else []
    rows = []
    for number, line in enumerate(lines, 1):
        try:
            rows.append(json.loads(line))
            rows[-1]["measure"], rows[-1]["run"]
        except (ValueError, KeyError, TypeError) as error:
            raise ValueError(f"{path}, line {number}, is no measurement") from error
    return rows


# --- The command line ---------------------------------------------------------------


class Parser(argparse.ArgumentParser):
    """Reports a mistake in one line, without the usage."""

    def error(self, message: str) -> NoReturn:
        """Ends with status 2."""
        self.exit(2, f"{self.prog}: {' '.join(message.split())}\n")


def number(kind: type, low: float, high: float, multiple: int = 1) -> Any:
    """Returns a parser of a number within bounds."""

    def parse(text: str) -> Any:
        with contextlib.suppress(ValueError):
            x = kind(text)
            if low <= x <= high and (kind is float or x % multiple == 0):
                return x
        wanted = f"a {'whole ' * (kind is int)}number from {low:,} to {high:,}"
        if multiple > 1:
            wanted += f", a multiple of {multiple:,}"
        raise argparse.ArgumentTypeError(f"must be {wanted}, got {text!r}")

    return parse


def add_common(parser: Parser) -> None:
    """Adds the arguments of both scripts."""
    add = parser.add_argument
    today = datetime.now(UTC).date().isoformat()
    folder = Path("benchmarks", "records", f"{today}_speed")
    add("--out", type=Path, help=f"folder of the record; default: {folder}")
    add("--quick", action="store_true", help="tiny trees, to see that all works")
    add("--only", default="", help="optimizers whose names contain this, and Adam")
    add("--dtypes", nargs="+", choices=DTYPES, help="of parameters and gradients")
    add(
        "--parameters",
        type=number(int, MULTIPLE, 10**12, MULTIPLE),
        help=f"in the trees 'one' and 'large'; default: {Sizes().parameters:,}",
    )
    parser.set_defaults(folder=folder)


def settle(
    parser: Parser, options: argparse.Namespace, others: tuple[str, ...] = ()
) -> None:
    """Fills in what depends on other arguments, and checks the rest.

    Args:
        parser: Of the arguments.
        options: The arguments; changed in place.
        others: Names that --only may mean besides the optimizers'.
    """
    options.out = options.out or (
        Path("out", "bench") if options.quick else options.folder
    )
    sizes = QUICK if options.quick else Sizes()
    options.sizes = sizes._replace(parameters=options.parameters or sizes.parameters)
    check_only(parser, options.only, [*optimizers(), *flattened(), *others])
    try:
        options.out.mkdir(parents=True, exist_ok=True)
        (options.out / "results.jsonl").open("a").close()  # fails here, not after hours
        read(options.out / "results.jsonl")
    except OSError as error:
        parser.error(f"--out {options.out}: {error.strerror}")
    except ValueError as error:
        parser.error(f"--out: {error}")


def check_only(parser: Parser, only: str, known: Iterable[str]) -> None:
    """Ends the program if no optimizer has such a name."""
    if not any(only in name for name in known):
        parser.error(f"--only {only!r} is in no name; names are {'; '.join(known)}")


def chosen(options: argparse.Namespace, every: dict[str, Any]) -> dict[str, Any]:
    """Returns the optimizers that --only names, and the one to compare with."""
    return {
        name: make
        for name, make in every.items()
        if options.only in name or name == BASELINE
    }


def bar(console: Console) -> Progress:
    """Returns a progress bar, shown on a terminal alone."""
    columns = (
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TextColumn("{task.description}", markup=False),
    )
    return Progress(
        *columns, console=console, transient=True, disable=not console.is_terminal
    )


def label(tree: str, leaves: int, parameters: int) -> str:
    """Returns a tree's name for tables: "200 x 100 k"."""
    if tree == "transformer":
        return f"transformer ({short(parameters)} in {leaves})"
    return f"{leaves:,} x {short(parameters // leaves)}"


def short(count: int) -> str:
    """Returns a count as in "20 M"."""
    for unit, name in ((10**9, " G"), (10**6, " M"), (10**3, " k")):
        if count >= unit:
            return f"{count / unit:.3g}{name}"
    return str(count)
