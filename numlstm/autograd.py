"""Tensors, and the tape that differentiates whatever is computed with them.

An operation is a forward pass on arrays and, for each input, its vector-Jacobian product: given the gradient
of the loss with respect to the operation's output, that with respect to the input. While a `GradientTape`
records, every operation that depends on a trainable `Variable` (or a watched tensor) leaves one node on it;
`gradient` walks the nodes backwards (reverse mode: Griewank and Walther, Evaluating Derivatives, chapter 3),
freeing each once it has been used. The operations are in ops.py; `apply` and `apply_joint` are all that a new
one needs.
"""

from __future__ import annotations

import itertools
import operator
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextvars import ContextVar, Token
from typing import TYPE_CHECKING, Any, TypeVar, Union

import numpy as np

from numlstm.backend import adopt, backend_of, beside, moved, place_of, scalar, to_numpy
from numlstm.kernels.int8 import LEVELS, Quantized
from numlstm.kernels.reference_pointwise import dense_rows

__all__ = [
    "GradientTape",
    "QuantizedVariable",
    "RowGradient",
    "Tensor",
    "Variable",
    "apply",
    "apply_joint",
    "is_recording",
    "latest_change",
    "needs_gradient",
    "transfer",
]

Array = Any  # a NumPy array, or the like of it on a device
VJP = Callable[[Array], Array]
T = TypeVar("T")
TensorLike = Union["Tensor", np.ndarray, float, int, bool, Sequence[Any]]


def _as_array(data: Any, dtype: Any) -> Array:
    """`data` as an array: an array keeps its dtype, Python numbers with a fraction become float32."""
    if isinstance(data, Tensor):
        data = data.data
    if not hasattr(data, "dtype"):
        plain, data = data, np.asarray(data)
        if dtype is None and data.dtype == np.float64 and not _holds_arrays(plain):
            dtype = np.float32
    elif type(data) is not np.ndarray:
        data = adopt(data)
    if data.dtype.kind not in "fiub":
        raise ValueError(f"data: dtype {data.dtype} came, expected real numbers (float, int or bool)")
    return data if dtype is None or data.dtype == dtype else data.astype(dtype)


def _holds_arrays(data: Any) -> bool:
    """Does this (nested) list hold anything that brings a dtype of its own?"""
    if isinstance(data, (list, tuple)):
        return any(_holds_arrays(d) for d in data)
    return hasattr(data, "dtype") or hasattr(data, "__array__")


_FLOAT32 = np.dtype(np.float32)


