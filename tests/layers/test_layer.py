"""What every layer shares: building, names, weights, masks, training mode, losses, custom layers."""

import numpy as np
import pytest

import numlstm as nl
from numlstm import ops
from numlstm.autograd import GradientTape, Tensor, Variable
from numlstm.layers.base import snake_case

X = np.random.default_rng(0).standard_normal((2, 5, 3)).astype(np.float32)
MASK = np.array([[1, 1, 0, 1, 1], [1, 0, 0, 0, 0]], bool)


class Scale(nl.Layer):
    def __init__(self, start="ones", **options):
        super().__init__(**options)
        self.start = nl.initializers.get(start)

    def build(self, input_shape):
        self.factor = self.add_weight("factor", input_shape[-1:], self.start)

    def call(self, x):
        return x * self.factor


class Tower(nl.Layer):
    """Layers in lists and dicts, one of them used twice, and a variable of its own."""

    def __init__(self, **options):
        super().__init__(**options)
        self.shift = Variable([0.5], name="shift")
        self.blocks = [nl.Dense(3), nl.Dense(3)]
        self.named = {"last": Scale()}
        self.again = self.blocks[0]

    def call(self, x, training=False):
        for block in self.blocks:
            x = block(x)
        x = self.named["last"](self.again(x)) + self.shift
        return x * 0 if training else x


def test_building_happens_once_and_remembers_the_shape():
    layer = Scale()
    assert not layer.built and layer.weights == []
    layer(X)
    assert layer.built and layer.build_shape == (None, 5, 3) and layer.factor.shape == (3,)
    weights = layer.weights
    layer(X[:, :2])
    assert layer.weights[0] is weights[0]
    layer.build((None, 5, 3))  # no harm done
    with pytest.raises(ValueError, match=r"built already, for inputs of shape \(None, 5, 3\)"):
        layer.build((None, 3))


def test_a_build_that_fails_leaves_nothing_behind():
    class Twice(nl.Layer):
        ready = False

        def build(self, input_shape):
            self.first = self.add_weight("first", (2,))
            if not self.ready:
                raise ValueError("not yet")

        def call(self, x):
            return x

    layer = Twice()
    with pytest.raises(ValueError, match="not yet"):
        layer(X)
    layer.ready = True
    layer(X)
    assert len(layer.weights) == 1


def test_names():
    assert snake_case("GlobalAveragePooling1D") == "global_average_pooling1d"
    assert [snake_case(n) for n in ("LSTM", "SimpleRNN", "TimeDistributed")] == [
        "lstm",
        "simple_rnn",
        "time_distributed",
    ]
    first, second = Scale(), Scale()
    assert first.name != second.name and second.name.startswith("scale")
    with pytest.raises(ValueError, match="name: expected a string without '/'"):
        Scale(name="a/b")


def test_layers_and_variables_are_found_in_lists_and_dicts():
    tower = Tower()
    tower(X)
    assert list(tower.named_weights()) == [
        "shift",
        "blocks.0/kernel",
        "blocks.0/bias",
        "blocks.1/kernel",
        "blocks.1/bias",
        "named.last/factor",
    ]
    assert tower.count_params() == 1 + 2 * 12 + 3
    tower.blocks.append(nl.Dense(3))  # a list that grows later is seen
    tower(X)
    assert len(tower.weights) == 8


def test_weights_set_and_get():
    tower = Tower()
    tower(X)
    values = [np.full(w.shape, k, np.float64) for k, w in enumerate(tower.weights)]
    tower.set_weights(values)
    assert all(np.array_equal(a, b) for a, b in zip(tower.get_weights(), values, strict=True))
    tower.get_weights()[0][...] = 99  # a copy
    assert tower.shift.data[0] == 0
    with pytest.raises(ValueError, match="has 6 weights, got 5"):
        tower.set_weights(values[:-1])
    with pytest.raises(ValueError, match=r"blocks.0/kernel has shape \(3, 3\), got \(1,\)"):
        tower.set_weights([values[0], values[0], *values[2:]])
    with pytest.raises(ValueError, match="expected a list of arrays"):
        tower.set_weights(values[0])
    with pytest.raises(ValueError, match="not built yet"):
        Scale().set_weights([np.ones(3)])


def test_a_misfit_changes_nothing():
    tower = Tower()
    tower(X)
    before = tower.get_weights()
    with pytest.raises(ValueError):
        tower.set_weights([np.array([9.0]), *[np.zeros(1)] * 5])
    assert all(np.array_equal(a, b) for a, b in zip(before, tower.get_weights(), strict=True))


def test_freezing():
    tower = Tower()
    tower(X)
    tower.blocks[1].trainable = False
    assert len(tower.trainable_weights) == 4
    assert [w.shape for w in tower.non_trainable_weights] == [(3, 3), (3,)]
    tower.trainable = False
    assert tower.trainable_weights == [] and len(tower.non_trainable_weights) == 6


