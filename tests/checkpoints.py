"""Small random checkpoints in Hugging Face's layout, made by transformers' own classes, with a tiny tokenizer."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
import transformers
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

VOCAB_SIZE = 259  # the 256 bytes, and three special tokens
EOS, BOS, PAD = 256, 257, 258
CHAT_TEMPLATE = (
    "{% for message in messages %}<|{{ message['role'] }}|>{{ message['content'] }}\n{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)


def create_checkpoint(
    directory: Path,
    architecture: str = "LlamaForCausalLM",
    *,
    seed: int = 0,
    dtype: torch.dtype = torch.float32,
    max_shard_size: str = "5GB",
    tokenizer: bool = False,
    **config: Any,
) -> Path:
    """Writes ``architecture`` with random weights to ``directory`` and returns it.

    Weights are larger than a trained model's, so that logits are far apart and a wrong one shows.

    Args:
        max_shard_size: a small one gives several files and an index.
        tokenizer: whether to write a byte-level tokenizer with a chat template.
        config: keys of the model's configuration, over those of a 3-layer model of hidden size 64.
    """
    model_class = getattr(transformers, architecture)
    keys = {
        "vocab_size": VOCAB_SIZE,
        "hidden_size": 64,
        "intermediate_size": 112,
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 512,
        "rms_norm_eps": 1e-5,
        "tie_word_embeddings": False,
        "eos_token_id": EOS,
        "bos_token_id": BOS,
        "pad_token_id": None,
    } | config
    torch.manual_seed(seed)
    model = model_class(model_class.config_class(**keys))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.ndim == 1:
                parameter.normal_(1.0 if "norm" in name else 0.0, 0.3)
            else:
                parameter.normal_(0.0, 1.3 / parameter.shape[-1] ** 0.5)
    model.to(dtype).save_pretrained(directory, max_shard_size=max_shard_size)
    if tokenizer:
        create_tokenizer().save_pretrained(directory)
    return directory


def create_tokenizer() -> PreTrainedTokenizerFast:
    """One token per byte: any text has a round trip, and a multi-byte character has several tokens."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE(vocab={char: i for i, char in enumerate(alphabet)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(["<|end|>", "<|begin|>", "<|pad|>"])  # in the order of their ids above
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, eos_token="<|end|>", bos_token="<|begin|>", pad_token="<|pad|>"
    )
    fast.chat_template = CHAT_TEMPLATE
    return fast
