"""Kernels for NVIDIA GPUs: `@cuda.jit` functions compiled by Numba, products by cuBLAS through CuPy."""
