"""Callbacks: what each does to a training run, what it writes, and what it refuses."""

import csv
import io
import json
import re
import sys

import numpy as np
import pytest

import numlstm as nl
from numlstm import callbacks
from numlstm.callbacks import tracking

X = np.random.default_rng(0).normal(size=(12, 4, 2)).astype(np.float32)
Y = X[:, -1, :1]


def model(loss="mse"):
    nl.set_seed(0)
    made = nl.Sequential([nl.LSTM(3, input_shape=(4, 2)), nl.Dense(1)])
    made.compile(nl.optimizers.SGD(0.1), loss)
    return made


class Figures(callbacks.Callback):
    """Puts given figures in the place of those of the epochs, to see what the others do with them."""

    def __init__(self, values, name="val_loss"):
        self.values, self.name = values, name

    def on_epoch_end(self, epoch, logs):
        logs[self.name] = self.values[epoch]


def fit(made, *watchers, epochs=8, **options):
    return made.fit(X, Y, epochs=epochs, callbacks=list(watchers), verbose=0, **options)


def test_hooks_are_called_in_order_and_with_what():
    seen = []
    names = [n for n in dir(callbacks.Callback) if n.startswith("on_")]
    hooks = {name: (lambda *args, name=name: seen.append((name, *args[:-1]))) for name in names}
    made = model()
    fit(made, callbacks.LambdaCallback(**hooks), epochs=2, batch_size=6, validation_data=(X, Y))
    epoch = lambda e: [
        ("on_epoch_begin", e),
        *[(f"on_train_batch_{when}", b) for b in (0, 1) for when in ("begin", "end")],
        ("on_test_begin",),
        *[(f"on_test_batch_{when}", b) for b in (0, 1) for when in ("begin", "end")],
        ("on_test_end",),
        ("on_epoch_end", e),
    ]
    assert seen == [("on_train_begin",), *epoch(0), *epoch(1), ("on_train_end",)]
    seen.clear()
    made.predict(X, verbose=0, callbacks=[callbacks.LambdaCallback(**hooks)])
    assert [name for name, *_ in seen] == [
        "on_predict_begin", "on_predict_batch_begin", "on_predict_batch_end", "on_predict_end"
    ]  # fmt: skip


def test_a_callback_knows_model_and_parameters():
    class Curious(callbacks.Callback):
        def on_train_batch_end(self, batch, logs):
            self.seen = self.model, dict(self.params), dict(logs)

    curious, made = Curious(), model()
    made.fit(X, Y, epochs=1, batch_size=5, callbacks=curious, verbose=0)
    assert curious.seen[0] is made
    assert curious.seen[1]["steps"] == 3
    assert curious.seen[2]["loss"] > 0


def test_history_is_returned_and_kept():
    made = model()
    history = fit(made, epochs=3)
    assert history is made.history
    assert history.epoch == [0, 1, 2]
    assert len(history.history["loss"]) == 3


def test_early_stopping():
    stop = callbacks.EarlyStopping(patience=2)
    history = fit(model(), Figures([5, 4, 4, 4, 3, 2, 1, 0]), stop)
    assert history.epoch == [0, 1, 2, 3]
    assert stop.stopped_epoch == 3
    rising = callbacks.EarlyStopping("val_accuracy", patience=1)
    assert fit(model(), Figures([1, 2, 3, 3, 4], "val_accuracy"), rising).epoch == [0, 1, 2, 3]
    small = callbacks.EarlyStopping(min_delta=0.5, patience=1)
    assert fit(model(), Figures([5, 4.4, 4.2, 1]), small).epoch == [0, 1, 2]
    late = callbacks.EarlyStopping(patience=1, start_from_epoch=3)
    assert fit(model(), Figures([1, 2, 3, 4, 5, 6, 7, 8]), late).epoch == [0, 1, 2, 3, 4]
    unmet = callbacks.EarlyStopping(patience=2, baseline=1.0)
    assert fit(model(), Figures([5, 4, 4, 4, 4]), unmet).epoch == [0, 1, 2]  # 4 is better than 5, not than 1


