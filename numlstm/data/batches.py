"""One shape for all training data: whatever `fit` is given comes out as `Batch`es.

Arrays and np.memmap are gathered batch by batch (a memmap is never read whole), lists of sequences of unequal
length are padded batch by batch and get a mask, and generators, iterators and functions that return one are
drawn from. With `steps` a batch is cut along time into chunks, for truncated backpropagation: (B, T, ...)
becomes (B, steps, ...) pieces in order. Everything is checked on the way in: what does not fit raises a
ValueError naming the argument and the row.

On a device arrays are staged once, `on(backend)`, where they fit, and batches are gathered there in the same order; what
does not fit, memmaps, unequal sequences and sources of batches go over batch by batch, `placed(batch, backend)`.
"""

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from numlstm import random
from numlstm.backend import Backend, adopt, backend_of, moved, namespace, place_of, ranges, to_numpy

__all__ = [
    "ArrayBatches",
    "Batch",
    "Batches",
    "IteratorBatches",
    "as_batches",
    "cut",
    "one_batch",
    "pad",
    "placed",
]

STAGED = (
    0.5  # of a device's free memory: arrays that take no more are copied to it once, before the first batch
)


Rows = Any  # a slice, row numbers, or `_BothRows`


class Batch(NamedTuple):
    """One batch, or one chunk in time of it: `x` (B, T, ...) and what belongs to it, ready for the model.

    `y`, `sample_weight` and `mask` (B, T; True where a step counts) may be None. `first` and `last` tell
    where a chunk stands in its batch; both are True for a batch that was not cut. `timed`: `y` has the time
    axis of `x`.
    """

    x: np.ndarray
    y: np.ndarray | None = None
    sample_weight: np.ndarray | None = None
    mask: np.ndarray | None = None
    first: bool = True
    last: bool = True
    timed: bool = False


class Batches:
    """Base of the sources of batches. `rows`: samples in all, `steps`: batches in an epoch; None when
    unknown."""

    rows: int | None = None
    steps: int | None = None
    endless: bool = False  # can one iterator serve several epochs?
    came_from: str | None = None  # the device that the caller's x lies on; None: the host

    def on(self, backend: Backend) -> "Batches":
        """The same source for a model that runs on `backend`."""
        return self

    def epoch(
        self, *, shuffle: bool = False, chunk: int | None = None, timed: bool = True
    ) -> Iterator[Batch]:
        """The batches of one epoch, in a new random order if `shuffle`, cut along time into `chunk` steps if
        given.

        A `y` whose second axis is as long as the time axis of x is cut with it, unless `timed` is False.
        """
        raise NotImplementedError


