"""What the estimators' tests share: the Japanese vowels, and two waves."""

from pathlib import Path

import numpy as np
import pytest


@pytest.fixture(scope="session")
def vowels():
    """(sequences, labels) of the training part and of the test part; lengths differ."""
    with np.load(Path(__file__).with_name("japanese_vowels.npz"), allow_pickle=False) as file:
        arrays = dict(file)
    parts = []
    for name in ("train", "test"):
        ends = np.cumsum(arrays[f"len_{name}"])[:-1]
        parts += [np.split(arrays[f"x_{name}"], ends), arrays[f"y_{name}"]]
    return tuple(parts)


@pytest.fixture(scope="session")
def waves():
    """Two columns of 240 rows: a wave with a slope, and another twice as fast."""
    t = np.arange(240.0)
    return np.column_stack([np.sin(t / 4) + 0.01 * t, np.cos(t / 2)])
