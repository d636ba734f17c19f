"""One seed, numbered streams, a state that can be stored."""

import json
import subprocess
import sys

import numpy as np
import pytest

from numlstm import random


def test_the_same_seed_gives_the_same_numbers_in_the_same_order():
    random.set_seed(3)
    first = [random.generator().random(4) for _ in range(3)]
    random.set_seed(3)
    again = [random.generator().random(4) for _ in range(3)]
    np.testing.assert_array_equal(first, again)
    assert len({a.tobytes() for a in first}) == 3


def test_a_stream_is_fixed_by_seed_and_number_alone():
    random.set_seed(3)
    random.next_stream()
    a = random.generator(7).random(4)
    random.set_seed(3)
    np.testing.assert_array_equal(random.generator(7).random(4), a)
    random.set_seed(4)
    assert (random.generator(7).random(4) != a).any()
    assert random.next_stream() == 0  # naming a stream takes none


def test_the_state_goes_through_json():
    random.set_seed(2**64 - 1)
    random.next_stream()
    state = json.loads(json.dumps(random.get_state()))
    a = random.generator().random()
    random.set_seed(0)
    random.set_state(state)
    assert random.seed() == 2**64 - 1 and random.generator().random() == a


def test_without_a_seed_two_processes_differ():
    command = [sys.executable, "-c", "from numlstm import random; print(random.get_state())"]
    states = {subprocess.run(command, capture_output=True, text=True, check=True).stdout for _ in range(2)}
    assert len(states) == 2


@pytest.mark.parametrize("seed", [-1, 2**64, 1.5, "0", None, True])
def test_a_seed_is_an_integer_of_64_bits(seed):
    with pytest.raises(ValueError, match=r"seed: .* came, expected an integer from 0"):
        random.set_seed(seed)


def test_numpy_integers_are_integers():
    random.set_seed(np.int64(5))
    assert random.get_state() == {"seed": 5, "stream": 0}


@pytest.mark.parametrize("state", [None, {}, {"seed": 1}, {"seed": 1, "stream": 0, "more": 1}])
def test_a_foreign_state_is_refused(state):
    with pytest.raises(ValueError, match="expected a dict with the integers"):
        random.set_state(state)
    with pytest.raises(ValueError, match=r"state\['stream'\]: -1 came"):
        random.set_state({"seed": 1, "stream": -1})


def test_within_a_seed_nothing_outside_is_drawn_from():
    random.set_seed(3)
    random.generator()
    before = random.get_state()
    with random.within(7):
        assert random.get_state() == {"seed": 7, "stream": 0}
        inner = random.generator().random()
        with random.within(7):
            assert random.generator().random() == inner
        assert random.get_state()["stream"] == 1
        random.set_seed(9)  # inside, this is about the inside
        assert random.seed() == 9
    assert random.get_state() == before
    with pytest.raises(ValueError, match="seed: -1 came"), random.within(-1):
        pass


def test_threads_within_their_seeds_do_not_share_numbers():
    from concurrent.futures import ThreadPoolExecutor

    def draw(seed):
        with random.within(seed):
            return [random.generator().random() for _ in range(200)]

    expected = [draw(seed) for seed in range(4)]
    with ThreadPoolExecutor(4) as pool:
        assert list(pool.map(draw, range(4))) == expected