class Tensor:
    """An array whose computation a `GradientTape` can differentiate.

    Arithmetic, comparison, indexing and the usual methods work as on an array, and NumPy's element-wise
    functions (`np.exp(t)`) give Tensors. Comparisons give plain boolean arrays. Arrays keep their dtype;
    Python numbers and lists of them become float32 (or an integer dtype), and a plain number never changes
    the dtype of what it is combined with.

    Arguments:
        data: an array, a number, a nested list, or another Tensor (whose array is shared).
        dtype: convert to this dtype.

    Raises:
        ValueError: `data` is not made of real numbers.

    >>> t = Tensor([[1.0, 2.0], [3.0, 4.0]])
    >>> (t * 2 + 1).sum(axis=0)
    Tensor([10., 14.], dtype=float32)
    """

    # _origin: (the tape's token, the node's place on it, which of its outputs), or None: no tape knows it.
    __slots__ = ("__weakref__", "_origin", "data", "mask")
    __array_priority__ = 1000  # above CuPy's: `array * tensor` is ours
    trainable = False

    data: Array
    mask: Array | None
    _origin: tuple[object, int, int] | None

    def __init__(self, data: TensorLike, dtype: Any = None) -> None:
        if type(data) is np.ndarray and data.dtype is _FLOAT32 and (dtype is None or dtype == "float32"):
            self.data = data  # what nearly always comes: nothing to look at
        else:
            self.data = _as_array(data, dtype)
        self.mask = None
        self._origin = None

    # What it holds
    @property
    def shape(self) -> tuple[int, ...]:
        return self.data.shape

    @property
    def dtype(self) -> np.dtype[Any]:
        return self.data.dtype

    @property
    def ndim(self) -> int:
        return self.data.ndim

    @property
    def size(self) -> int:
        return self.data.size

    @property
    def T(self) -> Tensor:
        return ops.transpose(self)

    def numpy(self) -> np.ndarray:
        """The values as a NumPy array, sharing memory where it can."""
        return to_numpy(self.data)

    def item(self) -> float | int | bool:
        """The one value it holds, as a Python number."""
        return scalar(self.data)

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> np.ndarray:
        values = self.numpy()
        if dtype is not None and values.dtype != dtype:
            if copy is False:
                raise ValueError(f"a {values.dtype} Tensor can't be seen as {np.dtype(dtype)} without a copy")
            return values.astype(dtype)
        return values.copy() if copy else values

    def __float__(self) -> float:
        return float(self.item())

    def __int__(self) -> int:
        return int(self.item())

    def __bool__(self) -> bool:
        return bool(self.data)

    def __len__(self) -> int:
        return len(self.data)

    def __iter__(self) -> Iterator[Tensor]:
        return (self[k] for k in range(len(self)))

    def __repr__(self) -> str:
        kind = type(self).__name__
        values = np.array2string(self.numpy(), separator=", ", prefix=kind + "(", threshold=100)
        return f"{kind}({values}, dtype={self.dtype})"

    # Arithmetic
    def __add__(self, other: Any) -> Tensor:
        return ops.add(self, other)

    def __radd__(self, other: Any) -> Tensor:
        return ops.add(other, self)

    def __sub__(self, other: Any) -> Tensor:
        return ops.subtract(self, other)

    def __rsub__(self, other: Any) -> Tensor:
        return ops.subtract(other, self)

    def __mul__(self, other: Any) -> Tensor:
        return ops.multiply(self, other)

    def __rmul__(self, other: Any) -> Tensor:
        return ops.multiply(other, self)

    def __truediv__(self, other: Any) -> Tensor:
        return ops.divide(self, other)

    def __rtruediv__(self, other: Any) -> Tensor:
        return ops.divide(other, self)

    def __pow__(self, other: Any) -> Tensor:
        return ops.power(self, other)

    def __rpow__(self, other: Any) -> Tensor:
        return ops.power(other, self)

    def __matmul__(self, other: Any) -> Tensor:
        return ops.matmul(self, other)

    def __rmatmul__(self, other: Any) -> Tensor:
        return ops.matmul(other, self)

    def __neg__(self) -> Tensor:
        return ops.negative(self)

    def __pos__(self) -> Tensor:
        return self

    def __abs__(self) -> Tensor:
        return ops.abs(self)

    def __array_ufunc__(self, ufunc: np.ufunc, method: str, *args: Any, **kwargs: Any) -> Any:
        """`np.exp(t)`, and `array * t`: the operation of ops.py with that name, so that no tape misses it."""
        name = ufunc.__name__
        if method == "__call__" and not kwargs:
            if name in _COMPARISONS:
                return ufunc(*(a.data if isinstance(a, Tensor) else a for a in args))
            operation = ops.UFUNCS.get(name)
            if operation is not None:
                return operation(*args)
        called = name if method == "__call__" else f"{name}.{method}"
        raise TypeError(
            f"numpy.{called} does not know Tensors: use an operation of numlstm.ops, "
            f"or np.asarray(tensor) for its values, without a gradient"
        )

    def __array_function__(self, function: Any, types: Any, args: Any, kwargs: Any) -> Any:
        """`np.concatenate([t, u])` and the like: on the plain values, unless a tape would miss it."""
        if is_recording() and function.__name__ not in _CONSTANTS:
            raise TypeError(
                f"numpy.{function.__name__} under a GradientTape would lose the gradient of a Tensor: use an "
                f"operation of numlstm.ops, or np.asarray(tensor) for its values, without a gradient"
            )
        return function(*_plain(args), **{name: _plain(value) for name, value in kwargs.items()})

    # Comparison: plain boolean arrays
    def __lt__(self, other: Any) -> Array:
        return self.data < _values(other)

    def __le__(self, other: Any) -> Array:
        return self.data <= _values(other)

    def __gt__(self, other: Any) -> Array:
        return self.data > _values(other)

    def __ge__(self, other: Any) -> Array:
        return self.data >= _values(other)

    def __eq__(self, other: object) -> Array:  # type: ignore[override]
        return self.data == _values(other)

    def __ne__(self, other: object) -> Array:  # type: ignore[override]
        return self.data != _values(other)

    if TYPE_CHECKING:

        def __hash__(self) -> int: ...

    else:
        __hash__ = object.__hash__  # by identity: a Tensor may be a key

    # Methods: each is the operation of ops.py
    def __getitem__(self, index: Any) -> Tensor:
        return ops.getitem(self, index)

    def reshape(self, *shape: Any) -> Tensor:
        return ops.reshape(self, shape[0] if len(shape) == 1 and not isinstance(shape[0], int) else shape)

    def transpose(self, *axes: Any) -> Tensor:
        if not axes:
            return ops.transpose(self)
        return ops.transpose(self, axes[0] if len(axes) == 1 and not isinstance(axes[0], int) else axes)

    def astype(self, dtype: Any) -> Tensor:
        return ops.astype(self, dtype)

    def sum(self, axis: Any = None, keepdims: bool = False) -> Tensor:
        return ops.sum(self, axis, keepdims)

    def mean(self, axis: Any = None, keepdims: bool = False) -> Tensor:
        return ops.mean(self, axis, keepdims)

    def max(self, axis: Any = None, keepdims: bool = False) -> Tensor:
        return ops.max(self, axis, keepdims)

    def min(self, axis: Any = None, keepdims: bool = False) -> Tensor:
        return ops.min(self, axis, keepdims)


