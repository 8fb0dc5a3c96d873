"""The report of a record: results.json, results.md for the reader, and figures."""

import itertools
import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np

from study import drawing, plan, tasks
from study.plan import Study, Trial
from study.record import Record, Row, read_environment
from study.statistics import compare, holm, steps_to, verdict

IDENTICAL = 1e-6  # a median |b_t|/|m̂| below it is AdamW to rounding


def study_of(folder: Path) -> Study:
    """Returns the study that a folder is the record of.

    Raises:
        OSError: There is none.
        ValueError: It is no study.
    """
    return plan.load(folder / "study.toml")


def corpus_of(folder: Path) -> str:
    """Returns the digest of the text that the record was made with.

    Raises:
        ValueError: There is no run in the folder.
    """
    runs = read_environment(folder)
    if not runs:
        raise ValueError(f"{folder / 'environment.json'}: no run is in it")
    return str(runs[-1]["corpus"])


def results(study: Study, record: Record, corpus: str) -> dict[str, Any]:
    """Returns everything that the tables and figures show.

    Raises:
        KeyError: Trials of tuning are missing.
    """

    def done(trials: Iterable[Trial]) -> list[Row]:
        keys = (study.key(trial, corpus) for trial in trials)
        return [record.rows[key] for key in keys if key in record.rows]

    finals, sweeps = (done(f(study, record, corpus)) for f in (plan.final, plan.sweeps))
    rows = [
        _arm(study, record, corpus, task, arm, finals)
        for task in study.tuned_tasks()
        for arm in study.arms
    ]
    _adjust(rows, study)
    return {
        "baseline": study.baseline,
        "margin": study.margin,
        "alpha": study.alpha,
        "tuning_trials": study.tuning["trials"],
        "arms": rows,
        "sweeps": {
            phase: _sweep([x for x in sweeps if x["phase"] == phase])
            for phase in ("lr", "lam", "b3")
        },
        "stationary": _stationary(study, done(plan.stationary(study))),
    }


def _arm(
    study: Study, record: Record, corpus: str, task: str, arm: str, finals: list[Row]
) -> Row:
    """Returns the result of an arm on a task."""
    tuned = plan.best(study, record, corpus, task, arm)
    # Two arms may have the same rule; their trials then differ by hyperparameters.
    mine, base = (
        {x["seed"]: x for x in finals if (x["task"], x["arm"]) == (task, name)}
        for name in (arm, study.baseline)
    )
    row: Row = {
        "task": task,
        "arm": arm,
        "rule": study.arms[arm]["rule"],
        "h": tuned.h,
        "tuning_loss": tuned.loss,
        "lr_position": tuned.position,
        "lr_at_edge": tuned.at_edge,
        "tuning_diverged": tuned.diverged,
        "diverged": sum(not x["finite"] for x in mine.values()),
    }
    good = [x for x in mine.values() if x["finite"]]
    if good:
        for name in ("final", "seconds", "state_bytes"):
            row[name] = float(np.mean([x[name] for x in good]))
        row["training"] = float(np.mean([x["training_loss"][-1] for x in good]))
        if "validation_error" in good[0]:
            row["error"] = float(np.mean([x["validation_error"][-1] for x in good]))
        for name in ("ratio", "ratio_tail", "clipped", "agreement"):
            values = [y for x in good for y in x.get(name, ()) if y is not None]
            row[name] = float(np.median(values)) if values else None
    row["n"] = len(good)
    pairs = [
        (mine[x], base[x])
        for x in sorted(mine.keys() & base.keys())
        if mine[x]["finite"] and base[x]["finite"]
    ]
    if arm == study.baseline or len(pairs) < 2:
        return row
    theirs = [y["final"] for _, y in pairs]
    margin = study.margin * float(np.mean(theirs))
    row |= compare([x["final"] for x, _ in pairs], theirs, margin)._asdict()
    steps = study.tasks[task]["steps"]
    reached = [steps_to(y["final"], x["validation_loss"], steps) for x, y in pairs]
    # The median counts a run that never got there as one that took for ever.
    counts = [np.inf if x is None else x for x in reached]
    middle = float(np.median(counts))
    row["steps_to_baseline"] = middle if np.isfinite(middle) else None
    row["margin"] = margin
    return row


