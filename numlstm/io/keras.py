"""Keras' model files, in and out: `.keras` (Keras 3) and the older `.h5`.

    model = nl.io.load_keras("model.keras")
    nl.io.save_keras(model, "model.keras")           # keras.saving.load_model reads it

Read by json and h5py alone: no Keras is imported and no code in a file is run. A Sequential stays one; a functional
model becomes a `numlstm.graph.Graph`. Layers and options are those of `io.keras_layers.KINDS`; any other is refused by
its name, lambdas too. Weights and structure are read, what `compile` was given is not. A functional model's masks go
as Keras wrote them down; in a Sequential they go the ways they have here, which differ in two places: behind
`go_backwards` with `return_sequences` a mask is reversed, as the outputs are; and where initial states are given, steps
before a row's first valid one have that state, not zero.

A `.keras` file is a zip archive of config.json, metadata.json and model.weights.h5, in which a layer's arrays are
layers/<class>_<count>/.../vars/0, 1, ... (Keras' saving_lib.py); an `.h5` file has the configuration in an attribute
and the arrays by layer name (legacy_h5_format.py). Keras numbers the layers of a class from the second on.
"""

from __future__ import annotations

import io
import json
import os
import zipfile
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from numlstm.graph import OPERATIONS, Graph, references
from numlstm.io.atomic import write_bytes
from numlstm.io.keras_layers import (
    KINDS,
    MERGING,
    Kind,
    config_for_keras,
    kind_of,
    options_from_keras,
    weights_from_keras,
    weights_to_keras,
)
from numlstm.layers import (
    Bidirectional,
    Embedding,
    InputLayer,
    Layer,
    Masking,
    MultiHeadAttention,
    Recurrent,
    TimeDistributed,
)
from numlstm.layers.base import blank_weights, mark_built, shape_tuples
from numlstm.models import Model, Sequential
from numlstm.quantization import is_quantized
from numlstm.registry import snake_case

__all__ = ["load_keras", "save_keras"]

_CONFIG, _METADATA, _WEIGHTS = "config.json", "metadata.json", "model.weights.h5"
_WRITTEN_AS = "3.0.0"  # the version of Keras whose format is written
_OP_MODULES = {"Relu": "nn", "Sigmoid": "nn", "Softmax": "nn", "ConvertToTensor": "core"}  # the others: numpy
_MASKS = ("mask", "query_mask", "value_mask", "key_mask")


def _h5py() -> Any:
    try:
        import h5py
    except ImportError as error:
        raise ImportError("h5py is not installed: pip install numlstm[keras]") from error
    return h5py


class _Leaf(NamedTuple):
    """A layer with weights, and the groups that hold them."""

    layer: Layer
    kind: Kind
    groups: tuple[str, ...]

    def below(self, group: str) -> _Leaf:
        """The same, seen from the layer around."""
        return self._replace(groups=tuple(f"{group}/{g}".rstrip("/") for g in self.groups))


_Made = tuple[Layer, list[_Leaf]]


# Reading


def load_keras(path: str | os.PathLike[str]) -> Model:
    """A model from a `.keras` or `.h5` file that Keras saved.

    Returns a `Sequential`, or for a functional model a `numlstm.graph.Graph`; not compiled.

    Raises:
        FileNotFoundError: no such file.
        ValueError: another or a damaged file; a layer, option or operation that is not known here, which is named; a
            model that was saved before it had weights.
        ImportError: h5py is not installed (`pip install numlstm[keras]`).
    """
    h5py = _h5py()
    start = Path(path).read_bytes()[:8]
    try:
        if start.startswith(b"PK"):
            return _load_zip(path, h5py)
        if start.startswith(b"\x89HDF"):
            with h5py.File(path, "r") as file:
                return _load_h5(file)
        raise ValueError("expected a zip archive (.keras) or an HDF5 file (.h5), got neither")
    except (zipfile.BadZipFile, OSError) as error:
        raise ValueError(f"{path}: damaged: {error}") from None
    except KeyError as error:
        raise ValueError(f"{path}: damaged, or no Keras model: it lacks {error}") from None
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from None


