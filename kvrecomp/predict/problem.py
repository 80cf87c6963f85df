"""The problem that a plan solves: what is asked for, what is left open, and the room that there is."""

from dataclasses import dataclass
from functools import cached_property

from kvrecomp.plan import (
    DEFAULT_WINDOW,
    FORMS,
    GIB,
    MEMORIES,
    Budget,
    Codec,
    Drafting,
    LayerShape,
    Loss,
    Memory,
    ModelShape,
    Order,
    Plan,
    PlanError,
    Workload,
    format_bytes,
)
from kvrecomp.plan.codecs import PACKED_DTYPE
from kvrecomp.plan.cutting import BLOCKS_PER_WINDOW, default_tail
from kvrecomp.plan.footprint import MARGIN, logits_bytes, memory_needed, prefill_bytes, sampling_bytes, weights_in
from kvrecomp.plan.layout import MOST_BLOCKS
from kvrecomp.predict.hardware import LARGEST_DEVICE, LEAST_DEVICE, HardwareProfile

WINDOWS = tuple(DEFAULT_WINDOW >> shift for shift in (0, 2, 4, 6))
FEW_BLOCKS = 256  # of a layer: the windows to choose from are so large that the prompt has no more
WINDOW_SHARE = 1 / 8  # of the device memory beside the weights, at most, is window
TAIL_SHARE = 1 / 8  # of the device memory beside the weights, at most, is tail
MOST_TAIL_BYTES = 4 * GIB