class ArrayBatches(Batches):
    """Batches of arrays, memmaps or lists of sequences that share their first axis.

    >>> x = np.arange(6, dtype=np.float32).reshape(3, 2)
    >>> [b.x.tolist() for b in ArrayBatches(x, batch_size=2).epoch()]
    [[[0.0, 1.0], [2.0, 3.0]], [[4.0, 5.0]]]
    """

    def __init__(
        self,
        x: Any,
        y: Any = None,
        sample_weight: Any = None,
        *,
        mask: Any = None,
        lengths: Any = None,
        batch_size: int | None = None,
        dtype: Any = np.float32,
    ) -> None:
        self.dtype: np.dtype[Any] = np.dtype(dtype)
        self.batch_size: int = _batch_size(batch_size)
        self.x: _Dense | Ragged = _column("x", x, self.dtype)
        self.came_from: str | None = None if isinstance(self.x, Ragged) else place_of(self.x.array)
        self.y: _Dense | Ragged | None = None if y is None else _column("y", y, self.dtype)
        self.sample_weight: _Dense | Ragged | None = (
            None if sample_weight is None else _column("sample_weight", sample_weight, self.dtype)
        )
        self.rows: int = len(self.x)
        self.steps: int = math.ceil(self.rows / self.batch_size)
        self.mask: np.ndarray | None = None if mask is None else _mask(mask, self.x)
        self.lengths: np.ndarray | None = None if lengths is None else _lengths(lengths, self.x)
        if mask is not None and lengths is not None:
            raise ValueError(
                "give mask or lengths, not both: lengths are a mask of the first steps of each row"
            )
        for name, column in (("y", self.y), ("sample_weight", self.sample_weight)):
            if column is not None:
                _check_rows(name, column, self.rows)

    def split(self, fraction: float) -> tuple["ArrayBatches", "ArrayBatches"]:
        """The first rows, and the last `fraction` of them, as two sources that share this one's memory."""
        at = math.floor(self.rows * (1 - fraction))
        if not 0 < at < self.rows:
            raise ValueError(
                f"validation_split: {fraction} of {self.rows} rows leaves {at} to train on "
                f"and {self.rows - at} to validate"
            )
        return self.part(slice(0, at)), self.part(slice(at, self.rows))

    def part(self, rows: slice) -> "ArrayBatches":
        """The source that these rows are."""
        part = object.__new__(ArrayBatches)
        part.__dict__.update(self.__dict__)
        for name in ("x", "y", "sample_weight"):
            column = getattr(self, name)
            setattr(part, name, None if column is None else column.part(rows))
        part.mask = None if self.mask is None else self.mask[rows]
        part.lengths = None if self.lengths is None else self.lengths[rows]
        part.rows = rows.stop - rows.start
        part.steps = math.ceil(part.rows / part.batch_size)
        return part

    def on(self, backend: Backend) -> "ArrayBatches":
        """The same source with its arrays where `backend` works: on a device if they take no more than `STAGED` of its
        free memory, and always on the host. Memmaps stay, and so does what goes with them or with unequal
        sequences: such batches go over one by one.

        Raises:
            ValueError: an array lies on another device, naming it.
        """
        columns = {name: getattr(self, name) for name in ("x", "y", "sample_weight")}
        arrays = {name: c.array for name, c in columns.items() if isinstance(c, _Dense)}
        arrays |= {name: a for name in ("mask", "lengths") if (a := getattr(self, name)) is not None}
        if backend.xp is np:
            wanted = {name for name, a in arrays.items() if place_of(a) is not None}
        else:
            wanted = {name for name, a in arrays.items() if place_of(a) is None}
            for name in arrays.keys() - wanted:
                moved(arrays[name], backend, name)  # raises for another device
            lazy = any(isinstance(c, Ragged) or (c is not None and c.lazy) for c in columns.values())
            room = backend.room()
            size = sum(
                a.size * getattr(columns.get(n), "dtype", a.dtype).itemsize
                for n, a in arrays.items()
                if n in wanted
            )
            if lazy or (room is not None and size > STAGED * room):
                wanted = set()
            for name, c in columns.items():  # what came on the device is looked through there, once
                if isinstance(c, _Dense) and name not in wanted and c.wants_range():
                    wanted.add(name)
        if not wanted:
            return self
        staged = self.part(slice(0, self.rows))
        for name in wanted:
            column = columns.get(name)
            setattr(
                staged, name, moved(arrays[name], backend, name) if column is None else column.on(backend)
            )
        return staged

    def epoch(
        self, *, shuffle: bool = False, chunk: int | None = None, timed: bool = True
    ) -> Iterator[Batch]:
        order = random.generator().permutation(self.rows) if shuffle else None
        there = None  # the same order on the device that arrays are on
        if order is not None and (device := self._device()) is not None:
            there = device.asarray(order)
        for start in range(0, self.rows, self.batch_size):
            stop = min(start + self.batch_size, self.rows)
            rows: Rows = slice(start, stop) if order is None else order[start:stop]
            if there is not None:
                rows = _BothRows(rows, there[start:stop])
            if chunk is None:
                yield self._gather(rows)
            elif isinstance(self.x, Ragged):
                yield from cut(self._gather(rows), chunk, timed)
            else:
                yield from self._gather_chunks(rows, chunk, timed)

    def _device(self) -> Backend | None:
        """The backend of the device that some of the arrays are on."""
        columns = (self.x, self.y, self.sample_weight)
        arrays = [c.array for c in columns if isinstance(c, _Dense)] + [self.mask, self.lengths]
        return next((backend_of(a) for a in arrays if a is not None and place_of(a) is not None), None)

    def _mask_of(self, rows: Rows, span: slice) -> Any:
        """The mask of some rows and steps; None where all count."""
        if self.mask is not None:
            return self.mask[_of(rows, self.mask)][:, span]
        if self.lengths is None:
            return None
        steps = namespace(self.lengths).arange(span.start, span.stop)
        return steps < self.lengths[_of(rows, self.lengths)][:, None]

    def chunks(self, chunk: int) -> int | None:
        """How many pieces an epoch has when cut into `chunk` steps; None when that depends on the order."""
        if isinstance(self.x, Ragged):
            return None
        return self.steps * math.ceil(self.x.array.shape[1] / chunk) if self.x.array.ndim > 1 else self.steps

    def whole(self) -> Batch:
        """All rows as one batch."""
        return self._gather(slice(0, self.rows))

    def _gather(self, rows: Rows) -> Batch:
        """The batch of these rows."""
        x, mask = self.x.take(rows), None
        if isinstance(self.x, Ragged):
            mask = self.x.mask(rows)
        elif self.mask is not None or self.lengths is not None:
            mask = self._mask_of(rows, slice(0, x.shape[1]))
        y = None if self.y is None else self.y.take(rows)
        weight = None if self.sample_weight is None else self.sample_weight.take(rows)
        return Batch(x, y, weight, mask, timed=_timed(x, y))

    def _gather_chunks(self, rows: Rows, chunk: int, timed: bool) -> Iterator[Batch]:
        """`cut(self._gather(rows), chunk)` without ever holding more than one chunk of a row."""
        source: Any = self.x  # a _Dense: what is ragged is cut when it is gathered
        if source.array.ndim < 2:
            raise ValueError(f"bptt_steps: x must have a time axis to cut; got shape {source.array.shape}")
        time = source.array.shape[1]
        timed = timed and _timed(source.array, None if self.y is None else getattr(self.y, "array", None))
        weight_timed = self.sample_weight is not None and _timed(
            source.array, getattr(self.sample_weight, "array", None)
        )
        for start in range(0, time, chunk):
            span = slice(start, min(start + chunk, time))
            x, mask = self.x.take(rows, span), self._mask_of(rows, span)
            y = None if self.y is None else self.y.take(rows, span if timed else None)
            weight = None
            if self.sample_weight is not None:
                weight = self.sample_weight.take(rows, span if weight_timed else None)
            yield Batch(x, y, weight, mask, start == 0, span.stop == time, timed)


