"""Names for the content of KV blocks: the only place in ``core`` that sees token ids."""

from __future__ import annotations

from array import array
from collections.abc import Iterable
from hashlib import sha256

_TOKEN_BYTES = array("I").itemsize


def block_hashes(
    token_ids: Iterable[int], block_size: int, salt: bytes = b"", parent: bytes | None = None
) -> list[bytes]:
    """One sha256 digest per full block, each over its parent's digest and its own token ids.

    So a digest stands for all tokens up to the block's end, as the block's KV does. ``salt`` enters at the root: under
    different salts no two digests are equal, and tenants that must not see each other's timing share nothing.

    Args:
        token_ids: each in [0, 2**32); the tokens after the last full block are passed over.
        block_size: tokens per block, at least 1.
        salt: whose blocks they are; not used where ``parent``, which carries it, is given.
        parent: the digest of the block before the first token; None: they begin a sequence.

    Raises:
        OverflowError: an id is out of range.
    """
    packed = array("I", token_ids).tobytes()
    # Hashed twice, the root's last message is shorter than any block's: no salt can be made up to imitate a parent.
    digest = sha256(sha256(salt).digest()).digest() if parent is None else parent
    num_bytes = block_size * _TOKEN_BYTES
    digests = []
    for start in range(0, len(packed) - num_bytes + 1, num_bytes):
        digest = sha256(digest + packed[start : start + num_bytes]).digest()
        digests.append(digest)
    return digests
