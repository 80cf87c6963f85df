"""Trains a small byte-level OPT on the documentation that every Python installation carries.

    PYTHONPATH=. python experiments/train_lm.py --output=experiments/checkpoints/pydoc --seed=0

writes a checkpoint for `models.load`, with a tokenizer and `training.json`, which says how it came about. From a
notebook: `train(Config(output=...))`.

The corpus (`experiments.support.corpus`) is smaller than the model is patient, so weights are kept from the evaluation
that was best on the validation documents; the held-out documents decide nothing and are only reported on. Bits per byte
are the bits of all predicted tokens, ends of text included, over the number of predicted bytes.

Where the work happens: the whole corpus is one array on the device, and one jitted call does many steps, each cutting
its own random windows by (seed, step). So nothing crosses the link while training, and a resumed run sees the batches
that an uninterrupted one does.
"""

import dataclasses
import functools
import json
import math
import os
import platform
import shlex
import sys
import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
import orbax.checkpoint as ocp
from absl import flags
from flax import nnx
from jax import Array
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

import models
from experiments.support import corpus, script
from kvrecomp.files import write_json
from kvrecomp.run.attention import causal
from models.checkpoint import is_ours

SAVED_DTYPES = ("bfloat16", "float16", "float32")
COMPUTE_DTYPES = ("bfloat16", "float32")
WARMUP_STEPS = 100
FINAL_RATE = 0.02  # of the learning rate, at the end of the cosine
GRADIENT_NORM = 1.0
EVALUATION_TOKENS = 2**14  # at a time
STEPS_PER_CALL = 25  # often enough for a progress bar, seldom enough that dispatch costs nothing


@dataclass(frozen=True)
class Config:
    """One training run. `output`, `work_dir` and `log` are paths, the rest decides the result: two are equal,
    and share a compiled step, if they give the same weights.

    Sizes are in tokens, which are bytes. Rows start at random positions when `context` is less than `positions`, so
    that all positions are trained. `dtype` is that of the saved weights, `compute_dtype` that of the products in
    training; master weights and optimizer are float32.

    Raises:
        ValueError: a size that is not positive, sizes that do not fit each other, an unknown dtype, an output
            directory that is not a checkpoint of ours.
    """

    output: str = dataclasses.field(compare=False)
    steps: int = 5000
    batch: int = 32
    context: int = 512
    positions: int = 1024
    layers: int = 6
    hidden: int = 192
    heads: int = 6
    learning_rate: float = 2e-3
    weight_decay: float = 0.1
    dropout: float = 0.15
    seed: int = 0
    dtype: str = "bfloat16"
    compute_dtype: str = "bfloat16"
    eval_every: int = 250
    work_dir: str | None = dataclasses.field(default=None, compare=False)
    log: str | None = dataclasses.field(default=None, compare=False)

    def __post_init__(self):
        for name in ("steps", "batch", "context", "positions", "layers", "hidden", "heads", "eval_every"):
            if getattr(self, name) <= 0:
                raise ValueError(f"{name} is {getattr(self, name)}; it must be greater than zero")
        if not (0 < self.learning_rate < math.inf and 0 <= self.weight_decay < math.inf and 0 <= self.dropout < 1):
            raise ValueError(
                f"learning_rate {self.learning_rate}, weight_decay {self.weight_decay}, dropout {self.dropout}; "
                "expected a positive rate, a decay of at least zero and a dropout from 0 to below 1"
            )
        if not 0 <= self.seed < 2**32:
            raise ValueError(f"seed is {self.seed}; expected an integer from 0 to 2**32 - 1")
        for name, known in (("dtype", SAVED_DTYPES), ("compute_dtype", COMPUTE_DTYPES)):
            if getattr(self, name) not in known:
                raise ValueError(f"{name} is {getattr(self, name)!r}; expected one of {', '.join(known)}")
        if self.context > self.positions:
            raise ValueError(
                f"context {self.context} is larger than the model's {self.positions} positions; "
                f"lower it or use positions={self.context}"
            )
        if self.hidden % self.heads:
            raise ValueError(f"hidden size {self.hidden} does not divide into {self.heads} heads")
        output = Path(self.output)
        empty = output.is_dir() and not any(output.iterdir())
        if not self.output or (output.exists() and not empty and not is_ours(output)):
            raise ValueError(
                f"output {self.output!r} is not a checkpoint of ours; choose another directory or remove it"
            )
        for name in ("work_dir", "log"):  # saving replaces the output directory as a whole
            path = getattr(self, name)
            if path is not None and output.resolve() in (Path(path).resolve(), *Path(path).resolve().parents):
                raise ValueError(f"{name} {path} is inside output, which is replaced when saving; move it elsewhere")
        if self.work_dir is not None and Path(self.work_dir).exists() and not Path(self.work_dir).is_dir():
            raise ValueError(f"work_dir {self.work_dir} is a file; give the name of a directory")
        if self.log is not None and Path(self.log).is_dir():
            raise ValueError(f"log {self.log} is a directory; give the name of a file in it")

    @property
    def model(self) -> models.OPTConfig:
        """The model to be trained."""
        return models.OPTConfig(
            name="opt-pydoc",
            layers=self.layers,
            hidden=self.hidden,
            heads=self.heads,
            intermediate=4 * self.hidden,
            vocab=corpus.VOCABULARY,
            positions=self.positions,
        )

    @property
    def command(self) -> str:
        """The command line of this run."""
        given = [field.name for field in dataclasses.fields(self) if getattr(self, field.name) != field.default]
        given += [] if "seed" in given else ["seed"]
        options = [f"--{name}={shlex.quote(str(getattr(self, name)))}" for name in given]
        return " ".join(["PYTHONPATH=. python experiments/train_lm.py", *options])

    @property
    def decisive(self) -> dict[str, Any]:
        """The fields that the result depends on."""
        return {field.name: getattr(self, field.name) for field in dataclasses.fields(self) if field.compare}


