"""What a user waits for before training starts, and what the library takes on disk.

`python -m benchmarks.startup` measures, each in processes of their own and as medians of several: importing
numlstm (and numba alone, for comparison); the first fit of LSTM(50) + Dense(1) with empty kernel caches; a
second process from `import` to the end of the first epoch; peak memory; installed size, beside PyTorch's
where that is installed. These are absolute times, so the goals hold for the machine they name; results go to
`benchmarks/results/startup.json`.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import importlib.util
import json
import os
import re
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from benchmarks import common

GOALS = {"import": 0.8, "first_fit": 6.0, "second_run": 1.3}

IMPORT = """
import time
t = time.perf_counter()
import {module}
print('{{"seconds": %f}}' % (time.perf_counter() - t))
"""

# what a user's script does, timed from its first line; the interpreter's own start is outside
FIT = """
import time
start = time.perf_counter()
import numlstm as nl
imported = time.perf_counter()
import json
import numpy as np
draw = np.random.default_rng(0)
x, y = draw.standard_normal((1024, 20, 1), np.float32), draw.standard_normal((1024, 1), np.float32)
model = nl.Sequential([nl.LSTM(50, input_shape=(20, 1)), nl.Dense(1)])
model.compile(optimizer="adam", loss="mse")
model.fit(x, y, epochs=1, batch_size=32, verbose=0)
first = time.perf_counter()
model.fit(x, y, epochs=1, batch_size=32, verbose=0)
second = time.perf_counter()
try:
    import resource, sys
    unit = 2**20 if sys.platform == "darwin" else 2**10  # bytes there, KiB on Linux
    memory = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / unit
except ImportError:
    memory = None
print(json.dumps({"import": imported - start, "fit": first - imported, "seconds": first - start,
                  "second_epoch": second - first, "memory_mib": memory}))
"""


def python(code: str, **environment: str) -> dict[str, Any]:
    """Run `code` in a fresh interpreter and read the JSON it prints last."""
    done = subprocess.run(
        [sys.executable, "-c", code],
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
    )
    if done.returncode:
        raise RuntimeError(f"a measured process failed:\n{done.stderr.strip()}")
    return json.loads(done.stdout.strip().splitlines()[-1])


def median_of(runs: list[dict[str, Any]]) -> dict[str, Any]:
    """The medians of each value, and all runs of `seconds` for the reader to judge the spread."""
    found: dict[str, Any] = {
        key: statistics.median(r[key] for r in runs) for key in runs[0] if runs[0][key] is not None
    }
    return {**found, "runs": sorted(r["seconds"] for r in runs)}


def waits(several: int) -> dict[str, Any]:
    """Import, first fit with empty caches, second process with filled ones."""
    python(IMPORT.format(module="numlstm"))  # reads the disk once, writes missing bytecode
    found = {
        "import": median_of([python(IMPORT.format(module="numlstm")) for _ in range(several)]),
        "import_numba": median_of([python(IMPORT.format(module="numba")) for _ in range(several)]),
    }
    cold, warm = [], []
    for _ in range(max(3, several // 2)):
        with tempfile.TemporaryDirectory() as empty:
            caches = {"NUMLSTM_CACHE_DIR": empty, "NUMBA_CACHE_DIR": empty}
            cold.append(python(FIT, **caches))
            warm += [python(FIT, **caches) for _ in range(2)]
    return {**found, "first_fit": median_of(cold), "second_run": median_of(warm)}


# ------------------------------------------------------------------------------------ installed size


def requirements(package: str) -> set[str]:
    """`package` and everything it needs at run time, as installed here."""
    found: set[str] = set()
    waiting = [package]
    while waiting:
        name = re.sub(r"[-_.]+", "-", waiting.pop()).lower()
        if name in found or common.version(name) is None:
            continue
        found.add(name)
        for line in importlib.metadata.requires(name) or []:
            if "extra ==" not in line:
                waiting.append(re.split(r"[^A-Za-z0-9._-]", line, maxsplit=1)[0])
    return found


def tree_bytes(folder: Path) -> int:
    return sum(f.stat().st_size for f in folder.rglob("*") if f.is_file() and "__pycache__" not in f.parts)


def installed_bytes(package: str) -> int:
    """Bytes of the files that `package` installed. An editable numlstm is counted where its sources lie."""
    if package == "numlstm":
        places: set[Path] = set()
        for module in ("numlstm", "numlstm.kernels"):
            spec = importlib.util.find_spec(module)
            places |= {Path(p).resolve() for p in (spec.submodule_search_locations or [] if spec else [])}
        inner = {p for p in places if any(o != p and o in p.parents for o in places)}
        return sum(tree_bytes(p) for p in places - inner)
    total = 0
    for entry in importlib.metadata.files(package) or []:
        path = Path(str(entry.locate()))
        if path.is_file() and path.suffix != ".pyc":  # bytecode depends on what was imported so far
            total += path.stat().st_size
    return total


def sizes() -> dict[str, Any]:
    """MB on disk: each package that numlstm needs, their sum, and PyTorch's where it is installed."""
    found: dict[str, Any] = {}
    for package in ("numlstm", "torch"):
        if common.version(package) is None:
            continue
        parts = {name: installed_bytes(name) / 1e6 for name in requirements(package)}
        parts = dict(sorted(parts.items(), key=lambda item: -item[1]))
        found[package] = {"total_mb": sum(parts.values()), "parts_mb": parts}
    return found


