"""Rows to measure: of every case one `Task` a plan and a peer, the process that measures it, and whether it fits.

A task's command says all that its time depends on beside the machine and the commit; what is predicted depends on the
layers that were timed there before, too.
"""

import dataclasses
import itertools
import shlex
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from experiments.support.peers import PEERS
from experiments.support.suite.cases import Case
from experiments.support.suite.step_timing import device_bytes_with_room

import models
from kvrecomp.auto import plan_for
from kvrecomp.plan import AUTO, GIB, MEMORIES, Memory, ModelShape, Plan, PlanError, format_bytes
from kvrecomp.plan.footprint import check_within, memory_needed
from kvrecomp.plan.named import named_weights

BENCHMARK, PEER = "experiments/benchmark.py", "experiments/peers.py"


@dataclass(frozen=True)
class Task:
    """A row to measure: `plan` is a plan's name or a peer's, `asked` what its script is given for it, `settings` that
    script and its other flags but for batch and prompt.
    """

    case: Case
    plan: str
    asked: str
    settings: tuple[str, ...]
    room: float | None = None

    @property
    def peer(self) -> bool:
        """Whether it is somebody else's program."""
        return self.settings[0] == PEER

    @property
    def key(self) -> tuple[str, str, float | None]:
        """What its row is found by in a results file: workload, plan and room."""
        return self.case.name, self.plan, self.room

    @property
    def command(self) -> str:
        """What measures this row alone."""
        return shlex.join(["python", *arguments([self])])

    def __str__(self) -> str:
        room = "" if self.room is None else f" with room for {self.room:g} %"
        return f"{self.case.name} {self.plan}{room}"


def make_tasks(
    cases: Sequence[Case], peers: Sequence[str], quick: bool, dtype: str, host_gib: float | None
) -> list[Task]:
    """The rows of the cases, in their order."""
    tasks = [task for case in cases for task in _tasks_of(case, peers, dtype, host_gib)]
    return [task for task in tasks if not quick or task.plan in task.case.quick]


def _tasks_of(case: Case, peers: Sequence[str], dtype: str, host_gib: float | None) -> Iterator[Task]:
    common = (f"--model={case.model}", f"--new={case.new}", f"--dtype={dtype}")
    unlike_default = {
        "steps": case.steps,
        "host_memory_gib": host_gib,
        "weights": None if case.weights == "device" else case.weights,
        "groups": None if case.groups == 1 else case.groups,
        "order": case.order,
        "tail": case.tail,
        "device_memory_gib": case.device_gib,
    }
    settings = [BENCHMARK, *common]
    for name, value in unlike_default.items():
        if value is not None:
            settings.append(f"--{name}={value:g}" if isinstance(value, float) else f"--{name}={value}")
    if not case.rooms and AUTO not in case.plans:
        settings.append("--notime_layers")  # timed, they help to predict others too
    for plan in case.plans:
        yield Task(case, plan, plan, tuple(settings))
    for room in case.rooms:
        yield Task(case, AUTO, f"{AUTO}:{device_bytes(case, dtype, room) / GIB:.6f}", tuple(settings), room)
    for peer in case.peers:
        if peer in peers:
            yield Task(case, peer, peer, (PEER, *common))


def arguments(tasks: Sequence[Task]) -> list[str]:
    """Script and flags of a process that measures tasks which `processes` puts together."""

    def joined(values: Iterable[Any]) -> str:
        return ",".join(dict.fromkeys(map(str, values)))

    batches, prompts = joined(task.case.batch for task in tasks), joined(task.case.prompt for task in tasks)
    asked = joined(task.asked for task in tasks)
    flag = "peer" if tasks[0].peer else "plans"
    return [*tasks[0].settings, f"--batch={batches}", f"--prompt={prompts}", f"--{flag}={asked}"]


def processes(tasks: Iterable[Task]) -> list[list[Task]]:
    """The tasks by the process that measures them, in the order in which it does; each peer has its own.

    Workloads of one model that differ in their rows alone, or in their prompts, are in one, under the same plans: it
    makes weights and pins host memory once for all of them.
    """
    made: list[list[list[Task]]] = []  # of each process the tasks of each workload
    for _, group in itertools.groupby(tasks, lambda task: (task.case, task.settings, task.peer and task.asked)):
        of_workload = list(group)
        for process in made:
            if _one_command([*process, of_workload]):
                process.append(of_workload)
                break
        else:
            made.append([of_workload])
    return [list(itertools.chain(*process)) for process in made]


def _one_command(workloads: Sequence[Sequence[Task]]) -> bool:
    """Whether one command measures these tasks of each workload, and nothing else."""
    cases = [tasks[0].case for tasks in workloads]
    alike = {(tasks[0].settings, tuple(task.asked for task in tasks)) for tasks in workloads}
    batches, prompts = {case.batch for case in cases}, {case.prompt for case in cases}
    return len(alike) == 1 and len(batches) * len(prompts) == len(cases)


def shape_of(case: Case, dtype: str) -> ModelShape:
    """The sizes of its model, with weights and cache of that type."""
    return dataclasses.replace(models.preset(case.model).shape, dtype=dtype)


def planned(case: Case, name: str, dtype: str) -> Plan:
    """The plan of that name for the workload; where AUTO says where weights are, it has them on the device."""
    shape = shape_of(case, dtype)
    weights = None if case.weights == AUTO else named_weights(case.weights, len(shape.layers))
    return plan_for(name, shape, case.workload, weights=weights, groups=case.groups, order=case.order, tail=case.tail)


def device_bytes(case: Case, dtype: str, room: float) -> float:
    """Device memory with room for so many per cent of the workload's keys and values."""
    return device_bytes_with_room(planned(case, "keys_values", dtype), planned(case, "device", dtype), room)


def check_fits(task: Task, dtype: str, allowed: Mapping[Memory, float]) -> None:
    """Raises `PlanError`, with sizes, if a task needs more bytes than are allowed."""
    case = task.case
    if task.peer:
        needed = PEERS[task.plan].memory_needed(shape_of(case, dtype), case.workload)
    elif task.plan == AUTO:
        given = allowed["device"] if case.device_gib is None else case.device_gib * GIB
        needed = _least_needed(case, dtype, given if task.room is None else device_bytes(case, dtype, task.room))
    else:
        return check_within(planned(case, task.plan, dtype), allowed)
    for memory in MEMORIES:
        if needed[memory] > allowed[memory]:
            raise PlanError(
                f"{task} needs about {format_bytes(needed[memory])} of {memory} memory; "
                f"{format_bytes(allowed[memory])} may be used"
            )


def _least_needed(case: Case, dtype: str, device: float) -> dict[Memory, float]:
    """What any plan needs that uses so many bytes of the device, or more if it has to: all in the smaller form, and in
    host memory only what has no room, weights too where AUTO may put them there."""
    plans = [planned(case, name, dtype) for name in ("activations", "keys_values")]
    needed = memory_needed(min(plans, key=lambda plan: plan.bytes_in("host")))
    least = {memory: float(sum(needed[memory].values())) for memory in MEMORIES}
    device = device if case.weights == AUTO else max(device, least["device"])
    return {"device": device, "host": max(0.0, least["host"] - (device - least["device"]))}
