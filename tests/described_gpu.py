"""Compiling for an NVIDIA GPU on a machine that has none, by its description.

Needs jax's CUDA plugin (extra `schedule`). The only place that uses private parts of jax: it has no public way
to compile for a device that is not there.
"""

import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax._src import compiler
from jax._src.lib import _jax
from jax.experimental import topologies

from kvrecomp.run.schedule import compile_overlapping
from models.checkpoint import Skeleton

H200 = """
gpu_device_info {
  threads_per_block_limit: 1024 threads_per_warp: 32 shared_memory_per_block: 49152 shared_memory_per_core: 233472
  threads_per_core_limit: 2048 core_count: 132 fpus_per_core: 128 block_dim_limit_x: 2147483647
  block_dim_limit_y: 65535 block_dim_limit_z: 65535 memory_bandwidth: 4800000000000 l2_cache_size: 62914560
  clock_rate_ghz: 1.98 device_memory_size: 150754820096 shared_memory_per_block_optin: 232448
  cuda_compute_capability { major: 9 } registers_per_core_limit: 65536 registers_per_block_limit: 65536
}
platform_name: "CUDA"
dnn_version_info { major: 9 minor: 7 }
device_description_str: "NVIDIA H200"
"""
A100 = H200.replace("major: 9 } regi", "major: 8 } regi").replace("H200", "A100")  # as far as XLA's scheduler knows it


# Kernels that were compiled once in this process are there for later programs, which takes half of the time.
FOLDER = tempfile.TemporaryDirectory(prefix="kernels-")
KERNELS: dict[str, Any] = {}
if jax.__version_info__ < (0, 11):  # later XLAs do not know the second option, and stop at it
    KERNELS["xla_gpu_kernel_cache_file"] = str(Path(FOLDER.name) / "kernels")
    KERNELS["xla_gpu_enable_llvm_module_compilation_parallelism"] = True  # or there is no cache


def abstract_model(config: Any, where: Callable[[str, tuple[int, ...]], jax.sharding.Sharding]) -> Any:
    """A model in bfloat16 of no numbers, whose parameters are said to be where `kvrecomp.placement` has them."""
    skeleton = Skeleton(config, "bfloat16")
    return skeleton.fill(
        {
            name: jax.ShapeDtypeStruct(shape, jnp.bfloat16, sharding=where(name, shape))
            for name, shape in skeleton.shapes.items()
        }
    )


class Program:
    """A program for one such GPU, as `jax.stages.Compiled` has it."""

    def __init__(self, executable: Any):
        self._executable = executable

    def as_text(self) -> str:
        return self._executable.hlo_modules()[0].to_string()

    @property
    def temp_bytes(self) -> int:
        return self._executable.get_compiled_memory_stats().temp_size_in_bytes


class Lowered:
    """What `jax.jit(...).trace(...)` gives, lowered for one such GPU."""

    def __init__(self, traced: Any, target: str):
        self._module = traced.lower(lowering_platforms=("cuda",)).compiler_ir("stablehlo")
        self._target = target

    def compile(self, compiler_options: Mapping[str, Any]) -> Program:
        described = {"platform": "cuda", "target_config": self._target, "topology": "1x1x1"}
        (device,) = topologies.get_topology_desc("gpu", **described).devices
        given = {**KERNELS, **compiler_options}
        profile, placed = given.pop("fdo_profile", None), np.zeros((1, 1), int)
        options = compiler.get_compile_options(1, 1, placed, env_options_overrides=given, fdo_profile=profile)
        return Program(device.client.compile(self._module, _jax.DeviceList((device,)), options))


def compile_traced(traced: Any, options: Mapping[str, Any], target: str = H200) -> tuple[str, int]:
    """Compiles what `jax.jit(...).trace(...)` gives as the decoder does, with these options of XLA's, for one such GPU.

    Returns the program's text, its entry in the order of execution, and its temporary device memory in bytes.
    """
    program = compile_overlapping(Lowered(traced, target), options)
    return program.as_text(), program.temp_bytes
