"""The command line as a person uses it: what it prints, writes and refuses, and how it goes on."""

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

import numlstm as nl
from numlstm.cli import main
from numlstm.cli.common import plain

TEXT = "the cat sat on the mat and the dog sat on the log. " * 60
SMALL_TEXT = ["--units", "16", "--embedding", "8", "--streams", "4", "--steps", "20", "--epochs", "2"]
SMALL_TABLE = ["--units", "8", "--window", "6", "--epochs", "2"]


@pytest.fixture(autouse=True)
def _in_an_empty_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


@pytest.fixture
def text_file(tmp_path):
    path = tmp_path / "cats.txt"
    path.write_text(TEXT)
    return path


@pytest.fixture
def table_file(tmp_path):
    """A noisy seasonal series with gaps, a category and dates."""
    random = np.random.default_rng(0)
    days = np.arange(np.datetime64("2020-01-01"), np.datetime64("2020-01-01") + np.timedelta64(160, "D"))
    values = 10 + 5 * np.sin(np.arange(160) * 2 * np.pi / 12) + random.normal(size=160) * 0.2
    lines = ["day,value,sky"]
    for number, (day, value) in enumerate(zip(days, values, strict=True)):
        lines.append(
            f"{day},{'' if number % 37 == 5 else f'{value:.3f}'},{'clear' if number % 3 else 'cloudy'}"
        )
    path = tmp_path / "waves.csv"
    path.write_text("\n".join(lines) + "\n")
    return path


def call(*arguments):
    """Run a command in this process; its exit code."""
    with pytest.raises(SystemExit) as exit:
        main([str(argument) for argument in arguments])
    return exit.value.code


def call_json(capsys, *arguments):
    """Run a command with --json; the object it printed."""
    code = call(*arguments, "--json")
    out, err = capsys.readouterr()
    assert code == 0, err
    return json.loads(out)  # nothing else may be on stdout


def refused(capsys, *arguments):
    """Run a command that must be refused; its one line."""
    code = call(*arguments)
    _, err = capsys.readouterr()
    assert code == 2, err
    assert err.startswith("numlstm: error: ") and err.count("\n") == 1
    return err


@pytest.fixture
def text_model(text_file, capsys):
    assert call("train", "text", text_file, *SMALL_TEXT, "--out", "text") == 0
    capsys.readouterr()
    return "text/model.safetensors"


@pytest.fixture
def table_model(table_file, capsys):
    options = ("--target", "value", "--horizon", 2, *SMALL_TABLE, "--features", "all", "--season", 12)
    assert call("train", "forecast", table_file, *options, "--out", "table") == 0
    capsys.readouterr()
    return "table/model.safetensors"


def test_training_on_a_text(text_file, tmp_path, capsys):
    result = call_json(
        capsys, "train", "text", text_file, *SMALL_TEXT, "--epochs", 6, "--out", "o", "--test", "0.1"
    )
    assert set(result["nats"]) == {"valid", "test"}
    assert result["nats"]["valid"] < np.log(result["vocabulary"])  # better than guessing
    assert result["trivial"] is None  # the 5-gram's figure is for the bundled text only
    model = nl.load("o/model.safetensors")
    assert model.preprocessing["vocabulary"]["tokens"][0] == "<unk>"
    rows = (tmp_path / "o" / "history.csv").read_text().splitlines()
    assert rows[0] == "epoch,loss,val_loss" and len(rows) == 7
    assert (tmp_path / "o" / "curve.png").read_bytes()[:4] == b"\x89PNG"
    record = json.loads((tmp_path / "o" / "run.json").read_text())
    assert record["finished"] and not (tmp_path / "o" / "backup").exists()


def test_training_on_words(text_file, capsys):
    result = call_json(
        capsys,
        "train",
        "text",
        text_file,
        *SMALL_TEXT,
        "--steps",
        10,
        "--level",
        "word",
        "--max-words",
        8,
        "--out",
        "o",
    )
    assert result["vocabulary"] == 8
    text = call_json(capsys, "generate", "o/model.safetensors", "--prompt", "the cat", "--length", 5)["text"]
    assert text.startswith("the cat ") and "<unk>" not in text


