"""From a cell's scalar equations to its backward pass: trace once, differentiate, choose what to save, emit source.

A cell is a plain Python function of scalars: the gates' pre-activations, the old states, per-unit parameters. It is
called once with symbols; the graph that results is differentiated in reverse mode (Griewank and Walther, Evaluating
Derivatives, chapter 3), and a minimum cut between what only the forward pass knows and what the backward pass asks for
decides which values are saved, so that no exponential is computed twice. Both passes leave here as text: straight-line
scalar Python whose names (`exp`, `where`, `K` for a constant) each backend binds to its own functions.

Most cells are one stage: nothing but scalars stands between a step's products and its new states. Three primitives look
across the units of a row and end a stage: `preactivation` (a second product), `project` (a product to another width) and
`normalize`. The graph is cut there; each stage is differentiated by itself, and what passes from one to the next is a
vector in memory.
"""

from __future__ import annotations

import hashlib
import inspect
import math
import re
import types
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

__all__ = ["ACTIVATIONS", "LANGUAGE", "NORM_EPSILON", "Cell", "Norm", "Stage", "Symbol", "TraceError", "cell"]


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
PRODUCTS = {"preactivation", "project"}
ACROSS = {*PRODUCTS, "normalize"}  # these look at other units of the row, and so end a stage
NORM_EPSILON = 1e-3  # added to the variance, as Keras' LayerNormalization does
DEAR = {"exp", "log", "sqrt", "tanh", "sigmoid", "softplus"}  # never computed twice

# Prices of the minimum cut, in units of one saved value (a store now, a load later).
PRICE_DIVISION, PRICE_ARITHMETIC, PRICE_STORED_ANYWAY = 0.2, 0.05, 0.001


class Node:
    """One value of the traced cell. Equal expressions are one object: `Graph.node` interns them."""

    __slots__ = ("args", "id", "op", "value")

    args: tuple[Node, ...]
    id: int
    op: str
    value: Any

    def __init__(self, id: int, op: str, args: tuple[Node, ...], value: Any) -> None:
        self.id, self.op, self.args, self.value = id, op, args, value


class Graph:
    """The nodes of one cell, in the order they were made, which is a topological order."""

    def __init__(self) -> None:
        self.nodes: list[Node] = []
        self.names: dict[str, Node] = {}  # given by `named`
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

    graph: Graph
    node: Node

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

    if TYPE_CHECKING:

        def __ne__(self, other: object) -> Any: ...

        def __hash__(self) -> int: ...

    else:
        __ne__ = __eq__
        __hash__ = None

    def __bool__(self) -> bool:
        raise TraceError(
            "a cell is traced once, so `if`, `and`, `or`, min() and max() can't look at its values: "
            "write where(condition, a, b), minimum(a, b) or maximum(a, b)"
        )

    def __float__(self) -> Any:
        raise TraceError(
            "this call wants a number, but a cell is traced with symbols: use the functions of the cell language "
            f"({', '.join(sorted(LANGUAGE))})"
        )

    __int__: Callable[[Symbol], Any] = __float__
    __index__: Callable[[Symbol], Any] = __float__
    __complex__: Callable[[Symbol], Any] = __float__

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


exp: Callable[..., Any] = _primitive("exp")
log: Callable[..., Any] = _primitive("log")
sqrt: Callable[..., Any] = _primitive("sqrt")
tanh: Callable[..., Any] = _primitive("tanh")
sigmoid: Callable[..., Any] = _primitive("sigmoid")
softplus: Callable[..., Any] = _primitive("softplus")
maximum: Callable[..., Any] = _primitive("maximum")
minimum: Callable[..., Any] = _primitive("minimum")
where: Callable[..., Any] = _primitive("where")


def _across(op: str, values: Sequence[Any], value: Any = None) -> Symbol:
    """A node of one of the primitives that look across units."""
    for v in values:
        if not isinstance(v, Symbol):
            raise TraceError(f"{op}: expected traced values, which differ from unit to unit, got {v!r}")
        if v.node.op in COMPARISONS:
            raise TraceError(f"{op}: a comparison has no number; write where(condition, 1, 0)")
    graph = values[0].graph
    return Symbol(graph, graph.node(op, tuple(v._node_of(op, v) for v in values), value))


