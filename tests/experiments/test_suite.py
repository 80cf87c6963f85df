"""The suite: which workloads there are, what fits, how it goes on, and that one failure is not the end of the rest.

Most tests have a program in the place of experiments/benchmark.py that measures nothing, so that they are fast.
"""

import dataclasses
import functools
import io
import itertools
import json
import math
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import scripts
import toy
from rich.console import Console

import kvrecomp
import models
from experiments import suite
from experiments.support.paper import numbers as paper
from experiments.support.peers import PEERS
from experiments.support.results import tables
from experiments.support.suite import process
from experiments.support.suite.cases import CASES, Case, read_cases, select
from experiments.support.suite.machine import Machine
from experiments.support.suite.results import Results
from experiments.support.suite.tasks import arguments, make_tasks, processes
from kvrecomp.plan import GIB
from kvrecomp.plan.named import named_plan
from kvrecomp.predict.hardware import HardwareProfile

ABOUT = {"device": "Some GPU", "driver": "5.6", "jax": "0.1", "commit": "abc", "versions": {}, "command": "python x.py"}
PLENTY = {"device": 2.0**40, "host": 2.0**40}
HERE = Machine(ABOUT, PLENTY, PLENTY, {})
# Writes a row for each plan. With some plans it fails, is killed, says nothing, or hangs the first time.
BENCHMARK = """
import itertools, json, os, pathlib, signal, sys, time
given = dict(word[2:].partition("=")[::2] for word in sys.argv[1:])
log, rows = pathlib.Path(__file__).with_name("benchmark.log"), []
plans = given["plans"].split(",") if "plans" in given else [given["peer"]]  # one peer, as peers.py has it
for batch, prompt, plan in itertools.product(given["batch"].split(","), given["prompt"].split(","), plans):
    with log.open("a") as file:
        file.write(f"{plan} {os.getpid()}\\n")
    if plan == "split:0.1":
        print("Traceback:\\n  x = 1\\njaxlib.XlaRuntimeError: RESOURCE_EXHAUSTED\\nFor simplicity ...", file=sys.stderr)
        sys.exit(1)
    if plan == "split:0.2":
        os.kill(os.getpid(), signal.SIGKILL)
    if plan == "split:0.3":
        sys.exit(0)
    if plan == "split:0.4" and log.read_text().count(plan) == 1:
        time.sleep(float(given["new"]))
        sys.exit(1)
    sizes = {"model": given["model"], "batch": int(batch), "prompt": int(prompt), "new": int(given["new"])}
    name = plan.partition(":")[0] if plan.startswith("auto") else plan
    rows.append({**sizes, "asked": plan, "plan": name, "median_ms": 7.0, "link_bytes": 0, "link_efficiency": None})
    beside = pathlib.Path(given["out"] + ".partial")
    beside.write_text(json.dumps({"copy_gbps": 50.0, "rows": rows}))
    os.replace(beside, given["out"])
"""


@pytest.fixture
def benchmark(tmp_path, monkeypatch):
    """Where that program is; it keeps a log beside it."""
    program = tmp_path / "program" / "benchmark.py"
    program.parent.mkdir()
    program.write_text(BENCHMARK)
    monkeypatch.setattr("experiments.support.suite.tasks.BENCHMARK", str(program))
    return program


def log_of(program: Path) -> list[str]:
    """The plans that the program was at."""
    log = program.with_suffix(".log")
    return [line.split()[0] for line in log.read_text().splitlines()] if log.exists() else []


def processes_of(program: Path) -> set[str]:
    """Those that the program ran in."""
    return {line.split()[1] for line in program.with_suffix(".log").read_text().splitlines()}


def small(*plans, name="small", new=3, **more) -> Case:
    return Case(name, "opt-125m", 2, 5, new, plans, **more)


def with_prompts(case: Case, *prompts: int) -> list[Case]:
    """The workload with other prompts, of which each has the name."""
    return [dataclasses.replace(case, name=str(prompt), prompt=prompt) for prompt in prompts]


