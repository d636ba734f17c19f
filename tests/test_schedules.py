"""Learning-rate schedules against Keras' documented formulas, written out again here step by step."""

import json
import math

import pytest

from numlstm import schedules


def test_exponential_decay():
    rate = schedules.ExponentialDecay(0.05, 10, 0.96)
    assert rate(5) == pytest.approx(0.05 * 0.96**0.5)
    stairs = schedules.ExponentialDecay(0.1, 3, 0.96, staircase=True)
    assert stairs(2) == 0.1
    assert stairs(100) == pytest.approx(0.1 * 0.96**33)


def test_inverse_time_decay():
    rate = schedules.InverseTimeDecay(0.1, 10, 0.96)
    stairs = schedules.InverseTimeDecay(0.1, 10, 0.96, staircase=True)
    for step in range(21):
        assert rate(step) == pytest.approx(0.1 / (1 + 0.96 * step / 10))
        assert stairs(step) == pytest.approx(0.1 / (1 + 0.96 * (step // 10)))


def test_piecewise_constant_decay_keeps_the_boundary_in_the_left_piece():
    rate = schedules.PiecewiseConstantDecay([100, 110, 120], [1.0, 0.1, 0.01, 0.001])
    assert [rate(s) for s in (0, 100, 105, 110, 120, 999)] == [1.0, 1.0, 0.1, 0.1, 0.01, 0.001]


@pytest.mark.parametrize("power", [1.0, 0.5])
def test_polynomial_decay(power):
    rate = schedules.PolynomialDecay(0.05, 10, 0.001, power=power)
    assert rate(0) == pytest.approx(0.05)
    assert rate(5) == pytest.approx(0.049 * 0.5**power + 0.001)
    assert rate(10) == rate(15) == pytest.approx(0.001)
    cyclic = schedules.PolynomialDecay(0.05, 10, 0.001, power=power, cycle=True)
    assert cyclic(0) == pytest.approx(0.05)
    assert cyclic(15) == pytest.approx(0.049 * 0.25**power + 0.001)


@pytest.mark.parametrize("alpha", [0.0, 0.1])
def test_cosine_decay(alpha):
    rate = schedules.CosineDecay(2.0, 1000, alpha)
    for step in range(0, 1500, 125):
        cosine = 0.5 * (1 + math.cos(math.pi * min(step, 1000) / 1000))
        assert rate(step) == pytest.approx(2.0 * ((1 - alpha) * cosine + alpha))


def test_cosine_decay_warms_up_first():
    rate = schedules.CosineDecay(1.0, 1000, warmup_target=10.0, warmup_steps=2000)
    assert rate(0) == 1.0
    assert rate(1000) == pytest.approx(5.5)
    assert rate(2000) == pytest.approx(10.0)
    assert rate(2500) == pytest.approx(5.0)
    assert rate(3000) == rate(9000) == pytest.approx(0.0)


@pytest.mark.parametrize(
    "t_mul, m_mul, alpha", [(2.0, 1.0, 0.0), (1.0, 0.9, 0.0), (1.5, 0.5, 0.1), (3.0, 2.0, 0.2)]
)
def test_cosine_decay_restarts_agrees_with_walking_through_the_periods(t_mul, m_mul, alpha):
    rate = schedules.CosineDecayRestarts(0.3, 7, t_mul=t_mul, m_mul=m_mul, alpha=alpha)
    for step in range(400):
        left, period, height = float(step), 7.0, 1.0
        while left >= period - 1e-9:
            left, period, height = left - period, period * t_mul, height * m_mul
        cosine = height * 0.5 * (1 + math.cos(math.pi * left / period))
        assert rate(step) == pytest.approx(0.3 * ((1 - alpha) * cosine + alpha), abs=1e-9), step


def test_saved_form_is_json_and_comes_back():
    originals = [
        schedules.ExponentialDecay(0.05, 10, 0.96, staircase=True, name="a"),
        schedules.InverseTimeDecay(0.05, 10, 0.96),
        schedules.PiecewiseConstantDecay([10, 20], [1, 2, 3]),
        schedules.PolynomialDecay(0.1, 100, 0.005, cycle=True),
        schedules.CosineDecay(0.05, 10, 0.1, warmup_target=0.2, warmup_steps=2),
        schedules.CosineDecayRestarts(0.05, 10, 3.0, 4.0, 0.1),
    ]
    for schedule in originals:
        again = schedules.deserialize(json.loads(json.dumps(schedules.serialize(schedule))))
        assert type(again) is type(schedule)
        assert again.get_config() == schedule.get_config()
        assert [again(s) for s in range(30)] == [schedule(s) for s in range(30)]


@pytest.mark.parametrize(
    "build, word",
    [
        (lambda: schedules.ExponentialDecay(0.1, 0, 0.9), "decay_steps must be > 0; got 0"),
        (lambda: schedules.CosineDecay(0.1, -5), "decay_steps must be > 0; got -5"),
        (lambda: schedules.CosineDecay(0.1, 5, warmup_steps=3), "needs a warmup_target"),
        (lambda: schedules.CosineDecayRestarts(0.1, 5, t_mul=0.5), "t_mul must be >= 1"),
        (lambda: schedules.PiecewiseConstantDecay([1, 2], [1.0]), "one more entry"),
        (lambda: schedules.PiecewiseConstantDecay([2, 1], [1.0, 2.0, 3.0]), "boundaries must rise"),
        (lambda: schedules.get({"class_name": "CosinDecay", "config": {}}), "did you mean 'CosineDecay'"),
    ],
)
def test_errors_name_what_is_wrong(build, word):
    with pytest.raises(ValueError, match=word):
        build()
