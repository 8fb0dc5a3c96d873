"""Starts processes on this machine, and ends them all when one of them fails.

A process that found a mistake has said so (`say`) and ended with status 2: that line
alone is shown. If it raised another error, its last lines are shown. If the launcher
dies, in whatever way, the processes end, too.
"""

import contextlib
import os
import queue
import signal
import socket
import subprocess
import sys
import threading
from collections import deque
from pathlib import Path
from typing import IO

LOOPBACK = "127.0.0.1"
PROGRAM = Path(sys.argv[0]).name


def launch(command: list[str], processes: int) -> int:
    """Runs a command in several processes, and returns the exit status.

    Each gets options of its own, `--process-id I --coordinator HOST:PORT`.
    """
    with socket.socket() as probe:  # finds a port that nobody listens on
        probe.bind((LOOPBACK, 0))
        address = f"{LOOPBACK}:{probe.getsockname()[1]}"
    # No proxy leads to the loopback address.
    env = {k: v for k, v in os.environ.items() if not k.lower().endswith("_proxy")}
    workers: list[subprocess.Popen[bytes]] = []
    readers: list[threading.Thread] = []
    errors: dict[int, str] = {}  # of the processes that have ended
    ended: queue.SimpleQueue[int] = queue.SimpleQueue()

    def read(i: int, lines: IO[bytes]) -> None:
        errors[i] = b"".join(deque(lines, maxlen=100)).decode(errors="replace")
        ended.put(i)

    with contextlib.ExitStack() as stack:
        try:
            for i in range(processes):
                own = ["--process-id", str(i), "--coordinator", address]
                worker = subprocess.Popen(
                    [sys.executable, *command, *own],
                    env=env,
                    stdin=subprocess.PIPE,  # closes when the launcher ends
                    stdout=None if i == 0 else subprocess.DEVNULL,
                    stderr=subprocess.PIPE,
                    start_new_session=True,  # Ctrl-C is for the launcher alone
                )
                workers.append(stack.enter_context(worker))
                reader = threading.Thread(target=read, args=(i, worker.stderr))
                readers.append(reader)
                reader.start()
            for _ in workers:
                i = ended.get()
                if status := workers[i].wait():
                    return explain(i, status, errors[i])
        except KeyboardInterrupt:
            say("interrupted; the same command goes on from the last checkpoint")
            return 130
        finally:
            for worker, reader in zip(workers, readers, strict=False):
                worker.kill()
                reader.join()
    return 0


def end_with_the_launcher() -> None:
    """Ends this process, one that was launched, as soon as the launcher has ended."""

    def wait() -> None:
        os.read(0, 1)  # returns when the standard input is closed
        os._exit(1)

    threading.Thread(target=wait, daemon=True).start()


def explain(i: int, status: int, errors: str) -> int:
    """Says how a process ended, and returns the launcher's exit status."""
    ours = [line for line in errors.splitlines() if line.startswith(f"{PROGRAM}: ")]
    if status == 2 and ours:
        print(ours[-1], file=sys.stderr)
        return 2
    how = f"exit status {status}"
    if status < 0:
        how = signal.Signals(-status).name
        if -status == signal.SIGABRT:
            how += ", as JAX ends it when another process stops answering"
    else:
        sys.stderr.write(errors)
    say(f"process {i} ended ({how}); the same command goes on from the last checkpoint")
    return 1


def say(message: str) -> None:
    """Writes a line to the standard error."""
    print(f"{PROGRAM}: {message}", file=sys.stderr, flush=True)
