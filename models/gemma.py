"""Gemma (2024, arXiv 2403.08295): rotary positions, a feed-forward gated with GELU, tied embeddings scaled on entry.

Its heads are wider than their share of the hidden size: K and V of the 7B are 2 x 16 x 256 numbers a token and layer,
the activations that they come from 3072.
"""

import dataclasses
import functools
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
from flax import nnx
from jax import Array

from kvrecomp.plan import LayerShape, ModelShape
from kvrecomp.run.attention import Attend
from models.config import check_fields, check_supported, read_fields, read_flag
from models.layers import CausalLM, Embedding, GatedFeedForward, divided_by_root_mean_square, parameter
from models.rotary import Rotary, RotaryAttention

GELU = functools.partial(jax.nn.gelu, approximate=True)


@dataclass(frozen=True)
class GemmaConfig:
    """The sizes of a Gemma.

    Raises:
        ValueError: heads that do not divide into kv_heads, an odd head_dim, which cannot be rotated.
    """

    family: ClassVar[str] = "gemma"

    name: str
    layers: int
    hidden: int
    heads: int
    kv_heads: int
    intermediate: int
    head_dim: int = 256
    vocab: int = 256_000
    positions: int = 8192
    epsilon: float = 1e-6
    rotary: Rotary = field(default_factory=Rotary)
    attention_bias: bool = False
    tied: bool = True

    def __post_init__(self):
        object.__setattr__(self, "rotary", Rotary.of(self.rotary))  # JSON has no dataclasses
        check_fields("Gemma", self)
        if self.heads % self.kv_heads:
            raise ValueError(f"Gemma: {self.heads} heads do not divide into {self.kv_heads} key-value heads")
        if self.head_dim % 2:
            raise ValueError(f"Gemma: head_dim is {self.head_dim}; expected an even number, to be rotated in pairs")

    @property
    def shape(self) -> ModelShape:
        """The sizes as the planner knows them, in bfloat16; `Gemma.shape` has the dtype of the parameters."""
        layer = LayerShape(
            hidden=self.hidden,
            heads=self.heads,
            kv_heads=self.kv_heads,
            head_dim=self.head_dim,
            intermediate=self.intermediate,
            gated=True,
            absorbs_keys=False,
        )
        return ModelShape(
            name=self.name,
            layers=(layer,) * self.layers,
            vocab=self.vocab,
            embedding=self.hidden,
            positions=self.positions,
            tied=self.tied,
        )

    def build(self, *, dtype: Any, rngs: nnx.Rngs | None) -> "Gemma":
        """A model with new random parameters or, without `rngs`, an abstract one."""
        return Gemma(self, dtype=dtype, rngs=rngs)

    @classmethod
    def from_huggingface(cls, config: Mapping[str, Any], name: str = "gemma") -> "GemmaConfig":
        """From the contents of a Hugging Face config.json.

        Raises:
            ValueError: a field that is missing, or whose value is not supported; the message names it.
        """
        sizes = {
            "layers": "num_hidden_layers",
            "hidden": "hidden_size",
            "heads": "num_attention_heads",
            "kv_heads": "num_key_value_heads",
            "intermediate": "intermediate_size",
            "head_dim": "head_dim",
            "vocab": "vocab_size",
            "positions": "max_position_embeddings",
            "epsilon": "rms_norm_eps",
        }
        supported = {
            # Older files say "gelu" and mean the approximation that the model was trained with.
            "hidden_act": ("gelu_pytorch_tanh", "gelu"),
            "hidden_activation": (None, "gelu_pytorch_tanh"),
            "use_bidirectional_attention": (None, False),
        }
        fields = read_fields("gemma", config, sizes)
        check_supported("gemma", config, supported)
        return cls(
            name=name,
            **fields,
            rotary=Rotary.from_huggingface("gemma", config),
            attention_bias=read_flag("gemma", config, "attention_bias"),
            tied=read_flag("gemma", config, "tie_word_embeddings", True),
        )


class GemmaNorm(nnx.Module):
    """RMSNorm with a scale of 1 + `offset`, which keeps more digits of a scale near one than its own bfloat16 would."""

    def __init__(self, width: int, *, epsilon: float, dtype: Any, rngs: nnx.Rngs | None):
        self.offset = parameter("offset", (width,), dtype, rngs)
        self.epsilon = epsilon

    def __call__(self, x: Array) -> Array:
        wide = divided_by_root_mean_square(x.astype(jnp.float32), self.epsilon)
        return (wide * (1 + self.offset[...].astype(jnp.float32))).astype(x.dtype)


class GemmaLayer(nnx.Module):
    """hidden [..., hidden] -> [..., hidden]; `attend` says what the tokens attend to."""

    def __init__(self, config: GemmaConfig, shape: LayerShape, *, dtype: Any, rngs: nnx.Rngs | None):
        self.attention_norm = GemmaNorm(shape.hidden, epsilon=config.epsilon, dtype=dtype, rngs=rngs)
        bias = config.attention_bias
        self.attention = RotaryAttention(shape, config.rotary, bias=bias, output_bias=bias, dtype=dtype, rngs=rngs)
        self.feed_forward_norm = GemmaNorm(shape.hidden, epsilon=config.epsilon, dtype=dtype, rngs=rngs)
        self.feed_forward = GatedFeedForward(shape.hidden, shape.intermediate, GELU, dtype=dtype, rngs=rngs)

    def __call__(self, hidden: Array, attend: Attend) -> Array:
        hidden = hidden + self.attention(self.attention_norm(hidden), attend)
        return hidden + self.feed_forward(self.feed_forward_norm(hidden))


class Gemma(CausalLM):
    """A Gemma with parameters of one dtype; see `CausalLM` for how it is called."""

    def __init__(self, config: GemmaConfig, *, dtype: Any, rngs: nnx.Rngs | None):
        self.config = config
        self.tokens = Embedding(config.vocab, config.hidden, dtype=dtype, rngs=rngs)
        self.layers = nnx.List(GemmaLayer(config, shape, dtype=dtype, rngs=rngs) for shape in config.shape.layers)
        self.final_norm = GemmaNorm(config.hidden, epsilon=config.epsilon, dtype=dtype, rngs=rngs)
        self.head = None if config.tied else Embedding(config.vocab, config.hidden, dtype=dtype, rngs=rngs)

    @property
    def shape(self) -> ModelShape:
        return dataclasses.replace(self.config.shape, dtype=self.tokens.embedding.dtype.name)

    def embed(self, token_ids: Array, positions: Array) -> Array:
        hidden = self.tokens(token_ids)
        # The factor is rounded first, as in training: sqrt(3072) is 55.5 in bfloat16.
        return hidden * jnp.asarray(self.config.hidden**0.5, hidden.dtype)

    def unembed(self, hidden: Array) -> Array:
        table = self.tokens if self.head is None else self.head
        return table.scores(self.final_norm(hidden))


PRESETS = {
    config.name: config
    for config in (
        GemmaConfig("gemma-2b", 18, 2048, 8, 1, 16384),
        GemmaConfig("gemma-7b", 28, 3072, 16, 16, 24576),
    )
}
"""The published sizes; table 1 of the paper counts the gate and the up matrix together."""
