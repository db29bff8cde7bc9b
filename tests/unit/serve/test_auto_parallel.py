"""``parallel: auto``, on clusters of different devices."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from cluster.bench.shapes import shape_named
from cluster.core.devices import DEVICE_BYTES
from cluster.distributed.config import ParallelConfig
from cluster.errors import ConfigError
from cluster.serve.auto_parallel import decide_models, devices_for
from cluster.serve.config import ModelConfig
from cluster.serve.placement import Resources
from cluster.serve.ray_nodes import RayNode
from cluster.worker.config import WorkerConfig

AUTO = ParallelConfig(tp="auto", pp="auto")


def node(gpus: int = 0, *types: str, memory_bytes: int = 2**35) -> RayNode:
    return RayNode(resources=Resources(num_cpus=64, num_gpus=gpus), memory_bytes=memory_bytes, accelerator_types=types)


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model of 70 billion parameters, as far as anybody looks."""
    directory = tmp_path_factory.mktemp("large")
    config = shape_named("llama-3.1-70b").config
    (directory / "config.json").write_text(json.dumps(dict(config) | {"dtype": "bfloat16"}))
    return directory


def test_the_fewest_gpus_that_hold_the_model_and_why(checkpoint: Path):
    models = (
        ModelConfig(path="demo", parallel=ParallelConfig(tp=2)),
        ModelConfig(path=str(checkpoint), name="large", parallel=AUTO),
    )
    decided, reasons = decide_models(models, [node(8, "L40S")])
    assert decided[0] == models[0]
    assert decided[1].parallel.sizes == (4, 1)
    (reason,) = reasons
    assert reason.startswith("large: tp 4 x pp 1 holds the model") and "tp 1 x pp 3 does not" in reason


def test_what_is_given_stays_given(checkpoint: Path):
    model = ModelConfig(path=str(checkpoint), parallel=ParallelConfig(tp=2, pp="auto"))
    ((decided,), _) = decide_models((model,), [node(2, "L40S"), node(2, "L40S")])
    assert decided.parallel.sizes == (2, 2)


def test_a_model_that_fits_nothing_is_told_with_its_name(checkpoint: Path):
    with pytest.raises(ConfigError, match=r"model 'large': .*are missing"):
        decide_models((ModelConfig(path=str(checkpoint), name="large", parallel=AUTO),), [node(1, "L4")])


def test_devices_by_rays_names():
    model = ModelConfig(path="m", parallel=AUTO)
    nodes = [node(2, "A100", "A100-40G"), node(1, "H100"), node()]
    devices = devices_for(model, nodes)
    assert devices.nodes == ((DEVICE_BYTES["a100-40g"],) * 2, (DEVICE_BYTES["h100"],))
    chosen = devices_for(ModelConfig(path="m", parallel=AUTO, accelerator_type="H100"), nodes)
    assert chosen.nodes == ((DEVICE_BYTES["h100"],),)
    with pytest.raises(ConfigError, match="how much memory a GPU that Ray calls V100 has is not known"):
        devices_for(model, [node(1, "V100")])
    with pytest.raises(ConfigError, match="no node that the model could run on"):
        devices_for(ModelConfig(path="m", worker=WorkerConfig(device="cuda")), [node()])


def test_replicas_on_a_cpu_share_its_memory():
    devices = devices_for(ModelConfig(path="m", replicas=3), [node(memory_bytes=900), node(memory_bytes=600)])
    assert (devices.kind, devices.nodes) == ("cpu", ((450,), (300,)))
