"""For all tests: one BLAS thread each, since two test processes with two spinning threads each get in each other's way."""

import os

os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")  # read when NumPy is imported, which is after this
