"""A device that is none: arrays that refuse what CuPy's refuse, on a backend that counts what crosses to the host.

A `StrictArray` holds a NumPy array and lets nobody at it: no implicit conversion, no NumPy array beside it in
arithmetic, as an index or as a value, no function that CuPy lacks, no `writeable` flag. `xp` is the module of its
functions, names that CuPy has (test_device.py compares them where CuPy is installed). NumPy's functions arrive by
`__array_ufunc__` and `__array_function__` by CuPy's rules: no `ufunc.reduce`, no generalised ufuncs, none beside `xp`'s.
`StrictBackend` runs NumPy's reference kernels on what the arrays hold. So a model that trains here touches its
arrays on a GPU only in ways that CuPy knows, and `COUNTS` says how often it crossed over. Stricter than CuPy in one
respect: NumPy arrays as indices, which CuPy copies over silently, are refused too.
"""

from __future__ import annotations

import operator
from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any

import numpy as np

from numlstm import backend as backends
from numlstm.backend import Backend
from numlstm.kernels import reference, reference_pointwise

__all__ = ["COUNTS", "StrictArray", "StrictBackend", "failing_at", "strict_device", "xp"]

COUNTS = SimpleNamespace(in_bytes=0, ins=0, out_bytes=0, outs=0, scalars=0, operations=0)
CURRENT = [0]  # the device that is current, as in CUDA
_FAIL: list[int] = []  # operations left until memory "runs out"


def reset_counts() -> None:
    for name in vars(COUNTS):
        setattr(COUNTS, name, 0)


@contextmanager
def failing_at(n: int):
    """The n-th operation on the device (from 0) raises MemoryError, as CuPy does when memory runs out."""
    _FAIL[:] = [n]
    try:
        yield
    finally:
        _FAIL.clear()


def _operation() -> None:
    COUNTS.operations += 1
    if _FAIL:
        if _FAIL[0] == 0:
            _FAIL.clear()
            raise MemoryError("Out of memory allocating 512 bytes (allocated so far: 0 bytes).")
        _FAIL[0] -= 1


def _operand(x: Any) -> Any:
    """What CuPy takes as an operand: its own arrays, and plain or NumPy numbers."""
    if isinstance(x, StrictArray):
        return x._held
    if isinstance(x, (bool, int, float, complex, np.generic)) or x is None:
        return x
    raise TypeError(f"Unsupported type {type(x)}")


def _wrapped(value: Any, index: int = 0, base: Any = None) -> Any:
    if isinstance(value, (np.ndarray, np.generic)):
        return StrictArray(np.asarray(value), index, base)
    if isinstance(value, (list, tuple)):
        return type(value)(_wrapped(v, index) for v in value)
    return value


def _device(*args: Any) -> int:
    places = {a.place for a in _arrays(args)}
    if len(places) > 1:
        raise ValueError(f"Array device must be same as the current device: arrays of {sorted(places)} came")
    if places and places != {CURRENT[0]}:
        raise ValueError(
            f"Array device must be same as the current device: array device = {places}, current = {CURRENT[0]}"
        )
    return CURRENT[0]


def _arrays(args: Any) -> Any:
    for a in args:
        if isinstance(a, StrictArray):
            yield a
        elif isinstance(a, (list, tuple)):
            yield from _arrays(a)


def _key(index: Any) -> Any:
    if isinstance(index, tuple):
        return tuple(_key(i) for i in index)
    if isinstance(index, StrictArray):
        return index._held
    if index is None or index is Ellipsis or isinstance(index, (int, np.integer, slice)):
        return index
    raise TypeError(f"an index of type {type(index)} would be copied to the device in silence")


