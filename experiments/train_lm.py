"""Trains a small byte-level OPT on the documentation that every Python installation carries.

    python experiments/train_lm.py --output=experiments/checkpoints/pydoc --seed=0

writes a checkpoint for `models.load`, with a tokenizer and `training.json`, which says how it came about and has the
loss curve. From a notebook: `train(Config(), output)`.

The model outlearns the corpus (`experiments.support.corpus`), so weights are kept from the evaluation that was best on
the validation documents; the held-out documents decide nothing and are only reported on. Bits per byte are the bits of
all predicted tokens, ends of text included, over the number of predicted bytes.

The whole corpus is one array on the device, and one jitted call does many steps, each cutting its own random windows by
(seed, step): nothing crosses the link while training, and a resumed run sees the batches of an uninterrupted one.
"""

import dataclasses
import functools
import json
import math
import os
import sys
import time
import zipfile
import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from experiments.support import corpus, script
from experiments.support.results.report import run_info, versions

import jax
import jax.numpy as jnp
import numpy as np
import optax
from absl import flags
from flax import nnx
from jax import Array
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

import models
from kvrecomp.files import check_writable, replacing, write_json
from kvrecomp.run.attention import causal
from models.checkpoint import is_ours
from models.config import check_size

DTYPES = ("bfloat16", "float32")
WARMUP_STEPS = 100
FINAL_RATE = 0.02  # of the learning rate, at the end of the cosine
GRADIENT_NORM = 1.0
EVALUATION_TOKENS = 2**14  # at a time
STEPS_PER_CALL = 25  # often enough for a progress bar, seldom enough that dispatch costs nothing
STATE = "state.npz"  # in the work_dir


def _flag(default: Any, help: str) -> Any:
    return dataclasses.field(default=default, metadata={"help": help})


@dataclass(frozen=True)
class Config:
    """What decides the weights: equal runs give the same and share a compiled step. Each field is a flag of the script.

    Sizes are in tokens, which are bytes. Rows start at random positions when `context` is less than `positions`, so
    that all positions are trained. Master weights and optimizer are float32. Raises ValueError for a size or rate that
    is none, sizes that do not fit each other, and an unknown dtype.
    """

    steps: int = _flag(5000, "Optimizer steps.")
    batch: int = _flag(32, "Rows of a step.")
    context: int = _flag(512, "Tokens (bytes) of a row.")
    positions: int = _flag(1024, "Most tokens the model can read; all are trained.")
    layers: int = _flag(6, "Layers.")
    hidden: int = _flag(192, "Hidden size; the feed-forward is four times as wide.")
    heads: int = _flag(6, "Attention heads.")
    learning_rate: float = _flag(2e-3, "Learning rate after warm-up.")
    weight_decay: float = _flag(0.1, "AdamW's decay of the kernels.")
    dropout: float = _flag(0.15, "Share of each layer's contributions that is dropped.")
    seed: int = _flag(0, "Seed of weights, batches and dropout.")
    dtype: str = _flag("bfloat16", f"Of the products, and of the saved weights: {', '.join(DTYPES)}.")
    eval_every: int = _flag(250, "Steps between evaluations, and states kept.")

    def __post_init__(self):
        for name in ("steps", "batch", "context", "eval_every"):
            check_size("training", name, getattr(self, name))
        if not (0 < self.learning_rate < math.inf and 0 <= self.weight_decay < math.inf and 0 <= self.dropout < 1):
            raise ValueError(
                f"learning_rate {self.learning_rate}, weight_decay {self.weight_decay}, dropout {self.dropout}; "
                "expected a positive rate, a decay of at least zero and a dropout from 0 to below 1"
            )
        if not 0 <= self.seed < 2**32:
            raise ValueError(f"seed is {self.seed}; expected an integer from 0 to 2**32 - 1")
        if self.dtype not in DTYPES:
            raise ValueError(f"dtype is {self.dtype!r}; expected one of {', '.join(DTYPES)}")
        if self.context > self.model.positions:  # whose own sizes are checked
            raise ValueError(
                f"context {self.context} is larger than the model's {self.positions} positions; "
                f"lower it or use positions={self.context}"
            )

    @property
    def model(self) -> models.OPTConfig:
        """The model to be trained."""
        sizes = (self.layers, self.hidden, self.heads, 4 * self.hidden, corpus.VOCABULARY, self.positions)
        return models.OPTConfig("opt-pydoc", *sizes)


class State(NamedTuple):
    """What a step changes: float32 parameters (an nnx.State) and the optimizer's state."""

    parameters: Any
    optimizer: Any


# --- one step ---------------------------------------------------------------------------------------------------------


