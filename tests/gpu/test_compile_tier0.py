"""Tier 0's kernels compiled and linked for GPUs that are not here: no stack, no spill, no doubles among float32.

Numba asks the current device for its compute capability when a kernel calls a device function; that one question is
answered here. NVIDIA's cuobjdump and nvdisasm read the binaries.
"""

from __future__ import annotations

import re
from pathlib import Path
from types import SimpleNamespace

import pytest
from machine_code import tool, usage

from numlstm.kernels import cells
from numlstm.kernels.cuda import cells as cuda_cells
from numlstm.kernels.cuda import compiler, pointwise
from numlstm.kernels.cuda.cells import Form

pytestmark = pytest.mark.gpu_compile

SHIPPED = {
    "lstm": cells.lstm(),
    "lstm_peephole": cells.lstm(peephole=True, cell_clip=3.0, clip=5.0),
    "lstm_coupled": cells.lstm(coupled=True, peephole=True),
    "lstm_coupled_input": cells.lstm(coupled="input"),
    "lstm_hard": cells.lstm("softsign", "hard_sigmoid"),
    "lstm_zoneout": cells.zoneout(cells.lstm()),
    "lstm_projected": cells.zoneout(cells.lstm(projection=True)),
    "lstm_normalized": cells.lstm(layer_norm=True, projection=True, peephole=True),
    "gru": cells.gru(),
    "gru_zoneout": cells.zoneout(cells.gru()),
    "gru_normalized": cells.gru(layer_norm=True),
    "gru_before": cells.gru(reset_after=False),
    "gru_before_normalized": cells.gru(reset_after=False, layer_norm=True),
    "elman": cells.elman(),
    "elman_relu_normalized": cells.elman("relu", layer_norm=True),
    "indrnn": cells.zoneout(cells.indrnn()),
    "slstm": cells.slstm(),
    "feedforward": cells.feedforward("mish"),
}
# A form with all that another lacks: the architectures share the work.
ARCHITECTURES = {"sm_80": ((8, 0), "float64", "bfloat16"), "sm_90a": ((9, 0, "a"), "float32", "bits")}


@pytest.fixture(autouse=True)
def no_device(monkeypatch, request):
    from numba.cuda import dispatcher

    arch = ARCHITECTURES[request.getfixturevalue("architecture")][0]
    monkeypatch.setattr(dispatcher, "get_current_device", lambda: SimpleNamespace(compute_capability=arch))


@pytest.fixture(params=ARCHITECTURES)
def architecture(request):
    return request.param


def check(kernel: compiler.Kernel, arch: tuple, folder: Path) -> None:
    entry, binary = compiler.compile_cubin(kernel, arch)
    file = folder / "kernel.cubin"
    file.write_bytes(binary)
    used = usage(file)
    assert used and max(registers for registers, *_ in used) <= 128, f"{kernel.name}: {used}"
    assert all(stack == local == 0 for _, stack, _, local in used), f"{kernel.name}: {used}"
    code = tool("nvdisasm", "-c", file)
    assert entry in code
    assert not re.search(r"\b(LDL|STL)\b", code), f"{kernel.name} spills"
    if kernel.dtype == "float32":
        wide = set(re.findall(r"\b(DADD|DMUL|DFMA|DSETP|F2F\.F64\.F32|I2F\.F64)\b", code))
        assert not wide, f"{kernel.name}: {wide}"


@pytest.mark.parametrize("name", SHIPPED)
def test_a_cell(name, architecture, tmp_path):
    arch, dtype, rounding = ARCHITECTURES[architecture]
    cell = SHIPPED[name]
    feeds = tuple(k for k, stage in enumerate(cell.stages) if stage.h_gates)
    for kernel in cuda_cells.all_kernels(cell, Form(dtype, rounding, feeds, bias=True)):
        check(kernel, arch, tmp_path)


@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_the_rest(dtype, architecture, tmp_path):
    arch = ARCHITECTURES[architecture][0]
    rest = [cuda_cells.column_sum_kernel(dtype)]
    rest += [cuda_cells.operand_kernel(Form(dtype, r)) for r in ("bits", "bfloat16", "tf32")]
    for kernel in [*pointwise.all_kernels(dtype), *rest]:
        check(kernel, arch, tmp_path)


def test_a_binary_is_kept_and_a_damaged_one_is_compiled_again(architecture, tmp_path, monkeypatch):
    monkeypatch.setenv("NUMLSTM_CACHE_DIR", str(tmp_path))
    kernel, arch = cuda_cells.column_sum_kernel("float32"), ARCHITECTURES[architecture][0]
    made = compiler.made
    before = made.compiled, made.loaded
    first = compiler.cubin(kernel, arch)
    assert compiler.cubin(kernel, arch) == first
    assert (made.compiled - before[0], made.loaded - before[1]) == (1, 1)
    (file,) = tmp_path.glob("column_sum-*.cubin")
    file.write_bytes(file.read_bytes()[:-1])
    again = compiler.cubin(kernel, arch)  # Numba counts what it compiles, in the name
    assert made.compiled - before[0] == 2 and [f.name for f in tmp_path.iterdir()] == [file.name]
    assert compiler.cubin(kernel, arch) == again and len(again[1]) == len(first[1])
    monkeypatch.setenv("NUMLSTM_CACHE_DIR", "")
    compiler.cubin(kernel, arch)
    assert made.compiled - before[0] == 3


def test_a_kernels_parameters_are_what_is_handed_over(architecture):
    """One parameter an argument, of the size that a launch gives it: CuPy passes bytes, and nothing checks them."""
    from numba import cuda

    arch = ARCHITECTURES[architecture][0]
    sizes = {
        "real": 64,
        "bits": 64,
        "flag": 64,
        "int64": 64,
        "int": 32,
        "index": 64,
        "word": 32,
        "number": 32,
    }
    kernels = [*pointwise.all_kernels("float32"), cuda_cells.forward_kernel(cells.lstm(), 0, Form("float32"))]
    for kernel in kernels:
        signature = compiler._signature(kernel)
        ptx, _ = cuda.compile(kernel.make(), signature, cc=arch, output="ptx", device=False, abi="numba")
        given = re.findall(r"\.param \.[a-z](\d+)(?: \.ptr[^,\n]*)? \w+_param_\d+", ptx)
        assert [int(g) for g in given] == [sizes[p.kind] for p in kernel.parameters], kernel.name
