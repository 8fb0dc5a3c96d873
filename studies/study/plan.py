"""A study's configuration, and the trials that follow from it, phase by phase."""

import functools
import hashlib
import json
import math
import tomllib
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from scipy.stats import qmc

from study import arms, tasks
from study.arms import RULES, SHARED, Numbers
from study.record import Record

# A column of the design each, in this order. Every arm takes its columns from the same
# points; so what arms share they share trial by trial.
COLUMNS = (*SHARED, "lam", "b3", "tau", "b1", "eps", "alpha", "beta")
# Another column would change the points of all others. So smoothing takes that of beta,
# which no rule has beside it.
DIMENSIONS = (*COLUMNS, "smoothing")
LINEAR = ("warm_up", "smoothing")  # spread evenly, from 0 on
DECAYS = ("b1", "b2", "b3", "beta")
EDGE = 0.1  # the outer share of a range at which a best number is reported
Table = dict[str, Any]
POINTS = 20
OF_PLAN = ("lr", "lanes", "tuned", "tuning_seeds")  # of a task, not of its trials


class Trial(NamedTuple):
    """A training: all that its result depends on, and what it is for.

    Attributes:
        phase: "tune", "final", "lr", "lam", "b3" or "stationary".
        task: Its name in the study.
        arm: Likewise.
        rule: Of the arm.
        h: Hyperparameters.
        seed: Of parameters, batches and the rule's own noise.
    """

    phase: str
    task: str
    arm: str
    rule: str
    h: Numbers
    seed: int


class Study(NamedTuple):
    """A checked configuration: the tables of its file.

    Attributes:
        baseline: The arm to compare with.
        margin: Of equivalence, relative to the baseline's mean loss.
        alpha: Level of significance.
        workers: Groups of lanes that train at the same time.
        tuning: trials, seeds, design.
        final: first, seeds.
        sweeps: lr, seeds, lam, b3; a list that is empty leaves its sweep out.
        space: Ranges for all arms.
        arms: Rules, factors of the learning rate, further ranges.
        tasks: Kinds, steps, centres of the learning rate, lanes, seeds of tuning where
            a task needs more of them, options.
        checks: identity, stationary, blow_up, class_means.
        primary: arm, whose comparison with the baseline is the primary one; may be
            left out.
    """

    baseline: str
    margin: float
    alpha: float
    workers: int
    tuning: Table
    final: Table
    sweeps: Table
    space: Table
    arms: Table
    tasks: Table
    checks: Table
    primary: Table = {}  # noqa: RUF012  # never written to

    def key(self, trial: Trial, corpus: str) -> str:
        """Returns a digest of what defines a trial; no name is in it.

        An edited file therefore runs again only what has changed.
        """
        task = self.tasks[trial.task]
        defines = {
            "phase": trial.phase,
            "task": {x: task[x] for x in task if x not in OF_PLAN},
            "corpus": corpus if task["kind"] in tasks.OF_TEXT else None,
            "rule": trial.rule,
            "h": trial.h,
            "seed": trial.seed,
        }
        text = json.dumps(defines, sort_keys=True)
        return hashlib.sha256(text.encode()).hexdigest()[:24]

    def options(self, task: str) -> Table:
        """Returns the options of a task's kind."""
        own = ("kind", "steps", *OF_PLAN)
        return {k: v for k, v in self.tasks[task].items() if k not in own}

    def tuning_seeds(self, task: str) -> list[int]:
        """Returns the seeds of tuning: a task's own, where it has any."""
        return list(self.tasks[task].get("tuning_seeds", self.tuning["seeds"]))

    def tuned_tasks(self) -> list[str]:
        """Returns the tasks on which arms are compared."""
        return [x for x, task in self.tasks.items() if task.get("tuned", True)]


# --- Reading ------------------------------------------------------------------------

WANTED: dict[str, dict[str, type]] = {
    "tuning": {"trials": int, "seeds": list, "design": int},
    "final": {"first": int, "seeds": int},
    "sweeps": {"lr": list, "seeds": list, "lam": list, "b3": list},
}


def load(path: Path) -> Study:
    """Returns a study.

    Raises:
        OSError: The file cannot be read.
        ValueError: It says something that cannot be; the message says what.
    """
    try:
        found = tomllib.loads(path.read_text(encoding="utf-8"))
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise ValueError(f"{path}: {error}") from error
    try:
        fields = set(Study._fields)
        _same("the study", set(found), fields, fields - {"primary"})
        for name, kind in (("margin", float), ("alpha", float), ("workers", int)):
            _typed(name, found[name], kind)
            if not found[name] > 0:
                raise ValueError(f"{name} must be above 0, got {found[name]}")
        for table, wanted in WANTED.items():
            _same(f"[{table}]", set(found[table]), set(wanted), set(wanted))
            for name, kind in wanted.items():
                _typed(f"{table}.{name}", found[table][name], kind)
        study = Study(**found)
        _check(study)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error
    return study


