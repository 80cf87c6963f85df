"""Makes the plan of layers of one shape from a few numbers, which the scheduler varies, and the room that there is."""

from collections.abc import Sequence
from dataclasses import dataclass

from kvrecomp.plan import LEAST_ALIGNED, BlockSpec, Form, LayerPlan, LayerShape, Memory, Method, ModelShape, Workload
from kvrecomp.plan.cutting import BLOCKS_PER_WINDOW, cut_runs


@dataclass(frozen=True)
class Settings:
    """What the plan of layers of one shape is made from.

    `on_device` is the fraction of the device memory left over that holds keys and values, None for as much as leaves no
    token behind the link; `activations` the fraction of the prompt behind the link that are activations. `tail_form` is
    that of generated tokens, and `growth` the fraction of the written-out tails that could stay on the device for which
    room is kept; the prompt comes next, and what is left over is for more of them. Parts of a prompt of LEAST_ALIGNED
    tokens or more are multiples of `unit`, but for the last, of which the rest is a block of its own.
    """

    on_device: float | None
    activations: float
    method: Method
    tail_form: Form
    growth: float
    unit: int = 1


@dataclass(frozen=True)
class Builder:
    """Makes the plan of layers of one shape.

    `room` is how many bytes of tail and blocks each may keep on the device, `window_room` the same where a window is
    needed too.
    """

    layer: LayerShape
    shape: ModelShape
    workload: Workload
    window: int
    tail: int
    room: float
    window_room: float

    def plan(self, settings: Settings) -> LayerPlan:
        """The plan with these settings, which may be over the budget where even the tail is."""
        prompt = self.layer.cached(self.workload.prompt)
        write_outs = max(0, (self.workload.new - 1) // self.tail)
        smaller = smaller_form(self.layer)
        pair, small = self._bytes("keys_values"), self._bytes(smaller)
        grown = self.tail * self._bytes(settings.tail_form)  # a tail's bytes, written out or not
        all_fits = prompt * small + (1 + write_outs) * grown <= self.room
        room = max(0.0, (self.room if all_fits else self.window_room) - grown)
        kept = min(write_outs, int(room / grown))
        for_prompt = room - (kept if all_fits else int(settings.growth * kept)) * grown
        if settings.on_device is not None:
            pairs = min(prompt, int(settings.on_device * for_prompt / pair))
        elif prompt * pair <= for_prompt:
            pairs = prompt
        else:  # as many as leave room for the others in the smaller form
            pairs = max(0, int((for_prompt - prompt * small) / (pair - small))) if pair > small else 0
        unit = settings.unit if prompt >= LEAST_ALIGNED else 1

        def part(tokens: int, of: int) -> int:
            """So many, or a few less; all there are as they are."""
            return tokens if tokens >= of else tokens - tokens % unit

        pairs = part(pairs, prompt)
        rest = part(min(prompt - pairs, int((for_prompt - pairs * pair) / small)), prompt - pairs)
        behind = prompt - pairs - rest
        sent = part(round(settings.activations * behind), behind)
        here = {"keys_values": pairs, "activations": 0}
        here[smaller] += rest
        blocks = (
            *self._cut("keys_values", "device", here["keys_values"]),
            *self._cut("activations", "device", here["activations"], unit),
            *_mix(self._cut("activations", "host", sent, unit), self._cut("keys_values", "host", behind - sent)),
        )
        kept = min(write_outs, int((room - pairs * pair - rest * small) / grown))
        stays: list[Memory] = ["device"] * kept
        leaves: list[Memory] = ["host"] if kept < write_outs or behind else ["device"]
        return LayerPlan(blocks, settings.tail_form, (*stays, *leaves), settings.method)

    def _cut(self, form: Form, memory: Memory, tokens: int, unit: int = 1) -> tuple[BlockSpec, ...]:
        """Blocks of so many tokens; where these are no multiple of `unit`, the rest is a block of its own."""
        rest = tokens % unit if tokens >= LEAST_ALIGNED else 0
        runs: list[tuple[Form, Memory, int]] = [(form, memory, tokens - rest), (form, memory, rest)]
        return cut_runs(runs, self.layer, self.shape, self.workload, self.window // BLOCKS_PER_WINDOW)

    def _bytes(self, form: Form) -> int:
        """Of one token."""
        return self.workload.batch * self.layer.width(form) * self.shape.itemsize


def _mix(some: Sequence[BlockSpec], others: Sequence[BlockSpec]) -> list[BlockSpec]:
    """Both in turns: of one kind copies are long and of the other compute is, so that each runs under the other. Of
    two that are due at once the first is one of `some`."""
    turns = [(number / len(own), block) for own in (some, others) for number, block in enumerate(own)]
    return [block for _, block in sorted(turns, key=lambda turn: turn[0])]


def smaller_form(layer: LayerShape) -> Form:
    """The form with fewer bytes; keys and values where they are alike."""
    return "activations" if layer.width("activations") < layer.width("keys_values") else "keys_values"
