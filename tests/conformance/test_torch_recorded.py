"""PyTorch's recorded answers (torch.npz, written by record_torch.py) against ours; PyTorch itself is not
needed.

The reference backend in float64 must agree to rounding; the cpu backend in float32 to single precision.
"""

from __future__ import annotations

import numpy as np
import pytest
from oracle import (
    ANSWERS,
    ELEMENTS,
    EPSILON,
    LOSSES,
    OPTIMIZERS,
    SEQUENCES,
    Sequence,
    descent,
    error,
    generator,
    inputs,
    label,
    pair,
    training,
)

import numlstm as nl

BACKENDS = [("reference", np.float64, 1e-10), ("cpu", np.float32, 2e-5)]
on_backends = pytest.mark.parametrize("backend, dtype, bound", BACKENDS, ids=[b[0] for b in BACKENDS])


@pytest.fixture(scope="module")
def answers() -> dict[str, np.ndarray]:
    with np.load(ANSWERS, allow_pickle=False) as stored:
        return dict(stored)


def compare(answers: dict[str, np.ndarray], question: str, ours: dict[str, np.ndarray], bound: float) -> None:
    expected = {key.split("/")[1] for key in answers if key.split("/")[0] == question}
    assert expected == set(ours), "the recorded answers are stale: run tests/conformance/record_torch.py"
    errors = {name: error(value, answers[f"{question}/{name}"]) for name, value in ours.items()}
    wrong = {name: f"{e:.1e}" for name, e in errors.items() if not e <= bound}
    assert not wrong, f"{question}: relative errors above {bound:.0e}: {wrong}"


def cell_of(name: str):
    return nl.kernels.cells.lstm() if name == "lstm" else nl.kernels.cells.elman(name[4:])


def our_sequence(s: Sequence, given: dict, dtype: type) -> dict[str, np.ndarray]:
    """Outputs, last states and gradients of one recurrent question through ops.recurrent."""
    named = {k: nl.Variable(given[k].astype(dtype)) for k in ("x", "kernel", "recurrent_kernel", "bias")}
    state = [nl.Variable(a.astype(dtype)) for a in given["state"]]
    with nl.GradientTape() as tape:
        y, final, _ = nl.ops.recurrent(
            cell_of(s.cell), *named.values(), state=tuple(state), mask=given["mask"], training=True
        )
        loss = (y * given["dy"].astype(dtype)).sum()
        for f, d in zip(final, given["dfinal"], strict=True):
            loss = loss + (f * d.astype(dtype)).sum()
    gradients = tape.gradient(loss, [*named.values(), *state])
    found = {"y": y.numpy(), **{f"final{k}": f.numpy() for k, f in enumerate(final)}}
    names = [*(f"d{n}" for n in named), *(f"dstate{k}" for k in range(len(state)))]
    return found | dict(zip(names, gradients, strict=True))


@on_backends
@pytest.mark.parametrize("s", SEQUENCES, ids=lambda s: s.name)
def test_recurrent(answers, s, backend, dtype, bound):
    # rounding grows with the number of steps that a gradient travels, and with unbounded activations
    bound *= 5 if s.T == 500 or s.cell == "rnn_relu" else 1
    with nl.use_backend(backend):
        compare(answers, s.name, our_sequence(s, inputs(s), dtype), bound)


@on_backends
@pytest.mark.parametrize("name", ELEMENTS)
def test_element_wise(answers, name, backend, dtype, bound):
    values, upstream = (a.astype(dtype) for a in pair(name))
    x = nl.Variable(values)
    with nl.use_backend(backend), nl.GradientTape() as tape:
        y = getattr(nl.ops, name)(x)
    (dx,) = tape.gradient(y, [x], output_gradient=upstream)
    assert y.dtype == dx.dtype == dtype
    compare(answers, f"element-{name}", {"y": y.numpy(), "dx": dx}, bound)


