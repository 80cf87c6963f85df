"""Language models as ordinary Flax modules, and reading and writing their checkpoints.

model = models.load("path/to/checkpoint")      # a Hugging Face directory or one that save() wrote
model = models.create("opt-1.3b")              # random weights, for measuring
text = models.load_text("path/to/checkpoint")  # text to ids and back, what ends it, how chats are written
logits = model(input_ids)                      # float32[batch, tokens, vocab]
models.save(model, "path/to/another")
"""

import dataclasses
import difflib
import os
from pathlib import Path
from typing import Any

from kvrecomp.plan import ModelShape
from models import checkpoint, gemma, huggingface, llama, opt
from models.checkpoint import CheckpointError, Placement, save
from models.config import Config
from models.gemma import Gemma, GemmaConfig
from models.layers import CausalLM
from models.llama import Llama, LlamaConfig
from models.opt import OPT, OPTConfig
from models.text import TextProcessor, load_text
from models.tokenizer import byte_tokenizer, check_tokenizer, load_tokenizer

__all__ = [
    "OPT",
    "PRESETS",
    "CausalLM",
    "CheckpointError",
    "Config",
    "Gemma",
    "GemmaConfig",
    "Llama",
    "LlamaConfig",
    "OPTConfig",
    "TextProcessor",
    "byte_tokenizer",
    "check_tokenizer",
    "create",
    "load",
    "load_text",
    "load_tokenizer",
    "preset",
    "read_shape",
    "save",
]

PRESETS: dict[str, Config] = {**opt.PRESETS, **llama.PRESETS, **gemma.PRESETS}
"""The published sizes of all families, by name."""


def load(path: str | os.PathLike[str], *, dtype: Any = None, sharding: Placement = None) -> CausalLM:
    """A model from a local directory, read one parameter at a time straight to its dtype and sharding.

    Args:
        path: a Hugging Face directory, or a checkpoint that `save` wrote.
        dtype: float32, bfloat16 or float16 for all parameters; None as stored.
        sharding: a jax Sharding for all parameters, or a function of (name, shape) that gives each its own; None for
            jax's default device.

    Raises:
        CheckpointError: what is there cannot be read as a model; the message says what and what to do.
    """
    path = Path(path)
    name = None if dtype is None else checkpoint.dtype_name(dtype)
    config = checkpoint.read_config(path)
    read = checkpoint.restore if "family" in config else huggingface.load
    return read(path, config, name, sharding)


def read_shape(path: str | os.PathLike[str], *, dtype: Any = None) -> ModelShape:
    """The sizes of the model that `load` would read, and its dtype, without its weights.

    Raises:
        CheckpointError: as `load`, but for what only reading shows.
    """
    path = Path(path)
    name = None if dtype is None else checkpoint.dtype_name(dtype)
    config = checkpoint.read_config(path)
    describe = checkpoint.describe if "family" in config else huggingface.describe
    found, stored, *_ = describe(path, config, name)
    return dataclasses.replace(found.shape, dtype=stored)


def preset(name: str) -> Config:
    """The configuration of that name in `PRESETS`.

    Raises:
        CheckpointError: there is none; the message lists the names.
    """
    if name not in PRESETS:
        close = difflib.get_close_matches(name, PRESETS, n=1, cutoff=0.5)
        hint = f": did you mean {close[0]!r}?" if close else ""
        raise CheckpointError(f"unknown model {name!r}; expected one of {', '.join(PRESETS)}{hint}")
    return PRESETS[name]


def create(
    name_or_config: str | Config, *, dtype: Any = "bfloat16", seed: int = 0, sharding: Placement = None
) -> CausalLM:
    """A model with random weights, drawn one parameter at a time in its dtype and sharding.

    Kernels and tables are normal with standard deviation 0.02, norms one, biases zero. Each parameter depends on the
    seed and its name only.

    Args:
        name_or_config: a name in `PRESETS`, or a configuration.
        dtype: float32, bfloat16 or float16.
        seed: an integer.
        sharding: as for `load`.

    Raises:
        CheckpointError: an unknown preset or dtype.
    """
    config = preset(name_or_config) if isinstance(name_or_config, str) else name_or_config
    dtype = checkpoint.dtype_name(dtype)
    skeleton = checkpoint.Skeleton(config, dtype)
    return skeleton.fill(dict(checkpoint.random_parameters(skeleton, dtype, seed, sharding)))
