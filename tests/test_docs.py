"""The documentation runs, its links lead somewhere, and its tables are the records'."""

import ast
import doctest
import importlib
import json
import re
from pathlib import Path
from typing import Any

import jax
import optax
import pytest

import adam3_optax
from tests.settings import STORAGE, all_at

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


# Snippets.

FUNCTIONS = {"adam3", "adam3w", "scale_by_adam3", "from_adam_state", "convert_state"}


def snippets() -> dict[str, str]:
    """Returns all code that a reader may copy: of pages, docstrings and examples."""
    found = {name(page): "\n".join(blocks(page, "python")) for page in PAGES}
    for path in ROOT.glob("examples/*.py"):
        found[name(path)] = path.read_text()
    for path in ROOT.glob("adam3_optax/*.py"):
        nodes = ast.walk(ast.parse(path.read_text()))
        kinds = ast.FunctionDef | ast.ClassDef | ast.Module
        texts = [ast.get_docstring(x) or "" for x in nodes if isinstance(x, kinds)]
        examples = map(doctest.DocTestParser().get_examples, texts)
        found[name(path)] = "".join(x.source for each in examples for x in each)
    return found


def nameless(code: str) -> list[str]:
    """Returns the calls that leave the form of the third moment to its default."""
    found = []
    for call in (x for x in ast.walk(ast.parse(code)) if isinstance(x, ast.Call)):
        called = ast.unparse(call.func).split(".")[-1]
        names = {keyword.arg for keyword in call.keywords}
        if called in FUNCTIONS and not names & {"third_moment", None}:
            found.append(ast.unparse(call))
    return found


def test_every_snippet_names_its_third_moment() -> None:
    # The default is the source's cubic form, which few readers want.
    assert nameless("import adam3_optax; adam3_optax.adam3w(1e-3, b1=0.9)")
    assert not nameless("adam3w(1e-3, **rule); adam3w(third_moment=None)")
    found = {where: nameless(code) for where, code in snippets().items()}
    assert not {where: calls for where, calls in found.items() if calls}


# Tables.

RECORDS = [
    "benchmarks/records/2026-11-25_bfloat16_parameters",
    "benchmarks/records/2026-11-27_speed_h200",
    "benchmarks/records/2026-11-29_compiled",
    "benchmarks/records/2026-11-29_low_precision",
    "benchmarks/records/2026-11-30_bfloat16_state",
    "benchmarks/records/2026-11-30_compiled_peers",
    "benchmarks/records/2026-11-30_speed",
    "benchmarks/records/2026-11-30_speed_pytorch",
    "studies/records/2026-11-27_fair",
    "studies/records/2026-11-27_fair_language",
]
tables_of: Any = importlib.import_module("docs.tables.__main__")


@pytest.mark.parametrize("record", RECORDS)
def test_tables_are_those_of_the_record(
    record: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert tables_of.main([str(ROOT / record)]) == 0
    pages = "".join(page.read_text() for page in PAGES)
    tables = capsys.readouterr().out.strip().split("\n\n")
    assert tables[0].startswith("| ")
    for table in tables:
        assert table in pages


def rows_of(
    head: str, page: str = "docs/low_precision.md", above: int = 2
) -> list[list[str]]:
    """Returns the cells of a table, without so many rows above."""
    text = (ROOT / page).read_text()
    lines = text[text.index(head) :].split("\n\n")[0].splitlines()[above:]
    return [[cell.strip() for cell in line.split("|")[1:-1]] for line in lines]


# Rows of the README's table: what the records of bytes and of losses call them.
SUMMARY = {
    "optax.adam": None,
    "bfloat16_state(optax.adamw)": "AdamW at 0.004, bfloat16",
    "adam3 None, bfloat16": "None, bfloat16",
    "adam3 None, float8": "None, float8, v bfloat16",
    "adam3 None, float8 all": "None, float8",
    "adam3 standardized, bfloat16": "standardized, bfloat16",
}


def test_numbers_of_the_readme_are_those_of_the_records() -> None:
    read = importlib.import_module("docs.tables.compiled").read
    records = importlib.import_module("docs.tables.compared").BYTES
    on_h100 = "device == 'h100' and dtype == 'float32' and tree == 'one'"
    found: dict[str, Any] = {}
    for record in records:
        rows = read(ROOT / "benchmarks" / "records" / record).query(on_h100)
        found |= {x["arm"]: x for x in rows.to_dict("records")}
    starts = "| cubic, float32 | 12.00", "| AdamW at 0.004, float32"
    losses = {row[0]: row for start in starts for row in rows_of(start, above=0)}
    shown = rows_of("| state of m, v and s", "README.md")
    for (arm, state), row in zip(SUMMARY.items(), shown, strict=True):
        assert row[2:4] == [f"{found[arm][x]:.0f}" for x in ("hbm", "instructions")]
        if state:
            assert float(row[1]) == float(losses[state][1])
            assert losses[state][4].startswith(f"{row[4]} (")


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


def test_bytes_of_a_model_are_those_that_are_kept() -> None:
    embeddings = [(50257, 768), (1024, 768)]
    block = [(768, 2304), (768, 768), (768, 3072), (3072, 768), (2304,), (3072,)]
    shapes = [*embeddings, *12 * [*block, *6 * [(768,)]], (768,), (768,)]
    adam3w: Any = adam3_optax.adam3w
    wrapped = adam3_optax.bfloat16_parameters
    halves = adam3w(third_moment=None, m_dtype="bfloat16", v_dtype="bfloat16")
    partly = adam3w(third_moment=None, m_dtype="float8", v_dtype="bfloat16")
    control = adam3w(third_moment=None, m_dtype="float8", v_dtype="float8")
    float8 = adam3w(**STORAGE["float8"])
    every: list[tuple[Any, str]] = [
        (optax.adamw(1e-3), "float32"),
        (adam3w(), "float32"),
        (adam3w(**all_at("bfloat16")), "float32"),
        (float8, "float32"),
        (adam3w(**STORAGE["smallest"]), "float32"),
        (wrapped(optax.adamw(1e-3)), "bfloat16"),
        (wrapped(float8), "bfloat16"),
        (wrapped(halves), "bfloat16"),
        (wrapped(partly), "bfloat16"),
        (wrapped(control), "bfloat16"),
        (wrapped(control, "int8"), "bfloat16"),
        (wrapped(control, None), "bfloat16"),
    ]
    rows = rows_of("| parameters, optimizer, state | bytes kept")
    for (optimizer, dtype), row in zip(every, rows, strict=True):
        params = [jax.ShapeDtypeStruct(shape, dtype) for shape in shapes]
        kept = jax.tree.leaves((params, jax.eval_shape(optimizer.init, params)))
        count = sum(x.size for x in params)
        each = sum(x.size * x.dtype.itemsize for x in kept) / count
        cells = row[1:]
        assert float(cells[0]) == pytest.approx(each, abs=1e-5), row
        for cell, n in zip(cells[1:5], (count, 1e9, 7e9, 70e9), strict=True):
            shown = float(cell.removesuffix(" GB").replace(",", ""))
            assert shown == pytest.approx(each * n / 1e9, rel=0.01, abs=0.05), row
        assert int(cells[5]) == params[0].dtype.itemsize
