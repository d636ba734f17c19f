"""Kernels for NVIDIA GPUs: `@cuda.jit` functions compiled by Numba, products by cuBLAS through CuPy. Importing this package
imports no CUDA; its modules do when they are used."""
