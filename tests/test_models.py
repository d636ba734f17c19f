"""Models: Sequential and subclassed, the seeds' programs, summary, states, tracking of layers."""

import copy
import re

import numpy as np
import pytest

import numlstm as nl
from numlstm import ops
from numlstm.autograd import GradientTape

X = np.random.default_rng(0).standard_normal((4, 6, 3)).astype(np.float32)


class Tagger(nl.Model):
    def __init__(self, units, depth=2):
        super().__init__()
        self.units, self.depth = units, depth
        self.stack = [nl.LSTM(units, return_sequences=True) for _ in range(depth)]
        self.head = nl.Dense(2)

    def call(self, x):
        for layer in self.stack:
            x = layer(x)
        return self.head(x)


def test_the_tensorflow_js_program():
    nl.set_seed(0)
    model = nl.Sequential()
    model.add(nl.layers.LSTM(16, input_shape=(1, 1)))
    model.add(nl.layers.Dense(1))
    model.compile(loss="meanSquaredError", optimizer="adam")
    x, y = np.array([[[1.0]], [[2.0]]]), np.array([[1.0], [2.0]])
    history = model.fit(x, y, epochs=300, verbose=0)
    assert history.history["loss"][-1] < history.history["loss"][0]
    assert 2 < model.predict(np.array([[[3.0]]]), verbose=0)[0, 0] < 3.5
    with pytest.raises(ValueError, match=r"rank 3, \(batch, time, features\)"):
        model.fit(
            np.array([[1.0], [2.0]]), y, verbose=0
        )  # the program's literal input, refused there as well
    with pytest.raises(ValueError, match=r"rank 3, \(batch, time, features\), got shape \(1, 1\)"):
        model(np.array([[3.0]]))


def test_the_keras_program():
    from numlstm.layers import LSTM, Dense
    from numlstm.models import Sequential

    timesteps, features = 6, 3
    model = Sequential()
    model.add(LSTM(50, input_shape=(timesteps, features)))
    model.add(Dense(1))
    model.compile(optimizer="adam", loss="mse")
    model.fit(X, X[:, -1, :1], epochs=2, verbose=0)
    assert model.predict(X, verbose=0).shape == (4, 1)
    assert [w.shape for w in model.get_weights()] == [(3, 200), (50, 200), (200,), (50, 1), (1,)]


def test_keras_module_names():
    modules = {
        "models",
        "layers",
        "optimizers",
        "losses",
        "metrics",
        "callbacks",
        "initializers",
        "regularizers",
    }
    assert modules <= set(dir(nl))
    assert nl.initializers.GlorotUniform and nl.regularizers.l2 and nl.constraints.max_norm
    assert nl.models.load_model


def test_every_exported_name_is_there():
    assert all(hasattr(nl, name) for name in nl.__all__) and len(set(nl.__all__)) == len(nl.__all__)
    assert callable(nl.explain) and callable(nl.cell)


def test_an_input_shape_builds_at_once():
    for model in (
        nl.Sequential([nl.LSTM(5, input_shape=(None, 3)), nl.Dense(2)]),
        nl.Sequential([nl.Input((6, 3)), nl.LSTM(5), nl.Dense(2)]),
        nl.Sequential([nl.Input(batch_shape=(4, 6, 3)), nl.LSTM(5), nl.Dense(2)]),
        nl.Sequential([nl.LSTM(5), nl.Dense(2)], input_shape=(None, 3)),
        nl.Sequential([nl.Sequential([nl.LSTM(5, input_shape=(None, 3))]), nl.Dense(2)]),
    ):
        assert model.built and len(model.weights) == 5
        assert model(X).shape == (4, 2)


def test_without_one_the_first_call_builds():
    model = nl.Sequential([nl.LSTM(5), nl.Dense(2)])
    assert not model.built and model.weights == []
    with pytest.raises(ValueError, match="rank 3"):
        model(X[0])
    model(X)  # a first call that failed does no harm
    assert model.built and model.build_shape == (None, 6, 3) and len(model.weights) == 5
    built = nl.Sequential([nl.LSTM(5), nl.Dense(2)])
    built.build((None, 6, 3))
    assert built.built and len(built.weights) == 5


def test_any_number_of_time_steps():
    model = nl.Sequential([nl.LSTM(5, input_shape=(6, 3))])
    assert model(X[:, :2]).shape == model(np.repeat(X, 2, 1)).shape == (4, 5)


