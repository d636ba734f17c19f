"""Everything around the recurrent sequence on a GPU: products, softmax and its loss, layer normalisation, random masks,
lookups, optimizers' updates; names and meaning as in ../reference_pointwise.py, which they are held against.

Kernels are text for one float type each (compiler.py); rows are (M, F). A row is reduced by one block, in an order that is
always the same; sums over rows go by columns, in two rounds of fixed size, and no atomic operation is used anywhere, so
that the same numbers give the same bits.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from itertools import product
from typing import Any

import numpy as np

from ..sequence import check_precision
from . import cells
from .cells import BLOCK_SUM, SHARED, Form
from .compiler import Kernel, Parameter, from_text, parameters
from .device import ROW_THREADS, Device, current
from .steps import DTYPES, rounding_of

__all__ = [
    "Updates", "all_kernels", "batched_matmul", "dropout_mask", "embedding", "embedding_gradient",
    "layer_norm", "layer_norm_gradient", "matmul", "softmax", "softmax_cross_entropy",
    "softmax_cross_entropy_gradient", "softmax_gradient",
]  # fmt: skip

Array = Any


def _dtype(name: str, a: Any) -> str:
    """The float type of an argument."""
    dtype = np.dtype(a.dtype).name
    if dtype not in DTYPES:
        raise ValueError(f"{name}: expected float32 or float64, got {dtype}")
    return dtype


def _fits(name: str, a: Any, shape: tuple[int, ...]) -> None:
    """Kernels work on addresses: hold an array to its shape."""
    if tuple(a.shape) != shape:
        raise ValueError(f"{name}: expected shape {shape}, got {tuple(a.shape)}")


# Products and lookups


def matmul(a: Array, b: Array, *, bias: Array | None = None, precision: str = "float32") -> Array:
    """a (M, K) times b (K, N), plus bias (N,), by cuBLAS. In "bfloat16" a and b are rounded first, in "tf32" by cuBLAS
    (../sequence.py); sums stay as they are.

    Raises:
        ValueError: the shapes do not fit, an unknown precision, or another type than float32 and float64.
    """
    check_precision(precision)
    dtype, device = _dtype("a", a), current()
    if a.ndim != 2 or b.ndim != 2 or a.shape[1] != b.shape[0]:
        raise ValueError(f"matmul: expected shapes (M, K) and (K, N), got {a.shape} and {b.shape}")
    (M, K), N = a.shape, b.shape[1]
    c = device.xp.empty((1, M, N), dtype)
    if bias is not None:
        _fits("bias", bias, (N,))
    if bias is not None or K == 0:
        c[...] = 0 if bias is None else device.array(bias, dtype)
    if M and K and N:
        (a, ta), (b, tb) = (_as_it_lies(device, m, dtype) for m in (a, b))
        rounding = rounding_of(dtype, precision, device)
        if rounding != "none":
            a, b = (_rounded(device, m, dtype, rounding) for m in (a, b))
        device.product(a[None], b, c, ta=ta, tb=tb, accumulate=bias is not None, tf32=precision == "tf32")(
            0, 0
        )
    return c[0]


def _as_it_lies(device: Device, m: Array, dtype: str) -> tuple[Array, bool]:
    """A matrix, contiguous, and whether it is the transpose of what was given: a transposed view is not copied."""
    m = device.xp.asarray(m, dtype)
    if not m.flags.c_contiguous and m.T.flags.c_contiguous:
        return m.T, True
    return device.xp.ascontiguousarray(m), False


def _rounded(device: Device, m: Array, dtype: str, rounding: str) -> Array:
    form = Form(dtype, rounding)
    out = device.xp.empty(m.shape, "uint16" if form.operand == "bits" else dtype)
    device.flat(cells.operand_kernel(form), m.size, (m, out, m.size))()
    return out


def batched_matmul(a: Array, b: Array) -> Array:
    """a (..., M, K) times b (..., K, N), leading axes broadcast, by cuBLAS through CuPy."""
    _dtype("a", a)
    xp = current().xp
    return xp.matmul(xp.asarray(a), xp.asarray(b))


def embedding(table: Array, ids: Array) -> Array:
    """Rows of `table` (V, E) by integer `ids` of any shape, from 0 to V - 1: (*ids.shape, E)."""
    xp = current().xp
    return xp.take(xp.asarray(table), xp.asarray(ids), axis=0)


_SUM_ROWS = """
def kernel(dy, order, starts, counts, values, U, E):
    e = cuda.grid(1)
    while e < U * E:
        u = e // E
        start, value = starts[u], K(0)
        for p in range(counts[u]):
            value += dy[order[start + p] * E + (e - u * E)]
        values[e] = value
        e += cuda.gridsize(1)
