"""Optimizers: one fused, in-place update a step, of all variables, with Keras' names, defaults and formulas.

An optimizer computes scalars (the learning rate of this step, bias corrections), clips the gradients, and
hands all of them to the backend's `updates` in one call. Where Keras and PyTorch differ, Keras is followed:
Adam's epsilon is added to the uncorrected root (Kingma & Ba 2015, the note before section 2.1), RMSprop's is
added under the root, and weight decay is always decoupled (Loshchilov & Hutter 2019):
`w -= learning_rate * weight_decay * w` before the update.
"""

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, ClassVar, TypedDict, Unpack

import numpy as np

from numlstm import schedules
from numlstm.autograd import RowGradient, Variable
from numlstm.backend import backend_of, beside, get_backend, place_of, to_numpy
from numlstm.registry import Configurable, Registry, serialize
from numlstm.schedules import LearningRateSchedule

__all__ = ["SGD", "Adam", "AdamW", "Optimizer", "RMSprop", "deserialize", "get", "schedules", "serialize"]

_registry: Registry[type["Optimizer"]] = Registry("optimizer")

Array = Any
LearningRate = float | LearningRateSchedule | Mapping[str, Any]


class CommonOptions(TypedDict, total=False):
    """What every optimizer takes beside its own parameters."""

    weight_decay: float | None
    clipnorm: float | None
    clipvalue: float | None
    global_clipnorm: float | None
    name: str | None


