"""benchmarks.gpu without a GPU: goals, summary, names, picture, sections that fail, and the kernels it will compile."""

from __future__ import annotations

import argparse
import json
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest


@pytest.fixture(autouse=True)
def root(monkeypatch: pytest.MonkeyPatch) -> Path:
    """The repository on the path: benchmarks/ is not part of the installed library."""
    folder = Path(__file__).parents[1]
    monkeypatch.syspath_prepend(folder)
    return folder


def row(
    shape=(512, 32, 512), cell="lstm", directions=1, precision="bfloat16", mode="inference", ratio=0.4, **more
):
    from benchmarks.gpu import goal_of

    place = f"{','.join(map(str, shape))} {cell}{' bi' if directions == 2 else ''}"
    made = {
        "shape": shape, "cell": cell, "directions": directions, "precision": precision, "mode": mode, "ratio": ratio,
        "place": place, "label": f"{place} {precision} {mode}", "tier": "persistent: one launch",
    }  # fmt: skip
    return made | {"goal": goal_of(made)} | more


def made_up() -> dict:
    """A report as a device would give it, with ratios on both sides of 1."""
    draw = np.random.default_rng(0)
    rows = [
        row(shape, cell, directions, precision, mode, float(draw.uniform(0.2, 1.4)), tier=tier)
        for shape, tier in [
            ((512, 32, 512), "persistent: one launch"),
            ((128, 64, 2048), "steps: a product a step"),
        ]
        for cell in ("lstm", "gru")
        for directions in (1, 2)
        for precision in ("float32", "bfloat16")
        for mode in ("inference", "training")
    ]
    return {"machine": {"device": "NVIDIA H200"}, "table": {"rows": [*rows, row(ratio=None)]}}


@pytest.mark.parametrize(
    ("given", "goal"),
    [
        ({}, 0.5),
        ({"mode": "training"}, 0.7),
        ({"precision": "tf32"}, 0.5),
        ({"precision": "float32"}, 0.8),
        ({"shape": (200, 64, 1024), "precision": "float32", "mode": "training"}, 0.8),
        ({"shape": (784, 128, 128)}, 1.0),
        ({"shape": (256, 65, 1024)}, 1.0),
        ({"shape": (9, 9, 192)}, 1.0),
        ({"shape": (128, 64, 2048), "precision": "float32"}, 1.0),
    ],
)
def test_goals(given, goal):
    assert row(**given)["goal"] == goal


def test_the_summary_names_the_worst_row_of_each_goal():
    from benchmarks.gpu import summary

    rows = [row(ratio=0.25), row((100, 64, 256), ratio=1.0), row((784, 128, 128), ratio=0.9), row(ratio=None)]
    options = [{"label": "mask", "ratio": 1.2}, {"label": "plain", "ratio": None}]
    far, near, over = summary({"table": {"rows": rows}, "options": {"rows": options}})
    assert (far["goal"], far["rows"], far["worst"], far["met"]) == (0.5, 2, 1.0, False)
    assert far["worst_row"] == "100,64,256 lstm bfloat16 inference" and far[
        "geometric_mean"
    ] == pytest.approx(0.5)
    assert (near["goal"], near["met"]) == (1.0, True)
    assert (over["mode"], over["worst_row"], over["met"]) == ("options over plain", "mask", True)
    assert summary({}) == []


def test_names_of_files_and_sections():
    from benchmarks.gpu import SECTIONS, file_name, section_list

    assert file_name(made_up()) == "gpu-nvidia-h200"
    assert file_name({}) == "gpu-unknown"
    assert section_list("table,machine") == ["machine", "table"]
    with pytest.raises(argparse.ArgumentTypeError, match=r"expected some of machine,.*, got speed"):
        section_list("machine,speed")
    assert sum(SECTIONS.values()) < 600  # seconds, of the whole run


def test_every_section_is_there():
    from benchmarks import gpu_sections
    from benchmarks.gpu import SECTIONS

    assert all(callable(getattr(gpu_sections, name)) for name in SECTIONS)


def test_a_section_that_fails_or_hangs_keeps_what_it_found(monkeypatch):
    from benchmarks import gpu

    said: list[str] = []
    source = "import json, sys, time; json.dump({'rows': [1]}, open(sys.argv[-1], 'w')); "
    for end, expected in [("", None), ("sys.exit(3)", "status 3"), ("time.sleep(60)", "stopped after 2 s")]:
        real = gpu.subprocess.Popen
        with monkeypatch.context() as patch:
            patch.setattr(
                gpu.subprocess, "Popen",
                lambda command, end=end, real=real, **how: real([sys.executable, "-c", source + end, command[-1]], **how),
            )  # fmt: skip
            found = gpu.run_section("machine", False, 2 if "sleep" in end else 60, said.append)
        assert found["rows"] == [1] and found["seconds"] > 0
        assert expected is None if "failed" not in found else expected in found["failed"]
    assert len(said) == 2 and all(line.startswith("machine: ") for line in said)