"""


def embedding_gradient(ids: Array, dy: Array, rows: int) -> tuple[Array, Array]:
    """The gradient of a table of `rows` rows from `dy` (M, E) and the `ids` (M,) that took them.

    Returns `index` (rows,) and `values` (U, E) as ../reference_pointwise.py has it; a sum goes in the order of the ids,
    which a stable sort brings together.
    """
    dtype, device = _dtype("dy", dy), current()
    xp = device.xp
    ids = device.array(ids, np.int64).reshape(-1)
    _fits("dy", dy, (ids.size, dy.shape[-1]))
    index = xp.full(rows, -1, np.int64)
    if ids.size == 0:
        return index, xp.zeros((0, dy.shape[1]), dtype)
    order = xp.argsort(ids, kind="stable")
    sorted_ids = ids[order]
    starts = xp.flatnonzero(xp.concatenate([xp.ones(1, bool), sorted_ids[1:] != sorted_ids[:-1]]))
    ends = xp.concatenate([starts[1:], xp.full(1, ids.size, starts.dtype)])
    by_first = xp.argsort(
        order[starts], kind="stable"
    )  # the rows in the order in which they were first taken
    starts, counts = starts[by_first], (ends - starts)[by_first]
    taken = int(starts.size)
    index[sorted_ids[starts]] = xp.arange(taken)
    values = xp.empty((taken, dy.shape[1]), dtype)
    given = (device.array(dy, dtype), *(device.array(a, np.int64) for a in (order, starts, counts)), values)
    if values.size:
        device.flat(_kernel("embedding_gradient", dtype), values.size, (*given, taken, dy.shape[1]))()
    return index, values


# Rows

_BLOCK_MAXIMUM = BLOCK_SUM.replace("block_sum", "block_maximum").replace(
    "part[i] + part[i + half]", "maximum(part[i], part[i + half])"
)


def _rows_kernel(name: str, signature: tuple[Parameter, ...], body: str, dtype: str) -> Kernel:
    """A kernel with a block a row: `body` is what it does for row b, F columns long; `x.columns` goes over them."""
    loop = f"for j in range(i, F, {ROW_THREADS}):"
    lines = [line.replace("over columns:", loop) for line in body.strip("\n").splitlines()]
    text = "\n".join(
        [
            f"def kernel({', '.join(p.name for p in signature)}):",
            f"    part = {SHARED}",
            "    i, b = cuda.threadIdx.x, cuda.blockIdx.x",
            "    while b < M:",
            *("    " + line for line in lines),
            "        b += cuda.gridDim.x",
        ]
    )
    return from_text(name, BLOCK_SUM + _BLOCK_MAXIMUM + "\n" + text + "\n", signature, dtype)


_SIZES = parameters(index="M F")

_EXPONENTIALS = """
    top = x[b * F]
    over columns:
        top = maximum(top, x[b * F + j])
    top = block_maximum(top, part, i)
    total = K(0)
    over columns:
        total += exp(x[b * F + j] - top)
    total = block_sum(total, part, i)
"""  # their sum, over e^top

_SOFTMAX = f"""{_EXPONENTIALS}
    over columns:
        y[b * F + j] = exp(x[b * F + j] - top) / total
"""

_SOFTMAX_GRADIENT = """
    total = K(0)
    over columns:
        total += y[b * F + j] * dy[b * F + j]
    total = block_sum(total, part, i)
    over columns:
        dx[b * F + j] = y[b * F + j] * (dy[b * F + j] - total)
"""

_CROSS_ENTROPY = f"""{_EXPONENTIALS}
    if i == 0:
        stats[b * 2] = top
        stats[b * 2 + 1] = total
        losses[b] = log(total) - (x[b * F + labels[b]] - top)
