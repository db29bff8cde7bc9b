"""Models cut into stages against the same models whole; stages of several ranks too."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from checkpoints import create_checkpoint
from model_parts import ModelParts, Stages, check_equal, run_steps

from cluster.errors import ConfigError
from cluster.kernels.cpu.library import library

compiled = pytest.mark.skipif(library() is None, reason="the CPU kernels are not compiled")
KINDS = ["torch", pytest.param("cpu", marks=compiled)]
VARIANTS: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("LlamaForCausalLM", {}),
    "llama-tied": ("LlamaForCausalLM", {"tie_word_embeddings": True}),
    "mistral": ("MistralForCausalLM", {"sliding_window": 13}),
    "qwen2": ("Qwen2ForCausalLM", {"use_sliding_window": True, "sliding_window": 9, "max_window_layers": 3}),
    "qwen3": (
        "Qwen3ForCausalLM",
        {
            "head_dim": 16,
            "tie_word_embeddings": True,
            "use_sliding_window": True,
            "sliding_window": 20,
            "layer_types": ["full_attention", "full_attention", "sliding_attention", "full_attention"],
        },
    ),
}
PP2 = [(0, 3), (3, 4)]
PP3 = [(0, 1), (1, 3), (3, 4)]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("variant", VARIANTS)
def test_stages_give_what_the_whole_gives(variant: str, kind: str, tmp_path: Path):
    """To the last bit where stages have one rank: they compute the same in the same order."""
    architecture, config = VARIANTS[variant]
    checkpoint = create_checkpoint(tmp_path, architecture, num_hidden_layers=4, **config)
    expected = run_steps(ModelParts(checkpoint, kind=kind))
    for stages in (PP2, PP3):
        found = run_steps(ModelParts(checkpoint, kind=kind, stages=stages))
        assert all(map(torch.equal, found, expected))
    check_equal(ModelParts(checkpoint, kind=kind, tp_size=2, stages=[(0, 1), (1, 4)]), expected)


@compiled
@pytest.mark.parametrize("weights", ["bfloat16", "int8", "int4"])
def test_stages_of_packed_weights(weights: str, tmp_path: Path):
    checkpoint = create_checkpoint(tmp_path, num_hidden_layers=4, dtype=torch.bfloat16)
    expected = run_steps(ModelParts(checkpoint, kind="cpu", weights=weights))
    found = run_steps(ModelParts(checkpoint, kind="cpu", weights=weights, stages=PP3))
    assert all(map(torch.equal, found, expected))


def test_a_stream_that_is_lost_between_stages_is_seen(tmp_path: Path):
    """Negative control: the residual stream alone is not enough."""
    checkpoint = create_checkpoint(tmp_path, num_hidden_layers=4)
    expected = run_steps(ModelParts(checkpoint))
    parts = ModelParts(checkpoint, stages=PP2)
    first = parts.stages[0][0].model
    first.register_forward_hook(lambda module, inputs, streams: (torch.zeros_like(streams[0]), streams[1]))
    with pytest.raises(AssertionError):
        check_equal(parts, expected)


@pytest.mark.parametrize("is_tied", [False, True])
def test_stages_hold_what_they_need(is_tied: bool, tmp_path: Path):
    checkpoint = create_checkpoint(tmp_path, num_hidden_layers=4, tie_word_embeddings=is_tied)
    (whole,) = ModelParts(checkpoint).ranks
    names = {name for name, _ in tensors_of(whole.model)}
    first, middle, last = (rank.model for rank in ModelParts(checkpoint, stages=PP3).ranks)
    held = [{name for name, _ in tensors_of(model)} for model in (first, middle, last)]
    ends = {"model.embed_tokens.weight", "model.norm.weight", "lm_head.weight"}
    assert [names & ends for names in held] == [
        {"model.embed_tokens.weight"},
        set(),
        {"model.norm.weight", "lm_head.weight"} | ({"model.embed_tokens.weight"} if is_tied else set()),
    ]
    assert set.union(*held) == names
    assert sum(map(len, held)) == len(names) + is_tied
    if is_tied:
        assert last.lm_head.weight is last.model.embed_tokens.weight
    assert [model.num_layers for model in (first, middle, last)] == [1, 2, 1]
    assert [(model.is_first_stage, model.is_last_stage) for model in (first, middle, last)] == [
        (True, False),
        (False, False),
        (False, True),
    ]


def tensors_of(model: torch.nn.Module) -> list[tuple[str, torch.Tensor]]:
    """Weights by the names of their places; a tied one has two."""
    return [
        (f"{prefix}.{name}", value)
        for prefix, module in model.named_modules()
        for name, value in vars(module).items()
        if isinstance(value, torch.Tensor)
    ]


@pytest.mark.parametrize(
    ("stages", "message"),
    [
        ([(0, 1), (1, 2), (2, 3), (3, 3)], "parallel.pp is 4, but the model has 3 layers"),
        ([(0, 2), (2, 5)], "layers 2 to 5 are no range of the model's 3"),
        ([(0, 0), (0, 3)], "layers 0 to 0"),
        ([None, (1, 3)], "stage 0 of 2 must be told its layers"),
    ],
)
def test_layers_that_the_model_does_not_have(stages: Stages, message: str, tmp_path: Path):
    with pytest.raises((ConfigError, ValueError), match=message):
        ModelParts(create_checkpoint(tmp_path), stages=stages)
