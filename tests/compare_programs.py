"""Whether two commits make the same programs: compiles them with the code of both, and compares what XLA made of them.

    python tests/compare_programs.py --other=PATH
    python tests/compare_programs.py --other=PATH --only=split,kvpr --texts=FOLDER

PATH is another checkout, and the programs are those of workloads like the quoted ones, cut to four layers, for a
described H200 (extra `schedule`). Two programs are the same if they execute the same kernels and copies on the same
values in the same order; names, the numbers of arguments and the order of results may differ. The last line says how
many are the same, and the exit status is 1 if not all are. With --texts a folder keeps what was compiled: compare its
`before` and `now`. The other checkout's programs are not compiled again where they are in it.
"""

import dataclasses
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from absl import app, flags, logging
from program_text import normalised

SIZES = {"layers": 4}
SMALL = {**SIZES, "hidden": 1024, "heads": 8, "vocab": 512}
NEW, TAIL = 32, 8  # three write-outs
WORKLOADS = [("opt-6.7b", 32, 1024), ("opt-6.7b", 1, 1024), ("llama-2-7b", 32, 1024), ("llama-3-8b", 64, 4096)]
PLANS = ("keys_values", "activations", "recompute", "split:0.5", "device", "device:0.5", "kvpr:0.75", "auto")


def define_flags(into: flags.FlagValues = flags.FLAGS) -> None:
    flags.DEFINE_string("other", None, "The folder of another checkout.", flag_values=into)
    flags.DEFINE_list("only", [], "Only programs that have one of these words in their name.", flag_values=into)
    flags.DEFINE_string("texts", None, "Keep the programs' texts in this folder.", flag_values=into)
    flags.DEFINE_string("dump", None, "For processes of this script's own: compile into this folder.", flag_values=into)


def cases() -> Iterator[tuple[str, Any, Any]]:
    """Names, models and plans of all that is compared."""
    import kvrecomp  # of the checkout whose programs these are
    import models

    def planned(name: str, config: Any, batch: int, prompt: int, **options: Any) -> Any:
        """A plan by name; for `auto` the device has room for a quarter of the cache."""
        workload = kvrecomp.Workload(batch, prompt, NEW)
        if name != "auto":
            return kvrecomp.named_plan(name, config.shape, workload, tail=TAIL, **options)
        needed = kvrecomp.memory_needed(planned("device", config, batch, prompt))["device"]
        budget = kvrecomp.Budget(sum(needed.values()) - 0.75 * needed["blocks"], 2.0**40)
        profile = kvrecomp.HardwareProfile.from_datasheet("h200")
        return kvrecomp.make_plan(config.shape, workload, profile, budget, tail=TAIL)

    for model, batch, prompt in WORKLOADS:
        config = dataclasses.replace(models.preset(model), **SIZES)
        for name in PLANS:
            yield f"{model} {batch} {name}", config, planned(name, config, batch, prompt)

    sliding = models.LlamaConfig("sliding", kv_heads=2, intermediate=2816, positions=8192, sliding_window=24, **SMALL)
    small = models.OPTConfig("small", intermediate=4096, positions=2048, **SMALL)
    for name in ("activations", "split:0.5", "device"):
        yield f"sliding {name}", sliding, planned(name, sliding, 8, 1024)
        for order, groups in (("row", 1), ("row", 2), ("column", 3)):
            on_device = planned(name, small, 8, 1024, window=2**26)
            for weights, plan in (("device", on_device), ("host", kvrecomp.with_host_weights(on_device, 1.0))):
                plan = dataclasses.replace(plan, groups=groups, order=order)
                yield f"{groups} groups {order} {name} weights {weights}", small, plan


def dump(folder: Path, only: Sequence[str]) -> None:
    """Compiles the programs with the code of the checkout that is imported, and writes their normalised texts."""
    from described_gpu import abstract_model, compile_traced

    import kvrecomp

    logging.set_verbosity(logging.WARNING)
    budget = kvrecomp.Budget.of_gib(device=1000, host=1000)
    for name, config, plan in cases():
        written_out = sorted({("write-out", plan.written_to(write_outs)) for write_outs in range(plan.write_outs)})
        programs = [("prefill",), ("step", 0), ("step", plan.write_outs), *written_out]
        paths = {folder / f"{name} {' '.join(map(str, program))}.txt": program for program in programs}
        missing = {
            path: program
            for path, program in paths.items()
            if not path.exists() and (not only or any(word in path.name for word in only))
        }
        if not missing:
            continue
        decoder = kvrecomp.Decoder(abstract_model(config, kvrecomp.placement(plan)), plan, budget=budget)
        for path, program in missing.items():
            text, temporary = compile_traced(decoder._trace(*program), decoder._options(*program))
            path.write_text(f"{normalised(text)}\ntemporary bytes {temporary}\n", encoding="utf-8")


def compare(before: Path, after: Path, only: Sequence[str]) -> bool:
    """Prints what is the same and what differs; whether all is the same."""
    names = sorted({path.name for path in (*before.glob("*.txt"), *after.glob("*.txt"))})
    names = [name for name in names if not only or any(word in name for word in only)]
    same = 0
    for name in names:
        paths = before / name, after / name
        texts = [path.read_text(encoding="utf-8") if path.exists() else None for path in paths]
        same += texts[0] == texts[1]
        print(f"{'same' if texts[0] == texts[1] else 'differs':8} {Path(name).stem}")
    print(f"{same} of {len(names)} programs are the same")
    return bool(names) and same == len(names)


def main(_: Sequence[str], given: flags.FlagValues = flags.FLAGS) -> None:
    if given.dump:
        dump(Path(given.dump), given.only)
        return
    if not given.other:
        raise app.UsageError("--other is missing: give the folder of another checkout")
    checkouts = {"before": Path(given.other).resolve(), "now": Path(__file__).resolve().parent.parent}
    with tempfile.TemporaryDirectory() as temporary:
        texts = Path(given.texts or temporary)
        processes = []
        for name, checkout in checkouts.items():
            folder = texts / name
            folder.mkdir(parents=True, exist_ok=True)
            if name == "now":
                for old in folder.glob("*.txt"):
                    old.unlink()
            variables = {
                "PYTHONPATH": str(checkout),
                "JAX_PLATFORMS": "cpu",
                "JAX_DISABLE_MOST_OPTIMIZATIONS": "1",  # of LLVM's, which nobody reads
                "XLA_PJRT_GPU_HOST_MEMORY_LIMIT_GB": "1000",
            }
            command = [sys.executable, __file__, f"--dump={folder}", f"--only={','.join(given.only)}"]
            processes.append(subprocess.Popen(command, env=os.environ | variables, cwd=checkout))
        if any([process.wait() for process in processes]):  # a list: of both
            raise SystemExit("not all programs were compiled")
        if not compare(texts / "before", texts / "now", given.only):
            raise SystemExit(1)


if __name__ == "__main__":
    define_flags()
    app.run(main)