class Result(NamedTuple):
    """What `train` gives: the model as saved, the loss curve, and the contents of training.json."""

    model: models.CausalLM
    log: list[dict[str, Any]]
    summary: dict[str, Any]


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
    batch, tokens = token_ids.shape
    attend = causal(jnp.zeros(batch, jnp.int32))
    hidden = model.embed(token_ids.T, jnp.arange(tokens)[:, None] + offsets)
    for number, layer in enumerate(model.layers):
        graph, parameters = nnx.split(layer)

        @jax.checkpoint
        def apply(parameters: nnx.State, hidden: Array, graph=graph, number=number) -> Array:
            out = nnx.merge(graph, parameters)(hidden, attend)
            if not rate:
                return out
            kept = jax.random.bernoulli(jax.random.fold_in(key, number), 1 - rate, out.shape)
            return hidden + jnp.where(kept, (out - hidden) / (1 - rate), 0)

        hidden = apply(parameters, hidden)
    return model.unembed(hidden)


def loss_sums(logits: Array, targets: Array) -> tuple[Array, Array]:
    """Nats of all targets but padding, and how many of them are bytes: logits [t, b, vocab], targets int32[t, b]."""
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


def _cast(parameters: Any, dtype: str) -> Any:
    return jax.tree.map(lambda p: p.astype(dtype), parameters)


