"""What is released: it needs jax, jaxlib and optax alone, and all names agree."""

import re
import subprocess
import sys
import tomllib
from importlib import import_module
from pathlib import Path

import pytest

import adam3_optax

ROOT = Path(__file__).parent.parent
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]


def test_needs_its_requirements_alone() -> None:
    needed = {re.split("[<>=]", x)[0] for x in PROJECT["dependencies"]}
    assert needed == {"jax", "jaxlib", "optax"}
    # With what else is installed here taken away.
    absent = dict.fromkeys(["chex", "equinox", "flax", "haliax", "matplotlib", "orbax"])
    program = (
        f"import sys; sys.modules.update({absent})\n"
        "import adam3_optax, jax.numpy as jnp\n"
        "optimizer, params = adam3_optax.adam3w(0.1), jnp.ones(3)\n"
        "updates, _ = optimizer.update(params, optimizer.init(params), params)\n"
        "assert abs(float(updates.sum()) + 0.3) < 1e-2, updates"
    )
    subprocess.run([sys.executable, "-c", program], cwd=ROOT, check=True)


def test_the_files_name_the_same_versions() -> None:
    version = adam3_optax.__version__
    assert f"version: {version}\n" in (ROOT / "CITATION.cff").read_text()
    assert f"## {version} - " in (ROOT / "CHANGELOG.md").read_text()
    pythons = re.findall(r"Python :: (\d\.\d+)", "\n".join(PROJECT["classifiers"]))
    assert PROJECT["requires-python"] == f">={pythons[0]}"
    for workflow in ("test", "publish"):
        text = (ROOT / ".github" / "workflows" / f"{workflow}.yml").read_text()
        (matrix,) = re.findall(r"python: \[(.*)\]", text)
        assert re.findall(r"\d\.\d+", matrix) == pythons


def test_the_newest_interpreter_comes_first(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("3.13.9", "3.13.10", "3.13.11rc1", "3.13.11t", "3.1.3"):
        (tmp_path / "versions" / name).mkdir(parents=True)
    (tmp_path / "pyenv").write_text(f"#!/bin/sh\necho '{tmp_path}'\n")
    (tmp_path / "pyenv").chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=":")
    monkeypatch.syspath_prepend(ROOT / "tools")
    found = import_module("interpreter")._of_pyenv("3.13")
    assert [Path(path).parts[-3] for path in found] == ["3.13.10", "3.13.9"]
