"""The tape itself: what it records, how gradients meet, what it frees, and what it refuses."""

import copy
import gc
import pickle
import threading
import weakref

import numpy as np
import pytest

from numlstm import ops
from numlstm.autograd import (
    GradientTape,
    RowGradient,
    Tensor,
    Variable,
    apply,
    apply_joint,
    is_recording,
    latest_change,
    needs_gradient,
)


def gradient(f, *values, **kwargs):
    variables = [Variable(np.asarray(v, np.float64)) for v in values]
    with GradientTape() as tape:
        loss = f(*variables)
    return tape.gradient(loss, variables, **kwargs)


# Tensors


def test_arrays_keep_their_dtype_and_python_numbers_become_float32():
    assert Tensor(np.zeros(2)).dtype == np.float64
    assert Tensor([1.0, 2.0]).dtype == np.float32
    assert Tensor(1.5).dtype == np.float32
    assert Tensor([1, 2]).dtype.kind == "i"
    assert Tensor([True, False]).dtype == bool
    assert Tensor([1.0], dtype=np.float64).dtype == np.float64
    assert Tensor([np.float64(1)]).dtype == np.float64  # brings a dtype of its own


def test_a_tensor_of_a_tensor_shares_its_array():
    t = Tensor(np.zeros(3))
    assert Tensor(t).data is t.data


@pytest.mark.parametrize("bad", [["a"], [None], np.array([1j]), np.array([object()])])
def test_what_is_no_real_number_is_refused(bad):
    with pytest.raises(ValueError, match="real numbers"):
        Tensor(bad)


@pytest.mark.parametrize("number", [2, 2.0, np.float64(2), np.float32(2), np.int64(2)])
def test_a_plain_number_does_not_change_the_dtype(number):
    t = Tensor(np.ones(3, np.float32))
    for result in (
        t + number,
        number + t,
        t * number,
        number * t,
        t - number,
        number - t,
        t / number,
        number / t,
    ):
        assert result.dtype == np.float32
    assert (t**number).dtype == np.float32


def test_integers_become_the_floats_they_meet():
    ids = Tensor(np.arange(3))
    assert (ids * 0.5).dtype == np.float32
    assert (ids * Tensor(np.ones(3, np.float32))).dtype == np.float32
    assert (ids / 2).dtype == np.float32
    assert (ids + 1).dtype == ids.dtype


def test_what_python_asks_of_a_tensor():
    t = Tensor([[1.0, 2.0], [3.0, 4.0]])
    assert (t.shape, t.ndim, t.size, len(t)) == ((2, 2), 2, 4, 2)
    assert float(t.sum()) == 10.0 and int(t[1, 1]) == 4 and t[0, 0].item() == 1.0
    assert bool(Tensor(1.0)) and not bool(Tensor(0.0))
    assert [row.shape for row in t] == [(2,), (2,)]
    assert t.T.data[0, 1] == 3.0
    assert repr(Tensor([1.0])) == "Tensor([1.], dtype=float32)"
    assert repr(Variable([1.0], name="w")) == "Variable([1.], dtype=float32, name='w')"
    assert +t is t
    np.testing.assert_array_equal(np.asarray(t), t.data)
    np.testing.assert_array_equal(abs(-t), t)
    assert np.asarray(t, np.float64).dtype == np.float64
    assert not np.shares_memory(np.array(t), t.data)


def test_comparisons_are_plain_boolean_arrays():
    t = Tensor([1.0, 2.0, 3.0])
    for result in (t < 2, t <= 2, t > 2, t >= 2, t == 2, t != 2, t < 2, np.array(2.0) > t, t == Tensor(t)):
        assert type(result) is np.ndarray and result.dtype == bool
    assert (t == 2).tolist() == [False, True, False]
    assert len({t, t}) == 1  # hashed by identity


def test_numpy_functions_of_a_tensor_stay_on_the_tape():
    (g,) = gradient(lambda x: (np.exp(x) * np.array([1.0, 2.0])).sum(), [0.0, 1.0])
    np.testing.assert_allclose(g, np.exp([0.0, 1.0]) * [1, 2])
    (g,) = gradient(lambda x: (np.array([1.0, 2.0]) - x).sum(), [0.0, 1.0])
    np.testing.assert_array_equal(g, [-1, -1])


