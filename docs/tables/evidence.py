"""The tables of a study in docs/evidence.md.

Differences of losses are in per cent of the baseline's mean loss; those of errors are
in points of the error.
"""

import json
from pathlib import Path
from typing import Any

from studies.study.markdown import table
from studies.study.statistics import compare

Row = dict[str, Any]


def tables(folder: Path) -> list[str]:
    """Returns all tables of a study's record; the primary comparison first."""
    found = json.loads((folder / "results.json").read_text(encoding="utf-8"))
    parts = [every_arm(found)]
    if found["primary"]:
        parts = [primary(found), *parts, by_class(found), fewer(found)]
        parts += [edges(found), by_eps(found), by_lam(found)]
    if found.get("class_means"):
        parts.append(without_training(found))
    return [part for part in parts if part]


def shown(row: Row, base: float, digits: int = 2) -> str:
    """Returns a difference in per cent of a base, its interval, p and the verdict."""
    middle, low, high = (
        f"{100 * x / base:+.{digits}f}" for x in (row["difference"], *row["interval"])
    )
    verdict = row["verdict"].replace(", within the margin", ", within margin")
    text = f"{middle} ({low} to {high}), p {row['holm_p']:.1g}: {verdict}"
    strong = verdict in ("better", "worse")
    return f"**{text}**" if strong else text


def every_arm(found: Row) -> str:
    """Returns a row an arm, and a column a task."""
    rows = {(x["arm"], x["task"]): x for x in found["arms"]}
    arms = list(dict.fromkeys(arm for arm, _ in rows))
    tasks = list(dict.fromkeys(task for _, task in rows))
    losses = {task: rows[found["baseline"], task]["final"] for task in tasks}

    def cell(arm: str, task: str) -> str:
        row = rows[arm, task]
        if "difference" in row:
            return shown(row, losses[task])
        is_base = row["verdict"] == "baseline"
        return f"loss {losses[task]:.4f}" if is_base else row["verdict"]

    cells = [[arm, *(cell(arm, task) for task in tasks)] for arm in arms]
    return table(["minus AdamW's loss, %", *tasks], cells)


def primary(found: Row) -> str:
    """Returns the comparison that was fixed before the runs: loss, then error."""
    rows = {(x["metric"], x["task"]): x for x in found["primary"]}
    arm = found["primary_arm"]
    head = ["task", "AdamW's loss", f"{arm} minus it, %"]
    classifies = any("difference" in x for x in rows.values() if x["metric"] == "error")
    if classifies:
        head += ["AdamW's error", f"{arm} minus it, points"]
    cells = []
    for task in dict.fromkeys(x["task"] for x in found["primary"]):
        loss, error = rows["loss", task], rows["error", task]
        line = [task, f"{loss['baseline']:.4f}", shown(loss, loss["baseline"])]
        if classifies:
            line += [f"{error['baseline']:.2%}", shown(error, 1.0)]
        cells.append(line)
    return table(head, cells)


def by_class(found: Row) -> str | None:
    """Returns errors of rare and of frequent classes; None where there are none."""
    rows = {(x["arm"], x["task"]): x for x in found["arms"]}
    arm, head, cells = found["primary_arm"], ["task"], []
    for name in ("rare", "frequent"):
        head += [f"{name}: AdamW's error", f"{arm} minus it, points (95%)"]
    for task in dict.fromkeys(task for _, task in rows):
        base, mine = rows[found["baseline"], task], rows[arm, task]
        if "error_rare" not in base:
            return None
        line = [task]
        for name in ("error_rare", "error_frequent"):
            measured = mine["metrics"][name]
            middle, low, high = (
                f"{100 * x:+.2f}"
                for x in (measured["difference"], *measured["interval"])
            )
            line += [f"{base[name]:.2%}", f"{middle} ({low} to {high})"]
        cells.append(line)
    return table(head, cells)