_COMPARISONS = {
    "less", "less_equal", "greater", "greater_equal", "equal", "not_equal", "isnan", "isfinite", "isinf",
}  # fmt: skip


_CONSTANTS = {"shape", "ndim", "size", "zeros_like", "ones_like", "full_like", "empty_like", "result_type"}


def _values(x: Any) -> Any:
    return x.data if isinstance(x, Tensor) else x


def _plain(x: Any) -> Any:
    """Arguments of a NumPy function with the Tensors in them as arrays."""
    if isinstance(x, (list, tuple)):
        return type(x)(_plain(v) for v in x)
    return x.numpy() if isinstance(x, Tensor) else x


_changes = itertools.count(1)
_latest_change = 0


def latest_change() -> int:
    """The number of the latest change of any Variable: while it stays the same, no weight has changed."""
    return _latest_change


_arrangement = 0
_abroad = False


def abroad() -> bool:
    """Has any Variable ever lain on a device? If not, nobody has to ask where one lies."""
    return _abroad


def arrangement() -> int:
    """How often any Variable was made, or got another array: while it stays the same, all weights lie where they lay."""
    return _arrangement


class Variable(Tensor):
    """A Tensor that is trained: a layer's weight. It owns its array, which `assign` writes in place.

    What is computed from weights and kept (packed for a stream, say) must notice when they change, so every
    change is counted, in `version`, and `data` is read-only: `assign` and `writable` are the ways to write.

    Arguments:
        data: the first values; copied.
        name: how summaries and files call it.
        trainable: whether tapes differentiate with respect to it.
        regularizer: a function of the Variable that gives a penalty, or None.
        constraint: a function from new values to permitted ones, applied after each update, or None.
        dtype: convert to this dtype.

    >>> w = Variable([1.0, 2.0], name="kernel")
    >>> w.assign([3.0, 4.0])
    >>> w
    Variable([3., 4.], dtype=float32, name='kernel')
    """

    __slots__ = (
        "_kept",
        "_owned",
        "_shown",
        "constraint",
        "name",
        "regularizer",
        "trainable",
        "version",
    )

    version: int

    def __init__(
        self,
        data: TensorLike,
        name: str = "variable",
        trainable: bool = True,
        regularizer: Callable[[Tensor], Tensor] | None = None,
        constraint: Callable[[Array], Array] | None = None,
        dtype: Any = None,
    ) -> None:
        super().__init__(data, dtype)
        self.name: str = name
        self.trainable: bool = trainable
        self.regularizer: Callable[[Tensor], Tensor] | None = regularizer
        self.constraint: Callable[[Array], Array] | None = constraint

    def _replace(self, array: Array) -> None:
        """Own a copy of another array."""
        self._own(array.copy(order="C"))
        self.count_change()

    def _own(self, array: Array) -> None:
        global _arrangement, _abroad
        self._owned = self._shown = array
        if isinstance(array, np.ndarray):
            self._shown = array.view()
            self._shown.flags.writeable = False
        else:
            _abroad = True
        _arrangement += 1

    if not TYPE_CHECKING:  # to a type checker the attribute that a Tensor has
        data = property(operator.attrgetter("_shown"), _replace)

    def move(self, backend: Any) -> None:
        """Have the array lie in the memory that a backend works in. Not a change: the values stay."""
        if place_of(self._owned) != (None if backend.xp is np else backend.place):
            self._own(moved(to_numpy(self._owned), backend, self.name))

    def count_change(self) -> None:
        """The array has been written in place, or is about to be."""
        global _latest_change
        self.version = _latest_change = next(_changes)

    def __getstate__(self) -> tuple[None, dict[str, Any]]:
        """For copies and pickles: the array once, and not also the view of it."""
        names = ("_origin", "mask", "constraint", "name", "regularizer", "trainable")
        return None, {"data": self._owned} | {name: getattr(self, name) for name in names}

    def writable(self) -> Array:
        """The array, to be written in place at once; counts as a change."""
        self.count_change()
        return self._owned

    def kept(self, others: Iterable[Variable], make: Callable[[], T]) -> T:
        """What `make` makes of this variable and `others`, made once until one of them changes or lies elsewhere.

        There is room for one such thing; copies and pickles go without it.

        >>> w, b = Variable([1.0, 2.0]), Variable([3.0])
        >>> scaled = lambda: w.numpy() * b.numpy()
        >>> w.kept([b], scaled) is w.kept([b], scaled)
        True
        >>> b.assign([5.0])
        >>> w.kept([b], scaled)
        array([ 5., 10.], dtype=float32)
        """
        state = [_arrangement, self.version, *[v.version for v in others]]
        known = getattr(self, "_kept", None)
        if known is None or known[0] != state:
            known = self._kept = (state, make())
        return known[1]

    def assign(self, value: TensorLike) -> None:
        """Write new values in place.

        Raises:
            ValueError: another shape, a dtype that would lose more than precision (float into int), or no
                numbers.
        """
        values = _as_array(value, None)
        if values.shape != self.shape:
            raise ValueError(f"{self.name}: values of shape {values.shape} came, expected {self.shape}")
        if not np.can_cast(values.dtype, self.dtype, "same_kind"):
            raise ValueError(f"{self.name}: values of dtype {values.dtype} came, expected {self.dtype}")
        if type(values) is not np.ndarray or type(self._owned) is not np.ndarray:
            values = beside(values, self._owned, self.name)
        self.writable()[...] = values

    def __repr__(self) -> str:
        return f"{super().__repr__()[:-1]}, name={self.name!r})"


