"""`numlstm warmup`: compile what models need and keep it in the cache, so that their first run starts at once.

Kernels depend on cells and options, never on sizes (numlstm.kernels.cpu; but where there is AMX, few rows have their
own, which a stream compiles), so small arrays will do, if they are not so small that NumPy serves them. Any number of
processes may warm up one cache at the same time.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import typer

from numlstm.cli.common import Backend, Json, Seed, command, load_model

# What is warmed up, for which use, and how; a job that gives a string says why it did nothing.
Job = tuple[str, str, Callable[[], Any]]

ROWS, TIME, WIDTH = 64, 8, 64  # of the arrays: every product is large enough for its own kernel
COMMON = ("LSTM", "GRU", "SimpleRNN")


def warmup(
    model: Annotated[
        Path | None, typer.Argument(metavar="[MODEL]", help="A model file: compile exactly what it needs.")
    ] = None,
    inference_only: Annotated[
        bool, typer.Option("--inference-only", help="Leave out what only training needs.")
    ] = False,
    seed: Seed = 0,
    backend: Backend = None,
    as_json: Json = False,
) -> None:
    """Compile kernels beforehand.

    Without MODEL, those of LSTM, GRU and SimpleRNN with dense layers, the usual losses and optimizers: for
    inference, streams and training. Compiled kernels stay in the cache that `info` shows; what is there
    already takes a fraction of a second.
    """
    from numlstm.kernels.cpu import cache, threads

    with command(as_json, seed, backend) as result:
        problem = cache.problem()
        if problem is not None:
            print(
                f"Nothing can be kept: {problem}. Every process will compile its kernels anew, until "
                f"NUMLSTM_CACHE_DIR names a folder that can be written.",
                file=sys.stderr,
            )
        folder = cache.directory()
        result |= {
            "model": model,
            "cache": folder and str(folder),
            "kept": problem is None,
            "problem": problem,
        }
        result |= {"seconds": {}, "compiled": 0, "loaded": 0}
        jobs = list(_common() if model is None else _of_model(load_model(model)[0]))
        jobs.insert(0, ("threads", "inference", threads.prepare))
        jobs = [job for job in jobs if not (inference_only and job[1] == "training")]
        for number, (name, use, job) in enumerate(jobs, 1):
            print(f"({number:2}/{len(jobs)}) {name:<12} {use:<10}", end=" ", flush=True)
            compiled, loaded, began = cache.made.compiled, cache.made.loaded, time.perf_counter()
            said = job()
            compiled, loaded = cache.made.compiled - compiled, cache.made.loaded - loaded
            seconds = time.perf_counter() - began
            result["compiled"] += compiled
            result["loaded"] += loaded
            result["seconds"].setdefault(name, {})[use] = seconds
            done = said if isinstance(said, str) else f"{compiled} compiled, {loaded} from the cache"
            print(f"{seconds:6.2f} s   {done}", flush=True)
        kept = "in the cache" if problem is None else "not kept"
        print(f"{result['compiled']} kernels compiled, {kept}; {result['loaded']} were there already")


def _common() -> Iterator[Job]:
    """The layers and uses that most programs have."""
    import numlstm as nl

    for kind in COMMON:
        model = nl.Sequential([getattr(nl, kind)(WIDTH, input_shape=(TIME, WIDTH)), nl.Dense(WIDTH)])
        for use, job in _uses(model):
            yield kind, use, job
    yield "loss", "training", lambda: _operations(["softmax_cross_entropy", "dropout_mask"])
    for name in ("adam", "sgd", "rmsprop"):
        yield name, "training", lambda name=name: _optimizer(nl.optimizers.get(name))


def _of_model(model: Any) -> Iterator[Job]:
    """What a loaded model needs."""
    import numlstm as nl
    from numlstm.layers.recurrent import Recurrent

    if isinstance(model, nl.Sequential) and isinstance(model.build_shape, tuple):
        for use, job in _uses(model):
            yield model.name, use, job
    else:  # only its own code knows what goes in: its recurrent layers, one by one
        for path, layer in model.walk():
            if isinstance(layer, Recurrent):
                x = _input(layer, layer.build_shape)
                yield path, "inference", lambda layer=layer, x=x: layer(x)
                yield path, "training", lambda layer=layer, x=x: _gradient(layer, x)
    asked = {operation for _, layer in model.walk() for operation, _ in layer.operations()}
    yield "operations", "inference", lambda: _operations(sorted(asked - {"dropout_mask"}))
    yield "operations", "training", lambda: _operations(sorted(asked & {"dropout_mask"}))
    if model.optimizer is not None:
        yield "optimizer", "training", lambda: _optimizer(model.optimizer)
        loss = str(model.get_compile_config()["loss"]).lower().replace("_", "")
        if "crossentropy" in loss:
            yield "loss", "training", lambda: _operations(["softmax_cross_entropy"])


def _uses(model: Any) -> Iterator[tuple[str, Callable[[], Any]]]:
    """A Sequential in each of its uses."""
    from numlstm.layers.core import InputLayer

    first = next(a for _, a in model.walk() if not a.has_children() and not isinstance(a, InputLayer))
    x = _input(first, model.build_shape)

    def stream() -> str | None:
        try:
            model.stream().step(x[:1, 0])
        except ValueError as error:
            return f"no stream: {error}"
        return None

    def training() -> None:
        with model._running(None):
            _gradient(model, x)

    yield "inference", lambda: model.predict_on_batch(x)
    yield "stream", stream
    yield "training", training


def _input(layer: Any, shape: tuple[int | None, ...]) -> np.ndarray:
    """Zeros for what was built for `shape`, the batch first; `layer` is the first that sees them."""
    sizes = [TIME if n is None else n for n in shape[1:]]
    return np.zeros((ROWS, *sizes), np.int64 if layer.keeps_integers else layer.dtype)


def _gradient(layer: Any, x: np.ndarray) -> None:
    from numlstm.autograd import GradientTape

    with GradientTape() as tape:
        y = layer(x, training=True)
        loss = (y[0] if isinstance(y, list) else y).sum()
    tape.gradient(loss, layer.trainable_weights)


def _optimizer(optimizer: Any) -> None:
    from numlstm.autograd import Variable

    optimizer.apply([np.zeros(WIDTH, np.float32)], [Variable(np.zeros(WIDTH, np.float32))])


def _operations(names: list[str]) -> None:
    """Backend operations on arrays so large that their own kernels serve them."""
    from numlstm.backend import get_backend

    backend, square = get_backend(), np.zeros((WIDTH, WIDTH), np.float32)
    for name in names:
        match name:
            case "matmul":
                backend.matmul(square, square, square[0])
            case "batched_matmul":
                backend.batched_matmul(np.stack([square] * 4), np.stack([square] * 4))
            case "softmax_cross_entropy":
                backend.softmax_cross_entropy(square, np.zeros(WIDTH, np.int64))
            case "dropout_mask":
                backend.dropout_mask(square.shape, 0.5, 0, 0)