class IteratorBatches(Batches):
    """Batches drawn from an iterable, an iterator, or a function that returns one for each epoch.

    Each item is `x`, a tuple `(x, y)` or `(x, y, sample_weight)`, or a dict with the keys x, y,
    sample_weight, mask and lengths. Items are checked like arrays given to `fit`; they come in the order in
    which they are drawn.
    """

    source: Any
    dtype: np.dtype[Any]
    name: str

    def __init__(self, source: Any, *, dtype: Any = np.float32, name: str = "x") -> None:
        self.source, self.dtype, self.name = source, np.dtype(dtype), name
        self.steps: int | None = len(source) if hasattr(source, "__len__") and not callable(source) else None
        self.endless: bool = isinstance(source, Iterator)

    def epoch(
        self, *, shuffle: bool = False, chunk: int | None = None, timed: bool = True
    ) -> Iterator[Batch]:
        source = self.source() if callable(self.source) else self.source
        if not isinstance(source, Iterable):
            raise ValueError(
                f"{self.name}: the function gave a {type(source).__name__}, expected an iterator of batches"
            )
        for number, item in enumerate(source):
            try:
                batch = self._batch(item)
            except ValueError as error:
                raise ValueError(f"batch {number} of {self.name}: {error}") from error
            yield from (batch,) if chunk is None else cut(batch, chunk, timed)

    def _batch(self, item: Any) -> Batch:
        if isinstance(item, tuple):
            if not 1 <= len(item) <= 3:
                raise ValueError(
                    f"a tuple of {len(item)} came, expected (x,), (x, y) or (x, y, sample_weight)"
                )
            item = dict(zip(("x", "y", "sample_weight"), item, strict=False))
        elif not isinstance(item, Mapping):
            item = {"x": item}
        unknown = sorted(set(item) - {"x", "y", "sample_weight", "mask", "lengths"})
        if unknown or "x" not in item:
            raise ValueError(
                f"keys {sorted(item)} came, expected x and any of y, sample_weight, mask, lengths"
            )
        columns = ArrayBatches(**item, batch_size=2**62, dtype=self.dtype)
        return columns.whole()


