"""Weights in host memory: which, what they need, and each matrix in the order of its use."""

import dataclasses

import jax
import numpy as np
import pytest
import toy
from flax import nnx

import kvrecomp
import models
from kvrecomp.plan import PlanError
from kvrecomp.plan.footprint import memory_needed
from kvrecomp.plan.named import named_weights, with_host_weights
from kvrecomp.run import memory, weights

OPT = models.OPTConfig("opt", layers=3, hidden=28, heads=7, intermediate=44, vocab=97, positions=61)
WORK = kvrecomp.Workload(batch=3, prompt=17, new=12)


def planned(config, name, fraction):
    shape = dataclasses.replace(config.shape, dtype="float32")
    return with_host_weights(kvrecomp.named_plan(name, shape, WORK, tail=5, window=2**20), fraction)


def test_placement_is_of_matrices_of_the_chosen_layers():
    plan = planned(OPT, "activations", 0.67)
    model = models.create(OPT, dtype="float32", sharding=weights.placement(plan))
    attention = [f"attention.{name}" for name in ("key", "value", "query", "output")]
    kernels = [*attention, "feed_forward.up", "feed_forward.down"]
    numbers = [number for number, layer in enumerate(plan.layers) if layer.weights == "host"]
    assert len(numbers) == 2
    expected = {f"layers.{number}.{kernel}.kernel" for number in numbers for kernel in kernels}
    assert set(toy.hosted_parameters(model)) == expected


@pytest.mark.parametrize("config", [OPT, toy.LLAMA], ids=["opt", "llama"])
def test_matrices_are_copied_in_the_order_of_their_use(config):
    """K's and V's projections first; the sizes that plans count with are those of the parameters, in the same order."""
    model = models.create(config, dtype="float32")
    plan = with_host_weights(kvrecomp.named_plan("activations", model.shape, WORK), 1.0)
    found = weights.layer_weights(model, plan)[0]
    layer = model.layers[0]
    gate = [] if config is OPT else [layer.feed_forward.gate]
    attention, feed_forward = layer.attention, layer.feed_forward
    used = attention.key, attention.value, attention.query, attention.output, *gate, feed_forward.up, feed_forward.down
    assert [id(array) for array in found.host_arrays] == [id(module.kernel.get_value()) for module in used]
    assert found.before == 3
    sizes = tuple(tuple(nbytes // 4 for nbytes in part) for part in found.matrices)
    assert sizes == model.shape.layers[0].matrices


def test_memory_is_counted_where_the_weights_are():
    shape = dataclasses.replace(OPT.shape, dtype="float32")
    matrices = 4 * (4 * 28 * 28 + 2 * 28 * 44)  # bytes of a layer's
    table = 4 * 97 * 28
    plan = planned(OPT, "activations", 0.34)
    assert plan.host_weight_bytes == matrices
    assert f"weights of 1 layer ({matrices / 1024:.1f} KiB) in host memory" in " ".join(str(plan).split())
    where = [line.split()[-1] for line in str(plan).splitlines() if line.strip()[:1].isdigit() and "absorb" in line]
    assert sorted(where) == ["device", "host"] and "weights" not in str(planned(OPT, "activations", 0.0))
    needed = memory_needed(plan)
    assert needed["host"]["weights"] == matrices
    plans = {"host": plan, "device": planned(OPT, "activations", 0.0)}
    beside = {name: memory_needed(own)["device"]["prefill or step"] for name, own in plans.items()}
    assert beside["host"] == beside["device"] + 2 * matrices  # a prefill's, with the weights of two layers
    assert needed["device"]["weights"] == 2 * matrices + table == shape.parameters * 4 - matrices


@pytest.mark.parametrize("name", ["auto", "activations"])
def test_weights_are_said_of_every_layer(name):
    with pytest.raises(PlanError, match="weights are said to be in 2 memories; opt has 3 layers"):
        kvrecomp.plan_for(name, OPT.shape, WORK, weights=["device", "host"])


def test_wrong_places_are_said():
    plan = planned(OPT, "activations", 1.0)
    model = models.create(OPT, dtype="float32")
    with pytest.raises(
        PlanError, match=r"layers\.0\.attention\.key\.kernel in memory 'pinned_host', the model in 'device'"
    ):
        kvrecomp.Decoder(model, plan)


def test_more_weights_than_the_shape_says_are_refused():
    """Copies are planned by the shape: those of a wider layer would not fit in the window."""
    plan = planned(OPT, "activations", 1.0)
    model = models.create(OPT, dtype="float32", sharding=kvrecomp.placement(plan))
    kvrecomp.Decoder(model, plan)
    layer, shape = model.layers[2], OPT.shape.layers[2]
    further = np.zeros((shape.hidden, shape.intermediate), np.float32)
    layer.further = nnx.Param(jax.device_put(further, memory.sharding("host")))
    held = shape.parameters + shape.hidden * shape.intermediate
    with pytest.raises(PlanError, match=rf"layer 2 has {held} weights, and its LayerShape says {shape.parameters}"):
        kvrecomp.Decoder(model, plan)


@pytest.mark.parametrize(
    ("name", "hosted"), [("device", []), ("host", [0, 1, 2, 3, 4, 5, 6]), ("0.43", [2, 4, 6]), ("0.07", [])]
)
def test_weights_by_name(name, hosted):
    assert [number for number, place in enumerate(named_weights(name, 7)) if place == "host"] == hosted


@pytest.mark.parametrize("name", ["gpu", "1.5", "-0.1", "nan", "auto"])
def test_weights_in_a_place_that_there_is_not(name):
    with pytest.raises(PlanError, match=f"weights '{name}': expected device, host, or the fraction of layers"):
        named_weights(name, 7)
