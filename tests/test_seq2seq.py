"""The encoder-decoder: teacher forcing, decoding against exhaustive search, files, errors, BLEU."""

import gzip
import itertools
import math
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

import numlstm as nl
from numlstm.seq2seq import END, SPECIALS, START, bleu

FORMS = [
    {},
    {"input_feeding": True},
    {"bidirectional": False, "score_mode": "additive", "embedding_units": 5},
    {"score_mode": "dot", "input_feeding": True},
]
SOURCES = [[4, 2, 3], [1], [3, 3, 2, 1, 4], []]


def sharp(form, target_vocabulary=6, seed=0):
    """A model whose probabilities are far from even, so that decoders can go wrong."""
    nl.set_seed(seed)
    model = nl.Seq2Seq(5, target_vocabulary, 6, **form)
    draw = np.random.default_rng(seed)
    model.set_weights([1.2 * draw.standard_normal(w.shape) for w in model.get_weights()])
    return model


def log_probabilities(model, source, tokens):
    """Of tokens (a row each, all of one length), by teacher forcing: (rows, time, vocabulary), in float64."""
    read = np.concatenate([np.full((len(tokens), 1), START), tokens[:, :-1]], axis=1)
    sources = np.tile(np.array([*source, 0]), (len(tokens), 1))
    logits = model([sources, read]).numpy().astype(np.float64)
    logits -= logits.max(axis=-1, keepdims=True)
    return logits - np.log(np.exp(logits).sum(axis=-1, keepdims=True))


def every_sequence(model, source, limit, penalty):
    """All that can be decoded, scored by teacher forcing: [(score, tokens)], the best first."""
    alphabet = [END, *range(SPECIALS, model.target_vocabulary)]
    found = {}
    tokens = np.array(list(itertools.product(alphabet, repeat=limit)))
    steps = np.take_along_axis(log_probabilities(model, source, tokens), tokens[..., None], -1)[..., 0]
    for row, logs in zip(tokens.tolist(), steps, strict=True):
        length = row.index(END) + 1 if END in row else limit
        score = logs[:length].sum() / ((5 + length) / 6) ** penalty
        found[tuple(t for t in row[:length] if t != END)] = score, END in row[:length]
        # a whole sequence and one cut off at the limit never share their tokens: the former has fewer
    return sorted(((score, tokens) for tokens, (score, _) in found.items()), reverse=True)


@pytest.mark.parametrize("form", FORMS, ids=str)
@pytest.mark.parametrize("penalty", [0.0, 0.7, 2.0])
def test_a_wide_beam_is_exhaustive_search(form, penalty):
    model, limit = sharp(form), 4
    wide = 3**4 * 4
    found = model.beam_search(SOURCES, wide, penalty, max_length=limit, return_scores=True)
    for source, hypotheses in zip(SOURCES, found, strict=True):
        right = every_sequence(model, source, limit, penalty)
        assert len(hypotheses) == len(right) == 3**4 + 3**3 + 3**2 + 3 + 1
        for (tokens, score), (best, expected) in zip(hypotheses, [(t, s) for s, t in right], strict=True):
            assert abs(score - expected) < 1e-4
            assert tuple(tokens) == best or sum(abs(s - expected) < 1e-4 for s, _ in right) > 1


@pytest.mark.parametrize("form", FORMS, ids=str)
def test_a_beam_of_any_width_scores_what_it_finds_rightly(form):
    """A narrow beam gives sequences that exist, with their scores, and stops early without a loss."""
    for seed in range(4):
        model = sharp(form, seed=seed)
        best = [-math.inf] * len(SOURCES)
        for width in (1, 2, 5, 40):
            found = model.beam_search(SOURCES, width, 1.0, max_length=3, return_scores=True)
            for k, (source, hypotheses) in enumerate(zip(SOURCES, found, strict=True)):
                scores = dict((t, s) for s, t in every_sequence(model, source, 3, 1.0))
                assert 1 <= len(hypotheses) <= width
                assert all(abs(scores[tuple(t)] - s) < 1e-4 for t, s in hypotheses)
                assert [s for _, s in hypotheses] == sorted((s for _, s in hypotheses), reverse=True)
                best[k] = max(best[k], hypotheses[0][1])
                if width == 40:
                    assert abs(best[k] - max(scores.values())) < 1e-4


@pytest.mark.parametrize("form", FORMS, ids=str)
def test_greedy_takes_the_likeliest_token_and_is_a_beam_of_one(form):
    for seed in range(4):
        model = sharp(form, seed=seed)
        found = model.greedy(SOURCES, max_length=6)
        for source, tokens in zip(SOURCES, found, strict=True):
            prefix = []
            while len(prefix) < 6:  # the whole prefix again for each token: what greedy must not need
                logs = log_probabilities(model, source, np.array([[*prefix, END]]))[0, -1]
                logs[[0, START]] = -np.inf
                if logs.argmax() == END:
                    break
                prefix.append(int(logs.argmax()))
            assert tokens.tolist() == prefix
        beam = model.beam_search(SOURCES, 1, 0.0, max_length=6)
        assert [t.tolist() for t in beam] == [t.tolist() for t in found]
        alone = [model.greedy([s], max_length=6)[0].tolist() for s in SOURCES]
        assert alone == [t.tolist() for t in found]  # padding and neighbours change nothing


