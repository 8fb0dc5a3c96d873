"""Checkpoints that survive a kill, and that know what they hold.

Orbax writes and reads the arrays, from every process and onto any sharding. It does not
notice flipped bytes, casts another dtype in silence, and an optimizer's state cannot
say by which rule it was made. So beside the arrays lies a manifest: what the user says
of the run, the shape and dtype of every array, and size and SHA-256 of every file.

    folder/step_00000300/arrays/...       written by Orbax
    folder/step_00000300/manifest.json    written last: with it the checkpoint exists

A run killed before that leaves a folder with manifest.json.unfinished. It counts as
nothing, and the next `save` removes it. A folder with neither is not ours, or has lost
its manifest: it is an error, and stays. `restore` verifies everything before it reads
an array.

    tree = {"params": params, "state": state}
    save(folder, step, tree, description)
    if (step := latest(folder)) is not None:
        tree = restore(folder, step, tree, description)

With several processes each one calls these functions, with the same arguments, on one
shared file system; what is an error in one of them is the same error in all. The folder
is for the checkpoints of one run at a time (`locked`).
"""

import contextlib
import hashlib
import json
import operator
import os
import re
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp
from jax.experimental import multihost_utils

try:
    import fcntl
except ImportError:  # on Windows
    fcntl = None

FORMAT = 1  # of the manifest
STEP = re.compile(r"step_([0-9]{8}|[1-9][0-9]{8,})")
LONGEST = 4096  # bytes of an error that all processes raise
ARRAYS, MANIFEST, UNFINISHED = "arrays", "manifest.json", "manifest.json.unfinished"


class CheckpointError(ValueError):
    """A checkpoint that is damaged, or not the one that is wanted."""


def save(
    folder: Path | str,
    step: int,
    tree: Any,
    description: dict[str, Any],
    keep: int = 3,
) -> None:
    """Saves a checkpoint, and removes all but the last few.

    Args:
        folder: Where the checkpoints are; made if need be.
        step: How many steps were taken; above those of all checkpoints in the folder.
        tree: Parameters, optimizer state and the like: a tree of `jax.Array`s.
        description: What a checkpoint must agree in to be restored, and the arrays do
            not show: the form of the third moment, storage settings, hyperparameters,
            the seed of the data. Anything that JSON can hold.
        keep: How many checkpoints stay, this one included.

    Raises:
        CheckpointError: The folder holds a checkpoint of this step or a later one, or
            of another run, or a folder that is no checkpoint; not all processes see it.
        TypeError: A step or keep that is no whole number.
        ValueError: A negative step; a keep below 1; a leaf that is no array; a
            description that JSON cannot hold.
    """
    step, keep = _whole("step", step), _whole("keep", keep)
    if step < 0 or keep < 1:
        raise ValueError(f"step must be >= 0 and keep >= 1, got {step} and {keep}")
    arrays, description = _arrays(tree), _as_json(description)
    checkpoint = _path(Path(folder).absolute(), step)
    with _together():
        if jax.process_index() == 0:
            _begin(checkpoint, step, description, arrays)
    with _together():
        if step not in _steps(checkpoint.parent):
            raise CheckpointError(f"{folder} is not shared by all processes")
    with ocp.StandardCheckpointer() as orbax:
        orbax.save(checkpoint / ARRAYS, tree)
        orbax.wait_until_finished()
    multihost_utils.sync_global_devices("the arrays are written")
    with _together():
        if jax.process_index() == 0:
            manifest = {
                "format": FORMAT,
                "step": step,
                "description": description,
                "arrays": arrays,
                "files": {x: _file(checkpoint / x) for x in _names(checkpoint)},
            }
            _commit(checkpoint, manifest | {"sha256": _digest(manifest)})
            for old in _complete(checkpoint.parent)[:-keep]:
                _remove(_path(checkpoint.parent, old))


def latest(folder: Path | str) -> int | None:
    """Returns the step of the last complete checkpoint, None where there is none.

    All processes get what the first one sees.

    Raises:
        CheckpointError: There is a folder that is no checkpoint.
    """
    last = -1
    with _together():
        if jax.process_index() == 0:
            last = max(_complete(Path(folder)), default=-1)
    # As bytes, for JAX would cut a number to 32 bits.
    last = np.asarray([last], np.int64).view(np.uint8)
    last = int(multihost_utils.process_allgather(last)[0].view(np.int64)[0])
    return None if last < 0 else last


@contextlib.contextmanager
def locked(folder: Path | str) -> Iterator[None]:
    """Keeps other runs out of a folder, on Linux and macOS; ends with the process.

    Raises:
        CheckpointError: Another run is using the folder.
    """
    with contextlib.ExitStack() as stack:
        with _together():
            if jax.process_index() == 0 and fcntl is not None:
                file = stack.enter_context((Path(folder) / ".lock").open("ab"))
                try:
                    fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                except BlockingIOError:
                    raise CheckpointError(f"another run is using {folder}") from None
        yield


