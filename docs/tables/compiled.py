"""The tables and the figure of the documentation, from a record of compiled.py.

python benchmarks/compiled_table.py benchmarks/records/2026-11-25_compiled
"""

import argparse
import sys
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure

sys.path.insert(0, str(Path(__file__).parent))
import common
from study import report

DEVICES = {"v5e": "TPU v5e", "h100": "H100"}
TREES = {
    "one": "one matrix of 16,384²",
    "gpt2": "GPT-2 small, 148 leaves",
    "small": "300 leaves of 1,024",
}
MESH_ARMS = (
    common.BASELINE,
    *(f"adam3 cubic, {name}" for name in common.SETTINGS),
)

Row = dict[str, Any]
Rows = dict[tuple[str, ...], Row]


def read(folder: Path) -> Rows:
    """Returns the last row of each cell: by device, types, tree and optimizer.

    On a mesh also by the kind of axes and by what is split.
    """
    rows = common.read(folder / "results.jsonl")
    keys = ("device", "dtype", "tree", "arm", "axes", "split")
    return {
        tuple(row[key] for key in keys if key in row): row
        for row in rows
        if row["measure"] == "compiled"
    }


def arms(rows: Rows) -> list[str]:
    """Returns the optimizers in the order of the record, without wrapped ones."""
    names = dict.fromkeys(key[3] for key in rows if len(key) == 4)
    return [name for name in names if " remainder over " not in name]


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
    return report.table(head, lines)


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
    return report.table(head, lines)


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
    return report.table(head, lines)


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
    return report.table(head, lines)


def sent(row: Row) -> str:
    """Returns the collectives of a row."""
    found = row.get("collectives", {}).items()
    return ", ".join(f"{name} of {n / 1024:.0f} KiB" for name, n in found) or "nothing"


def draw(rows: Rows, path: Path) -> None:
    """Draws the bytes of a step on one matrix, beside the least possible."""
    names = arms(rows)
    figure = Figure(figsize=(8, 1 + 0.34 * len(names)), dpi=120, layout="constrained")
    panel = figure.subplots()
    largest = 60
    for shift, (device, title), colour in zip(
        (-0.19, 0.19), DEVICES.items(), ("C0", "C1"), strict=True
    ):
        for i, arm in enumerate(names):
            row = rows.get((device, "float32", "one", arm))
            if row is None or "hbm" not in row:
                continue
            label = title if arm == common.BASELINE else None
            y = i + shift
            panel.barh(y, min(row["hbm"], largest), 0.36, color=colour, label=label)
            if row["hbm"] > largest:
                text = f"goes on to {row['hbm']:.0f} "
                style = {"ha": "right", "va": "center", "size": "small", "color": "w"}
                panel.text(largest, y, text, **style)
            least = "least possible" if label and device == "v5e" else None
            panel.plot(
                [row["floor"]] * 2, [y - 0.19, y + 0.19], "k-", lw=2, label=least
            )
    panel.axvline(28, c="0.6", lw=1, zorder=0)
    panel.set_yticks(range(len(names)), names)
    panel.set_ylim(len(names) - 0.5, -0.5)
    panel.set_xlim(0, largest)
    panel.set_xlabel("bytes a parameter and step (grey line: optax.adam)")
    panel.spines[["top", "right"]].set_visible(False)
    figure.legend(loc="outside lower center", ncols=3, frameon=False)
    figure.savefig(path)


def main() -> None:
    """Prints the tables of a record, and draws its figure."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path, help="where results.jsonl is")
    folder = parser.parse_args().folder
    rows = read(folder)
    tables = one_matrix(rows), trees(rows), meshes(rows), wrapped(rows)
    print("\n\n".join(tables))
    draw(rows, folder / "bytes.png")


if __name__ == "__main__":
    main()
