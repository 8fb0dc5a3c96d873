"""The figures of a record, from results.json's numbers and the trials' alone."""

import itertools
import math
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import matplotlib as mpl
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from study.record import Record

Found = dict[str, Any]
Panel = Axes
COLOURS = mpl.color_sequences["tab10"]
WIDTH = 3.2  # inches, of a panel
ACROSS = 4  # panels beside each other
PERCENT = [1, 2, 5, 10, 20, 50, 100, 200, 500]


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


def _in_per_cent(axis: Any) -> None:
    """Labels an axis that is linear about 0 and logarithmic beyond."""
    low, high = axis.get_view_interval()
    wide = max(-low, high) > 10
    sizes = PERCENT[1::2] if wide else PERCENT
    low = max(low, -100)  # no loss can fall by more
    ticks = [x for x in (*(-y for y in sizes), 0, *sizes) if low <= x <= high]
    axis.set_ticks(ticks, [f"{x:g}" for x in ticks])
    axis.set_ticks([], minor=True)


def _tasks(found: Found) -> list[str]:
    """Returns the tasks, in their order."""
    return list(dict.fromkeys(x["task"] for x in found["arms"]))


def _colours(found: Found) -> dict[str, Any]:
    """Returns a colour for each arm: black for the baseline."""
    arms = dict.fromkeys(x["arm"] for x in found["arms"])
    others = [x for x in arms if x != found["baseline"]]
    colours = dict(zip(others, itertools.cycle(COLOURS), strict=False))
    return {found["baseline"]: "black"} | colours


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
    tasks, colours = _tasks(found), _colours(found)
    arms = [x for x in colours if x != found["baseline"]]
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
            low, high = (percent * x for x in rows[arm]["interval"])
            panel.plot([low, high], [place, place], c=colours[arm], lw=2)
            middle = percent * rows[arm]["difference"]
            panel.plot([middle], [place], "o", c=colours[arm], ms=5)
        panel.set_yticks(range(len(arms)), list(reversed(arms)))
        # One bad arm would hide what the others are.
        panel.set_xscale("symlog", linthresh=2.0)
        panel.margins(x=0.1)
        _in_per_cent(panel.xaxis)
        panel.set_xlabel(f"loss minus {found['baseline']}'s, %")
    return figure


def _arms_of(found: Found, names: Iterable[str]) -> list[str]:
    """Returns the arms of these rules, in their order."""
    wanted = set(names)
    arms = {x["arm"]: x["rule"] for x in found["arms"]}
    return [arm for arm, rule in arms.items() if rule in wanted]


def _curves(found: Found, finals: list[Found]) -> Figure:
    """Draws validation losses over training: mean and range over the seeds."""
    tasks, colours = _tasks(found), _colours(found)
    rules = ("cubic", "stabilized", "standardized")
    arms = [found["baseline"], *_arms_of(found, rules)]
    figure, panels = _panels(tasks, 3.4)
    panel: Any = None
    for task, panel in zip(tasks, panels, strict=True):
        for arm in arms:
            rows = [x for x in finals if (x["task"], x["arm"]) == (task, arm)]
            if not rows:
                continue
            losses = np.array([x["validation_loss"] for x in rows])
            done = np.linspace(0, 1, losses.shape[1] + 1)[1:]
            panel.plot(done, losses.mean(0), c=colours[arm], label=arm, lw=1.2)
            ends = losses.min(0), losses.max(0)
            panel.fill_between(done, *ends, color=colours[arm], alpha=0.2, lw=0)
        panel.set_yscale("log")
        panel.set_xlabel("share of the steps")
    figure.supylabel("validation loss (band: all seeds)", size="medium")
    _below(figure, panel)
    return figure


def _ratio(found: Found, finals: list[Found]) -> Figure:
    """Draws the median of |b_t|/|m̂| over training, and where it is rounding."""
    tasks, colours = _tasks(found), _colours(found)
    figure, panels = _panels(tasks, 3.4)
    panel: Any = None
    for task, panel in zip(tasks, panels, strict=True):
        for arm, colour in colours.items():
            rows = [
                x["ratio"]
                for x in finals
                if (x["task"], x["arm"]) == (task, arm) and "ratio" in x
            ]
            if not rows:
                continue
            ratios = np.array(rows, dtype=float)
            done = np.linspace(0, 1, ratios.shape[1] + 1)[1:]
            panel.plot(done, np.nanmedian(ratios, 0), c=colour, label=arm, lw=1.2)
        panel.axhline(6e-8, c="0.6", lw=0.8, ls=":")
        panel.set_yscale("log")
        panel.set_xlabel("share of the steps")
    figure.supylabel("median |b|/|m̂| (dotted: float32's rounding)", size="medium")
    _below(figure, panel)
    return figure


def _learning_rate(found: Found) -> Figure | None:
    """Draws final losses against the learning rate, about each arm's best."""
    rows = found["sweeps"]["lr"]
    if not rows:
        return None
    tasks, colours = _tasks(found), _colours(found)
    figure, panels = _panels(tasks, 3.6)
    panel: Any = None
    for task, panel in zip(tasks, panels, strict=True):
        lowest, highest = [], []
        for arm, colour in colours.items():
            mine = [x for x in rows if (x["task"], x["arm"]) == (task, arm)]
            if mine:
                rates, losses = _sorted(mine)
                panel.plot(rates, losses, ".-", c=colour, label=arm, lw=1.0, ms=4)
                lowest.append(np.nanmin(losses))
                highest.append(np.nanmax(losses))
        panel.set_xscale("log")
        panel.set_yscale("log")
        bottom = min(lowest, default=1.0)
        factors = np.array([1.0, 1.2, 1.5, 2.0, 3.0])
        ticks = [float(f"{x:.2g}") for x in factors * bottom]
        panel.set_yticks(ticks, [f"{x:g}" for x in ticks])
        top = min(3.0 * bottom, 1.03 * max(highest, default=3.0))
        panel.set_ylim(0.97 * bottom, top)
        panel.set_yticks([], minor=True)
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
            panel.plot(shown, percent, ".-", label=task, c=f"C{number}", lw=1.0)
        panel.axhline(0, c="0.7", lw=0.8)
        panel.set_yscale("symlog", linthresh=2.0)
        _in_per_cent(panel.yaxis)
        if name == "lam":
            panel.set_xscale("symlog", linthresh=1e-3)
            panel.set_xticks([-0.1, -0.01, 0, 0.001, 0.01, 0.1])
        else:
            panel.set_xscale("log")
        panel.set_xlabel("lam" if name == "lam" else "1 - b3")
        reference = "lam = 0's" if name == "lam" else "the slowest decay's"
        panel.set_ylabel(f"loss minus {reference}, %")
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
        panel.plot(lams, shifts, "o", c=form, ms=5, label=label)
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
    for form, mine in itertools.groupby(rows, lambda x: x["form"]):
        pairs = sorted((1 - x["b3"], x["largest"]) for x in mine)
        panel.plot(*zip(*pairs, strict=True), ".-", label=form)
    panel.axvline(1 - rows[0]["b2"] ** 0.5, c="0.6", lw=0.8, ls=":")
    panel.set_xscale("log")
    panel.set_yscale("log")
    panel.set_xlabel("1 - b3 (dotted: b3 = sqrt(b2))")
    panel.set_ylabel("largest update, learning rates")
    panel.legend(frameon=False)
    return figure
