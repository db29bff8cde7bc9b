"""``cluster serve``: a cluster on this machine, until Ctrl-C."""

from __future__ import annotations

import os
import select
import signal
import textwrap
from pathlib import Path
from types import FrameType
from typing import Annotated, Any, Literal

import typer
import yaml

from cluster.cli.options import Json
from cluster.cli.output import print_json, print_text
from cluster.cli.startup_display import StartupDisplay
from cluster.client import Client
from cluster.config import ClusterConfig, effective_config, load_config, parse_config
from cluster.core.request import SamplingParams
from cluster.errors import ConfigError
from cluster.gateway.security_config import AuthConfig
from cluster.observability.logging import configure_logging
from cluster.serve.app import Cluster
from cluster.serve.config import ModelConfig
from cluster.serve.local_ray import token_path

_CHECK_PERIOD_S = 2.0
_DEFAULT_MODEL = "demo"
_SELF_TEST_PROMPT = "def read_lines(path):\n    with open(path"
_SELF_TEST_TOKENS = 48


def serve(
    model: Annotated[
        str | None,
        typer.Argument(
            help="'demo' (the embedded model), a Hugging Face directory, or a Hub id.", show_default=_DEFAULT_MODEL
        ),
    ] = None,
    config: Annotated[
        Path | None, typer.Option("--config", "-c", metavar="FILE", help="The configuration tree, instead of MODEL.")
    ] = None,
    replicas: Annotated[int | None, typer.Option(min=1, help="Engines of each model.", show_default="1")] = None,
    tp: Annotated[
        str | None,
        typer.Option(metavar="N", help="Shards that hold a part of every layer each; or auto.", show_default="1"),
    ] = None,
    pp: Annotated[
        str | None,
        typer.Option(metavar="N", help="Pipeline stages that hold some of the layers each; or auto.", show_default="1"),
    ] = None,
    host: Annotated[str | None, typer.Option(help="Address to bind.", show_default="127.0.0.1")] = None,
    port: Annotated[
        int | None, typer.Option(min=0, max=65535, help="gRPC port; 0 takes a free one.", show_default="50051")
    ] = None,
    http_port: Annotated[
        int | None,
        typer.Option(min=0, max=65535, help="Port of OpenAI's API over HTTP; 0 takes a free one.", show_default="8000"),
    ] = None,
    insecure: Annotated[
        bool | None, typer.Option("--insecure", help="Listen off loopback without TLS.", show_default=False)
    ] = None,
    device: Annotated[
        Literal["auto", "cpu", "cuda"] | None, typer.Option(help="Where models run.", show_default="auto")
    ] = None,
    dtype: Annotated[
        Literal["auto", "float32", "bfloat16", "float16"] | None,
        typer.Option(help="Of activations.", show_default="auto"),
    ] = None,
    weights: Annotated[
        Literal["auto", "float32", "bfloat16", "int8", "int4"] | None,
        typer.Option(help="Number format of the weights; int8 and int4 are made on load.", show_default="auto"),
    ] = None,
    max_model_len: Annotated[
        int | None, typer.Option(min=1, help="Context limit in tokens.", show_default="the checkpoint's")
    ] = None,
    max_num_seqs: Annotated[int | None, typer.Option(min=1, help="Sequences in one batch.", show_default="64")] = None,
    kv_cache: Annotated[
        str | None,
        typer.Option("--kv-cache", metavar="SIZE", help="Memory for KV blocks, e.g. 512MiB.", show_default="by memory"),
    ] = None,
    dashboard: Annotated[
        bool | None, typer.Option("--dashboard/--no-dashboard", help="Ray's dashboard.", show_default="dashboard")
    ] = None,
    json: Json = False,
) -> None:
    """Serve models over gRPC and HTTP from here, until Ctrl-C. A second Ctrl-C does not wait for running requests."""
    if model is not None and config is not None:
        raise typer.BadParameter("give MODEL or --config, not both", param_hint="MODEL")
    tree = load_config(config) if config else ClusterConfig(models=(ModelConfig(path=model or _DEFAULT_MODEL),))
    tree = _override(
        tree,
        models={"replicas": replicas},
        parallel={"tp": tp, "pp": pp},
        worker={
            "device": device,
            "dtype": dtype,
            "weights": weights,
            "max_model_len": max_model_len,
            "kv_cache_bytes": kv_cache,
        },
        scheduler={"max_num_seqs": max_num_seqs},
        gateway={"host": host, "port": port, "http_port": http_port, "insecure": insecure},
        ray={"dashboard": dashboard},
    )
    configure_logging(tree.logging.level, tree.logging.format)
    signals = _Signals()
    with StartupDisplay() as display:
        cluster = Cluster(tree, on_progress=display.update)
        cluster.start()
    try:
        _announce(cluster, tree, json)
        _test_itself(cluster, tree, json)
        while not signals.wait(_CHECK_PERIOD_S):
            cluster.check()
    except KeyboardInterrupt:
        pass  # while it announced itself: it serves already, so this is an ordinary end
    finally:
        if signals.count:
            typer.echo("draining ... (Ctrl-C again ends it at once)", err=True)
        cluster.stop(hurry=lambda: signals.count > 1)


