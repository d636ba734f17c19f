"""The shape of vectors and tiles follows from the features that Numba compiles for."""

from __future__ import annotations

import json

import pytest

from numlstm.kernels.cpu import isa

SHAPES = {  # lanes, registers -> columns, rows: accumulators, one row of weights and one broadcast fit
    (16, 32): (4, 6),
    (8, 16): (2, 6),
    (4, 16): (2, 6),
    (4, 32): (4, 6),
}


def test_the_tile_fits_the_registers() -> None:
    assert SHAPES[isa.LANES, isa.REGISTERS] == (isa.TILE_COLUMNS, isa.TILE_ROWS)
    assert isa.TILE_ROWS * isa.TILE_COLUMNS + isa.TILE_COLUMNS + 1 <= isa.REGISTERS


def test_described() -> None:
    assert str(isa.LANES) in isa.describe() and str(isa.REGISTERS) in isa.describe()


@pytest.mark.skipif(not isa.IS_X86, reason="the features named are x86's")
@pytest.mark.parametrize(
    ("lanes", "name", "environment"),
    [
        (
            16,
            "AVX-512",
            {"NUMBA_CPU_NAME": "skylake-avx512", "NUMBA_CPU_FEATURES": "+avx,+avx2,+fma,+avx512f"},
        ),
        (8, "AVX2", {"NUMBA_CPU_NAME": "haswell", "NUMBA_CPU_FEATURES": "+avx,+avx2,+fma,-avx512f"}),
        (4, "SSE", {"NUMBA_CPU_NAME": "generic"}),  # which Numba reads as no features
        (4, "SSE", {"NUMBA_ENABLE_AVX": "0"}),  # what Numba chooses by itself on Sandy and Ivy Bridge
    ],
)
def test_features_are_those_numba_compiles_for(lanes, name, environment, python) -> None:
    bare = dict.fromkeys(("NUMBA_CPU_NAME", "NUMBA_CPU_FEATURES", "NUMBA_ENABLE_AVX"))
    source = (
        "import json; from numlstm.kernels.cpu import isa; print(json.dumps([isa.LANES, isa.describe()]))"
    )
    found = json.loads(python(source, **bare | environment).stdout)
    assert found[0] == lanes and found[1].startswith(name)