def fewer(found: Row) -> str:
    """Returns what fewer settings would have found for the primary arm."""
    of_arm = {(x["arm"], x["task"]): x for x in found["effort"]}
    arm, cells, counts = found["primary_arm"], [], list(found["effort"][0]["best_of"])
    for task in dict.fromkeys(x["task"] for x in found["effort"]):
        base, mine = of_arm[found["baseline"], task], of_arm[arm, task]
        ratios = [mine["best_of"][x] / base["best_of"][x] - 1 for x in counts]
        ends = f"{mine['better']:.0%}", f"{mine['median']:+.1%}"
        cells.append([task, *(f"{x:+.1%}" for x in ratios), *ends])
    head = ["task", *(f"best of {x}" for x in counts)]
    return table([*head, "settings that are better", "median difference"], cells)


def edges(found: Row) -> str:
    """Returns the numbers of best settings in an outer tenth of their range."""
    chosen = found["baseline"], found["primary_arm"]
    rows = {(x["arm"], x["task"]): x for x in found["arms"]}

    def cell(row: Row) -> str:
        numbers = (
            f"{x} {row['h'][x]:.3g} ({row['positions'][x]:.0%})" for x in row["edges"]
        )
        return ", ".join(numbers) or "none"

    tasks = dict.fromkeys(task for _, task in rows)
    cells = [[task, *(cell(rows[arm, task]) for arm in chosen)] for task in tasks]
    return table(["numbers at an edge", *chosen], cells)


def by_eps(found: Row) -> str:
    """Returns the best losses in tuning with a small and with a large eps."""
    arms = "AdamW", found["primary_arm"]
    rows = {(x["arm"], x["task"]): x["by_eps"] for x in found["effort"]}
    ends = {"small": "eps below 1e-5", "large": "eps above 1e-4"}
    head = [f"{arm}, {text}" for arm in arms for text in ends.values()]
    cells = [
        [
            task,
            *(
                f"{rows[arm, task][end]:.4f}"
                for arm in (found["baseline"], found["primary_arm"])
                for end in ends
            ),
        ]
        for task in dict.fromkeys(task for _, task in rows)
    ]
    return table(["best loss in tuning", *head], cells)


def by_lam(found: Row) -> str | None:
    """Returns what lam does where all else is AdamW's; None without such a sweep."""
    swept = found["sweeps"]["lam"]
    losses = {(x["task"], x["value"]): x["losses"] for x in swept}
    values = [x for x in dict.fromkeys(x["value"] for x in swept) if x]
    if not values:
        return None

    def cell(task: str, value: float) -> str:
        none = losses[task, 0.0]
        found = compare(losses[task, value], none, margin=0.0)
        scale = 100 * len(none) / sum(none)
        middle, low, high = (scale * x for x in (found.difference, *found.interval))
        return f"{middle:+.2f} ({low:+.2f} to {high:+.2f})"

    tasks = dict.fromkeys(x["task"] for x in swept)
    cells = [[task, *(cell(task, x) for x in values)] for task in tasks]
    return table(["minus the loss of lam 0, %", *(f"lam {x:g}" for x in values)], cells)


def without_training(found: Row) -> str:
    """Returns class means beside AdamW and the best arm that was trained."""
    cells = []
    for task, means in found["class_means"].items():
        trained = [x for x in found["arms"] if x["task"] == task]
        base = next(x for x in trained if x["arm"] == found["baseline"])
        best = min(trained, key=lambda x: x["final"])
        loss, error = (sum(means[x]) / len(means[x]) for x in ("loss", "error"))
        cells.append(
            [
                task,
                f"{loss:.4f}",
                f"{base['final']:.4f}",
                f"{best['final']:.4f} ({best['arm']})",
                f"{error:.2%}",
                f"{base['error']:.2%}",
                f"{best['error']:.2%}",
            ]
        )
    head = ["task", "class means: loss", "AdamW", "best trained arm"]
    return table([*head, "class means: error", "AdamW", "best trained arm"], cells)
