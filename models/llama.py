"""Llama (Touvron et al. 2023, arXiv 2302.13971) and models built alike: Mistral, Qwen2, Qwen2.5, Qwen3, Phi-3.

All normalise before each sublayer by the root of the mean square, rotate queries and keys by position, and have a
gated feed-forward with SiLU. What they add to that is a field of `LlamaConfig`:

    Llama 2 70B, Llama 3    several heads share one of K and V (`kv_heads`); Llama 3.1 scales its rotation (`rotary`)
    models of others        biases of all projections (`qkv_bias` and `output_bias`, `mlp_bias`)
    Mistral                 a token sees the last `sliding_window` tokens only
    Qwen2, Qwen2.5          queries, keys and values have a bias (`qkv_bias`); the small ones a tied head (`tied`)
    Qwen3                   each head of queries and keys is normalised before it is rotated (`head_norms`)
    Phi-3                   a sliding window
"""

import dataclasses
import reprlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar

import jax
from flax import nnx
from jax import Array

from kvrecomp.plan import LayerShape, ModelShape
from kvrecomp.run.attention import Attend, Projections
from models.config import check_fields, check_size, check_supported, read_fields, read_flag, read_size
from models.layers import CausalLM, Embedding, GatedFeedForward, RMSNorm
from models.rotary import Rotary, RotaryAttention


@dataclass(frozen=True)
class LlamaConfig:
    """The sizes and variants of a Llama. `kv_heads` are `heads` and `head_dim` is `hidden / heads` unless given.

    `sliding_window` is how many tokens, itself included, a token sees in the layers numbered in `sliding_layers`, or in
    all if that is None.

    Raises:
        ValueError: sizes that do not divide, an odd head_dim, which cannot be rotated.
    """

    family: ClassVar[str] = "llama"

    name: str
    layers: int
    hidden: int
    heads: int
    intermediate: int
    vocab: int
    positions: int
    kv_heads: int = 0
    head_dim: int = 0
    epsilon: float = 1e-5
    rotary: Rotary = field(default_factory=Rotary)
    qkv_bias: bool = False
    output_bias: bool = False
    mlp_bias: bool = False
    head_norms: bool = False
    tied: bool = False
    sliding_window: int | None = None
    sliding_layers: tuple[int, ...] | None = None

    def __post_init__(self):
        check_size("Llama", "heads", self.heads)
        check_size("Llama", "hidden", self.hidden)
        if not self.head_dim and self.hidden % self.heads:
            raise ValueError(f"Llama: hidden size {self.hidden} does not divide into {self.heads} heads")
        given = {
            "kv_heads": self.kv_heads or self.heads,
            "head_dim": self.head_dim or self.hidden // self.heads,
            # JSON has neither dataclasses nor tuples.
            "rotary": Rotary.of(self.rotary),
            "sliding_layers": None if self.sliding_layers is None else tuple(self.sliding_layers),
        }
        for name, value in given.items():
            object.__setattr__(self, name, value)
        check_fields("Llama", self)
        if self.heads % self.kv_heads:
            raise ValueError(f"Llama: {self.heads} heads do not divide into {self.kv_heads} key-value heads")
        if self.head_dim % 2:
            raise ValueError(f"Llama: head_dim is {self.head_dim}; expected an even number, to be rotated in pairs")
        if self.sliding_window is not None:
            check_size("Llama", "sliding_window", self.sliding_window)
        if not all(isinstance(layer, int) and layer >= 0 for layer in self.sliding_layers or ()):
            raise ValueError(
                f"Llama: sliding_layers is {reprlib.repr(self.sliding_layers)}; expected numbers of layers"
            )

    def window(self, layer: int) -> int | None:
        """How many tokens a token sees in that layer; None for all."""
        return self.sliding_window if self.sliding_layers is None or layer in self.sliding_layers else None

    @property
    def shape(self) -> ModelShape:
        """The sizes as the planner knows them, in bfloat16; `Llama.shape` has the dtype of the parameters."""
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
            layers=tuple(
                dataclasses.replace(layer, sliding_window=self.window(number)) for number in range(self.layers)
            ),
            vocab=self.vocab,
            embedding=self.hidden,
            positions=self.positions,
            tied=self.tied,
        )

    def build(self, *, dtype: Any, rngs: nnx.Rngs | None) -> "Llama":
        """A model with new random parameters or, without `rngs`, an abstract one."""
        return Llama(self, dtype=dtype, rngs=rngs)

    @classmethod
    def from_huggingface(cls, config: Mapping[str, Any], name: str = "llama") -> "LlamaConfig":
        """From the contents of a Hugging Face config.json whose `model_type` is in `VARIANTS`.

        Raises:
            ValueError: a field that is missing, or whose value is not supported; the message names it.
        """
        family = config.get("model_type", "llama")
        sizes = {
            "layers": "num_hidden_layers",
            "hidden": "hidden_size",
            "heads": "num_attention_heads",
            "intermediate": "intermediate_size",
            "vocab": "vocab_size",
            "positions": "max_position_embeddings",
            "epsilon": "rms_norm_eps",
        }
        fields = read_fields(family, config, sizes)
        check_supported(family, config, {"hidden_act": ("silu",)})
        return cls(
            name=name,
            **fields,
            kv_heads=read_size(family, config, "num_key_value_heads"),
            head_dim=read_size(family, config, "head_dim"),
            rotary=Rotary.from_huggingface(family, config),
            tied=read_flag(family, config, "tie_word_embeddings"),
            **VARIANTS[family](config),
        )


