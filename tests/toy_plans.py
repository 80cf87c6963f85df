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
def plans(draw):
    """Any plan of up to four layers of two shapes."""
    layers = tuple(draw(st.lists(st.sampled_from([PLAIN, GROUPED]), min_size=1, max_size=4)))
    prompt = draw(st.integers(1, 12))
    layer_plans = []
    for _ in layers:
        left, blocks = prompt, []
        while left:
            tokens = draw(st.integers(1, left))
            form, memory = draw(st.sampled_from([kv, acts])), draw(st.sampled_from(["host", "host", "device"]))
            blocks.append(BlockSpec(form, memory, tokens))
            left -= tokens
        memories = tuple(draw(st.lists(st.sampled_from(["host", "device"]), min_size=1, max_size=2)))
        weights = draw(st.sampled_from(["device", "device", "host"]))
        layer_plans.append(LayerPlan(tuple(blocks), draw(st.sampled_from([kv, acts])), memories, weights=weights))
    return Plan(
        "any",
        replace(SHAPE, layers=layers),
        Workload(3, prompt, draw(st.integers(1, 9))),
        tuple(layer_plans),
        tail=draw(st.integers(1, 3)),
        window=draw(st.integers(12 * 420, 30 * 420)),
        schedule=draw(st.sampled_from(["pipelined", "layerwise"])),
        groups=draw(st.sampled_from([1, 1, 2, 3])),
        order=draw(st.sampled_from(["row", "column"])),
    )
