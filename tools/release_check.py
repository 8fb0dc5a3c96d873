"""Builds the release and tests it as a user gets it.

    python tools/release_check.py --pythons 3.11 3.12 3.13

It builds an sdist, and a wheel from the sdist. It checks their files and metadata. Then
each is installed into empty environments: for each Python one with the oldest and one
with the newest dependencies. There the tests run against the installed wheel, in a
folder without the sources of the package. Nothing is published.
"""

import argparse
import importlib.util
import re
import shutil
import subprocess
import sys
import tarfile
import tomllib
import zipfile
from collections.abc import Sequence
from pathlib import Path

from interpreter import interpreter
from packaging.metadata import Metadata
from readme_renderer import markdown

ROOT = Path(__file__).resolve().parent.parent
PACKAGE = ROOT / "adam3_optax"
TOP = {
    ".gitignore",
    "CHANGELOG.md",
    "CITATION.cff",
    "LICENSE",
    "PKG-INFO",
    "README.md",
    "pyproject.toml",
    "tools/long_description.py",
}
# What the tests read, apart from the package.
BESIDE = "tests", "docs", "examples", "tools", "benchmarks", "notebooks"
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


def build(out: Path) -> tuple[Path, Path]:
    """Builds the sdist, and the wheel from it; returns both."""
    hatchling = sys.executable, "-m", "hatchling", "build", "-d", out
    must(*hatchling, "-t", "sdist")
    (sdist,) = out.glob("*.tar.gz")
    with tarfile.open(sdist) as archive:
        archive.extractall(out, filter="data")
    must(*hatchling, "-t", "wheel", cwd=out / sdist.name.removesuffix(".tar.gz"))
    (wheel,) = out.glob("*.whl")
    return sdist, wheel


def check_contents(sdist: Path, wheel: Path) -> None:
    """Compares the names of the files with those that should be there."""
    inside = {f"adam3_optax/{p.name}" for p in PACKAGE.glob("*.py")}
    inside.add("adam3_optax/py.typed")
    with tarfile.open(sdist) as archive:
        names = {n.partition("/")[2] for n in archive.getnames()}
    compare("sdist", names, inside | TOP)
    info = f"adam3_optax-{version()}.dist-info"
    parts = "METADATA", "RECORD", "WHEEL", "licenses/LICENSE"
    compare(
        "wheel",
        set(zipfile.ZipFile(wheel).namelist()),
        inside | {f"{info}/{part}" for part in parts},
    )


def compare(what: str, found: set[str], wanted: set[str]) -> None:
    """Ends the check if names are missing or too many."""
    if found != wanted:
        missing, more = sorted(wanted - found), sorted(found - wanted)
        sys.exit(f"the {what} lacks {missing} and has {more} that should not be there")
    print(f"{what}: {len(found)} files, as they should be")


def check_metadata(wheel: Path) -> None:
    """Checks version, addresses, requirements and the long description."""
    archive = zipfile.ZipFile(wheel)
    (name,) = (n for n in archive.namelist() if n.endswith("/METADATA"))
    metadata = Metadata.from_email(archive.read(name), validate=True)
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    assert str(metadata.version) == version(), metadata.version
    assert metadata.project_urls == project["urls"], metadata.project_urls
    needed = {
        r.name for r in metadata.requires_dist or () if "extra" not in str(r.marker)
    }
    assert needed == {"jax", "jaxlib", "optax"}, needed
    for file, pattern in (
        ("CITATION.cff", rf"^version: {re.escape(version())}$"),
        ("CHANGELOG.md", rf"^## \[{re.escape(version())}\]"),
    ):
        if not re.search(pattern, (ROOT / file).read_text(), re.M):
            sys.exit(f"{file} has no entry of version {version()}")
    page = markdown.render(metadata.description or "")
    if page is None:
        sys.exit("README.md cannot be rendered by a package index")
    links = re.findall(r'(?:href|src)="([^"]+)"', page)
    wrong = [x for x in links if not re.match(r"https?://|mailto:|#", x)]
    if wrong or not links:
        sys.exit(f"links of the long description are not absolute: {wrong}")
    print(f"metadata: {metadata.name} {metadata.version}, {len(links)} absolute links")


def version() -> str:
    """Returns the version of the sources."""
    text = (PACKAGE / "__init__.py").read_text()
    return re.findall(r'^__version__ = "(.*)"$', text, re.M)[0]


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


def folder_for_tests(out: Path, apart: Sequence[str]) -> Path:
    """Copies the tests and what they read, without the package; returns the folder."""
    folder = out / "tests"
    leave = shutil.ignore_patterns(
        "__pycache__", "records", *map("test_{}.py".format, apart)
    )
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
    args: argparse.Namespace,
) -> bool:
    """Installs both files, each in an empty environment, and runs the tests on one."""
    sdist, wheel = files
    made = environment(python, args.out / f"sdist-{name}-{dependencies}")
    if not install(made, str(sdist), dependencies):
        print(
            f"Python {name}, {dependencies}: the dependencies cannot be installed here"
        )
        return False
    must(made, "-c", ONE_STEP, cwd=args.out)
    made = environment(python, args.out / f"wheel-{name}-{dependencies}")
    if not install(made, f"{wheel}[test]", dependencies):
        print(f"Python {name}, {dependencies}: the tests cannot be installed here")
        return False
    folder = args.out / "tests"
    must(made, "-c", ONE_STEP, cwd=folder)
    tests = [f"tests/test_{t}.py" for t in args.tests] or [
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
    """Runs all checks; the status is 1 if one fails."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    add = parser.add_argument
    add("--pythons", nargs="+", default=["3.11", "3.12", "3.13"])
    add("--dependencies", nargs="+", default=["oldest", "newest"])
    add("--tests", nargs="*", default=[], help="names such as rule; all without")
    add("--apart", nargs="*", default=[], help="tests that are left out")
    add("--jobs", default="2", help="processes of pytest")
    add("--build-only", action="store_true", help="install nothing")
    add("--out", type=Path, default=ROOT / "out" / "release")
    args = parser.parse_args()
    args.out = args.out.resolve()
    if importlib.util.find_spec("hatchling") is None:
        sys.exit("hatchling is missing: run this by make release-check")
    shutil.rmtree(args.out, ignore_errors=True)
    args.out.mkdir(parents=True)
    files = build(args.out)
    check_contents(*files)
    check_metadata(files[1])
    folder_for_tests(args.out, args.apart)
    results = []
    for name in [] if args.build_only else args.pythons:
        python = interpreter(name)
        if python is None:
            print(f"Python {name} is not on this machine: not tested")
            results.append((name, "-", "not tested"))
            continue
        for dependencies in args.dependencies:
            passed = check_installed(name, python, dependencies, files, args)
            results.append((name, dependencies, "passed" if passed else "FAILED"))
    for result in results:
        print("Python {}, {} dependencies: {}".format(*result))
    if any(result[2] == "FAILED" for result in results):
        sys.exit(1)


if __name__ == "__main__":
    main()
