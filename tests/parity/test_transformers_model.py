"""Architectures without code of ours, on paged attention, against transformers' own generation."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

from cluster import kernels
from cluster.errors import CheckpointError, Unsupported
from cluster.layers.attention import AttentionMetadata
from cluster.models.transformers_model import TransformersModel

CPU = torch.device("cpu")
VOCAB = 131
CONTEXT = 160
SMALL = {
    "vocab_size": VOCAB,
    "hidden_size": 48,
    "intermediate_size": 80,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "max_position_embeddings": CONTEXT,
    "initializer_range": 0.3,  # far from uniform, so that a wrong answer shows
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
GROUPED = {**SMALL, "num_key_value_heads": 2}
GEMMA = {**GROUPED, "head_dim": 16, "query_pre_attn_scalar": 11, "sliding_window": 13}
ARCHITECTURES: dict[str, Callable[[], transformers.PretrainedConfig]] = {
    "GPTNeoX": lambda: transformers.GPTNeoXConfig(**SMALL),
    "GPT2": lambda: transformers.GPT2Config(
        vocab_size=VOCAB, n_embd=48, n_layer=3, n_head=4, n_positions=CONTEXT, initializer_range=0.3,
        bos_token_id=1, eos_token_id=2,
    ),
    "OPT": lambda: transformers.OPTConfig(
        vocab_size=VOCAB, hidden_size=48, ffn_dim=80, num_hidden_layers=3, num_attention_heads=4,
        max_position_embeddings=CONTEXT, init_std=0.3, word_embed_proj_dim=32,
    ),
    "Phi3": lambda: transformers.Phi3Config(**GROUPED),
    "Phi3 sliding window": lambda: transformers.Phi3Config(**GROUPED, sliding_window=11),
    "StableLm": lambda: transformers.StableLmConfig(
        **GROUPED, rope_parameters={"rope_type": "default", "rope_theta": 1e4, "partial_rotary_factor": 0.5}
    ),
    "Olmo2": lambda: transformers.Olmo2Config(**GROUPED),
    "Gemma2 with softcaps": lambda: transformers.Gemma2Config(
        **GEMMA, attn_logit_softcapping=2.0, final_logit_softcapping=5.0
    ),
    "Gemma3": lambda: transformers.Gemma3TextConfig(**GEMMA),
    "Granite": lambda: transformers.GraniteConfig(**GROUPED, attention_multiplier=0.3, logits_scaling=3.0),
    "Qwen3Moe": lambda: transformers.Qwen3MoeConfig(
        **GROUPED, head_dim=16, num_experts=4, num_experts_per_tok=2, moe_intermediate_size=32
    ),
    "Llama": lambda: transformers.LlamaConfig(**GROUPED),
}  # fmt: skip


@pytest.fixture(autouse=True)
def torch_kernels() -> None:
    """What transformers' modelling code runs on; other tests of this process may have left another backend bound."""
    kernels.use(kernels.backend("torch"))


def create_checkpoint(directory: Path, config: transformers.PretrainedConfig, seed: int = 0) -> Path:
    torch.manual_seed(seed)
    transformers.AutoModelForCausalLM.from_config(config).save_pretrained(directory)
    return directory


def create_prompts(lengths: tuple[int, ...]) -> list[list[int]]:
    generator = torch.Generator().manual_seed(1)
    return [torch.randint(3, VOCAB, (length,), generator=generator).tolist() for length in lengths]


