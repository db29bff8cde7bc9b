"""A block's hash stands for all tokens up to its end, and for whose they are."""

from __future__ import annotations

import hashlib
import struct

import pytest

from cluster.core.block_hash import block_hashes

TOKENS = [3, 1, 4, 1, 5, 9, 2, 6, 5]


def test_only_full_blocks_are_named():
    assert len(block_hashes(TOKENS, 4)) == 2
    assert len(block_hashes(TOKENS[:8], 4)) == 2
    assert block_hashes(TOKENS[:3], 4) == []
    assert block_hashes([], 4) == []


def test_a_digest_covers_its_parent_and_its_tokens():
    root = hashlib.sha256(hashlib.sha256(b"tenant").digest()).digest()
    first = hashlib.sha256(root + struct.pack("=4I", *TOKENS[:4])).digest()
    second = hashlib.sha256(first + struct.pack("=4I", *TOKENS[4:8])).digest()
    assert block_hashes(TOKENS, 4, b"tenant") == [first, second]


def test_equal_prefixes_have_equal_hashes_up_to_the_first_difference():
    other = [*TOKENS[:5], 7, *TOKENS[6:]]
    a, b = block_hashes(TOKENS, 2), block_hashes(other, 2)
    assert a[:2] == b[:2]
    assert not set(a[2:]) & set(b[2:])


def test_equal_blocks_at_different_places_differ():
    assert len(set(block_hashes([7] * 12, 3))) == 4


def test_a_chain_goes_on_from_its_parent():
    whole = block_hashes(TOKENS, 2, b"salt")
    assert block_hashes(TOKENS[4:], 2, parent=whole[1]) == whole[2:]


def test_salts_share_nothing():
    chains = [set(block_hashes(TOKENS, 2, salt)) for salt in (b"", b"a", b"b", b"ab")]
    assert len(set().union(*chains)) == sum(map(len, chains))


def test_a_salt_cannot_imitate_a_parent():
    """Whose salt spells another's block must not continue the other's chain."""
    victim = block_hashes(TOKENS, 4, b"victim")
    root = hashlib.sha256(hashlib.sha256(b"victim").digest()).digest()
    packed = struct.pack("=4I", *TOKENS[:4])
    for salt in (root + packed, hashlib.sha256(b"victim").digest(), victim[0]):
        assert not set(block_hashes(TOKENS[4:], 4, salt)) & set(victim)


@pytest.mark.parametrize("token_id", [-1, 2**32])
def test_ids_out_of_range_are_refused(token_id: int):
    with pytest.raises(OverflowError):
        block_hashes([token_id], 1)
