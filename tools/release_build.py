"""Builds the release, and checks its files and its metadata.

    make release-build
    make release-build PUBLISH=1    # it must also be ready to publish

It builds an sdist, and a wheel from the sdist, into out/release/. Nothing is published.
tools/release_check.py tests what was built.
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
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
OUT = ROOT / "out" / "release"
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
# What these pages say of installing before there is a release, and what they must say.
INSTALLING = "README.md", "docs/index.md"
NOT_YET = "URL-OF-THIS-REPOSITORY", "No release yet"
INSTALL = "pip install adam3-optax"


def must(*command: object, cwd: Path = ROOT) -> None:
    """Runs a command, and ends the check if it fails."""
    if subprocess.run([str(x) for x in command], cwd=cwd, check=False).returncode:
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


def sources() -> set[str]:
    """Returns the names of the package's files.

    They are those that git knows: a stray module in the folder is no part of a release.
    Where the sources are no checkout, they are those in the folder.
    """
    if (ROOT / ".git").exists():
        command = "git", "ls-files", "adam3_optax"
        found = subprocess.run(
            command, cwd=ROOT, check=True, capture_output=True, encoding="utf-8"
        )
        return {*found.stdout.splitlines()}
    names = {path.name for path in (ROOT / "adam3_optax").glob("*.py")}
    return {f"adam3_optax/{name}" for name in names | {"py.typed"}}


def check_contents(sdist: Path, wheel: Path) -> None:
    """Compares the names of the files with those that should be there."""
    inside = sources()
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
    # Here, because only the environment of `make release-build` has both.
    from packaging.metadata import Metadata
    from readme_renderer import markdown

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
    page = markdown.render(metadata.description or "")
    if page is None:
        sys.exit("README.md cannot be rendered by a package index")
    links = re.findall(r'(?:href|src)="([^"]+)"', page)
    wrong = [x for x in links if not re.match(r"https?://|mailto:|#", x)]
    if wrong or not links:
        sys.exit(f"links of the long description are not absolute: {wrong}")
    print(f"metadata: {metadata.name} {metadata.version}, {len(links)} absolute links")


def check_entries() -> None:
    """Ends the check if a file does not know the version."""
    number = re.escape(version())
    for file, pattern in (
        ("CITATION.cff", rf"^version: {number}$"),
        ("CHANGELOG.md", rf"^## {number} - (unreleased|\d{{4}}-\d\d-\d\d)$"),
    ):
        if not re.search(pattern, (ROOT / file).read_text(), re.M):
            sys.exit(f"{file} has no entry of version {version()}")


def unready() -> list[str]:
    """Returns what must be changed before the release is published, a line each."""
    found = []
    for page in INSTALLING:
        text = (ROOT / page).read_text()
        found += [f"{page} still says {words!r}" for words in NOT_YET if words in text]
        if INSTALL not in text:
            found.append(f"{page} does not say {INSTALL!r}")
    if f"## {version()} - unreleased" in (ROOT / "CHANGELOG.md").read_text():
        found.append(f"CHANGELOG.md has no date for {version()}")
    return found


def version() -> str:
    """Returns the version of the sources."""
    text = (ROOT / "adam3_optax" / "__init__.py").read_text()
    return re.findall(r'^__version__ = "(.*)"$', text, re.M)[0]


def main() -> None:
    """Builds and checks; the status is 1 if something is wrong."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    ready = "it must be ready to publish: pages name the index, the version has a date"
    parser.add_argument("--publish", action="store_true", help=ready)
    args = parser.parse_args()
    if importlib.util.find_spec("hatchling") is None:
        sys.exit("hatchling is missing: run this by make release-build")
    shutil.rmtree(OUT, ignore_errors=True)
    OUT.mkdir(parents=True)
    sdist, wheel = build(OUT)
    check_contents(sdist, wheel)
    check_metadata(wheel)
    check_entries()
    lines = unready()
    for line in lines:
        print(f"before publishing: {line}")
    if args.publish and lines:
        sys.exit("not ready to publish: see the lines above")


if __name__ == "__main__":
    main()
