"""Rotary positions (Su et al. 2021, arXiv 2104.09864): queries and keys are rotated by their positions.

A head of d numbers is d/2 planes, the numbers i and i + d/2 being one, as checkpoints of Hugging Face have them. Plane
i of a token at position p is rotated by the angle p theta^(-2i/d), so that the product of a query and a key depends
on the distance between them only. Models made for longer texts turn some planes more slowly (`Rotary.scaling`).
"""

import dataclasses
import math
import reprlib
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax import Array

from kvrecomp.plan import LayerShape
from kvrecomp.run.attention import Projections
from models.layers import Attention

Scaling = Literal["default", "linear", "llama3"]

NEEDED: dict[str, tuple[str, ...]] = {
    "default": (),
    "linear": ("factor",),
    "llama3": ("factor", "low_turns", "high_turns", "original_positions"),
}
"""The parameters that a scaling has."""

FIELDS = {
    "factor": "factor",
    "low_turns": "low_freq_factor",
    "high_turns": "high_freq_factor",
    "original_positions": "original_max_position_embeddings",
}
"""Hugging Face's names of those parameters."""


def _check_positive(what: str, value: Any) -> None:
    """Raise ValueError unless it is a positive number of float32, in which angles are computed."""
    smallest, largest = float(np.finfo(np.float32).tiny), float(np.finfo(np.float32).max)
    if not isinstance(value, int | float) or isinstance(value, bool) or not smallest <= value <= largest:
        raise ValueError(f"{what} is {reprlib.repr(value)}; expected a positive number")


@dataclass(frozen=True)
class Rotary:
    """The frequencies of the planes of a head.

        default    theta^(-2i/d)
        linear     all divided by `factor`
        llama3     divided by `factor` where a plane turns less than `low_turns` times in `original_positions`, left as
                   they are where it turns more than `high_turns` times, and in between linear in the turns

    Raises:
        ValueError: an unknown scaling, a number that is not positive, turns in the wrong order.
    """

    theta: float = 10_000.0
    scaling: Scaling = "default"
    factor: float = 1.0
    low_turns: float = 1.0
    high_turns: float = 4.0
    original_positions: int = 8192

    def __post_init__(self):
        if self.scaling not in tuple(NEEDED):  # which need not be hashable
            raise ValueError(f"rope scaling is {reprlib.repr(self.scaling)}; supported are {', '.join(NEEDED)}")
        for name in ("theta", "factor", "low_turns", "high_turns", "original_positions"):
            _check_positive(f"rope scaling: {name}", getattr(self, name))
        if self.low_turns >= self.high_turns:
            raise ValueError(
                f"rope scaling: low_turns is {self.low_turns} and high_turns {self.high_turns}; expected more turns"
            )

    @classmethod
    def of(cls, given: "Rotary | Mapping[str, Any]") -> "Rotary":
        """Itself, or from its fields as JSON has them. Raises ValueError or TypeError for what is neither."""
        if isinstance(given, cls):
            return given
        if not isinstance(given, Mapping):
            raise ValueError(f"rotary is {reprlib.repr(given)}; expected the fields of a Rotary")
        return cls(**given)

    def frequencies(self, head_dim: int) -> np.ndarray:
        """float32[head_dim / 2]: the angle from one position to the next, in radians."""
        # In float32 from the start, as models were trained: at position 100,000 a rounding is a hundredth of a radian.
        exponents = np.arange(0, head_dim, 2, dtype=np.float32) / np.float32(head_dim)
        plain = 1 / np.float32(self.theta) ** exponents
        if self.scaling == "default":
            return plain
        if self.scaling == "linear":
            return plain / np.float32(self.factor)
        turns = self.original_positions * plain / (2 * math.pi)
        kept = np.clip((turns - self.low_turns) / (self.high_turns - self.low_turns), 0, 1)
        return (kept * plain + (1 - kept) * plain / self.factor).astype(np.float32)

    def rotate(self, heads: Array, positions: Array) -> Array:
        """heads [..., n, d] at positions int32[...] -> [..., n, d], computed in float32, in the dtype of heads."""
        angles = positions[..., None, None].astype(jnp.float32) * self.frequencies(heads.shape[-1])
        cos, sin = jnp.cos(angles), jnp.sin(angles)
        first, second = jnp.split(heads.astype(jnp.float32), 2, axis=-1)
        rotated = jnp.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1)
        return rotated.astype(heads.dtype)

    @classmethod
    def from_huggingface(cls, family: str, config: Mapping[str, Any]) -> "Rotary":
        """From a config.json: `rope_theta` and `rope_scaling` or, since transformers 5, `rope_parameters` with both.

        Raises:
            ValueError: a scaling, or a parameter of one, that is not supported or missing; the message names it.
        """
        scaled = config.get("rope_scaling") or config.get("rope_parameters") or {}
        if not isinstance(scaled, Mapping):
            raise ValueError(f"{family}: rope scaling is {reprlib.repr(scaled)}; expected an object of its parameters")
        given = dict(scaled)
        theta = given.pop("rope_theta", config.get("rope_theta", cls.theta))
        rotated = given.pop("partial_rotary_factor", config.get("partial_rotary_factor"))
        scaling = given.pop("rope_type", given.get("type", "default"))
        given.pop("type", None)
        if scaling not in tuple(NEEDED):
            raise ValueError(f"{family}: rope scaling is {reprlib.repr(scaling)}; supported are {', '.join(NEEDED)}")
        if rotated not in (None, 1):
            raise ValueError(f"{family}: partial_rotary_factor is {rotated!r}; only 1 is supported")
        known = FIELDS.values()
        if unknown := sorted(given.keys() - known):
            raise ValueError(f"{family}: rope scaling has {', '.join(unknown)}; expected {', '.join(known)} only")
        if missing := [FIELDS[name] for name in NEEDED[scaling] if FIELDS[name] not in given]:
            raise ValueError(f"{family}: rope scaling {scaling!r} has no {', '.join(missing)}; expected in config.json")
        for name, value in {"rope_theta": theta, **given}.items():
            _check_positive(f"{family}: {name}", value)
        return cls(theta, scaling, **{name: given[FIELDS[name]] for name in NEEDED[scaling]})


class RotaryAttention(Attention):
    """Attention with queries and keys that are rotated by their positions."""

    def __init__(
        self,
        shape: LayerShape,
        rotary: Rotary,
        *,
        bias: bool = False,
        output_bias: bool = False,
        dtype: Any,
        rngs: nnx.Rngs | None,
    ):
        super().__init__(shape, bias=bias, output_bias=output_bias, dtype=dtype, rngs=rngs)
        self.rotary = rotary

    def projections(self) -> Projections:
        rotate = self.rotary.rotate
        return dataclasses.replace(super().projections(), encode_query=rotate, encode_key=rotate)
