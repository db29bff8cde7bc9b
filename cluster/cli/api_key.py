"""``cluster api-key``: a new API key, and what makes a gateway know it."""

from __future__ import annotations

import secrets
from typing import Annotated, Any, Literal

import typer
import yaml

from cluster.cli.options import Json
from cluster.cli.output import print_json, print_text
from cluster.gateway.callers_file import hash_api_key

_PREFIX = "ck_"  # so that scanners for leaked secrets can know one
_KEY_BYTES = 32


def api_key(
    subject: Annotated[str, typer.Argument(help="Who will have it, for logs.")],
    tenant: Annotated[str | None, typer.Option(help="On whose account.", show_default="SUBJECT")] = None,
    max_priority: Annotated[
        Literal["P0", "P1", "P2", "P3"] | None, typer.Option(help="The most urgent class.", show_default="P0")
    ] = None,
    model: Annotated[
        list[str] | None, typer.Option(help="That it may use; may be repeated.", show_default="all")
    ] = None,
    admin: Annotated[bool, typer.Option("--admin", help="May use the AdminService.")] = False,
    as_json: Json = False,
) -> None:
    """Draw an API key. It is shown once; the gateway's gateway.auth.callers_file gets its hash, a list's item."""
    key = _PREFIX + secrets.token_urlsafe(_KEY_BYTES)
    entry: dict[str, Any] = {"subject": subject, "key_sha256": hash_api_key(key)}
    if tenant is not None:
        entry["tenant"] = tenant
    if max_priority is not None:
        entry["max_priority"] = max_priority
    if model:
        entry["models"] = model
    if admin:
        entry["admin"] = True
    if as_json:
        print_json({"key": key, "caller": entry})
        return
    print_text(f"{key}\n\n# for gateway.auth.callers_file, which is read again when it changes\n")
    print_text(yaml.safe_dump([entry], sort_keys=False))
