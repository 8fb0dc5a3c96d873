"""The documentation runs, its links lead somewhere, and its tables are the records'."""

import importlib
import json
import re
from pathlib import Path
from typing import Any

import jax
import optax
import pytest

import adam3_optax

ROOT = Path(__file__).parent.parent
PAGES = sorted(
    [*ROOT.glob("*.md"), *ROOT.glob("docs/*.md"), *ROOT.glob("examples/*.md")]
)


def blocks(page: Path, language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", page.read_text(), re.M | re.S)


def name(page: Path) -> str:
    return str(page.relative_to(ROOT))


GIVEN: dict[str, Any] = {  # what a page takes as given
    "adam3_optax": adam3_optax,
    "optax": optax,
    "jax": jax,
    "float32_params": {"w": jax.numpy.full((4, 16), 0.1)},
    "updates": {"w": jax.numpy.full((4, 16), 1e-4)},
}


@pytest.mark.parametrize("page", [x for x in PAGES if blocks(x, "python")], ids=name)
def test_code_runs_from_top_to_bottom(page: Path, standard_promotion: None) -> None:
    # In standard promotion, for Optax's schedules need it.
    names = dict(GIVEN)
    for number, block in enumerate(blocks(page, "python")):
        exec(compile(block, f"{page.name}, block {number}", "exec"), names)


@pytest.mark.parametrize("page", PAGES, ids=name)
def test_links_lead_somewhere(page: Path) -> None:
    for link in re.findall(r"\]\(([^)\s]+)\)", page.read_text()):
        if link.startswith("http"):
            continue
        path, _, anchor = link.partition("#")
        target = page.parent / path if path else page
        assert target.exists(), link
        if anchor:
            headings = re.findall(r"^#+ (.*)$", target.read_text(), re.M)
            slugs = [
                re.sub(r"[^\w\- ]", "", h).strip().lower().replace(" ", "-")
                for h in headings
            ]
            assert anchor in slugs, link


# Tables.

RECORDS = {
    "benchmarks/records/2026-11-29_low_precision": {"low_precision": [16]},
    "benchmarks/records/2026-11-25_bfloat16_parameters": {"low_precision": [5]},
    "benchmarks/records/2026-11-23_speed": {"speed": [12]},
    "benchmarks/records/2026-11-29_compiled": {
        "speed": [23, 24, 6],
        "low_precision": [18],
    },
    "studies/records/2026-11-23_main_2": {"evidence": [11]},
    "studies/records/2026-11-27_fair": {"evidence": [6, 10, 6, 6, 6, 6, 6]},
    "studies/records/2026-11-27_fair_language": {"evidence": [2, 4, 2, 2, 2, 2]},
}
tables_of: Any = importlib.import_module("docs.tables.__main__")


@pytest.mark.parametrize("record", RECORDS)
def test_tables_are_those_of_the_record(
    record: str, capsys: pytest.CaptureFixture[str]
) -> None:
    # Here are the rows of each table, and the pages they stand on.
    assert tables_of.main([str(ROOT / record)]) == 0
    printed = capsys.readouterr().out.strip().split("\n\n")
    wanted = [(page, rows) for page, each in RECORDS[record].items() for rows in each]
    for table, (page, rows) in zip(printed, wanted, strict=True):
        assert table.count("\n") == rows + 1
        assert table in (ROOT / "docs" / f"{page}.md").read_text()


def rows_of(head: str) -> list[list[str]]:
    """Returns the cells of a table on low precision."""
    text = (ROOT / "docs" / "low_precision.md").read_text()
    lines = text[text.index(head) :].split("\n\n")[0].splitlines()[2:]
    return [[cell.strip() for cell in line.split("|")[1:-1]] for line in lines]


MINUS = "minus float32's"
FLOAT8 = ROOT / "benchmarks" / "records" / "2026-11-29_float8" / "float8.jsonl"
STATES = ("float32", "bfloat16", "float8, v bfloat16", "all float8")


def test_errors_of_float8_are_those_of_the_record() -> None:
    decays, late = "b1 = 0.9, b2 = 0.999", "3,001 to 6,000"
    laws: dict[str, dict[str, Any]] = {}
    for line in map(json.loads, FLOAT8.read_text().splitlines()):
        if (line.get("options"), line.get("steps")) == (decays, late):
            laws.setdefault(line["gradients"], {})[line["state"]] = line
    shown = []
    for states in laws.values():
        first, second, third = (states[x]["error"] for x in STATES[1:])
        sizes = [f"{states[x]['largest']:.1f}" for x in STATES if x != "bfloat16"]
        longer = f"{states['all float8']['slope'] - 1:+.1%}"
        shown.append([f"{first:.1%}", f"{second:.1%}", f"{third:.0%}", longer, *sizes])
    rows = rows_of("| gradients | bfloat16 |")
    assert len(rows) == 9
    assert all(row[1:] in shown for row in rows)


def test_losses_with_float8_are_those_of_the_record() -> None:
    lines = map(json.loads, FLOAT8.read_text().splitlines())
    losses = [line for line in lines if line["part"] == "losses"]
    rows = rows_of("| `third_moment` | state | loss |")
    for row, x in zip(rows, losses, strict=True):
        difference = ""
        if x["state"] != "float32":
            ends = f"{x['95%, from']:+.4f} to {x['to']:+.4f}"
            difference = f"{x[MINUS]:+.4f} ({ends})"
        assert row == [x["third moment"], x["state"], f"{x['loss']:.4f}", difference]