class PagedRun:
    """Sequences in a paged cache with scattered blocks; each step takes some new tokens of each."""

    def __init__(self, model: TransformersModel, num_seqs: int, block_size: int = 5) -> None:
        self.model, self.block_size = model, block_size
        blocks_each = -(-CONTEXT // block_size)
        order = np.random.default_rng(2).permutation(num_seqs * blocks_each)
        self.tables_SB = order.reshape(num_seqs, blocks_each)
        shape = (2, num_seqs * blocks_each, block_size, model.num_kv_heads, model.head_dim)
        self.kv_caches = [torch.zeros(shape) for _ in range(model.num_layers)]
        self.computed = [0] * num_seqs

    @torch.inference_mode()
    def step(self, tokens: dict[int, list[int]]) -> torch.Tensor:
        """Logits after the last token of each sequence in ``tokens``."""
        slots, positions = [], []
        for index, new in tokens.items():
            for position in range(self.computed[index], self.computed[index] + len(new)):
                block = self.tables_SB[index, position // self.block_size]
                slots.append(int(block) * self.block_size + position % self.block_size)
                positions.append(position)
            self.computed[index] += len(new)
        lengths = [len(new) for new in tokens.values()]
        attn = AttentionMetadata(
            query_lens=lengths,
            context_lens=[self.computed[index] for index in tokens],
            block_tables_SB=self.tables_SB[list(tokens)],
            slot_mapping_T=torch.tensor(slots),
            block_size=self.block_size,
            dtype=torch.float32,
        )
        ids_T = torch.tensor([token for new in tokens.values() for token in new])
        hidden_TD = self.model(ids_T, torch.tensor(positions), attn, self.kv_caches)
        return self.model.compute_logits(hidden_TD[np.cumsum(lengths) - 1])


@pytest.mark.parametrize("create_config", ARCHITECTURES.values(), ids=ARCHITECTURES)
def test_greedy_tokens_and_logprobs_equal_transformers(
    tmp_path: Path, create_config: Callable[[], transformers.PretrainedConfig]
) -> None:
    checkpoint = create_checkpoint(tmp_path, create_config())
    prompts = create_prompts((1, 7, 23, 40))
    num_tokens = 32
    model = TransformersModel.from_checkpoint(checkpoint, torch.float32, CPU)
    run = PagedRun(model, len(prompts))
    # The longest prompt comes in chunks, beside sequences that decode already.
    run.step({3: prompts[3][:17]})
    logits_SV = run.step({**dict(enumerate(prompts[:3])), 3: prompts[3][17:]})
    tokens: list[list[int]] = [[] for _ in prompts]
    logprobs: list[list[torch.Tensor]] = [[] for _ in prompts]
    for _ in range(num_tokens):
        for index, row_V in enumerate(logits_SV):
            tokens[index].append(int(row_V.argmax()))
            logprobs[index].append(row_V.log_softmax(-1))
        logits_SV = run.step({index: row[-1:] for index, row in enumerate(tokens)})

    reference = transformers.AutoModelForCausalLM.from_pretrained(checkpoint, attn_implementation="eager").eval()
    reference.generation_config.eos_token_id = None
    for prompt, ours, ours_logprobs in zip(prompts, tokens, logprobs, strict=True):
        with torch.inference_mode():
            expected = reference.generate(
                torch.tensor([prompt]),
                max_new_tokens=num_tokens,
                do_sample=False,
                output_logits=True,
                return_dict_in_generate=True,
            )
        assert ours == expected.sequences[0, len(prompt) :].tolist()
        for row_V, expected_1V in zip(ours_logprobs, expected.logits, strict=True):
            assert float((row_V - expected_1V[0].log_softmax(-1)).abs().max()) <= 1e-4


def test_it_describes_itself(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    checkpoint = create_checkpoint(tmp_path, transformers.Phi3Config(**GROUPED))
    model = TransformersModel.from_checkpoint(checkpoint, torch.bfloat16, CPU)
    assert (model.num_layers, model.num_kv_heads, model.head_dim) == (3, 2, 12)
    assert model.backend == "transformers (slower path)"
    assert (model.vocab_size, model.max_position_embeddings) == (VOCAB, CONTEXT)
    assert {parameter.dtype for parameter in model.parameters()} == {torch.bfloat16}
    assert [record.message for record in caplog.records if "slower path" in record.message] == [
        "Phi3ForCausalLM runs on transformers' own modelling code, the slower path: nothing is fused"
    ]


REFUSED: dict[str, tuple[Callable[[], transformers.PretrainedConfig], str]] = {
    "Mamba": (lambda: transformers.MambaConfig(vocab_size=VOCAB, hidden_size=16, num_hidden_layers=1), "recurrent"),
    "Bloom": (lambda: transformers.BloomConfig(vocab_size=VOCAB, hidden_size=16, n_layer=1, n_head=2), "interface"),
    "Lfm2": (
        lambda: transformers.Lfm2Config(**GROUPED, layer_types=["conv", "full_attention", "conv"]),
        "layers of type conv",
    ),
    "GptOss": (
        lambda: transformers.GptOssConfig(
            **GROUPED, head_dim=16, num_local_experts=2, num_experts_per_tok=1, rope_parameters={"rope_type": "default"}
        ),
        "s_aux",
    ),
    "Bart": (
        lambda: transformers.BartConfig(
            vocab_size=VOCAB, d_model=16, decoder_layers=1, decoder_attention_heads=2, decoder_ffn_dim=16
        ),
        "encoder-decoder|positions itself",
    ),
    "dynamic rope": (
        lambda: transformers.LlamaConfig(
            **GROUPED, rope_parameters={"rope_type": "dynamic", "factor": 2.0, "rope_theta": 1e4}
        ),
        "dynamic",
    ),
}


@pytest.mark.parametrize(("create_config", "reason"), REFUSED.values(), ids=REFUSED)
def test_what_paged_attention_cannot_do_is_refused(
    tmp_path: Path, create_config: Callable[[], transformers.PretrainedConfig], reason: str
) -> None:
    checkpoint = create_checkpoint(tmp_path, create_config())
    architecture = json.loads((checkpoint / "config.json").read_text())["architectures"][0]
    with pytest.raises(Unsupported, match=f"{architecture} cannot run on the transformers back end.*{reason}"):
        TransformersModel.from_checkpoint(checkpoint, torch.float32, CPU)


@pytest.mark.parametrize(
    ("config", "reason"),
    [
        ({"architectures": ["T5ForConditionalGeneration"], "model_type": "t5", "is_encoder_decoder": True}, "encoder"),
        ({"architectures": ["BertModel"], "model_type": "bert"}, "no causal language model"),
        ({"architectures": ["OwnForCausalLM"], "model_type": "own"}, "no model_type 'own'"),
        (
            {"architectures": ["OwnForCausalLM"], "model_type": "own", "auto_map": {"AutoConfig": "own.OwnConfig"}},
            "auto_map.* never executed",
        ),
    ],
)
def test_foreign_configurations_are_refused(tmp_path: Path, config: dict[str, object], reason: str) -> None:
    (tmp_path / "config.json").write_text(json.dumps(config))
    (tmp_path / "own.py").write_text("raise SystemExit('the checkpoint was executed')")
    with pytest.raises(Unsupported, match=reason):
        TransformersModel.from_checkpoint(tmp_path, torch.float32, CPU)


def test_a_missing_tensor_stops_the_load(tmp_path: Path) -> None:
    checkpoint = create_checkpoint(tmp_path, transformers.GPTNeoXConfig(**SMALL))
    weights = load_file(checkpoint / "model.safetensors")
    del weights["gpt_neox.layers.1.mlp.dense_h_to_4h.weight"]
    save_file(weights, checkpoint / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(CheckpointError, match=r"1 tensors are missing.*layers\.1\.mlp\.dense_h_to_4h\.weight"):
        TransformersModel.from_checkpoint(checkpoint, torch.float32, CPU)


def test_a_tensor_of_the_wrong_shape_stops_the_load(tmp_path: Path) -> None:
    checkpoint = create_checkpoint(tmp_path, transformers.GPTNeoXConfig(**SMALL))
    config = json.loads((checkpoint / "config.json").read_text())
    (checkpoint / "config.json").write_text(json.dumps({**config, "intermediate_size": 96}))
    with pytest.raises(CheckpointError, match="GPTNeoXForCausalLM"):
        TransformersModel.from_checkpoint(checkpoint, torch.float32, CPU)


def test_pickled_weights_are_not_read(tmp_path: Path) -> None:
    checkpoint = create_checkpoint(tmp_path, transformers.GPTNeoXConfig(**SMALL))
    torch.save(load_file(checkpoint / "model.safetensors"), checkpoint / "pytorch_model.bin")
    (checkpoint / "model.safetensors").unlink()
    with pytest.raises(CheckpointError, match="safetensors"):
        TransformersModel.from_checkpoint(checkpoint, torch.float32, CPU)
