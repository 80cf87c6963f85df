"""Weights of layers in host memory: where they are put, and the order in which a layer uses them.

Of a layer whose plan says `weights="host"`, the matrices are in pinned host memory and are copied inside each step like
blocks; biases and norms stay on the device. What the layer needs up to its attention, K's and V's projections first, is
copied before its blocks, the rest after them.
"""

import functools
import re
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax import Array
from jax.sharding import Sharding

from kvrecomp.plan import LayerShape, Memory, Plan, PlanError
from kvrecomp.plan.step_order import Matrices
from kvrecomp.run import memory
from kvrecomp.run.attention import Projections
from kvrecomp.run.layer import Layer, Layers
from kvrecomp.run.model import check_parts

_LAYER = re.compile(r"layers\.(\d+)\.")


def placement(plan: Plan) -> Callable[[str, tuple[int, ...]], Sharding]:
    """Where the plan has each parameter, by name and shape: `models.load(path, sharding=placement(plan))`."""

    def where(name: str, shape: tuple[int, ...]) -> Sharding:
        match = _LAYER.match(name)
        if match is None:
            return memory.sharding("device")
        layer, layer_shape = plan.layers[int(match[1])], plan.shape.layers[int(match[1])]
        return memory.sharding("host" if layer.weights == "host" and is_matrix(shape, layer_shape) else "device")

    return where


def is_matrix(shape: Sequence[int], layer: LayerShape) -> bool:
    """Whether a parameter is one of the layer's matrices, at least the projection to one head, not a bias or norm."""
    biases = [(count, layer.head_dim) for count in (layer.heads, layer.kv_heads)]
    return len(shape) > 1 and tuple(shape) not in biases and int(np.prod(shape)) >= layer.hidden * layer.head_dim


def _matrices(layer: nnx.Module, shape: LayerShape) -> list[Array]:
    """The layer's matrices, but for arrays of NumPy's."""
    arrays = [array for array in jax.tree.leaves(nnx.state(layer)) if isinstance(array, Array)]
    return [array for array in arrays if is_matrix(array.shape, shape)]


def on_device(array: Any) -> Array:
    """An array of a model's: one of NumPy's on the device that computes, any other as it is."""
    return jax.device_put(array, memory.sharding("device")) if isinstance(array, np.ndarray) else array


def weight_memories(model: Any) -> tuple[Memory, ...]:
    """The memory that each layer of a model has its matrices in; `host` if any of them is there."""
    check_parts(model)
    host = memory.sharding("host").memory_kind

    def hosted(layer: nnx.Module, shape: LayerShape) -> bool:
        return any(array.sharding.memory_kind == host for array in _matrices(layer, shape))

    layers = zip(model.layers, model.shape.layers, strict=True)
    return tuple("host" if hosted(layer, shape) else "device" for layer, shape in layers)


def check_placement(model: Any, plan: Plan) -> None:
    """Raises `PlanError` where a parameter of the model is on another device, or not in the memory that the plan has it
    in, and where a layer with weights in host memory has more of them than its shape says."""
    where = placement(plan)
    for path, variable in nnx.to_flat_state(nnx.state(model)):
        name, array = ".".join(map(str, path)), variable.get_value() if isinstance(variable, nnx.Variable) else variable
        if not isinstance(array, Array):
            continue
        expected = where(name, array.shape)
        if array.sharding.device_set != expected.device_set:
            there, here = (", ".join(map(str, sharding.device_set)) for sharding in (array.sharding, expected))
            raise PlanError(f"{name} is on {there}; what decodes is {here}, jax's first device: load the model there")
        if array.sharding.memory_kind != expected.memory_kind:
            raise PlanError(
                f"plan {plan.name} has {name} in memory {expected.memory_kind!r}, the model in "
                f"{array.sharding.memory_kind!r}: load it with sharding=kvrecomp.placement(plan)"
            )
    layers = zip(model.layers, plan.layers, plan.shape.layers, strict=True)
    for number, (layer, layer_plan, shape) in enumerate(layers):
        held = sum(array.size for array in _matrices(layer, shape)) if layer_plan.weights == "host" else 0
        if held > shape.parameters:
            raise PlanError(
                f"layer {number} has {held} weights, and its LayerShape says {shape.parameters}, by which copies are "
                "planned: keep them on the device, or give it a larger `intermediate`"
            )


# --- the order in which a layer uses them -----------------------------------------------------------------------------


class LayerWeights(NamedTuple):
    """A layer and its parameters; `in_host` are the numbers of those in host memory in the order of use, the first
    `before` of them up to its attention."""

    layer: Layer
    parameters: list[Array]
    in_host: tuple[int, ...] = ()
    before: int = 0

    @property
    def host_arrays(self) -> list[Array]:
        return [self.parameters[number] for number in self.in_host]

    @property
    def matrices(self) -> Matrices:
        """Bytes of those in host memory."""
        sizes = tuple(array.size * array.dtype.itemsize for array in self.host_arrays)
        return sizes[: self.before], sizes[self.before :]


def layer_weights(model: Any, plan: Plan) -> list[LayerWeights]:
    """Those of every layer."""
    found = []
    for module, layer_plan, shape in zip(model.layers, plan.layers, plan.shape.layers, strict=True):
        layer, parameters = Layer.split(module)
        in_host: tuple[int, ...] = ()
        before = 0
        if layer_plan.weights == "host":
            like = tuple((array.shape, array.dtype) for array in parameters)
            used = _order_of_use(layer, like, shape, plan.workload.batch)
            first, then = ([number for number in part if is_matrix(like[number][0], shape)] for part in used)
            in_host, before = (*first, *then), len(first)
        found.append(LayerWeights(layer, parameters, in_host, before))
    return found


@functools.lru_cache(maxsize=256)
def _order_of_use(
    layer: Layer, like: tuple[tuple[tuple[int, ...], Any], ...], shape: LayerShape, batch: int
) -> tuple[list[int], list[int]]:
    """The numbers of the parameters that the layer uses up to its attention and of those after, in the order of use."""
    used: dict[int, None] = {}
    used_before = 0

    def attention(_: None, x: Array, projections: Projections) -> tuple[Array, list[Array]]:
        positions = jnp.zeros(batch, jnp.int32)
        heads = [projections.keys(x, positions), projections.values(x), projections.queries(x, positions)]
        return jnp.zeros((batch, shape.heads * shape.head_dim), x.dtype), heads

    def attended(heads: list[Array]) -> list[Array]:
        nonlocal used_before
        used_before = len(used)
        return heads

    def run(hidden: Array, *parameters: Array) -> Array:
        def needed(number: int) -> Callable[[], Array]:
            return lambda: used.setdefault(number) or parameters[number]

        given = {number: needed(number) for number in range(len(parameters))}
        return Layers().call(layer, attention, hidden, parameters, None, given, attended)[0]

    parameters = [jax.ShapeDtypeStruct(*array) for array in like]
    jax.eval_shape(run, jax.ShapeDtypeStruct((batch, shape.hidden), like[0][1]), *parameters)
    numbers = list(used)
    return numbers[:used_before], numbers[used_before:]