def test_numpy_functions_that_would_leave_the_tape_are_refused():
    for call in (lambda t: np.arctan(t), lambda t: np.add.reduce(t), lambda t: np.exp(t, out=np.zeros(2))):
        with pytest.raises(TypeError, match=r"does not know Tensors.*np.asarray"):
            call(Tensor([1.0, 2.0]))


def test_other_numpy_functions_take_the_values_where_no_tape_can_miss_it():
    t = Tensor([1.0, 2.0])
    for result in (
        np.concatenate([t, t]),
        np.mean(t, axis=0),
        np.stack((t, np.ones(2))),
        np.where([True, False], t, 0),
    ):
        assert type(result) in (np.ndarray, np.float32)
    assert np.allclose(t, [1, 2])
    with GradientTape():
        assert np.shape(t) == (2,) and np.zeros_like(t).shape == (2,)
        assert np.asarray(t).sum() == 3
        for call in (
            lambda: np.concatenate([t, t]),
            lambda: np.mean(t),
            lambda: np.where([True, False], t, 0),
        ):
            with pytest.raises(TypeError, match="would lose the gradient"):
                call()


# Variables


def test_a_variable_owns_its_array_and_is_written_in_place():
    start = np.ones((2, 3), np.float32)
    w = Variable(start, name="kernel")
    array = w.data
    w.assign(np.full((2, 3), 7))
    assert w.data is array and (array == 7).all() and (start == 1).all()


@pytest.mark.parametrize(
    ("value", "message"),
    [
        (np.ones(3), r"kernel: values of shape \(3,\) came, expected \(2, 3\)"),
        (1j * np.ones((2, 3)), "real numbers"),
    ],
)
def test_a_variable_refuses_other_shapes_and_kinds(value, message):
    with pytest.raises(ValueError, match=message):
        Variable(np.ones((2, 3), np.float32), name="kernel").assign(value)


def test_every_change_of_a_variable_is_counted():
    w, other = Variable([1.0, 2.0], name="w"), Variable([3.0])
    versions = []
    for change in (
        lambda: None,
        lambda: w.assign([2.0, 3.0]),
        lambda: w.writable().fill(4.0),
        lambda: setattr(w, "data", np.ones(2, np.float64)),
    ):
        change()
        versions.append(w.version)
    assert sorted(set(versions)) == versions and latest_change() == w.version > other.version
    assert w.dtype == np.float64 and w.numpy().tolist() == [1, 1]
    (w * 2).sum(), w.numpy(), np.asarray(w), w[0]
    assert latest_change() == w.version == versions[-1]  # to look is no change
    for view in (w.data, w.numpy(), np.asarray(w), w[:1].data):
        with pytest.raises(ValueError, match="read-only"):
            view[0] = 5
    own = np.ones(2, np.float32)
    Variable(own).assign([7.0, 7.0])
    w.data = own
    w.assign([7.0, 7.0])
    assert own.tolist() == [1, 1]


@pytest.mark.parametrize("duplicate", [copy.deepcopy, lambda w: pickle.loads(pickle.dumps(w))])
def test_a_copied_variable_is_one_of_its_own(duplicate):
    w = Variable([1.0, 2.0], name="w", trainable=False)
    twin = duplicate(w)
    twin.assign([3.0, 4.0])
    assert (w.numpy().tolist(), twin.numpy().tolist()) == ([1, 2], [3, 4])
    assert (twin.name, twin.trainable) == ("w", False) and not twin.data.flags.writeable


def test_an_integer_variable_refuses_fractions():
    with pytest.raises(ValueError, match="dtype float64 came, expected int64"):
        Variable(np.zeros(2, np.int64)).assign(np.array([0.5, 1.5]))


# Gradients


def test_a_value_used_twice_gets_the_sum():
    (g,) = gradient(lambda x: (x * x + 3 * x).sum(), [2.0, 5.0])
    np.testing.assert_array_equal(g, [7, 13])


def test_broadcast_operands_get_summed_gradients():
    a, b, c = gradient(lambda a, b, c: (a * b + c).sum(), np.ones((2, 3)), [1.0, 2.0, 3.0], 5.0)
    np.testing.assert_array_equal(a, [[1, 2, 3]] * 2)
    np.testing.assert_array_equal(b, [2, 2, 2])
    assert c.shape == () and c == 6


