"""Measures how many drafts are right, on a real model and texts of several kinds.

    python experiments/acceptance.py --checkpoint=path/to/model --contexts=512,2048 --temperatures=0,1

A batch is decoded whose rows are the first tokens of a text of each kind, with a fixed number of drafts a round, in
float32 and with the whole cache in host memory; nothing ends a row. Of each row are recorded the tokens that it took a
pass, and the acceptance: the share of its drafts that were right, of those that were tried. After the first wrong draft
of a round none is. The text is to be the one without drafts; rows in which it is not are counted. In bfloat16 logits of
several tokens a step are rounded otherwise: where a greedy row parts, the gap between the two tokens' logits says how
near they were.
"""

import dataclasses
import json
import statistics
from collections.abc import Iterator, Sequence
from typing import Any

from experiments.support import script
from experiments.support.results import terminal
from experiments.support.results.report import after_warm_up, kept_rows, run_info
from experiments.support.results.tables import drafts
from experiments.support.source import SHIPPED
from experiments.support.texts import KINDS, make_texts

import numpy as np
from absl import flags

import kvrecomp
import models
from kvrecomp.files import check_writable, write_json
from kvrecomp.plan.codecs import SKETCHES
from kvrecomp.run.sampling import Sampling

DRAFTERS = (*SKETCHES, "prompt_lookup")
RUN = ("model", "dtype", "prompt", "new", "temperature", "drafter", "drafts")  # what tells rows apart


def define_flags(into: flags.FlagValues) -> None:
    define = script.Define(into)
    define.string("checkpoint", str(SHIPPED), "Directory of a model: Hugging Face's format, or models.save's.")
    define.list("texts", list(KINDS), "Kinds of text, a row each.")
    define.list("contexts", ["512"], "Tokens of each text, for each of which a batch is decoded.")
    define.integer("new", 64, "New tokens of a row.", lower_bound=2)
    define.integer("drafts", 8, "Drafts in a round.", lower_bound=1)
    define.list("drafters", list(DRAFTERS), f"Sketches by their codec ({', '.join(SKETCHES)}), and prompt_lookup.")
    define.string("assistant", None, "Directory of a smaller model of the same vocabulary, which drafts too.")
    define.list("temperatures", ["0"], "Of sampling; 0 takes the likeliest token.")
    define.string("dtype", "float32", "Of weights and cache.")
    define.seed("Of sampling.")
    define.string("out", None, "Also write the JSON document to this file; its rows of other runs are kept.")
    define.string("commit", "", "Recorded as the commit, where git cannot be asked.")


# --- the work ---------------------------------------------------------------------------------------------------------


def draftings(names: Sequence[str], assistant: bool, count: int) -> list[kvrecomp.Drafting]:
    """Of each drafter, so many drafts in a round. Raises ValueError where there is no such drafter."""
    by_name = {"prompt_lookup": kvrecomp.Drafting("prompt_lookup", count)}
    by_name |= {codec: kvrecomp.Drafting("sketch", count, codec=codec) for codec in SKETCHES}
    unknown = [name for name in names if name not in by_name]
    if unknown:
        raise ValueError(f"--drafters has {unknown[0]!r}; expected some of {', '.join(DRAFTERS)}")
    found = [by_name[name] for name in names]
    return [*found, kvrecomp.Drafting("assistant", count)] if assistant else found


def make_plan(shape: kvrecomp.ModelShape, workload: kvrecomp.Workload) -> kvrecomp.Plan:
    """All of the cache in host memory, in its smaller form, but for the new tokens: no row waits for others."""
    smaller = all(layer.width("keys_values") < layer.width("activations") for layer in shape.layers)
    return kvrecomp.named_plan("keys_values" if smaller else "activations", shape, workload, tail=workload.new)


def count_drafts(result: kvrecomp.Generated) -> list[dict[str, Any]]:
    """Of each row, its passes, and how many drafts were right and how many were tried."""
    counts = result.passes, result.tokens_per_pass, result.accepted, result.tried
    names = ("passes", "tokens_per_pass", "right", "tried")
    return [dict(zip(names, row)) for row in zip(*(column.tolist() for column in counts))]


