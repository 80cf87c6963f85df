"""A lock on the machine: processes prepare side by side, each on a GPU of its own, and one at a time measures.

Their GPUs share the host's memory and processors: beside a process that compiled, the worst twentieth of steps took a
fifth longer than the median (Gemma 7B, `keys_values`, on an H100 at d69516a).
"""

import contextlib
import fcntl
import os
import tempfile
from collections.abc import Iterator
from pathlib import Path


def lock_path() -> Path:
    """The file that is locked: one for each user of the machine."""
    return Path(tempfile.gettempdir()) / f"kvrecomp-turns-{os.getuid()}"


@contextlib.contextmanager
def _locked(operation: int) -> Iterator[None]:
    with lock_path().open("w") as file:  # closing it unlocks it, however this is left
        fcntl.flock(file, operation)
        yield


def shared() -> contextlib.AbstractContextManager[None]:
    """For untimed work on the processors, host memory or the link: not while another process measures."""
    return _locked(fcntl.LOCK_SH)


def exclusive() -> contextlib.AbstractContextManager[None]:
    """For what is timed: while no other process prepares or measures."""
    return _locked(fcntl.LOCK_EX)