def test_same_seed_same_bits_whatever_the_threads(text_file, capsys):
    weights = {}
    for threads, seed in ((1, 3), (2, 3), (2, 4)):
        environment = {**os.environ, "NUMLSTM_NUM_THREADS": str(threads)}
        options = [*SMALL_TEXT, "--seed", str(seed), "--out", f"o{threads}{seed}"]
        command = [sys.executable, "-m", "numlstm", "train", "text", str(text_file), *options]
        subprocess.run(command, env=environment, check=True, capture_output=True)
        weights[threads, seed] = nl.load(f"o{threads}{seed}/model.safetensors").get_weights()
    for a, b in zip(weights[1, 3], weights[2, 3], strict=True):
        np.testing.assert_array_equal(a, b)
    assert any((a != b).any() for a, b in zip(weights[2, 3], weights[2, 4], strict=True))


@pytest.mark.parametrize("command", ["text", "forecast"])
def test_an_interrupted_run_goes_on_to_the_same_bits(command, text_file, table_file, capsys, monkeypatch):
    if command == "text":
        line = ["train", "text", text_file, *SMALL_TEXT, "--epochs", 4, "--dropout", 0.2]
    else:
        line = ["train", "forecast", table_file, *SMALL_TABLE, "--epochs", 4, "--dropout", 0.2]
    whole = call_json(capsys, *line, "--out", "whole")

    from numlstm.callbacks import BackupAndRestore

    saved = BackupAndRestore.on_epoch_end

    def pull_the_plug(self, epoch, logs):
        saved(self, epoch, logs)
        if epoch == 1:
            raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(BackupAndRestore, "on_epoch_end", pull_the_plug)
        assert call(*line, "--out", "parts") == 130
        assert f"numlstm train {command} --resume parts" in capsys.readouterr().err
    assert "--resume parts" in refused(capsys, *line, "--out", "parts")  # it is not overwritten by accident
    parts = call_json(capsys, "train", command, "--resume", "parts")
    for a, b in zip(
        nl.load(whole["model"]).get_weights(), nl.load(parts["model"]).get_weights(), strict=True
    ):
        np.testing.assert_array_equal(a, b)
    with open("whole/history.csv") as a, open("parts/history.csv") as b:
        assert a.read() == b.read()
    assert "is finished" in refused(capsys, "train", command, "--resume", "parts")


def test_a_resumed_run_keeps_its_settings_and_its_input(text_file, capsys):
    from numlstm.cli.common import Run

    Run.start(
        "train text",
        {"file": str(text_file)},
        [text_file],
        out=text_file.parent / "o",
        stem="",
        overwrite=False,
    )
    assert "leave out: units" in refused(capsys, "train", "text", "--resume", "o", "--units", 5)
    assert "made by 'numlstm train text'" in refused(capsys, "train", "forecast", "--resume", "o")
    text_file.write_text(TEXT + "more")
    assert "has changed" in refused(capsys, "train", "text", "--resume", "o")
    assert "no run in that folder" in refused(capsys, "train", "text", "--resume", "nowhere")


def test_generating(text_model, capsys):
    line = ("generate", text_model, "--prompt", "the ", "--length", 30)
    first = call_json(capsys, *line, "--seed", 1)["text"]
    assert first.startswith("the ") and len(first) == 34
    assert call_json(capsys, *line, "--seed", 1)["text"] == first
    assert call_json(capsys, *line, "--seed", 2)["text"] != first
    cold = [call_json(capsys, *line, "--temperature", 0, "--seed", seed)["text"] for seed in (1, 2)]
    assert cold[0] == cold[1] == call_json(capsys, *line, "--top-k", 1)["text"]
    assert call("generate", text_model, "--prompt", "the ", "--length", 30, "--seed", 1) == 0
    assert capsys.readouterr().out == first + "\n"


