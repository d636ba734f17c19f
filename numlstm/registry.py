"""Things with names: how a string or a saved dictionary becomes an object, and back.

Layers, initializers, regularizers, constraints and activations are each kept in a `Registry`. Names are
compared without case and underscores, so `glorot_uniform`, `GlorotUniform` (Keras) and `glorotUniform`
(TensorFlow.js) are one name. `Configurable` objects are written as `{"class_name": ..., "config": ...}`,
where the configuration is the constructor's own parameters, read back from attributes of the same name.
"""

import difflib
import inspect
import re
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from functools import cache
from types import MappingProxyType
from typing import Any, Generic, Self, TypeVar

import numpy as np

T = TypeVar("T")
C = TypeVar("C", bound=Callable[..., Any])  # the class or function that is decorated: it keeps its type

_custom_objects: ContextVar[Mapping[str, Any]] = ContextVar("custom_objects", default=MappingProxyType({}))


@contextmanager
def custom_objects_scope(objects: Mapping[str, Any] | None) -> Iterator[None]:
    """Within the block, every registry also knows `objects` (name -> class, function or cell)."""
    token = _custom_objects.set({**_custom_objects.get(), **(objects or {})})
    try:
        yield
    finally:
        _custom_objects.reset(token)


def _key(name: str) -> str:
    return name.replace("_", "").lower()


def snake_case(name: str) -> str:
    """The default name of an object of this class, by Keras' rule.

    >>> snake_case("GlobalAveragePooling1D"), snake_case("KLDivergence")
    ('global_average_pooling1d', 'kl_divergence')
    """
    name = re.sub(r"(.)([A-Z][a-z]+)", r"\1_\2", name)
    return re.sub(r"([a-z])([A-Z])", r"\1_\2", name).lower()


def suggest(name: str, known: list[str]) -> str:
    """The second half of an "unknown name" error: the closest name, then all of them."""
    keys = {_key(k): k for k in known}
    close = difflib.get_close_matches(_key(name), keys, n=1)
    hint = f"did you mean {keys[close[0]]!r}? " if close else ""
    return f"{hint}Known: {', '.join(sorted(known))}"


class Registry(Generic[T]):
    """Names of one kind of thing. `kind` is the word used in error messages.

    >>> colours = Registry("colour")
    >>> colours.add("DeepBlue", "#00f")
    '#00f'
    >>> colours.find("deep_blue")
    '#00f'
    >>> colours.find("deep_bleu")
    Traceback (most recent call last):
    ValueError: unknown colour 'deep_bleu': did you mean 'DeepBlue'? Known: DeepBlue
    """

    def __init__(self, kind: str) -> None:
        self.kind = kind
        self._entries: dict[str, tuple[str, T]] = {}  # key -> (name as written, thing)

    def add(self, name: str, thing: T, *aliases: str) -> T:
        """Enter `thing` under `name` and `aliases`; gives `thing` back."""
        for alias in (name, *aliases):
            self._entries[_key(alias)] = (name, thing)
        return thing

    def register(self, *aliases: str) -> Callable[[C], C]:
        """Decorator: enter a class or function under its own name and `aliases`."""

        def enter(thing: Any) -> Any:
            return self.add(thing.__name__, thing, *aliases)

        return enter

    def names(self) -> list[str]:
        """Every name, aliases left out, sorted."""
        return sorted({name for name, _ in self._entries.values()})

    def values(self) -> list[T]:
        """Every thing once, in the order of `names()`."""
        return [self._entries[_key(name)][1] for name in self.names()]

    def __contains__(self, name: str) -> bool:
        return name in _custom_objects.get() or _key(name) in self._entries

    def find(self, name: str) -> T:
        """The thing called `name`. Raises ValueError, listing the known names."""
        custom = _custom_objects.get()
        if name in custom:
            return custom[name]
        entry = self._entries.get(_key(name))
        if entry is None:
            known = [*self.names(), *custom]
            raise ValueError(f"unknown {self.kind} {name!r}: {suggest(name, known)}")
        return entry[1]

    def get(self, identifier: Any) -> Any:
        """An object from its name, its saved form, its class, or itself; None stays None."""
        if identifier is None:
            return None
        if isinstance(identifier, str):
            thing = self.find(identifier)
            return thing() if isinstance(thing, type) else thing
        if isinstance(identifier, Mapping):
            return self._from_saved(identifier)
        if isinstance(identifier, type):
            return identifier()
        if callable(identifier):
            return identifier
        raise ValueError(
            f"{self.kind}: got {identifier!r} of type {type(identifier).__name__}; "
            f"expected a name, an object or its saved configuration"
        )

    def _from_saved(self, saved: Mapping[str, Any]) -> Any:
        if not isinstance(saved.get("class_name"), str):
            raise ValueError(
                f"{self.kind}: a saved configuration needs 'class_name' and 'config', got {saved!r}"
            )
        cls: Any = self.find(saved["class_name"])
        return cls.from_config(dict(saved.get("config") or {}))


@cache
def constructor_parameters(cls: type) -> tuple[str, ...]:
    """Names that `cls(...)` accepts: its own, then, as long as `**options` are handed up, those of its
    bases."""
    names: dict[str, None] = {}
    for base in cls.__mro__:
        init = vars(base).get("__init__")
        if init is None or base is object:
            continue
        parameters = list(inspect.signature(init).parameters.values())[1:]
        for p in parameters:
            if p.kind not in (p.VAR_KEYWORD, p.VAR_POSITIONAL):
                names.setdefault(p.name)
        if not any(p.kind is p.VAR_KEYWORD for p in parameters):
            break
    return tuple(names)


class Configurable:
    """An object that can be rebuilt from its constructor's parameters.

    The parameters must be kept in attributes of the same name; a class that can't do so overrides
    `get_config`.
    """

    def get_config(self) -> dict[str, Any]:
        """The constructor's arguments as JSON-able values. Raises ValueError when one was not kept."""
        config = {}
        for name in constructor_parameters(type(self)):
            if not hasattr(self, name):
                raise ValueError(
                    f"{type(self).__name__} takes {name!r} but keeps no attribute of that name: "
                    f"set self.{name}, or write get_config()"
                )
            config[name] = serialize(getattr(self, name))
        return config

    @classmethod
    def from_config(cls, config: Mapping[str, Any]) -> Self:
        """The inverse of `get_config`."""
        return cls(**config)

    def __repr__(self) -> str:
        arguments = ", ".join(f"{k}={v!r}" for k, v in self.get_config().items())
        return f"{type(self).__name__}({arguments})"


def serialize(value: Any) -> Any:
    """`value` as JSON can hold it. Raises ValueError for what could not be read back."""
    if value is None or isinstance(value, (bool, int, float, str)):
        return value
    if isinstance(value, np.generic):
        return value.item()
    if isinstance(value, np.dtype):
        return value.name
    if isinstance(value, np.ndarray):
        return value.tolist()
    if isinstance(value, (list, tuple)):
        return [serialize(v) for v in value]
    if isinstance(value, Mapping):
        return {str(k): serialize(v) for k, v in value.items()}
    if hasattr(value, "get_config") and not isinstance(value, type):
        return {"class_name": type(value).__name__, "config": value.get_config()}
    name = getattr(value, "__name__", None) or getattr(value, "name", None)  # a function; a cell
    if isinstance(name, str) and name.isidentifier():
        return name
    raise ValueError(f"{value!r} can't be saved: give it a name (a function, not a lambda) or a get_config()")
