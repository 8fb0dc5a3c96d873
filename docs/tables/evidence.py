"""The tables of a study in docs/evidence.md, from its results.json.

Differences are those of the primary arm to AdamW, with the 95% interval: of losses in
per cent of AdamW's mean, of errors in points.
"""

import json
from pathlib import Path
from typing import Any

from docs.tables import parts
from studies.study.markdown import table

GROUPS = ("rare", "frequent")
MARKS = {"better": "**better**", "worse": "**worse**", "undecided": "unclear"}


def tables(folder: Path) -> list[str]:
    """Returns the tables of a study's record; the primary comparison first."""
    found = json.loads((folder / "results.json").read_text(encoding="utf-8"))
    losses = [x for x in found["primary"] if x["metric"] == "loss"]
    cells = [[x["task"], shown(x, x["baseline"]), mark(x["verdict"])] for x in losses]
    made = [table(("task", "difference in loss, %", "verdict"), cells)]
    arms = [x for x in found["arms"] if x["arm"] == found["primary_arm"]]
    if "error_rare" in arms[0]:
        head = ("task", *(f"{x} classes, points" for x in GROUPS))
        errors = [[x["metrics"][f"error_{group}"] for group in GROUPS] for x in arms]
        named = zip(arms, errors, strict=True)
        made.append(table(head, [[x["task"], *map(shown, each)] for x, each in named]))
    return made


def shown(row: dict[str, Any], unit: float = 1.0) -> str:
    """Returns a difference in hundredths of a unit, with its interval."""
    numbers = (100 * x / unit for x in (row["difference"], *row["interval"]))
    return parts.between(*numbers, "+.2f")


def mark(verdict: str) -> str:
    """Returns what a comparison says in one word; "same" is within the margin."""
    return MARKS.get(verdict, "same")
