"""What looks for interpreters, asks for links, and builds and checks the release."""

import contextlib
import os
import shutil
import subprocess
import sys
import threading
import urllib.error
from collections import Counter
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from importlib import import_module
from pathlib import Path
from socket import EAI_AGAIN, EAI_NONAME, gaierror
from typing import Any, ClassVar

import pytest

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "tools"))
check_links: Any = import_module("check_links")
interpreter: Any = import_module("interpreter")
release_build: Any = import_module("release_build")
release_check: Any = import_module("release_check")


def test_the_newest_interpreter_comes_first(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("3.13.9", "3.13.10", "3.13.2", "3.13.11rc1", "3.13.11t", "3.1.3"):
        (tmp_path / "versions" / name).mkdir(parents=True)
    pyenv = tmp_path / "pyenv"
    pyenv.write_text(f"#!/bin/sh\necho '{tmp_path}'\n")
    pyenv.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=":")
    found = [Path(path).parts[-3] for path in interpreter._of_pyenv("3.13")]
    assert found == ["3.13.10", "3.13.9", "3.13.2"]


class Host(BaseHTTPRequestHandler):
    asked: ClassVar[Counter[str]] = Counter()

    def do_GET(self) -> None:
        self.asked[self.path] += 1
        if self.path == "/broken":
            self.wfile.write(b"no status\r\n\r\n")
        else:
            self.send_response(int(self.path[1:]))
            self.end_headers()

    def log_message(self, *args: object) -> None:
        """Says nothing."""


