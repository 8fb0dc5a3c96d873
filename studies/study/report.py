"""The report of a record: results.json, results.md for the reader, and a figure."""

import itertools
import json
import math
from collections.abc import Iterable
from functools import partial
from typing import Any

import numpy as np
import pandas as pd
from matplotlib.figure import Figure

from study import plan
from study import statistics as stats
from study.markdown import table
from study.plan import Study
from study.record import Record, Row, write_json

Found = dict[str, Any]
# Of held-out examples, beside the loss, where a task has them.
METRICS = ("error", "loss_rare", "error_rare", "loss_frequent", "error_frequent")
MEDIANS = ("ratio", "ratio_tail", "clipped")
IDENTICAL = 1e-6  # a median |b_t|/|m̂| below it is AdamW to rounding


def write(study: Study, record: Record, corpus: str) -> str:
    """Writes results.json, results.md and the figure, and returns results.md."""
    try:
        found = results(study, record, corpus)
    except KeyError:
        raise ValueError(f"{record.folder}: trainings are missing") from None
    text = page(found)
    write_json(record.folder / "results.json", found)
    (record.folder / "results.md").write_text(text, encoding="utf-8")
    finals_figure(found).savefig(record.folder / "finals.png", dpi=120)
    return text


def results(study: Study, record: Record, corpus: str) -> Found:
    """Returns everything that is shown; raises KeyError where trials are missing."""
    finals, swept = (
        [record.rows[study.key(x, corpus)] for x in phase(study, record, corpus)]
        for phase in (plan.final, plan.sweep)
    )
    cases = list(itertools.product(study.tasks, study.arms))
    tuned = {x: plan.tuned(study, record, corpus, *x) for x in cases}
    runs = {x: [row for row in finals if (row["task"], row["arm"]) == x] for x in cases}
    rows = []
    for case in cases:
        row = {"task": case[0], "arm": case[1], "rule": study.arms[case[1]]["rule"]}
        row |= tuned[case].shown() | _means(runs[case])
        if case[1] != study.baseline:
            row |= _against(runs[case], runs[case[0], study.baseline], study.margin)
        rows.append(row)
    _judge([x for x in rows if x["arm"] != study.baseline], study)
    for row in rows:
        row.setdefault("verdict", "baseline")
        # The median element may move as with AdamW, and a few others not.
        tiny = "difference" in row and (row["ratio"] or math.inf) < IDENTICAL
        if tiny and abs(row["difference"]) <= row["margin"]:
            row["verdict"] += " (identical to AdamW)"
    checks = record.folder / "checks.json"
    return {
        "baseline": study.baseline,
        "margin": study.margin,
        "alpha": study.alpha,
        "tuning_trials": study.tuning["trials"],
        "arms": rows,
        "effort": [_effort(*case, tuned[case]) for case in cases],
        "primary_arm": study.primary["arm"],
        "primary": _primary(rows, study),
        "sweeps": {"lam": _sweep(swept)},
        **(json.loads(checks.read_text("utf-8")) if checks.exists() else {}),
    }


def _means(runs: list[Row]) -> Row:
    """Returns means over the seeds, and medians over seeds and log points."""
    good = [x for x in runs if x["finite"]]
    row: Row = {"n": len(good), "diverged": len(runs) - len(good)}
    means = {x: x for x in ("final", "state_bytes")}
    means |= {"training": "training_loss", **{x: f"validation_{x}" for x in METRICS}}
    for name, column in means.items():
        values = [_last(x[column]) for x in good if column in x]
        if values and None not in values:
            row[name] = float(np.mean(values))
    for name in MEDIANS:
        values = [y for x in good for y in x.get(name, ()) if y is not None]
        row[name] = float(np.median(values)) if values else None
    return row


def _last(x: Any) -> Any:
    """Returns a number, or the last one of a curve."""
    return x[-1] if isinstance(x, list) else x


