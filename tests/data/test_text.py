"""Vocabularies, parallel streams, sampling and generation."""

import numpy as np
import pytest

from numlstm.data.text import Vocabulary, generate, read_text, sample, streams

SHAKESPEARE = read_text("tinyshakespeare")


def test_characters_come_back_exactly():
    vocabulary = Vocabulary.fit(SHAKESPEARE)
    assert len(vocabulary) == 66  # 65 different characters and the unknown token
    ids = vocabulary.encode(SHAKESPEARE)
    assert ids.dtype == np.int32 and ids.shape == (1_115_394,) and ids.min() == 1 and ids.max() == 65
    assert vocabulary.decode(ids) == SHAKESPEARE


@pytest.mark.parametrize(
    "text", ["Well, yes (no).", "don't stop\nnow: go on!", "a <unk> b", "one.\n\ntwo, three?", "first-rate"]
)
def test_plain_words_come_back_with_their_spacing(text):
    vocabulary = Vocabulary.fit(text, "word")
    assert vocabulary.decode(vocabulary.encode(text)) == text


def test_words_are_numbered_by_frequency_then_spelling():
    assert Vocabulary.fit("b a b c a b", "word").tokens == ("<unk>", "b", "a", "c")
    assert Vocabulary.fit("b a b c a b", "word", max_size=3).tokens == ("<unk>", "b", "a")
    assert Vocabulary.fit("b a b c a b", "word", min_count=3).tokens == ("<unk>", "b")


def test_strangers_become_the_unknown_token():
    vocabulary = Vocabulary.fit("abc")
    assert vocabulary.encode("aßc").tolist() == [1, 0, 3]
    assert vocabulary.decode([1, 0]) == "a<unk>"


def test_a_vocabulary_survives_json():
    import json

    vocabulary = Vocabulary.fit("Größe\n'\"", "char")
    copy = Vocabulary.from_dict(json.loads(json.dumps(vocabulary.to_dict())))
    assert copy.tokens == vocabulary.tokens and copy.level == "char"


@pytest.mark.parametrize(
    "call, message",
    [
        (lambda: Vocabulary.fit(""), "text is empty"),
        (lambda: Vocabulary.fit("a", "letter"), "'letter'"),
        (lambda: Vocabulary.fit("ab", min_count=2), "min_count=2"),
        (lambda: Vocabulary.fit("ab", max_size=1), "max_size must be at least 2, got 1"),
        (lambda: Vocabulary(["<unk>", "a", "a"]), "'a' more than once"),
        (lambda: Vocabulary(["a"]), "must begin with '<unk>'"),
        (lambda: Vocabulary.from_dict({"level": "char"}), "tokens"),
        (lambda: Vocabulary.fit("ab").decode([3]), "0..2, got 3"),
        (lambda: Vocabulary.fit("ab").decode([-1]), "0..2, got -1"),
    ],
)
def test_a_bad_vocabulary_is_refused(call, message):
    with pytest.raises(ValueError, match=message):
        call()


def test_streams_continue_from_row_to_row():
    ids = np.arange(101)
    x, y = streams(ids, 4)
    assert x.shape == y.shape == (4, 25)
    np.testing.assert_array_equal(y, x + 1)
    np.testing.assert_array_equal(x.reshape(-1), ids[:100])


@pytest.mark.parametrize(
    "ids, batch_size, message",
    [
        (np.arange(4), 4, "4 tokens; 4 parallel streams need at least 5"),
        (np.arange(4), 0, "batch_size must be at least 1, got 0"),
        (np.zeros((2, 2), int), 1, r"shape \(2, 2\)"),
        (np.zeros(4), 1, "float64"),
    ],
)
def test_streams_that_cannot_be(ids, batch_size, message):
    with pytest.raises(ValueError, match=message):
        streams(ids, batch_size)


