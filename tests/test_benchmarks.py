"""The benchmarks' own machinery: the clock, the turns, the shapes' parser, the report."""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
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


def test_a_call_in_another_process_says_what_it_used(root, monkeypatch):
    from benchmarks import common

    class Elsewhere:
        """Each call takes 10 ms of some other process' time."""

        calls = 0

        def __call__(self):
            self.calls += 1
            time.sleep(0.01)

        def cpu_seconds(self):
            return 0.01 * self.calls

    here = Elsewhere()
    monkeypatch.setattr(common, "busy_seconds", here.cpu_seconds)
    assert common.measure(here, 0.05).foreign == 0.0
    busy = Elsewhere()
    monkeypatch.setattr(common, "busy_seconds", busy.cpu_seconds)
    assert common.measure(lambda: busy(), 0.05).foreign > 0.3


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


def test_a_beaten_rival_is_spared_further_rounds(root):
    from benchmarks.common import Patience, Window, interleave, ratios

    turns: list[str] = []

    def contender(name: str, seconds: float):
        def take() -> Window:
            turns.append(name)
            return Window(seconds, 3, 0.0)

        return take

    # ours is slowest of all: it is no rival, and goes on
    seconds = {"ours": 9.0, "fast": 1.0, "near": 1.3, "slow": 1.5}
    contenders = {name: contender(name, s) for name, s in seconds.items()}
    samples, _ = interleave(contenders, Patience(0.0), rounds=3, rivals=["fast", "near", "slow"])
    assert [turns.count(name) for name in seconds] == [3, 3, 3, 1]
    assert ratios(samples["ours"], samples["slow"]) == [6.0]


def test_the_loop_of_tiles_counts_its_work(root):
    from benchmarks import common
    from numlstm.kernels.cpu import isa

    if isa.LANES != 16:
        pytest.skip("the code around the tiles is AVX-512's")
    spin, flops = common._tile_kernel("emulated")
    assert spin(2) == 0 and flops == 4 * 2 * 16 * 16 * 32
    assert not common.tiles("float32", 100) and not common.tiles("bfloat16", 1)


def test_the_ceilings_are_plausible(root, monkeypatch):
    from benchmarks import common
    from benchmarks.common import higher, machine, peaks, read_rate

    monkeypatch.setattr(common, "TRIES", 8)

    found = peaks((1,))["1"]
    assert found["fma_gflops"] > 5 and found["memory_gbytes"] > 0.5
    if "tile_gflops" in found:
        assert found["tile_gflops"] > found["fma_gflops"]
    elif "bfloat16_gflops" in found:
        # one instruction does twice the work of an FMA; a busy machine blurs it
        assert found["bfloat16_gflops"] > 0.8 * found["fma_gflops"]
    about = machine()
    assert about["cpu"] and about["cores"] >= 1 and about["packages"]["numpy"] == np.__version__
    curve = {"read_gbytes": {"1000": 8.0, "4000": 4.0}}
    assert [read_rate(curve, size) for size in (10, 1000, 1001, 9999)] == [8.0, 8.0, 4.0, 4.0]
    assert higher({"a": 1, "b": {"c": 5}}, {"a": 2, "b": {"c": 4}}) == {"a": 2, "b": {"c": 5}}


def test_the_command_line_refuses_what_it_does_not_know(root):
    from benchmarks import cpu

    assert cpu.shape_list("20,32,1,50; 1,1,1,1") == [(20, 32, 1, 50), (1, 1, 1, 1)]
    for wrong in ("", "1,2,3", "1,2,3,x", "0,1,1,1"):
        with pytest.raises(argparse.ArgumentTypeError, match="T,B,I,H"):
            cpu.shape_list(wrong)
    with pytest.raises(argparse.ArgumentTypeError, match="cores"):
        cpu.thread_list("1,9999")
    assert cpu.section_list("bf16, stream,bf16") == ["bf16", "stream"]
    with pytest.raises(argparse.ArgumentTypeError, match="float32,avx2,bf16,int8,stream,memory"):
        cpu.section_list("float32,fp8")


