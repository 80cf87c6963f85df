"""Models as trees of named parameters: built abstractly, filled one by one, written as and read from Orbax checkpoints.

A parameter's name is its path in the module, such as `layers.0.attention.query.kernel`. A checkpoint of ours is a
directory of

    config.json               {"family": "opt", "dtype": "bfloat16", ...fields of the family's configuration}
    params/                   an Orbax checkpoint of {name: array}
    tokenizer.json            optional, as are the other files that `models.text` reads
    generation_config.json
"""

import contextlib
import ctypes
import dataclasses
import functools
import json
import logging
import os
import shutil
import sys
import uuid
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
from flax import nnx
from jax import Array
from jax.sharding import Sharding
from tokenizers import Tokenizer

from models.config import Config
from models.gemma import GemmaConfig
from models.layers import INITIALIZERS, CausalLM
from models.llama import LlamaConfig
from models.opt import OPTConfig

FAMILIES: dict[str, type[Config]] = {config.family: config for config in (OPTConfig, LlamaConfig, GemmaConfig)}
"""Configurations by family."""

DTYPES = ("float32", "bfloat16", "float16")

Placement = Sharding | Callable[[str, tuple[int, ...]], Sharding] | None
"""Where parameters go: one sharding for all, or one for each (name, shape), or None for jax's default device."""


AT_FDCWD, RENAME_EXCHANGE = -100, 2
"""Of Linux's renameat2, for which Python has no function."""


class CheckpointError(ValueError):
    """A checkpoint that cannot be read or written; the message says what was given, what was expected, what to do."""


# --- a model and its parameters ---------------------------------------------------------------------------------------


def dtype_name(dtype: Any) -> str:
    """`"bfloat16"` for "bfloat16" or jnp.bfloat16. Raises CheckpointError for dtypes that models do not have."""
    try:
        name = jnp.dtype(dtype).name
    except TypeError:
        name = str(dtype)
    if name not in DTYPES:
        raise CheckpointError(f"dtype is {name}; expected one of {', '.join(DTYPES)}")
    return name


def sharding_of(sharding: Placement, name: str, shape: tuple[int, ...]) -> Sharding:
    """The sharding of one parameter."""
    if sharding is None:
        return jax.device_put(0).sharding  # jax.default_device, which has no other public name
    return sharding if isinstance(sharding, Sharding) else sharding(name, shape)


class Skeleton:
    """A model without its parameters: says which there are, and becomes a model when given them all."""

    def __init__(self, config: Config, dtype: str):
        self._graph, self._state = nnx.split(config.build(dtype=dtype, rngs=None))
        self.shapes: dict[str, tuple[int, ...]] = {
            ".".join(map(str, path)): tuple(variable.shape) for path, variable in nnx.to_flat_state(self._state)
        }

    def fill(self, parameters: Mapping[str, Array]) -> CausalLM:
        """A model of exactly these parameters, by name."""
        state = [
            (path, variable.replace(parameters[".".join(map(str, path))]))
            for path, variable in nnx.to_flat_state(self._state)
        ]
        return nnx.merge(self._graph, nnx.from_flat_state(state))


def parameters_of(model: CausalLM) -> dict[str, Array]:
    """{name: array} of a model."""
    flat = nnx.to_flat_state(nnx.state(model, nnx.Param))
    return {".".join(map(str, path)): variable.get_value() for path, variable in flat}


def random_parameters(skeleton: Skeleton, dtype: str, seed: int, sharding: Placement) -> Iterator[tuple[str, Array]]:
    """(name, array) of new parameters, each drawn in place in its dtype and sharding, from the seed and its name."""
    for name, shape in skeleton.shapes.items():
        draw = _draw(name.rpartition(".")[2], shape, dtype, sharding_of(sharding, name, shape))
        yield name, draw(jax.device_put(np.uint32(zlib.crc32(f"{seed}/{name}".encode()))))


@functools.lru_cache(maxsize=256)
def _draw(kind: str, shape: tuple[int, ...], dtype: str, sharding: Sharding) -> Callable[[Array], Array]:
    def draw(seed: Array) -> Array:
        return INITIALIZERS[kind](jax.random.key(seed), shape, jnp.dtype(dtype))

    return jax.jit(draw, out_shardings=sharding)


