"""Write small model files as PyTorch and Keras write them, and what those models compute: into files/.

Run it where both are installed, after a change: `KERAS_BACKEND=torch python tests/io/record_files.py`. The tests then
read the files without them.
"""

from __future__ import annotations

from pathlib import Path

import keras
import numpy as np
import safetensors.torch
import torch
from keras import layers as L
from torch import nn

FILES = Path(__file__).parent / "files"


class Tagger(nn.Module):
    """Embedding, a stacked LSTM in both directions, a norm and a linear layer, as PyTorch's users write it."""

    def __init__(self, projection: int) -> None:
        super().__init__()
        self.embed = nn.Embedding(9, 3)
        self.rnn = nn.LSTM(3, 4, num_layers=2, bidirectional=True, batch_first=True, proj_size=projection)
        self.norm = nn.LayerNorm(2 * (projection or 4))
        self.tag = nn.Linear(2 * (projection or 4), 2)

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        return self.tag(self.norm(self.rnn(self.embed(ids))[0]))


def sequential() -> keras.Model:
    return keras.Sequential(
        [
            keras.Input((None, 2)),
            L.Masking(),
            L.Bidirectional(L.GRU(3, return_sequences=True, dropout=0.1), merge_mode="ave"),
            L.TimeDistributed(L.Dense(4, activation="gelu", kernel_regularizer="l2")),
            L.LSTM(3, recurrent_activation="hard_sigmoid", go_backwards=True, kernel_constraint="max_norm"),
            L.Dropout(0.2),
            L.Dense(2, activation="softmax"),
        ]
    )


def functional() -> keras.Model:
    ids = keras.Input((None,), name="ids")
    x = L.Embedding(9, 4, mask_zero=True)(ids)
    x = L.LayerNormalization()(L.Add()([x, L.MultiHeadAttention(2, 3)(x, x)]))
    outputs, h, c = L.LSTM(3, return_sequences=True, return_state=True)(x)
    last = L.GRU(3, reset_after=False)(outputs, initial_state=h)
    return keras.Model(
        ids, [L.Dense(2, name="head")(L.Multiply()([last, c])), L.GlobalMaxPooling1D()(outputs)]
    )


def main() -> None:
    FILES.mkdir(exist_ok=True)
    draw = np.random.default_rng(0)
    torch.manual_seed(0)
    ids = np.array([[1, 2, 3, 4, 5], [6, 7, 8, 0, 0]])
    x = draw.standard_normal((2, 5, 2)).astype(np.float32)
    x[1, 3:] = 0
    answers = {"ids": ids, "x": x}
    for name, module in (("tagger.pt", Tagger(0)), ("projected.safetensors", Tagger(2))):
        state = module.state_dict()
        if name.endswith(".pt"):
            torch.save({"model": state, "epoch": 3}, FILES / name)
        else:
            safetensors.torch.save_file(state, FILES / name)
        answers[name] = module(torch.from_numpy(ids)).detach().numpy()
    keras.utils.set_random_seed(0)
    made = (("sequential", "h5", sequential(), x), ("functional", "keras", functional(), ids))
    for name, ending, model, given in made:
        for w in model.weights:
            w.assign(w + 0.2 * draw.standard_normal(w.shape).astype(np.float32))
        outputs = model(given)
        for k, y in enumerate(outputs if isinstance(outputs, list) else [outputs]):
            answers[f"{name}/{k}"] = y.detach().numpy()
        model.save(FILES / f"{name}.{ending}")
    np.savez_compressed(FILES / "answers.npz", **answers)
    for path in sorted(FILES.iterdir()):
        print(f"{path.name}: {path.stat().st_size / 1e3:.1f} kB")


if __name__ == "__main__":
    main()
