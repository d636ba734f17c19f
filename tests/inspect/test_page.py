"""The viewer's page as text: what it holds, that it holds all of it, and that nothing gets out or in."""

import base64
import hashlib
import html
import json
import re
from html.parser import HTMLParser

import numpy as np
import pytest

import numlstm as nl
from numlstm.inspect import page, trace
from numlstm.inspect.pages import LEVELS, equations, quantized, read_block
from numlstm.kernels import cells

EVIL = '</script><script>alert(1)</script><img src=x onerror="alert(2)">&amp;<!--$about ${x} \u2028'


class Parsed(HTMLParser):
    """The page as a browser reads it: its elements, and the text of its scripts."""

    def __init__(self, text):
        super().__init__()
        self.elements, self.scripts, self._within = [], {}, None
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        attrs = dict(attrs)
        self.elements.append((tag, attrs))
        if tag == "script":
            self._within = attrs.get("id", "code")
            self.scripts[self._within] = ""

    def handle_endtag(self, tag):
        if tag == "script":
            self._within = None

    def handle_data(self, data):
        if self._within is not None:
            self.scripts[self._within] += data


def about(text):
    return json.loads(Parsed(text).scripts["about"])


def decoded(text, array, steps):
    """An array (time, units) of a page, as its script unpacks it."""
    raw, n = read_block(text, array["block"]), array["units"]
    low, width = np.frombuffer(raw, "<f4", n), np.frombuffer(raw, "<f4", n, 4 * n)
    levels = np.frombuffer(raw, np.uint8, n * steps, 8 * n).reshape(n, steps).T
    return np.where(levels == 255, np.nan, low + levels * width), width


@pytest.fixture(scope="module")
def chars():
    """A character model, its text, and the page of it."""
    text = list(f"To be (or not)\nto {EVIL} be.\n" * 3)
    vocabulary = ["<unk>", *sorted(set(text))]
    nl.set_seed(0)
    model = nl.Sequential(
        [
            nl.Embedding(len(vocabulary), 6, input_shape=(None,)),
            nl.LSTM(7, return_sequences=True, name="lstm"),
            nl.Dense(len(vocabulary)),
        ]
    )
    model.compile("sgd", nl.losses.SparseCategoricalCrossentropy(from_logits=True))
    ids = np.array([[vocabulary.index(t) for t in text]])
    found = trace(model, ids, np.roll(ids, -1, axis=1))
    return text, vocabulary, found, page(found, tokens=text, vocabulary=vocabulary, title=EVIL, notes=EVIL)


def test_every_number_comes_back_within_half_a_level(chars):
    text, _, found, written = chars
    told = about(written)
    (layer,) = told["layers"]
    assert {a["name"] for a in layer["arrays"]} == set(found.layers["lstm"].arrays())
    for array in layer["arrays"]:
        values = found[f"lstm/{array['name']}"][0]
        shown, width = decoded(written, array, len(text))
        assert (np.abs(shown - values) <= 0.5 * width + 1e-6 * np.abs(values).max()).all()
        np.testing.assert_allclose(width, np.ptp(values, axis=0) / LEVELS, rtol=1e-5)
    assert told["tokens"] == text and told["steps"] == len(text)
    assert layer["kind"] == "lstm" and layer["equations"].startswith("i = sigmoid(~i)")
    assert {a["name"]: a["unipolar"] for a in layer["arrays"]} == {
        **dict.fromkeys("ifo", True), "g": False, "h": False, "c": False, **{f"d_{n}": False for n in "hcifgo"}
    }  # fmt: skip


def test_scores_and_expectations_are_in_it(chars):
    text, vocabulary, found, written = chars
    told = about(written)
    scores = np.frombuffer(read_block(written, told["layers"][0]["arrays"][1]["follows"]), np.int8)
    scores = scores.reshape(len(told["features"]), 7) / 100
    values, k = found["lstm/c"][0], told["features"].index("line ends")
    expected = [np.corrcoef([t == "\n" for t in text], values[:, u])[0, 1] for u in range(7)]
    np.testing.assert_allclose(scores[k], expected, atol=0.005)
    top = told["expects"]["top"]
    raw = np.frombuffer(read_block(written, told["expects"]["block"]), "<u2").reshape(2, len(text), top)
    logits = found.outputs[0].astype(float)
    chance = np.exp(logits) / np.exp(logits).sum(1, keepdims=True)
    assert (raw[0][:, 0] == chance.argmax(1)).all()
    np.testing.assert_allclose(raw[1][:, 0] / 65535, chance.max(1), atol=1e-5)
    assert told["vocabulary"] == vocabulary and "surprise" in told["features"]


