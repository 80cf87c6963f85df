"""Seconds of a layer's work where none were measured: from a machine's rates, as its data sheet has them."""

from typing import Literal

from kvrecomp.plan import LEAST_ALIGNED, MEMORIES, LayerShape, ModelShape
from kvrecomp.predict.hardware import ATTENTION, Curve, HardwareProfile, LayerTimes, Work, attention_work

# Llama-2-7B with 32 rows takes 2.4 ms a layer on an H100 with 481 activations, 1.2 with 480 (h100_tokens_82bb9c4.txt),
# where they are on the device. Those from the host have other kernels: w4's `auto` in h200_suite.json is the plan for
# kernels that are slow on the device alone, and its steps took what was predicted.
UNEVEN = 2.0


def estimate(profile: HardwareProfile, layer: LayerShape, dtype_bytes: int, batch: int) -> LayerTimes:
    """Times of a layer from the machine's rates; they have no dtype.

    A kernel takes the longer of its floating-point operations at the rate of matrix products and its bytes at the rate
    of device memory (the roofline model, Williams et al. 2009), and `kernel_seconds` more. Bytes are those of weights,
    once, and of cached tokens, once for scores and once for mixing.
    """
    h, kd, nd = layer.hidden, layer.kv_heads * layer.head_dim, layer.heads * layer.head_dim
    b, p = batch, dtype_bytes

    def kernel(operations: float, numbers: float) -> float:
        return max(operations / profile.matmul_rate, numbers * p / profile.memory_rate)

    def over_weights(count: float, kernels: int) -> Curve:
        return Curve.line(kernel(2 * b * count, count) + kernels * profile.kernel_seconds)

    def over_tokens(*kernels: tuple[float, float], count: int = 4) -> Curve:
        """Of `count` kernels; `kernels` are (operations, numbers) for one token of one row."""
        scores = 12 * b * layer.heads / profile.memory_rate  # float32, written, read for the softmax and for mixing
        token_seconds = sum(kernel(b * operations, b * numbers) for operations, numbers in kernels) + scores
        return Curve.line(count * profile.kernel_seconds, token_seconds)

    by_keys, by_values = (2 * nd, kd), (2 * nd, kd)  # scores against K, weights times V
    over_activations = (2 * layer.heads * h, h)  # the same against x
    absorbing = kernel(2 * b * h * nd, h * kd)  # q W_K, or the mix times W_V
    project_keys = (2 * h * kd, h + kd)
    if layer.absorbs_keys:
        absorb = over_tokens(over_activations, over_activations)
    else:
        absorb = over_tokens(project_keys, by_keys, over_activations, count=5)
    work: dict[Work, Curve] = {
        "project": over_weights(layer.projecting, 3),
        "project_absorb": over_weights(layer.projecting - layer.absorbed, 2 - layer.absorbs_keys),
        "project_recompute": over_weights(layer.projecting, 3),
        "finish": over_weights(layer.parameters - layer.projecting, 5),
        "prepare": Curve.line((1 + layer.absorbs_keys) * (absorbing + profile.kernel_seconds)),
        "unpack": Curve.line(2 * profile.kernel_seconds, kernel(0, 1.75 * b * h)),  # 12 bits read and 16 written
        "await": Curve.line(profile.handoff_seconds),  # which is measured of a machine; up to three times as long
        "keys_values": over_tokens(by_keys, by_values),
        "absorb": absorb,
        "recompute": over_tokens(project_keys, project_keys, by_keys, by_values, count=6),
    }
    work |= {attention_work(kind, "device"): work[kind] for kind in ATTENTION}
    work["uneven_absorb"] = absorb
    work["uneven_device_absorb"] = absorb if layer.absorbs_keys else absorb.times(UNEVEN)
    return LayerTimes(layer, "", batch, work)


def further_tokens(
    profile: HardwareProfile, layer: LayerShape, dtype_bytes: int, batch: int
) -> dict[Literal["keys_values", "absorb", "prepare"], Curve]:
    """Seconds that each token of a row beside the first adds to the work of attention: for every cached token, and for
    every block from the host, whose partial result is joined with that of the others.

    K and V are recomputed once for all tokens of a step, so there it adds what it adds over keys and values.
    """
    b, h, nd = batch, layer.hidden, layer.heads * layer.head_dim
    scores = 12 * b * layer.heads / profile.memory_rate

    def over(width: int) -> Curve:
        joined = 6 * 4 * b * layer.heads * width / profile.memory_rate  # float32, written, read and merged
        return Curve.line(joined, 4 * b * layer.heads * width / profile.matmul_rate + scores)

    absorbing = 2 * b * h * nd / profile.matmul_rate + 2 * dtype_bytes * b * layer.heads * h / profile.memory_rate
    return {
        "keys_values": over(layer.head_dim),
        "absorb": over(h),
        "prepare": Curve.line((1 + layer.absorbs_keys) * absorbing),
    }


def further_logits(profile: HardwareProfile, shape: ModelShape, batch: int) -> float:
    """Seconds that each token of a row beside the first adds outside of layers: its logits, and choosing by them."""
    product = 2 * batch * shape.vocab * shape.embedding / profile.matmul_rate
    return product + 8 * 4 * batch * shape.vocab / profile.memory_rate


def layer_times(profile: HardwareProfile, layer: LayerShape, shape: ModelShape, batch: int) -> LayerTimes:
    """What was measured of a layer of the model, or else an estimate."""
    times = profile.times(layer, shape.dtype, batch)
    return estimate(profile, layer, shape.itemsize, batch) if times is None else times


def slow_if_uneven(times: LayerTimes) -> bool:
    """Whether absorbing a number of activations that is no multiple of ALIGNED takes longer, in either memory."""
    for memory in MEMORIES:
        even = times.work[attention_work("absorb", memory, LEAST_ALIGNED)]
        uneven = times.work[attention_work("absorb", memory, LEAST_ALIGNED + 1)]
        if uneven.seconds > even.seconds:
            return True
    return False
