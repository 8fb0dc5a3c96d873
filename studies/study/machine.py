"""What a run depends on, besides its study: device, versions, commit."""

import contextlib
import os
import platform
import subprocess
from importlib import metadata
from pathlib import Path
from typing import Any

import jax

ROOT = Path(__file__).resolve().parents[2]
PACKAGES = ("jax", "jaxlib", "optax", "flax", "numpy")
# Runs of one record share these.
SAME = ("device", "cpu", "cores", "python", "jax", "jaxlib", "optax")


def facts() -> dict[str, Any]:
    """Returns what the numbers depend on, besides the study."""
    device = jax.devices()[0]
    settings = ("XLA_FLAGS", "JAX_PLATFORMS", "OMP_NUM_THREADS")
    return {
        "device": device.device_kind,
        "platform": device.platform,
        "cpu": _cpu_model(),
        "cores": _usable_cores(),
        "python": platform.python_version(),
        **{x: metadata.version(x) for x in PACKAGES},
        "adam3_optax": metadata.version("adam3_optax"),
        "commit": _git("rev-parse", "HEAD"),
        "changed": bool(_git("status", "--porcelain", "adam3_optax", "studies/*.py")),
        "environment": {x: os.environ[x] for x in settings if x in os.environ},
        "load": [round(x, 2) for x in os.getloadavg()],
    }


def _cpu_model() -> str:
    """Returns what the processor calls itself."""
    with contextlib.suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    return platform.processor() or platform.machine()


def _usable_cores() -> int:
    """Returns how many processors this process may run on."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def _git(*command: str) -> str | None:
    """Returns what git says of this repository, or None where there is none."""
    with contextlib.suppress(OSError, subprocess.CalledProcessError):
        done = subprocess.run(
            ["git", "-C", str(ROOT), *command],
            check=True,
            capture_output=True,
            encoding="utf-8",
        )
        return done.stdout.strip()
    return None
