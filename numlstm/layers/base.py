"""The layer: weights, a `call` that turns tensors into tensors, and the bookkeeping that every layer shares.

Calling a layer converts arrays to tensors, builds the weights at the first call, checks ranks, hands masks
from layer to layer (`Tensor.mask`, a bool array (batch, time), as in Keras) and passes `training` down to the
layers inside. Shapes are tuples whose first entry, the batch, is None. Sub-layers and variables are found by
looking through the attributes, whenever they are asked for, so a list that grows later is seen too; what was found is
kept for as long as every attribute is the object that it was, and every list holds what it held.
"""

import itertools
import warnings
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from contextvars import ContextVar
from functools import cache, wraps
from inspect import signature
from typing import Any, NamedTuple, TypeVar

import numpy as np

from numlstm import constraints, initializers, regularizers
from numlstm.autograd import QuantizedVariable, Tensor, Variable, abroad, arrangement, transfer
from numlstm.backend import (
    Backend,
    adopt,
    beside,
    chosen_backend,
    get_backend,
    moved,
    to_numpy,
    use_backend,
)
from numlstm.layers.contents import Contents, Holder
from numlstm.registry import Configurable, Registry, constructor_parameters, snake_case, suggest

Shape = tuple[int | None, ...]
L = TypeVar("L", bound="Layer")

registry: Registry[type["Layer"]] = Registry("layer")

FLOATS = ("float32", "float64")
_DTYPES = {name: np.dtype(name) for name in FLOATS}

_counters: defaultdict[str, Iterator[int]] = defaultdict(itertools.count)


class Members(NamedTuple):
    """A layer and all that is inside it: the layers, each once, depth first; their weights; those that are trained."""

    layers: list["Layer"]
    weights: list[Variable]
    trained: list[Variable]


class _Call(NamedTuple):
    """What the layers inside a running call inherit from the outermost one."""

    training: bool
    root: (
        object  # a new object for each outermost call: tells this call's losses from those of the one before
    )


_running: ContextVar[_Call | None] = ContextVar("running_call", default=None)
# Where the outermost call runs, if that is a device, or might be.
_calling_on: ContextVar[Backend | None] = ContextVar("calling_on", default=None)
_blank: ContextVar[bool] = ContextVar("blank_weights", default=False)


