"""Reading a local Hugging Face directory: config.json and weights in safetensors or torch files.

A family's table gives, for the name of each tensor (`{}` stands for the layer), our parameter and how it is stored.
Names, shapes and dtypes are checked before the first tensor is read. Then each tensor is read, put on its devices and
let go, so that no second copy of the weights exists. Nothing of a file is executed.
"""

import contextlib
import functools
import json
import math
import zipfile
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.sharding import Sharding
from safetensors import safe_open

from models.checkpoint import (
    FAMILIES,
    CheckpointError,
    Placement,
    Skeleton,
    check_names,
    dtype_name,
    first_line,
    sharding_of,
)
from models.layers import CausalLM

# --- tables -----------------------------------------------------------------------------------------------------------


class Stored(NamedTuple):
    """How a parameter lies in a file: the shape there, given ours. Reading turns it into a view of our shape."""

    shape: Callable[[tuple[int, ...]], tuple[int, ...]]
    transposed: bool = False

    def read(self, tensor: np.ndarray, shape: tuple[int, ...]) -> np.ndarray:
        """The tensor as ours, without a copy."""
        return (tensor.T if self.transposed else tensor).reshape(shape)


SAME = Stored(lambda ours: ours)
FLAT = Stored(lambda ours: (math.prod(ours),))  # [heads, head_dim] in one axis
OUT_IN = Stored(lambda ours: (math.prod(ours[1:]), ours[0]), transposed=True)  # torch's Linear: [out, in]

Table = Mapping[str, tuple[str, Stored]]

OPT_TABLE: Table = {
    "decoder.embed_tokens.weight": ("tokens.embedding", SAME),
    "decoder.embed_positions.weight": ("positions.embedding", SAME),
    "decoder.project_in.weight": ("project_in.kernel", OUT_IN),
    "decoder.project_out.weight": ("project_out.kernel", OUT_IN),
    "decoder.final_layer_norm.weight": ("final_norm.scale", SAME),
    "decoder.final_layer_norm.bias": ("final_norm.bias", SAME),
    "decoder.layers.{}.self_attn.q_proj.weight": ("layers.{}.attention.query.kernel", OUT_IN),
    "decoder.layers.{}.self_attn.q_proj.bias": ("layers.{}.attention.query.bias", FLAT),
    "decoder.layers.{}.self_attn.k_proj.weight": ("layers.{}.attention.key.kernel", OUT_IN),
    "decoder.layers.{}.self_attn.k_proj.bias": ("layers.{}.attention.key.bias", FLAT),
    "decoder.layers.{}.self_attn.v_proj.weight": ("layers.{}.attention.value.kernel", OUT_IN),
    "decoder.layers.{}.self_attn.v_proj.bias": ("layers.{}.attention.value.bias", FLAT),
    "decoder.layers.{}.self_attn.out_proj.weight": ("layers.{}.attention.output.kernel", OUT_IN),
    "decoder.layers.{}.self_attn.out_proj.bias": ("layers.{}.attention.output.bias", SAME),
    "decoder.layers.{}.self_attn_layer_norm.weight": ("layers.{}.attention_norm.scale", SAME),
    "decoder.layers.{}.self_attn_layer_norm.bias": ("layers.{}.attention_norm.bias", SAME),
    "decoder.layers.{}.fc1.weight": ("layers.{}.feed_forward.up.kernel", OUT_IN),
    "decoder.layers.{}.fc1.bias": ("layers.{}.feed_forward.up.bias", SAME),
    "decoder.layers.{}.fc2.weight": ("layers.{}.feed_forward.down.kernel", OUT_IN),
    "decoder.layers.{}.fc2.bias": ("layers.{}.feed_forward.down.bias", SAME),
    "decoder.layers.{}.final_layer_norm.weight": ("layers.{}.feed_forward_norm.scale", SAME),
    "decoder.layers.{}.final_layer_norm.bias": ("layers.{}.feed_forward_norm.bias", SAME),
}

