"""The tables of a study in docs/evidence.md, from its results.json.

Differences are those of the primary arm to AdamW, with the 95% interval: of losses in
per cent of AdamW's mean, of errors in points.
"""

import json
from pathlib import Path
from typing import Any

from studies.study.markdown import table

Row = dict[str, Any]
GROUPS = ("rare", "frequent")


def tables(folder: Path) -> list[str]:
    """Returns the tables of a study's record; the primary comparison first."""
    found = json.loads((folder / "results.json").read_text(encoding="utf-8"))
    losses = [x for x in found["primary"] if x["metric"] == "loss"]
    cells = [(x["task"], shown(x, x["baseline"]), mark(x)) for x in losses]
    parts = [table(("task", "difference in loss, %", "verdict"), cells)]
    arms = [x for x in found["arms"] if x["arm"] == found["primary_arm"]]
    if "error_rare" in arms[0]:
        head = ("task", *(f"{x} classes, points" for x in GROUPS))
        parts.append(table(head, [by_class(x) for x in arms]))
    return parts


def shown(row: Row, unit: float = 1.0) -> str:
    """Returns a difference in hundredths of a unit, with its interval."""
    numbers = (100 * x / unit for x in (row["difference"], *row["interval"]))
    return "{:+.2f} ({:+.2f} to {:+.2f})".format(*numbers)


def mark(row: Row) -> str:
    """Returns what a comparison says in one word; "same" is within the margin."""
    if row["verdict"] in ("better", "worse"):
        return f"**{row['verdict']}**"
    return "unclear" if row["verdict"] == "undecided" else "same"


def by_class(row: Row) -> tuple[str, ...]:
    """Returns differences in the error of rare and of frequent classes."""
    metrics = (row["metrics"][f"error_{x}"] for x in GROUPS)
    return row["task"], *(shown(x) for x in metrics)
