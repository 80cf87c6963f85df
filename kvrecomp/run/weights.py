"""Weights of layers in host memory: where they are put, and the order in which a layer uses them.

Of a layer whose plan says `weights="host"`, the matrices are in pinned host memory and are copied inside each step like
blocks; biases and norms stay on the device. What the layer needs up to its attention, K's and V's projections first, is
copied before its blocks, the rest after them.
"""

import functools
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax import Array
from jax.sharding import Sharding

from kvrecomp.plan import LayerPlan, LayerShape, Memory, Plan, PlanError
from kvrecomp.plan.holds import Copy
from kvrecomp.run import memory
from kvrecomp.run.attention import Projections
from kvrecomp.run.cache import Block
from kvrecomp.run.window import Window

Path = tuple[Any, ...]  # of a parameter in its layer

_LAYER = re.compile(r"layers\.(\d+)\.")


class InHost(NamedTuple):
    """A layer's parameters in host memory, in the order of use: up to its attention, and after it."""

    early: tuple[Path, ...]
    late: tuple[Path, ...]


def placement(plan: Plan) -> Callable[[str, tuple[int, ...]], Sharding]:
    """Where the plan has each parameter, by name and shape: `models.load(path, sharding=placement(plan))`."""

    def where(name: str, shape: tuple[int, ...]) -> Sharding:
        match = _LAYER.match(name)
        if match is None:
            return memory.sharding("device")
        own, layer = plan.layers[int(match[1])], plan.shape.layers[int(match[1])]
        return memory.sharding("host" if own.weights == "host" and is_matrix(shape, layer) else "device")

    return where


def is_matrix(shape: Sequence[int], layer: LayerShape) -> bool:
    """Whether a parameter is one of the layer's matrices, at least the projection to one head, not a bias or norm."""
    biases = [(count, layer.head_dim) for count in (layer.heads, layer.kv_heads)]
    return len(shape) > 1 and tuple(shape) not in biases and int(np.prod(shape)) >= layer.hidden * layer.head_dim


def matrices_in_host(layer: nnx.Module, own: LayerShape, batch: int) -> InHost:
    """The layer's matrices in the order in which it uses them, read off its own code."""
    graph, state = nnx.split(layer)
    like = jax.tree.map(lambda array: jax.ShapeDtypeStruct(array.shape, array.dtype), state)
    leaves, structure = jax.tree.flatten(like)
    order = _order_of_use(graph, structure, tuple((leaf.shape, leaf.dtype) for leaf in leaves), own, batch)
    paths = [path for path, _ in nnx.to_flat_state(state)]
    early, late = ([paths[i] for i in part if is_matrix(leaves[i].shape, own)] for part in order)
    return InHost(tuple(early), tuple(late))


@functools.lru_cache(maxsize=256)
def _order_of_use(
    graph: Any, structure: Any, leaves: tuple[tuple[tuple[int, ...], Any], ...], own: LayerShape, batch: int
) -> tuple[list[int], list[int]]:
    """The numbers of the leaves that the layer uses up to its attention, and of those after, in the order of use."""

    @jax.jit
    def attention(key: Array, value: Array, query: Array, x: Array) -> Array:
        return jnp.zeros((x.shape[0], own.heads * own.head_dim), x.dtype)

    def attend(x: Array, projections: Projections) -> Array:
        return attention(projections.key.kernel, projections.value.kernel, projections.query.kernel, x)

    def run(weights, hidden):
        return nnx.merge(graph, jax.tree.unflatten(structure, weights))(hidden, attend)

    weights = [jax.ShapeDtypeStruct(*leaf) for leaf in leaves]
    jaxpr = jax.make_jaxpr(run)(weights, jax.ShapeDtypeStruct((batch, own.hidden), leaves[0][1])).jaxpr
    attended = next(i for i, eqn in enumerate(jaxpr.eqns) if eqn.params.get("name") == "attention")
    first: dict[int, tuple[int, int]] = {}
    for number, variable in enumerate(jaxpr.invars[:-1]):
        uses = [(i, eqn.invars.index(variable)) for i, eqn in enumerate(jaxpr.eqns) if variable in eqn.invars]
        if uses:
            first[number] = min(uses)
    numbers = sorted(first, key=lambda number: first[number])
    return [n for n in numbers if first[n][0] <= attended], [n for n in numbers if first[n][0] > attended]


