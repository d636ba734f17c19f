"""Keras' layers and ours: which is which, what their options are called, and where the files keep their weights.

One table, `KINDS`, used for reading and writing. It needs neither Keras nor h5py. Sources: Keras 3's layers/ and
saving/saving_lib.py, and for `.h5` legacy/saving/legacy_h5_format.py.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from numlstm import activations, constraints, initializers, layers, regularizers
from numlstm.io import conversion
from numlstm.layers.base import Layer
from numlstm.registry import constructor_parameters

__all__ = [
    "KINDS",
    "MERGING",
    "OWN",
    "Kind",
    "config_for_keras",
    "from_saved",
    "kind_of",
    "options_from_keras",
]


class Kind(NamedTuple):
    """A layer of Keras. `ours` makes it from options under our names; by default the class of the name."""

    ours: type[Layer]
    options: str  # those that both have, by their name, blank-separated; besides name, trainable and dtype
    groups: tuple[str, ...] = ("",)  # the groups of a .keras file that hold its weights, in the order of ours
    fixed: Mapping[str, Any] = {}  # options of Keras' alone: the value that they must have
    unused: str = ""  # options of Keras' alone without a part in what is computed
    recurrent: str = ""  # the operator in conversion.GATES
    add: Mapping[str, Any] = {}  # options of ours that make it what Keras computes
    convert: Callable[[dict[str, Any]], dict[str, Any]] | None = None  # for options that go by other names

    @property
    def shared(self) -> tuple[str, ...]:
        """The options that both have."""
        return ("name", "trainable", "dtype", *self.options.split())


_DENSE = "kernel_initializer bias_initializer kernel_regularizer bias_regularizer kernel_constraint bias_constraint"
_RECURRENT = (
    "units activation use_bias recurrent_initializer recurrent_regularizer recurrent_constraint activity_regularizer "
    f"dropout recurrent_dropout return_sequences return_state go_backwards stateful zero_output_for_mask {_DENSE}"
)
_CELL = ("cell",)
_RNN_FIXED = {"time_major": False}
_RNN_UNUSED = "unroll seed implementation use_cudnn batch_input_shape"
_QUANTIZED = {"quantization_config": None, "lora_rank": None, "lora_alpha": None}
_HEADS = ("query_dense", "key_dense", "value_dense", "output_dense")


def _input(config: dict[str, Any]) -> dict[str, Any]:
    shape = config.pop("batch_shape", None) or config.pop("batch_input_shape", None)
    return {**config, "batch_shape": shape}


def _relu(config: dict[str, Any]) -> dict[str, Any]:
    if config.pop("threshold", 0.0):
        raise ValueError("threshold: expected 0, which is all that relu has here")
    limit, slope = config.pop("max_value", None), config.pop("negative_slope", 0.0) or 0.0
    if (limit is not None and slope) or limit not in (None, 6.0):
        raise ValueError(f"max_value: expected None, or 6 without negative_slope, got {limit} and {slope}")
    name = "relu6" if limit else f"leaky_relu(alpha={slope!r})" if slope else "relu"
    return {**config, "activation": name}


def _slope(name: str, *options: str) -> Callable[[dict[str, Any]], dict[str, Any]]:
    def convert(config: dict[str, Any]) -> dict[str, Any]:
        value = next((config.pop(option) for option in options if option in config), None)
        return {**config, "activation": name if value is None else f"{name}(alpha={float(value)!r})"}

    return convert


def _softmax(config: dict[str, Any]) -> dict[str, Any]:
    if config.pop("axis", -1) != -1:
        raise ValueError("axis: expected -1, the last")
    return {**config, "activation": "softmax"}


def _spatial(config: dict[str, Any]) -> dict[str, Any]:
    return {**config, "noise_shape": (None, 1, None)}


_L = layers
_ACT: dict[str, Any] = {"ours": _L.Activation, "options": "activation"}
_POOL: dict[str, Any] = {"options": "keepdims", "fixed": {"data_format": "channels_last"}}

KINDS: dict[str, Kind] = {
    "InputLayer": Kind(
        _L.InputLayer, "batch_shape", fixed={"sparse": False, "ragged": False, "optional": False}, convert=_input
    ),
    "Dense": Kind(_L.Dense, f"units activation use_bias activity_regularizer {_DENSE}", fixed=_QUANTIZED),
    "Conv1D": Kind(
        _L.Conv1D,
        f"filters kernel_size strides padding dilation_rate groups activation use_bias activity_regularizer {_DENSE}",
        fixed={**_QUANTIZED, "data_format": "channels_last"},
        add={"ignore_mask": True},
    ),
    "Embedding": Kind(
        _L.Embedding,
        "input_dim output_dim embeddings_initializer embeddings_regularizer embeddings_constraint mask_zero",
        fixed={**_QUANTIZED, "activity_regularizer": None},
        unused="input_length",
    ),
    "LSTM": Kind(
        _L.LSTM, f"recurrent_activation unit_forget_bias {_RECURRENT}", _CELL, _RNN_FIXED, _RNN_UNUSED, "LSTM"
    ),
    "GRU": Kind(_L.GRU, f"recurrent_activation reset_after {_RECURRENT}", _CELL, _RNN_FIXED, _RNN_UNUSED, "GRU"),
    "SimpleRNN": Kind(_L.SimpleRNN, _RECURRENT, _CELL, _RNN_FIXED, _RNN_UNUSED, "RNN"),
    "Bidirectional": Kind(_L.Bidirectional, "merge_mode layer backward_layer"),
    "TimeDistributed": Kind(_L.TimeDistributed, "layer"),
    "Masking": Kind(_L.Masking, "mask_value"),
    "Dropout": Kind(_L.Dropout, "rate noise_shape seed"),
    "SpatialDropout1D": Kind(_L.Dropout, "rate seed", convert=_spatial, unused="noise_shape"),
    "LayerNormalization": Kind(
        _L.LayerNormalization,
        "axis epsilon center scale beta_initializer gamma_initializer beta_regularizer gamma_regularizer "
        "beta_constraint gamma_constraint",
        fixed={"rms_scaling": False},
    ),
    "Activation": Kind(**_ACT),
    "ReLU": Kind(**_ACT, convert=_relu),
    "LeakyReLU": Kind(**_ACT, convert=_slope("leaky_relu", "negative_slope", "alpha")),
    "ELU": Kind(**_ACT, convert=_slope("elu", "alpha")),
    "Softmax": Kind(**_ACT, convert=_softmax),
    "Flatten": Kind(_L.Flatten, "", fixed={"data_format": "channels_last"}),
    "Reshape": Kind(_L.Reshape, "target_shape"),
    "Permute": Kind(_L.Permute, "dims"),
    "RepeatVector": Kind(_L.RepeatVector, "n"),
    "Concatenate": Kind(_L.Concatenate, "axis"),
    "Add": Kind(_L.Add, ""),
    "GlobalAveragePooling1D": Kind(_L.GlobalAveragePooling1D, **_POOL),
    "GlobalMaxPooling1D": Kind(_L.GlobalMaxPooling1D, **_POOL, add={"ignore_mask": True}),
    "Attention": Kind(_L.Attention, "use_scale score_mode dropout seed"),
    "AdditiveAttention": Kind(_L.AdditiveAttention, "use_scale dropout", fixed={"score_mode": "dot"}, unused="seed"),
    "MultiHeadAttention": Kind(
        _L.MultiHeadAttention,
        f"num_heads key_dim value_dim dropout use_bias output_shape activity_regularizer seed {_DENSE}",
        _HEADS,
        fixed={"use_gate": False, "sliding_window": None, "attention_axes": [1], "flash_attention": None},
    ),
}  # fmt: skip
_NEVER_USED = ("batch_input_shape", "build_input_shape", "autocast", "input_shape")

# Keras' layers over a list that have no weights, and what a Graph calls them: with Keras' own rules for masks.
MERGING = {
    "Add": "MergeAdd",
    "Subtract": "MergeSubtract",
    "Multiply": "MergeMultiply",
    "Maximum": "MergeMaximum",
    "Minimum": "MergeMinimum",
    "Average": "MergeAverage",
    "Concatenate": "MergeConcatenate",
}

# Options of ours alone that change nothing of what is computed, so that a Keras file may lack them.
OWN = (
    "input_shape", "remat_steps", "split_bias", "batch_size", "shape", "projection_regularizer",
    "projection_constraint", "ignore_mask",
)  # fmt: skip


# Reading


def options_from_keras(kind: Kind, config: Mapping[str, Any], old: bool) -> dict[str, Any]:
    """A Keras layer's configuration as options of ours.

    Arguments:
        kind: of `KINDS`.
        config: without the layers inside it.
        old: written by Keras 2, whose hard_sigmoid was another.

    Raises:
        ValueError: an option that is not known, or has a value that is not served; it is named.
    """
    skipped = (
        (*_NEVER_USED, "dtype") if kind.ours is layers.InputLayer else _NEVER_USED
    )  # what comes in is converted
    given = {k: _plain(k, v, old) for k, v in config.items() if k not in skipped}
    for option in [k for k in given if k in kind.fixed]:
        value = given.pop(option)
        if value is not None and value != kind.fixed[option]:
            raise ValueError(f"option {option!r}: expected {kind.fixed[option]!r}, got {value!r}")
    for option in kind.unused.split():
        given.pop(option, None)
    if kind.convert is not None:
        given = kind.convert({**given, **{k: config[k] for k in ("batch_input_shape",) if k in config}})
    known = constructor_parameters(kind.ours)
    unknown = [k for k, v in given.items() if v is not None and (k not in known or k not in _allowed(kind))]
    if unknown:
        raise ValueError(f"option {unknown[0]!r}: is not known here, got {given[unknown[0]]!r}")
    return {k: v for k, v in given.items() if k in known} | dict(kind.add)


def _allowed(kind: Kind) -> tuple[str, ...]:
    return (*kind.shared, "activation", "batch_shape", "noise_shape")


def _plain(option: str, value: Any, old: bool) -> Any:
    """An option's value as our constructors take it."""
    if option == "dtype":
        return _dtype(value)
    if option.endswith("activation"):
        return _activation(value, old)
    for ending, registry in _REGISTRIES.items():
        if option.endswith(ending):
            return from_saved(option, value, registry)
    if option == "seed" and isinstance(value, Mapping):
        return None
    return value


