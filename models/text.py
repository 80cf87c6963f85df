"""What a checkpoint says of text beside its weights: how it is read and written, what ends it, how tokens are sampled.

The files are Hugging Face's, and each is optional. They are read as transformers reads them, names of tokens meaning
nothing by themselves:

    tokenizer.json            text to ids, with what begins a text, and back
    tokenizer_config.json     which tokens are special
    chat_template.jinja       how messages become text; in older checkpoints a field of tokenizer_config.json
    generation_config.json    `eos_token_id` and `pad_token_id`, else those of config.json; how tokens are sampled
"""

import itertools
import os
import reprlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer

from kvrecomp.run.sampling import Sampling
from models.chat import render_chat
from models.checkpoint import CheckpointError, read_object
from models.tokenizer import load_tokenizer, read_tokenizer_config, special_tokens

SAMPLING: dict[str, Any] = {"do_sample": False, "temperature": 1.0, "top_k": 50, "top_p": 1.0}
"""What transformers does where a generation_config.json says nothing."""

UNSUPPORTED = (
    *("repetition_penalty", "encoder_repetition_penalty", "no_repeat_ngram_size", "bad_words_ids", "sequence_bias"),
    *("min_p", "typical_p", "top_h", "epsilon_cutoff", "eta_cutoff", "num_beams", "penalty_alpha", "guidance_scale"),
    *("suppress_tokens", "begin_suppress_tokens", "forced_bos_token_id", "forced_eos_token_id", "stop_strings"),
    *("min_length", "min_new_tokens", "exponential_decay_length_penalty"),
)
"""What else in a generation_config.json would change the tokens."""


@dataclass(frozen=True)
class TextProcessor:
    """Text to token ids and back, as one checkpoint has them.

    `tokenizer` is None where there is none. A text ends with any of `eos_token_ids`. `sampling` has all that `SAMPLING`
    has, or nothing where the checkpoint says nothing of it; `unsupported` is what it says that `generate` cannot do.
    `special_tokens` are by names such as `bos_token`.
    """

    tokenizer: Tokenizer | None = None
    eos_token_ids: tuple[int, ...] = ()
    pad_token_id: int = 0
    sampling: Mapping[str, Any] = field(default_factory=dict)
    unsupported: Mapping[str, Any] = field(default_factory=dict)
    chat_template: str | None = None
    special_tokens: Mapping[str, str] = field(default_factory=dict)

    def encode(self, text: str) -> list[int]:
        """The ids of a text, those that begin it included. Raises UnicodeEncodeError where it is none."""
        return self._encode(text, add_special_tokens=True)

    def encode_chat(self, messages: Sequence[Mapping[str, Any]]) -> list[int]:
        """The ids of messages, such as `{"role": "user", "content": "Hello"}`, up to where the model's answer begins.

        Raises:
            CheckpointError: there is no chat template.
            ValueError: it does not take the messages; UnicodeEncodeError where they are no text.
        """
        if self.chat_template is None:
            raise CheckpointError(
                "the checkpoint has no chat template; expected a chat_template.jinja, or one in tokenizer_config.json"
            )
        return self._encode(render_chat(self.chat_template, messages, self.special_tokens), add_special_tokens=False)

    def _encode(self, text: str, **options: bool) -> list[int]:
        text.encode()  # the tokenizer says less of what is no text
        if self.tokenizer is None:
            raise CheckpointError("the checkpoint has no tokenizer.json, so text cannot be read")
        return self.tokenizer.encode(text, **options).ids

    def decode(self, ids: Sequence[int], before: Sequence[int] = ()) -> str:
        """The text that these ids add to that of the ids `before` them; special tokens are left out.

        What an id stands for depends on those before it: decoders strip a text's first space, and join bytes.
        """
        if self.tokenizer is None:
            raise CheckpointError("the checkpoint has no tokenizer.json, so text cannot be written")
        whole, told = self.tokenizer.decode([*before, *ids]), self.tokenizer.decode(list(before))
        shared = itertools.takewhile(lambda pair: pair[0] == pair[1], zip(whole, told))
        return whole[len(list(shared)) :]


def load_text(path: str | os.PathLike[str]) -> TextProcessor:
    """What the files of a checkpoint directory say of text.

    Raises:
        CheckpointError: one of them cannot be read, or has a value that means nothing.
    """
    path = Path(path)
    tokenizer, tokens = load_tokenizer(path), special_tokens(path)
    files = [path / "generation_config.json", path / "config.json"]
    documents = {file: read_object(file) for file in files if file.is_file()}

    def token_ids(name: str) -> tuple[int, ...]:
        for file, document in documents.items():
            if name in document:
                return _token_ids(file, name, document[name])
        token = tokens.get(name.removesuffix("_id"))
        number = None if tokenizer is None or token is None else tokenizer.token_to_id(token)
        return () if number is None else (number,)

    eos = token_ids("eos_token_id")
    file, stated = next(iter(documents.items()), (path, {}))
    return TextProcessor(
        tokenizer=tokenizer,
        eos_token_ids=eos,
        pad_token_id=(*token_ids("pad_token_id"), *eos, 0)[0],
        sampling=_sampling(file, stated),
        unsupported={name: stated[name] for name in UNSUPPORTED if stated.get(name) not in (None, 0, 1, [], {})},
        chat_template=_chat_template(path),
        special_tokens=tokens,
    )


def _token_ids(file: Path, name: str, value: Any) -> tuple[int, ...]:
    """Those of a field that has one, several or none."""
    ids = [] if value is None else value if isinstance(value, list) else [value]
    if not all(type(number) is int and -(2**31) <= number < 2**31 for number in ids):
        raise CheckpointError(f"{file}: {name} is {reprlib.repr(value)}; expected a token id, or a list of them")
    return tuple(ids)


def _sampling(file: Path, stated: Mapping[str, Any]) -> dict[str, Any]:
    """What a file says of sampling, completed; nothing where it says nothing."""
    said = {name: stated[name] for name in SAMPLING if stated.get(name) is not None}
    sampling = SAMPLING | said if said else {}
    if not isinstance(sampling.get("do_sample", False), bool):
        raise CheckpointError(f"{file}: do_sample is {reprlib.repr(said['do_sample'])}; expected true or false")
    if sampling.get("do_sample"):  # or the others mean nothing
        try:
            Sampling(**sampling)
        except ValueError as error:
            raise CheckpointError(f"{file}: {error}") from error
    return sampling


def _chat_template(path: Path) -> str | None:
    file = path / "chat_template.jinja"
    if file.is_file():
        try:
            return file.read_text(encoding="utf-8")
        except UnicodeDecodeError as error:
            raise CheckpointError(f"{file} is not text in UTF-8 (byte {error.start}); copy it again") from error
    template = read_tokenizer_config(path).get("chat_template")
    if isinstance(template, list):  # of several, by name
        named = [one for one in template if isinstance(one, dict) and one.get("name") == "default"]
        template = named[0].get("template") if named else None
    if not isinstance(template, str | None):
        raise CheckpointError(f"{path}/tokenizer_config.json: chat_template is {reprlib.repr(template)}; expected text")
    return template
