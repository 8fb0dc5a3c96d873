"""What the benchmarks share: optimizers and trees by name, the step, the record."""

import argparse
import functools
import importlib.util
import itertools
import json
import os
import platform
import sys
from collections.abc import Callable, Iterable
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path
from typing import Any, NoReturn, get_args

import jax
import jax.numpy as jnp
import optax

import adam3_optax

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "tools"))
from machine import cpu_model, git, usable_cores

BASELINE = "optax.adam"
RATE = 1e-3
FORMS = (None, *get_args(adam3_optax.ThirdMoment))
MOMENTS = ("m_dtype", "v_dtype", "s_dtype")
SETTINGS: dict[str, dict[str, Any]] = {  # how m, v and s are stored
    "float32": {},
    "bfloat16 m, s": {"m_dtype": "bfloat16", "s_dtype": "bfloat16"},
    "bfloat16": dict.fromkeys(MOMENTS, "bfloat16"),
    "float8": dict.fromkeys(MOMENTS, "float8") | {"v_dtype": "bfloat16"},
    "float8 all": dict.fromkeys(MOMENTS, "float8"),
}
LEFT_OUT = (("standardized", "float8 all"), (None, "bfloat16 m, s"))  # one is refused
SAME = ("device", "cpu", "cores", "python", "jax", "optax")  # in all of a record
PACKAGES = ("jax", "libtpu", "optax", "numpy", "torch", "flashoptim-jax", "rollfast")
Makers = dict[str, Callable[[], Any]]


def ours(factory: Callable[..., Any]) -> Makers:
    """Returns functions that make AdaM3 in each form with each state, by name."""
    made: Makers = {}
    for form in FORMS:
        for name, setting in SETTINGS.items():
            if (form, name) not in LEFT_OUT:
                kept = {k: x for k, x in setting.items() if form or k != "s_dtype"}
                make = functools.partial(factory, RATE, third_moment=form, **kept)
                made[f"{factory.__name__} {form}, {name}"] = make
    return made


def peers(*, fused: bool) -> Makers:
    """Returns other packages' Adam with low-precision state; `fused` for a GPU."""
    made: Makers = {}
    if importlib.util.find_spec("rollfast"):
        from rollfast import adamw, adamw8

        make8 = functools.partial(adamw8, RATE)
        made["rollfast adamw, bfloat16"] = lambda: adamw(RATE, mu_dtype=jnp.bfloat16)
        made["rollfast adamw8"] = make8
        made["rollfast adamw8, stochastic"] = lambda: make8(stochastic_rounding=True)
    if importlib.util.find_spec("flashoptim_jax"):
        from flashoptim_jax import flash_adam

        make = functools.partial(flash_adam, RATE, master_weight_bits=None)
        made["flashoptim, int8"] = lambda: make(fused=False)
        if fused:
            made["flashoptim, int8, own kernel"] = make
    return made


def chosen(options: argparse.Namespace, every: Makers, base: str = BASELINE) -> Makers:
    """Returns the optimizers that --only names, and the one to compare with."""
    return {x: y for x, y in every.items() if options.only in x or x == base}


def trees(dtype: str, side: int = 16384, width: int = 768, layers: int = 12) -> Makers:
    """Returns functions that make trees of shapes: a matrix, GPT-2, small leaves."""

    def of(*shape: int) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(shape, dtype)

    def gpt2() -> Any:
        norm = {"scale": of(width), "bias": of(width)}
        widths = [(width, 3 * width), (width, width)]
        widths += [(width, 4 * width), (4 * width, width)]
        kernels = [{"kernel": of(i, o), "bias": of(o)} for i, o in widths]
        blocks = [{"norms": [norm, norm], "layers": kernels}] * layers
        embeddings = {"tokens": of(50257, width), "positions": of(1024, width)}
        return {**embeddings, "blocks": blocks, "norm": norm}

    small = [of(25, 40)] * 100
    return {"one": lambda: of(side, side), "gpt2": gpt2, "small": lambda: small}


def step_of(optimizer: Any) -> Callable[[Any, Any, Any], Any]:
    """Returns a step: from parameters, state and gradients to the first two."""
    if hasattr(optimizer, "step"):  # flashoptim's interface
        return optimizer.step

    def step(params: Any, state: Any, gradients: Any) -> Any:
        updates, state = optimizer.update(gradients, state, params)
        return optax.apply_updates(params, updates), state

    return step


def elements(tree: Any) -> int:
    return sum(x.size for x in jax.tree.leaves(tree))


def nbytes(tree: Any) -> int:
    return sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(tree))


def facts() -> dict[str, Any]:
    """Returns what the numbers depend on, besides the code that is measured."""
    installed = {x.name.lower(): x.version for x in metadata.distributions()}
    return {
        "device": jax.devices()[0].device_kind,
        "cpu": cpu_model(),
        "cores": usable_cores(),
        "python": platform.python_version(),
        **{package: installed.get(package) for package in PACKAGES},
        "commit": git("rev-parse", "HEAD"),
        "changed": bool(git("status", "--porcelain", "adam3_optax", "benchmarks/*.py")),
        "load": [round(x, 2) for x in os.getloadavg()],
    }


def read(folder: Path, measure: str) -> list[dict[str, Any]]:
    """Returns the lines of a measure in a record's files."""
    texts = (x.read_text(encoding="utf-8") for x in sorted(folder.glob("*.jsonl")))
    rows = (json.loads(line) for text in texts for line in text.splitlines())
    return [row for row in rows if row.get("measure") == measure]


class Parser(argparse.ArgumentParser):
    """The arguments of every script that measures. A mistake gets one line."""

    def __init__(self, script: str, text: str | None, kind: str) -> None:
        """Has those that all scripts share."""
        raw = argparse.RawDescriptionHelpFormatter
        super().__init__(script, description=text, formatter_class=raw)
        folder = Path("benchmarks", "records", f"{datetime.now(UTC).date()}_{kind}")
        add = self.add_argument
        add("--out", type=Path, default=folder, help=f"the record; default: {folder}")
        add("--only", default="", help="optimizers whose names contain this, and Adam")

    def error(self, message: str) -> NoReturn:
        """Ends with status 2."""
        self.exit(2, f"{self.prog}: {' '.join(message.split())}\n")

    def check_only(self, only: str, known: Iterable[str]) -> None:
        """Ends the program if no optimizer has such a name."""
        if not any(only in name for name in known):
            self.error(f"--only {only!r} is in no name; names are {'; '.join(known)}")

    def record(self, folder: Path, rows: Iterable[dict[str, Any]]) -> None:
        """Adds a line of this run to a record, and the rows as they come."""
        run, known = datetime.now(UTC).isoformat(timespec="milliseconds"), facts()
        if any(old[x] != known[x] for old in read(folder, "run") for x in SAME):
            self.error(f"--out {folder} is of another machine or of other versions")
        command = " ".join([f"benchmarks/{self.prog}", *sys.argv[1:]])
        first = {"measure": "run", "command": command, **known}
        try:
            folder.mkdir(parents=True, exist_ok=True)
            with (folder / "results.jsonl").open("a", encoding="utf-8") as file:
                for row in itertools.chain([first], rows):
                    print(json.dumps({"run": run, **row}), file=file, flush=True)
                    print(*(f"{x}: {y}" for x, y in row.items()), sep=", ", flush=True)
        except OSError as error:
            self.error(f"--out {folder}: {error.strerror}")
