"""NVIDIA's compute-sanitizer on a few of our kernels: memory accesses, shared memory without a barrier, barriers' misuse.

`check` finds the tool and runs this module under it once for each of TOOLS, as far as its time goes. `main` is what runs:
one sequence by tier 0 and one by the persistent kernels, forward and backward, at the shape that benchmarks.gpu compares
with the reference, so that the kernels are compiled by then, and of few steps: a persistent kernel's blocks look for each
other's words again and again, and the tool looks at every look. A tool that is not there is said and is no error.
"""

from __future__ import annotations

import importlib.util
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any, NamedTuple

NAME = "compute-sanitizer"
TOOLS = ("memcheck", "racecheck", "synccheck")  # in order of what they may find here
FOUND_SOME = 86  # the exit status that it is asked for where it finds something
STEPS = 3


class Verdict(NamedTuple):
    """How a tool's run ended: "ran", "failed" or "timed out", and its last summary, or what there is in its place."""

    tool: str
    outcome: str
    closing: str
    findings: list[str]


def find() -> str | None:
    """The tool's path: on the PATH, in a CUDA toolkit (CUDA_HOME, CUDA_PATH), or in its wheel, nvidia-cuda-sanitizer-api."""
    if (found := shutil.which(NAME)) is not None:
        return found
    homes = [Path(os.environ[name]) for name in ("CUDA_HOME", "CUDA_PATH") if os.environ.get(name)]
    folders = [home / place for home in homes for place in ("bin", NAME)]
    spec = importlib.util.find_spec("nvidia")
    for place in (spec.submodule_search_locations or []) if spec else []:
        folders += sorted(p for kind in ("bin", NAME) for p in Path(place).glob(f"*/{kind}"))
    for folder in folders:
        if (found := shutil.which(NAME, path=str(folder))) is not None:
            return found
    return None


def verdict(tool: str, status: int, output: str) -> Verdict:
    """What a run's output says; the tool's own lines begin with equals signs."""
    own = [line.lstrip("= ").rstrip() for line in output.splitlines() if line.startswith("=========")]
    summaries = [line for line in own if re.match(r"(ERROR|RACECHECK) SUMMARY:", line)]
    told = [line for line in output.splitlines() if line.strip()]
    closing = summaries[-1] if summaries else (told[-1].strip() if told else f"status {status}, no output")
    clean = bool(summaries) and all(re.search(r"SUMMARY: 0 ", line) for line in summaries)
    if status == 0 and clean:
        return Verdict(tool, "ran", closing, [])
    findings = [line for line in own if line and line not in summaries][:40]
    if not summaries:  # it did not come to its end: the program's last words are the reason
        findings += told[-10:]
    return Verdict(tool, "failed", closing, findings)


def run(path: str, tool: str, command: list[str], seconds: float) -> Verdict:
    """One tool over a command, stopped with all that it started after some seconds."""
    arguments = [
        path,
        "--tool",
        tool,
        "--error-exitcode",
        str(FOUND_SOME),
        "--report-api-errors",
        "no",
        *command,
    ]
    process = subprocess.Popen(
        arguments, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, errors="replace", start_new_session=True
    )  # fmt: skip
    try:
        output, _ = process.communicate(timeout=seconds)
    except subprocess.TimeoutExpired:
        if hasattr(os, "killpg"):
            os.killpg(process.pid, signal.SIGKILL)
        else:
            process.kill()
        process.communicate()
        return Verdict(tool, "timed out", f"stopped after {seconds:.0f} s", [])
    return verdict(tool, process.returncode, output)


def check(seconds: float, command: list[str] | None = None) -> dict[str, Any]:
    """The report: the tool's path or None, and a verdict for each of TOOLS for which there was time; a line for people.

    Arguments:
        seconds: for all of them together. command: in place of this module.
    """
    path, end = find(), time.monotonic() + seconds
    if path is None:
        where = "not on the PATH, in CUDA_HOME or as nvidia-cuda-sanitizer-api"
        return {"path": None, "runs": [], "line": f"{NAME}: absent ({where})"}
    runs: list[Verdict] = []
    for tool in TOOLS:
        left = end - time.monotonic()
        if left < 1:
            runs.append(Verdict(tool, "timed out", "no time was left for it", []))
        else:
            runs.append(run(path, tool, command or [sys.executable, "-m", __name__], left))
    line = "; ".join(f"{r.tool} {r.outcome}: {r.closing}" for r in runs)
    return {"path": path, "runs": [r._asdict() for r in runs], "line": f"{NAME}: {line}"}


def main() -> int:
    import cupy
    import numpy as np

    from benchmarks.gpu_layers import CORRECT_SHAPE, Question, numbers
    from numlstm.kernels.cuda import steps
    from numlstm.kernels.cuda.persistent import on_device

    _, B, H = CORRECT_SHAPE
    (call,) = numbers(Question((STEPS, B, H), "lstm", 1, "bfloat16"))
    places = [cupy.asarray(a) if isinstance(a, np.ndarray) else a for a in call.values()]
    dh = cupy.ones((STEPS, B, H), np.float32)
    persistent = on_device(cupy.cuda.get_device_id())
    for way in (steps, persistent):
        out = way.forward(*places, training=True, precision="bfloat16")
        found = way.backward(out.residual, dh, (None, None))
        assert bool(cupy.isfinite(found.kernel).all()), way
    persistent.device.finish()
    cupy.cuda.get_current_stream().synchronize()
    return 0


if __name__ == "__main__":
    sys.exit(main())
