"""Continues prompts under the fastest plan that fits, and compares the result with that of another plan.

    python experiments/generate.py
    python experiments/generate.py --plan=activations
    python experiments/generate.py --prompt='Return the' --plan=split:0.5 --temperature=0.5
    python experiments/generate.py --model=opt-1.3b --max_new_tokens=64 --json
    python experiments/generate.py --checkpoint=path/to/a/chat/model --chat --prompt='What is a cache?'
    python experiments/generate.py --input=prompts.jsonl --output=out.jsonl

Without flags it loads the checkpoint that this repository ships, continues a left-padded batch, and prints the texts,
the plan and why it was chosen, the time of a step, the bytes that crossed the link, and how far the logits are from
those of a plan with the cache in the other memory. With --input it continues a file of prompts, and goes on where it
was killed; see `experiments.support.job.runner`. From a notebook:

    model, text = load("experiments/checkpoints/pydoc")
    run = continue_prompts(model, text, ["Return the"], plan="keys_values")
    show(run)
"""

import dataclasses
import json
import statistics
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from experiments.support import script
from experiments.support.check import Check, check_logits
from experiments.support.job import runner
from experiments.support.job.reader import checkpoint_hash
from experiments.support.job.runner import BATCH
from experiments.support.prompts import PROMPTS, encode, is_ids, read_prompts
from experiments.support.results import terminal
from experiments.support.results.report import run_info
from experiments.support.source import SHIPPED, Source

from absl import flags
from rich.console import Console
from rich.text import Text

import kvrecomp
import models
from kvrecomp.acceptance import with_acceptance
from kvrecomp.drafts import as_drafting, without_assistant
from kvrecomp.plan import AUTO, format_bytes
from kvrecomp.plan.footprint import check_within
from kvrecomp.plan.named import BEHIND, NAMES
from kvrecomp.run.limits import limits
from kvrecomp.run.sampling import Sampling

NEW_TOKENS = 200
SAMPLING = {"do_sample": True, "temperature": 0.7, "top_k": 0, "top_p": 0.9}  # where flags and checkpoint are silent
SILENT = "Default: as the checkpoint says, else {}."


def define_flags(into: flags.FlagValues) -> None:
    define = script.Define(into)
    define.string("checkpoint", str(SHIPPED), "Directory of a model: Hugging Face's format, or models.save's.")
    define.string("model", None, "Instead of a checkpoint, a preset with random weights; ids are printed.")
    define.strings("prompt", [], "Text to continue; repeatable. Default: a few built in.")
    define.string("prompts_file", None, "More prompts, one a line; blank lines are skipped.")
    define.integer("max_new_tokens", NEW_TOKENS, "Most new tokens a row.", lower_bound=1)
    define.string("input", None, "Instead of prompts, a file of them: lines of JSON, with a prompt and maybe an id.")
    define.string("output", None, "Where to write records of an input; one that is there is gone on with.")
    define.integer("batch", BATCH, "Most prompts of an input decoded at once.", lower_bound=1)
    behind = ", ".join(f"+{codec}" for codec in BEHIND)
    plans = f"What is cached how and where: {AUTO}, the fastest; {', '.join(NAMES)}; or one of these with {behind}."
    define.string("plan", AUTO, plans)
    define.loss()
    define.window("as the plan needs")
    define.integer("tail", None, "Tokens in the tail; default: as the plan needs.", lower_bound=1)
    define.device_memory()
    define.host_memory()
    define.integer("drafts", None, "Drafts checked in a step, 0 for none; default: what pays.", lower_bound=0)
    lookup = "Draft so many tokens that followed the newest ones before, in the prompt or the text."
    define.integer("prompt_lookup_num_tokens", None, lookup, lower_bound=1)
    define.string("assistant", None, "Directory of a smaller model of the same vocabulary, which drafts.")
    define.integer("num_assistant_tokens", None, "How many tokens that drafts in a step; default: 8.", lower_bound=1)
    define.boolean("chat", False, "Prompts are messages of a user: the checkpoint's chat template makes text of them.")
    define.boolean("do_sample", None, f"Sample; --nodo_sample takes the likeliest token. {SILENT.format('sample')}")
    define.number("temperature", None, f"Logits are divided by it. {SILENT.format(0.7)}")
    top_k = f"Sample from so many of the likeliest tokens; 0: all. {SILENT.format('all')}"
    define.integer("top_k", None, top_k, lower_bound=0, upper_bound=2**31 - 1)
    top_p = f"Sample from the fewest tokens that have this probability together. {SILENT.format(0.9)}"
    define.number("top_p", None, top_p)
    define.seed("Of sampling, and of random weights.")
    define.string("dtype", None, "Of weights and cache; default: float32 on a CPU, else as stored or bfloat16.")
    define.boolean("check", True, "Compare the logits with those of a plan with the cache in the other memory.")
    define.boolean("json", False, "Print a JSON document as the last line of standard output.")


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


