"""Persistent kernels compiled for GPUs without one, through the code that a GPU runs, and the machine code read.

Every kernel that the dispatch table stands for was compiled once, and its figures stand in the ledger (shipped.py); here
SAMPLE of them, spread over the ledger and others each day, are compiled anew: no stack and no local memory (the weights stay
in registers), registers and shared memory within the machine's limits, as many matrix instructions as the plan says, no
memory barrier, the weights loaded before the first step; and what the ledger says.
"""

from __future__ import annotations

from datetime import date
from pathlib import Path

import emulator
import pytest
from shipped import faults, kernels, load

from numlstm.kernels import cells
from numlstm.kernels.cuda.persistent import Plan, choose
from numlstm.kernels.cuda.persistent.emit import Options, forward_arguments, forward_text

pytestmark = pytest.mark.gpu_compile

SAMPLE = 32


@pytest.mark.parametrize("number", range(SAMPLE))
def test_a_shipped_kernel(number: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As many registers as recorded, if it was with these compilers; whatever they are, as many matrix instructions."""
    from machine_code import compiled, versions

    monkeypatch.setenv("NUMLSTM_CACHE_DIR", "")
    every = kernels()
    apart = -(-len(every) // SAMPLE)  # so that in as many days each has had its turn
    digest = list(every)[(number * apart + date.today().toordinal() % apart) % len(every)]
    kernel, ledger = every[digest], load()
    found, (_, recorded) = compiled(kernel, tmp_path), ledger.lines[digest]
    assert not faults(kernel, found)
    assert found.hmma == recorded.hmma, kernel.name
    if ledger.compilers == versions():
        assert found == recorded, kernel.name


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
