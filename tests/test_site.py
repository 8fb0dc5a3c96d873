"""The pages of the site agree with the package and with Optax."""

import inspect
import re
import warnings
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
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


# What the page on the algorithm says of one gradient among zeros.


def updates(size: float, at: int, steps: int, **settings: Any) -> Any:
    """Returns the update of each step, in learning rates."""
    optimizer = adam3_optax.scale_by_adam3(**settings)

    def step(state: Any, g: Any) -> Any:
        return optimizer.update(g, state)[::-1]

    gradients = jnp.zeros((steps, 1)).at[at].set(size)
    return jax.lax.scan(step, optimizer.init(gradients[0]), gradients)[1]


@pytest.mark.filterwarnings("ignore::adam3_optax.BlowUpWarning")
def test_largest_updates_are_those_of_the_page() -> None:
    *rows, adam = cells("algorithm.md", "| form | b2 = 0.95, b3 = 0.999 |")
    for name, *shown in rows:
        for text, b3 in zip(shown, (0.999, 0.95**0.5), strict=True):
            form: Any = name.split(",")[0]
            u = updates(1.0, 0, 2000, b2=0.95, b3=b3, third_moment=form)
            assert float(u.max()) == pytest.approx(float(text.split()[0]), rel=0.01)
            if "later" in text:
                assert f", {u.argmax()} steps later" in text
    assert adam == ["Adam", "at most 1", "at most 1"]
    assert float(updates(1.0, 0, 2000, b2=0.95, third_moment=None).max()) <= 1
    sizes = 30, 100, 1000, 1e4
    rows = cells("algorithm.md", "| decays | about 30 | 100 |")
    for b3, (_, *shown) in zip((0.95**0.5, 0.95), rows, strict=True):
        for size, text in zip(sizes, shown, strict=True):
            u = updates(size, 0, 2000, b2=0.95, b3=b3, third_moment="cubic")
            if text:
                assert float(u.max()) == pytest.approx(float(text.split()[0]), rel=0.1)


def test_drifts_are_those_of_the_page() -> None:
    settings: dict[str, dict[str, Any]] = {
        "Adam": {"third_moment": None},
        "cubic": {"third_moment": "cubic"},
        "standardized": {},
        "standardized, b2 = b3 = 0.95, or b2 = 0.95 alone": {"b2": 0.95},
        "standardized, eps = 1e-3": {"eps": 1e-3},
    }
    rows = cells("algorithm.md", "| form and settings | gradient at step 2,000")
    assert [row[0] for row in rows] == [*settings]
    for (_, *shown), given in zip(rows, settings.values(), strict=True):
        for text, at in zip(shown, (2000, 0), strict=True):
            if text:
                chosen = {"third_moment": "standardized"} | given
                total = float(updates(1.0, at, 60_000, **chosen).sum())
                said = float(re.split("[ :]", text)[0])
                assert total == pytest.approx(said, rel=0.02)
