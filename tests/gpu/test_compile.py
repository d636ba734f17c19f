"""The persistent kernels compiled for GPUs without one, through the code that a GPU runs, and the machine code read.

For each plan of the dispatch table that is listed: no stack and no local memory (the weights stay in registers), registers
and shared memory within the machine's limits, as many matrix instructions as the plan says, and no memory barrier.
"""

from __future__ import annotations

import importlib.util
import re
import subprocess
from pathlib import Path

import emulator
import pytest

from numlstm.kernels import cells
from numlstm.kernels.cuda.persistent import Plan, choose
from numlstm.kernels.cuda.persistent.emit import (
    Options,
    backward_arguments,
    backward_text,
    forward_arguments,
    forward_text,
)

pytestmark = pytest.mark.gpu_compile

# (capability, multiprocessors, bytes of shared memory a block): H100 and H200; A100.
HOPPER, AMPERE = ((9, 0), 132, 227 << 10), ((8, 0), 108, 163 << 10)
PLAIN = Options(upstream=(True, False))
EVERYTHING = Options(masked=True, dropout=True, upstream=(True, True))
LSTM, GRU = cells.lstm(), cells.gru()
FULL = cells.zoneout(cells.lstm(peephole=True))

# Cell, H, B, precision, options, machine, directions. B is mostly the largest that pays.
SHIPPED = {
    f"{cell.name}-{H}-{B}-{precision}-sm{machine[0][0]}{machine[0][1]}-{directions}{'-all' if options.masked else ''}": (
        cell, H, B, precision, options, machine, directions,
    )
    for cell, H, B, precision, options, machine, directions in [
        (LSTM, 128, 64, "bfloat16", PLAIN, HOPPER, 1),
        (LSTM, 256, 64, "bfloat16", PLAIN, HOPPER, 1),
        (LSTM, 512, 64, "bfloat16", PLAIN, HOPPER, 1),
        (LSTM, 650, 20, "bfloat16", PLAIN, HOPPER, 1),
        (LSTM, 768, 64, "bfloat16", PLAIN, HOPPER, 1),
        (LSTM, 1024, 1, "bfloat16", PLAIN, HOPPER, 1),
        (LSTM, 1024, 32, "bfloat16", PLAIN, HOPPER, 1),
        (LSTM, 512, 32, "tf32", PLAIN, HOPPER, 1),
        (LSTM, 1024, 16, "tf32", PLAIN, HOPPER, 1),
        (LSTM, 512, 32, "float32", PLAIN, HOPPER, 1),
        (LSTM, 1024, 16, "float32", PLAIN, HOPPER, 1),
        (LSTM, 512, 32, "bfloat16", PLAIN, HOPPER, 2),
        (GRU, 512, 32, "bfloat16", Options(upstream=(True,)), HOPPER, 1),
        (GRU, 512, 256, "bfloat16", Options(upstream=(True,)), HOPPER, 1),
        (GRU, 1024, 32, "bfloat16", Options(upstream=(True,)), HOPPER, 1),
        (GRU, 512, 32, "float32", Options(upstream=(True,)), HOPPER, 1),
        (cells.elman(), 1024, 32, "bfloat16", Options(upstream=(True,)), HOPPER, 1),
        (cells.slstm(), 512, 16, "bfloat16", Options(upstream=(True, False, False, False)), HOPPER, 1),
        (FULL, 512, 32, "bfloat16", EVERYTHING, HOPPER, 1),
        (FULL, 1024, 16, "bfloat16", EVERYTHING, HOPPER, 1),
        (FULL, 512, 16, "float32", EVERYTHING, HOPPER, 1),
        (LSTM, 512, 64, "bfloat16", PLAIN, AMPERE, 1),
        (LSTM, 768, 16, "bfloat16", PLAIN, AMPERE, 1),
        (LSTM, 512, 16, "float32", PLAIN, AMPERE, 1),
        (GRU, 512, 32, "tf32", Options(upstream=(True,)), AMPERE, 1),
    ]
}  # fmt: skip