def as_batches(
    x: Any,
    y: Any = None,
    sample_weight: Any = None,
    *,
    mask: Any = None,
    lengths: Any = None,
    batch_size: int | None = None,
    dtype: Any = np.float32,
) -> Batches:
    """Whatever `fit`, `evaluate` and `predict` accept, as `Batches` whose floats have `dtype`.

    Raises ValueError for what is empty, has the wrong rank, dtype or length, or holds NaN or infinity.

    >>> len(next(as_batches([np.ones((3, 1)), np.ones((5, 1))]).epoch()).mask[0])
    5
    """
    if isinstance(x, Batches):
        return x
    if x is None:
        raise ValueError("x: got None, expected arrays, a list of sequences, or a source of batches")
    if _is_source(x):
        given = {
            "y": y,
            "sample_weight": sample_weight,
            "mask": mask,
            "lengths": lengths,
            "batch_size": batch_size,
        }
        wrong = [name for name, value in given.items() if value is not None]
        if wrong:
            raise ValueError(
                f"{', '.join(wrong)}: must not be given when x is a source of batches, which brings its own"
            )
        return IteratorBatches(x, dtype=dtype)
    return ArrayBatches(x, y, sample_weight, mask=mask, lengths=lengths, batch_size=batch_size, dtype=dtype)


def one_batch(
    x: Any,
    y: Any = None,
    sample_weight: Any = None,
    *,
    mask: Any = None,
    lengths: Any = None,
    dtype: Any = np.float32,
) -> Batch:
    """Everything as one batch, checked as `as_batches` checks it and raising what it raises.

    >>> one_batch(np.ones((2, 3, 1)), np.zeros(2)).timed
    False
    """
    if type(x) is np.ndarray and type(y) is np.ndarray and sample_weight is mask is lengths is None:
        # What a step of training nearly always gets: a source of batches would cost more than the checks.
        dtype = np.dtype(dtype)
        columns = _column("x", x, dtype), _column("y", y, dtype)
        _check_rows("y", columns[1], len(x))
        x, y = (c.array if c.exact else c.take(slice(0, len(c))) for c in columns)  # type: ignore[union-attr]
        return Batch(x, y, timed=_timed(x, y))
    data = as_batches(x, y, sample_weight, mask=mask, lengths=lengths, batch_size=2**62, dtype=dtype)
    return data.whole() if isinstance(data, ArrayBatches) else next(data.epoch())