class Optimizer(Configurable):
    """Base of all optimizers: learning rate, clipping, weight decay, state. Subclasses define `rule`,
    `slot_names`, `_options` and, where the rule takes slots that they lack, `_arguments`; or, for a formula of
    their own, `slot_names` and `_update`.

    Arguments:
        learning_rate: a number >= 0, a `LearningRateSchedule`, or the saved form of one.
        weight_decay: decoupled decay, in units of the learning rate, of every variable not excluded.
        clipnorm: scale each gradient down to this norm. clipvalue: clip every element to [-clipvalue,
            clipvalue].
        global_clipnorm: scale all gradients together down to this norm. At most one of the three.
        name: a label; the class' name in lower case if not given.

    Raises ValueError for a negative number, more than one kind of clipping, or an unknown schedule.

    >>> w = Variable([1.0, 2.0])
    >>> SGD(learning_rate=0.5).apply([np.array([1.0, 6.0], np.float32)], [w])
    >>> w.numpy().tolist()
    [0.5, -1.0]
    """

    rule: ClassVar[str]  # the backend's name for the update
    slot_names: tuple[str, ...] = ()

    def __init__(
        self,
        learning_rate: LearningRate = 0.001,
        weight_decay: float | None = None,
        clipnorm: float | None = None,
        clipvalue: float | None = None,
        global_clipnorm: float | None = None,
        name: str | None = None,
    ) -> None:
        self.name: str = name or type(self).__name__.lower()
        self.weight_decay: float | None = _number("weight_decay", weight_decay, optional=True)
        self.clipnorm: float | None = _positive("clipnorm", clipnorm)
        self.clipvalue: float | None = _positive("clipvalue", clipvalue)
        self.global_clipnorm: float | None = _positive("global_clipnorm", global_clipnorm)
        given = [n for n in ("clipnorm", "clipvalue", "global_clipnorm") if getattr(self, n) is not None]
        if len(given) > 1:
            raise ValueError(
                f"give at most one of clipnorm, clipvalue, global_clipnorm; got {' and '.join(given)}"
            )
        self.iterations: int = 0
        self._schedule: LearningRateSchedule | None = None
        self._rate = 0.0
        self._set_learning_rate(learning_rate)
        self._variables: list[Variable] = []
        self._slots: list[tuple[Array, ...]] = []
        self._place: dict[int, int] = {}  # id(variable) -> its place in the two lists, which keep it alive
        self._loaded: dict[str, Array] = {}  # slots that came from a file before their variables were seen
        self._excluded: list[Variable] = []
        self._excluded_names: tuple[str, ...] = ()
        self._plan: list[
            tuple[Variable, Array, tuple[Array, ...], bool]
        ] = []  # variable, array, slots, decays
        self._seen: list[Array] = []  # what `data` gave for each of them
        self._constrained: list[int] = []
        self._updates: list[tuple[list[int], Any]] = []
        self._updates_by: Any = None  # the backend that made them

    # The learning rate
    @property
    def learning_rate(self) -> float:
        """The rate of the next step. Settable, unless a schedule decides it."""
        return float(self._schedule(self.iterations)) if self._schedule is not None else self._rate

    @learning_rate.setter
    def learning_rate(self, value: LearningRate) -> None:
        if self._schedule is not None and not isinstance(value, (LearningRateSchedule, Mapping)):
            raise ValueError(
                f"learning_rate: got {value!r}, but this {type(self).__name__} follows the schedule "
                f"{type(self._schedule).__name__}; build it with a number to set the rate"
            )
        self._set_learning_rate(value)

    def _set_learning_rate(self, value: LearningRate) -> None:
        if isinstance(value, (LearningRateSchedule, Mapping)):
            self._schedule = schedules.get(value)
        else:
            self._rate = _number("learning_rate", value)

    # Steps
    def apply(self, gradients: Sequence[Array | None], variables: Sequence[Variable]) -> None:
        """Take one step: update `variables` in place from `gradients`, arrays of their shapes or
        `RowGradient`s (None: leave as it is).

        A `RowGradient` gives what the whole gradient with its zeros would: without momentum SGD touches only
        the rows taken, every other update all rows, since its running means decay.

        The gradients may be scaled in place when clipping. Raises ValueError for unequal lengths or shapes.
        """
        if len(gradients) != len(variables):
            raise ValueError(f"gradients: got {len(gradients)} for {len(variables)} variables")
        backend = get_backend()
        if not variables or (backend.xp is np and type(variables[0].data) is np.ndarray):
            self._step(backend, gradients, variables)
            return
        if place_of(variables[0].data) != backend.place:  # a step by hand, outside of what chose the backend
            backend = backend_of(variables[0].data)
        with backend.current():
            self._step(backend, gradients, variables)

    def _step(self, backend: Any, gradients: Sequence[Any], variables: Sequence[Variable]) -> None:
        """`apply`, on the backend of the variables' device."""
        plan = self._plan
        if len(variables) != len(plan):
            self._prepare(variables)
        else:
            for variable, known, seen in zip(variables, plan, self._seen, strict=True):
                if variable is not known[0] or variable.data is not seen:
                    self._prepare(variables)
                    break
        for gradient, (variable, array, _, _) in zip(gradients, self._plan, strict=True):
            if gradient is not None and gradient.shape != array.shape:
                raise ValueError(
                    f"gradients: shape {gradient.shape} came for {variable.name!r} of {variable.shape}"
                )
        if self.global_clipnorm is not None or self.clipnorm is not None or self.clipvalue is not None:
            gradients = self._clip(gradients)
        rate = self.learning_rate
        self._update(backend, gradients, rate, rate * self.weight_decay if self.weight_decay else 0.0)
        self.iterations += 1
        for gradient, variable in zip(gradients, variables, strict=True):
            if gradient is not None:
                variable.count_change()
        for k in self._constrained:
            if gradients[k] is not None:
                variables[k].assign(variables[k].constraint(variables[k].data))  # type: ignore[misc]

    def _update(self, backend: Any, gradients: Sequence[Any], rate: float, decay: float) -> None:
        """Change the variables of `_plan` in place; `decay` is learning rate times weight decay."""
        if backend is not self._updates_by:
            # One call of the backend for all variables of a dtype: which they are, and the call.
            dtypes = [array.dtype for _, array, _, _ in self._plan]
            self._updates = []
            for dtype in dict.fromkeys(dtypes):
                group = [k for k, d in enumerate(dtypes) if d == dtype]
                _, arrays, slots, decays = zip(*(self._plan[k] for k in group), strict=True)
                rows = list(zip(arrays, map(self._arguments, slots), strict=True))
                self._updates.append((group, backend.updates(self.rule, rows, decays)))
            self._updates_by = backend
        options = self._options(rate)
        given = [(g.index, g.values) if type(g) is RowGradient else g for g in gradients]
        for group, update in self._updates:
            update(given if len(group) == len(given) else [given[k] for k in group], options, decay)

    def apply_gradients(self, grads_and_vars: Iterable[tuple[Array | None, Variable]]) -> None:
        """`apply` in Keras' spelling: takes pairs (gradient, variable)."""
        pairs = list(grads_and_vars)
        self.apply([g for g, _ in pairs], [v for _, v in pairs])

    def exclude_from_weight_decay(
        self, var_list: Sequence[Variable] | None = None, var_names: Sequence[str] | None = None
    ) -> None:
        """Spare the variables of `var_list`, and those whose name contains one of `var_names`, from weight
        decay."""
        self._excluded += var_list or ()
        self._excluded_names += tuple(var_names or ())
        self._plan = []

    def _options(self, rate: float) -> tuple[Any, ...]:
        """What the rule takes after the slots, at this learning rate."""
        raise NotImplementedError(f"{type(self).__name__} must define _options")

    def _arguments(self, slots: tuple[Array, ...]) -> tuple[Array | None, ...]:
        """A variable's slots in the order in which the rule takes them, None where one is not used."""
        return slots

    def _prepare(self, variables: Sequence[Variable]) -> None:
        """Find or make the slots of `variables`. Called when they are others than in the last step."""
        plan = []
        for variable in variables:
            place = self._place.get(id(variable))
            if place is None:
                place = len(self._variables)
                slots = tuple(self._new_slot(place, n, variable) for n in self.slot_names)
                self._slots.append(slots)  # memory for them was there: nothing is left half done
                self._variables.append(variable)
                self._place[id(variable)] = place
                for n in self.slot_names:
                    self._loaded.pop(f"{place}.{n}", None)
            elif any(
                s.dtype != variable.dtype or type(s) is not type(variable.data) for s in self._slots[place]
            ):
                # The model changed its precision, or moved to or from a device.
                moved = [s if type(s) is type(variable.data) else to_numpy(s) for s in self._slots[place]]
                self._slots[place] = tuple(beside(s, variable.data, "slot", variable.dtype) for s in moved)
            plan.append((variable, variable.writable(), self._slots[place], self._decays(variable)))
        self._plan, self._seen, self._updates_by = plan, [v.data for v in variables], None
        self._constrained = [k for k, v in enumerate(variables) if v.constraint is not None]

    def _decays(self, variable: Variable) -> bool:
        named = any(part in variable.name for part in self._excluded_names)
        return not named and not any(variable is v for v in self._excluded)

    def _new_slot(self, place: int, slot: str, variable: Variable) -> Array:
        loaded = self._loaded.get(f"{place}.{slot}")
        if loaded is None:
            return np.zeros_like(variable.data)
        if loaded.shape != variable.shape:
            raise ValueError(
                f"optimizer state: {slot} number {place} has shape {loaded.shape}, "
                f"but variable {variable.name!r} has {variable.shape}"
            )
        return beside(loaded.astype(variable.dtype), variable.data, "optimizer state")

    # Clipping
    def _clip(self, gradients: Sequence[Array | RowGradient | None]) -> Sequence[Array | RowGradient | None]:
        # Of a gradient of rows those that are not zero are all that counts, each once.
        arrays: Any = [g.values if type(g) is RowGradient else g for g in gradients if g is not None]
        if self.clipvalue is not None:
            for g in arrays:
                np.clip(g, -self.clipvalue, self.clipvalue, out=g)
        elif self.clipnorm is not None:
            for g in arrays:
                _shrink(g, self.clipnorm, _norm([g]))
        else:
            norm = _norm(arrays)
            for g in arrays:
                _shrink(g, self.global_clipnorm, norm)  # type: ignore[arg-type]
        return gradients

    # State
    def __getstate__(self) -> dict[str, Any]:
        """What a copy takes over: all but what stands for arrays and variables by their addresses."""
        return {**self.__dict__, "_place": {}, "_plan": [], "_updates": [], "_updates_by": None}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._place = {id(variable): place for place, variable in enumerate(self._variables)}

    def state_dict(self) -> dict[str, Any]:
        """All that a later run needs to go on: `{"iterations", "learning_rate", "slots": {"0.m": array,
        ...}}`.

        The number in a slot's name is the variable's place in the order of training. Everything outside
        `slots` is JSON-able; `learning_rate` is None where a schedule decides it. Arrays are copies.
        """
        slots = {
            f"{place}.{name}": np.array(to_numpy(array))
            for place, arrays in enumerate(self._slots)
            for name, array in zip(self.slot_names, arrays, strict=True)
        }
        rate = None if self._schedule is not None else self._rate
        return {"iterations": self.iterations, "learning_rate": rate, "slots": {**self._loaded, **slots}}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take over what `state_dict` gave. Slots of variables not seen yet are kept for their first step.

        Raises ValueError for a state of another kind of optimizer or of other shapes.
        """
        slots = dict(state.get("slots") or {})
        strangers = sorted({name.partition(".")[2] for name in slots} - set(self.slot_names))
        if strangers:
            raise ValueError(
                f"optimizer state: holds {', '.join(strangers)}, but {type(self).__name__} keeps "
                f"{', '.join(self.slot_names) or 'nothing'}: it was saved by another optimizer"
            )
        for place, arrays in enumerate(self._slots):
            for name, array in zip(self.slot_names, arrays, strict=True):
                loaded = slots.pop(f"{place}.{name}", None)
                if loaded is None:
                    array[...] = 0
                elif loaded.shape != array.shape:
                    raise ValueError(
                        f"optimizer state: {place}.{name} is {loaded.shape}, expected {array.shape}"
                    )
                else:
                    array[...] = beside(loaded, array, "optimizer state")
        self._loaded = {name: np.array(array) for name, array in slots.items()}
        self.iterations = int(state["iterations"])
        if state.get("learning_rate") is not None and self._schedule is None:
            self._rate = _number("learning_rate", state["learning_rate"])

    def get_config(self) -> dict[str, Any]:
        """The constructor's arguments as JSON-able values; a schedule in its saved form."""
        config = super().get_config()
        if self._schedule is not None:
            config["learning_rate"] = serialize(self._schedule)
        return config


