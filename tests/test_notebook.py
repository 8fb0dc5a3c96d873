"""The notebooks run from a clean kernel, and are committed as a run leaves them.

To renew outputs after an edit: `python tests/test_notebook.py [NAME ...]`, of all
notebooks or of those named.
"""

import base64
import copy
import os
import re
import sys
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import matplotlib.font_manager  # noqa: F401  # builds its cache here, not in the kernel
import nbclient
import nbformat
import pytest
from ipykernel.kernelspec import get_kernel_dict
from jupyter_client.kernelspec import KernelSpec, KernelSpecManager
from jupyter_client.manager import AsyncKernelManager

import adam3_optax

PACKAGE = Path(adam3_optax.__file__).parent
ROOT = Path(__file__).parents[1]
PATHS = {path.stem: path for path in sorted((ROOT / "notebooks").glob("*.ipynb"))}
PICTURES = "what_the_third_moment_does"  # a figure a cell
IMAGES = {  # figures that the documentation shows, by their cells
    "units-code": "units.png",
    "blow-up-code": "blow_up.png",
}
METADATA = {
    "kernelspec": {
        "display_name": "Python 3",
        "language": "python",
        "name": "python3",
    },
    "language_info": {"name": "python"},
}
ABSOLUTE_PATH = re.compile(r"(?<![\w.:/])(file:/*|/)[\w.-]+/\w|\b[A-Za-z]:\\\w")


class ThisInterpreter(KernelSpecManager):
    """Offers one kernel, `sys.executable`: a user's own "python3" may be another."""

    def get_kernel_spec(self, kernel_name: str) -> Any:
        return KernelSpec(**get_kernel_dict())


def run(notebook: Any, directory: Path) -> None:
    """Executes a notebook in place; raises where a cell does."""
    env = {name: value for name, value in os.environ.items() if name != "MPLBACKEND"}
    path = [str(PACKAGE.parent), *filter(None, [env.get("PYTHONPATH")])]
    env |= {"JAX_PLATFORMS": "cpu", "PYTHONPATH": os.pathsep.join(path)}
    nbclient.NotebookClient(
        notebook,
        km=AsyncKernelManager(kernel_spec_manager=ThisInterpreter()),
        resources={"metadata": {"path": str(directory)}},
        timeout=600,  # seconds a cell, on a machine that does much else
        record_timing=False,
        coalesce_streams=True,
    ).execute(env=env, cleanup_kc=True)  # the default spares a manager given to it


def code_cells(notebook: Any) -> list[Any]:
    return [cell for cell in notebook.cells if cell.cell_type == "code"]


def printed(cell: Any, stream: str) -> str:
    return "".join(x.text for x in cell.outputs if x.get("name") == stream)


# With the spaces before it, for a column may be set to the right.
NUMBER = re.compile(r" *([-+]?\d+(?:,\d{3})*)(\.\d+)?(e[-+]?\d+)?")


def values(text: str) -> list[tuple[float, float]]:
    """Returns the numbers in a text, each with a unit of its last digit."""
    return [
        (
            float(whole.replace(",", "") + decimals + power),
            float(f"1e{-len(decimals[1:])}") * float(f"1{power}"),
        )
        for whole, decimals, power in NUMBER.findall(text)
    ]


def assert_prints(cell: Any, committed: Any) -> None:
    """Asserts that a cell prints what is committed: texts exactly, numbers nearly."""
    found, wanted = printed(cell, "stdout"), printed(committed, "stdout")
    assert NUMBER.sub("#", found) == NUMBER.sub("#", wanted), cell.id
    for (number, _), (other, unit) in zip(values(found), values(wanted), strict=True):
        # A last digit may turn where a CPU rounds otherwise.
        assert abs(number - other) < 0.05 * abs(other) + 1.01 * unit, cell.id


def figures(cell: Any) -> list[str]:
    return [
        x.data["image/png"] for x in cell.outputs if "image/png" in x.get("data", {})
    ]


