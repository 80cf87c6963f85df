"""What a program of somebody else has to offer, to be measured beside ours: see experiments/peers.py."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

from kvrecomp.plan import Memory, ModelShape, Workload
from models.config import Config


class Steps(NamedTuple):
    """What a program took: seconds of the prompt and of each step after it, one for every new token but the first."""

    device: str
    prefill_seconds: float
    seconds: list[float]
    peak_device_bytes: int | None


@dataclass(frozen=True)
class Peer:
    """Another program that decodes.

    `run(config, dtype, workloads, seed)` makes a model of that configuration with random weights, decodes random
    prompts of one workload after the other, and yields what each took; ValueError for a configuration that the program
    has no model for. `unavailable(gpu)` says why it cannot be run here, on a GPU where `gpu`, or is None.
    `memory_needed(shape, workload)` is an estimate in bytes. `link_bytes` is what a step sends over the link, None
    where that is not known.
    """

    run: Callable[[Config, str, Sequence[Workload], int], Iterator[Steps]]
    unavailable: Callable[[bool], str | None]
    memory_needed: Callable[[ModelShape, Workload], dict[Memory, float]]
    link_bytes: int | None = None
