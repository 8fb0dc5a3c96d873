"""Several processes: the same result as one, and neither hang nor orphan."""

import os
import re
import shutil
import signal
import socket
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from importlib import import_module
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
from jax.sharding import AxisType

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "examples"))
psutil: Any = import_module("psutil")  # it has no types
char_lm: Any = import_module("char_lm")
multi_process: Any = import_module("multi_process")

STEPS = 4
GO_ON = "the same command goes on from the last checkpoint\n"


def command(folder: Path, *options: str) -> list[str]:
    return [
        *(sys.executable, str(ROOT / "examples" / "multi_process.py")),
        *("--checkpoints", str(folder), "--every", "1", "--steps", str(STEPS)),
        *options,
    ]


@contextmanager
def started(folder: Path, *options: str) -> Iterator[subprocess.Popen[str]]:
    with subprocess.Popen(
        command(folder, *options),
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        stdin=subprocess.PIPE,  # closed, it would end what is --simulated
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        encoding="utf-8",
    ) as process:
        try:
            yield process
        finally:
            process.kill()  # its workers end with it


def launch(folder: Path, *options: str) -> tuple[int, str, str]:
    """Returns exit status, output and errors."""
    with started(folder, *options) as process:
        printed, errors = process.communicate(timeout=400)
    return process.returncode, printed, errors


