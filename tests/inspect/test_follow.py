"""What units are held against: features of texts and series, and the correlation with them."""

import numpy as np
import pytest

from numlstm.inspect.follow import correlations, series_features, strongest, text_features

TEXT = 'def f(a[1]):\n    "Two (x)"\n    return 2.\n\nEnd!'


def test_features_of_characters_count_as_a_reader_would():
    tokens = list(TEXT)
    found = text_features(tokens)
    line, column = 0, 0
    for k, ch in enumerate(tokens):
        assert found["position in line"][k] == column
        assert found["line ends"][k] == (ch == "\n")
        assert found["depth of brackets"][k] == max(0, sum(TEXT[: k + 1].count(c) for c in "([{") - sum(
            TEXT[: k + 1].count(c) for c in ")]}"
        ))  # fmt: skip
        column = 0 if ch == "\n" else column + 1
        line += ch == "\n"
    quoted = [k for k in range(len(TEXT)) if found["inside quotes"][k]]
    assert TEXT[quoted[0] : quoted[-1] + 1] == '"Two (x)'
    assert found["indentation"][TEXT.index("return")] == 4 and found["indentation"][0] == 0
    assert found["position in word"][TEXT.index("turn")] == 3
    assert found["position in sentence"][TEXT.index("\n\n")] == 0
    assert found["position in text"][-1] == len(TEXT) - 1
    assert all(len(f) == len(TEXT) for f in found.values())


def test_nothing_looks_ahead():
    """What comes later changes no feature of what came before."""
    a, b = text_features(list(TEXT)), text_features(list(TEXT[:25] + '?)]"\n' + TEXT[30:]))
    for name in set(a) & set(b):
        np.testing.assert_array_equal(a[name][:25], b[name][:25])


def test_words_have_their_own_features_and_still_ones_are_left_out():
    found = text_features(["Extraordinary", "\n", "it", "is", "."])
    assert found["long words"].tolist() == [1, 0, 0, 0, 0] and "vowels" not in found
    assert "digits" not in found and "inside quotes" not in found


def test_correlation_is_pearsons_and_bears_gaps():
    draw = np.random.default_rng(0)
    values, feature = draw.standard_normal((50, 3)), draw.standard_normal(50)
    values[5], feature[9] = np.nan, np.nan
    found = correlations({"f": feature}, values)
    known = ~np.isnan(feature) & ~np.isnan(values[:, 0])
    expected = [np.corrcoef(feature[known], values[known, u])[0, 1] for u in range(3)]
    np.testing.assert_allclose(found[0], expected, rtol=1e-12)
    np.testing.assert_array_equal(correlations({"f": np.ones(50)}, values), 0)


def test_the_strongest_unit_is_the_one_that_was_planted():
    series = {"wave": np.sin(np.arange(80) / 5)}
    values = np.random.default_rng(1).standard_normal((80, 6))
    values[:, 4] = -np.gradient(series["wave"])
    (unit, feature, r), *rest = strongest(series_features(series), values, 3)
    assert (unit, feature) == (4, "wave: change") and r < -0.95 and len(rest) == 2
    assert strongest({}, values, 3) == []
    assert strongest({"f": np.arange(80.0)}, values * 0, 3) == []


@pytest.mark.parametrize("tokens", [["a"], ["\n", "\n"]])
def test_texts_of_next_to_nothing(tokens):
    assert all(np.isfinite(f).all() and len(f) == len(tokens) for f in text_features(tokens).values())