"""

_CROSS_ENTROPY_GRADIENT = """
    d = dlosses[b]
    if d == K(0):
        over columns:
            dx[b * F + j] = K(0)
    else:
        top, factor = stats[b * 2], d / stats[b * 2 + 1]
        over columns:
            value = exp(x[b * F + j] - top) * factor
            dx[b * F + j] = value - d if j == labels[b] else value
"""

_LAYER_NORM = """
    total = K(0)
    over columns:
        total += x[b * F + j]
    mean = block_sum(total, part, i) / K(F)
    total = K(0)
    over columns:
        total += (x[b * F + j] - mean) * (x[b * F + j] - mean)
    factor = K(1) / sqrt(block_sum(total, part, i) / K(F) + eps)
    if i == 0:
        inverse[b] = factor
    over columns:
        value = (x[b * F + j] - mean) * factor
        normal[b * F + j] = value
        y[b * F + j] = value * gamma[j * gamma_s] + beta[j * beta_s]
"""

_LAYER_NORM_GRADIENT = """
    total, along = K(0), K(0)
    over columns:
        d = dy[b * F + j] * gamma[j * gamma_s]
        total += d
        along += d * normal[b * F + j]
    total = block_sum(total, part, i) / K(F)
    along = block_sum(along, part, i) / K(F)
    over columns:
        d = dy[b * F + j] * gamma[j * gamma_s]
        dx[b * F + j] = (d - total - normal[b * F + j] * along) * inverse[b]
"""

_COLUMN_PARTS = """
def kernel(dy, normal, products, sums, M, F, chunks):
    j, chunk = cuda.blockIdx.x * cuda.blockDim.x + cuda.threadIdx.x, cuda.blockIdx.y
    while j < F and chunk < chunks:
        product, total, b = K(0), K(0), chunk
        while b < M:
            d = dy[b * F + j]
            product += d * normal[b * F + j]
            total += d
            b += chunks
        products[chunk * F + j] = product
        sums[chunk * F + j] = total
        chunk += cuda.gridDim.y
