"""Training: `compile`, `fit`, `evaluate`, `predict` and their one-batch forms, inherited by every model.

A step is: forward pass under a tape, loss, gradients, one fused update of all weights; nothing is built anew
from step to step. With `bptt_steps` a batch (B, T, ...) is cut along time, the recurrent layers hand their
states on, detached, from piece to piece, and each piece is a step (truncated backpropagation through time:
Williams & Peng 1990). Argument names and defaults are those of Keras 3; `mask`, `lengths` and `bptt_steps` are
added, and one-batch methods give the figures of their batch, not running means.
"""

import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from numlstm import losses, metrics, optimizers, random
from numlstm.autograd import GradientTape, QuantizedVariable, Tensor, Variable
from numlstm.backend import (
    PRECISIONS,  # type: ignore[attr-defined]
    beside,
    get_backend,
    namespace,
    place_of,
    scalar,
    to_numpy,
    use_backend,
)
from numlstm.callbacks import Callback, CallbackList, History
from numlstm.data.batches import ArrayBatches, Batch, Batches, Ragged, as_batches, one_batch, placed
from numlstm.progress import Silent, progress
from numlstm.registry import serialize

__all__ = ["Trainer"]

_PRECISIONS = (*PRECISIONS, "float64")
_HELD = 64 * 2**20  # bytes of predictions that wait on a device before they are read back together


class _Settings(NamedTuple):
    """What `compile` was told, beside optimizer and loss."""

    metrics: list[Any]
    weighted_metrics: list[Any]
    precision: str
    backend: str | None
    strict: bool

    @property
    def dtype(self) -> str:
        """Of weights, states and everything that is not inside a product."""
        return "float64" if self.precision == "float64" else "float32"

    @property
    def products(self) -> str | None:
        """The backend's precision, that of the products' operands; None leaves the choice to `use_backend` around a call."""
        return None if self.precision in ("float32", "float64") else self.precision


if TYPE_CHECKING:  # what a checker should know of `self`; Layer comes into `Model` beside this class
    from numlstm.layers.base import Layer, Members
    from numlstm.layers.recurrent import Recurrent

    class _Mixed(Layer):
        def recurrent_layers(self) -> list[Recurrent]: ...

else:
    _Mixed = object