def test_judging_a_text_and_naming_what_comes_next(text_model, text_file, capsys):
    result = call_json(capsys, "evaluate", text_model, text_file)
    assert result["tokens"] == len(TEXT) and result["unknown"] == 0 and 0 < result["nats"] < 4
    entries = call_json(capsys, "predict", text_model, text_file)["next"]
    assert len(entries) == 10 and 0 < sum(entry["probability"] for entry in entries) <= 1
    probabilities = [entry["probability"] for entry in entries]
    assert probabilities == sorted(probabilities, reverse=True)


def test_training_a_forecast(table_file, tmp_path, capsys):
    options = ("--target", "value", "--features", "all", "--horizon", 3, "--season", 12)
    result = call_json(
        capsys, "train", "forecast", table_file, *SMALL_TABLE, *options, "--epochs", 60, "--out", "o"
    )
    errors = result["test"]["errors"]
    assert set(errors) == {"LSTM", "last value", "12 rows before"}
    assert errors["LSTM"]["rmse"] < errors["last value"]["rmse"]
    # A noisy sine's own season is hard to beat; whichever way it went, the report says so.
    best = min(errors["last value"]["rmse"], errors["12 rows before"]["rmse"])
    assert result["test"]["beats_trivial"] == (errors["LSTM"]["rmse"] < best)
    assert any("missing" in note for note in result["notes"])
    for name in ("forecast.png", "curve.png"):
        assert (tmp_path / "o" / name).read_bytes()[:4] == b"\x89PNG"


def test_a_model_that_does_not_beat_the_trivial_forecast_says_so(tmp_path, capsys):
    steps = np.cumsum(
        np.random.default_rng(0).normal(size=200)
    )  # a random walk: nothing beats the last value
    (tmp_path / "walk.csv").write_text("v\n" + "\n".join(map(str, steps)) + "\n")
    assert call("train", "forecast", "walk.csv", *SMALL_TABLE, "--epochs", 40, "--out", "o") == 0
    out = capsys.readouterr().out
    result = json.loads((tmp_path / "o" / "run.json").read_text())["result"]
    assert result["test"]["beats_trivial"] is ("does NOT beat" not in out)


def test_the_bundled_table_by_name(capsys):
    result = call_json(capsys, "train", "forecast", "sunspots", *SMALL_TABLE, "--out", "o")
    assert result["target"] == "SUNACTIVITY" and "last value" in result["test"]["errors"]


def test_a_split_by_rows(table_file, capsys):
    options = ("--target", "value", "--split", "100,20,40", *SMALL_TABLE, "--predict", "value", "--out", "o")
    assert 35 <= call_json(capsys, "train", "forecast", table_file, *options)["test"]["windows"] <= 40


def test_judging_and_continuing_a_table(table_model, table_file, tmp_path, capsys):
    result = call_json(capsys, "evaluate", table_model, table_file)
    assert set(result["errors"]) == {"LSTM", "last value", "12 rows before"}
    ahead = call_json(capsys, "predict", table_model, table_file)
    assert ahead["columns"] == ["steps_ahead", "value"] and [row[0] for row in ahead["rows"]] == [1, 2]
    assert call("predict", table_model, table_file, "--every", "--out", "all.csv") == 0
    lines = (tmp_path / "all.csv").read_text().splitlines()
    assert lines[0] == "after_row,value+1,value+2"
    last = lines[-1].split(",")
    assert last[0] == "160"
    np.testing.assert_allclose(
        [float(cell) for cell in last[1:]], [row[1] for row in ahead["rows"]], rtol=1e-4
    )


@pytest.fixture
def array_model():
    model = nl.Sequential([nl.LSTM(4, input_shape=(5, 2)), nl.Dense(1)])
    model.compile("adam", "mse", metrics=["mae"])
    model.save("m.safetensors")
    return model


def test_a_model_of_arrays(array_model, tmp_path, capsys):
    random = np.random.default_rng(0)
    x, y = random.normal(size=(3, 5, 2)).astype(np.float32), random.normal(size=(3, 1)).astype(np.float32)
    np.savez("d.npz", x=x, y=y)
    metrics = call_json(capsys, "evaluate", "m.safetensors", "d.npz")["metrics"]
    assert metrics == pytest.approx(array_model.evaluate(x, y, verbose=0, return_dict=True), rel=1e-6)
    assert call_json(capsys, "predict", "m.safetensors", "d.npz", "--out", "p.npy")["shape"] == [3, 1]
    np.testing.assert_array_equal(np.load("p.npy"), array_model.predict(x, verbose=0))
    np.save("x.npy", x)
    printed = call_json(capsys, "predict", "m.safetensors", "x.npy", "--backend", "reference")
    np.testing.assert_allclose(printed["prediction"], np.load("p.npy"), rtol=1e-4)
    assert printed["backend"] == "reference"


