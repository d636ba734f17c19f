"""Where in the sequence a step stands, added to its features: attention by itself sees a set, not a sequence.

Inputs and outputs are (batch, time, features); a mask goes through.
"""

from functools import lru_cache
from typing import Any

import numpy as np

from numlstm import constraints, initializers, ops, regularizers
from numlstm.autograd import Tensor, Variable
from numlstm.backend import Backend, backend_of
from numlstm.layers.base import Layer, Shape, positive, registry


class _Positions(Layer):
    """A layer that adds a table of vectors, one a step, to its inputs."""

    input_ndim: int | None = 3
    input_axes = "(batch, time, features)"
    supports_masking = True

    def compute_output_shape(self, input_shape: Shape) -> Shape:
        """The input's shape."""
        return input_shape


@registry.register()
class SinusoidalPositions(_Positions):
    """Adds sines and cosines of geometrically growing wavelengths: Vaswani et al. 2017, section 3.5.

    Feature 2i of step t gets sin(t / w ** (2i / features)), feature 2i + 1 the cosine of the same. No
    weights.

    Arguments:
        max_wavelength: w above.

    Raises:
        ValueError: a wavelength of 1 or less.

    >>> SinusoidalPositions()(np.zeros((1, 2, 2))).numpy().round(3).tolist()
    [[[0.0, 1.0], [0.8410000205039978, 0.5400000214576721]]]
    """

    def __init__(self, max_wavelength: float = 10000.0, **options: Any) -> None:
        super().__init__(**options)
        if isinstance(max_wavelength, bool) or not max_wavelength > 1:
            raise ValueError(f"max_wavelength: expected a number above 1, got {max_wavelength!r}")
        self.max_wavelength: float = float(max_wavelength)

    def call(self, inputs: Tensor) -> Tensor:
        """The inputs, plus the table."""
        asked = (*inputs.shape[1:], self.max_wavelength, self.dtype)
        here = type(inputs.data) is np.ndarray
        return inputs + Tensor(sinusoids(*asked) if here else _sinusoids_on(backend_of(inputs.data), *asked))


@lru_cache(maxsize=16)
def sinusoids(steps: int, features: int, max_wavelength: float, dtype: str) -> np.ndarray:
    """The table (steps, features) that `SinusoidalPositions` adds; not to be written to."""
    pair = np.arange(features) // 2
    angle = np.arange(steps)[:, None] / max_wavelength ** (2 * pair / features)
    table = np.where(np.arange(features) % 2, np.cos(angle), np.sin(angle)).astype(dtype)
    table.flags.writeable = False
    return table


@lru_cache(maxsize=16)
def _sinusoids_on(backend: Backend, *asked: Any) -> Any:
    """The same table, on a device."""
    return backend.asarray(sinusoids(*asked))


@registry.register()
class PositionEmbedding(_Positions):
    """Adds a trained vector for each of the first `sequence_length` steps.

    Arguments:
        sequence_length: the longest sequence it can take.
        embeddings_initializer, embeddings_regularizer, embeddings_constraint: as in `Embedding`.

    Raises:
        ValueError: a longer sequence, or another number of features than at first.

    >>> PositionEmbedding(10)(np.zeros((2, 3, 4))).shape
    (2, 3, 4)
    """

    def __init__(
        self,
        sequence_length: int,
        embeddings_initializer: Any = "uniform",
        embeddings_regularizer: Any = None,
        embeddings_constraint: Any = None,
        **options: Any,
    ) -> None:
        super().__init__(**options)
        self.sequence_length: int = positive("sequence_length", sequence_length)
        self.embeddings_initializer: Any = initializers.get(embeddings_initializer)
        self.embeddings_regularizer: Any = regularizers.get(embeddings_regularizer)
        self.embeddings_constraint: Any = constraints.get(embeddings_constraint)

    def build(self, input_shape: Shape) -> None:
        """embeddings (sequence_length, features)."""
        self.embeddings: Variable = self.add_weight(
            "embeddings",
            (self.sequence_length, input_shape[-1]),
            self.embeddings_initializer,
            self.embeddings_regularizer,
            self.embeddings_constraint,
        )

    def check_input(self, inputs: Tensor) -> None:
        """The features are those of the weights, and the sequence is no longer than the table."""
        super().check_input(inputs)
        if inputs.shape[1] > self.sequence_length:
            raise ValueError(
                f"{self.name}: expected at most {self.sequence_length} time steps (sequence_length), "
                f"got shape {inputs.shape}"
            )

    def call(self, inputs: Tensor) -> Tensor:
        """The inputs, plus the table's first rows."""
        return inputs + ops.getitem(self.embeddings, slice(0, inputs.shape[1]))
