"""Checkpoints by Orbax that also notice damage, and another run's settings.

Orbax's `CheckpointManager` writes the arrays of every process, keeps the last few
checkpoints, and gives each its final name once it is whole. A run that is killed on the
way loses nothing. But Orbax restores flipped bytes and other dtypes without a word, and
it cannot know with which settings an optimizer's state was made. So every checkpoint
gets a seal: a file with the run's settings, shape and dtype of each array, and the
SHA-256 of each file. It is written before Orbax gives the checkpoint its name, and
checked before a run goes on.

    with Checkpoints(folder, template, {"lr": 0.004, "seed": 0}) as checkpoints:
        step = checkpoints.step  # None if there is no checkpoint yet
        tree = init() if step is None else checkpoints.restore()
        ...
        checkpoints.save(step, tree)

Several processes call this at the same time, with one shared folder. Of two runs in one
folder the second is refused, by a lock (Linux and macOS).
"""

import fcntl
import hashlib
import json
import shutil
from pathlib import Path
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp
from jax.experimental import multihost_utils

ARRAYS, SEAL = "default", "seal.json"  # Orbax's name of the folder; ours of the file
COMMITTED = "commit_success.txt"  # Orbax writes it after the seal


class CheckpointError(RuntimeError):
    """What is wrong with a folder of checkpoints, in one line."""

    def __init__(self, what: str, cause: Exception | str) -> None:
        if "No space left on device" in str(cause):  # with Orbax's story around it
            cause = "no space left on device"
        line = " ".join(f"{what}: {cause}".split())
        # What was read from a damaged file may hold control characters.
        super().__init__("".join(c if c.isprintable() else "?" for c in line))


class SealingHandler(ocp.StandardCheckpointHandler):
    """Orbax's handler of arrays, which also writes the seal."""

    def __init__(self, facts: dict[str, str]) -> None:
        super().__init__()
        self.facts = facts

    def finalize(self, directory: Any) -> None:
        """Runs in the first process when all have written, before the renaming."""
        super().finalize(directory)
        seal = self.facts | digests(Path(directory))
        Path(directory, SEAL).write_text(json.dumps(seal, indent=1))


class Checkpoints:
    """The checkpoints of one run."""

    def __init__(
        self, folder: Path, template: Any, settings: dict[str, Any], keep: int = 3
    ) -> None:
        """Opens a folder, checks its last checkpoint, and removes unfinished ones.

        Args:
            folder: Made if need be.
            template: A tree of `jax.ShapeDtypeStruct`s with shardings: what is saved,
                and where it shall lie when it is restored.
            settings: What runs must share to go on from each other's checkpoints, and
                arrays do not show: hyperparameters, a seed. Anything JSON can hold.
            keep: How many checkpoints stay.

        Raises:
            CheckpointError: The folder cannot be used, another run is using it, or the
                last checkpoint is damaged or has other settings or arrays.
        """
        self.folder, self.template = folder.absolute(), template
        self.lock = self.manager = None
        texts = {f"setting {k}": json.dumps(v) for k, v in settings.items()}
        facts = texts | shapes(template)
        registry = ocp.handlers.DefaultCheckpointHandlerRegistry()
        handler = SealingHandler(facts)
        for arguments in (ocp.args.StandardSave, ocp.args.StandardRestore):
            registry.add(ARRAYS, arguments, handler)
        options = ocp.CheckpointManagerOptions(
            max_to_keep=keep,
            enable_async_checkpointing=False,
            lightweight_initialize=True,
        )
        what = f"{folder} cannot be opened"
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            if jax.process_index() == 0:
                self.lock = (self.folder / ".lock").open("ab")
                fcntl.flock(self.lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                # Orbax would do this, too, but in the background.
                for unfinished in self.folder.glob("*.orbax-checkpoint-tmp"):
                    shutil.rmtree(unfinished)
            self.manager = ocp.CheckpointManager(
                self.folder, options=options, handler_registry=registry
            )
            self.step = self.manager.latest_step()
            if self.step is not None:
                what = f"{folder / str(self.step)} cannot be used"
                what += " (move it away to go on from the one before)"
                check(self.folder / str(self.step) / ARRAYS, facts)
            mine = np.frombuffer(f"{self.step}".encode().ljust(32), np.uint8)
            seen = multihost_utils.process_allgather(mine)
            if (seen != mine).any():
                raise ValueError("not all processes see the same checkpoints in it")
        except Exception as error:
            self.close()
            locked = isinstance(error, BlockingIOError)
            cause = "another run is using it" if locked else error
            raise CheckpointError(what, cause) from error

    def restore(self) -> Any:
        """Returns the tree of the last checkpoint, that of `step`."""
        try:
            arguments = ocp.args.StandardRestore(self.template)
            return self.manager.restore(self.step, args=arguments)
        except Exception as error:
            what = f"{self.folder / str(self.step)} cannot be restored"
            raise CheckpointError(what, error) from error

    def save(self, step: int, tree: Any) -> None:
        """Saves a checkpoint, and then removes all but the last few.

        Raises:
            CheckpointError: The disk is full, say, or there is a later checkpoint.
        """
        try:
            if shapes(tree) != shapes(self.template):
                raise ValueError("its arrays are not those of the template")
            if not self.manager.save(step, args=ocp.args.StandardSave(tree)):
                raise ValueError(f"there is one of step {self.manager.latest_step()}")
            self.step = step
        except Exception as error:
            what = f"{self.folder / str(step)} cannot be saved"
            raise CheckpointError(what, error) from error

    def close(self) -> None:
        """Lets another run use the folder."""
        for resource in (self.manager, self.lock):
            if resource is not None:
                resource.close()

    def __enter__(self) -> "Checkpoints":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def shapes(tree: Any) -> dict[str, str]:
    """Returns dtype and shape of each array, by its path in the tree."""
    return {
        f"array {jax.tree_util.keystr(path)}": f"{x.dtype}{list(x.shape)}"
        for path, x in jax.tree.leaves_with_path(tree)
    }


def digests(directory: Path) -> dict[str, str]:
    """Returns the SHA-256 of each file."""
    found = {}
    for path in sorted(directory.rglob("*")):
        if path.is_file() and path.name not in (SEAL, COMMITTED):
            with path.open("rb") as file:
                digest = hashlib.file_digest(file, "sha256").hexdigest()
            found[f"SHA-256 of {path.relative_to(directory)}"] = digest
    return found


def check(directory: Path, facts: dict[str, str]) -> None:
    """Raises if a checkpoint is not as its seal says, or not what is wanted."""
    text = (directory / SEAL).read_bytes()
    try:
        saved = dict(json.loads(text))
    except (ValueError, TypeError, RecursionError):
        raise ValueError(f"{SEAL} is damaged") from None
    found = facts | digests(directory)
    for key in [*found, *saved]:
        ours, theirs = found.get(key, "nothing"), saved.get(key, "nothing")
        if ours != theirs:
            raise ValueError(f"{key} is {ours} now, and was {theirs} when it was saved")
