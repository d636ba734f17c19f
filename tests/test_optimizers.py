"""Optimizers: Keras' recorded numbers, formulas written out again in float64, and PyTorch's where it has the
same."""

import copy
import json

import numpy as np
import pytest

from numlstm import optimizers
from numlstm.autograd import RowGradient, Variable
from numlstm.backend import use_backend
from numlstm.constraints import NonNeg
from numlstm.schedules import ExponentialDecay


def run(optimizer, gradients, start, dtype=np.float32):
    """The values after each step."""
    w = Variable(np.array(start, dtype))
    seen = []
    for g in gradients:
        optimizer.apply([np.array(g, dtype)], [w])
        seen.append(w.numpy().copy())
    return np.array(seen)


# Keras' own tests: one step of [1, 6, 7, 2] from [1, 2, 3, 4], then ramps
@pytest.mark.parametrize(
    "optimizer, expected",
    [
        (optimizers.SGD(0.5), [0.5, -1.0, -0.5, 3.0]),
        (optimizers.RMSprop(0.5), [-0.5811, 0.4189, 1.4189, 2.4189]),
        (optimizers.Adam(0.5), [0.5, 1.5, 2.5, 3.5]),
        (optimizers.AdamW(0.5), [0.4980, 1.4960, 2.494, 3.492]),
    ],
)
def test_first_step_is_keras(optimizer, expected):
    got = run(optimizer, [[1.0, 6.0, 7.0, 2.0]], [1.0, 2.0, 3.0, 4.0])[0]
    np.testing.assert_allclose(got, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    "optimizer, expected",
    [
        (optimizers.RMSprop(centered=True), [0.9967, 0.9933, 0.9908, 0.9885, 0.9864]),
        (optimizers.Adam(amsgrad=True), [0.999, 0.9982, 0.9974, 0.9965, 0.9955]),
        (optimizers.SGD(nesterov=True), [0.9999, 0.9989, 0.9979, 0.9969, 0.9959]),
        (optimizers.AdamW(1.0, weight_decay=0.5, epsilon=2), [0.4998, 0.2486, 0.1223, 0.0586, 0.0263]),
    ],
)
def test_five_steps_are_keras(optimizer, expected):
    got = run(optimizer, [[0.01]] + [[0.1]] * 4, [1.0])
    np.testing.assert_allclose(got[:, 0], expected, atol=5e-4)


def formula(kind, gradients, w, *, lr=0.05, decay=0.0, **o):
    """Keras' formulas in float64, one line each."""
    m = v = a = largest = 0.0
    for t, g in enumerate(gradients, 1):
        w = w - lr * decay * w
        if kind == "sgd":
            m = o["momentum"] * m - lr * g
            w = w + (o["momentum"] * m - lr * g if o["nesterov"] else m)
        elif kind == "rmsprop":
            v = o["rho"] * v + (1 - o["rho"]) * g**2
            a = o["rho"] * a + (1 - o["rho"]) * g
            step = lr * g / np.sqrt(v - (a**2 if o["centered"] else 0) + o["epsilon"])
            m = o["momentum"] * m + step
            w = w - (m if o["momentum"] else step)
        else:
            m = o["beta_1"] * m + (1 - o["beta_1"]) * g
            v = o["beta_2"] * v + (1 - o["beta_2"]) * g**2
            largest = np.maximum(largest, v)
            root = np.sqrt(largest if o["amsgrad"] else v) + o["epsilon"]
            w = w - lr * np.sqrt(1 - o["beta_2"] ** t) / (1 - o["beta_1"] ** t) * m / root
    return w


