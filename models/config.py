"""What the configurations of all families share: what they offer, and checks of sizes and of Hugging Face's fields."""

import math
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar, Protocol, Self

from flax import nnx

from kvrecomp.plan import ModelShape
from models.layers import CausalLM


class Config(Protocol):
    """The sizes and variants of a model: a frozen dataclass, which JSON can hold and a model can be made from."""

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


def check_sizes(family: str, config: object, names: Sequence[str]) -> None:
    """Raise ValueError unless the fields of these names are positive integers."""
    for name in names:
        value = getattr(config, name)
        if not isinstance(value, int) or isinstance(value, bool) or value <= 0:
            raise ValueError(f"{family}: {name} is {value!r}; expected a positive integer")


def check_epsilon(family: str, epsilon: Any) -> None:
    """Raise ValueError unless it is a positive number."""
    if not isinstance(epsilon, (int, float)) or isinstance(epsilon, bool) or not 0 < epsilon < math.inf:
        raise ValueError(f"{family}: epsilon is {epsilon!r}; expected a positive number")


def read_fields(family: str, config: Mapping[str, Any], names: Mapping[str, str]) -> dict[str, Any]:
    """{ours: value} of fields that every configuration has, given {ours: theirs}; ValueError where one is missing."""
    if missing := [field for field in names.values() if field not in config]:
        raise ValueError(f"{family}: {', '.join(missing)} missing; expected in every {family} configuration")
    return {ours: config[theirs] for ours, theirs in names.items()}


def check_supported(family: str, config: Mapping[str, Any], supported: Mapping[str, Sequence[Any]]) -> None:
    """Raise ValueError for a field with another value than these; the first is what its absence means."""
    for field, values in {**supported, "quantization_config": (None,)}.items():
        if config.get(field, values[0]) not in values:
            given = "present" if field == "quantization_config" else repr(config[field])
            only = " or ".join(map(str, values))
            raise ValueError(f"{family}: {field} is {given}; only {only} is supported: convert the checkpoint")
