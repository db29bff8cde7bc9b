"""Trains the embedded demo models from nothing but the machine's own Python sources.

    python -m cluster.demo.train --size main  --minutes 90 --out cluster/demo/model
    python -m cluster.demo.train --size draft --minutes 15 --out cluster/demo/draft --tokenizer cluster/demo/model

Plain pre-training: random windows of concatenated files, matrices under Muon (Jordan et al., 2024), everything else
under AdamW, a warm-up / constant / linear-decay rate that follows the clock, so that a time budget is always kept.
"""

from __future__ import annotations

import argparse
import json
import math
import platform
import random
import time
from pathlib import Path

import numpy as np
import torch
from tokenizers import Tokenizer
from transformers import LlamaConfig, LlamaForCausalLM

from cluster.demo.corpus import END_OF_TEXT, VOCAB_SIZE, encode_documents, read_corpus, train_tokenizer

CONTEXT = 1024
LONG_FROM = 0.8  # share of the run after which windows grow from half the context to all of it
MICRO_BATCH_TOKENS = {"cpu": 2048, "cuda": 65536}
SHAPES: dict[str, dict[str, int]] = {
    "main": {
        "hidden_size": 256,
        "num_hidden_layers": 6,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "intermediate_size": 768,
    },
    "draft": {
        "hidden_size": 128,
        "num_hidden_layers": 3,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        "intermediate_size": 320,
    },
}


def build_model(size: str) -> LlamaForCausalLM:
    """A fresh model; residual projections start small, so that depth does not grow the stream's variance."""
    config = LlamaConfig(
        **SHAPES[size],
        vocab_size=VOCAB_SIZE,
        head_dim=64,
        max_position_embeddings=CONTEXT,
        rope_theta=10_000.0,
        rms_norm_eps=1e-5,
        tie_word_embeddings=True,
        bos_token_id=0,
        eos_token_id=0,
        pad_token_id=None,
        initializer_range=0.02,
    )
    config._attn_implementation = "eager"  # at half the context its backward pass beats SDPA's on CPU
    model = LlamaForCausalLM(config)
    with torch.no_grad():
        for layer in model.model.layers:
            for projection in (layer.self_attn.o_proj, layer.mlp.down_proj):
                projection.weight.mul_(1 / math.sqrt(2 * config.num_hidden_layers))
    return model


def build_optimizers(model: LlamaForCausalLM, lr: float) -> list[torch.optim.Optimizer]:
    matrices = [p for name, p in model.named_parameters() if p.ndim == 2 and "embed" not in name]
    rest = [p for name, p in model.named_parameters() if p.ndim != 2 or "embed" in name]
    return [
        torch.optim.Muon(matrices, lr=lr, weight_decay=0.05, momentum=0.95, adjust_lr_fn="match_rms_adamw"),
        torch.optim.AdamW(rest, lr=lr, betas=(0.9, 0.95), weight_decay=0.0),
    ]


def rate_at(progress: float) -> float:
    """Share of the peak rate at ``progress`` in [0, 1]: 2 % warm-up, constant, the last 45 % down to zero."""
    return min(progress / 0.02, 1.0, max(0.0, (1.0 - progress) / 0.45))


@torch.no_grad()
def bits_per_byte(model: LlamaForCausalLM, documents: list[np.ndarray], num_bytes: int) -> float:
    """Held-out bits per byte: every token predicted once, with at least half a context before it where there is one."""
    nats, half = 0.0, CONTEXT // 2
    for ids in documents:
        tokens = torch.from_numpy(ids.astype(np.int64))
        for begin in range(0, max(1, len(tokens) - 1), half):
            window = tokens[max(0, begin - half) : begin + half + 1]
            first_new = min(begin, half)
            logits = model(window[None, :-1]).logits[0, first_new:]
            nats += torch.nn.functional.cross_entropy(logits.float(), window[first_new + 1 :], reduction="sum").item()
    return nats / math.log(2) / num_bytes