@_registry.register()
class SGD(Optimizer):
    """Gradient descent: `v = momentum * v - lr * g; w += v`, or with Nesterov `w += momentum * v - lr * g`.

    Arguments: `momentum` in [0, 1], `nesterov`, and those of `Optimizer`. Raises ValueError for others.
    Sutskever et al. 2013, "On the importance of initialization and momentum in deep learning".

    >>> w = Variable([1.0])
    >>> optimizer = SGD(learning_rate=0.1, momentum=0.9)
    >>> for _ in range(2):
    ...     optimizer.apply([np.ones(1, np.float32)], [w])
    >>> round(float(w), 4)
    0.71
    """

    rule: ClassVar[str] = "sgd"
    slot_names: tuple[str, ...] = ("momentum",)

    def __init__(
        self,
        learning_rate: LearningRate = 0.01,
        momentum: float = 0.0,
        nesterov: bool = False,
        **options: Unpack[CommonOptions],
    ) -> None:
        super().__init__(learning_rate, **options)
        self.momentum: float = _fraction("momentum", momentum)
        self.nesterov: bool = bool(nesterov)
        if not momentum:
            self.slot_names = ()  # nothing to remember: no memory is taken

    def _arguments(self, slots: tuple[Array, ...]) -> tuple[Array | None, ...]:
        return slots or (None,)

    def _options(self, rate: float) -> tuple[Any, ...]:
        return rate, self.momentum, self.nesterov