def cut(batch: Batch, chunk: int, timed: bool = True) -> Iterator[Batch]:
    """A batch in pieces of `chunk` steps (the last may be shorter); a `y` without a time axis goes with each.

    >>> batch = Batch(np.zeros((2, 5, 1)), np.zeros((2, 5)), timed=True)
    >>> [(b.x.shape[1], b.first, b.last) for b in cut(batch, 2)]
    [(2, True, False), (2, False, False), (1, False, True)]
    """
    if batch.x.ndim < 2:
        raise ValueError(f"bptt_steps: x must have a time axis to cut; got shape {batch.x.shape}")
    time = batch.x.shape[1]
    timed = timed and batch.timed
    weight_timed = timed and _timed(batch.x, batch.sample_weight)
    for start in range(0, time, chunk):
        span = slice(start, min(start + chunk, time))
        yield Batch(
            _contiguous(batch.x[:, span]),
            batch.y[:, span] if timed else batch.y,  # type: ignore[index]
            batch.sample_weight[:, span] if weight_timed else batch.sample_weight,  # type: ignore[index]
            None if batch.mask is None else batch.mask[:, span],
            start == 0,
            span.stop == time,
            timed,
        )


def pad(sequences: Sequence[np.ndarray], dtype: Any = None) -> tuple[np.ndarray, np.ndarray]:
    """Sequences (T_i, ...) side by side: the padded array (B, max T_i, ...), zeros behind each end, and the
    lengths (B,).

    >>> padded, lengths = pad([np.array([1, 2, 3]), np.array([4])])
    >>> padded.tolist(), lengths.tolist()
    ([[1, 2, 3], [4, 0, 0]], [3, 1])
    """
    lengths = np.fromiter((len(s) for s in sequences), np.int64, len(sequences))
    longest = max(1, int(lengths.max()))  # a time axis of length 0 is no batch; a masked step is
    padded = np.zeros((len(sequences), longest, *sequences[0].shape[1:]), dtype or sequences[0].dtype)
    for row, sequence in zip(padded, sequences, strict=True):
        row[: len(sequence)] = sequence
    return padded, lengths


def placed(batch: Batch, backend: Backend) -> Batch:
    """A batch where a backend works; what lies there already stays as it is.

    >>> from numlstm.backend import get_backend
    >>> placed(Batch(np.ones((2, 3))), get_backend("cpu")).x.shape
    (2, 3)
    """

    def there(name: str, a: Any) -> Any:
        if isinstance(a, (list, tuple)):
            return [there(name, b) for b in a]
        return None if a is None else moved(a, backend, name)

    x, y, weight, mask, *others = batch
    y = there("y", y)
    return Batch(there("x", x), y, there("sample_weight", weight), there("mask", mask), *others)


def _contiguous(a: Any) -> Any:
    return np.ascontiguousarray(a) if type(a) is np.ndarray else a.copy(order="C")


# Columns: one argument of fit, whatever it is made of


class _BothRows:
    """The same row numbers on the host, and on a device."""

    def __init__(self, here: np.ndarray, there: Any) -> None:
        self.here, self.there = here, there


def _of(rows: Rows, array: Any) -> Any:
    """The rows as an index for this array."""
    if not isinstance(rows, _BothRows):
        return rows
    return rows.here if place_of(array) is None else rows.there


