"""What the configurations of all families share: what they offer, and checks of sizes and of Hugging Face's fields."""

import dataclasses
import reprlib
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar, Protocol, Self

from flax import nnx

from kvrecomp.plan import ModelShape
from models.layers import CausalLM

LARGEST = 2**31 - 1  # positions, token ids and shapes are counted in 32 bits
MOST_LAYERS = 1000  # of published models none has more than 126; each takes milliseconds before a tensor is read


class Config(Protocol):
    """The sizes and variants of a model: a frozen dataclass, which JSON can hold and a model can be made from."""

    __dataclass_fields__: ClassVar[dict[str, dataclasses.Field[Any]]]
    family: ClassVar[str]

    @property
    def name(self) -> str: ...

    @property
    def layers(self) -> int: ...

    @property
    def shape(self) -> ModelShape:
        """The sizes as the planner knows them, in bfloat16; the model's own `shape` has the dtype of the parameters."""
        ...

    def build(self, *, dtype: Any, rngs: nnx.Rngs | None) -> CausalLM:
        """A model with new random parameters or, without `rngs`, an abstract one."""
        ...

    @classmethod
    def from_huggingface(cls, config: Mapping[str, Any], name: str) -> Self:
        """From the contents of a Hugging Face config.json; ValueError names a field that is missing or unsupported."""
        ...


def check_size(family: str, name: str, value: Any) -> None:
    """Raise ValueError unless it is a positive integer that a model can have."""
    most = MOST_LAYERS if name in ("layers", "num_hidden_layers") else LARGEST
    if not isinstance(value, int) or isinstance(value, bool) or not 0 < value <= most:
        raise ValueError(f"{family}: {name} is {reprlib.repr(value)}; expected a positive integer up to {most}")


def check_epsilon(family: str, name: str, value: Any) -> None:
    """Raise ValueError unless it is a number that keeps a norm from dividing by zero, and changes little else."""
    if not isinstance(value, (int, float)) or isinstance(value, bool) or not 0 < value < 1:
        raise ValueError(f"{family}: {name} is {reprlib.repr(value)}; expected a number between 0 and 1, such as 1e-5")


def check_flag(family: str, name: str, value: Any) -> None:
    """Raise ValueError unless it is true or false."""
    if not isinstance(value, bool):
        raise ValueError(f"{family}: {name} is {reprlib.repr(value)}; expected true or false")


def check_name(family: str, name: str, value: Any) -> None:
    """Raise ValueError unless it is text."""
    if not isinstance(value, str):
        raise ValueError(f"{family}: {name} is {reprlib.repr(value)}; expected text")


CHECKS = {int: check_size, float: check_epsilon, bool: check_flag, str: check_name}
"""By the type of a configuration's field."""


def check_fields(family: str, config: Any) -> None:
    """Raise ValueError unless the fields of a configuration have values of their types that a model can have."""
    for field in dataclasses.fields(config):
        if check := CHECKS.get(field.type):
            check(family, field.name, getattr(config, field.name))


def read_fields(family: str, config: Mapping[str, Any], names: Mapping[str, str]) -> dict[str, Any]:
    """{ours: value} of sizes and `epsilon`, which every configuration has, given {ours: theirs}.

    Raises:
        ValueError: one is missing, or has no value that a model can have; the message has their name for it.
    """
    if missing := [field for field in names.values() if field not in config]:
        raise ValueError(f"{family}: {', '.join(missing)} missing; expected in every {family} configuration")
    for ours, theirs in names.items():
        (check_epsilon if ours == "epsilon" else check_size)(family, theirs, config[theirs])
    return {ours: config[theirs] for ours, theirs in names.items()}


def read_size(family: str, config: Mapping[str, Any], name: str, default: int = 0) -> int:
    """A size that a configuration may leave out or null. Raises ValueError where it is none."""
    if config.get(name) is None:
        return default
    check_size(family, name, config[name])
    return config[name]


def read_flag(family: str, config: Mapping[str, Any], name: str, default: bool = False) -> bool:
    """Of a flag that a configuration may leave out or null. Raises ValueError where it is none."""
    if config.get(name) is None:
        return default
    check_flag(family, name, config[name])
    return config[name]


def check_supported(family: str, config: Mapping[str, Any], supported: Mapping[str, Sequence[Any]]) -> None:
    """Raise ValueError for a field with another value than these; the first is what its absence means."""
    if config.get("quantization_config") is not None:
        raise ValueError(f"{family}: quantization_config is present; expected plain weights: save them dequantized")
    for field, values in supported.items():
        if config.get(field, values[0]) not in values:
            only = " or ".join(map(str, values))
            raise ValueError(f"{family}: {field} is {reprlib.repr(config[field])}; only {only} is supported")
