"""Measures the workloads of the suite under our plans and other programs, into a file a machine.

    python experiments/suite.py --quick
    python experiments/suite.py --only=w1,w5 --peers=huggingface_offloaded
    python experiments/suite.py --workloads=mine.json --out=mine_results.json

Our plans are measured by experiments/benchmark.py, and each peer by experiments/peers.py, in processes of their own:
one for the workloads of a model that differ in batch or prompt alone. What does not fit the machine is left out, and
what fails does not end the rest: the file says why, as `skipped` and `failed`, and a failure is the exit status. The
file is written after every row: killed, the same command goes on. A row is measured anew for another commit, or where
its own `command`, which measures it alone, would be another. Rows that were not asked for stay in the file, with the
commit that they were measured at.

For a smaller machine write workloads of your own, a JSON list of objects with the fields of `workloads.Case`:

    [{"name": "small", "model": "opt-125m", "batch": 2, "prompt": 64, "new": 8, "plans": ["activations", "device"]}]
"""

import collections
import contextlib
import fcntl
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

from absl import flags
from rich.console import Console
from rich.markdown import Markdown
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from experiments.support import script
from experiments.support.peers import PEERS
from experiments.support.results import tables
from experiments.support.results.report import command
from experiments.support.suite import cases as workloads
from experiments.support.suite.cases import CASES, Task
from experiments.support.suite.machine import Machine, look
from experiments.support.suite.own_workloads import read_cases
from experiments.support.suite.results import Results
from kvrecomp.run import memory
from models.checkpoint import DTYPES

ROOT = Path(__file__).parent.parent
RESULTS = ROOT / "experiments" / "results"
POLL_SECONDS = 0.2
GRACE_SECONDS = 20  # for a process that was told to end
MOST_OF_A_REASON = 400  # characters
TIMEOUT = 1200.0


def define_flags(into: flags.FlagValues) -> None:
    """Called by the script only."""
    flags.DEFINE_bool("quick", False, "Measure the few rows that say most.", flag_values=into)
    flags.DEFINE_list("only", [], "Workloads, or sets of them, by name; default: all.", flag_values=into)
    flags.DEFINE_list("peers", list(PEERS), "Other programs to measure; --peers= for none.", flag_values=into)
    flags.DEFINE_string("workloads", None, "JSON file of workloads of your own, in place of ours.", flag_values=into)
    flags.DEFINE_string("out", None, "The results file; default: with ours, by the device.", flag_values=into)
    flags.DEFINE_enum("dtype", "bfloat16", list(DTYPES), "Of all.", flag_values=into)
    flags.DEFINE_float("host_memory_gib", None, "Host memory to use; default: what is free.", flag_values=into)
    flags.DEFINE_float("timeout_s", TIMEOUT, "Most seconds from row to row.", lower_bound=1, flag_values=into)
    flags.DEFINE_string("commit", "", "Recorded as the commit, where git cannot be asked.", flag_values=into)


# --- one process ------------------------------------------------------------------------------------------------------


class ProcessFailed(Exception):
    """A process did not do all that it was asked for; the message says why."""


def run_process(tasks: Sequence[Task], commit: str, timeout: float, lock: int) -> Generator[dict[str, Any], None, None]:
    """Measures tasks that go together in a process: its document, whenever rows have joined it.

    A process that writes no row for `timeout` seconds is ended.

    The process holds the file descriptor `lock` too, so that one that outlives this, which was killed, is waited for
    by whoever comes next. Raises `ProcessFailed`.
    """
    with tempfile.TemporaryDirectory() as folder:
        out, errors = Path(folder) / "rows.json", Path(folder) / "errors.txt"
        given = [sys.executable, *workloads.arguments(tasks), f"--out={out}"]
        given += [f"--commit={commit}"] if commit else []
        told = {"cwd": ROOT, "env": _environment(), "pass_fds": [lock]}
        with errors.open("wb") as stream:
            process = subprocess.Popen(given, stdout=subprocess.DEVNULL, stderr=stream, **told)
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


# --- all of them ------------------------------------------------------------------------------------------------------


def to_measure(tasks: Sequence[Task], results: Results, machine: Machine, dtype: str) -> list[Task]:
    """The tasks that are not measured yet, can be run here and fit; why others are not is noted in the results."""
    left = []
    for task in tasks:
        if results.row(task) is not None:
            continue
        why = machine.unavailable.get(task.plan, "") if task.peer else ""
        try:
            workloads.check_fits(task, dtype, machine.peers_allowed if task.peer else machine.allowed)
        except ValueError as error:  # a PlanError: too large, or more tokens than the model has positions
            why = why or str(error)
        if why:
            results.note("skipped", task, why)
        else:
            left.append(task)
    return left


