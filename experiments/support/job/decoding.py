"""Decoding the batches of a job: the records of their lines."""

import itertools
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field

from experiments.support.job.meter import Meter
from experiments.support.job.output import Record
from experiments.support.job.reader import Line
from experiments.support.prompts import pad_left

import kvrecomp
import models
from kvrecomp.drafts import make_drafter
from kvrecomp.generate import TokenLoop
from kvrecomp.plan import Plan
from kvrecomp.run.sampling import Sampling


def error_record(line: Line, error: str) -> Record:
    """What is written in place of a continuation."""
    return {"id": line.id, "line": line.number, "error": error, "finish_reason": "error"}


def report(line: Line, error: str = "") -> None:
    """Says on standard error what is wrong with a line."""
    print(f"line {line.number}: {error or line.error}", file=sys.stderr)


@dataclass
class Decoding:
    """Decodes batches, with a decoder for each plan, made when it is first needed."""

    model: models.CausalLM
    text: models.TextProcessor
    sampling: Sampling
    meter: Meter
    budget: kvrecomp.Budget | None = None
    decoders: dict[Plan, kvrecomp.Decoder] = field(default_factory=dict)

    def records(self, plan: Plan, lines: Sequence[Line]) -> list[Record]:
        """The records of lines that are one batch, or less. Lines whose logits are NaN get errors."""
        try:
            return self._records(plan, lines)
        except FloatingPointError:
            if len(lines) > 1:
                half = len(lines) // 2
                return [*self.records(plan, lines[:half]), *self.records(plan, lines[half:])]
            told = "its logits are NaN: check the weights, or use a dtype with a larger range"
            report(lines[0], told)
            return [error_record(lines[0], told)]

    def _records(self, plan: Plan, lines: Sequence[Line]) -> list[Record]:
        if plan not in self.decoders:
            self.decoders[plan] = kvrecomp.Decoder(self.model, plan, budget=self.budget)
        # Rows that are wanting are copies of the first: they end when it does.
        rows = [*lines, *itertools.repeat(lines[0], plan.rows - len(lines))]
        ids, mask = pad_left([line.ids for line in rows], plan.workload.prompt)
        ends = self.text.eos_token_ids
        self.meter.begin(len(lines), ends)
        loop = TokenLoop(
            self.decoders[plan],
            self.sampling,
            ends,
            self.text.pad_token_id,
            self.meter,
            progress=False,
            drafter=make_drafter(plan),
            # Were it to go by what is compiled already, what is written after a kill might be rounded otherwise.
            drafts=plan.drafting and plan.drafting.most,
        )
        result = loop.run(ids, mask, plan.workload.new, [line.index for line in rows])
        records = []
        for line, row, count in zip(lines, result.sequences, result.new_tokens):
            new = row[plan.workload.prompt :][:count].tolist()
            text = None if self.text.tokenizer is None else self.text.decode(new, line.ids.tolist())
            reason = "stop" if new[-1] in ends else "length"
            records.append({"id": line.id, "prompt": line.prompt, "text": text, "tokens": new, "finish_reason": reason})
        self.meter.prompts += len(lines)
        return records
