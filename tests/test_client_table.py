"""docs/clients.md, the tests of clients and the record of their last run agree."""

import json
import re
from pathlib import Path

from tests.test_interop import WRAPPERS

ROOT = Path(__file__).parent.parent
PAGE = (ROOT / "docs" / "clients.md").read_text()
RECORD = json.loads((ROOT / "tests" / "clients_record.json").read_text())
VERDICTS = ("works", "with a line", "cannot", "not run")
# Of each row: client, version, verdict, and what its tests are called, with parameters.
ROWS = [
    (
        *(cell.strip() for cell in cells[:3]),
        set(re.findall(r"`(test_[^`]+)`", cells[3])),
    )
    for cells in re.findall(r"^\|(.*)\|(.*)\|(.*)\|(.*`test_.*)\|$", PAGE, re.M)
]
NAMED = set[str]().union(*(names for *_, names in ROWS))


def functions_of(pattern: str) -> set[str]:
    """Returns the names of the tests in the files of a pattern."""
    sources = (path.read_text() for path in (ROOT / "tests").glob(pattern))
    return {
        name for text in sources for name in re.findall(r"^def (test_\w+)", text, re.M)
    }


def test_rows_have_a_verdict_and_name_tests_that_exist() -> None:
    assert len(ROWS) >= 20 + 18
    assert {name.partition("[")[0] for name in NAMED} <= functions_of("test_*.py")
    for row in ROWS:
        assert row[2].startswith(VERDICTS), row


def test_every_test_of_a_client_and_every_wrapper_has_a_row() -> None:
    for file in ("test_clients.py", "test_client_patterns.py"):
        assert functions_of(file) <= NAMED
    test = "test_wrapped_with_lam_zero_it_is_wrapped_adamw"
    assert {f"{test}[{wrapper}]" for wrapper in WRAPPERS} <= NAMED


def test_the_page_says_what_the_record_says() -> None:
    # Each test that the last run ran passed, and each version is the one that it had.
    assert set(RECORD["tests"].values()) == {"passed"}
    ran = {name.partition("[")[0] for name in RECORD["tests"]}
    for client, version, verdict, names in ROWS:
        if names & functions_of("test_clients.py"):
            assert (names <= ran) == (not verdict.startswith("not run")), client
            for name in re.findall(r"`([\w-]+)`", client):
                assert version == RECORD["versions"].get(name, version), client
    pins = (ROOT / "constraints-clients.txt").read_text().splitlines()
    assert {f"{name}=={x}" for name, x in RECORD["versions"].items()} <= {*pins}
