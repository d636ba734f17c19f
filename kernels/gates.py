"""What a cell's gates are at each step: values that a fused kernel computes and forgets, from the cell's own equations.

A gate's value is what the equations make of its pre-activation before it meets anything else: `sigmoid(f)`, or with a
peephole `sigmoid(f + p c)`, or `tanh(n_x + r (n_h + b))`. It is found in the traced graph: along the values through which
all of the gate's influence goes (the post-dominators of its pre-activation: Lengauer and Tarjan 1979), up to the first
after the activation that brings something else in. Where the equations name a value (`named("f", ...)`), that is it.

Once every state is known, steps do not wait for each other: all of them are one step of a batch of T B rows.
"""

from __future__ import annotations

import weakref
from typing import Any

import numpy as np

from .derive import ACROSS, COMPARISONS, DEAR, PRODUCTS, Cell, Graph, Node, Symbol, TraceError, emit
from .reference import NAMES, forward
from .sequence import aux_columns

__all__ = ["gate_nodes", "gate_values"]

NONLINEAR = {*DEAR, *COMPARISONS, "maximum", "minimum", "where"}

# By graph: cells of the same equations are equal, but may name other values.
_FUNCTIONS: weakref.WeakKeyDictionary[Graph, tuple[tuple[str, ...], tuple[str, ...], Any]] = (
    weakref.WeakKeyDictionary()
)


def gate_values(
    cell: Cell,
    x: np.ndarray,
    kernel: Any,
    recurrent_kernel: Any,
    bias: np.ndarray | None,
    params: tuple[np.ndarray, ...],
    before: tuple[np.ndarray, ...],
    *,
    aux: tuple[np.ndarray, ...] = (),
    recurrent_mask: np.ndarray | None = None,
    projection: Any = None,
    precision: str = "float32",
) -> dict[str, np.ndarray]:
    """Every gate at every step, after its activation, and what else the equations name: (T, B, H) each, by name.

    Arguments as in sequence.py, but for `before`: each state as it was before each step, (T, B, units).

    >>> import numpy as np
    >>> from numlstm.kernels import cells
    >>> x, states = np.zeros((3, 1, 1)), (np.zeros((3, 1, 2)),) * 2
    >>> found = gate_values(cells.lstm(), x, np.ones((1, 8)), np.ones((2, 8)), None, (), states)
    >>> list(found), found["f"].shape, float(found["f"][0, 0, 0])
    (['i', 'f', 'g', 'o'], (3, 1, 2), 0.5)
    """
    T, B, I = x.shape
    rows = T * B

    def in_rows(a: np.ndarray, columns: int) -> np.ndarray:
        return np.broadcast_to(a, (T, B, columns)).reshape(1, rows, columns)

    P, H = before[0].shape[-1], kernel.shape[1] // len(cell.gates)
    out = forward(
        cell, x.reshape(1, rows, I), kernel, recurrent_kernel, bias, params,
        tuple(s.reshape(rows, -1) for s in before), None,
        training=True,
        aux=tuple(in_rows(a, aux_columns(cell, n, H, P)) for n, a in zip(cell.aux, aux, strict=True)),
        recurrent_mask=None if recurrent_mask is None else in_rows(recurrent_mask, P),
        projection=projection, precision=precision,
    )  # fmt: skip
    ((known, _),) = out.residual.steps
    names, arguments, function = _function(cell)
    with np.errstate(all="ignore"):
        values = function(*(known[a] for a in arguments))
    shape = (rows, H)
    return {
        name: np.array(np.broadcast_to(v, shape), x.dtype).reshape(T, B, H)
        for name, v in zip(names, values, strict=True)
    }


def _function(cell: Cell) -> tuple[tuple[str, ...], tuple[str, ...], Any]:
    """The names of what can be seen, the arguments that it is computed from, and the function, bound to NumPy."""
    if cell.graph not in _FUNCTIONS:
        nodes = gate_nodes(cell)
        given = {n: n.value for n in cell.graph.nodes if n.op == "leaf"} | cell.known
        arguments: dict[str, None] = {}

        def walk(n: Node) -> None:
            if n in given:
                arguments.setdefault(given[n])
            elif n.op in ACROSS:
                raise TraceError(f"cell {cell.name}: a named value needs {n.op}(), but no new state does")
            else:
                for a in n.args:
                    walk(a)

        for n in nodes.values():
            walk(n)
        scope = dict(NAMES)
        source = emit("gates", tuple(arguments), list(nodes.values()), given)
        exec(compile(source, f"<gates of {cell.name}>", "exec"), scope)
        _FUNCTIONS[cell.graph] = tuple(nodes), tuple(arguments), scope["gates"]
    return _FUNCTIONS[cell.graph]