class Layer(Holder, Configurable):
    """Base class of all layers.

    A layer of one's own defines `call(self, x, ...)` and, when it has weights, `build(self, input_shape)`
    with `self.add_weight`. `call` may take `training` and `mask`; they are handed over when its signature
    names them. Constructor parameters should be kept in attributes of the same name, which makes the layer
    savable.

    Arguments:
        name: unique within a model; by default the class's name in snake case and, from the second on, a
            number.
        trainable: False keeps all weights, also those of layers inside, as they are.
        dtype: "float32" or "float64" for weights and results; floating-point inputs are converted to it.
        input_shape: shape of one sample, without the batch; lets a `Sequential` make the weights at once.

    Raises:
        ValueError: an unknown option, or a value that makes no sense.

    >>> class Scale(Layer):
    ...     def build(self, input_shape):
    ...         self.factor = self.add_weight("factor", input_shape[-1:], "ones")
    ...     def call(self, x):
    ...         return x * self.factor
    >>> Scale()(np.ones((2, 3))).shape
    (2, 3)
    """

    input_shape: Shape | None

    # The rank a layer needs, batch included: `input_ndim` exactly, `min_ndim` at least.
    input_ndim: int | None = None
    min_ndim: int | None = None
    input_axes = ""  # how an error message spells that rank out, such as "(batch, time, features)"
    keeps_integers = False  # integers (ids, for an Embedding) stay what they are; else they become `dtype`
    supports_masking = False  # True: the input's mask is the output's
    per_step = False  # True: step t of the output depends on step t of the input alone (needed for streaming)

    def __init__(
        self,
        *,
        name: str | None = None,
        trainable: bool = True,
        dtype: Any = None,
        input_shape: Sequence[int | None] | None = None,
        **unknown: Any,
    ) -> None:
        if unknown:
            option = next(iter(unknown))
            known = list(constructor_parameters(type(self)))
            raise ValueError(f"{type(self).__name__}: unknown option {option!r}: {suggest(option, known)}")
        if name is not None and (not isinstance(name, str) or not name or "/" in name):
            raise ValueError(f"name: expected a string without '/', got {name!r}")
        self.name: str = name or automatic_name(type(self))
        self.trainable: bool = bool(trainable)
        self.dtype: str = checked_dtype(dtype)
        self.input_shape = None if input_shape is None else checked_shape("input_shape", input_shape)
        self.built = False
        self.build_shape: Any = None  # what `build` was given; saved with the model
        self.activity_regularizer: Callable[[Tensor], Tensor] | None = None
        self._variables: list[Variable] = []
        # Where the weights were last seen to lie, and how all weights lay then: the same again need not be looked at.
        self._place: tuple[str, int] | None = None

    def __init_subclass__(cls, **options: Any) -> None:
        """However `build` is called, directly or by a first call, the layer knows that it has happened."""
        super().__init_subclass__(**options)
        if "build" in cls.__dict__:
            cls.build = _recording(cls.__dict__["build"])  # type: ignore[method-assign]

    # To be written by layers

    def build(self, input_shape: Any) -> None:
        """Make the weights for inputs of this shape (batch first, None), or for a list of shapes."""
        mark_built(self, input_shape)

    def call(self, inputs: Any) -> Any:
        """From input tensors to output tensors."""
        raise NotImplementedError(f"{type(self).__name__} must define call(self, inputs)")

    def compute_output_shape(self, input_shape: Any) -> Any:
        """Shape of the output. Raises NotImplementedError when only a call can tell."""
        raise NotImplementedError(f"{type(self).__name__} does not define compute_output_shape")

    def operations(self) -> list[tuple[str, str]]:
        """What the layer asks of the backend, as (operation, option), for `nl.explain`."""
        return []

    def compute_mask(self, inputs: Any, mask: Any = None) -> Any:
        """The mask that goes on with the output. By default the input's own, if `supports_masking`."""
        if mask is None or self.supports_masking:
            return _single(mask)
        if self.has_children():  # the mask went on with the tensors, from layer to layer
            return None
        warnings.warn(
            f"{self.name}: a masked input reached a layer that does not say what becomes of the mask, so it "
            f"ends here. Set supports_masking = True in {type(self).__name__} to pass it on, "
            f"or define compute_mask",
            stacklevel=4,
        )
        return None

    # Calling

    def __call__(
        self,
        inputs: Any,
        *args: Any,
        training: bool | None = None,
        mask: Any = None,
        lengths: Any = None,
        **kwargs: Any,
    ) -> Any:
        """Apply the layer. Builds it when that has not happened yet.

        Arguments:
            inputs: an array or tensor, batch first; several in a list for layers that take several.
            training: switches dropout and the like; inside a model, that of the model's call.
            mask: bool (batch, time), True where a step counts; by default the mask that the input brought
                along.
            lengths: int (batch,), in place of `mask`: how many leading steps of each row count.

        Raises:
            ValueError: a rank, shape, dtype, mask or lengths that don't fit; names the layer and what was
                expected.
        """
        if "_variables" not in self.__dict__:
            raise ValueError(f"{type(self).__name__}: its __init__ must call super().__init__() first")
        outer = _running.get()
        if outer is None and _calling_on.get() is None:
            backend = chosen_backend() or get_backend(like=first_array(inputs))
            if backend.xp is not np or abroad():
                return self._called_on(backend, inputs, args, training, mask, lengths, kwargs)
        if not isinstance(inputs, Tensor) or inputs.data.dtype is not _DTYPES[self.dtype]:
            inputs = self._converted(inputs)
        self._check_rank(inputs)
        shape = None if self.built else batch_none(shape_of(inputs))
        if shape is not None:
            self.prepare(shape)
        self.check_input(inputs)
        if mask is None and lengths is None and isinstance(inputs, Tensor):
            mask = inputs.mask
        else:
            mask = self._given_mask(inputs, mask, lengths)

        if outer is not None and (training is None or bool(training) == outer.training):
            running = outer
        else:
            running = _Call(bool(training), object() if outer is None else outer.root)
        if self._root is not running.root:
            self._start_losses(running.root)
        options, takes_any = call_options(type(self))
        if kwargs and not takes_any and (unknown := [option for option in kwargs if option not in options]):
            raise ValueError(
                f"{self.name}: its call knows no {unknown[0]!r}; it takes {', '.join(sorted(options))}"
            )
        if "training" in options:
            kwargs["training"] = running.training
        if "mask" in options:
            kwargs["mask"] = mask
        if mask is not None and self.has_children():
            inputs = with_mask(inputs, mask)  # the layers inside take it from there
        if running is outer:
            outputs = self.call(inputs, *args, **kwargs)
        else:
            token = _running.set(running)
            try:
                outputs = self.call(inputs, *args, **kwargs)
            finally:
                _running.reset(token)
        if shape is not None and not self.built:
            mark_built(self, shape)  # a model, whose layers have built themselves by now
        if self.activity_regularizer is not None:
            for output in flat(outputs):
                self.add_loss(self.activity_regularizer(output))
        return self._masked(outputs, inputs, mask)

    def _called_on(
        self,
        backend: Backend,
        inputs: Any,
        args: tuple[Any, ...],
        training: Any,
        mask: Any,
        lengths: Any,
        kwargs: dict[str, Any],
    ) -> Any:
        """An outermost call on a device, or back on the host: weights and inputs go where the backend works."""
        self.move(backend)
        if mask is None and lengths is None:  # masks that came with the tensors go along
            inputs = brought(inputs, backend, self.name)
        else:
            inputs = brought(inputs, backend, self.name, with_masks=False)
        chosen = (
            nullcontext() if chosen_backend() is not None else use_backend(None, like=first_array(inputs))
        )
        token = _calling_on.set(backend)
        try:
            with chosen:
                return Layer.__call__(
                    self, inputs, *args, training=training, mask=mask, lengths=lengths, **kwargs
                )
        finally:
            _calling_on.reset(token)

    def move(self, backend: Backend) -> None:
        """Have all weights lie where `backend` works. A call does so by itself; to do it beforehand saves the first
        call the time.

        >>> layer = Layer()
        >>> layer.move(get_backend("cpu"))
        """
        if self._place == (backend.place, arrangement()):
            return
        for variable in self.weights:
            variable.move(backend)
        self._place = (backend.place, arrangement())

    def ensure_built(self, input_shape: Any) -> None:
        """Build, unless that has happened."""
        if not self.built:
            self.build(input_shape)

    def prepare(self, input_shape: Any) -> None:
        """What a first call does before `call`: build. (A model leaves that to the layers inside.)"""
        self.ensure_built(input_shape)

    def check_input(self, inputs: Any) -> None:
        """Raise ValueError when inputs don't fit the weights. By default: when the last axis has changed."""
        seen = self.build_shape
        if (
            self._variables
            and isinstance(inputs, Tensor)
            and isinstance(seen, tuple)
            and seen[-1:] not in ((), (None,))
        ):
            self.check_features(inputs.shape)

    def check_features(self, shape: Sequence[int | None]) -> None:
        """Raise ValueError unless the last axis has the size that the weights were made for."""
        if shape[-1] != self.build_shape[-1]:
            raise ValueError(
                f"{self.name}: expected inputs with {self.build_shape[-1]} features (last axis), "
                f"got shape {tuple(shape)}"
            )

    def add_loss(self, loss: Tensor) -> None:
        """Add a scalar tensor to the losses of the call in progress."""
        self._losses.append(loss)

    def _start_losses(self, root: object) -> None:
        """Forget the losses of the calls before the one that `root` stands for."""
        if self._root is not root:
            self._root = root
            self._losses = []

    def _converted(self, inputs: Any) -> Any:
        if isinstance(inputs, Mapping):
            return {k: self._converted(v) for k, v in inputs.items()}
        if isinstance(inputs, (list, tuple)) and any(is_array(x) for x in inputs):
            return [self._converted(x) for x in inputs]
        if isinstance(inputs, Layer):
            raise ValueError(
                f"{self.name}: called on the layer {inputs.name!r}. Layers are called on arrays or tensors; "
                f"for a graph of layers subclass nl.Model and write call(self, x)"
            )
        return to_tensor(inputs, self.dtype, self.name, self.keeps_integers)

    def _check_rank(self, inputs: Any) -> None:
        exact, least = self.input_ndim, self.min_ndim
        if exact is None and least is None:
            return
        if not isinstance(inputs, Tensor):
            raise ValueError(f"{self.name}: takes one input, got {len(inputs)}")
        rank = inputs.data.ndim
        if (exact is not None and rank != exact) or (least is not None and rank < least):
            wanted = f"rank {exact}" if exact is not None else f"rank {least} or more"
            axes = f", {self.input_axes}" if self.input_axes else ""
            hint = self.rank_hint(inputs.shape)
            raise ValueError(
                f"{self.name}: expected an input of {wanted}{axes}, got shape {inputs.shape}{hint}"
            )

    def rank_hint(self, shape: Sequence[int | None]) -> str:
        """What to add to the error about a wrong rank: how to repair an input of this shape."""
        return ""

    def _given_mask(self, inputs: Any, mask: Any, lengths: Any) -> Any:
        if lengths is not None:
            if mask is not None:
                raise ValueError(f"{self.name}: give mask or lengths, not both")
            first = flat(inputs)[0]
            if first.ndim < 2:
                raise ValueError(
                    f"{self.name}: lengths need inputs with a time axis, got shape {first.shape}"
                )
            valid = mask_from_lengths(lengths, first.shape[0], first.shape[1])
            return beside(valid, first.data, f"{self.name}: lengths")
        if mask is not None:
            return checked_mask(mask, inputs, self.name)
        if isinstance(inputs, Tensor):
            return inputs.mask
        masks = [t.mask for t in flat(inputs)]
        return masks if any(m is not None for m in masks) else None

    def _masked(self, outputs: Any, inputs: Any, mask: Any) -> Any:
        """Attach the outgoing mask to the (first) output, unless `call` has attached one itself."""
        first = outputs if isinstance(outputs, Tensor) else next(iter(flat(outputs)), None)
        if not isinstance(first, Tensor):
            raise ValueError(f"{self.name}: its call must give tensors, got {type(outputs).__name__}")
        if first.mask is None:
            first.mask = self.compute_mask(inputs, mask)
        return outputs

    # Weights

    def add_weight(
        self,
        name: str,
        shape: Sequence[Any],
        initializer: Any = "glorot_uniform",
        regularizer: Any = None,
        constraint: Any = None,
        trainable: bool = True,
    ) -> Variable:
        """Make a weight that the layer owns.

        Raises:
            ValueError: a shape with an unknown or non-positive size, or an initializer that gives another
                shape.
        """
        if any(n is None or n < 1 for n in shape):
            raise ValueError(
                f"{self.name}: weight {name!r} can't have the shape {tuple(shape)}: "
                f"sizes must be known and > 0"
            )
        initialize = np.zeros if _blank.get() else initializers.get(initializer)
        values = np.asarray(initialize(tuple(shape), self.dtype), self.dtype)
        if values.shape != tuple(shape):
            raise ValueError(
                f"{self.name}: {name}'s initializer gave shape {values.shape}, expected {tuple(shape)}"
            )
        if (
            backend := _calling_on.get()
        ) is not None:  # built by a first call, which goes on with it where it runs
            values = moved(values, backend, name)
        variable = Variable(
            values,
            name=name,
            trainable=trainable,
            regularizer=regularizers.get(regularizer),
            constraint=constraints.get(constraint),
        )
        self._variables.append(variable)
        return variable

    def _looked_through(self) -> Contents:
        """What lies inside, looked up anew if anything has changed."""
        contents = self._found_inside
        if not contents.hold(self.__dict__):
            contents.look(self.__dict__, Layer)
        return contents

    def children(self) -> Iterator[tuple[str, "Layer"]]:
        """The layers directly inside this one, in order, with the names that they have in files."""
        return iter(self._looked_through().children)

    def has_children(self) -> bool:
        """Are there layers inside this one?"""
        return any(True for _ in self.children())

    def walk(self, path: str = "") -> Iterator[tuple[str, "Layer"]]:
        """This layer and all layers inside, depth first, each once, with their paths ("encoder/lstm")."""
        seen: set[int] = set()

        def visit(path: str, layer: Layer) -> Iterator[tuple[str, Layer]]:
            if id(layer) not in seen:
                seen.add(id(layer))
                yield path, layer
                for name, child in layer.children():
                    yield from visit(f"{path}/{name}" if path else name, child)

        yield from visit(path, self)

    def own_variables(self) -> list[Variable]:
        """Variables that belong to this layer itself: made by `add_weight`, or kept in an attribute."""
        return list(self._looked_through().variables)

    def _survey(self) -> Members:
        """This layer and all inside it, their weights, and which of them are trained: in one walk, for whoever needs
        all of it at every step."""
        layers: dict[int, Layer] = {}
        found: dict[int, Variable] = {}
        self._gather(layers, found)
        weights, inside = list(found.values()), list(layers.values())
        if type(self).trainable_weights is Layer.trainable_weights and all([x.trainable for x in inside]):
            return Members(inside, weights, [v for v in weights if v.trainable])
        return Members(inside, weights, self.trainable_weights)

    def _gather(self, layers: dict[int, "Layer"], weights: dict[int, Variable]) -> None:
        """Add this layer and all inside to `layers`, as `walk` finds them, and what they own to `weights`."""
        layers[id(self)] = self
        cls, contents = type(self), self._looked_through()
        # A class may have ways of its own; what Layer's would give has been looked up once for both.
        for variable in (
            contents.variables if cls.own_variables is Layer.own_variables else self.own_variables()
        ):
            weights[id(variable)] = variable
        for _, child in contents.children if cls.children is Layer.children else self.children():
            if id(child) not in layers:
                child._gather(layers, weights)

    def named_weights(self) -> dict[str, Variable]:
        """Every weight by a path that is unique within this layer, such as "lstm/kernel", in the order of
        `weights`."""
        named: dict[str, Variable] = {}
        seen: set[int] = set()
        for path, layer in self.walk():
            for variable in layer.own_variables():
                if id(variable) in seen:
                    continue
                seen.add(id(variable))
                plain = key = f"{path}/{variable.name}" if path else variable.name
                for k in itertools.count(1):
                    if key not in named:
                        break
                    key = f"{plain}_{k}"
                named[key] = variable
        return named

    @property
    def weights(self) -> list[Variable]:
        """All weights: the layer's own, then those of the layers inside, in order."""
        return self._survey().weights

    @property
    def trainable_weights(self) -> list[Variable]:
        """The weights that training changes."""
        return list(self._trainable(set()))

    @property
    def non_trainable_weights(self) -> list[Variable]:
        """The other weights."""
        trainable = {id(v) for v in self.trainable_weights}
        return [v for v in self.weights if id(v) not in trainable]

    variables = weights
    trainable_variables = trainable_weights
    non_trainable_variables = non_trainable_weights

    def _trainable(self, seen: set[int]) -> Iterator[Variable]:
        if not self.trainable or id(self) in seen:
            return
        seen.add(id(self))
        for variable in self.own_variables():
            if variable.trainable and id(variable) not in seen:
                seen.add(id(variable))
                yield variable
        for _, child in self.children():
            yield from child._trainable(seen)

    def get_weights(self) -> list[np.ndarray]:
        """Copies of all weights as NumPy arrays, in the order of `weights`."""
        return [np.array(v.numpy()) for v in self.weights]

    def set_weights(self, weights: Sequence[Any]) -> None:
        """Assign all weights, in the order of `get_weights`. Raises ValueError on a misfit."""
        if isinstance(weights, (np.ndarray, Tensor)) or not isinstance(weights, Sequence):
            raise ValueError(f"weights: expected a list of arrays, got {type(weights).__name__}")
        named = self.named_weights()
        if len(weights) != len(named):
            unbuilt = "" if self.built else "; it is not built yet: give input_shape, or call it once on data"
            raise ValueError(f"{self.name} has {len(named)} weights, got {len(weights)}{unbuilt}")
        arrays = [adopt(w) for w in weights]
        for (path, variable), array in zip(
            named.items(), arrays, strict=True
        ):  # all checked before any is changed
            if array.shape != variable.shape:
                raise ValueError(f"weights: {path} has shape {variable.shape}, got {array.shape}")
        for variable, array in zip(named.values(), arrays, strict=True):
            variable.assign(array)

    def count_params(self) -> int:
        """How many numbers all weights hold together."""
        return sum(v.size for v in self.weights)

    def regularization_losses(self) -> list[Tensor]:
        """Penalties of the trainable weights, then what the latest call added (activity regularizers,
        `add_loss`)."""
        weights = [v.regularizer(v) for v in self.trainable_weights if v.regularizer is not None]
        latest = [loss for _, layer in self.walk() if layer._root is self._root for loss in layer._losses]
        return weights + latest

    losses: property = property(regularization_losses)

    def cast(self, dtype: Any) -> None:
        """Turn this layer and all inside it to another floating-point dtype, weights included.

        Raises ValueError for one that is not known, and where int8 weights would have to leave float32.
        """
        if checked_dtype(dtype) != "float32" and any(isinstance(v, QuantizedVariable) for v in self.weights):
            raise ValueError(f"{self.name}: int8 weights compute in float32, got {checked_dtype(dtype)}")
        for _, layer in self.walk():
            layer.dtype = checked_dtype(dtype)
            for variable in layer.own_variables():
                if variable.dtype.kind == "f":
                    variable.data = variable.data.astype(layer.dtype)

    def __repr__(self) -> str:
        return f"<{type(self).__name__} {self.name!r}{'' if self.built else ', not built'}>"