CASES = [
    ("sgd", optimizers.SGD, {"momentum": 0.0, "nesterov": False}),
    ("sgd", optimizers.SGD, {"momentum": 0.9, "nesterov": False}),
    ("sgd", optimizers.SGD, {"momentum": 0.8, "nesterov": True}),
    ("rmsprop", optimizers.RMSprop, {"rho": 0.9, "momentum": 0.0, "centered": False, "epsilon": 1e-3}),
    ("rmsprop", optimizers.RMSprop, {"rho": 0.8, "momentum": 0.5, "centered": False, "epsilon": 1e-7}),
    ("rmsprop", optimizers.RMSprop, {"rho": 0.9, "momentum": 0.5, "centered": True, "epsilon": 1e-3}),
    ("adam", optimizers.Adam, {"beta_1": 0.9, "beta_2": 0.999, "epsilon": 1e-7, "amsgrad": False}),
    ("adam", optimizers.Adam, {"beta_1": 0.5, "beta_2": 0.9, "epsilon": 1e-2, "amsgrad": True}),
]


@pytest.mark.parametrize("kind, cls, options", CASES)
@pytest.mark.parametrize("decay", [0.0, 0.1])
@pytest.mark.parametrize("dtype, tolerance", [(np.float32, 2e-6), (np.float64, 1e-13)])
def test_twelve_steps_follow_the_formula(kind, cls, options, decay, dtype, tolerance):
    rng = np.random.default_rng(3)
    gradients, start = rng.normal(size=(12, 37)).astype(dtype), rng.normal(size=37).astype(dtype)
    expected = formula(kind, gradients.astype(np.float64), start.astype(np.float64), decay=decay, **options)
    for backend in ("cpu", "reference"):
        with use_backend(backend):
            got = run(cls(0.05, weight_decay=decay or None, **options), gradients, start, dtype)[-1]
        np.testing.assert_allclose(got, expected, rtol=tolerance, atol=tolerance)


@pytest.mark.peers
@pytest.mark.parametrize(
    "make_ours, make_theirs",
    [
        (lambda: optimizers.SGD(0.05), lambda t, p: t.optim.SGD(p, 0.05)),
        (lambda: optimizers.SGD(0.05, 0.9), lambda t, p: t.optim.SGD(p, 0.05, 0.9)),
        (lambda: optimizers.SGD(0.05, 0.9, True), lambda t, p: t.optim.SGD(p, 0.05, 0.9, nesterov=True)),
        # PyTorch adds epsilon after the correction of the root (Adam) or outside of it (RMSprop): next to
        # none here.
        (lambda: optimizers.Adam(0.05, epsilon=1e-12), lambda t, p: t.optim.Adam(p, 0.05, eps=1e-12)),
        (
            lambda: optimizers.AdamW(0.05, 0.1, epsilon=1e-12),
            lambda t, p: t.optim.AdamW(p, 0.05, eps=1e-12, weight_decay=0.1),
        ),
        (
            lambda: optimizers.RMSprop(0.05, 0.9, 0.5, epsilon=1e-20),
            lambda t, p: t.optim.RMSprop(p, 0.05, 0.9, eps=1e-10, momentum=0.5),
        ),
    ],
)
def test_agrees_with_pytorch(make_ours, make_theirs):
    torch = pytest.importorskip("torch")
    rng = np.random.default_rng(0)
    start, gradients = rng.normal(size=50), rng.normal(size=(20, 50))
    ours = run(make_ours(), gradients, start, np.float64)[-1]
    p = torch.nn.Parameter(torch.tensor(start))
    optimizer = make_theirs(torch, [p])
    for g in gradients:
        p.grad = torch.tensor(g)
        optimizer.step()
    np.testing.assert_allclose(ours, p.detach().numpy(), rtol=1e-7, atol=1e-9)


ADAM_TORCH = [0.9, 0.936610352704, 0.950279419009]
SGD_TORCH = [0.81, 1.109, 1.1031]


