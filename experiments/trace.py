"""Traces a decode step on a GPU, and draws when the link copied and when the GPU computed, layer by layer.

    python experiments/trace.py --model=opt-6.7b --batch=32 --prompt=1024 --compare --plot=trace.png --out=trace.json
    python experiments/trace.py --from=trace.json --plot=trace.png

Two steps are recorded by `jax.profiler`, dispatched one ahead as `generate` does, on caches of random numbers, and the
second is drawn. `--compare` draws KVPR's schedule, keys and values, and activations below each other. `--out` keeps
what the picture needs (`experiments.support.traces.timeline` says how), so that `--from`, on any machine, and
experiments/readme.py can draw it again.

Tracing can make a step take longer; its time without is given too. Of kernels that XLA launches as CUDA graphs no layer
is known: that is said, and drawn hatched. With XLA_FLAGS=--xla_gpu_enable_command_buffer= in the environment there are
no graphs.

There is nothing to draw on a CPU: its trace has the operations of threads, where a copy from one memory to the other is
made by the cores that compute.
"""

import dataclasses
import gc
import json
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from experiments.support import script
from experiments.support.plots import png
from experiments.support.results import tables, terminal
from experiments.support.results.report import run_info
from experiments.support.results.tables import Row
from experiments.support.suite import machine_lock, step_timing
from experiments.support.traces import timeline, xplane

import jax
import numpy as np
from absl import flags
from jax.profiler import ProfileData, ProfileOptions

import kvrecomp
import models
from kvrecomp.files import write_json
from kvrecomp.plan import AUTO
from kvrecomp.plan.footprint import check_weights
from kvrecomp.plan.named import named_weights
from kvrecomp.run import memory
from kvrecomp.run.cache import Cache
from kvrecomp.run.limits import limits

COMPARED = ("kvpr:0.75", "keys_values", "activations")
WARM_UP, STEPS = 3, 2
SHOWN_GAPS = 1e-3  # gaps shorter than this part of the step are not kept, a picture has no room for them


def define_flags(into: flags.FlagValues) -> None:
    define = script.Define(into)
    define.string("model", "opt-1.3b", "Preset whose random weights are decoded with.")
    define.integer("batch", 8, "Rows decoded together.", lower_bound=1)
    define.integer("prompt", 1024, "Cached tokens of a row.", lower_bound=1)
    define.list("plans", ["activations"], "Plans: auto, or as named_plan has them.")
    define.boolean("compare", False, f"Short for --plans={','.join(COMPARED)}.")
    define.string("dtype", "bfloat16", "Of weights and cache.")
    define.device_memory()
    define.host_memory()
    define.string("plot", "trace.png", "Write the picture to this PNG.")
    define.string("out", None, "Also write the JSON document to this file.")
    define.string("from", None, "A JSON document of this script, drawn without tracing.")
    define.string("commit", "", "Recorded as the commit, where git cannot be asked.")


def traced(decoder: kvrecomp.Decoder) -> tuple[list[xplane.Span], float]:
    """What ran in one step, and its seconds; the program is compiled and warm."""
    cache = step_timing.filled_cache(decoder.plan)
    tokens = jax.device_put(np.full(decoder.plan.workload.batch, 5, np.int32), memory.sharding("device"))

    def take(steps: int, cache: Cache) -> Cache:
        logits = None
        for _ in range(steps):
            cache, logits = decoder.step(cache, tokens)
        jax.block_until_ready(logits)
        return cache

    cache = take(WARM_UP, cache)
    options = ProfileOptions()
    options.python_tracer_level = 0  # recording Python's calls would slow down the dispatch
    with tempfile.TemporaryDirectory() as directory:
        jax.profiler.start_trace(directory, profiler_options=options)
        try:
            take(STEPS, cache)
        finally:
            jax.profiler.stop_trace()
        (path,) = Path(directory).rglob("*.xplane.pb")
        spans = xplane.read_spans(ProfileData.from_file(str(path)), xplane.layers_of(decoder.text("step", 0)))
    return xplane.last_step(spans, STEPS)


def measure(model: Any, plan: kvrecomp.Plan, budget: kvrecomp.Budget) -> Row:
    """The step of one plan: timed, then traced."""
    decoder = kvrecomp.Decoder(model, plan, budget=budget)
    with machine_lock.shared():
        decoder.compile(prefill=False)
    with machine_lock.exclusive():
        median = step_timing.step_seconds(decoder)
        return timeline_of(plan, median, *traced(decoder))


