"""A model as all of its ranks' parts, run in this process: stage after stage, a stage's ranks as threads."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from thread_communicator import ThreadCommunicator, ThreadGroup
from torch import Tensor

from cluster import kernels
from cluster.distributed.layout import Layout
from cluster.kernels import BackendKind
from cluster.layers.attention import AttentionMetadata
from cluster.models.config import ConfigFile
from cluster.models.loader import LoadOptions, ModelLoader
from cluster.models.registry import Model
from cluster.worker.kv_cache import KVCacheShape

BLOCK_SIZE = 16
_BLOCKS_EACH = 4  # of a sequence: 64 positions
_NUM_SEQS = 3
_CPU = torch.device("cpu")
_ROUNDING = 2e-5  # of the largest number

Stages = Sequence[tuple[int, int]]


@dataclass
class Rank:
    loader: ModelLoader
    model: Model
    kv_caches: list[Tensor]


class ModelParts:
    """All ranks of ``tp_size`` times ``len(stages)``.

    Attributes:
        stages: the ranks of each stage.
    """

    def __init__(
        self,
        checkpoint: Path,
        *,
        tp_size: int = 1,
        stages: Stages | None = None,
        kind: BackendKind = "torch",
        weights: str = "float32",
        device: torch.device = _CPU,
        **options: Any,
    ) -> None:
        """
        Args:
            stages: each one's layers; None: one stage.
        """
        backend = kernels.backend(kind)
        kernels.use(backend)
        file = ConfigFile.read(checkpoint / "config.json")
        load_options = LoadOptions(backend=backend, weights=weights, dtype=torch.float32, device=device, **options)
        self._tp_size, self._device = tp_size, device
        self._groups = [ThreadGroup(tp_size) for _ in stages or [None]]

        def load(stage: int, tp: ThreadCommunicator) -> Rank:
            layout = Layout(
                rank=stage * tp_size + tp.rank,
                tp_size=tp_size,
                pp_size=len(self._groups),
                layers=stages[stage] if stages else None,
            )
            loader = ModelLoader(checkpoint, file, load_options, layout=layout, tp=tp if tp_size > 1 else None)
            model = loader.load()
            shape = KVCacheShape(
                num_layers=model.num_layers,
                block_size=BLOCK_SIZE,
                num_kv_heads=model.num_kv_heads,
                head_dim=model.head_dim,
                dtype=torch.float32,
            )
            return Rank(loader, model, shape.allocate(_NUM_SEQS * _BLOCKS_EACH, device))

        self.stages = [group.run(lambda tp, stage=i: load(stage, tp)) for i, group in enumerate(self._groups)]

    @property
    def ranks(self) -> list[Rank]:
        return [rank for stage in self.stages for rank in stage]

    def step(self, tokens: Sequence[Sequence[int]], num_computed: Sequence[int]) -> tuple[Tensor, Tensor]:
        """(hidden states (T, D), logits (T, V)) of some sequences' next tokens.

        Raises:
            AssertionError: a stage's ranks do not agree on every bit of what they give.
        """
        query_lens = [len(ids) for ids in tokens]
        device = self._device
        positions = [start + i for start, ids in zip(num_computed, tokens, strict=True) for i in range(len(ids))]
        positions_T = torch.tensor(positions, device=device)
        sequences = np.repeat(np.arange(len(tokens)), query_lens)
        slots_T = torch.from_numpy(sequences * _BLOCKS_EACH * BLOCK_SIZE).to(device) + positions_T
        attn = {
            "query_lens": query_lens,
            "context_lens": [start + n for start, n in zip(num_computed, query_lens, strict=True)],
            "block_tables_SB": np.arange(len(tokens) * _BLOCKS_EACH, dtype=np.int32).reshape(-1, _BLOCKS_EACH),
            "slot_mapping_T": slots_T,
            "block_size": BLOCK_SIZE,
            "dtype": torch.float32,
        }
        inputs: list[Any] = [torch.tensor([i for ids in tokens for i in ids], device=device)] * self._tp_size
        for group, stage in zip(self._groups, self.stages, strict=True):

            def run(tp: ThreadCommunicator, stage: list[Rank] = stage, inputs: list[Any] = inputs) -> Any:
                rank = stage[tp.rank]
                return rank.model(inputs[tp.rank], positions_T, AttentionMetadata(**attn), rank.kv_caches)

            inputs = group.run(run)
            for other in inputs[1:]:
                assert all(map(torch.equal, other, inputs[0]))
        last = self.stages[-1]
        logits = [rank.model.compute_logits(hidden) for rank, hidden in zip(last, inputs, strict=True)]
        assert len({part.shape for part in logits}) == 1
        return inputs[0], torch.cat(logits, dim=1)[:, : last[0].model.vocab_size]


def run_steps(parts: ModelParts) -> tuple[Tensor, Tensor]:
    """(hidden states, logits) of all tokens: three prompts, one of them in chunks, and three tokens of each after."""
    generator = torch.Generator().manual_seed(3)
    prompts = [torch.randint(0, 256, (length,), generator=generator).tolist() for length in (29, 1, 17)]
    outputs = [parts.step([prompts[0][:20], prompts[1], prompts[2]], [0, 0, 0])]
    outputs.append(parts.step([prompts[0][20:]], [20]))
    lengths = [len(prompt) for prompt in prompts]
    for next_ids in ([[5], [200], [258]], [[7], [7], [0]], [[130], [64], [9]]):
        outputs.append(parts.step(next_ids, lengths))
        lengths = [n + 1 for n in lengths]
    return torch.cat([hidden for hidden, _ in outputs]), torch.cat([logits for _, logits in outputs])


def check_equal(parts: ModelParts, expected: tuple[Tensor, Tensor]) -> None:
    """Raises AssertionError unless the parts give ``expected`` but for the rounding of float32, and the same likeliest
    ids, except where two are as likely as rounding can tell."""
    check_near(run_steps(parts), expected)


def check_near(found: tuple[Tensor, Tensor], expected: tuple[Tensor, Tensor]) -> None:
    """As ``check_equal``, of (hidden states, logits)."""
    for numbers, wanted in zip(found, expected, strict=True):
        assert (numbers - wanted).abs().max() <= _ROUNDING * wanted.abs().max()
    first, second = expected[1].topk(2).values.unbind(-1)
    is_clear = first - second > 2 * _ROUNDING * expected[1].abs().max()
    assert is_clear.float().mean() > 0.9
    assert torch.equal(found[1].argmax(-1)[is_clear], expected[1].argmax(-1)[is_clear])
