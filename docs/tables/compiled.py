"""The tables of docs/speed.md and low_precision.md, from a record of compiled.py."""

from pathlib import Path

from benchmarks import common
from benchmarks.compiled_record import DEVICES, Row, Rows, arms, read
from studies.study.markdown import table

TREES = {
    "one": "one matrix of 16,384²",
    "gpt2": "GPT-2 small, 148 leaves",
    "small": "300 leaves of 1,024",
}
MESH_ARMS = (
    common.BASELINE,
    *(f"adam3 cubic, {name}" for name in common.SETTINGS),
)


def shown(row: Row | None, field: str, digits: int = 1) -> str:
    """Returns a number of a row; a dash where it was not compiled."""
    found = None if row is None else row.get(field)
    return "-" if found is None else f"{found:.{digits}f}"


def one_matrix(rows: Rows) -> str:
    """Returns the bytes of a step on one matrix."""
    head = ["optimizer and state", *(f"{x}: bytes" for x in DEVICES.values())]
    head += ["least possible, without padding", "against `optax.adam`", "temporary"]
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
        ends = "; ".join(sorted(ratios)), "; ".join(sorted(temporary))
        lines.append([arm, *cells, floor, *ends])
    return table(head, lines)


def trees(rows: Rows) -> str:
    """Returns bytes, kernels and compile times on trees of many leaves."""
    head = ["device, parameters, tree", "optimizer and state", "bytes"]
    head += [
        "least possible, without padding",
        "kernels",
        "temporary",
        "compiling, against Adam's",
    ]
    lines = []
    for device, title in DEVICES.items():
        for dtype in common.DTYPES:
            for tree, name in TREES.items():
                for arm in MESH_ARMS:
                    row = rows.get((device, dtype, tree, arm))
                    if row is None or (dtype, tree) == ("float32", "one"):
                        continue
                    where = f"{title}, {dtype}, {name}" * (arm == MESH_ARMS[0])
                    lines.append(
                        [
                            where,
                            arm,
                            shown(row, "hbm"),
                            shown(row, "floor"),
                            shown(row, "kernels", 0),
                            shown(row, "temporary"),
                            shown(row, "compile_ratio"),
                        ]
                    )
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
    return [one_matrix(rows), trees(rows), meshes(rows), wrapped(rows)]
