"""Where a script's model is from: a checkpoint, or a preset with random weights."""

import dataclasses
from dataclasses import dataclass
from pathlib import Path

import jax

import kvrecomp
import models

SHIPPED = Path(__file__).parent.parent / "checkpoints" / "pydoc"


@dataclass(frozen=True)
class Source:
    """A checkpoint, or a `preset` of random weights drawn from `seed`.

    `dtype` None is float32 on a CPU, which computes nothing else fast; elsewhere as stored and, of random weights,
    bfloat16.
    """

    checkpoint: str | Path = SHIPPED
    preset: str | None = None
    dtype: str | None = None
    seed: int = 0

    def describe(self) -> tuple[kvrecomp.ModelShape, models.TextProcessor]:
        """The model's sizes, and what its checkpoint says of text: no weights are read or made.

        Raises `CheckpointError` where there is no such model, or the tokenizer is another's.
        """
        if self.preset is not None:
            shape = dataclasses.replace(models.preset(self.preset).shape, dtype=self.read_dtype or "bfloat16")
            return shape, models.TextProcessor()
        shape, text = models.read_shape(self.checkpoint, dtype=self.read_dtype), models.load_text(self.checkpoint)
        if text.tokenizer is not None:
            models.check_tokenizer(text.tokenizer, shape)
        return shape, text

    def load(self, plan: kvrecomp.Plan | None = None) -> models.CausalLM:
        """The model, its weights in the memories that the plan has them in; without one, all on the device."""
        sharding = None if plan is None else kvrecomp.placement(plan)
        if self.preset is not None:
            dtype = self.read_dtype or "bfloat16"
            return models.create(self.preset, dtype=dtype, seed=self.seed, sharding=sharding)
        return models.load(self.checkpoint, dtype=self.read_dtype, sharding=sharding)

    @property
    def read_dtype(self) -> str | None:
        """What weights are cast to; None: they are read as stored."""
        return self.dtype or ("float32" if jax.default_backend() == "cpu" else None)
