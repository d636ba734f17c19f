"""PyTorch's recurrent modules at 200 configurations drawn at random: LSTM, GRU and RNN, stacked, in both directions, with
a projection, over packed sequences; outputs, last states and every gradient.

PyTorch runs in double precision. `reference` in double precision must agree to rounding; `cpu` in single precision within
the project's bound. hypothesis draws the configurations and shrinks a failure to the smallest one.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import numlstm as nl

pytestmark = pytest.mark.peers
torch = pytest.importorskip("torch")

GATES = {"LSTM": 4, "GRU": 3, "tanh": 1, "relu": 1}
WORK = 4e6  # multiplications of a forward pass at most; longer ones are cut in time, then in batch
CPU_BOUND, REFERENCE_BOUND = 2e-5, 1e-9
EXAMPLES = 200
REFERENCE_STEPS = 120  # the reference steps through time in Python: longer ones are asked of the cpu alone


@dataclass(frozen=True)
class Configuration:
    """One module of PyTorch, and one input. `packed`: rows end at lengths of their own."""

    kind: str
    T: int
    B: int
    I: int
    H: int
    layers: int
    bidirectional: bool
    projection: int
    packed: bool
    bias: bool
    given_state: bool
    seed: int

    @property
    def directions(self) -> int:
        return 1 + self.bidirectional

    @property
    def output(self) -> int:
        return self.projection or self.H


@st.composite
def configurations(draw: Any) -> Configuration:
    size = st.integers(1, 200)
    kind = draw(st.sampled_from(["LSTM", "LSTM", "GRU", "tanh", "relu"]))
    I, H, T, B = (draw(size) for _ in range(4))
    layers, both = draw(st.integers(1, 3)), draw(st.booleans())
    projection = draw(st.integers(1, H - 1)) if kind == "LSTM" and H > 1 and draw(st.booleans()) else 0
    step = layers * (1 + both) * GATES[kind] * H * (I + 2 * H)
    T = int(max(1, min(T, WORK // step)))
    B = int(max(1, min(B, WORK // (step * T))))
    flags = [draw(st.booleans()) for _ in range(3)]
    return Configuration(kind, T, B, I, H, layers, both, projection, *flags, draw(st.integers(0, 2**32 - 1)))


def their_module(c: Configuration) -> Any:
    torch.manual_seed(c.seed)
    options = {
        "num_layers": c.layers,
        "bidirectional": c.bidirectional,
        "batch_first": True,
        "bias": c.bias,
        "dtype": torch.float64,
    }
    if c.kind in ("tanh", "relu"):
        return torch.nn.RNN(c.I, c.H, nonlinearity=c.kind, **options)
    if c.kind == "GRU":
        return torch.nn.GRU(c.I, c.H, **options)
    return torch.nn.LSTM(c.I, c.H, proj_size=c.projection, **options)


def ends(c: Configuration) -> list[str]:
    """The endings of PyTorch's names of weights, layer by layer, forward first."""
    return [f"_l{k}{end}" for k in range(c.layers) for end in ("", "_reverse")[: c.directions]]


def in_our_layout(c: Configuration, get: Any) -> list[np.ndarray]:
    """`get(name)` of each of PyTorch's weights (or gradients), in the order and layout of ours."""
    found = []
    for end in ends(c):
        found += [get(f"weight_ih{end}").T, get(f"weight_hh{end}").T]
        if c.bias and c.kind == "GRU":
            found.append(np.stack([get(f"bias_ih{end}"), get(f"bias_hh{end}")]))
        elif c.bias:
            found.append(get(f"bias_ih{end}"))
        if c.projection:
            found.append(get(f"weight_hr{end}").T)
    return found


def numbers(c: Configuration) -> dict[str, Any]:
    """Input, lengths, initial states by direction, and the upstream gradients of all results."""
    draw = np.random.default_rng(c.seed)
    normal = draw.standard_normal
    widths = (c.output, c.H) if c.kind == "LSTM" else (c.output,)
    states = lambda: [[normal((c.B, w)) * 0.5 for w in widths] for _ in ends(c)]
    # so that what enters a gate is of the order of 1: of a saturated unit's gradient float32 keeps few digits
    spread = min(1.0, (3 * c.H / c.I) ** 0.5)
    return {
        "x": normal((c.B, c.T, c.I)) * spread,
        "lengths": draw.integers(1, c.T + 1, c.B) if c.packed else np.full(c.B, c.T),
        "state": states() if c.given_state else None,
        "dy": normal((c.B, c.T, c.output * c.directions)),
        "dfinal": states(),
    }


def theirs(c: Configuration, module: Any, n: dict[str, Any]) -> dict[str, Any]:
    x = torch.from_numpy(n["x"]).requires_grad_()
    state = None
    if n["state"] is not None:
        state = tuple(torch.from_numpy(np.stack(s)).requires_grad_() for s in zip(*n["state"], strict=True))
    fed = x
    if c.packed:
        fed = torch.nn.utils.rnn.pack_padded_sequence(
            x, torch.tensor(n["lengths"]), batch_first=True, enforce_sorted=False
        )
    y, final = module(fed, state if state is None or c.kind == "LSTM" else state[0])
    if c.packed:
        y = torch.nn.utils.rnn.pad_packed_sequence(y, batch_first=True, total_length=c.T)[0]
    final = final if c.kind == "LSTM" else (final,)
    loss = (y * torch.from_numpy(n["dy"])).sum()
    for f, d in zip(final, zip(*n["dfinal"], strict=True), strict=True):
        loss = loss + (f * torch.from_numpy(np.stack(d))).sum()
    loss.backward()
    named = dict(module.named_parameters())
    gradients = in_our_layout(c, lambda name: named[name].grad.numpy())
    found = {"y": y, "dx": x.grad} | {f"final {k}": f for k, f in enumerate(final)}
    if state is not None:
        found |= {f"dstate {k}": s.grad for k, s in enumerate(state)}
    return {k: v.detach().numpy() for k, v in found.items()} | {f"dw {k}": g for k, g in enumerate(gradients)}


