"""Plans of layers of two small shapes: one by hand, and any."""

from dataclasses import replace

from hypothesis import strategies as st

from kvrecomp.plan import BlockSpec, LayerPlan, LayerShape, ModelShape, Plan, Workload

# Two layers of different shapes; the second has grouped queries.
PLAIN = LayerShape(hidden=35, heads=5, kv_heads=5, head_dim=7, intermediate=53)
GROUPED = LayerShape(hidden=35, heads=6, kv_heads=2, head_dim=4, intermediate=59, gated=True, absorbs_keys=False)
SHAPE = ModelShape("two", (PLAIN, GROUPED), vocab=97, embedding=17, positions=101, dtype="bfloat16")
WORKLOAD = Workload(batch=3, prompt=11, new=8)

kv, acts = "keys_values", "activations"

# Both forms, memories and methods; the first layer's tail is written to the device once.
MIXED = Plan(
    "mixed",
    SHAPE,
    WORKLOAD,
    (
        LayerPlan(
            (BlockSpec(acts, "host", 4), BlockSpec(kv, "device", 2), BlockSpec(kv, "host", 5)),
            tail_form=kv,
            write_out_memories=("device", "host"),
        ),
        LayerPlan((BlockSpec(acts, "device", 5), BlockSpec(acts, "host", 6)), tail_form=acts, method="recompute"),
    ),
    tail=3,
    window=10_000,
)


@st.composite
def plans(draw, shape=None, write_outs=None):
    """Any plan: of up to four layers of two shapes, with weights anywhere, and in groups; or of that shape, with all
    weights on the device. The tail is written out so often, or any number of times."""
    memories, forms = st.sampled_from(["host", "device"]), st.sampled_from([kv, acts])
    bfloat16 = (shape or SHAPE).dtype == "bfloat16"
    codecs = st.sampled_from(["plain", "packed"] if bfloat16 else ["plain"])
    weights, groups = st.just("device"), 1
    if shape is None:
        shape = replace(SHAPE, layers=tuple(draw(st.lists(st.sampled_from([PLAIN, GROUPED]), min_size=1, max_size=4))))
        weights, groups = st.sampled_from(["device", "device", "host"]), draw(st.sampled_from([1, 1, 2, 3]))
    prompt, tail = draw(st.integers(1, 12)), draw(st.integers(1, 3))
    new = draw(st.integers(1, 9)) if write_outs is None else write_outs * tail + draw(st.integers(1, tail))
    layers = []
    for layer in shape.layers:
        left, blocks = layer.cached(prompt), []
        while left:
            blocks.append(BlockSpec(draw(forms), draw(memories), draw(st.integers(1, left)), draw(codecs)))
            left -= blocks[-1].tokens
        places = tuple(draw(st.lists(memories, min_size=1, max_size=2)))
        method = draw(st.sampled_from(["absorb", "recompute"]))
        written_as = tuple(draw(st.lists(codecs, min_size=1, max_size=2)))
        layers.append(LayerPlan(tuple(blocks), draw(forms), places, method, draw(weights), written_as))
    plan = Plan("any", shape, Workload(3, prompt, new), tuple(layers), tail)
    return replace(
        plan,
        window=round(largest_block(plan) * draw(st.sampled_from([1, 1.5, 3, 100]))),
        schedule=draw(st.sampled_from(["pipelined", "layerwise"])),
        groups=groups,
        order=draw(st.sampled_from(["row", "column"])),
    )


def largest_block(plan):
    """Bytes of the largest block or tail that there ever is."""
    layers = zip(plan.shape.layers, plan.blocks(plan.write_outs + 1))
    return max(plan.bytes_of(layer, block) for layer, blocks in layers for block in blocks)