def test_the_rows_are_those_that_are_promised(root):
    from benchmarks import cpu
    from benchmarks.contenders import Case

    cases = [Case("lstm", "training", *shape) for shape in cpu.SHAPES]
    assert len({c.label for c in cases}) == len(cases) >= 16
    assert {50, 128, 193, 200, 256, 512, 1024} <= {c.H for c in cases}
    assert any(c.B == 1 for c in cases) and any(c.T == 784 for c in cases)
    assert any(c.layers == 2 for c in cases) and any(c.both for c in cases) and cpu.FIRST in cases
    assert all(shape[3] >= 128 for shape in cpu.BF16_SHAPES)
    assert set(cpu.BUDGETS) == set(cpu.SECTIONS) and sum(cpu.BUDGETS.values()) < 1200


def test_a_case_counts_its_work(root):
    from benchmarks.contenders import Case, numbers, reordered

    plain = Case("lstm", "inference", 5, 3, 2, 7)
    assert plain.flops == 2 * 5 * 3 * 28 * (2 + 7) and plain.traffic == 5 * 28 * 7 * 4
    # no gradient of the input: three products of the recurrent part, two of the input's
    assert Case("lstm", "training", 5, 3, 2, 7).flops == 2 * 5 * 3 * 28 * (2 * 2 + 3 * 7)
    deep = Case("gru", "inference", 5, 3, 2, 7, layers=2, both=True, precision="bfloat16")
    assert deep.label == "5,3,2,7 x2 bi" and deep.inputs == [2, 14]
    assert deep.flops == 2 * 2 * 5 * 3 * 21 * (2 + 7 + 14 + 7) and deep.traffic == 4 * 5 * 21 * 7 * 2
    assert [w.shape for w in numbers(deep).layers[2]] == [(14, 21), (7, 21), (2, 21)]
    (kernel,) = reordered(Case("gru", "inference", 1, 1, 1, 2), [np.array([[0, 1, 2, 3, 4, 5]])], "zrh")
    assert kernel.tolist() == [[2, 3, 0, 1, 4, 5]]


@pytest.mark.parametrize("cell", ["lstm", "rnn"])
def test_our_side_prepares_and_repeats(root, cell):
    """What is timed is what was checked: the same case twice gives the same, and training steps learn."""
    from benchmarks.contenders import Case, ours

    for case in (
        Case(cell, "inference", 5, 3, 2, 7),
        Case(cell, "inference", 5, 3, 2, 7, layers=2, both=True),
        Case(cell, "training", 5, 3, 2, 7, both=True),
        Case(cell, "stream", 5, 3, 2, 7),
    ):
        first, second = ours(case), ours(case)
        found = first.result()
        second.call()
        if case.mode == "training":
            assert found.shape == (2,) and found[0] > found[1] == second.call()
        else:
            assert found.shape == (3, 14 if case.both else 7) and np.abs(found).max() > 0
            np.testing.assert_array_equal(found, second.result())


def test_a_streamed_step_is_a_step_of_the_sequence(root):
    from benchmarks.contenders import Case, numbers, our_model, ours

    case = Case("lstm", "stream", 5, 3, 2, 7)
    n = numbers(case)
    four, model = np.repeat(n.x[:, :1], 4, axis=1), our_model(case, n)
    np.testing.assert_allclose(ours(case).result(), model(four).numpy()[:, -1], atol=1e-6)


def test_what_the_library_has_not_got_is_left_out_and_said(root):
    """Sections of features to come: either they run, or they say why they can't."""
    from benchmarks.contenders import Case, ours, ours_kernel
    from benchmarks.process import Unavailable

    plain = ours(Case("lstm", "inference", 4, 3, 2, 33)).result()
    for prepare, case in (
        (ours, Case("lstm", "inference", 4, 3, 2, 33, precision="bfloat16")),
        (ours, Case("lstm", "inference", 4, 3, 2, 33, precision="int8")),
        (ours_kernel, Case("lstm", "stream", 4, 3, 2, 33)),
    ):
        try:
            found = prepare(case).result()
        except Unavailable as error:
            assert "available" in str(error) or "there yet" in str(error) or "native call" in str(error)
        else:
            difference = np.abs(found - plain).max() if case.mode == "inference" else 1e-2
            assert 1e-5 < difference < 5e-2  # neither float32 itself, nor something else


