"""A path that leads nowhere says where it looked and what to give instead."""

import pytest

from cluster.checkpoint import EMBEDDED, resolve_checkpoint
from cluster.errors import CheckpointError


def test_a_directory_with_a_config_is_taken(tmp_path):
    (tmp_path / "config.json").write_text("{}")
    assert resolve_checkpoint(str(tmp_path)) == tmp_path.resolve()


def test_a_directory_without_a_config(tmp_path):
    with pytest.raises(CheckpointError, match=r"config\.json"):
        resolve_checkpoint(str(tmp_path))


def test_a_file(tmp_path):
    file = tmp_path / "model.safetensors"
    file.touch()
    with pytest.raises(CheckpointError, match="is a file"):
        resolve_checkpoint(str(file))


@pytest.mark.parametrize("path", ["./no/such", "/no/such/directory", "nosuchname", "a/b/c"])
def test_nothing_there(path):
    with pytest.raises(CheckpointError, match="there is no directory"):
        resolve_checkpoint(path)


def test_a_hub_id_has_an_organisation():
    with pytest.raises(CheckpointError, match="form organisation/model"):
        resolve_checkpoint("gpt2")


@pytest.mark.parametrize("path", ["my models/llama", "models/-llama", "models/" + "x" * 100])
def test_what_cannot_be_a_hub_id(path):
    with pytest.raises(CheckpointError, match="neither a directory nor a Hub id: give a directory"):
        resolve_checkpoint(path)


def test_the_hub_out_of_reach(monkeypatch, tmp_path):
    """Offline, a Hub id ends in one sentence that names the cache and the files."""
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    with pytest.raises(CheckpointError, match=r"cannot be reached: missing config\.json"):
        resolve_checkpoint("nobody/no-such-model")


@pytest.mark.parametrize("name", EMBEDDED)
def test_embedded_models_are_there(name):
    assert {"config.json", "model.safetensors", "tokenizer.json"} <= {
        p.name for p in resolve_checkpoint(name).iterdir()
    }
