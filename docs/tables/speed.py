"""Tables and the figure of a record of times: of benchmarks/step.py.

Also of the record of 2026-11-27, of an older script: of it one matrix alone.
"""

import re
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.figure import Figure

from benchmarks import common
from studies.study.markdown import table

OURS = re.compile(r"adam3w? (\w+), (.*)")
BASELINES = ("optax.adamw", "optax.adam")  # the second in the older record
Row = dict[str, Any]


def by_tree(folder: Path) -> dict[str, dict[str, Row]]:
    """Returns the last row of each cell with float32 parameters, by tree and arm."""
    trees: dict[str, dict[str, Row]] = {}
    for row in common.read(folder, "step"):
        if row.get("dtype", "float32") == "float32":
            trees.setdefault(row["tree"], {})[row["arm"]] = row
    return trees


def spread(row: Row | None) -> str:
    """Returns a ratio with its quartiles."""
    if row is None:
        return "-"
    low, middle, high = row["ratio"]
    if row["arm"] in BASELINES and low == high == 1:
        return f"1 = {duration(float(np.median(row['seconds'])))}"
    digits = 2 if middle < 9.5 else 0
    return f"{middle:.{digits}f} ({low:.{digits}f} to {high:.{digits}f})"


def duration(seconds: float) -> str:
    """Returns a time with its unit."""
    scale, unit = (1e3, "ms") if seconds >= 1e-3 else (1e6, "µs")
    return f"{seconds * scale:.3g} {unit}"


def by_form(arms: dict[str, Row]) -> str | None:
    """Returns the ratios of AdaM3: a row a state, a column a form."""
    found = [x for x in map(OURS.match, arms) if x]
    forms = dict.fromkeys(x[1] for x in found)
    if len(forms) < 2:
        return None
    every = {(x[1], x[2]): arms[x[0]] for x in found}
    lines = [
        [state, *(spread(every.get((form, state))) for form in forms)]
        for state in common.SETTINGS
        if any((form, state) in every for form in forms)
    ]
    return table([f"time against {base_of(arms)}", *forms], lines)


def base_of(arms: dict[str, Row]) -> str:
    """Returns what the ratios are to."""
    base = BASELINES[0] if "state" in arms.get(BASELINES[0], {}) else BASELINES[1]
    return f"`{base}`'s"


def others(arms: dict[str, Row], shown: bool) -> str:
    """Returns the other optimizers, with AdaM3 if no table before has `shown` it."""
    head = ["optimizer", "time", "state", "temporary memory"]
    lines = [
        [arm, spread(row), of_bytes(row, "state"), of_bytes(row, "temporary")]
        for arm, row in arms.items()
        if "state" in row and not (shown and OURS.match(arm))
    ]
    return table(head, lines) if lines else ""


def of_bytes(row: Row, field: str) -> str:
    """Returns bytes a parameter."""
    return f"{row[field]:.1f}" if field in row else "-"


def many_leaves(trees: dict[str, dict[str, Row]]) -> str:
    """Returns the ratios on trees of many leaves."""
    every = {x: y for x, y in trees.items() if x != "one"}
    arms = dict.fromkeys(arm for found in every.values() for arm in found)
    heads = []
    for found in every.values():
        row = next(iter(found.values()))
        heads.append(f"{row['leaves']} leaves, {row['parameters'] / 1e6:.3g} M")
    lines = [[arm, *(spread(x.get(arm)) for x in every.values())] for arm in arms]
    return table(["optimizer", *heads], lines)


def host(rows: list[Row]) -> str:
    """Returns what a call costs, and what a step inside a program takes."""
    head = ["leaves", "optimizer", "buffers", "call of an empty program", "a buffer"]
    head += ["call of a step", "a step inside one program"]
    lines = []
    for row in rows:
        each = f"{row['empty'] / row['buffers'] * 1e6:.1f} µs"
        line = [str(row["leaves"]), row["arm"], str(row["buffers"])]
        line += [duration(row["empty"]), each, duration(row["step"])]
        lines.append([*line, duration(row["inside"])])
    return table(head, lines)


def tables(folder: Path) -> list[str]:
    """Returns the tables in Markdown, those for which something was measured."""
    trees = by_tree(folder)
    one = trees.get("one", {})
    forms = by_form(one)
    made = [forms, others(one, shown=forms is not None)]
    if rows := [x for x in common.read(folder, "host") if x["leaves"] > 1]:
        made += [many_leaves(trees), host(rows)]
    return [x for x in made if x]


def draw(folder: Path) -> None:
    """Draws the ratios on one matrix, with quartiles."""
    rows = [x for x in by_tree(folder)["one"].values() if "state" in x]
    if not rows:  # the older record
        return
    figure = Figure(figsize=(8, 1 + 0.25 * len(rows)), dpi=120, layout="constrained")
    panel = figure.subplots()
    low, middle, high = np.array([x["ratio"] for x in rows]).T
    places = range(len(rows))
    panel.errorbar(middle, places, xerr=(middle - low, high - middle), fmt="o", ms=4)
    panel.axvline(1, c="0.6", lw=1, zorder=0)
    panel.set_xscale("log")
    ticks = [x for x in (0.5, 1, 2, 5, 10, 20, 50, 100) if x <= 2 * high.max()]
    panel.set_xticks(ticks, [f"{x:g}" for x in ticks], minor=False)
    panel.set_xticks([], minor=True)
    panel.grid(axis="x", c="0.9")
    panel.set_yticks(places, [x["arm"] for x in rows])
    panel.invert_yaxis()
    panel.set_xlabel("time of a step / optax.adamw's (line: quartiles)")
    panel.spines[["top", "right"]].set_visible(False)
    figure.savefig(folder / "times.png")
