"""Attention: each step of a query gathers from the steps of a value those whose keys match it.

`Attention` and `AdditiveAttention` have one head, `MultiHeadAttention` several, and `TransformerBlock` puts
the latter between norms and dense layers. Names, defaults, weights and their order are Keras 3's; shapes are
(batch, time, features). Inputs come in a list [query, value] or [query, value, key]. Masks arrive with the
tensors, as from `Embedding(mask_zero=True)`; a query that may look nowhere gathers zeros.
"""

import math
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from numlstm import activations, constraints, initializers, ops, regularizers
from numlstm.autograd import Tensor, Variable
from numlstm.backend import adopt, beside, namespace, to_numpy
from numlstm.layers.base import Layer, Shape, checked_shape, fraction, positive, registry, shape_of
from numlstm.layers.core import Dense, Dropout, LayerNormalization

SCORE_MODES = ("dot", "general", "concat", "additive")


class _Attending(Layer):
    """What the layers over [query, value] or [query, value, key] share."""

    def __init__(self, dropout: float = 0.0, seed: int | None = None, **options: Any) -> None:
        super().__init__(**options)
        self.dropout: float = fraction("dropout", dropout)
        if seed is not None and (
            isinstance(seed, bool) or not isinstance(seed, (int, np.integer)) or seed < 0
        ):
            raise ValueError(f"seed: expected None or an integer >= 0, got {seed!r}")
        self.seed: int | None = None if seed is None else int(seed)

    def _check_rank(self, inputs: Any) -> None:
        if not isinstance(inputs, list) or len(inputs) not in (2, 3):
            raise ValueError(
                f"{self.name}: expected a list [query, value] or [query, value, key], "
                f"got shape {shape_of(inputs)}"
            )
        shapes = shape_of(inputs)
        if any(len(s) != 3 for s in shapes) or len({s[0] for s in shapes}) > 1:
            raise ValueError(
                f"{self.name}: expected inputs of shape (batch, time, features) with one batch size, "
                f"got shapes {shapes}"
            )
        if shapes[1][1] != shapes[-1][1] or not shapes[1][1]:
            raise ValueError(
                f"{self.name}: expected value and key to have the same number of time steps, at least one, "
                f"got shapes {shapes}"
            )

    def check_input(self, inputs: Any) -> None:
        """Each input must have the features that the weights were made for."""
        for what, x, built in zip(
            ("query", "value", "key"), _three(inputs), _three(self.build_shape), strict=True
        ):
            if self._variables and x.shape[-1] != built[-1]:
                raise ValueError(
                    f"{self.name}: expected a {what} with {built[-1]} features (last axis), "
                    f"got shape {x.shape}"
                )

    def _given_mask(self, inputs: Any, mask: Any, lengths: Any) -> Any:
        if lengths is not None:
            raise ValueError(
                f"{self.name}: lengths: attention has several inputs; give mask=[query's, value's]"
            )
        if isinstance(mask, (list, tuple)) and 2 <= len(mask) < len(inputs):
            mask = [*mask, None]
        return super()._given_mask(inputs, mask, None)

    def compute_mask(self, inputs: Any, mask: Any = None) -> Any:
        """The query's: the result has its steps."""
        return None if mask is None else mask[0]

    def compute_output_shape(self, input_shape: Any) -> Shape:
        """(batch, query's time, value's features)."""
        return (*input_shape[0][:2], input_shape[1][-1])


def _three(inputs: Sequence[Any]) -> tuple[Any, Any, Any]:
    """query, value, key; the value is its own key where none is given."""
    return inputs[0], inputs[1], inputs[-1]


