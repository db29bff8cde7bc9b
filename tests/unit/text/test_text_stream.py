"""Pieces put together are the text, whatever the tokens, the chunking and the stop strings."""

import random

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from text_checkpoints import sentencepiece_like
from tokenizers import decoders

from cluster.text.detokenizer import create_detokenizer
from cluster.text.stop_strings import StopStrings
from cluster.text.text_stream import TextStream
from cluster.text.tokenizer import Tokenizer

shared_tokenizer = settings(
    max_examples=300, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.function_scoped_fixture]
)


def stream(tokenizer, token_ids, stop=(), *, min_tokens=0, sizes=(1,)):
    """The text, and the number of tokens taken in when the stop string matched (None without one)."""
    text_stream, text, taken, index = TextStream(tokenizer, stop, min_tokens=min_tokens), "", 0, 0
    while taken < len(token_ids):
        size = sizes[index % len(sizes)]
        delta = text_stream.push(token_ids[taken : taken + size])
        assert delta.offset == len(text)
        text, index = text + delta.text, index + 1
        if delta.stopped:
            return text, taken + delta.num_tokens
        taken += size
    delta = text_stream.finish()
    assert delta.offset == len(text)
    return text + delta.text, None


@shared_tokenizer
@given(
    text=st.text(alphabet=st.characters(exclude_categories=["Cs"], exclude_characters="\0"), min_size=1, max_size=40)
)
def test_encoded_text_comes_back_whole(tokenizer, text):
    ids = tokenizer.encode(text, add_special_tokens=False)
    assert stream(tokenizer, ids)[0] == tokenizer.decode(ids)


@shared_tokenizer
@given(data=st.data())
def test_random_bytes_equal_decode(byte_level_tokenizer, data):
    """Random ids make invalid UTF-8 and cut characters at every place."""
    tokenizer = byte_level_tokenizer
    ids = data.draw(st.lists(st.integers(0, tokenizer.vocab_size - 1), max_size=40))
    sizes = data.draw(st.lists(st.integers(1, 5), min_size=1, max_size=4))
    assert stream(tokenizer, ids, sizes=sizes)[0] == tokenizer.decode(ids)


def test_special_tokens_have_no_text(tokenizer):
    ids = tokenizer.encode("def", add_special_tokens=False)
    end = tokenizer.backend.token_to_id("<|end|>")
    assert stream(tokenizer, [end, *ids, end])[0] == tokenizer.decode(ids) != ""


def test_an_incomplete_character_is_held_then_replaced(byte_level_tokenizer):
    detokenizer = create_detokenizer(byte_level_tokenizer)
    byte_ids = [byte_level_tokenizer.backend.token_to_id(token) for token in ("ð", "Ł", "ĺ")]  # first 3 of an emoji's 4
    assert [detokenizer.push(token_id) for token_id in byte_ids] == ["", "", ""]
    assert detokenizer.finish() == "\ufffd"


@shared_tokenizer
@given(data=st.data())
def test_random_tokens_of_a_byte_fallback_vocabulary_equal_decode(byte_fallback_tokenizer, data):
    """Any tokens in any order, with byte runs that are valid, or that have no complete character in them."""
    tokenizer = byte_fallback_tokenizer
    first_byte = tokenizer.backend.token_to_id("<0x00>")
    not_bytes = st.sampled_from([*range(first_byte), *range(first_byte + 256, tokenizer.vocab_size + 3)])
    valid = st.text(alphabet=st.characters(exclude_categories=["Cs"]), max_size=5).map(str.encode)
    broken = st.sampled_from([b"\xff", b"\xe6\x97", b"\xf0\x9f\x99", b"\xed\xa0\x80", b"\x80\xf0\xbf"])
    separator = tokenizer.backend.token_to_id("a")  # keeps runs apart
    ids: list[int] = []
    for run, others in data.draw(st.lists(st.tuples(valid | broken, st.lists(not_bytes, max_size=3)), max_size=4)):
        ids += [*(first_byte + byte for byte in run), separator, *others, separator]
    assert stream(tokenizer, ids)[0] == tokenizer.decode(ids)