def load(checkpoint: str | Path = SHIPPED, **options: Any) -> tuple[models.CausalLM, models.TextProcessor]:
    """A model and what its checkpoint says of text; the options are those of `Source`."""
    source = Source(checkpoint, **options)
    _, text = source.describe()
    return source.load(), text


def continue_prompts(
    model: models.CausalLM,
    text: models.TextProcessor,
    prompts: Sequence[str] = PROMPTS,
    *,
    plan: kvrecomp.Plan | str = AUTO,
    max_new_tokens: int = NEW_TOKENS,
    budget: kvrecomp.Budget | None = None,
    sampling: Sampling | None = None,
    check: bool = True,
    chat: bool = False,
    **drafts: Any,
) -> Run:
    """Continues the prompts together under the plan; `check` compares all logits with those of another plan.

    With `chat` each prompt is the only message of a user, and is answered. `drafts` are arguments of
    `kvrecomp.generate`, `prompt_lookup_num_tokens` and others.

    Raises PromptError, PlanError and FloatingPointError as `kvrecomp.generate`.
    """
    ids, mask = encode(text, prompts, chat)
    options = {"max_new_tokens": max_new_tokens, "plan": plan, "budget": budget, "output_logits": check}
    options |= {"eos_token_id": text.eos_token_ids, "pad_token_id": text.pad_token_id}
    result = kvrecomp.generate(model, ids, mask, **options, **drafts, **dataclasses.asdict(sampling or Sampling()))
    new = [row[ids.shape[1] :][:count].tolist() for row, count in zip(result.sequences, result.new_tokens)]
    before = [row[kept].tolist() for row, kept in zip(ids, mask)]
    return Run(
        prompts=list(prompts),
        prompt_tokens=mask.sum(axis=1).tolist(),
        continuations=new,
        texts=None if text.tokenizer is None else [text.decode(*each) for each in zip(new, before)],
        result=result,
        check=check_logits(model, result, mask, budget) if check else None,
    )


# --- what is printed --------------------------------------------------------------------------------------------------


def show(run: Run, console: Console | None = None) -> None:
    """Prints texts, plan, times, bytes and the check."""
    console = console or terminal.standard_output()
    for number, prompt in enumerate(run.prompts):
        new = run.continuations[number]
        console.rule(f"prompt {number + 1}: {run.prompt_tokens[number]} tokens, {len(new)} new", align="left")
        text = " " + " ".join(map(str, new)) if run.texts is None else run.texts[number]
        console.print(Text.assemble((printable(prompt), "bold"), printable(text)), soft_wrap=True)
    console.rule()
    terminal.show(console, run.result.plan.table())
    sent = run.result.link_bytes
    if sent:
        span = format_bytes(sent[0]) if sent[0] == sent[-1] else f"{format_bytes(sent[0])} to {format_bytes(sent[-1])}"
        console.print(f"{run.median_step_ms:.2f} ms a step (median of {len(sent)}), {span} over the link a step")
    drafting = run.result.plan.drafting
    if drafting is not None and run.result.drafted.any():
        taken, checked = run.result.tokens_per_pass.mean(), run.result.drafted.sum()
        console.print(f"{taken:.2f} tokens a step and row, {checked} drafts ({drafting.name}) checked")
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
        "tokens_per_step": run.result.tokens_per_pass.tolist(),
        "drafted": run.result.drafted.tolist(),
        "check": None if run.check is None else dataclasses.asdict(run.check) | {"passed": run.check.passed},
    }


# --- the command ------------------------------------------------------------------------------------------------------


def check_flags(given: flags.FlagValues) -> None:
    """Raises ValueError for flags that exclude each other, or need one that is not there."""
    if (given.input is None) != (given.output is None):
        raise ValueError("--input and --output go together: a file of prompts, and one for their records")
    if given.model is not None and given["checkpoint"].present:
        raise ValueError("--model and --checkpoint exclude each other: random weights, or a checkpoint's")
    if given.model is not None and given.chat:
        raise ValueError("--chat is for a checkpoint that has a chat template: leave out --model")
    if given.prompt_lookup_num_tokens is not None and given.assistant is not None:
        raise ValueError("--prompt_lookup_num_tokens and --assistant both draft: give one of them")
    if given.num_assistant_tokens is not None and given.assistant is None:
        raise ValueError("--num_assistant_tokens is for an --assistant: give both")
    if given.input is None and given["batch"].present:
        raise ValueError("--batch is for --input: prompts that are given are one batch")
    for name in ("prompt", "prompts_file", "check", "assistant"):
        if given.input is not None and given[name].present and given[name].value:
            raise ValueError(f"--{name} and --input exclude each other: give one of them")


