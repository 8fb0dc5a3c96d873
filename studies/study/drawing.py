"""The figures of a record, from results.json's numbers and the trials' alone."""

import itertools
import math
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from study import axes
from study.record import Record

Found = dict[str, Any]
Panel = Axes
# Colour and marker of each arm, the same in every record.
ARMS = {
    "adamw": ("black", "o"),
    "nadamw": ("C0", "s"),
    "cubic": ("C1", "^"),
    "stabilized": ("C2", "v"),
    "standardized": ("C3", "D"),
    "negative": ("C4", "<"),
    "random_sign": ("C5", ">"),
    "adabelief": ("C6", "p"),
    "ademamix": ("C7", "h"),
    "lion": ("C8", "P"),
    "muon": ("C9", "X"),
    "smoothed": ("navy", "H"),
    "magnitude": ("teal", "d"),
    "agreeing": ("yellowgreen", "8"),
    "fading": ("mediumorchid", "*"),
    "short_b3": ("sandybrown", "v"),
    "ends": ("slateblue", "s"),
    "cubic_at_scale_1": ("goldenrod", "^"),
}
UNKNOWN = ("0.5", "x")
WIDTH = 3.2  # inches, of a panel
ACROSS = 4  # panels beside each other
LINEAR_LAM = 1e-3


def draw(found: Found, record: Record, folder: Path) -> list[Path]:
    """Writes the figures of what there is, and returns their paths."""
    finals = [x for x in record.rows.values() if x["phase"] == "final" and x["finite"]]
    figures = {
        "finals": _finals(found),
        "curves": _curves(found, finals),
        "ratio": _ratio(found, finals),
        "learning_rate": _learning_rate(found),
        "lam_and_b3": _lam_and_b3(found),
        "stationary": _stationary(found.get("stationary", [])),
        "blow_up": _blow_up(found.get("blow_up", [])),
    }
    paths = []
    for name, figure in figures.items():
        if figure is not None:
            path = folder / f"{name}.png"
            figure.savefig(path, dpi=120)
            paths.append(path)
    return paths


def _panels(names: list[str], height: float) -> tuple[Figure, Iterator[Any]]:
    """Returns a figure with a panel for each name, which is its title."""
    across = min(ACROSS, len(names))
    down = math.ceil(len(names) / across)
    size = (0.8 + WIDTH * across, height * down)
    figure = Figure(figsize=size, layout="constrained")
    panels = figure.subplots(down, across, squeeze=False).ravel()
    for panel in panels[len(names) :]:
        panel.remove()
    for panel, name in zip(panels, names, strict=False):
        panel.set_title(name, loc="left", weight="bold", size="medium")
        panel.spines[["top", "right"]].set_visible(False)
    return figure, iter(panels[: len(names)])


def _tasks(found: Found) -> list[str]:
    """Returns the tasks, in their order."""
    return list(dict.fromkeys(x["task"] for x in found["arms"]))


def _arms(found: Found) -> list[str]:
    """Returns the arms, the baseline first."""
    arms = dict.fromkeys(x["arm"] for x in found["arms"])
    return [found["baseline"], *(x for x in arms if x != found["baseline"])]


def _style(arm: str, place: int) -> dict[str, Any]:
    """Returns how an arm's line is drawn, the place-th of a panel.

    Markers are hollow, and later lines are thinner, so that those below are seen.
    """
    colour, marker = ARMS.get(arm, UNKNOWN)
    width = max(0.8, 3.2 - 0.4 * place)
    return {"c": colour, "marker": marker, "mfc": "none", "ms": 5, "lw": width}


def _below(figure: Figure, panel: Panel) -> None:
    """Puts the legend of a panel below the figure."""
    handles, labels = panel.get_legend_handles_labels()
    fit = 2 * round(figure.get_figwidth() / WIDTH)
    columns = min(6, fit, max(1, len(labels)))
    figure.legend(
        handles,
        labels,
        loc="outside lower center",
        ncols=columns,
        frameon=False,
        fontsize="small",
    )