"""
_CHUNKS = 64  # partial sums of a column


_ROWS = {
    "softmax": (parameters(real="x y"), _SOFTMAX),
    "softmax_gradient": (parameters(real="y dy dx"), _SOFTMAX_GRADIENT),
    "cross_entropy": (parameters(real="x", int64="labels") + parameters(real="losses stats"), _CROSS_ENTROPY),
    "cross_entropy_gradient": (
        parameters(real="x", int64="labels") + parameters(real="stats dlosses dx"), _CROSS_ENTROPY_GRADIENT
    ),
    "layer_norm": (
        parameters(real="x gamma beta y normal inverse", number="eps", int="gamma_s beta_s"), _LAYER_NORM
    ),
    "layer_norm_gradient": (
        parameters(real="dy normal inverse gamma dx", int="gamma_s"), _LAYER_NORM_GRADIENT
    ),
}  # fmt: skip


@cache
def _row_kernel(name: str, dtype: str) -> Kernel:
    signature, body = _ROWS[name]
    return _rows_kernel(name, (*signature, *_SIZES), body, dtype)


def _by_row(name: str, shape: tuple[int, int], dtype: str, *arguments: Any) -> None:
    if shape[0] and shape[1]:
        current().by_row(_row_kernel(name, dtype), shape[0], (*arguments, *shape))()


def softmax(x: Array) -> Array:
    """exp(x) over its sum, along the rows of x (M, V)."""
    dtype, device = _dtype("x", x), current()
    x = device.array(x, dtype)
    y = device.xp.empty_like(x)
    _by_row("softmax", x.shape, dtype, x, y)
    return y


def softmax_gradient(y: Array, dy: Array) -> Array:
    """The gradient of x (M, V) from that of y = softmax(x)."""
    dtype, device = _dtype("y", y), current()
    _fits("dy", dy, tuple(y.shape))
    y, dy = device.array(y, dtype), device.array(dy, dtype)
    dx = device.xp.empty_like(y)
    _by_row("softmax_gradient", y.shape, dtype, y, dy, dx)
    return dx


def softmax_cross_entropy(logits: Array, labels: Array) -> tuple[Array, Any]:
    """Losses (M,) of `logits` (M, V) against integer `labels` (M,) from 0 to V - 1, and what the gradient needs: the
    logits, and two numbers a row."""
    dtype, device = _dtype("logits", logits), current()
    M, _ = logits.shape
    _fits("labels", labels, (M,))
    logits, labels = device.array(logits, dtype), device.array(labels, np.int64)
    losses, stats = device.xp.empty(M, dtype), device.xp.empty((M, 2), dtype)
    _by_row("cross_entropy", logits.shape, dtype, logits, labels, losses, stats)
    return losses, (logits, labels, stats)


def softmax_cross_entropy_gradient(residual: Any, dlosses: Array) -> Array:
    """The gradient of the logits (M, V) from that of the losses (M,). A loss whose gradient is 0 gives a row of zeros."""
    logits, labels, stats = residual
    device, dtype = current(), logits.dtype.name
    _fits("dlosses", dlosses, (logits.shape[0],))
    dx = device.xp.empty_like(logits)
    given = logits, labels, stats, device.array(dlosses, dtype), dx
    _by_row("cross_entropy_gradient", logits.shape, dtype, *given)
    return dx


def layer_norm(x: Array, gamma: Array | None, beta: Array | None, eps: float) -> tuple[Array, Any]:
    """Rows of `x` (M, F) to mean 0 and variance 1, times gamma (F,) plus beta (F,); what the gradient needs."""
    dtype, device = _dtype("x", x), current()
    M, F = x.shape
    for name, a in (("gamma", gamma), ("beta", beta)):
        if a is not None:
            _fits(name, a, (F,))
    x = device.array(x, dtype)
    scale = device.constant(1, dtype) if gamma is None else device.array(gamma, dtype)
    shift = device.constant(0, dtype) if beta is None else device.array(beta, dtype)
    y, normal, inverse = device.xp.empty_like(x), device.xp.empty_like(x), device.xp.empty(M, dtype)
    given = x, scale, shift, y, normal, inverse, eps, int(gamma is not None), int(beta is not None)
    _by_row("layer_norm", x.shape, dtype, *given)
    return y, (normal, inverse, scale, int(gamma is not None))


def layer_norm_gradient(residual: Any, dy: Array) -> tuple[Array, Array, Array]:
    """The gradients of x (M, F), gamma (F,) and beta (F,)."""
    normal, inverse, scale, stride = residual
    device, dtype = current(), normal.dtype.name
    M, F = normal.shape
    _fits("dy", dy, (M, F))
    dy = device.array(dy, dtype)
    dx = device.xp.empty_like(normal)
    _by_row("layer_norm_gradient", normal.shape, dtype, dy, normal, inverse, scale, dx, stride)
    if not (M and F):
        return dx, device.xp.zeros(F, dtype), device.xp.zeros(F, dtype)
    chunks = min(M, _CHUNKS)
    products, sums = (device.xp.empty((chunks, F), dtype) for _ in range(2))
    device.over_rows(_kernel("column_parts", dtype), chunks, F, (dy, normal, products, sums, M, F, chunks))()
    dgamma, dbeta = device.xp.empty(F, dtype), device.xp.empty(F, dtype)
    total = cells.column_sum_kernel(dtype)
    device.flat(total, F, (products, dgamma, chunks, F))()
    device.flat(total, F, (sums, dbeta, chunks, F))()
    return dx, dgamma, dbeta


# Random masks: Philox4x32-10, as in ../reference_pointwise.py; all arithmetic in unsigned numbers of 64 bits

_PHILOX = """
def kernel(mask, kept, threshold, seed_low, seed_high, stream_low, stream_high, size):
    low, shift = u64(0xFFFFFFFF), u64(32)
    block = cuda.grid(1)
    while block * 4 < size:
        c0, c1 = u64(block) & low, u64(block) >> shift
        c2, c3 = u64(stream_low), u64(stream_high)
        k0, k1 = u64(seed_low), u64(seed_high)
        for _ in range(10):
            p0, p1 = u64(0xD2511F53) * c0, u64(0xCD9E8D57) * c2
            c0, c1, c2, c3 = (p1 >> shift) ^ c1 ^ k0, p1 & low, (p0 >> shift) ^ c3 ^ k1, p0 & low
            k0, k1 = (k0 + u64(0x9E3779B9)) & low, (k1 + u64(0xBB67AE85)) & low
        e = block * 4
        mask[e] = kept if c0 >= u64(threshold) else K(0)
        if e + 1 < size:
            mask[e + 1] = kept if c1 >= u64(threshold) else K(0)
        if e + 2 < size:
            mask[e + 2] = kept if c2 >= u64(threshold) else K(0)
        if e + 3 < size:
            mask[e + 3] = kept if c3 >= u64(threshold) else K(0)
        block += cuda.gridsize(1)
