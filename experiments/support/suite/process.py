"""A process of the suite: a script that measures tasks and writes the rows so far, watched until it ends."""

import contextlib
import json
import os
import re
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Generator, Iterator, Sequence
from pathlib import Path
from typing import Any

from experiments.support.suite.tasks import Task, arguments

ROOT = Path(__file__).parents[3]
POLL_SECONDS = 0.2
GRACE_SECONDS = 20  # for a process that was told to end
MOST_OF_A_REASON = 400  # characters


class ProcessFailed(Exception):
    """A process did not do all that it was asked for; the message says why."""


def run_process(tasks: Sequence[Task], commit: str, timeout: float, lock: int) -> Generator[dict[str, Any], None, None]:
    """Measures tasks that go together in a process: its document, whenever rows have joined it.

    A process that writes no row for `timeout` seconds is ended. It holds the file descriptor `lock` too, so that one
    that outlives a suite that was killed is waited for by the next. Raises `ProcessFailed`.
    """
    with tempfile.TemporaryDirectory() as folder:
        out, errors = Path(folder) / "rows.json", Path(folder) / "errors.txt"
        command = [sys.executable, *arguments(tasks), f"--out={out}", *([f"--commit={commit}"] if commit else [])]
        options = {"cwd": ROOT, "env": _environment(), "pass_fds": [lock]}
        with errors.open("wb") as stream:
            process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=stream, **options)
            with _ended(process):
                end, running, read = time.monotonic() + timeout, True, ""
                while running:
                    with contextlib.suppress(subprocess.TimeoutExpired):
                        process.wait(POLL_SECONDS)
                    running = process.poll() is None  # before its last rows are read
                    text = out.read_text(encoding="utf-8") if out.exists() else ""  # written in one piece
                    if text != read:
                        yield json.loads(text)
                        end, read = time.monotonic() + timeout, text
                    if running and time.monotonic() > end:
                        raise ProcessFailed(f"no row in {timeout:g} s (--timeout_s)")
        if process.returncode:
            raise ProcessFailed(reason(errors.read_text(errors="replace"), process.returncode))


def _environment() -> dict[str, str]:
    paths = [str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])]
    # Without jax's own words after it, the error is the last line of a traceback.
    return {**os.environ, "PYTHONPATH": os.pathsep.join(paths), "JAX_TRACEBACK_FILTERING": "off"}


@contextlib.contextmanager
def _ended(process: subprocess.Popen) -> Iterator[None]:
    """Ends the process if it is still there when this is left, however it is left."""
    try:
        yield
    finally:
        for end in (process.terminate, process.kill):
            if process.poll() is None:
                end()
                with contextlib.suppress(subprocess.TimeoutExpired):
                    process.wait(GRACE_SECONDS)


def reason(errors: str, status: int) -> str:
    """What went wrong in a process that wrote these errors and ended with that status."""
    lines = [line.strip() for line in errors.splitlines() if line.strip()]
    named = [line for line in lines if re.match(r"error: |[\w.]*(Error|Exception)\b", line)]
    said = (named or lines or ["it said nothing"])[-1].removeprefix("error: ")[:MOST_OF_A_REASON]
    return said if status > 0 else f"ended by {signal.Signals(-status).name}, maybe for want of host memory; {said}"