def test_what_a_text_says_stays_text(chars):
    *_, written = chars
    parsed = Parsed(written)
    assert not any(tag in ("img", "iframe", "object", "embed", "link", "base") for tag, _ in parsed.elements)
    assert not any(name.startswith("on") or name == "style" for _, attrs in parsed.elements for name in attrs)
    scripts = [attrs for tag, attrs in parsed.elements if tag == "script"]
    runs = [a for a in scripts if "type" not in a]
    assert runs == [{}]  # the page's own
    kinds = {a["type"] for a in scripts if "type" in a}
    assert kinds == {"application/json", "text/plain"}
    assert f"<h1>{html.escape(EVIL)}</h1>" in written and "alert(1)</script>" not in written
    assert "".join(json.loads(parsed.scripts["about"])["tokens"]).count(EVIL) == 3


def test_nothing_is_fetched_and_one_script_may_run(chars):
    *_, written = chars
    parsed = Parsed(written)
    assert not any(
        {"src", "href", "action", "data", "poster", "srcset"} & set(attrs) for _, attrs in parsed.elements
    )
    assert not re.search(
        r"https?:|//[a-z]+\.[a-z]|url\((?!#)|@import|import\(|fetch\(|XMLHttp|WebSocket", written
    )
    (policy,) = [
        a["content"] for tag, a in parsed.elements if a.get("http-equiv") == "Content-Security-Policy"
    ]
    rules = dict(rule.strip().split(" ", 1) for rule in policy.split(";"))
    assert rules["default-src"] == "'none'" and set(rules) == {"default-src", "script-src", "style-src"}
    digest = base64.b64encode(hashlib.sha256(parsed.scripts["code"].encode()).digest()).decode()
    assert rules["script-src"] == f"'sha256-{digest}'"
    style = re.search(r"<style>(.*?)</style>", written, re.S)[1]
    digest = base64.b64encode(hashlib.sha256(style.encode()).digest()).decode()
    assert rules["style-src"] == f"'sha256-{digest}'"


def test_what_a_person_needs_who_cannot_see_or_point(chars):
    *_, written = chars
    parsed = Parsed(written)
    ids = {a["id"] for _, a in parsed.elements if "id" in a}
    for _, attrs in parsed.elements:
        for name in ("aria-labelledby", "aria-describedby", "for"):
            assert attrs.get(name) is None or attrs[name] in ids
    labelled = [a for tag, a in parsed.elements if tag == "svg"]
    assert len(labelled) == 3 and all(a["role"] == "img" and a["aria-label"] for a in labelled)
    assert ("html", {"lang": "en"}) in parsed.elements
    assert any(a.get("aria-live") == "polite" for _, a in parsed.elements)
    for key in ("←", "→", "↑", "↓", "Page Up", "Home", "["):
        assert f"<kbd>{key}</kbd>" in written
    assert "prefers-color-scheme: dark" in written


def test_colours_can_be_read_on_their_ground():
    """WCAG's contrast, 4.5 for text: ink and soft ink on both grounds, light and dark."""
    from importlib import resources

    style = (resources.files("numlstm.inspect") / "viewer" / "page.css").read_text(encoding="utf-8")

    def luminance(colour):
        c = np.array([int(colour[k : k + 2], 16) for k in (1, 3, 5)]) / 255
        c = np.where(c <= 0.03928, c / 12.92, ((c + 0.055) / 1.055) ** 2.4)
        return float(c @ [0.2126, 0.7152, 0.0722])

    def contrast(a, b):
        low, high = sorted((luminance(a), luminance(b)))
        return (high + 0.05) / (low + 0.05)

    themes = [
        dict(re.findall(r"--(\w+): (#\w{6})", block)) for block in re.findall(r":root \{(.*?)\}", style, re.S)
    ]
    assert len(themes) == 2
    for theme in themes:
        for ink in ("ink", "soft"):
            for ground in ("ground", "panel"):
                assert contrast(theme[ink], theme[ground]) >= 4.5
        assert contrast(theme["focus"], theme["ground"]) >= 3
        for full in ("plus", "minus"):  # black or white on full colour
            assert max(contrast("#000000", theme[full]), contrast("#ffffff", theme[full])) >= 4.5


