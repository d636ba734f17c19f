"""PyTorch side by side, for whoever has it (`make test-peers`): a hundred modules drawn at random go in and come back
with the same bits, and both compute the same; so do models of ours."""

from __future__ import annotations

import copy
import itertools

import numpy as np
import pytest

import numlstm as nl

pytestmark = [
    pytest.mark.peers,
    pytest.mark.filterwarnings("ignore:LSTM with projections is not supported with oneDNN"),
]
torch = pytest.importorskip("torch")
nn = torch.nn

ACTIVATIONS = [
    nn.ReLU, nn.ReLU6, nn.Tanh, nn.Sigmoid, nn.LogSigmoid, nn.SiLU, nn.SELU, nn.Mish, nn.Softsign, nn.Hardsigmoid, nn.GELU,
    nn.Softplus, nn.Hardtanh, lambda: nn.Softmax(-1), lambda: nn.LogSoftmax(-1), lambda: nn.ELU(0.7),
    lambda: nn.LeakyReLU(0.3), nn.Identity,
]  # fmt: skip


def random_module(seed: int) -> tuple[nn.Module, np.ndarray]:
    """A module that `from_torch` takes, and an input (batch, time, ...) for it."""
    draw = np.random.default_rng(seed)
    torch.manual_seed(seed)
    pick = lambda *choices: choices[draw.integers(len(choices))]
    batch, time, features = pick(1, 3), pick(1, 5, 9), int(draw.integers(1, 7))
    x = draw.standard_normal((batch, time, features)).astype(np.float32)
    parts: list[nn.Module] = []
    if seed % 3 == 0:
        x = draw.integers(0, 11, (batch, time))
        parts.append(nn.Embedding(11, features))
    for _ in range(pick(1, 1, 2)):
        kind = pick(nn.LSTM, nn.GRU, nn.RNN)
        layers = pick(1, 2, 3)
        options = {
            "num_layers": layers,
            "bias": pick(True, True, False),
            "batch_first": pick(True, False),
            "bidirectional": pick(False, True),
            "dropout": pick(0.0, 0.4) if layers > 1 else 0.0,
        }
        units = int(draw.integers(2, 10))
        if kind is nn.LSTM and pick(True, False):
            options["proj_size"] = int(draw.integers(1, units))
        if kind is nn.RNN:
            options["nonlinearity"] = pick("tanh", "relu")
        parts.append(kind(features, units, **options))
        features = (options.get("proj_size") or units) * (1 + options["bidirectional"])
        if pick(True, False):
            parts.append(nn.LayerNorm(features, elementwise_affine=pick(True, False), bias=pick(True, False)))
        if pick(True, False):
            parts.append(nn.Dropout(0.3))
    if pick(True, False):
        parts.append(nn.Linear(features, 3, bias=pick(True, False)))
        parts.append(pick(*ACTIVATIONS)())
    return (parts[0] if len(parts) == 1 else nn.Sequential(*parts)).eval(), x


def theirs(module: nn.Module, x: np.ndarray) -> np.ndarray:
    """What the module computes where a recurrent part's sequence feeds the next part, batch first."""
    y = torch.from_numpy(x)
    with torch.no_grad():
        for part in module if isinstance(module, nn.Sequential) else [module]:
            turned = isinstance(part, nn.RNNBase) and not part.batch_first
            y = part(y.transpose(0, 1) if turned else y)
            y = y[0] if isinstance(y, tuple) else y
            y = y.transpose(0, 1) if turned else y
    return y.numpy()


def close(a: np.ndarray, b: np.ndarray) -> bool:
    return a.shape == b.shape and float(np.abs(a - b).max()) <= 1e-5 * max(1.0, float(np.abs(b).max()))


def same_bits(a: nn.Module, b: nn.Module) -> bool:
    pairs = list(itertools.zip_longest(a.state_dict().values(), b.state_dict().values()))
    return all(p.numpy().tobytes() == q.numpy().tobytes() for p, q in pairs)