def _recording(build: Callable[[Any, Any], None]) -> Callable[[Any, Any], None]:
    """`build`, run once, and remembering the shape: a saved model is built again from it."""

    @wraps(build)
    def once(self: Layer, input_shape: Any) -> None:
        shape = shape_tuples(input_shape)
        if self.built and shape == self.build_shape:
            return
        if self.built:
            raise ValueError(
                f"{self.name}: built already, for inputs of shape {self.build_shape}, got {input_shape}"
            )
        before = list(self._variables)
        try:
            build(self, shape)
        except BaseException:  # half a set of weights would be in the way of the next try
            self._variables[:] = before
            raise
        mark_built(self, shape)

    return once


@contextmanager
def blank_weights() -> Iterator[None]:
    """Within the block weights start as zeros and nothing is drawn: they are about to be read."""
    token = _blank.set(True)
    try:
        yield
    finally:
        _blank.reset(token)


def mark_built(layer: Layer, input_shape: Any) -> None:
    layer.build_shape = shape_tuples(input_shape)
    layer.built = True


def register_layer(cls: type[L]) -> type[L]:
    """Decorator: make a layer or model class known by its name, so that `nl.load` can rebuild it.

    Raises:
        ValueError: not a Layer subclass, or the name of another known layer.

    >>> @register_layer
    ... class Doubled(Layer):
    ...     def call(self, x):
    ...         return x * 2
    >>> from_config(to_config(Doubled(name="d"))).name
    'd'
    """
    if not (isinstance(cls, type) and issubclass(cls, Layer)):
        raise ValueError(f"register_layer: expected a subclass of Layer, got {cls!r}")
    if cls.__name__ in registry and registry.find(cls.__name__).__module__ != cls.__module__:
        raise ValueError(
            f"register_layer: {cls.__name__!r} is the name of a layer that numlstm knows already"
        )
    registry.add(cls.__name__, cls)
    return cls


