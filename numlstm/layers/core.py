"""The layers that have no memory: Dense, Embedding, Dropout, normalisation, masking, and those that change
shapes.

Keras 3's names, arguments and defaults. Shapes are written with the batch first; a layer whose output at a
time step depends on that step alone is marked `per_step` and can be used in a stream. What a layer does with
a mask is said in its docstring; a layer that mixes or removes the time axis ends the mask.
"""

import functools
import math
import operator
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from numlstm import activations, constraints, initializers, ops, regularizers
from numlstm.autograd import Tensor, Variable
from numlstm.backend import namespace, ranges
from numlstm.layers.base import (
    Layer,
    Shape,
    call_options,
    checked_shape,
    fraction,
    from_config,
    positive,
    registry,
    shape_of,
)


@registry.register()
class InputLayer(Layer):
    """Says what goes into a `Sequential`: `nl.Input(shape=(time, features))` as its first entry.

    Arguments:
        shape: of one sample, without the batch.
        batch_size: a fixed batch, or None; kept for information.
        batch_shape: the two in one, in place of `shape`.

    >>> InputLayer(shape=(None, 3)).input_shape
    (None, 3)
    """

    shape: Shape | None
    batch_shape: Shape | None

    supports_masking = True
    per_step = True
    keeps_integers = True

    def __init__(
        self, shape: Any = None, batch_size: int | None = None, *, batch_shape: Any = None, **options: Any
    ) -> None:
        if batch_shape is not None:
            if shape is not None:
                raise ValueError("batch_shape: give shape or batch_shape, not both")
            batch_size, *shape = checked_shape("batch_shape", batch_shape)
        if shape is None:
            shape = options.pop("input_shape", None)
        if shape is None:
            raise ValueError("shape: expected the shape of one sample, such as (time, features)")
        options.pop("input_shape", None)
        super().__init__(input_shape=shape, **options)
        self.batch_size: int | None = None if batch_size is None else positive("batch_size", batch_size)
        self.shape, self.batch_shape = self.input_shape, None

    def call(self, inputs: Tensor) -> Tensor:
        """The input itself."""
        return inputs

    def compute_output_shape(self, input_shape: Shape) -> Shape:
        """The input's shape."""
        return input_shape


def Input(shape: Any = None, batch_size: int | None = None, **options: Any) -> InputLayer:
    """An `InputLayer`, under the name that Keras programs use.

    >>> Input(shape=(10, 2)).input_shape
    (10, 2)
    """
    return InputLayer(shape, batch_size, **options)


