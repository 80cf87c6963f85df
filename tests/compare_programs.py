"""Whether two commits make the same programs: compiles them with the code of both, and compares what XLA made of them.

    python tests/compare_programs.py --other=PATH
    python tests/compare_programs.py --other=PATH --only=split,kvpr --show="w1 split:0.5 step 0"

PATH is another checkout, and the programs are those of the workloads that results are quoted on, cut to four layers,
for a described H200 (extra `schedule`). Two programs are the same if they execute the same kernels and copies on the
same values in the same order; names, the numbers of arguments and the order of results may differ. The last line says
how many are the same, and the exit status is 1 if not all are. With --texts a folder keeps what was compiled, and the
other checkout's programs are not compiled again where they are in it.
"""

import collections
import dataclasses
import difflib
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from absl import app, flags, logging
from program_text import normalised

LAYERS = 4
TAIL = 8  # of 32 new tokens: three write-outs
W1 = ("opt-6.7b", 32, 1024)
OTHER_WORKLOADS = {  # model, rows, tokens of the prompt
    "w2": ("opt-6.7b", 64, 512),
    "w3": ("opt-13b", 32, 1024),
    "w4": ("llama-2-7b", 32, 1024),
    "w5": ("llama-3-8b", 64, 4096),
    "w6": ("opt-30b", 16, 1024),
}
PLANS = ("keys_values", "activations", "recompute", "split:0.5", "device", "device:0.5", "kvpr:0.75")
SHOWN_LINES = 60  # of a difference


def define_flags(into: flags.FlagValues = flags.FLAGS) -> None:
    flags.DEFINE_string("other", None, "The folder of another checkout.", flag_values=into)
    flags.DEFINE_list("only", [], "Only programs that have one of these words in their name.", flag_values=into)
    flags.DEFINE_list("show", [], "Programs whose differences are printed, by name.", flag_values=into)
    flags.DEFINE_string("texts", None, "Keep the programs' texts in this folder.", flag_values=into)
    flags.DEFINE_string("dump", None, "For processes of this script's own: compile into this folder.", flag_values=into)


# --- compiling, in a process for each checkout: imports are of that one -----------------------------------------------


@dataclass(frozen=True)
class Case:
    """A model, a plan for it, and the programs that are compared."""

    name: str
    config: Any
    plan: Any
    steps: Sequence[int] = (0,)  # after so many write-outs
    prefill: bool = False
    write_outs: bool = True

    def programs(self) -> dict[str, tuple]:
        """By name, the names that the decoder has for them."""
        names = {f"step {write_outs}": ("step", write_outs) for write_outs in self.steps}
        if self.prefill:
            names["prefill"] = ("prefill",)
        if self.write_outs:
            for memories in sorted({self.plan.written_to(write_outs) for write_outs in range(self.plan.write_outs)}):
                names[f"write-out {'-'.join(memories)}"] = ("write-out", memories)
        return {f"{self.name} {name}": program for name, program in names.items()}


def cases() -> Iterator[Case]:
    """All that is compared. Each program takes seconds to compile, so not every plan has every program."""
    import kvrecomp
    import models

    def cut(model: str) -> Any:
        return dataclasses.replace(models.preset(model), layers=LAYERS)

    def named(name: str, config: Any, batch: int, prompt: int, **options: Any) -> Any:
        return kvrecomp.named_plan(name, config.shape, kvrecomp.Workload(batch, prompt, 32), tail=TAIL, **options)

    def auto(config: Any, batch: int, prompt: int) -> Any:
        """The scheduler's choice where the device has room for a quarter of the cache."""
        needed = kvrecomp.memory_needed(named("device", config, batch, prompt))["device"]
        budget = kvrecomp.Budget(sum(needed.values()) - 0.75 * needed["blocks"], 2.0**40)
        profile = kvrecomp.HardwareProfile.from_datasheet("h200")
        return kvrecomp.make_plan(config.shape, kvrecomp.Workload(batch, prompt, 32), profile, budget)

    config = cut(W1[0])
    for name in PLANS:
        steps = (0,) if name in ("keys_values", "recompute", "device") else (0, 2)
        prefill = name in ("activations", "split:0.5", "device:0.5")
        yield Case(f"w1 {name}", config, named(name, config, *W1[1:]), steps, prefill)
        if name in ("keys_values", "activations", "device"):
            yield Case(f"one row {name}", config, named(name, config, 1, 1024), write_outs=False)
    yield Case("w1 auto", config, auto(config, *W1[1:]), prefill=True)

    for workload, (model, *sizes) in OTHER_WORKLOADS.items():
        config, rotary = cut(model), workload in ("w4", "w5")
        for name in PLANS if rotary else ("split:0.5",):
            steps = (0, 2) if rotary and name == "split:0.5" else (0,)
            yield Case(f"{workload} {name}", config, named(name, config, *sizes), steps, steps == (0, 2), rotary)
        yield Case(f"{workload} auto", config, auto(config, *sizes))

    sizes = dict(layers=LAYERS, hidden=1024, heads=8, vocab=512)
    config = models.LlamaConfig("sliding", kv_heads=2, intermediate=2816, positions=8192, sliding_window=193, **sizes)
    for name in ("keys_values", "activations", "split:0.5", "device:0.5"):
        plan = dataclasses.replace(named(name, config, 8, 1024), tail=64)
        plan = dataclasses.replace(plan, workload=kvrecomp.Workload(8, 1024, 512))
        yield Case(f"sliding {name}", config, plan, (0,) if name == "device:0.5" else (0, 2), name == "split:0.5")

    config = models.OPTConfig("small", intermediate=4096, positions=2048, **sizes)
    for order in ("row", "column"):
        for name in ("activations", "split:0.5"):
            plan = dataclasses.replace(named(name, config, 8, 1024), groups=2, order=order)
            yield Case(f"groups {order} {name}", config, plan, steps=(0, 2), write_outs=False)
        for name in ("activations", "device"):
            plan = kvrecomp.with_host_weights(named(name, config, 8, 1024, window=2**26), 1.0)
            plan = dataclasses.replace(plan, groups=1 if order == "row" else 3, order=order)
            yield Case(f"host weights {order} {name}", config, plan, prefill=order == "row", write_outs=False)