class _Dense:
    """An array or memmap; `take` gives rows in the model's dtype, contiguous."""

    name: str
    array: np.ndarray
    lazy: bool

    range: tuple[Any, Any] | None = (
        None  # on a device: the smallest and the largest number, if they are known
    )

    def __init__(self, name: str, array: np.ndarray, dtype: np.dtype[Any], lazy: bool) -> None:
        self.name, self.array, self.lazy = name, array, lazy
        # Integers stay: they are ids or labels. All floats (and flags) become the model's dtype.
        self.dtype: np.dtype[Any] = array.dtype if array.dtype.kind in "iu" else dtype
        self.exact: bool = array.dtype == self.dtype

    def __len__(self) -> int:
        return len(self.array)

    def part(self, rows: slice) -> "_Dense":
        part = object.__new__(_Dense)
        part.__dict__.update(self.__dict__, array=self.array[rows])
        return part

    def on(self, backend: Backend) -> "_Dense":
        """The column where a backend works, in the dtype that batches have. Of numbers that may be ids, labels or
        probabilities the range is taken along, so that nobody has to ask the device for it."""
        column = object.__new__(_Dense)
        array = self.array
        if not self.exact:
            array = _cast(self.name, array, self.dtype, slice(0, len(array)))
        known = (
            ranges.bounds(array)
            if backend.xp is not np and (self.dtype.kind in "iu" or self.name == "y")
            else None
        )
        column.__dict__.update(self.__dict__, range=known, array=moved(array, backend, self.name), exact=True)
        return column

    def wants_range(self) -> bool:
        """Does it lie on a device, and nobody has looked yet what numbers it holds?"""
        return (
            self.range is None
            and (self.dtype.kind in "iu" or self.name == "y")
            and place_of(self.array) is not None
        )

    def take(self, rows: Rows, span: slice | None = None) -> np.ndarray:
        array = self.array
        if type(array) is not np.ndarray and place_of(array) is not None:
            return self._take_there(_of(rows, array), span)
        rows = _of(rows, array)
        if span is not None:
            block = array[rows, span]
        elif type(rows) is slice:
            block = array[rows]
        elif array.flags.c_contiguous:
            block = array.take(rows, axis=0)  # the quickest; of a view it would first copy all of it
        else:
            block = np.ascontiguousarray(array[rows])
        if not self.exact:
            block = _cast(self.name, block, self.dtype, rows)
        elif self.lazy or span is not None:
            block = np.ascontiguousarray(block)
        if self.lazy:
            _check_finite(self.name, block, rows)
        return block

    def _take_there(self, rows: Any, span: slice | None) -> Any:
        with backend_of(self.array).current():
            block = self.array[rows] if span is None else self.array[rows, span]
            if not self.exact:
                block = block.astype(self.dtype)
            elif span is not None:
                block = block.copy(order="C")
        if self.range is not None:
            ranges.remember(block, *self.range)
        return block


class Ragged:
    """A list of sequences of unequal length, padded a batch at a time."""

    name: str
    sequences: list[np.ndarray]

    def __init__(self, name: str, sequences: list[np.ndarray], dtype: np.dtype[Any]) -> None:
        self.name, self.sequences = name, sequences
        common = np.result_type(*{s.dtype for s in sequences})  # one float among ids makes them all floats
        self.dtype: np.dtype[Any] = common if common.kind in "iu" else dtype

    def __len__(self) -> int:
        return len(self.sequences)

    def part(self, rows: slice) -> "Ragged":
        part = object.__new__(Ragged)
        part.__dict__.update(self.__dict__, sequences=self.sequences[rows])
        return part

    def _select(self, rows: Rows) -> list[np.ndarray]:
        return self.sequences[rows] if isinstance(rows, slice) else [self.sequences[i] for i in rows]

    def take(self, rows: Rows, span: slice | None = None) -> np.ndarray:
        rows = rows.here if isinstance(rows, _BothRows) else rows
        padded, _ = pad(self._select(rows), self.dtype)
        return padded if span is None else padded[:, span]

    def mask(self, rows: Rows) -> np.ndarray:
        rows = rows.here if isinstance(rows, _BothRows) else rows
        lengths = np.array([len(s) for s in self._select(rows)])
        return np.arange(max(1, lengths.max())) < lengths[:, None]


