"""Calls a model's layer so that what its attention makes beside its output comes back as values.

A layer is `layer(hidden, attend)`, and `attend` gives it nothing but the mixed values. What is to be kept of a token,
and arrays that are on their way, are made within `attend`, which a layer may call inside `jax.checkpoint` or `jax.jit`;
there, results leave by no other door than the function's own. So the layer is traced to a jaxpr first, in which its
attention is one equation, and the jaxpr is evaluated: what wraps that equation is inlined, and its other results are
at hand.
"""

from collections.abc import Callable, Hashable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import jax
from flax import nnx
from jax import Array
from jax.extend import core

from kvrecomp.plan import PlanError
from kvrecomp.run.attention import Attend, Projections

Attention = Callable[[Any, Array, Projections], tuple[Array, Any]]
"""`attention(context, x, projections)` gives what `attend` returns and what else is made, both any pytrees."""

Input = Array | Callable[[], Array]
"""An array, or what gives it when it is needed."""

# One equation with all of a layer's attention: `jaxpr` computes it, and `structure` is that of its two results.
_attention = core.Primitive("attention")
_attention.multiple_results = True
_attention.def_abstract_eval(lambda *_, jaxpr, structure: jaxpr.out_avals)

# Equations that compute what the jaxpr among their parameters does, of the same operands.
_WRAPPERS = ("jit", "pjit", "closed_call", "core_call", "checkpoint", "remat2", "custom_jvp_call", "custom_vjp_call")

_RANDOM = ("random_bits", "threefry2x32", "rng_bit_generator", "rng_uniform")  # equations that draw numbers


@dataclass(frozen=True)
class Layer:
    """A layer without its parameters: `layer(parameters)(hidden, attend)`."""

    graph: Any
    structure: Any

    def __hash__(self) -> int:
        return hash(self.structure)  # of the graph, anyone's lists and dictionaries are part

    @classmethod
    def split(cls, module: nnx.Module) -> tuple["Layer", list[Array]]:
        """A module's layer and parameters."""
        graph, state = nnx.split(module)
        parameters, structure = jax.tree.flatten(state)
        return cls(graph, structure), parameters

    def __call__(self, parameters: Sequence[Array]) -> Callable[[Array, Attend], Array]:
        return nnx.merge(self.graph, jax.tree.unflatten(self.structure, parameters))


class Layers:
    """Calls layers; those that are alike, and attend alike, are traced once."""

    def __init__(self):
        self._traced: dict[Hashable, core.ClosedJaxpr] = {}

    def call(
        self,
        layer: Layer,
        attention: Attention,
        hidden: Array,
        parameters: Sequence[Any],
        context: Any,
        given: Mapping[int, Input] | None = None,
        attended: Callable[[Any], Any] = lambda result: result,
    ) -> tuple[Array, Any]:
        """`layer(parameters)(hidden, attend)`, hidden [..., h] -> [..., h], and what else its attention made.

        `given` are arrays in place of parameters, by their numbers, or functions that are called once the layer needs
        the array. `attended` is given what attention made when it is done, before the layer goes on, and may change it.
        An `attention` that equals another attends alike.

        Raises `PlanError` unless the layer attends exactly once, outside of loops and conditions, gives hidden states
        as it was given, and draws no random numbers.
        """
        shapes = [jax.ShapeDtypeStruct(array.shape, array.dtype) for array in parameters]  # on the device, wherever now
        arrays, structure = jax.tree.flatten((hidden, context))
        key = layer, attention, structure, *map(jax.typeof, arrays), *((like.shape, like.dtype) for like in shapes)
        if key not in self._traced:
            self._traced[key] = _trace(layer, attention, hidden, shapes, context)
        results: list[Any] = []

        def attend(operands: Sequence[Array], jaxpr: core.ClosedJaxpr, structure: Any) -> list[Array]:
            outputs = core.jaxpr_as_fun(jaxpr)(*operands)
            _, result = jax.tree.unflatten(structure, outputs)
            results.append(attended(result))
            return outputs

        inputs: dict[int, Input] = {**dict(enumerate(parameters)), **(given or {})}
        (out,) = _evaluate(self._traced[key], [hidden, *inputs.values(), *jax.tree.leaves(context)], attend)
        return out, results[0]


