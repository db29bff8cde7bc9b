"""``cluster api-key`` makes keys that a gateway knows by its entry."""

from __future__ import annotations

import json
from pathlib import Path

import yaml
from typer.testing import CliRunner

from cluster.cli.main import app
from cluster.core.request import Priority
from cluster.gateway.caller import Caller
from cluster.gateway.callers_file import CallersFile


def run(*arguments: str) -> str:
    done = CliRunner().invoke(app, ["api-key", *arguments])
    assert done.exit_code == 0, done.output
    return done.output


def test_the_entry_goes_into_the_file_as_it_is(tmp_path: Path) -> None:
    path = tmp_path / "callers.yaml"
    output = run("batch", "--tenant", "research", "--max-priority", "P2", "--model", "a", "--model", "b", "--admin")
    key, _, rest = output.partition("\n")
    path.write_text(rest)
    assert key not in rest
    assert CallersFile(str(path)).by_key(key) == Caller(
        tenant="research", subject="batch", max_priority=Priority.P2, models=frozenset({"a", "b"}), admin=True
    )


def test_json_and_defaults(tmp_path: Path) -> None:
    path = tmp_path / "callers.yaml"
    first, second = json.loads(run("web", "--json")), json.loads(run("web", "--json"))
    assert first["key"] != second["key"]
    assert len(first["key"]) > 40
    path.write_text(yaml.safe_dump([first["caller"]]))
    assert CallersFile(str(path)).by_key(first["key"]) == Caller(tenant="web", subject="web")
    assert CallersFile(str(path)).by_key(second["key"]) is None
