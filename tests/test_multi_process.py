"""Several processes: a killed run ends as one never killed, and leaves no orphans."""

import os
import re
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp
import psutil
import pytest

ROOT = Path(__file__).resolve().parent.parent
SMALL = "--devices", "1", "--every", "2"


@contextmanager
def started(folder: Path, *options: str) -> Iterator[subprocess.Popen[str]]:
    program = str(ROOT / "examples" / "multi_process.py")
    with subprocess.Popen(
        [sys.executable, program, "--checkpoints", str(folder), *options],
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        encoding="utf-8",
    ) as process:
        try:
            yield process
        finally:
            process.kill()  # its workers end with it


def run(folder: Path, *options: str) -> list[str]:
    """Returns the lines of a run, which must succeed."""
    with started(folder, *options) as process:
        printed, errors = process.communicate(timeout=600)
    assert process.returncode == 0, errors
    return printed.splitlines()


def harm(folder: Path, whom: int | None, how: signal.Signals, *options: str) -> int:
    """Ends a worker, or the launcher, after a checkpoint; returns the exit status."""
    with started(folder, *options, "--steps", "100000") as process:
        assert process.stdout
        while not re.match("step +2 ", process.stdout.readline()):
            assert process.poll() is None
        workers = psutil.Process(process.pid).children()
        assert len(workers) == 2
        for worker in workers:  # what they listen on is the loopback address alone
            for found in worker.net_connections("inet"):
                assert found.laddr.ip.removeprefix("::ffff:") == "127.0.0.1"
        (process if whom is None else workers[whom]).send_signal(how)
        status = process.wait(60)
        _, alive = psutil.wait_procs(workers, 20)
        assert [x for x in alive if x.status() != "zombie"] == []
    return status


def restored(folder: Path) -> Any:
    """Returns a checkpoint as arrays of NumPy, wherever it lay."""
    with ocp.Checkpointer(ocp.PyTreeCheckpointHandler()) as orbax:
        tree = orbax.handler.metadata(folder / "default").tree
        each = jax.tree.map(lambda _: ocp.RestoreArgs(restore_type=np.ndarray), tree)
        return orbax.restore(folder / "default", restore_args=each)


@pytest.mark.program
def test_a_killed_run_ends_as_one_never_killed(tmp_path: Path) -> None:
    killed, whole = tmp_path / "killed", tmp_path / "whole"
    assert harm(killed, 1, signal.SIGKILL, *SMALL) == 1
    last = max(int(x.name) for x in killed.iterdir() if x.name.isdigit())
    end = str(last + 3)
    first, *_ = run(killed, *SMALL, "--steps", end)
    assert first == f"From step {last}: 2 processes, 2 devices"
    first, *steps = run(whole, *SMALL, "--steps", end)
    assert first == "From step 0: 2 processes, 2 devices"
    assert float(steps[-1].split()[-1]) < float(steps[0].split()[-1])
    found, wanted = restored(killed / end), restored(whole / end)
    jax.tree.map(np.testing.assert_array_equal, found, wanted)


@pytest.mark.slow
@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGINT])
def test_workers_end_with_the_launcher(how: signal.Signals, tmp_path: Path) -> None:
    assert harm(tmp_path, None, how, *SMALL) == -how
    # On another number of processes and devices.
    first, *_ = run(tmp_path, *SMALL, "--processes", "1", "--devices", "4")
    assert re.fullmatch(r"From step \d+: 1 processes, 4 devices", first)


@pytest.mark.slow
def test_many_steps_between_checkpoints(tmp_path: Path) -> None:
    # As a reader runs it: steps that are queued would hang JAX before 0.12.
    printed = run(tmp_path)
    assert [line.split()[1] for line in printed] == ["step", "1", "75", "150"]
