"""Which kernel runs, layer by layer, and why: the answer to "is this as fast as it could be?".

A layer says what it asks of the backend in `operations()`, a list of (operation, option); one that asks
nothing is made of NumPy's element-wise functions. The answers come from the backend's own registry, the one
that serves the calls.
"""

from collections.abc import Callable
from typing import Any

from numlstm.backend import IN_PRECISION, Backend, cuda, lookup, use_backend
from numlstm.layers.base import Layer
from numlstm.layers.bidirectional import Bidirectional
from numlstm.layers.recurrent import Recurrent
from numlstm.quantization import is_quantized

__all__ = ["explain"]


def explain(
    model: Layer, *, backend: str | None = None, print_fn: Callable[[str], Any] | None = None
) -> list[dict[str, str]]:
    """Print, layer by layer, which kernel runs and why.

    Arguments:
        model: a model, or a single layer.
        backend: "cpu", "reference", ...; by default what `compile` chose, else the one that would run now
            (see `nl.use_backend`).
        print_fn: takes each line, in place of `print`.

    Returns what it printed, one dict a row: layer, type, operation, option, dtype, kernel, device, why.

    Raises:
        ValueError: not a layer, or an unknown backend. RuntimeError: a backend that can't be used here.

    >>> from numlstm.layers import Dense
    >>> explain(Dense(2, name="head"), backend="reference")[0]["kernel"]
    backend: reference
    head (Dense): matmul -> numlstm.kernels.reference_pointwise (plain NumPy, any float dtype)
    'numlstm.kernels.reference_pointwise'
    """
    if not isinstance(model, Layer):
        raise ValueError(f"model: expected a model or a layer, got {type(model).__name__}")
    say = print_fn or print
    settings = getattr(model, "_settings", None)  # what `compile` chose counts in fit and predict
    chosen, strict, precision = (
        (settings.backend, settings.strict, settings.products) if settings else (None, False, None)
    )
    with use_backend(backend or chosen, strict=strict, precision=precision) as serving:
        why_not = cuda.unavailable() if (backend or chosen) is None and serving.name == "cpu" else None
        say(f"backend: {serving}" + (f" (no cuda: {why_not})" if why_not else ""))
    pairs = [layer for _, layer in model.walk() if isinstance(layer, Bidirectional)]
    paired = {id(layer) for pair in pairs for layer in (pair.forward_layer, pair.backward_layer)}
    rows = [
        row
        for path, layer in model.walk()
        if _asks(layer)
        for row in _rows(path, layer, serving, 2 if id(layer) in paired else 1)
    ]
    for row in rows:
        what = row["operation"] + ("" if row["option"] == "*" else f" {row['option']}")
        say(f"{row['layer']} ({row['type']}): {what} -> {row['kernel']} ({row['why']})")
    return rows


def _asks(layer: Layer) -> bool:
    """Layers that only hold others speak through those."""
    return not layer.has_children()


def _rows(path: str, layer: Layer, serving: Backend, directions: int) -> list[dict[str, str]]:
    base = {"layer": path or layer.name, "type": type(layer).__name__, "dtype": layer.dtype}
    asked, device = layer.operations(), serving.device
    if quantized := is_quantized(layer):
        base["dtype"] = "int8"
        asked = [(f"quantized_{operation}", option) for operation, option in asked]
    if not asked:
        why = "no operation of the backend is asked for"
        return [
            {
                **base,
                "operation": "element-wise",
                "option": "*",
                "kernel": "numpy",
                "device": device,
                "why": why,
            }
        ]
    rows = []
    for operation, option in asked:
        kernel = lookup(operation, option, layer.dtype, device, gradient=not quantized)
        found = {"kernel": kernel.module, "device": kernel.device, "why": kernel.why}
        if operation in IN_PRECISION and serving.precision != "float32":
            found["why"] += f"; products in {serving.precision}, sums in {layer.dtype}"
        products = "int8" if quantized else serving.precision if operation in IN_PRECISION else "float32"
        if products != "float32" and (how := serving.products(products)):
            found["why"] += f"; {how}"
        if isinstance(layer, Recurrent) and operation == "sequence":
            way = serving.ways(layer.running_cell(), layer.units, layer.dtype, directions)
            found["why"] += f"; {way}" if way else ""
        if operation == "sequence" and (steps := getattr(layer, "remat_steps", None)) is not None:
            found["why"] += (
                f"; in training the states of every {steps} steps are kept, the rest computed again"
                + (" by tier 0" if "tier 2" in found["why"] else "")
            )
        rows.append({**base, "operation": operation, "option": option, **found})
    return rows