_REGISTRIES = {
    "_initializer": initializers.get,
    "_regularizer": regularizers.get,
    "_constraint": constraints.get,
}


def _dtype(value: Any) -> str | None:
    name = (value.get("config") or {}).get("name") if isinstance(value, Mapping) else value
    if name not in (None, "float32", "float64"):
        raise ValueError(f"option 'dtype': expected float32 or float64, got {name!r}")
    return name


def _activation(value: Any, old: bool) -> Any:
    if isinstance(value, Mapping):
        name = value.get("config") if value.get("class_name") == "function" else value.get("class_name")
    else:
        name = value
    if name is not None and not isinstance(name, str):
        raise ValueError(f"activation: expected the name of a function, got {value!r}")
    if name == "hard_sigmoid" and old:
        return "hard_sigmoid(alpha=0.2, beta=0.5)"
    return activations.name_of(name)


def from_saved(option: str, value: Any, get: Callable[[Any], Any]) -> Any:
    """An initializer, regularizer or constraint; what Keras says of it with None is left out."""
    if not isinstance(value, Mapping):
        return get(value)
    config = {k: v for k, v in dict(value.get("config") or {}).items() if v is not None and k != "dtype"}
    if isinstance(config.get("seed"), Mapping):
        del config["seed"]
    if isinstance(config.get("value"), Mapping):
        config["value"] = config["value"]["config"]["value"]
    try:
        return get({"class_name": value.get("class_name"), "config": config})
    except TypeError as error:
        raise ValueError(f"option {option!r}: {value.get('class_name')}: {error}") from None