def to_config(layer: Layer) -> dict[str, Any]:
    """A layer as `{"class_name": ..., "config": ...}`, without its weights."""
    return {"class_name": type(layer).__name__, "config": layer.get_config()}


def from_config(saved: Any) -> Layer:
    """The inverse of `to_config`; a layer is given back as it is.

    Raises:
        ValueError: an unknown class (the known ones are listed) or option, or not a saved layer.
    """
    layer = saved if isinstance(saved, Layer) else registry.get(saved) if isinstance(saved, Mapping) else None
    if not isinstance(layer, Layer):
        raise ValueError(
            f"expected a layer or its saved configuration, got {saved!r} of type {type(saved).__name__}"
        )
    return layer


# Names, shapes, dtypes


def automatic_name(cls: type) -> str:
    """lstm, lstm_1, lstm_2, ...: unique within the process."""
    stem = snake_case(cls.__name__)
    count = next(_counters[stem])
    return f"{stem}_{count}" if count else stem


def checked_dtype(dtype: Any) -> str:
    """ "float32" or "float64"; None is the former."""
    try:
        name = np.dtype(dtype or "float32").name
    except TypeError:
        name = None
    if name not in FLOATS:
        raise ValueError(f"dtype: expected one of {FLOATS}, got {dtype!r}")
    return name