def _load_zip(path: str | os.PathLike[str], h5py: Any) -> Model:
    with zipfile.ZipFile(path) as archive:
        saved = json.loads(archive.read(_CONFIG))
        metadata = json.loads(archive.read(_METADATA)) if _METADATA in archive.namelist() else {}
        content = archive.read(_WEIGHTS)
    model, leaves = _model(saved, _is_old(metadata.get("keras_version")))
    with h5py.File(io.BytesIO(content), "r") as file:
        for leaf in leaves:
            arrays = [a for group in leaf.groups for a in _variables(file, f"{group}/vars")]
            _fill(leaf, arrays)
    return model


def _variables(file: Any, group: str) -> list[np.ndarray]:
    if group not in file:
        return []
    held = file[group]
    return [np.asarray(held[name]) for name in sorted(held, key=int)]


def _load_h5(file: Any) -> Model:
    saved = json.loads(_text(file.attrs["model_config"]))
    weights = file["model_weights"]
    version = file.attrs.get("keras_version", weights.attrs.get("keras_version"))
    model, leaves = _model(saved, _is_old(None if version is None else _text(version)))
    pending: dict[str, list[_Leaf]] = {}
    for leaf in leaves:  # the first group says which of the model's layers it belongs to
        pending.setdefault("/".join(leaf.groups[0].split("/")[:2]), []).append(leaf)
    names = _top_names(model)
    for group, inside in pending.items():
        held = weights[names[group]]
        arrays = [np.asarray(held[name]) for name in _names(held, "weight_names")]
        for leaf in sorted(inside, key=lambda leaf: not leaf.layer.trainable):  # those not trained come last
            count = len(leaf.layer.weights)
            _fill(leaf, arrays[:count])
            arrays = arrays[count:]
        if arrays:
            raise ValueError(f"{names[group]}: expected {len(arrays)} weights less than there are")
    return model


def _names(held: Any, attribute: str) -> list[str]:
    """A list of names, which long lists have in pieces."""
    if attribute in held.attrs:
        return [_text(name) for name in held.attrs[attribute]]
    pieces = (
        held.attrs[f"{attribute}{k}"] for k in range(len(held.attrs)) if f"{attribute}{k}" in held.attrs
    )
    return [_text(name) for piece in pieces for name in piece]


def _text(value: Any) -> str:
    return value.decode() if isinstance(value, bytes) else str(value)


def _is_old(version: str | None) -> bool:
    return version is not None and version.split(".")[0] in ("1", "2")


def _fill(leaf: _Leaf, arrays: Sequence[np.ndarray]) -> None:
    layer = leaf.layer
    if not layer.built:
        raise ValueError(f"{layer.name}: the file does not say for which inputs it was built")
    if len(arrays) != len(layer.weights):
        raise ValueError(f"{layer.name}: expected {len(layer.weights)} weights, the file has {len(arrays)}")
    try:
        layer.set_weights(weights_from_keras(layer, leaf.kind, arrays))
    except ValueError as error:
        raise ValueError(f"{layer.name}: {error}") from None


def _model(saved: Mapping[str, Any], old: bool) -> tuple[Model, list[_Leaf]]:
    with blank_weights():
        model, leaves = _Reader(old).make(saved)
        if not isinstance(model, Model):
            raise ValueError(f"expected a model, got the layer {model.name}")
        if not model.built and any(not leaf.layer.built for leaf in leaves):
            _dry_run(model)
    return model, leaves


def _dry_run(model: Model) -> None:
    """Build a model of which the file says no shapes but the inputs', by a call on zeros."""
    if not isinstance(model, Graph):
        raise ValueError("was never built, so there are no weights in the file")
    shapes = [model.get_layer(name).input_shape for name in model.inputs]
    model([np.zeros([1, *(n or 1 for n in shape or ())], np.float32) for shape in shapes])