class QuantizedVariable(Variable):
    """A weight (K, N) in int8 with a float32 scale a column, for inference: `ops.linear` and `ops.recurrent` multiply by it.

    Its values are the whole numbers; the scales are another variable, `scale`. Neither is trained.

    Arguments:
        matrix: what it begins with.
        name: how summaries and files call it; the scales are called `<name>_scale`.

    >>> w = QuantizedVariable(Quantized.of(np.ones((2, 3), np.float32)), "kernel")
    >>> w.dtype.name, w.scale.name, w.matrix.dequantized().tolist()
    ('int8', 'kernel_scale', [[1.0, 1.0, 1.0], [1.0, 1.0, 1.0]])
    """

    __slots__ = ("_matrix", "scale")

    def __init__(self, matrix: Quantized, name: str) -> None:
        super().__init__(matrix.values, name=name, trainable=False)
        self.scale: _Scale = _Scale(matrix.scale, name=f"{name}_scale", trainable=False)
        self.scale.owner = self
        self._matrix: Quantized | None = None

    @property
    def matrix(self) -> Quantized:
        """Values and scales together, with what kernels have made of them; good until either is assigned."""
        if self._matrix is None:
            self._matrix = Quantized(self.data, self.scale.data)
        return self._matrix

    def move(self, backend: Any) -> None:
        """Stay. Raises ValueError for a device: only the host's backends have kernels for int8 weights."""
        if backend.xp is not np:
            raise ValueError(
                f"{self.name}: int8 weights run on the CPU, {backend.name} has no kernels for them: compile or call the "
                f"quantized model with backend='cpu', or run the float32 model"
            )

    def assign(self, value: TensorLike) -> None:
        """Write new whole numbers in place. Raises ValueError as `Variable` does, and for a value of -128."""
        if np.min(to_numpy(_as_array(value, None)), initial=0) < -LEVELS:
            raise ValueError(f"{self.name}: expected values from -{LEVELS} to {LEVELS}, got -128")
        super().assign(value)
        self._matrix = None


