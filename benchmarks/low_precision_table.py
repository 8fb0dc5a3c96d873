"""The tables of accuracy and speed in docs/low_precision.md, from a record.

Each setting is compared with float32 in the same form, seed by seed: the same
initialisation and the same batches. "Equivalent" means that two one-sided t-tests put
the mean difference within the margin, with Holm's correction over all rows.

    python benchmarks/low_precision_table.py benchmarks/records/2026-11-22_low_precision
"""

import argparse
import json
from pathlib import Path
from typing import Any

import numpy as np
from scipy import stats

MARGIN = 0.005  # nats a character
BASELINE = "float32"
PEAK_RATE = 4e-3  # of the schedule; the update is that of the chain, decay included


def by_arm(record: Path) -> dict[str, dict[int, dict[str, Any]]]:
    """Returns the runs, by arm and seed."""
    arms: dict[str, dict[int, dict[str, Any]]] = {}
    for line in record.read_text().splitlines():
        run = json.loads(line)
        arms.setdefault(run["arm"], {})[run["seed"]] = run
    return arms


def differences(runs: dict[int, Any], baseline: dict[int, Any]) -> np.ndarray:
    """Returns the paired differences of validation loss."""
    seeds = sorted(runs.keys() & baseline.keys())
    return np.array([runs[s]["validation"] - baseline[s]["validation"] for s in seeds])


def equivalence(d: np.ndarray) -> float:
    """Returns the p-value of two one-sided t-tests: that |mean| is not below MARGIN."""
    above = stats.ttest_1samp(d, -MARGIN, alternative="greater").pvalue
    below = stats.ttest_1samp(d, MARGIN, alternative="less").pvalue
    return float(max(above, below))


def holm(p: np.ndarray) -> np.ndarray:
    """Returns Holm's corrected p-values."""
    order = np.argsort(p)
    steps = np.maximum.accumulate(p[order] * np.arange(len(p), 0, -1))
    corrected = np.empty_like(p)
    corrected[order] = np.minimum(steps, 1.0)
    return corrected


def table(folder: Path) -> str:
    """Returns the table in Markdown."""
    arms = by_arm(folder / "runs.jsonl")
    compared = []
    for arm, runs in arms.items():
        form, setting = arm.split(", ", 1)
        if setting != BASELINE:
            compared.append((arm, differences(runs, arms[f"{form}, {BASELINE}"])))
    corrected = holm(np.array([equivalence(d) for _, d in compared]))
    verdicts = {arm: (d, p) for (arm, d), p in zip(compared, corrected, strict=True)}
    lines = [
        "| form, state | B a parameter | n | validation loss | minus float32 (95%) "
        "| p, equivalent | largest update, lr |",
        "|---|---|---|---|---|---|---|",
    ]
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
        lines.append(
            f"| {arm} | {first['state_bytes'] / first['parameters']:.2f} "
            f"| {len(runs)} | {np.mean(losses):.4f} | {shift} | {equal} "
            f"| {largest:.2f} |"
        )
    return "\n".join(lines)


def speed_table(folder: Path) -> str:
    """Returns the table of step times against Adam's in Markdown."""
    lines = (folder / "speed" / "results.jsonl").read_text().splitlines()
    found = {row.get("arm"): row for row in map(json.loads, lines)}
    table = [
        "| form, state | time of a step, against `optax.adam` (quartiles) |",
        "|---|---|",
    ]
    for arm, row in found.items():
        if arm and arm.startswith(("adam3", "optax.adamw")):
            low, middle, high = row["ratio"]
            name = arm.removeprefix("adam3 ")
            table.append(f"| {name} | {middle:.2f} ({low:.2f} to {high:.2f}) |")
    return "\n".join(table)


def main() -> None:
    """Prints the tables of a record."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path, help="where runs.jsonl is")
    folder = parser.parse_args().folder
    print(table(folder), speed_table(folder), sep="\n\n")


if __name__ == "__main__":
    main()
