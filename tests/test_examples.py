"""The examples, run as users run them: in a process and a folder of their own."""

import os
import re
import signal
import subprocess
import sys
import threading
from importlib import import_module
from io import FileIO
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from matplotlib.image import imread

from tests.settings import FORMS

ROOT = Path(__file__).resolve().parent.parent
EXAMPLES = ROOT / "examples"
sys.path.insert(0, str(EXAMPLES))
char_input: Any = import_module("char_input")
ENVIRONMENT = {
    **{k: v for k, v in os.environ.items() if k not in ("FORCE_COLOR", "COLUMNS")},
    "JAX_PLATFORMS": "cpu",
    "PYTHONPATH": str(ROOT),
    "PYTHONIOENCODING": "utf-8",
    "TERM": "xterm",
}
# Optimizer, steps, training loss, validation loss, seconds, megabytes, ratio.
ROW = re.compile(r"^(AdaM3W|AdamW)" + r" +(\S+)" * 5 + r" MB +(\S+)$", re.M)
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
    printed = run(tmp_path, "char_lm.py", "--steps", "20")
    ours, theirs = rows = ROW.findall(printed)
    assert [row[:2] for row in rows] == [("AdaM3W", "20"), ("AdamW", "20")]
    assert (ours[5], theirs[5]) == ("2.9", "1.9")  # three moments against two
    assert 1e-4 < float(ours[6]) < 1
    assert theirs[6] == "-"
    # They take turns: each line has the last loss of both.
    lines = re.findall(r"^step .* AdaM3W (\S+).*  AdamW (\S+)", printed, re.M)
    assert len(lines) == 3
    for row, *losses in zip(rows, *lines, strict=True):
        # From a wild guess to better than the frequencies of the characters.
        assert float(losses[0]) > 4 > 3.5 > float(losses[-1])
        assert float(row[3]) < 3
        assert float(row[4]) > 0
    assert "\nThe third moment shifts the momentum: median ratio" in printed
    assert re.search(r"AdaM3W ends .* AdamW: validation loss \d.* against \d", printed)
    table = printed[printed.index("optimizer") :].splitlines()[:3]
    assert max(map(len, table)) <= 60
    figure, sample = Path("out", "char_lm.png"), Path("out", "char_lm.txt")
    assert printed.endswith(f"\nLoss curves: {figure}\nSample: {sample}\n")
    check_files(tmp_path / "out")


@pytest.mark.slow
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
        outcomes.append(([row[:4] + row[5:] for row in rows], sample))
    assert outcomes[0] == outcomes[1]  # but for the seconds
    (ours, theirs), _ = outcomes[0]
    assert ours[:2] == ("AdaM3W", "12")
    assert float(ours[-1]) < 1e-6
    assert float(ours[3]) == pytest.approx(float(theirs[3]), abs=1.5e-4)


@pytest.mark.slow
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
                if not sent and re.search(rb"[1-9]\d* AdaM3W .*/s", output):
                    process.send_signal(signal.SIGINT)
                    sent = True
        status = process.wait()
        deadline.cancel()
    printed = re.sub(r"\x1b\[[\d;?]*[A-Za-z]|\r", "", output.decode())
    assert sent
    assert status == 130
    assert "Traceback" not in printed
    first, second = ROW.findall(printed)
    assert 1 < int(first[1]) == int(second[1]) < 1_000_000
    # At once: no figure and no sample are made first.
    assert "Interrupted.\n" in printed
    assert not list((tmp_path / "out").iterdir())
    # The cursor, which the bar hid, is there again.
    assert output.rfind(b"\x1b[?25h") > output.rfind(b"\x1b[?25l") > 0


def read(terminal: FileIO) -> bytes:
    """Returns some output, and nothing at its end."""
    try:
        return terminal.read(1 << 16)
    except OSError:  # so Linux ends a terminal
        return b""


BAD = {
    "--text missing": "--text missing: No such file",
    "--text folder": "--text folder: Is a directory",
    "--text empty": "--text empty: 0 characters, but 650 are needed",
    "--text short": "--text short: 649 characters, but 650 are needed",
    "--text latin1": "--text latin1: not UTF-8 text, at byte 2483",
    "--text nul": "--text nul: not UTF-8 text, for it contains a NUL",
    "--text same": "--text same: one character over and over",
    "--steps 0": "argument --steps: must be a whole number from 1",
    "--steps 1.5": "argument --steps: must be a whole number from 1",
    "--seed -1": "argument --seed: must be a whole number from 0",
    "--lr 0": "argument --lr: must be a number from 1e-09",
    "--lr -1": "argument --lr: must be a number from 1e-09",
    "--lr nan": "argument --lr: must be a number from 1e-09",
    "--lr inf": "argument --lr: must be a number from 1e-09",
    "--state int8": "argument --state: invalid choice: 'int8'",
    "--form": "argument --form: expected one argument",
    "--stepz 3": "unrecognized arguments: --stepz 3",
    "--out empty": "--out empty: empty: File exists",
    "--out empty/out": "--out empty/out: empty/out: Not a directory",
    "--out taken": "--out taken: taken/char_lm.png: Is a directory",
}


