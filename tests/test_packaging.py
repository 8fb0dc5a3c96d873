"""The wheel holds the package, and needs nothing but jax, jaxlib and optax."""

import importlib.metadata
import re
import subprocess
import sys
import tarfile
import tomllib
import zipfile
from pathlib import Path

import pytest

import adam3_optax

ROOT = Path(__file__).parent.parent


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("wheel")
    subprocess.run(
        [sys.executable, "-m", "hatchling", "build", "-t", "wheel", "-d", str(folder)],
        cwd=ROOT,
        check=True,
        capture_output=True,
    )
    (path,) = folder.glob("*.whl")
    return path


def test_wheel_holds_the_package_and_nothing_else(wheel: Path) -> None:
    names = zipfile.ZipFile(wheel).namelist()
    sources = {f"adam3_optax/{p.name}" for p in (ROOT / "adam3_optax").glob("*.py")}
    inside = {n for n in names if ".dist-info/" not in n}
    assert inside == sources | {"adam3_optax/py.typed"}
    assert any(n.endswith("licenses/LICENSE") for n in names)


def test_source_distribution_leaves_records_out(tmp_path: Path) -> None:
    subprocess.run(
        [
            sys.executable,
            "-m",
            "hatchling",
            "build",
            "-t",
            "sdist",
            "-d",
            str(tmp_path),
        ],
        cwd=ROOT,
        check=True,
        capture_output=True,
    )
    (path,) = tmp_path.glob("*.tar.gz")
    with tarfile.open(path) as archive:
        names = [name.partition("/")[2] for name in archive.getnames()]
    assert {"adam3_optax/__init__.py", "tools/long_description.py"} <= {*names}
    assert not [name for name in names if "/records/" in name]
    assert path.stat().st_size < 1e6


def test_wheel_requires_jax_jaxlib_and_optax_alone(wheel: Path) -> None:
    archive = zipfile.ZipFile(wheel)
    (metadata,) = (n for n in archive.namelist() if n.endswith("/METADATA"))
    message = importlib.metadata.PathDistribution(
        zipfile.Path(archive, metadata.removesuffix("METADATA"))
    )
    required = [r for r in message.requires or [] if "extra ==" not in r]
    assert {re.split(r"[<>=~!;\[ ]", r)[0] for r in required} == {
        "jax",
        "jaxlib",
        "optax",
    }
    assert message.version == adam3_optax.__version__


def test_the_pythons_are_the_same_everywhere() -> None:
    def versions(path: str, pattern: str) -> list[str]:
        (found,) = re.findall(pattern, (ROOT / path).read_text())
        return re.findall(r"\d\.\d+", found)

    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    named = re.findall(r"(?<=Python :: )\d\.\d+", "\n".join(project["classifiers"]))
    assert project["requires-python"] == f">={named[0]}"
    assert versions("Makefile", r"PYTHONS \?= (.*)") == named
    assert versions("CONTRIBUTING.md", r"on Python (.* and\s+\S+), and fails") == named
    assert versions("SUPPORT.md", r"Python (\S+ to \S+),") == [named[0], named[-1]]
    assert versions(".github/workflows/test.yml", r"python: \[(.*)\]") == named
    matrix = r"python-version: \|((?:\s+\d\.\d+)+)"
    assert versions(".github/workflows/publish.yml", matrix) == named


def test_wheel_runs_with_its_requirements_alone(wheel: Path, tmp_path: Path) -> None:
    # In a process that sees the wheel and, of all that is installed, only what jax,
    # jaxlib and optax need themselves.
    needed, queue = set(), ["jax", "jaxlib", "optax"]
    while queue:
        name = re.split(r"[<>=~!;\[ (]", queue.pop())[0].lower().replace("_", "-")
        if name not in needed:
            needed.add(name)
            requires = importlib.metadata.requires(name) or []
            queue += [r for r in requires if "extra ==" not in r]
    modules = {
        module
        for module, owners in importlib.metadata.packages_distributions().items()
        if not {o.lower().replace("_", "-") for o in owners} & needed
    }
    assert {"flax", "chex", "matplotlib", "pytest"} <= modules
    script = tmp_path / "user.py"
    script.write_text(f"""
import sys

class Nothing:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in {sorted(modules)}:
            raise ModuleNotFoundError(name)

sys.meta_path.insert(0, Nothing())
sys.path.insert(0, {str(wheel)!r})
import adam3_optax, jax.numpy as jnp
assert ".whl" in adam3_optax.__file__, adam3_optax.__file__
optimizer = adam3_optax.adam3w(0.1)
params = jnp.ones(3)
updates, _ = optimizer.update(params, optimizer.init(params), params)
print(updates.sum())
""")
    result = subprocess.run(
        [sys.executable, "-I", str(script)], capture_output=True, text=True, check=False
    )
    assert result.returncode == 0, result.stderr
    assert float(result.stdout) == pytest.approx(-0.3, rel=1e-2)