# The processes


def prepared_in_another_process(case):
    """Stands for a contender; a case is what it shall do."""
    from benchmarks.process import Prepared, Unavailable

    if case == "unavailable":
        raise Unavailable("not on this machine")
    if case == "broken":
        raise KeyError("kernel")
    if case == "end":
        os._exit(3)
    if isinstance(case, int):
        return Prepared(lambda: np.ones(case * 2**17), lambda: np.zeros(1))
    return Prepared(lambda: time.sleep(0.001), lambda: np.arange(3.0), {"value": os.environ[case]})


def test_a_side_answers_from_its_own_process(root):
    from benchmarks.process import Side, Unavailable

    before = dict(os.environ)
    environment = {"NUMLSTM_BENCHMARK_TEST": "17"}
    with Side("peer", prepared_in_another_process, 1, 0.01, environment) as side:
        assert dict(os.environ) == before
        result, about = side.ask("prepare", "a", "NUMLSTM_BENCHMARK_TEST")
        assert result.tolist() == [0, 1, 2] and about == {"value": "17"}
        assert side.ask("prepare", "b", "OMP_NUM_THREADS")[1] == {"value": "1"}
        assert side.turn("a")().seconds >= 0.001
        with pytest.raises(Unavailable, match="peer: not on this machine"):
            side.prepare("a", "unavailable")
        with pytest.raises(RuntimeError, match="peer: KeyError: 'kernel'"):
            side.prepare("a", "broken")
        side.forget()
        with pytest.raises(RuntimeError, match="KeyError: 'b'"):
            side.turn("b")()
        if Path("/proc/self/clear_refs").exists():
            growth = side.ask("memory", "", (1, 100))
            assert 99 < growth["growth_mib"] < 130  # a call that fills 100 MiB and gives them back
        if hasattr(os, "sched_getaffinity"):
            assert side.ask("ask", "", allowed_cores) == 1
        with pytest.raises(RuntimeError, match="ended with 3"):
            side.prepare("c", "end")
        with pytest.raises(RuntimeError, match="ended with 3"):
            side.prepare("c", "OMP_NUM_THREADS")


def allowed_cores() -> int:
    return len(os.sched_getaffinity(0))


class Fake:
    """Stands for a side's process: its result, and how long a call takes."""

    def __init__(self, seconds, result=1.0, error=None):
        self.seconds, self.result, self.error, self.taken = seconds, result, error, 0

    def ask(self, what, key, value):
        if self.error:
            raise self.error
        return np.full(3, self.result), {}

    def turn(self, key):
        from benchmarks.common import Window

        def take():
            self.taken += 1
            return Window(self.seconds, 3, 0.0)

        return take


CEILINGS = {
    str(n): {
        "fma_gflops": 100.0 * n,
        "avx2_gflops": 50.0 * n,
        "read_gbytes": {"1000000": 100.0, "10000000": 20.0},
    }
    for n in (1, 2)
}


@pytest.fixture
def run(root):
    from benchmarks import common, cpu

    said: list[str] = []
    made = cpu.Run(said.append, [1, 2], 0.01, {"rounds": 3, "least": 3, "budget": 1.0})
    made.patience = common.Patience(0.0)
    made.ceilings = CEILINGS
    made.said = said
    return made


