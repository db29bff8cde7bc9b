"""What is found wrong before anything is started."""

from __future__ import annotations

import contextlib
import socket
from pathlib import Path

import pytest

from cluster.config import ClusterConfig
from cluster.errors import CheckpointError, ConfigError
from cluster.gateway.config import DEFAULT_HTTP_PORT, GatewayConfig
from cluster.serve.config import ModelConfig
from cluster.serve.preflight import check_checkpoint, check_machine, check_ports


def create_directory(path: Path, **files: str) -> Path:
    path.mkdir()
    for name, text in {"config.json": "{}", "tokenizer.json": "{}", "model.safetensors": "", **files}.items():
        (path / name).write_text(text)
    return path


def test_a_whole_checkpoint_passes(tmp_path: Path):
    directory = create_directory(tmp_path / "model")
    assert check_checkpoint(str(directory)) == directory


@pytest.mark.parametrize("name", ["tokenizer.json", "model.safetensors"])
def test_a_missing_file_is_named(tmp_path: Path, name: str):
    directory = create_directory(tmp_path / "model")
    (directory / name).unlink()
    with pytest.raises(CheckpointError, match=name.replace("model", "")):
        check_checkpoint(str(directory))


@pytest.mark.parametrize("name", ["config.json", "tokenizer.json"])
def test_a_broken_file_is_named(tmp_path: Path, name: str):
    directory = create_directory(tmp_path / "model", **{name: "{"})
    with pytest.raises(CheckpointError, match=f"{name} is not valid JSON"):
        check_checkpoint(str(directory))


def test_a_taken_port_is_named_and_a_free_one_passes():
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port = listener.getsockname()[1]
        with pytest.raises(ConfigError, match=f"127.0.0.1:{port}") as caught:
            check_ports(GatewayConfig(port=port))
        assert caught.value.field == "gateway.port"
    check_ports(GatewayConfig(port=port))


def test_a_taken_http_port_is_named_where_it_was_chosen():
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port = listener.getsockname()[1]
        with pytest.raises(ConfigError, match="--http-port") as caught:
            check_ports(GatewayConfig(port=0, http_port=port))
        assert caught.value.field == "gateway.http_port"
        check_ports(GatewayConfig(port=0, http_port=None))
    with contextlib.ExitStack() as taken:
        with contextlib.suppress(OSError):  # somebody else has it, which will do
            taken.enter_context(socket.create_server(("127.0.0.1", DEFAULT_HTTP_PORT)))
        check_ports(GatewayConfig(port=0))


@pytest.mark.parametrize("port", [50051, 0])
def test_an_address_of_another_machine_is_refused(port: int):
    with pytest.raises(ConfigError, match=rf"203\.0\.113\.1:{port}"):
        check_ports(GatewayConfig(host="203.0.113.1", port=port))


def test_the_stages_of_a_check_are_told(tmp_path: Path):
    directory = str(create_directory(tmp_path / "model"))
    models = tuple(
        ModelConfig(path=path, name=name) for path, name in ((directory, "a"), (directory, "b"), ("demo", "c"))
    )
    stages: list[str] = []
    check_machine(ClusterConfig(models=models, gateway=GatewayConfig(port=0)), stages.append)
    assert stages == [f"checking {directory}", "checking demo"]


def test_what_the_hub_has_to_send_is_told_before_it_is_fetched():
    class Stop(Exception):
        pass

    def stop(stage: str) -> None:
        raise Stop(stage)

    config = ClusterConfig(models=(ModelConfig(path="organisation/model"),), gateway=GatewayConfig(port=0))
    with pytest.raises(Stop, match=r"^downloading organisation/model$"):
        check_machine(config, stop)
