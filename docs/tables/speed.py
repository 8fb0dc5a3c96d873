"""Tables and the figure of a record of benchmarks/step.py, or of an older script."""

from pathlib import Path

import numpy as np
import pandas as pd

from benchmarks import common
from docs.tables import parts

OURS = r"^adam3w? (?P<form>\w+), (?P<setting>.*)"
BASELINES = ("optax.adam", "optax.adamw")  # the first in the older record
OMITTED = {"dtype": "float32", "state": None, "temporary": None}  # by some records


def read(folder: Path) -> pd.DataFrame:
    """Returns what was measured with float32 parameters, by tree and optimizer."""
    rows = pd.DataFrame([OMITTED | x for x in common.read(folder, "step")])
    cells = rows[rows["dtype"] == "float32"].groupby(["tree", "arm"], sort=False)
    found = cells.last().reset_index()
    times = found.apply(spread, axis="columns")
    return found.assign(time=times).join(found["arm"].str.extract(OURS))


def spread(row: pd.Series) -> str:
    """Returns a ratio with its quartiles."""
    low, middle, high = row["ratio"]
    if row["arm"] in BASELINES and low == high == 1:
        return f"1 = {duration(float(np.median(row['seconds'])))}"
    return parts.between(middle, low, high, ".2f" if middle < 9.5 else ".0f")


def duration(seconds: float) -> str:
    scale, unit = (1e3, "ms") if seconds >= 1e-3 else (1e6, "µs")
    return f"{seconds * scale:.3g} {unit}"


def host(rows: pd.DataFrame) -> str:
    """Returns what a call costs, and what a step inside a program takes."""
    head = ["optimizer", "buffers", "call of an empty program", "a buffer"]
    head += ["call of a step", "a step inside one program"]
    each = (rows["empty"] / rows["buffers"] * 1e6).map("{:.1f} µs".format)
    times = [rows[x].map(duration) for x in ("empty", "step", "inside")]
    columns = [rows["arm"], rows["buffers"].map(str), times[0], each, *times[1:]]
    cells = pd.concat(columns, axis="columns", keys=head)
    return parts.table("leaves", cells.set_index(rows["leaves"].map(str)))


def tables(folder: Path) -> list[str]:
    """Returns the tables in Markdown, those for which something was measured."""
    every, made = read(folder), []
    one, many = every[every["tree"] == "one"], every[every["tree"] != "one"]
    others = one.dropna(subset="state")
    if one["form"].nunique() > 1:
        base = BASELINES[0 if others.empty else 1]
        moments = one[one["form"] != "None"]  # which stands beside other packages
        cells = moments.pivot_table("time", "setting", "form", "first", sort=False)
        cells = cells.reindex([x for x in common.SETTINGS if x in cells.index])
        made.append(parts.table(f"time against `{base}`'s", cells))
    elif len(others):
        cells = others.set_index("arm")[["time", "state", "temporary"]]
        cells = cells.rename(columns={"temporary": "temporary memory"})
        made.append(parts.table("optimizer", cells))
    if rows := [x for x in common.read(folder, "host") if x["leaves"] > 1]:
        millions = (many["parameters"] / 1e6).map("{:.3g} M".format)
        many = many.assign(size=many["leaves"].map("{} leaves, ".format) + millions)
        cells = many.pivot_table("time", "arm", "size", "first", sort=False)
        made += [parts.table("optimizer", cells), host(pd.DataFrame(rows))]
    return made


def draw(folder: Path) -> None:
    """Draws the ratios on one matrix, with quartiles."""
    rows = read(folder).query("tree == 'one'").dropna(subset="state")
    if rows.empty:  # the older record
        return
    figure, panel = parts.panel_of(rows["arm"], height=0.25, base=1)
    low, middle, high = np.array([*rows["ratio"]]).T
    ends = (middle - low, high - middle)
    panel.errorbar(middle, range(len(rows)), xerr=ends, fmt="o", ms=4)
    label = "time of a step / optax.adamw's (line: quartiles)"
    panel.set(xscale="log", xlabel=label)
    ticks = [x for x in (0.5, 1, 2, 5, 10, 20, 50, 100) if x <= 2 * high.max()]
    panel.set_xticks(ticks, map("{:g}".format, ticks))
    panel.minorticks_off()
    panel.grid(axis="x", c="0.9")
    panel.invert_yaxis()
    figure.savefig(folder / "times.png")
