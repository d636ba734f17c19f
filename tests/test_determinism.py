"""Same seed, same bits: run to run and whatever the thread count, in processes of their own.

The program trains a small text model with everything that draws or sums: embedding, dropout, shuffling,
masked sequences, two recurrent layers, global clipping, Adam. A digest of the final weights and predictions
is compared.
"""

from __future__ import annotations

import os
import subprocess
import sys

import numpy as np
import pytest

import numlstm as nl

PROGRAM = """
import hashlib, sys
import numpy as np
import numlstm as nl

seed, units = int(sys.argv[1]), int(sys.argv[2])
nl.set_seed(seed)
draw = np.random.default_rng(5)
x = draw.integers(1, 30, (70, 23))
x[:20, 15:] = 0
y = draw.integers(0, 5, 70)
model = nl.Sequential([
    nl.Embedding(30, 12, mask_zero=True),
    nl.LSTM(units, return_sequences=True),
    nl.Dropout(0.3),
    nl.SimpleRNN(units // 2),
    nl.LayerNormalization(),
    nl.Dense(5),
])
loss = nl.losses.SparseCategoricalCrossentropy(from_logits=True)
model.compile(optimizer=nl.optimizers.Adam(0.01, global_clipnorm=1.0), loss=loss, metrics=["accuracy"])
history = model.fit(x, y, epochs=3, batch_size=33, validation_split=0.2, verbose=0)
total = hashlib.sha256()
for array in [*model.get_weights(), model.predict(x, verbose=0)]:
    total.update(np.ascontiguousarray(array).tobytes())
total.update(repr(history.history["loss"]).encode())
print(total.hexdigest())
"""


def run(threads: int, seed: int = 0, units: int = 48, backend: str = "cpu") -> str:
    """The digest that the program prints, trained with this many threads."""
    environment = {**os.environ, "NUMLSTM_NUM_THREADS": str(threads), "NUMLSTM_BACKEND": backend}
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM, str(seed), str(units)],
        env=environment,
        capture_output=True,
        text=True,
        timeout=240,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


@pytest.mark.parametrize("units", [48, 193])
def test_same_bits_whatever_the_thread_count(units):
    """193 units: no multiple of a vector, and enough work that the threads are really used."""
    one = run(1, units=units)
    assert run(2, units=units) == one
    assert run(3, units=units) == one


def test_same_bits_run_to_run_and_other_bits_with_another_seed():
    first = run(2)
    assert run(2) == first
    assert run(2, seed=1) != first


def test_the_reference_backend_repeats_itself_too():
    assert run(1, backend="reference", units=12) == run(2, backend="reference", units=12)


@pytest.mark.parametrize(
    "shape", [(1, 7, 3, 5), (33, 20, 1, 50), (64, 9, 40, 96), (3, 40, 17, 193), (1, 30, 64, 256)]
)
def test_a_layer_gives_the_same_bits_on_any_number_of_threads(shape):
    """Forward and backward of one layer, thread counts changed inside one process."""
    from numlstm.kernels.cpu.threads import get_num_threads, set_num_threads

    B, T, features, units = shape
    draw = np.random.default_rng(1)
    x = nl.Variable(draw.standard_normal((B, T, features), np.float32))
    dy = draw.standard_normal((B, T, units), np.float32)
    layer = nl.LSTM(units, return_sequences=True)
    layer.build((None, T, features))

    def everything() -> list[np.ndarray]:
        with nl.GradientTape() as tape:
            y = layer(x, training=True)
        return [y.numpy(), *tape.gradient(y, [x, *layer.trainable_weights], output_gradient=dy)]

    before = get_num_threads()
    try:
        results = []
        for threads in (1, 2, 3):
            set_num_threads(threads)
            results.append(everything())
    finally:
        set_num_threads(before)
    for other in results[1:]:
        for a, b in zip(results[0], other, strict=True):
            np.testing.assert_array_equal(a, b)