def checked_shape(argument: str, shape: Any) -> Shape:
    """A shape as a tuple of positive sizes, None where a size is open."""
    sizes = tuple(shape) if isinstance(shape, (list, tuple)) else (shape,)
    for n in sizes:
        if n is not None and (not isinstance(n, (int, np.integer)) or isinstance(n, bool) or n < 1):
            raise ValueError(f"{argument}: expected sizes > 0 (or None for any), got {shape!r}")
    return tuple(None if n is None else int(n) for n in sizes)


def positive(argument: str, value: Any) -> int:
    """`value` as an int of at least 1. Raises ValueError naming the argument."""
    if isinstance(value, bool) or not isinstance(value, (int, np.integer)) or value < 1:
        raise ValueError(f"{argument}: expected an integer of at least 1, got {value!r}")
    return int(value)


def fraction(argument: str, value: Any) -> float:
    """`value` as a float in [0, 1). Raises ValueError naming the argument."""
    if isinstance(value, bool) or not isinstance(value, (int, float, np.number)) or not 0 <= value < 1:
        raise ValueError(f"{argument}: expected a number from 0 up to, not including, 1, got {value!r}")
    return float(value)


def shape_of(inputs: Any) -> Any:
    """The shape of a tensor, or a list (dict) of shapes for several."""
    if isinstance(inputs, Mapping):
        return {k: shape_of(v) for k, v in inputs.items()}
    if isinstance(inputs, (list, tuple)):
        return [shape_of(x) for x in inputs]
    return inputs.shape