def _allowed(inputs: Sequence[Tensor], masks: Any, causal: bool, more: Any = None) -> np.ndarray | None:
    """Where queries may look, (batch or 1, queries, values): the masks of value and key, those after them in
    `more`, and with `causal` no value later than the query."""
    parts = [] if more is None else [more]
    parts += [m[:, None, :] for m in (masks or ())[1:] if m is not None]
    if causal:
        triangle = namespace(inputs[0].data).tri(inputs[0].shape[1], inputs[1].shape[1], dtype=bool)
        parts.append(triangle[None])
    if not parts:
        return None
    allowed = parts[0]
    for part in parts[1:]:
        allowed = allowed & part
    return allowed


class _OneHead(_Attending):
    """`Attention` and its relatives: they differ in the scores."""

    def call(
        self,
        inputs: Sequence[Tensor],
        mask: Any = None,
        return_attention_scores: bool = False,
        training: bool = False,
        use_causal_mask: bool = False,
    ) -> Tensor | list[Tensor]:
        """Gather from the values.

        Arguments:
            inputs: [query (batch, Tq, features), value (batch, Tv, features)], and a key (batch, Tv,
                features).
            mask: [query's (batch, Tq), value's (batch, Tv)]: where a query does not count the result is zero,
                and where a value does not count nobody looks.
            return_attention_scores: also the weights (batch, Tq, Tv), which sum to 1 over the values.
            training: whether weights are dropped.
            use_causal_mask: a query sees the values of its own and earlier steps only.
        """
        query, value, key = _three(inputs)
        allowed = _allowed(inputs, mask, use_causal_mask)
        result, weights = self.attend(query, key, value, allowed, self.dropout if training else 0.0)
        if mask is not None and mask[0] is not None:
            result = ops.where(np.broadcast_to(mask[0][..., None], result.shape), result, 0.0)
        return [result, weights] if return_attention_scores else result

    def attend(
        self, query: Tensor, key: Tensor, value: Tensor, allowed: Any, dropout: float
    ) -> tuple[Tensor, Tensor]:
        """The result and the weights."""
        weights = ops.masked_softmax(self.scores(query, key), allowed)
        used = ops.dropout(weights, dropout, seed=self.seed) if dropout else weights
        return ops.matmul(used, value), weights

    def scores(self, query: Tensor, key: Tensor) -> Tensor:
        """How well keys (batch, Tv, features) match queries (batch, Tq, features): (batch, Tq, Tv)."""
        raise NotImplementedError


