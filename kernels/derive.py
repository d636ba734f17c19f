"""From a cell's scalar equations to its backward pass: trace once, differentiate, choose what to save, emit source.

A cell is a plain Python function of scalars: the gates' pre-activations, the old states, per-unit parameters. It is
called once with symbols; the graph that results is differentiated in reverse mode (Griewank and Walther, Evaluating
Derivatives, chapter 3), and a minimum cut between what only the forward pass knows and what the backward pass asks for
decides which values are saved, so that no exponential is computed twice. Both passes leave here as text: straight-line
scalar Python whose names (`exp`, `where`, `K` for a constant) each backend binds to its own functions.
"""

from __future__ import annotations

import hashlib
import inspect
import math
import re
import types
from collections.abc import Callable, Sequence
from typing import Any

__all__ = ["ACTIVATIONS", "LANGUAGE", "Cell", "Symbol", "TraceError", "cell"]


class TraceError(ValueError):
    """A cell function that can't be traced; the message says what to write instead."""


# What one call of each operation gives on numbers: folding of constants, and the meaning of the language.
FOLD: dict[str, Callable[..., Any]] = {
    "add": lambda a, b: a + b,
    "sub": lambda a, b: a - b,
    "mul": lambda a, b: a * b,
    "div": lambda a, b: a / b,
    "neg": lambda a: -a,
    "exp": math.exp,
    "log": math.log,
    "sqrt": math.sqrt,
    "tanh": math.tanh,
    "sigmoid": lambda a: 0.5 * (1 + math.tanh(0.5 * a)),
    "softplus": lambda a: max(a, 0.0) + math.log1p(math.exp(-abs(a))),
    "maximum": max,
    "minimum": min,
    "lt": lambda a, b: float(a < b),
    "le": lambda a, b: float(a <= b),
    "where": lambda c, a, b: a if c else b,
}
SIGN = {"add": "+", "sub": "-", "mul": "*", "div": "/", "lt": "<", "le": "<="}
COMPARISONS = {"lt", "le"}
ARITY = {"neg": 1, "where": 3} | dict.fromkeys(
    ("add", "sub", "mul", "div", "maximum", "minimum", "lt", "le"), 2
)
DEAR = {"exp", "log", "sqrt", "tanh", "sigmoid", "softplus"}  # never computed twice

# Prices of the minimum cut, in units of one saved value (a store now, a load later).
PRICE_DIVISION, PRICE_ARITHMETIC, PRICE_STORED_ANYWAY = 0.2, 0.05, 0.001


class Node:
    """One value of the traced cell. Equal expressions are one object: `Graph.node` interns them."""

    __slots__ = ("args", "id", "op", "value")

    def __init__(self, id: int, op: str, args: tuple[Node, ...], value: Any) -> None:
        self.id, self.op, self.args, self.value = id, op, args, value


class Graph:
    """The nodes of one cell, in the order they were made, which is a topological order."""

    def __init__(self) -> None:
        self.nodes: list[Node] = []
        self._interned: dict[tuple, Node] = {}

    def node(self, op: str, args: tuple[Node, ...] = (), value: Any = None) -> Node:
        key = (op, tuple(a.id for a in args), value)
        if key not in self._interned:
            self._interned[key] = Node(len(self.nodes), op, args, value)
            self.nodes.append(self._interned[key])
        return self._interned[key]

    def constant(self, value: float) -> Node:
        return self.node("const", (), float(value))

    def make(self, op: str, *args: Node) -> Node:
        """The node for `op(*args)`, simplified where that keeps every value (NaN and infinity included)."""
        known = [a.value if a.op == "const" else None for a in args]
        if op in FOLD and None not in known:
            return self.constant(FOLD[op](*known))
        a, b = args[0], args[-1]
        if op == "neg":
            if a.op == "neg":
                return a.args[0]
            if a.op == "sub":
                return self.make("sub", a.args[1], a.args[0])
        elif op == "add":
            if known[0] == 0:
                return b
            if known[1] == 0:
                return a
            if b.op == "neg":
                return self.make("sub", a, b.args[0])
            if a.op == "neg":
                return self.make("sub", b, a.args[0])
        elif op == "sub":
            if known[1] == 0:
                return a
            if known[0] == 0:
                return self.make("neg", b)
            if b.op == "neg":
                return self.make("add", a, b.args[0])
        elif op in ("mul", "div"):
            if known[1] == 1:
                return a
            if known[1] == -1:
                return self.make("neg", a)
            if op == "mul" and known[0] == 1:
                return b
            if op == "mul" and known[0] == -1:
                return self.make("neg", b)
            if a.op == "neg":
                return self.make("neg", self.make(op, a.args[0], b))
            if b.op == "neg":
                return self.make("neg", self.make(op, a, b.args[0]))
        elif op == "where" and args[1] is args[2]:
            return args[1]
        if op in ("add", "mul") and a.id > b.id:
            args = (b, a)  # a*b and b*a are one value
        return self.node(op, args)


