"""Decoding with a KV cache larger than device memory: send activations, absorb or recompute K and V.

    result = kvrecomp.generate(model, input_ids, max_new_tokens=128)

or, step by step,

    profile = kvrecomp.profile()  # measured once per machine
    work, weights = kvrecomp.Workload(batch=32, prompt=1024, new=128), kvrecomp.weight_memories(model)
    plan = kvrecomp.make_plan(model.shape, work, profile, weights=weights)
    decoder = kvrecomp.Decoder(model, plan)
    cache, logits = decoder.prefill(input_ids, attention_mask)
    cache, logits = decoder.step(cache, token_ids)
"""

from kvrecomp.run import memory as _memory

_memory.limit_pinned_to_free()  # before anything below starts the backend

from kvrecomp.auto import plan_for  # noqa: E402
from kvrecomp.generate import Generated, generate  # noqa: E402
from kvrecomp.measure.profiler import profile  # noqa: E402
from kvrecomp.plan import Budget, Drafting, LayerShape, ModelShape, Plan, PlanError, Workload  # noqa: E402
from kvrecomp.plan.footprint import memory_needed  # noqa: E402
from kvrecomp.plan.named import named_plan, with_host_weights  # noqa: E402
from kvrecomp.predict.hardware import HardwareProfile  # noqa: E402
from kvrecomp.predict.scheduler import make_plan  # noqa: E402
from kvrecomp.run.attention import Projection, Projections  # noqa: E402
from kvrecomp.run.decoder import Decoder  # noqa: E402
from kvrecomp.run.prompt import PromptError  # noqa: E402
from kvrecomp.run.weights import placement, weight_memories  # noqa: E402

__all__ = [
    "Budget",
    "Decoder",
    "Drafting",
    "Generated",
    "HardwareProfile",
    "LayerShape",
    "ModelShape",
    "Plan",
    "PlanError",
    "Projection",
    "Projections",
    "PromptError",
    "Workload",
    "generate",
    "make_plan",
    "memory_needed",
    "named_plan",
    "placement",
    "plan_for",
    "profile",
    "weight_memories",
    "with_host_weights",
]
