"""The demo's data split: by path, stable, disjoint."""

import pytest

from cluster.demo.corpus import END_OF_TEXT, encode_documents, is_held_out, read_corpus, train_tokenizer


@pytest.fixture(scope="module")
def library(tmp_path_factory):
    """A small tree with a duplicate across splits, an undecodable file and an installed package."""
    root = tmp_path_factory.mktemp("lib")
    paths = [f"m{index}.py" for index in range(200)]
    for path in paths:
        (root / path).write_text(f"def {path[:-3]}():\n    return {path!r}\n")
    held_out = next(path for path in paths if is_held_out(path))
    kept = next(path for path in paths if not is_held_out(path))
    (root / kept).write_text((root / held_out).read_text())
    (root / "latin.py").write_bytes(b"# \xe9\n")
    (root / "site-packages").mkdir()
    (root / "site-packages" / "other.py").write_text("other = 1\n")
    return root


def test_about_five_percent_of_paths_are_held_out():
    held_out = sum(is_held_out(f"package/module_{index}.py") for index in range(20_000))
    assert 0.04 < held_out / 20_000 < 0.06


def test_splits_are_disjoint_and_duplicates_count_as_held_out(library):
    corpus = read_corpus(library)
    assert len(corpus.train) + len(corpus.held_out) == 199
    assert not set(corpus.train) & set(corpus.held_out)
    assert len(corpus.held_out) == sum(is_held_out(f"m{index}.py") for index in range(200))
    assert not any("other" in text for text in corpus.train + corpus.held_out)


def test_tokenizer_round_trips_any_text(library):
    tokenizer = train_tokenizer(read_corpus(library).train, vocab_size=300)
    text = "def é(x):\n\treturn '日本' # \x00\x7f"
    (ids,) = encode_documents(tokenizer, [text])
    assert ids[0] == tokenizer.token_to_id(END_OF_TEXT)
    assert tokenizer.decode(ids[1:].tolist()) == text