def _against(runs: list[Row], base: list[Row], margin: float) -> Row:
    """Returns an arm's comparison with the baseline, seed by seed."""
    pairs = [x for x in zip(runs, base, strict=True) if all(y["finite"] for y in x)]
    if len(pairs) < 2:
        return {}

    def compared(name: str) -> Row:
        ours, theirs = ([_last(x[i][name]) for x in pairs] for i in (0, 1))
        width = margin * float(np.mean(theirs))
        return {"margin": width, **stats.compare(ours, theirs, width)._asdict()}

    names = [x for x in METRICS if f"validation_{x}" in runs[0]]
    metrics = {x: compared(f"validation_{x}") for x in names}
    return compared("final") | {"metrics": metrics}


def _judge(rows: list[Row], study: Study) -> None:
    """Adds Holm's p over all rows (of diverged runs it is 1), and the verdicts."""
    for name in ("p", "p_equivalence"):
        adjusted = stats.holm([x.get(name, 1.0) for x in rows])
        for row, p in zip(rows, adjusted, strict=True):
            row[f"holm_{name}"] = p
    for row in rows:
        if row["diverged"]:
            row["verdict"] = f"{row['diverged']} of its runs diverged"
        else:
            p = row["holm_p"], row["holm_p_equivalence"]
            row["verdict"] = stats.verdict(row["difference"], *p, study.alpha)


def _primary(rows: list[Row], study: Study) -> list[Row]:
    """Returns the primary comparison, loss first; Holm's p are over the tasks."""
    bases = {x["task"]: x for x in rows if x["arm"] == study.baseline}
    mine = [x for x in rows if x["arm"] == study.primary["arm"]]
    found: list[Row] = []
    for metric, key in (("loss", "final"), ("error", "error")):
        of_metric = []
        for row in (x for x in mine if key in x):
            measured = row if metric == "loss" else row["metrics"][metric]
            names = (*stats.Comparison._fields, "margin")
            new = {x: measured[x] for x in names if x in measured}
            new |= {"task": row["task"], "metric": metric, "diverged": row["diverged"]}
            base = bases[row["task"]].get(key)
            of_metric.append(new | {"arm": row[key], "baseline": base})
        if of_metric:
            _judge(of_metric, study)
        found += of_metric
    return found


def _effort(task: str, arm: str, tuned: plan.Tuned) -> Row:
    """Returns what fewer settings would have found, and what a small or large eps."""
    losses, by_eps = tuned.losses, stats.best_by_eps(tuned.settings, tuned.losses)
    counts = [*(x for x in stats.COUNTS if x < len(losses)), len(losses)]
    best = {str(x): stats.best_of(losses, x) for x in counts}
    row: Row = {"task": task, "arm": arm, "by_eps": by_eps, "best_of": best}
    return row


def _sweep(rows: list[Row]) -> list[Row]:
    """Returns the final losses of each lam, and their difference to lam 0, relative."""
    losses: dict[tuple[str, float], list[float]] = {}
    for row in rows:
        losses.setdefault((row["task"], row["h"]["lam"]), []).append(row["final"])
    swept = []
    for (task, lam), mine in losses.items():
        both = np.array([mine, losses[task, 0.0]], float)
        found = stats.compare(*both / both[1].mean(), margin=0.0)
        row = {"task": task, "arm": "standardized", "value": lam, "losses": mine}
        swept.append(row | {x: getattr(found, x) for x in ("difference", "interval")})
    return swept


# Columns of the tables: names in the flattened rows, each with its format.
PRIMARY = """metric task arm:.4f baseline:.4f difference:+.4f interval:+.4f margin:.4f
    detectable:.4f holm_p:.2g verdict"""
ARMS = """task arm n tuning_diverged training:.4f error:.2% final:.4f difference:+.4f
    interval:+.4f bootstrap:+.4f detectable:.4f holm_p:.2g verdict ratio:.1e
    clipped:.2% state_bytes:.0f"""
BY_CLASS = """task arm loss_rare:.4f loss_frequent:.4f
    error_rare:.2% metrics.error_rare.difference:+.2% metrics.error_rare.interval:+.2%
    error_frequent:.2% metrics.error_frequent.difference:+.2%
    metrics.error_frequent.interval:+.2%"""
CLASS_MEANS = """task shrinkage:.4g variance:.4g loss:.4f error:.2% error_rare:.2%
    error_frequent:.2%"""