@pytest.mark.parametrize("seed", range(100))
def test_a_random_module_goes_in_and_comes_back(seed, tmp_path):
    module, x = random_module(seed)
    model = nl.io.from_torch(module)
    expected = theirs(module, x)
    assert close(model(x).numpy(), expected)
    made = nl.io.to_torch(model)
    assert same_bits(module, made)
    assert close(made(torch.from_numpy(x)).detach().numpy(), expected)
    blank = copy.deepcopy(module)
    for p in blank.parameters():
        torch.nn.init.zeros_(p)
    assert nl.io.to_torch(model, blank) is blank
    assert same_bits(module, blank)
    model.save(tmp_path / "m.safetensors")  # the way through a file of ours keeps every bit too
    again = nl.io.from_torch(nl.io.to_torch(nl.load(tmp_path / "m.safetensors")))
    assert all((a == b).all() for a, b in zip(model.get_weights(), again.get_weights(), strict=True))


OURS = {
    "plain": lambda: [nl.LSTM(5), nl.Dense(2, activation="softmax")],
    "backwards": lambda: [
        nl.GRU(5, go_backwards=True, return_sequences=True),
        nl.Dense(3, activation="relu"),
    ],
    "last of both": lambda: [nl.Bidirectional(nl.LSTM(4, projection=2), "sum"), nl.Dropout(0.5)],
    "second first": lambda: [
        nl.Bidirectional(nl.SimpleRNN(3, go_backwards=True), "ave", backward_layer=nl.SimpleRNN(3))
    ],
    "product": lambda: [nl.Bidirectional(nl.GRU(3, return_sequences=True), "mul"), nl.LayerNormalization()],
    "gain alone": lambda: [
        nl.SimpleRNN(4, activation="relu", use_bias=False),
        nl.LayerNormalization(center=False),
    ],
    "steps": lambda: [nl.TimeDistributed(nl.Dense(3, activation="elu")), nl.Flatten(), nl.Activation("tanh")],
    "double": lambda: [nl.LSTM(4, dtype="float64"), nl.Dense(2, dtype="float64")],
}


@pytest.mark.parametrize("name", OURS)
def test_a_model_of_ours_goes_out_and_comes_back(name):
    layers = OURS[name]()
    model = nl.Sequential([nl.Input((6, 3)), *layers])
    draw = np.random.default_rng(1)
    model.set_weights([draw.standard_normal(w.shape) * 0.5 for w in model.get_weights()])
    x = draw.standard_normal((2, 6, 3)).astype(model.weights[0].dtype)
    module = nl.io.to_torch(model)
    assert close(module(torch.from_numpy(x)).detach().numpy(), model(x).numpy())
    again = nl.io.from_torch(module)
    assert close(again(x).numpy(), model(x).numpy())
    assert all(
        a.tobytes() == b.tobytes() for a, b in zip(model.get_weights(), again.get_weights(), strict=True)
    )


def test_a_bias_that_is_one_keeps_its_signed_zeros():
    model = nl.Sequential([nl.LSTM(1, input_shape=(None, 1))])
    weights = model.get_weights()
    weights[2][:] = [-0.0, 0.0, 1.5, -0.0]
    model.set_weights(weights)
    again = nl.io.from_torch(nl.io.to_torch(model))
    assert again.get_weights()[2].tobytes() == weights[2].tobytes()


def test_both_biases_learn_as_in_pytorch():
    """A step of gradient descent on an imported LSTM is the step that PyTorch takes."""
    module = nn.LSTM(3, 4, batch_first=True)
    x, y = (
        np.random.default_rng(k).standard_normal((2, 5, n)).astype(np.float32) for k, n in ((0, 3), (1, 4))
    )
    model = nl.io.from_torch(module)
    model.compile(optimizer=nl.optimizers.SGD(0.1), loss="mse")
    model.train_on_batch(x, y)
    ((module(torch.from_numpy(x))[0] - torch.from_numpy(y)) ** 2).mean().backward()
    with torch.no_grad():
        for p in module.parameters():
            p -= 0.1 * p.grad
    for a, b in zip(nl.io.to_torch(model).parameters(), module.parameters(), strict=True):
        assert torch.allclose(a, b, atol=1e-6)


