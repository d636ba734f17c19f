"""What every command shares: the common options, where output goes, and the folder of a training run.

A run's folder holds `run.json` (the command's settings, the input's checksum, in the end the result),
`backup/` (everything needed to go on after an interruption, until the run ends), and what the command makes:
the model, `history.csv`, pictures.
"""

from __future__ import annotations

import hashlib
import json
import math
import shutil
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, redirect_stdout
from pathlib import Path
from typing import Annotated, Any, Literal

import numpy as np
import typer

Json = Annotated[
    bool, typer.Option("--json", help="Print one JSON object on stdout; progress goes to stderr.")
]
Seed = Annotated[int, typer.Option(help="Seed of all randomness: same seed, same result.")]
Backend = Annotated[
    str | None, typer.Option(help="auto, cpu, cuda or reference (plain NumPy); else NUMLSTM_BACKEND decides.")
]
Out = Annotated[
    Path | None, typer.Option("--out", help="Folder for the results; without it a new one under runs/.")
]
Overwrite = Annotated[bool, typer.Option("--overwrite", help="Replace what --out already holds.")]
Resume = Annotated[
    Path | None,
    typer.Option("--resume", help="Go on with the interrupted run in this folder, with its own settings."),
]


@contextmanager
def command(as_json: bool, seed: int, backend: str | None) -> Iterator[dict[str, Any]]:
    """Run a command's body on `backend`, with `seed`; the dict it fills is printed at the end with --json."""
    import numlstm.random
    from numlstm.backend import get_backend, use_backend

    with ExitStack() as stack:
        if as_json:
            stack.enter_context(redirect_stdout(sys.stderr))
        numlstm.random.set_seed(seed)
        try:
            stack.enter_context(use_backend(backend))
            name = get_backend().name
        except RuntimeError as error:  # a backend that exists, but not on this machine
            raise ValueError(str(error)) from None
        result: dict[str, Any] = {"backend": name, "seed": seed}
        yield result
    if as_json:
        print(json.dumps(plain(result), ensure_ascii=False, allow_nan=False))


def plain(value: Any) -> Any:
    """`value` in the types of JSON, which has no NaN or infinity: they become null."""
    if isinstance(value, Mapping):
        return {str(key): plain(item) for key, item in value.items()}
    if isinstance(value, np.ndarray):
        return plain(value.tolist())
    if isinstance(value, list | tuple):
        return [plain(item) for item in value]
    if isinstance(value, np.generic):
        return plain(value.item())
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return str(value) if isinstance(value, Path) else value


def given_options(context: typer.Context) -> list[str]:
    """Names of the parameters that the person wrote on the command line."""
    source = context.get_parameter_source
    return [name for name in context.params if getattr(source(name), "name", "") == "COMMANDLINE"]