def test_a_custom_layer_inside():
    class Half(nl.Layer):
        def call(self, x):
            return x * 0.5

    model = nl.Sequential([nl.LSTM(5, input_shape=(None, 3)), Half(), nl.Dense(2)])
    assert len(model.weights) == 3  # its output shape is not known before a call
    y = model(X)
    assert len(model.weights) == 5
    kernel, bias = model.get_weights()[3:]
    np.testing.assert_allclose(
        y.numpy(), 0.5 * model.layers[0](X).numpy() @ kernel + bias, rtol=1e-4, atol=1e-6
    )


def test_pop_and_add_again():
    model = nl.Sequential([nl.LSTM(5, input_shape=(None, 3)), nl.Dense(2)])
    last = model.pop()
    assert last.units == 2 and len(model.layers) == 1 and model(X).shape == (4, 5)
    model.add(nl.Dense(7))
    assert model.built and model(X).shape == (4, 7)
    model.pop(), model.pop()
    with pytest.raises(ValueError, match="pop from a model without layers"):
        model.pop()


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: nl.Sequential(nl.Dense(1)), "layers: expected a list of layers, got Dense"),
        (lambda: nl.Sequential([nl.Dense]), r"got the class Dense, expected a layer: Dense\(...\)"),
        (lambda: nl.Sequential([3]), "expected a layer, got 3"),
        (
            lambda: nl.Sequential([nl.Dense(1, name="a"), nl.Dense(1, name="a")]),
            "has a layer named 'a' already",
        ),
        (
            lambda: nl.Sequential([nl.LSTM(2, input_shape=(3,))]),
            r"expected inputs of rank 3.*got shape \(None, 3\)",
        ),
        (lambda: nl.Sequential([nl.LSTM(2, input_shape=(4, None))]), "known number of features"),
        (lambda: nl.Sequential([nl.LSTM(2, input_shape=(4, 3)), nl.LSTM(2)]), "expected inputs of rank 3"),
        (
            lambda: nl.Sequential([nl.LSTM(2, return_state=True, input_shape=(4, 3))]),
            "gives 3 results, but a Sequential",
        ),
        (lambda: nl.Sequential()(X), "has no layers"),
        (lambda: nl.Sequential([nl.Dense(1)], colour=1), "unknown option 'colour'"),
        (lambda: nl.Sequential([nl.Dense(1)]).get_layer("b"), "no layer 'b' in"),
        (lambda: nl.Sequential([nl.Dense(1)]).get_layer(index=4), "index"),
        (lambda: nl.Sequential([nl.Dense(1)]).get_layer(), "either name or index"),
    ],
)
def test_bad_models(make, message):
    with pytest.raises(ValueError, match=message):
        make()


def test_a_layer_that_does_not_fit_is_not_added():
    model = nl.Sequential([nl.LSTM(5, input_shape=(None, 3))])
    with pytest.raises(ValueError):
        model.add(nl.LSTM(5))
    assert len(model.layers) == 1 and model(X).shape == (4, 5)


def test_same_seed_same_weights():
    def weights():
        nl.set_seed(3)
        return nl.Sequential([nl.Embedding(9, 4), nl.LSTM(5), nl.Dense(2)], input_shape=(6,)).get_weights()

    assert all(np.array_equal(a, b) for a, b in zip(weights(), weights(), strict=True))


def test_subclassed():
    model = Tagger(5)
    assert model(X).shape == (4, 6, 2)
    assert list(model.named_weights()) == [
        f"stack.{k}/{w}" for k in (0, 1) for w in ("kernel", "recurrent_kernel", "bias")
    ] + ["head/kernel", "head/bias"]
    assert [type(x) for x in model.layers] == [nl.LSTM, nl.LSTM, nl.Dense]
    assert model.recurrent_layers() == model.stack
    assert model.get_layer(index=2) is model.head
    with GradientTape() as tape:
        loss = ops.square(model(X)).sum()
    assert all(np.abs(g).max() > 0 for g in tape.gradient(loss, model.trainable_weights))


def test_subclassed_trains():
    nl.set_seed(0)
    model = Tagger(8)
    model.compile(nl.optimizers.Adam(0.02), "mse")
    history = model.fit(X, X[..., :2], epochs=20, verbose=0)
    assert history.history["loss"][-1] < 0.9 * history.history["loss"][0]


def test_masks_reach_the_layers_of_a_subclass():
    model = Tagger(5)
    y = model(X, lengths=[6, 3, 1, 0])
    assert np.array_equal(y.mask, np.arange(6) < np.array([6, 3, 1, 0])[:, None])
    assert (y.numpy()[1, 3:] == y.numpy()[1, 2]).all()