class _Reader:
    """Layers and models from their saved form."""

    def __init__(self, old: bool) -> None:
        self.old = old

    def make(self, saved: Mapping[str, Any]) -> _Made:
        """A layer or model, and where the weights of it and all inside are, seen from it."""
        name, config = saved["class_name"], saved["config"]
        if name == "Sequential":
            return self._sequential(saved, {"layers": config} if isinstance(config, list) else dict(config))
        if name in ("Functional", "Model"):
            return self._graph(dict(config))
        if name not in KINDS:
            label = (config or {}).get("name") if isinstance(config, Mapping) else None
            raise ValueError(f"{label or name}: Keras' {name} is not known here; known: {', '.join(KINDS)}")
        kind = KINDS[name]
        inside: dict[str, _Made] = {}
        for part in ("layer", "backward_layer"):
            if part in kind.options.split() and config.get(part):
                inside[part] = self.make(config[part])
        plain = {k: v for k, v in config.items() if k not in inside}
        try:
            options = options_from_keras(kind, plain, self.old)
            options |= {part: made[0] for part, made in inside.items()}
            layer = kind.ours(**options)
        except (ValueError, TypeError) as error:
            raise ValueError(f"{config.get('name', name)} ({name}): {error}") from None
        return layer, self._leaves(layer, kind, inside)

    def _leaves(self, layer: Layer, kind: Kind, inside: Mapping[str, _Made]) -> list[_Leaf]:
        if isinstance(layer, Bidirectional):
            pair = (("forward_layer", layer.forward_layer), ("backward_layer", layer.backward_layer))
            return [_Leaf(one, kind_of(one)[1], kind_of(one)[1].groups).below(group) for group, one in pair]
        if isinstance(layer, TimeDistributed):
            return [leaf.below("layer") for leaf in inside["layer"][1]]
        return [_Leaf(layer, kind, kind.groups)] if _has_weights(layer) else []

    def _sequential(self, saved: Mapping[str, Any], config: dict[str, Any]) -> _Made:
        made, leaves, shape = [], [], None
        names = _Numbers()
        for entry in config["layers"]:
            layer, inside = self.make(entry)
            shape = (
                shape or entry["config"].get("batch_input_shape")
                if isinstance(entry["config"], dict)
                else shape
            )
            if not isinstance(layer, InputLayer):
                group = names.next(entry["class_name"])
                leaves += [leaf.below(group) for leaf in inside]
            made.append(layer)
        shape = (
            shape or config.get("build_input_shape") or (saved.get("build_config") or {}).get("input_shape")
        )
        model = Sequential(made, name=config.get("name"), trainable=config.get("trainable", True))
        if not model.built and shape:
            model.build(shape_tuples(shape))
            mark_built(model, shape)
        return model, leaves

    # Functional models

    def _graph(self, config: dict[str, Any]) -> _Made:
        made: list[Layer] = []
        leaves: list[_Leaf] = []
        calls: dict[tuple[str, int], dict[str, Any]] = {}
        names = _Numbers()
        models = set()
        for entry in config["layers"]:
            name, kind = entry.get("name") or entry["config"]["name"], entry["class_name"]
            op = _operation(entry)
            if op is None:
                layer, inside = self.make(entry)
                group = names.next("Functional" if kind == "Model" else kind)  # Keras 2 says Model
                leaves += [leaf.below(group) for leaf in inside]
                made.append(layer)
                if isinstance(layer, Graph):
                    models.add(name)
                _build(layer, entry)
            else:
                layer = None
                if op not in OPERATIONS:
                    raise ValueError(
                        f"{name}: Keras' operation {op} is not known here; known: {', '.join(OPERATIONS)}"
                    )
            for node, given in enumerate(entry["inbound_nodes"]):
                args, kwargs = _arguments(given, layer)
                kwargs = _checked(name, kwargs)
                if "initial_state" in kwargs and isinstance(given, Mapping):
                    kwargs.setdefault(
                        "mask"
                    )  # Keras 3 finds a mask for a layer of one tensor only, not of several
                call = {"name": name, "node": node, "args": args, "kwargs": kwargs}
                if op is not None:
                    call |= {"op": op, "kwargs": {**_op_options(entry), **call["kwargs"]}}
                calls[name, node] = call
        inputs = [ref["from"][0] for ref in _reference_list(config["input_layers"])]
        outputs = _single(_structure(config["output_layers"]))
        for ref in _reference_list(config["output_layers"]):
            self._renumber(outputs, ref, models, calls)
        model = Graph(
            made, _in_order(calls, inputs), inputs, outputs,
            name=config.get("name"), trainable=config.get("trainable", True) is not False,
        )  # fmt: skip
        for layer in model.layers:
            if not _has_weights(layer) and not layer.has_children() and not layer.built:
                mark_built(layer, (None,))
        if all(leaf.layer.built for leaf in leaves):
            shapes = [(None, *(model.get_layer(name).input_shape or ())) for name in inputs]
            mark_built(model, shapes[0] if len(shapes) == 1 else shapes)
        return model, leaves

    def _renumber(self, outputs: Any, ref: Any, models: set[str], calls: Any) -> None:
        """As outputs, a functional model's calls are counted from 1 (Keras counts how it was made as the first)."""
        name, node, _ = ref["from"]
        if name in models and node > 0 and (name, node) not in calls:
            for found in _each_reference(outputs):
                if found["from"][:2] == [name, node]:
                    found["from"][1] = node - 1