def batch_none(shape: Any) -> Any:
    """The shape(s) with the batch axis open."""
    if isinstance(shape, Mapping):
        return {k: batch_none(v) for k, v in shape.items()}
    if isinstance(shape, list):
        return [batch_none(s) for s in shape]
    return (None, *shape[1:])


def shape_tuples(shape: Any) -> Any:
    """A shape that may come from JSON: its innermost lists become tuples."""
    if isinstance(shape, Mapping):
        return {k: shape_tuples(v) for k, v in shape.items()}
    if isinstance(shape, (list, tuple)) and any(isinstance(s, (list, tuple, Mapping)) for s in shape):
        return [shape_tuples(s) for s in shape]
    return tuple(shape)


# Inputs and masks


def is_array(x: Any) -> bool:
    """A tensor, a NumPy array or a device's array (but no plain list or number)."""
    return isinstance(x, Tensor) or (hasattr(x, "dtype") and hasattr(x, "shape") and len(x.shape) > 0)


def flat(tensors: Any) -> list[Tensor]:
    """The tensors of a tensor, list, tuple or dict, in order."""
    if isinstance(tensors, Mapping):
        return [t for v in tensors.values() for t in flat(v)]
    if isinstance(tensors, (list, tuple)):
        return [t for v in tensors for t in flat(v)]
    return [tensors]


