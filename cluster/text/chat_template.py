"""A checkpoint's chat template, in a sandbox: it is code from a stranger."""

from __future__ import annotations

import json
from datetime import datetime
from pathlib import Path
from typing import Any, NoReturn

from jinja2 import TemplateError, nodes
from jinja2.exceptions import SecurityError
from jinja2.ext import Extension, loopcontrols
from jinja2.parser import Parser
from jinja2.sandbox import ImmutableSandboxedEnvironment

from cluster.errors import CheckpointError, InvalidRequest

# Far more than any context holds; a template that writes without end stops here.
_MAX_CHARS = 64 * 2**20


class _Environment(ImmutableSandboxedEnvironment):
    """The sandbox, without ways to fill the memory in one expression."""

    intercepted_binops = frozenset(["*", "**"])

    def call_binop(self, context: Any, operator: str, left: Any, right: Any) -> Any:
        if operator == "**":
            raise SecurityError("powers are not allowed")
        for value, times in ((left, right), (right, left)):
            if isinstance(value, str | list | tuple) and isinstance(times, int) and len(value) * times > _MAX_CHARS:
                raise SecurityError("the product would be too large")
        return super().call_binop(context, operator, left, right)


class _Generation(Extension):
    """``{% generation %}`` marks the assistant's part, for training; here it only encloses it."""

    tags = {"generation"}  # noqa: RUF012

    def parse(self, parser: Parser) -> nodes.Node:
        line = next(parser.stream).lineno
        return nodes.Scope(parser.parse_statements(("name:endgeneration",), drop_needle=True), lineno=line)


class ChatTemplate:
    """Messages to the text that the model was trained on.

    Args:
        source: Jinja2, as Hugging Face's ``apply_chat_template`` takes it.
        variables: what the template may name beside ``messages``: the special tokens.
    """

    def __init__(self, source: str, variables: dict[str, str]) -> None:
        environment = _Environment(trim_blocks=True, lstrip_blocks=True, extensions=[loopcontrols, _Generation])
        environment.filters["tojson"] = _to_json
        environment.globals["raise_exception"] = _raise
        environment.globals["strftime_now"] = lambda form: datetime.now().strftime(form)
        self._template = environment.from_string(source)
        # Templates test these with "is none": they must be defined.
        self._variables = {"tools": None, "documents": None} | variables

    @classmethod
    def from_checkpoint(cls, directory: Path, settings: dict[str, Any]) -> ChatTemplate | None:
        """From ``chat_template.jinja``, or ``chat_template`` in tokenizer_config.json; None where there is neither.

        Raises:
            CheckpointError: the template is no valid Jinja2.
        """
        file = directory / "chat_template.jinja"
        if file.is_file():
            source: object = file.read_text(encoding="utf-8")
        else:
            file, source = directory / "tokenizer_config.json", settings.get("chat_template")
        if isinstance(source, list):  # several, by name
            source = {entry.get("name"): entry.get("template") for entry in source}.get("default")
        if not isinstance(source, str):
            return None
        variables = {
            name: value if isinstance(value, str) else value["content"]
            for name, value in settings.items()
            if name.endswith("_token") and (isinstance(value, str) or (isinstance(value, dict) and "content" in value))
        }
        try:
            return cls(source, variables)
        except TemplateError as error:
            raise CheckpointError(f"{file}: the chat template is broken: {error}") from error

    def render(self, messages: list[dict[str, str]]) -> str:
        """The text up to where the assistant's answer begins.

        Raises:
            InvalidRequest: the template refuses the messages.
        """
        pieces: list[str] = []
        length = 0
        try:
            for piece in self._template.generate(messages=messages, add_generation_prompt=True, **self._variables):
                pieces.append(piece)
                if (length := length + len(piece)) > _MAX_CHARS:
                    raise InvalidRequest("the chat becomes too long a text", field="chat")
        except InvalidRequest:
            raise
        except Exception as error:  # a template may fail in every way that code can
            raise InvalidRequest(f"the model's chat template refuses these messages: {error}", field="chat") from error
        return "".join(pieces)


def _raise(message: str) -> NoReturn:
    raise TemplateError(message)


def _to_json(
    value: object,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    # Jinja2's own tojson escapes for HTML, which is not what a model was trained on.
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)
