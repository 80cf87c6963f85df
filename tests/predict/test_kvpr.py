"""KVPR's own formula, and its schedule by our cost function: the paper's optimal splits and bytes."""

import numpy as np
import pytest

import models
from kvrecomp.plan import GIB, Workload
from kvrecomp.plan.named import named_plan
from kvrecomp.predict.cost import plan_costs
from kvrecomp.predict.hardware import HardwareProfile
from kvrecomp.predict.kvpr import kvpr_seconds, kvpr_split

# The optimal split l / s by KVPR's formula (arXiv 2411.17089, equations 8 to 11) at peak rates, where recomputing l
# tokens takes as long as sending the rest: 4 b l h^2 / v_gpu = 2 b (s - l) h p / v_link, so
#     l / s = 1 / (1 + 2 h v_link / (p v_gpu))
# with v_link 32 GB/s (PCIe 4.0 x16, as the paper counts it), v_gpu 312e12 (A100, dense bfloat16, its data sheet), p 2,
# and h 4096, 5120 and 7168 (OPT-6.7B, 13B, 30B; arXiv 2205.01068, table 1).
PAPER = [("opt-6.7b", 4096, 0.70), ("opt-13b", 5120, 0.66), ("opt-30b", 7168, 0.58)]
A100 = HardwareProfile.from_datasheet("a100")
WORKLOAD = Workload(batch=32, prompt=1024, new=32)


@pytest.mark.parametrize(("name", "hidden", "split"), PAPER)
def test_the_papers_split(name, hidden, split):
    shape = models.PRESETS[name].shape
    closed = 1 / (1 + 2 * hidden * 32e9 / (2 * 312e12))
    assert closed == pytest.approx(split, abs=0.005)
    assert shape.layers[0].hidden == hidden
    assert kvpr_split(A100, shape, WORKLOAD) / 1024 == pytest.approx(closed, abs=0.001)
    # Where both take as long, the formula is the activations' copies and the others'.
    recomputed = closed * 1024
    sent = 32 * 2 * hidden * (recomputed + 2 * (1024 - recomputed)) / 32e9
    assert kvpr_seconds(A100, shape, WORKLOAD, recomputed) == pytest.approx(len(shape.layers) * sent)
    # At the ends: all keys and values, 2 b s h p bytes; and everything recomputed, nothing beside it.
    pairs = len(shape.layers) * 2 * 32 * 1024 * hidden * 2 / 32e9
    assert kvpr_seconds(A100, shape, WORKLOAD, 0) == pytest.approx(pairs)
    alone = len(shape.layers) * (32 * 1024 * hidden * 2 / 32e9 + 4 * 32 * 1024 * hidden**2 / 312e12)
    assert kvpr_seconds(A100, shape, WORKLOAD, 1024) == pytest.approx(alone)


@pytest.mark.parametrize(("name", "hidden", "split"), PAPER)
def test_the_papers_schedule_has_its_optimum_there(name, hidden, split):
    """Predicted by our cost function, with attention and dense layers that the formula leaves out.

    The window is large enough that each run is one block, as in the paper.
    """
    shape = models.PRESETS[name].shape
    fractions = np.arange(0, 129) / 128
    plans = [named_plan(f"kvpr:{f}", shape, WORKLOAD, window=64 * GIB) for f in fractions]
    assert max(len(layer.prompt) for plan in plans for layer in plan.layers) == 2
    predicted = plan_costs(A100, plans, 0).seconds
    best = int(predicted.argmin())
    assert fractions[best] == pytest.approx(1 / (1 + 2 * hidden * 32e9 / (2 * 312e12)), abs=0.03)
    assert predicted[best] < 0.9 * predicted[0] and predicted[best] < 0.99 * predicted[-1]
    recomputed = round(fractions[best] * 1024)
    per_layer = 32 * 2 * hidden * (recomputed + 2 * (1024 - recomputed))  # b p h (l + 2 (s - l))
    assert plans[best].bytes_in("host") == len(shape.layers) * per_layer
