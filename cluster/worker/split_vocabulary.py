"""Drawing tokens where each rank of a stage has the logits of a part of the vocabulary.

The rows are dealt over the ranks: each gets the whole vocabulary of its own, draws their tokens, and learns those of
all others. A draw is keyed by (seed, candidate, position), so it does not matter who makes it. Where every row takes
just its likeliest token, the ranks exchange their candidates and no logits.

Shapes: W ranks, R rows that sample, C rows dealt to each rank, O rows dealt to this one, V vocabulary, U the part of it
that a rank has, the same on all (what is beyond the vocabulary is padding).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from cluster.core.step import SampledToken
from cluster.distributed.communicator import Communicator
from cluster.worker.input_batch import SequenceState
from cluster.worker.sampler import SamplingRow, is_plain_greedy

Sample = Callable[[Tensor, Sequence[SequenceState]], list[SampledToken | None]]
"""What ``sampler.sample`` does."""

Peaks = Callable[[Tensor], tuple[Tensor, Tensor]]
"""(values, ids) of each row's largest logit, the lowest id on ties; the value is not finite where a row has NaN."""


@dataclass(frozen=True, slots=True)
class Deal:
    """Which rank draws which rows.

    Attributes:
        order: of the rows: rank 0's first, then rank 1's.
        num_each: rows of each rank, C; the last ranks may have fewer, or none.
    """

    order: list[int]
    num_each: int

    @classmethod
    def of(cls, rows: Sequence[SamplingRow], num_ranks: int) -> Deal:
        """Even, but for the rows with log probabilities: all of them are rank 0's, which answers the step."""
        wanted = [index for index, row in enumerate(rows) if row.sampling.logprobs is not None]
        others = [index for index, row in enumerate(rows) if row.sampling.logprobs is None]
        return cls(wanted + others, max(len(wanted), -(-len(rows) // num_ranks)))

    def rows_of(self, rank: int) -> list[int]:
        return self.order[rank * self.num_each : (rank + 1) * self.num_each]


class SplitVocabulary:
    """One rank's end of it. All ranks call the same methods in the same order.

    Attributes:
        rank, num_ranks: of those that share the vocabulary; their parts follow each other in their order.
    """

    def __init__(self, tp: Communicator, vocab_range: tuple[int, int], vocab_size: int) -> None:
        """
        Args:
            vocab_range: first and last + 1 of the ids that this rank has.
            vocab_size: V.
        """
        self.rank, self.num_ranks = tp.rank, tp.size
        self._tp = tp
        self._num_ids = vocab_range[1] - vocab_range[0]
        self._vocab_size = vocab_size

    def greedy(self, logits_RU: Tensor, peaks: Peaks) -> Tensor:
        """int64 (R,): the likeliest tokens, the lowest id on ties; -1 where a row's largest logit is not finite."""
        values_R, ids_R = peaks(logits_RU[:, : self._num_ids])
        # Doubles hold both exactly.
        own_2R = torch.stack((values_R.double(), ids_R.double()))
        all_W2R = own_2R.new_empty((self.num_ranks, *own_2R.shape))
        self._tp.all_gather(own_2R, all_W2R)
        values_WR, ids_WR = all_W2R.unbind(1)
        ranks_1R = values_WR.argmax(0, keepdim=True)
        tokens_R = (ids_WR.gather(0, ranks_1R) + ranks_1R * logits_RU.shape[1]).squeeze(0).long()
        return tokens_R.masked_fill_(~values_WR.amax(0).isfinite(), -1)

    def own_rows(self, logits_RU: Tensor, deal: Deal) -> Tensor:
        """(O, V), contiguous: the rows that are dealt to this rank, whole."""
        num_rows, part = logits_RU.shape
        sent_WCU = logits_RU.new_empty((self.num_ranks, deal.num_each, part))
        torch.index_select(logits_RU, 0, self._index(deal, logits_RU), out=sent_WCU.view(-1, part)[:num_rows])
        got_WCU = torch.empty_like(sent_WCU)
        self._tp.all_to_all(sent_WCU, got_WCU)
        num_own = len(deal.rows_of(self.rank))
        rows_OV = logits_RU.new_empty((num_own, self._vocab_size))
        for rank in range(self.num_ranks):
            columns_OU = rows_OV[:, rank * part : (rank + 1) * part]
            columns_OU.copy_(got_WCU[rank, :num_own, : columns_OU.shape[1]])
        return rows_OV

    def share(self, tokens_O: Tensor, deal: Deal) -> Tensor:
        """int64 (R,), by row: the tokens of all ranks."""
        own_C = tokens_O.new_full((deal.num_each,), -1)
        own_C[: len(tokens_O)] = tokens_O
        all_WC = own_C.new_empty((self.num_ranks, deal.num_each))
        self._tp.all_gather(own_C, all_WC)
        dealt_R = all_WC.view(-1)[: len(deal.order)]
        return torch.empty_like(dealt_R).index_copy_(0, self._index(deal, dealt_R), dealt_R)

    def _index(self, deal: Deal, like: Tensor) -> Tensor:
        order = torch.tensor(deal.order, dtype=torch.int64, pin_memory=like.is_cuda)
        return order.to(like.device, non_blocking=True)


class SplitSampler:
    """The sampler of a rank that has a part of the vocabulary.

    Args:
        sample: of whole rows.
        peaks: of parts of rows.
    """

    def __init__(self, vocabulary: SplitVocabulary, sample: Sample, peaks: Peaks) -> None:
        self._vocabulary, self._sample, self._peaks = vocabulary, sample, peaks

    def sample(self, logits_RU: Tensor, rows: Sequence[SequenceState]) -> list[SampledToken | None]:
        """One token per row, the same on all ranks; with its log probabilities on rank 0 alone. None for a row whose
        largest logit is not finite."""
        if all(is_plain_greedy(row) for row in rows):
            return _sampled(self._vocabulary.greedy(logits_RU, self._peaks))
        deal = Deal.of(rows, self._vocabulary.num_ranks)
        own = deal.rows_of(self._vocabulary.rank)
        drawn = self._sample(self._vocabulary.own_rows(logits_RU, deal), [rows[index] for index in own])
        token_ids = [-1 if token is None else token.token_id for token in drawn]
        tokens_O = torch.tensor(token_ids, dtype=torch.int64, device=logits_RU.device)
        sampled = _sampled(self._vocabulary.share(tokens_O, deal))
        for index, token in zip(own, drawn, strict=True):
            sampled[index] = token
        return sampled


def torch_peaks(logits_RU: Tensor) -> tuple[Tensor, Tensor]:
    """``Peaks`` in torch."""
    values_R, ids_R = logits_RU.max(dim=-1)
    return values_R, ids_R


def _sampled(tokens_R: Tensor) -> list[SampledToken | None]:
    return [SampledToken(token_id=token) if token >= 0 else None for token in tokens_R.tolist()]
