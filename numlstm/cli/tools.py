"""`numlstm evaluate`, `predict`, `info` and `bench`: using a model, and looking at the machine.

What `evaluate` and `predict` do follows the model file: a language model takes a text, a forecasting model a
table, and any other model arrays (.npz with `x` and `y`, or .npy).
"""

from __future__ import annotations

import csv
import io
import os
import platform
import subprocess
import sys
from importlib import metadata
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import numpy as np
import typer

from numlstm.cli import estimators, forecast, text
from numlstm.cli.common import Backend, Json, Seed, command, load_model, read_arrays

if TYPE_CHECKING:
    from numlstm.models import Model

KIND = "estimator"  # as numlstm.estimators.files has it, which would import scikit-learn

ModelFile = Annotated[Path, typer.Argument(metavar="MODEL", help="A model file (.safetensors).")]
InputFile = Annotated[str, typer.Argument(metavar="FILE", help="Text, CSV table, or arrays (.npz, .npy).")]


def evaluate(
    model: ModelFile, file: InputFile, seed: Seed = 0, backend: Backend = None, as_json: Json = False
) -> None:
    """Judge a model on a file.

    Nats a token of a text; on a table, the errors beside the trivial forecast's; else loss and metrics.
    """
    with command(as_json, seed, backend) as result:
        trained, preprocessing = load_model(model)
        kind = preprocessing.get("kind")
        result |= {"model": model, "file": file}
        if kind == text.KIND:
            result |= text.judge_file(trained, preprocessing, file)
        elif kind == forecast.KIND:
            result |= forecast.judge_file(trained, preprocessing, file)
        elif kind == KIND:
            result |= estimators.judge_file(model, preprocessing, file)
        else:
            result |= _evaluate_arrays(trained, file)


def predict(
    model: ModelFile,
    file: InputFile,
    out: Annotated[
        Path | None, typer.Option("--out", help="Write here: .csv for a table, .npy for arrays.")
    ] = None,
    every: Annotated[
        bool, typer.Option("--every", help="Tables: forecast from every row, not from the last only.")
    ] = False,
    seed: Seed = 0,
    backend: Backend = None,
    as_json: Json = False,
) -> None:
    """Say what comes next.

    The rows after a table's end, the likeliest tokens after a text, or any other model's outputs.
    """
    with command(as_json, seed, backend) as result:
        trained, preprocessing = load_model(model)
        kind = preprocessing.get("kind")
        if every and kind != forecast.KIND:
            raise ValueError(f"--every is for forecasting models, and {model} is none")
        if out is not None and kind == text.KIND:
            raise ValueError("--out is for tables and arrays; a text's next tokens are printed")
        result |= {"model": model, "file": file}
        if kind == text.KIND:
            result["next"] = text.next_tokens(trained, preprocessing, file)
        elif kind == forecast.KIND:
            header, rows = forecast.forecast_rows(trained, preprocessing, file, every=every)
            _write_table(header, rows, out)
            result |= {"columns": header, "rows": rows}
        elif kind == KIND:
            header, rows = estimators.predict_file(model, preprocessing, file)
            _write_table(header, rows, out)
            result |= {"columns": header, "rows": rows}
        else:
            result |= _predict_arrays(trained, file, out, as_json)
        if out is not None:
            result["written"] = out
            print(f"Written: {out}")


def _write_table(header: list[str], rows: list[list[Any]], out: Path | None) -> None:
    from numlstm.io.atomic import write_text

    lines = io.StringIO()
    writer = csv.writer(lines, lineterminator="\n")
    writer.writerow(header)
    writer.writerows([f"{cell:.7g}" if isinstance(cell, float) else cell for cell in row] for row in rows)
    if out is None:
        print(lines.getvalue(), end="")
    else:
        write_text(out, lines.getvalue())


def array_options(arrays: dict[str, np.ndarray], names: tuple[str, ...], file: str) -> dict[str, np.ndarray]:
    strangers = sorted(set(arrays) - {"x", *names})
    if strangers:
        raise ValueError(
            f"{file} holds arrays of unknown use: {', '.join(strangers)}; known: x, {', '.join(names)}"
        )
    return {name: array for name, array in arrays.items() if name != "x"}