# NumPy's names for what is called otherwise here; a NumPy scalar on an operator's left side comes in by them.
UFUNCS = {"multiply": "mul", "subtract": "sub", "divide": "div", "negative": "neg"}
UFUNCS |= {"less": "lt", "greater": "lt", "less_equal": "le", "greater_equal": "le"}


class Symbol:
    """A traced scalar: what a cell function is called with. Arithmetic on it builds the graph.

    It has no value, so whatever would need one (`if`, `==`, `float()`, `math.tanh`) raises `TraceError`.
    """

    __slots__ = ("graph", "node")
    __array_priority__ = 1000

    def __init__(self, graph: Graph, node: Node) -> None:
        self.graph, self.node = graph, node

    def _apply(self, op: str, *args: Any) -> Symbol:
        if len(args) != ARITY.get(op, 1):
            raise TraceError(f"{op} takes {ARITY.get(op, 1)} values, but {len(args)} came")
        nodes = [self._node_of(op, a) for a in args]
        if op == "where" and nodes[0].op not in COMPARISONS:
            raise TraceError("where(condition, a, b): the condition must be a comparison by <, <=, > or >=")
        if any(n.op in COMPARISONS for n in nodes[op == "where" :]):
            raise TraceError(
                f"{op}: a comparison has no number; it can only be the condition of where(condition, a, b)"
            )
        return Symbol(self.graph, self.graph.make(op, *nodes))

    def _node_of(self, op: str, a: Any) -> Node:
        if isinstance(a, Symbol):
            if a.graph is not self.graph:
                raise TraceError(f"{op}: this value belongs to another cell's equations")
            return a.node
        if isinstance(a, bool) or not hasattr(a, "__float__") or getattr(a, "ndim", 0):
            raise TraceError(f"{op}: a cell is made of scalars, but a {type(a).__name__} came")
        return self.graph.constant(float(a))

    def __add__(self, b: Any) -> Symbol:
        return self._apply("add", self, b)

    def __radd__(self, b: Any) -> Symbol:
        return self._apply("add", b, self)

    def __sub__(self, b: Any) -> Symbol:
        return self._apply("sub", self, b)

    def __rsub__(self, b: Any) -> Symbol:
        return self._apply("sub", b, self)

    def __mul__(self, b: Any) -> Symbol:
        return self._apply("mul", self, b)

    def __rmul__(self, b: Any) -> Symbol:
        return self._apply("mul", b, self)

    def __truediv__(self, b: Any) -> Symbol:
        return self._apply("div", self, b)

    def __rtruediv__(self, b: Any) -> Symbol:
        return self._apply("div", b, self)

    def __neg__(self) -> Symbol:
        return self._apply("neg", self)

    def __pos__(self) -> Symbol:
        return self

    def __abs__(self) -> Symbol:
        return self._apply("maximum", self, -self)

    def __pow__(self, n: Any) -> Symbol:
        if isinstance(n, bool) or not isinstance(n, int) or n < 1:
            raise TraceError(f"only whole powers of 1 and above can be traced, not **{n!r}")
        return self if n == 1 else self * self ** (n - 1)

    def __lt__(self, b: Any) -> Symbol:
        return self._apply("lt", self, b)

    def __gt__(self, b: Any) -> Symbol:
        return self._apply("lt", b, self)

    def __le__(self, b: Any) -> Symbol:
        return self._apply("le", self, b)

    def __ge__(self, b: Any) -> Symbol:
        return self._apply("le", b, self)

    def __eq__(self, b: object) -> Any:
        raise TraceError(
            "== on a traced value: a cell can compare by <, <=, > and >= inside where(), never by equality"
        )

    __ne__ = __eq__
    __hash__ = None  # type: ignore[assignment]

    def __bool__(self) -> bool:
        raise TraceError(
            "a cell is traced once, so `if`, `and`, `or`, min() and max() can't look at its values: "
            "write where(condition, a, b), minimum(a, b) or maximum(a, b)"
        )

    def _number(self) -> Any:
        raise TraceError(
            "this call wants a number, but a cell is traced with symbols: use the functions of the cell language "
            f"({', '.join(sorted(LANGUAGE))})"
        )

    __float__ = __int__ = __index__ = __complex__ = _number

    def __array_ufunc__(self, ufunc: Any, method: str, *args: Any, **kwargs: Any) -> Symbol:  # np.tanh(x)
        name = UFUNCS.get(ufunc.__name__, ufunc.__name__)
        if method != "__call__" or kwargs or name not in FOLD:
            raise TraceError(f"numpy.{ufunc.__name__} can't be traced: use {', '.join(sorted(LANGUAGE))}")
        return self._apply(name, *(reversed(args) if "greater" in ufunc.__name__ else args))