class Trainer(_Mixed):
    """What makes a model trainable. Mixed into `Model`, which gives calls, weights and layers."""

    optimizer: Any = None
    loss: Any = None
    stop_training: bool = False
    history: History | None = None
    _settings: Any = None  # a _Settings, once compiled
    _loop: Any = None  # the running fit, for BackupAndRestore

    def compile(
        self,
        optimizer: Any = "rmsprop",
        loss: Any = None,
        metrics: Any = None,
        weighted_metrics: Any = None,
        precision: str = "float32",
        backend: str | None = None,
        strict: bool = False,
    ) -> None:
        """Say how to train.

        Arguments:
            optimizer: a name, or an `Optimizer`. loss: a name, a `Loss`, or a function of targets and
                predictions.
            metrics: figures to watch, names or objects, in a list. weighted_metrics: the same, weighed by the
                sample and class weights.
            precision: "float32"; "bfloat16": products of matrices (in recurrent and dense layers, `ops.matmul`) take
                operands rounded to bfloat16, in training and in `predict`, while their sums, gates, states, weights and
                batched products (attention's) stay float32; for inference alone see `use_backend`; or "float64", weights
                and data too (on the CPU by NumPy's kernels: `explain` says so, `strict` refuses it).
            backend, strict: where to run, as in `use_backend`; None: where the data lie, or what is in use. On a device
                weights stay there between calls, and figures are read back when somebody looks at them.

        Raises ValueError for unknown names and options, RuntimeError for a backend that can't be used here.

        >>> import numlstm as nl
        >>> model = nl.Sequential([nl.LSTM(4, input_shape=(3, 1)), nl.Dense(1)])
        >>> model.compile(optimizer="adam", loss="mse", metrics=["mae"])
        >>> history = model.fit(np.zeros((8, 3, 1)), np.ones((8, 1)), epochs=2, verbose=0)
        >>> sorted(history.history)
        ['loss', 'mae']
        """
        if precision not in _PRECISIONS:
            raise ValueError(f"precision: {precision!r} is not known; expected {' or '.join(_PRECISIONS)}")
        if backend is not None:  # raises now rather than in the first step
            products = None if precision in ("float32", "float64") else precision
            with use_backend(backend, precision=products):
                pass
        new_optimizer, new_loss = optimizers.get(optimizer), losses.get(loss)
        if new_loss is not None and new_loss.reduction in (None, "none"):
            raise ValueError(f"loss: {new_loss.name} has no reduction; training needs one number a batch")
        settings = _Settings(
            _metric_list("metrics", metrics),
            _metric_list("weighted_metrics", weighted_metrics),
            precision,
            backend,
            bool(strict),
        )
        self.optimizer, self.loss, self._settings = new_optimizer, new_loss, settings
        self.cast(settings.dtype)

    def get_compile_config(self) -> dict[str, Any] | None:
        """What `compile` was told, JSON-able, for a file; None if it was not called. Functions go by their
        names."""
        if self._settings is None:
            return None
        return {
            "optimizer": serialize(self.optimizer),
            "loss": None if self.loss is None else serialize(self.loss),
            **{name: serialize(value) for name, value in self._settings._asdict().items()},
            "metrics": _saved_metrics(self._settings.metrics),
            "weighted_metrics": _saved_metrics(self._settings.weighted_metrics),
        }

    def compile_from_config(self, config: Mapping[str, Any]) -> None:
        """`compile` with what `get_compile_config` gave."""
        self.compile(**config)

    # Training

    def fit(
        self,
        x: Any = None,
        y: Any = None,
        batch_size: int | None = None,
        epochs: int = 1,
        verbose: int | str = "auto",
        callbacks: Any = None,
        validation_split: float = 0.0,
        validation_data: Any = None,
        shuffle: bool = True,
        class_weight: Mapping[int, float] | None = None,
        sample_weight: Any = None,
        initial_epoch: int = 0,
        steps_per_epoch: int | None = None,
        validation_steps: int | None = None,
        validation_batch_size: int | None = None,
        validation_freq: int | Sequence[int] = 1,
        *,
        mask: Any = None,
        lengths: Any = None,
        bptt_steps: int | None = None,
    ) -> History:
        """Train for `epochs` passes over the data. On a device arrays are copied there once, if they take no more than
        half of its free memory, and else batch by batch, as memmaps, unequal sequences and sources always are.

        Arguments:
            x: array or np.memmap (batch, time, ...), a list of sequences of unequal length, or a source of
                batches: an iterable, an iterator, or a function that returns one each epoch, of `(x, y)` or
                    `(x, y, weights)`.
            y: targets, with the rows of x; part of the batches when x is a source.
            batch_size: rows a step, 32 if not given.
            validation_split: the last part of the rows (before shuffling) is not trained on, but evaluated.
            validation_data: `(x, y)` or `(x, y, weights)`, a dict of the arguments of `evaluate`, or a
                source.
            shuffle: take the rows in a new order each epoch (a source keeps its own).
            class_weight: weights of class numbers. sample_weight: (batch,), or (batch, time) for sequence
                targets.
            initial_epoch: number of the first epoch. steps_per_epoch: end an epoch early, or go on with the
                data.
            validation_freq: validate every so many epochs, or after those in a list (counted from 1).
            mask: (batch, time), False where a step does not count. lengths: (batch,), how many steps of a row
                count.
            bptt_steps: cut the time axis into pieces of so many steps, each a step of training.

        Returns the `History`; also an exception or Ctrl-C leaves a model that can be used.

        Raises ValueError for data or options that do not fit, naming them.

        >>> import numlstm as nl
        >>> model = nl.Sequential([nl.LSTM(4), nl.Dense(1)])
        >>> model.compile("adam", "mse")
        >>> model.fit([np.ones((3, 2)), np.ones((5, 2))], np.ones((2, 1)), epochs=3, verbose=0).epoch
        [0, 1, 2]
        """
        self._need_compiled("fit")
        self._need_float_weights("fit")
        epochs, initial_epoch = _whole("epochs", epochs, 1), _whole("initial_epoch", initial_epoch, 0)
        chunk = None if bptt_steps is None else _whole("bptt_steps", bptt_steps, 1)
        dtype = self._settings.dtype
        data = as_batches(x, y, sample_weight, mask=mask, lengths=lengths, batch_size=batch_size, dtype=dtype)
        validation = self._validation(validation_data, validation_batch_size or batch_size)
        if validation_split:
            data, validation = _split(data, validation_split, validation)
        sequences, shuffle = self._gives_sequences(), _flag("shuffle", shuffle)
        feed = _Feed(data, steps_per_epoch, chunk, sequences, shuffle=shuffle, repeat=True)
        loop = _Loop(self, feed, _class_table(class_weight, self.loss), validation, validation_steps)
        self.history, self.stop_training, self._loop = History(), False, loop
        params = {
            "epochs": epochs,
            "steps": feed.steps,
            "verbose": verbose,
            "validation_freq": validation_freq,
        }
        watchers = CallbackList([*_callback_list(callbacks), self.history], self, params)
        display = progress(verbose)
        try:
            with self._running(chunk, data):
                feed.go_on()
                loop.go_on()
                self._build_for(feed)
                loop.run(epochs, initial_epoch, watchers, display, validation_freq)
        finally:
            self._loop = None
            display.close()
        return self.history

    def evaluate(
        self,
        x: Any = None,
        y: Any = None,
        batch_size: int | None = None,
        verbose: int | str = "auto",
        sample_weight: Any = None,
        steps: int | None = None,
        callbacks: Any = None,
        return_dict: bool = False,
        *,
        mask: Any = None,
        lengths: Any = None,
        bptt_steps: int | None = None,
    ) -> Any:
        """The loss and metrics on data, which come in the forms that `fit` takes.

        `steps` ends early; with `bptt_steps` long rows are run in pieces, states handed on, so that memory
        stays small. Returns the loss, or a list of loss and metrics, or with `return_dict` a dict of them.

        Raises ValueError for data that do not fit.

        >>> import numlstm as nl
        >>> model = nl.Sequential([nl.LSTM(4), nl.Dense(1)])
        >>> model.compile("adam", "mse")
        >>> type(model.evaluate(np.ones((8, 3, 2)), np.ones((8, 1)), verbose=0)).__name__
        'float'
        """
        self._need_compiled("evaluate")
        chunk = None if bptt_steps is None else _whole("bptt_steps", bptt_steps, 1)
        data = as_batches(
            x,
            y,
            sample_weight,
            mask=mask,
            lengths=lengths,
            batch_size=batch_size,
            dtype=self._settings.dtype,
        )
        feed = _Feed(data, steps, chunk, self._gives_sequences())
        watchers = CallbackList(_callback_list(callbacks), self, {"steps": feed.steps, "verbose": verbose})
        display = progress(verbose)
        try:
            with self._running(chunk, data):
                feed.go_on()
                logs = _test(self, feed, _Figures(self), watchers, display)
        finally:
            display.close()
        return _results(logs, return_dict)

    def predict(
        self,
        x: Any,
        batch_size: int | None = None,
        verbose: int | str = "auto",
        steps: int | None = None,
        callbacks: Any = None,
        *,
        mask: Any = None,
        lengths: Any = None,
        bptt_steps: int | None = None,
    ) -> Any:
        """The outputs for data, which come in the forms that `fit` takes; targets in a source are left aside.

        Returns an array, on the device that `x` lies on (NumPy for NumPy, CuPy for CuPy and for GPU arrays of torch
        and JAX), or for a model with several outputs a list of arrays; for a list of unequal sequences and a model
        that gives sequences, a list of arrays of their lengths. Dropout and the like are off.

        Raises ValueError for data that do not fit.

        >>> import numlstm as nl
        >>> nl.Sequential([nl.LSTM(4), nl.Dense(2)]).predict(np.ones((8, 3, 1)), verbose=0).shape
        (8, 2)
        """
        chunk = None if bptt_steps is None else _whole("bptt_steps", bptt_steps, 1)
        data = as_batches(x, mask=mask, lengths=lengths, batch_size=batch_size, dtype=self.dtype)
        feed = _Feed(data, steps, chunk, self._gives_sequences())
        watchers = CallbackList(_callback_list(callbacks), self, {"steps": feed.steps, "verbose": verbose})
        display = progress(verbose, quiet_off_terminal=True)
        try:
            with self._running(chunk, data):
                feed.go_on()
                return _predict(self, feed, watchers, display)
        finally:
            display.close()

    # One batch

    def train_on_batch(
        self,
        x: Any,
        y: Any = None,
        sample_weight: Any = None,
        class_weight: Mapping[int, float] | None = None,
        return_dict: bool = False,
        *,
        mask: Any = None,
        lengths: Any = None,
    ) -> Any:
        """One step of training on one batch. Returns its loss, or a list of loss and metrics, or a dict of
        them.

        Raises ValueError for data that do not fit.

        >>> import numlstm as nl
        >>> model = nl.Sequential([nl.LSTM(4), nl.Dense(1)])
        >>> model.compile("sgd", "mse", metrics=["mae"])
        >>> sorted(model.train_on_batch(np.ones((2, 3, 1)), np.ones((2, 1)), return_dict=True))
        ['loss', 'mae']
        """
        self._need_compiled("train_on_batch")
        members = self._need_float_weights("train_on_batch")
        batch = self._one_batch(x, y, sample_weight, mask, lengths)
        figures = _Figures(self, _class_table(class_weight, self.loss))
        with self._running(None, batch.x):
            batch = self._on_device(batch)
            if not self.built:
                self._build(batch)
                members = self._survey()
            _TrainStep(self, figures, members)(batch)
        return _results(figures.logs(), return_dict)

    def test_on_batch(
        self,
        x: Any,
        y: Any = None,
        sample_weight: Any = None,
        return_dict: bool = False,
        *,
        mask: Any = None,
        lengths: Any = None,
    ) -> Any:
        """The loss and metrics of one batch, without training. Returns and raises as `train_on_batch`."""
        self._need_compiled("test_on_batch")
        figures = _Figures(self)
        batch = self._one_batch(x, y, sample_weight, mask, lengths)
        with self._running(None, batch.x):
            _test_step(self, self._on_device(batch), figures)
        return _results(figures.logs(), return_dict)

    def loss_and_gradients(
        self,
        x: Any,
        y: Any = None,
        sample_weight: Any = None,
        *,
        mask: Any = None,
        lengths: Any = None,
        training: bool = False,
    ) -> tuple[float, list[Any], Any]:
        """The loss of one batch, penalties included, and its gradient by each weight. Nothing is trained.

        Arguments:
            x, y, sample_weight, mask, lengths: as in `train_on_batch`.
            training: with dropout and the like, as in training, drawn anew.

        Returns the loss; an array for each of `weights`, those that are not trained too, None where the loss
        does not depend on it; and the model's outputs.

        Raises ValueError for data that do not fit, or a model that was not compiled.

        >>> import numlstm as nl
        >>> model = nl.Sequential([nl.LSTM(4), nl.Dense(1)])
        >>> model.compile("sgd", "mse")
        >>> loss, gradients, outputs = model.loss_and_gradients(np.ones((2, 3, 1)), np.ones((2, 1)))
        >>> [g.shape for g in gradients], outputs.shape
        ([(1, 16), (4, 16), (16,), (4, 1), (1,)], (2, 1))
        """
        self._need_compiled("loss_and_gradients")
        self._need_float_weights("loss_and_gradients")
        batch = self._one_batch(x, y, sample_weight, mask, lengths)
        with self._running(None, batch.x):
            batch = self._on_device(batch)
            if not self.built:
                self._build(batch)
            with GradientTape() as tape:
                for variable in self.weights:  # frozen ones too
                    tape.watch(variable)
                y_pred = self(batch.x, training=bool(training), mask=batch.mask)
                total, _ = _objective(_Figures(self), _Penalties(self, self._survey()), batch, y_pred)
            gradients = tape.gradient(total, self.weights)
        return float(total.item()), gradients, y_pred.numpy()

    def predict_on_batch(self, x: Any, *, mask: Any = None, lengths: Any = None) -> Any:
        """The outputs for one batch: an array, or a list of arrays for a model with several outputs."""
        batch = self._one_batch(x, None, None, mask, lengths)
        with self._running(None, batch.x):
            there = self._on_device(batch)
            out = self(there.x, training=False, mask=there.mask)
            several, like = isinstance(out, (list, tuple)), _first(batch.x)
            arrays = [_given_back(o.data, like) for o in (out if several else [out])]
        return arrays if several else arrays[0]

    def _one_batch(self, x: Any, y: Any, sample_weight: Any, mask: Any, lengths: Any) -> Batch:
        return one_batch(x, y, sample_weight, mask=mask, lengths=lengths, dtype=self.dtype)

    # For BackupAndRestore

    def resume_training(
        self, epoch: int, step: int, state: dict[str, int], figures: Mapping[str, Any] | None
    ) -> None:
        """Within `fit`, before the first epoch: go on at this step of this epoch, then with this random
        state."""
        self._loop.resume = (epoch, step, state, figures)

    def training_figures(self) -> dict[str, Any]:
        """The sums behind the running figures of the epoch in progress, JSON-able."""
        return self._loop.figures.get_state()

    # Preparation

    def _need_compiled(self, method: str) -> None:
        if self._settings is None:
            raise ValueError(
                f"{method}: the model has not been compiled; call compile(optimizer=..., loss=...) first"
            )

    def _need_float_weights(self, method: str) -> "Members":
        """The model's layers and weights, none of them int8."""
        members = self._survey()
        for variable in members.weights:
            if isinstance(variable, QuantizedVariable):
                raise ValueError(
                    f"{method}: this model has int8 weights, which serve inference only: train the float32 model, "
                    f"and quantize it again"
                )
        return members

    def _running(self, chunk: int | None, data: Any = None) -> AbstractContextManager[Any]:
        """The backend that `compile` chose, else by where `data` lie; with `chunk`, recurrent layers that hand their
        states on."""
        settings = self._settings
        how: dict[str, Any] = {"name": None}
        if settings is not None:
            how = {"name": settings.backend, "strict": settings.strict, "precision": settings.products}
        backend = use_backend(**how, like=_first(data))
        return self._carrying(backend) if chunk else backend

    @contextmanager
    def _carrying(self, backend: AbstractContextManager[Any]) -> Iterator[None]:
        """Within the block recurrent layers hand their states on from one call to the next."""
        layers = self.recurrent_layers()
        backwards = [layer.name for layer in layers if getattr(layer, "go_backwards", False)]
        if backwards:
            raise ValueError(
                f"bptt_steps: {backwards[0]} reads time from its end (go_backwards): its input can't be cut"
            )
        before = [(layer, layer.carry, layer.states) for layer in layers]
        with backend:
            try:
                for layer in layers:
                    layer.carry = True
                yield
            finally:
                for layer, carry, states in before:
                    layer.carry = carry
                    if not getattr(layer, "stateful", False):
                        layer.states = states

    def _on_device(self, batch: Batch) -> Batch:
        """A batch where the backend in use works."""
        backend = get_backend()
        return batch if backend.xp is np and not _abroad(batch) else placed(batch, backend)

    def _gives_sequences(self) -> bool:
        """False when the last recurrent layer gives its last output only: then targets have no time axis."""
        layers = self.recurrent_layers()
        return not layers or bool(getattr(layers[-1], "return_sequences", True))

    def _build_for(self, feed: "_Feed") -> None:
        """Make the weights before the first step, so that callbacks find them."""
        if not self.built:
            self._build(feed.peek())

    def _build(self, batch: Batch) -> None:
        # A tape makes this the forward pass of training: no second variant of the kernels is compiled.
        with GradientTape():
            self(batch.x[:1], mask=None if batch.mask is None else batch.mask[:1])
        for layer in self.recurrent_layers():
            layer.reset_states()

    def _validation(self, given: Any, batch_size: int | None) -> Batches | None:
        """`validation_data` of `fit` as a source."""
        if given is None:
            return None
        options: dict[str, Any] = {"dtype": self._settings.dtype}
        if isinstance(given, (tuple, list)):
            if len(given) not in (2, 3):
                kind = type(given).__name__
                raise ValueError(
                    f"validation_data: a {kind} of {len(given)} came, expected (x, y) or (x, y, weights)"
                )
            given = dict(zip(("x", "y", "sample_weight"), given, strict=False))
        if isinstance(given, Mapping):
            unknown = sorted(set(given) - {"x", "y", "sample_weight", "mask", "lengths"})
            if unknown:
                raise ValueError(f"validation_data: unknown key {unknown[0]!r}")
            options |= {**given, "batch_size": batch_size}
        else:
            options["x"] = given
        try:
            return as_batches(**options)
        except ValueError as error:
            raise ValueError(f"validation_data: {error}") from error


