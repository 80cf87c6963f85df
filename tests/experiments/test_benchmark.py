"""The benchmark: what a row says of a plan that was run. No time is asserted."""

import io

import numpy as np
import pytest
import toy
from rich.console import Console

import kvrecomp
import models
from experiments import benchmark
from experiments.support.results import report
from kvrecomp.plan import GIB, PlanError
from kvrecomp.plan.named import named_plan
from kvrecomp.predict.cost import plan_costs

WORK = kvrecomp.Workload(batch=3, prompt=11, new=13)


@pytest.mark.parametrize("name", ["activations", "device"])
def test_a_row(name, known_machine):
    model = toy.model()
    plan = named_plan(name, model.shape, WORK, tail=4)
    row = benchmark.measure(kvrecomp.Decoder(model, plan), "asked", None, known_machine, 2e9)
    assert (row.model, row.batch, row.prompt, row.new, row.asked, row.plan) == ("toy", 3, 11, 13, "asked", name)
    assert len(row.step_ms) == WORK.new - 1
    assert 5 <= row.programs <= 6  # prefill, write-out, three layouts' steps; the next may be there already
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


def test_some_of_the_steps(known_machine):
    """The plan is made for all of them; what is predicted is the middle of those that were run: 7 of 13 tokens, before
    the first write-out of a tail of 4."""
    model = toy.model()
    plan = named_plan("activations", model.shape, WORK, tail=4)
    row = benchmark.measure(kvrecomp.Decoder(model, plan), plan.name, None, known_machine, 2e9, steps=6)
    assert (row.new, len(row.step_ms)) == (13, 6)
    assert row.predicted_bytes == 11 * 3 * 21 * 4 * 2
    assert row.predicted_ms == pytest.approx(1e3 * float(plan_costs(known_machine, [plan], 0).seconds[0]))


def test_auto_within_so_much_memory():
    budget = kvrecomp.Budget(7.0, 5.0)
    assert benchmark.within("auto:2.5", budget) == ("auto", kvrecomp.Budget(2.5 * GIB, 5.0))
    assert benchmark.within("auto", budget) == ("auto", budget)
    assert benchmark.within("split:0.5", budget) == ("split:0.5", budget)
    for wrong in ("half", "", "0", "-1", "nan", "inf", "1e9"):
        with pytest.raises(
            ValueError, match=rf"--plans has 'auto:{wrong}'; expected auto:F, with F GiB of device memory, more"
        ):
            benchmark.within(f"auto:{wrong}", budget)


def test_what_does_not_fit_is_said_when_its_turn_comes():
    model = toy.model()
    decoder = benchmark.make_decoder(model, kvrecomp.Budget(), lambda: named_plan("activations", model.shape, WORK))
    small = benchmark.make_decoder(model, kvrecomp.Budget(host=100), lambda: decoder.plan)
    assert decoder.plan.name == "activations" and isinstance(small, PlanError)
    benchmark.compile_first(small)


def test_what_cannot_be_compiled_is_said_when_its_turn_comes(known_machine, monkeypatch):
    plan = named_plan("activations", toy.model().shape, WORK)
    decoder = kvrecomp.Decoder(toy.model(), plan)
    monkeypatch.setattr(decoder, "_trace", lambda *_: 1 / 0)
    benchmark.compile_first(decoder)
    with pytest.raises(ZeroDivisionError):
        benchmark.measure(decoder, plan.name, None, known_machine, 2e9)


def test_the_table_has_every_plan(known_machine):
    plan = named_plan("activations", toy.model().shape, kvrecomp.Workload(2, 5, 3))
    row = benchmark.measure(kvrecomp.Decoder(toy.model(), plan), plan.name, None, known_machine, 1e9)
    out = io.StringIO()
    Console(file=out, width=200).print(benchmark.table([row], 12.5))
    assert "copies alone reach 12.5 GB/s" in out.getvalue() and "activations" in out.getvalue()


def test_rows_count_weights_in_host_memory(known_machine):
    shape = toy.model().shape
    plan = kvrecomp.with_host_weights(named_plan("activations", shape, kvrecomp.Workload(2, 5, 7)), 0.5)
    assert [layer.weights for layer in plan.layers] == ["device", "host"]
    model = models.create(toy.model().config, dtype="float32", sharding=kvrecomp.placement(plan))
    row = benchmark.measure(kvrecomp.Decoder(model, plan), plan.name, None, known_machine, 1e9)
    assert row.weights == "0.5"
    assert row.link_bytes == row.predicted_bytes == 5 * 2 * 21 * 4 * 2 + 4 * shape.layers[1].parameters