@registry.register()
class Dense(Layer):
    """`activation(x kernel + bias)` over the last axis; (..., features) to (..., units). A mask goes through.

    Arguments:
        units: size of the output's last axis.
        activation: a name, a function of a tensor, or None.
        use_bias: whether there is a bias.
        kernel_initializer, bias_initializer: see `numlstm.initializers`.
        kernel_regularizer, bias_regularizer, activity_regularizer: see `numlstm.regularizers`.
        kernel_constraint, bias_constraint: see `numlstm.constraints`.

    Raises:
        ValueError: an unknown option or activation, or inputs with another number of features than at first.

    >>> Dense(2, activation="relu")(np.ones((4, 3))).shape
    (4, 2)
    """

    min_ndim: int | None = 2
    input_axes = "(batch, ..., features)"
    supports_masking = True
    per_step = True

    def __init__(
        self,
        units: int,
        activation: Any = None,
        use_bias: bool = True,
        kernel_initializer: Any = "glorot_uniform",
        bias_initializer: Any = "zeros",
        kernel_regularizer: Any = None,
        bias_regularizer: Any = None,
        activity_regularizer: Any = None,
        kernel_constraint: Any = None,
        bias_constraint: Any = None,
        **options: Any,
    ) -> None:
        super().__init__(**options)
        self.units: int = positive("units", units)
        self.activation: activations.Activation = activations.get(activation)
        self.use_bias: bool = bool(use_bias)
        self.kernel_initializer: Any = initializers.get(kernel_initializer)
        self.bias_initializer: Any = initializers.get(bias_initializer)
        self.kernel_regularizer: Any = regularizers.get(kernel_regularizer)
        self.bias_regularizer: Any = regularizers.get(bias_regularizer)
        self.activity_regularizer: Callable[[Tensor], Tensor] | None = regularizers.get(activity_regularizer)
        self.kernel_constraint: Any = constraints.get(kernel_constraint)
        self.bias_constraint: Any = constraints.get(bias_constraint)

    def build(self, input_shape: Shape) -> None:
        """kernel (features, units), bias (units,)."""
        self.kernel: Variable = self.add_weight(
            "kernel",
            (_features(self, input_shape), self.units),
            self.kernel_initializer,
            self.kernel_regularizer,
            self.kernel_constraint,
        )
        self.bias: Variable | None = None
        if self.use_bias:
            self.bias = self.add_weight(
                "bias", (self.units,), self.bias_initializer, self.bias_regularizer, self.bias_constraint
            )

    def call(self, inputs: Tensor) -> Tensor:
        """(..., features) to (..., units)."""
        return self.activation(ops.linear(inputs, self.kernel, self.bias))

    def compute_output_shape(self, input_shape: Shape) -> Shape:
        """The last axis becomes `units`."""
        return (*input_shape[:-1], self.units)

    def operations(self) -> list[tuple[str, str]]:
        """What is asked of the backend, for `nl.explain`."""
        return [("matmul", "*")]


@registry.register()
class Embedding(Layer):
    """A vector for each of `input_dim` ids: integers (batch, ...) to (batch, ..., output_dim).

    Arguments:
        input_dim: how many ids there are, from 0.
        output_dim: size of the vectors.
        embeddings_initializer, embeddings_regularizer, embeddings_constraint: as elsewhere; uniform by
            default.
        mask_zero: id 0 is padding: the layer makes a mask for those that follow.

    Raises:
        ValueError: ids that are not whole numbers, or outside 0 .. input_dim - 1.

    >>> Embedding(10, 4)([[1, 2, 3]]).shape
    (1, 3, 4)
    """

    keeps_integers = True
    supports_masking = True
    per_step = True

    def __init__(
        self,
        input_dim: int,
        output_dim: int,
        embeddings_initializer: Any = "uniform",
        embeddings_regularizer: Any = None,
        embeddings_constraint: Any = None,
        mask_zero: bool = False,
        **options: Any,
    ) -> None:
        super().__init__(**options)
        self.input_dim: int = positive("input_dim", input_dim)
        self.output_dim: int = positive("output_dim", output_dim)
        self.embeddings_initializer: Any = initializers.get(embeddings_initializer)
        self.embeddings_regularizer: Any = regularizers.get(embeddings_regularizer)
        self.embeddings_constraint: Any = constraints.get(embeddings_constraint)
        self.mask_zero: bool = bool(mask_zero)

    def build(self, input_shape: Shape) -> None:
        """embeddings (input_dim, output_dim)."""
        self.embeddings: Variable = self.add_weight(
            "embeddings",
            (self.input_dim, self.output_dim),
            self.embeddings_initializer,
            self.embeddings_regularizer,
            self.embeddings_constraint,
        )

    def check_input(self, inputs: Tensor) -> None:
        """Ids must be whole numbers that the table has."""
        ids = inputs.data
        if ids.dtype.kind == "f" and not (ids == np.floor(ids)).all():
            raise ValueError(
                f"{self.name}: expected ids, which are whole numbers, got dtype {ids.dtype} with fractions"
            )
        if not ids.size:
            return
        low, high = ranges.bounds(ids)
        if low < 0 or high >= self.input_dim:
            low, high = ranges.exact(ids)
        if low < 0 or high >= self.input_dim:
            bad = int(low if low < 0 else high)
            raise ValueError(
                f"{self.name}: expected ids from 0 to {self.input_dim - 1} (input_dim - 1), got {bad}"
            )

    def call(self, inputs: Tensor) -> Tensor:
        """(batch, ...) to (batch, ..., output_dim)."""
        ids = inputs.data if inputs.dtype.kind in "iu" else inputs.data.astype(np.int64)
        return ops.embedding(self.embeddings, ids)

    def compute_mask(self, inputs: Tensor, mask: Any = None) -> Any:
        """True where the id is not 0, if `mask_zero`; together with the mask that came."""
        if not self.mask_zero:
            return mask
        own = inputs.data != 0
        return own if mask is None else own & mask

    def compute_output_shape(self, input_shape: Shape) -> Shape:
        """One more axis, of size `output_dim`."""
        return (*input_shape, self.output_dim)

    def operations(self) -> list[tuple[str, str]]:
        """What is asked of the backend, for `nl.explain`."""
        return [("embedding", "*")]