class _Feed:
    """Batches for one epoch after the other, cut into chunks if asked for."""

    def __init__(
        self,
        data: Batches,
        steps: int | None,
        chunk: int | None,
        sequences: bool,
        *,
        shuffle: bool = False,
        repeat: bool = False,
    ) -> None:
        self.data, self.chunk, self.sequences = data, chunk, sequences
        self.shuffle, self.repeat = shuffle, repeat  # repeat: data that end within `steps` are begun anew
        self.limit = None if steps is None else _whole("steps_per_epoch" if repeat else "steps", steps, 1)
        self.steps = self.limit or _steps(data, chunk)
        self._flow: Any = None  # the iterator of batches
        self._peeked: list[Batch] = []
        self._backend: Any = (
            None  # to which batches are copied one by one, in so far as they do not lie there
        )
        self.came_from = data.came_from

    def go_on(self) -> None:
        """The data go where the backend in use works: all at once if they fit, else batch by batch."""
        backend = get_backend()
        self.data = self.data.on(backend)
        if backend.xp is not np or not isinstance(self.data, ArrayBatches):
            self._backend = backend

    def _start(self) -> Iterator[Batch]:
        return self.data.epoch(shuffle=self.shuffle, chunk=self.chunk, timed=self.sequences)

    def peek(self) -> Batch:
        """A batch to build the weights from; it is not lost."""
        if isinstance(self.data, ArrayBatches):
            first = self.data.part(slice(0, 1))
            return self._placed(next(first.epoch(chunk=self.chunk, timed=self.sequences)))
        self._flow = self._start()
        batch = self._next()
        if batch is None:
            raise ValueError(self._used_up(0, 0))
        self._peeked = [batch]
        return batch

    def epoch(self, number: int = 0) -> Iterator[Batch]:
        """The batches of the next epoch. Raises ValueError when an iterator has no more to give."""
        goes_on = self.limit is not None or self.data.endless
        if self._flow is None or not (goes_on or self._peeked):
            self._flow = self._start()
        count = 0
        while self.limit is None or count < self.limit:
            batch = self._draw()
            if batch is None:
                if count and self.limit is None:
                    break
                raise ValueError(self._used_up(number, count))
            count += 1
            yield batch

    def _draw(self) -> Batch | None:
        """The next batch; with `steps_per_epoch`, data that end are begun anew (where that is possible)."""
        batch = self._peeked.pop() if self._peeked else self._next()
        if batch is None and self.limit is not None and self.repeat and not self.data.endless:
            self._flow = self._start()
            batch = self._next()
        return batch

    def _next(self) -> Batch | None:
        batch = next(self._flow, None)
        return batch if batch is None else self._placed(batch)

    def _placed(self, batch: Batch) -> Batch:
        if self._backend is None:
            return batch
        if not isinstance(self.data, ArrayBatches):
            self.came_from = place_of(_first(batch.x))
            if self._backend.xp is np and not _abroad(batch):
                return batch
        return placed(batch, self._backend)

    def discard(self, epochs: int) -> None:
        """Draw from an iterator what these epochs were trained on before; other sources start anew."""
        if self.data.endless:
            for number in range(epochs):
                for _ in self.epoch(number):
                    pass

    def _used_up(self, number: int, count: int) -> str:
        wanted = f"{self.limit} batches" if self.limit else "at least one batch"
        hint = (
            "; give a function that returns a new iterator, or one that goes on" if self.data.endless else ""
        )
        return f"x: epoch {number + 1} needs {wanted}, but the source of batches ended after {count}{hint}"


