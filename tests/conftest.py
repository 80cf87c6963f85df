"""Tests run on the CPU unless JAX_PLATFORMS says otherwise, and no copy happens that was not asked for."""

import gc
import os
import tempfile

os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ.setdefault("JAX_DISABLE_MOST_OPTIMIZATIONS", "1")  # see below; for programs that tests start too
# Not what is free when tests begin, or what fits would depend on who else uses the machine.
os.environ.setdefault("XLA_PJRT_GPU_HOST_MEMORY_LIMIT_GB", "64")

import jax
import pytest
from hypothesis import settings

from kvrecomp.acceptance import acceptance_path
from kvrecomp.measure import profiler
from kvrecomp.predict.hardware import HardwareProfile, Line

# Most of the suite's time is LLVM's: unoptimised, the programs of a toy model compile twice as fast. The emitters of
# fusions are another half; jax 0.11 has no choice of them, and XLA stops at flags that it does not know. Many small
# modules pay off where there are more cores than tests at once.
os.environ["XLA_FLAGS"] = os.environ.get("XLA_FLAGS", "") + " --xla_cpu_parallel_codegen_split_count=1"
if jax.__version_info__ < (0, 11):
    os.environ["XLA_FLAGS"] += " --xla_cpu_use_fusion_emitters=false"

# Programs are large trees of Python objects that stay: going through all of them often is a tenth of the time.
gc.set_threshold(200_000, 50, 50)

# Global, so it holds for the threads that compile in the background too. `toy.put` and `toy.get` copy explicitly.
jax.config.update("jax_transfer_guard", "disallow")


# The same examples in every run, and no limit to the time of one: a machine may be busy.
settings.register_profile("ours", deadline=None, derandomize=True)
settings.load_profile("ours")


@pytest.fixture(scope="session", autouse=True)
def own_turns(tmp_path_factory):
    """A folder of these tests' own for the lock of those that measure: they wait for nobody else on this machine."""
    os.environ["TMPDIR"] = tempfile.tempdir = str(tmp_path_factory.mktemp("temporary"))


@pytest.fixture(scope="session", autouse=True)
def known_machine(tmp_path_factory):
    """A profile of this machine that nobody measured, so that plans do not depend on who else uses it."""
    os.environ["XDG_CACHE_HOME"] = str(tmp_path_factory.mktemp("cache"))
    made_up = HardwareProfile(
        **profiler.this_machine(),
        device_bytes=2.0**34,
        host_bytes=2.0**34,
        to_device=Line(1e-5, 1e-10),
        beside_compute=1e10,
        matmul_rate=1e11,
        memory_rate=1e11,
        kernel_seconds=1e-6,
        source="made up for tests",
    )
    profiler.keep(made_up)
    return made_up


@pytest.fixture(autouse=True)
def nothing_known_of_drafts(known_machine):
    """What other tests' drafts were like decides nothing."""
    acceptance_path().unlink(missing_ok=True)
