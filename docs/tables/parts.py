"""What the tables and figures of records share."""

from collections.abc import Sequence
from typing import Any

import pandas as pd
from matplotlib.figure import Figure

from studies.study import markdown


def cell(x: Any, digits: int = 1) -> str:
    """Returns a text as it is, a number with these digits, and a dash for neither."""
    if isinstance(x, str):
        return x
    return "-" if pd.isna(x) else f"{x:.{digits}f}"


def between(middle: float, low: float, high: float, form: str) -> str:
    """Returns a number with the ends of its interval."""
    return f"{middle:{form}} ({low:{form}} to {high:{form}})"


def table(first: str, cells: pd.DataFrame) -> str:
    """Returns cells in Markdown, with a first column of what the index names."""
    return markdown.table([first, *cells], cells.map(cell).itertuples(name=None))


def panel_of(names: Sequence[str], height: float, base: float) -> tuple[Figure, Any]:
    """Returns a figure and its panel: a line a name, and a grey one at the base."""
    figure = Figure((8, 1 + height * len(names)), dpi=120, layout="constrained")
    panel = figure.subplots()
    panel.axvline(base, c="0.6", lw=1, zorder=0)
    panel.set_yticks(range(len(names)), names)
    panel.spines[["top", "right"]].set_visible(False)
    return figure, panel
