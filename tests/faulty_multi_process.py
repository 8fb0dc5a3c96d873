"""examples/multi_process.py with a smaller model, and with what a test lets happen.

FAULTS is a JSON list of [process, event, step, action]. Events: "begun", before a step;
"arrays", when a checkpoint has its arrays and no manifest; "committed", when it has.
Actions: "die" and "freeze" (the process itself), "kill launcher", "interrupt launcher",
"raise", and "listen", which writes to FOUND/process.json who listens where, and when.
Each worker begins by writing its number among processes to FOUND/process.pid. With
--process-id and no launcher it is one that was started by hand, on simulated devices.
"""

import json
import os
import signal
import sys
import time
from collections.abc import Callable
from importlib import import_module
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "examples"))
psutil: Any = import_module("psutil")  # it has no types
char_lm: Any = import_module("char_lm")
multi_process: Any = import_module("multi_process")


def shrink(module: Any, set_to: Callable[[Any, str, Any], None] = setattr) -> None:
    """Makes the model small: it is compiled in half the time."""
    set_to(module, "LAYERS", 1)
    set_to(module, "WIDTH", 32)


def act(process: int, action: str) -> None:
    """Lets it happen, in this process."""
    match action:
        case "die":
            os.kill(os.getpid(), signal.SIGKILL)
        case "freeze":
            os.kill(os.getpid(), signal.SIGSTOP)
        case "kill launcher":
            os.kill(os.getppid(), signal.SIGKILL)
        case "interrupt launcher":
            os.kill(os.getppid(), signal.SIGINT)
        case "raise":
            raise RuntimeError("as the test wants")
        case "listen":
            sockets = psutil.Process().net_connections("inet")
            hosts = [x.laddr.ip for x in sockets if x.status == psutil.CONN_LISTEN]
            found = {"pid": os.getpid(), "time": time.time(), "hosts": hosts}
            Path(os.environ["FOUND"], f"{process}.json").write_text(json.dumps(found))
        case _:
            raise ValueError(action)


def inject(process: int) -> None:
    """Puts the faults where they belong."""
    faults = json.loads(os.environ.get("FAULTS", "[]"))

    def happens(event: str, step: int) -> None:
        for whose, when, at, action in faults:
            if (whose, when, at) == (process, event, step):
                act(process, action)

    checkpoints = multi_process.checkpoints
    batch_at, commit, save = (
        multi_process.batch_at,
        checkpoints._commit,
        checkpoints.save,
    )

    def batch_at_(corpus: Any, seed: int, step: int, *rest: Any) -> Any:
        happens("begun", step)
        return batch_at(corpus, seed, step, *rest)

    def commit_(checkpoint: Path, manifest: Any) -> None:  # in process 0 alone
        happens("arrays", manifest["step"])
        commit(checkpoint, manifest)

    def save_(folder: Path, step: int, *rest: Any) -> None:
        save(folder, step, *rest)
        happens("committed", step)

    multi_process.batch_at = batch_at_
    checkpoints._commit = commit_
    checkpoints.save = save_


if __name__ == "__main__":
    if not os.environ.get("FULL_SIZE"):
        shrink(char_lm)
    if sys.platform == "linux":
        # A loopback address to which no machine's name points.
        multi_process.LOOPBACK = "127.0.0.2"
    if "--process-id" in sys.argv:
        number = int(sys.argv[sys.argv.index("--process-id") + 1])
        Path(os.environ["FOUND"], f"{number}.pid").write_text(str(os.getpid()))
        inject(number)
        if "--simulated" not in sys.argv:
            multi_process.simulate(4)
    sys.exit(multi_process.main())
