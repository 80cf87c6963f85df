"""Hugging Face transformers as a peer: its `generate`, with the cache on the GPU, or offloaded to host memory.

What is timed is what a caller of `generate` waits for: from one call of a stopping criterion, which `generate` asks
once a token when the token is there, to the next, the GPU being synchronised in each. (It asks after each token whether
all rows have ended, so it never runs ahead.) Loading kernels is not in it, since a short run goes before. Greedy,
without padding, and with no token that ends a row.
"""

import importlib.util
import itertools
import math
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from experiments.support.peers.peer import Steps

import models
from kvrecomp.plan import Memory, ModelShape, Workload
from kvrecomp.plan.footprint import prefill_bytes
from models.config import Config
from models.rotary import FIELDS, NEEDED

PACKAGES = ("torch", "transformers")
# Times an offloaded cache's tensors: 96 GiB for the 40 of OPT-13B, 64 rows of 544 tokens (h100_suite.txt).
PINNED = 2.4


@dataclass(frozen=True)
class HuggingFace:
    """A `peer.Peer`: with its cache on the GPU, or `offloaded`."""

    offloaded: bool

    @property
    def link_bytes(self) -> int | None:
        """See `peer.Peer`, as all of it."""
        return None if self.offloaded else 0

    def unavailable(self, gpu: bool) -> str | None:
        for package in PACKAGES:
            if importlib.util.find_spec(package) is None:
                return f"{package} is not installed: pip install {' '.join(PACKAGES)}"
        if gpu or self.offloaded:
            import torch

            if not torch.cuda.is_available():
                wanted = "the cache is offloaded from one" if self.offloaded else "what it is compared with has one"
                return f"torch {torch.__version__} finds no GPU, and {wanted}: install torch with CUDA"
        return None

    def memory_needed(self, shape: ModelShape, workload: Workload) -> dict[Memory, float]:
        """Weights, cache, and a prompt's intermediate results. A layer's cache grows by being copied. Of an offloaded
        one, the next layer's is on the GPU as well, and in host memory a tensor takes a power of two, as PyTorch pins
        no other sizes, and what earlier ones had is kept."""
        token_bytes = workload.batch * (workload.prompt + workload.new) * shape.itemsize
        layers = [token_bytes * layer.width("keys_values") for layer in shape.layers]
        uncached = shape.parameters * shape.itemsize + prefill_bytes(shape, workload)
        if not self.offloaded:
            return {"device": uncached + sum(layers) + max(layers), "host": 0}
        pinned = sum(2 * 2 ** math.ceil(math.log2(layer / 2)) for layer in layers)  # keys, and values
        return {"device": uncached + 3 * max(layers), "host": PINNED * pinned}

    def run(self, config: Config, dtype: str, workloads: Sequence[Workload], seed: int) -> Iterator[Steps]:
        import torch

        model = make_model(config, dtype, seed)
        for workload in workloads:
            if torch.cuda.is_available():
                torch.cuda.reset_peak_memory_stats()
            yield _decode(model, workload, self.offloaded)


def _decode(model: Any, workload: Workload, offloaded: bool) -> Steps:
    """One workload."""
    import torch
    import transformers

    gpu = torch.cuda.is_available()
    ids = torch.randint(3, model.config.vocab_size, (workload.batch, workload.prompt), device=model.device)
    arrivals: list[float] = []

    class Clock(transformers.StoppingCriteria):
        """Stops no row, and notes when it was asked."""

        def __call__(self, input_ids: Any, scores: Any, **_: Any) -> Any:
            if gpu:
                torch.cuda.synchronize()
            arrivals.append(time.perf_counter())
            return torch.zeros(len(input_ids), dtype=torch.bool, device=input_ids.device)

    def decode(new: int) -> None:
        if gpu:
            torch.cuda.synchronize()
        arrivals[:] = [time.perf_counter()]
        model.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            max_new_tokens=new,
            do_sample=False,
            stopping_criteria=transformers.StoppingCriteriaList([Clock()]),
            cache_implementation="offloaded" if offloaded else None,
        )

    decode(2)
    decode(workload.new)
    if len(arrivals) != 1 + workload.new:
        raise RuntimeError(f"generate gave {len(arrivals) - 1} tokens where {workload.new} were asked for")
    prefill, *steps = [after - before for before, after in itertools.pairwise(arrivals)]
    return Steps(
        device=torch.cuda.get_device_name() if gpu else "cpu",
        prefill_seconds=prefill,
        seconds=steps,
        peak_device_bytes=torch.cuda.max_memory_allocated() if gpu else None,
    )


def make_model(config: Config, dtype: str, seed: int) -> Any:
    """A model with random weights, made where it is used; it continues texts for as long as it is told."""
    import torch
    import transformers

    torch.manual_seed(seed)
    with torch.device("cuda" if torch.cuda.is_available() else "cpu"):
        # Without the with, weights would be drawn by the CPU: minutes for billions.
        model = transformers.AutoModelForCausalLM.from_config(configuration(config), dtype=getattr(torch, dtype))
    model.generation_config.eos_token_id = None
    model.generation_config.pad_token_id = 0
    return model.eval()


def configuration(config: Config) -> Any:
    """The configuration of transformers for one of ours; `from_huggingface` is the way back.

    Raises ValueError for a family, or a variant of one, that is not written down here.
    """
    if isinstance(config, models.OPTConfig):
        return _opt(config)
    if isinstance(config, models.LlamaConfig) and not (config.qkv_bias or config.head_norms or config.sliding_window):
        return _llama(config)
    raise ValueError(
        f"{config.name}: there is no configuration of transformers for it in experiments/support/peers/huggingface.py; "
        "expected an OPT or a Llama"
    )


def _opt(config: models.OPTConfig) -> Any:
    import transformers

    return transformers.OPTConfig(
        vocab_size=config.vocab,
        hidden_size=config.hidden,
        num_hidden_layers=config.layers,
        ffn_dim=config.intermediate,
        num_attention_heads=config.heads,
        max_position_embeddings=config.positions,
        word_embed_proj_dim=config.embedding,
        activation_function=config.activation,
        do_layer_norm_before=config.pre_norm,
        _remove_final_layer_norm=config.pre_norm and not config.final_norm,
    )


def _llama(config: models.LlamaConfig) -> Any:
    import transformers

    rotary = config.rotary
    scaling = {"rope_type": rotary.scaling, **{FIELDS[name]: getattr(rotary, name) for name in NEEDED[rotary.scaling]}}
    rope: dict[str, Any] = {"rope_parameters": {"rope_theta": rotary.theta, **scaling}}
    if int(transformers.__version__.partition(".")[0]) < 5:  # two fields then
        rope = {"rope_theta": rotary.theta, "rope_scaling": scaling}
    return transformers.LlamaConfig(
        vocab_size=config.vocab,
        hidden_size=config.hidden,
        intermediate_size=config.intermediate,
        num_hidden_layers=config.layers,
        num_attention_heads=config.heads,
        num_key_value_heads=config.kv_heads,
        head_dim=config.head_dim,
        max_position_embeddings=config.positions,
        rms_norm_eps=config.epsilon,
        tie_word_embeddings=config.tied,
        **rope,
    )