def test_frozen_parts_stay_frozen():
    module = nn.Sequential(nn.Embedding(5, 3), nn.GRU(3, 2))
    module[0].weight.requires_grad_(False)
    model = nl.io.from_torch(module)
    assert [layer.trainable for layer in model.layers] == [False, True]
    assert [p.requires_grad for p in nl.io.to_torch(model).parameters()] == [False] + 4 * [True]


def test_half_precision_becomes_single():
    module = nn.GRU(3, 2).bfloat16()
    model = nl.io.from_torch(module)
    assert (model.get_weights()[0] == module.weight_ih_l0.detach().float().numpy().T).all()
    assert model.layers[0].dtype == "float32"


def test_the_last_output_alone():
    module = nn.LSTM(3, 4, bidirectional=True, batch_first=True)
    x = np.random.default_rng(0).standard_normal((2, 5, 3)).astype(np.float32)
    _, (h, _) = module(torch.from_numpy(x))
    ours = nl.io.from_torch(module, return_sequences=False)(x).numpy()
    assert close(ours, torch.cat([h[0], h[1]], -1).detach().numpy())


class Tagger(nn.Module):
    def __init__(self, tags: int = 5) -> None:
        super().__init__()
        self.embed = nn.Embedding(11, 4)
        self.lstm = nn.LSTM(4, 3, num_layers=2, bidirectional=True, batch_first=True)
        self.norm = nn.LayerNorm(6)
        self.tag = nn.Linear(6, tags)

    def forward(self, ids):
        return self.tag(self.norm(self.lstm(self.embed(ids))[0]))


@pytest.mark.parametrize("ending", ["pt", "safetensors"])
def test_a_state_dict_from_a_file(ending, tmp_path):
    import safetensors.torch

    module, path = Tagger(), tmp_path / f"m.{ending}"
    state = module.state_dict()
    torch.save(state, path) if ending == "pt" else safetensors.torch.save_file(state, path)
    model = nl.io.load_torch(path)
    ids = np.random.default_rng(0).integers(0, 11, (2, 7))
    assert close(model(ids).numpy(), module(torch.from_numpy(ids)).detach().numpy())
    twin = Tagger()
    nl.io.to_torch(model, twin)
    assert same_bits(module, twin)


def test_what_a_file_holds_beside_tensors(tmp_path):
    path = tmp_path / "c.pt"
    tensors = {
        "turned": torch.arange(6.0).reshape(2, 3).T, "half": torch.ones(2).half(), "ids": torch.tensor([3, 4]),
        "truth": torch.tensor([True, False]), "bfloat": torch.tensor([1.5, -2.0]).bfloat16(), "scalar": torch.tensor(2.0),
        "parameter": nn.Parameter(torch.zeros(1, 2)), "part": torch.arange(10.0)[3:7:2], "double": torch.ones(1).double(),
    }  # fmt: skip
    torch.save(
        {"model": tensors, "epoch": 3, "rates": [0.1, 0.2], "name": "x", "size": (1, None, True)}, path
    )
    from numlstm.io.torch_file import read_torch_file

    held = read_torch_file(path)
    assert {k: v for k, v in held.items() if k != "model"} == {
        "epoch": 3, "rates": [0.1, 0.2], "name": "x", "size": (1, None, True)
    }  # fmt: skip
    for name, tensor in tensors.items():
        found = held["model"][name]
        assert found.shape == tuple(tensor.shape)
        assert (found == tensor.detach().to(torch.float64).numpy()).all(), name
    for protocol in (2, 3, 4):
        torch.save({"w": torch.ones(3)}, path, pickle_protocol=protocol)
        assert nl.io.torch_state_dict(path)["w"].tolist() == [1, 1, 1]


class Planted:
    """What unpickling would run."""

    def __reduce__(self):
        return (exec, ("raise SystemExit('unpickled')",))