class _Numbers:
    """The names of groups: dense, dense_1, ..."""

    def __init__(self) -> None:
        self._counts: Counter[str] = Counter()

    def next(self, class_name: str) -> str:
        """The next layer of this class."""
        stem = snake_case(class_name)
        count = self._counts[stem]
        self._counts[stem] += 1
        return f"layers/{stem}_{count}" if count else f"layers/{stem}"


def _top_names(model: Model) -> dict[str, str]:
    """The names of a model's layers by the groups they would have in a .keras file, for those with weights."""
    found, names = {}, _Numbers()
    for layer in model.layers:
        if isinstance(layer, InputLayer):
            continue
        found[names.next(_class_name(layer))] = layer.name
    return found


def _class_name(layer: Layer) -> str:
    if isinstance(layer, Model):
        return "Functional" if isinstance(layer, Graph) else "Sequential"
    return kind_of(layer)[0]


def _has_weights(layer: Layer) -> bool:
    return type(layer).build is not Layer.build


def _operation(entry: Mapping[str, Any]) -> str | None:
    """What a Graph calls this entry of a functional model, if it is no layer here."""
    name, config = entry["class_name"], entry["config"]
    if ".ops." in (entry.get("module") or ""):
        return name
    if name in MERGING and "trainable" in config:
        return MERGING[name]
    is_layer = not isinstance(config, Mapping) or bool({"trainable", "layers", "batch_shape"} & set(config))
    return None if is_layer or entry.get("module") else name


def _op_options(entry: Mapping[str, Any]) -> dict[str, Any]:
    options = {
        k: v for k, v in entry["config"].items() if v is not None and k not in ("name", "trainable", "dtype")
    }
    unknown = sorted(
        set(options)
        - {"axis", "keepdims"}
        - ({"sparse"} if entry["class_name"] == "ConvertToTensor" else set())
    )
    if unknown:
        raise ValueError(
            f"{entry['config'].get('name')}: option {unknown[0]!r} of {entry['class_name']} is not known here"
        )
    return options


def _arguments(given: Any, layer: Layer | None) -> tuple[list[Any], dict[str, Any]]:
    """A call's arguments: of Keras 3 as args and kwargs, of Keras 2 as a list of [layer, node, result, kwargs]."""
    if isinstance(given, Mapping):
        return [_structure(a) for a in given["args"]], {k: _structure(v) for k, v in given["kwargs"].items()}
    sources = [{"from": list(source[:3])} for source in given]
    kwargs = {k: _structure(v) for source in given for k, v in (source[3] if len(source) > 3 else {}).items()}
    if len(sources) > 1 and isinstance(layer, (Recurrent, Bidirectional)):
        return sources[:1], {**kwargs, "initial_state": sources[1:]}
    return [sources[0] if len(sources) == 1 else sources], kwargs


def _structure(value: Any) -> Any:
    """Saved arguments with their tensors as references."""
    if isinstance(value, Mapping):
        kind = value.get("class_name")
        if kind == "__keras_tensor__":
            return {"from": list(value["config"]["keras_history"])}
        if kind == "__slice__":
            return {"slice": [_structure(value["config"][k]) for k in ("start", "stop", "step")]}
        if kind is not None:
            raise ValueError(f"a call's argument is a {kind}, which is not known here")
        return {k: _structure(v) for k, v in value.items()}
    if isinstance(value, (list, tuple)):
        if len(value) == 3 and isinstance(value[0], str) and all(isinstance(v, int) for v in value[1:]):
            return {"from": list(value)}
        return [_structure(v) for v in value]
    return value


def _checked(name: str, kwargs: dict[str, Any]) -> dict[str, Any]:
    """Without what was not given. `training` is said by whoever calls the model."""
    if kwargs.get("training"):
        raise ValueError(f"{name}: is called with training=True, which is not known here")
    return {k: v for k, v in kwargs.items() if v is not None and k != "training"}