def tool(name: str, cubin: Path, *arguments: str) -> str:
    """What one of NVIDIA's binary tools prints; its wheels put it beside the other CUDA packages."""
    spec = importlib.util.find_spec("nvidia")
    assert spec is not None and spec.submodule_search_locations
    found = [p for place in spec.submodule_search_locations for p in Path(place).glob(f"cu1?/bin/{name}*")]
    assert found, f"{name} is not installed"
    return subprocess.run([found[0], *arguments, cubin], capture_output=True, text=True, check=True).stdout


@pytest.mark.parametrize("back", [False, True], ids=["forward", "backward"])
@pytest.mark.parametrize("name", SHIPPED)
def test_machine_code(name: str, back: bool, tmp_path: Path) -> None:
    from numlstm.kernels.cuda.persistent.compile import build, kinds

    cell, H, B, precision, options, (capability, sms, shared_per_block), directions = SHIPPED[name]
    plan = choose(
        cell, B, H, precision=precision, sms=sms, shared_per_block=shared_per_block, directions=directions
    )
    assert isinstance(plan, Plan), plan
    if back:
        text, arguments, warps = (
            backward_text(cell, plan, options),
            backward_arguments(cell, options),
            plan.back_warps,
        )
        shared = plan.back_shared
        products = plan.back_chunks * (plan.U // 8) * 2 * plan.back_tiles
        loads = plan.back_chunks * (plan.U // 8)
    else:
        text, arguments, warps = (
            forward_text(cell, plan, options),
            forward_arguments(cell, options),
            plan.warps,
        )
        shared = plan.shared
        products = plan.chunks * (plan.M // 16) * 2 * (plan.tile // 8)
        loads = plan.chunks * (plan.M // 16) * 2
    built = build(text, kinds(arguments), warps, capability)
    file = tmp_path / "kernel.cubin"
    file.write_bytes(built.cubin)
    (used,) = re.findall(
        r"REG:(\d+) STACK:(\d+) SHARED:(\d+) LOCAL:(\d+)", tool("cuobjdump", file, "-res-usage")
    )
    registers, stack, static_shared, local = map(int, used)
    assert stack == local == 0
    assert registers * 32 * warps <= 65536 and registers <= 255
    assert static_shared + shared <= shared_per_block
    code = tool("nvdisasm", file, "-c")
    count = lambda instruction: len(re.findall(rf"\b{instruction}\b", code))
    assert count("HMMA") == products * (3 if precision == "float32" else 1)
    assert count("LDL") == count("STL") == count("MEMBAR") == count("CCTL") == 0
    # The weights are loaded before the first step looks for another block's words, and not again.
    before = code[: re.search(r"LDG\.E\.128\.STRONG\.GPU", code).start()]
    assert len(re.findall(r"LDG\.E\.128\.CONSTANT", before)) >= loads


def test_built_once_and_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Machine code comes from the cache the second time; a damaged file is compiled anew."""
    from numlstm.kernels.cuda.persistent import compile as module

    monkeypatch.setenv("NUMLSTM_CACHE_DIR", str(tmp_path))
    plan = choose(cells.elman(), 1, 16, precision="bfloat16", sms=8)
    assert isinstance(plan, Plan)
    options = Options(training=False)
    text, arguments = forward_text(cells.elman(), plan, options), forward_arguments(cells.elman(), options)
    asked = (text, module.kinds(arguments), plan.warps, (9, 0))
    module.build.cache_clear()
    first = module.build(*asked)
    (file,) = tmp_path.iterdir()
    module.build.cache_clear()
    monkeypatch.setattr(module, "_ptx", lambda *_: pytest.fail("compiled again"))
    assert module.build(*asked) == first
    monkeypatch.undo()
    monkeypatch.setenv("NUMLSTM_CACHE_DIR", str(tmp_path))
    file.write_bytes(file.read_bytes()[:-1])
    module.build.cache_clear()
    whole = len(file.read_bytes())
    assert module.build(*asked).cubin[:4] == first.cubin[:4] == b"\x7fELF"
    assert len(file.read_bytes()) > whole


def test_the_emulator_has_every_name() -> None:
    from numlstm.kernels.cuda import ptx

    made_by_the_warp = {"publish1", "publish2", "publish4"}
    own = {"float32", "uint32", "K"}
    assert set(ptx.__all__) == (set(emulator.NAMES) - own) | made_by_the_warp
    assert ptx.ABSENT == emulator.ABSENT