def _primitive(name: str) -> Callable[..., Any]:
    def function(*args: Any) -> Any:
        symbol = next((a for a in args if isinstance(a, Symbol)), None)
        return FOLD[name](*args) if symbol is None else symbol._apply(name, *args)

    function.__name__ = function.__qualname__ = name
    return function


exp, log, sqrt, tanh, sigmoid, softplus, maximum, minimum, where = (
    _primitive(n)
    for n in ("exp", "log", "sqrt", "tanh", "sigmoid", "softplus", "maximum", "minimum", "where")
)


def relu(x: Any) -> Any:
    return maximum(x, 0.0)


def clip(x: Any, low: float, high: float) -> Any:
    return minimum(maximum(x, low), high)


def _elu(x: Any, alpha: float = 1.0) -> Any:
    return where(
        x > 0, x, alpha * (exp(where(x > 0, 0.0, x)) - 1)
    )  # the inner choice keeps exp finite where it is not used


# The element-wise activations, by their Keras 3 names and definitions. Each is made of the primitives above.
ACTIVATIONS: dict[str, Callable[[Any], Any]] = {
    "linear": lambda x: x,
    "tanh": tanh,
    "sigmoid": sigmoid,
    "relu": relu,
    "relu6": lambda x: clip(x, 0.0, 6.0),
    "leaky_relu": lambda x: maximum(x, 0.2 * x),
    "hard_sigmoid": lambda x: clip(x / 6 + 0.5, 0.0, 1.0),
    "hard_tanh": lambda x: clip(x, -1.0, 1.0),
    "softplus": softplus,
    "softsign": lambda x: x / (1 + abs(x)),
    "elu": _elu,
    "selu": lambda x: 1.0507009873554805 * _elu(x, 1.6732632423543772),
    "exponential": exp,
    "silu": lambda x: x * sigmoid(x),
    "mish": lambda x: x * tanh(softplus(x)),
    "log_sigmoid": lambda x: -softplus(-x),
}
ACTIVATIONS["swish"] = ACTIVATIONS["silu"]

LANGUAGE: dict[str, Callable[..., Any]] = {
    "exp": exp,
    "log": log,
    "sqrt": sqrt,
    "tanh": tanh,
    "sigmoid": sigmoid,
    "softplus": softplus,
    "maximum": maximum,
    "minimum": minimum,
    "where": where,
    "clip": clip,
    "relu": relu,
    "hard_sigmoid": ACTIVATIONS["hard_sigmoid"],
}