@registry.register()
class Attention(_OneHead):
    """Attention with one head: Luong et al. 2015, section 3.1, and Bahdanau et al. 2015.

    The score of query q and key k, by `score_mode`: "dot" `q k`; "general" `q W k`; "concat" `w
    sum(tanh(q + k))` with one number w, as in Keras; "additive" `v tanh(Wq q + Wk k)`, Bahdanau's. For the
    inputs see `call`.

    Arguments:
        use_scale: a trained number times the scores (in "concat" and "additive" inside the tanh).
        score_mode: one of the four above.
        dropout: fraction of the weights dropped in training.
        seed: for dropout that does not depend on `nl.set_seed`.
        units: size of the sum in "additive"; the key's features if not given.
        kernel_initializer, kernel_regularizer, kernel_constraint: of the matrices (the second of v too).

    Raises:
        ValueError: an unknown option or score mode, inputs that don't fit each other.

    >>> Attention()([np.ones((2, 3, 4)), np.ones((2, 5, 4))]).shape
    (2, 3, 4)
    """

    score: Variable

    def __init__(
        self,
        use_scale: bool = False,
        score_mode: str = "dot",
        dropout: float = 0.0,
        seed: int | None = None,
        *,
        units: int | None = None,
        kernel_initializer: Any = "glorot_uniform",
        kernel_regularizer: Any = None,
        kernel_constraint: Any = None,
        **options: Any,
    ) -> None:
        super().__init__(dropout, seed, **options)
        if score_mode not in SCORE_MODES:
            raise ValueError(f"score_mode: expected one of {', '.join(SCORE_MODES)}, got {score_mode!r}")
        if units is not None and score_mode != "additive":
            raise ValueError(f"units: belongs to score_mode='additive', got it with {score_mode!r}")
        self.use_scale: bool = bool(use_scale)
        self.score_mode = score_mode
        self.units: int | None = None if units is None else positive("units", units)
        self.kernel_initializer: Any = initializers.get(kernel_initializer)
        self.kernel_regularizer: Any = regularizers.get(kernel_regularizer)
        self.kernel_constraint: Any = constraints.get(kernel_constraint)

    def build(self, input_shape: Sequence[Shape]) -> None:
        """scale (), then by mode: kernel (query, key); concat_score_weight (); query_kernel, key_kernel,
        score."""
        (*_, queries), _, (*_, keys) = _three(input_shape)
        self.scale: Variable | None = self.add_weight("scale", (), "ones") if self.use_scale else None
        if self.score_mode in ("dot", "concat") and queries != keys:
            raise ValueError(
                f"{self.name}: score_mode {self.score_mode!r} needs query and key of one size, "
                f"got {queries} and {keys} features"
            )
        if self.score_mode == "general":
            self.kernel: Variable = self._kernel("kernel", (queries, keys))
        elif self.score_mode == "concat":
            self.concat_score_weight: Variable = self.add_weight("concat_score_weight", (), "ones")
        elif self.score_mode == "additive":
            units = self.units or keys
            self.query_kernel: Variable = self._kernel("query_kernel", (queries, units))
            self.key_kernel: Variable = self._kernel("key_kernel", (keys, units))
            self.score = self.add_weight("score", (units,), "glorot_uniform", self.kernel_regularizer)

    def _kernel(self, name: str, shape: tuple[int, ...]) -> Variable:
        return self.add_weight(
            name, shape, self.kernel_initializer, self.kernel_regularizer, self.kernel_constraint
        )

    def attend(
        self, query: Tensor, key: Tensor, value: Tensor, allowed: Any, dropout: float
    ) -> tuple[Tensor, Tensor]:
        """The fused operation where the score is a product."""
        if self.score_mode in ("concat", "additive"):
            return super().attend(query, key, value, allowed, dropout)
        if self.score_mode == "general":
            query = ops.linear(query, self.kernel)
        if self.scale is not None:
            query = query * self.scale
        return ops.attend(query, key, value, allowed, dropout=dropout, seed=self.seed)

    def scores(self, query: Tensor, key: Tensor) -> Tensor:
        """Those with a tanh."""
        if self.score_mode == "additive":
            query, key, weight = (
                ops.linear(query, self.query_kernel),
                ops.linear(key, self.key_kernel),
                self.score,
            )
        else:
            weight = ops.broadcast_to(self.concat_score_weight, query.shape[-1:])
        if self.scale is not None:
            query, key = query * self.scale, key * self.scale
        return ops.additive_scores(query, key, weight)

    def operations(self) -> list[tuple[str, str]]:
        """What is asked of the backend, for `nl.explain`."""
        products = ["matmul"] if self.score_mode != "dot" else []
        return [(name, "*") for name in [*products, "batched_matmul"]]


@registry.register()
class AdditiveAttention(_OneHead):
    """Keras' additive attention: the score of query q and key k is `sum(scale tanh(q + k))`, with a trained
    vector.

    For Bahdanau's own, whose q and k go through matrices first, see `Attention(score_mode="additive")`. The
    call is that of `Attention`.

    Arguments:
        use_scale: whether there is the vector `scale`; without it the tanh are simply added.
        dropout: fraction of the weights dropped in training.
        seed: for dropout that does not depend on `nl.set_seed`.

    Raises:
        ValueError: an unknown option, inputs that don't fit each other.

    >>> AdditiveAttention()([np.ones((2, 3, 4)), np.ones((2, 5, 4))]).shape
    (2, 3, 4)
    """

    scale: Variable | None

    def __init__(
        self, use_scale: bool = True, dropout: float = 0.0, seed: int | None = None, **options: Any
    ) -> None:
        super().__init__(dropout, seed, **options)
        self.use_scale: bool = bool(use_scale)

    def build(self, input_shape: Sequence[Shape]) -> None:
        """scale (features,)."""
        query, _, key = _three(input_shape)
        if query[-1] != key[-1]:
            raise ValueError(
                f"{self.name}: query and key need one size, got {query[-1]} and {key[-1]} features"
            )
        self.scale = self.add_weight("scale", (query[-1],), "glorot_uniform") if self.use_scale else None

    def scores(self, query: Tensor, key: Tensor) -> Tensor:
        """sum(scale tanh(q + k))."""
        ones = namespace(query.data).ones
        weight = Tensor(ones(query.shape[-1], self.dtype)) if self.scale is None else self.scale
        return ops.additive_scores(query, key, weight)

    def operations(self) -> list[tuple[str, str]]:
        """What is asked of the backend, for `nl.explain`."""
        return [("matmul", "*"), ("batched_matmul", "*")]


