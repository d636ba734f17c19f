"""Keras side by side, for whoever has it (`make test-peers`): recurrent layers, masks with holes, both GRUs, all
merge modes; outputs, last states and every gradient.

Keras runs over PyTorch, which differentiates, in double precision: our reference backend must agree to rounding, the cpu
backend to single precision.
"""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import numlstm as nl

pytestmark = pytest.mark.peers
torch = pytest.importorskip("torch")
# keras_live says which backend Keras is to take, and imports it
keras_live = pytest.importorskip("keras_live", reason="keras is not installed")
from keras_questions import MERGE_MODES, ONE_WAY, QUESTIONS, Question, inputs, largest, ours  # noqa: E402

if keras_live.keras.backend.backend() != "torch":
    pytest.skip("KERAS_BACKEND is not torch, which differentiates here", allow_module_level=True)

keras = keras_live.keras


def agree(q: Question, single: float = 1e-5) -> None:
    numbers = inputs(q)
    theirs = keras_live.theirs(q, numbers)
    for backend, dtype, bound in (("reference", np.float64, 1e-10), ("cpu", np.float32, single)):
        with nl.use_backend(backend):
            found = ours(q, numbers, dtype)
        assert found.keys() == theirs.keys()
        errors = {name: largest(found[name], theirs[name]) for name in theirs}
        assert max(errors.values()) <= bound, (backend, {k: f"{v:.1e}" for k, v in errors.items()})


@pytest.mark.parametrize("q", QUESTIONS, ids=lambda q: q.name)
def test_the_recorded_questions(q):
    agree(q)


kinds = st.sampled_from([("LSTM", True), ("GRU", True), ("GRU", False), ("SimpleRNN", True)])
sizes = st.tuples(st.integers(1, 9), st.integers(1, 7), st.integers(1, 6), st.integers(1, 40))
flags = st.tuples(st.booleans(), st.booleans(), st.booleans())


@settings(max_examples=60, deadline=None)
@given(kinds, sizes, st.sampled_from(["", "holes"]), st.sampled_from([ONE_WAY, ONE_WAY, *MERGE_MODES]), flags)
def test_any_layer(kind, sizes, pattern, mode, flags):
    sequences, backwards, starts = flags
    q = Question(kind[0], *sizes, pattern, mode, sequences, backwards, starts, reset_after=kind[1])
    agree(
        q, single=2e-5
    )  # gradients through one saturated unit have lost digits: up to 1.2e-5 in 2,000 draws


def turned(layer: nl.layers.Layer, weight: np.ndarray) -> np.ndarray:
    """A weight of our layer in Keras' order of gates."""
    inner = getattr(layer, "forward_layer", layer)
    return keras_live.in_keras_order(type(inner).__name__, weight, getattr(inner, "units", 0))


def copy_weights(mine: nl.Sequential, theirs: keras.Sequential) -> None:
    for layer, other in zip(mine.layers, theirs.layers, strict=True):
        other.set_weights([turned(layer, w) for w in layer.get_weights()])


def test_masks_of_sequences_of_sequences():
    """TimeDistributed(LSTM) over (batch, time, inner time, features), with a mask of the inner steps."""
    draw = np.random.default_rng(0)
    x, mask = draw.standard_normal((3, 4, 5, 2)).astype(np.float32), draw.random((3, 4, 5)) < 0.6
    mask[1, 2] = False
    inner, theirs = nl.LSTM(6), keras.layers.TimeDistributed(keras.layers.LSTM(6))
    layer, embedded = nl.TimeDistributed(inner), nl.ops.tensor(x)
    embedded.mask = mask  # as Embedding(mask_zero=True) would have it
    found = layer(embedded)
    theirs.build(x.shape)
    theirs.set_weights(inner.get_weights())
    wanted = theirs(x, mask=torch.tensor(mask)).detach().numpy()
    np.testing.assert_allclose(found, wanted, rtol=1e-5, atol=1e-6)
    assert np.array_equal(found.mask, mask.any(axis=-1))


@pytest.mark.parametrize("first", ["Masking", "Embedding"])
def test_models_whose_first_layer_makes_the_mask(first):
    """Masking or Embedding, then recurrent layers of each kind, then Dense."""
    ids = np.random.default_rng(1).integers(0, 4, (6, 9))
    ids[0] = 0
    x = ids if first == "Embedding" else np.stack([ids, ids], axis=-1).astype(np.float32) / 4

    def model(layers):
        start = layers.Masking() if first == "Masking" else layers.Embedding(4, 5, mask_zero=True)
        options = {"return_sequences": True}
        both = layers.Bidirectional(layers.LSTM(7, **options), merge_mode="sum")
        return [start, both, layers.GRU(4, **options), layers.SimpleRNN(3), layers.Dense(2)]

    mine, theirs = nl.Sequential(model(nl.layers)), keras.Sequential(model(keras.layers))
    found = mine.predict(x, verbose=0)
    theirs.build(x.shape)
    copy_weights(mine, theirs)
    np.testing.assert_allclose(found, theirs(x).detach().numpy(), rtol=1e-5, atol=1e-6)


OPTIMIZERS = {"SGD": {"momentum": 0.9}, "RMSprop": {}, "Adam": {}}


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # Keras' trainer under newer versions of NumPy
@pytest.mark.parametrize("optimizer", OPTIMIZERS)
@pytest.mark.parametrize(
    "kind, options", [("LSTM", {}), ("GRU", {}), ("GRU", {"reset_after": False}), ("SimpleRNN", {})]
)
def test_training(kind, options, optimizer):
    """Three epochs of two batches with a mask from the first layer: the losses, and the weights afterwards."""
    draw = np.random.default_rng(2)
    x, y = draw.standard_normal((8, 4, 3), np.float32), draw.standard_normal((8, 2), np.float32)
    x[draw.random((8, 4)) < 0.3] = 0

    def made(library, sequential):
        recurrent = getattr(library.layers, kind)
        both = library.layers.Bidirectional(recurrent(6, return_sequences=True, **options))
        model = sequential([library.layers.Masking(), both, recurrent(5, **options), library.layers.Dense(2)])
        model.build((None, 4, 3))
        step = getattr(library.optimizers, optimizer)(learning_rate=0.01, **OPTIMIZERS[optimizer])
        model.compile(optimizer=step, loss="mse")
        return model

    mine, theirs = made(nl, nl.Sequential), made(keras, keras.Sequential)
    copy_weights(mine, theirs)
    how = {"epochs": 3, "batch_size": 4, "shuffle": False, "verbose": 0}
    found, wanted = (model.fit(x, y, **how).history["loss"] for model in (mine, theirs))
    np.testing.assert_allclose(found, wanted, rtol=1e-5)
    for layer, other in zip(mine.layers, theirs.layers, strict=True):
        for ours_after, theirs_after in zip(layer.get_weights(), other.get_weights(), strict=True):
            assert largest(turned(layer, ours_after), theirs_after) <= 1e-5