@registry.register()
class Dropout(Layer):
    """In training, zero a random fraction `rate` of the inputs and scale the rest up to keep the mean. A mask
    goes through.

    Arguments:
        rate: fraction dropped.
        noise_shape: shape of the random mask, 1 (or None for the input's own size) where it is shared along
            an axis; `(None, 1, None)` drops whole features of a sequence.
        seed: for masks that don't depend on `nl.set_seed`.

    >>> Dropout(0.5)(np.ones((2, 3))).numpy().tolist()
    [[1.0, 1.0, 1.0], [1.0, 1.0, 1.0]]
    """

    noise_shape: Shape | None

    supports_masking = True
    per_step = True

    def __init__(
        self,
        rate: float,
        noise_shape: Sequence[int | None] | None = None,
        seed: int | None = None,
        **options: Any,
    ) -> None:
        super().__init__(**options)
        self.rate: float = fraction("rate", rate)
        self.noise_shape = None if noise_shape is None else checked_shape("noise_shape", noise_shape)
        if seed is not None and (
            isinstance(seed, bool) or not isinstance(seed, (int, np.integer)) or seed < 0
        ):
            raise ValueError(f"seed: expected None or an integer >= 0, got {seed!r}")
        self.seed: int | None = None if seed is None else int(seed)

    def call(self, inputs: Tensor, training: bool = False) -> Tensor:
        """The inputs, thinned out if `training`."""
        if not training or not self.rate:
            return inputs
        if self.noise_shape is not None and len(self.noise_shape) != inputs.ndim:
            raise ValueError(
                f"{self.name}: noise_shape {self.noise_shape} doesn't fit the inputs' shape {inputs.shape}"
            )
        return ops.dropout(inputs, self.rate, shape=self.noise_shape, seed=self.seed)

    def compute_output_shape(self, input_shape: Shape) -> Shape:
        """The input's shape."""
        return input_shape

    def operations(self) -> list[tuple[str, str]]:
        """What is asked of the backend, for `nl.explain`."""
        return [("dropout_mask", "*")]


@registry.register()
class Activation(Layer):
    """An activation as a layer of its own. A mask goes through.

    >>> Activation("relu")(np.array([[-1.0, 2.0]])).numpy().tolist()
    [[0.0, 2.0]]
    """

    supports_masking = True
    per_step = True

    def __init__(self, activation: Any, **options: Any) -> None:
        super().__init__(**options)
        self.activation: activations.Activation = activations.get(activation)

    def call(self, inputs: Tensor) -> Tensor:
        """`activation(inputs)`."""
        return self.activation(inputs)

    def compute_output_shape(self, input_shape: Shape) -> Shape:
        """The input's shape."""
        return input_shape


