"""Draws the picture of README.md, from a record: `python -m docs.tables.picture`."""

import json
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
from scipy import stats

ROOT = Path(__file__).parents[2]
RECORD = ROOT / "benchmarks" / "records" / "2026-11-25_bfloat16_parameters"
ARMS = {
    "alone": "parameters, bfloat16 alone",
    "rounded stochastically": "parameters, bfloat16, remainder None",
    "remainder of 1 byte": "parameters, bfloat16, remainder int8",
    "remainder of 2 bytes": "parameters, bfloat16, remainder int16",
}
BASELINE = "parameters, float32"
# Parameters with their remainders, and state, in bytes a parameter.
BYTES = {
    "float32, optax.adamw": (4, 8),
    "bfloat16 + int16, m and v bfloat16": (4, 4),
    "bfloat16 + int16, m float8, v bfloat16": (4, 3),
    "bfloat16 + int8, m and v float8": (3, 2),
    "bfloat16, m and v float8": (2, 2),
}


def intervals() -> dict[str, tuple[float, float]]:
    """Returns each arm's loss above float32's, paired, and half a 95% interval."""
    rows = map(json.loads, (RECORD / "runs.jsonl").read_text().splitlines())
    losses = {(row["arm"], row["seed"]): row["validation"] for row in rows}
    seeds = sorted({seed for _, seed in losses})
    found = {}
    for name, arm in ARMS.items():
        above = np.array([losses[arm, i] - losses[BASELINE, i] for i in seeds])
        found[name] = (
            above.mean(),
            stats.t.ppf(0.975, len(seeds) - 1) * stats.sem(above),
        )
    return found


def draw(path: Path, style: str) -> None:
    """Draws both halves, for a light or a dark page."""
    plt.style.use(["default", style])
    figure, (left, right) = plt.subplots(1, 2, figsize=(10, 2.6), layout="constrained")
    for y, (mean, half) in enumerate(intervals().values()):
        left.errorbar(
            mean, y, xerr=half, fmt="o", capsize=4, color="C3" if y == 0 else "C0"
        )
    left.axvline(0, color="0.5", lw=1)
    left.set_yticks(range(len(ARMS)), ARMS)
    left.set(title="bfloat16 parameters: loss above float32's, nats", ylim=(3.5, -0.5))
    for y, (parameters, state) in enumerate(BYTES.values()):
        right.barh(y, parameters, color="C0", label="parameters" if y == 0 else None)
        right.barh(
            y, state, left=parameters, color="C1", label="state" if y == 0 else None
        )
        right.text(parameters + state + 0.2, y, parameters + state, va="center")
    right.set_yticks(range(len(BYTES)), BYTES)
    right.set(title="bytes a parameter", ylim=(4.5, -0.5), xlim=(0, 13.5))
    right.legend(frameon=False, loc="lower right")
    for axes in (left, right):
        axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, dpi=160)
    plt.close(figure)


if __name__ == "__main__":
    draw(ROOT / "docs" / "images" / "summary.png", "default")
    draw(ROOT / "docs" / "images" / "summary-dark.png", "dark_background")