TABLES: dict[str, Table] = {"opt": OPT_TABLE}


def expand(table: Table, shapes: Mapping[str, tuple[int, ...]], layers: int) -> dict[str, tuple[str, Stored]]:
    """{tensor name: (our parameter, how it is stored)} for every parameter in `shapes`; a variant may lack some."""
    return {
        pattern.format(layer): (ours.format(layer), stored)
        for pattern, (ours, stored) in table.items()
        for layer in range(layers if "{}" in pattern else 1)
        if ours.format(layer) in shapes
    }


# --- files ------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Tensor:
    """A tensor in a file, not yet read."""

    file: Path
    shape: tuple[int, ...]
    dtype: str
    read: Callable[[], np.ndarray]


SAFETENSORS_DTYPES = {"F32": "float32", "BF16": "bfloat16", "F16": "float16"}


@contextlib.contextmanager
def _reading(file: Path) -> Iterator[None]:
    """Turns what readers raise for damaged files into one clear error."""
    try:
        yield
    except CheckpointError:
        raise
    except FileNotFoundError as error:
        raise CheckpointError(f"{file} is missing; copy it again from its source") from error
    except Exception as error:  # a damaged file can make a reader raise anything
        raise CheckpointError(
            f"{file} is damaged or cut short ({first_line(error)}); copy it again from its source"
        ) from error


def _open_safetensors(file: Path) -> dict[str, Tensor]:
    with _reading(file):
        if not file.is_file():
            raise FileNotFoundError(file)
        opened = safe_open(str(file), framework="np")  # maps the file; unmapped when its tensors are let go
        tensors = {}
        for name in opened.keys():
            part = opened.get_slice(name)
            dtype = str(part.get_dtype())
            dtype = SAFETENSORS_DTYPES.get(dtype, dtype)
            tensors[name] = Tensor(file, tuple(part.get_shape()), dtype, functools.partial(opened.get_tensor, name))
        return tensors


def _open_torch(file: Path) -> dict[str, Tensor]:
    try:
        import torch
    except ImportError as error:
        raise CheckpointError(
            f"{file} is a torch file and torch is not installed; convert it to safetensors or `pip install torch`"
        ) from error
    with _reading(file):
        # Files from before torch 1.6 are not zip archives and cannot be mapped: they are read whole.
        mapped = zipfile.is_zipfile(file)
        try:
            loaded = torch.load(file, map_location="cpu", weights_only=True, mmap=mapped)
        except FileNotFoundError:
            raise
        except Exception as error:
            # torch's own message recommends loading without weights_only, which would execute the file's code.
            raise CheckpointError(
                f"{file} is damaged, cut short, or holds more than tensors ({type(error).__name__}); "
                "copy it again from its source or convert it to safetensors"
            ) from error
        if not isinstance(loaded, dict):
            raise CheckpointError(f"{file} holds a {type(loaded).__name__}; expected a dict of tensors")

        def read(tensor: Any) -> np.ndarray:
            if tensor.dtype == torch.bfloat16:  # numpy has none, so the bits go through an integer of the same size
                return tensor.contiguous().view(torch.int16).numpy().view(jnp.dtype("bfloat16"))
            return tensor.numpy()

        tensors = {}
        for name, tensor in loaded.items():
            if not isinstance(tensor, torch.Tensor):
                raise CheckpointError(f"{file}: {name} is a {type(tensor).__name__}; expected a tensor")
            dtype = str(tensor.dtype).removeprefix("torch.")
            tensors[name] = Tensor(file, tuple(tensor.shape), dtype, functools.partial(read, tensor))
        return tensors


def _shards(index: Path) -> list[Path]:
    """The files that an index lists."""
    with _reading(index):
        files = sorted(set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()))
        for file in files:
            if Path(file).name != file:
                raise CheckpointError(f"{index} lists {file!r}; expected names of files beside it")
    return [index.parent / file for file in files]


