"""PyTorch side by side, for whoever has it (`make test-peers`): LSTM at shapes, masks and lengths drawn at
random.

hypothesis draws the shapes and shrinks a failure to the smallest one; packed sequences are asked of PyTorch
as its users write them.
"""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import numlstm as nl

pytestmark = pytest.mark.peers
torch = pytest.importorskip("torch")

# after the skip: both import PyTorch's oracle
import torch_oracle  # noqa: E402
from oracle import SEQUENCES, Sequence, inputs  # noqa: E402
from test_torch_recorded import our_sequence  # noqa: E402


def largest(ours: np.ndarray, theirs: np.ndarray, typical: float) -> float:
    return float(np.max(np.abs(ours - theirs), initial=0) / max(np.max(np.abs(theirs), initial=0), typical))


def agree(s: Sequence, backend: str, dtype: type, bound: float) -> None:
    numbers = inputs(s)
    theirs = torch_oracle.sequence(s, numbers, torch.float64)
    with nl.use_backend(backend):
        ours = our_sequence(s, numbers, dtype)
    # a gradient that all but vanishes, as a single saturated unit's, is held to a hundredth of the largest
    of_gradients = 1e-2 * max(np.max(np.abs(a), initial=0) for name, a in theirs.items() if name[0] == "d")
    floor = lambda name: of_gradients if name[0] == "d" else 1e-3
    errors = {name: largest(ours[name], theirs[name], floor(name)) for name in theirs}
    assert max(errors.values()) <= bound, {k: f"{v:.1e}" for k, v in errors.items()}


@pytest.mark.parametrize("s", [s for s in SEQUENCES if s.cell == "lstm"], ids=lambda s: s.name)
def test_lstm_at_ten_shapes(s):
    agree(s, "cpu", np.float32, 1e-4 if s.T == 500 else 2e-5)


patterns = st.sampled_from(["full", "lengths", "holes"])
cells = st.sampled_from(["lstm", "lstm", "rnn_tanh"])


@settings(max_examples=40, deadline=None)
@given(cells, st.integers(1, 12), st.integers(1, 9), st.integers(1, 9), st.integers(1, 70), patterns)
def test_any_shape_and_mask(cell, T, B, I, H, pattern):
    s = Sequence(cell, T, B, I, H, pattern)
    agree(s, "cpu", np.float32, 2e-5)
    agree(s, "reference", np.float64, 1e-10)


@settings(max_examples=25, deadline=None)
@given(st.lists(st.integers(1, 11), min_size=1, max_size=8), st.integers(1, 5), st.integers(1, 40), st.data())
def test_packed_sequences(lengths, features, units, data):
    """nn.LSTM over pack_padded_sequence, in float32 through oneDNN, against LSTM with lengths=."""
    draw = np.random.default_rng(data.draw(st.integers(0, 2**32 - 1)))
    B, T = len(lengths), max(lengths)
    x = draw.standard_normal((B, T, features), np.float32)
    module = torch.nn.LSTM(features, units, batch_first=True)
    packed = torch.nn.utils.rnn.pack_padded_sequence(
        torch.from_numpy(x), torch.tensor(lengths), batch_first=True, enforce_sorted=False
    )
    with torch.no_grad():
        y, (h, c) = module(packed)
        y = torch.nn.utils.rnn.pad_packed_sequence(y, batch_first=True)[0].numpy()
    layer = nl.LSTM(units, return_sequences=True, return_state=True)
    layer.build((None, T, features))
    bias = (module.bias_ih_l0 + module.bias_hh_l0).detach().numpy()
    kernels = [w.detach().numpy().T.copy() for w in (module.weight_ih_l0, module.weight_hh_l0)]
    layer.set_weights([*kernels, bias])
    ours, our_h, our_c = (np.asarray(a) for a in layer(x, lengths=lengths))
    valid = np.arange(T) < np.array(lengths)[:, None]
    np.testing.assert_allclose(ours[valid], y[valid], atol=2e-6)
    np.testing.assert_allclose(our_h, h[0].numpy(), atol=2e-6)
    np.testing.assert_allclose(our_c, c[0].numpy(), atol=2e-6)
    # past its length a row repeats its last output, where PyTorch pads with zeros
    for b, n in enumerate(lengths):
        np.testing.assert_array_equal(ours[b, n:], np.broadcast_to(ours[b, n - 1], (T - n, units)))


@settings(max_examples=25, deadline=None)
@given(st.lists(st.integers(1, 11), min_size=1, max_size=8), st.integers(1, 5), st.integers(1, 40), st.data())
def test_packed_sequences_in_both_directions(lengths, features, units, data):
    """nn.LSTM(bidirectional=True) over pack_padded_sequence against Bidirectional: results and gradients."""
    draw = np.random.default_rng(data.draw(st.integers(0, 2**32 - 1)))
    B, T = len(lengths), max(lengths)
    x, dy = draw.standard_normal((B, T, features)), draw.standard_normal((B, T, 2 * units))
    module = torch.nn.LSTM(features, units, batch_first=True, bidirectional=True, dtype=torch.float64)
    theirs_x = torch.from_numpy(x).requires_grad_()
    packed = torch.nn.utils.rnn.pack_padded_sequence(
        theirs_x, torch.tensor(lengths), batch_first=True, enforce_sorted=False
    )
    y, (h, c) = module(packed)
    y = torch.nn.utils.rnn.pad_packed_sequence(y, batch_first=True)[0]
    ((y * torch.from_numpy(dy)).sum() + h[1].sum()).backward()

    lstm = nl.LSTM(units, return_sequences=True, return_state=True, dtype="float64")
    layer = nl.Bidirectional(lstm)
    layer.build((None, T, features))
    turned = lambda get: [
        get(getattr(module, f"{weight}_l0{end}")).numpy().T.copy()
        for end in ("", "_reverse")
        for weight in ("weight_ih", "weight_hh", "bias_ih")
    ]
    with torch.no_grad():
        for end in ("", "_reverse"):  # one bias of ours stands for two of theirs
            getattr(module, f"bias_ih_l0{end}").add_(getattr(module, f"bias_hh_l0{end}"))
    layer.set_weights(turned(lambda w: w.detach()))
    ours_x = nl.Variable(x, dtype="float64")
    with nl.GradientTape() as tape:
        ours = layer(ours_x, lengths=lengths)
        loss = (ours[0] * dy).sum() + ours[3].sum()
    gradients = tape.gradient(loss, [*layer.weights, ours_x])
    states = (h[0], c[0], h[1], c[1])
    for a, b in zip(ours, (y, *states), strict=True):  # padding included: zeros in both
        np.testing.assert_allclose(a.numpy(), b.detach().numpy(), atol=1e-12)
    for a, b in zip(gradients, [*turned(lambda w: w.grad), theirs_x.grad.numpy()], strict=True):
        np.testing.assert_allclose(a, b, atol=1e-10)
