"""The examples' checkpoints: whole or not there, verified, restored onto any mesh."""

import json
import os
import re
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from importlib import import_module
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

from adam3_optax import adam3w, state_shardings

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "examples"))
checkpoints: Any = import_module("checkpoints")

STATES: dict[str, dict[str, Any]] = {
    "float32": {},
    "mixed": {"m_dtype": "bfloat16", "s_dtype": "bfloat16"},
    "bfloat16": dict.fromkeys(("m_dtype", "v_dtype", "s_dtype"), "bfloat16"),
    "int8": dict.fromkeys(("m_dtype", "v_dtype", "s_dtype"), "int8"),
}
DESCRIPTION = {"third_moment": "standardized", "b": [0.9, 0.999, 0.999], "tau": 1.0}
PARAMS = {"w": (16, 32), "b": (32,), "odd": (3, 5)}


def sharded(shapes: Any, devices: int) -> Any:
    """Returns shardings over some of the devices, where the first axis allows it."""
    mesh = jax.make_mesh(
        (devices,), ("x",), axis_types=(AxisType.Auto,), devices=jax.devices()[:devices]
    )
    return jax.tree.map(
        lambda x: NamedSharding(mesh, P() if x.shape[0] % devices else P("x")), shapes
    )


def template_of(optimizer: Any, devices: int) -> Any:
    """Returns shapes and shardings of parameters and state on some devices."""
    params = {k: jax.ShapeDtypeStruct(v, jnp.float32) for k, v in PARAMS.items()}
    shardings = sharded(params, devices)
    shapes = {"params": params, "state": jax.eval_shape(optimizer.init, params)}
    where = {
        "params": shardings,
        "state": state_shardings(optimizer, params, shardings),
    }
    return jax.tree.map(
        lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s), shapes, where
    )


def filled(template: Any) -> Any:
    """Returns arrays for a template, each of other values."""
    treedef: Any
    leaves, treedef = jax.tree.flatten(template)
    arrays = []
    for i, x in enumerate(leaves):
        rng = np.random.default_rng(i)
        values = rng.integers(0, 127, x.shape) if x.dtype.itemsize == 1 else None
        if values is None:
            values = rng.normal(size=x.shape) * 10.0 ** (i % 5)
        arrays.append(jax.device_put(np.asarray(values).astype(x.dtype), x.sharding))
    return treedef.unflatten(arrays)


def check_alike(a: Any, b: Any) -> None:
    """Checks that two trees have the same structure, shapes and dtypes."""
    shapes = [jax.tree.map(lambda x: f"{x.dtype}{x.shape}", tree) for tree in (a, b)]
    assert shapes[0] == shapes[1]


def check_equal(a: Any, b: Any) -> None:
    """Checks that two trees are alike, to the bit."""
    check_alike(a, b)
    for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True):
        assert np.asarray(x).tobytes() == np.asarray(y).tobytes()


def on_disk(folder: Path) -> dict[str, tuple[bytes, int]]:
    """Returns all files, with their contents and times."""
    files = (x for x in folder.rglob("*") if x.is_file())
    return {str(x): (x.read_bytes(), x.stat().st_mtime_ns) for x in files}


@contextmanager
def refused(folder: Path, message: str) -> Iterator[None]:
    """Checks for an error that says this, in one line, and leaves the disk alone."""
    before = on_disk(folder)
    with pytest.raises(checkpoints.CheckpointError, match=message) as error:
        yield
    assert "\n" not in str(error.value)
    assert on_disk(folder) == before


@pytest.fixture(scope="module")
def small() -> Any:
    """A small tree, for what does not depend on its leaves."""
    return filled(template_of(adam3w(third_moment="standardized"), 8))


@pytest.mark.parametrize("state", STATES)
def test_restores_onto_fewer_devices(state: str, tmp_path: Path) -> None:
    optimizer = adam3w(third_moment="standardized", **STATES[state])
    tree = saved = filled(template_of(optimizer, 8))
    for step, devices in enumerate((4, 1), 1):
        checkpoints.save(tmp_path, step, tree, DESCRIPTION)
        template = template_of(optimizer, devices)
        tree = checkpoints.restore(tmp_path, step, template, DESCRIPTION)
        check_equal(tree, saved)
        shardings = (jax.tree.map(lambda x: x.sharding, t) for t in (tree, template))
        assert next(shardings) == next(shardings)
        assert len(tree["params"]["w"].sharding.device_set) == devices
    gradients = jax.tree.map(jnp.ones_like, tree["params"])
    _, after = optimizer.update(gradients, tree["state"], tree["params"])
    check_alike(after, tree["state"])