def test_recorded_pytorch_numbers():
    # torch 2.13, float64: Adam(lr=0.1, eps=1e-12) and SGD(lr=0.1, momentum=0.9, nesterov=True), gradients 1,
    # -2, 0.5
    gradients = [[1.0], [-2.0], [0.5]]
    adam = run(optimizers.Adam(0.1, epsilon=1e-12), gradients, [1.0], np.float64)[:, 0]
    np.testing.assert_allclose(adam, ADAM_TORCH, rtol=1e-8)
    sgd = run(optimizers.SGD(0.1, 0.9, True), gradients, [1.0], np.float64)[:, 0]
    np.testing.assert_allclose(sgd, SGD_TORCH, rtol=1e-12)


def test_weight_decay_can_spare_variables():
    for exclude in ({"var_names": ["bias"]}, {"var_list": "second"}):
        kernel, bias = Variable(np.array([2.0]), name="kernel"), Variable(np.array([2.0]), name="bias")
        optimizer = optimizers.SGD(1.0, weight_decay=0.004)
        optimizer.exclude_from_weight_decay(**({"var_list": [bias]} if "var_list" in exclude else exclude))
        optimizer.apply([np.zeros(1), np.zeros(1)], [kernel, bias])
        assert float(kernel) == pytest.approx(1.992)
        assert float(bias) == 2.0


def test_clipping():
    def after(gradients, **options):
        variables = [Variable(np.zeros_like(g)) for g in gradients]
        optimizers.SGD(1.0, **options).apply([g.copy() for g in gradients], variables)
        return [-v.numpy() for v in variables]

    big = [np.array([100.0, 100.0], np.float32)]
    np.testing.assert_allclose(after(big, clipnorm=1.0)[0], [2**0.5 / 2] * 2, rtol=1e-6)
    np.testing.assert_allclose(after(big, clipvalue=1.0)[0], [1.0, 1.0])
    two = [np.array([3.0], np.float32), np.array([4.0], np.float32)]
    np.testing.assert_allclose(np.concatenate(after(two, global_clipnorm=1.0)), [0.6, 0.8], rtol=1e-6)
    np.testing.assert_allclose(np.concatenate(after(two, global_clipnorm=5.1)), [3.0, 4.0])
    # A gradient whose square leaves float32 is clipped, not lost.
    huge = after([np.array([3e30, 4e30], np.float32)], clipnorm=1.0)[0]
    np.testing.assert_allclose(huge, [0.6, 0.8], rtol=1e-5)


def test_learning_rate_may_be_a_schedule_or_set_by_hand():
    optimizer = optimizers.SGD(ExponentialDecay(1.0, 1, 0.5))
    np.testing.assert_allclose(run(optimizer, [[1.0]] * 3, [0.0])[:, 0], [-1.0, -1.5, -1.75])
    assert optimizer.iterations == 3
    with pytest.raises(ValueError, match="follows the schedule ExponentialDecay"):
        optimizer.learning_rate = 0.1
    plain = optimizers.SGD(0.1)
    plain.learning_rate = 0.25
    assert plain.learning_rate == 0.25


@pytest.mark.parametrize(
    "make",
    [
        lambda: optimizers.SGD(0.1, 0.9),
        lambda: optimizers.RMSprop(0.1, momentum=0.5, centered=True),
        lambda: optimizers.Adam(0.1, amsgrad=True),
        lambda: optimizers.AdamW(ExponentialDecay(0.1, 3, 0.5)),
    ],
)
@pytest.mark.parametrize("seen_before", [False, True])
def test_state_taken_over_goes_on_in_the_same_bits(make, seen_before):
    rng = np.random.default_rng(1)
    gradients, start = rng.normal(size=(8, 5)).astype(np.float32), np.ones(5, np.float32)
    whole = run(make(), gradients, start)[-1]
    first, second, w = make(), make(), Variable(start)
    for g in gradients[:4]:
        first.apply([g], [w])
    if seen_before:  # the second optimizer has slots already, which must be overwritten
        second.apply([gradients[0]], [Variable(start)])
        second._variables, second._place = [w], {id(w): 0}
    state = first.state_dict()
    json.dumps({k: v for k, v in state.items() if k != "slots"})
    second.load_state_dict(state)
    for g in gradients[4:]:
        second.apply([g], [w])
    np.testing.assert_array_equal(w.numpy(), whole)