def first_array(inputs: Any) -> Any:
    """The first array of the inputs of a call, in whatever they come; None where there is none."""
    if type(inputs) is np.ndarray:
        return inputs
    if isinstance(inputs, Tensor):
        return inputs.data
    if isinstance(inputs, (list, tuple, Mapping)):
        for x in inputs.values() if isinstance(inputs, Mapping) else inputs:
            if is_array(x):
                return first_array(x)
        return None
    return adopt(inputs) if is_array(inputs) else None


def brought(inputs: Any, backend: Backend, owner: str, with_masks: bool = True) -> Any:
    """The inputs of a call where a backend works; what lies there already is left as it is."""
    if isinstance(inputs, Mapping):
        return {k: brought(v, backend, owner, with_masks) for k, v in inputs.items()}
    if isinstance(inputs, (list, tuple)):
        if any(is_array(x) for x in inputs):
            return [brought(x, backend, owner, with_masks) for x in inputs]
        try:
            return moved(np.asarray(inputs), backend, owner)
        except ValueError:  # rows of unequal length: the call says so
            return inputs
    if not isinstance(inputs, Tensor):
        return moved(adopt(inputs), backend, owner) if is_array(inputs) else inputs
    mask, inputs = inputs.mask, transfer(inputs, backend, owner)
    if mask is not None and with_masks and (there := moved(mask, backend, f"{owner}: mask")) is not mask:
        inputs = with_mask(inputs, there)
    return inputs