def _matrices(layer: nnx.Module, shape: LayerShape) -> list[Array]:
    """The layer's matrices."""
    return [array for array in jax.tree.leaves(nnx.state(layer)) if is_matrix(array.shape, shape)]


def weight_memories(model: Any) -> tuple[Memory, ...]:
    """The memory that each layer of a model has its matrices in; `host` if any of them is there."""

    def hosted(layer: nnx.Module, own: LayerShape) -> bool:
        there = memory.sharding("host").memory_kind
        return any(array.sharding.memory_kind == there for array in _matrices(layer, own))

    layers = zip(model.layers, model.shape.layers, strict=True)
    return tuple("host" if hosted(layer, own) else "device" for layer, own in layers)


def check_placement(model: Any, plan: Plan) -> None:
    """Raises `PlanError` where a parameter of the model is on another device, or not in the memory that the plan has it
    in, and where a layer with weights in host memory has more of them than its shape says."""
    where = placement(plan)
    for path, variable in nnx.to_flat_state(nnx.state(model)):
        name, array = ".".join(map(str, path)), variable.get_value()
        if not isinstance(array, Array):
            continue
        expected = where(name, array.shape)
        if array.sharding.device_set != expected.device_set:
            there, here = (", ".join(map(str, own.device_set)) for own in (array.sharding, expected))
            raise PlanError(f"{name} is on {there}; what decodes is {here}, jax's first device: load the model there")
        if array.sharding.memory_kind != expected.memory_kind:
            raise PlanError(
                f"plan {plan.name} has {name} in memory {expected.memory_kind!r}, the model in "
                f"{array.sharding.memory_kind!r}: load it with sharding=kvrecomp.placement(plan)"
            )
    for number, (layer, own, shape) in enumerate(zip(model.layers, plan.layers, plan.shape.layers, strict=True)):
        if own.weights == "host" and (held := sum(array.size for array in _matrices(layer, shape))) > shape.parameters:
            raise PlanError(
                f"layer {number} has {held} weights, and its LayerShape says {shape.parameters}, by which copies are "
                "planned: keep them on the device, or give it a larger `intermediate`"
            )


def get(layer: nnx.Module, paths: Sequence[Path]) -> list[Array]:
    """The layer's parameters at these paths."""
    flat = dict(nnx.to_flat_state(nnx.state(layer))) if paths else {}
    return [flat[path][...] for path in paths]


def put(layer: nnx.Module, arrays: Mapping[Path, Array]) -> None:
    """Gives the layer these arrays as its parameters."""
    if arrays:
        flat = dict(nnx.to_flat_state(nnx.state(layer)))
        nnx.update(layer, nnx.from_flat_state([(path, flat[path].replace(array)) for path, array in arrays.items()]))


class HostWeights:
    """The weights of one layer that are in host memory, given to it in the order of their use."""

    def __init__(self, layer: Any, plan: LayerPlan, shape: LayerShape, batch: int):
        self._layer = layer
        in_host = matrices_in_host(layer, shape, batch) if plan.weights == "host" else InHost((), ())
        self._early, self._late = in_host
        self.arrays = get(layer, [*self._early, *self._late])

    def copies(self, groups: Sequence[Sequence[Block]]) -> list[tuple[Array, Copy]]:
        """What the layer needs from the host: weights up to its attention, the groups' blocks, the other weights."""
        kept = [(array, Copy(array.size * array.dtype.itemsize, kept=True)) for array in self.arrays]
        blocks = [block for own in groups for block in own if block.memory == "host"]
        sent = [(block.arrays[0], Copy(block.nbytes)) for block in blocks]
        return [*kept[: len(self._early)], *sent, *kept[len(self._early) :]]

    def bring_early(self, window: Window) -> None:
        """What the layer uses up to its attention."""
        put(self._layer, {path: window.fetch() for path in self._early})

    def bring_late(self, window: Window) -> None:
        """What it uses after that."""
        put(self._layer, {path: window.fetch() for path in self._late})

    def give(self, arrays: Sequence[Array]) -> None:
        """All of them at once, as a prefill does."""
        put(self._layer, dict(zip((*self._early, *self._late), arrays, strict=True)))


def host_weights(model: Any, plan: Plan) -> list[HostWeights]:
    """Those of every layer."""
    layers = zip(model.layers, plan.layers, plan.shape.layers, strict=True)
    return [HostWeights(*layer, plan.workload.batch) for layer in layers]
