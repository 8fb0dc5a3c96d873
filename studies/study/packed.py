"""A finished record in columns, in one compressed file: `trials.npz`.

`numpy.load` reads it. There is an array for each scalar of a trial (hyperparameters as
"h.lr" and so on) and for each curve, a row a trial. Where only some trials have a
number, "rows of NAME" says which. NaN is what is not finite.

Scalars are whole. Curves are in float32, from which the eight digits of the log come
back exactly. Tuning's curves are dropped: nothing is made of them.
"""

import io
import zipfile
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np

Row = dict[str, Any]
ROWS = "rows of "
OF_H = "h."  # begins the name of a hyperparameter's column


def kept(row: Row) -> Row:
    """Returns what is kept of a trial: all, but of tuning no curves."""
    if row["phase"] != "tune":
        return row
    return {name: x for name, x in row.items() if not isinstance(x, list)}


def write(path: Path, rows: Iterable[Row]) -> None:
    """Writes trials."""
    flat = [_flat(kept(row)) for row in rows]
    columns: dict[str, np.ndarray] = {}
    for name in dict.fromkeys(x for row in flat for x in row):
        where = [i for i, row in enumerate(flat) if name in row]
        values = [flat[i][name] for i in where]
        columns[name] = _column(values)
        if len(where) < len(flat):
            columns[ROWS + name] = np.array(where, np.int32)
    # As numpy.savez_compressed does, but with LZMA: a fifth smaller.
    with zipfile.ZipFile(path, "w") as file:
        for name, column in columns.items():
            array = io.BytesIO()
            np.lib.format.write_array(array, column, allow_pickle=False)
            entry = zipfile.ZipInfo(f"{name}.npy")  # of no date: the same bytes again
            file.writestr(entry, array.getvalue(), zipfile.ZIP_LZMA)


def read(path: Path) -> list[Row]:
    """Returns the trials of a file.

    Raises:
        ValueError: It is no such file.
    """
    try:
        with np.load(path, allow_pickle=False) as file:
            columns = dict(file)
        rows: list[Row] = [{"h": {}} for _ in columns["key"]]
        for name, column in columns.items():
            if name.startswith(ROWS):
                continue
            where = columns.get(ROWS + name, range(len(rows)))
            for i, value in zip(where, _values(column), strict=True):
                if name.startswith(OF_H):
                    rows[i]["h"][name.removeprefix(OF_H)] = value
                else:
                    rows[i][name] = value
    except (ValueError, KeyError, EOFError, zipfile.BadZipFile) as error:
        raise ValueError(f"{path} holds no trials") from error
    return rows


def _flat(row: Row) -> Row:
    """Returns a trial with its hyperparameters beside all else."""
    rest = {name: x for name, x in row.items() if name != "h"}
    return rest | {OF_H + name: x for name, x in row["h"].items()}


def _column(values: list[Any]) -> np.ndarray:
    """Returns the values of a number, or of a curve, in an array."""
    if isinstance(values[0], list):
        return np.array(values, np.float32)  # None becomes NaN
    if None in values:
        return np.array(values, np.float64)
    return np.array(values)


def _values(column: np.ndarray) -> list[Any]:
    """Returns the values of a column as they were logged."""
    if column.ndim == 2:
        return [[_digits(x) for x in row] for row in column.tolist()]
    if column.dtype == np.float64:
        return [None if np.isnan(x) else x for x in column.tolist()]
    return list(column.tolist())


def _digits(x: float) -> float | None:
    """Returns a logged number, which has eight digits."""
    return float(f"{x:.8g}") if np.isfinite(x) else None
