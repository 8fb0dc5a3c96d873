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

from study.arms import RULES, Numbers
from study.record import Record
from study.tasks import KINDS, Corpus, Sizes, Task

# A column of the design each. Every arm takes its columns from the same points, so arms
# share what both have, trial by trial. (The records' points have a column of no arm.)
SHARED = ("lr", "warm_up", "b2", "weight_decay")
COLUMNS = (*SHARED, "lam", "b3", "tau", "b1", "eps", "(none)", "smoothing")
LINEAR = ("warm_up", "smoothing")  # spread evenly, from 0 on
DECAYS = ("b1", "b2", "b3")
EDGE = 0.1  # the outer share of a range at which a best number is reported
POINTS = 20  # of a training, at which it is logged
OF_PLAN = ("lr", "lanes")  # of a task, not of its trials; lanes are of an older program
Table = dict[str, Any]


class Trial(NamedTuple):
    """A training: all that its result depends on, and what it is for."""

    phase: str  # "tune", "final" or "lam"
    task: str
    arm: str
    rule: str  # of the arm
    h: Numbers
    seed: int  # of parameters, data, batches and the rule's own noise


class Study(NamedTuple):
    """A configuration: the tables of its file."""

    baseline: str  # the arm to compare with
    margin: float  # of equivalence, relative to the baseline's mean loss
    alpha: float  # level of significance
    workers: int  # trainings at the same time
    primary: Table  # arm: of the primary comparison with the baseline
    tuning: Table  # trials, seeds, design
    final: Table  # first, seeds
    sweeps: Table  # lam, seeds
    space: Table  # ranges for all arms
    arms: Table  # their rules, and ranges of their own
    tasks: Table  # kinds, steps, centres of the learning rate, options
    checks: Table  # class_means

    def key(self, trial: Trial, corpus: str) -> str:
        """Returns a digest of what defines a trial; no name is in it."""
        task = self.tasks[trial.task]
        defines = {
            "phase": trial.phase,
            "task": {x: task[x] for x in task if x not in OF_PLAN},
            "corpus": None if task["kind"] == "softmax" else corpus,
            "rule": trial.rule,
            "h": trial.h,
            "seed": trial.seed,
        }
        text = json.dumps(defines, sort_keys=True)
        return hashlib.sha256(text.encode()).hexdigest()[:24]

    def made(self, task: str, corpus: Corpus) -> Task:
        """Returns a task; ValueError says that the text is too short for it."""
        table = self.tasks[task]
        options = {k: v for k, v in table.items() if k in Sizes._fields}
        if table["kind"] == "softmax":
            options.setdefault("examples", 8192)
        return KINDS[table["kind"]](corpus, Sizes(**options))

    def final_seeds(self) -> list[int]:
        """Returns the seeds of finals, which tuning never sees."""
        return [self.final["first"] + i for i in range(self.final["seeds"])]


def load(path: Path) -> Study:
    """Returns a study. The files are ours, so their values are taken as they are."""
    return Study(**tomllib.loads(path.read_text(encoding="utf-8")))


@functools.cache
def design(trials: int, seed: int) -> np.ndarray:
    """Returns points of [0, 1), one a trial, with a column for each of `COLUMNS`."""
    sobol = qmc.Sobol(len(COLUMNS), scramble=True, rng=seed)
    return sobol.random_base2(math.ceil(math.log2(trials)))[:trials]


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


def ranges_of(study: Study, task: str, arm: str) -> Table:
    """Returns the range of each number that an arm has, or the number."""
    table = study.arms[arm]
    numbers = RULES[table["rule"]].numbers
    half, middle = 10 ** (study.space["decades"] / 2), study.tasks[task]["lr"]
    shared = {x: y for x, y in study.space.items() if x in {*SHARED, *numbers}}
    own = {x: y for x, y in table.items() if x != "rule"}
    return {**numbers, **shared, **own, "lr": [middle / half, middle * half]}


def settings(study: Study, task: str, arm: str) -> tuple[list[Numbers], np.ndarray]:
    """Returns the settings in which an arm is tried on a task, and their points."""
    ranges = ranges_of(study, task, arm)
    points = design(study.tuning["trials"], study.tuning["design"])

    def number(name: str, x: float) -> float:
        ends = ranges[name]
        return spread(name, ends, x) if isinstance(ends, list) else float(ends)

    columns = [(i, name) for i, name in enumerate(COLUMNS) if name in ranges]
    return [{name: number(name, x[i]) for i, name in columns} for x in points], points


def tune(study: Study) -> list[Trial]:
    """Returns the trials of tuning: the same number for each arm."""
    return [
        Trial("tune", task, arm, study.arms[arm]["rule"], h, seed)
        for task in study.tasks
        for arm in study.arms
        for h in settings(study, task, arm)[0]
        for seed in study.tuning["seeds"]
    ]


class Tuned(NamedTuple):
    """An arm's settings in the order of the design, and the best of them."""

    settings: list[Numbers]
    losses: list[float]  # the mean at the end over the seeds; infinite if one diverged
    h: Numbers  # the setting with the lowest loss
    positions: dict[str, float]  # of its tuned numbers in their ranges, from 0 to 1

    def shown(self) -> Table:
        """Returns what tuning chose, and the numbers that lie at an edge of a range."""
        at = self.positions.items()
        return {
            "h": self.h,
            "tuning_loss": min(self.losses),
            "tuning_diverged": self.losses.count(math.inf),
            "positions": self.positions,
            "edges": [x for x, y in at if not EDGE <= y <= 1 - EDGE],
        }


def tuned(study: Study, record: Record, corpus: str, task: str, arm: str) -> Tuned:
    """Returns what an arm's tuning found; raises KeyError where it has not ended."""
    rule, losses = study.arms[arm]["rule"], []
    found, points = settings(study, task, arm)
    for h in found:
        trials = [Trial("tune", task, arm, rule, h, x) for x in study.tuning["seeds"]]
        finals = [record.rows[study.key(x, corpus)]["final"] for x in trials]
        losses.append(math.inf if None in finals else sum(finals) / len(finals))
    best = losses.index(min(losses))
    at = dict(zip(COLUMNS, points[best].tolist(), strict=True))
    ranged = [x for x, y in ranges_of(study, task, arm).items() if type(y) is list]
    return Tuned(
        found, losses, found[best], {x: at[x] for x in found[best] if x in ranged}
    )


def final(study: Study, record: Record, corpus: str) -> list[Trial]:
    """Returns the trials of the best settings on seeds that tuning never saw."""
    return [
        Trial("final", task, arm, study.arms[arm]["rule"], h, seed)
        for task in study.tasks
        for arm in study.arms
        for h in [tuned(study, record, corpus, task, arm).h]
        for seed in study.final_seeds()
    ]


def sweep(study: Study, record: Record, corpus: str) -> list[Trial]:
    """Returns the trials of lam at the baseline's best setting, b3 its b2, tau 1."""
    rule = "standardized"
    return [
        Trial(
            "lam", task, rule, rule, h | {"b3": h["b2"], "tau": 1.0, "lam": lam}, seed
        )
        for task in study.tasks
        for h in [tuned(study, record, corpus, task, study.baseline).h]
        for lam in study.sweeps["lam"]
        for seed in study.sweeps["seeds"]
    ]