def tasks_of(*cases, peers=(), quick=False, host_gib=None):
    return make_tasks(cases, peers, quick, "bfloat16", host_gib)


def measured(tasks, results, out=None, **options) -> None:
    """As the command does it."""
    out = out or console()
    with suite.alone(results.path.parent, out) as lock:
        suite.measure(tasks, results, out, lock, **options)


def left_to_measure(tasks, results, machine=HERE) -> list:
    return suite.to_measure(tasks, results, machine, "bfloat16")


def console() -> Console:
    return Console(file=io.StringIO(), width=200)


def results_at(path, **about) -> Results:
    return Results(path, ABOUT | about)


@pytest.fixture
def results(tmp_path) -> Results:
    return results_at(tmp_path / "a.json")


def read(results: Results) -> dict:
    """What is in the file."""
    return json.loads(results.path.read_text())


# --- the workloads ----------------------------------------------------------------------------------------------------


def sizes(cases) -> set:
    return {(case.model, case.batch, case.prompt, case.new) for case in cases}


def test_workloads_of_the_paper_are_those_of_its_tables():
    """With its own schedule, and what the paper compares it with."""
    tables_of_it = [paper.read().table(name) for name in ("Table 3", "Table 4")]
    cases = select(CASES, ["kvpr"])
    assert sizes(cases) == sizes(row.setting for table in tables_of_it for row in table.rows)
    assert all({"kvpr:0.75", "keys_values"} < {*case.plans} for case in cases if case.device_gib is None)
    assert {peer for case in cases for peer in case.peers} == {table.peer for table in tables_of_it}
    figure = sizes(row.setting for row in paper.read().table("Figure 6 (batches)").rows)
    assert sizes(select(CASES, ["batches"])) < figure


def test_ours_has_the_memory_of_the_papers_card():
    """So that what it measures is set beside table 4's (`paper_costs.is_of`)."""
    table = paper.read().table("Table 4")
    card = paper.read().machines[table.machine].device_bytes
    ours = [case for case in select(CASES, ["kvpr"]) if case.device_gib is not None]
    assert sizes(ours) == {size for size in sizes(row.setting for row in table.rows) if size[3] == 32}
    assert all(case.plans == ("auto",) and 0.9 * card < case.device_gib * GIB < 1.1 * card for case in ours)


def test_every_plan_has_the_positions_that_it_needs():
    for case in CASES:
        for plan in {"device", *case.plans} - {"auto"}:
            named_plan(plan, models.preset(case.model).shape, case.workload)


def test_weights_do_not_fit_in_the_budgets_that_are_for_that():
    for case in [case for case in CASES if case.weights == "auto"]:
        shape, budget = models.preset(case.model).shape, kvrecomp.Budget.of_gib(case.device_gib, 1000)
        profile = HardwareProfile.from_datasheet("h200")
        plan = kvrecomp.make_plan(shape, case.workload, profile, budget, groups=case.groups)
        # OPT-6.7B's do fit in 16 GiB, with the cache's activations in host memory.
        least = 0 if case.device_gib == 16 else 1
        assert least <= plan.host_weight_bytes < shape.parameters * shape.itemsize / 2


def test_workloads_by_name_and_by_set():
    names = [case.name for case in select(CASES, ["w5", "cached"])]
    assert names == ["w1", "w5", "cached-1984", "cached-512", "cached-128"]
    assert select(CASES, []) == list(CASES)
    with pytest.raises(ValueError, match=r"there is no workload 'w7'; there are cached, batches, w1, kvpr, w2, w3"):
        select(CASES, ["w1", "w7"])


def test_a_short_run_measures_some_rows_by_the_same_commands():
    every = tasks_of(*CASES, peers=PEERS)
    quick = tasks_of(*CASES, peers=PEERS, quick=True)
    assert 10 < len(quick) < len(every) / 5
    assert {task.command for task in quick} < {task.command for task in every}
    assert {"auto", "kvpr:0.75", "huggingface_offloaded"} < {task.plan for task in quick}
    assert {task.plan for task in tasks_of(*CASES)} & {*PEERS} == set()


