"""`numlstm train classify` and `train detect`: the scikit-learn estimators on files, and what the models do afterwards.

`classify` reads an .npz file: `x` (samples, time, features), or (samples, time) for one feature, `y` (samples,), and for
unequal sequences `lengths` (samples,), behind which x is not looked at. `detect` reads a table whose rows are time steps.
"""

from __future__ import annotations

import csv
import io
import time
from collections.abc import Sequence
from pathlib import Path
from types import ModuleType
from typing import Annotated, Any

import numpy as np
import typer

from numlstm.cli.common import (
    Backend,
    Json,
    Out,
    Overwrite,
    Run,
    Seed,
    command,
    duration,
    picture,
    read_arrays,
)

Units = Annotated[str, typer.Option(help="Units of each layer, with commas between.")]
Cell = Annotated[str, typer.Option(help="lstm, gru, rnn, slstm or indrnn.")]
Dropout = Annotated[float, typer.Option(min=0, max=0.95, help="Dropout after each layer.")]
Epochs = Annotated[int, typer.Option(min=1, help="Most passes over the training part.")]
Batch = Annotated[int, typer.Option(min=1, help="Sequences a step.")]
Rate = Annotated[float, typer.Option(min=1e-9, help="Adam's.")]
Patience = Annotated[
    int,
    typer.Option(
        min=0, help="Hold a tenth out and stop after so many epochs without a better one; 0: don't."
    ),
]


def _estimators() -> ModuleType:
    """The estimators; that scikit-learn is missing is the person's to mend, so one line says how."""
    try:
        from numlstm import estimators
    except ImportError as error:
        raise ValueError(str(error)) from None
    return estimators


def _layers(text: str) -> tuple[int, ...]:
    try:
        return tuple(int(part) for part in text.split(","))
    except ValueError:
        raise ValueError(f"--units must be whole numbers with commas between, got {text!r}") from None


def train_classify(
    context: typer.Context,
    file: Annotated[str, typer.Argument(help="An .npz file with x, y and, for unequal sequences, lengths.")],
    test: Annotated[
        float, typer.Option(min=0.01, max=0.9, help="Share of the sequences to judge the model on.")
    ] = 0.2,
    units: Units = "64",
    cell: Cell = "lstm",
    bidirectional: Annotated[bool, typer.Option("--bidirectional", help="Also read from the end.")] = False,
    dropout: Dropout = 0.0,
    balanced: Annotated[
        bool, typer.Option("--balanced", help="Weigh classes so that each counts alike.")
    ] = False,
    epochs: Epochs = 100,
    patience: Patience = 15,
    batch: Batch = 32,
    learning_rate: Rate = 5e-3,
    out: Out = None,
    overwrite: Overwrite = False,
    seed: Seed = 0,
    backend: Backend = None,
    as_json: Json = False,
) -> None:
    """Train a classifier of sequences, and judge it on a part that it never saw."""
    settings = _settings(context)
    with command(as_json, seed, backend) as result:
        kind = _estimators().LSTMClassifier
        sequences, labels = _labelled(file)
        train, held = _split(labels, test, seed)
        classifier = kind(
            _layers(units),
            cell=cell,
            bidirectional=bidirectional,
            dropout=dropout,
            class_weight="balanced" if balanced else None,
            epochs=epochs,
            early_stopping=patience > 0,
            n_iter_no_change=max(1, patience),
            batch_size=batch,
            learning_rate=learning_rate,
            random_state=seed,
            verbose="auto",
        )
        run = Run.start(
            "train classify", settings, [Path(file)], out=out, stem=Path(file).stem, overwrite=overwrite
        )
        print(
            f"{file}: {len(labels):,} sequences, {len(np.unique(labels))} classes; {len(held):,} are for the test.\n"
        )
        began = time.perf_counter()
        classifier.fit([sequences[k] for k in train], labels[train])
        seconds = time.perf_counter() - began
        classifier.save(run.model)
        print(f"\nTrained in {duration(seconds)}, {classifier.n_iter_} epochs.")
        judgement = _judge_labels(classifier, [sequences[k] for k in held], labels[held])
        _print_labels(judgement, "Test part")
        print(f"Written: {run.model}")
        found = {"model": run.model, "epochs": classifier.n_iter_, "seconds": seconds, "test": judgement}
        run.finish(found)
        result |= found


