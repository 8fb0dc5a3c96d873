"""The notebooks run from a clean kernel, and are committed as a run leaves them.

To renew outputs after an edit: `python tests/test_notebook.py [NAME ...]`, of all
notebooks or of those named.
"""

import base64
import copy
import os
import re
import sys
from pathlib import Path
from typing import Any

import matplotlib.font_manager  # noqa: F401  # builds its cache here, not in the kernel
import nbclient
import nbformat
import pytest

ROOT = Path(__file__).resolve().parents[1]
PATHS = {path.stem: path for path in sorted((ROOT / "notebooks").glob("*.ipynb"))}
IMAGES = ROOT / "docs" / "images"
PICTURES = "what_the_third_moment_does"  # a figure a cell
SHOWN = {"units-code": "units.png", "blow-up-code": "blow_up.png"}  # in docs/, by cells
KERNEL = {"display_name": "Python 3", "language": "python", "name": "python3"}
METADATA = {"kernelspec": KERNEL, "language_info": {"name": "python"}}
# With the spaces before it, for a column may be set to the right.
NUMBER = re.compile(r" *[-+]?\d+(?:,\d{3})*(?:\.\d+)?(?:e[-+]?\d+)?")
ABSOLUTE_PATH = re.compile(r"(?<![\w.:/])(file:/*|/)[\w.-]+/\w|\b[A-Za-z]:\\\w")


def read(name: str) -> Any:
    return nbformat.read(PATHS[name], as_version=4)


def run(notebook: Any, folder: Path) -> None:
    """Executes a notebook in place; raises where a cell does."""
    env = {name: value for name, value in os.environ.items() if name != "MPLBACKEND"}
    nbclient.NotebookClient(
        notebook,
        resources={"metadata": {"path": str(folder)}},
        timeout=600,  # seconds a cell, on a machine that does much else
        record_timing=False,
        coalesce_streams=True,
    ).execute(env=env | {"JAX_PLATFORMS": "cpu", "PYTHONPATH": str(ROOT)})


def code_cells(notebook: Any) -> list[Any]:
    return [cell for cell in notebook.cells if cell.cell_type == "code"]


def printed(cell: Any) -> str:
    return "".join(x.text for x in cell.outputs if x.output_type == "stream")


def figures(cell: Any) -> list[bytes]:
    data = [x.get("data", {}) for x in cell.outputs]
    return [base64.b64decode(x["image/png"]) for x in data if "image/png" in x]


def value_and_unit(number: str) -> tuple[float, float]:
    """Returns a number, and a unit of its last digit."""
    digits, _, power = number.replace(",", "").partition("e")
    decimals = len(digits.partition(".")[2])
    return float(f"{digits}e{power or 0}"), float(f"1e{int(power or 0) - decimals}")


@pytest.mark.program
@pytest.mark.parametrize("name", PATHS)
def test_runs_from_a_clean_kernel(name: str, tmp_path: Path) -> None:
    notebook = read(name)
    committed = copy.deepcopy(code_cells(notebook))
    run(notebook, tmp_path)
    for cell, before in zip(code_cells(notebook), committed, strict=True):
        assert all(x.get("name") != "stderr" for x in cell.outputs)
        assert len(figures(cell)) == len(figures(before))
        if sys.version_info[:2] == (3, 11):  # on which the notebooks were run
            found, wanted = printed(cell), printed(before)
            assert NUMBER.sub("#", found) == NUMBER.sub("#", wanted), cell.id
            for x, y in zip(NUMBER.findall(found), NUMBER.findall(wanted), strict=True):
                (number, _), (other, unit) = value_and_unit(x), value_and_unit(y)
                # A last digit may turn where a CPU rounds otherwise.
                assert abs(number - other) < 0.05 * abs(other) + 1.01 * unit, cell.id


@pytest.mark.parametrize("name", PATHS)
def test_is_committed_as_a_clean_run_leaves_it(name: str) -> None:
    notebook = read(name)
    assert notebook.metadata == METADATA
    assert all(cell.metadata == {} for cell in notebook.cells)
    cells = code_cells(notebook)
    assert [cell.execution_count for cell in cells] == [*range(1, len(cells) + 1)]
    for cell in cells:
        assert re.search(r"\d", printed(cell)), f"{cell.id} shows no number"
        kinds = {x.get("name", x.output_type) for x in cell.outputs}
        assert kinds <= {"stdout", "display_data"}
        assert not ABSOLUTE_PATH.search(cell.source + printed(cell)), cell.id
    for cell in cells[1:]:
        assert len(figures(cell)) in ((1,) if name == PICTURES else (0, 1)), cell.id
        assert re.search(r"^ *assert ", cell.source, re.MULTILINE), cell.id
    assert PATHS[name].stat().st_size < 600_000


def test_the_documentation_shows_figures_of_the_first() -> None:
    found = {SHOWN[x.id]: figures(x) for x in read(PICTURES).cells if x.id in SHOWN}
    assert found == {x: [(IMAGES / x).read_bytes()] for x in SHOWN.values()}


def renew(names: Any) -> None:
    """Executes notebooks, writes them back, and figures to the documentation."""
    for name in names:
        notebook = read(name)
        run(notebook, PATHS[name].parent)
        notebook.metadata = nbformat.from_dict(METADATA)
        nbformat.write(notebook, PATHS[name])
        for cell in notebook.cells:
            if name == PICTURES and cell.id in SHOWN:
                (IMAGES / SHOWN[cell.id]).write_bytes(figures(cell)[0])


if __name__ == "__main__":
    renew(sys.argv[1:] or PATHS)
