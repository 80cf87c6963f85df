"""Continues prompts under the fastest plan that fits, and compares the result with that of another plan.

    python experiments/generate.py
    python experiments/generate.py --plan=activations
    python experiments/generate.py --prompt='Return the' --plan=split:0.5 --temperature=0.5
    python experiments/generate.py --model=opt-1.3b --max_new_tokens=64 --json
    python experiments/generate.py --input=prompts.jsonl --output=out.jsonl

Without flags it loads the checkpoint that this repository ships, continues a left-padded batch, and prints the texts,
the plan and why it was chosen, the time of a step, the bytes that crossed the link, and how far the logits are from
those of a plan with the cache in the other memory. With --input it continues a file of prompts, and goes on where it
was killed; see `experiments.support.job.runner`. From a notebook:

    model, tokenizer = load("experiments/checkpoints/pydoc")
    run = continue_prompts(model, tokenizer, ["Return the"], plan="keys_values")
    show(run)
"""

import dataclasses
import functools
import json
import statistics
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import numpy as np
from absl import flags
from rich.console import Console
from rich.text import Text
from tokenizers import Tokenizer

import kvrecomp
import models
from experiments.support import script
from experiments.support.job import runner as job
from experiments.support.job.reader import checkpoint_hash
from experiments.support.job.runner import BATCH
from experiments.support.prompts import ENDS, PADS, PROMPTS, encode, is_ids, read_prompts, special_tokens
from experiments.support.results.report import run_info
from experiments.support.source import SHIPPED, Source
from kvrecomp.plan import AUTO, format_bytes
from kvrecomp.plan.footprint import check_within
from kvrecomp.plan.named import NAMES
from kvrecomp.run.limits import limits
from kvrecomp.run.prompt import split_groups
from kvrecomp.run.sampling import Sampling

NEW_TOKENS = 200
WIDTH = 120  # of what is printed into a file or a pipe


def define_flags(into: flags.FlagValues) -> None:
    """Called by the script only: notebooks and tests import without them."""
    defining = (flags.DEFINE_string, flags.DEFINE_integer, flags.DEFINE_float, flags.DEFINE_bool)
    string, integer, number, boolean = (functools.partial(define, flag_values=into) for define in defining)
    string("checkpoint", str(SHIPPED), "Directory of a model: Hugging Face's format, or models.save's.")
    string("model", None, "Instead of a checkpoint, a preset with random weights; ids are printed.")
    flags.DEFINE_multi_string("prompt", [], "Text to continue; repeatable. Default: a few built in.", flag_values=into)
    string("prompts_file", None, "More prompts, one a line; blank lines are skipped.")
    integer("max_new_tokens", NEW_TOKENS, "Most new tokens a row.", lower_bound=1)
    string("input", None, "Instead of prompts, a file of them: lines of JSON, with a prompt and maybe an id.")
    string("output", None, "Where to write records of an input; one that is there is gone on with.")
    integer("batch", BATCH, "Most prompts of an input decoded at once.", lower_bound=1)
    string("plan", AUTO, f"What is cached how and where: {AUTO}, the fastest; or {', '.join(NAMES)}.")
    number("window_mib", None, "Bytes from the host in flight or in use, in MiB; default: as the plan needs.")
    integer("tail", None, "Tokens in the tail; default: as the plan needs.", lower_bound=1)
    number("device_memory_gib", None, "Device memory to use, weights included; default: what is free.")
    number("host_memory_gib", None, "Pinned host memory to use; default: what is free.")
    boolean("do_sample", True, "Sample; --nodo_sample takes the likeliest token.")
    number("temperature", 0.7, "Logits are divided by it.")
    integer("top_k", 0, "Sample from so many of the likeliest tokens; 0: all.")
    number("top_p", 0.9, "Sample from the fewest tokens that have this probability together.")
    integer("seed", 0, "Of sampling, and of random weights.", lower_bound=0, upper_bound=2**32 - 1)
    string("dtype", None, "Of weights and cache; default: float32 on a CPU, else as stored or bfloat16.")
    boolean("check", True, "Compare the logits with those of a plan with the cache in the other memory.")
    boolean("json", False, "Print a JSON document as the last line of standard output.")