class StrictArray:
    """See above. `place` is the number of its device."""

    __array_priority__ = 100  # CuPy's

    def __init__(self, held: np.ndarray, place: int = 0, base: Any = None) -> None:
        assert type(held) is np.ndarray
        self._held, self.place = held, place
        self.base = None if base is None else base if base.base is None else base.base

    def get(self) -> np.ndarray:
        COUNTS.outs, COUNTS.out_bytes = COUNTS.outs + 1, COUNTS.out_bytes + self.nbytes
        return self._held.copy()

    def _scalar(self) -> Any:
        COUNTS.scalars += 1
        return self._held.item()

    def item(self) -> Any:
        return self._scalar()

    def tolist(self) -> Any:
        return self.get().tolist()

    def __bool__(self) -> bool:
        return bool(self._scalar())

    def __float__(self) -> float:
        return float(self._scalar())

    def __int__(self) -> int:
        return int(self._scalar())

    def __index__(self) -> int:
        return operator.index(self._scalar())

    def __len__(self) -> int:
        return len(self._held)

    def __iter__(self) -> Any:
        return (self[k] for k in range(len(self)))

    def __repr__(self) -> str:
        return f"StrictArray({self._held!r})"

    __hash__ = None  # type: ignore[assignment]

    # What NumPy gets
    def __array__(self, *_: Any, **__: Any) -> Any:
        raise TypeError(
            "Implicit conversion to a NumPy array is not allowed. Please use `.get()` to construct a NumPy array explicitly."
        )

    def __array_ufunc__(self, ufunc: Any, method: str, *inputs: Any, **kwargs: Any) -> Any:
        if method != "__call__" or ufunc.signature is not None or not hasattr(xp, ufunc.__name__):
            return NotImplemented
        if "out" in kwargs:
            (kwargs["out"],) = kwargs["out"]
        return getattr(xp, ufunc.__name__)(*inputs, **kwargs)

    def __array_function__(self, function: Any, types: Any, args: Any, kwargs: Any) -> Any:
        module = function.__module__.split(".")[1:]
        if (
            module
            or not hasattr(xp, function.__name__)
            or any(t not in (StrictArray, np.ndarray) for t in types)
        ):
            return NotImplemented
        return getattr(xp, function.__name__)(*args, **kwargs)

    # What it holds
    dtype = property(lambda self: self._held.dtype)
    shape = property(lambda self: self._held.shape)
    ndim = property(lambda self: self._held.ndim)
    size = property(lambda self: self._held.size)
    nbytes = property(lambda self: self._held.nbytes)
    itemsize = property(lambda self: self._held.itemsize)
    strides = property(lambda self: self._held.strides)
    T = property(lambda self: _wrapped(self._held.T, self.place, self))

    @property
    def flags(self) -> Any:
        own = self._held.flags
        return SimpleNamespace(
            c_contiguous=own.c_contiguous, f_contiguous=own.f_contiguous, owndata=self.base is None
        )

    # Indexing
    def __getitem__(self, index: Any) -> StrictArray:
        _operation()
        _device(self, index if isinstance(index, tuple) else (index,))
        return _wrapped(self._held[_key(index)], self.place, self)

    def __setitem__(self, index: Any, value: Any) -> None:
        _operation()
        _device(self, value, index if isinstance(index, tuple) else (index,))
        self._held[_key(index)] = _operand(value)


def _binary(function: Any, name: str) -> None:
    def forward(self: StrictArray, other: Any) -> Any:
        if (
            getattr(other, "__array_priority__", 0) > 100
        ):  # CuPy gives way to a higher priority, and to nothing else
            return NotImplemented
        _operation()
        return _wrapped(function(self._held, _operand(other)), _device((self, other)))

    def backward(self: StrictArray, other: Any) -> Any:
        _operation()
        return _wrapped(function(_operand(other), self._held), self.place)

    def in_place(self: StrictArray, other: Any) -> StrictArray:
        _operation()
        _device((self, other))
        getattr(operator, f"i{name}")(self._held, _operand(other))
        return self

    setattr(StrictArray, f"__{name}__", forward)
    if name not in ("lt", "le", "gt", "ge", "eq", "ne"):
        setattr(StrictArray, f"__r{name}__", backward)
        setattr(StrictArray, f"__i{name}__", in_place)


for _name in (
    "add",
    "sub",
    "mul",
    "truediv",
    "floordiv",
    "mod",
    "pow",
    "matmul",
    "lt",
    "le",
    "gt",
    "ge",
    "eq",
    "ne",
):
    _binary(getattr(operator, _name), _name)
for _name in ("and_", "or_", "xor"):
    _binary(getattr(operator, _name), _name.rstrip("_"))


def _unary(name: str) -> None:
    def call(self: StrictArray) -> Any:
        _operation()
        return _wrapped(getattr(operator, name)(self._held), self.place)

    setattr(StrictArray, f"__{name}__", call)


for _name in ("neg", "pos", "abs", "invert"):
    _unary(_name)


