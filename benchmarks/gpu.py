"""numlstm against cuDNN on one GPU: correctness first, then what binds, then the ratios, in one command.

`python -m benchmarks.gpu` takes under ten minutes and needs a CUDA device, CuPy, numba-cuda and PyTorch. Each of its
sections, which `--only` selects, is a process of its own with a time limit, so that a kernel that hangs or a crash costs
one section and not the run, and the report is written anew after each:

- machine: device, driver, versions, clocks; what a launch, a copy and a matrix product cost;
- kernels: the persistent kernels of all that follows, compiled on all cores into the kernels' cache;
- tests: the project's own tests that need a device;
- correct: cells, options and precisions on the device against the float64 reference; where compute-sanitizer is found (PATH,
  CUDA_HOME, or `pip install nvidia-cuda-sanitizer-api`), a sequence by each way to run one under memcheck, racecheck and
  synccheck, as far as 25 seconds go;
- protocol: 1,000 runs of the persistent kernels' exchange, each compared with the first bit by bit; what one step costs;
- table: inference and training (forward and backward) against `torch.nn.LSTM` and `nn.GRU`, A B A B, by events;
- options: masks, lengths, dropout, zoneout and peepholes over the plain layer's time, cuDNN's packed input beside them;
- learning: tiny Shakespeare on the GPU and on the CPU, to the same loss.

A ratio below 1 means that we are faster. `floor` is what the cost model of docs/decisions.md gives from this run's own
bandwidth and products with the hardest assumption, an exchange of 0.7 microseconds a step. Results go to
`benchmarks/results/gpu-<device>.json` and `.png`. `--simulate` runs every section in Numba's simulator on tiny shapes, with
no peer: it shows that the script is whole, and its times mean nothing.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from benchmarks import common

SECTIONS = {  # and how many seconds each may take
    "machine": 40,
    "kernels": 75,
    "tests": 130,
    "correct": 60,
    "protocol": 45,
    "table": 150,
    "options": 50,
    "learning": 45,
}
GOALS = {  # of a ratio to cuDNN's time; see `goal_of`
    "small batch, forward": 0.5,
    "small batch, training": 0.7,
    "float32": 0.8,
    "elsewhere": 1.0,
    "options": 1.3,
}


def section_list(text: str) -> list[str]:
    """The value of --only: names of sections, in the order that they run in."""
    names = text.split(",")
    if unknown := [n for n in names if n not in SECTIONS]:
        raise argparse.ArgumentTypeError(f"expected some of {','.join(SECTIONS)}, got {','.join(unknown)}")
    return [n for n in SECTIONS if n in names]


def goal_of(row: dict[str, Any]) -> float:
    """The greatest ratio that was aimed at for a row of the table."""
    _, batch, units = row["shape"]
    if not (192 < units <= 1024 and batch <= 64):
        return GOALS["elsewhere"]
    if row["precision"] == "float32":
        return GOALS["float32"]
    return GOALS["small batch, forward" if row["mode"] == "inference" else "small batch, training"]


def run_section(name: str, simulate: bool, seconds: float, say: Any) -> dict[str, Any]:
    """What a section found, run in a process of its own: its report, and how it ended if not well."""
    environment = dict(os.environ)
    if simulate:
        environment["NUMBA_ENABLE_CUDASIM"] = "1"
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "section.json"
        command = [sys.executable, "-m", "benchmarks.gpu_sections", name, str(out)]
        started = time.perf_counter()
        process = subprocess.Popen(command, env=environment, cwd=common.RESULTS.parents[1])
        try:
            status: int | None = process.wait(seconds)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
            status = None
        found: dict[str, Any] = {}
        if out.exists():  # written whole after every measurement
            found = json.loads(out.read_text(encoding="utf-8"))
        found["seconds"] = time.perf_counter() - started
    if status is None:
        found["failed"] = f"stopped after {seconds:.0f} s; what it had by then is here"
    elif status:
        found["failed"] = f"ended with status {status}"
    if "failed" in found:
        say(f"{name}: {found['failed']}")
    return found


def summary(report: dict[str, Any]) -> list[dict[str, Any]]:
    """Geometric mean and worst ratio of the table's rows by what was aimed at, and the options' worst."""
    groups: dict[tuple[str, str, float], list[dict[str, Any]]] = {}
    for row in report.get("table", {}).get("rows", []):
        if row.get("ratio") is not None:
            groups.setdefault((row["precision"], row["mode"], goal_of(row)), []).append(row)
    found = []
    for (precision, mode, goal), rows in sorted(groups.items()):
        worst = max(rows, key=lambda r: r["ratio"])
        found.append(
            {
                "precision": precision,
                "mode": mode,
                "goal": goal,
                "rows": len(rows),
                "geometric_mean": common.geometric_mean(r["ratio"] for r in rows),
                "worst": worst["ratio"],
                "worst_row": worst["label"],
                "met": worst["ratio"] <= goal,
            }
        )
    rows = [r for r in report.get("options", {}).get("rows", []) if r.get("ratio") is not None]
    if rows:
        worst = max(rows, key=lambda r: r["ratio"])
        found.append(
            {
                "precision": "any",
                "mode": "options over plain",
                "goal": GOALS["options"],
                "rows": len(rows),
                "geometric_mean": common.geometric_mean(r["ratio"] for r in rows),
                "worst": worst["ratio"],
                "worst_row": worst["label"],
                "met": worst["ratio"] <= GOALS["options"],
            }
        )
    return found


def file_name(report: dict[str, Any]) -> str:
    """gpu-<device>, in small letters."""
    device = report.get("machine", {}).get("device", "unknown")
    return "gpu-" + re.sub(r"[^a-z0-9]+", "-", device.lower()).strip("-")


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.gpu", description=__doc__.split("\n\n")[0])
    parser.add_argument("--json", action="store_true", help="print the report as JSON instead of lines")
    parser.add_argument("--only", type=section_list, help=f"some of {','.join(SECTIONS)}")
    parser.add_argument("--simulate", action="store_true", help="tiny shapes in Numba's simulator, no times")
    parser.add_argument("--out", type=Path, help="folder for the results (default benchmarks/results)")
    options = parser.parse_args(argv)
    say = common.speaker(options.json)
    if not options.simulate:
        from numlstm.backend import backends

        if (reason := backends()["cuda"]) is not None:
            parser.error(f"the CUDA backend can't be used: {reason}")
    sections = options.only or list(SECTIONS)
    whole = sections == list(SECTIONS) and not options.simulate
    folder = options.out or (common.RESULTS if whole else None)
    report: dict[str, Any] = {
        "what": "numlstm against cuDNN (torch.nn) on one GPU; ratio = our time over theirs",
        "host": common.machine(),
        "simulated": options.simulate,
    }
    for name in sections:
        say(f"-- {name}")
        # On one core of a slow machine the simulator takes longer than a GPU; it is stopped all the same.
        report[name] = run_section(
            name, options.simulate, SECTIONS[name] * (3 if options.simulate else 1), say
        )
        for line in report[name].get("lines", []):
            say(line)
        report["summary"] = summary(report)
        if folder:
            common.write_json(folder / f"{file_name(report)}.json", report)
    for s in report["summary"]:
        say(
            f"{s['precision']:9} {s['mode']:18} geometric mean {s['geometric_mean']:.2f}, worst {s['worst']:.2f} "
            f"at {s['worst_row']} (goal {s['goal']}: {'met' if s['met'] else 'MISSED'}), {s['rows']} rows"
        )
    from benchmarks.gpu_picture import picture

    common.deliver(file_name(report), report, picture, whole=whole, out=options.out, as_json=options.json)
    return int(any("failed" in report[name] for name in sections))


if __name__ == "__main__":
    sys.exit(main())