def _partials(n: Symbol, args: list[Symbol], d: Symbol) -> tuple[Symbol | None, ...]:
    """What a gradient `d` of the value `n` sends to each of its arguments, written on n itself where that saves work."""
    a, b = (*args, None, None)[:2]
    match n.node.op:
        case "add":
            return d, d
        case "sub":
            return d, -d
        case "neg":
            return (-d,)
        case "mul":
            return d * b, d * a
        case "div":
            return d / b, -(d / b * n)
        case "exp":
            return (d * n,)
        case "log":
            return (d / a,)
        case "sqrt":
            return (d * 0.5 / n,)
        case "tanh":
            return (d * (1 - n * n),)
        case "sigmoid":
            return (d * (n * (1 - n)),)
        case "softplus":
            return (d * sigmoid(a),)
        case "maximum":  # a tie sends everything to the second: relu'(0) = 0, as everywhere
            return where(b < a, d, 0.0), where(b < a, 0.0, d)
        case "minimum":
            return where(a < b, d, 0.0), where(a < b, 0.0, d)
        case "where":
            return None, where(a, d, 0.0), where(a, 0.0, d)
    raise TraceError(f"no derivative for {n.node.op}")


class Cell:
    """A traced cell: names, emitted forward and backward source, and what the backward pass needs saved.

    Arguments of `function` are matched by name: the gates, the old states (those it uses), and per-unit parameters
    (the rest). A gate in `split` reaches it in two parts, `name_x` from the input and `name_h` from the recurrence.

    Attributes:
        gates: names in the order of the weights' columns.
        state: names of the states; the first is the output.
        params: names of the per-unit parameters (peepholes, a recurrent bias).
        aux: names of what is handed in at every step and not differentiated, such as a zoneout mask.
        pre: the pre-activations as the function sees them, ordered so that those fed by the input (`x_gates`) are its
            first and those fed by the recurrence (`h_gates`) its last ones.
        saved: how many values the forward pass saves for the backward pass beside the states.
        forward_source, backward_source: the two passes, as text.
        forward_args, backward_args: their arguments. `forward` returns the new states, then the saved values;
            `backward` returns the gradients of `pre`, of the old states, of the params. Names: `x` a value, `x1` a new
            state, `d_x` the gradient of a new state, `y0, y1, ...` the saved values.
        digest: a hash of all that a kernel made from this cell depends on.
    """

    def __init__(
        self,
        function: Callable[..., Any],
        gates: Sequence[str],
        state: Sequence[str] = ("h",),
        split: Sequence[str] = (),
        *,
        aux: Sequence[str] = (),
        name: str | None = None,
    ) -> None:
        self.aux = tuple(aux)
        self.name = name or getattr(function, "__name__", type(function).__name__)
        self.gates, self.state, self.split = tuple(gates), tuple(state), tuple(split)
        arguments = self._arguments(function)
        only_x = [g + "_x" for g in self.gates if g in self.split]
        only_h = [g + "_h" for g in self.gates if g in self.split]
        self.pre = (*only_x, *(g for g in self.gates if g not in self.split), *only_h)
        self.x_gates, self.h_gates = self.pre[: len(self.gates)], self.pre[len(only_x) :]
        self.params = tuple(n for n in arguments if n not in (*self.pre, *self.state, *self.aux))
        if missing := [a for a in self.aux if a not in arguments]:
            raise TraceError(
                f"cell {self.name}: its function has no argument for {missing}; it has {arguments}"
            )
        self.function = function
        if missing := [p for p in self.pre if p not in arguments]:
            raise TraceError(
                f"cell {self.name}: its function has no argument for the gates {missing}; it has {arguments}"
            )
        self._trace(function, arguments)
        text = "|".join(
            map(
                repr,
                (self.gates, self.state, self.pre, self.params, self.aux, self.backward_args, self.saved),
            )
        )
        self.digest = hashlib.sha256((text + self.forward_source + self.backward_source).encode()).hexdigest()

    # Cells with the same equations are one: kernels made for the first serve them all.
    def __eq__(self, other: object) -> bool:
        return isinstance(other, Cell) and self.digest == other.digest

    def __hash__(self) -> int:
        return hash(self.digest)

    def __repr__(self) -> str:
        return f"Cell({self.name}, gates={self.gates}, state={self.state}, params={self.params}, saved={self.saved})"

    def _arguments(self, function: Callable[..., Any]) -> list[str]:
        kinds = inspect.Parameter
        if not isinstance(function, types.FunctionType):
            raise TraceError(
                f"cell {self.name}: expected a plain Python function, got a {type(function).__name__}"
            )
        for p in inspect.signature(function).parameters.values():
            if p.kind in (kinds.VAR_POSITIONAL, kinds.VAR_KEYWORD):
                raise TraceError(
                    f"cell {self.name}: its arguments are matched by name, so *{p.name} can't be used"
                )
            if p.kind is kinds.KEYWORD_ONLY or p.default is not kinds.empty:
                raise TraceError(
                    f"cell {self.name}: {p.name} has a default or is keyword-only, but every argument is a gate, "
                    "a state or a trained per-unit parameter; write a constant into the equations"
                )
        reserved = [
            n for n in inspect.signature(function).parameters if n in LANGUAGE or self._emitted_name(n)
        ]
        if reserved:
            raise TraceError(
                f"cell {self.name}: the argument names {reserved} are used by the emitted code: rename them"
            )
        declared = [*self.gates, *self.state, *self.aux]
        if not self.gates or not self.state:
            raise TraceError(f"cell {self.name}: a cell has at least one gate and one state, got {declared}")
        if twice := sorted({n for n in declared if declared.count(n) > 1}):
            raise TraceError(
                f"cell {self.name}: the names {twice} are given twice among gates, states and aux"
            )
        unknown = [g for g in self.split if g not in self.gates]
        if unknown:
            raise TraceError(f"cell {self.name}: split names {unknown}, but the gates are {self.gates}")
        return list(inspect.signature(function).parameters)

    def _emitted_name(self, name: str) -> bool:
        """Whether emitted code may use `name` for something of its own: v0, y0, d_h, a new state's h1, K."""
        return (
            name == "K" or bool(re.fullmatch(r"[vy]\d+|d_.*", name)) or name in {s + "1" for s in self.state}
        )

    def _trace(self, function: Callable[..., Any], arguments: list[str]) -> None:
        graph = Graph()
        leaves = {n: Symbol(graph, graph.node("leaf", (), n)) for n in arguments}
        try:
            out = in_language(function)(*leaves.values())
        except TraceError as error:
            raise TraceError(f"cell {self.name}: {error}") from None
        except Exception as error:  # x % 2, a jitted function, a misspelt name
            known = ", ".join(sorted(LANGUAGE))
            reason = (
                f"{type(error).__name__}: {str(error).strip().splitlines()[0] if str(error).strip() else ''}"
            )
            raise TraceError(
                f"cell {self.name}: {reason} (+ - * / <, whole powers and {known} can be traced)"
            ) from error
        out = out if isinstance(out, tuple) else (out,)
        if len(out) != len(self.state):
            raise TraceError(
                f"cell {self.name} returns {len(out)} values for its {len(self.state)} states {self.state}"
            )
        any_leaf = next(iter(leaves.values()))
        new = [Symbol(graph, any_leaf._node_of(f"cell {self.name} returns", o)) for o in out]
        if any(n.node.op in COMPARISONS for n in new):
            raise TraceError(f"cell {self.name} returns a comparison; write where(condition, 1, 0)")
        forward_nodes = list(graph.nodes)
        seeds = [Symbol(graph, graph.node("leaf", (), f"d_{s}")) for s in self.state]
        gradients = self._differentiate(graph, forward_nodes, new, seeds)
        zero = Symbol(graph, graph.constant(0.0))
        wanted = [
            gradients.get(leaves[n].node, zero) if n in leaves else zero
            for n in (*self.pre, *self.state, *self.params)
        ]
        self._emit_passes(
            graph, leaves, [n.node for n in new], [s.node for s in seeds], [w.node for w in wanted]
        )

    @staticmethod
    def _differentiate(
        graph: Graph, forward_nodes: list[Node], new: list[Symbol], seeds: list[Symbol]
    ) -> dict[Node, Symbol]:
        gradients: dict[Node, Symbol] = {}

        def give(node: Node, d: Symbol | None) -> None:
            if d is not None and node.op != "const" and node.op not in COMPARISONS:
                gradients[node] = gradients[node] + d if node in gradients else d

        for value, seed in zip(new, seeds, strict=True):
            give(value.node, seed)
        for node in reversed(forward_nodes):
            if node in gradients and node.args:
                partials = _partials(
                    Symbol(graph, node), [Symbol(graph, a) for a in node.args], gradients[node]
                )
                for a, d in zip(node.args, partials, strict=True):
                    give(a, d)
        return gradients

    def _emit_passes(
        self, graph: Graph, leaves: dict[str, Symbol], new: list[Node], seeds: list[Node], wanted: list[Node]
    ) -> None:
        state_leaves = {s: leaves[s].node for s in self.state if s in leaves}
        stored_anyway = [*state_leaves.values(), *(leaves[p].node for p in (*self.params, *self.aux)), *new]
        kept = choose_saved(graph, seeds, wanted, stored_anyway)
        saved = [n for n in kept if n not in stored_anyway]
        self.saved = len(saved)
        names = [f"y{k}" for k in range(len(saved))]
        given = {n: y for n, y in zip(saved, names, strict=True)}
        given.update(
            {n: s + "1" for n, s in zip(new, self.state, strict=True) if n in kept and n not in given}
        )
        given.update({n: n.value for n in kept if n.op == "leaf" and n not in given})
        given.update({s: s.value for s in seeds})
        self.forward_args = tuple(leaves)
        self.backward_args = (*names, *(t for n, t in given.items() if n not in saved))
        # A comparison is saved as 0 or 1.
        stored = [
            graph.make("where", n, graph.constant(1), graph.constant(0)) if n.op in COMPARISONS else n
            for n in saved
        ]
        given.update({n: f"({y} > K(0.5))" for n, y in zip(saved, names, strict=True) if n.op in COMPARISONS})
        self.forward_source = emit(
            "forward", self.forward_args, [*new, *stored], {s.node: n for n, s in leaves.items()}
        )
        self.backward_source = emit("backward", self.backward_args, wanted, given)


