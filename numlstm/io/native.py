"""The library's own model file: one `.safetensors` file, readable by anything that reads that format.

Tensors are named `weights/<path>` and `optimizer/<slot>`; the metadata entry "numlstm" holds JSON: the
format's number, the model's class and configuration, the shapes it was built for, how it was compiled, its
preprocessing. No pickle: a file can't run code. A file that is cut off, foreign or too new is refused with a
ValueError that says so.
"""

import importlib
import io
import json
import os
import struct
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO

import numpy as np

from numlstm.io.atomic import write_bytes
from numlstm.layers.base import Layer, blank_weights, from_config, mark_built, shape_tuples, to_config
from numlstm.registry import custom_objects_scope

if TYPE_CHECKING:
    from numlstm.models import Model

FORMAT = 2  # the latest; a file is written with the first that can hold it: 2 for int8 weights, else 1
SUFFIX = ".safetensors"

# First bytes of files that people hand over by mistake.
_FOREIGN = {
    b"PK\x03\x04": "a zip archive, as .keras and PyTorch files are",
    b"\x89HDF": "an HDF5 file, as Keras 2 wrote them",
    b"\x80": "a pickle, which is never read: it could run code",
    b"\x1f\x8b": "a gzip file",
    b"\x93NUM": "a NumPy array",
}


def save_model(
    model: "Model",
    path: str | os.PathLike[str],
    *,
    include_optimizer: bool = False,
    preprocessing: Mapping[str, Any] | None = None,
) -> None:
    """Write a model to one file, whole or not at all. See `Model.save`.

    Raises:
        ValueError: another file ending than .safetensors, a model that is not built or can't be described as
            JSON.
    """
    if Path(path).suffix != SUFFIX:
        raise ValueError(f"path: models are saved as {SUFFIX} files, got {str(path)!r}")
    content = model_bytes(model, path, include_optimizer=include_optimizer, preprocessing=preprocessing)
    write_bytes(path, content)


def model_bytes(
    model: "Model",
    name: str | os.PathLike[str] = "the model",
    *,
    include_optimizer: bool = False,
    preprocessing: Mapping[str, Any] | None = None,
) -> bytes:
    """What `save_model` writes into the file, which `name` calls in errors. Raises as it does."""
    import safetensors.numpy

    from numlstm.quantization import quantized_weights

    if not model.built:
        raise ValueError(
            f"{model.name} is not built, so it has no weights to save: give input_shape, or call it once"
        )
    if preprocessing is not None:
        model.preprocessing = dict(preprocessing)
    description = {"format": 1, **_description(model)}
    if held := quantized_weights(model):
        description |= {"format": FORMAT, "quantized": held}  # names by layer; see numlstm/quantization.py
    tensors = {
        f"weights/{name}": np.asarray(v.numpy(), order="C") for name, v in model.named_weights().items()
    }
    if include_optimizer:
        description["optimizer"], slots = _optimizer_state(model)
        tensors |= {f"optimizer/{name}": np.asarray(a, order="C") for name, a in slots.items()}
    return safetensors.numpy.save(tensors, metadata={"numlstm": _json(description, name)})


def load_model(
    path: str | os.PathLike[str], custom_objects: Mapping[str, Any] | None = None, compile: bool = True
) -> "Model":
    """Read a model that `Model.save` wrote. It predicts the same bits.

    Arguments:
        path: the file.
        custom_objects: layers, models, cells and functions of one's own, by name.
        compile: also restore optimizer, loss and metrics (and the optimizer's state, if it was saved).

    Raises:
        FileNotFoundError: no such file.
        ValueError: the file is cut off, no model of this library, or from a later version; or it needs a
            class that is not known here. Names the path and what is wrong.

    >>> import numpy as np, os, tempfile, numlstm as nl
    >>> model = nl.Sequential([nl.LSTM(4, input_shape=(None, 2)), nl.Dense(1)])
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     model.save(os.path.join(folder, "m.safetensors"))
    ...     again = nl.load(os.path.join(folder, "m.safetensors"))
    >>> bool((again(np.ones((1, 3, 2))).numpy() == model(np.ones((1, 3, 2))).numpy()).all())
    True
    """
    description, tensors = read_file(path)
    return _model(description, tensors, path, custom_objects, compile)