def test_a_series_with_gaps_masked_steps_and_both_directions():
    x = np.sin(np.arange(40) / 3)
    model = nl.Sequential(
        [nl.Bidirectional(nl.GRU(3, return_sequences=True), name="b"), nl.SLSTM(2, name="s")]
    )
    valid = np.arange(40)[None] < 30
    found = trace(model, x[None, :, None], mask=valid)
    shown = x.copy()
    shown[4] = np.nan
    told = about(written := page(found, series={"a <b>": shown}))
    assert told["series"][0]["name"] == "a <b>" and told["series"][0]["values"][4] is None
    assert [layer["kind"] for layer in told["layers"]] == ["gru", "gru", "other"]
    assert [layer["backwards"] for layer in told["layers"]] == [False, True, False]
    gate = next(a for a in told["layers"][0]["arrays"] if a["name"] == "z")
    values, _ = decoded(written, gate, 40)
    assert np.isnan(values[30:]).all() and np.isfinite(values[:30]).all()


def test_layers_of_another_length_are_left_out_and_misfits_refused():
    x = np.zeros((2, 6, 1), np.float32)
    found = trace(nl.Sequential([nl.LSTM(2, name="a")]), x)
    series = {"x": np.arange(6.0)}
    for options, message in (
        ({}, "tokens, series: expected one of them"),
        ({"tokens": list("abcdef"), "series": series}, "tokens, series: expected one of them"),
        ({"tokens": list("abc")}, r"tokens: expected as many steps as a layer has \(a: 6\), got 3"),
        ({"series": {"x": np.zeros((6, 1))}}, "series: expected at least one array of shape"),
        ({"series": series, "row": 2}, "row: expected a number from 0 to 1, got 2"),
        ({"tokens": list("abcdef"), "vocabulary": ["a"]}, r"vocabulary: expected outputs of shape \(6, 1\)"),
    ):
        with pytest.raises(ValueError, match=message):
            page(found, **options)


def test_quantized_values_of_every_kind():
    values = np.array(
        [[0.0, 5.0, np.nan, 1e30, -2.0], [1.0, 5.0, np.nan, -1e30, np.inf], [0.3, 5.0, np.nan, 0, 4]]
    )
    low, width, levels = quantized(values)
    assert levels.shape == (5, 3) and levels.dtype == np.uint8
    back = np.where(levels == 255, np.nan, low[:, None] + levels * width[:, None]).T
    assert (np.isnan(back) == ~np.isfinite(values)).all()
    np.testing.assert_allclose(back[:, 0], values[:, 0], atol=0.5 / LEVELS)
    np.testing.assert_array_equal(back[:, 1], 5)
    np.testing.assert_allclose(back[:, 3], values[:, 3], atol=1e30 / LEVELS)
    assert levels[2].tolist() == [255, 255, 255] and levels[4].tolist() == [0, 255, LEVELS]


def test_a_page_of_5000_characters_and_512_units_is_below_20_megabytes():
    """Values without any order, which pack worst: six arrays of 5000 x 512, as an LSTM has them."""
    from numlstm.inspect.tracing import LayerTrace, Trace

    draw = np.random.default_rng(0)

    def sigmoid(v):
        return 1 / (1 + np.exp(-v))

    steps, units = 5000, 512
    shape = (1, steps, units)
    gates = {n: sigmoid(draw.standard_normal(shape, np.float32)) for n in "ifo"}
    gates["g"] = np.tanh(draw.standard_normal(shape, np.float32))
    c = np.tanh(draw.standard_normal(shape, np.float32))
    initial = {n: np.zeros((1, units), np.float32) for n in "hc"}
    layer = LayerTrace({"h": gates["o"] * np.tanh(c), "c": c}, gates, {}, initial, None, False, cells.lstm())
    written = page(Trace({"lstm": layer}, None, None), tokens=list("ab\n c" * 1000))
    assert 10e6 < len(written) < 20e6


EQUATIONS = {
    cells.gru(): "h = (n * (1 - z)) + (h_old * z)",
    cells.gru(reset_after=False): "~n = W x + R (h_old * r) + b",
    cells.elman(): "h = a",
    cells.elman("linear"): "a = ~a",
    cells.slstm(): "n = i + (n_old * f)",
    cells.lstm(peephole=True): "f = sigmoid(~f + (c_old * p_f))",
}


@pytest.mark.parametrize("cell", EQUATIONS, ids=lambda c: c.name)
def test_equations_are_those_of_the_cell(cell):
    assert EQUATIONS[cell] in equations(cell).splitlines()