def timeline_of(plan: kvrecomp.Plan, median: float, spans: Sequence[xplane.Span], seconds: float) -> Row:
    """What is kept of a traced step that takes `median` seconds untraced."""
    merged = xplane.merged(spans, SHOWN_GAPS * seconds)
    return {
        "model": plan.shape.name,
        **dataclasses.asdict(plan.workload),
        "plan": plan.name,
        "median_ms": 1e3 * median,
        "traced_ms": 1e3 * seconds,
        "link_bytes": plan.link_bytes(0),
        "link_busy": xplane.busy_seconds(spans, "to_device", "to_host") / seconds,
        "gpu_busy": xplane.busy_seconds(spans, "compute") / seconds,
        "unknown": xplane.unknown_share(spans),
        "spans": [[span.kind, span.layer, round(1e3 * span.start, 3), round(1e3 * span.seconds, 3)] for span in merged],
    }


def run(given: flags.FlagValues) -> list[Row]:
    """Traces every plan."""
    names = COMPARED if given.compare else script.names("plans", given.plans)
    platform = jax.devices()[0].platform
    if platform != "gpu":
        raise ValueError(
            f"a trace of copies and compute needs a GPU, and jax runs on {platform}: run it on one (README.md says how "
            "to install jax for it), or draw what was traced before with --from=FILE.json"
        )
    config = step_timing.with_positions(models.preset(given.model), given.prompt + step_timing.NEW)
    shape = dataclasses.replace(config.shape, dtype=given.dtype)
    workload = kvrecomp.Workload(given.batch, given.prompt, step_timing.NEW)
    for name in names:  # mistakes are said before the weights are made
        if name != AUTO:
            kvrecomp.plan_for(name, shape, workload, tail=step_timing.NEW)
    budget = kvrecomp.Budget.of_gib(given.device_memory_gib, given.host_memory_gib)
    check_weights(shape, named_weights("device", len(shape.layers)), limits(budget))
    with machine_lock.shared():
        model = models.create(config, dtype=given.dtype)
    with machine_lock.exclusive():
        machine = kvrecomp.profile(model, batch=given.batch) if AUTO in names else None
    rows, weights = [], kvrecomp.weight_memories(model)
    options = {"budget": budget, "profile": machine, "weights": weights, "tail": step_timing.NEW}
    for name in names:
        plan = kvrecomp.plan_for(name, model.shape, workload, **options)
        rows.append(measure(model, plan, budget))
        gc.collect()  # a decoder's cache is gone before the next one's is made
    return rows


def summary(rows: Sequence[Row]) -> str:
    """How busy link and GPU were, in Markdown."""

    def rate(row: Row) -> str:
        busy = row["link_busy"] * row["traced_ms"]
        return f"{row['link_bytes'] / (busy * 1e6):.1f}" if busy else "-"

    return tables.table(
        rows,
        ("traced step", "{0[plan]}".format),
        ("median ms", "{0[median_ms]:.2f}".format),
        ("traced ms", "{0[traced_ms]:.2f}".format),
        ("link busy", "{0[link_busy]:.1%}".format),
        ("GPU busy", "{0[gpu_busy]:.1%}".format),
        ("GB/s while busy", rate),
    )


def main(given: flags.FlagValues) -> None:
    console, old = terminal.standard_output(), given["from"].value
    if old and given.out:
        raise ValueError("--out is for what is traced, and with --from nothing is: give one of them")
    png.check_path(given.plot)
    tables.check_out(given.out, "spans")
    rows = timeline.timelines(tables.read_file(old)) if old else run(given)
    document = {} if old else run_info(given.commit) | {"rows": rows}
    if given.out:
        write_json(given.out, document)
    timeline.draw(rows, given.plot)
    terminal.show(console, summary(rows))
    console.print(f"drawn to {given.plot}", markup=False, highlight=False, soft_wrap=True)
    for row in rows:
        if row["unknown"] > 0.05:
            console.print(
                f"{row['plan']}: no layer is known of {row['unknown']:.0%} of the compute; if XLA launched it as CUDA "
                "graphs, XLA_FLAGS=--xla_gpu_enable_command_buffer= shows the layers"
            )
    if not old:
        print(json.dumps(document))


if __name__ == "__main__":
    script.run(main, define_flags)