def in_language(function: types.FunctionType) -> Callable[..., Any]:
    """`function` with the cell language as its builtins: one that imports nothing may still write tanh(x)."""
    scope = {**LANGUAGE, **function.__globals__}
    return types.FunctionType(function.__code__, scope, function.__name__, None, function.__closure__)


def choose_saved(
    graph: Graph, seeds: list[Node], wanted: list[Node], stored_anyway: list[Node]
) -> list[Node]:
    """Save or recompute, as a minimum cut between what the forward pass has and what the backward pass needs.

    Every forward value is a pair of vertices: the edge into it costs its recomputation (infinite for an exponential), the
    edge through it costs saving it (next to nothing for states and parameters, which the sequence stores anyway).
    """
    late, live = set(seeds), set()  # late: depends on an upstream gradient
    for n in graph.nodes:
        if any(a in late for a in n.args):
            late.add(n)

    def walk(n: Node) -> None:
        if n not in live:
            live.add(n)
            for a in n.args:
                walk(a)

    for w in wanted:
        walk(w)
    needed = {a for n in live & late for a in n.args if a not in late} | {w for w in wanted if w not in late}
    edges: list[tuple[Any, Any, float]] = []
    for n in graph.nodes:
        if n in late:
            continue
        if n.op == "leaf":
            make = math.inf
        elif n.op == "const":
            make = 0.0
        else:
            make = math.inf if n.op in DEAR else PRICE_DIVISION if n.op == "div" else PRICE_ARITHMETIC
        edges.append(("source", ("in", n), make))
        edges.append((("in", n), ("out", n), PRICE_STORED_ANYWAY if n in stored_anyway else 1.0))
        edges += [(("out", a), ("in", n), math.inf) for a in n.args]
        if n in needed:
            edges.append((("out", n), "sink", math.inf))
    side = minimum_cut(edges, "source", "sink")
    return [
        n
        for n in graph.nodes
        if n not in late and n.op != "const" and ("in", n) in side and ("out", n) not in side
    ]


