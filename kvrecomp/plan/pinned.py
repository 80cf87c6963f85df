"""The cap of XLA's pool of pinned host memory: an environment variable, which jax reads when its backend starts."""

import os

from kvrecomp.plan.shapes import GIB

LIMIT_VARIABLE = "XLA_PJRT_GPU_HOST_MEMORY_LIMIT_GB"
_DEFAULT_LIMIT_GIB = 64


def pinned_limit() -> int:
    """Bytes that the pinned pool may hold."""
    return int(os.environ.get(LIMIT_VARIABLE, _DEFAULT_LIMIT_GIB)) * GIB
