"""Our models against transformers in float32, with the C kernels, with torch's and where there is one on a CUDA device:
the same greedy tokens, the same log probabilities."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from checkpoints import create_checkpoint
from parity_runs import create_engine, create_prompts, distance, run_engine, run_transformers
from safetensors.torch import load_file, save_file

from cluster.kernels.cpu.library import library

CUDA = pytest.param(
    "cuda", marks=[pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]
)
COMPILED = pytest.param("cpu", marks=pytest.mark.skipif(library() is None, reason="the CPU kernels are not compiled"))
PLATFORMS = {"cpu": {"device": "cpu"}, "torch": {"device": "cpu", "kernels": "torch"}, "cuda": {"device": "cuda"}}
LINEAR = {"rope_type": "linear", "rope_theta": 1e4, "factor": 3.0}
LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 500.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}
YARN = {"rope_type": "yarn", "rope_theta": 1000.0, "factor": 4.0, "original_max_position_embeddings": 64}
VARIANTS: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("LlamaForCausalLM", {}),
    "llama-tied": ("LlamaForCausalLM", {"tie_word_embeddings": True}),
    "llama-biases": ("LlamaForCausalLM", {"attention_bias": True, "mlp_bias": True}),
    "llama-head-dim": ("LlamaForCausalLM", {"head_dim": 24}),
    "llama-mqa": ("LlamaForCausalLM", {"num_key_value_heads": 1}),
    "llama-mha": ("LlamaForCausalLM", {"num_key_value_heads": 4}),
    "llama-gqa-3": ("LlamaForCausalLM", {"hidden_size": 96, "num_attention_heads": 6}),
    "llama-rope-linear": ("LlamaForCausalLM", {"rope_parameters": LINEAR}),
    "llama-rope-llama3": ("LlamaForCausalLM", {"rope_parameters": LLAMA3}),
    "llama-rope-yarn": ("LlamaForCausalLM", {"rope_parameters": YARN}),
    "llama-rope-yarn-options": (
        "LlamaForCausalLM",
        {"rope_parameters": YARN | {"attention_factor": 1.3, "beta_fast": 16.0, "beta_slow": 2.0, "truncate": False}},
    ),
    "llama-rope-yarn-mscale": ("LlamaForCausalLM", {"rope_parameters": YARN | {"mscale": 0.7, "mscale_all_dim": 1.0}}),
    "llama-sharded": ("LlamaForCausalLM", {"max_shard_size": "50KB"}),
    "mistral-window": ("MistralForCausalLM", {"sliding_window": 13}),
    "mistral-no-window": ("MistralForCausalLM", {"sliding_window": None}),
    "qwen2": ("Qwen2ForCausalLM", {}),
    "qwen2-upper-window": (
        "Qwen2ForCausalLM", {"use_sliding_window": True, "sliding_window": 9, "max_window_layers": 1}
    ),
    "qwen3": ("Qwen3ForCausalLM", {"head_dim": 32}),
    "qwen3-layer-types": (
        "Qwen3ForCausalLM",
        {
            "head_dim": 16,
            "use_sliding_window": True,
            "sliding_window": 20,
            "layer_types": ["sliding_attention", "full_attention", "sliding_attention"],
        },
    ),
}  # fmt: skip


@pytest.mark.parametrize("platform", [COMPILED, "torch", CUDA])
@pytest.mark.parametrize("variant", VARIANTS)
def test_greedy_tokens_and_logprobs_equal_transformers(variant: str, platform: str, tmp_path: Path):
    architecture, config = VARIANTS[variant]
    checkpoint = create_checkpoint(tmp_path, architecture, **config)
    prompts = create_prompts()
    device = PLATFORMS[platform]["device"]
    engine = create_engine(checkpoint, dtype="float32", **PLATFORMS[platform])
    assert engine.model.architecture == architecture
    assert engine.model.backend.startswith("cluster")
    assert engine.model.kernels.startswith(platform if device == "cpu" else "triton")
    assert engine.model.device.startswith(device)
    outputs = run_engine(engine, prompts)
    apart = distance(run_transformers(checkpoint, prompts, outputs, device=device), outputs)
    assert apart.num_differing == 0
    assert apart.logprob <= 1e-4


def test_a_sharded_checkpoint_really_has_shards(tmp_path: Path):
    create_checkpoint(tmp_path, **VARIANTS["llama-sharded"][1])
    assert len(list(tmp_path.glob("*.safetensors"))) > 2


def test_the_layout_of_transformers_4_reads_the_same(tmp_path: Path):
    checkpoint = create_checkpoint(tmp_path, rope_parameters=LLAMA3)
    prompts = create_prompts()
    expected = run_engine(create_engine(checkpoint), prompts)
    config = json.loads((checkpoint / "config.json").read_text())
    rope = config.pop("rope_parameters")
    config |= {"rope_theta": rope.pop("rope_theta"), "rope_scaling": rope, "torch_dtype": config.pop("dtype")}
    rope["type"] = rope.pop("rope_type")
    (checkpoint / "config.json").write_text(json.dumps(config))
    assert run_engine(create_engine(checkpoint), prompts) == expected


def edit_config(checkpoint: Path, **changes: Any) -> None:
    path = checkpoint / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def edit_tensor(checkpoint: Path, name: str, change: Callable[[torch.Tensor], torch.Tensor]) -> None:
    path = checkpoint / "model.safetensors"
    tensors = load_file(path)
    tensors[name] = change(tensors[name]).contiguous()
    save_file(tensors, path, metadata={"format": "pt"})


FAULTS: dict[str, Callable[[Path], None]] = {
    "one scaled projection": lambda c: edit_tensor(c, "model.layers.1.self_attn.o_proj.weight", lambda w: w * 1.001),
    "one row of a merged projection": lambda c: edit_tensor(
        c, "model.layers.2.self_attn.v_proj.weight", lambda w: torch.cat((w[:-1], w[-1:] * 1.01))
    ),
    "one layer's gates in another order": lambda c: edit_tensor(
        c, "model.layers.0.mlp.gate_proj.weight", lambda w: w.roll(1, 0)
    ),
    "another epsilon": lambda c: edit_config(c, rms_norm_eps=1e-3),
    "rope theta 1 % off": lambda c: edit_config(c, rope_parameters={"rope_type": "default", "rope_theta": 10_100.0}),
    "rope scaling ignored": lambda c: edit_config(
        c, rope_parameters={"rope_type": "linear", "rope_theta": 10_000.0, "factor": 1.02}
    ),
    "window one off": lambda c: edit_config(c, sliding_window=12),
    "window ignored": lambda c: edit_config(c, sliding_window=None),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_the_parity_check_sees_a_small_fault(fault: str, tmp_path: Path):
    """Negative control: a run over damaged weights or configuration must not pass for the original."""
    original = create_checkpoint(tmp_path / "original", "MistralForCausalLM", sliding_window=13)
    damaged = shutil.copytree(original, tmp_path / "damaged")
    FAULTS[fault](damaged)
    prompts = create_prompts((5, 40))
    sound, other = (run_engine(create_engine(checkpoint), prompts) for checkpoint in (original, damaged))
    assert distance(run_transformers(original, prompts, sound), sound).logprob <= 1e-4
    assert distance(run_transformers(original, prompts, other), other).logprob > 1e-3


@pytest.mark.parametrize("device", ["cpu", CUDA])
@pytest.mark.parametrize(("dtype", "bound"), [("bfloat16", 0.5), ("float16", 0.08)])
@pytest.mark.parametrize("architecture", ["LlamaForCausalLM", "Qwen3ForCausalLM"])
def test_16_bit_runs_stay_near_float32(architecture: str, dtype: str, bound: float, device: str, tmp_path: Path):
    """The first token's log probabilities of every prompt: later ones follow another text once a near tie falls."""
    checkpoint = create_checkpoint(tmp_path, architecture, head_dim=16)
    prompts = create_prompts()
    engine = create_engine(checkpoint, device=device, dtype=dtype)
    assert (engine.model.dtype, torch.device(engine.model.device).type) == (dtype, device)
    outputs = run_engine(engine, prompts)
    expected = [reference.logprobs_NV[0] for reference in run_transformers(checkpoint, prompts, outputs)]
    for output, logprobs_V in zip(outputs, expected, strict=True):
        for token_id, logprob in output[0].top_logprobs:
            assert abs(logprob - logprobs_V[token_id].item()) < bound