@dataclass(frozen=True)
class Problem:
    """What a plan is to be found for; what is None is open, to be chosen.

    `workload` is that of one of the `groups`. `weights` has the memory of each layer's. `tail` is in tokens, `window`
    and the budget, which leaves nothing open (`resolve_budget`), in bytes.
    """

    shape: ModelShape
    workload: Workload
    profile: HardwareProfile
    budget: Budget
    groups: int = 1
    order: Order | None = None
    weights: tuple[Memory, ...] | None = None
    tail: int | None = None
    window: int | None = None
    drafting: Drafting | None = None
    loss: Loss = "none"

    @cached_property
    def weight_memories(self) -> tuple[Memory, ...]:
        """The memory of each layer's weights: the device, where they are open."""
        return ("device",) * len(self.shape.layers) if self.weights is None else self.weights

    @cached_property
    def beside_weights(self) -> float:
        """Bytes of device memory that the weights there leave. Raises `PlanError` for other than one memory a layer."""
        return max(0.0, (self.budget.device or 0.0) - weights_in(self.shape, self.weight_memories)["device"])

    @cached_property
    def largest_hosted(self) -> tuple[int, int]:
        """Bytes of the largest layer and matrix of those whose weights are in host memory; 0 where none are."""
        hosted = {layer for layer, memory in zip(self.shape.layers, self.weight_memories) if memory == "host"}
        layer = max((layer.parameters for layer in hosted), default=0)
        matrix = max((max(map(max, layer.matrices)) for layer in hosted), default=0)
        return layer * self.shape.itemsize, matrix * self.shape.itemsize

    @cached_property
    def prefill(self) -> int:
        """Bytes of device memory that a prompt or choosing tokens takes for a while; it is over when a step needs its
        window."""
        prefill = prefill_bytes(self.shape, self.workload) + 2 * self.largest_hosted[0]
        return max(prefill, self.tokens_per_step * sampling_bytes(self.shape, self.workload))

    @cached_property
    def logits(self) -> int:
        """Bytes of the logits of all groups, which are on the device from one step to the next."""
        return self.tokens_per_step * self.groups * logits_bytes(self.shape, self.workload)

    @cached_property
    def for_cache(self) -> float:
        """Bytes of device memory that are left for tails, blocks and a window; nothing fits where there are none."""
        return self.beside_weights - self.logits - self.prefill

    @cached_property
    def windows(self) -> tuple[int, ...]:
        """The windows to choose from: where it is open, the two largest of WINDOWS that there is room for, of at least
        a token's bytes and of what is cached of the prompt in FEW_BLOCKS. A smaller window leaves more room for
        blocks, and cuts what is sent into more copies."""
        if self.window is not None:
            return (self.window,)
        fitting = [size for size in WINDOWS if size <= max(self.beside_weights * WINDOW_SHARE, self.prefill)]
        row_bytes, prompt = self.workload.batch * self.shape.itemsize, self.workload.prompt
        widths = {layer: max(map(layer.width, FORMS)) for layer in self.layer_shapes}
        most = max(width * row_bytes * layer.cached(prompt) for layer, width in widths.items())
        least = max(max(widths.values()) * row_bytes, BLOCKS_PER_WINDOW * most // FEW_BLOCKS)
        return tuple(max(size, least) for size in fitting[:2] or WINDOWS[-1:])

    @cached_property
    def tail_tokens(self) -> int:
        """Tokens of the tail: as many as take a small share of the memory, where it is open, or as many as it takes to
        write out no more than MOST_BLOCKS."""
        if self.tail is not None:
            return min(self.tail, self.workload.new)
        most_bytes = min(MOST_TAIL_BYTES, self.beside_weights * TAIL_SHARE) / self.groups
        tail = default_tail(self.shape, self.workload, self.windows[-1], most_bytes)
        return max(tail, -(-self.workload.new // MOST_BLOCKS))

    @property
    def tokens_per_step(self) -> int:
        """New tokens of a row that go through a step, at most."""
        return 1 + (self.drafting.most if self.drafting else 0)

    @cached_property
    def codecs(self) -> tuple[Codec, ...]:
        """The codecs to choose from, lossless but for that whose loss is allowed."""
        lossless: tuple[Codec, ...] = ("plain", "packed") if self.shape.dtype == PACKED_DTYPE else ("plain",)
        return lossless if self.loss == "none" else (*lossless, self.loss)

    @cached_property
    def write_outs(self) -> int:
        """How often the tail is written out."""
        return max(0, (self.workload.new - 1) // self.tail_tokens)

    @cached_property
    def layer_shapes(self) -> tuple[LayerShape, ...]:
        """The distinct shapes of layers, in the order in which they occur."""
        return tuple(self.shape.distinct_layers)

    @cached_property
    def layer_numbers(self) -> tuple[int, ...]:
        """For each layer, which of `layer_shapes` it has; cached, as comparing those of many layers takes long."""
        return tuple(map(self.layer_shapes.index, self.shape.layers))


def default_order(hosted: bool, groups: int) -> Order:
    """The order of groups where none is asked for; `hosted` says whether there are weights in host memory.

    Column order sends these once for all groups. Without them row order has the smaller program, and is as fast where
    the link is the whole cost.
    """
    return "column" if hosted and groups > 1 else "row"


def resolve_budget(budget: Budget, profile: HardwareProfile) -> Budget:
    """The budget with what it leaves open taken from the profile, less a margin.

    Raises:
        PlanError: more or less device memory than any device has: it is in the wrong unit.
    """
    device, host = budget.device, budget.host
    if device is None:
        device = profile.device_bytes * (1 - MARGIN)
    if host is None:
        host = float("inf") if profile.host_bytes is None else profile.host_bytes * (1 - MARGIN)
    if not LEAST_DEVICE <= device <= LARGEST_DEVICE:
        raise PlanError(
            f"the budget is {device:.0f} bytes ({format_bytes(device)}) of device memory, "
            f"{'less' if device < LEAST_DEVICE else 'more'} than any device has: a Budget is in bytes, Budget.of_gib "
            "takes GiB"
        )
    return Budget(device, host)


def excess_bytes(plan: Plan, budget: Budget) -> float:
    """How many bytes the plan needs over a budget that leaves nothing open, in both memories together."""
    needed = memory_needed(plan)
    return sum(max(0.0, sum(needed[memory].values()) - getattr(budget, memory)) for memory in MEMORIES)
