"""The library's cells: their weights' order, their options, and that a cell is made once."""

from __future__ import annotations

import re

import numpy as np
import pytest
import zoo
from numpy.testing import assert_allclose

from numlstm.kernels import cells, reference
from numlstm.kernels.derive import ACTIVATIONS


def sigma(x: np.ndarray) -> np.ndarray:
    return 1 / (1 + np.exp(-x))


def step(cell, *arguments: np.ndarray) -> tuple[np.ndarray, ...]:
    return reference.functions(cell)[0][0](*arguments)[: len(cell.state)]


@pytest.mark.parametrize(
    ("cell", "gates", "state", "params"),
    [
        (cells.lstm(), ("i", "f", "g", "o"), ("h", "c"), ()),
        (cells.elman(), ("a",), ("h",), ()),
        (cells.gru(), ("r", "z", "n"), ("h",), ("b_n",)),
    ],
    ids=lambda v: getattr(v, "name", None),
)
def test_names(cell, gates, state, params) -> None:
    assert (cell.gates, cell.state, cell.params) == (gates, state, params)
    assert cell.name in repr(cell)


def test_gru_splits_its_candidate() -> None:
    gru = cells.gru().stages[0]
    assert gru.x_gates == ("n_x", "r", "z") and gru.h_gates == ("r", "z", "n_h")


@pytest.mark.parametrize("activation", ["tanh", "relu", "softsign"])
@pytest.mark.parametrize("recurrent_activation", ["sigmoid", "hard_sigmoid"])
def test_activations_stand_where_keras_has_them(activation: str, recurrent_activation: str) -> None:
    gate = {"sigmoid": sigma, "hard_sigmoid": lambda x: np.clip(x / 6 + 0.5, 0, 1)}[recurrent_activation]
    squash = {"tanh": np.tanh, "relu": lambda x: np.maximum(x, 0), "softsign": lambda x: x / (1 + abs(x))}[
        activation
    ]
    i, f, g, o, c, h, b = np.random.default_rng(0).standard_normal((7, 40)) * 2
    new_c = gate(f) * c + gate(i) * squash(g)
    for found, right in zip(
        step(cells.lstm(activation, recurrent_activation), i, f, g, o, c),
        (gate(o) * squash(new_c), new_c),
        strict=True,
    ):
        assert_allclose(found, right, rtol=1e-13, atol=1e-15)
    candidate = squash(g + gate(i) * (o + b))
    (found,) = step(cells.gru(activation, recurrent_activation), i, f, g, o, h, b)
    assert_allclose(found, (1 - gate(f)) * candidate + gate(f) * h, rtol=1e-13, atol=1e-15)
    (found,) = step(cells.elman(activation), i)
    assert_allclose(found, squash(i), rtol=1e-13, atol=1e-15)


@pytest.mark.parametrize("activation", sorted(ACTIVATIONS))
def test_every_activation_makes_every_cell(activation: str) -> None:
    for cell in (
        cells.elman(activation),
        cells.lstm(activation, activation),
        cells.gru(activation, activation),
    ):
        assert cell.stages[0].forward_source and cell.stages[0].backward_source


def test_forms_of_the_lstm_are_their_papers_cells() -> None:
    values = np.random.default_rng(0).standard_normal((8, 40)) * 2
    for form, paper in ((cells.lstm(peephole=True), zoo.peephole), (cells.lstm(coupled=True), zoo.coupled)):
        assert form.gates == paper.gates and form.params == paper.params
        arguments = values[: len(paper.arguments)]
        for found, right in zip(step(form, *arguments), zoo.NAIVE[paper.name](*arguments), strict=True):
            assert_allclose(found, right, rtol=1e-13, atol=1e-15)
    i, f, g, o, c = values[:5]
    _, new_c = step(cells.lstm(cell_clip=0.7), i, f, g, o, c)
    assert_allclose(new_c, np.clip(sigma(f) * c + sigma(i) * np.tanh(g), -0.7, 0.7), rtol=1e-13)
    assert np.abs(new_c).max() == 0.7


def test_zoneout_keeps_each_state_apart() -> None:
    zoned = cells.zoneout(cells.lstm())
    assert (
        zoned.aux == ("z_h", "z_c") and zoned.name == "lstm_zoneout" and zoned is cells.zoneout(cells.lstm())
    )
    i, f, g, o, c, h = np.random.default_rng(0).standard_normal((6, 40))
    new_h, _ = step(cells.lstm(), i, f, g, o, c)
    values = {"i": i, "f": f, "g": g, "o": o, "c": c, "h": h, "z_h": 0.25, "z_c": 1.0}
    found = step(zoned, *(values[a] for a in zoned.arguments))
    assert_allclose(found[0], 0.25 * h + 0.75 * new_h, rtol=1e-13)
    assert_allclose(found[1], c, rtol=1e-13)


def test_a_cell_is_made_once() -> None:
    assert cells.lstm() is cells.lstm()
    assert cells.lstm("tanh", "sigmoid") == cells.lstm()
    assert cells.elman("relu") is cells.elman("relu") and cells.elman("relu") != cells.elman()


@pytest.mark.parametrize("make", [cells.lstm, cells.gru, cells.elman])
def test_unknown_activation(make) -> None:
    with pytest.raises(
        ValueError, match=r"unknown activation 'softmax' for a cell; known: affine, elu, .*tanh"
    ):
        make("softmax")


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("relu(alpha=1)", "has no parameter 'alpha'; known: none"),
        ("elu(beta=1)", "has no parameter 'beta'; known: alpha"),
        ("elu(1)", "expected name=number, got '1'"),
        ("elu(alpha=x)", "expected name=number, got 'alpha=x'"),
        ("elu(alpha=1", "unknown activation"),
    ],
)
def test_bad_parameters_of_an_activation(name: str, message: str) -> None:
    with pytest.raises(ValueError, match=re.escape(message)):
        cells.elman(name)


def test_clip_holds_the_input_of_every_activation() -> None:
    i, f, g, o, c = np.random.default_rng(0).standard_normal((5, 40)) * 4
    held = lambda x: np.clip(x, -0.5, 0.5)
    gate, squash = lambda x: sigma(held(x)), lambda x: np.tanh(held(x))
    h, new_c = step(cells.lstm(clip=0.5), i, f, g, o, c)
    assert_allclose(new_c, gate(f) * c + gate(i) * squash(g), rtol=1e-13)
    assert_allclose(h, gate(o) * squash(new_c), rtol=1e-13)


def test_input_forget_couples_the_other_way() -> None:
    """ONNX's input_forget: f = 1 - i."""
    made = cells.lstm(coupled="input", peephole=True)
    assert made.gates == ("i", "g", "o") and made.params == ("p_i", "p_o")
    i, g, o, c, p_i, p_o = np.random.default_rng(0).standard_normal((6, 40))
    h, new_c = step(made, i, g, o, c, p_i, p_o)
    write = sigma(i + p_i * c)
    assert_allclose(new_c, (1 - write) * c + write * np.tanh(g), rtol=1e-13)
    assert_allclose(h, sigma(o + p_o * new_c) * np.tanh(new_c), rtol=1e-13)
    with pytest.raises(ValueError, match="coupled: expected False, True or 'input', got 'output'"):
        cells.lstm(coupled="output")


def test_clipped_states() -> None:
    (h,) = step(cells.clipped(cells.elman("relu"), 0.5), np.array([-1.0, 0.2, 3.0]))
    assert h.tolist() == [0.0, 0.2, 0.5]
    assert cells.elman("relu", cell_clip=0.5) == cells.clipped(cells.elman("relu"), 0.5)