def test_a_command_measures_one_row():
    case = small("activations", "split:0.5", rooms=[50], peers=["huggingface"], steps=2)
    first, second, room, peer = tasks_of(case, peers=["huggingface"], host_gib=7.5)
    common, sizes = "--model=opt-125m --new=3 --dtype=bfloat16", "--batch=2 --prompt=5"
    ours = f"python experiments/benchmark.py {common} --steps=2 --host_memory_gib=7.5 {sizes}"
    assert first.command == f"{ours} --plans=activations" and second.command == f"{ours} --plans=split:0.5"
    assert peer.command == f"python experiments/peers.py {common} {sizes} --peer=huggingface"
    assert [task.peer for task in (room, first, peer)] == [False, False, True]
    (alone,) = tasks_of(small("activations"))
    assert alone.command == f"python experiments/benchmark.py {common} --notime_layers {sizes} --plans=activations"
    # 2 rows of 5 tokens, K and V of 768 numbers of 2 bytes, in 12 layers: half of them beside what else is needed.
    given = float(room.command.partition("--plans=auto:")[2]) * GIB
    plan = named_plan("keys_values", models.preset("opt-125m").shape, kvrecomp.Workload(2, 5, 3))
    needed = sum(kvrecomp.memory_needed(plan)["device"].values())
    assert given == pytest.approx(needed + 2 * 5 * 2 * 768 * 2 * 12 / 2, abs=GIB / 1000)
    assert str(room) == "small auto with room for 50 %" and str(first) == "small activations"
    (grouped,) = tasks_of(small("auto", weights="auto", groups=3, order="column", tail=7, steps=5, device_gib=16))
    flags = "--steps=5 --weights=auto --groups=3 --order=column --tail=7 --device_memory_gib=16"
    assert grouped.command == f"python experiments/benchmark.py {common} {flags} {sizes} --plans=auto"


def test_workloads_that_differ_in_rows_or_in_prompts_go_together():
    """A process measures every plan under every batch and prompt of its command: what it is not asked for is not in
    it, and neither is a workload twice."""
    plans = "activations", "device"
    more = (("b", 5, 4), ("c", 7, 4), ("d", 7, 2), ("rows", 5, 3), ("again", 5, 2))
    first = Case("a", "opt-125m", 2, 5, 3, plans, peers=("huggingface",))
    cases = [
        first,
        *(dataclasses.replace(first, name=name, prompt=prompt, batch=batch) for name, prompt, batch in more),
        small("device", name="one plan"),
        Case("another model", "opt-350m", 2, 11, 3, plans),
        small(*plans, name="more tokens", new=4),
        small(*plans, name="some steps", steps=1),
    ]
    made = processes(tasks_of(*cases, peers=["huggingface"]))
    assert sorted(map(str, itertools.chain(*made))) == sorted(map(str, tasks_of(*cases, peers=["huggingface"])))
    said = [dict(word.partition("=")[::2] for word in arguments(tasks) if "=" in word) for tasks in made]
    sizes = [(words["--batch"], words["--prompt"], words.get("--plans", "a peer")) for words in said]
    both = "activations,device"
    assert sizes[:4] == [("2,4,3", "5", both), ("2,4,3", "5", "a peer"), ("4,2", "7", both), ("4,2", "7", "a peer")]
    assert sizes[4:6] == [("2", "5", both), ("2", "5", "a peer")]  # again
    assert sizes[6:] == [("2", "5", "device"), ("2", "11", both), ("2", "5", both), ("2", "5", both)]
    for tasks, words in zip(made, said, strict=True):
        asked = itertools.product(words["--batch"].split(","), words["--prompt"].split(","))
        measured_sizes = [(str(task.case.batch), str(task.case.prompt)) for task in tasks]
        assert list(dict.fromkeys(measured_sizes)) == list(asked)  # in the order in which they are measured


