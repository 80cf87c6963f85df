"""What a plan needs of device and host memory, item by item."""

import bisect
import dataclasses
from collections.abc import Mapping, Sequence

from kvrecomp.plan.cutting import chunk_of_queries
from kvrecomp.plan.layout import BlockSpec, LayerPlan, Plan
from kvrecomp.plan.pinned import LIMIT_VARIABLE, pinned_limit
from kvrecomp.plan.shapes import GIB, MEMORIES, LayerShape, Memory, ModelShape, PlanError
from kvrecomp.plan.step_order import high_water
from kvrecomp.plan.table import format_bytes
from kvrecomp.plan.workload import Workload

SCORE = 12  # bytes of a score: in float32, before and after the softmax, and once more in the model's numbers, or apart
MERGED_BYTES = 2**25  # of matrices that XLA makes one product of, at most
MARGIN = 0.05  # of what is free: fragmentation, and the programs themselves


def memory_needed(plan: Plan, write_outs: int | None = None) -> dict[Memory, dict[str, int]]:
    """Bytes by memory and item, after that many write-outs (default: at the end of the workload).

    A prefill, a step and the choice of tokens do not happen at the same time; the largest counts. A prefill has the
    host weights of two layers on the device at once, and what it packs; a step its window, and what it unpacks and
    computes, of as many tokens of a row as it may check. Logits are there from one step to the next; those that
    `output_logits` asks for are not counted.
    """
    write_outs = plan.write_outs if write_outs is None else write_outs
    shape = plan.shape
    weights = weights_in(shape, [layer.weights for layer in plan.layers])
    return {
        "device": {
            "weights": weights["device"],
            "blocks": plan.bytes_in("device", write_outs),
            "tail": plan.tail_bytes,
            "sketch": plan.sketch_bytes(write_outs),
            "logits": plan.tokens_per_step * plan.groups * logits_bytes(shape, plan.workload),
            "prefill or step": max(
                plan.tokens_per_step * sampling_bytes(shape, plan.workload),
                prefill_bytes(shape, plan.workload) + 2 * plan.most_weight_bytes + packing_bytes(plan),
                high_water(plan, write_outs)
                + rows_bytes(plan)
                + attention_bytes(plan, write_outs)
                + unpacked_bytes(plan, write_outs),
            ),
        },
        "host": {"weights": weights["host"], "blocks": plan.bytes_in("host", write_outs)},
    }


def logits_bytes(shape: ModelShape, workload: Workload) -> int:
    """Bytes of the logits of one group, float32."""
    return 4 * workload.batch * shape.vocab


def sampling_bytes(shape: ModelShape, workload: Workload) -> int:
    """An estimate of what choosing a group's tokens takes beside their logits, from above: where `top_k` or `top_p` are
    used, which a plan does not know, they are sorted; tests compare it with what XLA needs for an H200. A small
    vocabulary takes some KiB a row more.
    """
    return 7 * logits_bytes(shape, workload) // 2 + 2**12 * workload.batch


def prefill_bytes(shape: ModelShape, workload: Workload) -> int:
    """An estimate of a prompt's intermediate results, from above; tests compare it with what XLA needs for an H200.

    Of one layer at a time: K and V, and as many again on their way to the host of this layer and the one before; and
    the larger of what attention needs, with the scores of a chunk of queries, and the feed-forward. Models with a gate
    had two hidden states more on an H200, whose kernels XLA chooses by timing them.
    """
    tokens, most = workload.batch * workload.prompt, 0
    for layer in shape.distinct_layers:
        pairs = 3 * layer.width("keys_values")
        attention = 2 * layer.hidden + 2 * layer.heads * layer.head_dim + pairs
        feed_forward = (5 + 2 * layer.gated) * layer.hidden + (1 + layer.gated) * layer.intermediate + pairs
        chunk = chunk_of_queries(workload.batch, layer.heads, workload.prompt)
        scores = 2 * 4 * workload.batch * layer.heads * workload.prompt * chunk
        most = max(most, tokens * attention * shape.itemsize + scores, tokens * feed_forward * shape.itemsize)
    return most


def attention_bytes(plan: Plan, write_outs: int) -> int:
    """An estimate of what a step's attention computes from the blocks of a layer, from above, of one group and layer at
    a time; tests compare it with what XLA needs for an H200.

    Of the blocks and the tail on the device together, and of the largest block from the host: scores in float32, before
    and after the softmax. Where K or V are recomputed from activations, these, and where K is rotated, in float32, what
    it is rotated with too; on the device the activations themselves, moved for that. Of keys and values from the host K
    is moved, where several heads share it.
    """
    most = 0
    for layer, layer_shape in plan.distinct_layers:
        blocks = layer_shape.in_sight(layer.blocks(write_outs, plan.tail))
        on_device = [block for block in blocks if block.memory == "device"]
        from_host = {block for block in blocks if block.memory == "host"}
        of_device = sum(_attention_numbers(plan, layer, layer_shape, block) for block in on_device)
        of_device += _attention_numbers(plan, layer, layer_shape, layer.tail_block(plan.room))
        of_host = max((_attention_numbers(plan, layer, layer_shape, block) for block in from_host), default=0)
        most = max(most, plan.workload.batch * max(of_device, of_host))
    return most


