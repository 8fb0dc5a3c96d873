"""Instructions a parameter of a compiled step on a GPU, counted without one.

XLA writes its kernels in PTX. NVIDIA's ptxas makes the GPU's own instructions of them,
and nvdisasm prints these: jax[cuda13] and nvidia-cuda-nvdisasm are needed. Counted is
what stands there, on one matrix of 16,384². A kernel with a loop is refused, so that a
thread runs each instruction at most once. Results are added to instructions.jsonl.

    python benchmarks/instructions.py --devices h100 --only float8 --out FOLDER
"""

import argparse
import math
import re
import subprocess
import sys
import sysconfig
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
from jax.sharding import NamedSharding, PartitionSpec

sys.path.insert(0, str(Path(__file__).parent))
import common
import compiled
import compiled_devices

CHIPS = {compiled_devices.H100: "sm_90a", compiled_devices.A100: "sm_80"}
INSTRUCTION = re.compile(r"^\s+/\*[0-9a-f]+\*/\s+(?:@!?U?P\w+\s+)?([A-Z][\w.]*)", re.M)
LAUNCH = re.compile(r"(\w+) grid: \[([\d, ]+)\] threads: \[([\d, ]+)\]")
LARGE = 4096  # parameters a thread; kernels of fewer threads have scalars, or one row


def tool(name: str) -> Path | None:
    """Returns a program of NVIDIA's packages; None where it is not installed."""
    packages = Path(sysconfig.get_paths()["purelib"], "nvidia")
    return next(packages.glob(f"*/bin/{name}"), None)


def can_count() -> bool:
    """Returns whether the compiler and the programs are here."""
    tools = tool("ptxas"), tool("nvdisasm")
    return set(CHIPS) <= {*compiled_devices.present()} and None not in tools


def counted(optimizer: Any, device: str) -> float:
    """Returns the instructions a parameter of a donated step."""
    params = compiled.trees("float32")["one"]()
    where = NamedSharding(compiled.mesh_of(device, "2x2", 1), PartitionSpec())
    count = 0.0
    with tempfile.TemporaryDirectory() as folder:
        options = {"xla_dump_to": folder, "xla_dump_emitter_re": ".*"}
        compiled.compiled(optimizer, params, where, options)
        each = {name: params.size / n for name, n in launched(Path(folder))}
        for path in Path(folder).glob("*.ptx"):
            for name, instructions in kernels(path, CHIPS[device]):
                if each[name] < LARGE:
                    count += len(instructions) / each[name]
    return count


def launched(folder: Path) -> Iterator[tuple[str, int]]:
    """Yields each kernel, and how many threads it is given."""
    for path in folder.glob("*thunk_sequence.txt"):
        for name, *sizes in LAUNCH.findall(path.read_text(encoding="utf-8")):
            yield name, math.prod(map(int, ", ".join(sizes).split(", ")))


def kernels(ptx: Path, chip: str) -> Iterator[tuple[str, list[str]]]:
    """Yields each kernel of a file, and its instructions."""
    binary = ptx.with_suffix(".cubin")
    assemble = [tool("ptxas"), "-O3", f"-arch={chip}", ptx, "-o", binary]
    subprocess.run(assemble, check=True)
    text = subprocess.check_output([tool("nvdisasm"), "-c", binary], encoding="utf-8")
    for part in re.split(r"\.section\s+\.text\.", text)[1:]:
        found = [x for x in INSTRUCTION.findall(part) if x != "NOP"]
        if sum(x.startswith(("BRA", "CALL")) for x in found) > 1:  # the last one's end
            raise ValueError(f"{ptx}: it has loops, whose runs are not in the text")
        yield re.split(r"[,\s]", part, maxsplit=1)[0], found


def main(argv: list[str] | None = None) -> int:
    """Counts, and returns the exit status."""
    raw = argparse.RawDescriptionHelpFormatter
    parser = common.Parser("instructions.py", description=__doc__, formatter_class=raw)
    add = parser.add_argument
    add("--out", type=Path, required=True, help="folder of the record")
    add("--devices", nargs="+", choices=[*CHIPS], default=[*CHIPS])
    add("--only", default="", help="optimizers whose names contain this, and Adam")
    options = parser.parse_args(argv)
    if not can_count():
        print("Nothing is counted: jax[cuda13] or nvidia-cuda-nvdisasm is missing.")
        return 0
    jax.config.update("jax_platforms", "cpu")  # of this machine; it is not asked
    record = common.Record(options.out, common.facts(), "instructions.jsonl")
    for device in options.devices:
        for arm, make in common.chosen(options, compiled.optimizers(device)).items():
            if not arm.startswith("flashoptim"):  # whose own kernel is no PTX of XLA's
                count = counted(make(), device)
                row = {"device": device, "arm": arm, "instructions": count}
                record.append({"measure": "instructions", **row})
                print(f"{device}, {arm}: {count:.1f}", flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