def test_without_a_device_it_says_why(capsys, monkeypatch):
    import numlstm.backend
    from benchmarks import gpu

    monkeypatch.setattr(numlstm.backend, "backends", lambda: {"cuda": "no NVIDIA driver (of this test)"})
    with pytest.raises(SystemExit) as stopped:
        gpu.main([])
    assert stopped.value.code == 2
    assert "the CUDA backend can't be used: no NVIDIA driver (of this test)" in capsys.readouterr().err


CLEAN = "========= COMPUTE-SANITIZER\nloss 3.2\n========= ERROR SUMMARY: 0 errors\n"
INVALID = (
    "========= COMPUTE-SANITIZER\n========= Invalid __global__ read of size 16 bytes\n"
    "=========     at kernel+0x1230\n========= ERROR SUMMARY: 2 errors\n"
)
HAZARD = (
    "========= COMPUTE-SANITIZER\n========= Error: Race reported between Write access and Read access\n"
    "========= RACECHECK SUMMARY: 1 hazard displayed (1 error, 0 warnings)\n"
)


@pytest.mark.parametrize(
    ("status", "output", "outcome", "closing", "first"),
    [
        (0, CLEAN, "ran", "ERROR SUMMARY: 0 errors", None),
        (0, CLEAN.replace("ERROR SUMMARY: 0 errors", "RACECHECK SUMMARY: 0 hazards displayed (0 errors, 0 warnings)"),
         "ran", "RACECHECK SUMMARY: 0 hazards displayed (0 errors, 0 warnings)", None),
        (86, INVALID, "failed", "ERROR SUMMARY: 2 errors", "COMPUTE-SANITIZER"),
        (0, INVALID, "failed", "ERROR SUMMARY: 2 errors", "COMPUTE-SANITIZER"),
        (86, HAZARD, "failed", "RACECHECK SUMMARY: 1 hazard displayed (1 error, 0 warnings)", "COMPUTE-SANITIZER"),
        (1, CLEAN, "failed", "ERROR SUMMARY: 0 errors", "COMPUTE-SANITIZER"),  # the program under it failed
        (0, "the tool can't attach\n", "failed", "the tool can't attach", "the tool can't attach"),
        (255, "", "failed", "status 255, no output", None),
    ],
)  # fmt: skip
def test_what_the_sanitizer_says(status, output, outcome, closing, first):
    from benchmarks.gpu_sanitizer import verdict

    found = verdict("memcheck", status, output)
    assert found[:3] == ("memcheck", outcome, closing)
    assert (found.findings or [None])[0] == first
    if output == INVALID:
        assert "Invalid __global__ read of size 16 bytes" in found.findings


def stand_in(folder: Path, body: str) -> Path:
    """A program in the sanitizer's place."""
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / "compute-sanitizer"
    path.write_text(f"#!{sys.executable}\nimport sys, time\n{body}\n")
    path.chmod(0o755)
    return path


