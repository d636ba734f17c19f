"""The benchmarks' own machinery: the clock, the turns, the shapes' parser, the report."""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path

import numpy as np
import pytest


@pytest.fixture
def root(monkeypatch: pytest.MonkeyPatch) -> Path:
    """The repository on the path: benchmarks/ is not part of the installed library."""
    folder = Path(__file__).parents[1]
    monkeypatch.syspath_prepend(folder)
    return folder


def test_a_window_times_the_call(root):
    from benchmarks.common import measure

    window = measure(lambda: time.sleep(0.002), 0.02)
    assert 0.002 <= window.seconds < 0.05
    assert window.calls >= 3
    assert measure(lambda: time.sleep(0.21)).calls == 1


def test_contenders_take_turns_and_disturbed_windows_are_repeated(root):
    from benchmarks.common import Patience, Window, geometric_mean, interleave, ratios, relative_spread

    turns: list[str] = []
    disturbed = iter([True, False])

    def ours() -> Window:
        turns.append("ours")
        return Window(1.0, 3, 0.0)

    def peer() -> Window:
        turns.append("peer")
        return Window(2.0, 3, 0.9 if next(disturbed, False) else 0.0)

    samples, noisy = interleave({"ours": ours, "peer": peer}, Patience(60.0), rounds=3, least=3)
    assert turns == ["ours", "peer", "peer", "ours", "peer", "ours", "peer"]
    assert not noisy
    assert ratios(samples["ours"], samples["peer"]) == [0.5] * 3
    assert geometric_mean([0.5, 2.0]) == pytest.approx(1.0)
    assert relative_spread([1.0, 1.0, 1.0]) == 0.0


def test_the_ceilings_are_plausible(root):
    from benchmarks.common import machine, peaks

    found = peaks((1,))["1"]
    assert found["fma_gflops"] > 5 and found["memory_gbytes"] > 0.5
    about = machine()
    assert about["cpu"] and about["cores"] >= 1 and about["packages"]["numpy"] == np.__version__


def test_shapes_and_summary(root):
    from benchmarks import cpu

    assert cpu.shape_list("20,32,1,50; 1,1,1,1") == [(20, 32, 1, 50), (1, 1, 1, 1)]
    for wrong in ("", "1,2,3", "1,2,3,x", "0,1,1,1"):
        with pytest.raises(argparse.ArgumentTypeError, match="T,B,I,H"):
            cpu.shape_list(wrong)
    with pytest.raises(argparse.ArgumentTypeError, match="cores"):
        cpu.thread_list("1,9999")
    assert len(cpu.SHAPES) >= 16
    row = {"cell": "lstm", "mode": "training", "threads": 1, "label": "a", "noisy": False, "ours_share": 0.5}
    disturbed = row | {"ratio": 9.0, "noisy": True}
    (found,) = cpu.summary([row | {"ratio": 0.5}, row | {"ratio": 2.0, "label": "b"}, disturbed])
    assert (found["geometric_mean"], found["worst_shape"], found["faster"]) == (pytest.approx(1.0), "b", 1)


@pytest.mark.parametrize("cell", ["lstm", "rnn"])
def test_our_side_prepares_and_repeats(root, cell):
    """Each mode runs twice with the same result, so that what is timed is what was checked."""
    from benchmarks.contenders import MODES, Case, ours
    from numlstm.kernels.cpu.threads import get_num_threads, set_num_threads

    threads = get_num_threads()
    try:
        for mode in MODES:
            call, result = ours(Case(cell, mode, 5, 3, 2, 7), 1)
            before = result()
            call()
            np.testing.assert_array_equal(before, result())
    finally:
        set_num_threads(threads)


def test_sizes_and_report(root, tmp_path):
    from benchmarks import common, startup

    assert {"numlstm", "numpy", "numba", "llvmlite", "rich"} <= startup.requirements("numlstm")
    own = startup.installed_bytes("numlstm")
    assert 100_000 < own < startup.installed_bytes("numpy")
    path = common.write_json(tmp_path / "r.json", {"a": np.float32(0.1), "b": [1, (2.0, None)]})
    assert json.loads(path.read_text()) == {"a": 0.1, "b": [1, [2.0, None]]}
    assert [p.name for p in tmp_path.iterdir()] == ["r.json"]
