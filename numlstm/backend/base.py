"""What a backend is: one surface of operations on arrays, each served by the kernel that the registry names.

The registry is keyed by (operation, cell or option, dtype, device); "*" stands for any. A backend asks it
once for each key and remembers. Where its own device has no kernel for a key, NumPy serves (the `reference`
device), `lookup` says so and `strict` raises. `Backend` itself is the `reference` backend, complete for
every float dtype; the others change what the registry holds for their device, and no more than they must of
this class.
"""

from __future__ import annotations

import importlib
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from numlstm.kernels import remat
from numlstm.kernels.int8 import Quantized
from numlstm.kernels.sequence import PRECISIONS, Forward, Prepacked, check_precision

__all__ = ["IN_PRECISION", "PRECISIONS", "Backend", "Kernel", "lookup", "register"]

Array = Any
OPERATIONS = (
    "sequence",
    "matmul",
    "batched_matmul",
    "softmax",
    "softmax_cross_entropy",
    "embedding",
    "layer_norm",
    "dropout_mask",
    "optimizer",
    "quantized_sequence",  # on int8 weights, for inference
    "quantized_matmul",
)
KEEP_PACKED = ("numlstm.kernels.cpu.sequence",)  # modules of kernels that keep packed weights between calls
IN_PRECISION = ("sequence", "matmul")  # those whose products follow `compile(precision=...)`


@dataclass(frozen=True)
class Kernel:
    """An entry of the registry: the module whose functions serve an operation, and why it is this one.

    Attributes:
        operation, option, dtype, device: the key; "*" for any option or dtype.
        module: the module's name; imported when first used.
        why: one sentence for people.
        differentiable: has a checked backward pass; without one it is never picked where a gradient is
            needed.
        fallback: serves a device that has no kernel of its own for this key.
    """

    operation: str
    option: str
    dtype: str
    device: str
    module: str
    why: str
    differentiable: bool = True
    fallback: bool = False

    def functions(self) -> Any:
        """The module, imported."""
        return importlib.import_module(self.module)


_REGISTRY: dict[tuple[str, str, str, str], Kernel] = {}


def register(
    operation: str,
    module: str,
    why: str,
    *,
    option: str = "*",
    dtype: str = "*",
    device: str,
    differentiable: bool = True,
) -> None:
    """Enter a kernel: `module` serves `operation` on `device`, for a cell or option and a dtype ("*": any).

    Raises:
        ValueError: an operation that no backend has, or a key that is taken.
    """
    if operation not in OPERATIONS:
        raise ValueError(f"operation: {operation!r} came, expected one of {', '.join(OPERATIONS)}")
    key = (operation, option, dtype, device)
    if key in _REGISTRY:
        raise ValueError(f"a kernel for {key} is registered already: {_REGISTRY[key].module}")
    _REGISTRY[key] = Kernel(operation, option, dtype, device, module, why, differentiable)


def lookup(
    operation: str, option: str = "*", dtype: Any = np.float32, device: str = "cpu", *, gradient: bool = False
) -> Kernel:
    """The kernel that serves an operation on a device, and why: the closest key, else NumPy's.

    Arguments:
        operation: one of sequence, matmul, batched_matmul, softmax, softmax_cross_entropy, embedding,
            layer_norm, dropout_mask, optimizer, quantized_sequence, quantized_matmul.
        option: the cell's name for a sequence; the update's name for an optimizer.
        dtype: a float dtype, or its name.
        device: "cpu", "cuda" or "reference".
        gradient: only kernels with a checked backward pass.

    Raises:
        ValueError: an unknown operation.

    >>> lookup("sequence", "lstm", "float32", "reference").module
    'numlstm.kernels.reference'
    """
    if operation not in OPERATIONS:
        raise ValueError(f"operation: {operation!r} came, expected one of {', '.join(OPERATIONS)}")
    name = np.dtype(dtype).name
    for where in dict.fromkeys((device, "reference")):
        for key in ((option, name), ("*", name), (option, "*"), ("*", "*")):
            kernel = _REGISTRY.get((operation, *key, where))
            if kernel is not None and (kernel.differentiable or not gradient):
                if where == device:
                    return kernel
                lacking = f"{device} has no {name} kernel for this{' with a gradient' if gradient else ''}"
                return replace(kernel, why=f"{lacking}: {kernel.why}", fallback=True)
    raise ValueError(f"no kernel serves {operation} ({option}, {name}) on {device}")