@pytest.mark.parametrize("form", FORMS[:2], ids=str)
def test_decoding_never_runs_a_prefix_again(form, monkeypatch):
    model, steps = sharp(form), []
    call = type(model.decoder).call
    monkeypatch.setattr(
        type(model.decoder), "call", lambda self, x, **o: steps.append(x.shape[1]) or call(self, x, **o)
    )
    encoders = 2
    model.greedy([[4, 3]], max_length=5)
    assert len(steps) <= encoders + 5 and set(steps[encoders:]) == {1}
    steps.clear()
    model.beam_search([[4, 3]], 4, max_length=5)
    assert len(steps) <= encoders + 5 and set(steps[encoders:]) == {1}


def test_input_feeding_and_not_are_the_same_without_the_fed_weights():
    """With zero weights on the fed vector, step by step is all at once."""
    plain, fed = nl.Seq2Seq(5, 6, 4), nl.Seq2Seq(5, 6, 4, input_feeding=True)
    weights = plain.get_weights()
    k = [w.name for w in plain.weights].index("kernel", 7)  # the decoder's, after both encoders'
    assert weights[k].shape == (4, 16)
    weights[k] = np.concatenate([weights[k], np.zeros((4, 16), "f")])
    fed.set_weights(weights)
    inputs = [np.array([[4, 2, 0], [1, 1, 3]]), np.array([[1, 3, 5, 4], [1, 4, 0, 0]])]
    a, b = plain(inputs), fed(inputs)
    np.testing.assert_allclose(a.numpy()[0], b.numpy()[0], atol=1e-6)
    np.testing.assert_allclose(a.numpy()[1, :2], b.numpy()[1, :2], atol=1e-6)
    assert np.array_equal(a.mask, inputs[1] != 0) and np.array_equal(b.mask, a.mask)


def pairs(count, seed=0):
    draw = np.random.default_rng(seed)
    sources = [draw.integers(1, 5, draw.integers(1, 5)) for _ in range(count)]
    return sources, [s[::-1] + 2 for s in sources]


@pytest.mark.parametrize("form", FORMS[:2], ids=str)
def test_learns_to_reverse(form, tmp_path):
    nl.set_seed(1)
    sources, targets = pairs(400)
    model = nl.Seq2Seq(5, 7, 32, **form)
    model.compile(nl.optimizers.Adam(0.01), metrics=["accuracy"])
    history = model.fit(sources, targets, epochs=12, batch_size=25, validation_split=0.1, verbose=0).history
    assert history["val_accuracy"][-1] > 0.95 and history["val_loss"][-1] < 0.3 * history["val_loss"][0]
    new, right = pairs(40, seed=9)
    exact = sum(np.array_equal(a, b) for a, b in zip(model.beam_search(new, 3), right, strict=True))
    assert exact >= 36
    loss, accuracy = model.evaluate(new, right, verbose=0)
    assert loss < 0.3 and accuracy > 0.95

    model.save(tmp_path / "m.safetensors")
    again = nl.load(tmp_path / "m.safetensors")
    for a, b in zip(model.predict(new), again.predict(new), strict=True):
        assert np.array_equal(a, b)
    assert again.evaluate(new, right, verbose=0) == [loss, accuracy]
    again.fit(sources[:50], targets[:50], verbose=0)


def test_the_loss_counts_targets_and_their_ends_only():
    model = sharp({})
    model.compile("sgd")
    targets = [[3, 4], [5]]
    loss = model.evaluate(SOURCES[:2], targets, verbose=0)
    logs = []
    for source, target in zip(SOURCES, targets, strict=False):
        steps = log_probabilities(model, source, np.array([[*target, END]]))[0]
        logs += steps[np.arange(len(target) + 1), [*target, END]].tolist()
    assert abs(loss + np.mean(logs)) < 1e-5


def test_padded_arrays_are_lists():
    model = sharp({})
    padded = np.array([[4, 2, 3, 0, 0], [1, 0, 0, 0, 0], [3, 3, 2, 1, 4], [0] * 5])
    for a, b in zip(model.greedy(padded, max_length=5), model.greedy(SOURCES, max_length=5), strict=True):
        assert np.array_equal(a, b)
    model.compile("sgd")
    assert np.isfinite(model.train_on_batch(padded, np.array([[3, 0], [4, 5], [5, 0], [0, 0]])))


def test_same_seed_same_bits():
    found = []
    for _ in range(2):
        nl.set_seed(5)
        model = nl.Seq2Seq(5, 7, 8, dropout=0.3)
        model.compile("adam")
        model.fit(*pairs(60), epochs=2, batch_size=8, verbose=0)
        found.append(model.get_weights())
    assert all(np.array_equal(a, b) for a, b in zip(*found, strict=True))