def test_any_tree_of_arrays(tmp_path: Path) -> None:
    masked = optax.masked(adam3w(1e-3, m_dtype="int8"), {"w": True, "b": False})
    optimizer = optax.chain(optax.clip_by_global_norm(1.0), masked)
    params = {"w": jnp.ones((4, 32)), "b": jnp.ones(3)}
    more: Any = (None, [jnp.int8(3)], {})
    tree = {"params": params, "state": optimizer.init(params), "more": more}
    checkpoints.save(tmp_path, 0, tree, {})
    check_equal(checkpoints.restore(tmp_path, 0, tree, {}), tree)


# --- What is not complete does not exist --------------------------------------------


def lose_manifest(checkpoint: Path) -> None:
    (checkpoint / "manifest.json").unlink()


def lose_name_of_manifest(checkpoint: Path) -> None:
    (checkpoint / "manifest.json").rename(checkpoint / "manifest.json.unfinished")


def leave_orbax_in_the_middle(checkpoint: Path) -> None:
    lose_name_of_manifest(checkpoint)
    (checkpoint / "arrays").rename(checkpoint / "arrays.orbax-checkpoint-tmp")


def leave_an_empty_folder(checkpoint: Path) -> None:
    lose_manifest(checkpoint)
    checkpoints.shutil.rmtree(checkpoint / "arrays")


UNFINISHED = (
    lose_name_of_manifest,
    leave_orbax_in_the_middle,
    leave_an_empty_folder,
)


@pytest.mark.parametrize("interrupt", UNFINISHED)
@pytest.mark.parametrize("following", [2, 3])
def test_unfinished_is_no_obstacle(
    interrupt: Callable[[Path], None], following: int, tmp_path: Path, small: Any
) -> None:
    for step in (1, 2):
        checkpoints.save(tmp_path, step, small, DESCRIPTION)
    interrupt(tmp_path / "step_00000002")
    assert checkpoints.latest(tmp_path) == 1
    with refused(tmp_path, r"no complete .*step_00000002; steps that are: 1$"):
        checkpoints.restore(tmp_path, 2, small, DESCRIPTION)
    check_equal(checkpoints.restore(tmp_path, 1, small, DESCRIPTION), small)
    other = jax.tree.map(lambda x: x + x, small)
    checkpoints.save(tmp_path, following, other, DESCRIPTION)
    assert checkpoints.latest(tmp_path) == following
    check_equal(checkpoints.restore(tmp_path, following, small, DESCRIPTION), other)
    names = {x.name for x in tmp_path.iterdir()}
    assert names == {"step_00000001", f"step_{following:08}"}


def foreign(folder: Path) -> None:
    with checkpoints.ocp.StandardCheckpointer() as orbax:
        orbax.save(folder.absolute() / "step_00000500" / "arrays", {"x": jnp.ones(3)})


def lost(folder: Path) -> None:
    lose_manifest(folder / "step_00000002")


def file(folder: Path) -> None:
    (folder / "step_00000500").touch()


@pytest.mark.parametrize("harm", [foreign, lost, file])
def test_what_is_neither_complete_nor_unfinished_stays(
    harm: Callable[[Path], None], tmp_path: Path, small: Any
) -> None:
    for step in (1, 2):
        checkpoints.save(tmp_path, step, small, DESCRIPTION)
    harm(tmp_path)
    message = r"step_00000(500|002) has no manifest.json, .*: move it away$"
    if harm is file:
        message = r"Not a directory: .*step_00000500"
    with refused(tmp_path, message):
        checkpoints.latest(tmp_path)
    with refused(tmp_path, message):
        checkpoints.save(tmp_path, 3, small, DESCRIPTION)


def test_another_run_of_which_nothing_is_removed(tmp_path: Path, small: Any) -> None:
    for step in (1, 2):
        checkpoints.save(tmp_path, step, small, DESCRIPTION)
    with refused(tmp_path, r"in its description, seed is nothing, wanted 1"):
        checkpoints.save(tmp_path, 3, small, {**DESCRIPTION, "seed": 1}, keep=1)
    with refused(tmp_path, r"in its arrays, .* is nothing"):
        checkpoints.save(tmp_path, 3, {**small, "x": jnp.ones(3)}, DESCRIPTION, keep=1)