def forward(
    model: models.CausalLM, token_ids: Array, offsets: Array, rate: float = 0.0, key: Array | None = None
) -> Array:
    """Logits float32[tokens, batch, vocab] of token_ids [batch, tokens], row b at positions from offsets[b].

    `rate` of each layer's contributions to the residual stream is dropped. Layers are recomputed for their gradients:
    the attention weights of a batch would not fit otherwise.
    """
    attend = causal(jnp.zeros(token_ids.shape[0], jnp.int32))
    hidden = model.embed(token_ids.T, jnp.arange(token_ids.shape[1])[:, None] + offsets)
    for number, layer in enumerate(model.layers):
        graph, parameters = nnx.split(layer)

        @jax.checkpoint
        def apply(parameters: nnx.State, hidden: Array, graph=graph, number=number) -> Array:
            out = nnx.merge(graph, parameters)(hidden, attend)
            if key is None or not rate:
                return out
            kept = jax.random.bernoulli(jax.random.fold_in(key, number), 1 - rate, out.shape)
            return hidden + jnp.where(kept, (out - hidden) / (1 - rate), 0)

        hidden = apply(parameters, hidden)
    return model.unembed(hidden)


def loss_sums(logits: Array, targets: Array) -> tuple[Array, Array]:
    """Nats of all targets but padding, and how many are bytes: logits [t, b, vocab], targets int32[t, b]."""
    nats = optax.softmax_cross_entropy_with_integer_labels(logits, targets)
    return jnp.where(targets == corpus.PADDING, 0, nats).sum(), (targets < corpus.END_OF_TEXT).sum()


