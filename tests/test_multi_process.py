"""Several processes: the same result as one, and neither hang nor orphan."""

import json
import math
import os
import re
import shutil
import signal
import subprocess
import sys
import threading
import time
from importlib import import_module
from io import FileIO
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from jax.sharding import AxisType

from tests import faulty_multi_process

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "examples"))
psutil: Any = import_module("psutil")  # it has no types
char_lm: Any = import_module("char_lm")
multi_process: Any = import_module("multi_process")

STEPS = 6
# The cubic form, for there the bound below is a short one.
OPTIONS = ["--steps", str(STEPS), "--every", "1", "--keep", "9", "--form", "cubic"]
LIMIT = 15  # seconds within which a run must end when one of its processes has
GO_ON = "and the others were ended; the same command goes on from the last checkpoint\n"
SHARED = 6  # the quick tests share the cores with others; the slow ones do not
TINY = 2.0**-120  # below it, numbers are rounded coarsely, or to 0
U = 2.0**-24  # the largest relative error of rounding to float32


class Ended(NamedTuple):
    """How a run ended, and what its workers said of themselves before."""

    status: int
    printed: str
    errors: str
    hosts: list[list[str]]
    seconds: float  # since then


def command(folder: Path, *options: str) -> list[str]:
    return [
        sys.executable,
        str(ROOT / "tests" / "faulty_multi_process.py"),
        *("--checkpoints", str(folder / "checkpoints"), *OPTIONS, *options),
    ]


def environment(folder: Path, faults: Any, **variables: str) -> dict[str, str]:
    """Returns the variables of a run, about which nothing is known yet."""
    for old in (*folder.glob("*.json"), *folder.glob("*.pid")):
        old.unlink()
    ours = {**os.environ, "PYTHONPATH": str(ROOT), "PYTHONWARNINGS": "error"}
    return {**ours, "FAULTS": json.dumps(faults), "FOUND": str(folder), **variables}


def check_that_none_is_left(folder: Path) -> None:
    ended = time.time()
    workers = [int(path.read_text()) for path in folder.glob("*.pid")]
    assert workers
    # Those of a launcher that was killed may need a moment more.
    while any(map(alive, workers)):
        assert time.time() < ended + SHARED * LIMIT
        time.sleep(0.05)


def launch(folder: Path, *options: str, faults: Any = (), **variables: str) -> Ended:
    """Starts the processes, waits for their end, and checks that none is left."""
    with subprocess.Popen(
        command(folder, *options),
        env=environment(folder, faults, **variables),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        encoding="utf-8",
    ) as process:
        try:
            printed, errors = process.communicate(timeout=400)
        except BaseException:
            process.kill()  # its workers end with it
            raise
    check_that_none_is_left(folder)
    found = [json.loads(path.read_text()) for path in sorted(folder.glob("*.json"))]
    seconds = time.time() - max((x["time"] for x in found), default=math.nan)
    hosts = [x["hosts"] for x in found]
    return Ended(process.returncode, printed, errors, hosts, seconds)


def by_hand(folder: Path, *options: str, faults: Any = ()) -> list[tuple[int, str]]:
    """Starts two processes as on two machines, and returns how each one ended.

    Each has a folder of its own, for what it prints and for its checkpoints, which may
    be a link to that of the other.
    """
    address = f"{multi_process.LOOPBACK}:{multi_process.free_port()}"
    variables = environment(folder, faults)
    processes = []
    try:
        for i in ("0", "1"):
            with (folder / i / "errors").open("w") as errors:
                joined = ("--process-id", i, "--coordinator", address)
                processes.append(
                    subprocess.Popen(
                        command(folder / i, *options, *joined),
                        env=variables,
                        stdout=subprocess.DEVNULL,
                        stderr=errors,
                    )
                )
        ends = [process.wait(400) for process in processes]
    finally:
        for process in processes:
            process.kill()
            process.wait()
    return [(ends[i], (folder / str(i) / "errors").read_text()) for i in (0, 1)]


def alive(process: int) -> bool:
    try:
        return psutil.Process(process).status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


def listening(step: int) -> list[Any]:
    return [[process, "begun", step, "listen"] for process in (0, 1)]


class Single(NamedTuple):
    """The same training in this process, on its eight devices."""

    graph: Any
    optimizer: Any
    init: Any
    where: Any
    template: Any
    step: Any
    batch_at: Any
    description: Any


