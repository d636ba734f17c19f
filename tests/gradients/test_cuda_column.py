"""The gradient matrix's CUDA column: rows of small shapes in Numba's simulator (cuda_column.py)."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

BOUND, PARTS = 2e-5, 3


@pytest.mark.parametrize("part", range(PARTS))
def test_the_cuda_column(part, record):
    environment = {**os.environ, "NUMBA_ENABLE_CUDASIM": "1"}
    environment.pop("NUMLSTM_BACKEND", None)
    command = [sys.executable, "cuda_column.py", str(part), str(PARTS)]
    run = subprocess.run(
        command, env=environment, cwd=Path(__file__).parent, capture_output=True, text=True, timeout=900
    )
    assert run.returncode == 0, run.stderr[-4000:]
    rows = json.loads(run.stdout)
    assert len(rows) > 20
    for row, errors in rows.items():
        for column, error in errors.items():
            record(row, "cuda", column, error)
    wrong = {row: errors for row, errors in rows.items() if not all(e <= BOUND for e in errors.values())}
    assert not wrong, wrong  # a NaN is not <=