def _adjust(rows: list[Row], study: Study) -> None:
    """Adds Holm's p-values over all tasks and arms, and the verdicts."""
    compared = [x for x in rows if "p" in x]
    for name in ("p", "p_equivalence"):
        for row, p in zip(compared, holm([x[name] for x in compared]), strict=True):
            row[f"holm_{name}"] = p
    for row in rows:
        if row["h"] is None:
            row["verdict"] = "every setting diverged"
        elif row["diverged"]:
            row["verdict"] = f"{row['diverged']} of its runs diverged"
        elif row["n"] < study.final["seeds"]:
            row["verdict"] = f"incomplete: {row['n']} of {study.final['seeds']} seeds"
        elif row["arm"] == study.baseline:
            row["verdict"] = "baseline"
        elif "p" not in row:
            row["verdict"] = "not measured"
        else:
            found = row["holm_p"], row["holm_p_equivalence"]
            row["verdict"] = verdict(row["difference"], *found, study.alpha)
        if row.get("ratio") is not None and row["ratio"] < IDENTICAL:
            row["verdict"] += " (identical to AdamW)"


def _sweep(rows: list[Row]) -> list[Row]:
    """Returns the final losses of each setting of a sweep; None where one diverged."""
    found: dict[tuple[str, str, float], list[Row]] = {}
    for row in rows:
        value = row["h"][row["phase"]]
        found.setdefault((row["task"], row["arm"], value), []).append(row)
    return [
        {
            "task": task,
            "arm": arm,
            "value": value,
            "losses": [x["final"] for x in mine],
        }
        for (task, arm, value), mine in found.items()
    ]


def _stationary(study: Study, rows: list[Row]) -> list[Row]:
    """Returns the measured stationary points beside the closed form."""
    if not rows:
        return []
    options = study.options(study.checks["stationary"]["task"])
    defaults = {"shape": 2, "batch": 2} | options
    skewness = 2 / float(defaults["shape"] * defaults["batch"]) ** 0.5
    found: dict[tuple[float, float], list[float]] = {}
    for row in rows:
        at = row["h"]["lam"], row["h"]["tau"]
        found.setdefault(at, []).append(row["validation_mean"][-1])
    b1 = rows[0]["h"]["b1"]
    table = []
    for (lam, tau), means in found.items():
        table.append(
            {
                "lam": lam,
                "tau": tau,
                "skewness": skewness,
                "closed_form": tasks.stationary_point(skewness, lam, tau, b1),
                "measured": float(np.mean(means)),
                # What is left at lam = 0 is Adam's own.
                "shift": float(np.mean(means) - np.mean(found.get((0.0, tau), [0.0]))),
                "means": means,
            }
        )
    return table


# --- In words -----------------------------------------------------------------------


def write(study: Study, record: Record, corpus: str, folder: Path) -> str:
    """Writes results.json, results.md and figures, and returns results.md's text."""
    try:
        found = results(study, record, corpus)
    except KeyError:
        return "Nothing to report yet: tuning has not ended."
    path = folder / "checks.json"
    if path.exists():
        found |= json.loads(path.read_text(encoding="utf-8"))
    text = "\n\n".join(sections(found)) + "\n"
    (folder / "results.json").write_text(
        json.dumps(found, indent=1) + "\n", encoding="utf-8"
    )
    (folder / "results.md").write_text(text, encoding="utf-8")
    drawing.draw(found, record, folder)
    return text


HEAD = (
    "arm",
    "n",
    "lam",
    "diverged in tuning",
    "training loss",
    "error",
    "final loss",
    "minus baseline",
    "95% t interval",
    "bootstrap",
    "detectable (in one test)",
    "p (Holm)",
    "verdict",
    "steps to baseline",
    "median \\|b\\|/\\|m̂\\|",
    "clipped",
    "halves agree",
    "s a run",
    "state, bytes",
)