def _settings(context: typer.Context) -> dict[str, Any]:
    return {
        name: value for name, value in context.params.items() if name not in ("out", "overwrite", "as_json")
    }


def _labelled(file: str) -> tuple[list[np.ndarray], np.ndarray]:
    """Sequences (time, features) and labels of an .npz file."""
    arrays = read_arrays(file)
    strangers = sorted(set(arrays) - {"x", "y", "lengths"})
    if strangers or "y" not in arrays:
        raise ValueError(f"{file} must hold x, y and perhaps lengths; it holds: {', '.join(arrays)}")
    return _sequences(arrays, file), arrays["y"]


def _sequences(arrays: dict[str, np.ndarray], file: str) -> list[np.ndarray]:
    x = arrays["x"]
    if x.ndim == 2:
        x = x[..., None]
    if x.ndim != 3:
        raise ValueError(f"{file}: x must be (samples, time[, features]), got {x.shape}")
    lengths = arrays.get("lengths", np.full(len(x), x.shape[1]))
    if (
        lengths.shape != (len(x),)
        or lengths.dtype.kind not in "iu"
        or ((lengths < 1) | (lengths > x.shape[1])).any()
    ):
        raise ValueError(f"{file}: lengths must be {len(x)} integers from 1 to {x.shape[1]}")
    return [row[:length] for row, length in zip(x, lengths, strict=True)]


def _split(labels: np.ndarray, test: float, seed: int) -> tuple[np.ndarray, np.ndarray]:
    from sklearn.model_selection import train_test_split

    if labels.ndim != 1:
        raise ValueError(f"y must have one label a sequence, got shape {labels.shape}")
    try:
        return train_test_split(np.arange(len(labels)), test_size=test, random_state=seed, stratify=labels)
    except ValueError as error:
        raise ValueError(f"--test {test}: {error}") from None


def _judge_labels(classifier: Any, sequences: list[np.ndarray], labels: np.ndarray) -> dict[str, Any]:
    """Accuracy beside the commonest class' share, and how many of each class were found."""
    from sklearn.metrics import f1_score

    predicted = classifier.predict(sequences)
    classes, counts = np.unique(labels, return_counts=True)
    return {
        "sequences": len(labels),
        "accuracy": float(np.mean(predicted == labels)),
        "commonest": float(counts.max() / len(labels)),
        "macro_f1": float(f1_score(labels, predicted, average="macro", zero_division=0)),
        "recall": {str(c): float(np.mean(predicted[labels == c] == c)) for c in classes},
    }


def _print_labels(judgement: dict[str, Any], title: str) -> None:
    print(f"\n{title} ({judgement['sequences']:,} sequences):")
    print(
        f"  accuracy {judgement['accuracy']:.3f}   (always the commonest class: {judgement['commonest']:.3f})"
    )
    print(f"  macro F1 {judgement['macro_f1']:.3f}")
    for name, recall in judgement["recall"].items():
        print(f"  {recall:6.1%} of {name} found")