def _column(name: str, data: Any, dtype: np.dtype[Any]) -> _Dense | Ragged:
    """`data` checked, as a column. Arrays in memory are looked through once, here; memmaps batch by batch."""
    if type(data) is np.ndarray:
        array, lazy = data, False
    else:
        if isinstance(data, (tuple, Mapping)):
            raise ValueError(
                f"{name}: got a {type(data).__name__}; a model takes one array (or a list of sequences) here"
            )
        if isinstance(data, list) and _is_ragged(data):
            return _ragged(name, data, dtype)
        if isinstance(data, list) and data and place_of(data[0]) is not None:
            data = namespace(data[0]).stack(data)
        lazy = isinstance(data, np.memmap)
        array = data if isinstance(data, np.ndarray) else _to_array(name, data)
    _check_kind(name, array)
    if array.ndim == 0:
        raise ValueError(f"{name}: got a single value {array!r}, expected an array with one row a sample")
    if array.size == 0:
        raise ValueError(f"{name}: is empty, its shape is {array.shape}")
    if not lazy:
        _check_finite(name, array, slice(0, len(array)), dtype)
    return _Dense(name, array, dtype, lazy)


def _to_array(name: str, data: Any) -> np.ndarray:
    try:
        return adopt(data)
    except ValueError as error:  # nested lists of unequal length
        raise ValueError(
            f"{name}: can't be made an array ({error}); give a list of arrays for unequal sequences"
        ) from error


def _is_ragged(data: list[Any]) -> bool:
    """A list of sequences of which at least two differ in shape (equal ones are simply stacked)."""
    if not all(isinstance(d, (list, tuple)) or np.ndim(d) > 0 for d in data):
        return False
    return len({np.shape(d) if hasattr(d, "shape") else len(d) for d in data}) > 1


def _ragged(name: str, data: list[Any], dtype: np.dtype[Any]) -> Ragged:
    sequences = [to_numpy(_to_array(f"{name}[{row}]", d)) for row, d in enumerate(data)]
    first = next(s for s in sequences if len(s))
    # An empty list has neither dtype nor features: it takes those of the others.
    sequences = [s if len(s) else np.zeros((0, *first.shape[1:]), first.dtype) for s in sequences]
    for row, sequence in enumerate(sequences):
        _check_kind(f"{name}[{row}]", sequence)
        if sequence.shape[1:] != first.shape[1:]:
            expected = ", ".join(["any length", *map(str, first.shape[1:])])
            raise ValueError(f"{name}[{row}]: shape {sequence.shape} came, expected ({expected})")
        _check_finite(name, sequence[None], np.array([row]), dtype)
    return Ragged(name, sequences, dtype)


def _is_source(x: Any) -> bool:
    """A generator, iterator, function, or an iterable that is not data itself."""
    if isinstance(x, (np.ndarray, list, tuple, Mapping)) or hasattr(x, "__array__") or hasattr(x, "dtype"):
        return False
    return isinstance(x, Iterable) or callable(x)


# Checks


def _batch_size(batch_size: int | None) -> int:
    if batch_size is None:
        return 32
    if isinstance(batch_size, bool) or not isinstance(batch_size, (int, np.integer)) or batch_size < 1:
        raise ValueError(f"batch_size: expected an integer >= 1, got {batch_size!r}")
    return int(batch_size)


def _check_rows(name: str, column: Any, rows: int) -> None:
    if len(column) != rows:
        raise ValueError(f"{name}: {len(column)} rows came, expected {rows}, the number of rows of x")


def _check_kind(name: str, array: np.ndarray) -> None:
    if array.dtype.kind not in "fiub":
        hint = "; a list of arrays of unequal length may be given as a list" if array.dtype == object else ""
        raise ValueError(f"{name}: dtype {array.dtype} came, expected numbers (float, int or bool){hint}")


