"""Convolution over time, under Keras' name: what many models put before their recurrent layers.

A window's steps are laid side by side and multiplied by the kernel as one matrix, so the product is that of a dense layer,
on every backend and in every precision.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal

from numlstm import activations, constraints, initializers, ops, regularizers
from numlstm.autograd import Tensor, Variable
from numlstm.layers.base import Layer, Shape, positive, registry

__all__ = ["Conv1D"]

Padding = Literal["valid", "same", "causal"]
PADDINGS = ("valid", "same", "causal")


@registry.register()
class Conv1D(Layer):
    """`activation(x * kernel + bias)` over time: (batch, time, features) to (batch, steps, filters).

    Each output step sees a window of `kernel_size` steps, `dilation_rate` apart; windows begin `strides` steps apart. With
    padding "valid" all of a window lies inside the sequence; "same" puts zeros on both sides so that ceil(time / strides)
    steps come out; "causal" puts them before the first, so that no output step sees a later input step (van den Oord et al.,
    WaveNet, 2016). As everywhere in this field, the kernel is not turned round.

    Masked steps enter as zeros; an output step is masked as the input step is that it stands for: with "causal" and "valid"
    its window's last one, with "same" its middle.

    Arguments:
        filters: size of the output's last axis.
        kernel_size, strides, dilation_rate: steps; not both of the last two above 1.
        padding: "valid", "same" or "causal".
        groups: the features and the filters are cut into so many groups, each seeing only its own.
        activation: a name, a function of a tensor, or None.
        use_bias: whether there is a bias.
        ignore_mask: take masked steps as they are, and end the mask, as Keras does; models from there come with it.
        kernel_initializer, bias_initializer, kernel_regularizer, bias_regularizer, activity_regularizer,
            kernel_constraint, bias_constraint: as in `Dense`.

    Raises:
        ValueError: an unknown padding; strides and dilation together; groups that do not divide; a sequence that is shorter
            than a window without padding.

    >>> Conv1D(4, kernel_size=3, padding="causal")(np.ones((2, 6, 5))).shape
    (2, 6, 4)
    """

    input_ndim: int | None = 3
    input_axes = "(batch, time, features)"
    supports_masking = True

    def __init__(
        self,
        filters: int,
        kernel_size: int | tuple[int] | list[int],
        strides: int | tuple[int] | list[int] = 1,
        padding: Padding = "valid",
        dilation_rate: int | tuple[int] | list[int] = 1,
        groups: int = 1,
        activation: Any = None,
        use_bias: bool = True,
        ignore_mask: bool = False,
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
        self.filters: int = positive("filters", filters)
        self.kernel_size: int = _steps("kernel_size", kernel_size)
        self.strides: int = _steps("strides", strides)
        self.dilation_rate: int = _steps("dilation_rate", dilation_rate)
        self.groups: int = positive("groups", groups)
        if padding not in PADDINGS:
            raise ValueError(f"padding: expected {', '.join(PADDINGS)}, got {padding!r}")
        self.padding: str = padding
        if self.strides > 1 and self.dilation_rate > 1:
            raise ValueError(
                f"strides: expected 1 where dilation_rate is above 1, got {self.strides} and {self.dilation_rate}"
            )
        if self.filters % self.groups:
            raise ValueError(f"groups: expected a divisor of the {self.filters} filters, got {self.groups}")
        self.activation: activations.Activation = activations.get(activation)
        self.use_bias: bool = bool(use_bias)
        self.ignore_mask: bool = bool(ignore_mask)
        self.kernel_initializer: Any = initializers.get(kernel_initializer)
        self.bias_initializer: Any = initializers.get(bias_initializer)
        self.kernel_regularizer: Any = regularizers.get(kernel_regularizer)
        self.bias_regularizer: Any = regularizers.get(bias_regularizer)
        self.activity_regularizer: Callable[[Tensor], Tensor] | None = regularizers.get(activity_regularizer)
        self.kernel_constraint: Any = constraints.get(kernel_constraint)
        self.bias_constraint: Any = constraints.get(bias_constraint)

    def build(self, input_shape: Shape) -> None:
        """kernel (kernel_size, features / groups, filters), bias (filters,)."""
        features = input_shape[-1]
        if features is None:
            raise ValueError(f"{self.name}: the number of features must be known, got shape {input_shape}")
        if features % self.groups:
            raise ValueError(f"groups: expected a divisor of the {features} features, got {self.groups}")
        self.kernel: Variable = self.add_weight(
            "kernel",
            (self.kernel_size, features // self.groups, self.filters),
            self.kernel_initializer,
            self.kernel_regularizer,
            self.kernel_constraint,
        )
        self.bias: Variable | None = None
        if self.use_bias:
            self.bias = self.add_weight(
                "bias", (self.filters,), self.bias_initializer, self.bias_regularizer, self.bias_constraint
            )

    def call(self, inputs: Tensor, mask: Any = None) -> Tensor:
        """Raises ValueError for a sequence that is shorter than a window, without padding."""
        T, features = inputs.shape[1:]
        steps, before, after = self._places(T)
        if steps < 1:
            raise ValueError(
                f"{self.name}: expected at least {self._reach} time steps, got shape {inputs.shape}"
            )
        x = inputs
        if mask is not None and not self.ignore_mask:
            x = x * Tensor(mask[..., None].astype(inputs.dtype))
        if before or after:
            x = ops.pad(x, [(0, 0), (before, after), (0, 0)])
        each, outputs = features // self.groups, self.filters // self.groups
        parts = []
        for g in range(self.groups):
            of_group = slice(g * each, (g + 1) * each)
            window = [
                x[:, k : k + (steps - 1) * self.strides + 1 : self.strides, of_group]
                for k in range(0, self._reach, self.dilation_rate)
            ]
            own = slice(g * outputs, (g + 1) * outputs)
            kernel = self.kernel if self.groups == 1 else self.kernel[:, :, own]
            bias = self.bias if self.bias is None or self.groups == 1 else self.bias[own]
            rows = window[0] if len(window) == 1 else ops.concatenate(window)
            parts.append(ops.linear(rows, kernel.reshape((self.kernel_size * each, outputs)), bias))
        return self.activation(parts[0] if len(parts) == 1 else ops.concatenate(parts))

    @property
    def _reach(self) -> int:
        """Steps from a window's first to its last."""
        return (self.kernel_size - 1) * self.dilation_rate + 1

    def _places(self, T: int) -> tuple[int, int, int]:
        """How many steps come out of T, and the zeros before and after."""
        if self.padding == "valid":
            return (T - self._reach) // self.strides + 1 if self._reach <= T else 0, 0, 0
        steps = -(-T // self.strides)
        if self.padding == "causal":
            return steps, self._reach - 1, 0
        missing = max((steps - 1) * self.strides + self._reach - T, 0)
        return steps, missing // 2, missing - missing // 2

    def compute_mask(self, inputs: Any, mask: Any = None) -> Any:
        """The mask of the input steps that the output's stand for; None where it is ignored."""
        if mask is None or self.ignore_mask:
            return None
        steps, before, _ = self._places(mask.shape[1])
        first = self._reach // 2 - before if self.padding == "same" else self._reach - 1 - before
        return mask[:, max(first, 0) :: self.strides][:, :steps]

    def compute_output_shape(self, input_shape: Shape) -> Shape:
        """(batch, steps, filters); Raises ValueError for too short a sequence."""
        T = input_shape[1]
        if T is None:
            return (input_shape[0], None, self.filters)
        steps = self._places(T)[0]
        if steps < 1:
            raise ValueError(
                f"{self.name}: expected at least {self._reach} time steps, got shape {input_shape}"
            )
        return (input_shape[0], steps, self.filters)

    def operations(self) -> list[tuple[str, str]]:
        """What is asked of the backend, for `nl.explain`."""
        return [("matmul", "*")]


def _steps(name: str, value: Any) -> int:
    """A number of steps; in a list or tuple of one, as Keras' configurations have it, too."""
    if isinstance(value, (tuple, list)) and len(value) == 1:
        value = value[0]
    return positive(name, value)
