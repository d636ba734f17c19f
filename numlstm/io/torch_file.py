"""The tensors in a file that `torch.save` wrote, read without PyTorch and without unpickling anything.

Since PyTorch 1.6 such a file is a zip archive: `data.pkl` is a pickle in which tensors refer to storages, and
`data/<key>` holds a storage's bytes. The pickle is taken apart by `pickletools`, which lists its instructions and runs
none; the few that a dictionary of tensors needs are interpreted here over plain values, and everything else (a class,
a function, an instruction beyond them) is refused with its name. Layout: torch/serialization.py and torch/_utils.py.
"""

from __future__ import annotations

import math
import os
import pickletools
import zipfile
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

import numpy as np

__all__ = ["is_state_dict", "read_torch_file"]

# torch's storage classes and what is in them. bfloat16, which NumPy has not got, becomes float32, without loss.
_STORAGES = {
    "FloatStorage": "f4", "DoubleStorage": "f8", "HalfStorage": "f2", "BFloat16Storage": "bfloat16",
    "LongStorage": "i8", "IntStorage": "i4", "ShortStorage": "i2", "CharStorage": "i1", "ByteStorage": "u1",
    "BoolStorage": "?",
}  # fmt: skip
_LONGEST_PICKLE = 64 << 20


class _Name(NamedTuple):
    """A class or function that the pickle names: a mere name here."""

    module: str
    name: str


class _Storage(NamedTuple):
    kind: str
    key: str
    size: int


_MARK = object()


def read_torch_file(path: str | os.PathLike[str]) -> Any:
    """What `torch.save` wrote: dictionaries, lists and numbers as they are, tensors as NumPy arrays.

    Raises:
        FileNotFoundError: no such file.
        ValueError: no zip archive of `torch.save` (files from before PyTorch 1.6 are none), damaged, or one that
            holds other objects than tensors in dictionaries and lists; the object is named.
    """
    try:
        with zipfile.ZipFile(path) as archive:
            return _Reader(path, archive).read()
    except zipfile.BadZipFile as error:
        raise ValueError(
            f"{path}: not a file that torch.save wrote since PyTorch 1.6, or damaged ({error}); an older one is "
            f"brought up to date there: torch.save(torch.load(path, weights_only=True), path)"
        ) from None


