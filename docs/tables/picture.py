"""Draws the picture of README.md, from a record: `python -m docs.tables.picture`."""

from pathlib import Path

import matplotlib.pyplot as plt
from scipy import stats

from docs.tables.low_precision import BASELINE, read

ROOT = Path(__file__).parents[2]
RECORD = ROOT / "benchmarks" / "records" / "2026-11-25_bfloat16_parameters"
STATES = {
    "alone": "bfloat16 alone",
    "rounded stochastically": "bfloat16, remainder None",
    "remainder of 1 byte": "bfloat16, remainder int8",
    "remainder of 2 bytes": "bfloat16, remainder int16",
}
# Parameters with their remainders, and state, in bytes a parameter.
BYTES = {
    "float32, optax.adamw": (4, 8),
    "bfloat16 + int16, m and v bfloat16": (4, 4),
    "bfloat16 + int16, m float8, v bfloat16": (4, 3),
    "bfloat16 + int8, m and v float8": (3, 2),
    "bfloat16 rounded, m and v float8": (2, 2),
}


def draw(path: Path, style: str) -> None:
    """Draws both halves, for a light or a dark page."""
    spines = {"axes.spines.top": False, "axes.spines.right": False}
    plt.style.use(["default", style, spines])
    figure, (left, right) = plt.subplots(1, 2, figsize=(10, 2.6), layout="constrained")
    losses = read(RECORD).pivot(index="seed", columns="state", values="validation")
    for y, state in enumerate(STATES.values()):
        above = losses[state] - losses[BASELINE]  # paired, with a 95% interval
        half = stats.t.ppf(0.975, len(above) - 1) * above.sem()
        look = {"fmt": "o", "capsize": 4, "color": "C0" if y else "C3"}
        left.errorbar(above.mean(), y, xerr=half, **look)
    left.axvline(0, color="0.5", lw=1)
    left.set_yticks(range(len(STATES)), STATES)
    left.set(title="bfloat16 parameters: loss above float32's, nats", ylim=(3.5, -0.5))
    places, (parameters, state) = range(len(BYTES)), zip(*BYTES.values(), strict=True)
    right.barh(places, parameters, color="C0", label="parameters")
    right.barh(places, state, left=parameters, color="C1", label="state")
    for y, both in enumerate(map(sum, BYTES.values())):
        right.text(both + 0.2, y, both, va="center")
    right.set_yticks(places, BYTES)
    right.set(title="bytes a parameter", ylim=(4.5, -0.5), xlim=(0, 13.5))
    right.legend(frameon=False, loc="lower right")
    figure.savefig(path, dpi=160)


if __name__ == "__main__":
    draw(ROOT / "docs" / "images" / "summary.png", "default")
    draw(ROOT / "docs" / "images" / "summary-dark.png", "dark_background")