EFFORT = """task arm best_of.8:.4f best_of.16:.4f best_of.32:.4f best_of.64:.4f
    by_eps.small:.4f by_eps.large:.4f"""
EDGES = "task arm number value:.4g place:.0%"
SETTINGS = "task arm " + " ".join(f"h.{x}:.4g" for x in plan.COLUMNS)
SWEEP = "task value:.4g difference:+.2% interval:+.2%"


def shown(rows: Iterable[Row], columns: str) -> str:
    """Returns a table in Markdown; what no row has is left out."""
    frame = pd.json_normalize(list(rows))
    kept = [x.partition(":") for x in columns.split() if x.partition(":")[0] in frame]
    cells = [frame[x].map(partial(cell, form=form)) for x, _, form in kept]
    return table((x for x, *_ in kept), zip(*cells, strict=True))


def cell(x: Any, form: str) -> str:
    """Returns a number, or what else it is; nothing for what is missing."""
    if isinstance(x, list | tuple):
        return (" to " if form else ", ").join(cell(y, form) for y in x)
    return x if isinstance(x, str) else "" if pd.isna(x) else f"{x:{form}}"


def page(found: Found) -> str:
    """Returns results.md; what its columns are says studies/README.md."""
    arms = found["arms"]
    means = []
    for task, row in found.get("class_means", {}).items():
        names = [x for x in row if x.startswith(("loss", "error"))]
        means.append({"task": task, **row, **{x: np.mean(row[x]) for x in names}})
    edges = [
        row | {"number": x, "value": row["h"][x], "place": row["positions"][x]}
        for row in arms
        for x in row["edges"]
    ]
    compared = f"{found['primary_arm']} minus {found['baseline']}"
    sections: dict[str, tuple[list[Row], str]] = {
        f"The primary comparison: {compared}": (found["primary"], PRIMARY),
        "All arms": (arms, ARMS),
        "By class frequency": ([x for x in arms if "error_rare" in x], BY_CLASS),
        "Without training": (means, CLASS_MEANS),
        "Fewer settings, and a small or a large eps": (found["effort"], EFFORT),
        "Edges": (edges, EDGES),
        "Settings": (arms, SETTINGS),
        "Sweep of lam": (found["sweeps"]["lam"], SWEEP),
    }
    parts = ["# Results", "[What the columns are](../../README.md#results)"]
    for heading, (rows, columns) in sections.items():
        if rows:
            parts += [f"## {heading}", shown(rows, columns)]
    return "\n\n".join(parts) + "\n"


def finals_figure(found: Found) -> Figure:
    """Returns each arm's difference to the baseline, a panel for each task."""
    names = list(dict.fromkeys(x["task"] for x in found["arms"]))
    across = min(3, len(names))
    down = math.ceil(len(names) / across)
    count = len(found["arms"]) // len(names)
    size = 1 + 2.6 * across, down * (0.9 + 0.24 * count)
    figure = Figure(figsize=size, layout="constrained")
    panels = figure.subplots(down, across, squeeze=False, sharey=True).ravel()
    margin = 100 * found["margin"]
    for task, panel in zip(names, panels, strict=False):
        rows = [x for x in found["arms"] if x["task"] == task][::-1]
        [base] = [x["final"] for x in rows if x["arm"] == found["baseline"]]
        panel.axvspan(-margin, margin, color="0.9")
        panel.axvline(0, color="0.6", lw=0.8)
        for row in (x for x in rows if "interval" in x):
            colour = "C3" if row["arm"] == found["primary_arm"] else "0.35"
            middle, low, _ = (
                100 / base * np.array([row["difference"], *row["interval"]])
            )
            panel.errorbar(middle, row["arm"], xerr=middle - low, c=colour, fmt="o")
        panel.margins(y=0.12)
        panel.locator_params(axis="x", nbins=5)
        panel.set_title(task, loc="left", weight="bold", size="medium")
        panel.spines[["top", "right"]].set_visible(False)
    label = f"loss minus {found['baseline']}'s, % (grey: equivalent)"
    figure.supxlabel(label, size="medium")
    return figure
