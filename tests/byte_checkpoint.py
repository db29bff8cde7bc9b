"""A checkpoint without weights whose tokens are bytes, for whoever only tokenizes."""

from __future__ import annotations

import json
from pathlib import Path

from fake_replica import EOS, VOCAB_SIZE
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

CHAT_TEMPLATE = "{% for m in messages %}{{ m['role'] }}: {{ m['content'] }}\n{% endfor %}assistant:"


def write_byte_checkpoint(directory: Path) -> Path:
    """A byte-level tokenizer without merges: token id = byte, 256 is the end of text; returns ``directory``."""
    # Byte-level BPE spells the printable bytes as themselves and the others from 256 on.
    printable = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    others = [byte for byte in range(256) if byte not in printable]
    spelling = {byte: chr(byte) for byte in printable} | {byte: chr(256 + i) for i, byte in enumerate(others)}
    tokenizer = Tokenizer(models.BPE(vocab={spelling[byte]: byte for byte in range(256)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken("<|end|>", special=True)])
    tokenizer.save(str(directory / "tokenizer.json"))
    (directory / "tokenizer_config.json").write_text(
        json.dumps(
            {
                "tokenizer_class": "PreTrainedTokenizerFast",
                "eos_token": "<|end|>",
                "chat_template": CHAT_TEMPLATE,
            }
        )
    )
    (directory / "config.json").write_text(
        json.dumps({"model_type": "llama", "vocab_size": VOCAB_SIZE, "eos_token_id": EOS})
    )
    return directory
