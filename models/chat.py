"""Chat templates: messages as the text that a model was trained on.

They are programs in Jinja, run in its sandbox, with the settings and the names that transformers gives them.
"""

import functools
import json
from collections.abc import Mapping, Sequence
from datetime import datetime
from typing import Any, NoReturn

import jinja2
from jinja2 import nodes
from jinja2.ext import Extension
from jinja2.parser import Parser
from jinja2.sandbox import ImmutableSandboxedEnvironment


def render_chat(template: str, messages: Sequence[Mapping[str, Any]], special_tokens: Mapping[str, str]) -> str:
    """The text of messages, such as `{"role": "user", "content": "Hello"}`, up to where the model's answer begins.

    `special_tokens` are what the template may call `bos_token`, `eos_token`, ...

    Raises:
        ValueError: a template that cannot be read, or messages that it does not take; the message says why.
    """
    given = [{name: value for name, value in message.items() if value is not None} for message in messages]
    try:
        return _compiled(template).render(messages=given, add_generation_prompt=True, **special_tokens)
    except Exception as error:  # a template can raise anything, with a message of its own for what it does not take
        raise ValueError(f"the chat template does not take the messages ({error or type(error).__name__})") from error


class _GenerationTag(Extension):
    """`{% generation %}`, which marks what the model says, for training; here it is what is in it."""

    tags = {"generation"}  # noqa: RUF012

    def parse(self, parser: Parser) -> list[nodes.Node]:
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


@functools.lru_cache(maxsize=8)
def _compiled(template: str) -> jinja2.Template:
    extensions = ["jinja2.ext.loopcontrols", _GenerationTag]
    environment = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True, extensions=extensions)
    environment.filters["tojson"] = _to_json  # Jinja's own is for HTML
    environment.globals |= {
        "raise_exception": _raise,
        "strftime_now": lambda form: datetime.now().strftime(form),
        "tools": None,
        "documents": None,
    }
    return environment.from_string(template)


def _to_json(value: Any, **options: Any) -> str:
    return json.dumps(value, **{"ensure_ascii": False, **options})


def _raise(message: str) -> NoReturn:
    raise jinja2.TemplateError(message)