def test_several_inputs():
    class Two(nl.Model):
        def __init__(self):
            super().__init__()
            self.merge, self.head = nl.Concatenate(), nl.Dense(1)

        def call(self, inputs):
            return self.head(self.merge(inputs))

    assert Two()([X, X[..., :1]]).shape == (4, 6, 1)


def test_encoder_and_decoder_hand_states_on():
    class Copy(nl.Model):
        def __init__(self):
            super().__init__()
            self.encoder = nl.LSTM(5, return_state=True)
            self.decoder = nl.LSTM(5, return_sequences=True)

        def call(self, x):
            _, *state = self.encoder(x)
            return self.decoder(x, initial_state=state)

    model = Copy()
    with GradientTape() as tape:
        loss = model(X).sum()
    assert all(np.abs(g).max() > 0 for g in tape.gradient(loss, model.encoder.trainable_weights))


def test_ids_stay_whole_on_their_way_to_an_embedding():
    model = nl.Sequential([nl.Input((None,)), nl.Embedding(2**25, 1, "zeros"), nl.LSTM(2)])
    assert model(np.array([[2**25 - 1, 0]])).shape == (1, 2)


def test_states_of_stateful_layers():
    model = nl.Sequential(
        [nl.LSTM(5, return_sequences=True, stateful=True, input_shape=(None, 3)), nl.Dense(2)]
    )
    whole = model(X).numpy()
    model.reset_states()
    first = model(X[:, :2]).numpy()
    np.testing.assert_allclose(
        np.concatenate([first, model(X[:, 2:]).numpy()], 1), whole, rtol=1e-5, atol=1e-6
    )
    model.reset_states(rows=[0])
    assert (model.layers[0].states[0][0] == 0).all() and (model.layers[0].states[0][1] != 0).any()
    model.reset_state(rows=[1])  # Keras 3's name
    assert (model.layers[0].states[0][1] == 0).all() and (model.layers[0].states[0][2] != 0).any()
    model.reset_state()
    assert model.layers[0].states is None


def test_carrying_states_for_a_while():
    model = nl.Sequential([nl.LSTM(5, return_sequences=True, input_shape=(None, 3))])
    whole = model(X).numpy()
    model.carry_states(True)
    pieces = [model(X[:, :4]).numpy(), model(X[:, 4:]).numpy()]
    np.testing.assert_allclose(np.concatenate(pieces, 1), whole, rtol=1e-5, atol=1e-6)
    model.carry_states(False)
    assert model.layers[0].states is None
    assert np.array_equal(model(X).numpy(), whole)


def test_a_deep_copy_is_a_model_of_its_own():
    model = nl.Sequential([nl.LSTM(5, input_shape=(None, 3)), nl.Dense(2)])
    y = model(X).numpy()
    twin = copy.deepcopy(model)
    model.set_weights([w * 0 for w in model.get_weights()])
    assert np.array_equal(twin(X).numpy(), y) and (model(X).numpy() == 0).all()


def test_summary():
    lines = []
    model = nl.Sequential(
        [nl.Embedding(10, 4, name="e"), nl.LSTM(5, name="l"), nl.Dense(2, name="d")], name="reader"
    )
    model.summary(print_fn=lines.append)
    assert "not built" in "\n".join(lines)
    model(np.zeros((2, 7), int))
    model.layers[0].trainable = False
    lines.clear()
    model.summary(print_fn=lines.append)
    text = "\n".join(lines)
    for words in ("e (Embedding) (any, 7, 4) 40", "l (LSTM) (any, 5) 200", "d (Dense) (any, 2) 12"):
        assert re.search(r"\s+".join(map(re.escape, words.split(" "))).replace(r",\s+", r",\s*"), text), words
    assert "Total: 252 (1008 B)" in text and "Trained: 212 (848 B). Fixed: 40 (160 B)." in text
    assert all(len(line) <= 80 for line in lines)


def test_summary_prints(capsys):
    nl.Sequential([nl.LSTM(50, input_shape=(10, 1))]).summary()
    assert "10,400 (40.62 KB)" in capsys.readouterr().out


def test_a_notebook_and_rich_show_the_same_table_escaped():
    model = nl.Sequential(
        [nl.LSTM(5, name="l[red]", input_shape=(None, 3)), nl.Dense(2, name="d")], name="<i>m"
    )
    page = model._repr_html_()
    assert "<i>m" not in page and "&lt;i&gt;m" in page
    for text in ("l[red] (LSTM)", "(any, 5)", "180", "d (Dense)", "12"):
        assert f">{text}<" in page
    assert "Total: 192 (768 B)" in page
    lines = []
    model.summary(print_fn=lines.append)
    assert any("l[red] (LSTM)" in line for line in lines)  # a name is no markup