class _Scale(Variable):
    """The scales of a `QuantizedVariable`, its owner."""

    __slots__ = ("owner",)

    def assign(self, value: TensorLike) -> None:
        """Write new values in place; the owner's matrix is made anew."""
        super().assign(value)
        self.owner._matrix = None


class RowGradient:
    """The gradient of a table (V, E) of whose rows few were taken: those rows alone.

    Arguments:
        index: int64 (V,), for each row its place among `values`, -1 where the gradient is zero.
        values: (U, E), the rows that are not zero, each once.

    >>> g = RowGradient(np.array([-1, 0]), np.array([[2.0, 3.0]], np.float32))
    >>> g.shape, g.dense().tolist()
    ((2, 2), [[0.0, 0.0], [2.0, 3.0]])
    """

    __slots__ = ("index", "values")

    index: Array
    values: Array

    __array_ufunc__ = None  # array + gradient is ours
    __array_priority__ = 1000  # for CuPy's arrays too

    def __init__(self, index: Array, values: Array) -> None:
        self.index, self.values = index, values

    @property
    def shape(self) -> tuple[int, ...]:
        return (len(self.index), *self.values.shape[1:])

    @property
    def dtype(self) -> np.dtype[Any]:
        return self.values.dtype

    def dense(self) -> Array:
        """The whole array."""
        return dense_rows(self.index, self.values)

    def __add__(self, other: Any) -> Array:
        return self.dense() + (other.dense() if isinstance(other, RowGradient) else other)

    __radd__ = __add__


# One recorded operation: its inputs that need a gradient; how to get it, one function for each input of an operation
# of one output, or else one function of the gradients of all outputs for all inputs; how many outputs, 0 for the former.
# An input is its shape, the node and the output that made it, and the Tensor itself if no node did: what an operation
# made is kept only by whoever needs its values.
_Input = tuple[tuple[int, ...], int, int, Union["Tensor", None]]
_Node = tuple[Sequence[_Input], Any, int]

_ACTIVE: ContextVar[GradientTape | None] = ContextVar("numlstm_tape", default=None)