@dataclass(frozen=True)
class Check:
    """How far logits are from those of another plan that is fed the same tokens.

    `difference` is the largest absolute one, None where the other plan could not be run, for the `reason` given.
    """

    plan: str
    difference: float | None
    tolerance: float
    reason: str = ""

    @property
    def passed(self) -> bool:
        """Whether the difference is within the tolerance; a check that could not be made has not failed."""
        return self.difference is None or self.difference <= self.tolerance

    def __str__(self) -> str:
        if self.difference is None:
            return f"logits not compared with those of plan {self.plan}: {self.reason}"
        verdict = "equal" if self.passed else "DIFFER FROM"
        return (
            f"logits {verdict} those of plan {self.plan}: largest difference {self.difference:.2g}, "
            f"tolerance {self.tolerance:.2g}"
        )


@dataclass(frozen=True)
class Run:
    """What `continue_prompts` did: `continuations` are token ids, `texts` the same as text if there is a tokenizer."""

    prompts: list[str]
    prompt_tokens: list[int]
    continuations: list[list[int]]
    texts: list[str] | None
    result: kvrecomp.Generated
    check: Check | None

    @property
    def median_step_ms(self) -> float | None:
        """Milliseconds between tokens; None where there was one token only."""
        return statistics.median(self.result.step_seconds) * 1e3 if self.result.step_seconds else None


# --- the work ---------------------------------------------------------------------------------------------------------


def load(checkpoint: str | Path = SHIPPED, **options: Any) -> tuple[models.CausalLM, Tokenizer | None]:
    """A model and its tokenizer if it has one; the options are those of `Source`."""
    source = Source(checkpoint, **options)
    _, tokenizer = source.describe()
    return source.load(), tokenizer


def continue_prompts(
    model: models.CausalLM,
    tokenizer: Tokenizer | None,
    prompts: Sequence[str] = PROMPTS,
    *,
    plan: kvrecomp.Plan | str = AUTO,
    max_new_tokens: int = NEW_TOKENS,
    budget: kvrecomp.Budget | None = None,
    sampling: Sampling | None = None,
    check: bool = True,
) -> Run:
    """Continues the prompts together under the plan; `check` compares all logits with those of another plan.

    Raises:
        PromptError, PlanError, FloatingPointError: as `kvrecomp.generate`.
    """
    ids, mask = encode(tokenizer, prompts)
    ends, pads = special_tokens(tokenizer, ENDS), special_tokens(tokenizer, PADS)
    result = kvrecomp.generate(
        model,
        ids,
        mask,
        max_new_tokens=max_new_tokens,
        plan=plan,
        budget=budget,
        eos_token_id=ends or None,
        pad_token_id=pads[0] if pads else None,
        output_logits=check,
        **dataclasses.asdict(sampling or Sampling()),
    )
    new = [row[ids.shape[1] :][:count].tolist() for row, count in zip(result.sequences, result.new_tokens)]
    return Run(
        prompts=list(prompts),
        prompt_tokens=mask.sum(axis=1).tolist(),
        continuations=new,
        texts=None if tokenizer is None else [tokenizer.decode(own) for own in new],
        result=result,
        check=check_logits(model, result, mask, budget) if check else None,
    )


