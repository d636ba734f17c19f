"""These tests run where CUDA is usable: on a GPU, or in Numba's simulator, which must be chosen before Numba is imported.

`make test` chooses it in processes of their own: ../test_simulator.py runs these files there. On a machine with a GPU they
are collected here too, and run on it.
"""

from numlstm.backend import cuda

if cuda.unavailable() is not None:
    collect_ignore_glob = ["test_*.py"]
