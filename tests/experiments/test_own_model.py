"""A model of one's own is trained, and decoded under two plans, in the script and step by step."""

import re

import jax
import numpy as np
import pytest
import scripts
from flax import nnx

import kvrecomp
from experiments import own_model


@pytest.fixture(autouse=True)
def implicit_copies():
    """Flax makes parameters from Python's numbers."""
    with jax.transfer_guard("allow"):
        yield


def test_the_script_learns_and_decodes_alike_under_both_plans(capsys):
    scripts.call(own_model, "--steps=11", "--layers=2", "--hidden=24")
    said = capsys.readouterr().out
    losses = [float(loss) for loss in re.findall(r"step \d+: ([\d.]+) nats", said)]
    assert losses[-1] < 0.9 * losses[0]
    first, second = re.findall(r"\[([\d, ]+)\]", said)
    assert first == second and len(first.split()) == own_model.NEW
    differences = [float(number) for number in re.findall(r"by ([\d.e+-]+) at most", said)]
    assert len(differences) == 2 and max(differences) < 1e-4


@pytest.mark.parametrize(("name", "hosted"), [("split:0.4", 1.0), ("device:0.6", 0.34)])
def test_logits_are_those_of_the_forward_pass(name, hosted):
    """At every step of a run that writes the tail out twice, with rows of random tokens."""
    model = own_model.Model(3, 40, nnx.Rngs(7))
    prompts = np.random.default_rng(5).integers(0, 256, (3, 19))
    named = kvrecomp.named_plan(name, model.shape, kvrecomp.Workload(3, 19, 13), tail=5)
    plan = kvrecomp.with_host_weights(named, hosted)
    placed = own_model.placed(model, plan)
    result = kvrecomp.generate(placed, prompts, max_new_tokens=13, plan=plan, output_logits=True)
    whole = np.asarray(own_model.forward(model, jax.device_put(result.sequences)))
    assert whole.std() > 0.5  # or the tolerance says little
    np.testing.assert_allclose(result.logits, np.moveaxis(whole[:, 18:-1], 1, 0), atol=1e-4)
    memories = [layer.query.kernel[...].sharding.memory_kind for layer in placed.layers]
    assert [kind == "pinned_host" for kind in memories] == [layer.weights == "host" for layer in plan.layers]
