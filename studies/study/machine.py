"""What a run depends on, besides its study: device, versions, commit."""

import os
import platform
import sys
from importlib import metadata
from pathlib import Path
from typing import Any

import jax

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "tools"))
from machine import cpu_model, git, usable_cores

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
        "cpu": cpu_model(),
        "cores": usable_cores(),
        "python": platform.python_version(),
        **{x: metadata.version(x) for x in PACKAGES},
        "adam3_optax": metadata.version("adam3_optax"),
        "commit": git("rev-parse", "HEAD"),
        "changed": bool(git("status", "--porcelain", "adam3_optax", "studies/*.py")),
        "environment": {x: os.environ[x] for x in settings if x in os.environ},
        "load": [round(x, 2) for x in os.getloadavg()],
    }