def _finals(found: Found) -> Figure:
    """Draws each arm's difference to the baseline, in per cent of the latter's loss."""
    tasks, arms = _tasks(found), _arms(found)[1:]
    figure, panels = _panels(tasks, 0.9 + 0.28 * len(arms))
    for task, panel in zip(tasks, panels, strict=True):
        rows = {x["arm"]: x for x in found["arms"] if x["task"] == task}
        percent = 100 / rows[found["baseline"]].get("final", np.nan)
        panel.axvspan(-100 * found["margin"], 100 * found["margin"], color="0.93")
        panel.axvline(0, color="0.6", lw=0.8)
        for place, arm in enumerate(reversed(arms)):
            if "interval" not in rows[arm]:
                panel.text(0, place, "not measured", va="center", size="small")
                continue
            colour, _ = ARMS.get(arm, UNKNOWN)
            low, high = (percent * x for x in rows[arm]["interval"])
            panel.plot([low, high], [place, place], c=colour, lw=2)
            middle = percent * rows[arm]["difference"]
            panel.plot([middle], [place], "o", c=colour, ms=5)
        first = tasks.index(task) % ACROSS == 0  # the others have the same arms
        panel.set_yticks(range(len(arms)), arms[::-1] if first else [""] * len(arms))
        panel.set_ylim(-0.6, len(arms) - 0.4)
        panel.margins(x=0.1)
        axes.per_cent(panel.xaxis, f"loss minus {found['baseline']}'s")
    return figure


def _arms_of(found: Found, names: Iterable[str]) -> list[str]:
    """Returns the arms of these rules, in their order."""
    wanted = set(names)
    arms = {x["arm"]: x["rule"] for x in found["arms"]}
    return [arm for arm, rule in arms.items() if rule in wanted]


def _curves(found: Found, finals: list[Found]) -> Figure:
    """Draws validation losses over training: mean and range over the seeds."""
    tasks = _tasks(found)
    rules = ("cubic", "stabilized", "standardized")
    arms = [found["baseline"], *_arms_of(found, rules)]
    figure, panels = _panels(tasks, 3.4)
    panel: Any = None
    for task, panel in zip(tasks, panels, strict=True):
        for place, arm in enumerate(arms):
            rows = [x for x in finals if (x["task"], x["arm"]) == (task, arm)]
            if not rows:
                continue
            losses = np.array([x["validation_loss"] for x in rows])
            _over_training(panel, arm, place, losses.mean(0))
            ends = losses.min(0), losses.max(0)
            colour, _ = ARMS.get(arm, UNKNOWN)
            done = _shares(losses.shape[1])
            panel.fill_between(done, *ends, color=colour, alpha=0.15, lw=0)
        axes.logarithmic(panel.yaxis)
    figure.supylabel("validation loss (band: all seeds)", size="medium")
    _below(figure, panel)
    return figure


def _ratio(found: Found, finals: list[Found]) -> Figure:
    """Draws the median of |b_t|/|m̂| over training, and where it is rounding."""
    tasks = _tasks(found)
    arms = [x for x in _arms(found) if any(x == y["arm"] for y in finals
                                           if "ratio" in y)]  # fmt: skip
    figure, panels = _panels(tasks, 3.4)
    panel: Any = None
    for task, panel in zip(tasks, panels, strict=True):
        for place, arm in enumerate(arms):
            rows = [x["ratio"] for x in finals if (x["task"], x["arm"]) == (task, arm)]
            if rows:
                ratios = np.nanmedian(np.array(rows, dtype=float), 0)
                _over_training(panel, arm, place, ratios)
        panel.axhline(6e-8, c="0.6", lw=0.8, ls=":")
        axes.logarithmic(panel.yaxis)
    figure.supylabel("median |b|/|m̂| (dotted: float32's rounding)", size="medium")
    _below(figure, panel)
    return figure


def _over_training(panel: Panel, arm: str, place: int, values: np.ndarray) -> None:
    """Draws a curve; markers of arms that coincide stand beside each other."""
    style = _style(arm, place) | {"markevery": (place % 8, 8)}
    panel.plot(_shares(len(values)), values, label=arm, **style)
    panel.set_xlabel("share of the steps")


def _shares(points: int) -> np.ndarray:
    """Returns the shares of the steps that are done at the log points."""
    return np.linspace(0, 1, points + 1)[1:]