def restore(
    folder: Path | str, step: int, template: Any, description: dict[str, Any]
) -> Any:
    """Restores a checkpoint, once it is known to be whole and the one that is wanted.

    Args:
        folder: Where the checkpoints are. Nothing is written there.
        step: Which checkpoint, as from `latest`.
        template: A tree like the saved one: arrays, or `jax.ShapeDtypeStruct`s, with
            the shardings that the restored arrays shall have. They may be on another
            number of devices or processes than the saved ones were.
        description: As at `save`.

    Returns:
        The tree.

    Raises:
        CheckpointError: No such checkpoint; one that is truncated or changed; one with
            another description, other arrays, shapes or dtypes. It names the first
            difference, what is saved and what is wanted.
        TypeError: A step that is no whole number.
        ValueError: A leaf of the template without a sharding; a description that JSON
            cannot hold.
    """
    wanted = _arrays(template)
    description = _as_json(description)
    checkpoint = _path(Path(folder).absolute(), _whole("step", step))
    with _together():
        manifest = _check(checkpoint, description, wanted)
        _verify(checkpoint, manifest["files"])
    shapes = jax.tree.map(
        lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), template
    )
    with ocp.StandardCheckpointer() as orbax:
        return orbax.restore(checkpoint / ARRAYS, shapes)


# --- Complete and unfinished --------------------------------------------------------


@contextlib.contextmanager
def _together() -> Iterator[None]:
    """Waits for all processes, and raises in all of them what is wrong in one."""
    error, message = None, b""
    try:
        yield
    except (CheckpointError, OSError) as caught:
        error, message = caught, (str(caught) or repr(caught)).encode()[:LONGEST]
    padded = np.frombuffer(message.ljust(LONGEST, b"\0"), np.uint8)
    for said in multihost_utils.process_allgather(padded):
        if said.any():
            text = said.tobytes().rstrip(b"\0").decode(errors="replace")
            raise CheckpointError(text) from error


def _begin(
    checkpoint: Path, step: int, description: dict[str, Any], arrays: dict[str, str]
) -> None:
    """Makes the folder of a checkpoint, marked as unfinished, where it may be made."""
    folder = checkpoint.parent
    complete = _complete(folder)
    if complete and step <= complete[-1]:
        raise CheckpointError(
            f"{folder} holds a checkpoint of step {complete[-1]}, so step {step} is "
            "refused there: restore that one, or use another folder"
        )
    if complete:  # or another run's checkpoints would be removed as old ones
        _check(_path(folder, complete[-1]), description, arrays)
    for unfinished in set(_steps(folder)).difference(complete):
        _remove(_path(folder, unfinished))
    checkpoint.mkdir(parents=True, exist_ok=True)
    (checkpoint / UNFINISHED).touch()
    _sync(checkpoint)


def _path(folder: Path, step: int) -> Path:
    return folder / f"step_{step:08}"


def _steps(folder: Path) -> list[int]:
    """Returns the steps that have a folder, in order."""
    found = folder.iterdir() if folder.is_dir() else ()
    names = (STEP.fullmatch(path.name) for path in found)
    return sorted(int(name[1]) for name in names if name)


def _complete(folder: Path) -> list[int]:
    """Returns the steps of the complete checkpoints, in order.

    Raises:
        CheckpointError: There is a folder that is neither complete nor unfinished.
    """
    complete = []
    for step in _steps(folder):
        path = _path(folder, step)
        if (path / MANIFEST).is_file():
            complete.append(step)
        elif not (path / UNFINISHED).is_file() and any(path.iterdir()):
            raise CheckpointError(
                f"{path} has no {MANIFEST}, so it is no checkpoint of ours, or a "
                "damaged one: move it away"
            )
    return complete


def _commit(checkpoint: Path, manifest: dict[str, Any]) -> None:
    """Writes the manifest, which is there as a whole or not at all."""
    for path in sorted((checkpoint / ARRAYS).rglob("*/"), reverse=True):
        _sync(path)  # deepest first
    _sync(checkpoint / ARRAYS)
    with (checkpoint / UNFINISHED).open("w", encoding="utf-8") as file:
        json.dump(manifest, file, indent=1, sort_keys=True)
        file.flush()
        os.fsync(file.fileno())
    os.replace(checkpoint / UNFINISHED, checkpoint / MANIFEST)
    _sync(checkpoint)


