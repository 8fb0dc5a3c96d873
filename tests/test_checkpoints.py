"""The examples' checkpoints: whole or not there, sealed, restored onto any mesh."""

import json
import os
import re
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from importlib import import_module
from pathlib import Path
from typing import Any

import jax
import numpy as np
import optax
import pytest
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

from adam3_optax import adam3w, state_shardings
from tests.settings import each_storage

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "examples"))
checkpoints: Any = import_module("checkpoints")

SETTINGS: dict[str, Any] = {"third_moment": "cubic", "b": (0.9, 0.99), "tau": 1.0}
PARAMS = {"w": (16, 32), "odd": (3, 5)}


def template_of(optimizer: Any, devices: int = 8, more: Any = ()) -> Any:
    """Returns what parameters and state are, and how they lie on some devices."""
    params = {
        k: jax.ShapeDtypeStruct(v, "float32") for k, v in (PARAMS | dict(more)).items()
    }
    mesh = jax.make_mesh(
        (devices,), ("x",), axis_types=(AxisType.Auto,), devices=jax.devices()[:devices]
    )
    where = jax.tree.map(
        lambda x: NamedSharding(mesh, P() if x.shape[0] % devices else P("x")), params
    )
    return jax.tree.map(
        lambda x, sharding: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding),
        {"params": params, "state": jax.eval_shape(optimizer.init, params)},
        {"params": where, "state": state_shardings(optimizer, params, where)},
    )


def filled(template: Any) -> Any:
    """Returns arrays for a template, of random bits that are no NaN."""
    rng = np.random.default_rng(0)
    return jax.tree.map(
        lambda x: jax.device_put(
            (rng.normal(size=x.shape) * 50).astype(x.dtype), x.sharding
        ),
        template,
    )


def bits(tree: Any) -> list[Any]:
    return [(x.dtype, np.asarray(x).tobytes()) for x in jax.tree.leaves(tree)]


def on_disk(folder: Path) -> dict[Path, Any]:
    files = (x for x in folder.rglob("*") if x.is_file())
    return {x: (x.read_bytes(), x.stat().st_mtime_ns) for x in files}


@contextmanager
def refused(folder: Path, message: str) -> Iterator[None]:
    """Checks for one printable line that names the folder, and an untouched disk."""
    before = on_disk(folder)
    with pytest.raises(checkpoints.CheckpointError, match=message) as error:
        yield
    assert str(error.value).isprintable()
    assert str(error.value).startswith(str(folder))
    assert on_disk(folder) == before


@pytest.fixture(scope="module")
def template() -> Any:
    return template_of(adam3w(third_moment="cubic"))


