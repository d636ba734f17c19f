"""What lies inside a layer: the layers and variables among its attributes, looked up once and compared ever after.

Attributes are looked through to the bottom of lists, tuples and dicts, in whatever way they were set. A training step needs
to know what it trains, and to look costs it more than to compare: every attribute must be the object that it was, every list
and dict hold the objects that it held. Whoever changes something need not say so, and nothing can be forgotten.
"""

import operator
from collections.abc import Iterator, Mapping, Sequence
from functools import cache
from typing import Any, Self

from numlstm.autograd import Variable

__all__ = ["Contents", "Holder"]

# Attributes in which no layers are looked for: they hold none, or would only cost time.
_BOOKKEEPING = frozenset(
    {"name", "trainable", "dtype", "input_shape", "built", "build_shape", "activity_regularizer"}
    | {"preprocessing", "_variables", "_place"}
)


class Contents:
    """The layers directly inside a layer and the variables of its own, and all that was looked at to find them.

    What is replaced lives on until somebody looks again, which the next training step does.

    >>> from numlstm.layers import Dense, Layer
    >>> layer = Layer()
    >>> layer.blocks = [Dense(3, name="a")]
    >>> contents = Contents()
    >>> contents.look(vars(layer), Layer)
    >>> contents.children, contents.hold(vars(layer))
    ([('blocks.0', <Dense 'a', not built>)], True)
    >>> layer.blocks.append(Dense(3))
    >>> contents.hold(vars(layer))
    False
    """

    __slots__ = ("_lists", "_names", "_others", "_values", "children", "variables")

    children: list[tuple[str, Any]]  # layers, by the names that they have in files
    variables: list[Variable]
    _names: list[str]  # of all attributes
    _values: list[Any]
    _lists: list[tuple[list[Any], list[Any]]]  # also those inside others; and what they held
    _others: list[tuple[Any, Sequence[Any]]]  # dicts and the like, and what tells whether they hold the same

    def __init__(self) -> None:
        self._names = []  # no layer has no attributes: it has to be looked at

    def hold(self, attributes: dict[str, Any]) -> bool:
        """Is everything that was looked at what it was?"""
        if list(attributes) != self._names or not all(map(operator.is_, attributes.values(), self._values)):
            return False
        for now, held in self._lists:
            if len(now) != len(held) or not all(map(operator.is_, now, held)):
                return False
        for container, known in self._others:
            telling = _telling(container)
            if len(telling) != len(known) or not all(map(operator.is_, telling, known)):
                return False
        return True

    def look(self, attributes: dict[str, Any], layer: type) -> None:
        """Look through the attributes for objects of the class `layer`, and for variables."""
        children: list[tuple[str, Any]] = []
        variables = {id(v): v for v in attributes["_variables"]}
        lists: list[tuple[list[Any], list[Any]]] = []
        others: list[tuple[Any, Sequence[Any]]] = []
        _note(attributes["_variables"], lists, others)
        for name, value in attributes.items():
            if name in _BOOKKEEPING:
                continue
            if isinstance(value, layer):
                children.append((name.lstrip("_"), value))
            elif isinstance(value, Variable):
                variables[id(value)] = value
            elif _holds_others(type(value)):
                children += _found(name.lstrip("_"), value, layer)
                variables.update({id(v): v for _, v in _found(name, value, Variable)})
                _note(value, lists, others)
        # What was found comes before what it is compared by: another thread must not take the old for the new.
        self.children, self.variables = children, list(variables.values())
        self._lists, self._others = lists, others
        self._values, self._names = list(attributes.values()), list(attributes)


class Holder:
    """Base of `Layer`: what is kept beside a layer's attributes, not among them. The contents, which hold all attributes
    and would hold themselves; and what every call sets, which says nothing of what lies inside."""

    __slots__ = ("_found_inside", "_losses", "_root")

    _found_inside: Contents
    _losses: list[Any]  # what the latest call added
    _root: object  # stands for that call

    def __new__(cls, *args: Any, **kwargs: Any) -> Self:  # not in __init__: copies and pickles come here too
        holder = super().__new__(cls)
        holder._found_inside, holder._losses, holder._root = Contents(), [], None
        return holder

    def __getstate__(self) -> tuple[dict[str, Any], dict[str, Any]]:
        """For copies, which look for themselves what lies inside them."""
        return self.__dict__, {"_losses": self._losses, "_root": self._root}


@cache
def _holds_others(cls: type) -> bool:
    """May objects of this class hold layers or weights? (Asking an abstract base class takes its time.)"""
    return issubclass(cls, (Mapping, list, tuple))


def _looked_into(container: Any) -> bool:
    """A list that opens with a number or string holds no layers: nobody looks at the rest of it."""
    if isinstance(container, (list, tuple)):
        return bool(container) and not isinstance(container[0], (str, bytes, int, float))
    return True


def _telling(container: Any) -> Sequence[Any]:
    """The objects in a dict or list that say whether it holds the layers and weights that it held: of a list of which
    no more is looked at, the first."""
    if isinstance(container, Mapping):
        return [*container, *container.values()]
    return list(container if _looked_into(container) else container[:1])


def _note(
    container: Any, lists: list[tuple[list[Any], list[Any]]], others: list[tuple[Any, Sequence[Any]]]
) -> None:
    """Write down what a list or dict, and all those in it, hold now; a tuple itself can't change."""
    if type(container) is list and (not container or _looked_into(container)):
        lists.append((container, container.copy()))
    elif not isinstance(container, tuple):
        others.append((container, _telling(container)))
    if _looked_into(container):
        for item in container.values() if isinstance(container, Mapping) else container:
            if _holds_others(type(item)):
                _note(item, lists, others)


def _found(name: str, value: Any, kind: type) -> Iterator[tuple[str, Any]]:
    """Objects of `kind` in an attribute: itself, or inside lists, tuples and dicts."""
    if isinstance(value, kind):
        yield name, value
    elif isinstance(value, Mapping):
        for key, item in value.items():
            yield from _found(f"{name}.{key}", item, kind)
    elif isinstance(value, (list, tuple)) and _looked_into(value):
        for k, item in enumerate(value):
            yield from _found(f"{name}.{k}", item, kind)