def train_detect(
    context: typer.Context,
    file: Annotated[
        str, typer.Argument(help="A CSV file (.gz too) whose rows are time steps, or the bundled sunspots.")
    ],
    columns: Annotated[
        str, typer.Option(help="Columns to watch, with commas between; all numeric ones when left out.")
    ] = "",
    time_column: Annotated[
        str, typer.Option("--time", help="Column that gives the rows' times; found when left out.")
    ] = "",
    learn: Annotated[
        float, typer.Option(min=0.01, max=1, help="Share of the rows, the first ones, to learn from.")
    ] = 1.0,
    contamination: Annotated[
        float, typer.Option(min=1e-6, max=0.5, help="Share of these to call abnormal.")
    ] = 0.01,
    window: Annotated[int, typer.Option(min=1, help="Rows a forecast is made from, at least.")] = 24,
    units: Units = "32",
    cell: Cell = "lstm",
    dropout: Dropout = 0.0,
    epochs: Epochs = 50,
    patience: Patience = 0,
    batch: Batch = 32,
    learning_rate: Rate = 5e-3,
    out: Out = None,
    overwrite: Overwrite = False,
    seed: Seed = 0,
    backend: Backend = None,
    as_json: Json = False,
) -> None:
    """Learn the usual course of a table, and list the rows that are unlike it."""
    settings = _settings(context)
    with command(as_json, seed, backend) as result:
        kind = _estimators().LSTMAnomalyDetector
        from numlstm.data.tables import read_csv

        table = read_csv(file)
        when = table.time_column(time_column or None)
        names = [name.strip() for name in columns.split(",") if name.strip()]
        names = names or [n for n, v in table.columns.items() if v.dtype.kind == "f" and n != when]
        values, notes = _filled(table, names)
        rows = round(len(table) * learn)
        detector = kind(
            window,
            contamination=contamination,
            rows="steps",
            units=_layers(units),
            cell=cell,
            dropout=dropout,
            epochs=epochs,
            early_stopping=patience > 0,
            n_iter_no_change=max(1, patience),
            batch_size=batch,
            learning_rate=learning_rate,
            random_state=seed,
            verbose="auto",
        )
        if rows < 1:
            raise ValueError(f"--learn {learn} of {len(table)} rows leaves none to learn from")
        stem = Path(file).name.split(".")[0]
        run = Run.start(
            "train detect", settings, [Path(table.source)], out=out, stem=stem, overwrite=overwrite
        )
        print(f"{table.source}: {len(table):,} rows of {', '.join(names)}; learning from the first {rows:,}.")
        for note in notes:
            print(f"  - {note}")
        print()
        began = time.perf_counter()
        detector.fit(values[:rows])
        seconds = time.perf_counter() - began
        detector.save(run.model)
        detection = _Detection(table, when, names, values, detector)
        print(f"\nLearned in {duration(seconds)}.")
        detection.show()
        written: list[Path] = [run.model, detection.write(run.folder / "anomalies.csv")]
        drawn = picture(detection.picture, run.folder / "anomalies.png")
        written += [drawn] if drawn else []
        print("Written: " + ", ".join(map(str, written)))
        found = {
            "model": run.model,
            "columns": names,
            "rows": len(table),
            "learned_rows": rows,
            "seconds": seconds,
            "notes": notes,
            "anomalies": detection.found(),
            "written": written,
        }
        _keep_columns(run.model, names)
        run.finish(found)
        result |= found


def _keep_columns(path: Path, names: list[str]) -> None:
    """The columns' names in the model file, for `evaluate` and `predict`."""
    import numlstm as nl

    model = nl.load(path)
    model.save(path, preprocessing={**model.preprocessing, "columns": names})


def _filled(table: Any, names: Sequence[str]) -> tuple[np.ndarray, list[str]]:
    """The columns (rows, columns), gaps filled with the last known value (before the first one, with that), and notes."""
    from numlstm.data.tables import carry_forward

    if not names:
        raise ValueError(f"{table.source} has no numeric column to watch; it has: {', '.join(table.columns)}")
    columns, notes = [], []
    for name in names:
        values = table.numbers(name)
        gaps = np.isnan(values)
        if gaps.all():
            raise ValueError(f"column {name!r} of {table.source} has no known value")
        if gaps.any():
            notes.append(
                f"{name}: {int(gaps.sum()):,} missing of {len(values):,}; filled with the last known value"
            )
            values = carry_forward(values)
            values = np.where(np.isnan(values), values[~np.isnan(values)][0], values)
        columns.append(values)
    return np.stack(columns, axis=1), notes


