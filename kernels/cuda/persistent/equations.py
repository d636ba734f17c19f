"""A cell's emitted equations as lines of a kernel: names made unique, functions spelt out in primitives of ptx.py.

Kernels call no functions: numba-cuda would need a GPU to compile one, and the emulator would have to know it. exp, tanh and
their kin become a few lines around the special function unit's 2^x, log2 x and 1/x, whose errors are about two units in
the last place of float32. Near zero, where 1 - 2^(-2x) cancels, tanh is its Taylor series (Abramowitz and Stegun 4.5.64),
and log(1 + e) in softplus likewise (4.1.24).
"""

from __future__ import annotations

import ast
from typing import NamedTuple

__all__ = ["Lines", "inline"]

LOG2E, LN2 = 1.4426950408889634, 0.6931471805599453
LOG2E_REST = LOG2E - 1.44269502162933349609375  # what float32 leaves of it
TANH = (62 / 2835, -17 / 315, 2 / 15, -1 / 3)  # of x^9, x^7, x^5, x^3, over x
TANH_SERIES_BELOW = 0.3
LOG1P = (1 / 7, -1 / 6, 1 / 5, -1 / 4, 1 / 3, -1 / 2)  # of x^7 ... x^2, over x
LOG1P_SERIES_BELOW = 0.0625


def _series(coefficients: tuple[float, ...], x: str) -> str:
    text = f"K({coefficients[0]!r})"
    for c in coefficients[1:]:
        text = f"({text} * {x} + K({c!r}))"
    return text


# Each function: lines, of which the last makes the result. {x} is the argument, {m} a prefix for names.
FUNCTIONS: dict[str, tuple[str, ...]] = {
    "sigmoid": (f"rcp(K(1.0) + ex2({{x}} * K({-LOG2E!r})))",),
    "tanh": (
        "{m}a = absolute({x})",
        f"{{m}}e = ex2({{m}}a * K({-2 * LOG2E!r}))",
        "{m}t = (K(1.0) - {m}e) * rcp(K(1.0) + {m}e)",
        "{m}s = {x} * {x}",
        f"{{m}}n = {{x}} + {{x}} * {{m}}s * {_series(TANH, '{m}s')}",
        f"where({{m}}a < K({TANH_SERIES_BELOW}), {{m}}n, where({{x}} < K(0.0), -{{m}}t, {{m}}t))",
    ),
    "exp": (
        f"{{m}}p = {{x}} * K({LOG2E!r})",
        f"{{m}}r = fma({{x}}, K({LOG2E!r}), -{{m}}p) + {{x}} * K({LOG2E_REST!r})",
        f"{{m}}r = where(absolute({{m}}p) < K(160.0), {{m}}r * K({LN2!r}), K(0.0))",
        "{m}e = ex2({m}p)",
        "{m}e * (K(1.0) + {m}r)",
    ),
    "log": (f"lg2({{x}}) * K({LN2!r})",),
    "softplus": (
        f"{{m}}e = ex2(absolute({{x}}) * K({-LOG2E!r}))",
        f"{{m}}n = {{m}}e + {{m}}e * {{m}}e * {_series(LOG1P, '{m}e')}",
        f"{{m}}l = where({{m}}e < K({LOG1P_SERIES_BELOW}), {{m}}n, lg2(K(1.0) + {{m}}e) * K({LN2!r}))",
        "maximum({x}, K(0.0)) + {m}l",
    ),
}
KEPT = {"K", "where", "maximum", "minimum", "sqrt"}  # called as they are


class Lines(NamedTuple):
    """`lines` to run, and the expressions of the `results` after them."""

    lines: list[str]
    results: list[str]


class _Spelling(ast.NodeTransformer):
    def __init__(self, prefix: str) -> None:
        self.prefix, self.lines, self.count = prefix, [], 0

    def visit_Name(self, node: ast.Name) -> ast.AST:
        return ast.Name(self.prefix + node.id, node.ctx)

    def visit_BinOp(self, node: ast.BinOp) -> ast.AST:
        left, right = self.visit(node.left), self.visit(node.right)
        if isinstance(node.op, ast.Div):
            return ast.Call(ast.Name("divide", ast.Load()), [left, right], [])
        return ast.BinOp(left, node.op, right)

    def visit_Call(self, node: ast.Call) -> ast.AST:
        assert isinstance(node.func, ast.Name)
        name = node.func.id
        if name == "K":  # its argument is a number, or one of the spellings of infinity and NaN
            return node
        arguments = [self.visit(a) for a in node.args]
        if name in KEPT:
            return ast.Call(node.func, arguments, [])
        self.count += 1
        made = f"{self.prefix}m{self.count}"
        self.lines.append(f"{made}x = {ast.unparse(arguments[0])}")
        *steps, last = (text.format(x=f"{made}x", m=made) for text in FUNCTIONS[name])
        self.lines += [*steps, f"{made} = {last}"]
        return ast.Name(made, ast.Load())


def inline(source: str, prefix: str) -> Lines:
    """The body of an emitted function (derive.py) with every name prefixed; its arguments are `prefix` + their names.

    >>> inline("def forward(a, b):\\n    v0 = exp(a)\\n    return v0 / b,\\n", "p_").results
    ['divide(p_v0, p_b)']
    """
    function = ast.parse(source).body[0]
    assert isinstance(function, ast.FunctionDef)
    spelling = _Spelling(prefix)
    for statement in function.body:
        if isinstance(statement, ast.Return):
            assert isinstance(statement.value, ast.Tuple)
            results = [ast.unparse(spelling.visit(e)) for e in statement.value.elts]
            return Lines(spelling.lines, results)
        assert isinstance(statement, ast.Assign)
        value = ast.unparse(spelling.visit(statement.value))
        spelling.lines.append(f"{ast.unparse(spelling.visit(statement.targets[0]))} = {value}")
    raise AssertionError("emitted functions return")