FINE = {"name": "a", "model": "opt-125m", "batch": 2, "prompt": 5, "plans": ["device"]}


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"plans": ["activation"]}, "there is no plan 'activation'"),
        ({"peers": ["somebody"]}, "there is no peer 'somebody'; there are huggingface, huggingface_offloaded"),
        ({"quick": ["auto"]}, "quick has 'auto'; expected some of device"),
        ({"model": "opt-125"}, "unknown model 'opt-125'"),
        ({"new": 1}, "new is 1"),
        ({"batch": 0}, "batch is 0"),
        ({"weights": "gpu"}, "weights 'gpu': expected device, host"),
        ({"steps": 0}, "a: steps is 0; expected a whole number from 1 on, or null"),
        ({"rooms": [-5]}, r"a: rooms is \(-5,\); expected a list, each a number from 0 on"),
        ({"tail": -1}, "a: tail is -1; expected a whole number from 1 on, or null"),
        ({"groups": 0}, "a: groups is 0; expected a whole number from 1 on"),
        ({"groups": 2, "peers": ["huggingface"]}, "a: peers have one group, and their weights on the device"),
        ({"plan": []}, "'plan' is no field; .*objects with name, model, batch"),
        ({"batch": "eight"}, "batch is 'eight'; expected a whole number from 1 on; expected a JSON list"),
        ({"batch": True}, "batch is True; expected a whole number"),
        ({"prompt": 5.5}, "prompt is 5.5; expected a whole number"),
        ({"plans": "device"}, "plans is 'device'; expected a list, each a text"),
        ({"rooms": [50, "half"]}, r"rooms is \(50, 'half'\); expected a list, each a number"),
        ({"rooms": [math.nan]}, r"rooms is \(nan,\); expected a list, each a number from 0 on"),
        ({"rooms": [math.inf]}, r"rooms is \(inf,\); expected a list, each a number from 0 on"),
        ({"device_gib": -1}, "device_gib is -1; expected a number from 0 on, or null"),
        ({"device_gib": math.nan}, "device_gib is nan; expected a number from 0 on, or null"),
        ({"device_gib": "16"}, "device_gib is '16'; expected a number from 0 on, or null"),
        ({"order": "rows"}, "order is 'rows'; expected 'row' or 'column' or null"),
        ({"model": None}, "model is None; expected a text"),
    ],
)
def test_mistakes_in_workloads_of_a_file(tmp_path, given, message):
    path = tmp_path / "mine.json"
    path.write_text(json.dumps([FINE | given]))
    with pytest.raises(ValueError, match=message):
        read_cases(path)


def test_workloads_of_a_file(tmp_path):
    path = tmp_path / "mine.json"
    path.write_text(json.dumps([FINE]))
    assert read_cases(path) == (Case("a", "opt-125m", 2, 5, 32, ("device",)),)
    for missing in ("name", "model", "batch", "prompt"):
        path.write_text(json.dumps([{name: value for name, value in FINE.items() if name != missing}]))
        with pytest.raises(ValueError, match=f"mine.json: a.* has no {missing}; expected"):
            read_cases(path)
    for content, message in (
        (["a"], "'a' is no object"),
        ([FINE, FINE], "has two workloads 'a'"),
        ([], "it is an empty list"),
        ({}, "it is dict"),
    ):
        path.write_text(json.dumps(content))
        with pytest.raises(ValueError, match=message):
            read_cases(path)


# --- what fits --------------------------------------------------------------------------------------------------------


# 32 rows of 1024 and 32: 12 GiB of weights, 16.5 GiB of keys and values, 8 GiB of activations, of a group. What a step
# needs counts for AUTO as well, but for the device memory that it may use.
W1 = dataclasses.replace(CASES[0], plans=("auto", "activations", "device"), rooms=(50.0, 10.0), quick=())
GROUPS = Case("w1", "opt-6.7b", 32, 1024, 32, ("auto", "activations"), groups=2, device_gib=1, weights="host")
CHOSEN = dataclasses.replace(GROUPS, weights="auto")