def _check_finite(name: str, array: np.ndarray, rows: Rows, dtype: Any = None) -> None:
    """Raise for NaN, infinity, and what becomes infinite in `dtype`; looks at blocks of a few megabytes at a
    time."""
    if array.dtype.kind != "f" or (type(array) is np.ndarray and _surely_finite(array, dtype)):
        return
    if place_of(array) is not None:
        with backend_of(array).current():
            values = array if dtype is None else array.astype(dtype, copy=False)
            if bool(np.isfinite(values).all()):
                return
        array = to_numpy(array)  # to say which
    narrows = dtype is not None and np.dtype(dtype).itemsize < array.dtype.itemsize
    block = max(1, 2**20 // max(1, math.prod(array.shape[1:])))
    for start in range(0, len(array), block):
        part = array[start : start + block]
        if narrows:
            with np.errstate(over="ignore"):
                part = part.astype(dtype)
        good = np.isfinite(part)
        if not good.all():
            _refuse(name, array, start + int(np.argwhere(~good)[0, 0]), np.argwhere(~good)[0], rows, start)


FEW = 8192  # numbers; of more, BLAS would wake threads of its own for a dot product


def _surely_finite(array: np.ndarray, dtype: Any) -> bool:
    """Whether one pass over few numbers is enough to say that all are finite, and stay so in `dtype`: the sum of their
    squares is not NaN and not beyond the square of what `dtype` holds. False: they have to be looked at."""
    if array.size > FEW:
        return False
    squares = np.vdot(array, array)
    if dtype is not None and np.dtype(dtype).itemsize < array.dtype.itemsize:
        return bool(squares <= float(np.finfo(dtype).max) ** 2)
    return bool(squares < math.inf)


def _refuse(name: str, array: np.ndarray, row: int, place: np.ndarray, rows: Rows, start: int) -> None:
    """Say which value of which row is not finite; `rows` are the row numbers as the user counts them."""
    value = array[(row, *place[1:])]
    number = (rows.start or 0) + row if isinstance(rows, slice) else int(rows[row])
    within = f", at {tuple(int(i) for i in place[1:])} within it" if array.ndim > 1 else ""
    what = "is too large for float32" if np.isfinite(value) else "came, expected finite numbers"
    raise ValueError(f"{name}: {value} in row {number}{within} {what}")


def _cast(name: str, block: np.ndarray, dtype: np.dtype[Any], rows: Rows) -> np.ndarray:
    """`block` in `dtype`. What would overflow has been refused, or is refused now (as infinity) for a
    memmap."""
    with np.errstate(over="ignore"):
        return block.astype(dtype)


def _mask(mask: Any, x: _Dense | Ragged) -> np.ndarray:
    array = adopt(mask)
    expected = _time_shape("mask", x)
    if array.shape != expected:
        raise ValueError(f"mask: shape {array.shape} came, expected {expected}: (batch, time) of x")
    if array.dtype != bool:
        if array.dtype.kind not in "iuf" or not np.isin(to_numpy(array), (0, 1)).all():
            raise ValueError(f"mask: dtype {array.dtype} came, expected True and False, or 1 and 0")
        array = array.astype(bool)
    return array


def _lengths(lengths: Any, x: _Dense | Ragged) -> np.ndarray:
    array = to_numpy(adopt(lengths))
    rows, time = _time_shape("lengths", x)
    if array.shape != (rows,) or array.dtype.kind not in "iu":
        raise ValueError(
            f"lengths: {array.dtype} of shape {array.shape} came, expected {rows} integers, one a row of x"
        )
    bad = np.flatnonzero((array < 0) | (array > time))
    if bad.size:
        raise ValueError(
            f"lengths: {array[bad[0]]} came for row {bad[0]}, expected 0 to {time}, the time axis of x"
        )
    return array.astype(np.int64)


def _time_shape(name: str, x: _Dense | Ragged) -> tuple[int, int]:
    if isinstance(x, Ragged):
        raise ValueError(f"{name}: must not be given with a list of sequences, whose lengths are known")
    if x.array.ndim < 2:
        raise ValueError(f"{name}: x of shape {x.array.shape} has no time axis, expected (batch, time, ...)")
    return x.array.shape[:2]


def _timed(x: np.ndarray, other: np.ndarray | None) -> bool:
    """Does `other` have the time axis of `x`?"""
    return other is not None and x.ndim > 1 and other.ndim > 1 and other.shape[1] == x.shape[1]
