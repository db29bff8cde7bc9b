"""A checkpoint's chat template, in a sandbox: it is code from a stranger."""

from __future__ import annotations

import json
from datetime import datetime
from pathlib import Path
from typing import Any, NoReturn

from jinja2 import TemplateError
from jinja2.ext import loopcontrols
from jinja2.sandbox import ImmutableSandboxedEnvironment

from cluster.errors import CheckpointError, InvalidRequest

# Far more than any context holds; a template that writes without end stops here.
_MAX_CHARS = 64 * 2**20


class ChatTemplate:
    """Messages to the text that the model was trained on.

    Args:
        source: Jinja2, as Hugging Face's ``apply_chat_template`` takes it.
        variables: what the template may name beside ``messages``: the special tokens.
    """

    def __init__(self, source: str, variables: dict[str, str]) -> None:
        environment = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True, extensions=[loopcontrols])
        environment.filters["tojson"] = _to_json
        environment.globals["raise_exception"] = _raise
        environment.globals["strftime_now"] = lambda form: datetime.now().strftime(form)
        self._template = environment.from_string(source)
        self._variables = variables

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
        except (TemplateError, TypeError, ValueError, OverflowError, MemoryError) as error:
            if isinstance(error, InvalidRequest):
                raise
            raise InvalidRequest(f"the model's chat template refuses these messages: {error}", field="chat") from error
        return "".join(pieces)


def _raise(message: str) -> NoReturn:
    raise TemplateError(message)


def _to_json(value: object, indent: int | None = None, **options: Any) -> str:
    # Jinja2's own tojson escapes for HTML, which is not what a model was trained on.
    return json.dumps(value, ensure_ascii=False, indent=indent, **options)
