"""Tests the built release as a user gets it.

    make release-check                                          # builds it first
    python tools/release_check.py --pythons 3.13 --tests rule   # takes what was built

It takes the sdist and the wheel from out/release/, where tools/release_build.py puts
them. Each is installed into empty environments: for each Python one with the oldest and
one with the newest dependencies. There the tests run against the installed wheel, in a
folder without the sources of the package. The tests that tests/apart.txt names are left
out: those of studies, examples, documentation and tools. Nothing is published.

It needs the standard library alone, so that nothing is installed beside what it tests.
"""

import argparse
import shutil
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

from interpreter import interpreter

ROOT = Path(__file__).resolve().parent.parent
BUILT = ROOT / "out" / "release"
OUT = ROOT / "out" / "release-check"
# What the tests read, apart from the package.
BESIDE = "tests", "docs", "examples", "tools", "benchmarks", "notebooks"
APART = "@tests/apart.txt"
ONE_STEP = """
import adam3_optax, jax.numpy as jnp, pathlib, sys
found = pathlib.Path(adam3_optax.__file__)
assert found.is_relative_to(sys.prefix), found
optimizer = adam3_optax.adam3w(0.1)
params = jnp.ones(3)
updates, _ = optimizer.update(params, optimizer.init(params), params)
assert abs(float(updates.sum()) + 0.3) < 1e-2, updates
"""


def run(*command: object, cwd: Path = ROOT) -> bool:
    """Runs a command; returns whether it succeeded."""
    return (
        subprocess.run([str(x) for x in command], cwd=cwd, check=False).returncode == 0
    )


def must(*command: object, cwd: Path = ROOT) -> None:
    """Runs a command, and ends the check if it fails."""
    if not run(*command, cwd=cwd):
        sys.exit("failed: " + " ".join(map(str, command)))


def built(folder: Path) -> tuple[Path, Path]:
    """Returns the sdist and the wheel that were built."""
    sdists, wheels = [*folder.glob("*.tar.gz")], [*folder.glob("*.whl")]
    if (len(sdists), len(wheels)) != (1, 1):
        sys.exit(
            f"{folder} has {len(sdists)} sdists and {len(wheels)} wheels, and must have"
            " one of each: make release-build"
        )
    return sdists[0], wheels[0]


def environment(python: str, folder: Path) -> Path:
    """Makes an empty environment; returns its Python."""
    must(python, "-m", "venv", "--clear", folder)
    return folder / "bin" / "python"


def install(python: Path, what: str, dependencies: str) -> bool:
    """Installs a file with the oldest or the newest dependencies."""
    quiet = "--quiet", "--disable-pip-version-check", "--no-warn-script-location"
    older = ["-c", ROOT / "constraints-oldest.txt"] if dependencies == "oldest" else []
    upgrade = [] if older else ["--upgrade"]
    return run(python, "-m", "pip", "install", *quiet, *upgrade, *older, what)


def folder_for_tests(out: Path) -> Path:
    """Copies the tests and what they read, without the package; returns the folder."""
    folder = out / "tests"
    leave = shutil.ignore_patterns("__pycache__", "records")
    for name in BESIDE:
        shutil.copytree(ROOT / name, folder / name, ignore=leave)
    for path in ROOT.iterdir():
        if path.is_file() and path.suffix != ".lock":
            shutil.copy(path, folder)
    return folder


def check_installed(
    name: str,
    python: str,
    dependencies: str,
    files: Sequence[Path],
    folder: Path,
    args: argparse.Namespace,
) -> bool:
    """Installs both files, each in an empty environment, and runs the tests on one."""
    sdist, wheel = files
    made = environment(python, OUT / f"sdist-{name}-{dependencies}")
    if not install(made, str(sdist), dependencies):
        print(
            f"Python {name}, {dependencies}: the dependencies cannot be installed here"
        )
        return False
    must(made, "-c", ONE_STEP, cwd=OUT)
    made = environment(python, OUT / f"wheel-{name}-{dependencies}")
    if not install(made, f"{wheel}[test]", dependencies):
        print(f"Python {name}, {dependencies}: the tests cannot be installed here")
        return False
    must(made, "-c", ONE_STEP, cwd=folder)
    tests = [f"tests/test_{t}.py" for t in args.tests] or [
        APART,
        "tests",
        "--pyargs",
        "adam3_optax",
    ]
    versions = (
        "import jax, optax; print('jax', jax.__version__, 'optax', optax.__version__)"
    )
    run(made, "-c", versions)
    return run(made, "-m", "pytest", "-q", "-n", args.jobs, *tests, cwd=folder)


def main() -> None:
    """Runs all checks; the status is 1 unless each one passes."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    add = parser.add_argument
    add("--pythons", nargs="+", default=["3.11", "3.12", "3.13"])
    add(
        "--dependencies",
        nargs="+",
        choices=("oldest", "newest"),
        default=["oldest", "newest"],
    )
    add("--tests", nargs="*", default=[], help="names such as rule; all without")
    add("--jobs", default="2", help="processes of pytest")
    args = parser.parse_args()
    files = built(BUILT)
    pythons = {name: interpreter(name) for name in args.pythons}
    # Before the first test, because the tests take an hour.
    if missing := [name for name, python in pythons.items() if python is None]:
        sys.exit(
            f"not on this machine: Python {', '.join(missing)}. Install it, or name"
            " others: make release-check PYTHONS=3.13"
        )
    shutil.rmtree(OUT, ignore_errors=True)
    OUT.mkdir(parents=True)
    folder = folder_for_tests(OUT)
    results = {
        f"Python {name}, {dependencies} dependencies": check_installed(
            name, python, dependencies, files, folder, args
        )
        for name, python in pythons.items()
        for dependencies in args.dependencies
    }
    for what, passed in results.items():
        print(f"{what}: {'passed' if passed else 'FAILED'}")
    if not all(results.values()):
        sys.exit("not every test passed: see the lines above")


if __name__ == "__main__":
    main()