@_registry.register()
class RMSprop(Optimizer):
    """Divides by a running root mean square: `ms = rho ms + (1-rho) g^2`, `w -= lr * g / sqrt(ms + epsilon)`.

    With `centered` the running mean's square is subtracted from `ms`; with `momentum` the increments are
    accumulated. Arguments: `rho`, `momentum` in [0, 1], `epsilon` > 0, `centered`, and those of `Optimizer`.
    Hinton 2012, lecture 6e; Graves 2013 (arXiv:1308.0850) for the centered form.

    >>> w = Variable([1.0])
    >>> RMSprop(learning_rate=0.5).apply([np.ones(1, np.float32)], [w])
    >>> round(float(w), 4)
    -0.5811
    """

    rule: ClassVar[str] = "rmsprop"
    slot_names: tuple[str, ...] = ("mean_square", "mean", "momentum")

    def __init__(
        self,
        learning_rate: LearningRate = 0.001,
        rho: float = 0.9,
        momentum: float = 0.0,
        epsilon: float = 1e-7,
        centered: bool = False,
        **options: Unpack[CommonOptions],
    ) -> None:
        super().__init__(learning_rate, **options)
        self.rho: float = _fraction("rho", rho)
        self.momentum: float = _fraction("momentum", momentum)
        self.epsilon: float = _positive("epsilon", epsilon)
        self.centered: bool = bool(centered)
        kept = {"mean_square": True, "mean": centered, "momentum": momentum > 0}
        self.slot_names = tuple(name for name, keep in kept.items() if keep)

    def _arguments(self, slots: tuple[Array, ...]) -> tuple[Array | None, ...]:
        return slots[0], slots[1] if self.centered else None, slots[-1] if self.momentum else None

    def _options(self, rate: float) -> tuple[Any, ...]:
        return rate, self.rho, self.momentum, self.epsilon


