"""float32 to the operands of products: bfloat16, of which NumPy has no type (a value is the upper 16 bits of a float32),
and tf32, a float32 that has lost its last 13 bits (10 of the mantissa are left).

To nearest, ties to even, as the kernels and processors round; a NaN stays one, and what is too large becomes infinity.
"""

from __future__ import annotations

from typing import Any

import numpy as np

__all__ = ["bfloat16_bits", "operand", "tf32_bits"]


def bfloat16_bits(a: Any, xp: Any = np) -> Any:
    """`a` rounded to bfloat16, as uint16; `xp` is the module of its arrays.

    >>> import numpy as np
    >>> [hex(b) for b in bfloat16_bits([1.0, -2.0, 1.0 + 2**-8, 1.0 + 3 * 2**-8, np.inf])]
    ['0x3f80', '0xc000', '0x3f80', '0x3f82', '0x7f80']
    """
    a = xp.ascontiguousarray(a, xp.float32)
    whole = a.view(xp.uint32)
    rounded = whole + (xp.uint32(0x7FFF) + (whole >> 16 & 1))
    return (xp.where(xp.isnan(a), whole | 0x400000, rounded) >> 16).astype(xp.uint16)


def tf32_bits(a: Any, xp: Any = np) -> Any:
    """The bits of `a` as float32, rounded to tf32; `xp` is the module of its arrays.

    >>> import numpy as np
    >>> [hex(b) for b in tf32_bits([1.0, 1 + 2**-10, 1 + 2**-11, 1 + 3 * 2**-11, np.inf])]
    ['0x3f800000', '0x3f802000', '0x3f800000', '0x3f804000', '0x7f800000']
    """
    a = xp.ascontiguousarray(a, xp.float32)
    whole = a.view(xp.uint32)
    rounded = (whole + (xp.uint32(0xFFF) + (whole >> 13 & 1))) & xp.uint32(0xFFFFE000)
    return xp.where(xp.isfinite(a), rounded, whole)


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
        return tf32_bits(a).view(np.float32).astype(a.dtype).reshape(a.shape)
    return (bfloat16_bits(a).astype(np.uint32) << 16).view(np.float32).astype(a.dtype)