def preactivation(gate: str, v: Any) -> Symbol:
    """The pre-activation of `gate` with v in the place of h: W x + R v + b; of a gate in `split`, its part R v."""
    if not isinstance(gate, str):
        raise TraceError(f"preactivation(gate, v): expected a gate's name, got {gate!r}")
    return _across("preactivation", [v], gate)


def project(v: Any) -> Symbol:
    """v multiplied by the projection matrix: what a cell with fewer outputs than units returns as its first state."""
    return _across("project", [v])


def normalize(*values: Any) -> Any:
    """The values shifted and scaled to mean 0 and variance 1 over all of them and all units of a row, jointly."""
    if not values:
        raise TraceError("normalize takes at least one value")
    out = tuple(_across("normalize", values, k) for k in range(len(values)))
    return out if len(out) > 1 else out[0]


def named(name: str, v: Any) -> Any:
    """v, known by `name` to whoever looks into the cell: what a gate becomes where its activation is not its own alone."""
    if not isinstance(name, str) or not name.isidentifier():
        raise TraceError(f"named(name, v): expected a name, got {name!r}")
    if isinstance(v, Symbol) and v.graph.names.setdefault(name, v.node) is not v.node:
        raise TraceError(f"named: {name!r} is given to two values")
    return v


def relu(x: Any) -> Any:
    return maximum(x, 0.0)


def clip(x: Any, low: float, high: float) -> Any:
    return minimum(maximum(x, low), high)


def _elu(x: Any, alpha: float = 1.0) -> Any:
    # the inner choice keeps exp finite where it is not used
    return where(x > 0, x, alpha * (exp(where(x > 0, 0.0, x)) - 1))


