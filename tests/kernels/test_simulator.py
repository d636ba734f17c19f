"""The CUDA kernels in Numba's simulator on tiny shapes: each file of cuda/ in a process where the simulator is on.

A failure shows that process's report, with every test that failed in it.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

HERE = Path(__file__).parent
FILES = [*sorted((HERE / "cuda").glob("test_*.py")), HERE.parent / "backend" / "test_surface.py"]
FILES.append(HERE.parent / "gpu" / "test_on_device.py")


@pytest.mark.parametrize("file", FILES, ids=lambda path: path.stem)
def test_in_the_simulator(file):
    environment = {**os.environ, "NUMBA_ENABLE_CUDASIM": "1"}
    environment.pop("NUMLSTM_BACKEND", None)
    command = [
        sys.executable,
        "-m",
        "pytest",
        str(file),
        "-k",
        "cuda or on_device",
        "-q",
        "-p",
        "no:cacheprovider",
        "-p",
        "no:xdist",
    ]
    run = subprocess.run(
        command, env=environment, cwd=HERE.parent.parent, capture_output=True, text=True, timeout=600
    )
    assert run.returncode == 0, run.stdout[-8000:] + run.stderr[-2000:]
    assert " passed" in run.stdout