@pytest.fixture
def host(monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    server = ThreadingHTTPServer(("127.0.0.1", 0), Host)
    threading.Thread(target=server.serve_forever, args=(0.01,)).start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()
    server.server_close()


def test_links_are_lost_unchecked_or_right(host: str) -> None:
    Host.asked.clear()
    nowhere = {"404": True, "410": True, "403": False, "503": False, "broken": False}
    for path, lost in nowhere.items():
        assert check_links.problem(f"{host}/{path}")[0] is lost, path
    assert check_links.problem(f"{host}/200") is None
    assert {*Host.asked.values()} == {1}
    assert check_links.problem("no address")[0] is False


@pytest.mark.parametrize(
    ("reason", "lost"),
    [
        (gaierror(EAI_NONAME, "no such host"), True),
        (gaierror(EAI_AGAIN, "no name server"), False),
        (TimeoutError("too slow"), False),
        (ConnectionRefusedError("not now"), False),
    ],
)
def test_no_such_host_is_the_one_error_without_an_answer(
    reason: OSError, lost: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fails(*args: object, **kwargs: object) -> None:
        raise urllib.error.URLError(reason)

    monkeypatch.setattr("urllib.request.urlopen", fails)
    assert check_links.problem("https://example.org")[0] is lost


def test_only_a_lost_link_is_an_error(
    host: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(sys, "argv", ["check_links", str(tmp_path)])
    page = tmp_path / "index.html"
    page.write_text(
        f'<a href="{host}/200#a"><a href="{host}/200"><a href="{host}/503">'
    )
    check_links.main()
    assert "2 addresses of other hosts, 1 not checked" in capsys.readouterr().out
    page.write_text(f'<a href="{host}/404">')
    with pytest.raises(SystemExit, match="1 of 1 addresses lead nowhere"):
        check_links.main()
    assert f"{host}/404 of index.html leads nowhere" in capsys.readouterr().out


@pytest.mark.slow
def test_the_folder_of_the_release_check_has_all_that_its_tests_read(
    tmp_path: Path,
) -> None:
    folder = release_check.folder_for_tests(tmp_path)
    assert not (folder / "adam3_optax").exists()
    for arguments in (
        ("--collect-only", release_check.APART, "tests"),
        ("tests/test_client_table.py",),
    ):
        command = sys.executable, "-m", "pytest", "-q", *arguments
        done = subprocess.run(
            command, cwd=folder, check=False, capture_output=True, encoding="utf-8"
        )
        assert done.returncode == 0, done.stdout + done.stderr


def test_a_python_that_is_missing_fails_the_release_check(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(release_check, "BUILT", tmp_path)
    monkeypatch.setattr(sys, "argv", ["release_check", "--pythons", "3.99"])
    with pytest.raises(SystemExit, match="0 sdists and 0 wheels"):
        release_check.main()
    for name in ("x.tar.gz", "x.whl"):
        (tmp_path / name).touch()
    with pytest.raises(SystemExit, match=r"not on this machine: Python 3\.99\."):
        release_check.main()


def test_a_pair_that_fails_fails_the_release_check(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(release_check, "OUT", tmp_path / "out")
    monkeypatch.setattr(release_check, "built", lambda folder: (folder, folder))
    monkeypatch.setattr(release_check, "interpreter", lambda name: name)
    monkeypatch.setattr(release_check, "folder_for_tests", lambda out: out)
    monkeypatch.setattr(sys, "argv", ["release_check", "--pythons", "3.12", "3.13"])
    for failing in (("3.13", "oldest"), None):
        monkeypatch.setattr(
            release_check,
            "check_installed",
            lambda name, python, kind, *args, failing=failing: (name, kind) != failing,
        )
        with pytest.raises(SystemExit) if failing else contextlib.nullcontext():
            release_check.main()
        found = capsys.readouterr().out
        assert found.count("passed") == (3 if failing else 4)
        failed = "Python 3.13, oldest dependencies: FAILED"
        assert (failed in found) == (failing is not None)


@pytest.mark.skipif(shutil.which("git") is None, reason="git is not installed")
def test_a_stray_module_is_no_part_of_the_release(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(release_build, "ROOT", tmp_path)
    package = tmp_path / "adam3_optax"
    package.mkdir()
    for name in ("__init__.py", "py.typed"):
        (package / name).touch()
    known = {"adam3_optax/__init__.py", "adam3_optax/py.typed"}
    assert release_build.sources() == known
    for command in ("init -q", "add ."):
        subprocess.run(["git", *command.split()], cwd=tmp_path, check=True)
    stray = package / "stray.py"
    stray.touch()
    assert release_build.sources() == known
    with pytest.raises(SystemExit, match=r"has \['adam3_optax/stray.py'\]"):
        release_build.compare("wheel", known | {"adam3_optax/stray.py"}, known)


def test_what_must_change_before_a_release_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    release_build.check_entries()
    monkeypatch.setattr(release_build, "ROOT", tmp_path)
    monkeypatch.setattr(release_build, "version", lambda: "1.2.3")
    (tmp_path / "docs").mkdir()
    (tmp_path / "LICENSE").write_text("Apache License\n")
    (tmp_path / "CITATION.cff").write_text("version: 1.2.3\n")
    (tmp_path / "docs" / "index.md").write_text("pip install adam3-optax\n")
    (tmp_path / "README.md").write_text("git clone URL-OF-THIS-REPOSITORY\n")
    (tmp_path / "CHANGELOG.md").write_text("## 1.2.3 - unreleased\n")
    release_build.check_entries()
    assert release_build.unready() == [
        "README.md still says 'URL-OF-THIS-REPOSITORY'",
        "README.md does not say 'pip install adam3-optax'",
        "CHANGELOG.md has no date for 1.2.3",
    ]
    (tmp_path / "README.md").write_text("pip install adam3-optax\n")
    (tmp_path / "CHANGELOG.md").write_text("## 1.2.3 - 2027-01-02\n")
    release_build.check_entries()
    assert release_build.unready() == []
    (tmp_path / "CHANGELOG.md").write_text("## 1.2.3\n")
    with pytest.raises(SystemExit, match=r"CHANGELOG\.md has no entry of version 1"):
        release_build.check_entries()


def test_what_fails_a_check_leaves_no_release(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "out" / "release"
    monkeypatch.setattr(release_build, "OUT", out)
    monkeypatch.setattr(sys, "argv", ["release_build"])

    def build(folder: Path) -> tuple[Path, Path]:
        (folder / "x.whl").touch()
        return folder / "x.tar.gz", folder / "x.whl"

    monkeypatch.setattr(release_build, "build", build)
    for name in ("check_contents", "check_metadata"):
        monkeypatch.setattr(release_build, name, lambda *files: None)
    release_build.main()
    assert [path.name for path in out.iterdir()] == ["x.whl"]

    def fail(wheel: Path) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(release_build, "check_metadata", fail)
    with pytest.raises(KeyboardInterrupt):
        release_build.main()
    assert [*out.parent.iterdir()] == []


@pytest.mark.parametrize("text", ["'0.1.0'", '"0.2.0-rc1"', '"0.1"\n__version__ = "1"'])
def test_a_version_that_the_index_would_write_in_another_way_is_named(
    text: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert release_build.version() == "0.1.0"
    monkeypatch.setattr(release_build, "ROOT", tmp_path)
    (tmp_path / "adam3_optax").mkdir()
    (tmp_path / "adam3_optax" / "__init__.py").write_text(f"__version__ = {text}\n")
    with pytest.raises(SystemExit, match="one __version__ such as"):
        release_build.version()


def test_a_link_must_lead_into_the_repository() -> None:
    assert release_build.is_inside("docs/faq.md")
    assert release_build.is_inside("studies")
    for name in ("docs/nowhere.md", "..", "/"):
        assert not release_build.is_inside(name)


@pytest.mark.skipif(shutil.which("make") is None, reason="make is not installed")
@pytest.mark.parametrize("require", ["", "1"])
def test_a_compiler_that_is_missing_fails_where_it_is_required(require: str) -> None:
    settings = "COMPILERS=none", "PYTHON=false", f"REQUIRE={require}"
    # Not what a make that runs the tests was given.
    env = {name: value for name, value in os.environ.items() if "MAKE" not in name}
    done = subprocess.run(
        ["make", "test-compiled", *settings],
        cwd=ROOT,
        env=env,
        check=False,
        capture_output=True,
        encoding="utf-8",
    )
    assert "jax[none] cannot be installed here" in done.stdout
    assert bool(done.returncode) == bool(require)