# The element-wise activations, by their Keras 3 names and definitions, and those of the ONNX operators beside them. Each is
# made of the primitives above; what has a default may be given in a name, as in "leaky_relu(alpha=0.1)".
ACTIVATIONS: dict[str, Callable[..., Any]] = {
    "linear": lambda x: x,
    "tanh": tanh,
    "sigmoid": sigmoid,
    "relu": relu,
    "relu6": lambda x: clip(x, 0.0, 6.0),
    "leaky_relu": lambda x, alpha=0.2: where(x > 0, x, alpha * x),
    "hard_sigmoid": lambda x, alpha=1 / 6, beta=0.5: clip(alpha * x + beta, 0.0, 1.0),
    "hard_tanh": lambda x: clip(x, -1.0, 1.0),
    "softplus": softplus,
    "softsign": lambda x: x / (1 + abs(x)),
    "elu": _elu,
    "selu": lambda x: 1.0507009873554805 * _elu(x, 1.6732632423543772),
    "exponential": exp,
    "silu": lambda x: x * sigmoid(x),
    "mish": lambda x: x * tanh(softplus(x)),
    "log_sigmoid": lambda x: -softplus(-x),
    "affine": lambda x, alpha=1.0, beta=0.0: alpha * x + beta,
    "scaled_tanh": lambda x, alpha=1.0, beta=1.0: alpha * tanh(beta * x),
    "thresholded_relu": lambda x, alpha=1.0: where(x > alpha, x, 0.0),
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
    "preactivation": preactivation,
    "project": project,
    "normalize": normalize,
    "named": named,
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


@dataclass(frozen=True)
class Norm:
    """Vectors that are normalised jointly over the units of each row; an output may take its input's place."""

    inputs: tuple[str, ...]
    outputs: tuple[str, ...]


class Stage:
    """A part of a step in which nothing looks across units: vectors and pre-activations in, vectors out.

    Attributes:
        norms: what is normalised before this stage can begin.
        pre: the pre-activations as its function sees them, ordered so that those fed by the input (`x_gates`) are its first
            and those fed by a recurrent product (`h_gates`) its last ones.
        source: the vector that the recurrent product reads.
        projects: its product is with the projection matrix, and its vectors have as many units as that has columns.
        given: the vectors it reads, old states and what earlier stages made. made: those it writes; a new state `h` is `h1`.
        params, aux: those of the cell's that it reads.
        saved: how many values the forward pass saves for the backward pass beside the vectors.
        forward_source, backward_source: the two passes, as text.
        forward_args, backward_args: their arguments. `forward` returns `made`, then the saved values; `backward` returns the
            gradients of `pre`, `given` and `params`. Names: `d_x` the gradient of a made vector or new state x,
            `y0, y1, ...` the saved values.
    """

    norms: tuple[Norm, ...]
    pre: tuple[str, ...]
    x_gates: tuple[str, ...]
    h_gates: tuple[str, ...]
    source: str
    projects: bool
    given: tuple[str, ...]
    made: tuple[str, ...]
    params: tuple[str, ...]
    aux: tuple[str, ...]

    def __init__(
        self,
        graph: Graph,
        made: dict[str, Node],
        *,
        norms: tuple[Norm, ...] = (),
        pre: tuple[str, ...],
        x_gates: tuple[str, ...],
        h_gates: tuple[str, ...],
        source: str,
        projects: bool = False,
        given: tuple[str, ...],
        params: tuple[str, ...],
        aux: tuple[str, ...],
        arguments: tuple[str, ...],
        states: tuple[str, ...],
    ) -> None:
        self.norms, self.pre, self.x_gates, self.h_gates = norms, pre, x_gates, h_gates
        self.source, self.projects = source, projects
        self.given, self.made, self.params, self.aux = given, tuple(made), params, aux
        self.gradient_of: dict[str, str] = {m: "d_" + (m[:-1] if m[:-1] in states else m) for m in made}
        leaves = {n: Symbol(graph, graph.node("leaf", (), n)) for n in arguments}
        forward_nodes = list(graph.nodes)
        new = [Symbol(graph, n) for n in made.values()]
        seeds = [Symbol(graph, graph.node("leaf", (), d)) for d in self.gradient_of.values()]
        gradients = _differentiate(graph, forward_nodes, new, seeds)
        zero = Symbol(graph, graph.constant(0.0))
        wanted = [
            gradients.get(leaves[n].node, zero) if n in leaves else zero
            for n in (*self.pre, *self.given, *self.params)
        ]
        self._emit(graph, leaves, [n.node for n in new], [s.node for s in seeds], [w.node for w in wanted])

    def _emit(
        self, graph: Graph, leaves: dict[str, Symbol], new: list[Node], seeds: list[Node], wanted: list[Node]
    ) -> None:
        in_memory = [n for n in (*self.given, *self.params, *self.aux) if n in leaves]
        stored_anyway = [*(leaves[n].node for n in in_memory), *new]
        kept = choose_saved(graph, seeds, wanted, stored_anyway)
        saved = [n for n in kept if n not in stored_anyway]
        self.saved: int = len(saved)
        names = [f"y{k}" for k in range(len(saved))]
        given = {n: y for n, y in zip(saved, names, strict=True)}
        given.update({n: m for n, m in zip(new, self.made, strict=True) if n in kept and n not in given})
        given.update({n: n.value for n in kept if n.op == "leaf" and n not in given})
        given.update({s: s.value for s in seeds})
        self.forward_args: tuple[str, ...] = tuple(leaves)
        self.backward_args: tuple[str, ...] = (*names, *(t for n, t in given.items() if n not in saved))
        # A comparison is saved as 0 or 1.
        stored = [
            graph.make("where", n, graph.constant(1), graph.constant(0)) if n.op in COMPARISONS else n
            for n in saved
        ]
        given.update({n: f"({y} > K(0.5))" for n, y in zip(saved, names, strict=True) if n.op in COMPARISONS})
        self.forward_source: str = emit(
            "forward", self.forward_args, [*new, *stored], {s.node: n for n, s in leaves.items()}
        )
        self.backward_source: str = emit("backward", self.backward_args, wanted, given)


class Cell:
    """A traced cell: names, emitted forward and backward source, and what the backward pass needs saved.

    Arguments of `function` are matched by name: the gates, the old states (those it uses), and per-unit parameters
    (the rest). A gate in `split` reaches it in two parts, `name_x` from the input and `name_h` from the recurrence.

    Attributes:
        gates: names in the order of the weights' columns.
        recurrent: those of them that the recurrence feeds, in the order of the recurrent weights' columns.
        state: names of the states; the first is the output.
        params: names of the per-unit parameters (peepholes, a recurrent bias).
        aux: names of what is handed in at every step and not differentiated, such as a zoneout mask.
        projects: the output is narrower than the cell, by a projection matrix.
        stages: the parts of a step; one for most cells.
        graph, new: all the equations as they were traced, and the nodes of the new states.
        known: by node, the name of what a step has as an array: pre-activations, what stages hand on, new states.
        vectors: names of what stages hand on, states aside.
        saved: how many values the forward pass saves for the backward pass beside the states and vectors.
        digest: a hash of all that a kernel made from this cell depends on.
    """

    gates: tuple[str, ...]
    state: tuple[str, ...]
    split: tuple[str, ...]
    aux: tuple[str, ...]
    graph: Graph
    new: list[Node]

    def __init__(
        self,
        function: Callable[..., Any],
        gates: Sequence[str],
        state: Sequence[str] = ("h",),
        split: Sequence[str] = (),
        *,
        recurrent: Sequence[str] | None = None,
        aux: Sequence[str] = (),
        name: str | None = None,
    ) -> None:
        self.name: str = name or getattr(function, "__name__", type(function).__name__)
        self.gates, self.state, self.split, self.aux = tuple(gates), tuple(state), tuple(split), tuple(aux)
        self.recurrent: tuple[str, ...] = self.gates if recurrent is None else tuple(recurrent)
        self.arguments: list[str] = self._arguments(function)
        only_x = [g + "_x" if g in self.split else g for g in self.gates if not self._in_one(g)]
        only_h = [g + "_h" for g in self.gates if g in self.split]
        pre = (*only_x, *(g for g in self.gates if self._in_one(g)), *only_h)
        taken = (*pre, *self.state, *self.aux)
        self.params: tuple[str, ...] = tuple(n for n in self.arguments if n not in taken)
        if missing := [a for a in self.aux if a not in self.arguments]:
            raise TraceError(
                f"cell {self.name}: its function has no argument for {missing}; it has {self.arguments}"
            )
        self.function = function
        self.graph, self.new = self._trace(function)
        cutter = _Cutter(self, self.graph, self.new, pre)
        self.stages: tuple[Stage, ...] = cutter.stages()
        self.known: dict[Node, str] = {**cutter.vector, **cutter.pre}
        self.projects: bool = any(s.projects for s in self.stages)
        states1 = {s + "1" for s in self.state}
        self.vectors: tuple[str, ...] = tuple(
            dict.fromkeys(
                n
                for s in self.stages
                for n in (*s.made, *(v for norm in s.norms for v in norm.outputs))
                if n not in states1
            )
        )
        self.saved: int = sum(s.saved for s in self.stages)
        described = (self.gates, self.recurrent, self.state, self.params, self.aux, self.projects)
        stages = [
            (s.norms, s.pre, s.source, s.projects, s.given, s.made, s.params, s.aux, s.backward_args, s.saved)
            for s in self.stages
        ]
        text = repr((described, stages)) + "".join(s.forward_source + s.backward_source for s in self.stages)
        self.digest: str = hashlib.sha256(text.encode()).hexdigest()

    def _in_one(self, gate: str) -> bool:
        """Whether the function sees the input's and the recurrence's part of a gate as one sum."""
        return gate not in self.split and gate in self.recurrent

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
        if taken := [n for n in self.state if n in ("v", "w", "y")]:
            raise TraceError(
                f"cell {self.name}: the states {taken} would be called as the emitted code's own: rename them"
            )
        if twice := sorted({n for n in declared if declared.count(n) > 1}):
            raise TraceError(
                f"cell {self.name}: the names {twice} are given twice among gates, states and aux"
            )
        for what in ("split", "recurrent"):
            names = getattr(self, what)
            if unknown := [g for g in names if g not in self.gates]:
                raise TraceError(f"cell {self.name}: {what} names {unknown}, but the gates are {self.gates}")
        if sorted(self.recurrent, key=self.gates.index) != list(self.recurrent):
            raise TraceError(
                f"cell {self.name}: recurrent names each gate once, in the gates' order, got {self.recurrent}"
            )
        if whole := [g for g in self.split if g not in self.recurrent]:
            raise TraceError(f"cell {self.name}: {whole} are split, but have no recurrent part")
        return list(inspect.signature(function).parameters)

    def _emitted_name(self, name: str) -> bool:
        """Whether emitted code may use `name` for something of its own: v0, w0, y0, d_h, a new state's h1, K."""
        return (
            name == "K" or bool(re.fullmatch(r"[vwy]\d+|d_.*", name)) or name in {s + "1" for s in self.state}
        )

    def _trace(self, function: Callable[..., Any]) -> tuple[Graph, list[Node]]:
        """Call the function with symbols: the graph, and the new states' nodes."""
        graph = Graph()
        leaves = {n: Symbol(graph, graph.node("leaf", (), n)) for n in self.arguments}
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
        any_leaf = next(iter(leaves.values()), Symbol(graph, graph.constant(0.0)))
        new = [any_leaf._node_of(f"cell {self.name} returns", o) for o in out]
        if any(n.op in COMPARISONS for n in new):
            raise TraceError(f"cell {self.name} returns a comparison; write where(condition, 1, 0)")
        return graph, new


class _Cutter:
    """Cuts a cell's graph into stages at the primitives that look across units.

    A value's level is how many of those lie before it; stage k computes the values of level k. What a later stage, or one
    of those primitives, reads is a vector in memory: `w0, w1, ...`, or a new state where it is one.
    """

    def __init__(self, cell: Cell, graph: Graph, new: list[Node], pre: tuple[str, ...]) -> None:
        self.cell, self.graph, self.new = cell, graph, new
        self.leaf = {n.value: n for n in graph.nodes if n.op == "leaf"}
        self.users: dict[Node, list[Node]] = {n: [] for n in graph.nodes}
        self.live = self._live()
        self.stage: dict[
            Node, int
        ] = {}  # where a value is computed; that of its level, but for pre-activations
        for n in graph.nodes:
            self.stage[n] = max((self.stage[a] for a in n.args), default=0) + (n.op in ACROSS)
            if n in self.live:
                for a in n.args:
                    self.users[a].append(n)
        self.pre = self._place_gates(pre)
        self._name_vectors()
        self.last = max([*self.made, *(self.stage[n] for n in self.pre)])

    def fail(self, text: str) -> TraceError:
        return TraceError(f"cell {self.cell.name}: {text}")

    def _live(self) -> set[Node]:
        """The nodes that the new states depend on."""
        live, todo = set(self.new), list(self.new)
        while todo:
            fresh = [a for a in todo.pop().args if a not in live]
            live.update(fresh)
            todo += fresh
        return live

    def _place_gates(self, pre: tuple[str, ...]) -> dict[Node, str]:
        """The pre-activations' nodes and names. One fed by the input alone is computed where it is first used."""
        cell, placed = self.cell, {}
        for n in self.graph.nodes:
            if n.op == "preactivation" and n in self.live:
                name = n.value + "_h" if n.value in cell.split else n.value
                if n.value not in cell.recurrent:
                    raise self.fail(
                        f"preactivation({n.value!r}, v): expected a gate that the recurrence feeds, got one of none of "
                        f"{cell.recurrent}"
                    )
                if name in self.leaf or name in placed.values():
                    raise self.fail(
                        f"gate {name} is computed twice: one argument, or one preactivation(), is enough"
                    )
                placed[n] = name
        for name in pre:
            if name in placed.values():
                continue
            if name not in self.leaf:
                raise self.fail(
                    f"its function has no argument for the gates {[name]}; it has {cell.arguments}"
                )
            node = self.leaf[name]
            placed[node] = name
            alone = not cell._in_one(name) and not (name.endswith("_h") and name[:-2] in cell.split)
            if alone and self.users[node] and node not in self.new:
                self.stage[node] = min(self.stage[u] - (u.op in ACROSS) for u in self.users[node])
        projections = [n for n in self.graph.nodes if n.op == "project" and n in self.live]
        if len(projections) > 1 or any(self._reaches(n, self.new[1:]) for n in projections):
            raise self.fail("project(v) stands once, and only the first state, the output, may depend on it")
        if projections and any(n.op == "preactivation" for n in placed):
            raise self.fail(
                "project() narrows the output, and preactivation() takes values of all units: one of them"
            )
        return placed | {n: "projection" for n in projections}

    def _reaches(self, node: Node, targets: list[Node]) -> bool:
        reached, todo = {node}, [node]
        while todo:
            fresh = [u for u in self.users[todo.pop()] if u not in reached]
            reached.update(fresh)
            todo += fresh
        return any(n in reached for n in targets)

    def _name_vectors(self) -> None:
        """Which values lie in memory, and under what name.

        A normalised pre-activation takes its input's place if nothing else reads that; what depends on old states and
        parameters alone is computed anew in each stage.
        """
        states = self.cell.state
        self.vector: dict[Node, str] = {self.leaf[s]: s for s in states if s in self.leaf}
        self.fed: dict[Node, str] = {}  # the vector that a product reads, where it is not the same
        self.made: dict[int, dict[str, Node]] = {}
        count = 0

        def vector(n: Node) -> str:
            nonlocal count
            if n not in self.vector:
                self.vector[n] = f"w{count}"
                count += 1
            return self.vector[n]

        for s, n in zip(states, self.new, strict=True):
            if n.op != "normalize":
                self.vector.setdefault(n, s + "1")
            self.made.setdefault(self.stage[n], {})[s + "1"] = n
        computed: set[Node] = set()
        for n in self.graph.nodes:
            if n in self.pre or n.op in ACROSS or any(a in computed for a in n.args):
                computed.add(n)
        groups: dict[tuple[Node, ...], list[Node]] = {}
        for n in self.graph.nodes:
            if n.op == "normalize" and n in self.live:
                groups.setdefault(n.args, []).append(n)
                continue
            across = [u for u in self.users[n] if u.op in ACROSS]
            if n.op == "const" or (n.op == "leaf" and n not in self.pre):
                if across and n not in self.vector:
                    raise self.fail(
                        f"{across[0].op}() takes values that the cell computes, its gates, or old states"
                    )
            elif n in self.new and any(
                u.op in PRODUCTS for u in across
            ):  # its new state may keep the old one's value
                self.fed[n] = f"w{count}"
                self.made.setdefault(self.stage[n], {})[f"w{count}"] = n
                count += 1
            elif n not in self.vector:
                later = n in computed and any(self.stage[u] > self.stage[n] for u in self.users[n])
                if across or later:
                    self.made.setdefault(self.stage[n], {})[vector(n)] = n
        self.norms: list[tuple[int, Norm]] = []
        for args, results in groups.items():
            outputs = []
            for k, a in enumerate(args):
                result = next((n for n in results if n.value == k), a)
                alone = all(u.op == "normalize" and u.args == args for u in self.users[a])
                if alone and a in self.pre and a not in self.new and args.count(a) == 1:
                    self.vector[result] = self.vector[a]
                elif result is a:  # not read, but the others depend on it
                    outputs.append(f"w{count}")
                    count += 1
                    continue
                outputs.append(vector(result))
            norm = Norm(tuple(self.vector[a] for a in args), tuple(outputs))
            self.norms.append((self.stage[results[0]], norm))

    def stages(self) -> tuple[Stage, ...]:
        return tuple(self._stage(k) for k in range(self.last + 1))

    def _stage(self, k: int) -> Stage:
        cell, graph = self.cell, Graph()
        here = {n: name for n, name in self.pre.items() if self.stage[n] == k}
        only_h = [g + "_h" for g in cell.split] + ["projection"]
        order = [*(g + "_x" if g in cell.split else g for g in cell.gates), *only_h]
        x_only = [n for n in order if n in here.values() and n not in only_h and not cell._in_one(n)]
        both = [n for n in order if n in here.values() and cell._in_one(n)]
        h_only = [n for n in order if n in here.values() and n in only_h]
        sources = {self.fed.get(n.args[0], self.vector[n.args[0]]) for n in here if n.op in ACROSS}
        if any(n.op == "leaf" and name not in x_only for n, name in here.items()):
            sources.add(cell.state[0])
        if len(sources) > 1:
            raise self.fail(f"one stage has recurrent products of {sorted(sources)}, expected of one value")
        copies: dict[Node, Node] = {}
        leaves: dict[str, Node] = {}

        def leaf(name: str) -> Node:
            leaves[name] = graph.node("leaf", (), name)
            return leaves[name]

        def copy(n: Node) -> Node:
            if n not in copies:
                if n in here:
                    copies[n] = leaf(here[n])
                elif n.op == "leaf" and n not in self.pre:
                    copies[n] = leaf(n.value)
                elif n in self.vector and (n.op == "normalize" or self.stage[n] < k):
                    copies[n] = leaf(self.vector[n])
                else:
                    copies[n] = graph.node(n.op, tuple(copy(a) for a in n.args), n.value)
            return copies[n]

        if self.last == 0:  # the whole cell: every argument in its place, and nodes as they were traced
            for name in cell.arguments:
                leaf(name)
        for n in self.graph.nodes:
            if n in here or (self.last == 0 and n in self.live):
                copy(n)
        made = {name: copy(n) for name, n in self.made.get(k, {}).items()}
        given = [n for n in leaves if n not in here.values() and n not in (*cell.params, *cell.aux)]
        if self.last == 0:
            given = list(cell.state)
        output = cell.state[0]
        projects = "projection" in here.values()
        norms = tuple(norm for stage, norm in self.norms if stage == k)
        narrow = any(n.op == "project" for n in self.pre)
        if narrow and not projects and output in (*given, *(v for norm in norms for v in norm.inputs)):
            raise self.fail(
                f"with project(v) the old output {output} has fewer units than the cell: only what is projected may be "
                "mixed with it"
            )
        if projects and (len(here) > 1 or set(given) - {output} or set(made) != {output + "1"}):
            raise self.fail(
                "after project(v) nothing can follow but the output, made from it and the old output"
            )
        return Stage(
            graph,
            made,
            norms=norms,
            pre=(*x_only, *both, *h_only),
            x_gates=(*x_only, *both),
            h_gates=(*both, *h_only),
            source=next(iter(sources), output),
            projects=projects,
            given=tuple(given),
            params=tuple(n for n in cell.params if n in leaves),
            aux=tuple(n for n in cell.aux if n in leaves),
            arguments=tuple(leaves),
            states=cell.state,
        )


def _differentiate(
    graph: Graph, forward_nodes: list[Node], new: list[Symbol], seeds: list[Symbol]
) -> dict[Node, Symbol]:
    """Reverse mode: the gradient of every node that the `new` depend on, given the `seeds` of those."""
    gradients: dict[Node, Symbol] = {}

    def give(node: Node, d: Symbol | None) -> None:
        if d is not None and node.op != "const" and node.op not in COMPARISONS:
            gradients[node] = gradients[node] + d if node in gradients else d

    for value, seed in zip(new, seeds, strict=True):
        give(value.node, seed)
    for node in reversed(forward_nodes):
        if node in gradients and node.args:
            partials = _partials(Symbol(graph, node), [Symbol(graph, a) for a in node.args], gradients[node])
            for a, d in zip(node.args, partials, strict=True):
                give(a, d)
    return gradients


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
    gates: int | Sequence[str],
    state: Sequence[str] = ("h",),
    split: Sequence[str] = (),
    *,
    recurrent: Sequence[str] | None = None,
) -> Callable[[Callable[..., Any]], Cell]:
    """Turn a function of scalars into a `Cell`: traced, differentiated, ready for every backend.

    Args:
        gates: names of the gates in the order of the weights' columns (a string of one-letter names will do), or how many
            of the function's leading arguments are gates.
        state: names of the states; the first one returned is the output.
        split: gates that the function takes in two parts, `n_x` from the input and `n_h` from the recurrence.
        recurrent: the gates that the recurrence feeds, all unless given; the others see the input only.

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
        return Cell(function, names, state, split, recurrent=recurrent)  # type: ignore[arg-type]

    return decorate
