"""What a program of somebody else has to offer, to be measured beside ours: see experiments/peers.py."""

from collections.abc import Iterator, Sequence
from typing import NamedTuple, Protocol

from kvrecomp.plan import Memory, ModelShape, Workload
from models.config import Config


class Steps(NamedTuple):
    """What a program took: seconds of the prompt and of each step after it, one for every new token but the first."""

    device: str
    prefill_seconds: float
    seconds: list[float]
    peak_device_bytes: int | None


class Peer(Protocol):
    """Another program that decodes."""

    @property
    def link_bytes(self) -> int | None:
        """What a step sends over the link, None where that is not known."""

    def unavailable(self, gpu: bool) -> str | None:
        """Why it cannot be run here, on a GPU where `gpu`; None where it can."""

    def memory_needed(self, shape: ModelShape, workload: Workload) -> dict[Memory, float]:
        """An estimate in bytes."""
        ...

    def run(self, config: Config, dtype: str, workloads: Sequence[Workload], seed: int) -> Iterator[Steps]:
        """Makes a model of that configuration with random weights, decodes random prompts of one workload after the
        other, and yields what each took. Raises ValueError for a configuration that it has no model for."""
        ...
