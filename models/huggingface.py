"""Reading a local Hugging Face directory: config.json and weights in safetensors or torch files.

`models.tables` says where tensors belong. Names, shapes and dtypes are checked before the first tensor is read. Then
each tensor is read, put on its devices and let go, one file after the other, so that no second copy of the weights
exists. Nothing of a file is executed.
"""

import contextlib
import dataclasses
import functools
import json
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
    CheckpointError,
    Placement,
    Skeleton,
    check_names,
    dtype_name,
    first_line,
    sharding_of,
)
from models.config import Config, check_name
from models.layers import CausalLM
from models.tables import BUFFERS, HEAD, MODEL_TYPES, Table, expand

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
            # A copy, for jax may keep what it is given, and this is the file's mapping. Contiguous, for the view below.
            tensor = tensor.detach().clone(memory_format=torch.contiguous_format)
            if tensor.dtype == torch.bfloat16:  # numpy has none, so the bits go through an integer of the same size
                return tensor.view(torch.int16).numpy().view(jnp.dtype("bfloat16"))
            return tensor.numpy()

        tensors = {}
        for name, tensor in loaded.items():
            if not isinstance(name, str):
                raise CheckpointError(f"{file} holds a tensor named {name!r}; expected a dict of tensors by name")
            if not isinstance(tensor, torch.Tensor):
                raise CheckpointError(f"{file}: {name} is a {type(tensor).__name__}; expected a tensor")
            dtype = str(tensor.dtype).removeprefix("torch.")
            tensors[name] = Tensor(file, tuple(tensor.shape), dtype, functools.partial(read, tensor))
        return tensors


def _read_index(index: Path) -> dict[str, list[str]]:
    """{file: the tensors that an index has in it}."""
    files: dict[str, list[str]] = {}
    with _reading(index):
        for name, file in json.loads(index.read_text(encoding="utf-8"))["weight_map"].items():
            if Path(file).name != file:
                raise CheckpointError(f"{index} lists {file!r}; expected names of files beside it")
            files.setdefault(file, []).append(name)
    return files


def _open_weights(path: Path) -> dict[str, Tensor]:
    """All tensors of a directory, by name without the leading "model."; of shards, those that the index has in each."""
    for name, opener in (("model.safetensors", _open_safetensors), ("pytorch_model.bin", _open_torch)):
        index = path / f"{name}.index.json"
        if (path / name).is_file():
            files = {name: None}
        elif index.is_file():
            files = _read_index(index)
        else:
            continue
        tensors: dict[str, Tensor] = {}
        for file, listed in sorted(files.items()):
            opened = opener(path / file)
            for given in opened if listed is None else listed:
                if given not in opened:
                    raise CheckpointError(f"{index} has {given} in {file}, which has it not; copy both again")
                short = given.removeprefix("model.")
                if short in tensors:
                    raise CheckpointError(
                        f"{given} is doubled, in {tensors[short].file} and {path / file}; expected once: remove one"
                    )
                tensors[short] = opened[given]
        return tensors
    raise CheckpointError(
        f"{path} has no weights; expected model.safetensors, model.safetensors.index.json or pytorch_model.bin"
    )


# --- loading ----------------------------------------------------------------------------------------------------------


class Described(NamedTuple):
    """What a directory says before a tensor is read: the model, the dtype to read it in, and its tensors by name."""

    config: Config
    dtype: str
    tensors: dict[str, Tensor]
    table: Table


def describe(path: Path, config: Mapping[str, Any], dtype: str | None) -> Described:
    """Opens the files of a Hugging Face directory; `config` is the contents of its config.json, `dtype` None as stored.

    Raises:
        CheckpointError: an unsupported configuration or dtype; damaged files.
    """
    kind = config.get("model_type")
    if not isinstance(kind, str) or kind not in MODEL_TYPES:
        raise CheckpointError(f"{path}/config.json: model_type is {kind!r}; expected one of {', '.join(MODEL_TYPES)}")
    family, table = MODEL_TYPES[kind]
    try:
        check_name(kind, "_name_or_path", config.get("_name_or_path") or "")
        name = Path(config.get("_name_or_path") or path.resolve()).name
        model_config = family.from_huggingface(config, name)
    except (TypeError, ValueError) as error:  # a field may be of any type
        raise CheckpointError(f"{path}/config.json: {error}") from error

    tensors = {given: tensor for given, tensor in _open_weights(path).items() if not given.endswith(BUFFERS)}
    if model_config.shape.tied and _untied(tensors, table):
        model_config = dataclasses.replace(model_config, tied=False)
    for given, tensor in tensors.items():
        if tensor.dtype not in SAFETENSORS_DTYPES.values():
            raise CheckpointError(
                f"{tensor.file}: {given} has dtype {tensor.dtype}; expected one of "
                f"{', '.join(SAFETENSORS_DTYPES.values())}: convert the checkpoint"
            )
    dtype = dtype_name(dtype) if dtype is not None else _stored_dtype(path, tensors)
    return Described(model_config, dtype, tensors, table)


def _untied(tensors: dict[str, Tensor], table: Table) -> bool:
    """Whether there is a head that is not the token table once more, which is then dropped, nor stands in for it."""
    embedding = next(name for name, (ours, _) in table.items() if ours == "tokens.embedding")
    if HEAD not in tensors:
        return False
    if embedding not in tensors:
        tensors[embedding] = tensors.pop(HEAD)
        return False
    head, tokens = tensors[HEAD], tensors[embedding]
    if (head.shape, head.dtype) != (tokens.shape, tokens.dtype):
        return True
    with _reading(head.file):
        if not np.array_equal(head.read(), tokens.read()):
            return True
    del tensors[HEAD]
    return False


def load(path: Path, config: Mapping[str, Any], dtype: str | None, sharding: Placement) -> CausalLM:
    """Read what `describe` describes.

    Raises:
        CheckpointError: as `describe`; unknown, missing, doubled or misshapen tensors.
    """
    model_config, dtype, tensors, table = describe(path, config, dtype)
    skeleton = Skeleton(model_config, dtype)
    places = expand(table, skeleton.shapes, model_config.layers)
    expected = {given: place.shape(skeleton.shapes) for given, place in places.items()}
    check_names(str(path), {given: tensor.shape for given, tensor in tensors.items()}, expected)

    parameters = {}
    # A file stays mapped as long as one of its tensors is to be read, so they are read file by file.
    for given in sorted(places, key=lambda given: tensors[given].file):
        tensor = tensors.pop(given)
        with _reading(tensor.file):
            for ours, values in places[given].read(tensor.read(), skeleton.shapes):
                parameters[ours] = _put(values, dtype, sharding_of(sharding, ours, values.shape))
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