def measure(
    tasks: Sequence[Task], results: Results, console: Console, lock: int, commit: str = "", timeout: float = TIMEOUT
) -> None:
    """Measures the tasks, in processes as `workloads.processes` has them, and says what came of each.

    Where a process fails, the task that it was at has failed, and those after it are tried in a new one. `lock` is what
    `alone` gives.
    """
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    bar = Progress(*columns, console=console, transient=True, disable=not console.is_terminal)
    with bar:
        shown = bar.add_task("", total=len(tasks))
        waiting = collections.deque(workloads.processes(tasks))
        while waiting:
            left = waiting.popleft()
            bar.update(shown, description=str(left[0]))
            why = "its process ended without the row"
            try:
                began = time.monotonic()
                with contextlib.closing(run_process(left, commit, timeout, lock)) as documents:
                    for document in documents:
                        new = results.take(left, document, time.monotonic() - began)
                        began = time.monotonic() if new else began
                        left = [task for task in left if task not in new]
                        bar.update(shown, advance=len(new), description=str(left[0]) if left else "")
                        for task, row in new.items():
                            console.print(f"{task}: {row['median_ms']:.1f} ms a step", highlight=False)
            except ProcessFailed as error:
                why = str(error)
            if left:
                task = left.pop(0)
                results.note("failed", task, why)
                bar.update(shown, advance=1)
                console.print(f"{task}: failed: {why}", markup=False, highlight=False)
                waiting.extendleft(reversed(workloads.processes(left)))


@contextlib.contextmanager
def alone(folder: Path, console: Console) -> Iterator[int]:
    """Waits for other suites with results in the folder, and for a process that a killed one left behind, which may
    have all of the GPU's memory; then makes others wait. Gives a file descriptor, which processes inherit."""
    folder.mkdir(parents=True, exist_ok=True)
    lock = os.open(folder, os.O_RDONLY)
    try:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            console.print(f"waiting for another suite with results in {folder}, or a process that one left behind")
            fcntl.flock(lock, fcntl.LOCK_EX)
        yield lock
    finally:
        os.close(lock)


def show(tasks: Sequence[Task], results: Results, console: Console) -> list[str]:
    """Prints what was measured, and what was not; returns what failed."""
    rows = [row for row in map(results.row, tasks) if row is not None]
    if rows:
        console.print(Markdown(tables.benchmark(rows)))
        seconds = [row["seconds"] for row in rows if "seconds" in row]
        console.print(f"{len(seconds)} rows took {sum(seconds):.0f} s")
    failed = []
    for task in tasks:
        for kind in ("skipped", "failed"):
            if why := results.noted(kind, task):
                console.print(f"{kind}: {task}: {why}", markup=False, highlight=False)
                failed += [str(task)] if kind == "failed" else []
    return failed


# --- the command ------------------------------------------------------------------------------------------------------


def default_name(device: str) -> str:
    """The file of the results of a device: those of an NVIDIA H200 are in h200_suite.json."""
    return re.sub(r"[^a-z0-9]+", "_", device.lower().removeprefix("nvidia ")).strip("_") + "_suite.json"


def main(given: flags.FlagValues) -> None:
    """Unpacks the flags."""
    if memory.GIVEN_LIMIT is None:  # each process finds out itself what is free when it starts
        os.environ.pop(memory.LIMIT_VARIABLE, None)
    signal.signal(signal.SIGTERM, lambda number, _: sys.exit(128 + number))  # so that a process is not left behind
    console = Console(width=None if sys.stdout.isatty() else 150)
    if unknown := [name for name in given.peers if name not in PEERS]:
        raise ValueError(f"--peers: there is no peer {unknown[0]!r}; there are {', '.join(PEERS)}")
    cases = workloads.select(read_cases(given.workloads) if given.workloads else CASES, given.only)
    tasks = workloads.make_tasks(cases, given.peers, given.quick, given.dtype, given.host_memory_gib)
    if not tasks:
        raise ValueError("--quick leaves nothing of --only: ask for other workloads, or leave one of the flags out")
    folder = Path(given.out).parent if given.out else RESULTS
    with alone(folder, console) as lock:
        machine = look(given.peers, given.host_memory_gib, given.commit)
        path = given.out or folder / default_name(machine.about["device"])
        results = Results(path, machine.about | {"command": command()})
        if results.set_aside:
            console.print(f"{path} could not be read: it is {results.set_aside.name} now, and all is measured anew")
        left = to_measure(tasks, results, machine, given.dtype)
        console.print(f"{machine.about['device']}: {len(tasks)} rows, of which {len(left)} are to be measured")
        measure(left, results, console, lock, given.commit, given.timeout_s)
    failed = show(tasks, results, console)
    console.print(f"written to {results.path}")
    if failed:
        sys.exit(f"error: {len(failed)} of {len(tasks)} rows failed: {', '.join(failed)}")


if __name__ == "__main__":
    script.run(main, define_flags)
