"""Mistral (Jiang et al., 2023)."""

from __future__ import annotations

from cluster.models.config import ModelConfig
from cluster.models.decoder import DecoderForCausalLM, DecoderOptions


class MistralForCausalLM(DecoderForCausalLM):
    """Llama with a sliding window in every layer; ``sliding_window: null`` switches it off."""

    @staticmethod
    def options(config: ModelConfig) -> DecoderOptions:
        file = config.file
        # The first release's window, which transformers also takes where the key is absent.
        switched_off = "sliding_window" in file.values and not file.has("sliding_window")
        window = None if switched_off else file.integer("sliding_window", 4096)
        return DecoderOptions(sliding_windows=(window,) * config.num_hidden_layers)
