"""The examples, run as users run them: in a process and a folder of their own."""

import importlib.util
import math
import os
import re
import signal
import subprocess
import sys
import threading
from io import FileIO
from pathlib import Path
from typing import Any

import pytest
from matplotlib.image import imread

ROOT = Path(__file__).resolve().parent.parent
EXAMPLES = ROOT / "examples"
ENVIRONMENT = {
    **{k: v for k, v in os.environ.items() if k not in ("FORCE_COLOR", "COLUMNS")},
    "JAX_PLATFORMS": "cpu",
    "PYTHONPATH": str(ROOT),
    "PYTHONIOENCODING": "utf-8",
    "TERM": "xterm",
}
# Optimizer, form, steps, training loss, validation loss, seconds, bytes, unit, ratio.
ROW = re.compile(r"^(AdaM3W|AdamW) +(cubic|\w+ized|-)" + r" +(\S+)" * 7 + " *$", re.M)
TEXT = "The quick brown fox jumps over the lazy dog, again and again. " * 40


def command(example: str, *arguments: str) -> list[str]:
    return [sys.executable, "-W", "error", str(EXAMPLES / example), *arguments]


def run(folder: Path, example: str, *arguments: str) -> str:
    """Returns what a run prints, which must succeed and complain of nothing."""
    done = subprocess.run(
        command(example, *arguments),
        cwd=folder,
        env=ENVIRONMENT,
        capture_output=True,
        encoding="utf-8",
        timeout=300,
    )
    assert (done.returncode, done.stderr) == (0, "")
    return done.stdout


def check_files(out: Path) -> None:
    """Checks that the figure is one, that it is not blank, and the sample."""
    figure = imread(out / "char_lm.png")
    assert min(figure.shape[:2]) > 500
    assert figure.std() > 0.05
    assert len((out / "char_lm.txt").read_text("utf-8")) == 400 + 1


def test_char_lm_learns_and_reports(tmp_path: Path) -> None:
    printed = run(tmp_path, "char_lm.py", "--steps", "30")
    rows = ROW.findall(printed)
    assert [row[:3] for row in rows] == [
        ("AdaM3W", "standardized", "30"),
        ("AdamW", "-", "30"),
    ]
    # Three moments against two.
    assert float(rows[0][6]) / float(rows[1][6]) == pytest.approx(1.5, abs=0.1)
    assert 1e-4 < float(rows[0][8]) < 1
    assert rows[1][8] == "-"
    for row in rows:
        progress = re.findall(rf"{row[0]} +step .*validation (\S+)", printed)
        losses = [float(loss) for loss in progress]
        assert len(losses) == 4
        ratios = re.findall(rf"{row[0]} +step .*\|b\|/\|m̂\| (\S+)", printed)
        assert len(ratios) == (4 if row[0] == "AdaM3W" else 0)
        assert ratios[-1:] == [row[8]] or row[8] == "-"
        assert all(map(math.isfinite, losses))
        # From a wild guess to better than the frequencies of the characters.
        assert losses[0] > 4 > 3 > losses[-1]
        assert float(row[4]) == pytest.approx(losses[-1], abs=1e-3)
    assert "\nThe third moment shifts the momentum: median ratio" in printed
    assert re.search(r"AdaM3W ends .* AdamW: validation loss \d.* against \d", printed)
    figure, sample = Path("out", "char_lm.png"), Path("out", "char_lm.txt")
    assert printed.endswith(f"\nLoss curves: {figure}\nSample: {sample}\n")
    check_files(tmp_path / "out")


def test_char_lm_cubic_is_adam_and_a_seed_fixes_all(tmp_path: Path) -> None:
    (tmp_path / "text").write_text(TEXT, "utf-8")
    outcomes = []
    for out in ("a", "b"):
        options = ["--text", "text", "--steps", "12", "--form", "cubic", "--out", out]
        printed = run(tmp_path, "char_lm.py", *options)
        assert "With these gradients the third moment changes nothing in" in printed
        rows = ROW.findall(printed)
        check_files(tmp_path / out)
        sample = (tmp_path / out / "char_lm.txt").read_text("utf-8")
        outcomes.append(([row[:5] + row[6:] for row in rows], sample))
    assert outcomes[0] == outcomes[1]  # but for the seconds
    (ours, theirs), _ = outcomes[0]
    assert ours[:3] == ("AdaM3W", "cubic", "12")
    assert float(ours[-1]) < 1e-6
    assert float(ours[4]) == pytest.approx(float(theirs[4]), abs=1.5e-4)


@pytest.mark.skipif(sys.platform == "win32", reason="no pseudo-terminals")
def test_char_lm_reports_what_ctrl_c_left(tmp_path: Path) -> None:
    # In a terminal, for the progress bar is to be seen, too.
    ours, theirs = os.openpty()
    (tmp_path / "text").write_text(TEXT, "utf-8")
    options = ["--text", "text", "--steps", "1000000", "--out", "out"]
    with subprocess.Popen(
        command("char_lm.py", *options),
        cwd=tmp_path,
        env=ENVIRONMENT,
        stdin=subprocess.DEVNULL,
        stdout=theirs,
        stderr=theirs,
    ) as process:
        os.close(theirs)
        deadline = threading.Timer(300, process.kill)
        deadline.start()
        output, sent = b"", False
        with open(ours, "rb", buffering=0) as terminal:
            while block := read(terminal):
                output += block
                if not sent and re.search(rb"[1-9]\d*/1000000\D.*loss \d", output):
                    process.send_signal(signal.SIGINT)
                    sent = True
        status = process.wait()
        deadline.cancel()
    printed = re.sub(r"\x1b\[[\d;?]*[A-Za-z]|\r", "", output.decode())
    assert sent
    assert status == 130
    assert "Traceback" not in printed
    assert "steps/s" in printed
    (row,) = ROW.findall(printed)
    assert row[:2] == ("AdaM3W", "standardized")
    steps = int(row[2].replace(",", ""))
    assert 1 <= steps < 1_000_000
    assert f"Interrupted: AdaM3W step {steps:,}; validation loss" in printed
    check_files(tmp_path / "out")


