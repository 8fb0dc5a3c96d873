"""Finds an interpreter of a version of Python: on the path, or among pyenv's.

    python tools/interpreter.py 3.13

Prints its path; the status is 1 if there is none.
"""

import contextlib
import re
import shutil
import subprocess
import sys
from pathlib import Path


def interpreter(version: str) -> str | None:
    """Returns an interpreter of a version such as 3.12, or None."""
    test = f"import sys; assert '%d.%d' % sys.version_info[:2] == {version!r}"
    for candidate in (f"python{version}", *_of_pyenv(version)):
        found = shutil.which(candidate)
        # One of pyenv's on the path may be there, and refuse to run.
        if found and _succeeds([found, "-c", test]):
            return found
    return None


def _of_pyenv(version: str) -> list[str]:
    """Returns pyenv's interpreters of a version, the newest release first."""
    with contextlib.suppress(OSError, subprocess.CalledProcessError):
        done = subprocess.run(
            ["pyenv", "root"], check=True, capture_output=True, encoding="utf-8"
        )
        folders = Path(done.stdout.strip(), "versions").glob(f"{version}.*")
        # By numbers: as text, 3.13.9 comes after 3.13.10. Others than releases, such as
        # 3.13.0rc1 and 3.13.0t, are left out.
        releases = {
            tuple(map(int, folder.name.split("."))): folder
            for folder in folders
            if re.fullmatch(r"[\d.]*\d", folder.name)
        }
        return [str(releases[x] / "bin" / "python") for x in sorted(releases)[::-1]]
    return []


def _succeeds(command: list[str]) -> bool:
    return not subprocess.run(command, capture_output=True, check=False).returncode


if __name__ == "__main__":
    (wanted,) = sys.argv[1:]
    if (found := interpreter(wanted)) is None:
        sys.exit(1)
    print(found)