def gaps(expected: kvrecomp.Generated, new: np.ndarray) -> list[float]:
    """Of each row of new tokens int[rows, new] that parts from what was expected, how far apart the logits of the two
    tokens are; none where there are no logits."""
    if expected.logits is None:
        return []
    before = expected.sequences[:, -new.shape[1] :]
    found = []
    for row in np.flatnonzero((before != new).any(axis=1)):
        place = int(np.argmax(before[row] != new[row]))
        logits = expected.logits[place, row]
        found.append(float(logits[before[row, place]] - logits[new[row, place]]))
    return found


def measure(
    model: Any,
    ids: np.ndarray,
    new: int,
    drafting: Sequence[kvrecomp.Drafting],
    sampling: Sampling,
    assistant: Any = None,
) -> Iterator[dict[str, Any]]:
    """For ids int[rows, tokens], a row of results for each drafter."""
    batch, prompt = ids.shape
    plan = make_plan(model.shape, kvrecomp.Workload(batch, prompt, new))
    options = {"max_new_tokens": new, **dataclasses.asdict(sampling)}
    expected = kvrecomp.generate(model, ids, plan=plan, output_logits=not sampling.do_sample, **options)
    for each in drafting:
        drafted = dataclasses.replace(plan, drafting=each)
        helper = {"assistant_model": assistant} if each.drafter == "assistant" else {}
        result = kvrecomp.generate(model, ids, plan=drafted, drafts=each.most, **helper, **options)
        yield {
            "model": model.shape.name,
            "dtype": model.shape.dtype,
            "batch": batch,
            "prompt": prompt,
            "new": new,
            "plan": plan.name,
            "temperature": sampling.temperature if sampling.do_sample else 0.0,
            "drafter": each.name,
            "drafts": each.most,
            "median_ms": statistics.median(after_warm_up(result.step_seconds)) * 1e3,
            "rows_that_differ": int((result.sequences != expected.sequences).any(axis=1).sum()),
            "gaps": gaps(expected, result.sequences[:, prompt:]),
            "texts": count_drafts(result),
        }


# --- the command ------------------------------------------------------------------------------------------------------


def main(given: flags.FlagValues) -> None:
    contexts = script.whole_numbers("contexts", given.contexts)
    drafting = draftings(given.drafters, given.assistant is not None, given.drafts)
    if not drafting:
        raise ValueError("--drafters is empty, and there is no --assistant: give one")
    samplings = [
        Sampling(do_sample=temperature > 0, temperature=temperature or 1.0, seed=given.seed)
        for temperature in script.numbers("temperatures", given.temperatures)
    ]
    if given.out:
        check_writable(given.out)
        kept_rows(given.out, (), RUN)
    kinds, info = script.names("texts", given.texts), run_info(given.commit)
    model, text = models.load(given.checkpoint, dtype=given.dtype), models.load_text(given.checkpoint)
    assistant = models.load(given.assistant, dtype=given.dtype) if given.assistant else None
    longest = np.array(make_texts(kinds, model, text, max(contexts)))
    rows: list[dict[str, Any]] = []
    for context in contexts:
        for sampling in samplings:
            for row in measure(model, longest[:, :context], given.new, drafting, sampling, assistant):
                texts = [{"kind": kind} | found for kind, found in zip(kinds, row.pop("texts"))]
                rows.append(row | {"commit": info["commit"], "command": info["command"], "texts": texts})
                if given.out:
                    write_json(given.out, info | {"rows": [*kept_rows(given.out, rows, RUN), *rows]})
                print(f"{context} tokens, {row['drafter']}: {row['rows_that_differ']} rows differ", flush=True)
    terminal.show(terminal.standard_output(), drafts(rows))
    print(json.dumps(info | {"rows": rows}))


if __name__ == "__main__":
    script.run(main, define_flags)
