"""The workloads that results are quoted on, what each is measured under, and whether that fits a machine.

    w1 to w6    models of three families, and of sizes from 6.7 to 30 billion weights
    gemma       Gemma 7B, as w1
    cached      OPT-6.7B, 32 rows, against cached tokens; with w1
    batches     OPT-6.7B, 1024 tokens, against rows; with w1 (figure 6 of the paper)
    kvpr        OPT-6.7B and 13B, 64 rows; with w2 (tables 3 and 4 of the paper)
    weights     with weights in host memory, in groups: OPT-6.7B in both orders, and budgets that weights do not fit in

A `Case` becomes a `Task` for every row that is to be measured: a plan, or a peer, of experiments/peers.py. Its command
says all that its time depends on beside the machine and the commit; what is predicted depends on the layers that were
timed there before, too.
"""

import dataclasses
import itertools
import shlex
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import models
from experiments.support.peers import PEERS
from experiments.support.suite.step_timing import device_bytes_with_room
from kvrecomp.auto import plan_for
from kvrecomp.plan import AUTO, GIB, MEMORIES, Memory, ModelShape, Order, Plan, PlanError, Workload, format_bytes
from kvrecomp.plan.footprint import check_within, memory_needed
from kvrecomp.plan.named import named_plan, named_weights

BENCHMARK, PEER = "experiments/benchmark.py", "experiments/peers.py"
NEW, SOME = 32, 16  # tokens, and steps


@dataclass(frozen=True)
class Case:
    """A workload and what it is measured under: plans and peers by name, and what the scheduler chooses where the
    device may hold so many per cent of its keys and values (`rooms`), or where it has `device_gib`.

    `weights`, `groups`, `order`, `tail` and `steps` are flags of experiments/benchmark.py; the workload is that of one
    group. `quick` are those plans and peers, AUTO among them, that a short run measures. `sets` are names under which
    several workloads are asked for, beside the workload's own. Raises ValueError for what there is not.
    """

    name: str
    model: str
    batch: int
    prompt: int
    new: int = NEW
    plans: tuple[str, ...] = ()
    rooms: tuple[float, ...] = ()
    peers: tuple[str, ...] = ()
    quick: tuple[str, ...] = ()
    sets: tuple[str, ...] = ()
    weights: str = "device"
    groups: int = 1
    order: Order | None = None
    tail: int | None = None
    steps: int | None = None
    device_gib: float | None = None

    def __post_init__(self):
        for field in ("plans", "rooms", "peers", "quick", "sets"):
            object.__setattr__(self, field, tuple(getattr(self, field)))  # JSON has no tuples
        shape, work = models.preset(self.model).shape, self.work
        if work.new < 2:
            raise ValueError(f"{self.name}: new is {work.new}; the first comes with the prompt: ask for 2 or more")
        for plan in self.plans:
            if plan != AUTO:
                named_plan(plan, shape, Workload(1, 1, 1))  # a name that there is; it may yet not fit
        if self.weights != AUTO:
            named_weights(self.weights, len(shape.layers))
        if self.groups < 1 or self.order not in (None, "row", "column"):
            raise ValueError(
                f"{self.name}: {self.groups} groups in {self.order} order; expected 1 or more, row or column"
            )
        if wrong := [room for room in self.rooms if room < 0]:
            raise ValueError(f"{self.name}: there is no room for {wrong[0]:g} %; expected 0 or more")
        for field in ("tail", "steps"):
            if (value := getattr(self, field)) is not None and value < 1:
                raise ValueError(f"{self.name}: {field} is {value}; expected 1 or more")
        if self.peers and (self.groups, self.weights) != (1, "device"):
            raise ValueError(f"{self.name}: peers have one group, and their weights on the device: leave them out")
        if unknown := [peer for peer in self.peers if peer not in PEERS]:
            raise ValueError(f"{self.name}: there is no peer {unknown[0]!r}; there are {', '.join(PEERS)}")
        measured = (*self.plans, *self.peers, *([AUTO] if self.rooms else []))
        if unknown := [each for each in self.quick if each not in measured]:
            raise ValueError(f"{self.name}: quick has {unknown[0]!r}; expected some of {', '.join(measured)}")

    @property
    def work(self) -> Workload:
        """Rows, prompt and new tokens."""
        return Workload(self.batch, self.prompt, self.new)


# What needs the most host memory comes first, of plans and of workloads: pinning takes longer than anything else, and
# what is pinned for one in a process serves the next. Of KVPR's splits, three quarters was the best of five on an H200.
HOSTED = ("keys_values", "kvpr:0.75", "activations")
PLANS = (*HOSTED, "device")
BOTH = ("huggingface", "huggingface_offloaded")
OFFLOADED = ("huggingface_offloaded",)
# Where activations are half of the bytes, a quarter of K and V is half of the cache.
NONE, HALF, QUARTER = (0.0,), (50.0,), (25.0,)

