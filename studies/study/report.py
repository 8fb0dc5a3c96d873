"""The report of a record: results.json, results.md for the reader, and figures."""

import itertools
import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np

from study import drawing, effort, plan, tasks
from study.markdown import table
from study.plan import Study, Trial
from study.record import Record, Row, read_environment
from study.statistics import Comparison, compare, holm, steps_to, verdict

# Of held-out examples, beside the loss, where a task has them.
METRICS = ("error", "loss_rare", "error_rare", "loss_frequent", "error_frequent")
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
        "effort": _effort(study, record, corpus),
        "primary_arm": study.primary.get("arm"),
        "primary": _primary(rows, study),
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
        "positions": tuned.positions,
        "edges": tuned.edges,
        "tuning_diverged": tuned.diverged,
        "diverged": sum(not x["finite"] for x in mine.values()),
    }
    good = [x for x in mine.values() if x["finite"]]
    if good:
        for name in ("final", "seconds", "state_bytes"):
            row[name] = float(np.mean([x[name] for x in good]))
        row["training"] = float(np.mean([x["training_loss"][-1] for x in good]))
        for name in METRICS:
            values = _last(good, name)
            if values and None not in values:
                row[name] = float(np.mean(values))
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
    row["metrics"] = {}
    for name in METRICS:
        ours, theirs = (_last(x, name) for x in zip(*pairs, strict=True))
        if ours and None not in (*ours, *theirs):
            margin = study.margin * float(np.mean(theirs))
            found = compare(ours, theirs, margin)._asdict()
            row["metrics"][name] = {"margin": margin, **found}
    return row


def _effort(study: Study, record: Record, corpus: str) -> list[Row]:
    """Returns what fewer settings would have found, and settings against settings."""
    rows = []
    for task in study.tuned_tasks():
        settings = {
            arm: plan.tuned(study, record, corpus, task, arm) for arm in study.arms
        }
        losses = {arm: [x for _, x in tuned] for arm, tuned in settings.items()}
        for arm, mine in losses.items():
            better, middle = effort.matched(mine, losses[study.baseline])
            row = {"task": task, "arm": arm, "better": better, "median": middle}
            row["by_eps"] = effort.best_by_eps(settings[arm])
            counts = [x for x in effort.COUNTS if x < len(mine)]
            row["best_of"] = {x: effort.best_of(mine, x) for x in (*counts, len(mine))}
            rows.append(row)
    return rows


def _last(rows: Iterable[Row], name: str) -> list[float | None]:
    """Returns a number of held-out examples after the last step; [] without it."""
    name = f"validation_{name}"
    return [row[name][-1] for row in rows if name in row]


def _adjust(rows: list[Row], study: Study) -> None:
    """Adds Holm's p-values over all tasks and arms, and the verdicts."""
    compared = [x for x in rows if "p" in x]
    for name in ("p", "p_equivalence"):
        for row, p in zip(compared, holm([x[name] for x in compared]), strict=True):
            row[f"holm_{name}"] = p
    for row in rows:
        if flaw := _flaw(row, study):
            row["verdict"] = flaw
        elif row["arm"] == study.baseline:
            row["verdict"] = "baseline"
        else:
            found = row["holm_p"], row["holm_p_equivalence"]
            row["verdict"] = verdict(row["difference"], *found, study.alpha)
        # The median element may move as with AdamW, and a few others not.
        tiny = row.get("ratio") is not None and row["ratio"] < IDENTICAL
        if tiny and abs(row.get("difference", 0.0)) <= row.get("margin", 0.0):
            row["verdict"] += " (identical to AdamW)"


def _flaw(row: Row, study: Study) -> str | None:
    """Returns why an arm's seeds say nothing of it; None where they do."""
    if row["h"] is None:
        return "every setting diverged"
    if row["diverged"]:
        return f"{row['diverged']} of its runs diverged"
    if row["n"] < study.final["seeds"]:
        return f"incomplete: {row['n']} of {study.final['seeds']} seeds"
    if row["arm"] != study.baseline and "p" not in row:
        return "not measured"
    return None