# --- Orbax ------------------------------------------------------------------------------------------------------------


def read_config(path: Path) -> dict[str, Any]:
    """The contents of `path/config.json`, ours or Hugging Face's."""
    if not path.is_dir():
        raise CheckpointError(f"{path} is not a directory; expected a Hugging Face directory or one that save() wrote")
    file = path / "config.json"
    if not file.is_file():
        raise CheckpointError(f"{path} has no config.json; expected a Hugging Face directory or one that save() wrote")
    return read_object(file)


def read_object(file: Path) -> dict[str, Any]:
    """The JSON object in a file."""
    try:
        read = json.loads(file.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{file} is not JSON ({error}); copy it again from its source") from error
    if not isinstance(read, dict):
        raise CheckpointError(f"{file} holds a {type(read).__name__}; expected a JSON object")
    return read


def is_ours(path: Path) -> bool:
    """Whether a directory holds a checkpoint that `save` wrote."""
    try:
        return "family" in read_config(path) and (path / "params").is_dir()
    except CheckpointError:
        return False


def save(
    model: CausalLM,
    path: str | os.PathLike[str],
    *,
    tokenizer: Tokenizer | None = None,
    eos_token_id: int | Sequence[int] | None = None,
) -> None:
    """Write a model as an Orbax checkpoint, with its configuration and, if given, its tokenizer and what ends a text.

    Other files that say how text is read and written, such as a chat template, may be put beside (`models.text`). The
    directory appears whole or not at all: it is written beside, and takes the place of an earlier checkpoint of ours,
    or of an empty directory, in one step where the file system can exchange two directories.

    Raises:
        CheckpointError: `path` exists and is not a checkpoint of ours.
    """
    target = Path(path).absolute()
    if target.exists() and not is_ours(target) and not (target.is_dir() and not any(target.iterdir())):
        raise CheckpointError(f"{target} exists and is not a checkpoint of ours; choose another path or remove it")
    config = {"family": model.config.family, "dtype": model.shape.dtype, **dataclasses.asdict(model.config)}
    documents = {"config.json": config}
    if eos_token_id is not None:
        documents["generation_config.json"] = {"eos_token_id": eos_token_id}
    beside = target.with_name(f".{target.name}.saving-{uuid.uuid4().hex}")
    beside.mkdir(parents=True)
    try:
        for name, document in documents.items():
            (beside / name).write_text(json.dumps(document, indent=2) + "\n", encoding="utf-8")
        if tokenizer is not None:
            tokenizer.save(str(beside / "tokenizer.json"))
        with ocp.StandardCheckpointer() as checkpointer:
            checkpointer.save(beside / "params", parameters_of(model))
        if target.exists():
            _exchange(beside, target)
        else:
            os.replace(beside, target)
    finally:
        shutil.rmtree(beside, ignore_errors=True)  # by now what was there before, if it was exchanged


def _exchange(new: Path, old: Path) -> None:
    """Let two directories change places: at no moment is there none at `old`, where Linux can do that."""
    exchange = getattr(ctypes.CDLL(None, use_errno=True), "renameat2", None)
    if exchange is not None and exchange(AT_FDCWD, os.fsencode(new), AT_FDCWD, os.fsencode(old), RENAME_EXCHANGE) == 0:
        return
    aside = new.with_name(f"{new.name}.replaced")
    os.replace(old, aside)
    try:
        os.replace(new, old)
    except BaseException:
        os.replace(aside, old)
        raise
    os.replace(aside, new)


def describe(path: Path, config: Mapping[str, Any], dtype: str | None) -> tuple[Config, str]:
    """The model that `save` wrote and the dtype to read it in; `config` is the contents of its config.json, `dtype`
    None as stored."""
    fields = dict(config)
    family, stored = fields.pop("family"), fields.pop("dtype", "missing")
    if not isinstance(family, str) or family not in FAMILIES:
        raise CheckpointError(f"{path}/config.json: family is {family!r}; expected one of {', '.join(FAMILIES)}")
    try:
        return FAMILIES[family](**fields), dtype_name(dtype or stored)
    except (TypeError, ValueError) as error:
        raise CheckpointError(f"{path}/config.json: {error}; expected what save() writes") from error


def restore(path: Path, config: Mapping[str, Any], dtype: str | None, sharding: Placement) -> CausalLM:
    """Read what `describe` describes."""
    model_config, dtype = describe(path, config, dtype)
    skeleton = Skeleton(model_config, dtype)
    params = (path / "params").absolute()
    try:
        with _late_reads_dropped(), ocp.StandardCheckpointer() as checkpointer:
            on_disk = {name: tuple(entry.shape) for name, entry in checkpointer.metadata(params).item_metadata.items()}
            check_names(str(params), on_disk, skeleton.shapes)
            targets = {
                name: jax.ShapeDtypeStruct(shape, jnp.dtype(dtype), sharding=sharding_of(sharding, name, shape))
                for name, shape in skeleton.shapes.items()
            }
            parameters = checkpointer.restore(params, targets)
    except CheckpointError:
        raise
    except Exception as error:  # what Orbax and its storage raise for damaged files is not one kind
        # Of metadata that are gone or not what they were, Python says what they have not.
        of_metadata = isinstance(error, (AttributeError, LookupError, TypeError, RecursionError))
        reason = "its metadata are missing or damaged" if of_metadata else first_line(error)
        raise CheckpointError(f"{params} cannot be read ({reason}); copy or save it again") from error
    return skeleton.fill(parameters)


@contextlib.contextmanager
def _late_reads_dropped() -> Iterator[None]:
    """A context for reading in which Python says nothing of arrays that were still being read when another failed.

    Orbax closes its event loop then, and Python would print a traceback for each of them, thousands of lines around our
    own. They may end after the context, so after an error that stays so, until something is read.
    """
    log, before = logging.getLogger("asyncio"), sys.unraisablehook
    if isinstance(before, functools.partial) and before.func is _say_unless_late:
        (before,) = before.args
    sys.unraisablehook = functools.partial(_say_unless_late, before)
    log.addFilter(_is_wanted)
    yield
    sys.unraisablehook = before
    log.removeFilter(_is_wanted)


def _say_unless_late(say: Callable[["sys.UnraisableHookArgs"], Any], unraisable: "sys.UnraisableHookArgs") -> None:
    code = getattr(unraisable.object, "cr_code", None)  # of a coroutine
    orbax = code is not None and "orbax" in code.co_filename
    if not orbax and str(unraisable.exc_value) != "Event loop is closed":
        say(unraisable)


def _is_wanted(record: logging.LogRecord) -> bool:
    said = record.getMessage().split("\n")[0]  # of any kind of future: a Task, a _GatheringFuture
    return not said.endswith("exception was never retrieved") and not said.startswith("Task was destroyed")


def check_names(where: str, given: Mapping[str, tuple[int, ...]], expected: Mapping[str, tuple[int, ...]]) -> None:
    """Raise CheckpointError unless `given` has exactly the names and shapes of `expected`."""
    if unknown := sorted(given.keys() - expected.keys()):
        raise CheckpointError(f"{where}: unknown {_listed(unknown)}; the configuration has no such tensor: check both")
    if missing := sorted(expected.keys() - given.keys()):
        raise CheckpointError(f"{where}: missing {_listed(missing)}; the configuration needs it: check both")
    for name, shape in expected.items():
        if given[name] != shape:
            raise CheckpointError(
                f"{where}: {name} has shape {list(given[name])}; the configuration expects {list(shape)}: check both"
            )


def _listed(names: list[str]) -> str:
    return names[0] if len(names) == 1 else f"{names[0]} and {len(names) - 1} more"


def first_line(error: BaseException) -> str:
    """What an error of another package says, or the one that caused it, in one line of bearable length."""
    while error.__cause__ is not None:
        error = error.__cause__
    text = str(error).strip().split("\n")[0].strip() or type(error).__name__
    return text if len(text) <= 200 else text[:200] + "..."