# What a sequence module's functions take by place; the rest by name.
_FORWARD = ("cell", "x", "kernel", "recurrent_kernel", "bias", "params", "state", "valid")
_BACKWARD = ("residual", "dh", "dfinal")


def _split(
    call: dict[str, Any], places: tuple[str, ...], leave: tuple[str, ...] = ()
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """The arguments of a call, given by name: those that go by place, and the others."""
    by_name = {k: v for k, v in call.items() if k not in places and k not in leave}
    return tuple(call[name] for name in places), by_name


class Backend:
    """Plain NumPy, for any float dtype: the oracle, and the `reference` backend.

    Arguments:
        strict: raise where the device has no kernel of its own, instead of letting NumPy serve.
        precision: of the products inside recurrent sequences and dense layers, one of `PRECISIONS`; "bfloat16" rounds
            their operands and nothing else (kernels/sequence.py).

    Raises:
        ValueError: an unknown precision.

    >>> Backend().matmul(np.eye(2), np.ones((2, 3)), np.zeros(3)).shape
    (2, 3)
    """

    strict: bool
    precision: str

    name = "reference"
    device = "reference"
    xp: Any = np
    index = 0  # the device's number, where there can be several

    @property
    def place(self) -> str:
        """The memory that its arrays lie in: "host" for NumPy's, else the device, "cuda:0" say."""
        return "host" if self.xp is np else f"{self.device}:{self.index}"

    def __init__(self, *, strict: bool = False, precision: str = "float32") -> None:
        check_precision(precision)
        self.strict, self.precision = strict, precision
        # What is handed to kernels: those that know of no precision are asked for none where it is the usual one.
        self._precision = {} if precision == "float32" else {"precision": precision}
        self._found: dict[tuple[str, str, Any, bool], Any] = {}

    def __repr__(self) -> str:
        return f"<backend {self}>"

    def __str__(self) -> str:
        precision = "" if self.precision == "float32" else f", products in {self.precision}"
        return f"{self.name}{', strict' if self.strict else ''}{precision}"

    def functions(self, operation: str, option: str, dtype: Any, gradient: bool = False) -> Any:
        """The module of the kernel that serves this key here.

        Raises:
            RuntimeError: under `strict`, where only a fallback serves.
        """
        key = (operation, option, dtype, gradient)
        found = self._found.get(key)
        if found is None:
            kernel = lookup(operation, option, dtype, self.device, gradient=gradient)
            if kernel.fallback and self.strict:
                raise RuntimeError(f"strict: {operation} ({option}, {np.dtype(dtype).name}): {kernel.why}")
            found = self._found[key] = kernel.functions()
        return found

    # Arrays
    def asarray(self, a: Any, dtype: Any = None) -> Array:
        """`a` as an array of this backend's device, without a copy where it is one already."""
        return np.asarray(a, dtype)

    def to_numpy(self, a: Array) -> np.ndarray:
        """`a` as a NumPy array, without a copy where it is one already."""
        return np.asarray(a)

    def finish(self) -> None:
        """Raise what went wrong on its device after the call that asked for it; results are good once this returns.

        Raises:
            RuntimeError: a kernel gave up.
        """

    def room(self) -> int | None:
        """How many bytes more its memory can take; None for the host's, to which nothing has to be copied."""
        return None

    def current(self) -> AbstractContextManager[Any]:
        """A context in which arrays are made, and computed with, on its device."""
        return nullcontext()

    # Recurrent sequences, time-major: the contract is in kernels/sequence.py
    def sequence_forward(
        self,
        cell: Any,
        x: Array,
        kernel: Array,
        recurrent_kernel: Array,
        bias: Array | None,
        params: tuple[Array, ...],
        state: tuple[Array, ...] | None,
        valid: Array | None,
        *,
        training: bool,
        aux: tuple[Array, ...] = (),
        recurrent_mask: Array | None = None,
        projection: Array | None = None,
        remat_steps: int | None = None,
        keep_states: bool = True,
        prepacked: Prepacked | None = None,
    ) -> Any:
        """Run a cell over x (T, B, I): a `Forward(h, final, states, residual)`.

        Arguments:
            kernel, recurrent_kernel: arrays, or both `Quantized`, for inference: then `training` keeps the
                states' sequences and nothing else.
            projection: (H, P), for a cell that projects its output.
            remat_steps: keep the states at every so many steps only, and compute what else a gradient needs
                again, piece by piece (kernels/remat.py).
            keep_states: with `remat_steps`, whether `states` are wanted all the same.
            prepacked: where kernels that pack weights may keep them for the next call.
        """
        serving = self._sequence_kernels(cell, kernel, training)
        options: dict[str, Any] = {}
        if prepacked is not None and serving.__name__ in KEEP_PACKED:
            options["prepacked"] = prepacked
        if remat_steps is not None:
            # A module may have another serve its pieces.
            serving = remat.Remat(getattr(serving, "pieces", serving), remat_steps)
            options = {"keep_states": keep_states}
        out = serving.forward(
            cell, x, kernel, recurrent_kernel, bias, params, state, valid,
            training=training, aux=aux, recurrent_mask=recurrent_mask, projection=projection,
            **self._precision_of(kernel), **options,
        )  # fmt: skip
        return Forward(out.h, out.final, out.states, (serving, out.residual)) if training else out

    def _sequence_kernels(self, cell: Any, kernel: Any, training: bool) -> Any:
        """The module that serves a cell on these weights."""
        if isinstance(kernel, Quantized):
            return self.functions("quantized_sequence", cell.name, kernel.dtype)
        return self.functions("sequence", cell.name, kernel.dtype, training)

    def _precision_of(self, kernel: Any) -> dict[str, str]:
        """What a sequence is told of the precision of its products: of int8 weights, nothing else is to be chosen."""
        return {} if isinstance(kernel, Quantized) else self._precision

    def sequence_backward(
        self,
        residual: Any,
        dh: Array | None,
        dfinal: tuple[Array | None, ...],
        *,
        need_dx: bool = True,
        dstates: tuple[Array | None, ...] | None = None,
    ) -> Any:
        """The `Gradients` of `sequence_forward`, by the same kernel that ran it. A residual serves once."""
        serving, kept = residual
        return serving.backward(kept, dh, dfinal, need_dx=need_dx, dstates=dstates)

    def sequence_forward_pair(self, calls: Sequence[dict[str, Any]]) -> list[Any]:
        """Several sequences that do not depend on each other, such as the two directions over one input.

        Arguments:
            calls: the arguments of `sequence_forward`, by name, one dict a sequence.

        Returns a `Forward` each. Where one kernel serves them all and can run them together (`forward_all`, the
        places and options of each of its own `forward`'s calls in, a list of results out), it is asked once.
        """
        servings = {self._sequence_kernels(c["cell"], c["kernel"], c["training"]) for c in calls}
        together = getattr(next(iter(servings)), "forward_all", None) if len(servings) == 1 else None
        if together is None or any(c.get("remat_steps") is not None for c in calls):
            return [self.sequence_forward(**c) for c in calls]
        (serving,) = servings
        leave = ("remat_steps", "keep_states", *(() if serving.__name__ in KEEP_PACKED else ("prepacked",)))
        outs = together([_split({**c, **self._precision_of(c["kernel"])}, _FORWARD, leave) for c in calls])
        return [
            out._replace(residual=(serving, out.residual)) if c["training"] else out
            for c, out in zip(calls, outs, strict=True)
        ]

    def sequence_backward_pair(self, calls: Sequence[dict[str, Any]]) -> list[Any]:
        """The `Gradients` of several sequences: the arguments of `sequence_backward` by name, a dict each."""
        servings = {c["residual"][0] for c in calls}
        together = getattr(next(iter(servings)), "backward_all", None) if len(servings) == 1 else None
        if together is None:
            return [self.sequence_backward(**c) for c in calls]
        return together([_split({**c, "residual": c["residual"][1]}, _BACKWARD) for c in calls])

    # Single steps
    def stack(self, steps: Sequence[Any], batch: int, features: int | None, *, masked: bool) -> Any | None:
        """Layers to be stepped through in one native call: a `Stack` (kernels/cpu/stream.py) of the layers described
        by `steps` (kernels/stream.py), or None where the device has no such kernels."""
        return None

    def products(self, kind: str) -> str:
        """What `explain` adds about products in "bfloat16" or "int8" on this device; nothing where there is no choice."""
        return ""

    def ways(self, cell: Any, units: int, dtype: Any, directions: int = 1) -> str:
        """What `explain` adds about the way that a cell's sequences take on this device, `directions` of them at once;
        nothing where there is one only."""
        return ""

    # Products and lookups
    def matmul(self, a: Array, b: Array, bias: Array | None = None) -> Array:
        """a (M, K) times b (K, N), an array or `Quantized`, plus bias (N,)."""
        if isinstance(b, Quantized):
            return self.functions("quantized_matmul", "*", a.dtype).matmul(a, b, bias=bias)
        return self.functions("matmul", "*", a.dtype).matmul(a, b, bias=bias, **self._precision)

    def batched_matmul(self, a: Array, b: Array) -> Array:
        """a (..., M, K) times b (..., K, N), leading axes broadcast."""
        return self.functions("batched_matmul", "*", a.dtype).batched_matmul(a, b)

    def embedding(self, table: Array, ids: Array) -> Array:
        """Rows of table (V, E) by integer ids of any shape."""
        return self.functions("embedding", "*", table.dtype).embedding(table, ids)

    def embedding_gradient(self, ids: Array, dy: Array, rows: int) -> tuple[Array, Array]:
        """The gradient of a table of `rows` rows, from ids (M,) and dy (M, E): `index` (rows,), each row's
        place among `values` or -1 for zeros, and `values` (U, E), the rows that were taken."""
        return self.functions("embedding", "*", dy.dtype).embedding_gradient(ids, dy, rows)

    # Rows
    def softmax(self, x: Array) -> Array:
        """exp(x) over its sum, along the rows of x (M, V)."""
        return self.functions("softmax", "*", x.dtype).softmax(x)

    def softmax_gradient(self, y: Array, dy: Array) -> Array:
        """The gradient of x (M, V) from that of y = softmax(x)."""
        return self.functions("softmax", "*", y.dtype).softmax_gradient(y, dy)

    def softmax_cross_entropy(self, logits: Array, labels: Array) -> tuple[Array, Any]:
        """Losses (M,) for logits (M, V) and integer labels (M,); and the residual for the gradient."""
        serving = self.functions("softmax_cross_entropy", "*", logits.dtype)
        losses, residual = serving.softmax_cross_entropy(logits, labels)
        return losses, (serving, residual)

    def softmax_cross_entropy_gradient(self, residual: Any, dlosses: Array) -> Array:
        """The gradient of the logits (M, V) from that of the losses (M,), zeros where that is 0."""
        serving, kept = residual
        return serving.softmax_cross_entropy_gradient(kept, dlosses)

    def layer_norm(self, x: Array, gamma: Array | None, beta: Array | None, eps: float) -> tuple[Array, Any]:
        """Rows of x (M, F) normalised, times gamma (F,), plus beta (F,); and the residual for the
        gradient."""
        return self.functions("layer_norm", "*", x.dtype).layer_norm(x, gamma, beta, eps)

    def layer_norm_gradient(self, residual: Any, dy: Array) -> tuple[Array, Array, Array]:
        """The gradients of x, gamma and beta."""
        return self.functions("layer_norm", "*", dy.dtype).layer_norm_gradient(residual, dy)

    # Random masks
    def dropout_mask(
        self, shape: tuple[int, ...], rate: float, seed: int, stream: int, dtype: Any = np.float32
    ) -> Array:
        """0 with probability `rate`, else 1 / (1 - rate): element i depends on (seed, stream, i) only."""
        return self.functions("dropout_mask", "*", np.dtype(dtype)).dropout_mask(
            shape, rate, seed, stream, dtype
        )

    # Optimizers' updates, in place
    def updates(
        self,
        rule: str,
        variables: Sequence[tuple[Array, tuple[Array | None, ...]]],
        decays: Sequence[bool] | None = None,
    ) -> Any:
        """The steps of an optimizer over variables of one dtype, as a function to call at every step.

        Arguments:
            rule: "sgd", "rmsprop" or "adam".
            variables: for each its array and its slots, None where one is not used: (momentum,) for sgd, (mean
                square, mean, momentum) for rmsprop, (m, v, largest v) for adam.
            decays: for each whether weight decay is for it; none if not given.

        Returns a function of the gradients, one array each, or (index, values) as `embedding_gradient` gives
        them, or None; of the rule's options, (lr, momentum, nesterov), (lr, rho, momentum, eps) or (lr_t, beta1,
        beta2, eps), where lr_t holds the step's bias corrections; and of the learning rate times the weight decay.
        """
        dtype = variables[0][0].dtype if variables else np.dtype(np.float32)
        return self.functions("optimizer", rule, dtype).Updates(rule, variables, decays)


for _operation in OPERATIONS:
    _sequence = _operation in ("sequence", "quantized_sequence")
    _module = "numlstm.kernels.reference" if _sequence else "numlstm.kernels.reference_pointwise"
    register(_operation, _module, "plain NumPy, any float dtype", device="reference")