def _method(name: str, view: bool) -> None:
    def call(self: StrictArray, *args: Any, **kwargs: Any) -> Any:
        _operation()
        plain = [_operand(a) if isinstance(a, (np.ndarray, StrictArray)) else a for a in args]
        named = {k: _operand(v) if isinstance(v, (np.ndarray, StrictArray)) else v for k, v in kwargs.items()}
        out = getattr(self._held, name)(*plain, **named)
        if out is self._held:
            return self
        shares = view and isinstance(out, np.ndarray) and np.shares_memory(out, self._held)
        return _wrapped(out, self.place, self if shares else None)

    setattr(StrictArray, name, call)


for _name in ("reshape", "transpose", "swapaxes", "ravel", "squeeze", "view", "astype"):
    _method(_name, True)
for _name in (
    "all", "any", "argmax", "argmin", "argsort", "clip", "copy", "cumsum", "dot", "fill", "flatten", "max", "mean", "min",
    "prod", "repeat", "round", "sort", "std", "sum", "take", "var",
):  # fmt: skip
    _method(_name, False)

# The functions of the module: all take and give StrictArrays. Every name is one of CuPy's.
_FUNCTIONS = (  # noqa: SIM905
    "abs absolute add any all allclose argmax argmin argsort array_equal argwhere bincount broadcast_to ceil clip "
    "concatenate copysign copyto cos count_nonzero cumsum diff divide dot einsum equal exp expand_dims expm1 flatnonzero "
    "flip floor greater greater_equal isfinite isinf isnan isneginf less less_equal log log1p logaddexp logical_and "
    "logical_not logical_or matmul max maximum may_share_memory mean min minimum moveaxis multiply negative nonzero "
    "not_equal pad power prod ravel repeat reshape rint searchsorted sign sin sort sqrt square squeeze stack std subtract "
    "sum swapaxes take take_along_axis tanh transpose tril true_divide unique var vstack where zeros_like ones_like "
    "full_like empty_like shape ndim size"
).split()
_MAKERS = "arange empty eye full linspace ones tri zeros".split()  # noqa: SIM905  # of nothing that lies anywhere


def _function(name: str) -> Any:
    function = getattr(np, name)

    def unwrap(a: Any) -> Any:
        if isinstance(a, StrictArray):
            return a._held
        if isinstance(a, np.ndarray):
            raise TypeError(f"Unsupported type {type(a)}")
        if isinstance(a, (list, tuple)):
            return type(a)(unwrap(v) for v in a)
        return a

    def call(*args: Any, **kwargs: Any) -> Any:
        if name == "full" and isinstance(args[1], StrictArray):
            args = (args[0], args[1]._held, *args[2:])
        _operation()
        place = _device(args, kwargs.values())
        out = function(*(unwrap(a) for a in args), **{k: unwrap(v) for k, v in kwargs.items()})
        if isinstance(kwargs.get("out"), StrictArray):
            return kwargs["out"]
        if name in ("shape", "ndim", "size", "may_share_memory"):
            return out
        first = next(_arrays(args), None)
        shares = isinstance(out, np.ndarray) and first is not None and np.shares_memory(out, first._held)
        return _wrapped(out, place, first if shares else None)

    return call


class _Add:
    """`xp.add`, which has an `at` in CuPy too."""

    def __init__(self) -> None:
        self._call = _function("add")

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self._call(*args, **kwargs)

    def at(self, a: StrictArray, indices: Any, b: Any) -> None:
        _operation()
        np.add.at(a._held, _key(indices), _operand(b))


xp = SimpleNamespace(
    ndarray=StrictArray,
    float32=np.float32, float64=np.float64, int32=np.int32, int64=np.int64, bool_=np.bool_, inf=np.inf, nan=np.nan,
    newaxis=None, dtype=np.dtype, result_type=np.result_type, finfo=np.finfo, iinfo=np.iinfo, isscalar=np.isscalar,
    **{name: _function(name) for name in (*_FUNCTIONS, *_MAKERS)},
)  # fmt: skip
xp.add = _Add()


def _plain(value: Any) -> Any:
    """What the reference kernels get. A NumPy array among the arguments is somebody's mistake."""
    if isinstance(value, StrictArray):
        return value._held
    if isinstance(value, _Kept):
        return value.residual
    if isinstance(value, np.ndarray):
        raise TypeError(f"Unsupported type {type(value)}: a NumPy array came to a device's kernel")
    if isinstance(value, (list, tuple)) and not hasattr(value, "_fields"):
        return type(value)(_plain(v) for v in value)
    return value