def make_optimizer(config: Config) -> optax.GradientTransformation:
    """AdamW with warm-up, cosine and clipping; only kernels decay."""
    warmup = min(WARMUP_STEPS, config.steps // 10)
    peak = config.learning_rate
    rate = optax.warmup_cosine_decay_schedule(peak / (warmup + 1), peak, warmup, config.steps, peak * FINAL_RATE)

    def kernels(parameters: Any) -> Any:
        return jax.tree_util.tree_map_with_path(lambda path, _: "kernel" in jax.tree_util.keystr(path), parameters)

    return optax.chain(
        optax.clip_by_global_norm(GRADIENT_NORM),
        optax.adamw(rate, b1=0.9, b2=0.98, weight_decay=config.weight_decay, mask=kernels),
    )


@functools.partial(jax.jit, static_argnums=(0, 1), donate_argnums=2)
def train_steps(
    config: Config, graph: nnx.GraphDef, state: State, tokens: Array, seed: Array, first: Array, last: Array
) -> tuple[State, Array]:
    """Steps first to last - 1 on tokens [n] -> state, and the sum of their mean losses in bits per byte.

    The bounds are arguments, so calls of any number of steps are one program, and give the same bits.
    """
    optimizer = make_optimizer(config)

    def loss(parameters: Any, windows: Array, offsets: Array, key: Array) -> Array:
        model = nnx.merge(graph, optax.tree.cast(parameters, config.dtype))
        logits = forward(model, windows[:, :-1], offsets, config.dropout, key)
        nats, bytes_predicted = loss_sums(logits, windows[:, 1:].T)
        return nats / jnp.maximum(bytes_predicted, 1) / math.log(2)

    def step(number: Array, carry: tuple[State, Array]) -> tuple[State, Array]:
        state, total = carry
        keys = jax.random.split(jax.random.fold_in(jax.random.key(seed), number), 3)
        starts = jax.random.randint(keys[0], (config.batch,), 0, tokens.shape[0] - config.context)
        windows = tokens[starts[:, None] + jnp.arange(config.context + 1)].astype(jnp.int32)
        offsets = jax.random.randint(keys[1], (config.batch,), 0, config.positions - config.context + 1)
        bits, gradients = jax.value_and_grad(loss)(state.parameters, windows, offsets, keys[2])
        updates, moments = optimizer.update(gradients, state.optimizer, state.parameters)
        return State(optax.apply_updates(state.parameters, updates), moments), total + bits

    return jax.lax.fori_loop(first, last, step, (state, jnp.float32(0)))


# --- evaluation -------------------------------------------------------------------------------------------------------


def evaluation_windows(tokens: np.ndarray, context: int) -> Array:
    """tokens [n] -> int32[rows, context + 1] on the device: consecutive windows, each token a target once.

    A window's last token is the first of the next; the end is filled up with padding.
    """
    starts = np.arange(0, len(tokens) - 1, context)
    filled = np.pad(tokens.astype(np.int32), (0, context), constant_values=corpus.PADDING)
    return jax.device_put(filled[starts[:, None] + np.arange(context + 1)])


@functools.partial(jax.jit, static_argnums=(0, 1))
def _evaluate(graph: nnx.GraphDef, dtype: str, parameters: Any, windows: Array) -> tuple[Array, Array]:
    model = nnx.merge(graph, optax.tree.cast(parameters, dtype))

    def row(window: Array) -> tuple[Array, Array]:
        logits = forward(model, window[None, :-1], jnp.zeros(1, jnp.int32))
        return loss_sums(logits, window[1:, None])

    return jax.lax.map(row, windows, batch_size=max(1, EVALUATION_TOKENS // windows.shape[1]))


def bits_per_byte(graph: nnx.GraphDef, parameters: Any, dtype: str, windows: Array) -> float:
    """Of `evaluation_windows`, with parameters cast to `dtype` and computed in it."""
    nats, bytes_predicted = jax.device_get(_evaluate(graph, dtype, parameters, windows))
    return float(nats.astype(np.float64).sum() / math.log(2) / bytes_predicted.sum())


# --- a run ------------------------------------------------------------------------------------------------------------


def train(
    config: Config,
    output: str | os.PathLike[str],
    work_dir: str | os.PathLike[str] | None = None,
    documents: Sequence[str] | None = None,
) -> tuple[models.CausalLM, dict[str, Any]]:
    """Trains and saves a checkpoint to `output`; the model as saved, and the contents of training.json.

    A run that was killed is resumed from the state in its `work_dir`. `documents` default to `corpus.documents()`.

    Raises:
        ValueError: paths as `check_paths`, documents shorter than the context, a `work_dir` of a different run.
        FloatingPointError: a loss that is not a number.
    """
    started = time.monotonic()
    check_paths(output, work_dir)
    documents = corpus.documents() if documents is None else documents
    parts = corpus.split(documents)._asdict()
    encoded = {name: corpus.encode(part) for name, part in parts.items()}
    for name, tokens in encoded.items():
        needed = config.context + 1 if name == "train" else 2
        if len(tokens) < needed:
            raise ValueError(f"the {name} documents are {len(tokens)} tokens; at least {needed} are needed")
    tokens, seed = jax.device_put((encoded.pop("train"), np.uint32(config.seed)))
    windows = {name: evaluation_windows(part, config.context) for name, part in encoded.items()}

    graph, parameters = nnx.split(models.create(config.model, dtype="float32", seed=config.seed))
    state, best = State(parameters, jax.jit(make_optimizer(config).init)(parameters)), _on_host(parameters)
    identity = {**dataclasses.asdict(config), "corpus": corpus.fingerprint(documents)}
    curve = []
    if work_dir is not None and (Path(work_dir) / STATE).exists():
        curve, (state, best) = restore(Path(work_dir), identity, (state, best))
    step = resumed = curve[-1]["step"] if curve else 0

    console = Console(stderr=True)
    columns = (BarColumn(), MofNCompleteColumn(), TextColumn("{task.description}"), TimeRemainingColumn())
    with Progress(*columns, console=console, disable=not console.is_terminal) as bar:
        shown = bar.add_task("compiling", total=config.steps, completed=step)
        while step < config.steps:
            stop = min(config.steps, (step // config.eval_every + 1) * config.eval_every)
            bits = 0.0
            for first in range(step, stop, STEPS_PER_CALL):
                last = min(stop, first + STEPS_PER_CALL)
                bounds = jax.device_put((np.int32(first), np.int32(last)))
                state, total = train_steps(config, graph, state, tokens, seed, *bounds)
                bits += float(jax.device_get(total))
                bar.update(shown, completed=last, description=f"{bits / (last - step):.3f} bits per byte")
            point = {"step": stop, "train_loss_bits_per_byte": bits / (stop - step)}
            for name, part in windows.items():
                point[f"{name}_bits_per_byte"] = bits_per_byte(graph, state.parameters, config.dtype, part)
            if not all(map(math.isfinite, point.values())):
                raise FloatingPointError(
                    f"the loss is not a number by step {stop}; use a learning_rate below {config.learning_rate}"
                )
            step = stop
            curve.append(point)
            if _best(curve) is point:
                best = _on_host(state.parameters)
            if work_dir is not None:
                save(Path(work_dir), identity, curve, (state, best))

    best = jax.jit(optax.tree.cast, static_argnums=1)(jax.device_put(best), config.dtype)
    model = nnx.merge(graph, best)
    models.save(model, output, tokenizer=models.byte_tokenizer(), eos_token_id=corpus.END_OF_TEXT)
    summary = {
        **run_info(),
        "versions": versions(),
        "chosen_step": _best(curve)["step"],
        "parameters": sum(p.size for p in jax.tree.leaves(best)),
        **{f"{name}_bits_per_byte": bits_per_byte(graph, best, config.dtype, part) for name, part in windows.items()},
        "tokens_trained_on": config.steps * config.batch * config.context,
        "seconds": round(time.monotonic() - started, 1),
        "resumed_at_step": resumed,
        "config": dataclasses.asdict(config),
        "corpus": {
            "sha256": identity["corpus"],
            "documents": {name: len(part) for name, part in parts.items()},
            "bytes": {name: sum(len(text.encode()) for text in part) for name, part in parts.items()},
        },
        "curve": curve,
    }
    write_json(Path(output) / "training.json", summary)
    return model, summary


def check_paths(output: str | os.PathLike[str], work_dir: str | os.PathLike[str] | None) -> None:
    """Makes the work_dir. Raises ValueError where a path has what is no checkpoint, or no state, of ours, and OSError
    where none can be written."""
    output = Path(output)
    if output.exists() and not is_ours(output) and not (output.is_dir() and not any(output.iterdir())):
        raise ValueError(f"output {str(output)!r} is not a checkpoint of ours; choose another directory or remove it")
    try:
        check_writable(output.with_name(f"{output.name}.json"))  # beside it: a directory is replaced as a whole
    except OSError as error:
        raise type(error)(error.errno, error.strerror, str(output)) from error
    if work_dir is None:
        return
    work_dir = Path(work_dir)
    if output.resolve() in (work_dir.resolve(), *work_dir.resolve().parents):
        raise ValueError(f"work_dir {work_dir} is inside output, which is replaced when saving; move it elsewhere")
    work_dir.mkdir(parents=True, exist_ok=True)
    if other := [path.name for path in work_dir.iterdir() if not path.name.startswith(STATE)]:
        raise ValueError(
            f"work_dir {work_dir} is not a training run's: it has {min(other)}; choose an empty or a new directory"
        )
    check_writable(work_dir / STATE)


def _best(curve: Sequence[dict[str, Any]]) -> dict[str, Any]:
    return min(curve, key=lambda point: point["validation_bits_per_byte"])


def _on_host(tree: Any) -> Any:
    """A copy: on a CPU device_get gives the device's own memory, which the next step reuses."""
    return jax.tree.map(np.array, jax.device_get(tree))


def save(work_dir: Path, identity: dict[str, Any], curve: list[dict[str, Any]], tree: Any) -> None:
    """Keeps the loss curve and the arrays of a run in a file that is written in one piece."""
    record = np.array(json.dumps({"identity": identity, "curve": curve}))
    with replacing(work_dir / STATE) as beside, beside.open("wb") as file:
        np.savez(file, *jax.device_get(jax.tree.leaves(tree)), record=record)


def restore(work_dir: Path, identity: dict[str, Any], like: Any) -> tuple[list[dict[str, Any]], Any]:
    """The loss curve and the arrays that were saved last, in a tree like this. Raises ValueError for another run's, and
    for what cannot be read."""
    leaves, structure = jax.tree.flatten(like)
    try:
        with np.load(work_dir / STATE) as file:
            record = json.loads(str(file["record"]))
            arrays = [file[f"arr_{number}"] for number in range(len(leaves))]
    except (zipfile.BadZipFile, zlib.error, ValueError, KeyError, EOFError, TypeError) as error:
        raise ValueError(f"{work_dir / STATE} cannot be read ({error}): remove it, to begin anew") from error
    for name, value in identity.items():
        if (saved := record["identity"].get(name)) != value:
            raise ValueError(
                f"work_dir {work_dir} has the state of another run: its {name} is {saved!r}, not {value!r}; use the "
                "same settings or another work_dir"
            )
    arrays = [jax.device_put(new) if isinstance(old, Array) else new for old, new in zip(leaves, arrays, strict=True)]
    print(f"resumed at step {record['curve'][-1]['step']}", file=sys.stderr)
    return record["curve"], jax.tree.unflatten(structure, arrays)


# --- the command ------------------------------------------------------------------------------------------------------


def define_flags(into: flags.FlagValues) -> None:
    define = script.Define(into)
    define.string("output", None, "Directory to write the checkpoint to.", required=True)
    for field in dataclasses.fields(Config):
        of_type = {int: define.integer, float: define.number, str: define.string}[type(field.default)]
        of_type(field.name, field.default, field.metadata["help"])
    define.string("work_dir", None, "Directory of the training state, and of nothing else; resumes if there is one.")


def main(given: flags.FlagValues) -> None:
    config = Config(**{field.name: getattr(given, field.name) for field in dataclasses.fields(Config)})
    _, summary = train(config, given.output, given.work_dir)
    print(json.dumps(summary))


if __name__ == "__main__":
    script.run(main, define_flags)
