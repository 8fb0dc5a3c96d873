"""What char_lm.py reports: a table, a sentence and a figure."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import jax
import numpy as np
from matplotlib.figure import Figure


@dataclass
class Run:
    """The training by one optimizer, as far as it went."""

    name: str
    optimizer: Any
    params: Any = None
    state: Any = None
    losses: list[float] = field(default_factory=list)
    validation: dict[int, float] = field(default_factory=dict)  # by the steps done
    seconds: float = 0.0
    ratio: str = "-"  # the median of |b|/|m̂|, once it is known

    def latest(self) -> str:
        """Returns the last loss, and how many steps a second were done."""
        rate = f"{(len(self.losses) - 1) / self.seconds:.0f}/s" if self.seconds else ""
        return f"{self.name} {self.losses[-1]:.3f} {rate}".rstrip()


def table(runs: list[Run]) -> str:
    """Returns the numbers, in lines that fit a narrow terminal."""
    lines = ["optimizer  steps   train  valid.  seconds   state  |b|/|m̂|"]
    for run in runs:
        train = np.mean(run.losses[-50:])
        validation = list(run.validation.values())[-1]
        size = sum(x.nbytes for x in jax.tree.leaves(run.state)) / 1e6
        lines.append(
            f"{run.name:9} {len(run.losses):>6} {train:7.4f} {validation:7.4f} "
            f"{run.seconds:8.1f} {size:4.1f} MB  {run.ratio:>7}"
        )
    return "\n".join(lines)


def headline(runs: list[Run]) -> str:
    """Returns the result in words."""
    ours, theirs = runs
    losses = [f"{list(run.validation.values())[-1]:.3f}" for run in runs]
    gap = float(losses[0]) - float(losses[1])  # as the reader would subtract
    where = f"{abs(gap):.3f} {'above' if gap > 0 else 'below'}" if gap else "level with"
    names = f"One seed: {ours.name} ends {where} {theirs.name}"
    return f"{names}: validation loss {losses[0]} against {losses[1]}"


def draw(runs: list[Run], path: Path) -> None:
    """Writes the figure: the losses, and their difference."""
    figure = Figure(figsize=(8, 5.5), dpi=150, layout="constrained")
    upper, lower = figure.subplots(2, sharex=True, height_ratios=(5, 2))
    ours, theirs = runs
    width = min(25, 1 + len(ours.losses) // 20)

    def smooth(losses: Any) -> tuple[Any, Any]:
        means = np.convolve(losses, np.full(width, 1 / width), mode="valid")
        return np.arange(len(means)) + (width + 1) / 2, means

    # One curve may hide the other: the second is dashed, and its dots sit in rings.
    for run, color, line, dots in (
        (ours, "C3", "-", "none"),
        (theirs, "C0", "--", "C0"),
    ):
        upper.plot(*smooth(run.losses), line, c=color, label=run.name)
        points = zip(*run.validation.items(), strict=True)
        upper.plot(*points, "o", c=color, mfc=dots, label="validation")
    lower.axhline(0, c="0.8")
    lower.plot(*smooth(np.subtract(ours.losses, theirs.losses)), c="0.5")
    gaps = [ours.validation[i] - theirs.validation[i] for i in ours.validation]
    lower.plot(list(ours.validation), gaps, "k.")
    upper.set_title(headline(runs), loc="left", weight="bold", size="medium")
    upper.set_ylabel("loss, nats a character")
    upper.legend(frameon=False, ncols=2)
    lower.set_ylabel(f"{ours.name}\nminus {theirs.name}")
    lower.set_xlabel("step (lines: training, smoothed)")
    figure.savefig(path)
