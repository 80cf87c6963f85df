"""What tests of planning share: layers of published sizes, machines, and what plans hold, need and take."""

import collections
import math
from dataclasses import replace

from kvrecomp.plan import BlockSpec, Budget, LayerPlan, LayerShape, ModelShape, Workload
from kvrecomp.plan.footprint import memory_needed
from kvrecomp.plan.named import named_plan
from kvrecomp.predict import scheduler
from kvrecomp.predict.cost import plan_costs
from kvrecomp.predict.hardware import HardwareProfile

kv, acts = "keys_values", "activations"
LEARNED = LayerShape(4096, 32, 32, 128, 16384)  # OPT-6.7B's layer
ROTARY = LayerShape(4096, 32, 32, 128, 11008, gated=True, absorbs_keys=False)  # Llama-2-7B's
GROUPED = LayerShape(4096, 32, 8, 128, 14336, gated=True, absorbs_keys=False)  # Llama-3-8B's
LAYERS = {"learned": LEARNED, "rotary": ROTARY, "grouped": GROUPED}
WORKLOAD = Workload(batch=32, prompt=1024, new=16)


def model(*layers, **options):
    return ModelShape("some", layers, vocab=1009, embedding=61, positions=10**6, **options)


def machine(name="h200", **changes):
    return replace(HardwareProfile.from_datasheet(name), **changes)


def make_plan(shape, *given, **options):
    """With all weights on the device, as most of these tests are about the cache."""
    return scheduler.make_plan(shape, *given, weights=["device"] * len(shape.layers), **options)


def device_bytes(plan, write_outs=None):
    return sum(memory_needed(plan, write_outs)["device"].values())


def fits(plan, budget):
    limits = {memory: math.inf if limit is None else limit for memory, limit in vars(budget).items()}
    return all(sum(items.values()) <= limits[memory] for memory, items in memory_needed(plan).items())


def seconds(profile, *plans, write_outs=None):
    """Of a step of each plan, the median one where `write_outs` is None."""
    return plan_costs(profile, plans, write_outs).seconds.tolist()


def mean_seconds(profile, *plans):
    """Of the mean of every step of the workload."""
    steps = max(1, plans[0].workload.new - 1)
    counts = collections.Counter(step // plans[0].tail for step in range(steps))
    totals = [0.0] * len(plans)
    for write_outs, count in counts.items():
        taken = seconds(profile, *plans, write_outs=write_outs)
        totals = [total + count * step for total, step in zip(totals, taken)]
    return [total / steps for total in totals]


def assert_as_fast(profile, plan, others, budget, within=1.01, seconds=seconds):
    """A step of the plan takes no longer than one of any of the other plans that fit; gives all that it takes."""
    assert fits(plan, budget)
    others = [other for other in others if fits(other, budget)]
    taken, *found = seconds(profile, plan, *others)
    best, other = min(zip(found, others), key=lambda pair: pair[0], default=(math.inf, None))
    assert taken <= within * best, f"{taken / best:.3f} times as long as\n{other}\nchosen\n{plan}"
    return taken, found


def with_blocks(plan, *blocks, tail_form=acts, memories=("host",), **changes):
    """The plan with these blocks in all of its layers."""
    layer = LayerPlan(tuple(BlockSpec(*block) for block in blocks), tail_form, memories)
    return replace(plan, layers=(layer,) * len(plan.layers), **changes)


def tokens(layer):
    """Of a layer plan's prompt by (form, memory)."""
    counts = collections.Counter()
    for block in layer.prompt:
        counts[block.form, block.memory] += block.tokens
    return counts


def least(shape, workload, tail=16):
    """Device bytes of weights, logits and tails of that many tokens in the form that takes more, and of a prefill or
    step that keeps what is cached anywhere in any form; no blocks."""
    needed = [memory_needed(named_plan(name, shape, workload))["device"] for name in ("device", kv, acts)]
    widest = sum(max(layer.width(form) for form in (kv, acts)) for layer in shape.layers)
    tails = min(tail, workload.new) * workload.batch * widest * shape.itemsize
    return needed[0]["weights"] + needed[0]["logits"] + max(plan["prefill or step"] for plan in needed) + tails


def cache_bytes(shape, workload, form=kv):
    """Of everything that the workload caches, in one form."""
    widths = sum(layer.width(form) for layer in shape.layers)
    return (workload.prompt + workload.new) * workload.batch * widths * shape.itemsize


def with_room(shape, part, workload=WORKLOAD):
    """A budget that has so much of the cache's keys and values on the device."""
    return Budget(least(shape, workload) + part * cache_bytes(shape, workload))