class _Figures:
    """The running loss and metrics of an epoch."""

    def __init__(self, model: Trainer, class_table: np.ndarray | None = None) -> None:
        self.loss: losses.Loss | None = model.loss
        self.class_table = class_table
        settings: Any = model._settings
        self.specs = [(m, False) for m in settings.metrics] + [(m, True) for m in settings.weighted_metrics]
        self.metrics: Any = None if self.specs else []
        self.total: Any = 0.0
        self.count: Any = 0.0
        self._waiting: list[dict[str, Any]] | None = None  # states from a backup, until the metrics are known

    def reset(self) -> None:
        self.total = self.count = 0.0
        for metric, _, _ in self.metrics or ():
            metric.reset_state()

    def objective(self, batch: Batch, y_pred: Any) -> tuple[Tensor | None, Any]:
        """The loss of a batch, and (what `add` needs): its values, weights, mask, and how much they count."""
        if not isinstance(y_pred, Tensor):
            raise ValueError(
                f"the model gives {len(y_pred)} outputs; training needs one (loss by hand: GradientTape)"
            )
        if self.loss is None:
            return None, (None, None, y_pred.mask, batch.x.shape[0])
        if batch.y is None:
            raise ValueError(f"y: no targets came, but the loss {self.loss.name} needs them")
        if self.class_table is not None:
            self.class_table = beside(self.class_table, batch.y, "class_weight")
        weights = class_weights(batch.y, batch.sample_weight, self.class_table, self.loss.labels)
        values = self.loss.call(batch.y, y_pred)
        mask = self.loss.valid(batch.y, y_pred.mask)
        if not values.ndim or self.loss.reduction == "sum":
            amount: float = batch.x.shape[0]
        elif mask is None:
            amount = values.size
        else:
            mask = beside(mask, values.data, "mask")
            share = values.size / mask.size
            amount = (
                float(np.count_nonzero(mask)) * share
                if type(mask) is np.ndarray
                else np.count_nonzero(mask) * share
            )
        return self.loss.reduce(values, weights, mask), (values, weights, mask, amount)

    def add(self, loss: Any, batch: Batch, y_pred: Tensor, parts: Any) -> None:
        """Take in a batch: its loss, a number or the array on a device that holds it, and what `objective` gave
        beside it."""
        values, weights, mask, amount = parts
        # A batch of padding only has no loss: 0 times NaN must not spoil the sum.
        if type(loss) is not float and not isinstance(amount, (int, float)):
            loss = np.where(amount == 0, 0.0, loss.astype(np.float64) * amount)
            self.total, self.count = self.total + loss, self.count + amount
        elif amount:
            self.total += loss * amount if type(loss) is float else loss.astype(np.float64) * amount  # type: ignore[union-attr]
            self.count += amount
        if self.metrics is None:
            self._resolve(batch, y_pred.data)
        for metric, weighted, is_loss in self.metrics:  # type: ignore[union-attr]
            w = _metric_weights(mask, weights if weighted else None)
            if is_loss:
                metric.add_loss(values.data, batch.y, w)
            else:
                metric.update_state(batch.y, y_pred.data, w)

    def _resolve(self, batch: Batch, y_pred: np.ndarray) -> None:
        """Make metrics of their names, now that shapes are known; find those that repeat the loss."""
        if batch.y is None:
            raise ValueError("y: no targets came, but metrics need them")
        self.metrics = []
        for spec, weighted in self.specs:
            metric = metrics.resolve(spec, self.loss, batch.y, y_pred)
            metric.reset_state()
            repeats = isinstance(metric, metrics.LossMetric) and _same_loss(metric.loss, self.loss)
            self.metrics.append((metric, weighted, repeats))
        for (metric, _, _), state in zip(self.metrics, self._waiting or (), strict=False):
            metric.set_state(state)

    def _read(self) -> None:
        """The sums as numbers: on a device this is where one waits for it."""
        self.total, self.count = (scalar(s) if hasattr(s, "item") else s for s in (self.total, self.count))

    def logs(self) -> dict[str, Any]:
        self._read()
        figures: dict[str, Any] = {"loss": self.total / self.count if self.count else 0.0}
        for metric, _, _ in self.metrics or ():
            figures[_free_name(metric.name, figures)] = metric.result()
        return figures

    def get_state(self) -> dict[str, Any]:
        self._read()
        return {
            "total": self.total,
            "count": self.count,
            "metrics": [metric.get_state() for metric, _, _ in self.metrics or ()],
        }

    def set_state(self, state: Mapping[str, Any]) -> None:
        self.total, self.count, self._waiting = state["total"], state["count"], state["metrics"]


