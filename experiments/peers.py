"""Measures decode steps of other programs on the same model shapes and workloads, with random weights of their own.

    python experiments/peers.py --peer=huggingface_offloaded --model=opt-6.7b --batch=32 --prompt=1024 --new=32

A row is one of experiments/benchmark.py, with the peer's name as its plan and null where a field has no meaning; of
several batches and prompts each is measured with each, as there. Only decode steps are timed, each awaited;
`report.after_warm_up` says which count, as for our own. Another program joins with a `peer.Peer` in `programs.PEERS`.
"""

import json
import statistics
from collections.abc import Sequence
from typing import Any

import numpy as np
from absl import flags

import models
from experiments.support import script
from experiments.support.peers import PEERS
from experiments.support.peers.peer import Steps
from experiments.support.results import tables
from experiments.support.results.report import after_warm_up, run_info, versions
from experiments.support.suite import machine_lock
from kvrecomp.files import write_json
from kvrecomp.plan import Workload
from kvrecomp.plan.named import named_plan
from models.checkpoint import DTYPES
from models.config import Config


def row_of(name: str, config: Config, dtype: str, work: Workload, steps: Steps) -> dict[str, Any]:
    """The row of a results file: the fields of `benchmark.Row`."""
    seconds = after_warm_up(steps.seconds)
    median = statistics.median(seconds)
    return {
        "model": config.name,
        "batch": work.batch,
        "prompt": work.prompt,
        "new": work.new,
        "asked": name,
        "plan": name,
        "dtype": dtype,
        "weights": None,
        "groups": None,
        "order": None,
        "device_budget": None,
        "median_ms": median * 1e3,
        "p95_ms": float(np.percentile(seconds, 95)) * 1e3,
        "worst_ms": max(seconds) * 1e3,
        "predicted_ms": None,
        "link_bytes": PEERS[name].link_bytes,
        "predicted_bytes": None,
        "link_efficiency": None,
        "tokens_per_second": work.batch / median,
        "peak_device_bytes": steps.peak_device_bytes,
        "temp_bytes": None,
        "compile_s": None,
        "prefill_s": steps.prefill_seconds,
        "programs": None,
        "step_ms": [round(1e3 * each, 2) for each in steps.seconds],
    }


def define_flags(into: flags.FlagValues = flags.FLAGS) -> None:
    """Called by the script only."""
    flags.DEFINE_enum("peer", "huggingface", list(PEERS), "The program.", flag_values=into)
    flags.DEFINE_string("model", "opt-125m", "Preset whose shape is decoded with.", flag_values=into)
    flags.DEFINE_list("batch", ["8"], "Rows decoded together, or several such numbers.", flag_values=into)
    flags.DEFINE_list("prompt", ["256"], "Tokens in each prompt, or several such numbers.", flag_values=into)
    flags.DEFINE_integer("new", 32, "New tokens per row.", lower_bound=1, flag_values=into)
    flags.DEFINE_enum("dtype", "bfloat16", list(DTYPES), "Of weights and cache.", flag_values=into)
    flags.DEFINE_integer("seed", 0, "Of weights and prompts.", flag_values=into)
    flags.DEFINE_string("out", None, "Also write the JSON document to this file.", flag_values=into)
    flags.DEFINE_string("commit", "", "Recorded as the commit, where git cannot be asked.", flag_values=into)


def main(_: Sequence[str], given: flags.FlagValues = flags.FLAGS) -> None:
    """Unpacks the flags."""
    config, works = models.preset(given.model), script.workloads(given.batch, given.prompt, given.new)
    for work in works:
        named_plan("device", config.shape, work)  # raises where the model has too few positions
    tables.check_out(given.out, "link_efficiency")
    peer = PEERS[given.peer]
    if reason := peer.unavailable(False):
        raise ValueError(f"{given.peer}: {reason}")
    rows, document = [], {}
    with machine_lock.exclusive():
        for work, steps in zip(works, peer.run(config, given.dtype, works, given.seed), strict=True):
            rows.append(row_of(given.peer, config, given.dtype, work, steps))
            document = run_info(given.commit, device=steps.device) | {"versions": versions(), "rows": rows}
            if given.out:
                write_json(given.out, document)  # what was measured is not lost with what comes after
    print(json.dumps(document))


if __name__ == "__main__":
    define_flags()
    script.run(main)