class _Reader:
    """One archive."""

    def __init__(self, path: Any, archive: zipfile.ZipFile) -> None:
        self.path, self.archive = path, archive
        found = [name for name in archive.namelist() if name.count("/") == 1 and name.endswith("/data.pkl")]
        if len(found) != 1:
            raise ValueError(f"{path}: a zip archive, but not one that torch.save wrote: it has no data.pkl")
        self.root = found[0].removesuffix("data.pkl")
        order = (
            self._member("byteorder", 16).strip()
            if f"{self.root}byteorder" in archive.namelist()
            else b"little"
        )
        self.order = {b"little": "<", b"big": ">"}.get(order)
        if self.order is None:
            raise ValueError(f"{path}: damaged: unknown byte order {order!r}")

    def _member(self, name: str, limit: int) -> bytes:
        try:
            info = self.archive.getinfo(self.root + name)
        except KeyError:
            raise ValueError(f"{self.path}: damaged: it lacks {name}") from None
        if info.file_size > limit:  # also what would swell on unpacking
            raise ValueError(
                f"{self.path}: damaged: {name} has {info.file_size} bytes, expected at most {limit}"
            )
        return self.archive.read(info)

    def read(self) -> Any:
        """The object."""
        try:
            return self._run(self._member("data.pkl", _LONGEST_PICKLE))
        except (
            IndexError,
            KeyError,
            TypeError,
            AttributeError,
            StopIteration,
        ) as error:  # instructions that make no sense
            raise ValueError(f"{self.path}: damaged: data.pkl can't be followed ({error!r})") from None

    def _run(self, code: bytes) -> Any:
        """Interpret the pickle's instructions, as its protocols 2 to 4 define them, on plain values."""
        stack: list[Any] = []
        memo: dict[int, Any] = {}
        for opcode, argument in self._instructions(code):
            match opcode.name:
                case "PROTO" | "FRAME":
                    pass
                case "STOP":
                    return stack.pop()
                case "MARK":
                    stack.append(_MARK)
                case "NONE":
                    stack.append(None)
                case "NEWTRUE" | "NEWFALSE":
                    stack.append(opcode.name == "NEWTRUE")
                case ("BININT" | "BININT1" | "BININT2" | "LONG1" | "BINFLOAT" | "BINUNICODE" | "SHORT_BINUNICODE"
                      | "SHORT_BINSTRING" | "BINSTRING"):  # fmt: skip
                    stack.append(argument)
                case "EMPTY_DICT":
                    stack.append({})
                case "EMPTY_LIST":
                    stack.append([])
                case "EMPTY_TUPLE":
                    stack.append(())
                case "TUPLE":
                    stack.append(tuple(_above_mark(stack)))
                case "TUPLE1" | "TUPLE2" | "TUPLE3":
                    count = int(opcode.name[-1])
                    stack[-count:] = [tuple(stack[-count:])]
                case "APPEND":
                    item = stack.pop()
                    stack[-1].append(item)
                case "APPENDS":
                    items = _above_mark(stack)
                    stack[-1].extend(items)
                case "SETITEM":
                    value, key = stack.pop(), stack.pop()
                    stack[-1][key] = value
                case "SETITEMS":
                    items = _above_mark(stack)
                    stack[-1].update(zip(items[::2], items[1::2], strict=True))
                case "BINPUT" | "LONG_BINPUT":
                    memo[argument] = stack[-1]
                case "MEMOIZE":
                    memo[len(memo)] = stack[-1]
                case "BINGET" | "LONG_BINGET":
                    stack.append(memo[argument])
                case "GLOBAL":
                    stack.append(_Name(*argument.split(" ", 1)))
                case "STACK_GLOBAL":
                    name, module = stack.pop(), stack.pop()
                    stack.append(_Name(module, name))
                case "BINPERSID":
                    stack.append(self._storage(stack.pop()))
                case "NEWOBJ" | "NEWOBJ_EX" | "INST" | "OBJ":
                    raise self._refused(
                        next((x for x in reversed(stack) if isinstance(x, _Name)), opcode.name)
                    )
                case "REDUCE":
                    arguments, what = stack.pop(), stack.pop()
                    stack.append(self._made(what, arguments))
                case "BUILD":  # attributes of a dictionary, such as a state_dict's _metadata: not needed
                    stack.pop()
                    if not isinstance(stack[-1], dict):
                        raise self._refused(stack[-1])
                case name:
                    raise self._refused(f"the instruction {name}")
        raise ValueError(f"{self.path}: damaged: data.pkl has no end")

    def _instructions(self, code: bytes) -> Iterator[tuple[pickletools.OpcodeInfo, Any]]:
        try:
            for opcode, argument, _ in pickletools.genops(code):
                yield opcode, argument
        except ValueError as error:
            raise ValueError(f"{self.path}: damaged: data.pkl: {error}") from None

    def _refused(self, what: Any) -> ValueError:
        name = f"{what.module}.{what.name}" if isinstance(what, _Name) else str(what)
        return ValueError(
            f"{self.path}: holds {name}, which is not read: expected tensors in dictionaries and lists alone. "
            f"Save the weights, torch.save(module.state_dict(), path)"
        )

    def _storage(self, identity: Any) -> _Storage:
        kind, storage, key, _, size = identity
        if kind != "storage" or storage.module != "torch" or storage.name not in _STORAGES:
            raise self._refused(storage)
        return _Storage(_STORAGES[storage.name], str(key), int(size))

    def _made(self, what: Any, arguments: Any) -> Any:
        """What a call of these four functions gives; no other is known."""
        match what:
            case _Name("collections", "OrderedDict") if not arguments:
                return {}
            case _Name("torch._utils", "_rebuild_tensor_v2"):
                return self._tensor(*arguments[:4])
            case _Name("torch._utils", "_rebuild_parameter"):
                return arguments[0]
            case _Name("torch", "Size"):
                return tuple(arguments[0])
        raise self._refused(what)

    def _tensor(self, storage: Any, offset: Any, size: Any, stride: Any) -> np.ndarray:
        """Numbers `offset`, `offset + stride`, ... of a storage."""
        if not isinstance(storage, _Storage):
            raise self._refused(storage)
        width = 2 if storage.kind == "bfloat16" else np.dtype(storage.kind).itemsize
        content = self._member(f"data/{storage.key}", storage.size * width)
        shape, steps = tuple(map(int, size)), tuple(map(int, stride))
        last, there = (
            offset + sum((n - 1) * s for n, s in zip(shape, steps, strict=True)),
            len(content) // width,
        )
        if min((offset, *shape, *steps)) < 0 or (
            math.prod(shape) and max(last + 1, math.prod(shape)) > there
        ):
            raise ValueError(f"{self.path}: damaged: a tensor of shape {shape} lies outside its storage")
        if storage.kind == "bfloat16":  # the upper half of a float32
            values = (np.frombuffer(content, f"{self.order}u2").astype(np.uint32) << 16).view(np.float32)
        else:
            values = np.frombuffer(content, np.dtype(storage.kind).newbyteorder(self.order))
        values = values[offset:].astype(values.dtype.newbyteorder("="))
        return np.lib.stride_tricks.as_strided(values, shape, [s * values.itemsize for s in steps]).copy()


def _above_mark(stack: list[Any]) -> list[Any]:
    """Take what lies above the last mark, and the mark."""
    place = len(stack) - 1 - next(k for k, item in enumerate(reversed(stack)) if item is _MARK)
    items = stack[place + 1 :]
    del stack[place:]
    return items


def is_state_dict(value: Any) -> bool:
    """Tensors by name, and nothing else?"""
    return isinstance(value, Mapping) and bool(value) and all(
        isinstance(k, str) and isinstance(v, np.ndarray) for k, v in value.items()
    )  # fmt: skip