class GradientTape:
    """Records what is computed inside its `with` block, to differentiate it.

    Trainable `Variable`s are followed by themselves; any other tensor must be watched: `tape.watch(x)`. A
    tape serves one call of `gradient`, which frees what the operations kept as it goes; `persistent=True`
    keeps it all for more calls.

    Raises:
        RuntimeError: a tape inside another one (gradients of gradients are not available), or one entered
            twice.

    >>> w = Variable([2.0, 3.0])
    >>> with GradientTape() as tape:
    ...     loss = (w * w).sum()
    >>> tape.gradient(loss, [w])[0]
    array([4., 6.], dtype=float32)
    """

    def __init__(self, persistent: bool = False) -> None:
        self.persistent = persistent
        self._nodes: list[_Node | None] = []  # in the order of computation
        self._token = object()  # what tensors point at: a loss that is kept does not keep the tape
        self._spent = False
        self._entered: Token[GradientTape | None] | None = None

    def __enter__(self) -> GradientTape:
        if self._entered is not None:
            raise RuntimeError("this GradientTape is already recording")
        if _ACTIVE.get() is not None:
            raise RuntimeError("a GradientTape inside another one: gradients of gradients are not available")
        if self._spent:
            raise RuntimeError("this GradientTape has been used: make a new one for the next step")
        self._entered = _ACTIVE.set(self)
        return self

    def __exit__(self, *exception: Any) -> None:
        if self._entered is not None:
            _ACTIVE.reset(self._entered)
            self._entered = None

    def watch(self, tensor: Tensor) -> None:
        """Follow a tensor that is not a trainable Variable, such as a model's input, from here on.

        Raises:
            ValueError: not a Tensor of floats.
        """
        if not isinstance(tensor, Tensor):
            raise ValueError(f"tensor: a {type(tensor).__name__} came, expected a Tensor")
        if tensor.dtype.kind != "f":
            raise ValueError(f"tensor: dtype {tensor.dtype} came, expected floats: others have no gradient")
        if not self._follows(tensor):
            tensor._origin = (self._token, -1, 0)

    def _follows(self, tensor: Tensor) -> bool:
        origin = tensor._origin
        return tensor.trainable or (origin is not None and origin[0] is self._token)

    def gradient(
        self,
        loss: Tensor,
        sources: Sequence[Tensor],
        output_gradient: TensorLike | None = None,
        *,
        rows: bool = False,
    ) -> list[Array]:
        """The gradient of `loss` with respect to each of `sources`: arrays of their shapes and dtypes.

        Arguments:
            loss: what was computed under this tape; one value, unless `output_gradient` is given.
            sources: Variables, watched tensors, or results computed from those under this tape.
            output_gradient: the gradient of some later value with respect to `loss`; 1 if not given.
            rows: leave the gradient of a table that only `embedding` reads as a `RowGradient`, which optimizers
                take.

        Returns one array for each source; zeros where the loss does not depend on it. No two share memory.

        Raises:
            ValueError: a loss of more than one value without `output_gradient`, a wrong shape, a source that
                nobody watched (its gradient would be zero without meaning it).
            RuntimeError: the tape has been used already.
        """
        if self._spent:
            raise RuntimeError(
                "this GradientTape has been used: what the operations kept was freed by its first use. "
                "Use GradientTape(persistent=True) for several calls"
            )
        sources = list(sources)
        self._check(loss, sources)
        if type(loss.data) is np.ndarray:
            return self._differentiate(loss, sources, output_gradient, rows)
        with backend_of(loss.data).current():
            return self._differentiate(loss, sources, output_gradient, rows)

    def _differentiate(
        self, loss: Tensor, sources: list[Tensor], output_gradient: TensorLike | None, rows: bool
    ) -> list[Array]:
        """`gradient`, of arguments that were checked, on the device of the loss."""
        seed = self._seed(loss, output_gradient)
        self._spent = not self.persistent
        token = self._token
        leaves: dict[int, Array] = {}  # by id(source)
        inner: dict[tuple[int, int], Array] = {}  # by (place, output): sources computed under the tape
        places = []
        for source in sources:
            origin = source._origin
            if origin is None or origin[0] is not token or origin[1] < 0:
                leaves[id(source)] = None
                places.append(None)
            else:
                inner[origin[1:]] = None
                places.append(origin[1:])
        place = self._place(loss)
        if place is not None:
            self._walk(place, seed, leaves, inner)
        elif id(loss) in leaves:
            leaves[id(loss)] = seed
        if not self.persistent:
            self._nodes.clear()
        found = [leaves[id(s)] if p is None else inner[p] for s, p in zip(sources, places, strict=True)]
        if not rows:
            found = [g.dense() if type(g) is RowGradient else g for g in found]
        return _own(found, sources, seed)

    def _place(self, tensor: Tensor) -> tuple[int, int] | None:
        """Where a tensor was computed on this tape, (node, output); None for leaves and strangers."""
        origin = tensor._origin
        if origin is None or origin[0] is not self._token or origin[1] < 0:
            return None
        return origin[1], origin[2]

    def _check(self, loss: Tensor, sources: list[Tensor]) -> None:
        if not isinstance(loss, Tensor):
            raise ValueError(f"loss: a {type(loss).__name__} came, expected a Tensor")
        for k, source in enumerate(sources):
            if not isinstance(source, Tensor):
                raise ValueError(f"sources[{k}]: a {type(source).__name__} came, expected a Tensor")
            if not self._follows(source):
                kind = f"frozen Variable {source.name!r}" if isinstance(source, Variable) else "Tensor"
                raise ValueError(
                    f"sources[{k}]: the {kind} of shape {source.shape} is not followed by this tape: "
                    f"call tape.watch() on it before it is used"
                )

    def _seed(self, loss: Tensor, output_gradient: TensorLike | None) -> Array:
        if output_gradient is None:
            if loss.size != 1:
                raise ValueError(
                    f"loss: shape {loss.shape} came, expected one value: take its mean, or give a gradient"
                )
            data = loss.data
            if type(data) is not np.ndarray:
                return np.ones_like(data)
            seed = np.empty(data.shape, data.dtype)
            seed.fill(1)
            return seed
        seed = beside(_as_array(output_gradient, loss.dtype), loss.data, "output_gradient")
        if seed.shape != loss.shape:
            raise ValueError(f"output_gradient: shape {seed.shape} came, expected the loss's {loss.shape}")
        return seed

    def _walk(
        self, place: tuple[int, int], seed: Array, leaves: dict[int, Array], inner: dict[Any, Array]
    ) -> None:
        """Send `seed` back from `place` through every node before it; fill in `leaves` and `inner`."""
        nodes, persistent = self._nodes, self.persistent
        top = place[0]
        # What has arrived so far at each node: one array, or a list of them for a node with several outputs.
        arrived: list[Any] = [None] * (top + 1)
        arrived[top] = seed
        if nodes[top][2]:  # type: ignore[index]
            arrived[top] = [None] * nodes[top][2]  # type: ignore[index]
            arrived[top][place[1]] = seed
        for at in range(top, -1, -1):
            node, dy = nodes[at], arrived[at]
            arrived[at] = None
            if not persistent:
                nodes[at] = None
            if dy is None or node is None:
                continue
            inputs, vjp, outputs = node
            if inner:
                for output, d in enumerate(dy if outputs else (dy,)):
                    if (at, output) in inner:
                        inner[at, output] = d
            gradients = vjp(*dy) if outputs else [f(dy) for f in vjp]
            # Let go of what is not needed any more before the next operation asks for memory.
            del node, dy, vjp
            for (shape, to, output, leaf), g in zip(inputs, gradients, strict=True):
                if g is None:
                    continue
                if g.shape != shape:
                    g = _unbroadcast(g, shape)
                if leaf is not None:
                    key = id(leaf)
                    if key in leaves:
                        before = leaves[key]
                        leaves[key] = g if before is None else before + g
                    continue
                if type(g) is RowGradient:
                    g = g.dense()
                several = nodes[to][2]  # type: ignore[index]
                if not several:
                    before = arrived[to]
                    arrived[to] = g if before is None else before + g
                else:
                    slots = arrived[to]
                    if slots is None:
                        slots = arrived[to] = [None] * several
                    before = slots[output]
                    slots[output] = g if before is None else before + g
            g = gradients = None


