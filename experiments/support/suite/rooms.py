"""Device memory with room for a part of the cache: what the suite and the sweep limit the scheduler to."""

from kvrecomp.plan import Plan
from kvrecomp.plan.footprint import memory_needed


def device_bytes(hosted: Plan, kept: Plan, percent: float) -> float:
    """Bytes: what `hosted`, whose cache is in host memory, needs of the device, and so many per cent of the blocks of
    `kept`, a plan of the same workload that has them on the device."""
    return sum(memory_needed(hosted)["device"].values()) + percent / 100 * kept.bytes_in("device")
