"""Drafts: tokens that are proposed in advance, so that one step checks several.

A round is drafts and the step that checks them. Of each row it takes the tokens up to the first that is not the one the
sampler takes there, and that one itself: rows are ahead of one another then. A token's slot is its place in its row all
the same, so blocks are dense: the tail is written out when every row that goes on has filled it, and has room for
tokens of the rows ahead. A row that comes to the end of that room takes fewer tokens, and the rest again later.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal, get_args

from kvrecomp.plan.codecs import SKETCHES, Codec
from kvrecomp.plan.shapes import ALIGNED, PlanError, check_choice, check_positive

Drafter = Literal["sketch", "prompt_lookup", "assistant"]

# Of a step without drafts: for less, rounds without drafts take the program that checks some. Another one takes a while
# to load: of W1, 1.6 s on an H200, where a step that checks eight drafts takes 1.007 of one that checks none.
NEARLY = 1.03
# How often drafts are right, each if those before it are, where nothing is known of the model. SmolLM2-135M's were, on
# six kinds of text (cpu_acceptance.json): 0.98 to 1 of an fp8 sketch, 0.93 to 1 of an int4 one, 0.08 to 0.98 of prompt
# lookup, greedy after 2048 tokens; a little less is assumed. Of an assistant nothing was measured.
ACCEPTANCE: Mapping[str, float] = {"fp8": 0.95, "int4": 0.93, "prompt_lookup": 0.5, "assistant": 0.7}
MOST_DRAFTS = 256  # of a row in a round: their logits, and the program that checks them, grow with these
ROUNDS_AHEAD = 4  # of all drafts right, for which there is room; the host learns two rounds late what was taken


@dataclass(frozen=True)
class Drafting:
    """At most `most` drafts of each row in a round, of a `drafter`, and how many tokens the tail has room for beside
    those that are written out.

    A `sketch` is a copy on the device, written as `codec` says, of the blocks in host memory: the model itself drafts
    over it, and over the other blocks as they are. For `prompt_lookup` and an `assistant` model see `run.drafters`.

    How many of `most` drafts a round has is decided while decoding, by how often they are right and by what they cost:
    `draft_cost` is what a draft adds to a round, and `check_cost` the time of a step that checks `most`, in times of a
    step without, and `acceptance` how often one is right, if those before it are, as far as is known beforehand.
    """

    drafter: Drafter
    most: int
    ahead: int = 0
    codec: Codec | None = None
    draft_cost: float = 0.1
    check_cost: float = 1.0
    acceptance: float = field(default=math.nan, compare=False)  # it is in no program

    def __post_init__(self):
        if self.ahead == 0:
            ahead = ROUNDS_AHEAD * (self.most + 1)
            object.__setattr__(self, "ahead", ahead + -ahead % ALIGNED)
        if math.isnan(self.acceptance):
            object.__setattr__(self, "acceptance", ACCEPTANCE.get(self.codec or self.drafter, 0.0))
        check_choice(self, get_args(Drafter), self.drafter)
        check_positive(self, most=self.most, ahead=self.ahead)
        if self.most > MOST_DRAFTS:
            raise PlanError(
                f"Drafting: most is {self.most}; a round has {MOST_DRAFTS} drafts of a row at most: use fewer"
            )
        if not (0 <= self.draft_cost < math.inf and 0 < self.check_cost < math.inf):
            raise PlanError(
                f"Drafting: a draft costs {self.draft_cost} and a step that checks {self.check_cost} times a step; "
                "expected numbers"
            )
        if not 0 <= self.acceptance <= 1:
            raise PlanError(f"Drafting: acceptance is {self.acceptance}; expected a probability, from 0 to 1")
        if self.drafter == "sketch":
            check_choice(self, SKETCHES, str(self.codec))
        elif self.codec is not None:
            raise PlanError(f"Drafting: the codec {self.codec!r} is given for {self.drafter}; only a sketch has one")

    @property
    def name(self) -> str:
        """What it is called for people."""
        return f"{self.codec} sketch" if self.codec else self.drafter.replace("_", " ")

    @property
    def two_programs(self) -> bool:
        """Whether rounds without drafts have a program of their own."""
        return self.check_cost > NEARLY

    def pace(self, count: int, acceptance: float) -> float:
        """Tokens that a row takes with so many drafts a round, each right with that probability if those before it are,
        in the time of a step without drafts."""
        cost = 1.0 if count == 0 and self.two_programs else self.check_cost + count * self.draft_cost
        return tokens_per_round(count, acceptance) / cost

    def best_count(self, acceptance: float, counts: Sequence[int] | None = None) -> int:
        """The number of drafts, of any up to `most` or of these, with which rows take most tokens; 0 where none pay."""
        counts = range(self.most + 1) if counts is None else counts
        return max(counts, key=lambda count: self.pace(count, acceptance))


def tail_room(drafting: Drafting | None, tail: int, new: int) -> int:
    """Tokens that a tail has room for of which so many are written out: with drafts more, as far as rows may come."""
    return max(tail, min(tail + (drafting.ahead if drafting else 0), new))


def tokens_per_round(count: int, acceptance: float) -> float:
    """Tokens that a row takes of so many drafts and one more: the sum of acceptance ** n for n from 0 to `count`."""
    return sum(acceptance**number for number in range(count + 1))
