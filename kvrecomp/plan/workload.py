"""What is to be decoded, and the memory to do it in."""

import numbers
from dataclasses import dataclass

from kvrecomp.plan.shapes import GIB, PlanError, check_positive

MOST = 2**31 - 1  # rows, or tokens of one: a device counts them in int32


@dataclass(frozen=True)
class Workload:
    """`batch` rows with prompts of `prompt` tokens (padding included), continued by `new` tokens."""

    batch: int
    prompt: int
    new: int

    def __post_init__(self):
        sizes = {"batch": self.batch, "prompt": self.prompt, "new": self.new}
        check_positive(self, **sizes)
        for name, size in sizes.items():
            if size > MOST:
                raise PlanError(f"Workload: {name} is {size}; it may be {MOST}, as many as int32 counts: use less")

    def __str__(self) -> str:
        return f"batch {self.batch}, prompt {self.prompt}, {self.new} new"


@dataclass(frozen=True)
class Budget:
    """Bytes that a plan may use, weights included, on the device and of pinned host memory; None: what is free."""

    device: float | None = None
    host: float | None = None

    def __post_init__(self):
        for name, size in (("device", self.device), ("host", self.host)):
            if size is not None and not isinstance(size, numbers.Real):
                raise PlanError(f"Budget: {name} is {size!r}; it must be a number, or None for what is free")
        if self.device is not None and not self.device > 0:
            raise PlanError(f"Budget: device is {self.device} bytes; it must be greater than zero")
        if self.host is not None and not self.host >= 0:
            raise PlanError(f"Budget: host is {self.host} bytes; it must not be negative")

    @classmethod
    def of_gib(cls, device: float | None = None, host: float | None = None) -> "Budget":
        """From GiB, as flags give them."""
        return cls(*(size * GIB if isinstance(size, numbers.Real) else size for size in (device, host)))
