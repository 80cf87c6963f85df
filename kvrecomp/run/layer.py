"""Calls a model's layer so that what its attention makes beside its output comes back as values.

A layer is `layer(hidden, attend)`, and `attend` gives it nothing but the mixed values. What is to be kept of a token,
and arrays that are on their way, are made within `attend`, which a layer may call inside `jax.checkpoint` or `jax.jit`;
there, results leave by no other door than the function's own. So the layer is traced to a jaxpr first, in which its
attention is one equation, and the jaxpr is evaluated: what wraps that equation is inlined, and its other results are
at hand.
"""

from collections.abc import Callable, Iterator, Sequence
from typing import Any, TypeVar

import jax
from jax import Array
from jax.extend import core

from kvrecomp.plan import PlanError
from kvrecomp.run.attention import Attend, Projections

Result = TypeVar("Result")

Input = Array | Callable[[], Array]
"""An array, or what gives it when it is needed."""

# One equation with all of a layer's attention: `jaxpr` computes it, and `structure` is that of its two results.
_attention = core.Primitive("attention")
_attention.multiple_results = True
_attention.def_abstract_eval(lambda *_, jaxpr, structure: jaxpr.out_avals)

# Equations that compute what the jaxpr among their parameters does, of the same operands.
_WRAPPERS = ("jit", "pjit", "closed_call", "core_call", "checkpoint", "remat2", "custom_jvp_call", "custom_vjp_call")


def call_layer(
    layer: Callable[..., Array],
    attention: Callable[[Array, Projections], tuple[Array, Result]],
    hidden: Array,
    weights: Sequence[Input] = (),
    like: Sequence[Any] = (),
    attended: Callable[[Result], Result] = lambda result: result,
) -> tuple[Array, Result]:
    """`layer(hidden, attend, *weights)`, and what its attention made: hidden [..., h] -> [..., h] and any pytree.

    `attention` gives what `attend` returns, and the rest. `weights` are arrays like those in `like`; one that is a
    function is called once the layer needs the array. `attended` is given what attention made when it is done, before
    the layer goes on, and may change it.

    Raises `PlanError` unless the layer attends exactly once, outside of loops and conditions.
    """
    shapes = [jax.ShapeDtypeStruct(array.shape, array.dtype) for array in like]  # on the device, wherever they are now
    closed = jax.make_jaxpr(lambda hidden, *weights: layer(hidden, _attend_by(attention), *weights))(hidden, *shapes)
    if (count := _attentions(closed)) != 1:
        raise PlanError(f"a layer called attend {count} times; expected once")
    results: list[Result] = []

    def attend(operands: Sequence[Array], jaxpr: core.ClosedJaxpr, structure: Any) -> list[Array]:
        outputs = core.jaxpr_as_fun(jaxpr)(*operands)
        _, result = jax.tree.unflatten(structure, outputs)
        results.append(attended(result))
        return outputs

    (out,) = _evaluate(closed, [hidden, *weights], attend)
    return out, results[0]


def _attend_by(attention: Callable[[Array, Projections], tuple[Array, Any]]) -> Attend:
    """The `attend` that a layer is given: it makes the one equation."""

    def attend(x: Array, projections: Projections) -> Array:
        function = jax.jit(lambda x: attention(x, projections))  # what it captures becomes operands of its equation
        closed, shapes = jax.make_jaxpr(function, return_shape=True)(x)
        (call,) = closed.jaxpr.eqns
        values = dict(zip((*closed.jaxpr.constvars, *closed.jaxpr.invars), (*closed.consts, x), strict=True))
        operands = [values[variable] for variable in call.invars]
        mixed, *_ = _attention.bind(*operands, jaxpr=call.params["jaxpr"], structure=jax.tree.structure(shapes))
        return mixed

    return attend


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
            raise PlanError(f"a layer calls attend inside {primitive.name}: call it outside of loops and conditions")
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