@pytest.mark.parametrize(
    ("case", "plan", "room", "device", "host", "message"),
    [
        (W1, "activations", None, 40, 1, r"plan activations needs 8.00 GiB of host memory .*1.00 GiB may be used"),
        (W1, "device", None, 12, 100, r"plan device needs .* of device memory .*12.00 GiB may be used"),
        (W1, "auto", 50.0, 12, 100, r"room for 50 % needs about 24.\d* GiB of device memory; 12.00 GiB may be used"),
        (W1, "auto", 10.0, 40, 6, r"room for 10 % needs about 6.\d* GiB of host memory; 6.00 GiB may be used"),
        (W1, "auto", None, 12, 100, r"w1 auto needs about 16.\d* GiB of device memory; 12.00 GiB may be used"),
        (W1, "auto", None, 17, 7, r"w1 auto needs about 7.\d* GiB of host memory; 7.00 GiB may be used"),
        (W1, "huggingface", None, 12, 100, r"w1 huggingface needs about 33.15 GiB of device memory; 12.00 GiB may"),
        (W1, "huggingface_offloaded", None, 40, 10, r"w1 huggingface_offloaded needs about 76.80 GiB of host memory"),
        (GROUPS, "activations", None, 40, 20, r"needs 28.00 GiB of host memory \(weights 12.00 GiB, blocks 16.00"),
        (CHOSEN, "auto", None, 40, 30, r"auto needs about 31.\d* GiB of host memory; 30.00 GiB may be used"),
    ],
)
def test_what_does_not_fit_is_left_out_with_a_reason(results, case, plan, room, device, host, message):
    (task,) = [task for task in tasks_of(case, peers=PEERS) if (task.plan, task.room) == (plan, room)]
    allowed = {"device": device * GIB, "host": host * GIB}
    here = dataclasses.replace(HERE, **{"peers_allowed" if task.peer else "allowed": allowed})
    assert left_to_measure([task], results, here) == []
    (note,) = read(results)["skipped"]
    assert (note["workload"], note["plan"], note["room"]) == ("w1", plan, room)
    assert re.search(message, note["reason"]), note["reason"]
    assert left_to_measure([task], results) == [task]
    results.note("failed", task, "it tried")  # which it had not before
    assert read(results)["skipped"] == []


def test_what_cannot_be_run_is_left_out(results):
    (task,) = tasks_of(small("device", new=2045))
    assert left_to_measure([task], results) == []
    assert "need 2050 positions; opt-125m has 2048" in results.noted("skipped", task)
    (task,) = tasks_of(small(peers=["huggingface"]), peers=PEERS)
    assert left_to_measure([task], results, dataclasses.replace(HERE, unavailable={"huggingface": "no torch"})) == []
    assert results.noted("skipped", task) == "no torch"


def test_neither_the_suite_nor_a_peer_starts_a_backend_of_jax():
    """Which would keep three quarters of a GPU's memory from the processes that measure: of the machine it asks another
    process."""
    code = """if True:
        import dataclasses, json
        from experiments import peers, suite
        from kvrecomp.run import memory
        if __name__ == "__main__":
            found = suite.look(["huggingface"], 3.5, "abc")
            for task in suite.make_tasks(suite.CASES[:1], list(suite.PEERS), False, "bfloat16", None):
                suite.check_fits(task, "bfloat16", {"device": 2.0**40, "host": 2.0**40})
            peers.run_info(device="Some GPU"), peers.versions()
            print(json.dumps(dataclasses.asdict(found)))
            raise SystemExit(memory.backend_started())
    """
    environment = {**os.environ, "PYTHONPATH": str(process.ROOT)}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    found = Machine(**json.loads(done.stdout))
    assert found.about["commit"] == "abc" and found.about["jax"] == found.about["versions"]["jax"]
    assert found.allowed["host"] == 3.5 * GIB and found.allowed["device"] > 0
    assert not found.unavailable or "not installed" in found.unavailable["huggingface"]


# --- measuring --------------------------------------------------------------------------------------------------------