def test_training_reaches_the_layers_inside():
    class Outer(nl.Layer):
        def __init__(self):
            super().__init__()
            self.drop = nl.Dropout(0.5)
            self.kept = nl.Dropout(0.5)

        def call(self, x):
            return ops.concatenate([self.drop(x), self.kept(x, training=False)])

    ones = np.ones((50, 4), np.float32)
    layer = Outer()
    assert (layer(ones).numpy() == 1).all()
    y = layer(ones, training=True).numpy()
    assert (y[:, :4] == 0).any() and (y[:, 4:] == 1).all()
    assert (layer(ones).numpy() == 1).all()


def test_dtypes():
    assert Scale()(X.astype(np.float64)).dtype == np.float32
    assert Scale(dtype="float64")(X).dtype == np.float64
    assert Scale()(np.ones((2, 3), int)).dtype == np.float32
    layer = Scale()
    layer(X)
    layer.cast("float64")
    assert layer.factor.dtype == np.float64 and layer(X).dtype == np.float64


def test_regularization_losses():
    layer = nl.Dense(2, kernel_regularizer="l2", activity_regularizer=nl.regularizers.L1(1.0))
    for _ in range(3):  # the latest call counts, not all of them
        y = layer(X)
    kernel = layer.get_weights()[0]
    losses = [float(loss) for loss in layer.regularization_losses()]
    np.testing.assert_allclose(losses, [0.01 * (kernel**2).sum(), np.abs(y.numpy()).sum()], rtol=1e-5)
    layer.trainable = False
    assert len(layer.regularization_losses()) == 1


def test_losses_of_layers_inside_are_collected_and_differentiated():
    class Penalised(nl.Layer):
        def __init__(self):
            super().__init__()
            self.inner = Scale()
            self.used = True

        def call(self, x):
            if not self.used:
                return x
            self.add_loss(ops.sum(ops.square(x)))
            return self.inner(x)

    layer = Penalised()
    x = Tensor(X)
    with GradientTape() as tape:
        tape.watch(x)
        layer(x)
        (loss,) = layer.regularization_losses()
    np.testing.assert_allclose(tape.gradient(loss, [x])[0], 2 * X, rtol=1e-6)
    layer.used = False
    layer(x)
    assert layer.regularization_losses() == []


def test_a_layer_that_says_nothing_about_masks_warns():
    with pytest.warns(UserWarning, match="supports_masking = True in Scale"):
        y = Scale(name="mine")(X, mask=MASK)
    assert y.mask is None


def test_masks_go_through_layers_inside():
    class Two(nl.Layer):
        def __init__(self):
            super().__init__()
            self.first, self.second = nl.LSTM(3, return_sequences=True), nl.LSTM(2, return_sequences=True)

        def call(self, x):
            return self.second(self.first(x))

    layer = Two()
    y = layer(X, mask=MASK)
    assert np.array_equal(y.mask, MASK)
    assert (y.numpy()[1] == y.numpy()[1, :1]).all()  # steps after the first are masked, so its output repeats
    given = Tensor(X)
    layer(given, mask=MASK)
    assert given.mask is None  # the caller's tensor is left as it was


def test_a_mask_may_be_asked_for():
    class Count(nl.Layer):
        def call(self, x, mask=None):
            return ops.sum(x) * (0 if mask is None else int(mask.sum()))

        def compute_mask(self, inputs, mask=None):
            return None

    ones = np.ones((2, 5, 1), np.float32)
    assert float(Count()(ones, mask=MASK)) == 50
    assert float(Count()(nl.Masking()(ones))) == 100
    assert float(Count()(ones, lengths=[1, 2])) == 30
    assert float(Count()(ones)) == 0


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: Scale()(nl.Dense(2)), "called on the layer"),
        (lambda: Scale()([[1.0], [1.0, 2.0]]), "can't be made an array"),
        (lambda: Scale()(np.array([["a"]])), "expected numbers, got an input of dtype <U1"),
        (lambda: Scale()(X, state=1), "its call knows no 'state'"),
        (lambda: nl.Activation("relu")(X[0, 0], lengths=[1]), "lengths need inputs with a time axis"),
        (lambda: Scale(start="on"), "unknown initializer"),
        (lambda: Scale(units=3), "unknown option 'units'"),
        (lambda: Scale().add_weight("w", (0, 3)), "can't have the shape"),
        (
            lambda: Scale().add_weight("w", (2,), lambda shape, dtype: np.ones(3)),
            r"gave shape \(3,\), expected \(2,\)",
        ),
        (lambda: nl.register_layer(int), "expected a subclass of Layer"),
    ],
)
def test_bad_input(call, message):
    with pytest.raises(ValueError, match=message):
        call()


def test_common_slips_in_custom_layers_are_named():
    class NoInit(nl.Layer):
        def __init__(self):
            pass

        def call(self, x):
            return x

    class NoTensor(nl.Layer):
        def call(self, x):
            return np.asarray(x)

    with pytest.raises(ValueError, match=r"its __init__ must call super\(\).__init__\(\)"):
        NoInit()(X)
    with pytest.raises(ValueError, match="its call must give tensors, got ndarray"):
        NoTensor()(X)
    with pytest.raises(NotImplementedError, match="must define call"):
        nl.Layer()(X)


def test_registering_a_known_name_is_refused():
    class LSTM(nl.Layer):
        pass

    with pytest.raises(ValueError, match="'LSTM' is the name of a layer that numlstm knows"):
        nl.register_layer(LSTM)
