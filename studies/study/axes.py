"""Axes whose ticks do not touch, and whose scale is announced."""

from typing import Any

import numpy as np
from matplotlib.ticker import FixedFormatter, FixedLocator, MaxNLocator, NullLocator

LINEAR = 2.0  # per cent, up to which an axis of differences is linear
# In the order in which they are taken.
PERCENT = (0, 10, -10, 100, -100, 2, -2, 1000, 1, -1, 50, -50, 5, -5, 20, -20, 200, 500)
LAM = (0, 0.1, -0.1, 0.01, -0.01, 0.001, -0.001)
SHORT = 5.0  # per cent; an axis no longer than that is linear


def per_cent(axis: Any, text: str) -> None:
    """Scales and labels an axis of differences.

    Linear, where none is beyond ±5%. Else logarithmic beyond ±2%, for one bad arm would
    hide what the others are.
    """
    low, high = limits(axis)
    if max(-low, high) <= SHORT:
        axis.set_major_locator(MaxNLocator(5))
        axis.set_label_text(f"{text}, %")
        return
    symmetric(axis, LINEAR)
    ticks(axis, PERCENT)
    space = " " if axis.axis_name == "x" else "\n"
    axis.set_label_text(f"{text}, %{space}(log beyond ±{LINEAR:g})")


def symmetric(axis: Any, linear: float) -> None:
    """Makes an axis linear up to ± a value, and logarithmic beyond."""
    scale = getattr(axis.axes, f"set_{axis.axis_name}scale")
    scale("symlog", linthresh=linear)


def logarithmic(axis: Any) -> None:
    """Makes an axis logarithmic, with ticks that are plain numbers on a short one."""
    getattr(axis.axes, f"set_{axis.axis_name}scale")("log")
    low, high = limits(axis)
    if high / low > 100:
        return  # powers of ten
    decades = 10.0 ** np.arange(np.floor(np.log10(low)), np.log10(high) + 1)
    wanted = [x * digit for digit in (1, 2, 5, 3, 4, 6, 7, 8, 9) for x in decades]
    inside = [x for x in wanted if low <= x <= high]
    if len(inside) < 3:
        inside = [x for x in MaxNLocator(5).tick_values(low, high) if low <= x <= high]
    ticks(axis, inside)


def ticks(axis: Any, wanted: Any) -> None:
    """Sets those of the wanted ticks, the first ones first, that do not touch."""
    low, high = limits(axis)
    transform = axis.get_transform().transform
    start, end = transform(np.array([low, high]))
    taken: dict[float, float] = {}  # place on the axis of each tick
    for x in map(float, wanted):
        place = float((transform(np.array([x]))[0] - start) / (end - start))
        gaps = (abs(place - at) - _apart(axis, x, y) for y, at in taken.items())
        if low <= x <= high and all(gap >= 0 for gap in gaps):
            taken[x] = place
    axis.set_major_locator(FixedLocator(list(taken)))
    axis.set_major_formatter(FixedFormatter([f"{x:.4g}" for x in taken]))
    axis.set_minor_locator(NullLocator())


def _apart(axis: Any, a: float, b: float) -> float:
    """Returns the share of an axis that must lie between two ticks."""
    if axis.axis_name == "y":
        return 0.07
    return 0.03 + 0.016 * (len(f"{a:.4g}") + len(f"{b:.4g}"))


def limits(axis: Any) -> tuple[float, float]:
    """Returns the ends of an axis, once it fits its data."""
    axis.axes.autoscale_view()
    low, high = sorted(getattr(axis.axes, f"get_{axis.axis_name}lim")())
    return low, high