def test_rows_have_the_names_and_the_commands_of_their_tasks(benchmark, results):
    tasks = tasks_of(small("activations", "device", rooms=[25.0, 50.0]), small("activations", name="other"))
    assert [task.key for task in tasks[1:4]] == [
        ("small", "device", None),
        ("small", "auto", 25.0),
        ("small", "auto", 50.0),
    ]
    out = console()
    measured(tasks, results, out)
    document = read(results)
    assert {name: document[name] for name in ABOUT} == ABOUT and document["copy_gbps"] == 50.0
    assert [(row["workload"], row["plan"], row["room"]) for row in document["rows"]] == [task.key for task in tasks]
    assert [row["command"] for row in document["rows"]] == [task.command for task in tasks]
    assert len({task.asked for task in tasks}) == 4
    assert all(0 <= row["seconds"] < 60 for row in document["rows"])  # to a tenth of a second
    assert document["skipped"] == document["failed"] == []
    rows = tables.read_file(results.path)  # as the README does
    assert all(row["commit"] == "abc" and row["copy_gbps"] == 50.0 and row["off"] is None for row in rows)
    assert suite.show(tasks, results, out) == [] and "small device: 7.0 ms a step" in out.file.getvalue()
    assert len(processes_of(benchmark)) == 2


def test_rows_that_come_together_share_what_they_took(results):
    tasks = tasks_of(small("activations", "device", "split:0.5"))
    rows = [{"asked": plan, "plan": plan, "batch": 2, "prompt": 5} for plan in ("activations", "device")]
    assert [row["seconds"] for row in results.take(tasks, {"rows": rows}, 7.0).values()] == [3.5, 3.5]


def test_each_peer_has_a_process_of_its_own(benchmark, results, monkeypatch):
    peer = shutil.copy(benchmark, benchmark.with_name("peers.py"))
    monkeypatch.setattr("experiments.support.suite.tasks.PEER", str(peer))
    tasks = tasks_of(small("device", peers=[*PEERS]), peers=PEERS)
    measured(tasks, results)
    assert log_of(benchmark) == ["device", *PEERS] and len(processes_of(benchmark)) == 3
    assert all(results.row(task) for task in tasks) and read(results)["failed"] == []


def test_what_fails_is_not_the_end_of_the_rest(benchmark, results):
    plans = "activations", "split:0.1", "device", "split:0.2", "split:0.3"
    tasks, out = tasks_of(small(*plans), small("device", name="other")), console()
    measured(tasks, results, out)
    assert log_of(benchmark) == [*plans, "device"] and len(processes_of(benchmark)) == 4
    document = read(results)
    rows = [(row["workload"], row["plan"]) for row in document["rows"]]
    assert rows == [("small", "activations"), ("small", "device"), ("other", "device")]
    assert {note["plan"]: note["reason"] for note in document["failed"]} == {
        "split:0.1": "jaxlib.XlaRuntimeError: RESOURCE_EXHAUSTED",
        "split:0.2": "ended by SIGKILL, maybe for want of host memory; it said nothing",
        "split:0.3": "its process ended without the row",
    }
    assert suite.show(tasks, results, out) == ["small split:0.1", "small split:0.2", "small split:0.3"]
    assert "failed: small split:0.1: jaxlib" in out.file.getvalue()


def test_a_process_that_hangs_is_ended(benchmark, results):
    """Once it has begun, at the latest; a busy machine may take a while to start it."""
    tasks = tasks_of(small("split:0.4", new=600))
    measured(tasks, results, timeout=1)
    assert results.noted("failed", tasks[0]) == "no row in 1 s (--timeout_s)"
    assert not log_of(benchmark) or not running(benchmark)


def test_a_process_may_take_its_time_for_every_row(benchmark, results, monkeypatch):
    """By a clock that goes on by four seconds with each."""
    slow = benchmark.read_text().replace("    with log.open", "    time.sleep(0.4)\n    with log.open")
    benchmark.write_text(slow + "time.sleep(0.4)\n")
    clock = SimpleNamespace(monotonic=lambda: 4.0 * len(log_of(benchmark)))
    monkeypatch.setattr(process, "time", clock)
    tasks = tasks_of(small("activations", "device", "split:0.5"))
    measured(tasks, results, timeout=10)
    assert all(results.row(task) for task in tasks) and len(processes_of(benchmark)) == 1