def test_early_stopping_goes_back_to_the_best_weights():
    kept = []
    keep = callbacks.LambdaCallback(on_epoch_end=lambda epoch, logs: kept.append(made.get_weights()))
    made = model()
    fit(made, keep, Figures([5, 3, 4, 4, 4]), callbacks.EarlyStopping(patience=2, restore_best_weights=True))
    assert len(kept) == 4
    for a, b in zip(made.get_weights(), kept[1], strict=True):
        assert np.array_equal(a, b)


def test_reduce_on_plateau():
    made = model()
    reduce = callbacks.ReduceLROnPlateau(factor=0.5, patience=2, min_lr=0.04, cooldown=1)
    history = fit(made, Figures([5, 4, 4, 4, 4, 4, 4, 4]), reduce)
    rates = history.history["learning_rate"]
    assert rates[:4] == [0.1, 0.1, 0.1, 0.1]
    assert rates[4:6] == [0.05, 0.05]
    assert made.optimizer.learning_rate == 0.04


def test_learning_rate_scheduler():
    made = model()
    history = fit(
        made, callbacks.LearningRateScheduler(lambda epoch, rate: rate if epoch < 2 else rate / 2), epochs=4
    )
    np.testing.assert_allclose(history.history["learning_rate"], [0.1, 0.1, 0.05, 0.025])
    scheduled = model()
    scheduled.compile(nl.optimizers.SGD(nl.schedules.CosineDecay(0.1, 10)), "mse")
    with pytest.raises(ValueError, match="follows the schedule CosineDecay"):
        fit(scheduled, callbacks.LearningRateScheduler(lambda epoch, rate: 0.1))


def test_terminate_on_nan(capsys):
    made = model(lambda y_true, y_pred: (y_pred - y_true) * float("nan"))
    history = fit(made, callbacks.TerminateOnNaN(), batch_size=4)
    assert history.epoch == [0]
    assert made.optimizer.iterations == 1
    assert "Batch 0: the loss is nan" in capsys.readouterr().out


def test_checkpoints(tmp_path):
    made, best = model(), tmp_path / "best.safetensors"
    keep = callbacks.ModelCheckpoint(best, save_best_only=True, preprocessing={"vocabulary": "abc"})
    kept = []
    see = callbacks.LambdaCallback(on_epoch_end=lambda epoch, logs: kept.append(made.get_weights()))
    each = callbacks.ModelCheckpoint(tmp_path / "m-{epoch:02d}-{val_loss:.1f}.safetensors")
    fit(made, see, Figures([5, 3, 4, 3.5]), keep, each, epochs=4)
    again = nl.load(best)
    assert again.preprocessing == {"vocabulary": "abc"}
    for a, b in zip(again.get_weights(), kept[1], strict=True):
        assert np.array_equal(a, b)
    names = ["m-01-5.0", "m-02-3.0", "m-03-4.0", "m-04-3.5"]
    assert sorted(p.stem for p in tmp_path.glob("m-*")) == names
    steps = callbacks.ModelCheckpoint(tmp_path / "s-{epoch}-{batch}.safetensors", save_freq=2)
    fit(made, steps, epochs=2, batch_size=4)
    assert sorted(p.stem for p in tmp_path.glob("s-*")) == ["s-1-2", "s-2-1", "s-2-3"]


def test_training_goes_on_from_a_checkpoint_with_its_optimizer(tmp_path):
    path = tmp_path / "m.safetensors"
    whole = model()
    whole.compile("adam", "mse")
    fit(whole, callbacks.ModelCheckpoint(path, "loss", include_optimizer=True), epochs=1, shuffle=False)
    again = nl.load(path)
    for m in (whole, again):
        fit(m, epochs=2, shuffle=False)
    for a, b in zip(whole.get_weights(), again.get_weights(), strict=True):
        assert np.array_equal(a, b)