class _TrainStep:
    """One step of training. Holds what does not change from step to step."""

    def __init__(self, model: Trainer, figures: _Figures, members: "Members") -> None:
        self.model, self.figures = model, figures
        self.optimizer = model.optimizer
        self.variables: list[Variable] = members.trained
        if not self.variables:
            raise ValueError("the model has no trainable weights")
        self.penalties = _Penalties(model, members)

    def __call__(self, batch: Batch) -> None:
        """Take the step. When memory runs out the weights are as they were before it, or as they should be after it.

        Raises:
            MemoryError: it says what the sizes are, and what to try.
        """
        try:
            model, figures = self.model, self.figures
            if (
                not batch.last and not batch.timed
            ):  # only the last piece has a target: run on, and remember the states
                model(batch.x, training=True, mask=batch.mask)
                return
            with GradientTape() as tape:
                y_pred = model(batch.x, training=True, mask=batch.mask)
                total, parts = _objective(figures, self.penalties, batch, y_pred)
            self.optimizer.apply(tape.gradient(total, self.variables, rows=True), self.variables)
            figures.add(_figure(total.data), batch, y_pred, parts)
        except MemoryError as error:
            raise MemoryError(_too_large(self.model, batch, error)) from error


def _figure(total: Any) -> Any:
    """A loss as a number; on a device as it is, so that nobody waits for it."""
    return total.item() if type(total) is np.ndarray else total


