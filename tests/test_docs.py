"""The documentation runs, and its links lead somewhere."""

import importlib
import inspect
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


def test_readme_code_runs_from_top_to_bottom(standard_promotion: None) -> None:
    # `standard_promotion`, for Optax's schedules need it.
    namespace = {"adam3_optax": adam3_optax, "optax": optax, "jax": jax}
    code = blocks(ROOT / "README.md", "python")
    assert len(code) >= 3
    for number, block in enumerate(code):
        exec(compile(block, f"README.md, block {number}", "exec"), namespace)


def test_recipes_run_from_top_to_bottom(standard_promotion: None) -> None:
    namespace: dict[str, Any] = {}
    for number, block in enumerate(blocks(ROOT / "docs" / "recipes.md", "python")):
        exec(compile(block, f"docs/recipes.md, block {number}", "exec"), namespace)


def test_code_on_diagnostics_runs(capsys: pytest.CaptureFixture[str]) -> None:
    (code,) = blocks(ROOT / "docs" / "diagnostics.md", "python")
    namespace: dict[str, Any] = {}
    exec(compile(code, "docs/diagnostics.md", "exec"), namespace)
    printed = capsys.readouterr().out
    assert "With these gradients the third moment changes nothing" in printed
    assert "third_moment/ratio" in namespace["scalars"]


def test_code_on_low_precision_runs(standard_promotion: None) -> None:
    params = {"w": jax.numpy.full((4, 16), 0.1)}
    names: dict[str, Any] = {"adam3_optax": adam3_optax, "float32_params": params}
    code = blocks(ROOT / "docs" / "low_precision.md", "python")
    assert len(code) == 4
    for number, block in enumerate(code):
        exec(compile(block, f"docs/low_precision.md, block {number}", "exec"), names)
        if "updates" not in names and "state" in names:
            update = names["optimizer"].update
            names["updates"], _ = update(
                names["params"], names["state"], names["params"]
            )
    assert names["params"]["w"].dtype == jax.numpy.bfloat16
    assert names["float32_params"]["w"].dtype == jax.numpy.float32


def test_readme_commands_exist() -> None:
    makefile = (ROOT / "Makefile").read_text()
    commands = [
        c for page in PAGES for block in blocks(page, "sh") for c in block.split("\n")
    ]
    targets = {c.split()[1] for c in commands if c.startswith("make ")}
    assert {"demo", "test"} <= targets
    for target in targets:
        assert re.search(rf"^{target}:", makefile, re.M), target


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
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


RECORDED = [*ROOT.glob("*/README.md"), *ROOT.glob("*/records/*/README.md")]


@pytest.mark.parametrize(
    "page",
    sorted({*PAGES, *RECORDED}),
    ids=lambda page: str(page.relative_to(ROOT)),
)
def test_numbers_are_written_in_full(page: Path) -> None:
    # 0.2%, and neither .2% nor 0.2 %. Code may write numbers as it likes.
    code = r"^```.*?^```|^ {4}.*?$|`[^`]*`"
    prose = re.sub(code, "", page.read_text(), flags=re.M | re.S)
    assert re.findall(r".*(?<![\w./])\.\d.*|.*\d\s+%.*", prose) == []


PUBLIC = [name for name in vars(adam3_optax) if name[0] != "_" and name.islower()]


@pytest.mark.parametrize("name", PUBLIC)
def test_public_functions_are_documented(name: str) -> None:
    value = getattr(adam3_optax, name)
    text = "".join(page.read_text() for page in PAGES)
    assert f"`{name}" in text or f".{name}(" in text
    doc = inspect.getdoc(value) or ""
    for section in ("Args:", "Returns:", "Example:"):
        assert section in doc, section
    assert re.search(r"^    >>> ", doc, re.M)
    for argument in inspect.signature(value).parameters:
        assert re.search(rf"^    (\*\*)?{argument}: ", doc, re.M), argument


def test_factories_document_every_argument_and_run_an_example() -> None:
    for factory in (
        adam3_optax.adam3,
        adam3_optax.adam3w,
        adam3_optax.scale_by_adam3,
    ):
        doc = inspect.getdoc(factory) or ""
        for section in ("Args:", "Returns:", "Example:", "Source:"):
            assert section in doc, (factory.__name__, section)
        for argument in inspect.signature(factory).parameters:
            assert re.search(rf"^    {argument}: ", doc, re.M), argument