def train(args: argparse.Namespace) -> dict[str, object]:
    torch.manual_seed(args.seed)
    rng = np.random.default_rng(args.seed)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    corpus = read_corpus(args.sources)
    if args.tokenizer:
        tokenizer = Tokenizer.from_file(str(args.tokenizer / "tokenizer.json"))
    else:
        tokenizer = train_tokenizer(corpus.train)
    documents = encode_documents(tokenizer, corpus.train)
    held_out = encode_documents(tokenizer, corpus.held_out)
    held_out_bytes = sum(len(text.encode()) for text in corpus.held_out)
    train_bytes = sum(len(text.encode()) for text in corpus.train)
    num_train_tokens = sum(map(len, documents))
    print(
        f"train {train_bytes / 1e6:.1f} MB, {num_train_tokens / 1e6:.2f} M tokens; "
        f"held out {held_out_bytes / 1e6:.2f} MB",
        flush=True,
    )

    model = build_model(args.size).to(device)
    optimizers = build_optimizers(model, args.lr)
    num_parameters = sum(p.numel() for p in model.parameters())

    order = random.Random(args.seed)

    def epochs(sequence: int):
        """Windows of ``sequence + 1`` tokens over files shuffled anew in every epoch, at a fresh offset."""
        while True:
            order.shuffle(documents)
            stream = np.concatenate(documents)[int(rng.integers(sequence)) :]
            for index in rng.permutation((len(stream) - 1) // sequence):
                yield stream[index * sequence : (index + 1) * sequence + 1]

    sequence, windows = CONTEXT // 2, epochs(CONTEXT // 2)
    start, step, tokens, smooth, last_log = time.monotonic(), 0, 0, None, 0.0
    while (progress := (time.monotonic() - start) / (args.minutes * 60)) < 1.0:
        if progress > LONG_FROM and sequence < CONTEXT:
            sequence, windows = CONTEXT, epochs(CONTEXT)
            model.config._attn_implementation = "sdpa"
        # On CPU several small micro-batches that stay in cache are twice as fast as one large batch.
        micro_batch = min(MICRO_BATCH_TOKENS[device], args.batch_tokens) // sequence
        num_micro_batches = max(1, args.batch_tokens // (micro_batch * sequence))
        loss_sum = 0.0
        for _ in range(num_micro_batches):
            batch = torch.from_numpy(np.stack([next(windows) for _ in range(micro_batch)]).astype(np.int64)).to(device)
            with torch.autocast(device, dtype=torch.bfloat16):
                logits = model(batch[:, :-1], use_cache=False).logits
            loss = torch.nn.functional.cross_entropy(logits.float().flatten(0, 1), batch[:, 1:].flatten())
            (loss / num_micro_batches).backward()
            loss_sum += loss.item() / num_micro_batches
            tokens += micro_batch * sequence
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for optimizer in optimizers:
            for group in optimizer.param_groups:
                group["lr"] = args.lr * rate_at(progress)
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
        step += 1
        smooth = loss_sum if smooth is None else 0.95 * smooth + 0.05 * loss_sum
        if (elapsed := time.monotonic() - start) - last_log > 20:
            last_log = elapsed
            bpb = smooth / math.log(2) * num_train_tokens / train_bytes
            print(
                f"{elapsed:6.0f} s  step {step:6d}  {tokens / 1e6:7.2f} M tokens  {tokens / elapsed:6.0f} tok/s  "
                f"loss {smooth:.3f}  ~{bpb:.3f} bits/byte",
                flush=True,
            )

    model.eval().float()
    minutes = (time.monotonic() - start) / 60
    model.to(torch.bfloat16)  # what is measured is what is shipped
    model.to(torch.float32)
    result = {
        "size": args.size,
        "parameters": num_parameters,
        "train_bytes": train_bytes,
        "train_tokens_seen": tokens,
        "epochs": round(tokens / num_train_tokens, 2),
        "steps": step,
        "minutes": round(minutes, 1),
        "device": device,
        "threads": torch.get_num_threads(),
        "python": platform.python_version(),
        "held_out_bytes": held_out_bytes,
        "held_out_bits_per_byte": round(bits_per_byte(model.cpu(), held_out, held_out_bytes), 4),
    }
    save(model, tokenizer, result, args.out)
    return result


def save(model: LlamaForCausalLM, tokenizer: Tokenizer, result: dict[str, object], out: Path) -> None:
    """Writes a Hugging Face directory: config, bf16 safetensors, tokenizer, and a model card."""
    out.mkdir(parents=True, exist_ok=True)
    model.to(torch.bfloat16).save_pretrained(out)
    tokenizer.save(str(out / "tokenizer.json"))
    (out / "tokenizer_config.json").write_text(
        json.dumps(
            {
                "tokenizer_class": "PreTrainedTokenizerFast",
                "bos_token": END_OF_TEXT,
                "eos_token": END_OF_TEXT,
                "clean_up_tokenization_spaces": False,
                "model_max_length": CONTEXT,
            },
            indent=2,
        )
        + "\n"
    )
    (out / "training.json").write_text(json.dumps(result, indent=2) + "\n")
    (out / "README.md").write_text(model_card(result, out))
    for file in filter(Path.is_file, out.iterdir()):
        file.chmod(0o644)  # safetensors' files are their owner's alone, and these are for everybody who installs them


def model_card(result: dict[str, object], out: Path) -> str:
    """The card as Markdown; every figure comes from the run itself."""
    shape = SHAPES[str(result["size"])]
    parameters = (
        f"{result['parameters']:,} (hidden {shape['hidden_size']}, {shape['num_hidden_layers']} layers, "
        f"{shape['num_attention_heads']} heads, {shape['num_key_value_heads']} KV heads, tied embeddings)"
    )
    data = (
        f"{result['train_bytes'] / 1e6:.1f} MB of `.py` files; held out: {result['held_out_bytes'] / 1e6:.2f} MB, the "
        "files whose relative path's sha256 falls in the lowest 5 %; exact duplicates removed"
    )
    training = (
        f"{result['steps']:,} steps, {result['train_tokens_seen'] / 1e6:.1f} M tokens ({result['epochs']} epochs), "
        f"{result['minutes']} minutes on {result['threads']} {result['device']} threads; Muon for the matrices, AdamW "
        "for the rest"
    )
    return f"""---
license: psf-2.0
library_name: transformers
pipeline_tag: text-generation
---
# Demo model ({result["size"]})

A Llama-architecture decoder that completes Python, trained from nothing but the standard library of Python
{result["python"]}. It is here so that a cluster has something true to serve without a download; it knows the look of
Python and no facts.

| | |
| --- | --- |
| parameters | {parameters} |
| tokenizer | byte-level BPE, {VOCAB_SIZE} entries, trained on the training split |
| data | {data} |
| training | {training} |
| context | {CONTEXT} tokens |
| held-out bits per byte (bf16 weights) | **{result["held_out_bits_per_byte"]}** |

Made by `python -m cluster.demo.train --size {result["size"]} --out {out}`. The sources are under the PSF licence.
"""


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--size", choices=SHAPES, default="main")
    parser.add_argument("--minutes", type=float, default=90.0, help="wall-clock budget of the training loop")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--sources", type=Path, default=None, help="default: this interpreter's standard library")
    parser.add_argument("--tokenizer", type=Path, default=None, help="reuse the tokenizer of this model directory")
    parser.add_argument("--batch-tokens", type=int, default=8192)
    parser.add_argument("--lr", type=float, default=3e-3)
    parser.add_argument("--seed", type=int, default=0)
    return parser.parse_args()


if __name__ == "__main__":
    print(json.dumps(train(parse_args()), indent=2))