# Writing


def kind_of(layer: Layer) -> tuple[str, Kind]:
    """The layer of Keras that a layer is. Raises ValueError when there is none."""
    for name, kind in KINDS.items():
        if type(layer) is kind.ours:
            return name, kind
    raise ValueError(f"{layer.name}: a {type(layer).__name__} has no counterpart in Keras")


def config_for_keras(layer: Layer, masks: bool) -> tuple[str, dict[str, Any]]:
    """Class name and configuration of the Keras layer that computes what a layer does.

    Arguments:
        layer: of a class in `KINDS`; those inside it are left to the caller.
        masks: whether masks may reach it.

    Raises:
        ValueError: a layer or option that Keras has not got; it is named.
    """
    name, kind = kind_of(layer)
    if masks and isinstance(layer, layers.GlobalMaxPooling1D) and not layer.ignore_mask:
        raise ValueError(f"{layer.name}: a maximum over unmasked steps alone has no counterpart in Keras")
    given = layer.get_config()
    defaults = _defaults(type(layer))
    for option, value in given.items():
        without_part = option in OWN or option.endswith("_initializer")
        if option not in kind.shared and not without_part and value != defaults.get(option):
            raise ValueError(f"{layer.name}: {option}={value!r} has no counterpart in Keras")
    if isinstance(layer, layers.Attention) and layer.score_mode not in ("dot", "concat"):
        raise ValueError(f"{layer.name}: score_mode={layer.score_mode!r} has no counterpart in Keras")
    config = {k: _for_keras(layer, k, given[k]) for k in kind.shared if k in given and k not in _INSIDE}
    if isinstance(layer, layers.Activation):
        return _activation_layer(layer, config)
    if isinstance(layer, layers.InputLayer):
        assert layer.input_shape is not None
        shape = [layer.batch_size, *layer.input_shape]
        return name, {"name": layer.name, "dtype": layer.dtype, "batch_shape": shape}
    return name, config