def _attention_numbers(plan: Plan, layer: LayerPlan, shape: LayerShape, block: BlockSpec) -> int:
    """What attention to that block computes, in bytes of one row."""
    itemsize, key = plan.shape.itemsize, shape.kv_heads * shape.head_dim
    of_token = SCORE * shape.heads * plan.tokens_per_step
    if block.form == "keys_values":
        of_token += itemsize * key * (block.memory == "host" and shape.heads > shape.kv_heads)
    elif layer.method == "recompute" or not shape.absorbs_keys:
        of_token += itemsize * key * (2 if layer.method == "recompute" else 1)
        of_token += itemsize * shape.hidden * (block.memory == "device")
        of_token += 0 if shape.absorbs_keys else 4 * (key + shape.head_dim)
    return block.tokens * of_token


def rows_bytes(plan: Plan) -> int:
    """An estimate of what a step computes of the new tokens of the groups that go through a layer together, from above.

    The feed-forward's numbers and hidden states, and of each head, where V is absorbed, as many numbers as the
    activations have. And the projections' matrices, of two layers, which XLA puts side by side where rows are few.
    """
    most, itemsize = 0, plan.shape.itemsize
    for layer in plan.shape.distinct_layers:
        feed_forward = (2 + 2 * layer.gated) * layer.intermediate + 8 * layer.hidden
        heads = 3 * layer.heads * max(layer.hidden, layer.head_dim)
        of_row = max(feed_forward * itemsize * plan.groups_per_pass, 4 * heads)
        rows = plan.workload.batch * plan.tokens_per_step
        most = max(most, rows * of_row + min(MERGED_BYTES, 2 * layer.projecting * itemsize))
    return most


def packing_bytes(plan: Plan) -> int:
    """What writing a prompt's blocks takes, of one layer at a time: their parts, before they are one array."""
    most = 0
    for layer, layer_shape in plan.distinct_layers:
        sizes = [plan.bytes_of(layer_shape, block) for block in layer.prompt if block.codec != "plain"]
        most = max(most, sum(sizes))
    return most


def unpacked_bytes(plan: Plan, write_outs: int) -> int:
    """What a step has as plain numbers at once: a layer's packed blocks on the device, or a block from the host. Those
    with loss on the device are read number by number."""
    most = 0
    for layer, layer_shape in plan.distinct_layers:
        blocks = layer_shape.in_sight(layer.blocks(write_outs, plan.tail))
        sizes: dict[Memory, list[int]] = {memory: [0] for memory in MEMORIES}
        for block in blocks:
            if block.codec == "packed" or (block.codec != "plain" and block.memory == "host"):
                size = plan.bytes_of(layer_shape, dataclasses.replace(block, codec="plain"))
                sizes[block.memory].append(size)
        most = max(most, sum(sizes["device"]), *sizes["host"])
    return most


def weights_in(shape: ModelShape, memories: Sequence[Memory]) -> dict[Memory, int]:
    """Bytes of the model's weights in each memory, where `memories` has that of each layer's; others are on the device.

    Raises `PlanError` if there are not as many memories as layers.
    """
    if len(memories) != len(shape.layers):
        raise PlanError(
            f"weights are said to be in {len(memories)} memories; {shape.name} has {len(shape.layers)} layers"
        )
    hosted = sum(layer.parameters for layer, memory in zip(shape.layers, memories) if memory == "host")
    return {"device": (shape.parameters - hosted) * shape.itemsize, "host": hosted * shape.itemsize}


def check_weights(shape: ModelShape, memories: Sequence[Memory], allowed: Mapping[Memory, float]) -> None:
    """Raises `PlanError` if the weights alone, each layer's in its memory, need more bytes than are allowed: no plan
    fits then, and they need not be made."""
    for memory, needed in weights_in(shape, memories).items():
        if needed > allowed[memory]:
            ways = "put them into host memory, or " if memory == "device" and "device" in memories else ""
            raise PlanError(
                f"the weights of {shape.name} need {format_bytes(needed)} of {memory} memory; "
                f"{format_bytes(allowed[memory])} may be used: {ways}use a smaller model or more memory"
            )


def check_within(plan: Plan, allowed: Mapping[Memory, float]) -> None:
    """Raises `PlanError`, with sizes and with what would fit, if the plan needs more bytes than are allowed."""
    needed = memory_needed(plan)
    for memory in MEMORIES:
        limit = allowed[memory]
        total = sum(needed[memory].values())
        if total <= limit:
            continue
        items = ", ".join(f"{item} {format_bytes(size)}" for item, size in needed[memory].items() if size)
        raise PlanError(
            f"plan {plan.name} needs {format_bytes(total)} of {memory} memory ({items}); {format_bytes(limit)} may be "
            f"used: {_what_fits(plan, memory, limit)}{_pool_hint(memory, total)}"
        )


def _what_fits(plan: Plan, memory: Memory, limit: float) -> str:
    """The largest batch for which the plan fits."""

    def excess(batch: int) -> bool:
        smaller = dataclasses.replace(plan, workload=dataclasses.replace(plan.workload, batch=batch))
        return sum(memory_needed(smaller)[memory].values()) > limit

    fitting = bisect.bisect_left(range(1, plan.workload.batch), True, key=excess)
    if fitting:
        return f"a batch of {fitting} fits where {plan.workload.batch} were asked for"
    ways = "use a smaller model, a shorter prompt or more memory"
    if memory == "device" and any(layer.weights == "device" for layer in plan.layers):
        ways += ", or put weights into host memory, as plan auto does where it may"
    return f"not even a batch of 1 fits; {ways}"


def _pool_hint(memory: Memory, total: float) -> str:
    if memory == "device" or total <= pinned_limit():
        return ""
    return (
        f"; the pinned pool is capped at {pinned_limit() / GIB:.0f} GiB: set {LIMIT_VARIABLE} before jax "
        "starts its backend"
    )
