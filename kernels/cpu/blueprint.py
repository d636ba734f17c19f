"""Memory laid out once for a shape: pieces of one slab, and a table of numbers and addresses that kernels read.

Laying out the memory of a cell of several stages takes some hundred lines of Python; a short sequence would take longer to
set up than to run. So the layout is made once for each shape as a blueprint, whose words may be relative to something that
differs from call to call (where a slab lies, where an input is, its strides); a call adds those values and is done.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from .workspace import aligned, lay_out

__all__ = ["Blueprint", "Relative", "Word"]


class Relative(NamedTuple):
    """A word that is known but for a value given with each call: an address in the slab, an input's address, a stride."""

    to: str
    bytes: int = 0


Word = int | Relative


class Blueprint:
    """Pieces of a slab of float32, and words.

    Args:
        zeroed, rest: floats of each piece by name; the pieces of `zeroed` are 0 at first, the others arbitrary.
        words: numbers, and what is relative to a piece (by its name) or to a value given to `write`.
        where: the words' places in the table that `write` fills; in order from the first unless given.
    """

    offset: dict[Any, int]
    zeroed: int
    floats: int

    def __init__(
        self,
        zeroed: Mapping[str, int],
        rest: Mapping[str, int],
        words: Sequence[Word],
        where: Sequence[int] | None = None,
    ) -> None:
        self.size: dict[str, int] = {**zeroed, **rest}
        self.offset, self.zeroed, self.floats = lay_out(zeroed, rest)
        places = range(len(words)) if where is None else where
        self.where: slice | np.ndarray = slice(0, len(words)) if where is None else np.array(places, np.intp)
        self.words: np.ndarray = np.zeros(len(words), np.int64)
        groups: dict[str, list[int]] = {}
        for k, (at, word) in enumerate(zip(places, words, strict=True)):
            if isinstance(word, Relative):
                piece = word.to in self.offset
                self.words[k] = word.bytes + (4 * self.offset[word.to] if piece else 0)
                groups.setdefault("slab" if piece else word.to, []).append(at)
            else:
                self.words[k] = word
        self.relative: dict[str, np.ndarray] = {name: np.array(at, np.intp) for name, at in groups.items()}

    def slab(self) -> np.ndarray:
        """Memory for the pieces."""
        memory = aligned((self.floats,))
        memory[: self.zeroed] = 0
        return memory

    def piece(self, slab: np.ndarray, name: str, *shape: int) -> np.ndarray:
        """One piece of a slab, as an array of that shape."""
        start = self.offset[name]
        return slab[start : start + self.size[name]].reshape(shape)

    def write(self, table: np.ndarray, slab: np.ndarray, values: Mapping[str, Any]) -> None:
        """Fill in the words, those relative to a name by `values[name]`: a number, or an array for its address."""
        table[self.where] = self.words
        for name, at in self.relative.items():
            value = slab if name == "slab" else values[name]
            table[at] += value.ctypes.data if isinstance(value, np.ndarray) else value
