"""The benchmark: what a row says of a plan that was run. No time is asserted."""

import dataclasses
import functools

import numpy as np
import pytest
import scripts
import toy

import kvrecomp
import models
from experiments import benchmark
from experiments.support.results import report
from kvrecomp.plan import GIB, PlanError
from kvrecomp.plan.named import named_plan
from kvrecomp.predict.cost import plan_costs, round_cost

WORKLOAD = kvrecomp.Workload(batch=3, prompt=11, new=13)


@functools.cache
def decoder(name):
    """Compiled once for all tests."""
    model = toy.model()
    return kvrecomp.Decoder(model, named_plan(name, model.shape, WORKLOAD, tail=4))


@pytest.mark.parametrize("name", ["activations", "device"])
def test_a_row(name, known_machine):
    plan = decoder(name).plan
    (row,) = benchmark.measure(decoder(name), "asked", None, known_machine, 2e9)
    assert (row.model, row.batch, row.prompt, row.new, row.asked, row.plan) == ("toy", 3, 11, 13, "asked", name)
    assert len(row.step_ms) == WORKLOAD.new - 1
    assert 6 <= row.programs <= 7  # prefill, write-out, shift, three layouts' steps; the next may be there already
    counted = row.step_ms[report.WARM_UP :]
    assert row.worst_ms == pytest.approx(max(counted), abs=0.01)
    assert row.median_ms == pytest.approx(np.median(counted), abs=0.01)
    assert row.predicted_ms == pytest.approx(1e3 * float(plan_costs(known_machine, [plan]).seconds[0]))
    assert row.tokens_per_second == pytest.approx(3 / row.median_ms * 1e3)
    # Half way, 11 tokens and a written-out tail or two; 21 float32 numbers each, in 2 layers.
    tokens = {"activations": 11 + 4, "device": 0}[name]
    assert row.predicted_bytes == tokens * 3 * 21 * 4 * 2
    if name == "device":
        assert row.link_efficiency is None and row.link_bytes == 0
    else:
        assert row.link_efficiency == pytest.approx(row.link_bytes / row.median_ms * 1e3 / 2e9)
    assert f"| toy | 3 | 11 | {name} | plain | {row.median_ms:.2f} |" in benchmark.table([row])


def test_some_of_the_steps(known_machine):
    """The plan is made for all of them; what is predicted is the middle of those that were run: 7 of 13 tokens, before
    the first write-out of a tail of 4."""
    plan = decoder("activations").plan
    (row,) = benchmark.measure(decoder("activations"), plan.name, None, known_machine, 2e9, steps=6)
    assert (row.new, len(row.step_ms)) == (13, 6)
    assert row.predicted_bytes == 11 * 3 * 21 * 4 * 2
    assert row.predicted_ms == pytest.approx(1e3 * float(plan_costs(known_machine, [plan], 0).seconds[0]))


def test_rows_count_weights_in_host_memory(known_machine):
    shape = toy.model().shape
    plan = kvrecomp.with_host_weights(named_plan("activations", shape, kvrecomp.Workload(2, 5, 7)), 0.5)
    assert [layer.weights for layer in plan.layers] == ["device", "host"]
    model = models.create(toy.model().config, dtype="float32", sharding=kvrecomp.placement(plan))
    (row,) = benchmark.measure(kvrecomp.Decoder(model, plan), plan.name, None, known_machine, 1e9)
    assert row.weights == "0.5"
    assert row.link_bytes == row.predicted_bytes == 5 * 2 * 21 * 4 * 2 + 4 * shape.layers[1].parameters


def test_auto_within_so_much_memory():
    budget = kvrecomp.Budget(7.0, 5.0)
    assert benchmark.read_plan("auto:2.5", budget)[:3] == ("auto:2.5", "auto", kvrecomp.Budget(2.5 * GIB, 5.0))
    for words in ("auto", "split:0.5"):
        assert benchmark.read_plan(words, budget)[:3] == (words, words, budget)


def test_what_does_not_fit_or_compile_is_said_when_its_turn_comes(known_machine, monkeypatch):
    model, plan = toy.model(), named_plan("activations", toy.model().shape, WORKLOAD)
    small = benchmark.make_decoder(model, kvrecomp.Budget(host=100), lambda: plan)
    assert isinstance(small, PlanError)
    benchmark.compile_first((small, ""))
    broken = benchmark.make_decoder(model, kvrecomp.Budget(), lambda: plan)
    monkeypatch.setattr(broken, "_trace", lambda *_: 1 / 0)
    benchmark.compile_first((broken, ""))
    with pytest.raises(ZeroDivisionError):
        benchmark.measure(broken, plan.name, None, known_machine, 2e9)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (
            ["--model=opt-175b"],
            "the weights of opt-175b need 325.15 GiB of device memory; 2.50 GiB may be used: put them",
        ),
        (
            ["--model=opt-175b", "--weights=host"],
            "the weights of opt-175b need 324.00 GiB of host memory; 3.50 GiB may",
        ),
        (["--plans=device", "--prompt=1024", "--batch=3000"], "plan device needs "),
        (["--plans=auto:0.5,device", "--model=opt-1.3b"], "opt-1.3b need 2.44 GiB of device memory; 512.0 MiB may be"),
    ],
)
def test_what_does_not_fit_is_said_before_weights_are_made(monkeypatch, words, message):
    monkeypatch.setattr(models, "create", lambda *given, **options: pytest.fail("weights are made"))
    monkeypatch.setattr(kvrecomp, "profile", lambda *given, **options: pytest.fail("the machine is measured"))
    with pytest.raises(SystemExit) as ended:
        scripts.call(benchmark, "--device_memory_gib=2.5", "--host_memory_gib=3.5", *words)
    assert message in str(ended.value) and "\n" not in str(ended.value)


def test_rounds(known_machine):
    """Of a sketch, whose drafts are made up to be right half of the time, or always: 12 tokens, three drafts a pass."""
    plan = dataclasses.replace(decoder("activations").plan, drafting=kvrecomp.Drafting("sketch", 3, codec="int4"))
    drafted = kvrecomp.Decoder(toy.model(), plan)
    given = {"drafter": "int4", "acceptance": [0.0, 0.5, 1.0]}
    never, often, always = benchmark.measure(drafted, plan.name, None, known_machine, 2e9, **given)
    assert len(always.step_ms) == 3 and always.tokens_per_pass == 4 and len(never.step_ms) == 12
    assert 1 < often.tokens_per_pass < 4 and (often.acceptance, often.drafts, often.drafter) == (0.5, 3, "int4")
    cost = round_cost(known_machine, plan)
    for row, share in ((often, 0.5), (always, 1.0)):
        assert row.ms_per_token == pytest.approx(row.median_ms / row.tokens_per_pass)
        tokens = sum(share**number for number in range(4))
        assert row.predicted_ms_per_token == pytest.approx(1e3 * (cost.check + 3 * cost.draft) / tokens)
    assert "| 3 int4 | 4.00 (1) |" in benchmark.table([always])


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--drafts=2.5"], "--drafts has '2.5'; expected a whole number from 0 to 256"),
        (["--drafts=3", "--drafters=me"], "--drafters has 'me'; expected some of fp8, int4, prompt_lookup, made_up"),
        (["--drafts=3", "--acceptance=2"], "--acceptance has '2'; expected a probability from 0 to 1"),
    ],
)
def test_what_drafts_cannot_be(words, message):
    with pytest.raises(SystemExit) as ended:
        scripts.call(benchmark, "--device_memory_gib=2.5", "--host_memory_gib=3.5", *words)
    assert message in str(ended.value) and "\n" not in str(ended.value)