def test_csv_logger(tmp_path):
    path = tmp_path / "log.csv"
    made = model()
    fit(made, callbacks.CSVLogger(path), epochs=2)
    fit(made, callbacks.CSVLogger(path, append=True), epochs=3, initial_epoch=2)
    with open(path, newline="") as file:
        rows = list(csv.reader(file))
    assert rows[0] == ["epoch", "loss"]
    assert [r[0] for r in rows[1:]] == ["0", "1", "2"]
    assert float(rows[1][1]) > 0
    fit(made, callbacks.CSVLogger(path, separator=";"), epochs=1)
    assert path.read_text().startswith("epoch;loss\n0;")


def test_json_lines(tmp_path):
    path = tmp_path / "log.jsonl"
    made = model()
    history = fit(made, callbacks.JSONLogger(path), epochs=2, validation_data=(X, Y))
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    assert lines == [
        {"epoch": e, **{name: values[e] for name, values in history.history.items()}} for e in range(2)
    ]
    odd = [float("nan"), np.float32(0.5), np.array([1.0, np.inf])]
    logger = callbacks.JSONLogger(path, append=True)
    logger.on_train_begin({})
    for epoch, value in enumerate(odd, 2):
        logger.on_epoch_end(epoch, {"val_loss": value})
    lines = [json.loads(line, parse_constant=pytest.fail) for line in path.read_text().splitlines()]
    assert [line["epoch"] for line in lines] == [0, 1, 2, 3, 4]
    assert [line["val_loss"] for line in lines[2:]] == [None, 0.5, [1.0, None]]
    logger = callbacks.JSONLogger(path)
    logger.on_train_begin({})
    assert path.read_text() == ""


def test_tensorboard_refuses_what_can_not_be_and_names_its_extra(tmp_path, monkeypatch):
    with pytest.raises(ValueError, match="histogram_freq: expected a number of epochs >= 0, got -1"):
        callbacks.TensorBoard(tmp_path, histogram_freq=-1)
    with pytest.raises(ValueError, match="update_freq: expected 'epoch' or a number of steps >= 1, got 0"):
        callbacks.TensorBoard(tmp_path, update_freq=0)
    monkeypatch.setitem(sys.modules, "tensorboard.compat.proto.event_pb2", None)
    tracking._tensorboard.cache_clear()
    with pytest.raises(ImportError, match=re.escape("pip install 'numlstm[tensorboard]'")):
        fit(model(), callbacks.TensorBoard(tmp_path / "logs"))
    assert not (tmp_path / "logs").exists()


@pytest.mark.peers
def test_tensorboard_reads_back_what_was_written(tmp_path):
    """By its own EventAccumulator."""
    accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    from tensorboard.util.tensor_util import make_ndarray

    tracking._tensorboard.cache_clear()
    made = model()
    board = callbacks.TensorBoard(tmp_path, histogram_freq=2, update_freq=2, write_steps_per_second=True)
    history = fit(made, board, epochs=3, batch_size=4, validation_data=(X, Y)).history
    found = {}
    for part in ("train", "validation"):
        events = accumulator.EventAccumulator(str(tmp_path / part), size_guidance={"tensors": 0})
        events.Reload()
        found[part] = {
            tag: [(e.step, make_ndarray(e.tensor_proto)) for e in events.Tensors(tag)]
            for tag in events.Tags()["tensors"]
        }
    assert found["train"]["epoch_loss"] == [(e, np.float32(v)) for e, v in enumerate(history["loss"])]
    assert found["validation"]["epoch_loss"] == [
        (e, np.float32(v)) for e, v in enumerate(history["val_loss"])
    ]
    assert [v for _, v in found["train"]["epoch_learning_rate"]] == [np.float32(0.1)] * 3
    assert [step for step, _ in found["train"]["batch_loss"]] == [2, 4, 6, 8]
    assert all(v > 0 for _, v in found["train"]["epoch_steps_per_second"])
    weights = made.named_weights()
    assert set(weights) <= set(found["train"])
    for name, variable in weights.items():
        steps, buckets = zip(*found["train"][name], strict=True)
        assert steps == (0, 2)
        assert buckets[-1][:, 2].sum() == variable.size  # counts
        assert buckets[-1][0, 0] <= variable.numpy().min() and buckets[-1][-1, 1] >= variable.numpy().max()