def model_from_bytes(content: bytes) -> "Model":
    """The model that `model_bytes` was given. Raises ValueError as `load_model`."""
    source = "the model's bytes"
    description, tensors = _read(io.BytesIO(content), len(content), source)
    return _model(description, tensors, source, None, True)


def _model(
    description: Mapping[str, Any],
    tensors: Mapping[str, np.ndarray],
    path: str | os.PathLike[str],
    custom_objects: Mapping[str, Any] | None,
    compile: bool,
) -> "Model":
    from numlstm.models import Model  # also makes Sequential known
    from numlstm.quantization import hold_int8

    try:
        _make_known(description["model"])
        with custom_objects_scope(custom_objects):
            model = rebuilt(description["model"], description["build_shapes"])
            if not isinstance(model, Model):
                raise ValueError(f"it holds a {type(model).__name__}, which is a layer, not a model")
            if description.get("quantized"):
                hold_int8(model, description["quantized"])
            _assign(
                model, {k.removeprefix("weights/"): a for k, a in tensors.items() if k.startswith("weights/")}
            )
            model.preprocessing = description.get("preprocessing")
            if compile and description.get("compile"):
                model.compile_from_config(description["compile"])
                _restore_optimizer(model, description, tensors)
    except (ValueError, KeyError, TypeError) as error:
        reason = f"lacks {error}" if isinstance(error, KeyError) else error
        raise ValueError(f"{path}: the model can't be rebuilt: {reason}") from error
    return model


# Classes of the library that are known once their modules are imported, which costs time.
_ELSEWHERE = {"OnnxModel": "numlstm.io.onnx.model"}


def _make_known(saved: Any) -> None:
    """Import the modules of the classes that a configuration names, at any depth."""
    if isinstance(saved, Mapping):
        module = _ELSEWHERE.get(saved.get("class_name", ""))
        if module is not None:
            importlib.import_module(module)
            return  # what it holds is its own
    for value in saved.values() if isinstance(saved, Mapping) else saved if isinstance(saved, list) else ():
        if isinstance(value, (Mapping, list)):
            _make_known(value)


def read_file(path: str | os.PathLike[str]) -> tuple[dict[str, Any], dict[str, np.ndarray]]:
    """Description and tensors of a model file. Raises as `load_model`."""
    path = Path(path)
    if path.is_dir():
        raise ValueError(f"{path}: a folder, expected a {SUFFIX} file")
    with path.open("rb") as file:
        return _read(file, path.stat().st_size, path)


def _read(
    file: BinaryIO, size: int, path: str | os.PathLike[str]
) -> tuple[dict[str, Any], dict[str, np.ndarray]]:
    """`read_file` of an open file of `size` bytes that people know as `path`."""
    import safetensors
    import safetensors.numpy

    header = _header(file, size, path)
    file.seek(0)
    try:
        tensors = safetensors.numpy.load(file.read())
    except safetensors.SafetensorError as error:
        raise ValueError(f"{path}: damaged: {error}") from error
    text = (header.get("__metadata__") or {}).get("numlstm")
    if text is None:
        raise ValueError(
            f"{path}: a safetensors file, but not a model of numlstm: its metadata has no 'numlstm'"
        )
    try:
        description = json.loads(text)
    except ValueError as error:
        raise ValueError(f"{path}: damaged: the model's description is no JSON ({error})") from error
    number = description.get("format") if isinstance(description, dict) else None
    if not isinstance(number, int):
        raise ValueError(f"{path}: damaged: the model's description has no format number")
    if number > FORMAT:
        raise ValueError(
            f"{path}: has format {number}, this version reads up to {FORMAT}: a newer numlstm wrote it"
        )
    return description, tensors


def describe(path: str | os.PathLike[str]) -> dict[str, Any]:
    """The description in a model file: format, model, build_shapes, compile, preprocessing. Raises as
    `load_model`."""
    return read_file(path)[0]


# Writing


def _description(model: "Model") -> dict[str, Any]:
    from numlstm import __version__

    return {
        "version": __version__,
        "model": to_config(model),
        "build_shapes": {name: layer.build_shape for name, layer in model.walk() if layer.built},
        "compile": model.get_compile_config(),
        "preprocessing": model.preprocessing,
    }


def _optimizer_state(model: "Model") -> tuple[dict[str, Any], dict[str, np.ndarray]]:
    if getattr(model, "optimizer", None) is None:
        raise ValueError("include_optimizer: the model has no optimizer; compile it first")
    state = dict(model.optimizer.state_dict())
    return state, {name: np.asarray(a) for name, a in state.pop("slots").items()}