def test_a_row_is_taken_against_the_best_peer(run):
    from benchmarks import cpu
    from benchmarks.contenders import Case
    from benchmarks.process import Unavailable

    case = Case("lstm", "inference", 10, 1, 100, 500)
    sides = {
        "ours": Fake(1.0),
        "ours float32": Fake(4.0),
        "torch": Fake(3.0, 1.0001),
        "onnxruntime": Fake(2.0),
        "tfjs": Fake(0.0, error=Unavailable("node is not installed")),
    }
    row = cpu.Row("float32", case, 1, "widest", {name: (side, case) for name, side in sides.items()})
    run.measure_all([row, row], 100.0)
    assert [line for line in run.said if "left out" in line] == [
        "left out: float32: tfjs: node is not installed"
    ]
    found = run.rows[0]
    assert (found["best"], found["ratio"]) == ("onnxruntime", 0.5)
    assert found["ratios"] == {"ours float32": 0.25, "torch": pytest.approx(1 / 3), "onnxruntime": 0.5}
    assert found["ms"]["torch"] == 3000 and found["difference"] == pytest.approx(1e-4, rel=0.01)
    assert [sides[name].taken for name in ("ours", "ours float32", "torch", "onnxruntime")] == [6, 6, 2, 6]
    assert "onnxruntime" in run.said[-1] and "0.50" in run.said[-1] and "torch 0.333" in run.said[-1]

    wrong = cpu.Row(
        "float32", case, 1, "widest", {"ours": (Fake(1.0), case), "torch": (Fake(1.0, 1.1), case)}
    )
    with pytest.raises(RuntimeError, match="differ by"):
        run.measure(wrong, 1.0)
    run.measure_all([wrong], 1.0)
    assert len(run.failed) == 1 and run.said[-1].startswith(
        "failed: float32, lstm inference 10,1,100,500, 1 thread(s)"
    )
    none = cpu.Row(
        "bf16", case, 1, "widest", {"ours": (Fake(1.0, error=Unavailable("not available yet")), case)}
    )
    run.measure_all([none, none], 1.0)
    assert run.said[-1] == "left out: bf16, lstm inference: not available yet" and len(run.rows) == 2


def test_a_share_is_of_the_ceiling_that_binds(root):
    from benchmarks import cpu

    row = {
        "threads": 1, "isa": "widest", "precision": "float32", "batch": 1, "best": "torch",
        "flops": 1e9, "traffic": 1e8, "weight_bytes": 5e5, "ms": {"ours": 20.0, "torch": 40.0},
    }  # fmt: skip
    assert cpu.with_share(row, CEILINGS)["share"] == {
        "ours": pytest.approx(0.5),
        "torch": pytest.approx(0.25),
    }
    narrow = cpu.with_share(row | {"isa": "avx2"}, CEILINGS)
    in_tiles = {k: v | {"tile_gflops": 10 * v["fma_gflops"]} for k, v in CEILINGS.items()}
    quick = cpu.with_share(row | {"isa": "amx", "precision": "bfloat16"}, in_tiles)["share"]
    assert quick["ours"] == pytest.approx(cpu.with_share(row, CEILINGS)["share"]["ours"] / 10)
    assert (narrow["bound"], narrow["share"]["ours"]) == ("fma", pytest.approx(1.0))
    large = cpu.with_share(row | {"weight_bytes": 5e6, "traffic": 3e8}, CEILINGS)  # 15 ms at 20 GB/s
    assert (large["bound"], large["share"]["ours"]) == ("bandwidth", pytest.approx(0.75))
    bytes_only = row | {"precision": "int8"}
    assert cpu.with_share(bytes_only, CEILINGS)["bound"] == "bandwidth"
    assert cpu.with_share(bytes_only | {"batch": 64}, CEILINGS)["share"] == {}


def a_row(**changes):
    """A row of the report, with other values where asked."""
    row = {
        "section": "float32", "cell": "lstm", "mode": "training", "threads": 1, "label": "20,32,1,50", "hidden": 50,
        "precision": "float32", "isa": "widest", "noisy": False, "share": {"ours": 0.5}, "ratio": 0.5,
        "ratios": {"torch": 0.5}, "ms": {"ours": 1.0, "torch": 2.0}, "best": "torch", "bound": "fma", "spread": 0.1,
    }  # fmt: skip
    return row | changes