def test_one_run_at_a_time(tmp_path: Path) -> None:
    with (
        checkpoints.locked(tmp_path),
        pytest.raises(checkpoints.CheckpointError, match="another run is using"),
        checkpoints.locked(tmp_path),
    ):
        pass
    with checkpoints.locked(tmp_path):
        pass


def test_latest_of_nothing(tmp_path: Path) -> None:
    assert checkpoints.latest(tmp_path / "missing") is None
    assert checkpoints.latest(tmp_path) is None
    with refused(tmp_path, r"no complete .*step_00000007; steps that are: none"):
        checkpoints.restore(tmp_path, 7, {}, {})


def test_the_last_few_stay_and_so_does_what_is_not_ours(
    tmp_path: Path, small: Any
) -> None:
    (tmp_path / "notes.txt").write_text("mine")
    (tmp_path / "step_000000007").mkdir()  # one digit too many
    for step in (5, np.int64(10), jnp.int32(100_000_000), 10**10):
        checkpoints.save(tmp_path, step, small, DESCRIPTION, keep=2)
        if step == 5:
            (tmp_path / "step_00000005" / "mine.txt").write_text("mine, too")
    names = sorted(x.name for x in tmp_path.iterdir())
    assert names == [
        "notes.txt",
        "step_000000007",
        "step_00000005",
        "step_100000000",
        "step_10000000000",
    ]
    left = sorted(x.name for x in (tmp_path / "step_00000005").iterdir())
    assert left == ["manifest.json.unfinished", "mine.txt"]
    assert checkpoints.latest(tmp_path) == 10**10


@pytest.mark.parametrize("step", [3, 4])
def test_no_step_back(step: int, tmp_path: Path, small: Any) -> None:
    checkpoints.save(tmp_path, 4, small, DESCRIPTION)
    with refused(tmp_path, f"holds a checkpoint of step 4, so step {step} is refused"):
        checkpoints.save(tmp_path, step, small, DESCRIPTION)


def test_wrong_arguments(tmp_path: Path, small: Any) -> None:
    with pytest.raises(ValueError, match=r"step must be >= 0 .* got -1 and 3"):
        checkpoints.save(tmp_path, -1, small, DESCRIPTION)
    with pytest.raises(ValueError, match=r"keep >= 1, got 1 and 0"):
        checkpoints.save(tmp_path, 1, small, DESCRIPTION, keep=0)
    for step in (True, 3.0, "3", jnp.ones(())):
        with pytest.raises(TypeError, match="step must be a whole number, got"):
            checkpoints.save(tmp_path, step, small, DESCRIPTION)
        with pytest.raises(TypeError, match="step must be a whole number, got"):
            checkpoints.restore(tmp_path, step, small, DESCRIPTION)
    with pytest.raises(TypeError, match=r"keep must be a whole number, got 2.5"):
        checkpoints.save(tmp_path, 1, small, DESCRIPTION, keep=2.5)
    with pytest.raises(ValueError, match="description must be what JSON can hold"):
        checkpoints.save(tmp_path, 1, small, {"dtype": jnp.float32})
    with pytest.raises(ValueError, match=r"\['a'\]\[0\] must be a jax.Array"):
        checkpoints.save(tmp_path, 1, {"a": [np.ones(3)]}, DESCRIPTION)
    bare = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), small)
    with pytest.raises(ValueError, match=r"a jax.ShapeDtypeStruct with a sharding"):
        checkpoints.restore(tmp_path, 1, bare, DESCRIPTION)
    assert not list(tmp_path.iterdir())


# --- Damage -------------------------------------------------------------------------


@pytest.fixture
def checkpoint(tmp_path: Path, small: Any) -> Path:
    checkpoints.save(tmp_path, 1, small, DESCRIPTION)
    return tmp_path / "step_00000001"


def flip(path: Path) -> None:
    """Flips one bit in the middle."""
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


def truncate(path: Path) -> None:
    os.truncate(path, path.stat().st_size - 1)


@pytest.mark.parametrize(
    ("harm", "message"),
    [
        (flip, "is damaged: its SHA-256 differs"),
        (truncate, r"has \d+ bytes, but \d+ were saved"),
        (Path.unlink, "is missing"),
    ],
)
def test_damage_to_any_file(
    harm: Callable[[Path], None], message: str, checkpoint: Path, small: Any
) -> None:
    files = [x for x in (checkpoint / "arrays").rglob("*") if x.is_file()]
    assert len(files) > 5
    for path in files:
        whole = path.read_bytes()
        if not whole:
            continue
        harm(path)
        with refused(checkpoint, f"{re.escape(str(path))} {message}"):
            checkpoints.restore(checkpoint.parent, 1, small, DESCRIPTION)
        path.write_bytes(whole)
    check_equal(checkpoints.restore(checkpoint.parent, 1, small, DESCRIPTION), small)