class _Signals:
    """Ctrl-C and SIGTERM: the first one interrupts or ends the wait, all later ones only count.

    Handlers touch no lock: they may run in the middle of anything on the main thread.
    """

    def __init__(self) -> None:
        self.count = 0
        self._waiting = False
        self._reader, self._writer = os.pipe2(os.O_CLOEXEC | os.O_NONBLOCK)
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, self._handle)

    def _handle(self, number: int, frame: FrameType | None) -> None:
        self.count += 1
        os.write(self._writer, b"!")
        if self.count == 1 and not self._waiting:
            raise KeyboardInterrupt

    def wait(self, timeout_s: float) -> bool:
        """Whether there was a signal, or came one in time."""
        self._waiting = True
        return bool(select.select([self._reader], [], [], timeout_s)[0])


def _override(
    tree: ClusterConfig,
    *,
    models: dict[str, Any],
    parallel: dict[str, Any],
    worker: dict[str, Any],
    scheduler: dict[str, Any],
    gateway: dict[str, Any],
    ray: dict[str, Any],
) -> ClusterConfig:
    """The tree with what the command line says, checked like any other; model options hold for every model."""
    raw = effective_config(tree)
    sections = [(raw["gateway"], gateway), (raw["ray"], ray)]
    for model in raw["models"]:
        sections += [(model, models), (model["parallel"], parallel), (model["worker"], worker)]
        sections += [(model["engine"]["scheduler"], scheduler)]
    for section, options in sections:
        section.update({name: value for name, value in options.items() if value is not None})
    try:
        return parse_config(raw)
    except ConfigError as error:
        raise typer.BadParameter(error.message) from None


def _announce(cluster: Cluster, tree: ClusterConfig, as_json: bool) -> None:
    """Addresses, models, configuration, capacity and dashboard."""
    if as_json:
        print_json(
            {
                "address": cluster.address,
                "http_urls": cluster.http_urls,
                "dashboard_url": cluster.dashboard_url,
                "replicas": cluster.replicas,
                "notes": cluster.notes,
                "config": effective_config(tree),
            }
        )
        return
    lines = [*(f"note       {note}" for note in cluster.notes), f"address    {cluster.address}"]
    lines += [f"openai     {url}/v1" for url in cluster.http_urls]
    for model in tree.models:
        facts = next(facts for facts in cluster.replicas if facts["model"] == model.name)
        capacity = sum(int(f["kv_capacity_tokens"]) for f in cluster.replicas if f["model"] == model.name)
        lines += [
            f"model      {model.name}: {facts['architecture']}, context {facts['max_model_len']:,} tokens",
            f"  runs on  {facts['device']} in {facts['dtype']}, {facts['backend']}{_shards(facts)}",
            f"  KV cache {capacity:,} tokens in {model.replicas} replica{'s' if model.replicas > 1 else ''}",
        ]
    if cluster.dashboard_url:
        lines.append(f"dashboard  {cluster.dashboard_url}  {_token_hint()}")
    settings = yaml.safe_dump(effective_config(tree), sort_keys=False, default_flow_style=None, width=100)
    lines += ["config", textwrap.indent(settings.rstrip(), "  ")]
    print_text("\n".join(lines) + "\n")


def _shards(facts: dict[str, str | int]) -> str:
    """How a replica is cut, where it is."""
    tp_size, pp_size = facts["tp_size"], facts["pp_size"]
    return "" if tp_size == pp_size == 1 else f", tp {tp_size} x pp {pp_size}"


def _token_hint() -> str:
    """How to pass Ray's token; never the token itself."""
    path = token_path()
    where = "$RAY_AUTH_TOKEN" if path is None else f"the content of {path}"
    return f"(it asks for a token: {where})"


def _test_itself(cluster: Cluster, tree: ClusterConfig, as_json: bool) -> None:
    """One prompt through the front door, streamed."""
    gateway = tree.gateway
    if gateway.tls is not None or gateway.auth != AuthConfig():
        reason = "no test of itself: it would take a caller's certificate or token"
        print_json({"skipped": reason}) if as_json else print_text(f"\nserving ({reason})    Ctrl-C ends it\n")
        return
    sampling = SamplingParams(max_tokens=_SELF_TEST_TOKENS, temperature=0.6, seed=2, stop=("\n\n",))
    with Client(cluster.address) as client:
        stream = client.stream(_SELF_TEST_PROMPT, sampling, model=tree.models[0].name)
        if as_json:
            print_json({"prompt": _SELF_TEST_PROMPT, "completion": "".join(chunk.text for chunk in stream)})
            return
        print_text(f"\n{_SELF_TEST_PROMPT}")
        for chunk in stream:
            print_text(chunk.text)
        print_text(f'\n\nserving; try: cluster generate "import " --address {cluster.address}    Ctrl-C ends it\n')