"""


_SIGNATURES = {
    "embedding_gradient": (
        _SUM_ROWS, parameters(real="dy", int64="order starts counts") + parameters(real="values", index="U E")
    ),
    "column_parts": (_COLUMN_PARTS, parameters(real="dy normal products sums", index="M F chunks")),
    "dropout_mask": (
        _PHILOX,
        parameters(real="mask", number="kept", index="threshold", word="seed_low seed_high stream_low stream_high")
        + parameters(index="size"),
    ),
}  # fmt: skip


@cache
def _kernel(name: str, dtype: str) -> Kernel:
    text, signature = _SIGNATURES[name]
    return from_text(name, text, signature, dtype)


def dropout_mask(
    shape: tuple[int, ...], rate: float, seed: int, stream: int, dtype: Any = np.float32
) -> Array:
    """A mask of 0 (with probability `rate`) or 1 / (1 - rate): the same bits as every backend's."""
    device, name = current(), np.dtype(dtype).name
    if name not in DTYPES:
        raise ValueError(f"dtype: expected float32 or float64, got {name}")
    mask = device.xp.empty(shape, name)
    words = [n & 0xFFFFFFFF for n in (seed, seed >> 32, stream, stream >> 32)]
    if mask.size:
        given = (mask, 1 / (1 - rate), round(rate * 2**32), *words, mask.size)
        device.flat(_kernel("dropout_mask", name), -(-mask.size // 4), given)()
    return mask


# Optimizers' updates, in place: the formulas of ../reference_pointwise.py, an element a thread

_RULES: dict[
    str, tuple[tuple[str, ...], tuple[str, ...], str]
] = {  # slots, numbers, what is done to an element
    "sgd": (
        ("v",),
        ("lr", "momentum", "nesterov"),
        """
if v:
    m = momentum * v[e] - lr * d
    v[e] = m
    w[e] = x + (momentum * m - lr * d if nesterov > K(0) else m)
else:
    w[e] = x - lr * d
""",
    ),
    "rmsprop": (
        ("ms", "mg", "mom"),
        ("lr", "rho", "momentum", "eps", "rest"),
        """
variance = rho * ms[e] + rest * (d * d)
ms[e] = variance
if mg:
    mean = rho * mg[e] + rest * d
    mg[e] = mean
    variance = variance - mean * mean
step = lr * d / sqrt(variance + eps)
if mom:
    step = momentum * mom[e] + step
    mom[e] = step
w[e] = x - step
""",
    ),
    "adam": (
        ("m", "v", "vhat"),
        ("lr", "rest1", "rest2", "eps"),
        """
first = m[e] + rest1 * (d - m[e])
second = v[e] + rest2 * (d * d - v[e])
m[e] = first
v[e] = second
if vhat:
    second = maximum(vhat[e], second)
    vhat[e] = second
w[e] = x - lr * first / (sqrt(second) + eps)
""",
    ),
}


@cache
def _update_kernel(rule: str, given: tuple[bool, ...], sparse: bool, dtype: str) -> Kernel:
    """The update of one variable by `rule`, with the slots that are `given`; `sparse`: its gradient comes by rows."""
    slots, numbers, rule_text = _RULES[rule]
    lines, skipping = [], None
    for line in rule_text.strip("\n").splitlines():  # the branches over slots are taken here
        indent = len(line) - len(line.lstrip())
        if skipping is not None and indent > 0:
            if not skipping:
                lines.append(line[4:])
            continue
        if line.startswith("else:") and skipping is not None:
            skipping = not skipping
            continue
        name = line.removeprefix("if ").removesuffix(":")
        skipping = not given[slots.index(name)] if line.startswith("if ") else None
        if skipping is None:
            lines.append(line)
    if sparse:
        read = ["place = index[e // E]", "d = K(0)", "if place >= 0:", "    d = g[place * E + e % E]"]
    else:
        read = ["d = g[e]"]
    present = [s for s, there in zip(slots, given, strict=True) if there]
    arrays = parameters(real=["w", "g", *present])
    if sparse:
        arrays += parameters(int64="index")
    signature = (*arrays, *parameters(index=["size", *(["E"] if sparse else [])], number=["decay", *numbers]))
    body = [*read, "x = w[e] * decay", *lines, "e += cuda.gridsize(1)"]
    text = "\n".join([
        f"def kernel({', '.join(p.name for p in signature)}):", "    e = cuda.grid(1)", "    while e < size:",
        *("        " + line for line in body),
    ])  # fmt: skip
    which = "".join(str(int(there)) for there in given) + ("_rows" if sparse else "")
    return from_text(f"{rule}_{which}", text + "\n", signature, dtype)


def all_kernels(dtype: str) -> list[Kernel]:
    """Every kernel of this module for a float type, for who checks what they compile to."""
    found = [_row_kernel(name, dtype) for name in _ROWS] + [_kernel(name, dtype) for name in _SIGNATURES]
    for rule, (slots, _, _) in _RULES.items():
        for there in product((False, True), repeat=len(slots)):
            needed = {"adam": (0, 1), "rmsprop": (0,), "sgd": ()}[rule]
            if all(there[k] for k in needed):
                found += [_update_kernel(rule, there, sparse, dtype) for sparse in (False, True)]
    return found


class Updates:
    """An optimizer's step over many variables, ready to be taken again and again: ../reference_pointwise.py.

    Raises:
        ValueError: an unknown rule, or variables and slots that are not contiguous arrays of one type and shape.
    """

    def __init__(
        self,
        rule: str,
        variables: Sequence[tuple[Array, Sequence[Array | None]]],
        decays: Sequence[bool] | None = None,
    ) -> None:
        if rule not in _RULES:
            raise ValueError(f"rule: expected {', '.join(_RULES)}, got {rule!r}")
        self.rule: str = rule
        self.variables: list[tuple[Array, tuple[Array | None, ...]]] = [
            (w, tuple(slots)) for w, slots in variables
        ]
        self.decays: list[bool] = [False] * len(self.variables) if decays is None else list(decays)
        for w, slots in self.variables:
            _dtype("variables", w)
            for a in (w, *(s for s in slots if s is not None)):
                if a.dtype != w.dtype or a.shape != w.shape or not a.flags.c_contiguous:
                    raise ValueError(
                        f"{rule}: variable and slots must be contiguous arrays of one type and shape, got "
                        f"{a.dtype} of {a.shape} beside {w.dtype} of {w.shape}"
                    )

    def __call__(self, gradients: Sequence[Any], options: tuple[Any, ...], decay: float = 0.0) -> None:
        """Take the step, in place; arguments as in ../reference_pointwise.py.

        Raises:
            ValueError: a gradient of another shape.
        """
        device = current()
        if self.rule == "sgd":
            numbers = options
        elif self.rule == "rmsprop":
            numbers = (*options, 1 - options[1])
        else:
            lr, beta1, beta2, eps = options
            numbers = (lr, 1 - beta1, 1 - beta2, eps)
        for (w, slots), g, decays in zip(self.variables, gradients, self.decays, strict=True):
            if g is None or not w.size:
                continue
            dtype, sparse = w.dtype.name, type(g) is tuple
            shape = (len(g[0]), *g[1].shape[1:]) if sparse else g.shape
            if tuple(shape) != tuple(w.shape):
                raise ValueError(f"{self.rule}: gradient of shape {shape} for a variable of shape {w.shape}")
            kernel = _update_kernel(self.rule, tuple(s is not None for s in slots), sparse, dtype)
            values = device.array(g[1] if sparse else g, dtype)
            arrays = [w, values, *(s for s in slots if s is not None)]
            sizes = [w.size]
            if sparse:
                arrays.append(device.array(g[0], np.int64))
                sizes.append(w.size // len(g[0]))
            keep = 1 - decay if decays else 1.0
            device.flat(kernel, w.size, (*arrays, *sizes, keep, *numbers))()
