"""The byte arithmetic against counts that are known, and the choice of a group against what it must hold."""

import itertools

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cluster.core.devices import DEVICE_BYTES, Devices
from cluster.core.group_memory import GroupMemory, Workload
from cluster.core.memory_plan import GB, choose_group, smallest_group
from cluster.core.model_shape import ModelShape
from cluster.core.number_formats import NumberFormats
from cluster.errors import CheckpointError, ConfigError, Unsupported

LLAMA_8B = {
    "architectures": ["LlamaForCausalLM"],
    "dtype": "bfloat16",
    "vocab_size": 128_256,
    "hidden_size": 4096,
    "intermediate_size": 14_336,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "max_position_embeddings": 131_072,
}
LLAMA_70B = LLAMA_8B | {
    "hidden_size": 8192,
    "intermediate_size": 28_672,
    "num_hidden_layers": 80,
    "num_attention_heads": 64,
}
QWEN_HALF_B = {
    "architectures": ["Qwen2ForCausalLM"],
    "torch_dtype": "bfloat16",
    "vocab_size": 151_936,
    "hidden_size": 896,
    "intermediate_size": 4864,
    "num_hidden_layers": 24,
    "num_attention_heads": 14,
    "num_key_value_heads": 2,
    "max_position_embeddings": 32_768,
    "tie_word_embeddings": True,
}
QWEN3_8B = {
    "architectures": ["Qwen3ForCausalLM"],
    "dtype": "bfloat16",
    "vocab_size": 151_936,
    "hidden_size": 4096,
    "intermediate_size": 12_288,
    "num_hidden_layers": 36,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "head_dim": 128,
    "max_position_embeddings": 40_960,
}
QWEN3_30B_A3B = {
    "architectures": ["Qwen3MoeForCausalLM"],
    "dtype": "bfloat16",
    "vocab_size": 151_936,
    "hidden_size": 2048,
    "intermediate_size": 6144,
    "moe_intermediate_size": 768,
    "num_experts": 128,
    "num_experts_per_tok": 8,
    "decoder_sparse_step": 1,
    "mlp_only_layers": [],
    "num_hidden_layers": 48,
    "num_attention_heads": 32,
    "num_key_value_heads": 4,
    "head_dim": 128,
    "max_position_embeddings": 40_960,
}
MIXTRAL = {
    "architectures": ["MixtralForCausalLM"],
    "dtype": "bfloat16",
    "vocab_size": 32_000,
    "hidden_size": 4096,
    "intermediate_size": 14_336,
    "num_local_experts": 8,
    "num_experts_per_tok": 2,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "max_position_embeddings": 32_768,
}


def create_devices(gigabytes: float, *, nodes: int = 1, per_node: int = 8, **options) -> Devices:
    return Devices(kind="cuda", nodes=((int(gigabytes * GB),) * per_node,) * nodes, **options)


def create_memory(config=LLAMA_8B, *, device="cuda", weights="auto", kv="auto", **workload) -> GroupMemory:
    shape = ModelShape.from_config(config)
    formats = NumberFormats.choose(device, shape.dtype, weights=weights, kv_cache_dtype=kv)
    return GroupMemory(shape, formats, Workload(**({"context": 4096} | workload)))


# Published counts: of the models' cards, to the last digit those of transformers' own classes.
@pytest.mark.parametrize(
    ("config", "num_parameters"),
    [
        (LLAMA_8B, 8_030_261_248),
        (LLAMA_70B, 70_553_706_496),
        (QWEN_HALF_B, 494_032_768),
        (QWEN3_8B, 8_190_735_360),
        (QWEN3_30B_A3B, 30_532_122_624),
        (MIXTRAL, 46_702_792_704),
    ],
)
def test_parameters_are_those_of_the_published_models(config, num_parameters):
    assert ModelShape.from_config(config).num_parameters == num_parameters


def test_weights_of_one_device_are_the_parameters_in_their_format():
    plan = choose_group(LLAMA_8B, create_devices(80))
    assert (plan.tp_size, plan.pp_size) == (1, 1)
    assert plan.stages[0].weight_bytes == 2 * 8_030_261_248
    # A scale per output: 4 bytes of each row, and the embedding's.
    int8 = choose_group(LLAMA_8B, create_devices(80), weights="int8").stages[0].weight_bytes
    rows = 32 * (4096 + 2 * 1024 + 4096 + 2 * 14_336 + 4096) + 2 * 128_256
    norms = 65 * 4096
    assert int8 == (8_030_261_248 - norms) + 4 * rows + 2 * norms