def _trace(
    layer: Layer, attention: Attention, hidden: Array, parameters: Sequence[jax.ShapeDtypeStruct], context: Any
) -> core.ClosedJaxpr:
    """The layer as a jaxpr of these three, whose attention is one equation."""

    def run(hidden: Array, parameters: Sequence[Array], context: Any) -> Array:
        def attend(x: Array, projections: Projections) -> Array:
            if not isinstance(x, Array):
                raise PlanError(f"attend was given a {type(x).__name__}; expected an array [..., hidden]")
            function = jax.jit(lambda x: attention(context, x, projections))  # what it captures becomes its operands
            closed, shapes = jax.make_jaxpr(function, return_shape=True)(x)
            (call,) = closed.jaxpr.eqns
            values = dict(zip((*closed.jaxpr.constvars, *closed.jaxpr.invars), (*closed.consts, x), strict=True))
            operands = [values[variable] for variable in call.invars]
            mixed, *_ = _attention.bind(*operands, jaxpr=call.params["jaxpr"], structure=jax.tree.structure(shapes))
            return mixed

        return layer(parameters)(hidden, attend)

    closed, result = jax.make_jaxpr(run, return_shape=True)(hidden, parameters, context)
    if (count := _attentions(closed)) != 1:
        raise PlanError(f"it calls attend {count} times; expected once")
    given = f"hidden states {list(hidden.shape)}, as it was given"
    if not isinstance(result, jax.ShapeDtypeStruct):
        raise PlanError(f"it returns a {type(result).__name__}; expected an array of {given}")
    if result.shape != hidden.shape:
        raise PlanError(f"it returns {list(result.shape)}; expected {given}")
    check_draws_nothing(closed)
    return closed


def check_draws_nothing(closed: core.ClosedJaxpr) -> None:
    """Raises `PlanError` where random numbers are drawn."""
    if _draws(closed):
        raise PlanError("it draws random numbers, as active dropout does: call model.eval() before decoding")


def _draws(closed: core.ClosedJaxpr) -> bool:
    """Whether random numbers are drawn in this jaxpr."""
    return any(
        equation.primitive.name in _RANDOM or any(map(_draws, _inner(equation))) for equation in closed.jaxpr.eqns
    )


def _evaluate(closed: core.ClosedJaxpr, inputs: Sequence[Input], attend: Callable[..., list[Array]]) -> list[Array]:
    """The jaxpr's outputs, equation by equation; `attend` evaluates its attention."""
    jaxpr = closed.jaxpr
    values: dict[Any, Input] = dict(zip((*jaxpr.constvars, *jaxpr.invars), (*closed.consts, *inputs), strict=True))

    def value(operand: Any) -> Input:
        return operand.val if isinstance(operand, core.Literal) else values[operand]

    def array(operand: Any) -> Array:
        found = value(operand)
        return found() if callable(found) else found

    for equation in jaxpr.eqns:
        primitive = equation.primitive
        if primitive is _attention:
            outputs = attend(list(map(array, equation.invars)), **equation.params)
        elif not any(map(_attentions, _inner(equation))):
            parameters = primitive.get_bind_params(equation.params)
            outputs = primitive.bind(*map(array, equation.invars), **parameters)
            outputs = outputs if primitive.multiple_results else [outputs]
        elif primitive.name in _WRAPPERS:
            (inner,) = _inner(equation)
            outputs = _evaluate(inner, list(map(value, equation.invars)), attend)
        else:
            raise PlanError(f"it calls attend inside {primitive.name}: call it outside of loops and conditions")
        values |= zip(equation.outvars, outputs, strict=True)
    return list(map(array, jaxpr.outvars))


def _inner(equation: core.JaxprEqn) -> Iterator[core.ClosedJaxpr]:
    """The jaxprs among the equation's parameters."""
    for parameter in equation.params.values():
        for jaxpr in parameter if isinstance(parameter, (tuple, list)) else (parameter,):
            if isinstance(jaxpr, core.ClosedJaxpr):
                yield jaxpr
            elif isinstance(jaxpr, core.Jaxpr):
                yield core.ClosedJaxpr(jaxpr, ())


def _attentions(closed: core.ClosedJaxpr) -> int:
    """How often the layer attends in this jaxpr."""
    count = 0
    for equation in closed.jaxpr.eqns:
        count += 1 if equation.primitive is _attention else sum(map(_attentions, _inner(equation)))
    return count
