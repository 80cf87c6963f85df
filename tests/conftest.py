"""Tests run on the CPU unless JAX_PLATFORMS says otherwise, and no copy happens that was not asked for."""

import os

os.environ.setdefault("JAX_PLATFORMS", "cpu")

import jax

# Most of the suite's time is LLVM's: unoptimised, the programs of a toy model compile twice as fast. The emitters of
# fusions are another half; jax 0.11 has no choice of them, and XLA stops at flags that it does not know.
jax.config.update("jax_disable_most_optimizations", True)
if jax.__version_info__ < (0, 11):
    os.environ["XLA_FLAGS"] = os.environ.get("XLA_FLAGS", "") + " --xla_cpu_use_fusion_emitters=false"

# Global, so it holds for the threads that compile in the background too. `toy.put` and `toy.get` copy explicitly.
jax.config.update("jax_transfer_guard", "disallow")