def test_the_kv_cache_of_a_token_is_its_keys_and_values():
    # 2 x 32 layers x 8 heads x 128 numbers of 2 bytes: the 128 KiB of Llama 3.1 8B.
    assert create_memory().stages(create_devices(80), 1, 1)[0].kv_token_bytes == 128 * 2**10
    assert create_memory(kv="float32").stages(create_devices(80), 1, 1)[0].kv_token_bytes == 256 * 2**10


@pytest.mark.parametrize(("tp_size", "heads"), [(1, 8), (2, 4), (8, 1), (16, 1), (32, 1)])
def test_key_value_heads_are_repeated_where_there_are_more_shards(tp_size, heads):
    shape = ModelShape.from_config(LLAMA_8B)
    assert shape.obstacle_to_tp(tp_size) == ""
    assert shape.kv_heads_of(tp_size) == heads
    qkv = shape.layer(tp_size).matrices[0]
    assert qkv.out_features == (32 // tp_size + 2 * heads) * 128


@pytest.mark.parametrize("tp_size", [3, 5, 64])
def test_heads_stay_whole(tp_size):
    assert str(tp_size) in ModelShape.from_config(LLAMA_8B).obstacle_to_tp(tp_size)
    assert "key-value" in ModelShape.from_config(
        LLAMA_8B | {"num_key_value_heads": 4, "num_attention_heads": 24}
    ).obstacle_to_tp(6)


@pytest.mark.parametrize("config", [LLAMA_8B, QWEN_HALF_B, QWEN3_30B_A3B])
@pytest.mark.parametrize("tp_size", [1, 2])
@pytest.mark.parametrize("pp_size", [2, 3, 5])
def test_stages_together_hold_every_layer_once_and_tied_weights_twice(config, tp_size, pp_size):
    memory = create_memory(config)
    shape = memory.shape
    stages = memory.stages(create_devices(80, nodes=2), tp_size, pp_size)
    bounds = [stage.layers for stage in stages]
    assert bounds[0][0] == 0 and bounds[-1][1] == shape.num_layers
    assert all(before[1] == after[0] for before, after in itertools.pairwise(bounds))
    assert all(first < last for first, last in bounds)
    vocabulary = 2 * shape.vocabulary(tp_size).num_parameters
    layers = 2 * shape.num_layers * shape.layer(tp_size).num_parameters
    assert sum(stage.weight_bytes for stage in stages) == layers + 2 * vocabulary + 2 * shape.hidden_size


def test_the_ends_of_a_pipeline_get_fewer_layers_where_the_vocabulary_is_large():
    stages = create_memory(LLAMA_70B).stages(create_devices(24), 1, 7)
    counts = [last - first for first, last in (stage.layers for stage in stages)]
    assert sum(counts) == 80
    assert max(counts[0], counts[-1]) < min(counts[1:-1])


@settings(max_examples=60, deadline=None)
@given(
    room=st.lists(st.integers(20, 90), min_size=1, max_size=4),
    context=st.sampled_from([256, 4096, 32_768]),
    batch=st.integers(1, 8),
    weights=st.sampled_from(["auto", "int8", "int4"]),
)
def test_a_plan_fits_and_holds_what_was_asked_for(room, context, batch, weights):
    devices = Devices(kind="cuda", nodes=tuple((size * GB,) * 2 for size in room))
    memory = create_memory(weights=weights, context=context, num_contexts=batch)
    try:
        plan = smallest_group(memory.shape, devices, memory.formats, memory.workload)
    except ConfigError:
        for tp_size, pp_size in itertools.product((1, 2), range(1, 2 * len(room) + 1)):
            if devices.stages(tp_size, pp_size):
                assert min(stage.free_bytes for stage in memory.stages(devices, tp_size, pp_size)) < 0
        return
    assert plan.kv_tokens >= context * batch
    for stage in plan.stages:
        used = stage.weight_bytes + stage.activation_bytes + stage.kv_cache_bytes
        assert used <= stage.usable_bytes <= 0.9 * stage.device_bytes
        assert stage.usable_bytes + stage.reserve_bytes <= stage.device_bytes
    for group in plan.rejected:
        assert group.tp_size * group.pp_size <= plan.tp_size * plan.pp_size


def test_one_device_is_taken_where_it_is_enough():
    plan = choose_group(LLAMA_8B, create_devices(24))
    assert (plan.tp_size, plan.pp_size, plan.rejected) == (1, 1, ())


def test_a_node_is_cut_by_layers_parts_before_stages():
    plan = choose_group(LLAMA_70B, create_devices(141))
    assert (plan.tp_size, plan.pp_size) == (2, 1)
    [alone] = plan.rejected
    assert (alone.tp_size, alone.pp_size) == (1, 1)
    assert alone.why.startswith("each device would hold 144.1 GB (141.1 GB weights")
    assert "126.9 GB of its 141.0 GB are usable: 17.2 GB are missing" in alone.why
    assert alone.missing_bytes == pytest.approx(17.2e9, rel=0.01)
    assert "tp 1 x pp 1 does not" in plan.reason


def test_nodes_of_one_device_are_stages_of_a_pipeline():
    plan = choose_group(LLAMA_70B, create_devices(141, nodes=4, per_node=1))
    assert (plan.tp_size, plan.pp_size) == (1, 2)


def test_stages_are_cut_where_a_node_is_too_small():
    plan = choose_group(LLAMA_70B, create_devices(24, nodes=4, per_node=2), tp=2)
    assert (plan.tp_size, plan.pp_size, len(plan.stages)) == (2, 4, 4)


def test_a_number_leaves_no_choice():
    assert choose_group(LLAMA_8B, create_devices(80), tp=4).tp_size == 4
    assert choose_group(LLAMA_8B, create_devices(80), pp=3).pp_size == 3
    both = choose_group(LLAMA_8B, create_devices(80), tp=2, pp=2)
    assert (both.tp_size, both.pp_size) == (2, 2)


def test_the_smallest_device_of_a_stage_counts():
    devices = Devices(kind="cuda", nodes=((80 * GB, 24 * GB), (24 * GB, 80 * GB)))
    assert devices.stages(2, 2) == (24 * GB, 24 * GB)
    assert devices.stages(1, 3) == (80 * GB, 80 * GB, 24 * GB)
    assert devices.stages(3, 1) == devices.stages(1, 5) == ()


def test_larger_devices_get_more_layers():
    memory = create_memory(LLAMA_70B)
    first, second = memory.stages(Devices(kind="cuda", nodes=((141 * GB,), (80 * GB,))), 1, 2)
    assert first.layers[1] - first.layers[0] > second.layers[1] - second.layers[0]
    assert min(first.free_bytes, second.free_bytes) > 0


def test_what_cuda_keeps_comes_out_of_the_rest_of_the_device():
    memory = create_memory()
    [stage] = memory.stages(create_devices(80), 1, 1)
    assert stage.usable_bytes == 72 * GB
    [full] = memory.stages(create_devices(80, utilization=1.0), 1, 1)
    assert full.usable_bytes == 80 * GB - full.reserve_bytes
    [cut] = memory.stages(create_devices(80), 2, 1)
    assert cut.reserve_bytes > stage.reserve_bytes  # by a communicator


def test_a_pool_of_a_given_size_is_taken_as_it_is():
    plan = choose_group(LLAMA_8B, create_devices(24), kv_cache_bytes=2**30)
    assert (plan.stages[0].kv_cache_bytes, plan.kv_tokens) == (2**30, 8192)
    with pytest.raises(ConfigError, match="missing"):
        choose_group(LLAMA_8B, create_devices(24, per_node=1), kv_cache_bytes=8 * 2**30)


def test_the_context_that_is_configured_must_find_room():
    assert choose_group(LLAMA_8B, create_devices(24, per_node=4)).tp_size == 1
    longer = choose_group(LLAMA_8B, create_devices(24, per_node=4), max_model_len=131_072)
    assert longer.tp_size == 2 and longer.kv_tokens >= 131_072


def test_nothing_fits_says_what_is_missing_and_what_helps():
    with pytest.raises(ConfigError) as caught:
        choose_group(LLAMA_70B, create_devices(24, per_node=4))
    message = caught.value.message
    assert caught.value.field == "parallel"
    assert message.startswith("no group of 4 devices on 1 node holds the model; nearest is tp 4 x pp 1: ")
    assert "14.5 GB are missing" in message
    assert "int8 weights, as tp 4 x pp 1" in message
    assert "7 devices of 24.0 GB, as tp 1 x pp 7" in message


def test_a_shorter_context_is_said_to_help_where_it_does():
    with pytest.raises(ConfigError, match=r"a context of at most ([\d,]+) tokens") as caught:
        choose_group(LLAMA_8B, create_devices(24, per_node=1), max_model_len=131_072)
    context = int(caught.value.message.partition("a context of at most ")[2].partition(" ")[0].replace(",", ""))
    assert choose_group(LLAMA_8B, create_devices(24, per_node=1), max_model_len=context).kv_tokens >= context
    with pytest.raises(ConfigError):
        choose_group(LLAMA_8B, create_devices(24, per_node=1), max_model_len=context + 512)


def test_a_group_that_cannot_be_made_says_why():
    with pytest.raises(ConfigError, match=r"tp 3 x pp 1: 3 does not divide the 32 query heads"):
        choose_group(LLAMA_8B, create_devices(80), tp=3, pp=1)
    with pytest.raises(ConfigError, match="shards of a stage share a node"):
        choose_group(LLAMA_8B, create_devices(80, nodes=4, per_node=1), tp=2)
    with pytest.raises(ConfigError, match="33 stages are more than its 32 layers"):
        choose_group(LLAMA_8B, create_devices(80, nodes=5), tp=1, pp=33)


def test_a_cpu_is_one_shard_unless_its_memory_is_too_small():
    # float16 KV beside bfloat16 weights, as the C kernels hold them.
    plan = choose_group(LLAMA_8B, Devices(kind="cpu", nodes=((24 * GB,),)))
    assert (plan.tp_size, plan.pp_size) == (1, 1)
    assert plan.stages[0].reserve_bytes == 0 and plan.stages[0].usable_bytes == 24 * GB
    two = choose_group(LLAMA_8B, Devices(kind="cpu", nodes=((14 * GB,),) * 3))
    assert (two.tp_size, two.pp_size) == (1, 2)
    with pytest.raises(ConfigError, match=r"int8 weights, as tp 1 x pp 1; 2 devices of 14\.0 GB"):
        choose_group(LLAMA_8B, Devices(kind="cpu", nodes=((14 * GB,),)))


def test_shards_of_a_cpu_share_its_memory():
    machine = Devices(kind="cpu", nodes=((24 * GB,),))
    assert machine.stages(2, 1) == (12 * GB,)
    assert machine.stages(2, 2) == (6 * GB, 6 * GB)
    assert Devices(kind="cpu", nodes=((24 * GB,), (24 * GB,))).stages(1, 3) == (12 * GB, 12 * GB, 24 * GB)


@pytest.mark.parametrize("config", [MIXTRAL, {"architectures": ["GPT2LMHeadModel"]}])
def test_a_model_of_transformers_code_is_one_shard(config):
    plan = choose_group(config, create_devices(80))
    assert (plan.tp_size, plan.pp_size, plan.stages) == (1, 1, ())
    assert config["architectures"][0] in plan.reason
    assert choose_group(LLAMA_70B, create_devices(24), model_impl="transformers").pp_size == 1


def test_experts_are_planned_for_all_the_same():
    memory = create_memory(QWEN3_30B_A3B)
    plan = smallest_group(memory.shape, create_devices(24), memory.formats, memory.workload)
    assert plan.tp_size * plan.pp_size > 1
    one = memory.stages(create_devices(80), 1, 1)[0].weight_bytes
    assert one == 2 * 30_532_122_624


@pytest.mark.parametrize(
    ("change", "error", "said"),
    [
        ({"architectures": ["GPT2LMHeadModel"]}, Unsupported, "GPT2LMHeadModel"),
        ({"architectures": None}, CheckpointError, "architectures"),
        ({"hidden_size": None}, CheckpointError, "hidden_size is missing"),
        ({"num_hidden_layers": "3"}, CheckpointError, "num_hidden_layers is '3'"),
        ({"num_key_value_heads": 5}, CheckpointError, "num_key_value_heads is 5"),
        ({"dtype": "int7"}, CheckpointError, "int7"),
    ],
)
def test_a_configuration_that_cannot_be_is_refused(change, error, said):
    with pytest.raises(error, match=said):
        ModelShape.from_config(LLAMA_8B | change, source="x/config.json")


def test_formats_that_a_cpu_does_not_hold_are_refused():
    with pytest.raises(ConfigError, match="float16"):
        NumberFormats.choose("cpu", "float32", weights="float16")


def test_devices_have_the_memory_of_their_names():
    # 24 GB cards give a little less than that, the others more.
    assert 23.4 * GB < DEVICE_BYTES["l4"] < 24 * GB
    assert 80 * GB < DEVICE_BYTES["h100"] < 86 * GB
    assert 141 * GB < DEVICE_BYTES["h200"] < 151 * GB
