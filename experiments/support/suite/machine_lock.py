"""Processes that measure on one machine, each on a GPU of its own, take turns.

Their GPUs share the host's memory and processors: beside a process that compiled, the worst twentieth of steps took a
fifth longer than the median (Gemma 7B, `keys_values`, on an H100 at d69516a). So they prepare side by
side, and while one measures, the others wait.
"""

import contextlib
import fcntl
import os
import tempfile
from collections.abc import Iterator
from pathlib import Path


def lock_path() -> Path:
    """The file that is locked: the machine's own, one for each user."""
    return Path(tempfile.gettempdir()) / f"kvrecomp-turns-{os.getuid()}"


@contextlib.contextmanager
def preparing() -> Iterator[None]:
    """A context for what takes processors, host memory or the link, and is not timed: not while another measures."""
    with _locked(fcntl.LOCK_SH):
        yield


@contextlib.contextmanager
def measuring() -> Iterator[None]:
    """A context for what is timed: while no other process prepares or measures."""
    with _locked(fcntl.LOCK_EX):
        yield


@contextlib.contextmanager
def _locked(kind: int) -> Iterator[None]:
    with lock_path().open("w") as file:  # closed, and so unlocked, however this is left
        fcntl.flock(file, kind)
        yield
