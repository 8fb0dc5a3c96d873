"""What a compiled step will move, read from the text of XLA's optimized program.

Bytes are those of arrays in the device's main memory (HBM), with a TPU's padding. An
operation is taken to read each operand once and whole, and to write its results once.
"""

import math
import re
from typing import NamedTuple

SIZES = {"pred": 1, "s8": 1, "u8": 1, "f8e4m3fn": 1, "s16": 2, "u16": 2, "bf16": 2}
SIZES |= {"s32": 4, "u32": 4, "f32": 4, "s64": 8, "u64": 8, "f64": 8, "token": 0}
ARRAY = re.compile(r"\b([a-z]\w*)\[([\d,]*)\](?:{([^}]*)})?")
# name = type operation(operands), ...
INSTRUCTION = re.compile(r"\s+(?:ROOT )?(%[\w.-]+) = (.*?) ([a-z][\w-]*)\((.*)$")
COMPUTATION = re.compile(r"(ENTRY )?(%?[\w.-]+) .*\{$")

# They move nothing: they name arrays, or wait for what another operation has moved.
FREE = re.compile(
    r" (parameter|constant|tuple|get-tuple-element|bitcast|after-all|partition-id|"
    r'replica-id|[\w-]+-done)\(|custom_call_target="ConcatBitcast"'
)
COPIES = {"copy", "copy-start", "slice-start"}
# Their bodies run any number of times, so their bytes cannot be read from the text.
UNKNOWN = {"while", "conditional", "sort", "async-start"}
COLLECTIVES = {"all-gather", "all-reduce", "reduce-scatter", "all-to-all"}
COLLECTIVES |= {"collective-permute", "collective-broadcast", "ragged-all-to-all"}


class Moved(NamedTuple):
    """What one run of a program moves, on each device."""

    hbm: int  # bytes read from and written to the main memory
    kernels: int  # operations on arrays, without scalars and plain copies
    collectives: dict[str, int]  # bytes of what devices send, by kind of operation


class Instruction(NamedTuple):
    """A line of a program."""

    name: str
    type: str
    operation: str
    operands: tuple[str, ...]
    line: str


def moved(text: str) -> Moved:
    """Returns what a program moves; a ValueError where the text does not tell."""
    programs = computations(text)
    hbm, kernels = 0, 0
    collectives: dict[str, int] = {}
    waiting = ["ENTRY"]
    while waiting:
        lines = programs[waiting.pop()]
        types = {x.name: x.type for x in lines}
        for x in lines:
            if x.operation in UNKNOWN:
                raise ValueError(f"{x.operation}: its bytes are not in the text")
            if x.operation == "call":
                waiting += re.findall(r"to_apply=%?([\w.-]+)", x.line)
            elif not FREE.search(x.line):
                hbm += bytes_of(x, types)
                every = " ".join([x.type, *(types[name] for name in x.operands)])
                has_arrays = any(dims for _, dims, _ in ARRAY.findall(every))
                kernels += has_arrays and x.operation not in COPIES
                kind = x.operation.removesuffix("-start")
                if kind in COLLECTIVES:
                    size = sum(nbytes(*y, everywhere=True) for y in results(x, types))
                    collectives[kind] = collectives.get(kind, 0) + size
    return Moved(hbm, kernels, collectives)


def computations(text: str) -> dict[str, list[Instruction]]:
    """Returns the instructions of a program's parts, by name; the main is ENTRY."""
    found: dict[str, list[Instruction]] = {}
    lines: list[Instruction] = []
    for line in text.splitlines():
        if not line.startswith(" ") and (head := COMPUTATION.match(line)):
            lines = found["ENTRY" if head[1] else head[2].lstrip("%")] = []
        elif x := INSTRUCTION.match(line):
            operands = tuple(re.findall(r"%[\w.-]+", x[4].split(")")[0]))
            line = line.split(", metadata=")[0]
            lines.append(Instruction(x[1], x[2], x[3], operands, line))
    return found


def bytes_of(x: Instruction, types: dict[str, str]) -> int:
    """Returns the bytes that an instruction moves to and from the main memory."""
    if x.operation in ("copy-start", "slice-start"):
        # The type names source, result and a flag. A slice reads what it returns.
        arrays = [array for array in ARRAY.findall(x.type) if array[1]]
        size = min(nbytes(*array, everywhere=True) for array in arrays)
        return sum(min(nbytes(*array), size) for array in arrays)
    read = [y for name in {*x.operands} for y in ARRAY.findall(types[name])]
    return sum(nbytes(*y) for y in [*read, *results(x, types)])


def results(x: Instruction, types: dict[str, str]) -> list[tuple[str, str, str]]:
    """Returns the arrays that an instruction makes."""
    arrays = ARRAY.findall(x.type)
    if x.operation not in ("all-gather-start", "collective-permute-start"):
        return arrays
    # The type of these names the operands first, and flags last.
    operands = sum(len(ARRAY.findall(types[name])) for name in x.operands)
    return arrays[operands : 2 * operands]


def nbytes(dtype: str, dims: str, layout: str, everywhere: bool = False) -> int:
    """Returns the bytes of an array, with padding; 0 if it is not in main memory."""
    if dtype not in SIZES:
        raise ValueError(f"{dtype}: its size is not known here")
    if "S(" in layout and not everywhere:
        return 0
    shape = [int(n) for n in dims.split(",") if n]
    order = [int(i) for i in layout.split(":")[0].split(",") if i]
    shape = [shape[i] for i in reversed(order)] if order else shape  # contiguous last
    if tile := re.search(r"T\(([\d,]+)\)", layout):
        sizes = [int(n) for n in tile[1].split(",")]
        shape = [1] * (len(sizes) - len(shape)) + shape
        for i, size in enumerate(reversed(sizes), 1):
            shape[-i] = math.ceil(shape[-i] / size) * size
    return math.prod(shape) * SIZES[dtype]