def test_info(capsys):
    found = call_json(capsys, "info")
    assert found["numlstm"] == nl.__version__ and found["backends"]["cpu"] == "usable"
    assert found["backends"]["cuda"] != "usable" or found["packages"]["cupy"]
    assert call("info", "--backend", "reference") == 0
    assert "reference (chosen now)" in capsys.readouterr().out


def test_warmup(capsys):
    """Kernels that the tests have compiled are in the cache; what is asked here is that all are there afterwards."""
    first = call_json(capsys, "warmup")
    assert first["kept"] and first["problem"] is None
    assert all(
        set(first["seconds"][kind]) == {"inference", "stream", "training"}
        for kind in ("LSTM", "GRU", "SimpleRNN")
    )
    again = json.loads(in_a_process("warmup", "--json").stdout)
    assert again["compiled"] == 0 and again["loaded"] >= 10


def in_a_process(*arguments, **environment):
    """A command in a fresh interpreter."""
    command = [sys.executable, "-W", "error", "-m", "numlstm", *map(str, arguments)]
    env = {**os.environ, **environment}
    return subprocess.run(command, env=env, capture_output=True, text=True, timeout=300, check=True)


# Says whether anything is compiled while a model is used; argument: the model file.
USE = """
import sys
import numpy as np
import numlstm as nl
from numlstm.kernels.cpu import cache
model = nl.load(sys.argv[1])
x = np.ones((40, 6, 5), np.float32)
model.predict(x, verbose=0)
model.stream().step(x[0, 0])
print(cache.made.compiled, cache.made.loaded)
model.fit(x, np.zeros(40, int), verbose=0)
print(cache.made.compiled)
"""


@pytest.fixture
def small_model():
    model = nl.Sequential([nl.IndRNN(20, input_shape=(None, 5)), nl.Dropout(0.5), nl.Dense(3, "softmax")])
    model.compile("rmsprop", "sparse_categorical_crossentropy")
    model.save("m.safetensors")
    return model


def test_warmup_of_a_model_file(small_model, tmp_path):
    """Exactly what the model needs, for inference and streams, then for training too."""
    cached = {"NUMLSTM_CACHE_DIR": str(tmp_path / "cache")}
    warm = lambda *more: json.loads(in_a_process("warmup", "m.safetensors", *more, "--json", **cached).stdout)
    use = lambda: subprocess.run(
        [sys.executable, "-c", USE, "m.safetensors"],
        env={**os.environ, **cached},
        capture_output=True,
        text=True,
    ).stdout.split()
    first = warm("--inference-only")
    assert first["compiled"] > 2 and first["loaded"] == 0
    assert [k for uses in first["seconds"].values() for k in uses].count("training") == 0
    assert warm()["loaded"] == first["compiled"]
    assert use() == [
        "0",
        str(first["compiled"] - 5),
        "0",
    ]  # all but its dense layer's product, so small that NumPy makes it, and what hands work to threads


@pytest.fixture
def smaller_model():
    """Three kernels, which are soon compiled, beside the four that hand work to threads."""
    nl.Sequential([nl.Activation("softmax", input_shape=(None, 5))]).save("m.safetensors")


def test_warmup_by_two_processes_at_once(smaller_model, tmp_path):
    """Both end well, and what they leave serves a third."""
    command = [sys.executable, "-m", "numlstm", "warmup", "m.safetensors", "--inference-only", "--json"]
    env = {**os.environ, "NUMLSTM_CACHE_DIR": str(tmp_path / "cache")}
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    for process in [subprocess.Popen(command, env=env, **pipes) for _ in range(2)]:
        _, error = process.communicate(timeout=300)
        assert process.returncode == 0, error
    third = json.loads(subprocess.run(command, env=env, capture_output=True, text=True, check=True).stdout)
    assert (third["compiled"], third["loaded"]) == (0, 7)


