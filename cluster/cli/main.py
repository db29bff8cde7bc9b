"""The ``cluster`` command: its subcommands, and what their failures look like outside."""

from __future__ import annotations

import os
import sys
from importlib import metadata
from typing import Annotated, Any, ClassVar

import typer

from cluster.cli.lazy_commands import Entry, LazyGroup
from cluster.errors import ClusterError, ServerUnreachable

EXIT_FAILED = 1
EXIT_UNREACHABLE = 3
EXIT_INTERRUPTED = 130


_COMMANDS = {
    "serve": Entry(module="cluster.cli.serve", function="serve", help="Serve models over gRPC on this machine."),
    "generate": Entry(module="cluster.cli.generate", function="generate", help="Continue a text."),
    "chat": Entry(module="cluster.cli.chat", function="chat", help="Talk with a model that has a chat template."),
    "models": Entry(module="cluster.cli.models", function="models", help="List the models that a server has."),
    "status": Entry(module="cluster.cli.status", function="status", help="Show a server's health and its replicas."),
    "api-key": Entry(module="cluster.cli.api_key", function="api_key", help="Draw an API key for a gateway."),
    "plan": Entry(module="cluster.cli.plan", function="plan", help="Say which devices hold a model."),
    "bench": Entry(module="cluster.cli.bench", function="app", help="Measure an engine here, or a server."),
}

_EPILOGUE = """\
[bold]Examples[/bold]
  cluster serve                             the embedded model, 127.0.0.1:50051
  cluster serve ~/models/Qwen3-0.6B         a Hugging Face directory
  cluster generate "import " --max-tokens 64 --temperature 0
  cat prompt.txt | cluster generate - --json
  cluster status --address 10.0.0.7:50051

[bold]Exit codes[/bold]
  0    done
  1    the server refused or failed, or is not healthy
  2    wrong usage
  3    no server answers at the address
  130  interrupted by Ctrl-C"""


class _ClusterGroup(LazyGroup):
    """The subcommands. Their errors become one line on standard error and an exit code."""

    TABLE: ClassVar = _COMMANDS

    def invoke(self, ctx: Any) -> Any:
        try:
            result = super().invoke(ctx)
            sys.stdout.flush()  # so that a reader who left is noticed here
            return result
        except ClusterError as error:
            typer.echo(f"error: {error}", err=True)
            raise typer.Exit(EXIT_UNREACHABLE if isinstance(error, ServerUnreachable) else EXIT_FAILED) from None
        except KeyboardInterrupt:
            raise typer.Exit(EXIT_INTERRUPTED) from None
        except BrokenPipeError:
            # As with ``| head``: the reader has what it wanted. Python flushes once more at exit, into nothing then.
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
            raise typer.Exit(0) from None


def _print_version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"cluster {metadata.version('llm-cluster')}")
        raise typer.Exit


app = typer.Typer(
    cls=_ClusterGroup,
    epilog=_EPILOGUE,
    rich_markup_mode="rich",
    add_completion=False,
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)


@app.callback()
def cluster(
    version: Annotated[
        bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Print the version and leave.")
    ] = False,
) -> None:
    """Serve large language models, and talk to them."""


def main() -> None:
    app(prog_name="cluster")