def test_sampling_follows_the_distribution():
    random = np.random.default_rng(0)
    probabilities = np.array([0.5, 0.2, 0.3])
    drawn = np.bincount([sample(np.log(probabilities), random) for _ in range(20_000)], minlength=3) / 20_000
    np.testing.assert_allclose(drawn, probabilities, atol=0.015)
    drawn = np.bincount([sample(np.log(probabilities), random, top_k=2) for _ in range(5_000)], minlength=3)
    assert drawn[1] == 0 and abs(drawn[0] / 5_000 - 0.625) < 0.03
    # Temperature T draws from p ** (1/T).
    drawn = np.bincount([sample(np.log(probabilities), random, temperature=0.5) for _ in range(20_000)])
    np.testing.assert_allclose(drawn / 20_000, probabilities**2 / np.sum(probabilities**2), atol=0.015)
    assert {sample(np.log(probabilities), random, banned=(0,)) for _ in range(200)} == {1, 2}


def test_cold_sampling_takes_the_likeliest():
    logits = np.array([1.0, 5.0, 4.999])
    random = np.random.default_rng(0)
    assert sample(logits, random, temperature=0) == 1
    assert sample(logits, random, temperature=1e-300) == 1


@pytest.mark.parametrize(
    "options, message",
    [
        ({"temperature": -1.0}, "temperature"),
        ({"temperature": np.nan}, "temperature"),
        ({"top_k": -1}, "top_k"),
        ({"banned": (0, 1)}, "no token is left"),
    ],
)
def test_sampling_that_cannot_be(options, message):
    with pytest.raises(ValueError, match=message):
        sample(np.zeros(2), np.random.default_rng(0), **options)


class Bigrams:
    """A stand-in for a model: logits by the last token alone; `seen` records what it was fed."""

    def __init__(self, size):
        self.table = np.random.default_rng(1).normal(size=(size, size))
        self.seen = []

    def stream(self, batch_size):
        assert batch_size == 1
        return self

    def step(self, ids):
        self.seen.append(int(ids[0]))
        return self.table[ids]


def test_generation_feeds_back_what_it_draws():
    vocabulary = Vocabulary.fit("abcdef")
    model = Bigrams(len(vocabulary))
    text = "".join(generate(model, vocabulary, "fed", 20, seed=3))
    assert len(text) == 20
    assert vocabulary.decode(model.seen) == "fed" + text
    again = "".join(generate(Bigrams(len(vocabulary)), vocabulary, "fed", 20, seed=3))
    other = "".join(generate(Bigrams(len(vocabulary)), vocabulary, "fed", 20, seed=4))
    assert text == again != other


def test_generated_words_are_spaced():
    vocabulary = Vocabulary.fit("one two , three .", "word")
    text = "one" + "".join(generate(Bigrams(len(vocabulary)), vocabulary, "one", 30))
    assert " ," not in text and " ." not in text and "<unk>" not in text
    assert vocabulary.decode(vocabulary.encode(text)) == text


@pytest.mark.parametrize(
    "prompt, length, message",
    [("", 1, "prompt is empty"), ("a?", 1, r"never seen: '\?'"), ("a", -1, "length must be >= 0")],
)
def test_generation_that_cannot_be(prompt, length, message):
    with pytest.raises(ValueError, match=message):
        generate(Bigrams(3), Vocabulary.fit("ab"), prompt, length)


def test_texts_that_cannot_be_read(tmp_path):
    with pytest.raises(FileNotFoundError, match="bundled texts: tinyshakespeare"):
        read_text(tmp_path / "none.txt")
    (tmp_path / "empty.txt").write_bytes(b"")
    with pytest.raises(ValueError, match="empty"):
        read_text(tmp_path / "empty.txt")
    (tmp_path / "latin.txt").write_bytes("Größe".encode("latin-1"))
    with pytest.raises(ValueError, match="byte 2 is 0xf6"):
        read_text(tmp_path / "latin.txt")
    with pytest.raises(ValueError, match="folder"):
        read_text(tmp_path)


def test_line_ends_and_byte_order_marks_are_evened_out(tmp_path):
    (tmp_path / "windows.txt").write_bytes(b"\xef\xbb\xbfa\r\nb")
    assert read_text(tmp_path / "windows.txt") == "a\nb"