def _json(description: Mapping[str, Any], name: str | os.PathLike[str]) -> str:
    try:
        return json.dumps(description, allow_nan=False, default=_plain)
    except (TypeError, ValueError) as error:
        raise ValueError(f"{name}: the model can't be described as JSON: {error}") from error


def _plain(value: Any) -> Any:
    """NumPy numbers and arrays in a preprocessing dictionary."""
    if isinstance(value, np.generic):
        return value.item()
    if isinstance(value, np.ndarray):
        return value.tolist()
    raise TypeError(f"{value!r} of type {type(value).__name__} has no form in JSON")


# Reading


def _header(file: BinaryIO, size: int, path: str | os.PathLike[str]) -> dict[str, Any]:
    """The JSON header of a safetensors file: 8 bytes of its length, then the text; the tensors' bytes
    follow."""
    start, ninth = file.read(8), file.read(1)
    file.seek(8)
    for magic, what in _FOREIGN.items():
        if start.startswith(magic) and not _plausible(start, ninth, size):
            raise ValueError(f"{path}: {what}, expected a {SUFFIX} file")
    if size < 8:
        raise ValueError(f"{path}: cut off, or not a {SUFFIX} file: it has {size} bytes")
    length = struct.unpack("<Q", start)[0]
    if length > 100_000_000:  # the format's own limit
        raise ValueError(f"{path}: not a {SUFFIX} file")
    if length > size - 8:
        raise ValueError(f"{path}: cut off: its header should have {length} bytes, the file has {size}")
    text = file.read(length)
    try:
        header = json.loads(text)
    except ValueError as error:
        raise ValueError(f"{path}: not a {SUFFIX} file, or damaged: no JSON header") from error
    if not isinstance(header, dict):
        raise ValueError(f"{path}: not a {SUFFIX} file, or damaged: no JSON object as header")
    ends = [e["data_offsets"][1] for e in header.values() if isinstance(e, dict) and "data_offsets" in e]
    expected = 8 + length + max(ends, default=0)
    if size < expected:
        raise ValueError(f"{path}: cut off: {size} of {expected} bytes are there")
    return header


def _plausible(start: bytes, ninth: bytes, size: int) -> bool:
    """Could these bytes be a header's length and its first brace after all? (A length may happen to begin like a
    foreign file.)"""
    if size < 9:
        return start.startswith(b"\x80")  # too little to tell a pickle from a header cut off
    length = struct.unpack("<Q", start)[0]
    return length <= size - 8 or (ninth == b"{" and length <= 100_000_000)


def rebuilt(saved: Mapping[str, Any], shapes: Mapping[str, Any]) -> Layer:
    """A layer or model from its configuration, built for these shapes, by path; its weights are zeros."""
    with blank_weights():
        model = from_config(saved)
        _rebuild(model, shapes)
    return model


def _rebuild(model: Layer, shapes: Mapping[str, Any]) -> None:
    """Build every layer for the shape it had. Layers made by a parent's build appear in the walk once that
    has run."""
    done: set[str] = set()
    while True:
        waiting = [(path, layer) for path, layer in model.walk() if path not in done and path in shapes]
        if not waiting:
            return
        path, layer = waiting[0]
        done.add(path)
        shape = shape_tuples(shapes[path])
        if not layer.built:
            layer.prepare(shape)
        if not layer.built:
            mark_built(layer, shape)


def _assign(model: Layer, arrays: Mapping[str, np.ndarray]) -> None:
    """Give every weight its saved values: all of them, and no others."""
    named = model.named_weights()
    missing, extra = sorted(set(named) - set(arrays)), sorted(set(arrays) - set(named))
    if missing or extra:
        parts = [
            f"{what} {', '.join(names)}"
            for what, names in (("lacks", missing), ("has unknown", extra))
            if names
        ]
        raise ValueError(f"the file {' and '.join(parts)}")
    for name, variable in named.items():
        variable.assign(arrays[name])


def _restore_optimizer(
    model: "Model", description: Mapping[str, Any], tensors: Mapping[str, np.ndarray]
) -> None:
    state = description.get("optimizer")
    if state is not None:
        slots = {k.removeprefix("optimizer/"): a for k, a in tensors.items() if k.startswith("optimizer/")}
        model.optimizer.load_state_dict({**state, "slots": slots})