@functools.partial(jax.jit, static_argnums=(0, 1), donate_argnums=2)
def train_steps(
    config: Config, graph: nnx.GraphDef, state: State, tokens: Array, seed: Array, first: Array, last: Array
) -> tuple[State, Array]:
    """Steps first to last - 1 on tokens [n] -> state, and the sum of their mean losses in bits per byte.

    The bounds are arguments, so calls of any number of steps are one program, and give the same bits.
    """
    optimizer = make_optimizer(config)

    def loss(parameters: Any, windows: Array, offsets: Array, key: Array) -> Array:
        model = nnx.merge(graph, _cast(parameters, config.compute_dtype))
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
    """tokens [n] -> int32[groups, rows, context + 1] on the device: consecutive windows, each token a target once.

    A window's last token is the first of the next; the end is filled up with padding.
    """
    count = -(-(len(tokens) - 1) // context)
    rows = min(max(1, EVALUATION_TOKENS // context), count)
    groups = -(-count // rows)
    filled = np.full(groups * rows * context + 1, corpus.PADDING, np.int32)
    filled[: len(tokens)] = tokens
    windows = filled[np.arange(groups * rows)[:, None] * context + np.arange(context + 1)]
    return jax.device_put(windows.reshape(groups, rows, context + 1))


@functools.partial(jax.jit, static_argnums=(0, 1))
def _evaluate(graph: nnx.GraphDef, dtype: str, parameters: Any, windows: Array) -> tuple[Array, Array]:
    model = nnx.merge(graph, _cast(parameters, dtype))

    def group(windows: Array) -> tuple[Array, Array]:
        offsets = jnp.zeros(windows.shape[0], jnp.int32)
        return loss_sums(forward(model, windows[:, :-1], offsets), windows[:, 1:].T)

    return jax.lax.map(group, windows)


def bits_per_byte(graph: nnx.GraphDef, parameters: Any, dtype: str, windows: Array) -> float:
    """Of `evaluation_windows`, with parameters cast to `dtype` and computed in it."""
    nats, bytes_predicted = jax.device_get(_evaluate(graph, dtype, parameters, windows))
    return float(nats.astype(np.float64).sum() / math.log(2) / bytes_predicted.sum())


# --- a run ------------------------------------------------------------------------------------------------------------


def train(config: Config, documents: Sequence[str] | None = None) -> Result:
    """Train, save to `config.output` and say how it went; resumes from `config.work_dir` if that has a state.

    Args:
        config: the run.
        documents: what to train on; `corpus.documents()` if None.

    Raises:
        ValueError: a corpus shorter than the context, a `work_dir` of a different run.
        FloatingPointError: a loss that is not a number.
    """
    started = time.monotonic()
    documents = corpus.documents() if documents is None else documents
    parts = corpus.split(documents)
    encoded = corpus.Split(*map(corpus.encode, parts))
    for name, tokens in encoded._asdict().items():
        needed = config.context + 1 if name == "train" else 2
        if len(tokens) < needed:
            raise ValueError(f"the {name} documents are {len(tokens)} tokens; at least {needed} are needed")
    tokens = jax.device_put(encoded.train)
    validation, heldout = (evaluation_windows(part, config.context) for part in (encoded.validation, encoded.heldout))

    graph, parameters = nnx.split(models.create(config.model, dtype="float32", seed=config.seed))
    state = State(parameters, jax.jit(make_optimizer(config).init)(parameters))
    best, step, log = _on_host(parameters), 0, []
    store = _Store(config, corpus.fingerprint(documents))
    if (kept := store.restore(state, best)) is not None:
        state, best, step, log = kept
        print(f"resumed at step {step}", file=sys.stderr)
    resumed = step

    seed = jax.device_put(np.uint32(config.seed))
    with _progress(config.steps, step) as advance:
        while step < config.steps:
            stop = min(config.steps, (step // config.eval_every + 1) * config.eval_every)
            bits = 0.0
            for first, last in _calls(step, stop):
                bounds = jax.device_put((np.int32(first), np.int32(last)))
                state, total = train_steps(config, graph, state, tokens, seed, *bounds)
                bits += float(jax.device_get(total))
                advance(last, bits / (last - step))
            record = {"step": stop, "train_loss_bits_per_byte": bits / (stop - step)}
            for name, windows in (("validation", validation), ("heldout", heldout)):
                record[f"{name}_bits_per_byte"] = bits_per_byte(graph, state.parameters, config.compute_dtype, windows)
            if not all(map(math.isfinite, record.values())):
                raise FloatingPointError(
                    f"the loss is not a number by step {stop}; use a learning_rate below {config.learning_rate}"
                )
            step, known = stop, min((r["validation_bits_per_byte"] for r in log), default=math.inf)
            if record["validation_bits_per_byte"] < known:
                best = _on_host(state.parameters)
            log.append(record)
            store.save(state, best, step, log)
            if config.log is not None:
                write_json(config.log, log)
    store.close()
    if config.log is not None:
        write_json(config.log, log)

    best = jax.jit(_cast, static_argnums=1)(jax.device_put(best), config.dtype)
    model = nnx.merge(graph, best)
    models.save(model, config.output, tokenizer=models.byte_tokenizer())
    summary = {
        "command": config.command,
        "seed": config.seed,
        "steps": config.steps,
        "chosen_step": min(log, key=lambda record: record["validation_bits_per_byte"])["step"],
        "parameters": sum(p.size for p in jax.tree.leaves(best)),
        # Of the weights as saved, computed in their dtype.
        "heldout_bits_per_byte": bits_per_byte(graph, best, config.dtype, heldout),
        "validation_bits_per_byte": bits_per_byte(graph, best, config.dtype, validation),
        "tokens_trained_on": config.steps * config.batch * config.context,
        "seconds": round(time.monotonic() - started, 1),
        "resumed_at_step": resumed,
        "config": config.decisive,
        "corpus": {
            "sha256": corpus.fingerprint(documents),
            "documents": {name: len(part) for name, part in parts._asdict().items()},
            "bytes": {name: sum(len(text.encode()) for text in part) for name, part in parts._asdict().items()},
        },
        "versions": {
            "python": platform.python_version(),
            **{name: version(name) for name in ("jax", "flax", "optax", "orbax-checkpoint", "numpy")},
        },
        "device": jax.devices()[0].device_kind,
        "xla_flags": os.environ.get("XLA_FLAGS", ""),
    }
    write_json(Path(config.output) / "training.json", summary)
    return Result(model, log, summary)


def _on_host(tree: Any) -> Any:
    """A copy: on a CPU device_get gives the device's own memory, which the next step reuses."""
    return jax.tree.map(np.array, jax.device_get(tree))


def _calls(first: int, last: int) -> Iterable[tuple[int, int]]:
    """(first, last) of each call of `train_steps`."""
    for start in range(first, last, STEPS_PER_CALL):
        yield start, min(last, start + STEPS_PER_CALL)


class _progress:
    """A context that gives `advance(step, bits per byte)`: a bar on a terminal, nothing elsewhere."""

    def __init__(self, steps: int, done: int):
        console = Console(stderr=True)
        columns = (BarColumn(), MofNCompleteColumn(), TextColumn("{task.description}"), TimeRemainingColumn())
        self._progress = Progress(*columns, console=console, disable=not console.is_terminal)
        self._task = self._progress.add_task("compiling", total=steps, completed=done)

    def __enter__(self):
        self._progress.start()
        return lambda step, bits: self._progress.update(
            self._task, completed=step, description=f"{bits:.3f} bits per byte"
        )

    def __exit__(self, *_):
        self._progress.stop()


class _Store:
    """The training state in `config.work_dir`, as Orbax keeps it; does nothing without a `work_dir`."""

    def __init__(self, config: Config, fingerprint: str):
        self._identity = {"config": config.decisive, "corpus": fingerprint}
        self._directory = config.work_dir
        self._manager = None
        if config.work_dir is not None:
            self._manager = ocp.CheckpointManager(
                Path(config.work_dir).absolute(),
                options=ocp.CheckpointManagerOptions(max_to_keep=2, create=True),
                item_names=("arrays", "record"),
            )

    def save(self, state: State, best: Any, step: int, log: list[dict[str, Any]]) -> None:
        """Keep it all. Waits for the disk: the next step reuses the memory of the arrays."""
        if self._manager is None:
            return
        record = {"identity": self._identity, "log": log}
        arrays = _named({"state": state, "best": best})
        items = ocp.args.Composite(arrays=ocp.args.StandardSave(arrays), record=ocp.args.JsonSave(record))
        self._manager.save(step, args=items)
        self._manager.wait_until_finished()

    def restore(self, state: State, best: Any) -> tuple[State, Any, int, list[dict[str, Any]]] | None:
        """The latest kept, in the form of the arguments; None if there is nothing."""
        if self._manager is None or (step := self._manager.latest_step()) is None:
            return None
        record = self._manager.restore(step, args=ocp.args.Composite(record=ocp.args.JsonRestore()))["record"]
        theirs = {**record["identity"].pop("config"), **record["identity"]}
        ours = {**self._identity["config"], "corpus": self._identity["corpus"]}
        if different := [name for name in ours if theirs.get(name) != ours[name]]:
            name = different[0]
            raise ValueError(
                f"work_dir {self._directory} has the state of another run: its {name} is {theirs.get(name)!r}, not "
                f"{ours[name]!r}; use the same settings or another work_dir"
            )
        tree = {"state": state, "best": best}
        target = _named(tree)
        arrays = self._manager.restore(step, args=ocp.args.Composite(arrays=ocp.args.StandardRestore(target)))["arrays"]
        tree = jax.tree.unflatten(jax.tree.structure(tree), [arrays[name] for name in target])
        return tree["state"], tree["best"], step, record["log"]

    def close(self) -> None:
        """Give the directory back."""
        if self._manager is not None:
            self._manager.close()


def _named(tree: Any) -> dict[str, Any]:
    """{path: leaf}, in the order of the leaves: what is on disk does not depend on classes of optax or flax."""
    return {jax.tree_util.keystr(path): leaf for path, leaf in jax.tree_util.tree_leaves_with_path(tree)}


# --- the command ------------------------------------------------------------------------------------------------------


def define_flags() -> None:
    """The fields of `Config` as flags. Called by the script only: notebooks and tests import without them."""
    default = Config
    flags.DEFINE_string("output", None, "Directory to write the checkpoint to.", required=True)
    flags.DEFINE_integer("steps", default.steps, "Optimizer steps.")
    flags.DEFINE_integer("batch", default.batch, "Rows of a step.")
    flags.DEFINE_integer("context", default.context, "Tokens (bytes) of a row.")
    flags.DEFINE_integer("positions", default.positions, "Most tokens the model can read; all are trained.")
    flags.DEFINE_integer("layers", default.layers, "Layers.")
    flags.DEFINE_integer("hidden", default.hidden, "Hidden size; the feed-forward is four times as wide.")
    flags.DEFINE_integer("heads", default.heads, "Attention heads.")
    flags.DEFINE_float("learning_rate", default.learning_rate, "Learning rate after warm-up.")
    flags.DEFINE_float("weight_decay", default.weight_decay, "AdamW's decay of the kernels.")
    flags.DEFINE_float("dropout", default.dropout, "Share of each layer's contributions that is dropped.")
    flags.DEFINE_integer("seed", default.seed, "Seed of weights, batches and dropout.")
    flags.DEFINE_string("dtype", default.dtype, f"Of the saved weights: {', '.join(SAVED_DTYPES)}.")
    flags.DEFINE_string("compute_dtype", default.compute_dtype, f"Of the products: {', '.join(COMPUTE_DTYPES)}.")
    flags.DEFINE_integer("eval_every", default.eval_every, "Steps between evaluations, and states kept.")
    flags.DEFINE_string("work_dir", default.work_dir, "Directory of the training state; resumes if there is one.")
    flags.DEFINE_string("log", default.log, "JSON file for the loss curve.")


def main(given: flags.FlagValues) -> None:
    """Unpacks the flags."""
    names = [field.name for field in dataclasses.fields(Config)]
    result = train(Config(**{name: flags.FLAGS[name].value for name in names}))
    print(json.dumps(result.summary))


if __name__ == "__main__":
    script.run(main, define_flags)
