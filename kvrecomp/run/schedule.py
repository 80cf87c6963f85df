"""Compiles programs whose copies from and to host memory run under compute, and start as soon as they may.

XLA's latency hiding scheduler puts compute between the start of a copy and its end. It takes every copy for as long as
five kernels, whatever the sizes of either, and so lets a copy start some five kernels before it is awaited: late, where
more could run under it, and the link rests meanwhile. A profile can tell it otherwise, by the names of kernels, which
are known once the program is compiled. So a program that copies from host memory is compiled twice, the second time
with a profile in which kernels take no time to speak of: a copy starts when what it waits for has ended. The kernels
were chosen, by timing them, the first time.

Measured on an H200 (h200_schedule.txt): OPT-13B, 64 x 512, `auto` within 40 GiB takes 31.7 ms a step where it
took 37.6, and W1's steps, which were at 97 to 100 % of the link, what they took. The second time compiles in 3.5 to 5.7
s where the first does in 10 to 16.
"""

import re
import types
from collections.abc import Mapping
from typing import Any

# XLA has the scheduler on by itself from Hopper on, and off on older GPUs.
OVERLAPPING: Mapping[str, Any] = types.MappingProxyType({"xla_gpu_enable_latency_hiding_scheduler": True})
# Of what runs beside compute XLA starts a third only when one of two has ended. Drafts take longer than two copies:
# while they are made, as many are to be on their way as the step's order lets.
MANY_COPIES: Mapping[str, Any] = types.MappingProxyType({"xla_gpu_experimental_parallel_async_compute_limit": 2**16})

NO_TIME = 1e-6  # microseconds: thousands of kernels are nothing beside XLA's own estimate of a copy
# The profile says nothing of copies, which XLA would warn of.
_UNCHECKED = {"xla_gpu_pgle_accuracy_checker": "PGLE_STRICTNESS_LEVEL_OFF"}
_FROM_HOST = re.compile(r"= \([^()]*, [^()]*\{[^{}]*S\(5\)\}, [^()]*\) copy-start\(")  # its destination, its source
_INSTRUCTION = re.compile(r"^  (?:ROOT )?%(\S+) = .*? ([a-z][a-z\-]*)\(", re.MULTILINE)


def compile_overlapping(lowered: Any, options: Mapping[str, Any]) -> Any:
    """What `jax.jit(...).lower(...)` gives, compiled with these options of XLA's.

    The profile is given as it is, not as a file: jax's persistent cache knows a program by its options.
    """
    program = lowered.compile(compiler_options=dict(options))
    profile = _profile(program.as_text())
    return lowered.compile(compiler_options={**options, **_UNCHECKED, "fdo_profile": profile}) if profile else program


def _profile(text: str) -> bytes:
    """The profile for a program of that text, in XLA's format; empty where nothing is copied from the host."""
    entry = text[text.index("\nENTRY") :]
    if not _FROM_HOST.search(entry):
        return b""
    names = [name for name, kind in _INSTRUCTION.findall(entry) if kind not in ("copy-start", "copy-done")]
    return "".join(f'costs {{ name: "{name}" cost_us: {NO_TIME} }}\n' for name in names).encode()