def test_every_pair_is_trained_on_once_an_epoch():
    from numlstm.seq2seq import _Pairs

    sources = [np.array([k + 1] * (k % 7 + 1)) for k in range(53)]
    data = _Pairs(sources, [s + 2 for s in sources], 4)
    for shuffle in (False, True):
        batches = list(data.epoch(shuffle=shuffle))
        assert len(batches) == data.steps == 14
        rows = [row for b in batches for row in b.x[0][:, 0].tolist()]
        assert sorted(rows) == list(range(1, 54)) and (rows == sorted(rows)) != shuffle
    for b in batches:
        source, read = b.x
        assert (read[:, 0] == START).all() and np.array_equal(read != 0, b.y != 0)
        assert ((b.y == END).sum(axis=1) == 1).all() and np.array_equal(read[:, 1:] > 2, b.y[:, 1:] != 0)
        assert len({tuple(s) for s in source.tolist()}) == len(source)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda m: nl.Seq2Seq(5, 3, 4), "target_vocabulary: expected more than 3"),
        (lambda m: nl.Seq2Seq(5, 6, 5), "units: expected an even number"),
        (lambda m: nl.Seq2Seq(5, 6, 4, score_mode="x"), "score_mode"),
        (lambda m: m.fit(SOURCES, [[3]], verbose=0), "y: 1 rows came, expected 4"),
        (lambda m: m.fit([[1]], [[2]], verbose=0), r"y\[0\]: expected tokens from 3 to 5, got 2"),
        (lambda m: m.fit([[1], [5]], [[3], [3]], verbose=0), r"x\[1\]: expected tokens from 1 to 4, got 5"),
        (lambda m: m.fit([[1.5]], [[3]], verbose=0), r"x\[0\]: expected a sequence of integers"),
        (lambda m: m.fit([], [], verbose=0), "x: expected a list"),
        (lambda m: m.fit([[1]], [[3]], validation_split=0.5, verbose=0), "validation_split"),
        (lambda m: m.fit([[1]], [[3]], validation_data=[[1]], verbose=0), "validation_data"),
        (lambda m: m.greedy("abc"), "x: expected a list"),
        (lambda m: m.greedy([[1]], max_length=0), "max_length"),
        (lambda m: m.beam_search([[1]], 0), "width"),
        (lambda m: m.beam_search([[1]], 2, -1.0), "length_penalty"),
        (lambda m: m(np.ones((2, 3), int)), r"expected a list \[source"),
    ],
)
def test_errors(call, message):
    model = nl.Seq2Seq(5, 6, 4)
    model.compile()
    with pytest.raises(ValueError, match=message):
        call(model)


def test_bleu():
    """Worked by hand, and the clipping example of Papineni et al. 2002 (section 2.1)."""
    assert bleu([list("abcd")], [[list("abcd")]]) == pytest.approx(100)
    the = [["the"] * 7]
    rights = [[["the", "cat", "is", "on", "the", "mat"], ["there", "is", "a", "cat", "on", "the", "mat"]]]
    assert bleu(the, rights, order=1) == pytest.approx(100 * 2 / 7)
    # unigrams 4/5, bigrams 3/4, trigrams 2/3, of length 5 where 6 is right
    expected = 100 * (4 / 5 * 3 / 4 * 2 / 3) ** (1 / 3) * math.exp(1 - 6 / 5)
    assert bleu([list("abcdx")], [[list("abcdef")]], order=3) == pytest.approx(expected)
    # over a corpus, counts are added before they are divided
    assert bleu([list("ab"), list("cx")], [[list("ab")], [list("cd")]], order=2) == pytest.approx(
        100 * (3 / 4 * 1 / 2) ** 0.5
    )
    assert bleu([list("xyz")], [[list("abc")]]) == 0
    assert bleu([[]], [[list("abc")]]) == 0
    with pytest.raises(ValueError, match="candidates"):
        bleu([], [])


def test_the_example_runs(tmp_path):
    """examples/translate.py on made-up pairs, from file to BLEU."""
    english = ["dog", "cat", "bird", "fish", "cow", "hen"]
    french = ["chien", "chat", "oiseau", "poisson", "vache", "poule"]
    lines = [
        f"The {english[i]} sees the {english[j]}.\tLe {french[i]} voit le {french[j]}.\n"
        for i, j in itertools.product(range(6), repeat=2)
    ]
    path, saved = tmp_path / "pairs.txt.gz", tmp_path / "m.safetensors"
    path.write_bytes(gzip.compress("".join(lines).encode()))
    script = Path(__file__).resolve().parents[1] / "examples" / "translate.py"
    options = ["--epochs", "2", "--units", "16", "--save", str(saved)]
    done = subprocess.run(
        [sys.executable, str(script), str(path), *options], capture_output=True, text=True, timeout=240
    )
    assert done.returncode == 0, done.stderr
    assert "34 English sentences to train on" in done.stdout and "beam of 5" in done.stdout
    assert nl.load(saved).preprocessing["french"]["level"] == "word"
