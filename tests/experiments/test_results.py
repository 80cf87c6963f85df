"""The results that the pages show, against the code as it is: the scheduler chooses what was measured as its choice."""

import dataclasses
import json
from pathlib import Path

import pytest

import models
from experiments import sweep
from experiments.support.results import tables
from experiments.support.suite import step_timing
from kvrecomp.plan import Workload
from kvrecomp.predict.hardware import HardwareProfile
from kvrecomp.predict.scheduler import make_plan

RESULTS = Path(__file__).parent.parent.parent / "experiments" / "results"
HOST = 2.0**40  # bytes: none of these plans was short of host memory


def profile_of(document):
    """What the file has of its machine. What profiles did not have then takes nothing more, or is never chosen."""
    nothing, never = {"sizes": [0, 1], "seconds": [0, 0]}, {"sizes": [0, 1], "seconds": [1e9, 1e9]}
    for times in document["profile"]["layers"]:
        work = times["work"]
        evenly = {f"uneven_{kind}": work[kind] for kind in ("absorb", "device_absorb")}
        times["work"] = {"await": nothing, "unpack": never, **evenly, **work}
        times.setdefault("positions", None)
    return HardwareProfile.from_json(document["profile"])


@pytest.mark.parametrize(
    ("file", "count"),
    [("h100_choices", 40), ("h100_choices_13b", 24), ("h200_choices", 24), ("h200_choices_again", 8)],
)
def test_what_was_chosen_is_chosen_now(file, count):
    """By the profile that was measured then, which knows nothing of uneven blocks: the same bytes cross the link.
    Profiles of OPT-6.7B with 8 and 32 rows on the H200 are not in their file."""
    profile = profile_of(json.loads((RESULTS / f"{file}.json").read_text()))
    compared = 0
    for row in tables.predicted(tables.read_file(RESULTS / f"{file}.json")):
        config = models.preset(row.model)
        shape = step_timing.with_positions(config, row.prompt + row.new).shape
        shape = dataclasses.replace(shape, dtype="bfloat16", layers=shape.layers[: row.layers])
        if not row.chosen or profile.times(shape.layers[0], shape.dtype, row.batch) is None:
            continue
        work = Workload(row.batch, row.prompt, row.new)
        budget = sweep.budget_with_room(shape, work, row.room, HOST)
        plan = make_plan(shape, work, profile, budget, weights=["device"] * len(shape.layers), tail=sweep.NEW)
        assert plan.link_bytes() == row.link_bytes, row
        compared += 1
    assert compared == count