class _Detection:
    """A table's scores: shown, written and drawn."""

    def __init__(
        self, table: Any, when: str | None, names: list[str], values: np.ndarray, detector: Any
    ) -> None:
        self.names, self.values = names, values
        self.time_name = when or "row"
        self.times = table[when] if when else np.arange(1, len(table) + 1)
        self.scores = detector.score_samples(values)
        self.abnormal = np.flatnonzero(self.scores < detector.offset_)

    def found(self) -> list[dict[str, Any]]:
        """The abnormal rows, the most abnormal first; rows count from 1, as the file's data rows do."""
        order = self.abnormal[np.argsort(self.scores[self.abnormal], kind="stable")]
        return [
            {"row": int(k) + 1, "time": str(self.times[k]), "surprise": float(-self.scores[k]),
             **{name: float(v) for name, v in zip(self.names, self.values[k], strict=True)}}
            for k in order
        ]  # fmt: skip

    def show(self, most: int = 10) -> None:
        """The most abnormal rows, as a small table."""
        found = self.found()
        print(f"\n{len(found):,} of {len(self.scores):,} rows are abnormal; the most abnormal:")
        for one in found[:most]:
            shown = ", ".join(f"{name} {one[name]:.6g}" for name in self.names[:4])
            print(f"  row {one['row']:>7}  {one['time']:<20} surprise {one['surprise']:8.3g}   {shown}")

    def write(self, path: Path) -> Path:
        """Every row with its surprise and label."""
        from numlstm.io.atomic import write_text

        lines = io.StringIO()
        writer = csv.writer(lines, lineterminator="\n")
        writer.writerow([self.time_name, *self.names, "surprise", "abnormal"])
        abnormal = set(self.abnormal.tolist())
        for k, (when, values, score) in enumerate(zip(self.times, self.values, self.scores, strict=True)):
            writer.writerow([when, *(f"{v:.9g}" for v in values), f"{-score:.6g}", int(k in abnormal)])
        write_text(path, lines.getvalue())
        return path

    def picture(self) -> Any:
        from numlstm.data.plots import anomaly_figure

        return anomaly_figure(
            self.times, self.values, -self.scores, self.abnormal, names=self.names, time_name=self.time_name
        )


def _estimator_and_data(path: Path, preprocessing: dict[str, Any], file: str) -> tuple[Any, Any]:
    """The estimator in a model file, and the file's data in its form: sequences and labels, or a detection."""
    estimator = _estimators().load(path)
    if preprocessing["estimator"] == "LSTMClassifier":
        return estimator, read_arrays(file)
    if preprocessing["estimator"] == "LSTMAnomalyDetector" and "columns" in preprocessing:
        from numlstm.data.tables import read_csv

        table = read_csv(file)
        names = list(preprocessing["columns"])
        return estimator, _Detection(table, table.time_column(), names, _filled(table, names)[0], estimator)
    raise ValueError(
        f"{path} holds an {preprocessing['estimator']}, which is used from Python: numlstm.estimators.load({str(path)!r})"
    )


def judge_file(path: Path, preprocessing: dict[str, Any], file: str) -> dict[str, Any]:
    """`numlstm evaluate`: a classifier's accuracy, or a table's abnormal rows."""
    estimator, data = _estimator_and_data(path, preprocessing, file)
    if isinstance(data, _Detection):
        data.show()
        return {"rows": len(data.scores), "anomalies": data.found()}
    if "y" not in data:
        raise ValueError(f"{file} has no array y to compare with")
    judgement = _judge_labels(estimator, _sequences(data, file), data["y"])
    _print_labels(judgement, f"All of {file}")
    return judgement


def predict_file(path: Path, preprocessing: dict[str, Any], file: str) -> tuple[list[str], list[list[Any]]]:
    """`numlstm predict`: a row for each sequence (its class, each class' probability) or for each row of a table."""
    estimator, data = _estimator_and_data(path, preprocessing, file)
    if isinstance(data, _Detection):
        abnormal = set(data.abnormal.tolist())
        rows = [
            [str(t), float(-s), int(k in abnormal)]
            for k, (t, s) in enumerate(zip(data.times, data.scores, strict=True))
        ]
        return [data.time_name, "surprise", "abnormal"], rows
    shares = estimator.predict_proba(_sequences(data, file))
    named = estimator.classes_[shares.argmax(axis=1)].tolist()
    header = ["sequence", "class", *(f"p({c})" for c in estimator.classes_.tolist())]
    return header, [
        [k + 1, str(c), *map(float, p)] for k, (c, p) in enumerate(zip(named, shares, strict=True))
    ]
