"""Which value of a cell's graph stands for a gate."""

import numpy as np
import pytest
import zoo

from numlstm.kernels import cells, gates, reference
from numlstm.kernels.derive import Cell, TraceError, emit

LINES = {  # the text of each gate's value; constants are K(...)
    "lstm": {"i": "sigmoid(i)", "f": "sigmoid(f)", "g": "tanh(g)", "o": "sigmoid(o)"},
    "gru": {"r": "sigmoid(r)", "z": "sigmoid(z)", "n": "tanh(n_x + (v0 * (n_h + b_n)))"},
    "peephole": {"f": "sigmoid(f + (c * p_f))", "o": "sigmoid(o + (p_o * c1))"},
    "coupled": {"f": "sigmoid(f)", "g": "tanh(g)"},
    "lstm97": {"g": "(v0 * K(4.0)) - K(2.0)", "o": "sigmoid(o)"},
    "minimal": {"f": "sigmoid(f)", "n": "tanh(n_x + (n_h * v0))"},
    "wide": {"a": "a", "p": "sigmoid(p)", "q": "v0 / K(2.0)", "u": "u_x + u_h"},
    "gru_before": {"r": "sigmoid(r)", "n": "tanh(n)"},
    "gru_zoneout": {"z": "sigmoid(z)"},
    "lstm_coupled_peephole": {"f": "sigmoid(f + (c * p_f))"},
    "lstm_projected_zoneout": {"o": "sigmoid(o)"},
    "lstm_normalized": {"f": "sigmoid((bx_f + (gx_f * w1)) + (gh_f * w5))"},
    "elman_normalized": {"a": "h1"},
}
FURTHER = {
    "activation of a product": (cells.lstm("silu"), "g", "g * v0"),
    "activation of pieces": (
        cells.lstm("tanh", "hard_sigmoid"),
        "f",
        "minimum(maximum((f * K(0.16666666666666666)) + K(0.5), K(0.0)), K(1.0))",
    ),
    "limited": (cells.lstm(clip=3.0), "o", "sigmoid(minimum(maximum(o, K(-3.0)), K(3.0)))"),
    "no activation": (cells.lstm("linear", "linear", peephole=True, cell_clip=1.0), "g", "g"),
    "no activation, a peephole": (cells.lstm("linear", "linear", peephole=True), "f", "f + (c * p_f)"),
    "named": (cells.slstm(), "i", "exp(i - m1)"),
}
CASES = {
    f"{name}, {gate}": (cell, gate, text)
    for name, cell in {**zoo.CELLS, **zoo.FORMS, **zoo.STAGED}.items()
    for gate, text in LINES.get(name, {}).items()
} | FURTHER


@pytest.mark.parametrize("case", CASES)
def test_a_gates_value_is_its_activation(case):
    cell, gate, text = CASES[case]
    given = {n: n.value for n in cell.graph.nodes if n.op == "leaf"} | cell.known
    source = emit("f", (), [gates.gate_nodes(cell)[gate]], given).splitlines()[1:]
    last = source[-1].removeprefix("    return ").removesuffix(",")
    lines = {line.split(" = ")[0].strip(): line.split(" = ")[1] for line in source[:-1]}
    assert lines.get(last, last) == text


@pytest.mark.parametrize("name", [*zoo.CELLS, *zoo.STAGED])
def test_every_cell_has_finite_gates_of_its_units(name):
    cell = {**zoo.CELLS, **zoo.STAGED}[name]
    draw = np.random.default_rng(0)
    T, B, I, H, P = 4, 3, 2, 5, 5
    projection = None
    if cell.projects:
        P = 3
        projection = draw.standard_normal((H, P))
    G, R = len(cell.gates), len(cell.recurrent)
    arguments = (
        draw.standard_normal((T, B, I)),
        draw.standard_normal((I, G * H)),
        draw.standard_normal((P, R * H)),
        draw.standard_normal(G * H),
        tuple(draw.standard_normal(H) for _ in cell.params),
    )
    state = tuple(draw.random((B, H if k else P)) + 1 for k in range(len(cell.state)))
    aux = tuple(np.full((1, 1, 1), 0.2) for _ in cell.aux)
    out = reference.forward(cell, *arguments, state, None, training=True, aux=aux, projection=projection)
    after = (out.h, *out.states)
    before = tuple(np.concatenate([s[None], a[:-1]]) for s, a in zip(state, after, strict=True))
    found = gates.gate_values(cell, *arguments, before, aux=aux, projection=projection)
    assert list(found)[: len(cell.gates)] == list(cell.gates)
    assert all(a.shape == (T, B, H) and np.isfinite(a).all() for a in found.values())
    # all steps at once are the steps one by one
    for t in range(T):
        alone = gates.gate_values(
            cell, arguments[0][t : t + 1], *arguments[1:], tuple(s[t : t + 1] for s in before), aux=aux,
            projection=projection,
        )  # fmt: skip
        for gate, a in alone.items():
            np.testing.assert_allclose(a[0], found[gate][t], rtol=1e-12)


def test_names_that_can_not_be():
    with pytest.raises(TraceError, match="'b' is given to two values"):
        Cell(lambda a: named("b", tanh(a)) + named("b", a), "a", name="twice")  # noqa: F821
    with pytest.raises(TraceError, match="expected a name, got 'a b'"):
        Cell(lambda a: named("a b", tanh(a)), "a", name="spaced")  # noqa: F821
    clash = Cell(lambda a, h: named("h", tanh(a + h)), "a", name="clash")  # noqa: F821
    with pytest.raises(TraceError, match=r"named\('h', ...\) is the name of one of its arguments"):
        gates.gate_nodes(clash)

    def unused(a):
        named("n", normalize(a))  # noqa: F821
        return tanh(a)  # noqa: F821

    cell = Cell(unused, "a")
    states = (np.zeros((1, 1, 2)),)
    with pytest.raises(TraceError, match=r"needs normalize\(\), but no new state does"):
        gates.gate_values(cell, np.ones((1, 1, 1)), np.ones((1, 2)), np.ones((2, 2)), None, (), states)