def minimum_cut(edges: list[tuple[Any, Any, float]], source: Any, sink: Any) -> set[Any]:
    """The source's side of a minimum cut, by shortest augmenting paths: Edmonds and Karp 1972."""
    capacity: dict[Any, dict[Any, float]] = {source: {}, sink: {}}
    for u, v, c in edges:
        capacity.setdefault(u, {})
        capacity.setdefault(v, {})
        capacity[u][v] = capacity[u].get(v, 0.0) + min(c, 1e6)
        capacity[v].setdefault(u, 0.0)
    while True:
        came: dict[Any, Any] = {source: None}
        queue = [source]
        for u in queue:
            for v, c in capacity[u].items():
                if c > 1e-9 and v not in came:
                    came[v] = u
                    queue.append(v)
        if sink not in came:
            return set(came)
        path, v = [], sink
        while came[v] is not None:
            path.append((came[v], v))
            v = came[v]
        flow = min(capacity[u][v] for u, v in path)
        for u, v in path:
            capacity[u][v] -= flow
            capacity[v][u] += flow


def emit(name: str, arguments: Sequence[str], outputs: list[Node], given: dict[Node, str]) -> str:
    """Straight-line Python for the values `outputs`: shared values get a name, values used once are written in place."""
    uses: dict[Node, int] = {}
    order: list[Node] = []

    def count(n: Node) -> None:
        uses[n] = uses.get(n, 0) + 1
        if uses[n] == 1 and n not in given:
            for a in n.args:
                count(a)
            order.append(n)

    for o in outputs:
        count(o)
    text, lines = dict(given), []
    for n in order:
        if n.op == "const":
            text[n] = f"K({_literal(n.value)})"
            continue
        a = [text[x] for x in n.args]
        if n.op in SIGN:
            expression = f"({a[0]} {SIGN[n.op]} {a[1]})"
        elif n.op == "neg":
            expression = f"(-{a[0]})"
        else:
            expression = f"{n.op}({', '.join(map(_bare, a))})"
        if uses[n] > 1 or n.op in DEAR:
            text[n] = f"v{len(lines)}"
            lines.append(f"    {text[n]} = {_bare(expression)}")
        else:
            text[n] = expression
    result = ", ".join(_bare(text[o]) for o in outputs) + ("," if len(outputs) == 1 else "")
    return "\n".join([f"def {name}({', '.join(arguments)}):", *lines, f"    return {result}"]) + "\n"