def _primary(rows: list[Row], study: Study) -> list[Row]:
    """Returns the primary comparison: a row a metric and task, loss first.

    Holm's p-values are over the tasks, for each metric. A task that says nothing
    counts with a p of 1.
    """
    mine = [x for x in rows if x["arm"] == study.primary.get("arm")]
    bases = {x["task"]: x for x in rows if x["arm"] == study.baseline}
    found: list[Row] = []
    for metric, key in (("loss", "final"), ("error", "error")):
        of_metric = []
        for row in mine:
            measured = row if metric == "loss" else row.get("metrics", {}).get(metric)
            flaw = _flaw(row, study) or ("not measured" if measured is None else None)
            new: Row = {"task": row["task"], "metric": metric}
            new |= {"arm": row.get(key), "baseline": bases[row["task"]].get(key)}
            if flaw is None:
                new |= {x: measured[x] for x in (*Comparison._fields, "margin")}
            of_metric.append(new | {"verdict": flaw})
        for name in ("p", "p_equivalence"):
            adjusted = holm([x.get(name, 1.0) for x in of_metric])
            for new, p in zip(of_metric, adjusted, strict=True):
                new[f"holm_{name}"] = p
        for new in of_metric:
            p_values = new["holm_p"], new["holm_p_equivalence"]
            new["verdict"] = new["verdict"] or verdict(
                new["difference"], *p_values, study.alpha
            )
        found += of_metric
    return found


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
        found = shown(study, record, corpus, folder)
    except KeyError:
        return "Nothing to report yet: tuning has not ended."
    text = "\n\n".join(sections(found)) + "\n"
    (folder / "results.json").write_text(
        json.dumps(found, indent=1) + "\n", encoding="utf-8"
    )
    (folder / "results.md").write_text(text, encoding="utf-8")
    drawing.draw(found, record, folder)
    return text


def shown(study: Study, record: Record, corpus: str, folder: Path) -> dict[str, Any]:
    """Returns the results of the trials, and the checks of a folder.

    Raises:
        KeyError: Trials of tuning are missing.
    """
    found, path = results(study, record, corpus), folder / "checks.json"
    if path.exists():
        found |= json.loads(path.read_text(encoding="utf-8"))
    return found


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
    parts = ["# Results"]
    if found["primary"]:
        parts += _primary_section(found)
    parts += [
        f"{found['tuning_trials']} settings an arm; validation loss at the last step "
        f"of the best one, on fresh seeds, paired with {found['baseline']}'s. p-values "
        f"are Holm's, over all rows; equivalent: within {found['margin']:.2%} of "
        f"{found['baseline']}'s mean loss (two one-sided tests, Holm's too). Ratio, "
        "clipped and agreement are medians over a run; error is of held-out examples.",
    ]
    for task, rows in itertools.groupby(found["arms"], lambda row: row["task"]):
        parts += [f"## {task}", table(HEAD, [_cells(row) for row in rows])]
    if by_class := _by_class(found):
        parts += [
            "## By class frequency",
            "Held-out examples of classes with few examples to train on (rare: at most "
            f"{tasks.RARE}) and of the others; in brackets the 95% t interval, not "
            "corrected.",
            table(BY_CLASS, by_class),
        ]
    if found.get("class_means"):
        parts += [
            "## Without training",
            "Class means shrunk towards 0, with one variance, both chosen on the seeds "
            "of tuning; the same data of the final seeds.",
            table(CLASS_MEANS, _class_means(found)),
        ]
    parts += [
        "## Fewer settings, and settings as they are",
        "Expected loss in tuning of the best of so many settings, against the same of "
        f"{found['baseline']}. And how often an arm's loss is lower than that of "
        f"{found['baseline']} with the same learning rate, warm-up, b2, decay, b1 and "
        "eps, where both have them; the median of the relative difference.",
        table(*_effort_cells(found)),
    ]
    parts += [
        "## Edges",
        f"Numbers of the best settings in an outer {plan.EDGE:.0%} of their range, as "
        "it is drawn (0% and 100% are its ends).",
        table(("task", "arm", "number", "value", "place in its range"), _edges(found)),
    ]
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


BY_CLASS = (
    "task",
    "arm",
    "loss, rare",
    "loss, frequent",
    "error, rare",
    "minus baseline",
    "error, frequent",
    "minus baseline",
)
CLASS_MEANS = (
    "task",
    "shrinkage",
    "variance",
    "at an end",
    "loss",
    "baseline's loss",
    "error",
    "baseline's error",
    "error, rare",
    "error, frequent",
)