def _each_reference(value: Any) -> Iterator[dict[str, Any]]:
    if isinstance(value, dict) and set(value) == {"from"}:
        yield value
    elif isinstance(value, (dict, list)):
        for item in value.values() if isinstance(value, dict) else value:
            yield from _each_reference(item)


def _reference_list(value: Any) -> list[dict[str, Any]]:
    return list(_each_reference(_structure(value)))


def _single(outputs: Any) -> Any:
    return outputs[0] if isinstance(outputs, list) and len(outputs) == 1 else outputs


def _in_order(calls: Mapping[tuple[str, int], dict[str, Any]], inputs: Sequence[str]) -> list[dict[str, Any]]:
    """The calls in an order in which each finds what it needs."""
    there = {(name, 0) for name in inputs}
    waiting, ordered = dict(calls), []
    while waiting:
        ready = [
            key for key, call in waiting.items()
            if all(ref[:2] in there for ref in references([call["args"], call["kwargs"]]))
        ]  # fmt: skip
        if not ready:
            raise ValueError(
                f"the graph has a loop, or a call of what is not there, at {next(iter(waiting))[0]}"
            )
        for key in ready:
            ordered.append(waiting.pop(key))
            there.add(key)
    return ordered


def _build(layer: Layer, entry: Mapping[str, Any]) -> None:
    """Build a layer for the shapes that the file says its first inputs had."""
    if layer.built or not _has_weights(layer) or not entry["inbound_nodes"]:
        return
    node, shape = entry["inbound_nodes"][0], None
    if isinstance(node, Mapping):
        args = [*node["args"], *(node["kwargs"][k] for k in ("value", "key") if k in node["kwargs"])]
        shapes = [_shapes(a) for a in args if a is not None]
        several = isinstance(layer, MultiHeadAttention) and len(shapes) > 1
        shape = (shapes if several else shapes[0]) if shapes and None not in shapes else None
    if not shape:
        saved = entry.get("build_config") or {}
        shape = saved.get("input_shape") or list((saved.get("shapes_dict") or {}).values())
    if shape:
        layer.ensure_built(shape_tuples(shape))


def _shapes(value: Any) -> Any:
    if isinstance(value, Mapping):
        shape = (value.get("config") or {}).get("shape")
        return None if shape == [None] else shape
    shapes = [_shapes(v) for v in value] if isinstance(value, list) else []
    return None if None in shapes else shapes or None


# Writing


def save_keras(model: Model, path: str | os.PathLike[str]) -> None:
    """Write a model to a `.keras` or `.h5` file that Keras 3 loads, whole or not at all.

    The two rows of a split bias are added up. What a model was compiled with, and its preprocessing, stay behind.

    Arguments:
        model: a `Sequential` or a `numlstm.graph.Graph`, built, of layers and options that Keras has.
        path: must end in ".keras" or ".h5".

    Raises:
        ValueError: another file ending; a model that is not built; a layer or option that Keras has not got, which is
            named.
        ImportError: h5py is not installed (`pip install numlstm[keras]`).
    """
    h5py = _h5py()
    suffix = Path(path).suffix
    if suffix not in (".keras", ".h5"):
        raise ValueError(f"path: expected a .keras or .h5 file, got {str(path)!r}")
    if not isinstance(model, Model) or not model.built:
        raise ValueError("model: expected a numlstm model that is built: give input_shape, or call it once")
    if is_quantized(model):
        raise ValueError(f"{model.name}: has int8 weights, which Keras' files have not got")
    masks = any(isinstance(x, Masking) or (isinstance(x, Embedding) and x.mask_zero) for _, x in model.walk())
    saved, leaves = _Writer(masks).model(model)
    write_bytes(path, (_zip if suffix == ".keras" else _h5)(model, saved, leaves, h5py))