# Half of a plan's steps say what one takes, but not of a peer, whose first ones are slow.
CASES = (
    Case("w1", "opt-6.7b", 32, 1024, NEW, PLANS, QUARTER, BOTH, (*PLANS, AUTO, *BOTH), ("cached", "batches")),
    Case("w2", "opt-6.7b", 64, 512, NEW, HOSTED, (), OFFLOADED, sets=("kvpr",), steps=SOME),
    Case("w3", "opt-13b", 32, 1024, NEW, PLANS, QUARTER, OFFLOADED, steps=SOME),
    Case("w4", "llama-2-7b", 32, 1024, NEW, PLANS, QUARTER, BOTH, steps=SOME),
    # Activations are twice as many bytes as K and V here: 69 GB, whose pinning alone would take a minute.
    Case("w5", "llama-3-8b", 64, 4096, NEW, ("keys_values", "device"), HALF, OFFLOADED, steps=SOME),
    Case("w6", "opt-30b", 16, 1024, NEW, PLANS, QUARTER, OFFLOADED, steps=SOME),
    # Heads wider than their share of the hidden size: activations are three eighths of the bytes of K and V.
    Case("gemma", "gemma-7b", 32, 1024, NEW, ("keys_values", "activations", "device"), NONE, steps=SOME),
    *(
        Case(f"cached-{prompt}", "opt-6.7b", 32, prompt, NEW, PLANS, (), BOTH, quick, ("cached",), steps=SOME)
        for prompt, quick in (
            (1984, ("activations", "keys_values", *OFFLOADED)),
            (512, ()),
            (128, ("activations", "keys_values", *OFFLOADED)),
        )
    ),
    *(
        Case(f"batch-{batch}", "opt-6.7b", batch, 1024, NEW, HOSTED, sets=("batches",), steps=SOME)
        for batch in (48, 8, 1)
    ),
    # 8 GiB of device memory have room for the tails of K and V, and for little else.
    *(
        Case(
            f"weights-{prompt}-{order}",
            "opt-6.7b",
            32,
            prompt,
            plans=("keys_values", AUTO) if order == "column" else (AUTO,),
            quick=(AUTO,) if (prompt, order) == (256, "column") else (),
            sets=("weights",),
            weights="host",
            groups=8,
            order=order,
            tail=NEW,
            steps=SOME,
            device_gib=8,
        )
        for prompt in (512, 256)
        for order in ("column", "row")
    ),
    *(
        Case(
            f"weights-{size}-{gib}",
            model,
            32,
            256,
            plans=(AUTO,),
            sets=("weights",),
            weights=AUTO,
            groups=8,
            device_gib=gib,
        )
        for size, model, gib in (("6.7b", "opt-6.7b", 16), ("30b", "opt-30b", 40))
    ),
    *(
        Case(
            name=f"kvpr-{size}-{prompt}-{new}",
            model=f"opt-{size}",
            batch=64,
            prompt=prompt,
            new=new,
            plans=HOSTED,
            # The paper gains most after 128 tokens, with 128 new ones, which take a peer minutes after more.
            peers=OFFLOADED if prompt == 128 or new == 32 else (),
            sets=("kvpr",),
            steps=new // 2,
        )
        for new in (32, 128)
        for size in ("6.7b", "13b")
        for prompt in (512, 256, 128)
        if (size, prompt, new) != ("6.7b", 512, 32)  # which is w2
    ),
    # Beside table 4's, what the scheduler makes of the memory of the paper's card.
    *(
        Case(f"kvpr-13b-{prompt}-auto", "opt-13b", 64, prompt, plans=(AUTO,), sets=("kvpr",), steps=SOME, device_gib=40)
        for prompt in (512, 256, 128)
    ),
)


def select(cases: Sequence[Case], names: Sequence[str]) -> list[Case]:
    """The workloads of these names or sets, all if there is no name, in their order.

    Raises:
        ValueError: a name of nothing.
    """
    known = list(dict.fromkeys(name for case in cases for name in (*case.sets, case.name)))
    if unknown := [name for name in names if name not in known]:
        raise ValueError(f"there is no workload {unknown[0]!r}; there are {', '.join(known)}")
    return [case for case in cases if not names or {case.name, *case.sets} & {*names}]


# --- rows to measure --------------------------------------------------------------------------------------------------


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
    def chosen_by(self) -> str:
        """The flag that its script has for `asked`."""
        return "peer" if self.peer else "plans"

    @property
    def command(self) -> str:
        """What measures this row alone."""
        return shlex.join(["python", *arguments([self])])

    def __str__(self) -> str:
        room = "" if self.room is None else f" with room for {self.room:g} %"
        return f"{self.case.name} {self.plan}{room}"


def arguments(tasks: Sequence[Task]) -> list[str]:
    """Script and flags of a process that measures tasks which `processes` puts together."""

    def several(values: Iterable[Any]) -> str:
        return ",".join(dict.fromkeys(map(str, values)))

    batches, prompts = several(task.case.batch for task in tasks), several(task.case.prompt for task in tasks)
    plans = several(task.asked for task in tasks)
    return [*tasks[0].settings, f"--batch={batches}", f"--prompt={prompts}", f"--{tasks[0].chosen_by}={plans}"]