def _learning_rate(found: Found) -> Figure | None:
    """Draws final losses against the learning rate, about each arm's best."""
    rows = found["sweeps"]["lr"]
    if not rows:
        return None
    tasks = _tasks(found)
    figure, panels = _panels(tasks, 4.4)
    panel: Any = None
    for task, panel in zip(tasks, panels, strict=True):
        for place, arm in enumerate(_arms(found)):
            mine = [x for x in rows if (x["task"], x["arm"]) == (task, arm)]
            if mine:
                panel.plot(*_sorted(mine), label=arm, **_style(arm, place))
        panel.set_xscale("log")
        axes.logarithmic(panel.yaxis)
        panel.set_xlabel("learning rate")
    figure.supylabel("final validation loss", size="medium")
    _below(figure, panel)
    return figure


def _sorted(rows: list[Found]) -> tuple[np.ndarray, np.ndarray]:
    """Returns the values of a sweep in order, and the mean losses; NaN if diverged."""
    ordered = sorted(rows, key=lambda x: x["value"])
    losses = [np.mean(np.array(x["losses"], dtype=float)) for x in ordered]
    return np.array([x["value"] for x in ordered]), np.array(losses)


def _lam_and_b3(found: Found) -> Figure | None:
    """Draws the standardized form's final losses against lam and against b3."""
    sweeps = {x: found["sweeps"][x] for x in ("lam", "b3") if found["sweeps"][x]}
    if not sweeps:
        return None
    figure, panels = _panels(list(sweeps), 3.4)
    panel: Any = None
    for (name, rows), panel in zip(sweeps.items(), panels, strict=True):
        for number, task in enumerate(_tasks(found)):
            mine = [x for x in rows if x["task"] == task]
            if not mine:
                continue
            values, losses = _sorted(mine)
            # Of lam = 0, which is Adam; of b3 there is no such thing.
            base = losses[values == 0] if name == "lam" else losses[-1:]
            percent = 100 * (losses / base - 1) if base.size else losses
            shown = values if name == "lam" else 1 - values
            style = {"c": f"C{number}", "marker": "osD^vPX*"[number % 8], "mfc": "none"}
            panel.plot(shown, percent, label=task, lw=1.0, **style)
        panel.axhline(0, c="0.7", lw=0.8)
        reference = "lam = 0's" if name == "lam" else "the slowest decay's"
        axes.per_cent(panel.yaxis, f"loss minus {reference}")
        if name == "lam":
            axes.symmetric(panel.xaxis, LINEAR_LAM)
            axes.ticks(panel.xaxis, axes.LAM)
            panel.set_xlabel(f"lam (log beyond ±{LINEAR_LAM:g})")
        else:
            panel.set_xscale("log")
            panel.set_xlabel("1 - b3")
    _below(figure, panel)
    return figure


def _stationary(rows: list[Found]) -> Figure | None:
    """Draws the measured shift of the stationary point against its closed form."""
    if not rows:
        return None
    figure, panels = _panels(["quadratic, skewed noise"], 3.4)
    panel = next(panels)
    for number, tau in enumerate(dict.fromkeys(x["tau"] for x in rows)):
        mine = sorted((x for x in rows if x["tau"] == tau), key=lambda x: x["lam"])
        lams = [x["lam"] for x in mine]
        form = f"C{number}"
        label = f"tau = {tau:g}"
        panel.plot(lams, [x["closed_form"] for x in mine], "-", c=form, lw=1.0)
        shifts = [x["shift"] for x in mine]
        panel.plot(lams, shifts, "os"[number % 2], c=form, mfc="none", label=label)
    panel.set_xlabel("lam")
    panel.set_ylabel("shift of the stationary point")
    panel.legend(frameon=False, title="lines: closed form")
    return figure


def _blow_up(rows: list[Found]) -> Figure | None:
    """Draws the largest update after one gradient of 1, against b3."""
    if not rows:
        return None
    figure, panels = _panels([f"one gradient, then none; b2 = {rows[0]['b2']:g}"], 3.4)
    panel = next(panels)
    grouped = itertools.groupby(rows, lambda x: x["form"])
    for place, (form, mine) in enumerate(grouped):
        pairs = sorted((1 - x["b3"], x["largest"]) for x in mine)
        panel.plot(*zip(*pairs, strict=True), label=form, **_style(form, 3 * place))
    panel.axvline(1 - rows[0]["b2"] ** 0.5, c="0.6", lw=0.8, ls=":")
    panel.set_xscale("log")
    panel.set_yscale("log")
    panel.set_xlabel("1 - b3 (dotted: b3 = sqrt(b2))")
    panel.set_ylabel("largest update, learning rates")
    panel.legend(frameon=False)
    return figure
