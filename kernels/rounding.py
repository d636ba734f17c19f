"""float32 to the operands of products: bfloat16, of which NumPy has no type (a value is the upper 16 bits of a float32),
and tf32, a float32 that has lost its last 13 bits (10 of the mantissa are left).

To nearest, ties to even, as the kernels and processors round; a NaN stays one, and what is too large becomes infinity.
"""

from __future__ import annotations

from typing import Any

import numpy as np

__all__ = ["bfloat16_bits", "operand"]


def bfloat16_bits(a: Any) -> np.ndarray:
    """`a` rounded to bfloat16, as uint16.

    >>> import numpy as np
    >>> [hex(b) for b in bfloat16_bits([1.0, -2.0, 1.0 + 2**-8, 1.0 + 3 * 2**-8, np.inf])]
    ['0x3f80', '0xc000', '0x3f80', '0x3f82', '0x7f80']
    """
    a = np.ascontiguousarray(a, np.float32)
    whole = a.view(np.uint32)
    rounded = whole + (0x7FFF + (whole >> 16 & 1))
    return (np.where(np.isnan(a), whole | 0x400000, rounded) >> 16).astype(np.uint16)


def operand(a: np.ndarray, precision: str) -> np.ndarray:
    """`a` as a product in `precision` sees it, in its own dtype.

    >>> import numpy as np
    >>> operand(np.array([1.0, 1.01]), "bfloat16").tolist(), operand(np.array([1.01]), "float32").tolist()
    ([1.0, 1.0078125], [1.01])
    >>> operand(np.array([1 + 2**-10, 1 + 2**-12]), "tf32").tolist()
    [1.0009765625, 1.0]
    """
    if precision == "float32":
        return a
    if precision == "tf32":
        single = np.ascontiguousarray(a, np.float32)
        whole = single.view(np.uint32)
        rounded = (whole + (0xFFF + (whole >> 13 & 1))) & np.uint32(0xFFFFE000)
        return np.where(np.isfinite(single), rounded, whole).view(np.float32).astype(a.dtype).reshape(a.shape)
    return (bfloat16_bits(a).astype(np.uint32) << 16).view(np.float32).astype(a.dtype)
