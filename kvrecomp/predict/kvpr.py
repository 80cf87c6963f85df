"""KVPR's own formula of a step and its best split, for comparison with the cost function."""

from kvrecomp.plan import ModelShape, Workload
from kvrecomp.predict.hardware import HardwareProfile


def kvpr_seconds(profile: HardwareProfile, shape: ModelShape, workload: Workload, recomputed: float) -> float:
    """Seconds of a step by KVPR's formula (arXiv 2411.17089, equations 8 to 11), summed over layers.

    Of the prompt's s tokens `recomputed`, l, are sent as activations and the rest as keys and values:

        t = b l h p / v_link + max(4 b l h^2 / v_gpu, 2 b (s - l) h p / v_link)
    """
    b, s, p = workload.batch, workload.prompt, shape.itemsize
    total = 0.0
    for layer, count in shape.distinct_layers.items():
        kv = layer.width("keys_values")
        sent = b * recomputed * layer.hidden * p / profile.beside_compute
        computed = 2 * b * recomputed * layer.hidden * kv / profile.matmul_rate
        total += count * (sent + max(computed, b * (s - recomputed) * kv * p / profile.beside_compute))
    return total


def kvpr_split(profile: HardwareProfile, shape: ModelShape, workload: Workload) -> int:
    """The number of recomputed tokens for which KVPR's formula gives the shortest step."""
    candidates = range(workload.prompt + 1)
    return min(candidates, key=lambda tokens: kvpr_seconds(profile, shape, workload, tokens))
