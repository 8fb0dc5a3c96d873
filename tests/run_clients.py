"""Runs the tests of the clients that are installed here, and records the outcome.

    python -m tests.run_clients clients_record.json DISTRIBUTION ...

writes to that file the date, the versions and each test that passed or failed.
"""

import datetime
import json
import platform
import sys
from importlib.metadata import version
from pathlib import Path
from typing import Any

import pytest

TESTS = [f"tests/test_{name}.py" for name in ("clients", "client_patterns")]


class Outcomes:
    def __init__(self) -> None:
        self.tests: dict[str, str] = {}

    def pytest_runtest_logreport(self, report: Any) -> None:
        if report.failed or (report.when == "call" and report.passed):
            self.tests[report.nodeid.rsplit("::")[-1]] = report.outcome


def main(path: Path, distributions: list[str]) -> int:
    outcomes = Outcomes()
    status = pytest.main(["-q", "-m", "slow or not slow", *TESTS], plugins=[outcomes])
    shown = ["jax", "jaxlib", "optax", "flax", *distributions]
    record = {
        "date": datetime.datetime.now(datetime.UTC).date().isoformat(),
        "python": platform.python_version(),
        "versions": {name: version(name) for name in shown},
        "tests": outcomes.tests,
    }
    path.write_text(json.dumps(record, indent=1, sort_keys=True) + "\n")
    print(record["versions"])
    return int(status)


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1]), sys.argv[2:]))
