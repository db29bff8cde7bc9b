"""The demo model's data: Python's own standard library, split by path, tokenised with a small byte-level BPE."""

from __future__ import annotations

import hashlib
import sysconfig
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers

END_OF_TEXT = "<|endoftext|>"
VOCAB_SIZE = 4096
HELD_OUT_FRACTION = 0.05


@dataclass(frozen=True, kw_only=True)
class Corpus:
    """Source texts by split; ``held_out`` never reaches the tokenizer or the model."""

    train: list[str]
    held_out: list[str]


def is_held_out(relative_path: str) -> bool:
    """A file is held out when its path's sha256 falls in the lowest 5 % of the hash's range."""
    digest = hashlib.sha256(relative_path.encode()).digest()
    return int.from_bytes(digest[:8], "big") < HELD_OUT_FRACTION * 2**64


def read_corpus(root: Path | None = None) -> Corpus:
    """Reads every UTF-8 ``.py`` file below ``root`` (default: this interpreter's standard library).

    Exact duplicates are dropped, and a text seen in both splits counts as held out only.
    """
    root = root or Path(sysconfig.get_paths()["stdlib"])
    texts: dict[str, tuple[bool, str]] = {}
    for path in sorted(root.rglob("*.py")):
        relative = path.relative_to(root).as_posix()
        if relative.startswith(("site-packages/", "dist-packages/")):
            continue
        try:
            text = path.read_text(encoding="utf-8")
        except UnicodeDecodeError:
            continue  # test data in other encodings on purpose
        held_out = is_held_out(relative)
        seen_held_out, _ = texts.get(text, (False, ""))
        if text.strip():
            texts[text] = (held_out or seen_held_out, text)
    return Corpus(
        train=[text for held_out, text in texts.values() if not held_out],
        held_out=[text for held_out, text in texts.values() if held_out],
    )


def train_tokenizer(texts: list[str], vocab_size: int = VOCAB_SIZE) -> Tokenizer:
    """A byte-level BPE: every byte string round-trips, whatever it holds. Encoded texts begin with ``END_OF_TEXT``."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.train_from_iterator(
        texts,
        trainers.BpeTrainer(
            vocab_size=vocab_size,
            special_tokens=[END_OF_TEXT],
            initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
            show_progress=False,
        ),
    )
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{END_OF_TEXT} $A", special_tokens=[(END_OF_TEXT, tokenizer.token_to_id(END_OF_TEXT))]
    )
    return tokenizer


def encode_documents(tokenizer: Tokenizer, texts: list[str]) -> list[np.ndarray]:
    """Each text as uint16 ids that start with ``END_OF_TEXT``, which serves as the beginning of a document too."""
    return [np.asarray(encoding.ids, dtype=np.uint16) for encoding in tokenizer.encode_batch(texts)]
