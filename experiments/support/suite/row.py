"""A row of results: one plan, or another program, measured on one workload."""

import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from experiments.support.results.report import after_warm_up

import numpy as np


@dataclass(kw_only=True)
class Row:
    """Milliseconds are per decode step, bytes are bytes. None is what has no meaning, or is not known.

    `asked` is the plan's name as it was given, and `device_budget` the device memory in bytes that it was to keep to,
    None for what was free. `codec` says how its blocks are written, "plain, packed" where both are. `compile_s` are the
    seconds that the step's program took, compiled beside others, and `prefill_s` those until all rows have their first
    token. `peak_device_bytes` is the most that the process has used by then, earlier plans included. `step_ms` has
    every step that was run.

    With `drafts` steps are rounds, of so many by a `drafter`, each right at the `acceptance` if those before it are:
    a row took `tokens_per_pass` in the mean.
    """

    model: str
    batch: int
    prompt: int
    new: int
    asked: str
    plan: str
    codec: str | None = None
    dtype: str
    weights: str | None = None
    groups: int | None = None
    order: str | None = None
    device_budget: float | None = None
    median_ms: float
    p95_ms: float
    worst_ms: float
    predicted_ms: float | None = None
    link_bytes: int | None
    predicted_bytes: int | None = None
    link_efficiency: float | None = None
    tokens_per_second: float
    peak_device_bytes: int | None
    temp_bytes: int | None = None
    compile_s: float | None = None
    prefill_s: float
    programs: int | None = None
    drafts: int | None = None
    drafter: str | None = None
    acceptance: float | None = None
    tokens_per_pass: float | None = None
    ms_per_token: float | None = None
    predicted_ms_per_token: float | None = None
    step_ms: list[float]


def step_times(seconds: Sequence[float], rows: int) -> dict[str, Any]:
    """The fields of a `Row` that say how long its steps took, each decoding a token of so many rows."""
    counted = after_warm_up(seconds)
    median = statistics.median(counted)
    return {
        "median_ms": median * 1e3,
        "p95_ms": float(np.percentile(counted, 95)) * 1e3,
        "worst_ms": max(counted) * 1e3,
        "tokens_per_second": rows / median,
        "step_ms": [round(1e3 * step, 2) for step in seconds],
    }