@registry.register()
class TimeDistributed(Layer):
    """A layer applied to each time step by itself: (batch, time, ...) to (batch, time, ...).

    A mask goes through, and the layer inside is told of it if it heeds masks: a step that is left out is a row
    that is left out, with all its steps where the rows are sequences. The mask of a batch of sequences of
    sequences, (batch, time, inner time), as an `Embedding(mask_zero=True)` of such ids gives it, goes on as it is
    behind a layer that keeps the inner time; behind one that does not, a step counts if anything in it did.

    >>> TimeDistributed(Dense(2))(np.ones((4, 5, 3))).shape
    (4, 5, 2)
    """

    min_ndim: int | None = 3
    input_axes = "(batch, time, ...)"
    supports_masking = True
    per_step = True

    def __init__(self, layer: Any, **options: Any) -> None:
        super().__init__(**options)
        self.layer: Layer = from_config(layer)

    def build(self, input_shape: Shape) -> None:
        """Build the layer inside for one step."""
        self.layer.ensure_built((input_shape[0], *input_shape[2:]))

    def check_input(self, inputs: Tensor) -> None:
        """The layer inside checks for itself."""

    def call(self, inputs: Tensor, mask: Any = None) -> Tensor:
        """Every step becomes a row of one large batch."""
        batch, time = inputs.shape[:2]
        rows = inputs.reshape((batch * time, *inputs.shape[2:]))
        if mask is not None and (mask.ndim > 2 or self._heeds_masks()):
            rows.mask = self._mask_of_rows(rows, mask)
        outputs = self.layer(rows)
        result = outputs.reshape((batch, time, *outputs.shape[1:]))
        if mask is not None and mask.ndim > 2:
            kept = outputs.mask is not None and outputs.mask.ndim > 1
            result.mask = mask if kept else mask.any(axis=-1)
        return result

    def _heeds_masks(self) -> bool:
        return "mask" in call_options(type(self.layer))[0] or self.layer.has_children()

    def _mask_of_rows(self, rows: Tensor, mask: np.ndarray) -> np.ndarray:
        """(rows,) for rows that are vectors, (rows, inner time) for rows that are sequences."""
        flat = mask.reshape(len(rows), *mask.shape[2:])
        if rows.ndim > 2 and flat.ndim == 1:
            return np.repeat(flat[:, None], rows.shape[1], axis=1)
        return flat

    def compute_output_shape(self, input_shape: Shape) -> Shape:
        """The time axis stays; the rest is up to the layer inside."""
        inner = self.layer.compute_output_shape((input_shape[0], *input_shape[2:]))
        return (*input_shape[:2], *inner[1:])

    def operations(self) -> list[tuple[str, str]]:
        """What is asked of the backend, for `nl.explain`."""
        return self.layer.operations()


@registry.register()
class Masking(Layer):
    """Masks the steps of (batch, time, features) whose features all equal `mask_value`, and sets them to
    zero.

    >>> Masking()(np.array([[[0.0, 0.0], [0.0, 1.0]]])).mask.tolist()
    [[False, True]]
    """

    input_ndim: int | None = 3
    input_axes = "(batch, time, features)"
    supports_masking = True
    per_step = True

    def __init__(self, mask_value: float = 0.0, **options: Any) -> None:
        super().__init__(**options)
        self.mask_value: float = float(mask_value)

    def call(self, inputs: Tensor) -> Tensor:
        """The inputs, with zeros at masked steps."""
        return inputs * Tensor(self._kept(inputs)[..., None].astype(inputs.dtype))

    def compute_mask(self, inputs: Tensor, mask: Any = None) -> Any:
        """True where a step counts; together with the mask that came."""
        kept = self._kept(inputs)
        return kept if mask is None else kept & mask

    def compute_output_shape(self, input_shape: Shape) -> Shape:
        """The input's shape."""
        return input_shape

    def _kept(self, inputs: Tensor) -> np.ndarray:
        return (inputs.data != self.mask_value).any(axis=-1)