def _unbroadcast(gradient: Array, shape: tuple[int, ...]) -> Array:
    """Sum a gradient over the axes along which its operand was broadcast."""
    extra = gradient.ndim - len(shape)
    if extra:
        gradient = gradient.sum(axis=tuple(range(extra)))
    stretched = tuple(k for k, n in enumerate(shape) if n == 1 and gradient.shape[k] != 1)
    return gradient.sum(axis=stretched, keepdims=True) if stretched else gradient


def _own(gradients: list[Array], sources: list[Tensor], seed: Array) -> list[Array]:
    """The gradients as writable arrays that share no memory, as optimizers scale in place. Zeros for None."""
    # Arrays by the memory they live in, where a kernel may have put several side by side. The seed is the
    # caller's own.
    neighbours: dict[int, list[Array]] = {_owner(seed): [seed]}
    result = []
    for g, source in zip(gradients, sources, strict=True):
        data = source.data
        if g is None:
            result.append(np.zeros_like(data))
            continue
        if type(g) is RowGradient:
            result.append(g)
            continue
        if type(g) is not type(data) or g.dtype != data.dtype:
            g = beside(g, data, "gradient", data.dtype)
        others = neighbours.setdefault(_owner(g), [])
        writable = g.flags.writeable if type(g) is np.ndarray else _writable(g)
        if not writable or (others and any(np.may_share_memory(g, other) for other in others)):
            g = g.copy()
        else:
            others.append(g)
        result.append(g)
    return result