@_registry.register()
class Adam(Optimizer):
    """Adam: `m`, `v` running means of g and g^2; `w -= lr_t * m / (sqrt(v) + epsilon)`, `lr_t` the corrected
    rate.

    `lr_t = lr * sqrt(1 - beta_2^t) / (1 - beta_1^t)`. With `amsgrad` the largest `v` so far is used (Reddi et
    al. 2018). Arguments: `beta_1`, `beta_2` in [0, 1), `epsilon` > 0, `amsgrad`, and those of `Optimizer`.
    Kingma & Ba 2015, https://arxiv.org/abs/1412.6980.

    >>> w = Variable([1.0])
    >>> Adam(learning_rate=0.5).apply([np.array([6.0], np.float32)], [w])
    >>> round(float(w), 4)
    0.5
    """

    rule: ClassVar[str] = "adam"
    slot_names: tuple[str, ...] = ("m", "v", "v_max")

    def __init__(
        self,
        learning_rate: LearningRate = 0.001,
        beta_1: float = 0.9,
        beta_2: float = 0.999,
        epsilon: float = 1e-7,
        amsgrad: bool = False,
        **options: Unpack[CommonOptions],
    ) -> None:
        super().__init__(learning_rate, **options)
        self.beta_1: float = _fraction("beta_1", beta_1, open_end=True)
        self.beta_2: float = _fraction("beta_2", beta_2, open_end=True)
        self.epsilon: float = _positive("epsilon", epsilon)
        self.amsgrad: bool = bool(amsgrad)
        if not amsgrad:
            self.slot_names = ("m", "v")

    def _arguments(self, slots: tuple[Array, ...]) -> tuple[Array | None, ...]:
        return slots if self.amsgrad else (*slots, None)

    def _options(self, rate: float) -> tuple[Any, ...]:
        t = self.iterations + 1
        corrected = rate * math.sqrt(1 - self.beta_2**t) / (1 - self.beta_1**t)
        return corrected, self.beta_1, self.beta_2, self.epsilon