def test_state_of_another_optimizer_is_refused():
    adam, w = optimizers.Adam(), Variable(np.ones(2))
    adam.apply([np.ones(2)], [w])
    with pytest.raises(ValueError, match="saved by another optimizer"):
        optimizers.SGD().load_state_dict(adam.state_dict())
    other = optimizers.Adam()
    other.load_state_dict(adam.state_dict())
    with pytest.raises(ValueError, match="has shape"):
        other.apply([np.ones(3)], [Variable(np.ones(3))])


def test_variables_may_come_and_go():
    a, b = Variable(np.ones(2)), Variable(np.ones(3))
    optimizer = optimizers.Adam(0.1)
    optimizer.apply([np.ones(2)], [a])
    optimizer.apply([np.ones(3), np.ones(2)], [b, a])
    optimizer.apply([None, np.ones(2)], [b, a])
    assert set(optimizer.state_dict()["slots"]) == {"0.m", "0.v", "1.m", "1.v"}
    assert b.numpy()[0] == pytest.approx(0.9, abs=0.05)


def test_constraints_are_applied_after_the_update():
    w = Variable(np.array([0.1, 5.0]), constraint=NonNeg())
    optimizers.SGD(1.0).apply([np.ones(2)], [w])
    assert w.numpy().tolist() == [0.0, 4.0]


def test_saved_form_comes_back():
    for original in (
        optimizers.SGD(0.5, 0.06, True, weight_decay=0.004),
        optimizers.RMSprop(0.5, 0.8, 0.05, 1e-6, True, clipnorm=1.0),
        optimizers.Adam(0.5, 0.5, 0.67, 1e-5, True, global_clipnorm=2.0),
        optimizers.AdamW(ExponentialDecay(0.1, 3, 0.5), 0.008),
    ):
        saved = json.loads(json.dumps(optimizers.serialize(original)))
        again = optimizers.deserialize(saved)
        assert type(again) is type(original)
        assert again.get_config() == original.get_config()


def test_names_in_every_spelling():
    for name, cls in [
        ("sgd", "SGD"),
        ("RMSprop", "RMSprop"),
        ("rmsprop", "RMSprop"),
        ("adamW", "AdamW"),
        ("Adam", "Adam"),
    ]:
        assert type(optimizers.get(name)).__name__ == cls
    assert isinstance(optimizers.get(optimizers.Adam), optimizers.Adam)


@pytest.mark.parametrize(
    "build, words",
    [
        (lambda: optimizers.get("adm"), "unknown optimizer 'adm'.*did you mean 'Adam'"),
        (lambda: optimizers.get(3), "optimizer: got 3"),
        (lambda: optimizers.SGD(-0.1), "learning_rate: expected a finite number >= 0, got -0.1"),
        (lambda: optimizers.SGD(float("nan")), "learning_rate"),
        (lambda: optimizers.SGD(momentum=2.0), r"momentum: expected a number in \[0, 1\], got 2.0"),
        (lambda: optimizers.Adam(beta_1=1.0), r"beta_1: expected a number in \[0, 1\), got 1.0"),
        (lambda: optimizers.Adam(epsilon=0), "epsilon: expected a number > 0, got 0"),
        (lambda: optimizers.Adam(clipnorm=1.0, clipvalue=1.0), "at most one of"),
        (lambda: optimizers.AdamW(weight_decay=None), "weight_decay: AdamW needs"),
        (
            lambda: optimizers.SGD().apply([np.ones(2)], [Variable(np.ones(3))]),
            r"shape \(2,\) came for 'variable'",
        ),
        (lambda: optimizers.SGD().apply([], [Variable(np.ones(3))]), "got 0 for 1 variables"),
    ],
)
def test_errors_name_what_is_wrong(build, words):
    with pytest.raises(ValueError, match=words):
        build()