def _zip(model: Model, saved: dict[str, Any], leaves: Sequence[_Leaf], h5py: Any) -> bytes:
    weights = io.BytesIO()
    with h5py.File(weights, "w") as file:
        for leaf in leaves:
            arrays = weights_to_keras(leaf.layer, leaf.kind)
            per_group = len(arrays) // len(leaf.groups)
            for k, group in enumerate(leaf.groups):
                held = file.create_group(f"{group}/vars")
                for j, array in enumerate(arrays[k * per_group : (k + 1) * per_group]):
                    held[str(j)] = array
    content = io.BytesIO()
    with zipfile.ZipFile(content, "w") as archive:
        metadata = {"keras_version": _WRITTEN_AS, "date_saved": ""}
        for name, data in (
            (_METADATA, json.dumps(metadata)),
            (_CONFIG, json.dumps(saved)),
            (_WEIGHTS, weights.getvalue()),
        ):
            archive.writestr(
                zipfile.ZipInfo(name), data
            )  # without the time of day: the same model, the same bytes
    return content.getvalue()


def _h5(model: Model, saved: dict[str, Any], leaves: Sequence[_Leaf], h5py: Any) -> bytes:
    content = io.BytesIO()
    with h5py.File(content, "w") as file:
        file.attrs["keras_version"], file.attrs["backend"] = _WRITTEN_AS, "numpy"
        file.attrs["model_config"] = json.dumps(saved)
        top = file.create_group("model_weights")
        top.attrs["keras_version"], top.attrs["backend"] = _WRITTEN_AS, "numpy"
        names = _top_names(model)
        top.attrs["layer_names"] = [names[group].encode() for group in names]
        for group, name in names.items():
            held = top.create_group(name)
            inside = [leaf for leaf in leaves if "/".join(leaf.groups[0].split("/")[:2]) == group]
            arrays: dict[str, np.ndarray] = {}
            for leaf in sorted(inside, key=lambda leaf: not leaf.layer.trainable):
                for k, array in enumerate(weights_to_keras(leaf.layer, leaf.kind)):
                    arrays[f"{name}/{leaf.layer.name}/{len(arrays)}_{k}"] = array
            held.attrs["weight_names"] = [key.encode() for key in arrays]
            for key, array in arrays.items():
                held[key] = array
        top.create_group("top_level_model_weights").attrs["weight_names"] = []
    return content.getvalue()


class _Writer:
    """Layers and models in Keras' form; with each, where its weights go."""

    def __init__(self, masks: bool) -> None:
        self.masks = masks

    def model(self, model: Model) -> tuple[dict[str, Any], list[_Leaf]]:
        """A Sequential or a Graph."""
        if isinstance(model, Graph):
            return self._graph(model)
        if type(model) is not Sequential:
            raise ValueError(
                f"{model.name}: a {type(model).__name__} is code, which Keras' files do not hold"
            )
        entries, leaves, names = [], [], _Numbers()
        layers = model.layers
        if not isinstance(layers[0], InputLayer):
            assert model.build_shape is not None
            layers.insert(0, InputLayer(batch_shape=model.build_shape, name=f"{model.name}_input"))
        for layer in layers:
            entry, inside = self.layer(layer)
            entries.append(entry)
            if not isinstance(layer, InputLayer):
                group = names.next(entry["class_name"])
                leaves += [leaf.below(group) for leaf in inside]
        config = {"name": model.name, "trainable": model.trainable, "dtype": model.dtype, "layers": entries}
        return _entry("keras", "Sequential", config), leaves

    def layer(self, layer: Layer) -> tuple[dict[str, Any], list[_Leaf]]:
        """A layer, or a model inside another."""
        if isinstance(layer, Model):
            return self.model(layer)
        name, config = config_for_keras(layer, self.masks)
        kind = KINDS[name]
        leaves = [_Leaf(layer, kind, kind.groups)] if layer.own_variables() else []
        if isinstance(layer, Bidirectional):
            for part, one in (("layer", layer.forward_layer), ("backward_layer", layer.backward_layer)):
                config[part], inside = self.layer(one)
                leaves += [leaf.below("forward_layer" if part == "layer" else part) for leaf in inside]
        elif isinstance(layer, TimeDistributed):
            config["layer"], inside = self.layer(layer.layer)
            leaves += [leaf.below("layer") for leaf in inside]
        return _entry("keras.layers", name, config), leaves

    def _graph(self, model: Graph) -> tuple[dict[str, Any], list[_Leaf]]:
        entries: dict[str, dict[str, Any]] = {}
        leaves: list[_Leaf] = []
        names = _Numbers()
        for layer in model.layers:
            entry, inside = self.layer(layer)
            group = names.next(entry["class_name"])
            leaves += [leaf.below(group) for leaf in inside]
            entries[layer.name] = {**entry, **_built_for(layer), "name": layer.name, "inbound_nodes": []}
        missing = [name for name in model.inputs if name not in entries]
        if missing:
            raise ValueError(
                f"{model.name}: the input {missing[0]} has no InputLayer, which would say its shape"
            )
        for name in _mask_inputs(model):
            entries[name]["config"]["dtype"] = "bool"
        for call in sorted(model.calls, key=lambda call: call["node"]):
            name = call["name"]
            if "op" in call:
                entries.setdefault(name, _op_entry(call))
            given, options = call["kwargs"], entries[name]["config"]
            kwargs = {k: v for k, v in given.items() if "op" not in call or k not in options}
            entries[name]["inbound_nodes"].append(
                {"args": _tensors(call["args"]), "kwargs": _tensors(kwargs)}
            )
        inputs = [[name, 0, 0] for name in model.inputs]
        nested = {layer.name for layer in model.layers if isinstance(layer, Graph)}
        config = {
            "name": model.name,
            "trainable": model.trainable,
            "layers": list(entries.values()),
            "input_layers": inputs[0] if len(inputs) == 1 else inputs,
            "output_layers": _histories(model.outputs, nested),
        }
        return _entry("keras.src.models.functional", "Functional", config) | {
            "registered_name": "Functional"
        }, leaves


