"""`numlstm inspect`: a model's gates over a text, a table or arrays, as one HTML page or a picture.

What is read follows the model file, as in `evaluate`: a language model takes a text, a forecasting model a table, any
other model arrays (.npy, .npz, or the numeric columns of a .csv).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import numpy as np
import typer

from numlstm.cli import forecast, text
from numlstm.cli.common import Backend, Json, Seed, command, load_model, read_arrays

if TYPE_CHECKING:
    from numlstm.models import Model

STRONGEST = 5  # units named on the terminal, for each layer
DRAWN = 16  # units in a picture


@dataclass
class _Input:
    """What goes into the model, and how it is shown."""

    x: np.ndarray
    y: np.ndarray | None
    shown: dict[str, Any]  # tokens and vocabulary, or series: as `page` takes them
    notes: list[str] = field(default_factory=list)
    options: dict[str, Any] = field(default_factory=dict)  # mask, lengths
    row: int = 0


def inspect(
    model: Annotated[Path, typer.Argument(metavar="MODEL", help="A model file (.safetensors).")],
    file: Annotated[str, typer.Argument(metavar="INPUT", help="Text, CSV table, or arrays (.npz, .npy).")],
    out: Annotated[
        Path,
        typer.Option(
            "--out", help="The page to write (.html), or a picture of the gates (.png, .svg, .pdf)."
        ),
    ] = Path("gates.html"),
    start: Annotated[int, typer.Option(min=0, help="The first token, row or step to read.")] = 0,
    length: Annotated[
        int | None,
        typer.Option(
            min=1, help="How many of them: 5000 unless given; of a table, the model's window at its end."
        ),
    ] = None,
    row: Annotated[int, typer.Option(min=0, help="Arrays of several sequences: which one is shown.")] = 0,
    gradients: Annotated[
        bool, typer.Option("--gradients", help="Also the loss's gradient by every state and gate.")
    ] = False,
    seed: Seed = 0,
    backend: Backend = None,
    as_json: Json = False,
) -> None:
    """Look inside a model: its gates over an input, unit by unit, as a page for the browser.

    The page needs no network: the input coloured by any unit of any gate or state, the units sorted by what they
    seem to follow, and the cell's flow diagram with the numbers of each step.
    """
    from numlstm.inspect import follow, page, plots, trace
    from numlstm.io.atomic import write_text

    if out.suffix not in (".html", *plots.KINDS):
        raise ValueError(f"--out must end in .html, {', '.join(plots.KINDS)}, got {out}")
    with command(as_json, seed, backend) as result:
        trained, preprocessing = load_model(model)
        kind = preprocessing.get("kind")
        read = {text.KIND: _text, forecast.KIND: _table}.get(str(kind), _arrays)
        given = read(trained, preprocessing, file, start, length, row, gradients)
        found = trace(trained, given.x, given.y if gradients else None, **given.options)
        for note in given.notes:
            print(note)
        tokens = given.shown.get("tokens")
        features = follow.text_features(tokens) if tokens else follow.series_features(given.shown["series"])
        if out.suffix == ".html":
            written = page(
                found, row=given.row, title=f"{model.name} reads {Path(file).name}", notes=" ".join(given.notes),
                **given.shown,
            )  # fmt: skip
            write_text(out, written)
        else:
            # More units than rows that can be told apart: those that follow something most.
            values = next(iter(found.layers.values())).remembered
            units = None
            if values.shape[2] > DRAWN and values.shape[1] == given.x.shape[1]:
                units = [u for u, _, _ in follow.strongest(features, values[given.row], DRAWN)]
            plots.save(plots.gates(found, row=given.row, tokens=tokens, units=units), out)
        result |= {"model": model, "file": file, "written": out, "bytes": out.stat().st_size, "layers": {}}
        for path, layer in found.layers.items():
            name, values = layer.memory, layer.remembered
            if values.shape[1] != given.x.shape[1]:
                continue
            print(f"{path} ({layer.cell.name}, {values.shape[2]} units), {name}:")
            result["layers"][path] = []
            for unit, feature, r in follow.strongest(features, values[given.row], STRONGEST):
                print(f"  unit {unit:>4} goes with {feature} (r = {r:+.2f})")
                result["layers"][path].append({"state": name, "unit": unit, "follows": feature, "r": r})
        print(f"Written: {out}")


def _part(what: str, total: int, start: int, length: int, notes: list[str], file: str) -> slice:
    """The part that is read, with a note when it is not the whole."""
    stop = min(total, start + length)
    if stop - start < 1:
        raise ValueError(f"--start {start}: {file} has {total:,} {what}s")
    if stop - start < total:
        notes.append(f"{what.capitalize()}s {start + 1:,} to {stop:,} of {total:,}.")
    return slice(start, stop)


def _text(
    model: Model,
    preprocessing: Mapping[str, Any],
    file: str,
    start: int,
    length: int | None,
    row: int,
    y: bool,
) -> _Input:
    """A text, as the model's tokens."""
    from numlstm.data.text import Vocabulary, read_text

    _one_row(row, file)
    vocabulary, content = Vocabulary.from_dict(preprocessing["vocabulary"]), read_text(file)
    notes: list[str] = []
    ids = vocabulary.encode(content)
    part = _part(text.UNIT[vocabulary.level], len(ids), start, length or 5000, notes, file)
    ids = ids[part]
    # Characters as they stand, also those that the model does not know; of unknown words nothing else is at hand.
    tokens = list(content[part]) if vocabulary.level == "char" else [vocabulary.tokens[i] for i in ids]
    targets = None
    if y:
        if len(ids) < 2:
            raise ValueError("--gradients: a text of at least 2 tokens is needed, to know what comes next")
        ids, targets, tokens = ids[:-1], ids[None, 1:], tokens[:-1]
    return _Input(ids[None], targets, {"tokens": tokens, "vocabulary": vocabulary.tokens}, notes)