def test_a_history_shows_itself():
    history = callbacks.History()
    assert "0 epochs" in history._repr_html_()
    for epoch, (loss, val) in enumerate([(3.0, 2.5), (2.0, 1.5), (1.0, 1e-5), (0.5, 2.0)]):
        history.on_epoch_end(epoch, {"loss": loss, "val_loss": val, "<b>": epoch})
    page = history._repr_html_()
    assert "<b>" not in page and "&lt;b&gt;" in page
    for text in ("4 epochs", "1 (first)", "3 (best)", "4 (last)", "1.0000e-05", "0.5000"):
        assert f">{text}<" in page
    assert "2 (" not in page
    from rich.console import Console

    console = Console(width=80, record=True, file=io.StringIO())
    console.print(history)
    assert "3 (best)" in console.export_text()


def test_a_foreign_backup_is_refused(tmp_path):
    backup = callbacks.BackupAndRestore(tmp_path)
    backup.path.write_bytes(b"not a backup")
    with pytest.raises(ValueError, match="is not a backup that can be read"):
        fit(model(), backup)
    made = model()
    with pytest.raises(RuntimeError):
        fit(
            made,
            callbacks.LambdaCallback(on_epoch_begin=_raise_in_epoch_1),
            callbacks.BackupAndRestore(tmp_path / "b"),
        )
    other = nl.Sequential([nl.LSTM(5, input_shape=(4, 2)), nl.Dense(1)])
    other.compile("sgd", "mse")
    with pytest.raises(ValueError, match="shape"):
        fit(other, callbacks.BackupAndRestore(tmp_path / "b"))


def _raise_in_epoch_1(epoch, logs):
    if epoch == 1:
        raise RuntimeError("power cut")


def test_a_backup_can_be_kept(tmp_path):
    backup = callbacks.BackupAndRestore(tmp_path, delete_checkpoint=False)
    made = model()
    fit(made, backup, epochs=2)
    assert backup.path.exists()
    assert fit(made, callbacks.BackupAndRestore(tmp_path), epochs=3).epoch == [0, 1, 2]


def test_sparse_validation_is_waited_for():
    stop = callbacks.EarlyStopping(patience=50)
    assert len(fit(model(), stop, epochs=4, validation_data=(X, Y), validation_freq=2).epoch) == 4


@pytest.mark.parametrize(
    "build, words",
    [
        (lambda: callbacks.EarlyStopping(mode="up"), "mode: expected auto, min or max"),
        (lambda: callbacks.EarlyStopping(patience=-1), "patience"),
        (lambda: callbacks.ReduceLROnPlateau(factor=1.5), "factor: expected a number between 0 and 1"),
        (lambda: callbacks.LearningRateScheduler(0.1), "schedule: expected a function"),
        (lambda: callbacks.ModelCheckpoint("m", save_weights_only=True), "save_weights_only"),
        (
            lambda: callbacks.ModelCheckpoint("m", save_freq="batch"),
            "save_freq: expected 'epoch' or a number",
        ),
        (lambda: callbacks.BackupAndRestore(""), "backup_dir: got an empty path"),
        (lambda: callbacks.LambdaCallback(on_epoch=print), "unknown hook 'on_epoch'"),
        (
            lambda: fit(model(), callbacks.EarlyStopping()),
            "monitor 'val_loss' is not among loss; give validation data",
        ),
        (lambda: fit(model(), callbacks.EarlyStopping("lost")), "monitor 'lost' is not among loss"),
        (
            lambda: fit(model(), callbacks.LearningRateScheduler(lambda e, r: None)),
            "schedule: gave None for epoch 0",
        ),
        (
            lambda: fit(model(), callbacks.ModelCheckpoint("{x}.safetensors")),
            "filepath: 'x' is not among epoch, loss",
        ),
    ],
)
def test_errors_name_what_is_wrong(build, words):
    with pytest.raises(ValueError, match=words):
        build()
