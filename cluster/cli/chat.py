"""``cluster chat``: a conversation in the terminal, or one turn per line of standard input."""

from __future__ import annotations

import contextlib
import sys
from typing import Annotated

import typer

from cluster.cli.connection import Connection, connects
from cluster.cli.options import Deadline, MaxTokens, Model, Progress, Seed, Temperature, TopK, TopP, sampling_of
from cluster.cli.output import print_chunk, print_text
from cluster.client import Client
from cluster.client.channel import DEFAULT_DEADLINE_S
from cluster.client.requests import GenerateOptions
from cluster.core.request import SamplingParams
from cluster.errors import ClusterError, InvalidRequest

HELP = "/reset forgets the conversation, /exit or Ctrl-D leaves, Ctrl-C stops an answer."


@connects
def chat(
    connection: Connection,
    model: Model = "",
    system: Annotated[str, typer.Option("--system", help="A system message that opens the conversation.")] = "",
    max_tokens: MaxTokens = None,
    temperature: Temperature = 1.0,
    top_p: TopP = 1.0,
    top_k: TopK = 0,
    seed: Seed = None,
    deadline: Deadline = DEFAULT_DEADLINE_S,
    progress: Progress = False,
    as_json: Annotated[bool, typer.Option("--json", help="One JSON object per chunk.")] = False,
) -> None:
    """Talk with a model that has a chat template. Lines piped in are answered one after the other."""
    sampling = sampling_of(max_tokens=max_tokens, temperature=temperature, top_p=top_p, top_k=top_k, seed=seed)
    with connection.client() as client:
        _check_template(client, model)
        conversation = Conversation(
            client,
            sampling,
            {"model": model, "deadline_s": deadline, "progress": progress},
            system=system,
            as_json=as_json,
        )
        if sys.stdin.isatty():
            _talk(conversation, marker="" if as_json else "> ")
        else:
            for line in sys.stdin:
                if not _obey(conversation, line.strip()):
                    break


class Conversation:
    """The messages so far; an answer that came only in part stays, a turn without any answer does not."""

    def __init__(
        self, client: Client, sampling: SamplingParams, options: GenerateOptions, *, system: str, as_json: bool
    ) -> None:
        self._client = client
        self._sampling = sampling
        self._options = options
        self._as_json = as_json
        self._opening = [{"role": "system", "content": system}] if system else []
        self.messages = list(self._opening)

    def reset(self) -> None:
        self.messages = list(self._opening)

    def answer(self, text: str) -> None:
        """Prints the answer to ``text`` as it comes.

        Raises:
            ClusterError, KeyboardInterrupt: the answer ended early; at the server, too.
        """
        turn = [*self.messages, {"role": "user", "content": text}]
        parts: list[str] = []
        try:
            with self._client.stream_chat(turn, self._sampling, **self._options) as chunks:
                for chunk in chunks:
                    parts.append(chunk.text)
                    print_chunk(chunk, as_json=self._as_json)
        finally:
            if any(parts):
                self.messages = [*turn, {"role": "assistant", "content": "".join(parts)}]
                if not self._as_json:
                    print_text("\n")


def _check_template(client: Client, model: str) -> None:
    """Fails now, not after the first line typed, where the server cannot chat with this model."""
    try:
        client.count_tokens(messages=[{"role": "user", "content": "Hello"}], model=model)
    except InvalidRequest as error:
        raise InvalidRequest(f"{error} (`cluster generate` continues plain text)", field=error.field) from None


def _obey(conversation: Conversation, line: str) -> bool:
    """Does what a line says; False to leave."""
    if line == "/exit":
        return False
    if line == "/reset":
        conversation.reset()
    elif line.startswith("/"):
        typer.echo(f"no such command: {line}. {HELP}", err=True)
    elif line:
        conversation.answer(line)
    return True


def _talk(conversation: Conversation, *, marker: str) -> None:
    """Reads lines from a terminal. ``input`` writes the marker to standard output: among JSON there is to be none."""
    with contextlib.suppress(ImportError):
        import readline  # noqa: F401  (gives input() its line editing and history)
    typer.echo(HELP, err=True)
    going_on = True
    while going_on:
        try:
            line = input(marker).strip()
        except EOFError:
            typer.echo(err=True)
            return
        except KeyboardInterrupt:
            typer.echo(f"\n{HELP}", err=True)
            continue
        try:
            going_on = _obey(conversation, line)
        except KeyboardInterrupt:
            typer.echo("(stopped)", err=True)
        except ClusterError as error:
            typer.echo(f"error: {error}", err=True)