def _check(study: Study) -> None:
    """Raises where parts of a study do not fit together."""
    if study.final["seeds"] < 2:
        raise ValueError(f"final.seeds must be 2 or more, got {study.final['seeds']}")
    if study.tuning["trials"] < 1 or not study.tuning["seeds"]:
        raise ValueError("tuning needs a trial and a seed")
    fresh = final_seeds(study)
    used = {*study.tuning["seeds"], *study.sweeps["seeds"]}
    for name, task in study.tasks.items():
        seeds = task.get("tuning_seeds", [0])
        if type(seeds) is not list or not seeds or {type(x) for x in seeds} != {int}:
            raise ValueError(
                f"tasks.{name}.tuning_seeds must be whole numbers, got {seeds!r}"
            )
        used |= set(study.tuning_seeds(name))
    if used := used & set(fresh):
        raise ValueError(f"final's seeds must be fresh, but {sorted(used)} are not")
    if study.baseline not in study.arms:
        raise ValueError(f"baseline {study.baseline!r} is none of [arms]")
    if study.primary:
        _same("[primary]", set(study.primary), {"arm"}, {"arm"})
        arm = study.primary["arm"]
        if arm not in study.arms or arm == study.baseline:
            raise ValueError(f"primary.arm {arm!r} is no arm beside the baseline")
    for name, value in study.space.items():
        if name not in ("decades", *DIMENSIONS[1:]):
            allowed = ", ".join(DIMENSIONS[1:])
            raise ValueError(f"[space] has no {name!r}; it has decades, {allowed}")
        if name != "decades":
            _range(f"space.{name}", name, value)
    if missing := {"decades", *SHARED[1:]} - set(study.space):
        raise ValueError(f"[space] lacks {', '.join(sorted(missing))}")
    for name, arm in study.arms.items():
        rule = arm.get("rule")
        if rule not in RULES:
            known = ", ".join(RULES)
            raise ValueError(
                f"rule of arms.{name} must be one of {known}, got {rule!r}"
            )
        for key, value in arm.items():
            if key in RULES[rule].numbers or key in SHARED[1:]:
                _range(f"arms.{name}.{key}", key, value)
            elif key not in ("rule", "rate"):
                allowed = ", ".join(("rate", *RULES[rule].numbers, *SHARED[1:]))
                raise ValueError(f"arms.{name} has no {key!r}; it has rule, {allowed}")
    for name, task in study.tasks.items():
        where = f"tasks.{name}"
        for key, kind in (("kind", str), ("steps", int), ("lr", float), ("lanes", int)):
            if key not in task:
                raise ValueError(f"{where} lacks {key!r}")
            _typed(f"{where}.{key}", task[key], kind)
        if task["steps"] < POINTS or task["steps"] % POINTS:
            raise ValueError(f"{where}.steps must be a multiple of {POINTS}")
        if task["lanes"] < 1:
            raise ValueError(f"{where}.lanes must be 1 or more")
        try:
            tasks.check(task["kind"], study.options(name))
        except ValueError as error:
            raise ValueError(f"{where}: {error}") from error
        smoothed = any(
            "smoothing" in RULES[x["rule"]].numbers for x in study.arms.values()
        )
        if (
            smoothed
            and task.get("tuned", True)
            and task["kind"] not in tasks.OF_CLASSES
        ):
            raise ValueError(f"{where} has no labels that an arm could smooth")
    _check_checks(study)


CHECKS: dict[str, dict[str, type]] = {
    "identity": {"task": str, "steps": int},
    "stationary": {"task": str, "seeds": list, "lam": list, "tau": list, "h": dict},
    "blow_up": {"b2": float, "b3": list, "steps": int},
    "class_means": {"shrinkage": list, "variance": list},
}


def _check_checks(study: Study) -> None:
    """Raises where a check is incomplete."""
    _same("[checks]", set(study.checks), set(CHECKS), set())
    for table, wanted in CHECKS.items():
        if table in study.checks:
            found = study.checks[table]
            _same(f"[checks.{table}]", set(found), set(wanted), set(wanted))
            for name, kind in wanted.items():
                _typed(f"checks.{table}.{name}", found[name], kind)
                if found[name] == []:
                    raise ValueError(f"checks.{table}.{name} is empty")
            if "task" in found and found["task"] not in study.tasks:
                raise ValueError(
                    f"checks.{table}.task {found['task']!r} is none of [tasks]"
                )


