"""Texts of several kinds, as token ids, from what is on every machine that runs this.

documentation   topics of Python's reference manual
code            modules of kvrecomp
licence         what NumPy is distributed with
list            names of pictographs, an item a line
story           stories that the model itself tells; a written one where it has no chat template
dialogue        questions, and what the model itself answers; a written one where it has no chat template

The first four go by the versions of Python, kvrecomp and NumPy, the last two by the model.
"""

import importlib
import importlib.metadata
import inspect
import itertools
import unicodedata
from collections.abc import Callable, Iterator, Sequence
from pydoc_data.topics import topics
from typing import Any

from experiments.support.prompts import encode

import kvrecomp
from models import TextProcessor

ANSWER = 384  # tokens of an answer, at most
FEWEST = 100  # tokens of a request and its answer, for asking as often as needed
MODULES = ("kvrecomp.generate", "kvrecomp.run.decoder", "kvrecomp.run.step")
PICTOGRAPHS = (*range(0x1F300, 0x1F650), *range(0x1F900, 0x1FA00), *range(0x2600, 0x2800))

STORIES = [
    f"Tell me a story about {subject}."
    for subject in (
        *("a lighthouse keeper", "two sisters and a borrowed horse", "a clock that runs backwards"),
        *("a baker who cannot sleep", "the last train of the year", "a fox in a library", "a letter that came late"),
        *("a bridge that nobody crosses", "a boy who collects rain", "an old captain and his map", "a broken violin"),
        *("a village without a well", "the painter of the moon", "a cat that kept a shop", "a winter in the mountains"),
        *("a thief who gave things back", "a garden on a roof", "a doctor on an island", "a race of paper boats"),
    )
]
QUESTIONS = (
    *("How do I keep tomato plants alive in a hot summer?", "Why is the sky red in the evening?"),
    *("Can you plan three days in Lisbon for me?", "What should I ask before I rent a flat?"),
    *("How does a refrigerator work?", "My neighbour plays the drums at night. What can I do?"),
    *("Explain interest rates to a child.", "Which books should I read about the sea?"),
    *("How do I learn to swim as an adult?", "What is the difference between a frog and a toad?"),
    *("Write an email to my landlord about a leaking tap.", "How do I make bread without yeast?"),
    *("Why do cats purr?", "What happened at the Battle of Hastings?", "How can I speak in front of many people?"),
    *("How do I remove a stain of red wine?", "What is a good name for a small bakery?"),
    *("How far away is the Moon, and how do we know?", "Give me reasons to keep bees, and reasons not to."),
)
STORY = """\
The ferry stopped running in October, and so Marta had the island to herself. She counted what she had: forty candles, a
sack of flour, the radio that spoke only at night. On the third evening it said her name. She was on a ladder then, and
did not fall, but the lamp did. In the dark the voice went on reading a list of ships, as it always had, and hers was
the last of them. "Lost with all hands," it said, "in the year of the great frost." Marta climbed down. She had never
owned a ship. In the morning she walked round the island to see what the sea had brought, as her father used to, and
between two rocks she found a boat with her name on its bow. It was dry inside. There was a coat in it, and in the
pocket of the coat a key that she knew, because she had turned it every day for eleven years. She went back up to the
house and tried the door, which she never locked, and it was locked. So she put on the coat. Behind the door somebody
was winding the clock.
"""
DIALOGUE = """\
ANNA: You are late again.
BEN: The bridge was closed. I had to go round by the mill.
ANNA: The bridge has been closed since Monday. You know that.
BEN: I hoped that they would be done. Is there any soup left?
ANNA: There is, but it is cold. Did you bring the papers?
BEN: Which papers?
ANNA: The ones that I asked you for. The ones that the bank wants to see by tomorrow morning.
BEN: Oh. I left them on the desk, I think. Next to the lamp.
ANNA: You think?
BEN: I am almost sure. I had them in my hand when the telephone rang.
ANNA: Who was it?
BEN: Nobody. Somebody who wanted to sell me a roof.
ANNA: We need a roof.
BEN: That is what I told him. He is coming on Thursday to look at it.
ANNA: And who is going to pay for it, without the papers?
BEN: I will go back. Give me the keys to your car.
ANNA: Eat your soup first. I will come with you, and we will take the long way.
BEN: What did the bank say, when you called them?
ANNA: That they have waited long enough.
"""


def documentation() -> str:
    return "\n\n".join(topics.values())


def code() -> str:
    return "\n\n".join(inspect.getsource(importlib.import_module(name)) for name in MODULES)


def licence() -> str:
    files = importlib.metadata.files("numpy") or ()
    return "\n\n".join(file.read_text(encoding="utf-8") for file in files if "LICENSE" in file.name)


def pictographs() -> str:
    return "".join(f"- {name.lower()}\n" for code in PICTOGRAPHS if (name := unicodedata.name(chr(code), "")))


WRITTEN: dict[str, Callable[[], str]] = {
    "documentation": documentation,
    "code": code,
    "licence": licence,
    "list": pictographs,
    "story": lambda: STORY,
    "dialogue": lambda: DIALOGUE,
}
ASKED: dict[str, Sequence[str]] = {"story": STORIES, "dialogue": QUESTIONS}
KINDS = tuple(WRITTEN)


def make_texts(kinds: Sequence[str], model: Any, text: TextProcessor, tokens: int) -> list[list[int]]:
    """The first `tokens` ids of a text of each kind.

    Raises ValueError where there is no such kind, or its text is shorter.
    """
    unknown = [kind for kind in kinds if kind not in KINDS]
    if unknown:
        raise ValueError(f"there is no text of kind {unknown[0]!r}; the kinds are {', '.join(KINDS)}")
    asked = [kind for kind in kinds if kind in ASKED] if text.chat_template is not None else []
    requests = [ASKED[kind][: 1 + tokens // FEWEST] for kind in asked]
    chats = dict(zip(asked, _chats(model, text, requests))) if asked else {}
    found = [chats[kind] if kind in chats else text.encode(WRITTEN[kind]()) for kind in kinds]
    for kind, ids in zip(kinds, found):
        if len(ids) < tokens:
            raise ValueError(f"the {kind} has {len(ids)} tokens, fewer than {tokens}: ask for shorter contexts")
    return [ids[:tokens] for ids in found]


def _chats(model: Any, text: TextProcessor, requests: Sequence[Sequence[str]]) -> Iterator[list[int]]:
    """The ids of chats in which the model answers requests, each greedily as if it were the only one."""
    every = list(itertools.chain(*requests))
    ids, mask = encode(text, every, chat=True)
    batch, prompt = ids.shape
    plan = kvrecomp.named_plan("device", model.shape, kvrecomp.Workload(batch, prompt, ANSWER), tail=ANSWER)
    ends = {"eos_token_id": text.eos_token_ids, "pad_token_id": text.pad_token_id}
    found = kvrecomp.generate(model, ids, mask, max_new_tokens=ANSWER, plan=plan, **ends)
    new = zip(found.sequences[:, ids.shape[1] :], found.new_tokens)
    answers = iter([text.decode(row[:count].tolist()).strip() for row, count in new])
    for of_chat in requests:
        messages = []
        for request in of_chat:
            messages += [{"role": "user", "content": request}, {"role": "assistant", "content": next(answers)}]
        yield text.encode_chat(messages)
