"""Measures what codecs with loss do to a model's text: teacher-forced, through the cache that decoding uses.

    python experiments/quality.py --checkpoint=path/to/model --prompt=1536 --new=512

The first tokens of a text of each kind are a prompt, and those after it are fed one by one, as if they had been chosen,
under each plan, and without loss under plan activations. Of all of them are recorded the bits a token (the mean of the
negative binary logarithm of the probability that the model gives the token that follows), what these are more than
without loss, the divergence (of Kullback and Leibler, in bits, of the probabilities without loss from those with it),
and the share of tokens that greedy decoding would choose alike.

`flexgen:B` is a baseline, plan keys_values with K and V in B bits by groups of 64 of a token's channels, as FlexGen has
them (Sheng et al. 2023, arXiv 2303.06865).
"""

import dataclasses
import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

from experiments.support import script
from experiments.support.results import terminal
from experiments.support.results.report import kept_rows, run_info
from experiments.support.results.tables import losses
from experiments.support.source import SHIPPED
from experiments.support.texts import KINDS, make_texts

import jax
import numpy as np
from absl import flags

import kvrecomp
import models
from kvrecomp.files import check_writable, write_json
from kvrecomp.plan.codecs import LOSSY, Steps
from kvrecomp.progress import StepBar
from kvrecomp.run import memory
from kvrecomp.run.cache import Block, Cache
from kvrecomp.run.codecs import from_steps, to_steps

PLANS = [f"{form}+{codec}" for form in ("activations", "keys_values") for codec in LOSSY]
FLEXGEN, FLEXGEN_GROUP = "flexgen:", 64
REAL = [kind for kind in KINDS if kind not in ("story", "dialogue")]  # those the model has not written itself
RUN = ("model", "dtype", "prompt", "new", "tail", "plan")  # what tells rows apart

Change = Callable[[Cache], Cache]


def define_flags(into: flags.FlagValues) -> None:
    define = script.Define(into)
    define.string("checkpoint", str(SHIPPED), "Directory of a model: Hugging Face's format, or models.save's.")
    define.list("texts", REAL, f"Kinds of text, a row each: {', '.join(KINDS)}.")
    define.integer("prompt", 640, "Tokens of each text that are a prompt.", lower_bound=1)
    define.integer("new", 256, "Tokens after these, which are fed one by one.", lower_bound=1)
    define.integer("tail", 128, "Tokens in the tail, which are as they are until it is written out.", lower_bound=1)
    define.list("plans", [*PLANS, f"{FLEXGEN}4"], f"Plans by name, or {FLEXGEN}B, of B bits, 1 to 8.")
    define.string("dtype", "float32", "Of weights and cache.")
    define.string("out", None, "Also write the JSON document to this file; its rows of other runs are kept.")
    define.string("commit", "", "Recorded as the commit, where git cannot be asked.")


# --- the baseline -----------------------------------------------------------------------------------------------------


@dataclass
class Rewritten:
    """A change of caches of plan keys_values: blocks come as `steps` leaves them, each as soon as it is there."""

    steps: Steps
    blocks: list[tuple[Block, ...]] = field(default_factory=list)

    def __call__(self, cache: Cache) -> Cache:
        before = self.blocks or [()] * len(cache.blocks)
        self.blocks = [(*old, *map(self._of, layer[len(old) :])) for old, layer in zip(before, cache.blocks)]
        return dataclasses.replace(cache, blocks=tuple(self.blocks))

    def _of(self, block: Block) -> Block:
        (both,) = block.arrays  # [s, 2, b, k, d]
        shape = (both.shape[0], 2 * both.shape[2], *both.shape[3:])
        rewrite = jax.jit(lambda x: from_steps(to_steps(x.reshape(shape), self.steps), self.steps, shape))
        written = rewrite(jax.device_put(both, memory.sharding("device"))).reshape(both.shape)
        return dataclasses.replace(block, arrays=(jax.device_put(written, memory.sharding("host")),))


def read_plan(name: str) -> tuple[str, Steps | None]:
    """The plan's name, and how the baseline rewrites its blocks. Raises ValueError for bits that it cannot have."""
    if not name.startswith(FLEXGEN):
        return name, None
    bits = name.removeprefix(FLEXGEN)
    if bits not in map(str, range(1, 9)):
        raise ValueError(f"--plans has {name!r}; expected {FLEXGEN}B, with B bits from 1 to 8")
    return "keys_values", Steps(int(bits), 1, FLEXGEN_GROUP)


# --- the work ---------------------------------------------------------------------------------------------------------


