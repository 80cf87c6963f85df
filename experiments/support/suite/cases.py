"""The workloads that results are quoted on, and what each is measured under: cases.json.

w1 to w6    models of three families, and of sizes from 6.7 to 30 billion weights
gemma       Gemma 7B, as w1
cached      OPT-6.7B, 32 rows, against cached tokens; with w1
batches     OPT-6.7B, 1024 tokens, against rows; with w1 (figure 6 of the paper)
kvpr        OPT-6.7B and 13B, 64 rows; with w2 (tables 3 and 4 of the paper)
weights     with weights in host memory, in groups: OPT-6.7B in both orders, and budgets that weights do not fit in

What needs the most host memory comes first, of plans and of cases: pinning takes longer than anything else, and what is
pinned for one in a process serves the next. Of KVPR's splits, three quarters was the best of five on an H200. Of w5,
activations are twice its keys and values: pinning 69 GB alone would take a minute. Where activations are half of the
bytes, room for a quarter of keys and values is room for half of the cache.

Half of a plan's steps say what one takes, but not of a peer, whose first ones are slow. The paper (kvpr) gains most
after 128 tokens, with 128 new ones, which take a peer minutes after more; beside its table 4, what the scheduler makes
of the memory of its card. With weights in the host, 8 GiB of the device have room for the tails of K and V, and for
little else.
"""

import dataclasses
import json
import math
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from experiments.support.peers import PEERS

import models
from kvrecomp.plan import AUTO, Order, Workload
from kvrecomp.plan.named import named_plan, named_weights

NEW = 32  # tokens


def _is_count(value: Any) -> bool:
    return type(value) is int and value >= 1


def _is_size(value: Any) -> bool:
    return type(value) in (int, float) and 0 <= value < math.inf


# What a field of such a type has to be, and whether a value is that: of JSON, too.
KINDS: dict[Any, tuple[str, Callable[[Any], bool]]] = {
    str: ("a text", lambda value: isinstance(value, str)),
    int: ("a whole number from 1 on", _is_count),
    int | None: ("a whole number from 1 on, or null", lambda value: value is None or _is_count(value)),
    float | None: ("a number from 0 on, or null", lambda value: value is None or _is_size(value)),
    Order | None: ("'row' or 'column' or null", lambda value: value in ("row", "column", None)),
    tuple[str, ...]: (
        "a list, each a text",
        lambda value: isinstance(value, tuple) and all(isinstance(item, str) for item in value),
    ),
    tuple[float, ...]: (
        "a list, each a number from 0 on",
        lambda value: isinstance(value, tuple) and all(map(_is_size, value)),
    ),
}


@dataclass(frozen=True)
class Case:
    """A workload and what it is measured under: plans and peers by name, and what the scheduler chooses where the
    device may hold so many per cent of its keys and values (`rooms`), or where it has `device_gib`.

    `sets` are names under which several cases are asked for, beside the case's own. `steps`, `weights`, `groups`,
    `order` and `tail` are flags of experiments/benchmark.py; the workload is that of one group. `quick` are those plans
    and peers, AUTO among them, that a short run measures. Raises ValueError for what there is not.
    """

    name: str
    model: str
    batch: int
    prompt: int
    new: int = NEW
    plans: tuple[str, ...] = ()
    rooms: tuple[float, ...] = ()
    peers: tuple[str, ...] = ()
    sets: tuple[str, ...] = ()
    steps: int | None = None
    quick: tuple[str, ...] = ()
    weights: str = "device"
    groups: int = 1
    order: Order | None = None
    tail: int | None = None
    device_gib: float | None = None

    def __post_init__(self):
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            value = tuple(value) if isinstance(value, list) else value  # JSON has no tuples
            object.__setattr__(self, field.name, value)
            expected, is_one = KINDS[field.type]
            if not is_one(value):
                raise ValueError(f"{self.name}: {field.name} is {value!r}; expected {expected}")
        if self.new < 2:
            raise ValueError(f"{self.name}: new is {self.new}; the first comes with the prompt: ask for 2 or more")
        shape = models.preset(self.model).shape
        for plan in self.plans:
            if plan != AUTO:
                named_plan(plan, shape, Workload(1, 1, 1))  # a name that there is; it may yet not fit
        if self.weights != AUTO:
            named_weights(self.weights, len(shape.layers))
        if self.peers and (self.groups, self.weights) != (1, "device"):
            raise ValueError(f"{self.name}: peers have one group, and their weights on the device: leave them out")
        if unknown := [peer for peer in self.peers if peer not in PEERS]:
            raise ValueError(f"{self.name}: there is no peer {unknown[0]!r}; there are {', '.join(PEERS)}")
        measured = (*self.plans, *self.peers, *([AUTO] if self.rooms else []))
        if unknown := [name for name in self.quick if name not in measured]:
            raise ValueError(f"{self.name}: quick has {unknown[0]!r}; expected some of {', '.join(measured)}")

    @property
    def workload(self) -> Workload:
        """Rows, prompt and new tokens."""
        return Workload(self.batch, self.prompt, self.new)


def select(cases: Sequence[Case], names: Sequence[str]) -> list[Case]:
    """The cases of these names or sets, all if there is no name, in their order; ValueError for a name of nothing."""
    known = list(dict.fromkeys(name for case in cases for name in (*case.sets, case.name)))
    if unknown := [name for name in names if name not in known]:
        raise ValueError(f"there is no workload {unknown[0]!r}; there are {', '.join(known)}")
    return [case for case in cases if not names or {case.name, *case.sets} & {*names}]


def read_cases(path: str | os.PathLike) -> tuple[Case, ...]:
    """The cases of a file: a JSON list of objects with the fields of `Case`.

    Raises ValueError where it is no such list, or has a name twice, and OSError.
    """
    try:
        given = json.loads(Path(path).read_text(encoding="utf-8"))
        if not isinstance(given, list) or not given:
            raise ValueError(f"it is {'an empty list' if given == [] else type(given).__name__}")
        cases = tuple(map(_read_case, given))
    except (ValueError, RecursionError) as error:
        fields = ", ".join(field.name for field in dataclasses.fields(Case))
        raise ValueError(f"{path}: {error}; expected a JSON list of objects with {fields}") from error
    names = [case.name for case in cases]
    if doubled := [name for name in names if names.count(name) > 1]:
        raise ValueError(f"{path} has two workloads {doubled[0]!r}: each needs a name of its own")
    return cases


def _read_case(given: Any) -> Case:
    """The case of an object of JSON. Raises ValueError for fields that are missing or unknown, and as `Case`."""
    if not isinstance(given, dict):
        raise ValueError(f"{given!r} is no object")
    fields = {field.name: field.default for field in dataclasses.fields(Case)}
    for name in given:
        if name not in fields:
            raise ValueError(f"{name!r} is no field")
    for name, default in fields.items():
        if name not in given and default is dataclasses.MISSING:
            raise ValueError(f"{given.get('name', 'a workload')} has no {name}")
    return Case(**given)


CASES = read_cases(Path(__file__).with_name("cases.json"))
