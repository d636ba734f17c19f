"""Fused CPU kernels, float32: LLVM vector code from Numba, packed weights, one dispatch a sequence."""