def test_groups_and_goals(root):
    from benchmarks import cpu

    rows = [
        a_row(ratios={"torch": 0.1, "tfjs": 0.005}),
        a_row(cell="gru", threads=2, ratio=0.125, label="b"),
        a_row(cell="rnn", ratio=9.0),
        a_row(ratio=9.0, noisy=True, label="c"),
        a_row(hidden=256, label="d", ratio=0.25),
        a_row(hidden=256, label="d", ratio=0.25, threads=2, ms={"ours": 0.5, "torch": 1.0}),
    ]
    whole, *parts = cpu.summary(rows)
    assert whole["cell"] is None and (whole["rows"], whole["left_out"]) == (4, 1)
    assert whole["geometric_mean"] == pytest.approx(0.25) and whole["met"] is True
    assert (whole["worst"], whole["faster"]) == (0.5, 4) and "lstm 20,32,1,50" in whole["worst_row"]
    assert len(parts) == 4 and all(p["goals"] is None for p in parts)
    assert "goals 0.50, 0.85: met" in cpu.summary_line(whole)
    missed = cpu.summary([a_row(ratio=0.9)])[0]
    assert missed["met"] is False and "MISSED" in cpu.summary_line(missed)
    single = {c["what"]: c for c in cpu.checks(rows, CEILINGS)}
    assert single["LSTM(50) + Dense(1), training step, over torch's"]["met"]
    assert not single["LSTM(50) + Dense(1), training step, over tfjs's"]["met"]
    assert single["the machine itself: two threads' pure FMA loops over one's"]["value"] == pytest.approx(2.0)
    speed = single["our training, H >= 256: two threads' speed over one's"]
    assert (speed["value"], speed["goal"], speed["met"]) == (pytest.approx(2.0), 1.7, True)
    assert ">= 1.7: met" in cpu.check_line(speed)


def test_the_picture_shows_every_section(root, tmp_path):
    pytest.importorskip("matplotlib")
    from benchmarks import common, cpu, cpu_picture

    rows = [a_row(section=section) for section in ("float32", "avx2", "bf16")]
    rows += [a_row(cell="gru", threads=2, noisy=True), a_row(mode="inference"), a_row(ratio=None)]
    rows += [
        a_row(section="memory"),
        a_row(section="stream", mode="stream", ratios={"torch": 0.05, "ours kernel": 3}),
    ]
    groups = cpu_picture._panels({"rows": rows})
    assert [len(g) for g in groups] == [1, 2, 1, 1, 1, 1] and groups[-1][0]["label"] == "torch"
    report = {"rows": rows, "summary": cpu.summary(rows), "machine": common.machine()}
    path = cpu_picture.picture(report, tmp_path / "cpu.png")
    assert path.read_bytes().startswith(b"\x89PNG")


def test_a_partial_run_writes_only_where_it_is_told(root, monkeypatch, tmp_path, capsys):
    from benchmarks import common, cpu

    def section(run, seconds):
        assert (run.threads, run.quick, seconds) == ([1], True, pytest.approx(0.2 * cpu.BUDGETS["int8"]))
        run.rows.append(a_row(section="int8", mode="inference", precision="int8"))
        run.failed.append("int8, gru: no") if failing else run.absent("a peer", "not installed")

    monkeypatch.setattr(cpu, "SECTIONS", {"int8": ("int8 weights", section)})
    monkeypatch.setattr(common, "peaks", lambda threads: CEILINGS)
    monkeypatch.setattr(common, "version", lambda package: "0" if package == "torch" else None)
    monkeypatch.setattr(common, "RESULTS", tmp_path / "results")
    failing = False
    assert cpu.main(["--quick"]) == 0
    said = capsys.readouterr().out
    assert "left out: a peer: not installed" in said and "1 rows in" in said and "wrote" not in said
    failing = True
    assert cpu.main(["--quick", "--json", "--out", str(tmp_path / "out")]) == 1
    report = json.loads(capsys.readouterr().out)
    assert report["failed"] == ["int8, gru: no"] and report["summary"][0]["goals"] == [0.6, 1.0]
    assert [p.relative_to(tmp_path).as_posix() for p in tmp_path.rglob("*.*")] == ["out/cpu.json"]


# The peers, each in its own process as in the comparison