# -------------------------------------------------------------------------------------------- the table


def lines(report: dict[str, Any]) -> list[str]:
    about, times = report["machine"], report["times"]
    ceiling = report["peaks"]["1"]
    said = [
        f"{about['cpu']}, {about['cores']} cores, load {about['load']}, one core's FMA peak "
        f"{ceiling['fma_gflops']:.0f} GFLOP/s, reading memory {ceiling['memory_gbytes']:.0f} GB/s",
        ", ".join(f"{k} {v}" for k, v in about["packages"].items()) + f", Python {about['python']}",
        "",
        f"{'medians, seconds':52}{'time':>7}{'goal':>7}",
    ]
    first, second = times["first_fit"], times["second_run"]
    rows = [
        ("import numlstm", times["import"]["seconds"], "import"),
        ("(import numba alone)", times["import_numba"]["seconds"], None),
        ("first run, empty caches: import to end of epoch 1", first["seconds"], "first_fit"),
        ("  of which fit, compilation included", first["fit"], None),
        ("second process: import to end of epoch 1", second["seconds"], "second_run"),
        ("  of which fit", second["fit"], None),
        ("a further epoch (1,024 rows of 20 steps)", second["second_epoch"], None),
    ]
    for name, seconds, goal in rows:
        verdict = (
            "" if goal is None else f"{GOALS[goal]:>7.1f}  {'met' if seconds <= GOALS[goal] else 'MISSED'}"
        )
        said.append(f"{name:52}{seconds:>7.2f}{verdict}")
    if "memory_mib" in second:
        said.append(
            f"peak memory: first run {first['memory_mib']:.0f} MiB, second {second['memory_mib']:.0f} MiB"
        )
    said.append("")
    for package, size in report["sizes"].items():
        largest = ", ".join(f"{name} {mb:.1f}" for name, mb in list(size["parts_mb"].items())[:5])
        said.append(f"installed, {package} and what it needs: {size['total_mb']:.0f} MB ({largest}, ...)")
    if "torch" not in report["sizes"]:
        said.append("PyTorch is not installed here, so its size is not shown")
    else:
        said.append(f"numlstm alone: {report['sizes']['numlstm']['parts_mb']['numlstm']:.1f} MB")
    return said


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.startup", description=__doc__.split("\n\n")[0]
    )
    parser.add_argument("--json", action="store_true", help="print the report as JSON instead of lines")
    parser.add_argument("--runs", type=int, default=7, help="processes for each import time (default 7)")
    parser.add_argument("--out", type=Path, default=common.RESULTS, help="folder for startup.json")
    options = parser.parse_args(argv)
    if options.runs < 1:
        parser.error(f"--runs must be at least 1, got {options.runs}")
    report = {
        "what": "start-up of numlstm: medians in fresh processes, seconds",
        "machine": common.machine(),
        "peaks": common.peaks((1,)),
        "goals": GOALS,
        "times": waits(options.runs),
        "sizes": sizes(),
    }
    path = common.write_json(options.out / "startup.json", report)
    if options.json:
        print(json.dumps(common.plain(report), indent=1))
    else:
        print("\n".join(lines(report)))
        print(f"wrote {path}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