def single_of(*more: str) -> Single:
    options, corpus = multi_process.parse([*OPTIONS, *more])
    mesh = jax.make_mesh((8,), ("devices",), axis_types=(AxisType.Auto,))
    graph, optimizer, init, where = multi_process.set_up(options, corpus, mesh)
    return Single(
        graph,
        optimizer,
        init,
        where,
        jax.tree.map(multi_process.shape_in, jax.eval_shape(init), where),
        multi_process.make_step(graph, optimizer, where, mesh),
        lambda step: multi_process.batch_at(corpus, 0, step, options.batch, mesh),
        multi_process.describe(options, corpus),
    )


@pytest.fixture
def single(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, standard_promotion: None
) -> Single:
    faulty_multi_process.shrink(char_lm, monkeypatch.setattr)
    return single_of("--checkpoints", str(tmp_path))


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run never killed, of 2 processes with 4 devices each."""
    folder = tmp_path_factory.mktemp("whole")
    ended = launch(folder)
    assert (ended.status, ended.errors) == (0, "")
    first, *steps, last = ended.printed.splitlines()
    assert first == "Started: 2 processes, 8 devices"
    losses = [float(x.split()[3]) for x in steps]
    assert len(losses) == STEPS
    assert losses[-1] < losses[0] - 0.5
    assert re.fullmatch(r"Validation loss \d\.\d+. Checkpoints: .*", last)
    return folder / "checkpoints"


def restored(folder: Path, step: int, single: Single) -> Any:
    return multi_process.checkpoints.restore(
        folder, step, single.template, single.description
    )


def bits(tree: Any) -> list[bytes]:
    return [np.asarray(x).tobytes() for x in jax.tree.leaves(tree)]


def magnitudes_of(graph: Any) -> Any:
    """Returns a function: for each gradient, the sizes of what the devices add up.

    The embedding is used at both ends of the model, and its two gradients are summed
    over the devices one by one.
    """

    def loss(params: Any, read: jax.Array, windows: jax.Array) -> jax.Array:
        model = nnx.merge(graph, params)
        x = read[windows[:, :-1]] + model.position(jnp.arange(char_lm.CONTEXT))
        for block in model.blocks:
            x = block(x)
        logits = model.embed.attend(model.norm(x))
        losses = optax.softmax_cross_entropy_with_integer_labels(logits, windows[:, 1:])
        return losses.mean() / 8  # of the eight devices

    @jax.jit
    def magnitudes(params: Any, parts: jax.Array) -> Any:
        read = params["embed"]["embedding"].get_value()
        gradients = jax.lax.map(
            lambda x: jax.grad(loss, (0, 1))(params, read, x), parts
        )
        sizes, sizes_read = jax.tree.map(lambda x: jnp.abs(x).sum(0), gradients)
        embedding = sizes["embed"]["embedding"]
        sizes["embed"]["embedding"] = embedding.replace(embedding[...] + sizes_read)
        return jax.tree.leaves(sizes)

    return magnitudes


def stepped(p: Any, m: Any, v: Any, s: Any, count: int) -> tuple[Any, Any]:
    """Returns the parameters of the next step, and how far rounding may take them.

    In the cubic form, from moments in double precision.
    """
    m, v, s = (np.asarray(x, np.float64) for x in (m, v, s))
    options, _ = multi_process.parse([*OPTIONS, "--checkpoints", "out"])
    rate = float(multi_process.schedule(options)(count))
    decay = multi_process.HYPERPARAMETERS["weight_decay"]
    m_hat = m / (1 - char_lm.B1 ** (count + 1))
    v_hat = v / (1 - char_lm.B2 ** (count + 1))
    b = char_lm.LAM * np.clip(s, -char_lm.TAU, char_lm.TAU)
    root = np.sqrt(v_hat) + 1e-8
    # Some ten roundings, of the terms and not of their sum, which may cancel.
    terms = (np.abs(m_hat) + np.abs(b)) / root + decay * np.abs(p)
    new = p - rate * ((m_hat + b) / root + decay * p)
    return new, 16 * U * (np.abs(p) + rate * terms) + TINY


def test_two_processes_of_four_are_one_of_eight(whole: Path, single: Single) -> None:
    # Every device does the same with the same part of the batch, in one process or in
    # two. What differs is the order in which eight terms are summed to a gradient g.
    # Each of the sums is off by at most 7u·S/(1-7u), with S the sum of the terms'
    # sizes, and so g differs by at most δ = 2·(7u·S) to first order, and by 2u·|g| <=
    # 2u·S more where two sums are added (the embedding). From one and the same
    # checkpoint, the moments after one step are then apart by at most
    #   m: (1-b1)·δ     v: (1-b2)·(2|g| + δ)·δ     s: (1-b3)·3·(|d| + δ)²·δ
    # with d = g - m', which moves by at most δ, and by their own rounding: 8 errors of
    # u, of all terms. The new parameters follow from the moments: each run's are within
    # rounding of p - rate·(û + wd·p), with û of its own moments in double precision.
    # And where the moments agree to the bit, so must the parameters, most of which do.
    # Each step starts from the same bits, so that nothing is amplified.
    magnitudes = magnitudes_of(single.graph)
    equal = total = 0
    for count in range(STEPS):
        if count:
            before = restored(whole, count, single)
        else:
            before = jax.jit(single.init, out_shardings=single.where)()
        after = restored(whole, count + 1, single)
        windows = single.batch_at(count + 1)
        parts = np.asarray(windows).reshape(8, -1, windows.shape[1])
        on_one = jax.device_put(before["params"], jax.devices()[0])
        sizes = magnitudes(on_one, parts)
        params0 = [np.asarray(x, np.float64) for x in jax.tree.leaves(before["params"])]
        old = optax.tree.get(before["state"], "ScaleByAdam3State")
        old = [[np.asarray(x, np.float64) for x in jax.tree.leaves(y)] for y in old[:3]]
        params, state, _ = single.step(before["params"], before["state"], windows)
        ours, theirs = (
            optax.tree.get(x, "ScaleByAdam3State") for x in (state, after["state"])
        )
        assert int(ours.count) == int(theirs.count) == count + 1
        leaves = [
            map(np.asarray, jax.tree.leaves(x))
            for x in (*ours[:3], params, *theirs[:3], after["params"])
        ]
        for size, p0, m0, v0, s0, m, v, s, p, m_, v_, s_, p_ in zip(
            sizes, params0, *old, *leaves, strict=True
        ):
            delta = (2 * 7 + 2) * U * 1.001 * np.asarray(size, np.float64)
            b1, b2, b3 = char_lm.B1, char_lm.B2, char_lm.B3
            g = (m.astype(np.float64) - b1 * m0) / (1 - b1)
            # It is known by m alone: of its size, rounding may have taken a little.
            g = np.abs(g) + 4 * U * (np.abs(m0) + np.abs(m)) / (1 - b1)
            d = g + np.abs(m)
            bounds = (
                (1 - b1) * delta + 8 * U * (np.abs(m0) + (1 - b1) * g),
                (1 - b2) * (2 * g + delta) * delta + 8 * U * (v0 + (1 - b2) * g**2),
                (1 - b3) * 3 * (d + delta) ** 2 * delta
                + 8 * U * (np.abs(s0) + (1 - b3) * d**3),
            )
            for x, y, bound in zip((m, v, s), (m_, v_, s_), bounds, strict=True):
                assert np.all(np.abs(x.astype(np.float64) - y) <= bound + TINY)
            for new, moments in ((p, (m, v, s)), (p_, (m_, v_, s_))):
                wanted, bound = stepped(p0, *moments, count)
                assert np.all(np.abs(new - wanted) <= bound)
            same = (m == m_) & (v == v_) & (s == s_)
            assert np.array_equal(p[same], p_[same])
            equal, total = equal + same.sum(), total + same.size
    assert total > 10_000
    assert equal > total / 2
    assert single.step._cache_size() == 1  # compiled once: what it returns, it takes
    print(f"{equal} of {total} elements are equal to the bit")


@pytest.mark.parametrize("devices", [4, 1])
def test_restores_on_fewer_devices(devices: int, whole: Path, single: Single) -> None:
    mesh = jax.make_mesh(
        (devices,),
        ("devices",),
        axis_types=(AxisType.Auto,),
        devices=jax.devices()[:devices],
    )
    shardings = multi_process.fully_sharded(single.template, mesh)
    template = jax.tree.map(multi_process.shape_in, single.template, shardings)
    fewer = restored(whole, STEPS, single._replace(template=template))
    assert bits(fewer) == bits(restored(whole, STEPS, single))
    assert {len(x.sharding.device_set) for x in jax.tree.leaves(fewer)} == {devices}


def test_kills(tmp_path: Path, whole: Path, single: Single) -> None:
    # A worker between two checkpoints; the launcher, while an unfinished one is there.
    worker = launch(tmp_path, faults=[*listening(3), [1, "begun", 4, "die"]])
    assert worker.errors == f"multi_process.py: worker 1 ended (SIGKILL), {GO_ON}"
    assert worker.status == 1
    assert worker.seconds < SHARED * LIMIT
    launcher = launch(
        tmp_path, faults=[*listening(4), [0, "arrays", 5, "kill launcher"]]
    )
    assert launcher.printed.startswith("Resumed from step 3: 2 processes, 8 devices\n")
    assert (launcher.status, launcher.errors) == (-signal.SIGKILL, "")
    assert launcher.seconds < SHARED * LIMIT
    # The coordinator and Gloo listen, and Gloo alone. On Linux it is an address that
    # only this test uses, so none of them is where a default leads.
    own = "127.0.0.2" if sys.platform == "linux" else "127.0.0.1"
    for coordinator, other in (worker.hosts, launcher.hosts):
        hosts = [x.removeprefix("::ffff:") for x in (*coordinator, *other)]
        assert hosts == [own] * 3
    ended = launch(tmp_path)
    assert (ended.status, ended.errors) == (0, "")
    # Killed in the very moment, worker 0 may still have finished that checkpoint.
    assert re.match("Resumed from step [45]: 2 processes", ended.printed)
    end = restored(tmp_path / "checkpoints", STEPS, single)
    assert bits(end) == bits(restored(whole, STEPS, single))


@pytest.mark.slow
@pytest.mark.parametrize("state", ["float32", "bfloat16", "int8"])
def test_kills_at_full_size(
    state: str, tmp_path: Path, standard_promotion: None
) -> None:
    options, size = ("--state", state), {"FULL_SIZE": "1"}
    single = single_of(*options, "--checkpoints", str(tmp_path / "unused"))
    ends = []
    runs: list[tuple[str, list[Any]]] = [
        ("never", []),
        ("again", []),
        (
            "killed",
            [
                [[0, "begun", 1, "die"]],
                [[0, "arrays", 1, "die"]],
                [[0, "committed", 2, "die"], [1, "committed", 2, "die"]],
                [[0, "arrays", 4, "kill launcher"]],
                [[1, "committed", 5, "kill launcher"]],
            ],
        ),
    ]
    for name, faults in runs:
        folder = tmp_path / name
        folder.mkdir()
        for fault in faults:
            ended = launch(folder, *options, faults=fault, **size)
            assert ended.status in (1, -signal.SIGKILL)
        assert launch(folder, *options, **size).status == 0
        ends.append(bits(restored(folder / "checkpoints", STEPS, single)))
    assert ends[0] == ends[1] == ends[2]
    # On another number of processes: nothing is left to train, and it still loads.
    one = launch(tmp_path / "never", *options, "--processes", "1", **size)
    assert one.printed.startswith(f"Resumed from step {STEPS}: 1 processes, 4 devices")


@pytest.mark.slow
@pytest.mark.parametrize("process", [0, 1])
def test_a_worker_that_is_killed(process: int, tmp_path: Path) -> None:
    faults = [*listening(3), [process, "begun", 4, "die"]]
    ended = launch(tmp_path, faults=faults)
    assert (
        ended.errors == f"multi_process.py: worker {process} ended (SIGKILL), {GO_ON}"
    )
    assert ended.status == 1
    assert ended.seconds < LIMIT


@pytest.mark.slow
@pytest.mark.parametrize("before", [[], [[1, "begun", 4, "freeze"]]])
def test_a_launcher_that_is_killed(before: list[Any], tmp_path: Path) -> None:
    # Also with a worker that can do nothing any more.
    faults = [*listening(3), *before, [0, "begun", 4, "kill launcher"]]
    ended = launch(tmp_path, faults=faults)
    assert (ended.status, ended.errors) == (-signal.SIGKILL, "")
    assert ended.seconds < LIMIT


@pytest.mark.slow
def test_two_runs_in_one_folder(tmp_path: Path) -> None:
    (tmp_path / "checkpoints").mkdir()
    with multi_process.checkpoints.locked(tmp_path / "checkpoints"):
        ended = launch(tmp_path)
    assert (ended.status, ended.printed) == (2, "")
    assert re.fullmatch(r"multi_process.py: another run is using .*\n", ended.errors)


@pytest.mark.slow
def test_goes_on_with_another_number_of_processes(tmp_path: Path) -> None:
    killed = launch(tmp_path, faults=[[1, "begun", 4, "die"]])
    assert killed.status == 1
    fewer = ("--processes", "1", "--devices-per-process", "8")
    one = launch(tmp_path, *fewer, faults=[[0, "begun", 6, "die"]])
    assert one.printed.startswith("Resumed from step 3: 1 processes, 8 devices\n")
    two = launch(tmp_path)
    assert two.status == 0
    assert two.printed.startswith("Resumed from step 5: 2 processes, 8 devices\n")


@pytest.mark.slow
@pytest.mark.parametrize("process", [0, 1])
def test_a_worker_that_is_silent(process: int, tmp_path: Path) -> None:
    faults = [*listening(3), [process, "begun", 4, "freeze"]]
    ended = launch(tmp_path, faults=faults)
    assert ended.status == 1
    *_, last = ended.errors.splitlines(keepends=True)
    assert re.fullmatch(rf"multi_process.py: worker . ended \(.+\), {GO_ON}", last)
    assert multi_process.HEARTBEAT - 5 < ended.seconds < LIMIT


@pytest.mark.slow
@pytest.mark.parametrize("process", [0, 1])
def test_a_worker_that_raises(process: int, tmp_path: Path) -> None:
    faults = [*listening(3), [process, "begun", 4, "raise"]]
    ended = launch(tmp_path, faults=faults)
    assert ended.status == 1
    assert "RuntimeError: as the test wants" in ended.errors
    assert ended.errors.endswith(f"worker {process} ended (exit status 1), {GO_ON}")
    assert ended.seconds < LIMIT


@pytest.mark.slow
def test_ctrl_c(tmp_path: Path) -> None:
    faults = [*listening(3), [0, "begun", 4, "interrupt launcher"]]
    ended = launch(tmp_path, faults=faults)
    message = "interrupted; the same command goes on from the last checkpoint"
    assert (ended.status, ended.errors) == (130, f"multi_process.py: {message}\n")
    assert ended.seconds < LIMIT


@pytest.mark.slow
def test_ctrl_c_at_a_terminal(tmp_path: Path) -> None:
    attach = "import os, sys; os.login_tty(0); os.execv(sys.executable, sys.argv[1:])"
    ours, theirs = os.openpty()
    with subprocess.Popen(
        [sys.executable, "-c", attach, *command(tmp_path, "--steps", "1000")],
        env=environment(tmp_path, [], TERM="xterm"),
        stdin=theirs,
        stdout=theirs,
        stderr=theirs,
    ) as process:
        os.close(theirs)
        deadline = threading.Timer(300, process.kill)
        deadline.start()
        output, sent = b"", False
        with open(ours, "r+b", buffering=0) as terminal:
            while block := read(terminal):
                output += block
                # After the first checkpoint.
                if not sent and re.search(rb"[2-9]/1000\D.*loss \d", output):
                    terminal.write(b"\x03")
                    sent = True
        status = process.wait()
        deadline.cancel()
    check_that_none_is_left(tmp_path)
    assert (sent, status) == (True, 130)
    # The cursor, which the bar hid, is there again, and the bar's line has an end.
    assert output.rfind(b"\x1b[?25h") > output.rfind(b"\x1b[?25l") > 0
    printed = re.sub(r"\x1b\[[\d;?]*[A-Za-z]|\r", "", output.decode())
    assert "Traceback" not in printed
    assert "Started: 2 processes, 8 devices\n" in printed
    assert printed.endswith(
        "\nmulti_process.py: interrupted; the same command goes on from the last "
        "checkpoint\n"
    )


def read(terminal: FileIO) -> bytes:
    """Returns some output, and nothing at its end."""
    try:
        return terminal.read(1 << 16)
    except OSError:  # so Linux ends a terminal
        return b""


@pytest.fixture
def two_machines(tmp_path: Path) -> Path:
    """Two folders, one for each process, which share their checkpoints."""
    for i in ("0", "1"):
        (tmp_path / i).mkdir()
    (tmp_path / "0" / "checkpoints").mkdir()
    (tmp_path / "1" / "checkpoints").symlink_to(tmp_path / "0" / "checkpoints")
    return tmp_path


@pytest.mark.slow
@pytest.mark.parametrize("process", [0, 1])
def test_by_hand_a_process_that_is_killed(process: int, two_machines: Path) -> None:
    # There is no launcher, so JAX must notice by itself.
    faults = [*listening(3), [process, "begun", 4, "die"]]
    ends = by_hand(two_machines, faults=faults)
    began = [
        json.loads(path.read_text())["time"] for path in two_machines.glob("*.json")
    ]
    assert time.time() - max(began) < LIMIT
    assert ends[process][0] == -signal.SIGKILL
    assert ends[1 - process][0] not in (0, 2)
    # And they go on, to the end.
    ends = by_hand(two_machines)
    assert ends == [(0, ""), (0, "")]
    steps = sorted(x.name for x in (two_machines / "0" / "checkpoints").glob("step_*"))
    assert steps == [f"step_{i:08}" for i in range(1, STEPS + 1)]


@pytest.mark.slow
def test_by_hand_a_batch_that_cannot_be_split(two_machines: Path) -> None:
    first, second = by_hand(two_machines, "--batch", "12")
    message = "multi_process.py: --batch 12 cannot be split over 8 devices\n"
    assert first == (2, message)
    assert second[0] != 0  # it may have noticed that the first one is gone


@pytest.mark.slow
def test_by_hand_folders_that_are_not_shared(two_machines: Path) -> None:
    own = two_machines / "1" / "checkpoints"
    own.unlink()
    own.mkdir()
    first, second = by_hand(two_machines)
    assert first[0] == 2
    # What the second one found wrong, both say.
    assert first[1] == f"multi_process.py: {own} is not shared by all processes\n"
    assert second[0] != 0  # as above
    assert not list(own.iterdir())


@pytest.mark.slow
@pytest.mark.parametrize("process", [0, 1])
def test_a_damaged_checkpoint(process: int, whole: Path, tmp_path: Path) -> None:
    folder = tmp_path / "checkpoints"
    shutil.copytree(whole, folder)
    last = folder / f"step_{STEPS:08}"
    files = sorted(json.loads((last / "manifest.json").read_text())["files"])
    # One that only this process reads.
    with (last / files[process]).open("ab") as file:
        file.write(b"x")
    ended = launch(tmp_path)
    assert (ended.status, ended.printed) == (2, "")
    assert re.fullmatch(
        rf"multi_process.py: {re.escape(str(last / files[process]))} has .* were "
        rf"saved; with {last.name} moved away, a run goes on from step {STEPS - 1}\n",
        ended.errors,
    )
    last.rename(tmp_path / "moved")
    ended = launch(tmp_path)
    assert ended.status == 0
    assert ended.printed.startswith(f"Resumed from step {STEPS - 1}: 2 processes")


@pytest.mark.slow
def test_another_run_in_the_folder(whole: Path) -> None:
    before = {x: x.stat().st_mtime_ns for x in whole.rglob("*")}
    for options, message in {
        ("--form", "stabilized"): "third_moment is cubic, wanted stabilized",
        ("--state", "int8"): "m_dtype is float32, wanted int8",
        ("--seed", "1"): "seed is 0, wanted 1",
    }.items():
        ended = launch(whole.parent, *options)
        assert ended.status == 2
        assert ended.printed == ""
        assert re.fullmatch(rf"multi_process.py: .*{message}\n", ended.errors)
    assert {x: x.stat().st_mtime_ns for x in whole.rglob("*")} == before


BAD = {
    "--processes 0": "argument --processes: must be a whole number from 1",
    "--devices-per-process x": "argument --devices-per-process: must be a whole",
    "--process-id 0": "--process-id and --coordinator go together",
    "--coordinator 10.0.0.1:1": "--process-id and --coordinator go together",
    "--process-id 2 --coordinator 10.0.0.1:1": "--process-id must be below --processes",
    "--pod --process-id 0 --coordinator 10.0.0.1:1": "--pod names the processes",
    "--text missing": "missing: No such file",
    "--keep 0": "argument --keep: must be a whole number from 1",
    "--checkpoints notes": "notes: File exists",
    "--batch 12": "--batch 12 cannot be split over 8 devices",
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