def _literal(x: float) -> str:
    """A number's text; Python has no literal for those beyond the largest, but reads 1e999 as infinity."""
    return (
        repr(x) if math.isfinite(x) else "1e999 - 1e999" if math.isnan(x) else "1e999" if x > 0 else "-1e999"
    )


def _bare(s: str) -> str:
    """`(a + b)` without its outer parentheses, where they enclose the whole."""
    if not (s.startswith("(") and s.endswith(")")):
        return s
    depth = 0
    for k, ch in enumerate(s):
        depth += (ch == "(") - (ch == ")")
        if depth == 0 and k < len(s) - 1:
            return s
    return s[1:-1]


def cell(
    gates: int | Sequence[str], state: Sequence[str] = ("h",), split: Sequence[str] = ()
) -> Callable[[Callable[..., Any]], Cell]:
    """Turn a function of scalars into a `Cell`: traced, differentiated, ready for every backend.

    Args:
        gates: names of the gates in the order of the weights' columns (a string of one-letter names will do), or how many
            of the function's leading arguments are gates.
        state: names of the states; the first one returned is the output.
        split: gates that the function takes in two parts, `n_x` from the input and `n_h` from the recurrence.

    Raises:
        TraceError: the function branches on values, calls something outside the cell language, or returns the wrong count.

    >>> @cell(gates="ifgo", state=("h", "c"))
    ... def lstm(i, f, g, o, c):
    ...     c = sigmoid(f) * c + sigmoid(i) * tanh(g)
    ...     return sigmoid(o) * tanh(c), c
    >>> lstm.params, lstm.saved
    ((), 5)
    """

    def decorate(function: Callable[..., Any]) -> Cell:
        names = gates
        if isinstance(gates, int):
            arguments = tuple(inspect.signature(function).parameters)
            if isinstance(gates, bool) or not 1 <= gates <= len(arguments):
                raise TraceError(f"gates={gates!r}, but the function's arguments are {arguments}")
            names = arguments[:gates]
        return Cell(function, names, state, split)  # type: ignore[arg-type]

    return decorate