def _llama(config: Mapping[str, Any]) -> dict[str, Any]:
    return {**_attention_bias("llama", config), "mlp_bias": read_flag("llama", config, "mlp_bias")}


def _attention_bias(family: str, config: Mapping[str, Any]) -> dict[str, Any]:
    return dict.fromkeys(("qkv_bias", "output_bias"), read_flag(family, config, "attention_bias"))


def _mistral(config: Mapping[str, Any]) -> dict[str, Any]:
    return {"sliding_window": config.get("sliding_window", 4096)}


def _qwen2(config: Mapping[str, Any]) -> dict[str, Any]:
    return {"qkv_bias": True, **_qwen_windows(config)}


def _qwen3(config: Mapping[str, Any]) -> dict[str, Any]:
    return {"head_norms": True, **_attention_bias("qwen3", config), **_qwen_windows(config)}


def _qwen_windows(config: Mapping[str, Any]) -> dict[str, Any]:
    """The layers that slide are listed in `layer_types` or, in older files, begin with `max_window_layers`."""
    family, layers, kinds = config["model_type"], config["num_hidden_layers"], config.get("layer_types")
    if kinds is not None and (
        not isinstance(kinds, list) or len(kinds) != layers or any(kind not in LAYER_TYPES for kind in kinds)
    ):
        raise ValueError(
            f"{family}: layer_types is {reprlib.repr(kinds)}; expected {' or '.join(LAYER_TYPES)} for each of the "
            f"{layers} layers"
        )
    window = config.get("sliding_window", 4096)
    if not read_flag(family, config, "use_sliding_window") or window is None:
        return {}
    if kinds is None:
        first = config.get("max_window_layers", 28)
        if first != 0:  # all of them
            check_size(family, "max_window_layers", first)
        kinds = [LAYER_TYPES[layer >= first] for layer in range(layers)]
    return {
        "sliding_window": window,
        "sliding_layers": tuple(layer for layer, kind in enumerate(kinds) if kind == "sliding_attention"),
    }


def _phi3(config: Mapping[str, Any]) -> dict[str, Any]:
    return {"sliding_window": config.get("sliding_window")}


LAYER_TYPES = ("full_attention", "sliding_attention")

VARIANTS: dict[str, Callable[[Mapping[str, Any]], dict[str, Any]]] = {
    "llama": _llama,
    "mistral": _mistral,
    "qwen2": _qwen2,
    "qwen3": _qwen3,
    "phi3": _phi3,
}
"""By Hugging Face's `model_type`: config.json -> the fields in which that family differs from Llama."""


class LlamaAttention(RotaryAttention):
    """Rotary attention that may normalise the heads of queries and keys, and see the last tokens only."""

    def __init__(
        self, config: LlamaConfig, shape: LayerShape, window: int | None, *, dtype: Any, rngs: nnx.Rngs | None
    ):
        bias = {"bias": config.qkv_bias, "output_bias": config.output_bias}
        super().__init__(shape, config.rotary, **bias, dtype=dtype, rngs=rngs)

        def head_norm() -> RMSNorm | None:
            if not config.head_norms:
                return None
            return RMSNorm(shape.head_dim, epsilon=config.epsilon, dtype=dtype, rngs=rngs)

        self.query_norm, self.key_norm = head_norm(), head_norm()
        self.sliding_window = window

    def projections(self) -> Projections:
        projections = dataclasses.replace(super().projections(), sliding_window=self.sliding_window)
        query_norm, key_norm = self.query_norm, self.key_norm
        if query_norm is None or key_norm is None:
            return projections
        return dataclasses.replace(
            projections,
            encode_query=lambda heads, positions: self.rotary.rotate(query_norm(heads), positions),
            encode_key=lambda heads, positions: self.rotary.rotate(key_norm(heads), positions),
        )


