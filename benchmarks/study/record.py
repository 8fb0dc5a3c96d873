"""The record of a study: a line a trial, added as they end, and none taken away."""

import contextlib
import json
import os
import sys
import threading
from datetime import UTC, datetime
from pathlib import Path
from typing import IO, Any

import common

try:
    import fcntl
except ImportError:  # on Windows
    fcntl = None  # type: ignore[assignment]

Row = dict[str, Any]


class Record:
    """The finished trials of a folder, by their keys. Several threads may add."""

    def __init__(self, folder: Path) -> None:
        """Reads what is there; a last line that was cut off is dropped.

        Raises:
            ValueError: A line before the last is not of a record.
        """
        self.path = folder / "trials.jsonl"
        self.rows: dict[str, Row] = {}
        self._lock = threading.Lock()
        if not self.path.exists():
            return
        data = self.path.read_bytes()
        whole = data[: data.rfind(b"\n") + 1]
        for number, line in enumerate(whole.splitlines(), 1):
            try:
                row = json.loads(line)
                self.rows[row["key"]] = row
            except (ValueError, KeyError, TypeError) as error:
                raise ValueError(f"{self.path}, line {number}, is no trial") from error
        self._torn = whole if len(whole) < len(data) else None

    _torn: bytes | None = None

    def add(self, row: Row) -> None:
        """Adds a trial, which is on the disk when this returns."""
        line = json.dumps(row, allow_nan=False) + "\n"
        with self._lock:
            if self._torn is not None:  # only who writes may take the torn line away
                os.truncate(self.path, len(self._torn))
                self._torn = None
            with self.path.open("ab") as file:
                file.write(line.encode())
                file.flush()
                os.fsync(file.fileno())
            self.rows[row["key"]] = row


def lock(folder: Path) -> IO[bytes]:
    """Keeps other studies out of a folder, on Linux and macOS.

    Returns:
        A file that holds the lock for as long as it is open.

    Raises:
        ValueError: Another study is running there.
    """
    file = (folder / "trials.jsonl").open("ab")
    if fcntl is not None:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            file.close()
            raise ValueError(f"another study is running in {folder}") from None
    return file


def environment(folder: Path, corpus: str) -> None:
    """Adds this run to environment.json: versions, device, commit, command.

    Raises:
        ValueError: The folder holds runs of another device, version or text.
    """
    path = folder / "environment.json"
    known = {**common.facts(), "corpus": corpus}
    runs = read_environment(folder)
    for run in runs:
        for name in (*common.SAME, "corpus"):
            if run.get(name) != known[name]:
                raise ValueError(
                    f"{path} has runs with {name} = {run.get(name)}, and this one has "
                    f"{known[name]}; take another folder with --out"
                )
    words = [Path(sys.argv[0]).name, *sys.argv[1:]]
    command = " ".join(["python", f"benchmarks/{words[0]}", *words[1:]])
    now = datetime.now(UTC).isoformat(timespec="seconds")
    runs.append({"began": now, "command": command, **known})
    part = path.with_suffix(".part")
    part.write_text(json.dumps(runs, indent=1) + "\n", encoding="utf-8")
    part.replace(path)


def read_environment(folder: Path) -> list[Row]:
    """Returns the runs of a folder; none where there is no file.

    Raises:
        ValueError: The file is no list of runs.
    """
    path = folder / "environment.json"
    with contextlib.suppress(FileNotFoundError):
        try:
            runs = json.loads(path.read_text(encoding="utf-8"))
            return [dict(run) for run in runs]
        except (ValueError, TypeError) as error:
            raise ValueError(f"{path} is no list of runs") from error
    return []
