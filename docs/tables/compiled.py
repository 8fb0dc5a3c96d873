"""Tables and the figure of a record of benchmarks/compiled.py.

Some records have the instructions in a file of their own.
"""

import statistics
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure

from benchmarks import common
from studies.study.markdown import table

DEVICES = {"v5e": "TPU v5e", "h100": "H100"}
CUBIC = "adam3 cubic, "
FORMS = tuple(f"adam3 {form}, " for form in common.FORMS if form)
FEW = (common.BASELINE, *(CUBIC + name for name in common.SETTINGS))
Row = dict[str, Any]
Rows = dict[tuple[str, ...], Row]


def read(folder: Path) -> Rows:
    """Returns the last row of each cell off the mesh: by device, type, tree and arm."""
    keys = ("device", "dtype", "tree", "arm")
    rows = [x for x in common.read(folder, "compiled") if "split" not in x]
    found = {tuple(row[key] for key in keys): row for row in rows}
    for row in common.read(folder, "instructions"):
        cell = row["device"], "float32", "one", row["arm"]
        found.setdefault(cell, {})["instructions"] = row["instructions"]
    for row in common.read(folder, "compile"):
        cell = row["device"], "float32", "gpt2", row["arm"]
        found[cell]["compile_cpu_seconds"] = statistics.median(row["seconds"])
    return found


def shown(row: Row | None, field: str, digits: int = 1) -> str:
    """Returns a number of a row; a dash where it was not compiled."""
    found = None if row is None else row.get(field)
    return "-" if found is None else f"{found:.{digits}f}"


def of_forms(rows: Rows, device: str, arm: str, field: str, digits: int = 1) -> str:
    """Returns a number; of an arm of the cubic form, those of the other forms, too."""
    names = [arm.replace(CUBIC, form) for form in FORMS] if CUBIC in arm else [arm]
    found = [rows.get((device, "float32", "one", name), {}) for name in names]
    numbers = sorted({round(x[field], digits) for x in found if field in x})
    ends = dict.fromkeys(f"{x:.{digits}f}" for x in (*numbers[:1], *numbers[-1:]))
    return " to ".join(ends) or "-"


def names_of(rows: Rows) -> list[str]:
    """Returns the arms of one matrix; of the forms with a third moment the first."""
    arms = dict.fromkeys(x[3] for x in rows if x[1:3] == ("float32", "one"))
    return [x for x in arms if x.startswith(CUBIC) or not x.startswith(FORMS)]


def title(arm: str) -> str:
    """Returns the name of an arm, in which "cubic" stands for all forms."""
    return arm.replace("adam3 cubic", "adam3")


def one_matrix(rows: Rows) -> str:
    """Returns the bytes and the instructions of a step on one matrix."""
    head = ["optimizer and state", *(f"{x}: bytes" for x in DEVICES.values())]
    head += ["least possible, without padding", "temporary"]
    head += ["H100: instructions", "A100: instructions"]
    lines = []
    for arm in names_of(rows):
        cells = [of_forms(rows, x, arm, "hbm") for x in DEVICES]
        for field in ("floor", "temporary"):
            found = [of_forms(rows, x, arm, field) for x in DEVICES]
            cells.append("; ".join(dict.fromkeys(x for x in found if x != "-")))
        cells += [of_forms(rows, x, arm, "instructions", 0) for x in ("h100", "a100")]
        lines.append([title(arm), *cells])
    return table(head, lines)


def many_leaves(rows: Rows) -> str:
    """Returns bytes, kernels and compile times on the tree of GPT-2 small."""
    head = ["optimizer and state"]
    for name in DEVICES.values():
        head += [f"{name}: bytes", "kernels"]
    lines = []
    for arm in FEW:
        line = [arm]
        for device in DEVICES:
            row = rows.get((device, "float32", "gpt2", arm))
            line += [shown(row, "hbm"), shown(row, "kernels", 0)]
        row = rows.get(("h100", "float32", "gpt2", arm))
        lines.append([*line, shown(row, "compile_cpu_seconds")])
    return table([*head, "H100: CPU seconds to compile"], lines)


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


def tables(folder: Path) -> list[str]:
    """Returns the tables in Markdown."""
    rows = read(folder)
    made = [one_matrix(rows)]
    if any(key[2] == "gpt2" for key in rows):  # not of other packages alone
        made += [many_leaves(rows), wrapped(rows)]
    return made


def draw(folder: Path) -> None:
    """Draws the bytes of a step on one matrix, beside the least possible."""
    rows, largest = read(folder), 60
    names = names_of(rows)
    figure = Figure(figsize=(8, 1 + 0.34 * len(names)), dpi=120, layout="constrained")
    panel = figure.subplots()
    for shift, device in zip((-0.19, 0.19), DEVICES, strict=True):
        found = [rows.get((device, "float32", "one", arm), {}) for arm in names]
        places = [i + shift for i in range(len(names))]
        widths = [min(x.get("hbm", 0), largest) for x in found]
        panel.barh(places, widths, 0.36, label=DEVICES[device])
        for y, row in zip(places, found, strict=True):
            if row.get("hbm", 0) > largest:
                text = f"goes on to {row['hbm']:.0f} "
                style = {"ha": "right", "va": "center", "size": "small", "color": "w"}
                panel.text(largest, y, text, **style)
            if "floor" in row:
                panel.plot([row["floor"]] * 2, [y - 0.19, y + 0.19], "k-", lw=2)
    panel.plot([], [], "k-", lw=2, label="least possible")
    panel.axvline(28, c="0.6", lw=1, zorder=0)
    panel.set_yticks(range(len(names)), map(title, names))
    panel.set_ylim(len(names) - 0.5, -0.5)
    panel.set_xlim(0, largest)
    panel.set_xlabel("bytes a parameter and step (grey line: optax.adam)")
    panel.spines[["top", "right"]].set_visible(False)
    figure.legend(loc="outside lower center", ncols=3, frameon=False)
    figure.savefig(folder / "bytes.png")