class LlamaLayer(nnx.Module):
    """hidden [..., hidden] -> [..., hidden]; `attend` says what the tokens attend to."""

    def __init__(
        self, config: LlamaConfig, shape: LayerShape, window: int | None, *, dtype: Any, rngs: nnx.Rngs | None
    ):
        self.attention_norm = RMSNorm(shape.hidden, epsilon=config.epsilon, dtype=dtype, rngs=rngs)
        self.attention = LlamaAttention(config, shape, window, dtype=dtype, rngs=rngs)
        self.feed_forward_norm = RMSNorm(shape.hidden, epsilon=config.epsilon, dtype=dtype, rngs=rngs)
        self.feed_forward = GatedFeedForward(
            shape.hidden, shape.intermediate, jax.nn.silu, bias=config.mlp_bias, dtype=dtype, rngs=rngs
        )

    def __call__(self, hidden: Array, attend: Attend) -> Array:
        hidden = hidden + self.attention(self.attention_norm(hidden), attend)
        return hidden + self.feed_forward(self.feed_forward_norm(hidden))


class Llama(CausalLM):
    """A Llama with parameters of one dtype; see `CausalLM` for how it is called."""

    def __init__(self, config: LlamaConfig, *, dtype: Any, rngs: nnx.Rngs | None):
        self.config = config
        self.tokens = Embedding(config.vocab, config.hidden, dtype=dtype, rngs=rngs)
        self.layers = nnx.List(
            LlamaLayer(config, shape, config.window(number), dtype=dtype, rngs=rngs)
            for number, shape in enumerate(config.shape.layers)
        )
        self.final_norm = RMSNorm(config.hidden, epsilon=config.epsilon, dtype=dtype, rngs=rngs)
        self.head = None if config.tied else Embedding(config.vocab, config.hidden, dtype=dtype, rngs=rngs)

    @property
    def shape(self) -> ModelShape:
        return dataclasses.replace(self.config.shape, dtype=self.tokens.embedding.dtype.name)

    def embed(self, token_ids: Array, positions: Array) -> Array:
        return self.tokens(token_ids)

    def unembed(self, hidden: Array) -> Array:
        table = self.tokens if self.head is None else self.head
        return table.scores(self.final_norm(hidden))


LLAMA_3: dict[str, Any] = {"kv_heads": 8, "rotary": Rotary(500_000.0)}
LLAMA_3_1: dict[str, Any] = {
    "kv_heads": 8,
    "rotary": Rotary(500_000.0, "llama3", factor=8.0, low_turns=1.0, high_turns=4.0, original_positions=8192),
}
QWEN: dict[str, Any] = {"epsilon": 1e-6, "rotary": Rotary(1_000_000.0)}
QWEN_2: dict[str, Any] = {**QWEN, "qkv_bias": True}
QWEN_3: dict[str, Any] = {**QWEN, "kv_heads": 8, "head_dim": 128, "head_norms": True}

PRESETS = {
    config.name: config
    for config in (
        LlamaConfig("llama-2-7b", 32, 4096, 32, 11008, 32_000, 4096),
        LlamaConfig("llama-2-13b", 40, 5120, 40, 13824, 32_000, 4096),
        LlamaConfig("llama-2-70b", 80, 8192, 64, 28672, 32_000, 4096, kv_heads=8),
        LlamaConfig("llama-3-8b", 32, 4096, 32, 14336, 128_256, 8192, **LLAMA_3),
        LlamaConfig("llama-3-70b", 80, 8192, 64, 28672, 128_256, 8192, **LLAMA_3),
        LlamaConfig("llama-3.1-8b", 32, 4096, 32, 14336, 128_256, 131_072, **LLAMA_3_1),
        LlamaConfig("llama-3.1-70b", 80, 8192, 64, 28672, 128_256, 131_072, **LLAMA_3_1),
        LlamaConfig("mistral-7b", 32, 4096, 32, 14336, 32_000, 32_768, kv_heads=8, sliding_window=4096),
        LlamaConfig("qwen2-7b", 28, 3584, 28, 18944, 152_064, 131_072, kv_heads=4, **QWEN_2),
        LlamaConfig("qwen2.5-0.5b", 24, 896, 14, 4864, 151_936, 32_768, kv_heads=2, tied=True, **QWEN_2),
        LlamaConfig("qwen2.5-1.5b", 28, 1536, 12, 8960, 151_936, 131_072, kv_heads=2, tied=True, **QWEN_2),
        LlamaConfig("qwen2.5-7b", 28, 3584, 28, 18944, 152_064, 131_072, kv_heads=4, **QWEN_2),
        LlamaConfig("qwen3-0.6b", 28, 1024, 16, 3072, 151_936, 40_960, tied=True, **QWEN_3),
        LlamaConfig("qwen3-4b", 36, 2560, 32, 9728, 151_936, 40_960, tied=True, **QWEN_3),
        LlamaConfig("qwen3-8b", 36, 4096, 32, 12288, 151_936, 40_960, **QWEN_3),
        LlamaConfig("phi-3-mini", 32, 3072, 32, 8192, 32_064, 4096, sliding_window=2047),
    )
}
"""Sizes of the published base models; mistral-7b is version 0.1, phi-3-mini the one for 4096 positions."""