def our_target(name: str, target: np.ndarray) -> np.ndarray:
    """The target as this loss wants it, made of the same numbers as the oracle's."""
    if name == "binary_crossentropy":
        return (target > 0).astype(target.dtype)
    if name == "sparse_categorical_crossentropy":
        return target.argmax(-1)
    if name in ("categorical_crossentropy", "kl_divergence"):
        grown = np.exp(target - target.max(-1, keepdims=True))
        return grown / grown.sum(-1, keepdims=True)
    return target


@on_backends
@pytest.mark.parametrize(
    "name, options", [(n, o) for n, o, _ in LOSSES], ids=[label(n, o) for n, o, _ in LOSSES]
)
def test_losses(answers, name, options, backend, dtype, bound):
    values, target = (a.astype(dtype) for a in pair(label(name, options)))
    p = nl.Variable(values)
    classes = {"mse": "MeanSquaredError", "mae": "MeanAbsoluteError", "huber": "Huber"}
    default = "".join(word.capitalize() for word in name.split("_")).replace("Kld", "KLD").replace("Kl", "KL")
    loss = getattr(nl.losses, classes.get(name, default))(**options)
    with nl.use_backend(backend), nl.GradientTape() as tape:
        prediction = nl.ops.softmax(p) if name == "kl_divergence" else p
        value = loss(our_target(name, target), prediction)
    (dp,) = tape.gradient(value, [p])
    # Keras clips probabilities at 1e-7 in kl_divergence and adds 1e-7 to norms: not PyTorch's last digits
    bound = max(bound, 1e-5) if name in ("kl_divergence", "cosine_similarity") else bound
    compare(answers, f"loss-{label(name, options)}", {"loss": value.numpy(), "dp": dp}, bound)


@on_backends
@pytest.mark.parametrize(
    "name, options", [(n, o) for n, o, *_ in OPTIMIZERS], ids=[label(n, o) for n, o, *_ in OPTIMIZERS]
)
def test_optimizers(answers, name, options, backend, dtype, bound):
    start, gradients = descent(label(name, options))
    w = nl.Variable(start.astype(dtype))
    optimizer = getattr(nl.optimizers, name)(**options)
    path = []
    with nl.use_backend(backend):
        for g in gradients:
            optimizer.apply([g.astype(dtype)], [w])
            path.append(w.numpy().copy())
    # Keras adds epsilon elsewhere than PyTorch: the paths part in the seventh digit of the step
    compare(answers, f"optimizer-{label(name, options)}", {"path": np.array(path)}, max(bound, 5e-6))


@on_backends
def test_layer_norm(answers, backend, dtype, bound):
    draw = generator("layer_norm")
    x, dy = (draw.standard_normal((4, 3, 9)).astype(dtype) for _ in range(2))
    gamma, beta = (draw.standard_normal(9).astype(dtype) for _ in range(2))
    leaves = [nl.Variable(a) for a in (x, gamma, beta)]
    with nl.use_backend(backend), nl.GradientTape() as tape:
        y = nl.ops.layer_norm(*leaves, 1e-3)
    gradients = tape.gradient(y, leaves, output_gradient=dy)
    ours = {"y": y.numpy(), **{f"d{k}": g for k, g in enumerate(gradients)}}
    compare(answers, "layer_norm", ours, bound)


def test_a_training_run_follows_pytorch(answers):
    """Thirty Adam steps through Sequential in float32: losses and weights stay with PyTorch's in float64."""
    t = {name: a.astype(np.float32) for name, a in training().items()}
    model = nl.Sequential([nl.LSTM(8, input_shape=(12, 3)), nl.Dense(1)])
    model.compile(optimizer=nl.optimizers.Adam(learning_rate=0.01, epsilon=EPSILON), loss="mse")
    model.set_weights([t["kernel"], t["recurrent_kernel"], t["bias"], t["dense"], np.zeros(1, np.float32)])
    history = model.fit(t["x"], t["y"], epochs=30, batch_size=16, shuffle=False, verbose=0)
    names = ("kernel", "recurrent_kernel", "bias", "dense", "dense_bias")
    ours = {"losses": np.array(history.history["loss"]), **dict(zip(names, model.get_weights(), strict=True))}
    compare(answers, "training", ours, 2e-4)


def test_the_whole_record_is_small():
    assert ANSWERS.stat().st_size < 300_000