def test_a_wrong_byte_does_not_take_the_run_along(byte_fallback_tokenizer):
    """A line feed is out at once, whatever byte comes next; only the bytes that are no character are replaced."""
    token_to_id = byte_fallback_tokenizer.backend.token_to_id
    detokenizer = create_detokenizer(byte_fallback_tokenizer)
    pushed = [detokenizer.push(token_to_id(token)) for token in ("<0x0A>", "<0xE6>", "<0x97>", "<0x0A>", "a")]
    assert pushed == ["\n", "", "", "\ufffd\ufffd\n", "a"]
    assert detokenizer.finish() == ""


@pytest.mark.parametrize(
    "decoder",
    [decoders.Metaspace(), decoders.BPEDecoder("f"), decoders.WordPiece("▁"), None],  # "f" ends "f" and "▁def"
    ids=["metaspace", "word end", "word piece", "none"],
)
@settings(max_examples=200, deadline=None, derandomize=True)
@given(data=st.data())
def test_other_decoders_equal_decode(decoder, data):
    backend = sentencepiece_like()
    backend.decoder = decoder
    tokenizer = Tokenizer(backend, vocab_size=backend.get_vocab_size(), chat_template=None)
    ids = data.draw(st.lists(st.integers(0, tokenizer.vocab_size), max_size=20))
    assert stream(tokenizer, ids)[0] == tokenizer.decode(ids)


def first_match(text, stop):
    """Naive: the shortest prefix of the text that ends with a stop string; where that match begins."""
    for end in range(1, len(text) + 1):
        lengths = [len(s) for s in stop if text[:end].endswith(s)]
        if lengths:
            return end, end - max(lengths)
    return None


@settings(max_examples=500, deadline=None, derandomize=True)
@given(
    text=st.text(alphabet="abc", max_size=30),
    stop=st.lists(st.text(alphabet="ab", min_size=1, max_size=6), min_size=1, max_size=4),
    seed=st.integers(0, 2**16),
)
def test_stop_strings_against_a_naive_search(text, stop, seed):
    rng = random.Random(seed)
    strings, out, begin, match = StopStrings(tuple(stop)), "", 0, first_match(text, stop)
    while begin < len(text):
        size = rng.randint(1, 4)
        piece, stopped = strings.push(text[begin : begin + size], may_stop=True)
        out, begin = out + piece, begin + size
        if stopped:
            assert match is not None and begin - size < match[0] <= begin
            assert out == text[: match[1]]
            return
        # No more is held than could still become a match.
        held = text[len(out) : begin]
        assert text.startswith(out) and (not held or any(s.startswith(held) and s != held for s in stop))
    assert match is None
    assert out + strings.finish() == text


@pytest.mark.parametrize(
    ("text", "stop", "kept"),
    [
        ("aaab", ("aab",), "a"),
        ("xabcy", ("abcd", "bc"), "xa"),
        ("xabc", ("abc", "bc"), "x"),
        ("abab", ("abac",), "abab"),
        ("日本語", ("本",), "日"),
    ],
)
def test_overlapping_stop_strings(byte_level_tokenizer, text, stop, kept):
    ids = byte_level_tokenizer.encode(text)
    for size in (1, 2, len(ids)):
        assert stream(byte_level_tokenizer, ids, stop, sizes=(size,))[0] == kept


def test_the_completing_token_is_counted(byte_level_tokenizer):
    ids = byte_level_tokenizer.encode("def read stop return")
    for size in (1, 3, len(ids)):
        _, num_tokens = stream(byte_level_tokenizer, ids, ("stop",), sizes=(size,))
        assert "stop" in byte_level_tokenizer.decode(ids[:num_tokens])
        assert "stop" not in byte_level_tokenizer.decode(ids[: num_tokens - 1])


def test_min_tokens_passes_over_early_matches(byte_level_tokenizer):
    ids = [byte_level_tokenizer.backend.token_to_id(char) for char in "abab"]
    assert stream(byte_level_tokenizer, ids, ("ab",), min_tokens=2) == ("", 2)
    assert stream(byte_level_tokenizer, ids, ("ab",), min_tokens=3) == ("ab", 4)
    assert stream(byte_level_tokenizer, ids, ("ab",), min_tokens=5) == ("abab", None)