def _too_large(model: Trainer, batch: Batch, error: MemoryError) -> str:
    backend, shapes = (
        get_backend(),
        [tuple(a.shape) for a in (batch.x if isinstance(batch.x, list) else [batch.x])],
    )
    weights = sum(v.data.nbytes for v in model.weights)
    room = backend.room()
    free = "" if room is None else f"; {room / 2**20:,.0f} MiB are free on {backend.name}"
    return (
        f"a training step ran out of memory ({error}): a batch of shape {', '.join(map(str, shapes))}, weights of "
        f"{weights / 2**20:,.1f} MiB and the optimizer's as much again for each slot{free}. The model can still be used. "
        f"Try a smaller batch_size, bptt_steps for long sequences, remat_steps in recurrent layers, or backend='cpu'"
    )


def _objective(figures: _Figures, penalties: "_Penalties", batch: Batch, y_pred: Any) -> tuple[Tensor, Any]:
    """What is differentiated: the loss of a batch and the penalties; and what `_Figures.add` needs."""
    total, parts = figures.objective(batch, y_pred)
    for penalty in penalties():
        total = penalty if total is None else total + penalty
    if total is None:
        raise ValueError("loss: the model was compiled without one, and no layer adds any")
    return total, parts


class _Penalties:
    """The model's regularization losses of this call, found without walking through all layers each time."""

    def __init__(self, model: Trainer, members: "Members") -> None:
        self.model = model
        self.regularized: list[Any] = [v for v in members.trained if v.regularizer is not None]
        self.layers = members.layers

    def __call__(self) -> list[Tensor]:
        penalties = [v.regularizer(v) for v in self.regularized]
        root = self.model._root
        for layer in self.layers:
            if layer._losses and layer._root is root:
                penalties += layer._losses
        return penalties


class _Loop:
    """The epochs of one `fit`."""

    def __init__(
        self,
        model: Trainer,
        feed: _Feed,
        class_table: np.ndarray | None,
        validation: Batches | None,
        validation_steps: int | None,
    ) -> None:
        self.model, self.feed = model, feed
        self.figures = _Figures(model, class_table)
        self.validation: Any = validation
        self.validation_steps = validation_steps
        self.validation_figures: Any = None if validation is None else _Figures(model)
        self.resume: Any = None  # (epoch, step, state of the randomness, sums of the figures)

    def go_on(self) -> None:
        """The validation data go where the backend in use works, once for all evaluations."""
        if self.validation is not None:
            try:
                self.validation = self.validation.on(get_backend())
            except ValueError as error:
                raise ValueError(f"validation_data: {error}") from error

    def run(
        self,
        epochs: int,
        first: int,
        watchers: CallbackList,
        display: Silent,
        validation_freq: int | Sequence[int],
    ) -> None:
        """All epochs, from `first`, or from where a callback took training up again."""
        due = _due(validation_freq)
        watchers("on_train_begin", {})
        skip = 0
        if self.resume is not None:
            first, skip = self.resume[0], self.resume[1]
            self.feed.discard(first)
        step = _TrainStep(self.model, self.figures, self.model._survey())
        logs: dict[str, Any] = {}
        for epoch in range(first, epochs):
            display.begin(f"Epoch {epoch + 1}/{epochs}", self.feed.steps)
            watchers("on_epoch_begin", epoch, {})
            self._train(epoch, skip, step, watchers, display)
            skip = 0
            logs = self.figures.logs()
            if self.validation is not None and due(epoch):
                logs |= {f"val_{name}": value for name, value in self._validate(watchers).items()}
            watchers("on_epoch_end", epoch, logs)
            display.end(logs)
            if self.model.stop_training:
                break
        watchers("on_train_end", logs)

    def _train(
        self, epoch: int, skip: int, step: "_TrainStep", watchers: CallbackList, display: Silent
    ) -> None:
        """One epoch; of a resumed one the first `skip` steps were done before."""
        model, figures = self.model, self.figures
        figures.reset()
        before, after = watchers.hook("on_train_batch_begin"), watchers.hook("on_train_batch_end")
        batches = self.feed.epoch(epoch)
        if skip:
            self._skip(skip, batches)
        for number, batch in enumerate(batches, skip):
            if before is not None:
                before(number, {})
            if batch.first and self.feed.chunk:
                _forget_states(model)
            step(batch)
            display.step(number + 1, figures.logs)
            if after is not None:
                after(number, figures.logs())
            if model.stop_training:
                break

    def _skip(self, skip: int, batches: Iterator[Batch]) -> None:
        """Draw what was trained on before the interruption, then put figures and randomness where they
        were."""
        _, _, state, sums = self.resume
        for _ in range(skip):
            next(batches)
        random.set_state(state)
        if sums is not None:
            self.figures.set_state(sums)

    def _validate(self, watchers: CallbackList) -> dict[str, Any]:
        """Evaluate in between, without touching the states that stateful layers keep for training."""
        layers = self.model.recurrent_layers()
        kept = [layer.states for layer in layers]
        for layer in layers:
            layer.states = None
        try:
            feed = _Feed(self.validation, self.validation_steps, self.feed.chunk, self.feed.sequences)
            feed.go_on()
            return _test(self.model, feed, self.validation_figures, watchers, Silent())
        except ValueError as error:
            raise ValueError(f"validation_data: {error}") from error
        finally:
            for layer, states in zip(layers, kept, strict=True):
                layer.states = states


