"""The CPU backend: fused float32 kernels compiled by Numba, and NumPy for the rest.

Nothing here imports Numba: the registry names the kernels' modules, and the first use of each imports it.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from numlstm.kernels.sequence import check_precision

from .base import Backend, register

__all__ = ["CpuBackend"]


class CpuBackend(Backend):
    """Float32 on this machine's processors; products in float32 or bfloat16, and a ValueError for another precision.

    >>> CpuBackend().name
    'cpu'
    """

    name = "cpu"
    device = "cpu"

    def __init__(self, *, strict: bool = False, precision: str = "float32") -> None:
        check_precision(precision, ("float32", "bfloat16"))
        super().__init__(strict=strict, precision=precision)

    def stack(self, steps: Sequence[Any], batch: int, features: int | None, *, masked: bool) -> Any | None:
        """One native call for the layers that `steps` describes."""
        from numlstm.kernels.cpu.stream import Stack

        return Stack(steps, batch, features, masked=masked)

    def products(self, kind: str) -> str:
        """Whether they run in AMX's tiles, or why not where the processor has them."""
        from numlstm.kernels.cpu import amx

        return amx.words({"bfloat16": "bf16"}.get(kind, kind))


_FUSED = {  # operation: module of numlstm.kernels.cpu, why
    "sequence": ("sequence", "input product, recurrent product and gates in one compiled pass"),
    "matmul": ("gemm", "packed and vectorised for this processor"),
    "batched_matmul": ("batched", "each product by one thread, all in one dispatch"),
    "softmax": ("pointwise", "one compiled pass over the rows, one for the gradient"),
    "softmax_cross_entropy": (
        "pointwise",
        "one compiled pass over the rows for the losses, one for the gradient",
    ),
    "dropout_mask": ("pointwise", "compiled Philox, the same bits as every backend's"),
    "embedding": ("pointwise", "NumPy's gather, and a compiled sum of the rows that were taken"),
    "optimizer": ("pointwise", "one compiled pass over all weights and their slots"),
}
_NUMPY = {
    "layer_norm": "NumPy: no fused kernel yet",
}
_INFERENCE = {  # likewise; without a backward pass
    "quantized_sequence": ("quantized", "int8 weights, rows brought to int8 as they come, 32-bit sums"),
    "quantized_matmul": ("quantized", "int8 weights, rows brought to int8 as they come, 32-bit sums"),
}
for _operation, (_module, _why) in _FUSED.items():
    register(_operation, f"numlstm.kernels.cpu.{_module}", _why, dtype="float32", device="cpu")
for _operation, (_module, _why) in _INFERENCE.items():
    _module = f"numlstm.kernels.cpu.{_module}"
    register(_operation, _module, _why, dtype="float32", device="cpu", differentiable=False)
for _operation, _why in _NUMPY.items():
    register(_operation, "numlstm.kernels.reference_pointwise", _why, device="cpu")
