"""The pages of the site agree with the package and with Optax."""

import inspect
import re
import warnings
from pathlib import Path

import optax
import pytest

import adam3_optax

DOCS = Path(__file__).parent.parent / "docs"


def cells(page: str, head: str) -> list[list[str]]:
    """Returns the cells of a table, without its head."""
    text = (DOCS / page).read_text()
    lines = text[text.index(head) :].split("\n\n")[0].splitlines()[2:]
    return [[cell.strip() for cell in line.split("|")[1:-1]] for line in lines]


def test_every_public_name_is_on_the_api_page_once() -> None:
    names = re.findall(r"^::: adam3_optax\.(\w+)$", (DOCS / "api.md").read_text(), re.M)
    assert sorted(names) == sorted(x for x in vars(adam3_optax) if x[0] != "_")


def test_the_largest_b3_does_not_warn() -> None:
    for b2, b3 in cells("choosing.md", "| b2 | largest b3 without the warning"):
        with warnings.catch_warnings(action="error"):
            adam3_optax.adam3(b2=float(b2), b3=float(b3))
        with pytest.warns(adam3_optax.BlowUpWarning):
            adam3_optax.adam3(b2=float(b2), b3=float(b3) + 1e-4)


def test_arguments_on_the_page_are_those_of_both_optimizers() -> None:
    rows = cells("coming-from-adamw.md", "| `optax.adamw` | `adam3w` | note")
    columns = zip(*rows, strict=True)
    theirs, ours, _ = (set(re.findall(r"`(\w+)`", " ".join(x))) for x in columns)
    assert theirs == set(inspect.signature(optax.adamw).parameters)
    ours |= {"v_dtype", "s_dtype"}
    assert ours == set(inspect.signature(adam3_optax.adam3w).parameters)