def test_a_source_that_does_not_matter_gets_zeros():
    x, y = gradient(lambda x, y: (2 * x).sum(), [1.0], [[3.0, 4.0]])
    assert x.tolist() == [2] and y.tolist() == [[0, 0]]


def test_results_computed_under_the_tape_are_sources_too():
    w = Variable(2.0)
    with GradientTape() as tape:
        h = w * 3
        loss = h * h
    dh, dw, dloss = tape.gradient(loss, [h, w, loss])
    assert (dh, dw, dloss) == (12, 36, 1)


def test_a_watched_tensor_and_a_frozen_variable():
    x, frozen = Tensor([1.0, 2.0]), Variable([3.0, 4.0], trainable=False)
    with GradientTape() as tape:
        tape.watch(x)
        tape.watch(frozen)
        loss = (x * frozen).sum()
    dx, df = tape.gradient(loss, [x, frozen])
    assert dx.tolist() == [3, 4] and df.tolist() == [1, 2]


def test_a_source_that_nobody_watched_is_refused():
    x, frozen = Tensor([1.0]), Variable([1.0], name="kernel", trainable=False)
    with GradientTape() as tape:
        loss = (x * frozen).sum()
    with pytest.raises(ValueError, match=r"sources\[0\]: the Tensor of shape \(1,\) is not followed.*watch"):
        tape.gradient(loss, [x])
    with pytest.raises(ValueError, match=r"sources\[1\]: the frozen Variable 'kernel'"):
        tape.gradient(loss, [Variable([1.0]), frozen])


def test_only_float_tensors_can_be_watched():
    with GradientTape() as tape, pytest.raises(ValueError, match="expected floats"):
        tape.watch(Tensor([1, 2]))
    with pytest.raises(ValueError, match="a ndarray came, expected a Tensor"):
        GradientTape().watch(np.ones(2))


def test_output_gradient_and_its_shape():
    (g,) = gradient(lambda x: x * x, [1.0, 2.0], output_gradient=[10.0, 100.0])
    assert g.tolist() == [20, 400]
    with pytest.raises(ValueError, match=r"output_gradient: shape \(3,\) came"):
        gradient(lambda x: x * x, [1.0, 2.0], output_gradient=np.ones(3))


def test_a_loss_of_many_values_is_refused():
    with pytest.raises(ValueError, match=r"loss: shape \(2,\) came, expected one value"):
        gradient(lambda x: x * x, [1.0, 2.0])


def test_gradients_have_the_sources_dtype_and_share_no_memory():
    a, b = Variable(np.ones(3, np.float32)), Variable(np.ones(3, np.float32))
    c, d = Variable(np.ones(3, np.float32)), Variable(np.ones(3, np.float64))
    with GradientTape() as tape:
        loss = (a + b).sum() + c.sum() + (d * a).sum()
    gradients = tape.gradient(loss, [a, b, c, d])
    assert [g.dtype for g in gradients] == [np.float32, np.float32, np.float32, np.float64]
    for k, g in enumerate(gradients):
        assert g.flags.writeable
        g[...] = -k  # nobody else's
    assert [g[0] for g in gradients] == [0, -1, -2, -3]


def test_the_callers_output_gradient_is_not_handed_back():
    seed, w = np.ones(2, np.float32), Variable([1.0, 2.0])
    with GradientTape() as tape:
        y = w + 0.0
    (g,) = tape.gradient(y, [w], output_gradient=seed)
    assert not np.shares_memory(g, seed)


def test_stop_gradient_makes_a_constant():
    (g,) = gradient(lambda x: (ops.stop_gradient(x * x) * x).sum(), [3.0])
    assert g.tolist() == [9]


# Recording


def test_nothing_is_recorded_outside_a_tape():
    w = Variable([1.0])
    y = w * 2
    assert y._origin is None and not is_recording() and not needs_gradient(w)
    with GradientTape() as tape:
        assert is_recording() and needs_gradient(w) and not needs_gradient(y)
        z = y * 3  # depends on no variable that this tape has seen used
    assert z._origin is None and tape._nodes == []


def test_constants_are_not_recorded():
    x = Tensor([1.0, 2.0])
    with GradientTape() as tape:
        (x * x).sum()
    assert tape._nodes == []


