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

# One dimension of the design each, in this order. Every arm takes its columns from the
# same points; so what arms share they share trial by trial.
DIMENSIONS = (*SHARED, "lam", "b3", "tau", "b1", "eps", "alpha", "beta")
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
        checks: identity, stationary, blow_up.
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
        _same("the study", set(found), fields, fields)
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
    fresh = range(study.final["first"], study.final["first"] + study.final["seeds"])
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
    _check_checks(study)


CHECKS: dict[str, dict[str, type]] = {
    "identity": {"task": str, "steps": int},
    "stationary": {"task": str, "seeds": list, "lam": list, "tau": list, "h": dict},
    "blow_up": {"b2": float, "b3": list, "steps": int},
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
    positive = low >= 0 if name == "warm_up" else low > 0
    below = high < 1 if name in ("b1", "b2", "b3", "beta", "warm_up") else True
    if not (positive and below and low <= high):
        raise ValueError(
            f"{where} must be a number or a range [low, high], got {value!r}"
        )


# --- The design ---------------------------------------------------------------------


@functools.cache
def design(trials: int, seed: int) -> np.ndarray:
    """Returns points of [0, 1), one a trial, with a column for each of `DIMENSIONS`."""
    sobol = qmc.Sobol(len(DIMENSIONS), scramble=True, rng=seed)
    return sobol.random_base2(max(0, math.ceil(math.log2(trials))))[:trials]


def spread(name: str, ends: list[float], x: float) -> float:
    """Returns the number at a share of a range.

    A warm-up is spread evenly, a decay b on the logarithm of 1 - b, all else on its
    logarithm.
    """
    low, high = ends
    if name == "warm_up":
        value = low + (high - low) * x
    elif name in ("b1", "b2", "b3", "beta"):
        value = 1 - (1 - low) ** (1 - x) * (1 - high) ** x
    else:
        value = low ** (1 - x) * high**x
    return float(f"{value:.6g}")


def centre(study: Study, task: str, arm: str) -> float:
    """Returns the middle of an arm's learning rates on a task."""
    return float(study.tasks[task]["lr"] * study.arms[arm].get("rate", 1.0))


def settings(study: Study, task: str, arm: str) -> list[Numbers]:
    """Returns the settings in which an arm is tried on a task."""
    rule = RULES[study.arms[arm]["rule"]]
    half = 10 ** (study.space["decades"] / 2)
    middle = centre(study, task, arm)
    ranges: Table = {**rule.numbers}
    ranges |= {x: y for x, y in study.space.items() if x in {*SHARED, *rule.numbers}}
    ranges |= {x: y for x, y in study.arms[arm].items() if x not in ("rule", "rate")}
    ranges["lr"] = [middle / half, middle * half]
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


class Best(NamedTuple):
    """The setting of an arm with the lowest mean validation loss at the end.

    Attributes:
        h: The setting; None where every one diverged.
        loss: Its mean over the tuning seeds.
        position: Of its learning rate in the range, from 0 to 1.
        diverged: Settings that diverged, with any seed.
    """

    h: Numbers | None
    loss: float | None
    position: float | None
    diverged: int

    @property
    def at_edge(self) -> bool:
        """Whether it is in an outer sixth of the learning rates: too narrow a range."""
        return self.position is not None and not 1 / 6 <= self.position <= 5 / 6


def best(study: Study, record: Record, corpus: str, task: str, arm: str) -> Best:
    """Returns the best of an arm's tuning.

    Raises:
        KeyError: A trial is not in the record.
    """
    rule = study.arms[arm]["rule"]
    tried, diverged = [], 0
    for h in settings(study, task, arm):
        trials = [
            Trial("tune", task, arm, rule, h, x) for x in study.tuning_seeds(task)
        ]
        losses = [record.rows[study.key(x, corpus)]["final"] for x in trials]
        if None in losses:
            diverged += 1
        else:
            tried.append((sum(losses) / len(losses), h))
    if not tried:
        return Best(None, None, None, diverged)
    loss, h = min(tried, key=lambda x: x[0])
    decades = study.space["decades"]
    position = 0.5 + math.log10(h["lr"] / centre(study, task, arm)) / decades
    return Best(h, loss, position, diverged)


def final(study: Study, record: Record, corpus: str) -> list[Trial]:
    """Returns the trials of the best settings on seeds that tuning never saw."""
    first, count = study.final["first"], study.final["seeds"]
    return [
        Trial("final", task, arm, study.arms[arm]["rule"], h, seed)
        for task in study.tuned_tasks()
        for arm in study.arms
        if (h := best(study, record, corpus, task, arm).h) is not None
        for seed in range(first, first + count)
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