RECORDS = {
    "benchmarks/records/2026-11-29_low_precision": {"low_precision": [16]},
    "benchmarks/records/2026-11-25_bfloat16_parameters": {"low_precision": [5]},
    "benchmarks/records/2026-11-23_speed": {"speed": [12]},
    "benchmarks/records/2026-11-29_compiled": {
        "speed": [23, 24, 6, 6],
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


FLOAT8 = ROOT / "benchmarks" / "records" / "2026-11-29_float8" / "float8.jsonl"
STATES = ("float32", "bfloat16", "float8, v bfloat16", "all float8")


def rows_of(page: str, head: str) -> list[list[str]]:
    text = (ROOT / "docs" / page).read_text()
    lines = text[text.index(head) :].split("\n\n")[0].splitlines()[2:]
    return [[cell.strip() for cell in line.split("|")[1:-1]] for line in lines]


def test_errors_of_float8_are_those_of_the_record() -> None:
    decays, late = "b1 = 0.9, b2 = 0.999", "3,001 to 6,000"
    laws: dict[str, dict[str, Any]] = {}
    losses = []
    for line in map(json.loads, FLOAT8.read_text().splitlines()):
        if (line.get("options"), line.get("steps")) == (decays, late):
            laws.setdefault(line["gradients"], {})[line["state"]] = line
        elif line["part"] == "losses":
            losses.append(line)
    shown = []
    for states in laws.values():
        errors = [states[x]["error"] for x in STATES[1:]]
        largest = [states[x]["largest"] for x in STATES if x != "bfloat16"]
        longer = states["all float8"]["slope"] - 1
        sizes = [f"{x:.1f}" for x in largest]
        cells = [
            *(f"{x:.1%}" for x in errors[:2]),
            f"{errors[2]:.0%}",
            f"{longer:+.1%}",
        ]
        shown.append([*cells, *sizes])
    rows = rows_of("low_precision.md", "| gradients | bfloat16 |")
    assert len(rows) == 9
    assert all(row[1:] in shown for row in rows)

    rows = rows_of("low_precision.md", "| `third_moment` | state | loss |")
    for row, line in zip(rows, losses, strict=True):
        third, state, loss, d = line["third moment"], line["state"], line["loss"], ""
        if state != "float32":
            ends = f"{line['95%, from']:+.4f} to {line['to']:+.4f}"
            d = f"{line[DIFFERENCE]:+.4f} ({ends})"
        assert row == [third, state, f"{loss:.4f}", d]


DIFFERENCE = "minus float32's"


def test_a_table_takes_the_place_of_its_older_version() -> None:
    head = "| a | b |\n| --- | --- |\n"
    page = f"Text.\n\n{head}| x | 1 |\n\n{head}| y | 2 |\n"
    new = f"{head}| y | 3 |"
    assert tables_of.replaced(page, new) == page.replace("| y | 2 |", "| y | 3 |")
    assert tables_of.replaced(page, new.replace("| y", "| z")) == page


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
    text = (ROOT / "docs" / "low_precision.md").read_text()
    head = "| parameters, optimizer, state | bytes kept"
    lines = text[text.index(head) :].split("\n\n")[0].splitlines()[2:]
    for (optimizer, dtype), line in zip(every, lines, strict=True):
        params = [jax.ShapeDtypeStruct(shape, dtype) for shape in shapes]
        kept = jax.tree.leaves((params, jax.eval_shape(optimizer.init, params)))
        count = sum(x.size for x in params)
        each = sum(x.size * x.dtype.itemsize for x in kept) / count
        cells = [cell.strip() for cell in line.split("|")[2:-1]]
        assert float(cells[0]) == pytest.approx(each, abs=1e-5), line
        for cell, n in zip(cells[1:5], (count, 1e9, 7e9, 70e9), strict=True):
            shown = float(cell.removesuffix(" GB").replace(",", ""))
            assert shown == pytest.approx(each * n / 1e9, rel=0.01, abs=0.05), line
        assert int(cells[5]) == params[0].dtype.itemsize