def test_a_process_does_not_outlive_an_interrupted_suite(benchmark, results, monkeypatch):
    def interrupt(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(results, "write", interrupt)
    with pytest.raises(KeyboardInterrupt):
        measured(tasks_of(small("activations", "split:0.4", new=600)), results)
    assert not running(benchmark)


def running(benchmark: Path) -> bool:
    """Whether the last process of the program is there."""
    pid = int(benchmark.with_suffix(".log").read_text().split()[-1])
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    return True


# --- going on ---------------------------------------------------------------------------------------------------------


def test_what_is_measured_is_not_measured_again(benchmark, results):
    path, tasks = results.path, tasks_of(small("activations", "split:0.1", "device"))
    measured(tasks[:1], results)
    results = results_at(path)
    left = left_to_measure(tasks, results)
    assert left == tasks[1:]
    measured(left, results)
    assert left_to_measure(tasks, results_at(path)) == [tasks[1]]  # what failed is tried again
    again = results_at(path, commit="def")
    assert left_to_measure(tasks, again) == tasks
    by_another_command = tasks_of(small("activations", "device"), host_gib=7.0)
    assert left_to_measure(by_another_command, results_at(path)) == by_another_command
    # Rows of another commit stay until they are measured anew.
    measured(tasks[:1], again)
    assert [(row["plan"], row["commit"]) for row in read(again)["rows"]] == [("activations", "def"), ("device", "abc")]


DRIVER = """
import sys
from absl import flags
from experiments import suite
from experiments.support.suite import tasks
from experiments.support.suite.machine import Machine
tasks.BENCHMARK, about, *words = sys.argv[1:]
plenty = {"device": 2.0**40, "host": 2.0**40}
suite.look = lambda *_: Machine(eval(about), plenty, plenty, {})
values = flags.FlagValues()
suite.define_flags(values)
values(["suite", *words])
suite.main(values)
"""


def test_killed_it_goes_on(benchmark, tmp_path):
    """Killed at the second plan; its process is there for a while yet, which the next suite waits for."""
    waits = benchmark.with_name("waits")  # what the second plan's process waits for, the first time
    hanging = "while not log.with_name('waits').exists(): time.sleep(0.02)"
    benchmark.write_text(benchmark.read_text().replace('time.sleep(float(given["new"]))', hanging))
    mine, path = tmp_path / "mine.json", tmp_path / "results" / "a.json"
    case = small("activations", "split:0.4", "device", new=2)
    mine.write_text(json.dumps([dataclasses.asdict(case)]))
    words = [sys.executable, "-c", DRIVER, str(benchmark), repr(ABOUT), f"--workloads={mine}", f"--out={path}"]
    environment = {**os.environ, "PYTHONPATH": str(process.ROOT)}
    with subprocess.Popen(words, cwd=process.ROOT, env=environment) as first:
        while "split:0.4" not in log_of(benchmark) or not path.exists():
            assert first.poll() is None
            time.sleep(0.02)
        first.send_signal(signal.SIGKILL)
    tasks, results, out = tasks_of(case), results_at(path), console()
    print_out = out.print
    out.print = lambda *words, **options: (print_out(*words, **options), waits.touch())  # it is said, then it ends
    measured(left_to_measure(tasks, results), results, out)
    assert out.file.getvalue().startswith(f"waiting for another suite with results in {path.parent}")
    assert log_of(benchmark) == ["activations", "split:0.4", "split:0.4", "device"]
    assert [row["plan"] for row in read(results)["rows"]] == ["activations", "split:0.4", "device"]


def test_files_of_others_are_left_alone(benchmark, results):
    path = results.path
    measured(tasks_of(small("activations")), results)
    for name, message in (("device", "device is Some GPU there and other here"), ("versions", "versions is {} there")):
        with pytest.raises(ValueError, match=message):
            results_at(path, **{name: "other"})
    torn = path.read_text()[:-20]
    for text in ('{"rows": [{"plan": "a"}]}', "[]", '{"device": "x"}', torn):
        path.write_text(text)
        with pytest.raises(ValueError, match=r"a\.json is not a file of this suite"):
            results_at(path)
        assert path.read_text() == text


# --- the command ------------------------------------------------------------------------------------------------------


@pytest.fixture
def command(monkeypatch):
    """The script in this process, on a machine that has plenty of memory."""
    monkeypatch.setattr(suite, "look", lambda *_: HERE)
    before = signal.getsignal(signal.SIGTERM)
    yield functools.partial(scripts.call, suite)
    signal.signal(signal.SIGTERM, before)


def test_the_exit_status_says_what_failed(benchmark, command, tmp_path, capsys):
    mine = tmp_path / "mine.json"
    mine.write_text(json.dumps([dataclasses.asdict(small("activations", "split:0.1"))]))
    with pytest.raises(SystemExit, match=r"error: 1 of 2 rows failed: small split:0.1"):
        command(f"--workloads={mine}", f"--out={tmp_path}/a.json")
    said = capsys.readouterr().out
    assert "Some GPU: 2 rows, of which 2 are to be measured" in said and "OPT-125M" in said
    benchmark.write_text(BENCHMARK.replace("split:0.1", "never"))
    command(f"--workloads={mine}", f"--out={tmp_path}/a.json")
    assert "of which 1 are to be measured" in capsys.readouterr().out


def test_results_of_a_device_have_its_name(benchmark, command, tmp_path, monkeypatch):
    names = {"NVIDIA H200": "h200", "NVIDIA A100-SXM4-40GB": "a100_sxm4_40gb", "Tesla T4": "tesla_t4", "cpu": "cpu"}
    assert {device: suite.default_name(device) for device in names} == {
        device: f"{name}_suite.json" for device, name in names.items()
    }
    (tmp_path / "mine.json").write_text(json.dumps([dataclasses.asdict(small("device"))]))
    (tmp_path / "results").mkdir()
    monkeypatch.chdir(tmp_path / "results")
    command(f"--workloads={tmp_path}/mine.json")
    assert [path.name for path in (tmp_path / "results").iterdir()] == ["some_gpu_suite.json"]


def test_with_the_benchmark_itself(results, tmp_path, monkeypatch):
    """A toy model on this machine, with two prompts in the process that the suite starts, and rows as the README reads
    them."""
    program = tmp_path / "benchmark.py"
    program.write_text(
        f"import runpy, sys; sys.path.insert(0, {str(Path(toy.__file__).parent)!r})\n"
        "import models, toy, dataclasses; models.PRESETS['toy'] = dataclasses.replace(toy.OPT, layers=1)\n"
        "from kvrecomp.measure import machine\n"
        "machine.copy_rate = lambda *_, **__: 5e9  # or gigabytes would be copied\n"
        "from kvrecomp.run import memory\n"
        "def limit(needed):\n"
        f"    open({str(tmp_path / 'limit')!r}, 'w').write(f'{{needed}} {{memory.backend_started()}}')\n"
        "memory.limit_pinned = limit\n"
        f"runpy.run_path({str(process.ROOT / 'experiments/benchmark.py')!r}, run_name='__main__')\n"
    )
    monkeypatch.setattr("experiments.support.suite.tasks.BENCHMARK", str(program))
    monkeypatch.setitem(models.PRESETS, "toy", toy.OPT)
    cases = with_prompts(Case("toy", "toy", 3, 11, 7, ("keys_values",)), 11, 5)
    tasks, out = make_tasks(cases, [], False, "float32", 1.0), console()
    measured(tasks, results, out)
    assert suite.show(tasks, results, out) == []
    rows = tables.read_file(results.path)
    assert [(row["workload"], row["prompt"]) for row in rows] == [("11", 11), ("5", 5)]
    for row in rows:
        expected = ("keys_values", row["prompt"] * 3 * 42 * 4, 5.0)
        assert (row["plan"], row["link_bytes"], row["copy_gbps"]) == expected
        assert len(row["step_ms"]) == 6 and row["off"] is not None
    assert (tmp_path / "limit").read_text() == f"{2.0 * GIB} False"  # for the rate of copies; what is cached is less
