"""A record of compiled.py, for its figure and its tables."""

import json
from pathlib import Path
from typing import Any

DEVICES = {"v5e": "TPU v5e", "h100": "H100"}

Row = dict[str, Any]
Rows = dict[tuple[str, ...], Row]


def read(folder: Path) -> Rows:
    """Returns the last row of each cell: by device, types, tree and optimizer.

    On a mesh also by the kind of axes and by what is split.
    """
    lines = (folder / "results.jsonl").read_text(encoding="utf-8").splitlines()
    keys = ("device", "dtype", "tree", "arm", "axes", "split")
    return {
        tuple(row[key] for key in keys if key in row): row
        for row in map(json.loads, lines)
        if row["measure"] == "compiled"
    }


def every(folder: Path, file: str, measure: str) -> dict[tuple[str, str], Row]:
    """Returns the last row of a measure, by device and optimizer."""
    path = folder / file
    lines = path.read_text(encoding="utf-8").splitlines() if path.exists() else []
    rows = (row for row in map(json.loads, lines) if row["measure"] == measure)
    return {(row["device"], row["arm"]): row for row in rows}


def arms(rows: Rows) -> list[str]:
    """Returns the optimizers in the order of the record, without wrapped ones."""
    names = dict.fromkeys(key[3] for key in rows if len(key) == 4)
    return [name for name in names if " remainder over " not in name]