_INSIDE = ("layer", "backward_layer")


def _defaults(cls: type) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for base in reversed(cls.__mro__):
        if "__init__" in vars(base):
            found |= {p.name: p.default for p in inspect.signature(base.__init__).parameters.values()}  # type: ignore[misc]
    return found


def _for_keras(layer: Layer, option: str, value: Any) -> Any:
    if option.endswith("activation") and value is not None:
        name = activations.name_of(getattr(layer, option))
        if not isinstance(layer, layers.Activation):
            return _keras_name(layer, option, name)
        return name
    for ending, module in (
        ("_initializer", "initializers"),
        ("_regularizer", "regularizers"),
        ("_constraint", "constraints"),
    ):
        if option.endswith(ending) and isinstance(value, Mapping):
            return {"module": f"keras.{module}", **value, "registered_name": None}
    return value


_OURS_ALONE = ("affine", "scaled_tanh", "thresholded_relu")


def _keras_name(layer: Layer, option: str, name: str) -> str:
    plain = name.partition("(")[0]
    if plain in _OURS_ALONE or "(" in name:
        raise ValueError(f"{layer.name}: {option}={name!r} has no counterpart in Keras")
    return name


def _activation_layer(layer: Layer, config: dict[str, Any]) -> tuple[str, dict[str, Any]]:
    """Those with a parameter are layers of their own in Keras."""
    name = config["activation"]
    for kind, plain, option in (("LeakyReLU", "leaky_relu", "negative_slope"), ("ELU", "elu", "alpha")):
        if name.startswith(f"{plain}(alpha="):
            del config["activation"]
            return kind, {**config, option: float(name.removeprefix(f"{plain}(alpha=").rstrip(")"))}
    return "Activation", {**config, "activation": _keras_name(layer, "activation", name)}


# Weights


def weights_from_keras(layer: Layer, kind: Kind, arrays: Sequence[np.ndarray]) -> list[np.ndarray]:
    """A layer's arrays in Keras' order as ours. (Theirs of a Bidirectional are those of its layers.)"""
    return conversion.from_keras(kind.recurrent, arrays) if kind.recurrent else list(arrays)


def weights_to_keras(layer: Layer, kind: Kind) -> list[np.ndarray]:
    """The inverse; the two rows of a bias that Keras has in one are added up."""
    arrays = layer.get_weights()
    if not kind.recurrent:
        return arrays
    if getattr(layer, "split_bias", False) and not (kind.recurrent == "GRU" and layer.reset_after):  # type: ignore[attr-defined]
        arrays[2] = arrays[2][0] + arrays[2][1]
    return conversion.to_keras(kind.recurrent, arrays)