def _writable(a: Array) -> bool:
    """Can the elements of a device's array be written to, each by itself? It does not say so of broadcast views."""
    return all(stride or n < 2 for n, stride in zip(a.shape, a.strides, strict=True))


def _owner(a: Array) -> int:
    base = a.base
    return id(a if base is None else base)


def is_recording() -> bool:
    """Is a tape recording, in this context?"""
    return _ACTIVE.get() is not None


def needs_gradient(*tensors: Tensor | None) -> bool:
    """Is a tape recording that follows one of these? An operation asks before it keeps anything costly."""
    tape = _ACTIVE.get()
    if tape is not None:
        token = tape._token
        for t in tensors:
            if t is not None and (t.trainable or ((o := t._origin) is not None and o[0] is token)):
                return True
    return False


def apply(data: Array, *edges: tuple[Tensor, VJP]) -> Tensor:
    """The Tensor that an operation returns: `data`, recorded with an (input, vector-Jacobian product) each.

    A product is called with the gradient of the output and gives that of its input; it need not undo
    broadcasting. Those of inputs that need no gradient are dropped, with all that they hold on to.

    >>> x = Variable([1.0, 2.0])
    >>> def cube(x):
    ...     return apply(x.data**3, (x, lambda dy: dy * 3 * x.data**2))
    >>> with GradientTape() as tape:
    ...     y = cube(x).sum()
    >>> tape.gradient(y, [x])[0]
    array([ 3., 12.], dtype=float32)
    """
    out = _new(Tensor)
    out.data = np.asarray(data) if isinstance(data, np.generic) else data
    out.mask = out._origin = None
    tape = _ACTIVE.get()
    if tape is not None:
        token, inputs, vjps = tape._token, [], []
        for x, vjp in edges:
            origin = x._origin
            if origin is not None and origin[0] is token and origin[1] >= 0:
                inputs.append((x.data.shape, origin[1], origin[2], None))
                vjps.append(vjp)
            elif x.trainable or (origin is not None and origin[0] is token):
                inputs.append((x.data.shape, -1, 0, x))
                vjps.append(vjp)
        if inputs:
            nodes = tape._nodes
            out._origin = (token, len(nodes), 0)
            nodes.append((inputs, vjps, 0))
    return out


_new = Tensor.__new__


def transfer(tensor: Tensor, backend: Any, name: str) -> Tensor:
    """A tensor in the memory that a backend works in; itself if it lies there. Its gradient comes back to where it lay.

    Raises:
        ValueError: it lies on another device than the backend's; `name` says which argument it came as.
    """
    here = tensor.data
    there = moved(here, backend, name)
    if there is here:
        return tensor
    out = apply(there, (tensor, lambda dy: beside(dy, here, name)))
    out.mask = tensor.mask
    return out


def apply_joint(
    data: Sequence[Array], inputs: Sequence[Tensor], vjp: Callable[..., Sequence[Array | None]]
) -> tuple[Tensor, ...]:
    """The Tensors of an operation whose gradients are computed together, or that has several outputs.

    `vjp` is called with one gradient for each output, None for an output that the loss does not use, and
    gives one for each of `inputs`, or None.
    """
    outs = tuple([_of_array(d) for d in data])
    if needs_gradient(*inputs):
        tape: Any = _ACTIVE.get()
        token, nodes = tape._token, tape._nodes
        place = len(nodes)
        for k, out in enumerate(outs):
            out._origin = (token, place, k)
        nodes.append(([_input(x, token) for x in inputs], vjp, len(outs)))
    return outs


def _input(x: Tensor, token: object) -> _Input:
    origin = x._origin
    if origin is not None and origin[0] is token and origin[1] >= 0:
        return x.data.shape, origin[1], origin[2], None
    return x.data.shape, -1, 0, x


def _of_array(data: Array) -> Tensor:
    """A Tensor of an array that an operation has made, which needs no looking at."""
    out = _new(Tensor)
    out.data = np.asarray(data) if isinstance(data, np.generic) else data
    out.mask = out._origin = None
    return out


# Last, because ops.py is made of the names above, and the operators of a Tensor are made of ops.
from numlstm import ops  # noqa: E402