@pytest.mark.parametrize("options", BAD)
def test_char_lm_refuses_before_training(
    options: str,
    bad_folder: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    before = sorted(bad_folder.rglob("*"))
    with pytest.raises(SystemExit) as ended:
        char_input.parse(options.split(), None)
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


def test_char_lm_takes_the_forms_of_the_package(
    capsys: pytest.CaptureFixture[str],
) -> None:
    options = SimpleNamespace(form="quartic")
    assert import_module("char_lm").main(options) == 2
    expected = f"char_lm.py: --form quartic: not one of {', '.join(FORMS)}\n"
    assert capsys.readouterr().err == expected


def test_char_lm_refuses_as_a_program(tmp_path: Path) -> None:
    # Before the slow imports: of a jax that cannot be imported, nothing is heard.
    (tmp_path / "jax.py").write_text("raise ImportError")
    done = subprocess.run(
        command("char_lm.py", "--text", "no\nsuch"),
        cwd=tmp_path,
        env={**ENVIRONMENT, "PYTHONPATH": str(tmp_path)},
        capture_output=True,
        encoding="utf-8",
        timeout=300,
    )
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr == "char_lm.py: --text no such: No such file or directory\n"
    assert not (tmp_path / "out").exists()


def test_quickstart_ends_at_the_least_squares_line(tmp_path: Path) -> None:
    printed = run(tmp_path, "quickstart.py")
    lines = re.fullmatch(r"AdaM3: (.+), least squares: (.+)\n", printed)
    assert lines
    assert lines[1] == lines[2] == "2.000 x -0.989"


@pytest.mark.slow
def test_digits_are_recognized(tmp_path: Path) -> None:
    *epochs, last = run(tmp_path, "digits_linen.py", "--epochs", "12").splitlines()
    losses = [float(line.rpartition(" ")[2]) for line in epochs]
    assert len(losses) == 12
    assert losses == sorted(losses, reverse=True)
    accuracy = re.fullmatch(r"test accuracy (\d+\.\d)%", last)
    assert accuracy
    assert float(accuracy[1]) >= 95


@pytest.mark.slow
def test_low_precision_state_costs_no_accuracy_here(tmp_path: Path) -> None:
    _, *rows = run(tmp_path, "low_precision.py").splitlines()
    found = {row[:14].strip(): [*map(float, row[14:].split())] for row in rows}
    sizes = [size for size, _ in found.values()]
    assert sizes == [12.0, 8.0, 6.0, 4.0]
    exact = found["all float32"][1]
    for _, loss in found.values():
        assert loss == pytest.approx(exact, rel=0.02)


@pytest.mark.slow
def test_rare_classes_gain_what_frequent_ones_pay(tmp_path: Path) -> None:
    _, *rows, _, _ = run(tmp_path, "rare_classes.py").splitlines()
    numbers = [[float(x) for x in re.findall(r"[\d.]+", row[16:])] for row in rows]
    (adamw, *_), (*_, most) = numbers, numbers
    assert len(numbers) == 4
    assert most[2] < adamw[2] - 5  # errors on rare classes
    assert most[3] > adamw[3]


@pytest.mark.slow
def test_bfloat16_parameters_learn_as_float32_ones(tmp_path: Path) -> None:
    _, *rows, last = run(tmp_path, "bfloat16_parameters.py").splitlines()
    found = {row[:15].strip(): row[15:].split() for row in rows}
    losses = {name: float(loss) for name, (loss, _) in found.items()}
    lost = {name: share for name, (_, share) in found.items()}
    exact = losses["float32"]
    assert losses["bfloat16 alone"] > 1.3 * exact
    assert float(lost["bfloat16 alone"].rstrip("%")) > 70
    assert float(lost["float32"].rstrip("%")) < 2
    for remainder, within in (("None", 0.05), ("int8", 0.01), ("int16", 0.01)):
        assert losses[f"remainder {remainder}"] == pytest.approx(exact, rel=within)
    assert last == "Figure: out/bfloat16_parameters.png"
    assert imread(tmp_path / "out" / "bfloat16_parameters.png").shape[:2] == (480, 840)
