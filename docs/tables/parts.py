"""What the tables and figures of records share."""

from collections.abc import Iterable, Sequence
from typing import Any

import pandas as pd
from matplotlib.figure import Figure

from studies.study import markdown


def last(rows: Iterable[dict[str, Any]], *keys: str) -> pd.DataFrame:
    """Returns the last value of each field, a row for each value of the keys."""
    return pd.DataFrame(rows).groupby(list(keys), sort=False, as_index=False).last()


def number(x: float, digits: int = 1) -> str:
    """Returns a number; a dash where there is none."""
    return "-" if pd.isna(x) else f"{x:.{digits}f}"


def between(middle: float, low: float, high: float, form: str) -> str:
    """Returns a number with the ends of its interval."""
    return f"{middle:{form}} ({low:{form}} to {high:{form}})"


def table(first: str, cells: pd.DataFrame) -> str:
    """Returns cells in Markdown, under the index's name; a dash where one is none."""
    rows = cells.fillna("-").itertuples(name=None)
    return markdown.table([first, *cells], rows)


def panel_of(names: Sequence[str], height: float) -> tuple[Figure, Any]:
    """Returns a figure and its panel, with a line of some inches for each name."""
    size = (8, 1 + height * len(names))
    figure = Figure(figsize=size, dpi=120, layout="constrained")
    panel = figure.subplots()
    panel.set_yticks(range(len(names)), names)
    panel.spines[["top", "right"]].set_visible(False)
    return figure, panel
