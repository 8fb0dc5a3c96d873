"""Devices as their compilers describe them: libtpu for a TPU, jax[cuda13] for a GPU.

Each needs an environment of its own. No device is needed, and none is used.
"""

import importlib.util
import os
from typing import Any
from unittest import mock

from jax._src import xla_bridge
from jax.experimental import topologies

TPUS = ("v4", "v5e", "v5p", "v6e")
H100, A100 = "h100", "a100"  # the A100 has no instructions for float8

# What XLA must know of a GPU to compile for it: facts of the device, and the versions
# of its libraries. Source: h100_sxm.txtpb and a100_sxm_80.txtpb in openxla/xla,
# xla/backends/gpu/target_config/specs, and CUDA 12.8.
GPUS = {
    H100: """
name: "NVIDIA H100 80GB HBM3" clock_rate_ghz: 1.98 core_count: 132 fpus_per_core: 128
cuda_compute_capability { major: 9 feature_extension: ACCELERATED_FEATURES }
memory_bandwidth: 3352320000000 device_memory_size: 84942979072 l2_cache_size: 52428800
shared_memory_per_core: 233472 shared_memory_per_block_optin: 232448
""",
    A100: """
name: "NVIDIA A100-SXM4-80GB" clock_rate_ghz: 1.41 core_count: 108 fpus_per_core: 64
cuda_compute_capability { major: 8 feature_extension: NONE }
memory_bandwidth: 2039040000000 device_memory_size: 85100068864 l2_cache_size: 41943040
shared_memory_per_core: 167936 shared_memory_per_block_optin: 166912
""",
}
EVERY_GPU = """
device_vendor: "NVIDIA Corporation" device_address_bits: 64 driver_version: "13.0.0"
runtime_version: "12.8.0" compile_time_toolkit_version: "12.8.0"
shared_memory_per_block: 49152 registers_per_core_limit: 65536
registers_per_block_limit: 65536 threads_per_warp: 32
threads_per_core_limit: 2048 threads_per_block_limit: 1024
thread_dim_limit_x: 1024 thread_dim_limit_y: 1024 thread_dim_limit_z: 64
block_dim_limit_x: 2147483647 block_dim_limit_y: 65535 block_dim_limit_z: 65535
"""

ENVIRONMENT = {
    "TPU_SKIP_MDS_QUERY": "1",  # or libtpu asks the network what its TPU is
    "TPU_WORKER_HOSTNAMES": "localhost",
    "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",  # or it refuses a second process
    "JAX_SKIP_CUDA_CONSTRAINTS_CHECK": "1",  # or JAX looks for what runs a GPU
}


def present() -> tuple[str, ...]:
    """Returns the devices that have a compiler here. Call it before JAX is used."""
    os.environ.update(ENVIRONMENT | os.environ)
    tpus = TPUS if importlib.util.find_spec("libtpu") else ()
    return (*tpus, *(GPUS if importlib.util.find_spec("jax_cuda13_plugin") else ()))


def devices(name: str, shape: str = "2x2") -> Any:
    """Returns devices to compile for; `shape` is that of a TPU's slice."""
    if name not in GPUS:
        slice_of = f"{name}:{shape}" + "x1" * (name in ("v4", "v5p"))
        return topologies.get_topology_desc(slice_of, "tpu").devices
    kind = GPUS[name].split('"')[1]
    described = f"""
platform_name: "CUDA" device_description_str: "{kind}"
dnn_version_info {{ major: 9 minor: 10 patch: 0 }}
gpu_device_info {{ {GPUS[name]}{EVERY_GPU} }}
"""
    known = xla_bridge.canonicalize_platform

    def canonical(platform: str) -> str:  # without a GPU JAX does not know "gpu"
        return "cuda" if platform == "gpu" else known(platform)

    with mock.patch.object(xla_bridge, "canonicalize_platform", canonical):
        return topologies.get_topology_desc(
            platform="cuda", target_config=described, topology="1x1x1"
        ).devices
