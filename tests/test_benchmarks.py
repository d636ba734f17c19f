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


def test_every_option_is_one_that_the_layers_take(root):
    """Each option builds on both of its modes' sides; a misspelt one would only fail in the long run."""
    import numlstm as nl
    from benchmarks import options

    catalogue = options.catalogue()
    assert len({o.title for o in catalogue}) == len(catalogue) >= 50
    for option in catalogue:
        if option.layer == "MGU":
            continue
        made = getattr(nl, option.layer)(4, **options.constructor(option, (9, 2, 3, 4)))
        for name, _ in option.options:
            assert getattr(made, name) == options.constructor(option, (9, 2, 3, 4))[name]


@pytest.mark.parametrize(
    "title", ["LSTM lengths", "GRU initial state", "SimpleRNN bidirectional", "MGU a user's cell"]
)
def test_our_side_of_an_option_repeats(root, title):
    from benchmarks import options

    (option,) = (o for o in options.catalogue() if o.title == title)
    for mode in options.MODES:
        call, result = options.ours(options.Question(option, mode, (5, 3, 2, 7)))
        before = result()
        call()
        np.testing.assert_array_equal(before, result())
        assert np.abs(before).max() > 0


def test_an_option_is_timed_against_its_plain_layer(root):
    from benchmarks import common, options

    class Clock:
        """Stands for a side's process: the plain layer takes 1 s, the option 2.4 s, Keras' twice that."""

        def __init__(self, factor):
            self.factor, self.asked = factor, []

        def ask(self, what, value):
            self.asked.append((what, value[0]))
            return np.ones(2)

        def turn(self, key):
            seconds = self.factor * (1.0 if key.endswith("plain") else 2.4)
            return lambda: common.Window(seconds, 3, 0.0)

    found = {}
    for name in ("bidirectional", "reset_after=False", "dropout"):
        (option,) = (o for o in options.catalogue() if o.title == f"GRU {name}")
        sides = {"ours": Clock(1.0), "keras": Clock(2.0)}
        question = options.Question(option, "training", (5, 3, 2, 7))
        pace = {"rounds": 3, "least": 3, "budget": 1.0}
        found[name] = options.row(question, sides, {"ours": {}, "keras": {}}, common.Patience(0.0), pace)
        assert sides["ours"].asked == [("prepare", "GRU plain"), ("prepare", option.title)]
    assert found["bidirectional"]["ratio"] == pytest.approx(1.2) and found["bidirectional"]["met"]
    after = found["reset_after=False"]
    assert (after["ratio"], after["goal"], after["met"]) == (pytest.approx(2.4), 2.0, False)
    assert after["keras_ratio"] == pytest.approx(2.4) and after["ours_over_keras"] == pytest.approx(0.5)
    assert not found["dropout"]["met"] and "met" in options.line(found["bidirectional"])
    (missed,) = (s for s in options.summary(list(found.values())) if s["option"] == "dropout")
    assert missed["worst"] == pytest.approx(2.4) and "MISSED" in options.summary_line(missed)


def test_adding_sequences_are_those_of_1997(root):
    from benchmarks.papers.adding import sequences

    x, lengths, y = sequences(np.random.default_rng(0), 4000, 40)
    assert lengths.min() == 40 and lengths.max() == 44 == x.shape[1]
    seconds = set()
    for row, length, target in zip(x, lengths, y[:, 0], strict=True):
        (marked,) = np.nonzero(row[:, 1] == 1)
        assert len(marked) == 2 and marked[0] < 10 and marked[1] < 19  # half of 40, less one
        seconds.update(marked)
        assert row[length - 1, 1] == -1 and not row[length:].any()
        assert row[0, 1] == (1 if 0 in marked else -1)
        numbers = [0.0 if at == 0 else row[at, 0] for at in marked]
        assert target == pytest.approx(0.5 + sum(numbers) / 4, abs=1e-6)
    assert seconds == set(range(19))


def test_spike_streams_tell_the_extra_step(root):
    from benchmarks.papers.spike_delays import streams, task_list

    x, y, at = streams(np.random.default_rng(0), 50, 6, 10)
    for spikes, extra in zip(x[..., 0], y[..., 0], strict=True):
        (when,) = np.nonzero(spikes)
        np.testing.assert_array_equal(np.diff(when, prepend=-1), 10 + extra[when])
        assert extra.sum() == extra[when].sum()
    np.testing.assert_array_equal(at, x[..., 0])
    assert 0.4 < y[at == 1].mean() < 0.6
    with pytest.raises(argparse.ArgumentTypeError, match="F,cells"):
        task_list("10")


@pytest.mark.parametrize(
    ("script", "name", "arguments"),
    [
        ("adding", "adding", "--length 40 --units 24 --steps 300 --every 50 --validation 64 --test 200"),
        ("spike_delays", "spike-delays", "--tasks 4,2 --runs 1 --steps 600 --test-spikes 20"),
        ("gradient_by_step", "gradient-by-step", "--steps 60 --units 16 --batch 4"),
    ],
)
def test_the_papers_tasks_run_learn_and_are_written_down(root, tmp_path, script, name, arguments, capsys):
    """Small versions, which must learn: a broken gradient or task shows here."""
    import importlib

    module = importlib.import_module(f"benchmarks.papers.{script}")
    assert module.main([*arguments.split(), "--json", "--out", str(tmp_path)]) == 0
    report = json.loads(capsys.readouterr().out)
    assert json.loads((tmp_path / f"{name}.json").read_text()) == report
    assert {p.name for p in tmp_path.iterdir()} == {f"{name}.json", f"{name}.png"}
    if script == "adding":
        lstm, elman = report["results"]
        assert lstm["cell"] == "lstm" and lstm["test_mse"] < 0.2 * report["variance_of_targets"]
        assert lstm["test_mse"] < elman["test_mse"]
    elif script == "spike_delays":
        assert [(s["side"], s["solved"]) for s in report["summary"]] == [("plain", 1), ("peephole", 1)]
    else:
        weak, strong, usual, open_gate = (n["relative"][0] for n in report["networks"])
        assert weak < 1e-8 < usual < 1e-2 < open_gate < 1e3 < strong


def test_papers_scripts_refuse_wrong_sizes(root, capsys):
    from benchmarks.papers import adding, gradient_by_step, spike_delays

    for module in (adding, spike_delays, gradient_by_step):
        with pytest.raises(SystemExit):
            module.main(["--steps", "0"])
        assert "steps" in capsys.readouterr().err


@pytest.mark.parametrize(
    "module", ["options", "papers.adding", "papers.spike_delays", "papers.gradient_by_step"]
)
def test_examples_in_docstrings(root, module):
    import doctest
    import importlib

    assert doctest.testmod(importlib.import_module(f"benchmarks.{module}")).failed == 0