@pytest.mark.peers
@pytest.mark.parametrize("name", ["torch", "torch_cell", "onnxruntime", "keras", "tfjs"])
def test_peers_compute_what_we_compute(root, name):
    from benchmarks import cpu, peers
    from benchmarks.contenders import Case, ours
    from benchmarks.process import Side, Unavailable

    for package in {"onnxruntime": ("onnxruntime", "onnx"), "keras": ("keras", "jax"), "tfjs": ()}.get(
        name, ("torch",)
    ):
        if importlib.util.find_spec(package) is None:
            pytest.skip(f"{package} is not installed")
    stacked = Case("lstm", "inference", 5, 4, 3, 10, layers=2, both=True)
    steps = [Case(cell, "stream", 4, 1, 3, 10) for cell in ("lstm", "gru")]
    training = [
        Case("lstm", "training", 5, 4, 3, 10),
        Case("gru", "training", 5, 4, 3, 10, layers=2, both=True),
    ]
    cases = {
        "torch": [stacked, Case("gru", "inference", 5, 4, 3, 10), *steps, *training],
        "torch_cell": steps,
        "onnxruntime": [stacked, Case("gru", "inference", 5, 4, 3, 10, both=True), *steps],
        "keras": [stacked, training[1]],
        "tfjs": training[:1],
    }[name]
    with Side(name, getattr(peers, name), 1, environment=peers.KERAS if name == "keras" else None) as side:
        for case in cases:
            try:
                theirs = side.prepare("case", case)
            except Unavailable as error:
                pytest.skip(str(error))
            assert cpu.agreement(ours(case).result(), theirs) < 1e-4, case
        assert side.turn("case")().calls >= 1


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
        prepared = options.ours(options.Question(option, mode, (5, 3, 2, 7)))
        before = prepared.result()
        prepared.call()
        np.testing.assert_array_equal(before, prepared.result())
        assert np.abs(before).max() > 0


def test_an_option_is_timed_against_its_plain_layer(root):
    from benchmarks import common, options

    class Clock:
        """Stands for a side's process: the plain layer takes 1 s, the option 2.4 s, Keras' twice that."""

        def __init__(self, factor):
            self.factor, self.asked = factor, []

        def prepare(self, key, value):
            self.asked.append(key)
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
        assert sides["ours"].asked == ["GRU plain", option.title]
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
        ("forecasting", "forecasting", "--epochs 60"),
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
    elif script == "forecasting":
        ahead = report["results"][0]  # without the file of the other series
        assert [r["source"] for r in report["results"]] == ["sunspots"] * 2
        assert ahead["errors"]["LSTM"]["rmse"] < 0.8 * ahead["errors"]["last value"]["rmse"]
        assert 0.4 < ahead["coverage"]["0.8"] <= ahead["coverage"]["0.9"] <= 1
    else:
        weak, strong, usual, open_gate = (n["relative"][0] for n in report["networks"])
        assert weak < 1e-8 < usual < 1e-2 < open_gate < 1e3 < strong


def test_papers_scripts_refuse_wrong_sizes(root, capsys):
    from benchmarks.papers import adding, gradient_by_step, spike_delays

    for module in (adding, spike_delays, gradient_by_step):
        with pytest.raises(SystemExit):
            module.main(["--steps", "0"])
        assert "steps" in capsys.readouterr().err


def nab_corpus():
    """Two series of 500 rows, 75 of them probation; three windows, one of which begins in the probation."""
    from benchmarks.papers.nab import Series

    return [Series("a", np.zeros(500), [(50, 79), (200, 219)]), Series("b", np.zeros(500), [(300, 309)])]


def test_nabs_scores_are_those_of_its_rules(root):
    from benchmarks.papers import nab

    corpus = nab_corpus()
    silent = [np.zeros(500), np.zeros(500)]
    perfect = [np.zeros(500), np.zeros(500)]
    perfect[0][[75, 200]] = perfect[1][300] = 1.0  # 75: the first row of its window that counts
    for weights in nab.PROFILES.values():
        assert nab.score(corpus, silent, weights).score == 0
    early = nab.scaled_sigmoid(-5 / 30) / nab.scaled_sigmoid(
        -1
    )  # what row 75, five from its window's end, is worth
    for true, false, missed in nab.PROFILES.values():
        expected = 100 * (2 + early + 3 * missed) / (3 + 3 * missed)
        assert nab.score(corpus, perfect, (true, false, missed)).score == pytest.approx(expected)
    whole = [nab.Series("c", np.zeros(500), [(200, 219)])]
    first = np.zeros(500)
    first[200] = 1.0
    assert nab.score(whole, [first], nab.PROFILES["standard"]) == (100.0, 1.0, 1, 0)
    # a second detection in the window earns nothing; one right behind it costs little, one before it the whole price
    for row, cost in [(210, 0.0), (220, -nab.scaled_sigmoid(1 / 19)), (100, 1.0), (499, 1.0)]:
        also = first.copy()
        also[row] = 1.0
        found = nab.score(whole, [also], nab.PROFILES["standard"])
        assert found.score == pytest.approx(100 * (2 - 0.11 * cost) / 2), row
    also[:75] = 1.0  # nothing in the probation counts
    assert nab.score(whole, [also], nab.PROFILES["standard"]) == found
    with pytest.raises(ValueError, match="scores of c: expected 500 numbers from 0 to 1"):
        nab.score(whole, [first * 2], nab.PROFILES["standard"])


