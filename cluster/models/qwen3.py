"""Qwen3, dense (Yang et al., 2025)."""

from __future__ import annotations

from cluster.models.config import ModelConfig
from cluster.models.decoder import DecoderForCausalLM, DecoderOptions


class Qwen3ForCausalLM(DecoderForCausalLM):
    """Qwen2 without its biases, with queries and keys normalised per head."""

    @staticmethod
    def options(config: ModelConfig) -> DecoderOptions:
        attention_bias = config.file.boolean("attention_bias", False)
        return DecoderOptions(
            qkv_bias=attention_bias,
            output_bias=attention_bias,
            qk_norm=True,
            sliding_windows=config.windows_by_layer_type(),
        )