@pytest.fixture
def nowhere(monkeypatch, tmp_path):
    """No sanitizer on this machine, whatever is installed; its wheel's place is under tmp_path / "wheel"."""
    from benchmarks import gpu_sanitizer

    for name in ("CUDA_HOME", "CUDA_PATH"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("PATH", str(tmp_path / "empty"))
    wheel = SimpleNamespace(submodule_search_locations=[str(tmp_path / "wheel")])
    monkeypatch.setattr(
        gpu_sanitizer.importlib.util, "find_spec", lambda name: wheel if name == "nvidia" else None
    )
    return gpu_sanitizer


@pytest.mark.skipif(
    sys.platform == "win32", reason="the stand-in is a script with a first line that names its interpreter"
)
def test_the_sanitizer_is_looked_for_in_its_places(nowhere, tmp_path, monkeypatch):
    absent = nowhere.check(5)
    assert absent["path"] is None and absent["runs"] == [] and "absent" in absent["line"]
    in_wheel = stand_in(tmp_path / "wheel" / "cu13" / "bin", "")
    assert nowhere.find() == str(in_wheel)
    in_toolkit = stand_in(tmp_path / "toolkit" / "bin", "")
    monkeypatch.setenv("CUDA_HOME", str(tmp_path / "toolkit"))
    assert nowhere.find() == str(in_toolkit)
    on_path = stand_in(tmp_path / "empty", "")
    assert nowhere.find() == str(on_path)


@pytest.mark.skipif(sys.platform == "win32", reason="as above")
def test_the_sanitizer_runs_each_tool_in_the_time_there_is(nowhere, tmp_path):
    body = f"""
tool = sys.argv[sys.argv.index('--tool') + 1]
assert sys.argv[-2:] == ['python', 'program'] and '--error-exitcode' in sys.argv
if tool == 'memcheck':
    print({CLEAN!r})
elif tool == 'racecheck':
    print({HAZARD!r})
    sys.exit(86)
else:
    import subprocess
    subprocess.run([sys.executable, '-c', 'import time; time.sleep(60)'])  # holds the pipe open
"""
    stand_in(tmp_path / "empty", body)
    start = time.monotonic()
    found = nowhere.check(4, ["python", "program"])
    assert time.monotonic() - start < 30
    assert [(r["tool"], r["outcome"]) for r in found["runs"]] == [
        ("memcheck", "ran"), ("racecheck", "failed"), ("synccheck", "timed out"),
    ]  # fmt: skip
    assert found["line"].startswith(
        "compute-sanitizer: memcheck ran: ERROR SUMMARY: 0 errors; racecheck failed: "
    )
    assert json.loads(json.dumps(found)) == found
    assert [r["closing"] for r in nowhere.check(0.5)["runs"]] == ["no time was left for it"] * 3


@pytest.mark.parametrize(("outcome", "fails"), [("ran", False), ("timed out", False), ("failed", True)])
def test_a_finding_fails_the_section(outcome, fails, tmp_path, monkeypatch):
    from benchmarks import gpu_sections

    runs = [{"tool": "memcheck", "outcome": outcome, "closing": "as it may be", "findings": []}]
    made = {"path": "compute-sanitizer", "runs": runs, "line": "as it may be"}
    monkeypatch.setattr(gpu_sections.gpu_sanitizer, "check", lambda seconds: made)
    monkeypatch.setattr(gpu_sections, "SIMULATED", False)
    monkeypatch.setattr(gpu_sections, "errors_of", lambda question, options: {"h": 0.0})
    report = gpu_sections.Report(tmp_path / "correct.json")
    if fails:
        with pytest.raises(SystemExit, match="memcheck"):
            gpu_sections.correct(report)
    else:
        gpu_sections.correct(report)
    written = json.loads((tmp_path / "correct.json").read_text())
    assert written["sanitizer"] == made and written["lines"][-1] == "as it may be"


def test_simulated_there_is_nothing_for_the_sanitizer(tmp_path, monkeypatch):
    from benchmarks import gpu_sections

    monkeypatch.setattr(gpu_sections, "SIMULATED", True)
    monkeypatch.setattr(gpu_sections, "errors_of", lambda question, options: {"h": 0.0})
    gpu_sections.correct(gpu_sections.Report(tmp_path / "correct.json"))
    written = json.loads((tmp_path / "correct.json").read_text())
    assert written["lines"][-1] == "compute-sanitizer: absent (simulated)"


@pytest.mark.parametrize("report", [made_up(), {}], ids=["made up", "empty"])
def test_the_picture(tmp_path, report):
    from benchmarks.gpu_picture import picture

    path = picture(json.loads(json.dumps(report)), tmp_path / "there" / "gpu.png")
    assert path.read_bytes()[:4] == b"\x89PNG"


def test_the_kernels_to_compile_are_those_that_a_device_launches():
    """Both passes of each plan that the dispatcher takes, once, whatever the number of steps."""
    from benchmarks.gpu_layers import Question, numbers
    from benchmarks.gpu_sections import Recorder, wanted_kernels
    from numlstm.kernels.cuda.persistent import Sequences

    recorder = Recorder(132, 227 << 10, (9, 0))
    jobs = wanted_kernels(recorder, [(9, 16, 512)])
    assert len(jobs) == len(set(jobs)) > 50
    assert {warps for _, _, warps, _ in jobs} <= set(range(1, 33))
    before = len(recorder.launches)
    (call,) = numbers(Question((5, 16, 512), "gru", 1, "bfloat16"))
    Sequences(recorder).forward(*call.values(), training=False, precision="bfloat16")
    assert len(recorder.launches) == before  # asked for with one step, launched with five