def _open_weights(path: Path) -> dict[str, Tensor]:
    """All tensors of a directory, by name without the leading "model."."""
    for name, opener in (("model.safetensors", _open_safetensors), ("pytorch_model.bin", _open_torch)):
        if (path / name).is_file():
            files = [path / name]
        elif (path / f"{name}.index.json").is_file():
            files = _shards(path / f"{name}.index.json")
        else:
            continue
        tensors: dict[str, Tensor] = {}
        for file in files:
            for given, tensor in opener(file).items():
                short = given.removeprefix("model.")
                if short in tensors:
                    raise CheckpointError(
                        f"{given} is doubled, in {tensors[short].file} and {file}; expected once: remove one of them"
                    )
                tensors[short] = tensor
        return tensors
    raise CheckpointError(
        f"{path} has no weights; expected model.safetensors, model.safetensors.index.json or pytorch_model.bin"
    )


# --- loading ----------------------------------------------------------------------------------------------------------


def load(path: Path, config: Mapping[str, Any], dtype: str | None, sharding: Placement) -> CausalLM:
    """Read a Hugging Face directory; `config` is the contents of its config.json, `dtype` None as stored.

    Raises:
        CheckpointError: an unsupported configuration; unknown, missing, doubled or misshapen tensors; damaged files.
    """
    family = config.get("model_type")
    if family not in TABLES:
        raise CheckpointError(f"{path}/config.json: model_type is {family!r}; expected one of {', '.join(TABLES)}")
    name = Path(config.get("_name_or_path") or path.resolve()).name
    try:
        model_config = FAMILIES[family].from_huggingface(config, name)
    except ValueError as error:
        raise CheckpointError(f"{path}/config.json: {error}") from error

    tensors = _open_weights(path)
    # Weights are tied, so a written head is the token table once more.
    tensors.pop("lm_head.weight", None)
    for given, tensor in tensors.items():
        if tensor.dtype not in SAFETENSORS_DTYPES.values():
            raise CheckpointError(
                f"{tensor.file}: {given} has dtype {tensor.dtype}; expected one of "
                f"{', '.join(SAFETENSORS_DTYPES.values())}: convert the checkpoint"
            )
    dtype = dtype_name(dtype) if dtype is not None else _stored_dtype(path, tensors)
    skeleton = Skeleton(model_config, dtype)
    table = expand(TABLES[family], skeleton.shapes, model_config.layers)
    expected = {given: stored.shape(skeleton.shapes[ours]) for given, (ours, stored) in table.items()}
    check_names(str(path), {given: tensor.shape for given, tensor in tensors.items()}, expected)

    parameters = {}
    for given, (ours, stored) in table.items():
        tensor, shape = tensors.pop(given), skeleton.shapes[ours]
        with _reading(tensor.file):
            parameters[ours] = _put(stored.read(tensor.read(), shape), dtype, sharding_of(sharding, ours, shape))
    return skeleton.fill(parameters)


def _stored_dtype(path: Path, tensors: Mapping[str, Tensor]) -> str:
    dtypes = sorted({tensor.dtype for tensor in tensors.values()})
    if len(dtypes) != 1:
        raise CheckpointError(f"{path} stores {' and '.join(dtypes) or 'no tensors'}; say which with dtype=")
    return dtype_name(dtypes[0])


def _put(array: np.ndarray, dtype: str, sharding: Sharding) -> Array:
    """On its devices, in its dtype. Transposing is left to the transfer and casting to the device: both are slow here.

    Waits, so that one tensor at a time is in flight.
    """
    if array.dtype == jnp.dtype(dtype):
        return jax.device_put(array, sharding).block_until_ready()
    # Through device memory even where the sharding is the host's: nothing computes on host arrays.
    return _cast(dtype, sharding)(jax.device_put(array, sharding.with_memory_kind("device"))).block_until_ready()


@functools.lru_cache(maxsize=64)
def _cast(dtype: str, sharding: Sharding) -> Callable[[Array], Array]:
    return jax.jit(lambda array: array.astype(dtype), out_shardings=sharding)