def processes(tasks: Iterable[Task]) -> list[list[Task]]:
    """The tasks by the process that measures them, in the order in which it does; each peer has its own.

    Workloads of one model that differ in their rows alone, or in their prompts, are in one, under the same plans: it
    makes weights and pins host memory once for all of them.
    """
    made: list[list[list[Task]]] = []  # of each process the tasks of each workload
    for _, group in itertools.groupby(tasks, lambda task: (task.case, task.settings, task.peer and task.asked)):
        own = list(group)
        fitting = [others for others in made if _one_command([*others, own])]
        if fitting:
            fitting[0].append(own)
        else:
            made.append([own])
    return [[task for own in each for task in own] for each in made]


def _one_command(of_each: Sequence[Sequence[Task]]) -> bool:
    """Whether one command measures these tasks of each workload, and nothing else."""
    cases = [tasks[0].case for tasks in of_each]
    alike = {(tasks[0].settings, tuple(task.asked for task in tasks)) for tasks in of_each}
    batches, prompts = {case.batch for case in cases}, {case.prompt for case in cases}
    return len(alike) == 1 and len(batches) * len(prompts) == len(cases)


def make_tasks(
    cases: Sequence[Case], peers: Sequence[str], quick: bool, dtype: str, host_gib: float | None
) -> list[Task]:
    """The rows of the workloads, in their order."""
    tasks = [task for case in cases for task in _tasks_of(case, peers, dtype, host_gib)]
    return [task for task in tasks if not quick or task.plan in task.case.quick]


def _tasks_of(case: Case, peers: Sequence[str], dtype: str, host_gib: float | None) -> Iterator[Task]:
    common = [f"--model={case.model}", f"--new={case.new}", f"--dtype={dtype}"]
    own = [BENCHMARK, *common, *([] if case.steps is None else [f"--steps={case.steps}"])]
    own += [] if host_gib is None else [f"--host_memory_gib={host_gib:g}"]
    own += [] if case.weights == "device" else [f"--weights={case.weights}"]
    own += [] if case.groups == 1 else [f"--groups={case.groups}"]
    own += [] if case.order is None else [f"--order={case.order}"]
    own += [] if case.tail is None else [f"--tail={case.tail}"]
    own += [] if case.device_gib is None else [f"--device_memory_gib={case.device_gib:g}"]
    own += [] if case.rooms or AUTO in case.plans else ["--notime_layers"]  # timed, they help to predict others too
    for plan in case.plans:
        yield Task(case, plan, plan, tuple(own))
    for room in case.rooms:
        yield Task(case, AUTO, f"{AUTO}:{device_bytes(case, dtype, room) / GIB:.6f}", tuple(own), room)
    for peer in case.peers:
        if peer in peers:
            yield Task(case, peer, peer, (PEER, *common))


def shape_of(case: Case, dtype: str) -> ModelShape:
    """The sizes of its model, with weights and cache of that type."""
    return dataclasses.replace(models.preset(case.model).shape, dtype=dtype)


def device_bytes(case: Case, dtype: str, room: float) -> float:
    """Device memory with room for so many per cent of the workload's keys and values."""
    return device_bytes_with_room(planned(case, "keys_values", dtype), planned(case, "device", dtype), room)


def planned(case: Case, name: str, dtype: str) -> Plan:
    """The plan of that name for the workload; where AUTO says where weights are, it has them on the device."""
    shape = shape_of(case, dtype)
    weights = None if case.weights == AUTO else named_weights(case.weights, len(shape.layers))
    return plan_for(name, shape, case.work, weights=weights, groups=case.groups, order=case.order, tail=case.tail)


# --- what fits --------------------------------------------------------------------------------------------------------


def check_fits(task: Task, dtype: str, allowed: Mapping[Memory, float]) -> None:
    """Raises `PlanError`, with sizes, if a task needs more bytes than are allowed."""
    case = task.case
    if task.peer:
        needed = PEERS[task.plan].memory_needed(shape_of(case, dtype), case.work)
    elif task.plan == AUTO:
        given = allowed["device"] if case.device_gib is None else case.device_gib * GIB
        needed = _least_needed(case, dtype, given if task.room is None else device_bytes(case, dtype, task.room))
    else:
        return check_within(planned(case, task.plan, dtype), allowed)
    for place in MEMORIES:
        if needed[place] > allowed[place]:
            raise PlanError(
                f"{task} needs about {format_bytes(needed[place])} of {place} memory; {format_bytes(allowed[place])} "
                "may be used"
            )


def _least_needed(case: Case, dtype: str, device: float) -> dict[Memory, float]:
    """What any plan needs that uses so many bytes of the device, or more if it has to: all in the smaller form, and in
    host memory only what has no room, weights too where AUTO may put them there."""
    plans = [planned(case, name, dtype) for name in ("activations", "keys_values")]
    needed = memory_needed(min(plans, key=lambda plan: plan.bytes_in("host")))
    least = {place: float(sum(needed[place].values())) for place in MEMORIES}
    device = device if case.weights == AUTO else max(device, least["device"])
    return {"device": device, "host": max(0.0, least["host"] - (device - least["device"]))}
