"""Names of a sequence's KV blocks as it grows."""

from __future__ import annotations

from collections.abc import Sequence

from cluster.core.block_hash import block_hashes


class HashChain:
    """Hashes the full blocks of one sequence, each once.

    Args:
        block_size: tokens per block.
        salt: whose blocks they are.
        prompt_hashes: of the prompt's full blocks, from which candidates of one prompt go on.
    """

    __slots__ = ("_block_size", "_last", "_num_blocks", "_salt")

    def __init__(self, block_size: int, salt: bytes, prompt_hashes: Sequence[bytes]) -> None:
        self._block_size = block_size
        self._salt = salt
        self._num_blocks = len(prompt_hashes)
        self._last = prompt_hashes[-1] if prompt_hashes else None

    def extend(self, token_ids: Sequence[int]) -> list[bytes]:
        """Hashes of the blocks that have been filled since the last call.

        Args:
            token_ids: the whole sequence.
        """
        unnamed = token_ids[self._num_blocks * self._block_size :]
        hashes = block_hashes(unnamed, self._block_size, self._salt, self._last)
        if hashes:
            self._num_blocks += len(hashes)
            self._last = hashes[-1]
        return hashes
