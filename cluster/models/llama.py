"""Llama (Touvron et al., 2023; Grattafiori et al., 2024)."""

from __future__ import annotations

from cluster.models.config import ModelConfig
from cluster.models.decoder import DecoderForCausalLM, DecoderOptions


class LlamaForCausalLM(DecoderForCausalLM):
    """The plain decoder; biases where the checkpoint says so."""

    @staticmethod
    def options(config: ModelConfig) -> DecoderOptions:
        attention_bias = config.file.boolean("attention_bias", False)
        return DecoderOptions(
            qkv_bias=attention_bias,
            output_bias=attention_bias,
            mlp_bias=config.file.boolean("mlp_bias", False),
            sliding_windows=(None,) * config.num_hidden_layers,
        )