def _same(where: str, found: set[str], allowed: set[str], needed: set[str]) -> None:
    """Raises where names are unknown or missing."""
    if unknown := found - allowed:
        names = ", ".join(sorted(allowed))
        raise ValueError(f"{where} has no {sorted(unknown)[0]!r}; it has {names}")
    if missing := needed - found:
        raise ValueError(f"{where} lacks {', '.join(sorted(missing))}")


def _typed(name: str, value: Any, kind: type) -> None:
    """Raises where a value is of another type; a whole number is a number, too."""
    if type(value) is not kind and not (kind is float and type(value) is int):
        raise ValueError(f"{name} must be of type {kind.__name__}, got {value!r}")


def _range(where: str, name: str, value: Any) -> None:
    """Raises where a value is neither a number nor the two ends of a range."""
    if isinstance(value, int | float) and not isinstance(value, bool):
        if math.isfinite(value):
            return
        raise ValueError(f"{where} must be finite, got {value}")
    ends = value if isinstance(value, list) and len(value) == 2 else [math.nan] * 2
    low, high = ends
    positive = low >= 0 if name in LINEAR else low > 0
    below = high < 1 if name in (*DECAYS, *LINEAR) else True
    if not (positive and below and low <= high):
        raise ValueError(
            f"{where} must be a number or a range [low, high], got {value!r}"
        )


# --- The design ---------------------------------------------------------------------


@functools.cache
def design(trials: int, seed: int) -> np.ndarray:
    """Returns points of [0, 1), one a trial, with a column for each of `DIMENSIONS`."""
    sobol = qmc.Sobol(len(COLUMNS), scramble=True, rng=seed)
    points = sobol.random_base2(max(0, math.ceil(math.log2(trials))))[:trials]
    return np.column_stack([points, points[:, COLUMNS.index("beta")]])


def spread(name: str, ends: list[float], x: float) -> float:
    """Returns the number at a share of a range.

    A warm-up and a smoothing are spread evenly, a decay b on the logarithm of 1 - b,
    all else on its logarithm.
    """
    low, high = ends
    if name in LINEAR:
        value = low + (high - low) * x
    elif name in DECAYS:
        value = 1 - (1 - low) ** (1 - x) * (1 - high) ** x
    else:
        value = low ** (1 - x) * high**x
    return float(f"{value:.6g}")


def position(name: str, ends: list[float], value: float) -> float:
    """Returns the share of a range at which a number lies: `spread`, the other way."""

    def scale(x: float) -> float:
        return x if name in LINEAR else math.log(1 - x if name in DECAYS else x)

    low, high, at = (scale(x) for x in (*ends, value))
    return (at - low) / (high - low)


def centre(study: Study, task: str, arm: str) -> float:
    """Returns the middle of an arm's learning rates on a task."""
    return float(study.tasks[task]["lr"] * study.arms[arm].get("rate", 1.0))


def ranges_of(study: Study, task: str, arm: str) -> Table:
    """Returns the range of each number that an arm has, or the number."""
    rule = RULES[study.arms[arm]["rule"]]
    half = 10 ** (study.space["decades"] / 2)
    middle = centre(study, task, arm)
    ranges: Table = {**rule.numbers}
    ranges |= {x: y for x, y in study.space.items() if x in {*SHARED, *rule.numbers}}
    ranges |= {x: y for x, y in study.arms[arm].items() if x not in ("rule", "rate")}
    ranges["lr"] = [middle / half, middle * half]
    return ranges


def settings(study: Study, task: str, arm: str) -> list[Numbers]:
    """Returns the settings in which an arm is tried on a task."""
    ranges = ranges_of(study, task, arm)
    points = design(study.tuning["trials"], study.tuning["design"])
    return [
        {
            name: spread(name, ranges[name], x)
            if isinstance(ranges[name], list)
            else float(ranges[name])
            for name, x in zip(DIMENSIONS, point, strict=True)
            if name in ranges
        }
        for point in points
    ]


# --- The phases ---------------------------------------------------------------------


def tune(study: Study) -> list[Trial]:
    """Returns the trials of tuning: the same number for each arm."""
    return [
        Trial("tune", task, arm, study.arms[arm]["rule"], h, seed)
        for task in study.tuned_tasks()
        for arm in study.arms
        for h in settings(study, task, arm)
        for seed in study.tuning_seeds(task)
    ]