def _primary_section(found: dict[str, Any]) -> list[str]:
    """Returns the primary comparison, which was fixed before the runs."""
    rows = found["primary"]
    cells = [
        [
            row["metric"],
            row["task"],
            _number(row["arm"], ".4f"),
            _number(row["baseline"], ".4f"),
            _number(row.get("difference"), "+.4f"),
            "{:+.4f} to {:+.4f}".format(*row["interval"]) if "p" in row else "",
            _number(row.get("margin"), ".4f"),
            _number(row.get("detectable"), ".4f"),
            _number(row["holm_p"], ".2g"),
            row["verdict"],
        ]
        for row in rows
    ]
    base, arm = found["baseline"], found["primary_arm"]
    head = ("metric", "task", arm, base, "difference", "95% t interval", "margin")
    head += ("detectable (in one test)", "p (Holm)", "verdict")
    return [
        "## The primary comparison",
        f"{arm} minus {base}, fixed before the runs: held-out loss first, error "
        "second; Holm's p-values over the tasks, for each metric. All else in this "
        "report is secondary.",
        table(head, cells),
        "## All arms",
    ]


def _by_class(found: dict[str, Any]) -> list[list[str]]:
    """Returns the rows of loss and error by class frequency."""

    def minus(row: Row, name: str) -> str:
        if name not in row.get("metrics", {}):
            return ""
        measured = row["metrics"][name]
        low, high = measured["interval"]
        return f"{measured['difference']:+.2%} ({low:+.2%} to {high:+.2%})"

    return [
        [
            row["task"],
            row["arm"],
            _number(row.get("loss_rare"), ".4f"),
            _number(row.get("loss_frequent"), ".4f"),
            _number(row.get("error_rare"), ".2%"),
            minus(row, "error_rare"),
            _number(row.get("error_frequent"), ".2%"),
            minus(row, "error_frequent"),
        ]
        for row in found["arms"]
        if "error_rare" in row or "error_frequent" in row
    ]


def _class_means(found: dict[str, Any]) -> list[list[str]]:
    """Returns the rows of the rule without training."""
    bases = {x["task"]: x for x in found["arms"] if x["arm"] == found["baseline"]}
    cells = []
    for name, row in found["class_means"].items():
        means = {
            x: float(np.mean(row[x])) if None not in row[x] else None
            for x in ("loss", "error", "error_rare", "error_frequent")
        }
        cells.append(
            [
                name,
                _number(row["shrinkage"]),
                _number(row["variance"]),
                ", ".join(row["edges"]),
                _number(means["loss"], ".4f"),
                _number(bases[name].get("final"), ".4f"),
                _number(means["error"], ".2%"),
                _number(bases[name].get("error"), ".2%"),
                _number(means["error_rare"], ".2%"),
                _number(means["error_frequent"], ".2%"),
            ]
        )
    return cells


def _effort_cells(found: dict[str, Any]) -> tuple[list[str], list[list[str]]]:
    """Returns head and rows of the table of effort."""
    rows = [x for x in found["effort"] if x["arm"] != found["baseline"]]
    bases = {
        x["task"]: x["best_of"]
        for x in found["effort"]
        if x["arm"] == found["baseline"]
    }
    counts = list(next(iter(bases.values())))
    head = ["task", "arm", *(f"best of {x}" for x in counts)]
    head += ["settings that are better", "median difference"]
    cells = []
    for row in rows:
        pairs = [(row["best_of"][x], bases[row["task"]][x]) for x in counts]
        ratios = [None if None in pair else pair[0] / pair[1] - 1 for pair in pairs]
        numbers = [*(_number(x, "+.1%") for x in ratios), f"{row['better']:.0%}"]
        cells.append(
            [row["task"], row["arm"], *numbers, _number(row["median"], "+.1%")]
        )
    return head, cells


def _edges(found: dict[str, Any]) -> list[list[str]]:
    """Returns a row for each number of a best setting at an edge of its range."""
    return [
        [x["task"], x["arm"], y, _number(x["h"][y]), f"{x['positions'][y]:.0%}"]
        for x in found["arms"]
        for y in x["edges"]
    ]


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


def _number(x: Any, form: str = ".4g") -> str:
    """Returns a number, or what else it is; nothing for None."""
    if x is None:
        return ""
    return x if isinstance(x, str) else f"{x:{form}}"


def _losses(losses: list[float | None]) -> str:
    """Returns losses; a run that diverged says so."""
    return ", ".join("diverged" if x is None else f"{x:.4f}" for x in losses)
