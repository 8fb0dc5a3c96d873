"""Builds the release, and checks its files and its metadata.

    make release-build
    make release-build PUBLISH=1    # it must also be ready to publish

It builds an sdist, and a wheel from the sdist. If all is right they lie in
out/release/; if not, nothing does. Nothing is published. tools/release_check.py tests
what was built.
"""

import argparse
import importlib.util
import re
import shutil
import subprocess
import sys
import tarfile
import tempfile
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


def git(*arguments: str) -> str:
    """Returns what git says of this checkout."""
    command = "git", "-C", str(ROOT), *arguments
    try:
        done = subprocess.run(
            command, check=False, capture_output=True, encoding="utf-8"
        )
    except OSError as error:
        sys.exit(f"the release is built from a checkout, which needs git: {error}")
    if done.returncode:
        sys.exit(f"{' '.join(command)}: {done.stderr.strip()}")
    return done.stdout


def text_of(name: str) -> str:
    """Returns the text of a file of the repository."""
    return (ROOT / name).read_text(encoding="utf-8")


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
        return {x for x in git("ls-files", "-z", "adam3_optax").split("\0") if x}
    names = {path.name for path in (ROOT / "adam3_optax").glob("*.py")}
    return {f"adam3_optax/{name}" for name in names | {"py.typed"}}


def check_contents(sdist: Path, wheel: Path) -> None:
    """Compares the names of the files with those that should be there."""
    inside = sources()
    if "adam3_optax/py.typed" not in inside:
        sys.exit("adam3_optax/py.typed is missing: without it no user sees the types")
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
    project = tomllib.loads(text_of("pyproject.toml"))["project"]
    needed = {
        r.name for r in metadata.requires_dist or () if "extra" not in str(r.marker)
    }
    for what, found, wanted in (
        ("version", str(metadata.version), version()),
        ("addresses", metadata.project_urls, project["urls"]),
        ("requirements", needed, {"jax", "jaxlib", "optax"}),
        ("license", metadata.license_expression, "Apache-2.0"),
        # The newest that the tools which publish it know.
        ("version of the metadata", metadata.metadata_version, "2.4"),
    ):
        if found != wanted:
            sys.exit(f"the wheel's {what} must be {wanted}, not {found}")
    page = markdown.render(metadata.description or "")
    if page is None:
        sys.exit("README.md cannot be rendered by a package index")
    links = re.findall(r'(?:href|src)="([^"]+)"', page)
    wrong = [x for x in links if not re.match(r"https?://|mailto:|#", x)]
    if wrong or not links:
        sys.exit(f"links of the long description are not absolute: {wrong}")
    mine = re.compile(rf"{project['urls']['Repository']}/(?:blob|raw)/v[^/]*/([^#]*)")
    lost = [
        link
        for link in links
        if (found := mine.match(link)) and not is_inside(found.group(1))
    ]
    if lost:
        sys.exit(f"links of the long description to files that are not there: {lost}")
    print(f"metadata: {metadata.name} {metadata.version}, {len(links)} absolute links")


def is_inside(name: str) -> bool:
    """Returns whether a path names a file or a folder of the repository."""
    path = (ROOT / name).resolve()
    return path.is_relative_to(ROOT) and path.exists()


def check_entries() -> None:
    """Ends the check if a file does not know the version, or is no license."""
    if "Apache License" not in text_of("LICENSE"):
        sys.exit("LICENSE is not the text of Apache-2.0")
    number = re.escape(version())
    for file, pattern in (
        ("CITATION.cff", rf"^version: {number}$"),
        ("CHANGELOG.md", rf"^## {number} - (unreleased|\d{{4}}-\d\d-\d\d)$"),
    ):
        if not re.search(pattern, text_of(file), re.M):
            sys.exit(f"{file} has no entry of version {version()}")


def unready() -> list[str]:
    """Returns what must be changed before the release is published, a line each."""
    found = []
    for page in INSTALLING:
        text = text_of(page)
        found += [f"{page} still says {words!r}" for words in NOT_YET if words in text]
        if INSTALL not in text:
            found.append(f"{page} does not say {INSTALL!r}")
    if f"## {version()} - unreleased" in text_of("CHANGELOG.md"):
        found.append(f"CHANGELOG.md has no date for {version()}")
    if (ROOT / ".git").exists():
        changed = git("status", "--porcelain").splitlines()
        found += [f"the checkout is not its commit: {line}" for line in changed]
    return found


def version() -> str:
    """Returns the version of the sources."""
    text = text_of("adam3_optax/__init__.py")
    found = re.findall(r'^__version__ = "(.*)"$', text, re.M)
    if len(found) != 1 or not re.fullmatch(r"\d+(\.\d+)*((a|b|rc)\d+)?", found[0]):
        sys.exit(f'one __version__ such as "0.1.0" or "0.2.0rc1" is needed: {found}')
    return str(found[0])


def main() -> None:
    """Builds and checks; the status is 1 if something is wrong."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    ready = "it must be ready to publish: pages name the index, the version has a date"
    parser.add_argument("--publish", action="store_true", help=ready)
    args = parser.parse_args()
    if importlib.util.find_spec("hatchling") is None:
        sys.exit("hatchling is missing: run this by make release-build")
    shutil.rmtree(OUT, ignore_errors=True)
    OUT.parent.mkdir(parents=True, exist_ok=True)
    # Only what passed every check gets the name by which others take it.
    with tempfile.TemporaryDirectory(dir=OUT.parent) as folder:
        out = Path(folder, "release")
        out.mkdir()
        sdist, wheel = build(out)
        check_contents(sdist, wheel)
        check_metadata(wheel)
        check_entries()
        lines = unready()
        for line in lines:
            print(f"before publishing: {line}")
        if args.publish and lines:
            sys.exit("not ready to publish: see the lines above")
        out.rename(OUT)


if __name__ == "__main__":
    try:
        main()
    except KeyboardInterrupt:
        sys.exit("interrupted: nothing was built")
    except OSError as error:
        sys.exit(f"nothing was built: {error}")
