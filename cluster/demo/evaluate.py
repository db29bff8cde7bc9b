"""How well a demo model predicts held-out text in each number format of its weights.

    python -m cluster.demo.evaluate --weights float32 int8 int4

Bits per byte as training measures them (``train.bits_per_byte``), but of the model and the kernels that serve.

Shapes: T tokens of a window, V vocabulary.
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from tokenizers import Tokenizer
from torch import Tensor

from cluster import kernels
from cluster.checkpoint import resolve_checkpoint
from cluster.demo.corpus import encode_documents, read_corpus
from cluster.layers.attention import AttentionMetadata
from cluster.models.config import ConfigFile
from cluster.models.loader import LoadOptions, ModelLoader
from cluster.worker.config import WorkerConfig
from cluster.worker.kv_cache import KVCacheShape
from cluster.worker.numbers import choose_numbers

_CPU = torch.device("cpu")


class Scorer:
    """A model on the CPU that gives every token of a text its probability."""

    def __init__(self, checkpoint: Path, config: WorkerConfig) -> None:
        """
        Raises:
            ConfigError: the configuration's formats do not run here.
            CheckpointError: the checkpoint is missing or broken.
        """
        file = ConfigFile.read(checkpoint / "config.json")
        numbers = choose_numbers(config, file, _CPU, our_code=True)
        kernels.use(numbers.backend)
        options = LoadOptions(backend=numbers.backend, weights=numbers.weights, dtype=numbers.dtype, device=_CPU)
        self._model = ModelLoader(checkpoint, file, options).load()
        self._dtype, self._block_size = numbers.dtype, config.block_size
        self.max_tokens = self._model.max_position_embeddings
        self._num_blocks = -(-self.max_tokens // config.block_size)
        shape = KVCacheShape(
            num_layers=self._model.num_layers,
            block_size=config.block_size,
            num_kv_heads=self._model.num_kv_heads,
            head_dim=self._model.head_dim,
            dtype=numbers.kv_dtype,
        )
        self._kv_caches = shape.allocate(self._num_blocks, _CPU)

    @torch.inference_mode()
    def logits(self, token_ids: Sequence[int]) -> Tensor:
        """(T, V) of the token after each of these, at most ``max_tokens``, which begin a sequence."""
        positions_T = torch.arange(len(token_ids))
        attn = AttentionMetadata(
            query_lens=[len(token_ids)],
            context_lens=[len(token_ids)],
            block_tables_SB=np.arange(self._num_blocks)[None],
            slot_mapping_T=positions_T,
            block_size=self._block_size,
            dtype=self._dtype,
        )
        hidden_TD = self._model(torch.tensor(token_ids), positions_T, attn, self._kv_caches)
        return self._model.compute_logits(hidden_TD)

    def bits(self, token_ids: Sequence[int]) -> float:
        """Of all tokens but the first, each with at least half a context before it where there is one."""
        nats, half = 0.0, self.max_tokens // 2
        for begin in range(0, max(1, len(token_ids) - 1), half):
            window = token_ids[max(0, begin - half) : begin + half + 1]
            first_new = min(begin, half)
            logits_TV = self.logits(window[:-1])[first_new:]
            expected_T = torch.tensor(window[first_new + 1 :])
            nats += torch.nn.functional.cross_entropy(logits_TV.double(), expected_T, reduction="sum").item()
        return nats / math.log(2)


def held_out_documents(checkpoint: Path, num_bytes: int | None = None) -> tuple[list[list[int]], int]:
    """(token ids of each held-out text, bytes of all of them).

    Args:
        num_bytes: about as many are enough, spread over the whole; None: all.
    """
    texts = read_corpus().held_out
    if num_bytes is not None:
        step = max(1, sum(len(text.encode()) for text in texts) // num_bytes)
        texts = texts[::step]
    documents = encode_documents(Tokenizer.from_file(str(checkpoint / "tokenizer.json")), texts)
    return [document.tolist() for document in documents], sum(len(text.encode()) for text in texts)


def bits_per_byte(scorer: Scorer, documents: Sequence[Sequence[int]], num_bytes: int) -> float:
    return sum(scorer.bits(document) for document in documents) / num_bytes


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="demo", help="demo, demo-draft, or a directory of the same tokenizer")
    parser.add_argument("--weights", nargs="+", default=["float32", "bfloat16", "int8", "int4"])
    parser.add_argument("--kv-cache-dtype", default="auto")
    parser.add_argument("--bytes", type=int, help="about as many of the held-out bytes (default: all)")
    args = parser.parse_args()
    checkpoint = resolve_checkpoint(args.model)
    documents, num_bytes = held_out_documents(checkpoint, args.bytes)
    print(f"{len(documents)} held-out files, {num_bytes / 1e6:.2f} MB")
    first: float | None = None
    for weights in args.weights:
        config = WorkerConfig(device="cpu", weights=weights, kv_cache_dtype=args.kv_cache_dtype)
        measured = bits_per_byte(Scorer(checkpoint, config), documents, num_bytes)
        first = first or measured
        print(f"{weights:10} {measured:.5f} bits per byte  {100 * (measured / first - 1):+.3f} %")


if __name__ == "__main__":
    main()