@registry.register()
class MultiHeadAttention(_Attending):
    """Several attentions side by side, each on projections of its own: Vaswani et al. 2017, section 3.2.2.

    Weights, N heads of K (`key_dim`) and V (`value_dim`) features: query_kernel (features, N, K), query_bias
    (N, K), the same for key and value (features, N, V), then output_kernel (N, V, *output_shape),
    output_bias. Rows that may look nowhere gather zeros, of which the output projection leaves its bias.

    Arguments:
        num_heads: N.
        key_dim: K. value_dim: V; K if not given.
        dropout: fraction of the weights dropped in training.
        use_bias: whether the projections have biases.
        output_shape: features of the result, a number or several; the query's if not given.
        kernel_initializer, bias_initializer: see `numlstm.initializers`.
        kernel_regularizer, bias_regularizer, activity_regularizer: see `numlstm.regularizers`.
        kernel_constraint, bias_constraint: see `numlstm.constraints`.
        seed: for dropout that does not depend on `nl.set_seed`.

    Raises:
        ValueError: an unknown option, inputs or masks that don't fit each other.

    >>> x = np.ones((2, 5, 8))
    >>> y, scores = MultiHeadAttention(num_heads=2, key_dim=4)(x, x, return_attention_scores=True)
    >>> y.shape, scores.shape
    ((2, 5, 8), (2, 2, 5, 5))
    """

    num_heads: int
    key_dim: int
    output_shape: Shape | None
    query_kernel: Variable
    query_bias: Variable | None
    key_kernel: Variable
    key_bias: Variable | None
    value_kernel: Variable
    value_bias: Variable | None
    output_kernel: Variable
    output_bias: Variable | None

    def __init__(
        self,
        num_heads: int,
        key_dim: int,
        value_dim: int | None = None,
        dropout: float = 0.0,
        use_bias: bool = True,
        output_shape: Any = None,
        kernel_initializer: Any = "glorot_uniform",
        bias_initializer: Any = "zeros",
        kernel_regularizer: Any = None,
        bias_regularizer: Any = None,
        activity_regularizer: Any = None,
        kernel_constraint: Any = None,
        bias_constraint: Any = None,
        seed: int | None = None,
        **options: Any,
    ) -> None:
        super().__init__(dropout, seed, **options)
        self.num_heads, self.key_dim = positive("num_heads", num_heads), positive("key_dim", key_dim)
        self.value_dim: int = self.key_dim if value_dim is None else positive("value_dim", value_dim)
        self.use_bias: bool = bool(use_bias)
        self.output_shape = None if output_shape is None else checked_shape("output_shape", output_shape)
        if self.output_shape is not None and None in self.output_shape:
            raise ValueError(f"output_shape: expected known sizes, got {output_shape!r}")
        self.kernel_initializer: Any = initializers.get(kernel_initializer)
        self.bias_initializer: Any = initializers.get(bias_initializer)
        self.kernel_regularizer: Any = regularizers.get(kernel_regularizer)
        self.bias_regularizer: Any = regularizers.get(bias_regularizer)
        self.activity_regularizer: Callable[[Tensor], Tensor] | None = regularizers.get(activity_regularizer)
        self.kernel_constraint: Any = constraints.get(kernel_constraint)
        self.bias_constraint: Any = constraints.get(bias_constraint)

    def build(self, input_shape: Sequence[Shape]) -> None:
        """The four projections, in Keras' order."""
        query, value, key = _three(input_shape)
        N, K, V = self.num_heads, self.key_dim, self.value_dim
        if None in (query[-1], value[-1], key[-1]):
            raise ValueError(f"{self.name}: the features need known sizes, got shapes {list(input_shape)}")
        out = self.output_shape or (query[-1],)
        self.query_kernel, self.query_bias = self._projection("query", (query[-1], N, K), (N, K))
        self.key_kernel, self.key_bias = self._projection("key", (key[-1], N, K), (N, K))
        self.value_kernel, self.value_bias = self._projection("value", (value[-1], N, V), (N, V))
        self.output_kernel, self.output_bias = self._projection("output", (N, V, *out), out)

    def _projection(self, name: str, shape: Shape, bias: Shape) -> tuple[Variable, Variable | None]:
        kernel = self.add_weight(
            f"{name}_kernel", shape, self.kernel_initializer, self.kernel_regularizer, self.kernel_constraint
        )
        if not self.use_bias:
            return kernel, None
        options = (self.bias_initializer, self.bias_regularizer, self.bias_constraint)
        return kernel, self.add_weight(f"{name}_bias", bias, *options)

    def __call__(
        self,
        query: Any,
        value: Any = None,
        key: Any = None,
        *,
        query_mask: Any = None,
        value_mask: Any = None,
        key_mask: Any = None,
        mask: Any = None,
        **options: Any,
    ) -> Any:
        """Apply the layer: `layer(query, value, key)`, or `layer([query, value, key])` as other layers take
        it.

        Arguments:
            query: (batch, Tq, features). value: (batch, Tv, features). key: like value; the value if not
                given.
            query_mask, value_mask, key_mask: bool (batch, time); by default what the tensors brought along.
                `mask` has them in a list.
            options: see `call`; and `training`.
        """
        several = isinstance(query, (list, tuple)) and value is None
        if not several and value is None:
            raise ValueError(
                f"{self.name}: value: expected query and value (for self-attention the same), got None"
            )
        inputs = list(query) if several else [query, value, *(() if key is None else (key,))]
        if key_mask is not None and len(inputs) == 2:
            inputs.append(inputs[1])
        given = [query_mask, value_mask, key_mask]
        if any(m is not None for m in given):
            if mask is not None:
                raise ValueError(f"{self.name}: give mask or query_mask, value_mask and key_mask, not both")
            own = [getattr(x, "mask", None) for x in inputs]
            mask = [b if a is None else a for a, b in zip(given, own, strict=False)]
        return super().__call__(inputs, mask=mask, **options)

    def call(
        self,
        inputs: Sequence[Tensor],
        mask: Any = None,
        attention_mask: Any = None,
        return_attention_scores: bool = False,
        training: bool = False,
        use_causal_mask: bool = False,
    ) -> Tensor | list[Tensor]:
        """Gather from the values, by every head.

        Arguments:
            inputs: [query, value] or [query, value, key].
            mask: [query's (batch, Tq), value's (batch, Tv), key's].
            attention_mask: bool (batch, Tq, Tv), or (batch, heads, Tq, Tv), with 1 for what is shared: False
                where a query may not look.
            return_attention_scores: also the weights (batch, heads, Tq, Tv).
            training: whether weights are dropped.
            use_causal_mask: a query sees the values of its own and earlier steps only.

        Returns (batch, Tq, *output_shape), in a list with the weights if they are asked for.
        """
        query, value, key = _three(inputs)
        q = self._heads(query, self.query_kernel, self.query_bias)
        k = self._heads(key, self.key_kernel, self.key_bias)
        v = self._heads(value, self.value_kernel, self.value_bias)
        gathered, weights = ops.attend(
            q, k, v, self._allowed(inputs, mask, attention_mask, use_causal_mask),
            scale=1 / math.sqrt(self.key_dim), dropout=self.dropout if training else 0.0, seed=self.seed,
        )  # fmt: skip
        N, V, *out = self.output_kernel.shape
        side_by_side = gathered.transpose(0, 2, 1, 3).reshape((*query.shape[:2], N * V))
        kernel = self.output_kernel.reshape((N * V, math.prod(out)))
        bias = None if self.output_bias is None else self.output_bias.reshape((math.prod(out),))
        result = ops.linear(side_by_side, kernel, bias).reshape((*query.shape[:2], *out))
        return [result, weights] if return_attention_scores else result

    def _heads(self, x: Tensor, kernel: Variable, bias: Variable | None) -> Tensor:
        """(batch, time, features) to (batch, heads, time, size)."""
        features, N, size = kernel.shape
        flat_bias = None if bias is None else bias.reshape((N * size,))
        projected = ops.linear(x, kernel.reshape((features, N * size)), flat_bias)
        return projected.reshape((*x.shape[:2], N, size)).transpose(0, 2, 1, 3)

    def _allowed(self, inputs: Sequence[Tensor], masks: Any, given: Any, causal: bool) -> np.ndarray | None:
        """Where queries may look, (batch, heads or 1, Tq, Tv)."""
        more = None
        if given is not None:
            more = adopt(given.data if isinstance(given, Tensor) else given)
            scores = (inputs[0].shape[0], self.num_heads, inputs[0].shape[1], inputs[1].shape[1])
            expected = scores if more.ndim == 4 else (scores[0], *scores[2:])
            if more.ndim not in (2, 3, 4) or any(
                n not in (1, m) for n, m in zip(more.shape[::-1], expected[::-1], strict=False)
            ):
                raise ValueError(
                    f"{self.name}: attention_mask: expected (batch, Tq, Tv) = {(scores[0], *scores[2:])} "
                    f"or, with heads, {scores}, got shape {more.shape}"
                )
            if more.dtype.kind not in "biuf" or not (
                more.dtype.kind == "b" or np.isin(to_numpy(more), (0, 1)).all()
            ):
                raise ValueError(f"{self.name}: attention_mask: expected True and False (or 1 and 0)")
            more = beside(more, inputs[0].data, f"{self.name}: attention_mask", bool)
        rank3 = None if more is None or more.ndim == 4 else more.reshape((1,) * (3 - more.ndim) + more.shape)
        if masks is not None and masks[0] is not None:
            rank3 = masks[0][..., None] if rank3 is None else rank3 & masks[0][..., None]
        allowed = _allowed(inputs, masks, causal, rank3)
        if allowed is not None:
            allowed = allowed[:, None]
        if more is None or more.ndim < 4:
            return allowed
        return more if allowed is None else more & allowed

    def compute_output_shape(self, input_shape: Any) -> Shape:
        """(batch, query's time, *output_shape)."""
        query = input_shape[0]
        return (*query[:2], *(self.output_shape or query[2:]))

    def operations(self) -> list[tuple[str, str]]:
        """What is asked of the backend, for `nl.explain`."""
        return [("matmul", "*"), ("batched_matmul", "*")]


