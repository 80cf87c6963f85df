"""What the library asks of a model, so that anyone's can join."""

from typing import Any, Protocol

from jax import Array

from kvrecomp.plan import ModelShape


class Model(Protocol):
    """A `flax.nnx` module with these names."""

    @property
    def shape(self) -> ModelShape: ...

    layers: Any  # a sequence of callables: layer(hidden [..., h], attend: Attend) -> [..., h]

    def embed(self, token_ids: Array, positions: Array) -> Array:
        """int32[...], int32[...] -> [..., h]."""
        ...

    def unembed(self, hidden: Array) -> Array:
        """[..., h] -> float32 logits [..., vocab]."""
        ...
