"""The tables of a study in docs/evidence.md, from its results.json.

Differences are those of the primary arm to AdamW, with the 95% interval: of losses in
per cent of AdamW's mean, of errors in points.
"""

import json
from pathlib import Path
from typing import Any

from docs.tables import parts
from studies.study.markdown import table

MARKS = {"better": "**better**", "worse": "**worse**", "undecided": "unclear"}


def tables(folder: Path) -> list[str]:
    """Returns the tables of a study's record; the primary comparison first."""
    found = json.loads((folder / "results.json").read_text(encoding="utf-8"))
    losses = [x for x in found["primary"] if x["metric"] == "loss"]
    marks = [MARKS.get(x["verdict"], "same") for x in losses]  # within the margin
    named = zip(losses, marks, strict=True)
    rows = [[x["task"], shown(x, x["baseline"]), mark] for x, mark in named]
    made = [table(["task", "difference in loss, %", "verdict"], rows)]
    arms = [x for x in found["arms"] if x["arm"] == found["primary_arm"]]
    if "error_rare" in arms[0]:
        head = ["task", "rare classes, points", "frequent classes, points"]
        errors = ("error_rare", "error_frequent")
        rows = [[x["task"], *(shown(x["metrics"][y]) for y in errors)] for x in arms]
        made.append(table(head, rows))
    return made


def shown(row: dict[str, Any], unit: float = 1.0) -> str:
    """Returns a difference in hundredths of a unit, with its interval."""
    numbers = (100 * x / unit for x in (row["difference"], *row["interval"]))
    return parts.between(*numbers, "+.2f")
