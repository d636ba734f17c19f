"""What the host knows of the numbers on a device, and when it has to ask."""

import gc

import numpy as np
from strict_arrays import StrictArray

from numlstm.backend import get_backend, moved, ranges


def test_what_came_from_the_host_is_known(counts):
    a = moved(np.array([[3, 1], [2, 0]]), get_backend("strict"), "x")
    assert (
        ranges.bounds(a) == (0, 3) and ranges.bounds(a[0]) == (0, 3) and counts.scalars == 0
    )  # a view: its base's
    assert ranges.exact(a[0]) == (1, 3) and counts.scalars == 2
    assert ranges.bounds(a + 1) == (1, 4) and counts.scalars == 4  # made there
    assert ranges.bounds(np.array([2.0, 5.0])) == (2.0, 5.0)


def test_nothing_is_kept_alive_and_no_other_array_is_taken_for_it(counts):
    a = get_backend("strict").asarray(np.array([1, 2]))
    ranges.remember(a, -5, 5)
    assert ranges.bounds(a) == (-5, 5)
    del a
    gc.collect()
    assert not any(isinstance(reference(), StrictArray) for reference, *_ in ranges._KNOWN)
    many = [get_backend("strict").asarray(np.array([k, k + 1])) for k in range(20)]
    assert [ranges.bounds(b) for b in many] == [(k, k + 1) for k in range(20)]
