"""Instructions a parameter of a compiled step on a GPU, counted without one.

XLA writes PTX, ptxas makes the GPU's own instructions of it, and nvdisasm prints them.
A kernel with a loop is refused, so that a thread runs each instruction at most once.
"""

import math
import re
import subprocess
import sysconfig
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import compiled
import compiled_devices
from jax.sharding import NamedSharding, PartitionSpec

CHIPS = {compiled_devices.H100: "sm_90a", compiled_devices.A100: "sm_80"}
INSTRUCTION = re.compile(r"^\s+/\*[0-9a-f]+\*/\s+(?:@!?U?P\w+\s+)?([A-Z][\w.]*)", re.M)
LAUNCH = re.compile(r"(\w+) grid: \[([\d, ]+)\] threads: \[([\d, ]+)\]")
LARGE = 4096  # parameters a thread; kernels of fewer threads have scalars, or one row


def tool(name: str) -> Path | None:
    """Returns a program of NVIDIA's packages; None where it is not installed."""
    packages = Path(sysconfig.get_paths()["purelib"])
    return next(packages.glob(f"nvidia/*/bin/{name}"), None)


def can_count() -> bool:
    """Returns whether the compiler and the programs are here."""
    here = set(CHIPS) <= {*compiled_devices.present()}
    return here and None not in (tool("ptxas"), tool("nvdisasm"))


def counted(optimizer: Any, device: str) -> float:
    """Returns the instructions a parameter of a donated step."""
    params = compiled.trees("float32")["one"]()
    where = NamedSharding(compiled.mesh_of(device, "2x2", 1), PartitionSpec())
    with tempfile.TemporaryDirectory() as folder:
        options = {"xla_dump_to": folder, "xla_dump_emitter_re": ".*"}
        compiled.compiled(optimizer, params, where, options)
        each = {}  # parameters a thread, by kernel
        for path in Path(folder).glob("*thunk_sequence.txt"):
            for name, *sizes in LAUNCH.findall(path.read_text(encoding="utf-8")):
                threads = math.prod(map(int, ", ".join(sizes).split(", ")))
                each[name] = params.size / threads
        found = [x for y in Path(folder).glob("*.ptx") for x in kernels(y, device)]
    return sum(n / each[name] for name, n in found if each[name] < LARGE)


def kernels(ptx: Path, device: str) -> Iterator[tuple[str, int]]:
    """Yields each kernel of a file, and the number of its instructions."""
    binary = ptx.with_suffix(".cubin")
    assemble = [tool("ptxas"), "-O3", f"-arch={CHIPS[device]}", ptx, "-o", binary]
    subprocess.run(assemble, check=True)
    text = subprocess.check_output([tool("nvdisasm"), "-c", binary], encoding="utf-8")
    for part in re.split(r"\.section\s+\.text\.", text)[1:]:
        found = [x for x in INSTRUCTION.findall(part) if x != "NOP"]
        if sum(x.startswith(("BRA", "CALL")) for x in found) > 1:  # the last one's end
            raise ValueError(f"{ptx}: it has loops, whose runs are not in the text")
        yield re.split(r"[,\s]", part, maxsplit=1)[0], len(found)