def _table(
    model: Model,
    preprocessing: Mapping[str, Any],
    file: str,
    start: int,
    length: int | None,
    row: int,
    y: bool,
) -> _Input:
    """The rows of a table that a forecasting model reads: its window before the end, or from --start."""
    from numlstm.data.series import Series
    from numlstm.data.tables import read_csv

    _one_row(row, file)
    series, table = Series.from_dict(preprocessing["series"]), read_csv(file)
    inputs, targets, notes = series.features.transform(table), None, list[str]()
    length = length or series.window
    if y:
        windows = series.windows(table)
        if len(windows.y) == 0 or length != series.window or start:
            raise ValueError(
                f"--gradients: takes the model's own window of {series.window} rows (no --start, no --length), with "
                f"{series.horizon} known values of {series.target} after it"
            )
        origin = int(windows.origin[-1])
        part = slice(origin - series.window + 1, origin + 1)
        targets = series.encode(table, windows)[-1:]
    elif start:
        part = _part("row", len(inputs), start, length, notes, file)
    else:
        part = slice(max(0, len(inputs) - length), len(inputs))
    notes[:] = [f"Rows {part.start + 1:,} to {part.stop:,} of {len(inputs):,}."]
    if part.stop - part.start != series.window:
        notes.append(f"The model was trained on windows of {series.window} rows.")
    x = inputs[part]
    shown = {name: x[:, k] for k, name in enumerate(series.features.names)}
    if len(shown) != x.shape[1]:  # a category takes several columns
        shown = {f"input {k}": x[:, k] for k in range(x.shape[1])}
    return _Input(x[None], targets, {"series": shown}, notes)


def _arrays(
    model: Model,
    preprocessing: Mapping[str, Any],
    file: str,
    start: int,
    length: int | None,
    row: int,
    y: bool,
) -> _Input:
    """Arrays: x (batch, time, features) or (time, features), or the numeric columns of a table."""
    from numlstm.cli.tools import array_options
    from numlstm.data.tables import read_csv

    notes: list[str] = []
    names: list[str] | None = None
    if file.endswith((".csv", ".csv.gz")):
        table = read_csv(file)
        names = [name for name, values in table.columns.items() if values.dtype.kind == "f"]
        if not names:
            raise ValueError(f"{file} has no numeric column")
        arrays = {"x": np.stack([table.numbers(name) for name in names], axis=1).astype(np.float32)}
    else:
        arrays = read_arrays(file)
    options = array_options(arrays, ("y", "sample_weight", "mask", "lengths"), file)
    x, targets = arrays["x"], options.pop("y", None)
    if x.ndim == 2 and not np.issubdtype(x.dtype, np.integer):
        x = x[None]
    if not 0 <= row < len(x):
        raise ValueError(f"--row {row}: {file} holds {len(x)} sequences")
    if y and targets is None:
        raise ValueError(f"--gradients: {file} has no array y to compare with")
    part = _part("step", x.shape[1], start, length or 5000, notes, file)
    if part != slice(0, x.shape[1]) and (y or options):
        raise ValueError(
            "--start, --length: not with --gradients, a mask or lengths: cut the arrays yourself"
        )
    x = x[:, part]
    shown = np.asarray(x[row], np.float64).reshape(x.shape[1], -1)
    columns = names or (["x"] if shown.shape[1] == 1 else [f"x[{k}]" for k in range(shown.shape[1])])
    return _Input(
        x, targets if y else None, {"series": dict(zip(columns, shown.T, strict=True))}, notes, options, row
    )


def _one_row(row: int, file: str) -> None:
    if row:
        raise ValueError(f"--row {row}: {file} is one sequence")
