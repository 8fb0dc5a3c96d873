"""The table of a study in docs/evidence.md.

Differences are in per cent of the baseline's mean loss.
"""

import json
from pathlib import Path
from typing import Any

from studies.study.markdown import table


def cell(row: dict[str, Any], base: float) -> str:
    """Returns an arm's difference, its interval, Holm's p and the verdict."""
    if "difference" not in row:
        return f"loss {base:.4f}" if row["verdict"] == "baseline" else row["verdict"]
    middle, low, high = (
        f"{100 * x / base:+.2f}" for x in (row["difference"], *row["interval"])
    )
    verdict = row["verdict"].replace(", within the margin", ", within margin")
    text = f"{middle} ({low} to {high}), p {row['holm_p']:.1g}: {verdict}"
    strong = verdict in ("better", "worse")
    return f"**{text}**" if strong else text


def tables(folder: Path) -> list[str]:
    """Returns the table in Markdown: a row an arm, a column a task."""
    found = json.loads((folder / "results.json").read_text(encoding="utf-8"))
    rows = {(x["arm"], x["task"]): x for x in found["arms"]}
    arms = list(dict.fromkeys(arm for arm, _ in rows))
    tasks = list(dict.fromkeys(task for _, task in rows))
    losses = {task: rows[found["baseline"], task]["final"] for task in tasks}
    cells = [[arm, *(cell(rows[arm, x], losses[x]) for x in tasks)] for arm in arms]
    return [table(["minus AdamW's loss, %", *tasks], cells)]
