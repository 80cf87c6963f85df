"""Counts the numbers of a real model's cache that packed blocks list apart.

    python experiments/escapes.py --checkpoint=path/to/model --texts=README.md,kvrecomp/run/step.py --tokens=2048

Each text is a row, cut to so many tokens and run through the model in bfloat16 at once. Counted are activations, keys
and values of every layer, as blocks of `--block` tokens would pack them.
"""

import json
from pathlib import Path
from typing import Any

from experiments.support import script
from experiments.support.results import terminal
from experiments.support.results.report import run_info
from experiments.support.results.tables import table
from experiments.support.source import SHIPPED

import jax
import jax.numpy as jnp
import numpy as np
from absl import flags
from jax import Array

import models
from kvrecomp.files import check_writable, write_json
from kvrecomp.plan.codecs import NUMBERS_PER_ESCAPE, PACKED_DTYPE
from kvrecomp.run.attention import Projections, attend_causal
from kvrecomp.run.codecs import escapes

TENSORS = ("activations", "keys", "values")


def define_flags(into: flags.FlagValues) -> None:
    define = script.Define(into)
    define.string("checkpoint", str(SHIPPED), "Directory of a model: Hugging Face's format, or models.save's.")
    define.list("texts", ["README.md"], "Text files, a row each.")
    define.integer("tokens", 1024, "Tokens of each text.", lower_bound=1)
    define.integer("block", 256, "Tokens of a block.", lower_bound=1)
    define.string("out", None, "Also write the JSON document to this file.")
    define.string("commit", "", "Recorded as the commit, where git cannot be asked.")


def count(model: Any, ids: np.ndarray, block: int) -> dict[str, np.ndarray]:
    """Of each tensor, for ids int[rows, tokens]: which share of its numbers is listed apart, float[layers, blocks]."""

    @jax.jit
    def shares(ids: Array) -> dict[str, list[Array]]:
        found: dict[str, list[Array]] = {name: [] for name in TENSORS}
        tokens, padding = ids.T, jnp.zeros(len(ids), jnp.int32)
        positions = jnp.broadcast_to(jnp.arange(len(tokens))[:, None], tokens.shape)

        def attend(x: Array, projections: Projections) -> Array:
            mixed, key, value = attend_causal(projections, x, padding)
            for name, tensor in zip(TENSORS, (x, key, value)):
                starts = range(0, len(tensor) - block + 1, block)
                blocks = [tensor[start : start + block].astype(PACKED_DTYPE) for start in starts]
                found[name].append(jnp.stack([escapes(block) / block.size for block in blocks]))
            return mixed

        hidden = model.embed(tokens, positions)
        for layer in model.layers:
            hidden = layer(hidden, attend)
        return found

    return {name: np.stack(jax.device_get(layers)) for name, layers in shares(jnp.asarray(ids)).items()}


def main(given: flags.FlagValues) -> None:
    if given.block > given.tokens:
        raise ValueError(f"--block is {given.block}, more than the {given.tokens} of --tokens: no block is full")
    if given.out:
        check_writable(given.out)
    tokenizer = models.load_tokenizer(given.checkpoint)
    if tokenizer is None:
        raise models.CheckpointError(f"{given.checkpoint} has no tokenizer.json, which texts are read with")
    rows = []
    for path in script.names("texts", given.texts):
        ids = tokenizer.encode(Path(path).read_text(encoding="utf-8")).ids[: given.tokens]
        if len(ids) < given.tokens:
            raise ValueError(f"{path} has {len(ids)} tokens; --tokens is {given.tokens}: give longer texts or fewer")
        rows.append(ids)
    model = models.load(given.checkpoint, dtype=PACKED_DTYPE)
    found = [
        {"tensor": name, "mean": float(shares.mean()), "largest": float(shares.max())}
        for name, shares in count(model, np.array(rows), given.block).items()
    ]
    print(
        f"{model.shape.name}, {len(rows)} x {given.tokens} tokens in blocks of {given.block}: of 10,000 numbers there "
        f"is room for {1e4 / NUMBERS_PER_ESCAPE:.1f} apart, and there are"
    )
    columns = (
        ("of", lambda row: row["tensor"]),
        ("all", lambda row: f"{1e4 * row['mean']:.2f}"),
        ("a block, at most", lambda row: f"{1e4 * row['largest']:.2f}"),
    )
    terminal.show(terminal.standard_output(), table(found, *columns))
    document = run_info(given.commit) | {"model": model.shape.name, "block": given.block, "shares": found}
    if given.out:
        write_json(given.out, document)
    print(json.dumps(document))


if __name__ == "__main__":
    script.run(main, define_flags)