@_registry.register()
class AdamW(Adam):
    """Adam with decoupled weight decay, 0.004 unless said. Loshchilov & Hutter,
    https://arxiv.org/abs/1711.05101.

    >>> w = Variable([2.0])
    >>> AdamW(learning_rate=0.5).apply([np.ones(1, np.float32)], [w])
    >>> round(float(w), 4)
    1.496
    """

    def __init__(
        self,
        learning_rate: LearningRate = 0.001,
        weight_decay: float = 0.004,
        beta_1: float = 0.9,
        beta_2: float = 0.999,
        epsilon: float = 1e-7,
        amsgrad: bool = False,
        **options: Unpack[CommonOptions],  # type: ignore[misc]
    ) -> None:
        if weight_decay is None:
            raise ValueError("weight_decay: AdamW needs a number >= 0, got None; Adam is AdamW without it")
        super().__init__(
            learning_rate, beta_1, beta_2, epsilon, amsgrad, **{**options, "weight_decay": weight_decay}
        )


def get(identifier: Any) -> Optimizer:
    """An optimizer from its name in any spelling, its class, its saved form, or itself.

    Raises ValueError for an unknown name (listing the known), or for what is no optimizer.

    >>> get("rmsProp").name
    'rmsprop'
    """
    optimizer = identifier if isinstance(identifier, Optimizer) else _registry.get(identifier)
    if not isinstance(optimizer, Optimizer):
        raise ValueError(
            f"optimizer: got {identifier!r}; expected one of {', '.join(_registry.names())} or an object"
        )
    return optimizer


deserialize = get


# Checks and norms
def _number(name: str, value: Any, *, optional: bool = False) -> Any:
    if optional and value is None:
        return None
    if isinstance(value, bool) or not isinstance(value, (int, float, np.number)) or not 0 <= value < math.inf:
        raise ValueError(f"{name}: expected a finite number >= 0, got {value!r}")
    return float(value)


def _positive(name: str, value: Any) -> Any:
    if value is not None and not _number(name, value) > 0:
        raise ValueError(f"{name}: expected a number > 0, got {value!r}")
    return value


def _fraction(name: str, value: float, *, open_end: bool = False) -> float:
    if not (0 <= value < 1 or (value == 1 and not open_end)):
        raise ValueError(f"{name}: expected a number in [0, 1{')' if open_end else ']'}, got {value!r}")
    return float(value)


def _norm(gradients: Sequence[Array]) -> Any:
    """The Euclidean norm over all `gradients`; on a device a number there, for which nobody waits.

    NumPy's pairwise sum is used, not a BLAS dot product, whose result may depend on the number of threads.
    Squares that leave float32's range are summed again in float64, so that a large but finite gradient is
    clipped, not lost.
    """
    if gradients and type(gradients[0]) is not np.ndarray:
        squares = 0.0
        for g in gradients:
            squares = squares + np.square(g.astype(np.float64)).sum()
        return np.sqrt(squares)
    with np.errstate(over="ignore", invalid="ignore"):
        squares = math.fsum(float(np.square(g).sum()) for g in gradients) if gradients else 0.0
    if not math.isfinite(squares):
        squares = sum(float(np.square(g, dtype=np.float64).sum()) for g in gradients)
    return math.sqrt(squares)


def _shrink(gradient: Array, limit: float, norm: Any) -> None:
    """Scale `gradient`, in place, so that a `norm` above `limit` becomes `limit`. An infinite one stays as
    it is."""
    if not isinstance(norm, float):
        above = (norm > limit) & np.isfinite(norm)
        gradient *= np.where(above, limit / np.where(above, norm, 1.0), 1.0).astype(gradient.dtype)
    elif limit < norm < math.inf:
        gradient *= gradient.dtype.type(limit / norm)