def check_logits(
    model: models.CausalLM, result: kvrecomp.Generated, mask: np.ndarray, budget: kvrecomp.Budget | None = None
) -> Check:
    """Decodes the same tokens with the cache on the device, or with K and V in host memory if it was on the device or
    does not fit there.

    The difference is rounding: float32 is held to 1e-4, and what is rounded more coarsely to a few units in the last
    place of the largest logit.
    """
    plan, given = result.plan, result.logits
    if given is None:
        raise ValueError("the result has no logits to check: generate with output_logits=True")
    coarse = {"bfloat16": 2**-8, "float16": 2**-11, "float32": 0 if jax.default_backend() == "cpu" else 2**-11}
    tolerance = max(1e-4, 8 * coarse[plan.shape.dtype] * float(np.abs(given).max()))
    names = ["device"] if plan.bytes_in("host", plan.write_outs) else []
    names += [] if plan.name == "keys_values" else ["keys_values"]
    misfit, options = None, {"groups": plan.groups, "order": plan.order, "tail": plan.tail, "window": plan.window}
    for name in names:
        try:
            weights = [layer.weights for layer in plan.layers]
            other = kvrecomp.plan_for(name, plan.shape, plan.workload, weights=weights, **options)
            decoder = kvrecomp.Decoder(model, other, budget=budget)
            break
        except kvrecomp.PlanError as error:
            misfit = misfit or str(error)
    else:
        return Check(names[0], None, tolerance, misfit or "")
    prompt, new = np.split(result.sequences, [mask.shape[1]], axis=1)
    caches, logits = zip(*(decoder.prefill(*part) for part in split_groups(prompt, mask, other)))
    differences = [_difference(logits, given[0])]
    for tokens, expected in zip(new.T, given[1:]):
        caches, logits = decoder.step_groups(caches, jax.device_put(np.split(tokens, plan.groups)))
        differences.append(_difference(logits, expected))
    return Check(name, float(np.max(differences)), tolerance)  # NaN stays NaN


def _difference(logits: Sequence[jax.Array], expected: np.ndarray) -> float:
    """The largest between logits of all groups and those expected."""
    return np.abs(np.concatenate(jax.device_get(logits)) - expected).max()


# --- what is printed --------------------------------------------------------------------------------------------------


def show(run: Run, console: Console | None = None) -> None:
    """Prints texts, plan, times, bytes and the check."""
    console = console or Console(width=None if sys.stdout.isatty() else WIDTH)
    for number, prompt in enumerate(run.prompts):
        new = run.continuations[number]
        console.rule(f"prompt {number + 1}: {run.prompt_tokens[number]} tokens, {len(new)} new", align="left")
        text = " " + " ".join(map(str, new)) if run.texts is None else run.texts[number]
        console.print(Text.assemble((printable(prompt), "bold"), printable(text)), soft_wrap=True)
    console.rule()
    console.print(run.result.plan.table())
    sent = run.result.link_bytes
    if sent:
        span = format_bytes(sent[0]) if sent[0] == sent[-1] else f"{format_bytes(sent[0])} to {format_bytes(sent[-1])}"
        console.print(f"{run.median_step_ms:.2f} ms a step (median of {len(sent)}), {span} over the link a step")
    if run.check is not None:
        console.print(str(run.check), style="green" if run.check.passed else "bold red", soft_wrap=True)


def printable(text: str) -> str:
    """The text without what would move a terminal's cursor or change its colours."""
    return "".join(char if char.isprintable() or char in "\n\t" else "\N{REPLACEMENT CHARACTER}" for char in text)


def document(run: Run) -> dict[str, Any]:
    """The run as plain data."""
    plan, sent = run.result.plan, run.result.link_bytes
    texts = run.texts or [None] * len(run.prompts)
    return run_info() | {
        "model": plan.shape.name,
        "dtype": plan.shape.dtype,
        "batch": plan.workload.batch,
        "groups": plan.groups,
        "order": plan.order,
        "prompt": plan.workload.prompt,
        "new": plan.workload.new,
        "plan": plan.name,
        "schedule": plan.schedule,
        "tail": plan.tail,
        "window": plan.window,
        "layers": [dataclasses.asdict(layer) for layer in plan.layers],
        "rows": [
            {"prompt": prompt, "prompt_tokens": tokens, "text": text, "ids": ids}
            for prompt, tokens, text, ids in zip(run.prompts, run.prompt_tokens, texts, run.continuations)
        ],
        "prefill_s": run.result.prefill_seconds,
        "median_ms": run.median_step_ms,
        "link_bytes": int(statistics.median(sent)) if sent else None,
        "link_bytes_first": sent[0] if sent else None,
        "link_bytes_last": sent[-1] if sent else None,
        "check": None if run.check is None else dataclasses.asdict(run.check) | {"passed": run.check.passed},
    }


