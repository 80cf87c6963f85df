"""What the library asks of a model, so that anyone's can join, and whether one has it."""

from dataclasses import dataclass
from typing import Any, Protocol

import jax
import jax.numpy as jnp
from flax import nnx
from jax import Array

from kvrecomp.plan import LayerShape, ModelShape, PlanError
from kvrecomp.run.attention import Projections
from kvrecomp.run.layer import Layer, Layers, check_draws_nothing
from kvrecomp.run.programs import as_by_default

ROWS = 3  # of the tokens that a model is checked with


class Model(Protocol):
    """A `flax.nnx` module with these names."""

    @property
    def shape(self) -> ModelShape: ...

    layers: Any  # a sequence of nnx modules: layer(hidden [..., h], attend: Attend) -> [..., h]

    def embed(self, token_ids: Array, positions: Array) -> Array:
        """int32[...], int32[...] -> [..., h]."""
        ...

    def unembed(self, hidden: Array) -> Array:
        """[..., h] -> float32 logits [..., vocab]."""
        ...


def check_parts(model: Any) -> None:
    """Raises `PlanError` unless this is a module with the names of `Model`, and as many layers as its shape says."""
    missing = [name for name in ("shape", "layers", "embed", "unembed") if not hasattr(model, name)]
    if missing or not issubclass(type(model), nnx.Module):
        lacks = f" without {', '.join(missing)}" if missing else ", no module"
        raise PlanError(
            f"the model is a {type(model).__name__}{lacks}; expected a flax.nnx module with shape, layers, embed and "
            "unembed, as models.load gives"
        )
    if not isinstance(model.shape, ModelShape):
        raise PlanError(f"the model's shape is {model.shape!r}; expected a kvrecomp.ModelShape")
    if len(model.layers) != len(model.shape.layers):
        raise PlanError(
            f"the model has {len(model.layers)} layers, its shape says {len(model.shape.layers)}: make them the same"
        )


def check_model(model: Any) -> None:
    """Calls the parts of a model abstractly, as a step does. Raises `PlanError` where what they take or give is not
    what the model's shape says, a layer does not attend exactly once, or random numbers are drawn."""
    check_parts(model)
    shape: ModelShape = model.shape
    whole, parameters = _abstract(model)
    tokens = jax.ShapeDtypeStruct((ROWS,), jnp.int32)
    with as_by_default():
        hidden = _check_outside("embed", whole, parameters, tokens, tokens)
        _check_array("embed", hidden, (ROWS, shape.layers[0].hidden), "rows, hidden")
        seen: set[tuple[Layer, LayerShape, Any]] = set()
        for number, (module, layer_shape) in enumerate(zip(model.layers, shape.layers, strict=True)):
            layer, parameters_of_layer = _abstract(module)
            key = layer, layer_shape, hidden.dtype
            if key in seen:
                continue  # it computes what the other does
            seen.add(key)
            try:
                hidden = _check_layer(layer, layer_shape, hidden, parameters_of_layer)
            except PlanError as error:
                raise PlanError(f"layer {number}: {error}") from None
        logits = _check_outside("unembed", whole, parameters, hidden)
        _check_array("unembed", logits, (ROWS, shape.vocab), "rows, vocab", jnp.float32)


def _abstract(module: nnx.Module) -> tuple[Layer, list[jax.ShapeDtypeStruct]]:
    """A module without its parameters, and these without their numbers."""
    layer, parameters = Layer.split(module)
    return layer, [jax.ShapeDtypeStruct(array.shape, array.dtype) for array in parameters]


def _check_layer(
    layer: Layer, shape: LayerShape, hidden: jax.ShapeDtypeStruct, parameters: list[jax.ShapeDtypeStruct]
) -> jax.ShapeDtypeStruct:
    """What the layer gives, abstractly."""

    def run(hidden: Array, parameters: list[Array]) -> Array:
        return Layers().call(layer, ShapeCheck(shape), hidden, parameters, None)[0]

    return jax.eval_shape(run, hidden, parameters)


def _check_outside(name: str, whole: Layer, parameters: list[jax.ShapeDtypeStruct], *given: Any) -> Any:
    """What the model's `embed` or `unembed` gives, abstractly."""
    closed, result = jax.make_jaxpr(
        lambda parameters, *given: getattr(whole(parameters), name)(*given), return_shape=True
    )(parameters, *given)
    try:
        check_draws_nothing(closed)
    except PlanError as error:
        raise PlanError(f"{name}: {error}") from None
    return result


def _check_array(name: str, found: Any, shape: tuple[int, ...], axes: str, dtype: Any = None) -> None:
    """Raises `PlanError` unless what `embed` or `unembed` gives is an array of that shape and, if given, dtype."""
    if not isinstance(found, jax.ShapeDtypeStruct):
        raise PlanError(f"{name} gives a {type(found).__name__}; expected an array [{axes}]")
    if found.shape != shape or (dtype is not None and found.dtype != dtype):
        kind = "" if dtype is None else jnp.dtype(dtype).name
        raise PlanError(
            f"{name} gives {found.dtype}{list(found.shape)}; expected {kind}{list(shape)} [{axes}], as ModelShape says"
        )


@dataclass(frozen=True)
class ShapeCheck:
    """An attention that computes nothing, but raises `PlanError` where what it is given is not of the layer's shape."""

    shape: LayerShape

    def __call__(self, _: None, x: Array, projections: Projections) -> tuple[Array, None]:
        shape = self.shape
        if not isinstance(projections, Projections):
            raise PlanError(f"attend was given a {type(projections).__name__}; expected kvrecomp.Projections")
        queries = shape.heads, shape.head_dim
        keys = shape.kv_heads, shape.head_dim
        self._check("what attend is given", x.shape, (*x.shape[:-1], shape.hidden), "hidden")
        for name, heads in (("query", queries), ("key", keys), ("value", keys)):
            kernel, bias = getattr(projections, name)
            axes = f"hidden, {'heads' if name == 'query' else 'kv_heads'}, head_dim"
            self._check(f"the {name}'s kernel", kernel.shape, (shape.hidden, *heads), axes)
            if bias is not None:
                self._check(f"the {name}'s bias", bias.shape, heads, axes.removeprefix("hidden, "))
        positions = jnp.zeros(x.shape[:-1], jnp.int32)
        for name, encoded, heads in (
            ("encode_query", projections.queries(x, positions), queries),
            ("encode_key", projections.keys(x, positions), keys),
        ):
            self._check(f"what {name} gives", encoded.shape, (*x.shape[:-1], *heads), "heads, head_dim")
        if projections.sliding_window != shape.sliding_window:
            raise PlanError(
                f"Projections.sliding_window is {projections.sliding_window}, LayerShape.sliding_window "
                f"{shape.sliding_window}: make them the same"
            )
        return jnp.zeros((*x.shape[:-1], shape.heads * shape.head_dim), x.dtype), None

    def _check(self, what: str, found: tuple[int, ...], expected: tuple[int, ...], axes: str) -> None:
        if found != expected:
            raise PlanError(
                f"{what} is {list(found)}, and its LayerShape says {list(expected)} [..., {axes}]: make them the same"
            )