def gate_nodes(cell: Cell) -> dict[str, Node]:
    """The node of each gate's value, in the order of `cell.gates`, then of what else the equations name."""
    found = {gate: cell.graph.names.get(gate) or _value(cell, gate) for gate in cell.gates}
    others = {name: n for name, n in cell.graph.names.items() if name not in found}
    if taken := [n for n in others if n in (*cell.state, *cell.params, *cell.aux)]:
        raise TraceError(f"cell {cell.name}: named({taken[0]!r}, ...) is the name of one of its arguments")
    return found | others


def _value(cell: Cell, gate: str) -> Node:
    """What the equations make of a gate's pre-activation before it meets anything else."""
    parts = [gate + "_x", gate + "_h"] if gate in cell.split else [gate]
    before = {n for n, name in cell.known.items() if name in parts and n.op in ("leaf", "preactivation")}
    users = _users(cell)
    at: Node | None = next(iter(before)) if len(before) == 1 else None
    activated = False
    for n in _through(cell, before, users):
        between = _between(before, n, users)
        others = {a for b in between for a in b.args} - between - before
        foreign = [a for a in others if a.op != "const"]
        mixing = any(b.op in ("mul", "div") for b in between) and any(
            a.op != "leaf" or a.value not in cell.params for a in foreign
        )
        nonlinear = any(b.op in NONLINEAR or _of_itself(b, between | before) for b in between)
        # The two parts of a gate have to come together first, whatever else that takes.
        if at is not None and foreign and (activated or nonlinear or mixing):
            break
        at, before, activated = n, {n}, activated or nonlinear
    if at is None:  # two parts that never become one value: the pre-activation as a whole
        x, h = (Symbol(cell.graph, n) for n in sorted(before, key=lambda n: n.id))
        return (x + h).node
    return at


def _of_itself(n: Node, known: set[Node]) -> bool:
    """A product of two values that both come from the gate, such as x sigmoid(x)."""
    return n.op in ("mul", "div") and all(a in known for a in n.args)


def _users(cell: Cell) -> dict[Node, list[Node]]:
    """Who uses a value as part of itself; of values normalised together each has its own place."""
    live = {n for n in cell.new}
    todo = list(live)
    while todo:
        fresh = [a for a in todo.pop().args if a not in live]
        live.update(fresh)
        todo += fresh
    users: dict[Node, list[Node]] = {n: [] for n in cell.graph.nodes}
    for n in cell.graph.nodes:
        if n in live:
            for a in (n.args[n.value],) if n.op == "normalize" else n.args:
                users[a].append(n)
    return users


def _through(cell: Cell, start: set[Node], users: dict[Node, list[Node]]) -> list[Node]:
    """The values through which all that `start` does to the new states goes, in order."""
    ways: dict[Node, set[Node]] = {}
    for n in reversed(cell.graph.nodes):
        out = [] if n in cell.new or any(u.op in PRODUCTS for u in users[n]) else users[n]
        common = set.intersection(*(ways[u] for u in out)) if out else set()
        ways[n] = common | {n}
    if not start:
        return []
    return sorted(set.intersection(*(ways[n] for n in start)) - start, key=lambda n: n.id)


def _between(start: set[Node], end: Node, users: dict[Node, list[Node]]) -> set[Node]:
    """The values on the ways from `start` to `end`, with `end`."""
    after, todo = set(), list(start)
    while todo:
        fresh = [u for u in users[todo.pop()] if u not in after and u.id <= end.id]
        after.update(fresh)
        todo += fresh
    reaching, todo = {end}, [end]
    while todo:
        fresh = [a for a in todo.pop().args if a in after and a not in reaching]
        reaching.update(fresh)
        todo += fresh
    return reaching
