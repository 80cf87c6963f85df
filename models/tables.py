"""Where the tensors of Hugging Face's files belong: for each of its model types, names and layouts.

A table gives, for the name of each tensor (`{}` stands for the layer), our parameter and how it is stored. A tensor of
several parameters holds them one after the other along its first axis.
"""

import math
from collections.abc import Callable, Iterator, Mapping
from typing import NamedTuple

import numpy as np

from models.config import Config
from models.gemma import GemmaConfig
from models.llama import LlamaConfig
from models.opt import OPTConfig


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

HEAD = "lm_head.weight"

Table = Mapping[str, tuple[str | tuple[str, ...], Stored]]

OPT_TABLE: Table = {
    "decoder.embed_tokens.weight": ("tokens.embedding", SAME),
    HEAD: ("head.embedding", SAME),
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

LLAMA_TABLE: Table = {
    "embed_tokens.weight": ("tokens.embedding", SAME),
    HEAD: ("head.embedding", SAME),
    "norm.weight": ("final_norm.scale", SAME),
    "layers.{}.input_layernorm.weight": ("layers.{}.attention_norm.scale", SAME),
    "layers.{}.self_attn.q_proj.weight": ("layers.{}.attention.query.kernel", OUT_IN),
    "layers.{}.self_attn.q_proj.bias": ("layers.{}.attention.query.bias", FLAT),
    "layers.{}.self_attn.k_proj.weight": ("layers.{}.attention.key.kernel", OUT_IN),
    "layers.{}.self_attn.k_proj.bias": ("layers.{}.attention.key.bias", FLAT),
    "layers.{}.self_attn.v_proj.weight": ("layers.{}.attention.value.kernel", OUT_IN),
    "layers.{}.self_attn.v_proj.bias": ("layers.{}.attention.value.bias", FLAT),
    "layers.{}.self_attn.q_norm.weight": ("layers.{}.attention.query_norm.scale", SAME),
    "layers.{}.self_attn.k_norm.weight": ("layers.{}.attention.key_norm.scale", SAME),
    "layers.{}.self_attn.o_proj.weight": ("layers.{}.attention.output.kernel", OUT_IN),
    "layers.{}.self_attn.o_proj.bias": ("layers.{}.attention.output.bias", SAME),
    "layers.{}.post_attention_layernorm.weight": ("layers.{}.feed_forward_norm.scale", SAME),
    "layers.{}.mlp.gate_proj.weight": ("layers.{}.feed_forward.gate.kernel", OUT_IN),
    "layers.{}.mlp.gate_proj.bias": ("layers.{}.feed_forward.gate.bias", SAME),
    "layers.{}.mlp.up_proj.weight": ("layers.{}.feed_forward.up.kernel", OUT_IN),
    "layers.{}.mlp.up_proj.bias": ("layers.{}.feed_forward.up.bias", SAME),
    "layers.{}.mlp.down_proj.weight": ("layers.{}.feed_forward.down.kernel", OUT_IN),
    "layers.{}.mlp.down_proj.bias": ("layers.{}.feed_forward.down.bias", SAME),
}

PHI3_TABLE: Table = {
    "embed_tokens.weight": ("tokens.embedding", SAME),
    HEAD: ("head.embedding", SAME),
    "norm.weight": ("final_norm.scale", SAME),
    "layers.{}.input_layernorm.weight": ("layers.{}.attention_norm.scale", SAME),
    "layers.{}.self_attn.qkv_proj.weight": (
        (
            "layers.{}.attention.query.kernel",
            "layers.{}.attention.key.kernel",
            "layers.{}.attention.value.kernel",
        ),
        OUT_IN,
    ),
    "layers.{}.self_attn.o_proj.weight": ("layers.{}.attention.output.kernel", OUT_IN),
    "layers.{}.post_attention_layernorm.weight": ("layers.{}.feed_forward_norm.scale", SAME),
    "layers.{}.mlp.gate_up_proj.weight": (
        ("layers.{}.feed_forward.gate.kernel", "layers.{}.feed_forward.up.kernel"),
        OUT_IN,
    ),
    "layers.{}.mlp.down_proj.weight": ("layers.{}.feed_forward.down.kernel", OUT_IN),
}

GEMMA_TABLE: Table = {  # Llama's, but that a norm's scale is stored less one
    name: (ours.replace("norm.scale", "norm.offset") if isinstance(ours, str) else ours, stored)
    for name, (ours, stored) in LLAMA_TABLE.items()
}

MODEL_TYPES: dict[str, tuple[type[Config], Table]] = {
    "opt": (OPTConfig, OPT_TABLE),
    "llama": (LlamaConfig, LLAMA_TABLE),
    "mistral": (LlamaConfig, LLAMA_TABLE),
    "qwen2": (LlamaConfig, LLAMA_TABLE),
    "qwen3": (LlamaConfig, LLAMA_TABLE),
    "phi3": (LlamaConfig, PHI3_TABLE),
    "gemma": (GemmaConfig, GEMMA_TABLE),
}
"""By Hugging Face's `model_type`: the configuration that reads its config.json, and the table of its tensors."""

BUFFERS = ("rotary_emb.inv_freq",)
"""How names end of what older files hold beside parameters, and what follows from the configuration."""


class Place(NamedTuple):
    """A tensor of a file: the parameters that it holds, in order along its first axis, and how each is stored."""

    parameters: tuple[str, ...]
    stored: Stored

    def shape(self, shapes: Mapping[str, tuple[int, ...]]) -> tuple[int, ...]:
        """The shape of the tensor, given those of our parameters."""
        each = [self.stored.shape(shapes[name]) for name in self.parameters]
        return (sum(shape[0] for shape in each), *each[0][1:])

    def read(self, tensor: np.ndarray, shapes: Mapping[str, tuple[int, ...]]) -> Iterator[tuple[str, np.ndarray]]:
        """(our parameter, its values) one after the other, without a copy."""
        start = 0
        for name in self.parameters:
            stop = start + self.stored.shape(shapes[name])[0]
            yield name, self.stored.read(tensor[start:stop], shapes[name])
            start = stop


def expand(table: Table, shapes: Mapping[str, tuple[int, ...]], layers: int) -> dict[str, Place]:
    """{tensor name: its place} for every parameter in `shapes`; a variant may lack some."""
    places = {}
    for pattern, (ours, stored) in table.items():
        for layer in range(layers if "{}" in pattern else 1):
            names = tuple(name.format(layer) for name in ([ours] if isinstance(ours, str) else ours))
            if names[0] in shapes:
                places[pattern.format(layer)] = Place(names, stored)
    return places