def dump(folder: Path, only: Sequence[str]) -> None:
    """Compiles the programs with the code of the checkout that is imported, and writes their normalised texts."""
    from described_gpu import abstract_model, compile_traced

    import kvrecomp

    logging.set_verbosity(logging.WARNING)
    budget = kvrecomp.Budget.of_gib(device=1000, host=1000)
    for case in cases():
        missing = {
            name: program
            for name, program in case.programs().items()
            if (not only or any(word in name for word in only)) and not (folder / f"{name}.txt").exists()
        }
        if not missing:
            continue
        model = abstract_model(case.config, kvrecomp.placement(case.plan))
        decoder = kvrecomp.Decoder(model, case.plan, budget=budget)
        traces = {
            "step": decoder._trace_step,
            "prefill": decoder._trace_prefill,
            "write-out": decoder._trace_write_out,
        }
        for name, program in missing.items():
            kind, *which = program
            text, temporary = compile_traced(traces[kind](*which), decoder._options(*program))
            (folder / f"{name}.txt").write_text(f"{normalised(text)}\ntemporary bytes {temporary}\n", encoding="utf-8")


# --- comparing --------------------------------------------------------------------------------------------------------


def kinds(text: str) -> collections.Counter[str]:
    """How many instructions of each kind the entry has."""
    return collections.Counter(re.findall(r"^  ([a-z\-]+)\.\d+ = ", text[text.index("ENTRY\n") :], re.M))


def differences(before: str, after: str) -> str:
    """In a few words."""
    old, new = kinds(before), kinds(after)
    found = [f"{kind} {old[kind]} -> {new[kind]}" for kind in sorted(old | new) if old[kind] != new[kind]]
    memory = [text.splitlines()[-1].split()[-1] for text in (before, after)]
    if memory[0] != memory[1]:
        found.append(f"temporary bytes {memory[0]} -> {memory[1]}")
    return ", ".join(found) or "as many instructions of each kind"


def compare(before: Path, after: Path, only: Sequence[str], show: Sequence[str]) -> bool:
    """Prints what is the same and what differs; whether all is the same."""
    names = sorted({path.stem for path in (*before.glob("*.txt"), *after.glob("*.txt"))})
    names = [name for name in names if not only or any(word in name for word in only)]
    same = 0
    for name in names:
        paths = [folder / f"{name}.txt" for folder in (before, after)]
        texts = [path.read_text(encoding="utf-8") if path.exists() else None for path in paths]
        if texts[0] == texts[1]:
            same += 1
            print(f"same     {name}")
        elif None in texts:
            print(f"differs  {name}: there is none {'before' if texts[0] is None else 'now'}")
        else:
            print(f"differs  {name}: {differences(*texts)}")
            if name in show:
                lines = difflib.unified_diff(*(text.splitlines() for text in texts), "before", "now", lineterm="", n=1)
                print("\n".join(line[:400] for line, _ in zip(lines, range(SHOWN_LINES))))
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
        if not compare(texts / "before", texts / "now", given.only, given.show):
            raise SystemExit(1)


if __name__ == "__main__":
    define_flags()
    app.run(main)