def test_warmup_where_nothing_can_be_written(smaller_model, tmp_path):
    (tmp_path / "file").write_text("not a folder")
    folder = str(tmp_path / "file" / "below")
    done = in_a_process("warmup", "m.safetensors", "--inference-only", "--json", NUMLSTM_CACHE_DIR=folder)
    found = json.loads(done.stdout)
    assert not found["kept"] and "can't be written" in found["problem"] and found["compiled"] == 7
    assert "Nothing can be kept" in done.stderr and "7 kernels compiled, not kept" in done.stderr


def test_help_names_every_command(capsys):
    assert call() == 0
    out = capsys.readouterr().out
    for name in ("demo", "train", "evaluate", "predict", "generate", "convert", "info", "warmup", "bench"):
        assert f"  {name} " in out
    assert call("train", "forecast", "--help") == 0
    assert "--horizon" in capsys.readouterr().out


def test_the_demo_in_small(capsys, monkeypatch, tmp_path):
    """The demo itself takes minutes; here its text is a piece and its network small."""
    from numlstm.cli import text
    from numlstm.data import text as texts

    piece = texts.read_text("tinyshakespeare")[:40_000]
    monkeypatch.setattr(texts, "read_text", lambda source: piece)
    monkeypatch.setattr(text, "DEMO", {"units": 16, "embedding": 8, "streams": 8, "steps": 32})
    result = call_json(capsys, "demo", "--epochs", 1)
    assert result["sample"].startswith("ROMEO:\n") and len(result["sample"]) > 400
    assert result["model"] == os.path.join("runs", "demo", "model.safetensors")
    assert (tmp_path / "runs" / "demo" / "curve.png").exists()
    assert call_json(capsys, "demo", "--epochs", 1)["sample"] == result["sample"]  # an older demo is replaced


BAD = [
    (["train", "text"], "give a FILE"),
    (["train", "text", "none.txt"], "no file 'none.txt'"),
    (["train", "text", "short.txt"], "has 18 chars; --streams 48 of at least --steps 96 take 4,609"),
    (["train", "text", "cats.txt", "--level", "letter"], "'letter'"),
    (["train", "text", "cats.txt", "--valid", "1.5"], "--valid must be a share"),
    (["train", "text", "cats.txt", "--valid", "0"], "no text to validate on"),
    (["train", "text", "cats.txt", "--valid", "0.6", "--test", "0.6"], "nothing to train on"),
    (["train", "text", "cats.txt", "--units", "0"], "units"),
    (["train", "text", "cats.txt", "--nonsense", "1"], "--nonsense"),
    (["train", "text", "cats.txt", *SMALL_TEXT, "--learning-rate", "-1"], "learning-rate"),
    (["train", "text", "cats.txt", *SMALL_TEXT, "--backend", "cuda"], "cuda"),
    (["train", "text", "cats.txt", *SMALL_TEXT, "--backend", "gpu"], "gpu"),
    (["train", "text", "cats.txt", *SMALL_TEXT, "--out", "full"], "is no folder of a run"),
    (["train", "forecast", "two.csv"], "give --target, one of: a, b"),
    (["train", "forecast", "waves.csv", "--target", "wave"], "no column 'wave'; it has: day, value, sky"),
    (["train", "forecast", "waves.csv", "--target", "sky"], "not numeric"),
    (["train", "forecast", "waves.csv", "--target", "value", "--features", "value,rain"], "no column 'rain'"),
    (["train", "forecast", "waves.csv", "--target", "value", "--split", "1,2"], "split must be three"),
    (
        ["train", "forecast", "waves.csv", "--target", "value", "--split", "a,b,c"],
        "--split must be three numbers",
    ),
    (["train", "forecast", "waves.csv", "--target", "value", "--horizon", "99"], "holds no whole window"),
    (["train", "forecast", "waves.csv", "--target", "value", "--window", "999"], "160 rows are too few"),
    (["train", "forecast", "waves.csv", "--target", "value", "--predict", "both"], "'both'"),
    (["train", "forecast", "waves.csv", "--target", "value", "--loss", "nice"], "nice"),
    (["generate", "none.safetensors"], "none.safetensors"),
    (["generate", "cats.txt"], "cats.txt"),
    (["generate", "m.safetensors"], "is no text model"),
    (["evaluate", "m.safetensors", "none.npz"], "no file 'none.npz'"),
    (["evaluate", "m.safetensors", "waves.csv"], "takes arrays"),
    (["evaluate", "m.safetensors", "bad.npz"], "bad.npz"),
    (["predict", "m.safetensors", "rank.npz"], "rank"),
    (["predict", "m.safetensors", "odd.npz"], "unknown use: z"),
    (["nonsense"], "nonsense"),
]


