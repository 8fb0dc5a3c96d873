"""Tables and the figure of a record of times: of benchmarks/step.py.

Also of the record of 2026-11-27, of an older script: of it one matrix alone.
"""

from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from benchmarks import common
from docs.tables import parts
from studies.study import markdown

OURS = r"^adam3w? (?P<form>\w+), (?P<setting>.*)"
BASELINES = ("optax.adamw", "optax.adam")  # the second in the older record
FIELDS = ("tree", "arm", "leaves", "parameters", "ratio", "state", "temporary")


def read(folder: Path) -> pd.DataFrame:
    """Returns what was measured with float32 parameters, by tree and optimizer."""
    rows = common.read(folder, "step")
    rows = [x for x in rows if x.get("dtype", "float32") == "float32"]
    found = parts.last(rows, "tree", "arm")
    times = found[["arm", "ratio", "seconds"]].itertuples(index=False)
    every = found.reindex(columns=FIELDS).assign(time=[spread(*x) for x in times])
    return every.join(every["arm"].str.extract(OURS))


def spread(arm: str, ratio: list[float], seconds: list[float]) -> str:
    """Returns a ratio with its quartiles."""
    low, middle, high = ratio
    if arm in BASELINES and low == high == 1:
        return f"1 = {duration(float(np.median(seconds)))}"
    return parts.between(middle, low, high, ".2f" if middle < 9.5 else ".0f")


def duration(seconds: float) -> str:
    """Returns a time with its unit."""
    scale, unit = (1e3, "ms") if seconds >= 1e-3 else (1e6, "µs")
    return f"{seconds * scale:.3g} {unit}"


def by_form(one: pd.DataFrame) -> str:
    """Returns the ratios of AdaM3: a row a state, a column a form."""
    base = BASELINES[0] in set(one["arm"][one["state"].notna()])
    ours = one.dropna(subset="form")
    cells = ours.pivot(index="setting", columns="form", values="time")
    cells = cells.reindex(index=common.SETTINGS, columns=ours["form"].unique())
    first = f"time against `{BASELINES[0 if base else 1]}`'s"
    return parts.table(first, cells.dropna(how="all"))


def others(rows: pd.DataFrame) -> str:
    """Returns time and memory of optimizers."""
    memory = {"state": "state", "temporary": "temporary memory"}
    cells = rows.set_index("arm")[["time", *memory]].rename(columns=memory)
    cells[[*memory.values()]] = cells[[*memory.values()]].map(parts.number)
    return parts.table("optimizer", cells)


def many_leaves(rows: pd.DataFrame) -> str:
    """Returns the ratios on trees of many leaves."""
    sizes = zip(rows["leaves"], rows["parameters"], strict=True)
    rows = rows.assign(head=[f"{n} leaves, {x / 1e6:.3g} M" for n, x in sizes])
    cells = rows.pivot(index="arm", columns="head", values="time")
    order = {"index": rows["arm"].unique(), "columns": rows["head"].unique()}
    return parts.table("optimizer", cells.reindex(**order))


def host(rows: list[dict[str, Any]]) -> str:
    """Returns what a call costs, and what a step inside a program takes."""
    head = ["leaves", "optimizer", "buffers", "call of an empty program", "a buffer"]
    head += ["call of a step", "a step inside one program"]
    lines = []
    for row in rows:
        each = f"{row['empty'] / row['buffers'] * 1e6:.1f} µs"
        empty, step, inside = (duration(row[x]) for x in ("empty", "step", "inside"))
        line = [str(row["leaves"]), row["arm"], str(row["buffers"])]
        lines.append([*line, empty, each, step, inside])
    return markdown.table(head, lines)


def tables(folder: Path) -> list[str]:
    """Returns the tables in Markdown, those for which something was measured."""
    every = read(folder)
    one, many = every[every["tree"] == "one"], every[every["tree"] != "one"]
    made, rest = [], one.dropna(subset="state")
    if one["form"].nunique() > 1:
        made.append(by_form(one))
        rest = rest[rest["form"].isna()]
    if len(rest):
        made.append(others(rest))
    if rows := [x for x in common.read(folder, "host") if x["leaves"] > 1]:
        made += [many_leaves(many), host(rows)]
    return made


def draw(folder: Path) -> None:
    """Draws the ratios on one matrix, with quartiles."""
    rows = read(folder).query("tree == 'one'").dropna(subset="state")
    if rows.empty:  # the older record
        return
    figure, panel = parts.panel_of(rows["arm"], 0.25)
    low, middle, high = np.array([*rows["ratio"]]).T
    ends = (middle - low, high - middle)
    panel.errorbar(middle, range(len(rows)), xerr=ends, fmt="o", ms=4)
    panel.axvline(1, c="0.6", lw=1, zorder=0)
    panel.set_xscale("log")
    ticks = [x for x in (0.5, 1, 2, 5, 10, 20, 50, 100) if x <= 2 * high.max()]
    panel.set_xticks(ticks, [f"{x:g}" for x in ticks], minor=False)
    panel.set_xticks([], minor=True)
    panel.grid(axis="x", c="0.9")
    panel.invert_yaxis()
    panel.set_xlabel("time of a step / optax.adamw's (line: quartiles)")
    figure.savefig(folder / "times.png")
