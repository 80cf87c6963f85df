"""A check of logits against those of another plan: all plans decode the same, up to rounding."""

from collections.abc import Sequence
from dataclasses import dataclass

import jax
import numpy as np

import kvrecomp
import models
from kvrecomp.plan import LOSSLESS, Memory
from kvrecomp.run.prompt import split_groups


@dataclass(frozen=True)
class Check:
    """How far logits are from those of another plan that is fed the same tokens.

    `difference` is the largest absolute one, None where the other plan could not be run, for the `reason` given. With
    `loss`, by those codecs, there is a difference, of any size.
    """

    plan: str
    difference: float | None
    tolerance: float
    reason: str = ""
    loss: str = ""

    @property
    def passed(self) -> bool:
        """Whether the difference is within the tolerance, or there is to be one; a check that could not be made has not
        failed."""
        return self.difference is None or bool(self.loss) or self.difference <= self.tolerance

    def __str__(self) -> str:
        if self.difference is None:
            return f"logits not compared with those of plan {self.plan}: {self.reason}"
        if self.loss:
            return (
                f"with loss ({self.loss}): logits differ from those of plan {self.plan}, {self.difference:.2g} the most"
            )
        verdict = "equal" if self.passed else "DIFFER FROM"
        return (
            f"logits {verdict} those of plan {self.plan}: largest difference {self.difference:.2g}, "
            f"tolerance {self.tolerance:.2g}"
        )


def check_logits(
    model: models.CausalLM, result: kvrecomp.Generated, mask: np.ndarray, budget: kvrecomp.Budget | None = None
) -> Check:
    """Decodes the same tokens with the cache on the device, or with K and V in host memory if it was on the device or
    does not fit there.

    The difference is rounding: float32 is held to 1e-4, and what is rounded more coarsely to a few units in the last
    place of the largest logit.
    """
    plan, logits = result.plan, result.logits
    if logits is None:
        raise ValueError("the result has no logits to check: generate with output_logits=True")
    coarse = {"bfloat16": 2**-8, "float16": 2**-11, "float32": 0 if jax.default_backend() == "cpu" else 2**-11}
    tolerance = max(1e-4, 8 * coarse[plan.shape.dtype] * float(np.abs(logits).max()))
    names = ["device"] if plan.bytes_in("host", plan.write_outs) else []
    names += [] if plan.name == "keys_values" else ["keys_values"]
    weights: list[Memory] = [layer.weights for layer in plan.layers]
    options = {"groups": plan.groups, "order": plan.order, "tail": plan.tail, "window": plan.window}
    misfits = []
    for name in names:
        try:
            reference = kvrecomp.plan_for(name, plan.shape, plan.workload, weights=weights, **options)
            decoder = kvrecomp.Decoder(model, reference, budget=budget)
        except kvrecomp.PlanError as error:
            misfits.append(str(error))
        else:
            difference = _largest_difference(decoder, result, mask, logits)
            return Check(name, difference, tolerance, loss=", ".join(set(plan.codecs) - set(LOSSLESS)))
    return Check(names[0], None, tolerance, misfits[0])


def _largest_difference(
    decoder: kvrecomp.Decoder, result: kvrecomp.Generated, mask: np.ndarray, expected: np.ndarray
) -> float:
    """Between the decoder's logits of the result's texts and those expected, [new, batch, vocab], as far as rows had
    not ended; NaN where one is."""
    plan = decoder.plan
    prompt, new = np.split(result.sequences, [mask.shape[1]], axis=1)
    caches, logits = zip(*(decoder.prefill(*part) for part in split_groups(prompt, mask, plan)))
    differences = [_difference(logits, expected[0], result.new_tokens > 0)]
    for place, (tokens, row) in enumerate(zip(new.T, expected[1:]), 1):
        caches, logits = decoder.step_groups(caches, jax.device_put(np.split(tokens, plan.groups)))
        differences.append(_difference(logits, row, result.new_tokens > place))
    return float(np.max(differences))


def _difference(logits: Sequence[jax.Array], expected: np.ndarray, rows: np.ndarray) -> float:
    """The largest between the logits of all groups and those expected, of the rows bool[batch]."""
    return np.abs(np.concatenate(jax.device_get(logits)) - expected)[rows].max()