@registry.register()
class LayerNormalization(Layer):
    """Mean 0 and variance 1 over the last axis (or `axis`), then times `gamma`, plus `beta`: Ba et al. 2016.

    Arguments:
        axis: the axis, or the trailing axes, that are normalised together.
        epsilon: added to the variance.
        center, scale: whether there is a beta, a gamma.
        beta_initializer, gamma_initializer, and the regularizers and constraints of both: as elsewhere.

    Raises:
        ValueError: axes that are not the trailing ones, or inputs of another size along them than at first.

    >>> LayerNormalization()(np.array([[1.0, 3.0]])).numpy().round(2).tolist()
    [[-1.0, 1.0]]
    """

    axis: int | list[int]
    center: bool
    scale: bool
    gamma: Variable | None
    beta: Variable | None

    min_ndim: int | None = 2
    supports_masking = True

    def __init__(
        self,
        axis: int | Sequence[int] = -1,
        epsilon: float = 1e-3,
        center: bool = True,
        scale: bool = True,
        beta_initializer: Any = "zeros",
        gamma_initializer: Any = "ones",
        beta_regularizer: Any = None,
        gamma_regularizer: Any = None,
        beta_constraint: Any = None,
        gamma_constraint: Any = None,
        **options: Any,
    ) -> None:
        super().__init__(**options)
        self.axis = int(axis) if isinstance(axis, (int, np.integer)) else [int(a) for a in axis]
        if not epsilon > 0:
            raise ValueError(f"epsilon: expected a number > 0, got {epsilon!r}")
        self.epsilon: float = float(epsilon)
        self.center, self.scale = bool(center), bool(scale)
        self.beta_initializer: Any = initializers.get(beta_initializer)
        self.gamma_initializer: Any = initializers.get(gamma_initializer)
        self.beta_regularizer: Any = regularizers.get(beta_regularizer)
        self.gamma_regularizer: Any = regularizers.get(gamma_regularizer)
        self.beta_constraint: Any = constraints.get(beta_constraint)
        self.gamma_constraint: Any = constraints.get(gamma_constraint)

    @property
    def per_step(self) -> bool:  # type: ignore[override]
        """Over the last axis alone, a step is normalised by itself."""
        return self.axis in (-1, [-1], 2, [2])

    def build(self, input_shape: Shape) -> None:
        """gamma and beta, of the normalised axes' sizes."""
        count = self._count(len(input_shape))
        sizes = input_shape[len(input_shape) - count :]
        if None in sizes:
            raise ValueError(
                f"{self.name}: the normalised axes need known sizes, got shape {tuple(input_shape)}"
            )
        self.gamma = self.beta = None
        if self.scale:
            self.gamma = self.add_weight(
                "gamma", sizes, self.gamma_initializer, self.gamma_regularizer, self.gamma_constraint
            )
        if self.center:
            self.beta = self.add_weight(
                "beta", sizes, self.beta_initializer, self.beta_regularizer, self.beta_constraint
            )

    def check_input(self, inputs: Tensor) -> None:
        """The normalised axes must have the sizes of the weights."""
        count = self._count(inputs.ndim)
        if inputs.shape[-count:] != tuple(self.build_shape[-count:]):
            raise ValueError(
                f"{self.name}: expected an input that ends in {tuple(self.build_shape[-count:])}, "
                f"got shape {inputs.shape}"
            )

    def call(self, inputs: Tensor) -> Tensor:
        """Normalise, then scale and shift."""
        count = self._count(inputs.ndim)
        rows = (
            inputs
            if count == 1
            else inputs.reshape((*inputs.shape[:-count], math.prod(inputs.shape[-count:])))
        )
        gamma, beta = (None if w is None else w.reshape((w.size,)) for w in (self.gamma, self.beta))
        return ops.layer_norm(rows, gamma, beta, self.epsilon).reshape(inputs.shape)

    def compute_output_shape(self, input_shape: Shape) -> Shape:
        """The input's shape."""
        return input_shape

    def operations(self) -> list[tuple[str, str]]:
        """What is asked of the backend, for `nl.explain`."""
        return [("layer_norm", "*")]

    def _count(self, rank: int) -> int:
        """How many trailing axes are normalised."""
        axes = [self.axis] if isinstance(self.axis, int) else self.axis
        last = sorted(a - rank if a >= 0 else a for a in axes)
        if not last or last != list(range(-len(last), 0)) or len(last) >= rank:
            raise ValueError(
                f"{self.name}: axis: expected the last axis or several trailing ones, got {self.axis}"
            )
        return len(last)