@pytest.mark.parametrize("platform", [COMPILED, "torch"])
@pytest.mark.parametrize("weights", ["auto", "float32"])
def test_a_bfloat16_checkpoint_is_computed_in_float32(platform: str, weights: str, tmp_path: Path):
    checkpoint = create_checkpoint(tmp_path, dtype=torch.bfloat16)
    prompts = create_prompts()
    engine = create_engine(checkpoint, weights=weights, kv_cache_dtype="float32", **PLATFORMS[platform])
    assert engine.model.weights == ("bfloat16" if (platform, weights) == ("cpu", "auto") else "float32")
    outputs = run_engine(engine, prompts)
    apart = distance(run_transformers(checkpoint, prompts, outputs, torch.float32), outputs)
    assert apart.num_differing == 0
    assert apart.logprob <= 1e-4


def test_model_impl_transformers_runs_a_known_family_too(tmp_path: Path):
    checkpoint = create_checkpoint(tmp_path, "Qwen2ForCausalLM")
    prompts = create_prompts()
    engine = create_engine(checkpoint, model_impl="transformers")
    assert engine.model.backend.startswith("transformers")
    outputs = run_engine(engine, prompts)
    apart = distance(run_transformers(checkpoint, prompts, outputs), outputs)
    assert apart.num_differing == 0
    assert apart.logprob <= 1e-4


def test_an_architecture_without_code_of_ours_falls_back_to_transformers(tmp_path: Path):
    checkpoint = create_checkpoint(tmp_path, "Olmo2ForCausalLM")
    prompts = create_prompts()
    engine = create_engine(checkpoint)
    assert engine.model.backend.startswith("transformers")
    outputs = run_engine(engine, prompts)
    apart = distance(run_transformers(checkpoint, prompts, outputs), outputs)
    assert apart.num_differing == 0
    assert apart.logprob <= 1e-4
