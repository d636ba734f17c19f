"""The strict device of strict_arrays.py, for a test that asks for it."""

import pytest
from strict_arrays import strict_device


@pytest.fixture
def counts():
    """The backends "strict" and "strict:1" are known; gives the counts of what crossed over."""
    with strict_device() as counts:
        yield counts