def test_what_another_tape_computed_is_a_constant_here():
    w = Variable([3.0])
    with GradientTape():
        y = w * 2
    with GradientTape() as tape:
        loss = (y * w).sum()
    assert tape.gradient(loss, [w])[0].tolist() == [6]


def test_a_used_tape_says_so():
    w = Variable([1.0])
    with GradientTape() as tape:
        loss = (w * w).sum()
    tape.gradient(loss, [w])
    with pytest.raises(RuntimeError, match=r"has been used.*persistent=True"):
        tape.gradient(loss, [w])
    with pytest.raises(RuntimeError, match="has been used: make a new one"), tape:
        pass


def test_a_refused_call_does_not_use_the_tape_up():
    w = Variable([1.0])
    with GradientTape() as tape:
        loss = (w * w).sum()
    with pytest.raises(ValueError, match="not followed"):
        tape.gradient(loss, [Tensor([1.0])])
    assert tape.gradient(loss, [w])[0].tolist() == [2]


def test_a_persistent_tape_serves_again():
    w = Variable([1.0, 2.0])
    with GradientTape(persistent=True) as tape:
        h = w * w
        a, b = h.sum(), (h * h).sum()
    assert tape.gradient(a, [w])[0].tolist() == [2, 4]
    assert tape.gradient(b, [w])[0].tolist() == [4, 32]
    assert tape.gradient(a, [w])[0].tolist() == [2, 4]


def test_tapes_do_not_nest():
    with GradientTape() as tape:
        with pytest.raises(RuntimeError, match="gradients of gradients"), GradientTape():
            pass
        with pytest.raises(RuntimeError, match="already recording"):
            tape.__enter__()
    assert not is_recording()


def test_an_exception_stops_the_recording():
    with pytest.raises(KeyError), GradientTape():
        raise KeyError
    assert not is_recording()


def test_threads_have_their_own_tapes():
    results = {}

    def work(k):
        w = Variable(np.full(4, float(k)))
        for _ in range(50):
            with GradientTape() as tape:
                loss = (w * w).sum()
            results[k] = tape.gradient(loss, [w])[0]

    with GradientTape() as outer:
        threads = [threading.Thread(target=work, args=(k,)) for k in range(4)]
        for t in threads:
            t.start()
        for t in threads:
            t.join()
        assert outer._nodes == []
    assert all((results[k] == 2 * k).all() for k in range(4))


# Memory


class Tracked(np.ndarray):
    """An array that can be weakly referred to, to see when it goes."""


def _kept(x, log):
    """The identity, with a vjp that holds on to a big array until it is freed."""
    big = np.zeros(10).view(Tracked)
    log.append(weakref.ref(big))
    return apply(x.data + 0, (x, lambda dy: dy + big[0]))


def test_the_backward_walk_frees_as_it_goes():
    w, log, alive = Variable([1.0]), [], []
    with GradientTape() as tape:
        h = w
        for _ in range(5):
            h = _kept(h, log)
            h = apply(h.data, (h, lambda dy: alive.append(sum(r() is not None for r in log)) or dy))
        loss = h.sum()
    tape.gradient(loss, [w])
    assert alive == [5, 4, 3, 2, 1]
    assert all(r() is None for r in log)


def test_a_kept_loss_does_not_keep_what_led_to_it():
    w, log, losses = Variable([1.0]), [], []
    for _ in range(3):
        with GradientTape() as tape:
            losses.append(_kept(w, log).sum())
        del tape
    gc.collect()
    assert all(r() is None for r in log)


def test_no_reference_cycles_are_left_to_the_collector():
    w, log = Variable([1.0]), []
    gc.collect()
    gc.disable()
    try:
        with GradientTape() as tape:
            _kept(w, log).sum()
        del tape
        assert log[0]() is None
    finally:
        gc.enable()


def test_vjps_of_constants_are_dropped():
    w, x, log = Variable([1.0]), Tensor([2.0]), []
    with GradientTape():
        big = np.zeros(10).view(Tracked)
        log.append(weakref.ref(big))
        apply(w.data * x.data, (w, lambda dy: dy * 2), (x, lambda dy, big=big: dy * big))
        del big
        assert log[0]() is None


# Operations with several outputs


