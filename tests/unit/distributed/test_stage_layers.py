import json
from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import pytest

from cluster.core.group_memory import GRAPH_BYTES, num_graphs
from cluster.core.layer_split import StageTimes
from cluster.errors import CheckpointError, ConfigError
from cluster.worker.config import WorkerConfig
from cluster.worker.stage_layers import RankMeasure, choose_layers

HIDDEN, INNER, VOCABULARY = 256, 1024, 1000
LAYER_BYTES = 4 * (4 * HIDDEN * HIDDEN + 3 * HIDDEN * INNER)  # float32; norms and padding come on top
LLAMA = {
    "architectures": ["LlamaForCausalLM"],
    "num_hidden_layers": 12,
    "hidden_size": HIDDEN,
    "intermediate_size": INNER,
    "num_attention_heads": 4,
    "vocab_size": VOCABULARY,
    "max_position_embeddings": 64,
    "torch_dtype": "float32",
}


def create_measure(layer_s: float = 1.0, free_bytes: int = 2**34, device: str = "cpu", **times: float) -> RankMeasure:
    return RankMeasure(
        times=StageTimes(layer_s=layer_s, **times), device=device, device_bytes=2**35, free_bytes=free_bytes
    )


def choose(folder: Path, measures: list[RankMeasure], tp_size: int = 1, **options: object) -> list[int]:
    """Numbers of layers."""
    (folder / "config.json").write_text(json.dumps(LLAMA | options.pop("config", {})))
    layers = choose_layers(
        folder, WorkerConfig(**options), tp_size, measures, max_num_seqs=4, max_num_batched_tokens=64
    )
    assert layers[0][0] == 0
    assert all(left[1] == right[0] for left, right in pairwise(layers))
    return [end - first for first, end in layers]


def test_layers_follow_the_times(tmp_path):
    assert choose(tmp_path, [create_measure(1.0), create_measure(2.0)]) == [8, 4]
    assert choose(tmp_path, [create_measure(), create_measure(head_s=4.0)]) == [8, 4]


def test_a_stage_is_as_slow_as_its_slowest_shard(tmp_path):
    measures = [create_measure(1.0), create_measure(1.0), create_measure(1.0), create_measure(2.0)]
    assert choose(tmp_path, measures, tp_size=2) == [8, 4]


def test_ranks_of_one_machine_are_alike(tmp_path):
    slow, fast = create_measure(layer_s=3.0), create_measure(layer_s=1.0)
    assert choose(tmp_path, [slow, fast]) != choose(tmp_path, [fast, fast])
    shared = [replace(measure, machine="here") for measure in (slow, fast)]
    assert choose(tmp_path, shared) == choose(tmp_path, [fast, fast])


@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_a_stage_gets_no_more_than_its_memory_holds(tmp_path, device):
    reserve = 0 if device == "cpu" else num_graphs(4) * GRAPH_BYTES
    small = create_measure(0.1, free_bytes=int(5.5 * LAYER_BYTES) + 2**21 + reserve, device=device)
    assert choose(tmp_path, [small, create_measure(1.0, device=device)])[0] in (4, 5)


def test_the_smallest_device_of_a_stage_decides(tmp_path):
    small = create_measure(free_bytes=int(3.5 * LAYER_BYTES / 2) + 2**21)
    assert choose(tmp_path, [create_measure(), small, create_measure(), create_measure()], tp_size=2)[0] in (3, 4)


def test_a_share_of_a_gpu_is_all_that_is_taken(tmp_path):
    free = create_measure(device="cuda", free_bytes=2**35)
    with pytest.raises(ConfigError, match="memory"):
        choose(tmp_path, [free, free], gpu_memory_utilization=0.0001)


def test_room_is_kept_for_the_pool_that_was_asked_for(tmp_path):
    """Both have the same free; the pool takes half of it."""
    measures = [create_measure(0.1, free_bytes=12 * LAYER_BYTES + 2**22), create_measure(1.0)]
    all_but_one = choose(tmp_path, measures)
    assert all_but_one[0] >= 10
    assert choose(tmp_path, measures, kv_cache_bytes=6 * LAYER_BYTES)[0] <= 6


def test_a_context_that_fits_nowhere_does_not_stop_a_model_that_does(tmp_path):
    measures = [create_measure(free_bytes=8 * LAYER_BYTES)] * 2
    assert sum(choose(tmp_path, measures, config={"max_position_embeddings": 10**7})) == 12


def test_what_does_not_fit_is_said_before_anything_is_loaded(tmp_path):
    with pytest.raises(ConfigError, match="raise pp or tp"):
        choose(tmp_path, [create_measure(free_bytes=4 * LAYER_BYTES)] * 2)


def test_of_unknown_architectures_the_times_alone_count(tmp_path):
    measures = [create_measure(free_bytes=1), create_measure(free_bytes=1)]
    assert choose(tmp_path, measures, config={"architectures": ["NewForCausalLM"]}) == [6, 6]


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"num_hidden_layers": "12"}'])
def test_a_broken_configuration(tmp_path, text):
    (tmp_path / "config.json").write_text(text)
    with pytest.raises(CheckpointError, match=r"config\.json"):
        choose_layers(tmp_path, WorkerConfig(), 1, [create_measure()], max_num_seqs=1, max_num_batched_tokens=1)
