"""A plan as a table for people."""

import itertools
from collections.abc import Sequence
from typing import Any

from rich import box
from rich.table import Table

from kvrecomp.plan.codecs import CODECS, Codec
from kvrecomp.plan.shapes import FORMS, MEMORIES


def plan_table(plan: Any) -> Table:
    """A `Plan` for a terminal: tokens and bytes per layer in each form and memory, layers alike in one line."""
    title = f"Plan {plan.name}: {plan.shape.name}, {plan.workload}"
    table = Table(title=title, box=box.SIMPLE, title_justify="left")
    table.add_column("layers", no_wrap=True)
    columns = [(form, memory) for memory in MEMORIES for form in FORMS]
    for form, memory in columns:
        table.add_column(f"{form.replace('_', ' and ')}\non the {memory}", justify="right")
    table.add_column("tail", justify="right")
    table.add_column("method")
    hosted = sum(layer.weights == "host" for layer in plan.layers)
    if hosted:
        table.add_column("weights")
    for row, (layer, layer_shape) in enumerate(plan.distinct_layers):
        numbers = [number for number, distinct in enumerate(plan.distinct_numbers) if distinct == row]
        cells = []
        for form, memory in columns:
            blocks = [b for b in layer.prompt if (b.form, b.memory) == (form, memory)]
            written = [
                _cell(codec, [b.tokens for b in of_codec], [plan.bytes_of(layer_shape, b) for b in of_codec])
                for codec in CODECS
                if (of_codec := [b for b in blocks if b.codec == codec])
            ]
            cells.append("\n".join(written) or "-")
        tail_size = plan.bytes_of(layer_shape, layer.tail_block(plan.room))
        cells += [_cell("plain", [plan.room], [tail_size]), layer.method, *([layer.weights] if hosted else [])]
        table.add_row(_spans(numbers), *cells)
    total = [f"{format_bytes(plan.bytes_in(memory))} in blocks on the {memory}" for memory in MEMORIES]
    if plan.write_outs and plan.codecs != ("plain",):
        codecs = {layer.written_to(number)[1] for layer, _ in plan.distinct_layers for number in range(plan.write_outs)}
        total.append(f"tails written out {' and '.join(sorted(codecs))}")
    if not plan.lossless:
        total.append("with loss")
    if hosted:
        layers = f"{hosted} layer{'s' if hosted > 1 else ''} ({format_bytes(plan.host_weight_bytes)})"
        total.append(f"weights of {layers} in host memory")
    if plan.groups > 1:
        total.append(f"{plan.groups} groups in {plan.order} order")
    if plan.drafting is not None:
        size = f", {format_bytes(plan.sketch_bytes(plan.write_outs))}" if plan.sketched else ""
        where = " made under copies" if plan.drafts_under_copies else ""
        total.append(f"up to {plan.drafting.most} drafts a step{where} ({plan.drafting.name}{size})")
    caption = f"{', '.join(total)}; window {format_bytes(plan.window)}; {plan.schedule}"
    table.caption = f"{caption}\n{plan.reason}" if plan.reason else caption
    table.caption_justify = "left"
    return table


def _cell(codec: Codec, tokens: Sequence[int], sizes: Sequence[int]) -> str:
    """Tokens and bytes of blocks, and their codec where it says anything."""
    return f"{sum(tokens)} ({format_bytes(sum(sizes))}{'' if codec == 'plain' else f', {codec}'})"


def _spans(numbers: Sequence[int]) -> str:
    """Numbers as spans, and as their count where those are many: "0-3, 7", "16 of 0-31"."""
    runs = [
        [number for _, number in run]
        for _, run in itertools.groupby(enumerate(numbers), key=lambda item: item[1] - item[0])
    ]
    if len(runs) > 3:
        return f"{len(numbers)} of {numbers[0]}-{numbers[-1]}"
    return ", ".join(f"{run[0]}" if len(run) == 1 else f"{run[0]}-{run[-1]}" for run in runs)


def format_bytes(size: float) -> str:
    """Bytes for people, in powers of 1024: `format_bytes(3 * 2**20) == "3.0 MiB"`."""
    for unit in ("B", "KiB", "MiB"):
        if abs(size) < 1024:
            return f"{size:.1f} {unit}" if unit != "B" else f"{size:.0f} B"
        size /= 1024
    return f"{size:.2f} GiB"
