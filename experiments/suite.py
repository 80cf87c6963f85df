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

For a smaller machine write workloads of your own, as in experiments/support/suite/cases.json; `cases.Case` has the
fields:

    [{"name": "small", "model": "opt-125m", "batch": 2, "prompt": 64, "new": 8, "plans": ["activations", "device"]}]
"""

import collections
import contextlib
import fcntl
import os
import re
import signal
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from experiments.support import script
from experiments.support.peers import PEERS
from experiments.support.results import tables, terminal
from experiments.support.results.report import command
from experiments.support.suite.cases import CASES, read_cases, select
from experiments.support.suite.machine import Machine, look
from experiments.support.suite.process import ProcessFailed, run_process
from experiments.support.suite.results import Results
from experiments.support.suite.tasks import Task, check_fits, make_tasks, processes

from absl import flags
from rich.console import Console

from kvrecomp.files import check_writable
from kvrecomp.run import memory
from models.checkpoint import DTYPES

TIMEOUT = 1200.0
PLAIN: dict[str, Any] = {"markup": False, "highlight": False, "soft_wrap": True}  # how lines with names are printed


def define_flags(into: flags.FlagValues) -> None:
    define = script.Define(into)
    define.boolean("quick", False, "Measure the few rows that say most.")
    define.list("only", [], "Workloads, or sets of them, by name; default: all.")
    define.list("peers", list(PEERS), "Other programs to measure; --peers= for none.")
    define.string("workloads", None, "JSON file of workloads of your own, in place of ours.")
    define.string("out", None, "The results file; default: one in this folder, by the name of the device.")
    define.enum("dtype", "bfloat16", list(DTYPES), "Of all.")
    define.host_memory()
    define.number("timeout_s", TIMEOUT, "Most seconds from row to row.", lower_bound=1)
    define.string("commit", "", "Recorded as the commit, where git cannot be asked.")


def to_measure(tasks: Sequence[Task], results: Results, machine: Machine, dtype: str) -> list[Task]:
    """The tasks that are not measured yet, can be run here and fit; why others are not is noted in the results."""
    left = []
    for task in tasks:
        if results.row(task) is not None:
            continue
        why = machine.unavailable.get(task.plan, "") if task.peer else ""
        try:
            check_fits(task, dtype, machine.peers_allowed if task.peer else machine.allowed)
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
    """Measures the tasks, in processes as `tasks.processes` has them, and says what came of each.

    Where a process fails, the task that it was at has failed, and those after it are tried in a new one. `lock` is what
    `alone` gives.
    """
    waiting = collections.deque(processes(tasks))
    with console.status("") as status:
        while waiting:
            left = waiting.popleft()
            why = "its process ended without the row"
            try:
                began = time.monotonic()
                status.update(f"{left[0]}; {sum(map(len, waiting), len(left))} rows are left")
                with contextlib.closing(run_process(left, commit, timeout, lock)) as documents:
                    for document in documents:
                        new = results.take(left, document, time.monotonic() - began)
                        began = time.monotonic() if new else began
                        left = [task for task in left if task not in new]
                        if left:
                            status.update(f"{left[0]}; {sum(map(len, waiting), len(left))} rows are left")
                        for task, row in new.items():
                            console.print(f"{task}: {row['median_ms']:.1f} ms a step", **PLAIN)
            except ProcessFailed as error:
                why = str(error)
            if left:
                task = left.pop(0)
                results.note("failed", task, why)
                console.print(f"{task}: failed: {why}", **PLAIN)
                waiting.extendleft(reversed(processes(left)))


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
        terminal.show(console, tables.benchmark([results.about | row for row in rows]))
        seconds = [row["seconds"] for row in rows if "seconds" in row]
        console.print(f"{len(seconds)} rows took {sum(seconds):.0f} s")
    failed = []
    for task in tasks:
        for kind in ("skipped", "failed"):
            if why := results.noted(kind, task):
                console.print(f"{kind}: {task}: {why}", **PLAIN)
                failed += [str(task)] if kind == "failed" else []
    return failed


def default_name(device: str) -> str:
    """The file of the results of a device: those of an NVIDIA H200 are in h200_suite.json."""
    return re.sub(r"[^a-z0-9]+", "_", device.lower().removeprefix("nvidia ")).strip("_") + "_suite.json"


def main(given: flags.FlagValues) -> None:
    if memory.GIVEN_LIMIT is None:  # each process finds out itself what is free when it starts
        os.environ.pop(memory.LIMIT_VARIABLE, None)
    signal.signal(signal.SIGTERM, lambda number, _: sys.exit(128 + number))  # so that a process is not left behind
    console = terminal.standard_output()
    if unknown := [name for name in given.peers if name not in PEERS]:
        raise ValueError(f"--peers: there is no peer {unknown[0]!r}; there are {', '.join(PEERS)}")
    cases = select(read_cases(given.workloads) if given.workloads else CASES, given.only)
    tasks = make_tasks(cases, given.peers, given.quick, given.dtype, given.host_memory_gib)
    if not tasks:
        raise ValueError("--quick leaves nothing of --only: ask for other workloads, or leave one of the flags out")
    folder = Path(given.out).parent if given.out else Path()
    check_writable(given.out or folder / default_name(""))  # before anything is measured
    with alone(folder, console) as lock:
        machine = look(given.peers, given.host_memory_gib, given.commit)
        path = given.out or folder / default_name(machine.about["device"])
        results = Results(path, machine.about | {"command": command()})
        left = to_measure(tasks, results, machine, given.dtype)
        console.print(f"{machine.about['device']}: {len(tasks)} rows, of which {len(left)} are to be measured")
        measure(left, results, console, lock, given.commit, given.timeout_s)
    failed = show(tasks, results, console)
    console.print(f"written to {results.path}", **PLAIN)
    if failed:
        sys.exit(f"error: {len(failed)} of {len(tasks)} rows failed: {', '.join(failed)}")


if __name__ == "__main__":
    script.run(main, define_flags)