def _test(
    model: Trainer, feed: _Feed, figures: _Figures, watchers: CallbackList, display: Silent
) -> dict[str, Any]:
    """Loss and metrics over all batches."""
    figures.reset()
    watchers("on_test_begin", {})
    before, after = watchers.hook("on_test_batch_begin"), watchers.hook("on_test_batch_end")
    display.begin("", feed.steps)
    for done, batch in enumerate(feed.epoch(), 1):
        if before is not None:
            before(done - 1, {})
        if batch.first and feed.chunk:
            _forget_states(model)
        _test_step(model, batch, figures)
        display.step(done, figures.logs)
        if after is not None:
            after(done - 1, figures.logs())
    logs = figures.logs()
    display.end(logs)
    watchers("on_test_end", logs)
    return logs


def _test_step(model: Trainer, batch: Batch, figures: _Figures) -> None:
    y_pred = model(batch.x, training=False, mask=batch.mask)
    if not batch.last and not batch.timed:
        return
    total, parts = figures.objective(batch, y_pred)
    loss = 0.0 if total is None else _figure(total.data)
    for penalty in model.regularization_losses():
        loss = loss + _figure(penalty.data)
    figures.add(loss, batch, y_pred, parts)


def _predict(model: Trainer, feed: _Feed, watchers: CallbackList, display: Silent) -> Any:
    """The outputs of all batches, put together."""
    watchers("on_predict_begin", {})
    before, after = watchers.hook("on_predict_batch_begin"), watchers.hook("on_predict_batch_end")
    display.begin("", feed.steps)
    rows: list[list[np.ndarray]] = []  # of each batch, one array an output
    pieces: list[list[np.ndarray]] = []  # of the batch in progress, cut along time
    several, waiting = False, 0
    for done, batch in enumerate(feed.epoch(), 1):
        if before is not None:
            before(done - 1, {})
        if batch.first and feed.chunk:
            _forget_states(model)
        out = model(batch.x, training=False, mask=batch.mask)
        several = isinstance(out, (list, tuple))
        # Contiguous: outputs may be views of the larger, time-major arrays of a kernel.
        pieces.append([_contiguous(o.data) for o in (out if several else [out])])
        if batch.last:
            rows.append(_join(pieces, batch, feed.sequences))
            pieces = []
            if feed.came_from is None and type(rows[-1][0]) is not np.ndarray:
                waiting += sum(a.nbytes for a in rows[-1])
                if waiting > _HELD:
                    rows, waiting = [[to_numpy(a) for a in row] for row in rows], 0
        display.step(done, dict)
        if after is not None:
            shown = pieces[-1] if pieces else rows[-1]
            after(done - 1, {"outputs": [a if feed.came_from is not None else to_numpy(a) for a in shown]})
    if pieces:
        raise ValueError(
            f"steps: {feed.limit} pieces of {feed.chunk} steps end within a batch; expected whole batches"
        )
    display.end({})
    watchers("on_predict_end", {})
    outputs = [_stack(_together(part, feed.came_from), feed.data) for part in zip(*rows, strict=True)]
    return outputs if several else outputs[0]


def _together(parts: Sequence[Any], came_from: str | None) -> list[Any]:
    """The outputs of all batches where the inputs lay: those that waited on a device are read back in one go."""
    if came_from is not None:
        return [_at_home(p, came_from) for p in parts]
    if all(type(p) is np.ndarray for p in parts):
        return list(parts)
    waiting = [p for p in parts if type(p) is not np.ndarray]
    flat = to_numpy(namespace(waiting[0]).concatenate([p.ravel() for p in waiting]))
    read, start = [], 0
    for p in parts:
        if type(p) is np.ndarray:
            read.append(p)
        else:
            read.append(flat[start : start + p.size].reshape(p.shape))
            start += p.size
    return read


def _at_home(a: Any, came_from: str) -> Any:
    return a if place_of(a) == came_from else get_backend(came_from).asarray(to_numpy(a))


def _contiguous(a: Any) -> Any:
    return (
        np.ascontiguousarray(a) if type(a) is np.ndarray else a if a.flags.c_contiguous else a.copy(order="C")
    )


def _given_back(a: Any, like: Any) -> Any:
    """An output on the device that the input came from."""
    place = place_of(like)
    return np.ascontiguousarray(to_numpy(a)) if place is None else _contiguous(_at_home(a, place))


def _first(data: Any) -> Any:
    """An array of the data, whose device counts where nothing else chooses a backend; None where there is none."""
    if isinstance(data, ArrayBatches):
        return getattr(data.x, "array", None)
    if isinstance(data, (list, tuple)):
        return data[0]
    return None if isinstance(data, Batches) else data


def _abroad(batch: Batch) -> bool:
    """Is something of the batch on a device?"""
    x, y, weight, mask, *_ = batch
    given = [a for a in (x, y, weight, mask) if a is not None and type(a) is not np.ndarray]
    return any(any(map(place_of, a if isinstance(a, list) else [a])) for a in given) if given else False


def _join(pieces: list[list[np.ndarray]], last: Batch, sequences: bool) -> list[np.ndarray]:
    """Outputs of the pieces of a batch: side by side along time, or the last where there is no time axis."""
    if len(pieces) == 1:
        return pieces[0]
    steps = last.x.shape[1]
    return [
        np.concatenate(parts, axis=1)
        if sequences and parts[-1].ndim > 1 and parts[-1].shape[1] == steps
        else parts[-1]
        for parts in zip(*pieces, strict=True)
    ]


def _stack(parts: Sequence[np.ndarray], data: Any) -> Any:
    """Batches one under the other; sequences of a ragged source each by itself, cut to its length."""
    ragged = isinstance(data, ArrayBatches) and isinstance(data.x, Ragged)
    if ragged and parts[0].ndim > 1:
        lengths = [len(s) for s in data.x.sequences]  # type: ignore[union-attr]
        size = data.batch_size
        longest = [max(1, *lengths[i : i + size], 1) for i in range(0, len(lengths), size)]
        if [p.shape[1] for p in parts] == longest and (len(set(longest)) > 1 or parts[0].ndim > 2):
            rows = [row for part in parts for row in part]
            return [row[:n] for row, n in zip(rows, lengths, strict=False)]
    return parts[0] if len(parts) == 1 else np.concatenate(parts)