@pytest.fixture(scope="module")
def saved(template: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with checkpoints of the steps 5 and 10."""
    folder = tmp_path_factory.mktemp("saved")
    with checkpoints.Checkpoints(folder, template, SETTINGS) as run:
        for step in (5, 10):
            run.save(step, filled(template))
    return folder


@pytest.fixture
def folder(saved: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(saved, tmp_path / "folder"))


def open_and_close(folder: Path, template: Any, settings: Any = SETTINGS) -> None:
    with checkpoints.Checkpoints(folder, template, settings):
        pass


@each_storage("default", "bfloat16", "smallest")
def test_restores_onto_fewer_devices(storage: Any, tmp_path: Path) -> None:
    optimizer = adam3w(third_moment="cubic", **storage)
    tree = filled(template_of(optimizer))
    with checkpoints.Checkpoints(tmp_path, template_of(optimizer), SETTINGS) as run:
        assert run.step is None
        run.save(1, tree)
    fewer = template_of(optimizer, 2)
    with checkpoints.Checkpoints(tmp_path, fewer, SETTINGS) as run:
        assert run.step == 1
        found = run.restore()
    assert bits(found) == bits(tree)
    for x, wanted in zip(jax.tree.leaves(found), jax.tree.leaves(fewer), strict=True):
        assert x.sharding == wanted.sharding


def test_the_last_few_stay_and_no_step_goes_back(folder: Path, template: Any) -> None:
    tree = filled(template)
    with checkpoints.Checkpoints(folder, template, SETTINGS, keep=2) as run:
        assert run.step == 10
        for step in (10, 7):
            with refused(folder, f"/{step} cannot be saved: there is one of step 10$"):
                run.save(step, tree)
        with refused(folder, "/11 cannot be saved: its arrays are not those of the"):
            run.save(11, jax.tree.map(lambda x: x.astype("bfloat16"), tree))
        run.save(10**10, tree)
        names = sorted(x.name for x in folder.iterdir())
        assert names == [".lock", "10", "10000000000"]
        with refused(folder, " cannot be opened: another run is using it$"):
            open_and_close(folder, template)
    open_and_close(folder, template)


# --- Damage, and what is not ours ---------------------------------------------------


def flip(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-1])


def lengthen(path: Path) -> None:
    path.write_bytes(path.read_bytes() + b"x")


def test_damage_to_any_file(folder: Path, template: Any) -> None:
    arrays = folder / "10" / "default"
    files = [x for x in arrays.rglob("*") if x.is_file()]
    files = [x for x in files if x.name != checkpoints.COMMITTED]
    assert len(files) > 8
    for path in files:
        content = path.read_bytes()
        for harm in (flip, cut, lengthen, Path.unlink):
            harm(path)
            with refused(folder, r"/10 cannot be used"):
                open_and_close(folder, template)
            path.write_bytes(content)
    (arrays / "added").touch()
    with refused(folder, "/10 cannot be used.*: SHA-256 of added is "):
        open_and_close(folder, template)
    (arrays / "added").unlink()
    open_and_close(folder, template)


SEALS = {
    "empty": b"",
    "list": b"[]",
    "number": b"3",
    "object": b"{}",
    "deep": b"[" * 200_000,
    "deeper": b'{"a":' * 200_000,
    "binary": b"\xff\xfe",
    "another type": b'{"setting tau": {"a": [1]}}',
    "control characters": rb'{"setting third_moment": "\u001b[31m\n"}',
}


@pytest.mark.parametrize("seal", SEALS)
def test_a_seal_of_something_else(seal: str, folder: Path, template: Any) -> None:
    (folder / "10" / "default" / "seal.json").write_bytes(SEALS[seal])
    readable = seal in ("object", "list", "another type", "control characters")
    message = "setting third_moment is " if readable else "seal.json is damaged$"
    with refused(folder, f"/10 cannot be used.*: {message}"):
        open_and_close(folder, template)


@pytest.mark.parametrize("name", ["11", "99999999999999999999"])
def test_a_folder_that_is_no_checkpoint(name: str, folder: Path, template: Any) -> None:
    (folder / name).mkdir()
    with refused(folder, rf"/{name} cannot be used.* No such file .*seal.json"):
        open_and_close(folder, template)
    (folder / name).rename(folder / f"moved_{name}")
    open_and_close(folder, template)


def test_a_folder_that_cannot_be_made(template: Any, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with refused(tmp_path, "file cannot be opened: .*File exists"):
        open_and_close(tmp_path / "file", template)


@pytest.mark.parametrize(
    ("setting", "value", "message"),
    [
        (
            "third_moment",
            "stabilized",
            'third_moment is "stabilized" now, and was "cub',
        ),
        ("b", [0.9, 0.999], r"b is \[0.9, 0.999\] now, and was \[0.9, 0.99\] when"),
        ("tau", float("nan"), "tau is NaN now, and was 1.0 when it was saved"),
        ("seed", 1, "seed is 1 now, and was nothing when it was saved"),
    ],
)
def test_other_settings(
    setting: str, value: Any, message: str, folder: Path, template: Any
) -> None:
    with refused(folder, f"/10 cannot be used.*: setting {message}"):
        open_and_close(folder, template, SETTINGS | {setting: value})


OTHERS: dict[str, tuple[Any, dict[str, tuple[int, ...]], str]] = {
    "adam": (optax.adamw(1e-3), {}, r"\.mu\['odd'\] is float32\[3, 5\] now, and w"),
    "dtype": (
        adam3w(m_dtype="bfloat16"),
        {},
        r"\.m.* is bfloat16\[3, 5\] now, and was fl",
    ),
    "shape": (adam3w(), {"w": (16, 33)}, r"\['w'\] is float32\[16, 33\] now, and was"),
    "more": (adam3w(), {"z": (2,)}, r"\['z'\] is float32\[2\] now, and was nothing"),
}


@pytest.mark.parametrize("other", OTHERS)
def test_other_arrays(other: str, folder: Path) -> None:
    optimizer, more, message = OTHERS[other]
    with refused(folder, f"/10 cannot be used.*: array .*{message}"):
        open_and_close(folder, template_of(optimizer, more=more))


def test_a_full_disk(
    folder: Path, template: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    def write_text(path: Path, *_: Any) -> None:
        raise OSError(28, "No space left on device", str(path))

    message = f"^{re.escape(str(folder))}/11 cannot be saved: no space left on device$"
    with checkpoints.Checkpoints(folder, template, SETTINGS) as run:
        monkeypatch.setattr(Path, "write_text", write_text)
        with pytest.raises(checkpoints.CheckpointError, match=message):
            run.save(11, filled(template))
        monkeypatch.undo()
    with checkpoints.Checkpoints(folder, template, SETTINGS) as run:
        assert run.step == 10
        assert not list(folder.glob("11*"))
        run.save(11, filled(template))


# --- Kills --------------------------------------------------------------------------


def killed(folder: Path, *moments: int) -> list[dict[str, Any]]:
    """Returns what was found after each kill."""
    with subprocess.Popen(
        [
            *(sys.executable, "-W", "error", str(ROOT / "tests" / "killed_run.py")),
            *(str(folder), *map(str, moments)),
        ],
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
    return [json.loads(line) for line in printed.splitlines()]


def check_kills(found: list[dict[str, Any]]) -> None:
    for x in found:
        assert x["same"]
        assert x["step"] in (2, 3)
        # The unfinished one is removed, and the last two stay.
        assert x["left"] == [".lock", str(x["step"]), "4"]


def test_killed_saves(tmp_path: Path) -> None:
    found = killed(tmp_path, 3, 20, 33)
    check_kills(found)
    assert found[0]["killed"]


@pytest.mark.slow
def test_a_save_killed_at_every_moment(tmp_path: Path) -> None:
    found = killed(tmp_path, *range(60))
    check_kills(found)
    assert found[-1]["killed"] is False
    steps = [x["step"] for x in found if x["killed"]]
    assert len(steps) > 20
    assert steps == sorted(steps)
    assert {*steps} == {2, 3}  # before the renaming, and after it