def _sync(folder: Path) -> None:
    """Returns once the names in a folder, and its own, are on the disk."""
    if os.name != "posix":
        return  # there a folder cannot be opened
    for path in (folder, folder.parent):
        descriptor = os.open(path, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def _remove(checkpoint: Path) -> None:
    """Removes what `save` writes; from the first moment on it counts as unfinished."""
    if (checkpoint / MANIFEST).exists():
        os.replace(checkpoint / MANIFEST, checkpoint / UNFINISHED)
        _sync(checkpoint)
    for arrays in checkpoint.glob(f"{ARRAYS}*/"):  # Orbax's unfinished ones, too
        shutil.rmtree(arrays)
    if {path.name for path in checkpoint.iterdir()} <= {UNFINISHED}:
        (checkpoint / UNFINISHED).unlink(missing_ok=True)
        checkpoint.rmdir()  # unless there is more in it, which is not ours


# --- The manifest -------------------------------------------------------------------


def _whole(name: str, number: Any) -> int:
    """Returns a whole number, which a float or a truth value is not."""
    try:
        return operator.index(None if isinstance(number, bool) else number)
    except TypeError:
        raise TypeError(f"{name} must be a whole number, got {number!r}") from None


def _arrays(tree: Any) -> dict[str, str]:
    """Returns what each array is, by its path in the tree."""
    leaves = jax.tree.leaves_with_path(tree)
    for path, x in leaves:
        if getattr(x, "sharding", None) is None:
            raise ValueError(
                f"{jax.tree_util.keystr(path)} must be a jax.Array, or a "
                f"jax.ShapeDtypeStruct with a sharding, got {x!r}"
            )
    return {jax.tree_util.keystr(p): f"{x.dtype}{list(x.shape)}" for p, x in leaves}


def _as_json(description: dict[str, Any]) -> dict[str, Any]:
    """Returns a description as it comes back from a file: tuples are lists, say."""
    try:
        return json.loads(json.dumps(description))
    except (TypeError, ValueError) as error:
        raise ValueError(f"description must be what JSON can hold: {error}") from error


def _digest(manifest: dict[str, Any]) -> str:
    text = json.dumps(_as_json(manifest), sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()


def _names(checkpoint: Path) -> list[str]:
    files = (path for path in (checkpoint / ARRAYS).rglob("*") if path.is_file())
    return sorted(path.relative_to(checkpoint).as_posix() for path in files)


def _file(path: Path) -> dict[str, Any]:
    """Returns size and digest of a file, once it is on the disk."""
    with path.open("r+b") as file:
        os.fsync(file.fileno())
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    return {"bytes": path.stat().st_size, "sha256": digest}


def _manifest(checkpoint: Path) -> dict[str, Any]:
    """Returns the manifest, which must be whole and of this format."""
    path = checkpoint / MANIFEST
    if not path.is_file():
        steps = ", ".join(map(str, _complete(checkpoint.parent))) or "none"
        raise CheckpointError(
            f"there is no complete checkpoint {checkpoint}; steps that are: {steps}"
        )
    try:
        manifest = json.loads(path.read_text("utf-8"))
        digest, form = manifest.pop("sha256"), manifest["format"]
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise _damaged(checkpoint, MANIFEST, f"is damaged: {error}") from error
    if form != FORMAT:
        raise CheckpointError(f"{path} has format {form!r}, wanted {FORMAT}")
    if digest != _digest(manifest):
        raise _damaged(checkpoint, MANIFEST, "is damaged: its SHA-256 differs")
    return manifest


def _check(
    checkpoint: Path, description: dict[str, Any], arrays: dict[str, str]
) -> dict[str, Any]:
    """Returns the manifest of a checkpoint, which must be the one that is wanted."""
    manifest = _manifest(checkpoint)
    _compare(checkpoint, "description", manifest["description"], description)
    _compare(checkpoint, "arrays", manifest["arrays"], arrays)
    return manifest


def _compare(
    checkpoint: Path, what: str, saved: dict[str, Any], wanted: dict[str, Any]
) -> None:
    """Raises where saved and wanted differ, and names the first difference."""
    for key in sorted(saved.keys() | wanted.keys()):
        # As text, for a NaN is not equal to itself.
        ours, theirs = (
            json.dumps(x[key], sort_keys=True) if key in x else ""
            for x in (wanted, saved)
        )
        if ours != theirs:
            ours, theirs = (x.get(key, "nothing") for x in (wanted, saved))
            raise CheckpointError(
                f"{checkpoint} is another checkpoint than is wanted: in its {what}, "
                f"{key} is {theirs}, wanted {ours}"
            )


def _damaged(checkpoint: Path, name: str, damage: str) -> CheckpointError:
    """Returns an error that says what is damaged, and how to go on without it."""
    steps = _complete(checkpoint.parent)
    earlier = [i for i in steps if i < int(checkpoint.name.removeprefix("step_"))]
    on = f"step {earlier[-1]}" if earlier else "the beginning"
    return CheckpointError(
        f"{checkpoint / name} {damage}; with {checkpoint.name} moved away, a run goes "
        f"on from {on}"
    )


def _verify(checkpoint: Path, files: dict[str, Any]) -> None:
    """Raises where a file is not as it was saved; each process reads its share."""
    for name in sorted(files)[jax.process_index() :: jax.process_count()]:
        if damage := _damage(checkpoint / name, files[name]):
            raise _damaged(checkpoint, name, damage)


def _damage(path: Path, saved: dict[str, Any]) -> str:
    """Returns what is wrong with a file, and nothing where it is as it was saved."""
    if not path.is_file():
        return "is missing"
    try:
        if path.stat().st_size != saved["bytes"]:
            return f"has {path.stat().st_size} bytes, but {saved['bytes']} were saved"
        with path.open("rb") as file:
            same = hashlib.file_digest(file, "sha256").hexdigest() == saved["sha256"]
    except OSError as error:
        return f"cannot be read: {error.strerror}"
    return "" if same else "is damaged: its SHA-256 differs"