def our_layers(c: Configuration, dtype: str) -> list[Any]:
    kinds = {"LSTM": nl.LSTM, "GRU": nl.GRU}
    options = {"use_bias": c.bias, "return_sequences": True, "return_state": True, "dtype": dtype}
    if c.projection:
        options["projection"] = c.projection
    layers = []
    for _ in range(c.layers):
        layer = kinds[c.kind](c.H, **options) if c.kind in kinds else nl.SimpleRNN(c.H, c.kind, **options)
        layers.append(nl.Bidirectional(layer) if c.bidirectional else layer)
    return layers


def ours(
    c: Configuration, weights: list[np.ndarray], n: dict[str, Any], dtype: str
) -> tuple[dict[str, Any], list[np.ndarray]]:
    """Results and gradients by name, and for each layer which of its outputs are above zero."""
    layers, width = our_layers(c, dtype), c.I
    share = len(weights) // c.layers
    for k, layer in enumerate(layers):
        layer.build((None, c.T, width))
        layer.set_weights(weights[k * share : (k + 1) * share])
        width = c.output * c.directions
    x = nl.Variable(n["x"], dtype=dtype)
    state = None
    if n["state"] is not None:
        state = [[nl.Variable(s, dtype=dtype) for s in pair] for pair in n["state"]]
    valid = np.arange(c.T) < n["lengths"][:, None]
    with nl.GradientTape() as tape:
        y, finals, active = x, [], []
        for k, layer in enumerate(layers):
            options = {"lengths": n["lengths"]} if c.packed else {}
            here = slice(k * c.directions, (k + 1) * c.directions)
            if state is not None:
                options["initial_state"] = [s for pair in state[here] for s in pair]
            y, *final = layer(y, **options)
            per = len(final) // c.directions
            active.append(y.numpy() > 0)
            finals += [final[j * per : (j + 1) * per] for j in range(c.directions)]
        # past its end PyTorch pads a row with zeros; a layer of one direction repeats its last output there
        y = y * nl.Tensor(valid[..., None].astype(dtype))
        loss = (y * nl.Tensor(n["dy"].astype(dtype))).sum()
        for pair, d in zip(finals, n["dfinal"], strict=True):
            for f, g in zip(pair, d, strict=True):
                loss = loss + (f * nl.Tensor(g.astype(dtype))).sum()
    variables = [w for layer in layers for w in layer.weights]
    leaves = [x, *variables, *(s for pair in state or () for s in pair)]
    gradients = tape.gradient(loss, leaves)
    found = {"y": y.numpy(), "dx": gradients[0]}
    found |= {f"dw {k}": g for k, g in enumerate(gradients[1 : 1 + len(variables)])}
    by_state = lambda values: {k: np.stack(s) for k, s in enumerate(zip(*values, strict=True))}
    found |= {f"final {k}": s for k, s in by_state([[f.numpy() for f in pair] for pair in finals]).items()}
    if state is not None:
        rest, per = gradients[1 + len(variables) :], len(state[0])
        pairs = [rest[j : j + per] for j in range(0, len(rest), per)]
        found |= {f"dstate {k}": s for k, s in by_state(pairs).items()}
    return found, active


def largest(found: np.ndarray, right: np.ndarray, typical: float) -> float:
    return float(np.max(np.abs(found - right)) / max(np.max(np.abs(right)), typical))


@settings(max_examples=EXAMPLES, deadline=None, derandomize=True)
@given(configurations())
def test_any_configuration(c: Configuration) -> None:
    module, n = their_module(c), numbers(c)
    right = theirs(c, module, n)
    named = dict(module.named_parameters())
    if c.bias and c.kind != "GRU":  # one bias of ours stands for two of theirs
        with torch.no_grad():
            for end in ends(c):
                named[f"bias_ih{end}"].add_(named[f"bias_hh{end}"])
    weights = in_our_layout(c, lambda name: named[name].detach().numpy())
    # A gradient is a sum over all steps and rows: one that cancels is held to a tenth of the largest. An output is held to
    # a hundredth of what entered its unit, which is of the order of 1: a sum of many such terms that cancels has lost
    # digits before any kernel can err.
    of_gradients = 1e-1 * max(np.max(np.abs(a)) for k, a in right.items() if k.startswith("d"))
    of_gradients = max(of_gradients, 1e-9)  # all units off: all zero
    backends = [("reference", "float64", REFERENCE_BOUND), ("cpu", "float32", CPU_BOUND)]
    if c.T * c.layers * c.directions > REFERENCE_STEPS and c.kind != "relu":
        del backends[0]
    patterns = []
    for backend, dtype, bound in backends:
        with nl.use_backend(backend):
            found, active = ours(c, weights, n, dtype)
        assert found.keys() == right.keys()
        patterns.append(active)
        names = list(right)
        if c.kind == "relu" and any(np.any(a != b) for a, b in zip(patterns[0], active, strict=True)):
            # float32 has put a unit on the other side of relu's kink, where the gradient jumps
            names = [k for k in names if not k.startswith("d")]
        errors = {k: largest(found[k], right[k], of_gradients if k.startswith("d") else 1e-2) for k in names}
        worst = max(errors, key=errors.get)
        assert errors[worst] <= bound, f"{backend}: {worst} is off by {errors[worst]:.1e}"
