"""Plans by name: the methods that are compared, alike in all layers.

activations    all activations in host memory, absorbed
recompute      the same, with K and V recomputed on the device
keys_values    all keys and values in host memory
split:F        the first F of the prompt as activations, the rest as keys and values, in host memory, pipelined
kvpr:F         the same split in KVPR's own schedule: K and V recomputed, copies layer by layer
device         all keys and values on the device
device:F       the first F of the prompt as keys and values on the device, the rest as activations in host memory

With "+packed" behind the name its blocks are packed, with "+int8" or "+int4" they are written with loss, but for a
prompt's first tokens.
"""

import dataclasses
from collections.abc import Sequence

from kvrecomp.plan.codecs import LOSSY, Codec
from kvrecomp.plan.cutting import BLOCKS_PER_WINDOW, cut_runs, default_tail, first_block, first_tokens, without_first
from kvrecomp.plan.layout import AUTO, DEFAULT_WINDOW, LayerPlan, Plan
from kvrecomp.plan.shapes import Form, LayerShape, Memory, ModelShape, PlanError
from kvrecomp.plan.workload import Workload

NAMES = ("activations", "recompute", "keys_values", "split:F", "kvpr:F", "device[:F]")
BEHIND: tuple[Codec, ...] = ("packed", *LOSSY)  # with a plus, behind a name
_BARE = ("activations", "recompute", "keys_values", "device")
_WITH_FRACTION = ("split", "kvpr", "device")


def named_plan(
    name: str, shape: ModelShape, workload: Workload, *, tail: int | None = None, window: int = DEFAULT_WINDOW
) -> Plan:
    """The plan of that name; `tail` in tokens, `window` in bytes. Raises `PlanError` if there is no such plan."""
    kind, fraction, codec = _read_name(name)
    # KVPR sends all activations of a layer, then all keys and values: as few blocks as the window allows.
    most_bytes = window if kind == "kvpr" else window // BLOCKS_PER_WINDOW
    plans: dict[LayerShape, LayerPlan] = {}
    for layer in shape.distinct_layers:
        runs = _runs(kind, fraction, layer.cached(workload.prompt))
        last_form, last_memory, _ = runs[-1]
        first = first_tokens(layer, workload.prompt, [codec])
        others = cut_runs(without_first(runs, first), layer, shape, workload, most_bytes, codec)
        blocks = (*first_block(last_form, first), *others)
        method = "recompute" if kind in ("recompute", "kvpr") else "absorb"
        plans[layer] = LayerPlan(blocks, last_form, (last_memory,), method, write_out_codecs=(codec,))
    layers = tuple(plans[layer] for layer in shape.layers)
    schedule = "layerwise" if kind == "kvpr" else "pipelined"
    tail = default_tail(shape, workload, window) if tail is None else min(tail, workload.new)
    return Plan(name, shape, workload, layers, tail=tail, window=window, schedule=schedule)


def _read_name(name: str) -> tuple[str, float, Codec]:
    """What kind of plan it is, its fraction, 1 where it has none, and the codec of its blocks."""
    layout, plus, word = name.partition("+")
    kind, colon, argument = layout.partition(":")
    if layout == AUTO and plus:
        ways = f"say loss={word}" if word in LOSSY else f"leave +{word} out"
        raise PlanError(f"plan {name!r}: {AUTO} chooses codecs, without loss unless that is allowed: {ways}")
    if layout == AUTO:
        raise PlanError("what plan auto is goes by the machine: use plan_for or make_plan")
    if kind not in (_WITH_FRACTION if argument else _BARE) or (colon and not argument):
        raise PlanError(
            f"there is no plan {name!r}; the plans are {', '.join((AUTO, *NAMES))}, with F from 0 to 1, and all but "
            f"{AUTO} with {', '.join(f'+{codec}' for codec in BEHIND)} behind the name"
        )
    codecs: dict[str, Codec] = {codec: codec for codec in ("plain", *BEHIND)}
    codec = codecs.get(word) if plus else "plain"
    if codec is None:
        raise PlanError(f"plan {name!r}: there is no codec {word!r}; the codecs are {', '.join(codecs)}")
    fraction = _fraction(argument) if colon else 1.0
    if fraction is None:
        raise PlanError(f"plan {name!r}: {argument!r} is not a fraction from 0 to 1")
    return kind, fraction, codec


def _runs(kind: str, fraction: float, tokens: int) -> list[tuple[Form, Memory, int]]:
    """Where the prompt's tokens are, (form, memory, tokens) in order, without runs of none."""
    first = round(fraction * tokens)
    runs: list[tuple[Form, Memory, int]]
    if kind == "keys_values":
        runs = [("keys_values", "host", tokens)]
    elif kind == "device":
        runs = [("keys_values", "device", first), ("activations", "host", tokens - first)]
    else:
        runs = [("activations", "host", first), ("keys_values", "host", tokens - first)]
    return [run for run in runs if run[2]]


def with_host_weights(plan: Plan, fraction: float) -> Plan:
    """The plan with the weights of that fraction of its layers, evenly spread, in host memory; see `with_weights`.

    Raises `PlanError` for what is no fraction from 0 to 1.
    """
    return with_weights(plan, named_weights(str(fraction), len(plan.layers)))


def named_weights(name: str, layers: int) -> tuple[Memory, ...]:
    """The memory of each layer's weights: all on the `device`, all in the `host`, or that fraction of layers there.

    Raises `PlanError` for other names.
    """
    fraction = _fraction({"device": "0", "host": "1"}.get(name, name))
    if fraction is None:
        raise PlanError(f"weights {name!r}: expected device, host, or the fraction of layers in host memory, 0 to 1")
    return spread(round(fraction * layers), layers)


def spread(hosted: int, layers: int) -> tuple[Memory, ...]:
    """The memory of each layer's weights where so many layers, evenly spread, have theirs in host memory."""
    return tuple("host" if (i + 1) * hosted // layers > i * hosted // layers else "device" for i in range(layers))


def with_weights(plan: Plan, memories: Sequence[Memory]) -> Plan:
    """The plan with each layer's weights in that memory. Raises `PlanError` if there are not as many as layers."""
    if len(memories) != len(plan.layers):
        raise PlanError(f"{len(memories)} memories for weights of {len(plan.layers)} layers: give one a layer")
    layers = tuple(dataclasses.replace(layer, weights=memory) for layer, memory in zip(plan.layers, memories))
    return dataclasses.replace(plan, layers=layers)


def _fraction(text: str) -> float | None:
    """The number from 0 to 1 that the text is, if it is one."""
    try:
        fraction = float(text)
    except ValueError:
        return None
    return fraction if 0 <= fraction <= 1 else None
