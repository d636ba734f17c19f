"""Compile every shipped persistent kernel, hold its machine code to its limits, and keep the figures in compiled.json.

Run `python tests/gpu/record_compiled.py` with numlstm[gpu-test] installed, after a kernel's text, the dispatch table or the
code that compiles has changed; no GPU is needed. `--jobs N` compiles N at once. What is in the ledger with its present
digest, of the same compilers, is kept; `--again` compiles all. A run that was stopped goes on where it was: each kernel's
figures go to compiled.part as they come. Where a kernel breaks a limit, the faults are printed and the ledger is not
written.
"""

from __future__ import annotations

import argparse
import gc
import itertools
import json
import multiprocessing
import os
import sys
import tempfile
import time
from pathlib import Path

from shipped import LEDGER, Figures, Kernel, Ledger, faults, kernels, load, written

from numlstm.io.atomic import write_text

PART = LEDGER.with_suffix(".part")
A_PROCESS = 100  # compilations, as Numba forgets nothing
A_COLLECTION = 10  # compilations: looking for garbage on the way is a fifth of their time
_count = itertools.count(1)


def measured(kernel: Kernel) -> tuple[Figures, float]:
    """A kernel's figures, from the compilers and not from the cache, and the seconds of processor time that they took."""
    os.environ["NUMLSTM_CACHE_DIR"] = ""
    from machine_code import compiled

    gc.disable()
    if next(_count) % A_COLLECTION == 0:
        gc.collect()
    with tempfile.TemporaryDirectory() as folder:
        start = time.process_time()
        return compiled(kernel, Path(folder)), time.process_time() - start


def known(compilers: dict[str, str], again: bool) -> dict[str, Figures]:
    """Figures by digest that need no compilation."""
    found: dict[str, Figures] = {}
    ledger = load()
    if ledger.compilers == compilers and not again:
        found |= {d: figures for d, (_, figures) in ledger.lines.items()}
    if PART.exists():
        for line in PART.read_text(encoding="utf-8").split("\n"):
            try:
                version, d, *figures = json.loads(line)
            except ValueError:  # the line at which the run was stopped
                continue
            if version == compilers:
                found[d] = Figures(*figures)
    return found


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--jobs", type=int, default=1, help="how many are compiled at once (default 1)")
    parser.add_argument("--again", action="store_true", help="compile also what the ledger has")
    options = parser.parse_args()
    from machine_code import versions

    compilers, wanted = versions(), kernels()
    figures = known(compilers, options.again)
    todo = [d for d in wanted if d not in figures]
    print(f"{len(wanted)} kernels, of which {len(todo)} are to be compiled", flush=True)
    spawn, start, cost = multiprocessing.get_context("spawn"), time.perf_counter(), 0.0
    with (
        spawn.Pool(options.jobs, maxtasksperchild=A_PROCESS) as pool,
        PART.open("a", encoding="utf-8") as part,
    ):
        for k, (d, (found, took)) in enumerate(
            zip(todo, pool.imap(measured, [wanted[d] for d in todo]), strict=True), 1
        ):
            figures[d], cost = found, cost + took
            part.write(json.dumps([compilers, d, *found]) + "\n")
            part.flush()
            left = (time.perf_counter() - start) / k * (len(todo) - k)
            end = "\n" if k % 25 == 0 or k == len(todo) or not sys.stdout.isatty() else "\r"
            if end == "\r" or k % 25 == 0 or k == len(todo):
                print(
                    f"{k} of {len(todo)}, {cost / k:.1f} s each, {left / 60:.0f} minutes left ",
                    end=end,
                    flush=True,
                )
            for fault in faults(wanted[d], found):
                print(fault, flush=True)
    bad = [fault for d, kernel in wanted.items() for fault in faults(kernel, figures[d])]
    if bad:
        print(f"{len(bad)} faults; {LEDGER.name} is not written:", *bad, sep="\n")
        return 1
    write_text(LEDGER, written(Ledger(compilers, {d: (k.name, figures[d]) for d, k in wanted.items()})))
    PART.unlink()
    print(f"{len(wanted)} kernels in {LEDGER.name}, {LEDGER.stat().st_size / 1e3:.0f} kB")
    return 0


if __name__ == "__main__":
    sys.exit(main())