def test_nabs_best_threshold_is_found(root):
    """Against scores computed threshold by threshold."""
    from benchmarks.papers import nab

    corpus, draw = nab_corpus(), np.random.default_rng(0)
    given = [np.round(draw.random(500), 2), np.round(draw.random(500), 2)]
    given[0][205] = given[1][300] = 0.995
    for weights in nab.PROFILES.values():
        best = max(
            nab.score(corpus, [(g >= t).astype(float) for g in given], weights).score
            for t in np.arange(0.0, 1.01, 0.005)
        )
        assert nab.score(corpus, given, weights).score == pytest.approx(best)


def test_nab_runs_on_a_small_corpus(root, tmp_path, capsys):
    from benchmarks.papers import nab
    from numlstm.kernels.cpu import threads

    draw = np.random.default_rng(0)
    times = np.datetime64("2020-01-01T00:00:00") + np.arange(400) * np.timedelta64(300, "s")
    (tmp_path / "made").mkdir()
    labels = {}
    for name in ("made/one.csv", "made/two.csv"):
        values = np.sin(np.arange(400) / 5) + draw.normal(size=400) * 0.05
        values[250:256] += 4
        rows = [f"{str(t).replace('T', ' ')},{v:.5f}" for t, v in zip(times, values, strict=True)]
        (tmp_path / name).write_text("timestamp,value\n" + "\n".join(rows) + "\n")
        labels[name] = [[str(t).replace("T", " ") + ".000000" for t in times[[245, 265]]]]
    (tmp_path / "combined_windows.json").write_text(json.dumps(labels))
    arguments = [str(tmp_path), "--steps", "20", "--units", "8", "--jobs", "1", "--json"]
    arguments += ["--out", str(tmp_path / "out")]
    before = threads.get_num_threads()
    try:
        assert nab.main(arguments) == 0
    finally:
        threads.set_num_threads(before)
    report = json.loads(capsys.readouterr().out)
    assert {p.name for p in (tmp_path / "out").iterdir()} == {"nab.json", "nab.png"}
    scores = {r["name"]: r["standard"]["score"] for r in report["results"]}
    assert scores["null"] == 0 and scores["LSTM"] > 80 and report["windows"] == 2
    with pytest.raises(SystemExit):
        nab.main([str(tmp_path / "made")])
    assert "no combined_windows.json" in capsys.readouterr().err


@pytest.mark.skipif(
    "NUMLSTM_DATA" not in os.environ,
    reason="NUMLSTM_DATA names no folder that holds nab/, the benchmark's data",
)
def test_nab_gives_the_windowed_gaussian_its_published_score(root):
    from benchmarks.papers import nab

    corpus = nab.read_corpus(Path(os.environ["NUMLSTM_DATA"]) / "nab")
    given = [nab.windowed_gaussian(series.values) for series in corpus]
    # results/final_results.json of numenta/NAB
    published = {"standard": 39.6495235, "reward_low_FP_rate": 20.8679858, "reward_low_FN_rate": 47.4100272}
    for profile, expected in published.items():
        assert nab.score(corpus, given, nab.PROFILES[profile]).score == pytest.approx(expected, abs=1e-5)


@pytest.mark.parametrize(
    "module",
    ["options", "papers.adding", "papers.spike_delays", "papers.gradient_by_step", "papers.nab"],
)
def test_examples_in_docstrings(root, module):
    import doctest
    import importlib

    assert doctest.testmod(importlib.import_module(f"benchmarks.{module}")).failed == 0