def harmed(
    folder: Path, harm: Callable[[Any, list[Any]], None], *options: str
) -> tuple[int, str]:
    """Returns how a run ends that is harmed after its first checkpoint."""
    with started(folder, "--steps", "100000", *options) as process:
        assert process.stdout
        assert process.stdout.readline().startswith(("Started", "Resumed"))
        assert "saved" in process.stdout.readline()
        launcher = psutil.Process(process.pid)
        workers = sorted(launcher.children(), key=lambda x: x.cmdline())
        assert len(workers) == 2
        for worker in workers:  # the coordinator and Gloo, on the loopback address
            for found in worker.net_connections("inet"):
                assert found.laddr.ip.removeprefix("::ffff:") == "127.0.0.1"
        harm(launcher, workers)
        _, errors = process.communicate(timeout=60)
        _, alive = psutil.wait_procs(
            [x for x in workers if x.is_running() and x.status() != "zombie"], 10
        )
        assert [x for x in alive if x.status() != "zombie"] == []
    return process.returncode, errors


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The checkpoints of a run never harmed, of 2 processes with 4 devices each."""
    folder = tmp_path_factory.mktemp("whole") / "checkpoints"
    status, printed, errors = launch(folder)
    assert (status, errors) == (0, "")
    first, *steps, last = printed.splitlines()
    assert first == "Started: 2 processes, 8 devices"
    losses = [float(x.split()[3]) for x in steps]
    assert len(losses) == STEPS
    assert losses[-1] < losses[0] - 0.5
    assert re.fullmatch(r"Validation loss \d\.\d+. Checkpoints: .*", last)
    return folder


@pytest.mark.slow
@pytest.mark.parametrize("options", [(), ("--steps", "130", "--every", "130")])
def test_many_steps_between_checkpoints(options: Any, tmp_path: Path) -> None:
    # With the defaults, as a reader runs it, and with one checkpoint at the end. Steps
    # that are queued hang JAX 0.10 on simulated devices.
    ended = subprocess.run(
        [*command(tmp_path)[:4], *options],
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        stdin=subprocess.PIPE,
        capture_output=True,
        encoding="utf-8",
        timeout=600,
    )
    assert (ended.returncode, ended.stderr) == (0, "")
    assert "Validation loss" in ended.stdout


@pytest.mark.slow
def test_two_processes_of_four_are_one_of_eight(
    whole: Path, tmp_path: Path, standard_promotion: None
) -> None:
    # Here, one process with eight devices takes the step after the second checkpoint.
    folder = Path(shutil.copytree(whole, tmp_path / "copy"))
    last = shutil.move(folder / "3", tmp_path / "3")
    shutil.rmtree(folder / "4")
    corpus = char_lm.load(None)
    mesh = jax.make_mesh((8,), ("all",), axis_types=(AxisType.Auto,))
    parts = multi_process.set_up(STEPS, len(corpus.alphabet), mesh)
    graph, optimizer, _, template = parts
    settings = multi_process.settings_of(STEPS)
    with multi_process.Checkpoints(folder, template, settings) as checkpoints:
        assert checkpoints.step == 2
        tree = checkpoints.restore()
    step = multi_process.make_step(graph, optimizer, template, mesh)
    ours, _ = step(tree, multi_process.batch_at(corpus.training, 3, mesh))
    shutil.move(last, folder / "3")
    with multi_process.Checkpoints(folder, template, settings) as checkpoints:
        theirs = checkpoints.restore()
    # Only the order of the sums over devices differs, and with it the last digits of
    # the gradients: 1e-5 of the largest. A moment is linear in them, or of the second
    # or third power, so three times that.
    for name in ("m", "v", "s"):
        leaves = [jax.tree.leaves(getattr(x["state"][0], name)) for x in (ours, theirs)]
        for x, y in zip(*leaves, strict=True):
            x, y = np.asarray(x), np.asarray(y)
            np.testing.assert_allclose(x, y, rtol=0, atol=3e-5 * np.abs(y).max())


@pytest.mark.slow
def test_a_killed_run_ends_as_one_never_killed(whole: Path, tmp_path: Path) -> None:
    # With all steps in its settings, for a run of other steps is another run.
    with started(tmp_path) as process:
        assert process.stdout
        assert "Started" in process.stdout.readline()
        assert "saved" in process.stdout.readline()
        psutil.Process(process.pid).children()[0].kill()
        assert process.wait(60) in (1, 2)
    status, printed, errors = launch(tmp_path)
    assert (status, errors) == (0, "")
    assert re.match(r"Resumed from step [1-3]: 2 processes, 8 devices\n", printed)
    # The digests in the two seals are those of Orbax's files, which hold random names.
    assert bits(tmp_path) == bits(whole)


def bits(folder: Path) -> list[bytes]:
    mesh = jax.make_mesh((8,), ("all",), axis_types=(AxisType.Auto,))
    characters = len(char_lm.load(None).alphabet)
    with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
        *_, template = multi_process.set_up(STEPS, characters, mesh)
    settings = multi_process.settings_of(STEPS)
    with multi_process.Checkpoints(folder, template, settings) as checkpoints:
        assert checkpoints.step == STEPS
        return [np.asarray(x).tobytes() for x in jax.tree.leaves(checkpoints.restore())]


@pytest.mark.slow
def test_goes_on_with_another_number_of_processes(whole: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(whole, tmp_path / "copy"))
    shutil.rmtree(folder / "4")
    one = launch(folder, "--processes", "1", "--devices-per-process", "2")
    assert one[1].startswith("Resumed from step 3: 1 processes, 2 devices\n")
    assert one[0::2] == (0, "")


def end(process: Any, kind: signal.Signals) -> None:
    process.send_signal(kind)


@pytest.mark.slow
@pytest.mark.parametrize("i", [0, 1])
def test_a_worker_that_is_killed(i: int, tmp_path: Path) -> None:
    status, errors = harmed(tmp_path, lambda _, x: end(x[i], signal.SIGKILL))
    assert (status, errors) == (
        1,
        f"multi_process.py: process {i} ended (SIGKILL); {GO_ON}",
    )


@pytest.mark.slow
@pytest.mark.parametrize("i", [0, 1])
def test_a_worker_that_is_stopped(i: int, tmp_path: Path) -> None:
    status, errors = harmed(tmp_path, lambda _, x: end(x[i], signal.SIGSTOP))
    why = "SIGABRT, as JAX ends it when another process stops answering"
    assert (status, errors) == (
        1,
        f"multi_process.py: process {1 - i} ended ({why}); {GO_ON}",
    )


@pytest.mark.slow
def test_a_launcher_that_is_killed_or_interrupted(tmp_path: Path) -> None:
    ended = harmed(tmp_path, lambda x, _: end(x, signal.SIGKILL))
    assert ended == (-signal.SIGKILL, "")
    ended = harmed(tmp_path, lambda x, _: end(x, signal.SIGINT))
    assert ended == (130, f"multi_process.py: interrupted; {GO_ON}")


@pytest.mark.slow
def test_what_is_wrong_with_the_checkpoints(whole: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(whole, tmp_path / "copy"))
    prefix = "multi_process.py: " + re.escape(f"{folder}/{STEPS} cannot be used")
    status, printed, errors = launch(folder, "--steps", "9")
    assert (status, printed) == (2, "")
    assert re.fullmatch(rf"{prefix}.*: setting steps is 9 now, and was 4.*\n", errors)
    (folder / str(STEPS) / "default" / "added").touch()
    status, printed, errors = launch(folder)
    assert (status, printed) == (2, "")
    assert re.fullmatch(rf"{prefix}.*: SHA-256 of added is .*\n", errors)
    shutil.rmtree(folder / str(STEPS))
    status, printed, errors = launch(folder)
    assert (status, errors) == (0, "")
    assert printed.startswith(f"Resumed from step {STEPS - 1}: 2 processes")


@pytest.mark.slow
def test_by_hand_folders_that_are_not_shared(whole: Path, tmp_path: Path) -> None:
    address = f"127.0.0.1:{free_port()}"
    (tmp_path / "empty").mkdir()
    joined = ("--coordinator", address, "--simulated")
    with (
        started(whole, *joined, "--process-id", "0") as first,
        started(tmp_path / "empty", *joined, "--process-id", "1") as second,
    ):
        ends = [x.wait(100) for x in (first, second)]
        errors = "".join(x.stderr.read() for x in (first, second) if x.stderr)
    assert 2 in ends  # the other one may only have noticed that this one is gone
    assert re.search("multi_process.py: .*: not all processes see the same", errors)


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


BAD = {
    "--processes 0": "argument --processes: must be a whole number from 1",
    "--devices-per-process x": "argument --devices-per-process: must be a whole",
    "--process-id 0": "--process-id and --coordinator go together",
    "--coordinator 10.0.0.1:1": "--process-id and --coordinator go together",
    "--process-id 2 --coordinator 10.0.0.1:1": "--process-id must be below --processes",
    "--pod --process-id 0 --coordinator 10.0.0.1:1": "--pod and --coordinator exclude",
    "--process-id 0 --coordinator 127.0.0.1:x": "--coordinator 127.0.0.1:x: invalid",
    "--checkpoints notes": "--checkpoints notes: File exists",
    "--processes 3": "the 16 texts of a batch cannot go to 12 devices",
}


@pytest.mark.parametrize("options", BAD)
def test_refuses_before_it_starts(
    options: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("notes").touch()
    with pytest.raises(SystemExit) as ended:
        multi_process.main(options.split())
    printed = capsys.readouterr()
    assert (ended.value.code, printed.out) == (2, "")
    assert re.fullmatch(rf"multi_process.py: .*{BAD[options]}.*\n", printed.err)


def test_a_port_in_use(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        address = f"127.0.0.1:{server.getsockname()[1]}"
        joined = ["--process-id", "0", "--coordinator", address]
        with pytest.raises(SystemExit):
            multi_process.parse([*joined, "--checkpoints", str(tmp_path)])
    message = f"multi_process.py: --coordinator {address}: .*Address already in use.*\n"
    assert re.fullmatch(message, capsys.readouterr().err)
