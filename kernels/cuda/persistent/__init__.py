"""Persistent kernels: one launch runs all steps of a sequence, with the recurrent weights in registers throughout.

The idea (Diamos et al., Persistent RNNs, 2016): a step by step product reads the recurrent weights from memory at every
step, and for batches of tens that reading is all the time there is. Here every thread block keeps the weights of U units in
its threads' registers for the whole sequence, and what travels at every step is h alone, through L2.

- plan.py: how units and batch are dealt to blocks, what fits, what pays, and the table that says so.
- equations.py: a cell's equations as lines of a kernel. product.py: the recurrent product, on tensor cores by inline PTX
  (../ptx.py), the waiting for other blocks, and the order of the weights; places.py: which registers and words its
  intrinsics touch. emit.py: the two kernels' text.
- sequence.py: the contract of a sequence around them. compile.py: text to machine code. device.py: a GPU.

The exchange. Blocks do not meet at a barrier of the grid. Room for what they hand each other is filled beforehand with a
word that no published value is (all bits set; a NaN that would read so is published as another NaN, so that it travels and
never hangs), values are stored relaxed, and a reader looks again until none of its words is that one: one trip through
L2, without fences, flags or atomics (Zhu et al., Sparse Persistent RNNs, 2018, name the idea Lamport timestamps). Every
word is written once in a launch, so a word that is there is the right one. This needs all blocks resident at once, which a
cooperative launch guarantees, and spins are bounded: a block that waits in vain leaves, with its step noted, the others
follow, and the host raises RuntimeError.

Precision. "bfloat16" and "tf32" round the operands of the recurrent product, as the contract says; "float32" is three tf32
products of the operands' halves of 11 digits each (Markidis et al. 2018), a relative error of about 2^-21 a term: an
infinite h therefore becomes NaN in it. Plain float32 arithmetic would have the 128 lanes of a multiprocessor do per step
what the tensor cores do several times faster, and its operands would have to pass through shared memory. Gates, states
and sums are float32 in all of them.

Determinism. A sum's order is fixed by the plan: over a warp's words, then over warps, then (gradients of biases and
parameters) over steps in a thread and over rows on the host. No atomics.

Nothing of CUDA is imported here; the module for a GPU is imported when `on_device` is called.
"""

from __future__ import annotations

from functools import cache

from .plan import Plan, choose, costs, supports, table
from .sequence import Sequences

__all__ = ["Plan", "Sequences", "choose", "costs", "on_device", "supports", "table"]


@cache
def on_device(index: int = 0) -> Sequences:
    """The sequences of GPU `index`: `forward`, `backward`, `forward_all`, `backward_all`, `supports`, and `device.finish`.

    Raises:
        ImportError: CuPy, cuBLAS, numba-cuda or cuda-core is missing. cupy's own errors where there is no such GPU.
    """
    try:
        from .device import Device
    except ImportError as error:
        needed = "CuPy with cuBLAS, and numba-cuda: pip install numlstm[cuda13]"
        raise ImportError(f"persistent kernels need {needed} ({error})") from error
    return Sequences(Device(index))