@pytest.mark.parametrize("clip", [{}, {"clipvalue": 0.2}, {"clipnorm": 0.5}, {"global_clipnorm": 0.5}])
@pytest.mark.parametrize(
    "make",
    [
        lambda **o: optimizers.SGD(0.1, **o),
        lambda **o: optimizers.SGD(0.1, momentum=0.9, weight_decay=0.1, **o),
        lambda **o: optimizers.RMSprop(0.1, centered=True, **o),
        lambda **o: optimizers.Adam(0.1, amsgrad=True, **o),
        lambda **o: optimizers.AdamW(0.1, **o),
    ],
)
@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_a_gradient_of_rows_is_the_whole_gradient_with_its_zeros(make, clip, dtype):
    """Also for the rows that no step of late has taken: their running means decay and move them on. To the bit but for a
    norm, whose sum goes in another order."""
    found = []
    for whole in (False, True):
        rng, optimizer = np.random.default_rng(0), make(**clip)
        w, bias = Variable(rng.normal(size=(7, 5)), dtype=dtype), Variable(np.ones(3), dtype=dtype)
        for k in range(4):
            index = np.full(7, -1)
            index[[k, 6 - k % 2]] = [1, 0]
            g = RowGradient(index, rng.normal(size=(2, 5)).astype(dtype))
            optimizer.apply([g.dense() if whole else g, np.ones(3, dtype)], [w, bias])
        found.append([w.numpy(), bias.numpy(), *optimizer.state_dict()["slots"].values()])
    for a, b in zip(*found, strict=True):
        np.testing.assert_allclose(
            a, b, rtol=1e-6 if "norm" in str(clip) else 0, atol=1e-7 if "norm" in str(clip) else 0
        )


def test_sgd_leaves_the_rows_that_nobody_took():
    w = Variable(np.ones((4, 2)))
    optimizers.SGD(0.5).apply([RowGradient(np.array([-1, 0, -1, -1]), np.ones((1, 2), np.float32))], [w])
    assert w.numpy().tolist() == [[1, 1], [0.5, 0.5], [1, 1], [1, 1]]


def test_a_formula_of_ones_own():
    class Sign(optimizers.Optimizer):
        slot_names = ("steps",)

        def _update(self, backend, gradients, rate, decay):
            for g, (_, array, (steps,), _) in zip(gradients, self._plan, strict=True):
                steps += 1
                array -= rate * np.sign(g)

    w = Variable([1.0, 2.0])
    optimizer = Sign(learning_rate=0.5)
    for _ in range(2):
        optimizer.apply([np.array([3.0, -1.0], np.float32)], [w])
    assert w.numpy().tolist() == [0, 3] and optimizer.state_dict()["slots"]["0.steps"].tolist() == [2, 2]


def test_a_variable_may_change_its_array():
    """As `cast` does, between two steps."""
    w = Variable([1.0, 2.0])
    optimizer = optimizers.SGD(0.5, momentum=0.5)
    optimizer.apply([np.ones(2, np.float32)], [w])
    w.data = w.data.astype(np.float64)
    optimizer.apply([np.ones(2)], [w])
    assert w.numpy().dtype == np.float64 and w.numpy().tolist() == [-0.25, 0.75]


def test_a_copy_trains_its_own_variables():
    w, optimizer = Variable([1.0, 2.0]), optimizers.Adam(0.5)
    g = np.ones(2, np.float32)
    optimizer.apply([g], [w])
    before = w.numpy().copy()
    v, other = copy.deepcopy((w, optimizer))
    other.apply([g], [v])
    assert w.numpy().tolist() == before.tolist() != v.numpy().tolist()
    optimizer.apply([g], [w])
    assert w.numpy().tolist() == v.numpy().tolist()