def class_weights(
    y: np.ndarray, sample_weight: np.ndarray | None, table: np.ndarray | None, labels: str
) -> np.ndarray | None:
    """The sample weights times the weight of each label's class; `labels` says how the loss writes them.

    >>> class_weights(np.array([[0.0], [1.0]]), None, np.array([1.0, 3.0]), "number").tolist()
    [1.0, 3.0]
    """
    if table is None:
        return sample_weight
    numbers = y.argmax(axis=-1) if labels == "one_hot" else y
    if numbers.ndim > 1 and numbers.shape[-1] == 1:
        numbers = numbers[..., 0]
    numbers = numbers.astype(np.int64)
    known = (numbers >= 0) & (numbers < len(table))
    weights = np.where(known, table[np.where(known, numbers, 0)], table.dtype.type(1))
    if sample_weight is None:
        return weights
    return weights * sample_weight.reshape(sample_weight.shape + (1,) * (weights.ndim - sample_weight.ndim))


def _class_table(class_weight: Mapping[int, float] | None, loss: losses.Loss | None) -> np.ndarray | None:
    """`{class: weight}` as an array to look up in; classes that are not named weigh 1."""
    if class_weight is None:
        return None
    if not isinstance(class_weight, Mapping) or not class_weight:
        raise ValueError(f"class_weight: expected a dict from class number to weight, got {class_weight!r}")
    if loss is None or (loss.labels == "value" and not isinstance(loss, losses.FunctionLoss)):
        raise ValueError(f"class_weight: the loss {getattr(loss, 'name', None)} has no classes to weigh")
    for label, weight in class_weight.items():
        if isinstance(label, bool) or not isinstance(label, (int, np.integer)) or label < 0:
            raise ValueError(f"class_weight: classes are integers >= 0, got {label!r}")
        if not 0 <= weight < math.inf:
            raise ValueError(f"class_weight: weights are numbers >= 0, got {weight!r} for class {label}")
    table = np.ones(max(class_weight) + 1, np.float32)
    for label, weight in class_weight.items():
        table[label] = weight
    return table


# Small helpers


def _metric_list(name: str, given: Any) -> list[Any]:
    """The metrics to watch, their names checked."""
    if given is None:
        return []
    if isinstance(given, str) or callable(given) or isinstance(given, metrics.Metric):
        given = [given]
    if not isinstance(given, (list, tuple)):
        raise ValueError(f"{name}: expected a list of names or metrics, got {given!r}")
    specs = []
    for spec in given:
        if isinstance(spec, Mapping):
            spec = metrics.get(spec)
        elif not (isinstance(spec, str) and spec.lower() in ("accuracy", "acc", "crossentropy", "ce")):
            metrics.get(spec)
        specs.append(spec)
    return specs


def _saved_metrics(specs: Sequence[Any]) -> list[Any]:
    """Names as they are, everything else in its saved form."""
    return [spec if isinstance(spec, str) else serialize(metrics.get(spec)) for spec in specs]


def _metric_weights(mask: Any, weights: Any) -> Any:
    """What a metric gets as sample weights: the mask, the weights, or both."""
    if mask is None or weights is None:
        return mask if weights is None else weights
    weights = beside(weights, mask, "sample_weight")
    return mask * weights.reshape(weights.shape + (1,) * (mask.ndim - weights.ndim))


def _same_loss(a: losses.Loss, b: Any) -> bool:
    """Do both give the same values? The reduction and the name do not matter."""
    if type(a) is not type(b) or isinstance(a, losses.FunctionLoss):
        return False
    first, second = a.get_config(), b.get_config()
    return all(first[k] == second[k] for k in first if k not in ("reduction", "name"))


def _free_name(name: str, taken: Mapping[str, Any]) -> str:
    number, free = 0, name
    while free in taken:
        number += 1
        free = f"{name}_{number}"
    return free


def _results(logs: dict[str, Any], as_dict: bool) -> Any:
    """As Keras returns them: a number, a list, or a dict."""
    if as_dict:
        return logs
    return next(iter(logs.values())) if len(logs) == 1 else list(logs.values())


def _forget_states(model: Trainer) -> None:
    """A new batch of a cut run starts from zeros, unless a layer is stateful."""
    for layer in model.recurrent_layers():
        if not getattr(layer, "stateful", False):
            layer.reset_states()


def _callback_list(callbacks: Any) -> list[Callback]:
    if callbacks is None:
        return []
    return [callbacks] if isinstance(callbacks, Callback) else list(callbacks)


def _split(data: Batches, fraction: float, validation: Batches | None) -> tuple[Batches, Batches]:
    if validation is not None:
        raise ValueError("give validation_split or validation_data, not both")
    if not 0 < fraction < 1:
        raise ValueError(f"validation_split: expected a number between 0 and 1, got {fraction!r}")
    if not isinstance(data, ArrayBatches):
        raise ValueError(
            "validation_split: needs arrays or lists; give validation_data for a source of batches"
        )
    return data.split(fraction)


def _steps(data: Batches, chunk: int | None) -> int | None:
    """Steps of an epoch, where they can be known beforehand."""
    if chunk is None:
        return data.steps
    return data.chunks(chunk) if isinstance(data, ArrayBatches) else None


def _due(validation_freq: Any) -> Any:
    """Is validation due after this epoch (counted from 0)?"""
    if isinstance(validation_freq, (list, tuple, set)):
        wanted = set(validation_freq)
        return lambda epoch: epoch + 1 in wanted
    every = _whole("validation_freq", validation_freq, 1)
    return lambda epoch: (epoch + 1) % every == 0


def _flag(name: str, value: Any) -> bool:
    if not isinstance(value, (bool, np.bool_)):
        raise ValueError(f"{name}: expected True or False, got {value!r}")
    return bool(value)


def _whole(name: str, value: Any, least: int) -> int:
    if isinstance(value, bool) or not isinstance(value, (int, np.integer)) or value < least:
        raise ValueError(f"{name}: expected an integer >= {least}, got {value!r}")
    return int(value)
