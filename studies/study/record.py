"""The record of a study: a line a trial, added as they end, and none taken away.

A finished record is packed into one small file; see `packed`. What is added later
stands in lines again.
"""

import contextlib
import json
import os
import sys
import tempfile
import threading
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path
from typing import IO, Any

from study import machine, packed
from study.packed import Row

try:
    import fcntl
except ImportError:  # on Windows
    fcntl = None  # type: ignore[assignment]

LINES, PACKED = "trials.jsonl", "trials.npz"


class Record:
    """The finished trials of a folder, by their keys. Several threads may add."""

    def __init__(self, folder: Path) -> None:
        """Reads what is there; a last line that was cut off is dropped.

        Raises:
            ValueError: A line before the last is not of a record, or the packed file
                is none.
        """
        self.path = folder / LINES
        self.rows: dict[str, Row] = {}
        self._lock = threading.Lock()
        if (folder / PACKED).exists():
            self.rows = {row["key"]: row for row in packed.read(folder / PACKED)}
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


def pack(folder: Path, report: Callable[[Record], Any]) -> None:
    """Packs a record, and takes its lines away.

    Args:
        folder: Of the record.
        report: Returns everything that is shown of a record. It must be the same from
            the packed file as from the lines.

    Raises:
        ValueError: It is not; nothing has been taken away.
    """
    before, path = Record(folder), folder / PACKED
    with tempfile.TemporaryDirectory(dir=folder) as name:
        new = Path(name, PACKED)
        packed.write(new, before.rows.values())
        after = Record(new.parent)
        kept = {key: packed.kept(row) for key, row in before.rows.items()}
        if after.rows != kept or report(after) != report(before):
            raise ValueError(f"{path} would not hold all that {before.path} does")
        new.replace(path)
    before.path.unlink(missing_ok=True)


def lock(folder: Path) -> IO[bytes]:
    """Keeps other studies out of a folder, on Linux and macOS.

    Returns:
        A file that holds the lock for as long as it is open.

    Raises:
        ValueError: Another study is running there.
    """
    file = (folder / LINES).open("ab")
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
    known = {**machine.facts(), "corpus": corpus}
    runs = read_environment(folder)
    for run in runs:
        for name in (*machine.SAME, "corpus"):
            if run.get(name) != known[name]:
                raise ValueError(
                    f"{path} has runs with {name} = {run.get(name)}, and this one has "
                    f"{known[name]}; take another folder with --out"
                )
    words = [Path(sys.argv[0]).name, *sys.argv[1:]]
    command = " ".join(["python", f"studies/{words[0]}", *words[1:]])
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