# --- the command ------------------------------------------------------------------------------------------------------


def check_flags(given: flags.FlagValues) -> None:
    """Raises ValueError for flags that exclude each other, or need one that is not there."""
    if (given.input is None) != (given.output is None):
        raise ValueError("--input and --output go together: a file of prompts, and one for their records")
    if given.input is None and given["batch"].present:
        raise ValueError("--batch is for --input: prompts that are given are one batch")
    for name in ("prompt", "prompts_file", "check"):
        if given.input is not None and given[name].present and given[name].value:
            raise ValueError(f"--{name} and --input exclude each other: give one of them")


def continue_given(given: flags.FlagValues, budget: kvrecomp.Budget) -> Run:
    """Continues the prompts of the flags, or the built-in ones."""
    prompts = read_prompts(given.prompt, given.prompts_file)
    sampling = Sampling(given.do_sample, given.temperature, given.top_k, given.top_p, given.seed)
    source = source_of(given)
    shape, tokenizer = source.describe()
    if tokenizer is None and given.model is None and not all(map(is_ids, prompts)):
        raise models.CheckpointError(
            f"{given.checkpoint} has no tokenizer.json, so text cannot be read or written: put the model's own "
            "there (transformers: AutoTokenizer.from_pretrained(...).save_pretrained(...)), or give ids, such as "
            "--prompt='5 17 2'"
        )
    workload = kvrecomp.Workload(len(prompts), encode(tokenizer, prompts)[0].shape[1], given.max_new_tokens)
    window = script.window_bytes(given.window_mib)
    options = {"budget": budget, "groups": None, "tail": given.tail, "window": window}
    plan = kvrecomp.plan_for(given.plan, shape, workload, **options)
    check_within(plan, limits(budget))  # before the weights are read or made
    return continue_prompts(
        source.load(plan),
        tokenizer,
        prompts,
        plan=plan,
        max_new_tokens=given.max_new_tokens,
        budget=budget,
        sampling=sampling,
        check=given.check,
    )


def source_of(given: flags.FlagValues) -> Source:
    """Where the flags say that the model is from."""
    return Source(given.checkpoint, given.model, given.dtype, given.seed)


def continue_file(given: flags.FlagValues, budget: kvrecomp.Budget) -> job.Summary:
    """Continues a file of prompts into another; see `experiments.support.job.runner`."""
    settings = job.Settings(**{own.name: given[own.name].value for own in dataclasses.fields(job.Settings)})
    return job.run(
        Path(given.input),
        Path(given.output),
        settings,
        checkpoint_hash(Path(given.checkpoint)) if given.model is None else f"{given.model}, seed {given.seed}",
        source_of(given),
        any_text=given.model is not None,
        budget=budget,
    )


def main(given: flags.FlagValues) -> None:
    """Unpacks the flags."""
    check_flags(given)
    budget = kvrecomp.Budget.of_gib(given.device_memory_gib, given.host_memory_gib)
    budget = kvrecomp.Budget(**limits(budget))  # what is free before the weights are there
    try:
        done = continue_given(given, budget) if given.input is None else continue_file(given, budget)
    except KeyboardInterrupt:
        if given.input is None:
            raise
        raise KeyboardInterrupt(f"; the same command goes on with {given.output}") from None
    if isinstance(done, Run):
        show(done)
    else:
        print(done)
    if given.json:
        print(json.dumps(document(done) if isinstance(done, Run) else run_info() | dataclasses.asdict(done)))
    if isinstance(done, Run) and done.check is not None and not done.check.passed:
        sys.exit(f"error: {done.check}")


if __name__ == "__main__":
    script.run(main, define_flags)
