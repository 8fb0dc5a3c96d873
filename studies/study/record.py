"""The record of a study: a line a trial in trials.jsonl, added as they end.

Kept records are in trials.npz: an array for each number of a trial (hyperparameters as
"h.lr"), and for each curve, a row a trial. Where only some trials have a number, "rows
of NAME" says which. NaN is what is not finite. Curves are in float32, from which the
eight digits of the log come back exactly.
"""

import contextlib
import json
import os
import platform
import sys
import threading
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path
from typing import Any

import jax
import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "tools"))
from machine import cpu_model, git, usable_cores

Row = dict[str, Any]
ROWS, OF_H = "rows of ", "h."
SAME = ("device", "cpu", "python", "jax", "jaxlib", "optax", "corpus")  # of a record


class Record:
    """The finished trials of a folder, by their keys. Several threads may add."""

    def __init__(self, folder: Path) -> None:
        """Reads what is there; a line that was cut off is no trial."""
        self.folder, self.lock = folder, threading.Lock()
        self.lines, kept = folder / "trials.jsonl", folder / "trials.npz"
        rows = unpack(kept) if kept.exists() else []
        if self.lines.exists():
            for line in self.lines.read_bytes().splitlines():
                with contextlib.suppress(ValueError):
                    rows.append(json.loads(line))
        self.rows: dict[str, Row] = {row["key"]: row for row in rows}

    def add(self, row: Row) -> None:
        """Adds a trial, which is on the disk when this returns."""
        # The end of line comes first, for the last line may have been cut off.
        line = "\n" + json.dumps(row, allow_nan=False)
        with self.lock, self.lines.open("ab") as file:
            file.write(line.encode())
            file.flush()
            os.fsync(file.fileno())
            self.rows[row["key"]] = row


def unpack(path: Path) -> list[Row]:
    """Returns the trials of a kept record."""
    with np.load(path, allow_pickle=False) as file:
        columns = dict(file)
    rows: list[Row] = [{"h": {}} for _ in columns["key"]]
    for name in (x for x in columns if not x.startswith(ROWS)):
        where = columns.get(ROWS + name, range(len(rows)))
        for i, value in zip(where, columns[name].tolist(), strict=True):
            if isinstance(value, list):
                value = [float(f"{x:.8g}") if np.isfinite(x) else None for x in value]
            row = rows[i]["h"] if name.startswith(OF_H) else rows[i]
            row[name.removeprefix(OF_H)] = None if value != value else value
    return rows


def write_json(path: Path, found: Any) -> None:
    """Writes a file as a whole, or not at all."""
    part = path.with_suffix(".part")
    part.write_text(json.dumps(found, indent=1) + "\n", "utf-8")
    part.replace(path)


def runs_of(folder: Path) -> list[Row]:
    """Returns the runs of a record: what environment.json says of each."""
    runs: list[Row] = json.loads((folder / "environment.json").read_text("utf-8"))
    return runs


def note_run(folder: Path, corpus: str) -> None:
    """Adds this run to environment.json; ValueError if it does not fit the others."""
    run = {
        "began": datetime.now(UTC).isoformat(timespec="seconds"),
        "command": " ".join(["python", "studies/compare.py", *sys.argv[1:]]),
        "device": jax.devices()[0].device_kind,
        "cpu": cpu_model(),
        "cores": usable_cores(),
        "python": platform.python_version(),
        **{x: metadata.version(x) for x in ("jax", "jaxlib", "optax", "numpy")},
        "commit": git("rev-parse", "HEAD"),
        "changed": bool(git("status", "--porcelain", "adam3_optax", "studies/*.py")),
        "corpus": corpus,
    }
    path = folder / "environment.json"
    runs = runs_of(folder) if path.exists() else []
    for name in SAME:
        if runs and runs[-1][name] != run[name]:
            before = f"{folder} has runs with {name} = {runs[-1][name]}"
            raise ValueError(f"{before}, not {run[name]}; take another one with --out")
    write_json(path, [*runs, run])