def checksum(path: Path) -> str:
    """SHA-256 of a file."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


class Run:
    """The folder of one training run: begun with `start`, or taken up again with `resume`."""

    def __init__(self, folder: Path, record: dict[str, Any]) -> None:
        self.folder = folder
        self.record: dict[str, Any] = record

    @classmethod
    def start(
        cls,
        command: str,
        settings: Mapping[str, Any],
        inputs: list[Path],
        *,
        out: Path | None,
        stem: str,
        overwrite: bool,
    ) -> Run:
        """A fresh folder: `out`, or runs/<stem>, runs/<stem>-2, ...

        Raises:
            ValueError: `out` holds a run already and `overwrite` is False, or holds something else.
        """
        if out is None:
            out = _free_folder(Path("runs"), stem)
        if out.exists() and (not out.is_dir() or any(out.iterdir())):
            if not (out / "run.json").is_file():
                raise ValueError(f"--out {out} exists and is no folder of a run; name another")
            if not overwrite:
                raise ValueError(
                    f"--out {out} holds a run: give --overwrite to replace it, or --resume {out}"
                )
            shutil.rmtree(out)
        out.mkdir(parents=True, exist_ok=True)
        record = {
            "command": command,
            "settings": plain(settings),
            "inputs": {str(path.resolve()): checksum(path) for path in inputs},
            "finished": False,
        }
        run = cls(out, record)
        run.save()
        return run

    @classmethod
    def resume(cls, command: str, folder: Path) -> Run:
        """The unfinished run in `folder`.

        Raises:
            ValueError: no run there, another command's, one that is finished, or an input that has changed.
        """
        path = folder / "run.json"
        if not path.is_file():
            raise ValueError(f"--resume {folder}: there is no run in that folder (no run.json)")
        try:
            record = json.loads(path.read_text(encoding="utf-8"))
            found, finished, inputs = record["command"], record["finished"], record["inputs"]
        except (json.JSONDecodeError, KeyError, TypeError, UnicodeDecodeError):
            raise ValueError(f"--resume {folder}: {path} is damaged") from None
        if found != command:
            raise ValueError(f"--resume {folder}: the run there was made by 'numlstm {found}'")
        if finished:
            raise ValueError(
                f"--resume {folder}: the run there is finished; its model is {folder / 'model.safetensors'}"
            )
        for name, digest in inputs.items():
            if checksum(Path(name)) != digest:
                raise ValueError(f"--resume {folder}: {name} has changed since the run began")
        return cls(folder, record)

    @property
    def settings(self) -> dict[str, Any]:
        return self.record["settings"]

    @property
    def model(self) -> Path:
        return self.folder / "model.safetensors"

    @property
    def backup(self) -> Path:
        return self.folder / "backup"

    def save(self) -> None:
        from numlstm.io.atomic import write_text

        write_text(
            self.folder / "run.json", json.dumps(plain(self.record), indent=1, ensure_ascii=False) + "\n"
        )

    def finish(self, result: Mapping[str, Any]) -> None:
        """Note the result; from here on the run cannot be resumed and its backup is gone."""
        self.record |= {"finished": True, "result": plain(result)}
        self.save()
        shutil.rmtree(self.backup, ignore_errors=True)


def _free_folder(parent: Path, stem: str) -> Path:
    number = 1
    while True:
        folder = parent / (stem if number == 1 else f"{stem}-{number}")
        if not folder.exists():
            return folder
        number += 1


def resumed_or_new(
    command: str, kind: type[Any], context: typer.Context, given: Mapping[str, Any], resume: Path | None
) -> tuple[Any, Run | None]:
    """The settings of a training command (a dataclass `kind`), and the run to go on with if any.

    Raises:
        ValueError: neither a file nor a run is named, or a resumed run is given settings of its own.
    """
    if resume is None:
        if given["file"] is None:
            raise ValueError(f"give a FILE to train on, or --resume FOLDER; see numlstm {command} --help")
        return kind(**{name: value for name, value in given.items() if name in kind.__annotations__}), None
    extra = sorted(set(given_options(context)) - {"resume", "as_json", "backend"})
    if extra:
        raise ValueError(f"--resume takes the run's own settings; leave out: {', '.join(extra)}")
    run = Run.resume(command, resume)
    try:
        return kind(**run.settings), run
    except TypeError:
        raise ValueError(f"--resume {resume}: its settings are another version's of numlstm") from None


def train_run(
    run: Run,
    model: Any,
    *,
    preprocessing: dict[str, Any],
    patience: int | None = None,
    callbacks: Sequence[Any] = (),
    backup_every: int | Literal["epoch"] = "epoch",
    **options: Any,
) -> dict[str, list[float]]:
    """`model.fit(**options)` with everything a run's folder needs; the history, an interrupted part included.

    The epoch that is best on the validation data stays in `run.model`; `patience` epochs without a better one
    end the training.

    Raises:
        ValueError: the loss stopped being a finite number before any epoch was worth keeping.
    """
    from numlstm.callbacks import BackupAndRestore, EarlyStopping, ModelCheckpoint, TerminateOnNaN

    log = _history_file(run.folder / "history.csv")
    kept = ModelCheckpoint(run.model, monitor="val_loss", save_best_only=True, preprocessing=preprocessing)
    stop = [EarlyStopping(monitor="val_loss", patience=patience)] if patience else []
    backup = BackupAndRestore(run.backup, save_freq=backup_every)  # last: it keeps what the others noted
    if (run.backup / "backup.safetensors").exists():
        print(f"Going on with the run in {run.folder}.")
    try:
        model.fit(**options, callbacks=[TerminateOnNaN(), log, kept, *stop, *callbacks, backup])
    except KeyboardInterrupt:
        print(
            f"\nInterrupted. To go on: numlstm {run.record['command']} --resume {run.folder}", file=sys.stderr
        )
        raise
    if not run.model.exists():
        raise ValueError(
            f"the loss became {log.history['loss'][-1]} in epoch {len(log.epoch)}: lower --learning-rate"
        )
    return log.history


def _history_file(path: Path) -> Any:
    """A callback that keeps the history as a CSV file, rewritten whole: right also after a resume."""
    from numlstm.callbacks import History
    from numlstm.io.atomic import write_text

    class HistoryFile(History):
        def on_epoch_end(self, epoch: int, logs: dict[str, Any]) -> None:
            super().on_epoch_end(epoch, logs)
            columns = [[number + 1 for number in self.epoch], *self.history.values()]
            lines = [",".join(["epoch", *self.history]), *(",".join(map(str, row)) for row in zip(*columns))]  # noqa: B905
            write_text(path, "\n".join(lines) + "\n")

    return HistoryFile()


def load_model(path: Path, kind: str | None = None) -> tuple[Any, dict[str, Any]]:
    """A saved model and its preprocessing; `kind` says which one the command needs.

    Raises:
        ValueError: no such file, no model of numlstm, or another kind of model.
    """
    import numlstm as nl

    model = nl.load(path)
    preprocessing = model.preprocessing or {}
    if kind is not None and preprocessing.get("kind") != kind:
        raise ValueError(f"{path} is no {kind} model (its file says: {preprocessing.get('kind') or 'none'})")
    return model, preprocessing


def read_arrays(file: str) -> dict[str, np.ndarray]:
    """The arrays of a .npz file, or a .npy file's as `x`; never unpickles."""
    path = Path(file)
    if path.suffix not in (".npz", ".npy"):
        raise ValueError(f"this model takes arrays: a .npz file with x (and y), or a .npy file; got {file}")
    try:
        with path.open("rb") as stream:
            loaded = np.load(stream, allow_pickle=False)
            arrays = dict(loaded) if path.suffix == ".npz" else {"x": loaded}
    except FileNotFoundError:
        raise ValueError(f"no file {file!r}") from None
    except Exception as error:  # a damaged archive raises half a dozen kinds
        raise ValueError(f"{file} holds no readable arrays: {error}") from None
    if "x" not in arrays:
        raise ValueError(f"{file} has no array x; it holds: {', '.join(arrays) or 'nothing'}")
    return arrays


def duration(seconds: float) -> str:
    """Seconds for people.

    >>> duration(7.23), duration(83), duration(7300)
    ('7.2 s', '1 min 23 s', '2 h 1 min')
    """
    if seconds < 60:
        return f"{seconds:.1f} s"
    if seconds < 3600:
        return f"{int(seconds) // 60} min {int(seconds) % 60} s"
    return f"{int(seconds) // 3600} h {int(seconds) % 3600 // 60} min"


def picture(draw: Any, path: Path) -> Path | None:
    """Draw and save a figure, or say that it takes an extra package and give None."""
    from numlstm.data import plots

    if not plots.available():
        print("No picture: that takes matplotlib (pip install 'numlstm[plot]').")
        return None
    return plots.save(draw(), path)
