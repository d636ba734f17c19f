"""What the tests of recurrent layers share: a batch of sequences (3, 7, 5) and a mask over its steps."""

import numpy as np
import pytest

B, T, I = 3, 7, 5


@pytest.fixture
def x():
    return np.random.default_rng(0).standard_normal((B, T, I)).astype(np.float32)


@pytest.fixture
def holes():
    mask = np.random.default_rng(1).random((B, T)) < 0.6
    mask[1] = False  # a row without one valid step
    return mask
