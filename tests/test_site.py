"""The site: every public name is on it, its code runs, and its tables are right.

`make docs` builds it. Here is what can be asked of its sources and its tools.
"""

import importlib.util
import inspect
import re
import tomllib
import warnings
from pathlib import Path
from types import ModuleType
from typing import Any

import jax
import jax.numpy as jnp
import optax
import pytest

import adam3_optax
from tests.settings import ADAMS_MEMORY, STORAGE, all_at

ROOT = Path(__file__).parent.parent
DOCS = ROOT / "docs"
PUBLIC = [name for name in vars(adam3_optax) if not name.startswith("_")]


def tool(name: str) -> ModuleType:
    """Returns a script of `tools/` as a module."""
    spec = importlib.util.spec_from_file_location(name, ROOT / "tools" / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def cells(page: str, head: str) -> list[list[str]]:
    """Returns the cells of a table, without its head."""
    text = (DOCS / page).read_text()
    lines = text[text.index(head) :].split("\n\n")[0].splitlines()[2:]
    return [[cell.strip() for cell in line.split("|")[1:-1]] for line in lines]


def test_every_public_name_is_on_the_api_page_once() -> None:
    text = (DOCS / "api.md").read_text()
    names = re.findall(r"^::: adam3_optax\.(\w+)$", text, re.M)
    assert sorted(names) == sorted(PUBLIC)


@pytest.mark.parametrize("page", ["index", "choosing", "coming-from-adamw"])
def test_code_runs_from_top_to_bottom(page: str, standard_promotion: None) -> None:
    text = (DOCS / f"{page}.md").read_text()
    code = re.findall(r"^```python\n(.*?)^```", text, re.M | re.S)
    assert code
    names: dict[str, Any] = {}
    for number, block in enumerate(code):
        exec(compile(block, f"docs/{page}.md, block {number}", "exec"), names)


def test_bytes_of_the_state_are_those_that_are_kept() -> None:
    # The matrices, biases and norms of GPT-2 small.
    block = [(768, 2304), (768, 768), (768, 3072), (3072, 768), (2304,), (3072,)]
    shapes = [(50257, 768), (1024, 768), *12 * [*block, *6 * [(768,)]], *2 * [(768,)]]
    params = [jax.ShapeDtypeStruct(shape, jnp.float32) for shape in shapes]
    count = sum(x.size for x in params)
    adam3w: Any = adam3_optax.adam3w

    def without(m: str, v: str) -> Any:
        return adam3w(third_moment=None, m_dtype=m, v_dtype=v)

    optimizers = [
        optax.adamw(1e-3),
        adam3w(),
        adam3w(**ADAMS_MEMORY),
        adam3w(**all_at("bfloat16")),
        adam3w(**STORAGE["float8"]),
        adam3w(**STORAGE["smallest"]),
        without("float32", "float32"),
        without("bfloat16", "bfloat16"),
        without("float8", "bfloat16"),
        without("float8", "float8"),
    ]
    rows = cells("choosing.md", "| state | bytes a parameter")
    for optimizer, row in zip(optimizers, rows, strict=True):
        kept = jax.tree.leaves(jax.eval_shape(optimizer.init, params))
        each = sum(x.size * x.dtype.itemsize for x in kept) / count
        assert float(row[1]) == pytest.approx(each, abs=1e-5), row
        for cell, n in zip(row[2:], (count, 1e9, 7e9, 70e9), strict=True):
            shown = float(cell.removesuffix(" GB"))
            assert shown == pytest.approx(each * n / 1e9, rel=0.01, abs=0.06), row


def test_the_largest_b3_does_not_warn() -> None:
    for b2, b3 in cells("choosing.md", "| b2 | largest b3 without the warning"):
        with warnings.catch_warnings(action="error"):
            adam3_optax.adam3(b2=float(b2), b3=float(b3))
        with pytest.warns(adam3_optax.BlowUpWarning):
            adam3_optax.adam3(b2=float(b2), b3=float(b3) + 1e-4)


def test_arguments_on_the_page_are_those_of_both_optimizers() -> None:
    rows = cells("coming-from-adamw.md", "| `optax.adamw` | `adam3w` | note")
    theirs = re.findall(r"`(\w+)`", " ".join(row[0] for row in rows))
    assert set(theirs) == set(inspect.signature(optax.adamw).parameters)
    ours = re.findall(r"`(\w+)`", " ".join(row[1] for row in rows))
    parameters = set(inspect.signature(adam3_optax.adam3w).parameters)
    assert set(ours) | {"v_dtype", "s_dtype"} == parameters


def test_sample_of_the_source_has_the_cubic_step() -> None:
    # What docs/coming-from-adamw.md says of the PyTorch sample, from its equations.
    def sample(grads: list[float], lam: float = 0.01, tau: float = 1.0) -> list[float]:
        m = v = s = 0.0
        steps = []
        for t, g in enumerate(grads, 1):
            m = 0.9 * m + (1 - 0.9) * g
            v = 0.999 * v + (1 - 0.999) * g * g
            s = 0.999 * s + (1 - 0.999) * (g - m) ** 3
            skew = lam * max(-tau, min(tau, s))
            top, below = m / (1 - 0.9**t) + skew, (v / (1 - 0.999**t)) ** 0.5 + 1e-8
            steps.append(-1e-3 * top / below)
        return steps

    gradients = [1.0, -3.0, 0.5, 7.0, -0.01]
    optimizer = adam3_optax.adam3(1e-3, 0.9, 0.999, b3=0.999, lam=0.01, tau=1.0)
    state, got = optimizer.init(jnp.zeros(())), []
    for g in gradients:
        updates, state = optimizer.update(jnp.asarray(g), state)
        got.append(float(updates))
    assert got == pytest.approx(sample(gradients), rel=1e-5)


def test_the_tool_sees_what_is_loaded_from_elsewhere(tmp_path: Path) -> None:
    check = tool("check_site")
    page = tmp_path / "index.html"
    page.write_text(
        '<a href="https://example.org/x">x</a><p id="here"><a href="#here">'
        '<link rel="canonical" href="https://example.org/index.html">'
    )
    assert list(check.problems(tmp_path)) == []
    for wrong in (
        '<script src="https://example.org/x.js"></script>',
        '<link rel="stylesheet" href="//example.org/x.css">',
        '<img src="https://example.org/x.png">',
        '<img src="missing.png">',
        '<a href="missing.html">x</a>',
        '<a href="#there">x</a>',
        '<div class="mermaid">x</div>',
    ):
        page.write_text(wrong)
        assert len(list(check.problems(tmp_path))) == 1, wrong
    page.write_text("")
    (tmp_path / "x.css").write_text(
        "a { background: url('https://example.org/x.png') }"
    )
    assert len(list(check.problems(tmp_path))) == 1


def test_long_description_has_absolute_links_alone() -> None:
    absolute = tool("long_description").absolute
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    home = project["urls"]["Repository"]
    text = "[a](docs/a.md#b) ![p](docs/p.png) [c](#c) [d](https://example.org)"
    assert absolute(text, home, "1.2.3") == (
        f"[a]({home}/blob/v1.2.3/docs/a.md#b) ![p]({home}/raw/v1.2.3/docs/p.png) "
        "[c](#c) [d](https://example.org)"
    )
    readme = absolute((ROOT / "README.md").read_text(), home, "1.2.3")
    links = re.findall(r"\]\(([^)]+)\)", readme)
    assert links
    assert all(link.startswith(("https://", "#")) for link in links)


def test_the_repository_is_named_in_one_file() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    home = project["urls"]["Repository"]
    assert all(url.startswith(home) for url in project["urls"].values())
    files = [p for kind in ("md", "yml", "cff", "py") for p in ROOT.glob(f"*.{kind}")]
    files += [*DOCS.glob("*.md"), *ROOT.glob("tools/*"), *ROOT.glob(".github/**/*.yml")]
    # GitHub takes no relative address there.
    contact = ROOT / ".github" / "ISSUE_TEMPLATE" / "config.yml"
    assert f"url: {home}/security/advisories\n" in contact.read_text()
    for path in {*files} - {contact}:
        if path.is_file():
            assert home not in path.read_text(), path
