"""OPT (Zhang et al. 2022, arXiv 2205.01068): learned positions, biases everywhere, ReLU, tied embeddings.

All published sizes normalise before each sublayer, except 350M, which normalises after each residual sum, has no final
norm, and whose token table is narrower than its hidden size (`embedding`, with a projection in and one out).
"""

import dataclasses
import functools
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import jax
from flax import nnx
from jax import Array

from kvrecomp.plan import LayerShape, ModelShape
from kvrecomp.run.attention import Attend
from models.config import check_fields, check_supported, read_fields, read_flag, read_size
from models.layers import Attention, CausalLM, Embedding, FeedForward, LayerNorm, Linear

POSITION_OFFSET = 2  # the first two rows of OPT's position table are never used (a legacy of fairseq's padding index)

ACTIVATIONS = {"relu": jax.nn.relu, "gelu": functools.partial(jax.nn.gelu, approximate=False)}


@dataclass(frozen=True)
class OPTConfig:
    """The sizes and variants of an OPT. `embedding` is the width of the token table; `hidden` unless given.

    Raises:
        ValueError: hidden not divisible into heads, an unknown activation.
    """

    family: ClassVar[str] = "opt"

    name: str
    layers: int
    hidden: int
    heads: int
    intermediate: int
    vocab: int = 50272
    positions: int = 2048
    embedding: int = 0
    activation: str = "relu"
    pre_norm: bool = True
    final_norm: bool = True
    tied: bool = True

    def __post_init__(self):
        if not self.embedding:
            object.__setattr__(self, "embedding", self.hidden)
        check_fields("OPT", self)
        if self.hidden % self.heads:
            raise ValueError(f"OPT: hidden size {self.hidden} does not divide into {self.heads} heads")
        if self.activation not in ACTIVATIONS:
            raise ValueError(f"OPT: activation is {self.activation!r}; expected {' or '.join(ACTIVATIONS)}")

    @property
    def shape(self) -> ModelShape:
        """The sizes as the planner knows them, in bfloat16; `OPT.shape` has the dtype of the parameters."""
        layer = LayerShape(
            hidden=self.hidden,
            heads=self.heads,
            kv_heads=self.heads,
            head_dim=self.hidden // self.heads,
            intermediate=self.intermediate,
        )
        return ModelShape(
            name=self.name,
            layers=(layer,) * self.layers,
            vocab=self.vocab,
            embedding=self.embedding,
            positions=self.positions,
            tied=self.tied,
        )

    def build(self, *, dtype: Any, rngs: nnx.Rngs | None) -> "OPT":
        """A model with new random parameters or, without `rngs`, an abstract one."""
        return OPT(self, dtype=dtype, rngs=rngs)

    @classmethod
    def from_huggingface(cls, config: Mapping[str, Any], name: str = "opt") -> "OPTConfig":
        """From the contents of a Hugging Face config.json.

        Raises:
            ValueError: a field that is missing, or whose value is not supported; the message names it.
        """
        sizes = {
            "layers": "num_hidden_layers",
            "hidden": "hidden_size",
            "heads": "num_attention_heads",
            "intermediate": "ffn_dim",
            "vocab": "vocab_size",
            "positions": "max_position_embeddings",
        }
        fields = read_fields("OPT", config, sizes)
        check_supported("OPT", config, {"enable_bias": (True,), "layer_norm_elementwise_affine": (True,)})
        pre_norm = read_flag("OPT", config, "do_layer_norm_before", True)
        return cls(
            name=name,
            **fields,
            embedding=read_size("OPT", config, "word_embed_proj_dim"),
            activation=config.get("activation_function", "relu"),
            pre_norm=pre_norm,
            final_norm=pre_norm and not read_flag("OPT", config, "_remove_final_layer_norm"),
            tied=read_flag("OPT", config, "tie_word_embeddings", True),
        )


class OPTLayer(nnx.Module):
    """hidden [..., hidden] -> [..., hidden]; `attend` says what the tokens attend to."""

    def __init__(self, config: OPTConfig, shape: LayerShape, *, dtype: Any, rngs: nnx.Rngs | None):
        self.attention = Attention(shape, bias=True, dtype=dtype, rngs=rngs)
        self.attention_norm = LayerNorm(shape.hidden, dtype=dtype, rngs=rngs)
        self.feed_forward = FeedForward(
            shape.hidden, shape.intermediate, ACTIVATIONS[config.activation], bias=True, dtype=dtype, rngs=rngs
        )
        self.feed_forward_norm = LayerNorm(shape.hidden, dtype=dtype, rngs=rngs)
        self.pre_norm = config.pre_norm

    def __call__(self, hidden: Array, attend: Attend) -> Array:
        if self.pre_norm:
            hidden = hidden + self.attention(self.attention_norm(hidden), attend)
            return hidden + self.feed_forward(self.feed_forward_norm(hidden))
        hidden = self.attention_norm(hidden + self.attention(hidden, attend))
        return self.feed_forward_norm(hidden + self.feed_forward(hidden))


class OPT(CausalLM):
    """An OPT with parameters of one dtype; see `CausalLM` for how it is called."""

    def __init__(self, config: OPTConfig, *, dtype: Any, rngs: nnx.Rngs | None):
        self.config = config
        self.tokens = Embedding(config.vocab, config.embedding, dtype=dtype, rngs=rngs)
        self.positions = Embedding(config.positions + POSITION_OFFSET, config.hidden, dtype=dtype, rngs=rngs)
        self.layers = nnx.List(OPTLayer(config, shape, dtype=dtype, rngs=rngs) for shape in config.shape.layers)
        self.final_norm = LayerNorm(config.hidden, dtype=dtype, rngs=rngs) if config.final_norm else None
        narrow = config.embedding != config.hidden
        project = functools.partial(Linear, bias=False, dtype=dtype, rngs=rngs)
        self.project_in = project(config.embedding, config.hidden) if narrow else None
        self.project_out = project(config.hidden, config.embedding) if narrow else None
        self.head = None if config.tied else Embedding(config.vocab, config.embedding, dtype=dtype, rngs=rngs)

    @property
    def shape(self) -> ModelShape:
        return dataclasses.replace(self.config.shape, dtype=self.tokens.embedding.dtype.name)

    def embed(self, token_ids: Array, positions: Array) -> Array:
        hidden = self.tokens(token_ids)
        if self.project_in is not None:
            hidden = self.project_in(hidden)
        return hidden + self.positions(positions + POSITION_OFFSET)

    def unembed(self, hidden: Array) -> Array:
        if self.final_norm is not None:
            hidden = self.final_norm(hidden)
        if self.project_out is not None:
            hidden = self.project_out(hidden)
        table = self.tokens if self.head is None else self.head
        return table.scores(hidden)


def _published(size: str, layers: int, hidden: int, heads: int, **variants: Any) -> OPTConfig:
    return OPTConfig(f"opt-{size}", layers, hidden, heads, intermediate=4 * hidden, **variants)


PRESETS = {
    config.name: config
    for config in (
        _published("125m", 12, 768, 12),
        _published("350m", 24, 1024, 16, embedding=512, pre_norm=False, final_norm=False),
        _published("1.3b", 24, 2048, 32),
        _published("2.7b", 32, 2560, 32),
        _published("6.7b", 32, 4096, 32),
        _published("13b", 40, 5120, 40),
        _published("30b", 48, 7168, 56),
        _published("66b", 64, 9216, 72),
        _published("175b", 96, 12288, 96),
    )
}
"""The published sizes, table 1 of the paper; 350M's variants as in its published configuration."""
