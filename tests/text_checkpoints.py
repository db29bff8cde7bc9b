"""Small tokenizers of both kinds that models use, trained on the spot."""

import json

import tokenizers
from tokenizers import decoders, models, normalizers, pre_tokenizers, trainers

CORPUS = [
    "def read_lines(path):\n    return open(path).read()\n" * 4,
    "naïve café 日本語 текст 🙂🙃 " * 4,
    "aab aaab abab stop ",
]


def byte_level() -> tokenizers.Tokenizer:
    tokenizer = tokenizers.Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=320,
        special_tokens=["<|end|>", "<|start|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(CORPUS, trainer)
    tokenizer.add_tokens(["<tool call>"])  # an added token that is no special one, with a space in it
    return tokenizer


def sentencepiece_like() -> tokenizers.Tokenizer:
    """As Llama 2's: spaces as U+2581, unknown bytes as <0xNN>, the first space dropped."""
    pieces = ["<unk>", "<|end|>", "<|start|>", *(f"<0x{byte:02X}>" for byte in range(256))]
    pieces += ["▁", *"abcdefghijklmnoprstuvwxyz():.\n", "▁d", "▁de", "▁def", "é", "日", "本"]
    merges = [("▁", "d"), ("▁d", "e"), ("▁de", "f")]
    model = models.BPE(
        vocab={piece: index for index, piece in enumerate(pieces)},
        merges=merges,
        unk_token="<unk>",
        byte_fallback=True,
        fuse_unk=True,
    )
    tokenizer = tokenizers.Tokenizer(model)
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    tokenizer.add_special_tokens(["<|end|>", "<|start|>"])
    return tokenizer


BACKENDS = {"byte_level": byte_level, "sentencepiece_like": sentencepiece_like}


def write_checkpoint(directory, backend, *, settings=None, config=None, generation=None):
    """The text half of a Hugging Face directory."""
    backend.save(str(directory / "tokenizer.json"))
    (directory / "tokenizer_config.json").write_text(json.dumps(settings or {}))
    (directory / "config.json").write_text(json.dumps({"vocab_size": backend.get_vocab_size()} | (config or {})))
    if generation is not None:
        (directory / "generation_config.json").write_text(json.dumps(generation))
    return directory