@pytest.mark.parametrize("line, message", BAD, ids=[" ".join(line) for line, _ in BAD])
def test_bad_input_is_one_line_and_leaves_nothing(
    line, message, text_file, table_file, array_model, tmp_path, capsys
):
    (tmp_path / "short.txt").write_text("too short a text...")
    (tmp_path / "bad.npz").write_bytes(b"PK\x03\x04 no archive")
    np.savez("rank.npz", x=np.zeros((3, 5)))
    np.savez("odd.npz", x=np.zeros((3, 5, 2)), z=np.zeros(3))
    (tmp_path / "two.csv").write_text("a,b\n1,2\n3,4\n")
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "letters").write_text("dear")
    before = sorted(path.name for path in tmp_path.rglob("*"))
    error = refused(capsys, *line)
    assert message in error
    after = sorted(path.name for path in tmp_path.rglob("*"))
    assert after == before or "backend" in error


def test_with_json_an_error_is_an_object_too(capsys):
    assert call("generate", "none.safetensors", "--json") == 2
    out, err = capsys.readouterr()
    assert "none.safetensors" in json.loads(out)["error"] and err.startswith("numlstm: error:")


def test_a_finished_run_is_not_overwritten_by_accident(text_model, text_file, capsys):
    line = ("train", "text", text_file, *SMALL_TEXT, "--out", "text")
    assert "--overwrite" in refused(capsys, *line)
    assert call(*line, "--overwrite") == 0
    capsys.readouterr()
    first = call_json(capsys, "train", "text", text_file, *SMALL_TEXT)["model"]
    second = call_json(capsys, "train", "text", text_file, *SMALL_TEXT)["model"]
    assert first == os.path.join("runs", "cats", "model.safetensors")
    assert second == os.path.join("runs", "cats-2", "model.safetensors")


def test_json_has_no_nan():
    given = {"a": np.float32("nan"), "b": (np.int64(2), [float("inf")]), "c": np.array([1.5, np.nan])}
    assert json.loads(json.dumps(plain(given), allow_nan=False)) == {
        "a": None,
        "b": [2, [None]],
        "c": [1.5, None],
    }


def page_about(path):
    """What a page of `inspect` holds beside numbers."""
    import re

    found = re.search(
        r'<script type="application/json" id="about">(.*?)</script>', path.read_text("utf-8"), re.S
    )
    return json.loads(found[1])


def test_inspect_a_text_model(text_model, text_file, capsys, tmp_path):
    done = call_json(capsys, "inspect", text_model, text_file, "--start", 10, "--length", 80, "--gradients")
    about = page_about(tmp_path / "gates.html")
    assert "".join(about["tokens"]) == TEXT[10:89]  # the last one is only to be foretold
    (layer,) = about["layers"]
    assert {a["name"] for a in layer["arrays"]} == {*"hcifgo", *(f"d_{n}" for n in "hcifgo")}
    assert about["expects"] and done["written"] == "gates.html"
    assert done["bytes"] == (tmp_path / "gates.html").stat().st_size
    (units,) = done["layers"].values()
    strengths = [abs(unit["r"]) for unit in units]
    assert len(units) == 5 and strengths == sorted(strengths, reverse=True)
    assert call("inspect", text_model, text_file, "--out", "gates.png") == 0
    assert (tmp_path / "gates.png").read_bytes()[:4] == b"\x89PNG"


