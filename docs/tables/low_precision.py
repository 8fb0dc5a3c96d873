"""The table of accuracy in docs/low_precision.md, from a record.

Each setting is compared with float32 in the same form, seed by seed: the same
initialisation and the same batches. "Equivalent" means that two one-sided t-tests put
the mean difference within the margin, with Holm's correction over all rows.
"""

import json
from pathlib import Path
from typing import Any

import numpy as np
from scipy import stats

from studies.study.markdown import table
from studies.study.statistics import equivalence, holm

HEAD = (
    "form, state",
    "B a parameter",
    "n",
    "validation loss",
    "minus float32 (95%)",
    "p, equivalent",
    "largest update, lr",
)
MARGIN = 0.005  # nats a character
BASELINE = "float32"
REMAINDERS = (None, "int8", "int16")
STATES = (BASELINE, "float32, rate times 1.07", "bfloat16", "float8, v bfloat16")
STATES += ("float8", "bfloat16 alone")
STATES += tuple(f"bfloat16, remainder {x}" for x in REMAINDERS)
PEAK_RATE = 4e-3  # of the schedule; the update is that of the chain, decay included


def by_arm(record: Path) -> dict[str, dict[int, dict[str, Any]]]:
    """Returns the runs, by arm and seed; arms by form, then by state."""
    arms: dict[str, dict[int, dict[str, Any]]] = {}
    for line in record.read_text().splitlines():
        run = json.loads(line)
        arms.setdefault(run["arm"], {})[run["seed"]] = run
    forms = list(dict.fromkeys(arm.split(", ", 1)[0] for arm in arms))

    def place(arm: str) -> tuple[int, int]:
        form, state = arm.split(", ", 1)
        return forms.index(form), STATES.index(state)

    return {arm: arms[arm] for arm in sorted(arms, key=place)}


def differences(runs: dict[int, Any], baseline: dict[int, Any]) -> np.ndarray:
    """Returns the paired differences of validation loss."""
    seeds = sorted(runs.keys() & baseline.keys())
    return np.array([runs[s]["validation"] - baseline[s]["validation"] for s in seeds])


def tables(folder: Path) -> list[str]:
    """Returns the table in Markdown."""
    arms = by_arm(folder / "runs.jsonl")
    compared = []
    for arm, runs in arms.items():
        form, setting = arm.split(", ", 1)
        if setting != BASELINE:
            compared.append((arm, differences(runs, arms[f"{form}, {BASELINE}"])))
    corrected = holm([equivalence(d, MARGIN) for _, d in compared])
    verdicts = {arm: (d, p) for (arm, d), p in zip(compared, corrected, strict=True)}
    rows = []
    for arm, runs in arms.items():
        losses = [run["validation"] for run in runs.values()]
        first = next(iter(runs.values()))
        largest = max(run["largest"] for run in runs.values()) / PEAK_RATE
        shift = equal = ""
        if arm in verdicts:
            d, p = verdicts[arm]
            low, high = stats.t.interval(0.95, len(d) - 1, d.mean(), stats.sem(d))
            shift = f"{d.mean():+.4f} ({low:+.4f} to {high:+.4f})"
            equal = f"{p:.0e}"
        size = first["state_bytes"] / first["parameters"]
        cells = [arm, f"{size:.2f}", str(len(runs)), f"{np.mean(losses):.4f}"]
        rows.append([*cells, shift, equal, f"{largest:.2f}"])
    return [table(HEAD, rows)]