class _Kept:
    """What a kernel keeps for its gradient, which is nobody else's business."""

    def __init__(self, residual: Any) -> None:
        self.residual = residual


class _Module:
    """A module of reference kernels whose functions take and give StrictArrays."""

    def __init__(self, module: Any) -> None:
        self._module = module
        self.__name__ = f"strict.{module.__name__}"

    def __getattr__(self, name: str) -> Any:
        function = getattr(self._module, name)
        if isinstance(function, type):  # Updates
            return lambda *args: _Updates(function(*(_plain(a) for a in args)))

        def call(*args: Any, **kwargs: Any) -> Any:
            _operation()
            place = _device(args, kwargs.values())
            out = function(*(_plain(a) for a in args), **{k: _plain(v) for k, v in kwargs.items()})
            if hasattr(out, "_fields"):  # Forward, Gradients: the residual is the kernel's own
                return type(out)(
                    *(
                        v if f == "residual" else _wrapped(v, place)
                        for f, v in zip(out._fields, out, strict=True)
                    )
                )
            if name in ("softmax_cross_entropy", "layer_norm"):
                return _wrapped(out[0], place), _Kept(out[1])
            return _wrapped(out, place)

        return call


class _Updates:
    """One operation, that happens as a whole or not at all: as a fused kernel does."""

    def __init__(self, inner: Any) -> None:
        self._inner = inner

    def __call__(self, gradients: Any, options: Any, decay: float = 0.0) -> None:
        _operation()
        self._inner([_plain(g) for g in gradients], options, decay)


_MODULES = {module.__name__: _Module(module) for module in (reference, reference_pointwise)}


class StrictBackend(Backend):
    """The reference's kernels, on StrictArrays of device `index`."""

    xp = xp
    index = 0
    memory = 2**40  # what `room` gives

    name = property(lambda self: f"strict:{self.index}")  # type: ignore[assignment]
    place = name

    def functions(self, operation: str, option: str, dtype: Any, gradient: bool = False) -> Any:
        return _MODULES[super().functions(operation, option, dtype, gradient).__name__]

    def asarray(self, a: Any, dtype: Any = None) -> StrictArray:
        if isinstance(a, StrictArray):
            if a.place != self.index:
                raise ValueError(f"an array of strict:{a.place} came to {self.place}")
            return a if dtype is None or a.dtype == dtype else a.astype(dtype)
        if hasattr(a, "__dlpack__") and not isinstance(a, np.ndarray):  # without a copy
            return StrictArray(a._held if dtype is None else a._held.astype(dtype, copy=False), self.index)
        held = np.array(a, dtype)
        COUNTS.ins, COUNTS.in_bytes = COUNTS.ins + 1, COUNTS.in_bytes + held.nbytes
        _operation()
        return StrictArray(held, self.index)

    def to_numpy(self, a: Any) -> np.ndarray:
        return a.get() if isinstance(a, StrictArray) else np.asarray(a)

    @contextmanager
    def current(self):
        before, CURRENT[0] = CURRENT[0], self.index
        try:
            yield
        finally:
            CURRENT[0] = before

    def room(self) -> int | None:
        return self.memory


class SecondStrictBackend(StrictBackend):
    """Another device."""

    index = 1


@contextmanager
def strict_device():
    """The backends "strict" and "strict:1" are known inside the block, and the counts begin at zero."""
    StrictArray.__module__ = "strict_device"  # by this name arrays are known to the backends
    classes = {"strict": StrictBackend, "strict:0": StrictBackend, "strict:1": SecondStrictBackend}
    backends._CLASSES.update(classes)
    backends._PLACES["strict_device"] = lambda a: f"strict:{a.place}"
    backends._DLPACK[99] = "strict"
    reset_counts()
    try:
        yield COUNTS
    finally:
        for name in classes:
            backends._CLASSES.pop(name)
        for key in [k for k in backends._INSTANCES if k[0] in classes]:
            backends._INSTANCES.pop(key)
        backends._PLACES.pop("strict_device")
        backends._DLPACK.pop(99)
        for place in classes:
            backends._BY_PLACE.pop(place, None)
