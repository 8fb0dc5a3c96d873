"""The tables of docs/speed.md and low_precision.md, from a record of compiled.py.

Instructions are from that of instructions.py beside it.
"""

import statistics
from pathlib import Path

from benchmarks import common
from benchmarks.compiled_record import DEVICES, Row, Rows, arms, every, read
from studies.study.markdown import table

MESH_ARMS = (
    common.BASELINE,
    *(f"adam3 cubic, {name}" for name in common.SETTINGS),
)


def shown(row: Row | None, field: str, digits: int = 1) -> str:
    """Returns a number of a row; a dash where it was not compiled."""
    found = None if row is None else row.get(field)
    return "-" if found is None else f"{found:.{digits}f}"


def one_matrix(rows: Rows, counted: dict[tuple[str, str], Row]) -> str:
    """Returns the bytes and the instructions of a step on one matrix."""
    head = ["optimizer and state", *(f"{x}: bytes" for x in DEVICES.values())]
    head += ["least possible, without padding", "against `optax.adam`", "temporary"]
    head += ["H100: instructions", "A100: instructions"]
    lines = []
    for arm in arms(rows):
        cells, ratios, temporary, floor = [], set(), set(), "-"
        for device in DEVICES:
            row = rows.get((device, "float32", "one", arm))
            base = rows.get((device, "float32", "one", common.BASELINE))
            cells.append(shown(row, "hbm"))
            if row and base and "hbm" in row:
                ratios.add(f"{row['hbm'] / base['hbm']:.2f}")
                temporary.add(shown(row, "temporary"))
                floor = shown(row, "floor")
        ends = ["; ".join(sorted(ratios)), "; ".join(sorted(temporary))]
        ends += [shown(counted.get((x, arm)), "instructions") for x in ("h100", "a100")]
        lines.append([arm, *cells, floor, *ends])
    return table(head, lines)


def many_leaves(rows: Rows) -> str:
    """Returns bytes and kernels on the tree of GPT-2 small."""
    head = ["device, parameters", "optimizer and state", "bytes"]
    head += ["least possible, without padding", "kernels", "temporary"]
    lines = []
    for device, title in DEVICES.items():
        for dtype in common.DTYPES:
            for arm in MESH_ARMS:
                row = rows.get((device, dtype, "gpt2", arm))
                where = f"{title}, {dtype}" * (arm == MESH_ARMS[0])
                cells = [shown(row, "hbm"), shown(row, "floor")]
                cells += [shown(row, "kernels", 0), shown(row, "temporary")]
                lines.append([where, arm, *cells])
    return table(head, lines)


def compile_times(times: dict[tuple[str, str], Row]) -> str:
    """Returns the CPU seconds of the compilers, on the tree of GPT-2 small."""
    head = ["compiling for", "optimizer and state", "CPU seconds", "against Adam's"]
    lines = []
    for (device, arm), row in times.items():
        middle = statistics.median(row["seconds"])
        base = statistics.median(times[device, common.BASELINE]["seconds"])
        low, high = min(row["seconds"]), max(row["seconds"])
        text = f"{middle:.1f} ({low:.1f} to {high:.1f})"
        lines.append([DEVICES[device], arm, text, f"{middle / base:.1f}"])
    return table(head, lines)


def wrapped(rows: Rows) -> str:
    """Returns the bytes of `bfloat16_parameters`, on one matrix."""
    head = ["remainder", "over", *(f"{x}: bytes" for x in DEVICES.values())]
    head += ["least possible, without padding", "temporary", "peak, with gradients"]
    lines = []
    for key, row in rows.items():
        if key[0] != "v5e" or " remainder over " not in key[3]:
            continue
        remainder, inner = key[3].split(" remainder over ")
        other = rows.get(("h100", *key[1:]))
        temporary = {shown(x, "temporary", 2) for x in (row, other)}
        line = [remainder, inner, shown(row, "hbm"), shown(other, "hbm")]
        line += [shown(row, "floor"), "; ".join(sorted(temporary))]
        lines.append([*line, shown(row, "peak", 2)])
    return table(head, lines)


def meshes(rows: Rows) -> str:
    """Returns what is moved on a mesh, on each device."""
    splits = list(dict.fromkeys(key[5] for key in rows if len(key) == 6))
    head = ["state", *(f"{x} split: bytes; sent" for x in splits)]
    lines = []
    for arm in MESH_ARMS:
        cells = []
        for split in splits:
            found = {
                f"{shown(row, 'hbm')}; {sent(row)}"
                for key, row in rows.items()
                if key[3:4] == (arm,) and key[5:] == (split,)
            }
            cells.append(" or ".join(sorted(found)))
        lines.append([arm, *cells])
    return table(head, lines)


def sent(row: Row) -> str:
    """Returns the collectives of a row."""
    found = row.get("collectives", {}).items()
    return ", ".join(f"{name} of {n / 1024:.0f} KiB" for name, n in found) or "nothing"


def tables(folder: Path) -> list[str]:
    """Returns the tables in Markdown."""
    rows = read(folder)
    counted = every(folder, "instructions.jsonl", "instructions")
    times = every(folder, "results.jsonl", "compile")
    made = [one_matrix(rows, counted), many_leaves(rows), meshes(rows)]
    return [*made, *([compile_times(times)] if times else []), wrapped(rows)]