def _entry(module: str, name: str, config: dict[str, Any]) -> dict[str, Any]:
    return {"module": module, "class_name": name, "config": config, "registered_name": None}


def _built_for(layer: Layer) -> dict[str, Any]:
    """For which inputs a layer was built, as Keras says it."""
    if isinstance(layer, Model) or not layer.built or not _has_weights(layer):
        return {}
    if isinstance(layer, MultiHeadAttention):
        names = ("query_shape", "value_shape", "key_shape")
        return {"build_config": {"shapes_dict": dict(zip(names, layer.build_shape, strict=False))}}
    return {"build_config": {"input_shape": layer.build_shape}}


def _op_entry(call: Mapping[str, Any]) -> dict[str, Any]:
    op, name = call["op"], call["name"]
    layer = next((k for k, v in MERGING.items() if v == op), None)
    if layer is not None:
        options = {"name": name, "trainable": True, "dtype": "float32"}
        options |= {k: v for k, v in call["kwargs"].items() if k == "axis"}
        entry = _entry("keras.layers", layer, options)
    else:
        options = {k: v for k, v in call["kwargs"].items() if not list(references(v))}
        module = f"keras.src.ops.{_OP_MODULES.get(op, 'numpy')}"
        entry = {**_entry(module, op, {"name": name, **options}), "registered_name": op}
    return {**entry, "name": name, "inbound_nodes": []}


def _mask_inputs(model: Graph) -> list[str]:
    """Inputs that are masks and nothing else."""
    as_masks = {
        r[0] for c in model.calls for k, v in c["kwargs"].items() if k in _MASKS for r in references(v)
    }
    others = {
        r[0] for c in model.calls for r in references([c["args"], {k: v for k, v in c["kwargs"].items() if k not in _MASKS}])
    }  # fmt: skip
    return [name for name in model.inputs if name in as_masks - others]


def _tensors(value: Any) -> Any:
    """Arguments with their references as Keras' tensors; their shapes it works out anew, so they are [None] here."""
    if isinstance(value, Mapping):
        if set(value) == {"from"}:
            config = {"shape": [None], "dtype": "float32", "keras_history": list(value["from"])}
            return {"class_name": "__keras_tensor__", "config": config}
        if set(value) == {"slice"}:
            return {
                "class_name": "__slice__",
                "config": dict(zip(("start", "stop", "step"), value["slice"], strict=True)),
            }
        return {k: _tensors(v) for k, v in value.items()}
    return [_tensors(v) for v in value] if isinstance(value, (list, tuple)) else value


def _histories(value: Any, nested: set[str]) -> Any:
    if isinstance(value, Mapping) and set(value) == {"from"}:
        name, node, k = value["from"]
        return [name, node + (name in nested), k]
    if isinstance(value, Mapping):
        return {k: _histories(v, nested) for k, v in value.items()}
    return [_histories(v, nested) for v in value]
