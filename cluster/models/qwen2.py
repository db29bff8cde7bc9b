"""Qwen2 and Qwen2.5 (Yang et al., 2024)."""

from __future__ import annotations

from cluster.models.config import ModelConfig
from cluster.models.decoder import DecoderForCausalLM, DecoderOptions


class Qwen2ForCausalLM(DecoderForCausalLM):
    """Llama with biases on queries, keys and values; upper layers may have a sliding window."""

    @staticmethod
    def options(config: ModelConfig) -> DecoderOptions:
        return DecoderOptions(qkv_bias=True, sliding_windows=config.windows_by_layer_type())
