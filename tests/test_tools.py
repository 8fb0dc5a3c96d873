"""What looks for interpreters, asks for links, and builds and checks the release."""

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