def _evaluate_arrays(model: Model, file: str) -> dict[str, Any]:
    arrays = read_arrays(file)
    options = array_options(arrays, ("y", "sample_weight", "mask", "lengths"), file)
    if "y" not in options:
        raise ValueError(f"{file} has no array y to compare with")
    if getattr(model, "optimizer", None) is None:
        raise ValueError("this model was saved without compile(): it has no loss to evaluate")
    figures = model.evaluate(arrays["x"], **options, verbose=0, return_dict=True)
    for name, value in figures.items():
        print(f"{name}: {value:.6g}")
    return {"metrics": figures}


def _predict_arrays(model: Model, file: str, out: Path | None, as_json: bool) -> dict[str, Any]:
    from numlstm.io.atomic import atomic_write

    arrays = read_arrays(file)
    arrays.pop("y", None)  # the file that was evaluated may be predicted too
    output = np.asarray(
        model.predict(arrays["x"], **array_options(arrays, ("mask", "lengths"), file), verbose=0)
    )
    if out is not None:
        if out.suffix != ".npy":
            raise ValueError(f"--out must end in .npy for a model of arrays, got {out}")
        with atomic_write(out) as stream:
            np.save(stream, output, allow_pickle=False)
        return {"shape": list(output.shape)}
    if as_json:
        return {"shape": list(output.shape), "prediction": output}
    print(np.array2string(output, threshold=200, precision=6))
    return {}


def info(
    seed: Seed = 0,
    backend: Backend = None,
    as_json: Json = False,
) -> None:
    """Show versions, backends and processor."""
    from numlstm.backend import backends, cuda, get_backend
    from numlstm.kernels.cpu import cache, isa, threads

    with command(as_json, seed, backend) as result:
        folder = cache.directory()
        packages = (
            "numpy",
            "numba",
            "llvmlite",
            "safetensors",
            "rich",
            "typer",
            "matplotlib",
            "torch",
            "cupy",
        )
        result |= {
            "numlstm": _version("numlstm"),
            "python": platform.python_version(),
            "platform": platform.platform(),
            "processor": isa.describe(),
            "cores": os.cpu_count(),
            "threads": threads.get_num_threads(),
            "kernel_cache": "off" if folder is None else str(folder),
            "backends": {
                name: reason or (f"usable ({cuda.describe()})" if name == "cuda" else "usable")
                for name, reason in backends().items()
            },
            "packages": {name: _version(name) for name in packages},
        }
        if result["backends"]["cuda"].startswith("usable"):
            result["persistent_kernels"] = get_backend("cuda").dispatch_table()
        for name, value in result.items():
            if name in ("seed", "backends", "packages", "persistent_kernels"):
                continue
            print(f"{name.replace('_', ' '):<14}{value}" + (" (chosen now)" if name == "backend" else ""))
        print("\nBackends")
        for name, state in result["backends"].items():
            print(f"  {name:<12}{state}")
        print("\nPackages")
        for name, version in result["packages"].items():
            print(f"  {name:<12}{version or 'not installed'}")
        if "persistent_kernels" in result:
            table = result["persistent_kernels"]
            print(
                "\nPersistent kernels of an LSTM: "
                + ("none run here" if table is None else "where tier 2 serves")
            )
            if table is not None:
                print(table)


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def bench(context: typer.Context) -> None:
    """Measure speed beside PyTorch's.

    Runs a checkout's `python -m benchmarks.cpu`; options are handed on to it.
    """
    root = Path(__file__).resolve().parents[2]
    if not (root / "benchmarks" / "cpu.py").is_file():
        raise ValueError(
            "the benchmarks come with the source, not with the installed package: in a checkout of the "
            "repository run 'make test-peers', then 'numlstm bench' from its environment"
        )
    if find_spec("torch") is None:
        raise ValueError("the benchmarks compare with PyTorch: pip install 'numlstm[peers]'")
    done = subprocess.run([sys.executable, "-m", "benchmarks.cpu", *context.args], cwd=root, check=False)
    raise typer.Exit(done.returncode)