def test_inspect_a_model_of_words(text_file, capsys, tmp_path):
    assert call("train", "text", text_file, "--level", "word", *SMALL_TEXT, "--out", "words") == 0
    assert call("inspect", "words/model.safetensors", text_file, "--length", 20, "--out", "w.html") == 0
    about = page_about(tmp_path / "w.html")
    assert about["level"] == "word" and about["tokens"][:3] == ["the", "cat", "sat"]


def test_inspect_a_forecasting_model(table_model, table_file, capsys, tmp_path):
    assert call("inspect", table_model, table_file, "--gradients") == 0
    about = page_about(tmp_path / "gates.html")
    assert about["steps"] == 6 and "d_c" in {a["name"] for a in about["layers"][0]["arrays"]}
    out = capsys.readouterr().out
    assert "Rows 153 to 158 of 160." in out  # the two after them are foretold
    assert call("inspect", table_model, table_file, "--length", 40) == 0
    assert "trained on windows of 6 rows" in capsys.readouterr().out
    assert page_about(tmp_path / "gates.html")["steps"] == 40


def test_inspect_arrays_and_tables(capsys, tmp_path):
    model = nl.Sequential([nl.GRU(3, name="g", input_shape=(None, 2)), nl.Dense(1)])
    model.compile("sgd", "mse")
    model.save("m.safetensors")
    x = np.random.default_rng(0).standard_normal((4, 9, 2)).astype(np.float32)
    np.save("x.npy", x)
    np.savez("xy.npz", x=x, y=np.ones((4, 1), np.float32), lengths=np.array([9, 5, 9, 9]))
    (tmp_path / "t.csv").write_text("a,b,name\n" + "".join(f"{i},{i * i % 7},x\n" for i in range(30)))
    assert call("inspect", "m.safetensors", "x.npy", "--row", 2, "--length", 5) == 0
    shown = page_about(tmp_path / "gates.html")["series"]
    np.testing.assert_allclose(shown[0]["values"], x[2, :5, 0], rtol=1e-5)
    assert call("inspect", "m.safetensors", "xy.npz", "--gradients", "--row", 1) == 0
    assert "d_z" in {a["name"] for a in page_about(tmp_path / "gates.html")["layers"][0]["arrays"]}
    assert call("inspect", "m.safetensors", "t.csv") == 0
    assert [s["name"] for s in page_about(tmp_path / "gates.html")["series"]] == ["a", "b"]
    capsys.readouterr()
    for arguments, message in (
        (("x.npy", "--row", 4), "--row 4: x.npy holds 4 sequences"),
        (("x.npy", "--gradients"), "has no array y"),
        (("x.npy", "--start", 9), "--start 9: x.npy has 9 steps"),
        (("xy.npz", "--length", 3), "cut the arrays yourself"),
        (("x.npy", "--out", "a.bmp"), "--out must end in .html, .png"),
        (("nowhere.npy",), "no file 'nowhere.npy'"),
    ):
        assert message in refused(capsys, "inspect", "m.safetensors", *arguments)


# ------------------------------------------------------------------------------- scikit-learn estimators


@pytest.fixture
def sequences_file(tmp_path):
    """Waves that rise and waves that fall, of unequal lengths."""
    pytest.importorskip("sklearn", reason="the estimators need scikit-learn (extra: sklearn)")
    random = np.random.default_rng(0)
    lengths = random.integers(6, 12, 60)
    y = np.array(["rise", "fall"] * 30)
    x = np.zeros((60, 12, 2), np.float32)
    for row, length, label in zip(x, lengths, y, strict=True):
        row[:length, 0] = (
            np.arange(length) * (1 if label == "rise" else -1) + random.normal(size=length) * 0.3
        )
    path = tmp_path / "moves.npz"
    np.savez(path, x=x, y=y, lengths=lengths)
    return path