def texts(node: Any) -> Iterator[str]:
    """Yields every string but the pictures."""
    if isinstance(node, str):
        yield node
    elif isinstance(node, dict):
        for key, value in node.items():
            if key != "image/png":
                yield from texts(value)
    elif isinstance(node, list):
        for value in node:
            yield from texts(value)


def read(name: str) -> Any:
    return nbformat.read(PATHS[name], as_version=4)


def assert_runs(notebook: Any, directory: Path) -> None:
    """Asserts that a clean kernel prints and draws what is committed."""
    committed = copy.deepcopy(code_cells(notebook))
    probe = "import sys; print(sys.executable, adam3_optax.__file__, sep='\\n')"
    notebook.cells.append(nbformat.v4.new_code_cell(probe))

    with pytest.MonkeyPatch.context() as patch:
        # Neither the user's start-up files nor a run beside this one.
        for name in ("IPYTHONDIR", "JUPYTER_CONFIG_DIR", "JUPYTER_RUNTIME_DIR"):
            patch.setenv(name, str(directory / name))
        run(notebook, directory)

    *ran, last = code_cells(notebook)
    assert printed(last, "stdout").split("\n") == [
        sys.executable,
        adam3_optax.__file__,
        "",
    ]
    assert [printed(cell, "stderr") for cell in ran] == [""] * len(ran)
    for cell, before in zip(ran, committed, strict=True):
        assert len(figures(cell)) == len(figures(before))
        if sys.version_info[:2] == (3, 11):  # on which the notebooks were run
            assert_prints(cell, before)


@pytest.mark.slow
@pytest.mark.parametrize("name", PATHS)
def test_runs_from_a_clean_kernel(name: str, tmp_path: Path) -> None:
    assert_runs(read(name), tmp_path)


@pytest.mark.parametrize("name", PATHS)
def test_is_committed_as_a_clean_run_leaves_it(name: str) -> None:
    cells = code_cells(read(name))
    assert [cell.execution_count for cell in cells] == [*range(1, len(cells) + 1)]
    for cell in cells:
        assert re.search(r"\d", printed(cell, "stdout")), f"{cell.id} shows no number"
        assert {x.output_type for x in cell.outputs} <= {"stream", "display_data"}
        assert not printed(cell, "stderr")
    for cell in cells[1:]:
        shown = len(figures(cell))
        assert shown == 1 or (name != PICTURES and not shown), f"figures of {cell.id}"
        assert re.search(r"^ *assert ", cell.source, re.MULTILINE), cell.id
    assert PATHS[name].stat().st_size < 600_000


@pytest.mark.parametrize("name", PATHS)
def test_names_no_machine(name: str) -> None:
    notebook = read(name)
    assert notebook.metadata == METADATA
    assert all(cell.metadata == {} for cell in notebook.cells)
    assert [text for text in texts(notebook) if ABSOLUTE_PATH.search(text)] == []


def test_the_documentation_shows_figures_of_the_first() -> None:
    found = dict(images(read(PICTURES)))
    assert sorted(found) == sorted(IMAGES.values())
    for name, png in found.items():
        assert (ROOT / "docs" / "images" / name).read_bytes() == png, name


def images(notebook: Any) -> Iterator[tuple[str, bytes]]:
    for cell in notebook.cells:
        if cell.id in IMAGES:
            (figure,) = figures(cell)
            yield IMAGES[cell.id], base64.b64decode(figure)


def renew(names: Iterable[str]) -> None:
    """Executes notebooks, writes them back, and figures to the documentation."""
    for name in names:
        notebook = read(name)
        run(notebook, PATHS[name].parent)
        notebook.metadata = nbformat.from_dict(METADATA)
        nbformat.write(notebook, PATHS[name])
        for image, png in images(notebook):
            (ROOT / "docs" / "images" / image).write_bytes(png)


if __name__ == "__main__":
    renew(sys.argv[1:] or PATHS)
