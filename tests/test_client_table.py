"""docs/clients.md, the tests of clients and the record of their last run agree."""

import ast
import json
import re
from pathlib import Path

ROOT = Path(__file__).parent.parent
PAGE = (ROOT / "docs" / "clients.md").read_text()
RECORD = json.loads((ROOT / "tests" / "clients_record.json").read_text())
OF_CLIENTS = ("test_clients", "test_client_patterns")
VERDICTS = ("works", "with a line", "cannot", "not run")


def rows() -> list[list[str]]:
    """Returns the cells of each row: client, version, verdict, tests."""
    lines = re.findall(r"^\|(.*)\|$", PAGE, re.M)
    cells = [[cell.strip() for cell in line.split("|")] for line in lines]
    return [row for row in cells if "`test_" in row[-1]]


def functions_of(name: str) -> set[str]:
    tree = ast.parse((ROOT / "tests" / f"{name}.py").read_text())
    functions = (x for x in tree.body if isinstance(x, ast.FunctionDef))
    return {x.name for x in functions if x.name.startswith("test_")}


def test_every_row_has_a_verdict_and_names_tests_that_exist() -> None:
    files = [path.stem for path in (ROOT / "tests").glob("test_*.py")]
    known = set.union(*map(functions_of, files))
    assert len(rows()) >= 20 + 18
    for row in rows():
        assert row[2].startswith(VERDICTS), row
        for name in re.findall(r"`(test_\w+)", row[-1]):
            assert name in known, name


def test_every_test_of_a_client_has_a_row() -> None:
    named = {name for row in rows() for name in re.findall(r"`(test_\w+)", row[-1])}
    for file in OF_CLIENTS:
        assert functions_of(file) <= named, functions_of(file) - named


def test_every_wrapper_has_a_row() -> None:
    source = (ROOT / "tests" / "test_interop.py").read_text()
    wrappers = set(re.findall(r'^    "(\w+)": (?:lambda o|optax)', source, re.M))
    named = {name for row in rows() for name in re.findall(r"\[(\w+)\]`", row[-1])}
    assert len(wrappers) >= 20
    assert wrappers <= named, wrappers - named


def test_the_page_says_what_the_record_says() -> None:
    # Each test that the last run ran passed, and each version is the one that it had.
    assert set(RECORD["tests"].values()) == {"passed"}
    ran = {name.partition("[")[0] for name in RECORD["tests"]}
    for row in rows():
        names = set(re.findall(r"`(test_\w+)", row[-1]))
        if names & functions_of("test_clients"):
            assert (names <= ran) == (not row[2].startswith("not run")), row
            for name in re.findall(r"`([\w-]+)`", row[0]):
                assert row[1] == RECORD["versions"].get(name, row[1]), row
    pins = (ROOT / "constraints-clients.txt").read_text()
    for name, number in RECORD["versions"].items():
        assert re.search(rf"^{re.escape(f'{name}=={number}')}$", pins, re.M), name