def test_damage_to_any_part_of_the_manifest(checkpoint: Path, small: Any) -> None:
    path = checkpoint / "manifest.json"
    whole = path.read_bytes()
    assert len(whole) > 1000
    for position in range(0, len(whole), 97):
        damaged = bytearray(whole)
        damaged[position] ^= 1
        path.write_bytes(damaged)
        if json.loads(whole) == try_json(damaged):
            continue  # white space
        with refused(checkpoint, r"manifest.json (is damaged|has format)"):
            checkpoints.restore(checkpoint.parent, 1, small, DESCRIPTION)
    for end in (0, 1, len(whole) // 2, len(whole) - 2):
        path.write_bytes(whole[:end])
        with refused(checkpoint, r"manifest.json is damaged"):
            checkpoints.restore(checkpoint.parent, 1, small, DESCRIPTION)


def try_json(text: bytes | bytearray) -> Any:
    try:
        return json.loads(text)
    except ValueError:
        return None


@pytest.mark.parametrize("content", ["[]", "3", "null", "{}", '{"sha256": ""}'])
def test_a_manifest_of_something_else(
    content: str, checkpoint: Path, small: Any
) -> None:
    (checkpoint / "manifest.json").write_text(content)
    with refused(checkpoint, r"manifest.json is damaged"):
        checkpoints.restore(checkpoint.parent, 1, small, DESCRIPTION)


def test_a_manifest_of_another_format(checkpoint: Path, small: Any) -> None:
    path = checkpoint / "manifest.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"format": 2}))
    with refused(checkpoint, r"manifest.json has format 2, wanted 1"):
        checkpoints.restore(checkpoint.parent, 1, small, DESCRIPTION)


# --- Another checkpoint than is wanted ----------------------------------------------


def other_tree(change: str) -> Any:
    """Returns the tree of a run that differs in one thing."""
    optimizers = {
        "adam": optax.adamw(1e-3),
        "bfloat16 m": adam3w(m_dtype="bfloat16"),
        "int8 v": adam3w(v_dtype="int8"),
        "chained": optax.chain(optax.clip_by_global_norm(1.0), adam3w()),
    }
    shapes: dict[str, tuple[int, ...]] = dict(PARAMS)
    match change:
        case "shape":
            shapes["w"] = (16, 33)
        case "name":
            shapes["another"] = shapes.pop("odd")
        case "more":
            shapes["z"] = (2,)
    params = {k: jnp.zeros(v) for k, v in shapes.items()}
    optimizer = optimizers.get(change, adam3w())
    return {"params": params, "state": optimizer.init(params)}


FOREIGN = {
    "adam": r"\['state'\]\[0\]\.m\['b'\] is nothing, wanted float32\[32\]",
    "bfloat16 m": r"\['state'\]\[0\]\.m\['b'\] is bfloat16\[32\], wanted float32\[32\]",
    "int8 v": r"\['state'\]\[0\]\.v\.codes\['b'\] is float32\[32\], wanted nothing",
    "chained": r"\['state'\]\[0\]\.count is nothing, wanted int32\[\]",
    "shape": r"\['params'\]\['w'\] is float32\[16, 33\], wanted float32\[16, 32\]",
    "name": r"\['params'\]\['another'\] is float32\[3, 5\], wanted nothing",
    "more": r"\['params'\]\['z'\] is float32\[2\], wanted nothing",
}


@pytest.mark.parametrize("change", FOREIGN)
def test_foreign_arrays(change: str, tmp_path: Path, small: Any) -> None:
    checkpoints.save(tmp_path, 1, other_tree(change), DESCRIPTION)
    with refused(tmp_path, FOREIGN[change]):
        checkpoints.restore(tmp_path, 1, small, DESCRIPTION)


@pytest.mark.parametrize(
    ("saved", "message"),
    [
        ({"third_moment": "cubic"}, "third_moment is cubic, wanted standardized"),
        ({"m_dtype": "int8"}, "m_dtype is int8, wanted nothing"),
        ({"b": [0.9, 0.99, 0.999]}, r"b is \[0.9, 0.99, 0.999\], wanted \[0.9, 0.999"),
        ({"tau": float("inf")}, "tau is inf, wanted 1.0"),
    ],
)
def test_foreign_description(
    saved: dict[str, Any], message: str, tmp_path: Path, small: Any
) -> None:
    checkpoints.save(tmp_path, 1, small, DESCRIPTION | saved)
    with refused(tmp_path, f"in its description, {message}"):
        checkpoints.restore(tmp_path, 1, small, DESCRIPTION)


def test_what_json_changes_in_descriptions(tmp_path: Path, small: Any) -> None:
    description: dict[str, Any] = {"decays": (0.9, 0.999), "tau": float("nan")}
    description |= {"x": "nothing", "nested": {"b": 1, "a": 2}, "kept": {1: None}}
    checkpoints.save(tmp_path, np.int64(1), small, description)
    del description["x"]
    with refused(tmp_path, "in its description, x is nothing"):
        checkpoints.restore(tmp_path, 1, small, description)
    description["x"] = "nothing"
    check_equal(checkpoints.restore(tmp_path, 1, small, description), small)


# --- Kills --------------------------------------------------------------------------


def killed_runs(folder: Path, state: str, *runs: list[Any]) -> Any:
    """Returns what each run, killed so often, ends with, and from where it resumed."""
    folders = [folder / str(i) for i in range(len(runs))]
    job = json.dumps([state, *zip(map(str, folders), runs, strict=True)])
    with subprocess.Popen(
        [sys.executable, "-W", "error", str(ROOT / "tests" / "killed_run.py"), job],
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        encoding="utf-8",
        start_new_session=True,
    ) as process:
        try:
            printed, errors = process.communicate(timeout=500)
        except BaseException:
            os.killpg(process.pid, signal.SIGKILL)  # the processes it forked, too
            raise
    assert (process.returncode, errors) == (0, "")
    lines = [json.loads(line) for line in printed.splitlines()]
    ends = []
    for path in folders:
        with np.load(path / "end.npz") as arrays:
            ends.append({name: arrays[name].tobytes() for name in arrays.files})
    assert len(ends[0]) >= 11
    starts = [[x["how"] for x in lines if x["folder"] == str(y)] for y in folders]
    return list(zip(ends, starts, strict=True))


# The last complete checkpoint, when a save is killed at step 6 of 12, saved every 2.
LEFT = {
    "between": {"resumed": 4, "unfinished": []},
    "arrays": {"resumed": 4, "unfinished": ["step_00000006"]},
    "manifest": {"resumed": 4, "unfinished": ["step_00000006"]},
    "writing": {"resumed": 4, "unfinished": ["step_00000006"]},
    "committed": {"resumed": 6, "unfinished": []},
    "removal": {"resumed": 6, "unfinished": ["step_00000002"]},
}
BEGUN = {"resumed": 0, "unfinished": []}


@pytest.mark.parametrize(
    ("state", "event"),
    [("float32", "committed"), ("bfloat16", "arrays"), ("int8", "between")],
)
def test_a_killed_run_ends_as_one_never_killed(
    state: str, event: str, tmp_path: Path
) -> None:
    runs = killed_runs(tmp_path, state, [], [[event, 6]])
    (whole, never), (ended, resumed) = runs
    assert never == [BEGUN]
    assert resumed == [BEGUN, LEFT[event]]
    assert ended == whole


@pytest.mark.slow
@pytest.mark.parametrize("state", ["float32", "bfloat16", "int8"])
def test_a_run_killed_all_the_time(state: str, tmp_path: Path) -> None:
    # Before the first checkpoint, at each event in one run, and after the last one.
    kills: list[Any] = [["between", 1], ["arrays", 2], ["writing", 2]]
    kills += [[event, 6] for event in ("between", "manifest", "arrays", "committed")]
    kills += [["removal", 8], ["writing", 10], ["between", 11], ["manifest", 12]]
    kills += [["committed", 12]]
    once = [[[event, 6]] for event in LEFT]
    whole, often, *others = killed_runs(tmp_path, state, [], kills, *once)
    resumed = [x["resumed"] for x in often[1]]
    assert resumed == [0, 0, 0, 0, 4, 4, 4, 6, 8, 8, 10, 10, 12]
    assert often[0] == whole[0]
    for (ended, starts), left in zip(others, LEFT.values(), strict=True):
        assert starts == [BEGUN, left]
        assert ended == whole[0]