def split(x, log=None):
    """The two halves of x, and a count that is no float."""
    n = len(x.data) // 2
    a, b = x.data[:n] * 2, x.data[n:] * 3

    def vjp(da, db, _):
        if log is not None:
            log.append((da is None, db is None))
        zeros = np.zeros(n)
        return [np.concatenate([zeros if da is None else 2 * da, zeros if db is None else 3 * db])]

    return apply_joint((a, b, np.array(n)), (x,), vjp)


def test_several_outputs():
    (g,) = gradient(lambda x: (split(x)[0] * split(x)[1]).sum(), [1.0, 2.0, 3.0, 4.0])
    np.testing.assert_allclose(g, [18, 24, 6, 12])


@pytest.mark.parametrize(("used", "expected"), [(0, [2, 2, 0, 0]), (1, [0, 0, 3, 3])])
def test_an_unused_output_has_no_gradient(used, expected):
    log = []
    (g,) = gradient(lambda x: split(x, log)[used].sum(), [1.0, 2.0, 3.0, 4.0])
    assert g.tolist() == expected and log == [(used != 0, used != 1)]


def test_an_output_of_several_is_a_source_and_a_loss():
    w = Variable(np.array([1.0, 2.0]))
    with GradientTape(persistent=True) as tape:
        a, b, _ = split(w)
        loss = (a * b).sum()
    da, db = tape.gradient(loss, [a, b])
    assert (da, db) == (6, 2)
    assert tape.gradient(b, [w])[0].tolist() == [0, 3]


def test_an_operation_may_give_no_gradient():
    w = Variable([1.0])
    with GradientTape() as tape:
        (y,) = apply_joint((w.data * 2,), (w,), lambda dy: [None])
    assert tape.gradient(y, [w])[0].tolist() == [0]


# What the tape keeps


def test_what_no_gradient_needs_is_not_kept():
    """A sum's gradient takes the shape of what was summed, not its values."""
    w = Variable(np.ones(1000, np.float32))
    with GradientTape() as tape:
        x = w * 2
        y = x + 1
        dead = [weakref.ref(x.data), weakref.ref(y.data)]
        loss = y.sum()
        del x, y
        assert [r() for r in dead] == [None, None]
    assert (tape.gradient(loss, [w])[0] == 2).all()


# Gradients of rows


def looked_up(table, then, **kwargs):
    w = Variable(table)
    with GradientTape() as tape:
        loss = then(w, ops.embedding(w, np.array([[4, 1], [4, 4]])))
    return tape.gradient(loss, [w], **kwargs)[0]


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_gradient_of_rows_is_left_alone_when_asked_for(dtype):
    table = np.arange(15, dtype=dtype).reshape(5, 3)
    dense = looked_up(table, lambda w, y: (y * y).sum())
    rows = looked_up(table, lambda w, y: (y * y).sum(), rows=True)
    assert type(rows) is RowGradient and rows.shape == (5, 3) and rows.dtype == dtype
    assert rows.index.tolist() == [-1, 1, -1, -1, 0] and rows.values.shape == (2, 3)
    expected = np.zeros((5, 3))
    expected[1], expected[4] = 2 * table[1], 6 * table[4]
    assert dense.tolist() == rows.dense().tolist() == expected.tolist()


@pytest.mark.parametrize(
    "then, whole",
    [
        (lambda w, y: y.sum() + w.sum(), lambda k: k + 1),
        (lambda w, y: w.sum() + y.sum(), lambda k: k + 1),
        (
            lambda w, y: y.sum() + ops.embedding(w, np.array([0, 4])).sum(),
            lambda k: k + np.array([1, 0, 0, 0, 1]),
        ),
    ],
)
def test_rows_that_meet_another_gradient_become_whole(then, whole):
    found = looked_up(np.ones((5, 2), np.float32), then, rows=True)
    assert type(found) is np.ndarray
    assert found.tolist() == np.stack([whole(np.array([0, 1, 0, 0, 3]))] * 2, axis=1).tolist()


def test_rows_of_a_computed_table():
    (g,) = gradient(lambda w: ops.embedding(w * 2, np.array([0, 0])).sum(), np.ones((2, 3)), rows=True)
    assert g.tolist() == [[4, 4, 4], [0, 0, 0]]
