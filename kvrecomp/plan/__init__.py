"""Plain data, without jax: the sizes of a model, a workload, a budget, and the plan of what is cached where."""

from kvrecomp.plan.codecs import CODECS, LOSSLESS, Codec, Loss
from kvrecomp.plan.drafting import Drafting
from kvrecomp.plan.layout import AUTO, DEFAULT_WINDOW, BlockSpec, LayerPlan, Order, Plan, Schedule
from kvrecomp.plan.shapes import (
    ALIGNED,
    FORMS,
    GIB,
    LEAST_ALIGNED,
    MEMORIES,
    METHODS,
    MIB,
    Form,
    LayerShape,
    Memory,
    Method,
    ModelShape,
    PlanError,
    uneven,
)
from kvrecomp.plan.table import format_bytes
from kvrecomp.plan.workload import Budget, Workload

__all__ = [
    "ALIGNED",
    "AUTO",
    "CODECS",
    "DEFAULT_WINDOW",
    "FORMS",
    "GIB",
    "LEAST_ALIGNED",
    "LOSSLESS",
    "MEMORIES",
    "METHODS",
    "MIB",
    "BlockSpec",
    "Budget",
    "Codec",
    "Drafting",
    "Form",
    "LayerPlan",
    "LayerShape",
    "Loss",
    "Memory",
    "Method",
    "ModelShape",
    "Order",
    "Plan",
    "PlanError",
    "Schedule",
    "Workload",
    "format_bytes",
    "uneven",
]