def describe(given: flags.FlagValues, source: Source) -> tuple[kvrecomp.ModelShape, models.TextProcessor, Sampling]:
    """The model's sizes, what its checkpoint says of text, and how tokens are chosen: as flags say or, where they are
    silent, the checkpoint, which is printed. A flag of sampling alone asks for it."""
    shape, text = source.describe()
    if given.chat and text.chat_template is None:
        raise models.CheckpointError(
            f"{given.checkpoint} has no chat template: leave out --chat, or put the model's chat_template.jinja there"
        )
    flagged = {name: getattr(given, name) for name in SAMPLING if getattr(given, name) is not None}
    asked = {"do_sample": True, **flagged} if flagged else {}
    chosen = {**(text.sampling or SAMPLING), **asked}
    if not chosen["do_sample"]:
        chosen = {"do_sample": False}
    if said := [f"{name} {value}" for name, value in chosen.items() if text.sampling and name not in asked]:
        print(f"sampling as the checkpoint says: {', '.join(said)}")
    if text.unsupported:
        left = ", ".join(f"{name} {value}" for name, value in text.unsupported.items())
        print(f"left out, as it is not supported, of what the checkpoint says: {left}")
    return shape, text, Sampling(**chosen, seed=given.seed)


def continue_given(given: flags.FlagValues, source: Source, budget: kvrecomp.Budget) -> Run:
    """Continues the prompts of the flags, or the built-in ones."""
    prompts = read_prompts(given.prompt, given.prompts_file)
    shape, text, sampling = describe(given, source)
    if text.tokenizer is None and given.model is None and not all(map(is_ids, prompts)):
        raise models.CheckpointError(
            f"{given.checkpoint} has no tokenizer.json, so text cannot be read or written: put the model's own "
            "there (transformers: AutoTokenizer.from_pretrained(...).save_pretrained(...)), or give ids, such as "
            "--prompt='5 17 2'"
        )
    workload = kvrecomp.Workload(len(prompts), encode(text, prompts, given.chat)[0].shape[1], given.max_new_tokens)
    assistant = None if given.assistant is None else models.load(given.assistant, dtype=shape.dtype)
    asked = given.prompt_lookup_num_tokens, assistant, given.num_assistant_tokens
    window = script.window_bytes(given.window_mib)
    options = {"groups": None, "tail": given.tail, "window": window, "loss": given.loss}
    drafting = as_drafting(*asked, given.drafts)
    if assistant is not None and isinstance(drafting, kvrecomp.Drafting):
        budget = without_assistant(budget, shape, assistant.shape, workload, drafting.most, loaded=False)
    known = with_acceptance(shape, drafting)
    plan = kvrecomp.plan_for(given.plan, shape, workload, budget=budget, drafting=known, **options)
    check_within(plan, limits(budget))  # before the weights are read or made
    options = {"max_new_tokens": given.max_new_tokens, "check": given.check, "chat": given.chat}
    options |= dict(zip(("prompt_lookup_num_tokens", "assistant_model", "num_assistant_tokens"), asked))
    options |= {"plan": plan, "budget": budget, "sampling": sampling, "drafts": given.drafts}
    return continue_prompts(source.load(plan), text, prompts, **options)


def continue_file(given: flags.FlagValues, source: Source, budget: kvrecomp.Budget) -> runner.Summary:
    """Continues a file of prompts into another; see `experiments.support.job.runner`."""
    *_, sampling = describe(given, source)
    flagged = {f.name: getattr(given, f.name) for f in dataclasses.fields(runner.Settings)}
    settings = runner.Settings(**flagged | dataclasses.asdict(sampling))
    random = given.model is not None
    model = f"{given.model}, seed {given.seed}" if random else checkpoint_hash(Path(given.checkpoint))
    try:
        return runner.run(
            Path(given.input), Path(given.output), settings, model, source, any_text=random, budget=budget
        )
    except KeyboardInterrupt:
        raise KeyboardInterrupt(f"; the same command goes on with {given.output}") from None


def main(given: flags.FlagValues) -> None:
    check_flags(given)
    budget = kvrecomp.Budget.of_gib(given.device_memory_gib, given.host_memory_gib)
    budget = kvrecomp.Budget(**limits(budget))  # what is free before the weights are there
    source = Source(given.checkpoint, given.model, given.dtype, given.seed)
    if given.input is not None:
        summary = continue_file(given, source, budget)
        print(summary)
        if given.json:
            print(json.dumps(run_info() | dataclasses.asdict(summary)))
        if summary.errors == summary.records > 0:
            sys.exit(f"error: {given.output}: all {summary.records} records are errors")
        return
    run = continue_given(given, source, budget)
    show(run)
    if given.json:
        print(json.dumps(document(run)))
    if run.check is not None and not run.check.passed:
        sys.exit(f"error: {run.check}")


if __name__ == "__main__":
    script.run(main, define_flags)
