"""Measures decode steps of other programs on the same model shapes and workloads, with random weights of their own.

    python experiments/peers.py --peer=huggingface_offloaded --model=opt-6.7b --batch=32 --prompt=1024 --new=32

A row is one of experiments/benchmark.py, with the peer's name as its plan and null where a field has no meaning; of
several batches and prompts each is measured with each, as there. Only decode steps are timed, each awaited;
`report.after_warm_up` says which count, as for our own. Another program joins with a `peer.Peer` in `peers.PEERS`.
"""

import dataclasses
import json

from experiments.support import script
from experiments.support.peers import PEERS
from experiments.support.peers.peer import Steps
from experiments.support.results import tables
from experiments.support.results.report import run_info, versions
from experiments.support.suite import machine_lock
from experiments.support.suite.row import Row, step_times

from absl import flags

import models
from kvrecomp.files import write_json
from kvrecomp.plan import Workload
from kvrecomp.plan.named import named_plan
from models.checkpoint import DTYPES


def define_flags(into: flags.FlagValues) -> None:
    define = script.Define(into)
    define.enum("peer", "huggingface", list(PEERS), "The program.")
    define.string("model", "opt-125m", "Preset whose shape is decoded with.")
    define.list("batch", ["8"], "Rows decoded together, or several such numbers.")
    define.list("prompt", ["256"], "Tokens in each prompt, or several such numbers.")
    define.integer("new", 32, "New tokens per row.", lower_bound=1)
    define.enum("dtype", "bfloat16", list(DTYPES), "Of weights and cache.")
    define.seed("Of weights and prompts.")
    define.string("out", None, "Also write the JSON document to this file.")
    define.string("commit", "", "Recorded as the commit, where git cannot be asked.")


def row_of(peer: str, model: str, dtype: str, workload: Workload, steps: Steps) -> Row:
    """The row of a peer that took these steps."""
    return Row(
        model=model,
        **dataclasses.asdict(workload),
        asked=peer,
        plan=peer,
        dtype=dtype,
        link_bytes=PEERS[peer].link_bytes,
        peak_device_bytes=steps.peak_device_bytes,
        prefill_s=steps.prefill_seconds,
        **step_times(steps.seconds, workload.batch),
    )


def main(given: flags.FlagValues) -> None:
    config, workloads = models.preset(given.model), script.workloads(given.batch, given.prompt, given.new)
    for workload in workloads:
        named_plan("device", config.shape, workload)  # raises where the model has too few positions
    tables.check_out(given.out, "link_efficiency")
    peer = PEERS[given.peer]
    if reason := peer.unavailable(False):
        raise ValueError(f"{given.peer}: {reason}")
    rows, document = [], {}
    with machine_lock.exclusive():
        for workload, steps in zip(workloads, peer.run(config, given.dtype, workloads, given.seed), strict=True):
            rows.append(dataclasses.asdict(row_of(given.peer, config.name, given.dtype, workload, steps)))
            document = run_info(given.commit, device=steps.device) | {"versions": versions(), "rows": rows}
            if given.out:
                write_json(given.out, document)  # what was measured is not lost with what comes after
    print(json.dumps(document))


if __name__ == "__main__":
    script.run(main, define_flags)