def read(terminal: FileIO) -> bytes:
    """Returns some output, and nothing at its end."""
    try:
        return terminal.read(1 << 16)
    except OSError:  # so Linux ends a terminal
        return b""


@pytest.fixture(scope="module")
def char_lm() -> Any:
    """The example as a module: what is wrong with its input needs no process."""
    spec = importlib.util.spec_from_file_location("char_lm", EXAMPLES / "char_lm.py")
    assert spec
    assert spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


BAD = {
    "--text missing": "missing: No such file",
    "--text folder": "folder: Is a directory",
    "--text empty": "empty: 0 characters, but 650 are needed",
    "--text short": "short: 649 characters, but 650 are needed",
    "--text latin1": "latin1: 'utf-8' codec can't decode byte 0xe9",
    "--text nul": "nul: not a text, for it contains a NUL",
    "--text same": "same: one character over and over",
    "--steps 0": "argument --steps: must be a whole number from 1",
    "--steps 1.5": "argument --steps: must be a whole number from 1",
    "--seed -1": "argument --seed: must be a whole number from 0",
    "--lr 0": "argument --lr: must be a number from 1e-09",
    "--lr -1": "argument --lr: must be a number from 1e-09",
    "--lr nan": "argument --lr: must be a number from 1e-09",
    "--lr inf": "argument --lr: must be a number from 1e-09",
    "--state float8": "argument --state: invalid choice: 'float8'",
    "--form quartic": "argument --form: invalid choice: 'quartic'",
    "--form": "argument --form: expected one argument",
    "--stepz 3": "unrecognized arguments: --stepz 3",
    "--out empty": "empty: File exists",
    "--out empty/out": "empty/out: Not a directory",
    "--out taken": "char_lm.png: Is a directory",
}


@pytest.mark.parametrize("options", BAD)
def test_char_lm_refuses_before_training(
    options: str,
    char_lm: Any,
    bad_folder: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    before = sorted(bad_folder.rglob("*"))
    with pytest.raises(SystemExit) as ended:
        char_lm.main(options.split())
    printed = capsys.readouterr()
    assert ended.value.code == 2
    assert printed.out == ""
    assert printed.err.startswith("char_lm.py: ")
    assert printed.err.index("\n") == len(printed.err) - 1
    assert BAD[options] in printed.err
    assert sorted(bad_folder.rglob("*")) == before


@pytest.fixture
def bad_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    Path("folder").mkdir()
    Path("taken/char_lm.png").mkdir(parents=True)
    Path("empty").touch()
    Path("short").write_text(TEXT[:649], "utf-8")
    Path("latin1").write_bytes(TEXT.encode() + "café".encode("latin1"))
    Path("nul").write_text(TEXT + "\0", "utf-8")
    Path("same").write_text("a" * 1000, "utf-8")
    return tmp_path


def test_char_lm_refuses_as_a_program(tmp_path: Path) -> None:
    done = subprocess.run(
        command("char_lm.py", "--text", "no\nsuch"),
        cwd=tmp_path,
        env=ENVIRONMENT,
        capture_output=True,
        encoding="utf-8",
        timeout=300,
    )
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr == "char_lm.py: no such: No such file or directory\n"
    assert not list(tmp_path.iterdir())


def test_quickstart_ends_at_the_least_squares_line(tmp_path: Path) -> None:
    printed = run(tmp_path, "quickstart.py")
    lines = re.fullmatch(r"AdaM3: (.+), least squares: (.+)\n", printed)
    assert lines
    assert lines[1] == lines[2] == "2.000 x -0.989"


def test_digits_are_recognized(tmp_path: Path) -> None:
    *epochs, last = run(tmp_path, "digits_linen.py", "--epochs", "12").splitlines()
    losses = [float(line.rpartition(" ")[2]) for line in epochs]
    assert len(losses) == 12
    assert losses == sorted(losses, reverse=True)
    accuracy = re.fullmatch(r"test accuracy (\d+\.\d)%", last)
    assert accuracy
    assert float(accuracy[1]) >= 95


def test_low_precision_state_costs_no_accuracy_here(tmp_path: Path) -> None:
    _, *rows = run(tmp_path, "low_precision.py").splitlines()
    found = {row[:14].strip(): [*map(float, row[14:].split())] for row in rows}
    sizes = [size for size, _ in found.values()]
    assert sizes == [12.0, 8.0, 6.0, pytest.approx(3.11, abs=0.01)]
    exact = found["all float32"][1]
    for _, loss in found.values():
        assert loss == pytest.approx(exact, rel=0.02)
