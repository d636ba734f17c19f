"""The ledger of compiled kernels held to the dispatch table, the kernels' text and the compiling code as they are now: who
changes one of them compiles all kernels (record_compiled.py). No compiler is needed here."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path
from types import SimpleNamespace

import pytest
import shipped
from shipped import Figures, Kernel, code_of, configurations, digest, faults, kernels, load, written

RECORD = "run `python tests/gpu/record_compiled.py` (needs numlstm[gpu-test], no GPU)"


def test_every_shipped_kernel_was_compiled_as_it_is_now() -> None:
    wanted, held = kernels(), load().lines
    missing = [kernel.name for d, kernel in wanted.items() if d not in held]
    assert not missing, f"{len(missing)} of {len(wanted)} kernels were not compiled: {RECORD}; {missing[:9]}"
    stale = [name for d, (name, _) in held.items() if d not in wanted]
    assert not stale, f"{len(stale)} lines of the ledger are no kernel's any more: {RECORD}; {stale[:9]}"
    wrong = [fault for d, kernel in wanted.items() for fault in faults(kernel, held[d][1])]
    assert not wrong, "\n".join(wrong[:9])
    assert [name for name, _ in held.values()] == [kernel.name for kernel in wanted.values()]


def test_what_is_shipped() -> None:
    """Both machines, both cells of the table and others beside, every precision, one direction and two."""
    names = [name for name, *_ in configurations()]
    assert len(names) == len(set(names)) > 400
    words = Counter(word for name in names for word in name.replace("two directions", "two").split())
    assert all(
        words[w] > 100 for w in ("sm_80", "sm_90a", "bfloat16", "tf32", "float32", "lstm", "gru", "two")
    )
    assert all(words[w] > 1 for w in ("elman", "slstm", "lstm_peephole_zoneout", "H=1024", "H=128"))
    found = kernels()
    ways = Counter(kernel.name.partition(", ")[2] for kernel in found.values())
    assert set(ways) == {f"{o} {w}" for o in ("plain", "all options") for w in ("forward", "backward")} | {
        "inference"
    }
    assert min(ways.values()) > 150


def some() -> Kernel:
    return next(iter(kernels().values()))


def test_a_digest_is_of_all_that_makes_machine_code(monkeypatch: pytest.MonkeyPatch) -> None:
    kernel = some()
    whole = digest(kernel)
    others = [
        kernel._replace(text=kernel.text + "\n"),
        kernel._replace(arguments=kernel.arguments + "i"),
        kernel._replace(warps=kernel.warps + 1),
        kernel._replace(capability=(8, 6)),
    ]
    assert len({whole, *map(digest, others)}) == 5
    assert digest(kernel._replace(name="another", products=0)) == whole
    compiling = shipped._compiling()
    assert "mma.sync" in compiling and "def polled" in compiling and "launch_bounds" in compiling
    assert "LinkerOptions(arch=" in compiling and "def kept" not in compiling
    monkeypatch.setattr(shipped, "_compiling", lambda: compiling + "\n")
    assert digest(kernel) != whole


def test_comments_and_docstrings_make_no_machine_code() -> None:
    plain = 'def f(a):\n    x = f"{a}#{{}}"\n    return x\n'
    told = '"""Two\nlines."""\n# why\n\ndef f(a):\n    """What."""\n    x = f"{a}#{{}}"  # because\n\n    return x\n'
    assert code_of(told) == code_of(plain) == plain.rstrip()
    assert code_of(plain.replace("#", "")) != code_of(plain)


GOOD = Figures(255, 0, 0, 1024, 64, 0, 0, 32)


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"registers": 256}, "at most 255 registers, for 256 threads"),
        ({"stack": 8}, "no stack"),
        ({"local": 4}, "no local memory"),
        ({"spills": 1}, "no local memory"),
        ({"fences": 1}, "no memory barrier"),
        ({"shared": 2048}, "at most 4096 bytes of shared memory with the launch's 3000"),
        ({"hmma": 63}, "64 matrix instructions"),
        ({"loads": 31}, "32 loads of weights before the first step"),
    ],
)
def test_each_fault_is_named(change: dict[str, int], says: str) -> None:
    kernel = Kernel("k", "", "", 8, (9, 0), 3000 + 72, 4096, 64, 32)._replace(shared=3000)
    assert faults(kernel, GOOD) == []
    (fault,) = faults(kernel, GOOD._replace(**change))
    assert fault.startswith(f"k: expected {says}, got Figures(")


def test_a_recording_goes_on_and_refuses_faults(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """A compiler stands in that gives figures; what a stopped run had compiled is not compiled again, and a fault leaves
    the ledger as it was."""
    import machine_code
    import record_compiled as record

    every = list(kernels().items())[:3]
    good = {d: Figures(99, 0, 0, 0, kernel.products, 0, 0, kernel.loads) for d, kernel in every}
    asked: list[str] = []

    class Pool:
        def __init__(self, *_: object, **__: object) -> None: ...
        def __enter__(self) -> Pool:
            return self

        def __exit__(self, *_: object) -> None: ...

        @staticmethod
        def imap(_: object, todo: list[Kernel]) -> list[tuple[Figures, float]]:
            names = [digest(kernel) for kernel in todo]
            asked.extend(names)
            return [(good[d], 1.0) for d in names]

    for module in (shipped, record):
        monkeypatch.setattr(module, "LEDGER", tmp_path / "compiled.json")
    monkeypatch.setattr(record, "PART", tmp_path / "compiled.part")
    monkeypatch.setattr(record.multiprocessing, "get_context", lambda _: SimpleNamespace(Pool=Pool))
    monkeypatch.setattr(record, "kernels", lambda: dict(every))
    monkeypatch.setattr(machine_code, "versions", lambda: {"compiler": "1"})
    monkeypatch.setattr("sys.argv", ["record_compiled.py"])
    first = every[0][0]
    line = json.dumps([{"compiler": "1"}, first, *good[first]])
    record.PART.write_text(line + "\n" + line[:-9])  # stopped at its second line
    assert record.main() == 0
    assert asked == [d for d, _ in every[1:]] and not record.PART.exists()
    assert load().lines == {d: (kernel.name, good[d]) for d, kernel in every}
    assert record.LEDGER.read_text() == written(load())
    asked.clear()
    assert record.main() == 0 and asked == []  # all there
    monkeypatch.setattr(machine_code, "versions", lambda: {"compiler": "2"})
    good[first] = good[first]._replace(stack=8)
    before = record.LEDGER.read_text()
    assert record.main() == 1 and asked == [d for d, _ in every]
    assert record.LEDGER.read_text() == before
    assert "1 faults; compiled.json is not written" in capsys.readouterr().out