def final_seeds(study: Study) -> range:
    """Returns the seeds of finals, which tuning never sees."""
    first = study.final["first"]
    return range(first, first + study.final["seeds"])


class Best(NamedTuple):
    """The setting of an arm with the lowest mean validation loss at the end.

    Attributes:
        h: The setting; None where every one diverged.
        loss: Its mean over the tuning seeds.
        positions: Of its tuned numbers in their ranges, from 0 to 1.
        diverged: Settings that diverged, with any seed.
    """

    h: Numbers | None
    loss: float | None
    positions: dict[str, float]
    diverged: int

    @property
    def edges(self) -> list[str]:
        """The numbers in an outer tenth of their ranges, which may be too narrow."""
        found = self.positions.items()
        return [name for name, x in found if not EDGE <= x <= 1 - EDGE]


def tuned(
    study: Study, record: Record, corpus: str, task: str, arm: str
) -> list[tuple[Numbers, float | None]]:
    """Returns the settings of an arm's tuning, in the order of the design.

    Each comes with its mean loss over the seeds; None where a run diverged.

    Raises:
        KeyError: A trial is not in the record.
    """
    rule, found = study.arms[arm]["rule"], []
    for h in settings(study, task, arm):
        trials = [
            Trial("tune", task, arm, rule, h, x) for x in study.tuning_seeds(task)
        ]
        losses = [record.rows[study.key(x, corpus)]["final"] for x in trials]
        found.append((h, None if None in losses else sum(losses) / len(losses)))
    return found


def best(study: Study, record: Record, corpus: str, task: str, arm: str) -> Best:
    """Returns the best of an arm's tuning.

    Raises:
        KeyError: A trial is not in the record.
    """
    found = tuned(study, record, corpus, task, arm)
    tried = [(loss, h) for h, loss in found if loss is not None]
    diverged = len(found) - len(tried)
    if not tried:
        return Best(None, None, {}, diverged)
    loss, h = min(tried, key=lambda x: x[0])
    ranges = ranges_of(study, task, arm)
    chosen = {x: ranges[x] for x in h if isinstance(ranges[x], list)}
    positions = {x: position(x, ends, h[x]) for x, ends in chosen.items()}
    return Best(h, loss, positions, diverged)


def final(study: Study, record: Record, corpus: str) -> list[Trial]:
    """Returns the trials of the best settings on seeds that tuning never saw."""
    return [
        Trial("final", task, arm, study.arms[arm]["rule"], h, seed)
        for task in study.tuned_tasks()
        for arm in study.arms
        if (h := best(study, record, corpus, task, arm).h) is not None
        for seed in final_seeds(study)
    ]


def sweeps(study: Study, record: Record, corpus: str) -> list[Trial]:
    """Returns the trials about the best settings.

    Learning rates are multiples of each arm's best. lam and b3 are those of the
    standardized form with tau = 1, at the baseline's best setting (where b3 is its b2
    and lam .03, in the other's sweep).
    """
    trials = []
    for task in study.tuned_tasks():
        for arm in study.arms:
            found = best(study, record, corpus, task, arm).h
            if found is None:
                continue
            rule = study.arms[arm]["rule"]
            trials += [
                Trial("lr", task, arm, rule, {**found, "lr": _six(found["lr"] * x)}, s)
                for x in study.sweeps["lr"]
                for s in study.sweeps["seeds"]
            ]
        base = best(study, record, corpus, task, study.baseline).h
        if base is None:
            continue
        plain = {x: base[x] for x in base if x in (*SHARED, "b1", "eps")}
        plain = {**arms.ADAM3, **plain, "b3": base["b2"], "lam": 0.03, "tau": 1.0}
        for name in ("lam", "b3"):
            trials += [
                Trial(
                    name,
                    task,
                    "standardized",
                    "standardized",
                    {**plain, name: float(x)},
                    seed,
                )
                for x in study.sweeps[name]
                for seed in study.sweeps["seeds"]
            ]
    return trials


def stationary(study: Study) -> list[Trial]:
    """Returns the trials of the stationary point."""
    if "stationary" not in study.checks:
        return []
    check = study.checks["stationary"]
    base = {**arms.ADAM3, "lr": study.tasks[check["task"]]["lr"], **check["h"]}
    return [
        Trial(
            "stationary",
            check["task"],
            "standardized",
            "standardized",
            {**base, "lam": float(lam), "tau": float(tau)},
            seed,
        )
        for tau in check["tau"]
        for lam in check["lam"]
        for seed in check["seeds"]
    ]


def _six(x: float) -> float:
    """Returns six digits of a number."""
    return float(f"{x:.6g}")