def to_tensor(x: Any, dtype: str, owner: str, keeps_integers: bool = False) -> Tensor:
    """`x` as a tensor of `dtype`, or of its own integer dtype with `keeps_integers`. Masks stay."""
    if isinstance(x, Tensor):
        if x.dtype == dtype or (keeps_integers and x.dtype.kind in "iu"):
            return x
        mask, x = x.mask, x.astype(dtype)
        x.mask = mask
        return x
    try:
        array = adopt(x)
    except ValueError as error:  # rows of unequal length
        raise ValueError(f"{owner}: inputs can't be made an array: {error}") from error
    if array.dtype.kind not in "biuf":
        raise ValueError(
            f"{owner}: expected numbers, got an input of dtype {array.dtype} and shape {array.shape}"
        )
    return Tensor(array, None if keeps_integers and array.dtype.kind in "iu" else dtype)


def mask_from_lengths(lengths: Any, batch: int, time: int) -> np.ndarray:
    """Bool (batch, time), True at the first `lengths[b]` steps of row b.

    Raises:
        ValueError: not one integer between 0 and `time` for each row.

    >>> mask_from_lengths([1, 3], batch=2, time=3).astype(int).tolist()
    [[1, 0, 0], [1, 1, 1]]
    """
    array = to_numpy(adopt(lengths))
    if array.shape != (batch,):
        raise ValueError(f"lengths: expected one for each of the {batch} rows, got shape {array.shape}")
    if array.dtype.kind not in "iu":
        raise ValueError(f"lengths: expected integers, got dtype {array.dtype}")
    if batch and (array.min() < 0 or array.max() > time):
        bad = int(array.min()) if array.min() < 0 else int(array.max())
        raise ValueError(f"lengths: expected values from 0 to {time} (the time steps there are), got {bad}")
    return np.arange(time) < array[:, None]


def checked_mask(mask: Any, inputs: Any, owner: str) -> Any:
    """A mask given by hand, as a bool array (or a list of them) that fits the inputs' batch and time."""
    if not isinstance(inputs, Tensor):
        if not isinstance(mask, (list, tuple)) or len(mask) != len(inputs):
            raise ValueError(
                f"{owner}: mask: expected one mask (or None) for each of the {len(inputs)} inputs"
            )
        return [
            None if m is None else checked_mask(m, x, owner) for m, x in zip(mask, flat(inputs), strict=True)
        ]
    array = adopt(mask)
    if array.dtype.kind != "b":
        if array.dtype.kind not in "iuf" or not np.isin(to_numpy(array), (0, 1)).all():
            raise ValueError(f"{owner}: mask: expected True and False (or 1 and 0), got dtype {array.dtype}")
        array = array.astype(bool)
    if array.ndim != 2 or array.shape != inputs.shape[:2]:
        raise ValueError(
            f"{owner}: mask: expected shape (batch, time) = {inputs.shape[:2]} for inputs of {inputs.shape}, "
            f"got {array.shape}"
        )
    return (
        array
        if type(inputs.data) is np.ndarray is type(array)
        else beside(array, inputs.data, f"{owner}: mask")
    )


def with_mask(inputs: Any, mask: Any) -> Any:
    """The inputs with the mask attached, on tensors of our own: the caller's are left as they are."""
    if not isinstance(inputs, Tensor):
        return [x if m is None else with_mask(x, m) for x, m in zip(inputs, mask, strict=True)]
    if inputs.mask is mask:
        return inputs
    alias = inputs.reshape(inputs.shape)
    alias.mask = mask
    return alias


def _single(mask: Any) -> Any:
    """Of several inputs' masks, the first there is."""
    return next((m for m in mask if m is not None), None) if isinstance(mask, list) else mask


# Reflection


@cache
def call_options(cls: type[Layer]) -> tuple[frozenset[str], bool]:
    """What the class's `call` takes beside its input, and whether it takes anything (`**kwargs`)."""
    parameters = list(signature(cls.call).parameters.values())
    names = frozenset(p.name for p in parameters[2:] if p.kind is not p.VAR_KEYWORD)
    return names, any(p.kind is p.VAR_KEYWORD for p in parameters)