@pytest.mark.parametrize("thing", [nn.Linear(2, 2), {"w": Planted()}, {"w": np.ones(2)}, {"f": exec}])
def test_other_objects_are_refused_and_not_run(thing, tmp_path):
    torch.save(thing, tmp_path / "x.pt")
    with pytest.raises(ValueError, match=r"is not read: expected tensors|expected a state_dict"):
        nl.io.torch_state_dict(tmp_path / "x.pt")


def test_modules_that_have_no_counterpart():
    cases = [
        (nn.Sequential(nn.Linear(2, 2), nn.Conv1d(2, 2, 1)), "Conv1d at 1"),
        (Tagger(), "Tagger: expected an nn.LSTM"),
        (nn.Embedding(3, 2, max_norm=1.0), "Embedding: max_norm: expected None, got 1.0"),
        (nn.Softmax(1), "Softmax: dim: expected -1, got 1"),
        (nn.Dropout(1.0), "Dropout: p: expected less than 1"),
        (nn.LSTMCell(2, 2), "LSTMCell: expected"),
        ("lstm", "module: expected an nn.Module, got str"),
    ]
    for module, message in cases:
        with pytest.raises(ValueError, match=message):
            nl.io.from_torch(module)


REFUSED = {
    "peephole": lambda: nl.LSTM(3, peephole=True),
    "coupled": lambda: nl.LSTM(3, coupled=True),
    "layer_norm": lambda: nl.GRU(3, layer_norm=True),
    "cell_clip": lambda: nl.LSTM(3, cell_clip=1.0),
    "clip": lambda: nl.GRU(3, clip=1.0),
    "zoneout": lambda: nl.LSTM(3, zoneout=[0.1, 0.2]),
    "dropout": lambda: nl.LSTM(3, dropout=0.1),
    "recurrent_dropout": lambda: nl.LSTM(3, recurrent_dropout=0.1),
    "recurrent_dropconnect": lambda: nl.LSTM(3, recurrent_dropconnect=0.1),
    "activation": lambda: nl.LSTM(3, activation="relu"),
    "recurrent_activation": lambda: nl.GRU(3, recurrent_activation="hard_sigmoid"),
    "output_activation": lambda: nl.LSTM(3, output_activation="linear"),
    "reset_after": lambda: nl.GRU(3, reset_after=False),
    "stateful": lambda: nl.LSTM(3, stateful=True),
    "zero_output_for_mask": lambda: nl.LSTM(3, zero_output_for_mask=True),
    "IndRNN": lambda: nl.IndRNN(3),
    "SLSTM": lambda: nl.SLSTM(3),
    "Masking": lambda: nl.Masking(),
    "GlobalMaxPooling1D": lambda: nl.GlobalMaxPooling1D(),
    "noise_shape": lambda: nl.Dropout(0.1, noise_shape=(None, 1, None)),
    "'exponential'": lambda: nl.Dense(2, activation="exponential"),
    "scale": lambda: nl.LayerNormalization(scale=False),
}


@pytest.mark.parametrize("named", REFUSED)
def test_what_pytorch_has_not_got_is_refused_by_its_name(named):
    model = nl.Sequential([nl.Input((4, 2)), REFUSED[named]()])
    with pytest.raises(ValueError, match=rf"{named}.*no counterpart"):
        nl.io.to_torch(model)


def test_a_module_that_does_not_fit_is_left_as_it_is():
    model = nl.Sequential([nl.LSTM(3, input_shape=(None, 2)), nl.Dense(1)])
    cases = [
        (nn.LSTM(2, 3), "expected 2 layers with weights"),
        (nn.Sequential(nn.LSTM(2, 3), nn.Linear(3, 2)), "expected Linear with"),
        (nn.Sequential(nn.GRU(2, 3), nn.Linear(3, 1)), "expected LSTM with .* got GRU"),
        (
            nn.Sequential(nn.LSTM(2, 3), nn.Linear(3, 1), nn.BatchNorm1d(1)),
            "a parameter of no layer that is known",
        ),
    ]
    for module, message in cases:
        before = copy.deepcopy(module)
        with pytest.raises(ValueError, match=message):
            nl.io.to_torch(model, module)
        assert same_bits(before, module)