@registry.register()
class TransformerBlock(Layer):
    """Self-attention, then two dense layers at each step, each around a shortcut: Vaswani et al. 2017,
    section 3.1.

    (batch, time, features) to the same. Steps that the incoming mask leaves out are not looked at; the mask
    goes on.

    Arguments:
        num_heads: of the attention.
        intermediate_dim: units of the first dense layer.
        key_dim: features of a head; the input's features divided by `num_heads` if not given.
        dropout: in training, on the attention's weights, after it and after the dense layers.
        activation: of the first dense layer.
        normalize_first: norms in front of the two parts (Xiong et al. 2020: trains without a warm-up), or,
            False, behind the sums, as first published.
        causal: a step sees itself and earlier steps only.
        layer_norm_epsilon: of the norms.
        kernel_initializer: of all matrices.

    Raises:
        ValueError: an unknown option; features that `num_heads` does not divide, without a `key_dim`.

    >>> TransformerBlock(num_heads=2, intermediate_dim=16, causal=True)(np.ones((3, 5, 8))).shape
    (3, 5, 8)
    """

    normalize_first: bool
    causal: bool
    attention_norm: LayerNormalization
    feedforward_norm: LayerNormalization

    input_ndim: int | None = 3
    input_axes = "(batch, time, features)"
    supports_masking = True

    def __init__(
        self,
        num_heads: int,
        intermediate_dim: int,
        *,
        key_dim: int | None = None,
        dropout: float = 0.0,
        activation: Any = "relu",
        normalize_first: bool = True,
        causal: bool = False,
        layer_norm_epsilon: float = 1e-5,
        kernel_initializer: Any = "glorot_uniform",
        **options: Any,
    ) -> None:
        super().__init__(**options)
        self.num_heads: int = positive("num_heads", num_heads)
        self.intermediate_dim: int = positive("intermediate_dim", intermediate_dim)
        self.key_dim: int | None = None if key_dim is None else positive("key_dim", key_dim)
        self.dropout: float = fraction("dropout", dropout)
        self.activation: activations.Activation = activations.get(activation)
        self.normalize_first, self.causal = bool(normalize_first), bool(causal)
        self.layer_norm_epsilon = layer_norm_epsilon
        self.kernel_initializer: Any = initializers.get(kernel_initializer)

    def build(self, input_shape: Shape) -> None:
        """The layers inside: attention_norm, attention, feedforward_norm, expand, contract."""
        features, shape, dtype = input_shape[-1], tuple(input_shape), self.dtype
        if features is None or (self.key_dim is None and features % self.num_heads):
            raise ValueError(
                f"{self.name}: expected features that num_heads {self.num_heads} divides, or a key_dim, "
                f"got shape {shape}"
            )
        options = {"kernel_initializer": self.kernel_initializer, "dtype": dtype}
        self.attention_norm = LayerNormalization(epsilon=self.layer_norm_epsilon, dtype=dtype)
        self.attention: MultiHeadAttention = MultiHeadAttention(
            self.num_heads, self.key_dim or features // self.num_heads, dropout=self.dropout, **options
        )
        self.feedforward_norm = LayerNormalization(epsilon=self.layer_norm_epsilon, dtype=dtype)
        self.expand: Dense = Dense(self.intermediate_dim, self.activation, **options)
        self.contract: Dense = Dense(features, **options)
        self.thin: Dropout = Dropout(self.dropout, dtype=dtype)
        for layer in (self.attention_norm, self.feedforward_norm, self.expand, self.thin):
            layer.build(shape)
        self.attention.build([shape, shape])
        self.contract.build((*shape[:-1], self.intermediate_dim))

    def call(self, inputs: Tensor, mask: Any = None) -> Tensor:
        """(batch, time, features) to the same."""
        if self.normalize_first:
            x = inputs + self._look(self.attention_norm(inputs), mask)
            return x + self._think(self.feedforward_norm(x))
        x = self.attention_norm(inputs + self._look(inputs, mask))
        return self.feedforward_norm(x + self._think(x))

    def _look(self, x: Tensor, mask: Any) -> Tensor:
        masks = None if mask is None else [mask, mask]
        return self.thin(self.attention([x, x], mask=masks, use_causal_mask=self.causal))

    def _think(self, x: Tensor) -> Tensor:
        return self.thin(self.contract(self.expand(x)))

    def compute_output_shape(self, input_shape: Shape) -> Shape:
        """The input's shape."""
        return input_shape