def forced(model: Any, plan: kvrecomp.Plan, ids: np.ndarray, change: Change | None = None) -> Iterator[np.ndarray]:
    """The logits float32[rows, vocab] after each of the new tokens of ids int[rows, prompt + new or more]."""
    decoder, work = kvrecomp.Decoder(model, plan), plan.workload
    cache, _ = decoder.prefill(ids[:, : work.prompt])
    with StepBar(plan.name, work.new, True) as advance:
        for place in range(work.prompt, work.prompt + work.new):
            cache = change(cache) if change else cache
            tokens = jax.device_put(np.ascontiguousarray(ids[:, place], np.int32), memory.sharding("device"))
            cache, logits = decoder.step(cache, tokens)
            yield jax.device_get(logits)
            advance()
    decoder.finish()


def log2_probabilities(logits: np.ndarray) -> np.ndarray:
    """Of logits float32[rows, vocab]."""
    logits = logits - logits.max(axis=-1, keepdims=True)
    return (logits - np.log(np.exp(logits).sum(axis=-1, keepdims=True))) / np.log(2)


def measure(
    model: Any, ids: np.ndarray, prompt: int, tail: int, names: Sequence[str]
) -> Iterator[tuple[str, list[dict[str, float]]]]:
    """For ids int[rows, tokens], whose last tokens are only predicted: of each plan, the figures of each row."""
    rows, tokens = ids.shape
    work = kvrecomp.Workload(rows, prompt, tokens - 1 - prompt)
    following = ids[:, prompt + 1 :].T[..., None]  # [new, rows, 1]
    plain = kvrecomp.named_plan("activations", model.shape, work, tail=tail)
    exact = np.stack([log2_probabilities(logits) for logits in forced(model, plain, ids)])
    for name in names:
        plan_name, steps = read_plan(name)
        plan = kvrecomp.named_plan(plan_name, model.shape, work, tail=tail)
        found = []
        logits = forced(model, plan, ids, Rewritten(steps) if steps else None)
        for expected, next_ids, given in zip(exact, following, logits, strict=True):
            own = log2_probabilities(given)
            bits, bits_exact = (-np.take_along_axis(each, next_ids, axis=-1)[:, 0] for each in (own, expected))
            divergence = (np.exp2(expected) * (expected - own)).sum(axis=-1)
            found.append((bits, bits_exact, divergence, own.argmax(axis=-1) == expected.argmax(axis=-1)))
        means = np.mean(np.array(found, np.float64), axis=0).T  # [rows, 4]
        yield name, [dict(zip(("bits", "bits_exact", "divergence", "agreement"), row)) for row in means.tolist()]


def share_of_plain(name: str, shape: kvrecomp.ModelShape, work: kvrecomp.Workload) -> float:
    """Bytes of the plan's blocks in host memory, of those of the same tokens as plain K and V; all of bfloat16."""
    plan_name, steps = read_plan(name)
    plan = kvrecomp.named_plan(plan_name, dataclasses.replace(shape, dtype="bfloat16"), work)
    nbytes = numbers = 0
    for layer, blocks in zip(plan.shape.layers, plan.blocks()):
        for block in blocks:
            if block.memory == "host":
                width = layer.width("keys_values")
                own = steps.nbytes(block.tokens, work.batch, width, 2) if steps else plan.bytes_of(layer, block)
                nbytes, numbers = nbytes + own, numbers + block.tokens * work.batch * width
    return nbytes / (2 * numbers) if numbers else 1.0


def main(given: flags.FlagValues) -> None:
    kinds, names, info = script.names("texts", given.texts), script.names("plans", given.plans), run_info(given.commit)
    model, text = models.load(given.checkpoint, dtype=given.dtype), models.load_text(given.checkpoint)
    work = kvrecomp.Workload(len(kinds), given.prompt, given.new)
    for name in names:  # before anything that takes long
        kvrecomp.named_plan(read_plan(name)[0], model.shape, work, tail=given.tail)
    if given.out:
        check_writable(given.out)
        kept_rows(given.out, (), RUN)
    ids = np.array(make_texts(kinds, model, text, given.prompt + given.new + 1))
    rows: list[dict[str, Any]] = []
    for name, found in measure(model, ids, given.prompt, given.tail, names):
        mean = {field: float(np.mean([row[field] for row in found])) for field in found[0]}
        rows.append(
            {"model": model.shape.name, "dtype": model.shape.dtype, **dataclasses.asdict(work), "tail": given.tail}
            | {"plan": name, "bytes_of_plain": share_of_plain(name, model.shape, work)}
            | {**mean, "loss": mean["bits"] / mean["bits_exact"] - 1}
            | {"commit": info["commit"], "command": info["command"]}
            | {"texts": [{"kind": kind} | row for kind, row in zip(kinds, found)]}
        )
        if given.out:
            write_json(given.out, info | {"rows": [*kept_rows(given.out, rows, RUN), *rows]})
    terminal.show(terminal.standard_output(), losses(rows))
    print(json.dumps(info | {"rows": rows}))


if __name__ == "__main__":
    script.run(main, define_flags)