class _Reshaping(Layer):
    """A layer that moves numbers about; time steps may change places, so a mask ends here."""

    keeps_integers = True

    def compute_mask(self, inputs: Any, mask: Any = None) -> Any:
        """None: the mask belongs to the time axis as it was."""
        return None


@registry.register()
class Flatten(_Reshaping):
    """(batch, ...) to (batch, everything). A mask ends here.

    >>> Flatten()(np.ones((2, 3, 4))).shape
    (2, 12)
    """

    def call(self, inputs: Tensor) -> Tensor:
        """All axes but the batch become one."""
        return inputs.reshape((inputs.shape[0], math.prod(inputs.shape[1:])))

    def compute_output_shape(self, input_shape: Shape) -> Shape:
        """(batch, product of the others)."""
        rest: Any = input_shape[1:]
        return (input_shape[0], None if None in rest else math.prod(rest))


@registry.register()
class Reshape(_Reshaping):
    """(batch, ...) to (batch, *target_shape); one size may be -1. A mask ends here.

    >>> Reshape((3, -1))(np.ones((2, 12))).shape
    (2, 3, 4)
    """

    def __init__(self, target_shape: Sequence[int], **options: Any) -> None:
        super().__init__(**options)
        sizes: Any = tuple(target_shape) if isinstance(target_shape, (list, tuple)) else (target_shape,)
        if (
            any(not isinstance(n, (int, np.integer)) or n == 0 or n < -1 for n in sizes)
            or sizes.count(-1) > 1
        ):
            raise ValueError(
                f"target_shape: expected sizes > 0, at most one of them -1, got {target_shape!r}"
            )
        self.target_shape: tuple[int, ...] = tuple(int(n) for n in sizes)

    def call(self, inputs: Tensor) -> Tensor:
        """Raises ValueError when the sizes don't fit."""
        sample, known = math.prod(inputs.shape[1:]), math.prod(n for n in self.target_shape if n != -1)
        if sample % known or (-1 not in self.target_shape and sample != known):
            raise ValueError(
                f"{self.name}: {inputs.shape[1:]} can't be made {self.target_shape}: "
                f"{sample} numbers a sample"
            )
        return inputs.reshape(
            (inputs.shape[0], *(sample // known if n == -1 else n for n in self.target_shape))
        )

    def compute_output_shape(self, input_shape: Shape) -> Shape:
        """(batch, *target_shape), with -1 worked out where it can be."""
        known = math.prod(n for n in self.target_shape if n != -1)
        rest: Any = input_shape[1:]
        open_size = None if None in rest else math.prod(rest) // known
        return (input_shape[0], *(open_size if n == -1 else n for n in self.target_shape))


@registry.register()
class Permute(_Reshaping):
    """Swap the axes of a sample: `dims` counts them from 1, the batch not included. A mask ends here.

    >>> Permute((2, 1))(np.ones((5, 3, 4))).shape
    (5, 4, 3)
    """

    def __init__(self, dims: Sequence[int], **options: Any) -> None:
        super().__init__(**options)
        self.dims: tuple[int, ...] = tuple(dims)
        if sorted(self.dims) != list(range(1, len(self.dims) + 1)):
            raise ValueError(f"dims: expected an ordering of 1 .. {len(self.dims)}, got {dims!r}")

    def call(self, inputs: Tensor) -> Tensor:
        """Raises ValueError unless there are as many axes as `dims`."""
        if inputs.ndim != len(self.dims) + 1:
            raise ValueError(
                f"{self.name}: expected rank {len(self.dims) + 1} for dims {self.dims}, got {inputs.shape}"
            )
        return inputs.transpose((0, *self.dims))

    def compute_output_shape(self, input_shape: Shape) -> Shape:
        """The axes in their new order."""
        return (input_shape[0], *(input_shape[d] for d in self.dims))


@registry.register()
class RepeatVector(_Reshaping):
    """(batch, features) to (batch, n, features): the same vector at n time steps.

    >>> RepeatVector(3)(np.ones((2, 4))).shape
    (2, 3, 4)
    """

    input_ndim: int | None = 2
    input_axes = "(batch, features)"

    def __init__(self, n: int, **options: Any) -> None:
        super().__init__(**options)
        self.n: int = positive("n", n)

    def call(self, inputs: Tensor) -> Tensor:
        """A new time axis of length n."""
        return ops.repeat(ops.expand_dims(inputs, 1), self.n, axis=1)

    def compute_output_shape(self, input_shape: Shape) -> Shape:
        """(batch, n, features)."""
        return (input_shape[0], self.n, *input_shape[1:])


class _Merging(Layer):
    """A layer over a list of inputs. Of their masks, a step counts where all count."""

    supports_masking = True
    per_step = True

    def _check_rank(self, inputs: Any) -> None:
        shapes = shape_of(inputs)
        if isinstance(inputs, Tensor) or len(inputs) < 2:
            raise ValueError(f"{self.name}: expected a list of at least two inputs, got shape {shapes}")
        if len({len(s) for s in shapes}) > 1 or len({s[0] for s in shapes}) > 1:
            raise ValueError(
                f"{self.name}: expected inputs of one rank and one batch size, got shapes {shapes}"
            )

    def compute_mask(self, inputs: Any, mask: Any = None) -> Any:
        """Where all of the inputs' masks are True."""
        present = [m for m in mask or [] if m is not None]
        return functools.reduce(operator.and_, present) if present else None


@registry.register()
class Concatenate(_Merging):
    """Several inputs, one after the other along `axis`.

    >>> Concatenate()([np.ones((2, 3)), np.ones((2, 1))]).shape
    (2, 4)
    """

    def __init__(self, axis: int = -1, **options: Any) -> None:
        super().__init__(**options)
        self.axis: int = int(axis)
        if self.axis == 0:
            raise ValueError("axis: 0 is the batch, expected another axis")

    def call(self, inputs: Sequence[Tensor]) -> Tensor:
        """Raises ValueError unless the other axes agree."""
        axis, rank = self._axis(inputs[0].ndim), inputs[0].ndim
        others = {tuple(n for k, n in enumerate(x.shape) if k != axis) for x in inputs}
        if len(others) > 1:
            raise ValueError(
                f"{self.name}: inputs may differ in axis {axis} of {rank} only, got shapes {shape_of(inputs)}"
            )
        return ops.concatenate(inputs, axis=axis)

    def compute_mask(self, inputs: Any, mask: Any = None) -> Any:
        """Along time the masks are put one after the other as well; inputs without one count in full."""
        if mask is None or self._axis(inputs[0].ndim) != 1:
            return super().compute_mask(inputs, mask)
        full = (
            namespace(x.data).ones(x.shape[:2], bool) if m is None else m
            for x, m in zip(inputs, mask, strict=True)
        )
        return np.concatenate(list(full), axis=1)

    def compute_output_shape(self, input_shape: Sequence[Shape]) -> Shape:
        """The sizes along `axis` add up."""
        axis = self._axis(len(input_shape[0]))
        sizes = [s[axis] for s in input_shape]
        total = None if None in sizes else sum(n for n in sizes if n is not None)
        return (*input_shape[0][:axis], total, *input_shape[0][axis + 1 :])

    def _axis(self, rank: int) -> int:
        axis = self.axis + rank if self.axis < 0 else self.axis
        if not 0 < axis < rank:
            raise ValueError(
                f"{self.name}: axis {self.axis} is not one of the axes after the batch, at rank {rank}"
            )
        return axis


@registry.register()
class Add(_Merging):
    """The sum of several inputs of one shape (or of shapes that broadcast).

    >>> Add()([np.ones((1, 2)), np.ones((1, 2))]).numpy().tolist()
    [[2.0, 2.0]]
    """

    def call(self, inputs: Sequence[Tensor]) -> Tensor:
        """Raises ValueError when the shapes don't broadcast."""
        self.compute_output_shape([x.shape for x in inputs])
        total = inputs[0]
        for x in inputs[1:]:
            total = total + x
        return total

    def compute_output_shape(self, input_shape: Sequence[Shape]) -> Shape:
        """The shape they broadcast to."""
        sizes = []
        for column in zip(*input_shape, strict=True):
            wide = {n for n in column if n != 1}
            if len(wide - {None}) > 1:
                raise ValueError(f"{self.name}: shapes {list(input_shape)} can't be added")
            sizes.append(None if None in wide else next(iter(wide), 1))
        return tuple(sizes)


class _Pooling(Layer):
    """(batch, time, features) to (batch, features), over the steps that the mask lets count."""

    input_ndim: int | None = 3
    input_axes = "(batch, time, features)"
    supports_masking = True

    def __init__(self, keepdims: bool = False, **options: Any) -> None:
        super().__init__(**options)
        self.keepdims: bool = bool(keepdims)

    def check_input(self, inputs: Tensor) -> None:
        """There must be a step to pool over."""
        if inputs.shape[1] == 0:
            raise ValueError(f"{self.name}: expected at least one time step, got shape {inputs.shape}")

    def compute_mask(self, inputs: Any, mask: Any = None) -> Any:
        """None: there is no time axis left."""
        return None

    def compute_output_shape(self, input_shape: Shape) -> Shape:
        """(batch, features), or (batch, 1, features) with `keepdims`."""
        return (input_shape[0], 1, input_shape[2]) if self.keepdims else (input_shape[0], input_shape[2])


@registry.register()
class GlobalAveragePooling1D(_Pooling):
    """Mean over the time steps, masked ones left out; zero for a row without any.

    >>> GlobalAveragePooling1D()(np.array([[[1.0], [3.0]]])).numpy().tolist()
    [[2.0]]
    """

    def call(self, inputs: Tensor, mask: Any = None) -> Tensor:
        """The mean of each feature."""
        if mask is None:
            return ops.mean(inputs, axis=1, keepdims=self.keepdims)
        weights = mask[..., None].astype(inputs.dtype)
        weights /= np.maximum(weights.sum(axis=1, keepdims=True), 1)
        return ops.sum(inputs * Tensor(weights), axis=1, keepdims=self.keepdims)


@registry.register()
class GlobalMaxPooling1D(_Pooling):
    """Maximum over the time steps, masked ones left out; zero for a row without any.

    Keras ignores the mask here; leaving padding out of a maximum is what a mask is for.

    Arguments:
        keepdims: keep the time axis, of size 1.
        ignore_mask: the maximum over all steps, as in Keras; models from there come with it.

    >>> GlobalMaxPooling1D()(np.array([[[1.0], [3.0]]])).numpy().tolist()
    [[3.0]]
    """

    def __init__(self, keepdims: bool = False, ignore_mask: bool = False, **options: Any) -> None:
        super().__init__(keepdims, **options)
        self.ignore_mask: bool = bool(ignore_mask)

    def call(self, inputs: Tensor, mask: Any = None) -> Tensor:
        """The maximum of each feature."""
        if mask is not None and not self.ignore_mask:
            valid = mask[..., None]
            floor = np.where(valid.any(axis=1, keepdims=True), np.finfo(inputs.dtype).min, 0).astype(
                inputs.dtype
            )
            inputs = ops.where(
                np.broadcast_to(valid, inputs.shape), inputs, Tensor(np.broadcast_to(floor, inputs.shape))
            )
        return ops.max(inputs, axis=1, keepdims=self.keepdims)


def _features(layer: Layer, input_shape: Shape) -> int:
    if not input_shape or input_shape[-1] is None:
        raise ValueError(
            f"{layer.name}: the last axis, the features, needs a known size, got {tuple(input_shape)}"
        )
    return int(input_shape[-1])