def sections(found: dict[str, Any]) -> list[str]:
    """Returns the tables in Markdown, each under its heading."""
    parts = [
        "# Results",
        f"{found['tuning_trials']} settings an arm; validation loss at the last step "
        f"of the best one, on fresh seeds, paired with {found['baseline']}'s. p-values "
        f"are Holm's, over all rows; equivalent: within {found['margin']:.2%} of "
        f"{found['baseline']}'s mean loss (two one-sided tests, Holm's too). Ratio, "
        "clipped and agreement are medians over a run; error is of held-out examples.",
    ]
    for task, rows in itertools.groupby(found["arms"], lambda row: row["task"]):
        parts += [f"## {task}", table(HEAD, [_cells(row) for row in rows])]
    edges = [f"{x['arm']} on {x['task']}" for x in found["arms"] if x["lr_at_edge"]]
    text = ", ".join(edges) if edges else "none"
    parts.append(f"Best learning rate in an outer sixth of its range: {text}.")
    settings = [
        (x["task"], x["arm"], *(_number(x["h"].get(y)) for y in plan.DIMENSIONS))
        for x in found["arms"]
        if x["h"]
    ]
    parts += ["## Settings", table(("task", "arm", *plan.DIMENSIONS), settings)]
    for name, rows in found["sweeps"].items():
        if rows:
            cells = [
                (x["task"], x["arm"], _number(x["value"]), _losses(x["losses"]))
                for x in rows
            ]
            parts += [
                f"## Sweep of {name}",
                table(("task", "arm", name, "final losses"), cells),
            ]
    if found["stationary"]:
        cells = [
            [_number(x[y]) for y in ("lam", "tau", "closed_form", "measured", "shift")]
            for x in found["stationary"]
        ]
        head = ("lam", "tau", "closed form", "measured", "minus lam = 0")
        parts += ["## Stationary point", table(head, cells)]
    if "identity" in found:
        steps, forms = found["identity"]["steps"], found["identity"]["forms"]
        cells = [(form, *map(_number, x.values())) for form, x in forms.items()]
        head = (
            "form",
            "m and v, ulp",
            "update against Adam's formula, ulp",
            "against Optax's update, relative",
        )
        parts += [
            "## lam = 0 against AdamW",
            f"Largest difference in {steps} steps.",
            table(head, cells),
        ]
    if "blow_up" in found:
        cells = [
            [_number(x[y]) for y in ("form", "b2", "b3", "largest", "after")]
            for x in found["blow_up"]
        ]
        head = ("form", "b2", "b3", "largest update, learning rates", "at step")
        parts += ["## After one gradient of 1", table(head, cells)]
    return parts


def _cells(row: Row) -> list[str]:
    """Returns a row of the main table."""
    low, high = row.get("interval", (None, None))
    first, last = row.get("bootstrap", (None, None))
    return [
        row["arm"],
        str(row["n"]),
        _number((row["h"] or {}).get("lam")),
        str(row["tuning_diverged"]),
        _number(row.get("training"), ".4f"),
        _number(row.get("error"), ".2%"),
        _number(row.get("final"), ".4f"),
        _number(row.get("difference"), "+.4f"),
        "" if low is None else f"{low:+.4f} to {high:+.4f}",
        "" if first is None else f"{first:+.4f} to {last:+.4f}",
        _number(row.get("detectable"), ".4f"),
        _number(row.get("holm_p"), ".2g"),
        row["verdict"],
        _number(row.get("steps_to_baseline"), ".0f"),
        _number(row.get("ratio"), ".1e"),
        _number(row.get("clipped"), ".2%"),
        _number(row.get("agreement"), ".2f"),
        _number(row.get("seconds"), ".2f"),
        _number(row.get("state_bytes"), ".0f"),
    ]


def table(head: Iterable[str], rows: Iterable[Iterable[str]]) -> str:
    """Returns a Markdown table."""
    head = list(head)
    lines = [head, ["---"] * len(head), *map(list, rows)]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def _number(x: Any, form: str = ".4g") -> str:
    """Returns a number, or what else it is; nothing for None."""
    if x is None:
        return ""
    return x if isinstance(x, str) else f"{x:{form}}"


def _losses(losses: list[float | None]) -> str:
    """Returns losses; a run that diverged says so."""
    return ", ".join("diverged" if x is None else f"{x:.4f}" for x in losses)