def test_classify_judges_on_what_it_never_saw_and_is_used_afterwards(sequences_file, capsys):
    options = ["--units", "8", "--epochs", "15", "--learning-rate", "0.02", "--balanced", "--out", "c"]
    result = call_json(capsys, "train", "classify", sequences_file, *options)
    assert result["test"]["sequences"] == 12 and result["test"]["accuracy"] == 1.0
    assert result["test"]["commonest"] == 0.5 and set(result["test"]["recall"]) == {"rise", "fall"}
    assert json.loads(Path("c/run.json").read_text())["finished"]
    again = call_json(capsys, "train", "classify", sequences_file, *options, "--overwrite")
    assert again["test"] == result["test"]
    judged = call_json(capsys, "evaluate", "c/model.safetensors", sequences_file)
    assert judged["sequences"] == 60 and judged["accuracy"] > 0.95
    predicted = call_json(capsys, "predict", "c/model.safetensors", sequences_file, "--out", "p.csv")
    assert (
        predicted["columns"] == ["sequence", "class", "p(fall)", "p(rise)"] and len(predicted["rows"]) == 60
    )
    assert Path("p.csv").read_text().splitlines()[0] == "sequence,class,p(fall),p(rise)"


def test_detect_lists_the_rows_that_are_unlike_the_rest(tmp_path, capsys):
    pytest.importorskip("sklearn", reason="the estimators need scikit-learn (extra: sklearn)")
    load = np.sin(np.arange(400) / 3)
    load[300] += 3
    lines = [f"{minute},{'' if minute == 50 else value},7" for minute, value in enumerate(load)]
    path = tmp_path / "load.csv"
    path.write_text("\n".join(["time,load,rpm", *lines]) + "\n")
    options = ["--units", "8", "--epochs", "10", "--learning-rate", "0.02", "--learn", "0.6", "--out", "d"]
    result = call_json(capsys, "train", "detect", path, *options)
    assert result["columns"] == ["load", "rpm"] and result["learned_rows"] == 240
    assert result["anomalies"][0]["row"] == 301 and result["anomalies"][0]["time"] == "300.0"
    assert any("1 missing of 400" in note for note in result["notes"])
    rows = Path("d/anomalies.csv").read_text().splitlines()
    assert rows[0] == "time,load,rpm,surprise,abnormal" and len(rows) == 401 and rows[301].endswith(",1")
    assert os.path.getsize("d/anomalies.png") > 5000
    found = call_json(capsys, "evaluate", "d/model.safetensors", path)
    assert [one["row"] for one in found["anomalies"]] == [one["row"] for one in result["anomalies"]]
    table = call_json(capsys, "predict", "d/model.safetensors", path)
    assert table["columns"] == ["time", "surprise", "abnormal"] and table["rows"][300][2] == 1
    assert "no column 'speed'" in refused(capsys, "train", "detect", path, "--columns", "load,speed")


def test_what_classify_and_detect_refuse(sequences_file, tmp_path, capsys):
    np.savez(tmp_path / "bare.npz", x=np.ones((4, 3)))
    assert "must hold x, y" in refused(capsys, "train", "classify", "bare.npz")
    np.savez(tmp_path / "one.npz", x=np.ones((4, 3)), y=np.array([0, 0, 0, 1]))
    assert "--test 0.2" in refused(capsys, "train", "classify", "one.npz")
    np.savez(tmp_path / "long.npz", x=np.ones((4, 3)), y=np.zeros(4), lengths=np.array([1, 2, 3, 4]))
    assert "lengths must be 4 integers from 1 to 3" in refused(capsys, "train", "classify", "long.npz")
    assert "--units" in refused(capsys, "train", "classify", sequences_file, "--units", "many")
    assert "no file" in refused(capsys, "train", "classify", "none.npz")
    (tmp_path / "words.csv").write_text("a,b\nx,y\nz,w\n")
    assert "no numeric column" in refused(capsys, "train", "detect", "words.csv")
    regressor = nl.estimators.LSTMRegressor(units=2, epochs=1).fit(np.ones((4, 3)), np.arange(4.0))
    regressor.save(tmp_path / "r.safetensors")
    assert "used from Python" in refused(capsys, "evaluate", "r.safetensors", sequences_file)
