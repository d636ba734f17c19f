"""Batches from arrays, memmaps, unequal sequences and sources: what comes out, in which order, and what is
refused."""

import numpy as np
import pytest

from numlstm import random
from numlstm.data.batches import FEW, ArrayBatches, Batch, _Dense, as_batches, cut, one_batch, pad


def rows(source, **options):
    return [b.x for b in source.epoch(**options)]


def test_arrays_in_order_share_memory_when_nothing_has_to_change():
    x, y = np.arange(20, dtype=np.float32).reshape(5, 4), np.arange(5)
    batches = list(as_batches(x, y, batch_size=2).epoch())
    assert [len(b.x) for b in batches] == [2, 2, 1]
    assert all(np.shares_memory(b.x, x) for b in batches)
    assert batches[1].y.tolist() == [2, 3]
    assert batches[1].y.dtype == y.dtype  # labels and ids stay integers
    assert as_batches(x, y, batch_size=2).steps == 3
    assert len(rows(as_batches(np.zeros((70, 2))))) == 3  # 32 rows unless said


def test_shuffling_is_a_permutation_fixed_by_the_seed():
    x = np.arange(50, dtype=np.float32)[:, None]
    source = as_batches(x, -x, np.arange(50.0), batch_size=8)
    random.set_seed(1)
    first = [(b.x.copy(), b.y.copy(), b.sample_weight.copy()) for b in source.epoch(shuffle=True)]
    second = rows(source, shuffle=True)
    random.set_seed(1)
    again = rows(source, shuffle=True)
    flat = np.concatenate([b for b, _, _ in first])
    assert sorted(flat[:, 0]) == list(range(50))
    assert not np.array_equal(flat, x)
    assert not np.array_equal(flat, np.concatenate(second))
    assert np.array_equal(flat, np.concatenate(again))
    for bx, by, bw in first:  # rows stay together
        assert np.array_equal(bx, -by)
        assert np.array_equal(bx[:, 0], bw)


@pytest.mark.parametrize("dtype", [np.float64, np.float16, bool, np.float32])
def test_floats_and_flags_become_the_models_dtype(dtype):
    x = np.ones((4, 2), dtype)
    assert next(as_batches(x).epoch()).x.dtype == np.float32
    assert next(as_batches(x, dtype="float64").epoch(shuffle=True)).x.dtype == np.float64


def test_nested_lists_and_equal_sequences_are_arrays():
    assert next(as_batches([[1, 2], [3, 4]]).epoch()).x.shape == (2, 2)
    batch = next(as_batches([np.ones((3, 1)), np.zeros((3, 1))]).epoch())
    assert batch.x.shape == (2, 3, 1)
    assert batch.mask is None


def test_a_memmap_is_read_batch_by_batch(tmp_path):
    x = np.arange(24, dtype=np.float32).reshape(6, 2, 2)
    np.save(tmp_path / "x.npy", x)
    lazy = np.load(tmp_path / "x.npy", mmap_mode="r")
    source = as_batches(lazy, np.zeros(6), batch_size=4)
    assert isinstance(source.x.array, np.memmap)
    got = rows(source)
    assert np.array_equal(np.concatenate(got), x)
    assert not isinstance(got[0].base, np.memmap) or got[0].flags.c_contiguous
    train, held_out = source.split(0.5)
    assert np.array_equal(np.concatenate(rows(held_out)), x[3:])
    assert len(rows(train, shuffle=True)[0]) == 3


def test_nan_in_a_memmap_is_named_when_it_is_met(tmp_path):
    x = np.zeros((6, 2), np.float32)
    x[4, 1] = np.nan
    np.save(tmp_path / "x.npy", x)
    lazy = np.load(tmp_path / "x.npy", mmap_mode="r")
    batches = as_batches(lazy, batch_size=3).epoch()
    next(batches)
    with pytest.raises(ValueError, match=r"x: nan in row 4, at \(1,\) within it"):
        next(batches)
    with pytest.raises(ValueError, match="nan in row 4"):
        rows(as_batches(lazy, batch_size=3), shuffle=True)


def test_unequal_sequences_are_padded_a_batch_at_a_time():
    sequences = [np.full((n, 2), n, np.float32) for n in (3, 1, 5, 0)]
    labels = [np.arange(n) for n in (3, 1, 5, 0)]
    source = as_batches(sequences, labels, batch_size=2)
    first, second = source.epoch()
    assert first.x.shape == (2, 3, 2)
    assert first.mask.tolist() == [[True] * 3, [True, False, False]]
    assert first.y.tolist() == [[0, 1, 2], [0, 0, 0]]
    assert first.timed
    assert second.x.shape == (2, 5, 2)
    assert second.mask[1].any() == np.False_  # a row without a step
    random.set_seed(0)
    for batch in source.epoch(shuffle=True):
        assert np.array_equal(batch.mask.sum(1), np.where(batch.mask, batch.x[..., 0], 0).max(1, initial=0))
    assert len(next(source.split(0.5)[1].epoch()).x) == 2


def test_unequal_lists_are_sequences_too():
    batch = next(as_batches([[1, 2], [3], []]).epoch())
    assert batch.x.tolist() == [[1, 2], [3, 0], [0, 0]]
    assert batch.mask.sum(1).tolist() == [2, 1, 0]
    assert batch.x.dtype.kind == "i"
    assert next(as_batches([[1, 2], [0.5]]).epoch()).x.tolist() == [[1, 2], [0.5, 0]]


def test_pad_keeps_an_axis_where_all_are_empty():
    padded, lengths = pad([np.zeros((0, 2)), np.zeros((0, 2))])
    assert padded.shape == (2, 1, 2)
    assert lengths.tolist() == [0, 0]


def test_lengths_and_masks():
    x = np.zeros((3, 4, 1), np.float32)
    batch = next(as_batches(x, lengths=[4, 0, 2]).epoch())
    assert batch.mask.tolist() == [[True] * 4, [False] * 4, [True, True, False, False]]
    holes = np.array([[1, 0, 1, 0]] * 3)
    assert next(as_batches(x, mask=holes).epoch()).mask.tolist() == holes.astype(bool).tolist()


@pytest.mark.parametrize("shuffle", [False, True])
@pytest.mark.parametrize("lazy", [False, True])
def test_chunks_in_time_put_together_are_the_batch(tmp_path, shuffle, lazy):
    rng = np.random.default_rng(0)
    x, y = rng.integers(0, 9, (5, 11)), rng.normal(size=(5, 11)).astype(np.float32)
    if lazy:
        np.save(tmp_path / "x.npy", x)
        x = np.load(tmp_path / "x.npy", mmap_mode="r")
    source = as_batches(x, y, y, batch_size=3, lengths=[11, 2, 0, 5, 7])
    random.set_seed(5)
    whole = list(source.epoch(shuffle=shuffle))
    random.set_seed(5)
    pieces = list(source.epoch(shuffle=shuffle, chunk=4))
    assert source.chunks(4) == len(pieces) == 6
    assert [b.first for b in pieces] == [True, False, False] * 2
    assert [b.last for b in pieces] == [False, False, True] * 2
    for k, batch in enumerate(whole):
        mine = pieces[3 * k : 3 * k + 3]
        for field in ("x", "y", "sample_weight", "mask"):
            assert np.array_equal(
                np.concatenate([getattr(b, field) for b in mine], axis=1), getattr(batch, field)
            )
    assert all(b.x.flags.c_contiguous and not isinstance(b.x, np.memmap) for b in pieces)


def test_targets_without_a_time_axis_go_with_each_chunk():
    x, y = np.zeros((2, 6, 1), np.float32), np.ones((2, 1), np.float32)
    assert [b.y.shape for b in as_batches(x, y).epoch(chunk=4)] == [(2, 1), (2, 1)]
    same = np.ones((2, 6), np.float32)  # six outputs, not six steps
    assert [b.y.shape for b in as_batches(x, same).epoch(chunk=4, timed=False)] == [(2, 6), (2, 6)]
    assert [b.y.shape for b in cut(Batch(x, same, timed=True), 4)] == [(2, 4), (2, 2)]


def test_sources_of_batches():
    x, y, w = np.ones((2, 3, 1)), np.zeros((2, 1)), np.ones(2)

    def generate():
        yield x
        yield x, y
        yield x, y, w
        yield {"x": x, "y": y, "lengths": [1, 3]}
        yield [np.ones((1, 1)), np.ones((2, 1))], y

    for source in (generate(), generate, list_like(generate)):
        batches = list(as_batches(source).epoch())
        assert [b.y is None for b in batches] == [True, False, False, False, False]
        assert batches[2].sample_weight.tolist() == [1, 1]
        assert batches[3].mask.tolist() == [[True, False, False], [True, True, True]]
        assert batches[4].x.shape == (2, 2, 1)
    assert as_batches(generate()).endless
    assert not as_batches(generate).endless
    assert as_batches(list_like(generate)).steps == 5


class list_like:
    """An iterable with a length, such as a loader of another framework."""

    def __init__(self, generate):
        self.items = list(generate())

    def __len__(self):
        return len(self.items)

    def __iter__(self):
        return iter(self.items)


X = np.zeros((4, 3, 2), np.float32)


@pytest.mark.parametrize(
    "build, words",
    [
        (lambda: as_batches(None), "x: got None"),
        (lambda: as_batches(np.zeros((0, 3))), r"x: is empty, its shape is \(0, 3\)"),
        (lambda: as_batches(np.zeros((3, 0, 2))), "x: is empty"),
        (lambda: as_batches([]), "x: is empty"),
        (lambda: as_batches(3.0), "x: got a single value"),
        (lambda: as_batches(np.array(["a", "b"])), "x: dtype <U1 came"),
        (
            lambda: as_batches(np.array([[1, 2], None], object)),
            "x: dtype object came.*may be given as a list",
        ),
        (lambda: as_batches(np.ones(3, complex)), "x: dtype complex128 came"),
        (lambda: as_batches([[1, [2]], [3, 4]]), "x: can't be made an array"),
        (lambda: as_batches((X, X)), "x: got a tuple"),
        (lambda: as_batches(X, np.zeros(3)), "y: 3 rows came, expected 4"),
        (lambda: as_batches(X, np.zeros(4), np.zeros(5)), "sample_weight: 5 rows came, expected 4"),
        (lambda: as_batches(X, np.array([0, 1, np.nan, 0])), "y: nan in row 2"),
        (lambda: as_batches(X, np.array([[0], [1], [0], [np.inf]])), r"y: inf in row 3, at \(0,\) within it"),
        (lambda: as_batches(np.full((4, 2), 1e300)), "x: 1e.300 in row 0.*too large for float32"),
        (lambda: as_batches([np.zeros((2, 1)), np.array([[np.nan]])]), "x: nan in row 1"),
        (lambda: as_batches([np.zeros((2, 1)), np.zeros((3, 2))]), r"x\[1\]: shape \(3, 2\) came"),
        (
            lambda: as_batches([np.zeros((2, 1)), np.zeros((3, 1))], lengths=[1, 1]),
            "lengths: must not be given",
        ),
        (lambda: as_batches(X, lengths=[1, 2, 3]), "lengths: int64 of shape"),
        (lambda: as_batches(X, lengths=[1, 2, 3, -1]), "lengths: -1 came for row 3, expected 0 to 3"),
        (lambda: as_batches(X, lengths=[1, 2, 3, 4]), "lengths: 4 came for row 3"),
        (lambda: as_batches(X, lengths=[1.0, 2, 3, 3]), "lengths: float64"),
        (lambda: as_batches(X, mask=np.ones((4, 2))), r"mask: shape \(4, 2\) came, expected \(4, 3\)"),
        (lambda: as_batches(X, mask=np.full((4, 3), 2)), "mask: dtype int64 came"),
        (lambda: as_batches(X, mask=np.ones((4, 3)), lengths=[1] * 4), "give mask or lengths, not both"),
        (lambda: as_batches(np.zeros(4), lengths=[1] * 4), "lengths: x of shape .* has no time axis"),
        (lambda: as_batches(X, batch_size=0), "batch_size: expected an integer >= 1, got 0"),
        (lambda: as_batches(X, batch_size=2.5), "batch_size"),
        (lambda: as_batches(iter([]), np.zeros(3)), "y: must not be given when x is a source"),
        (lambda: list(as_batches(iter([(X, X, X, X)])).epoch()), "batch 0 of x: a tuple of 4 came"),
        (lambda: list(as_batches(iter([X, (X, np.zeros(3))])).epoch()), "batch 1 of x: y: 3 rows came"),
        (lambda: list(as_batches(iter([{"y": X}])).epoch()), r"keys \['y'\] came"),
        (lambda: list(as_batches(lambda: 3).epoch()), "the function gave a int"),
        (lambda: list(as_batches(np.zeros(4)).epoch(chunk=2)), "bptt_steps: x must have a time axis"),
        (lambda: ArrayBatches(X).split(0.9), "validation_split"),
    ],
)
def test_errors_name_what_is_wrong(build, words):
    with pytest.raises(ValueError, match=words):
        build()


def test_rows_of_a_view_are_gathered_without_copying_all_of_it():
    """Windows over a table are a view in which every value lies many times; a copy of it would not fit in memory."""
    table = np.arange(3_000_000, dtype=np.float32).reshape(-1, 2)
    view = np.lib.stride_tricks.sliding_window_view(table, 100_000, axis=0).transpose(
        0, 2, 1
    )  # 1.1 TB if it were whole
    block = _Dense("x", view, np.dtype(np.float32), lazy=False).take(np.array([1_000_000, 3]))
    assert block.flags.c_contiguous and block.shape == (2, 100_000, 2)
    np.testing.assert_array_equal(block[1], table[3:100_003])


@pytest.mark.parametrize("size", [1, 7, FEW, FEW + 1])
@pytest.mark.parametrize("kind", ["float16", "float32", "float64"])
@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_one_bad_number_is_found_wherever_it_stands(size, kind, bad):
    for place in {0, size // 2, size - 1}:
        x = np.full((size, 1), -1, kind)
        x[place] = bad
        with pytest.raises(ValueError, match=f"^x: {bad} in row {place}, at .0,. within it came"):
            as_batches(x)
        with pytest.raises(ValueError, match=f"^y: {bad} in row {place}, at .0,. within it came"):
            one_batch(np.ones((size, 1)), x)


def test_large_numbers_are_finite_and_too_large_ones_are_not():
    largest = np.finfo(np.float32).max
    for x in (
        np.full((3, 2), largest),
        np.full((3, 2), -largest, np.float64),
        np.full((3, 2), 65504, np.float16),
    ):
        assert np.array_equal(one_batch(x, np.zeros(3)).x, x.astype(np.float32))
    assert one_batch(np.full((3, 2), 1e300), np.zeros(3), dtype=np.float64).x[0, 0] == 1e300
    for size in (2, FEW + 1):
        with pytest.raises(ValueError, match=r"x: 1e\+39 in row 1.* is too large for float32"):
            as_batches(np.concatenate([np.ones((1, size)), np.full((1, size), 1e39)]))


def test_one_batch_is_the_only_batch_of_all_rows():
    steps = np.arange(24.0).reshape(4, 3, 2)
    questions = [
        {"x": steps.astype(np.float32), "y": np.zeros((4, 1), np.float32)},
        {"x": steps[:, ::-1], "y": np.zeros((4, 3, 1))},  # float64, a view
        {"x": steps.astype(int), "y": np.arange(4)},
        {"x": steps > 3, "y": np.ones(4, bool)},
        {"x": steps},
        {"x": steps, "y": steps, "sample_weight": np.ones(4)},
        {"x": steps, "y": [1, 2, 3, 4], "lengths": [1, 2, 3, 3]},
        {"x": [steps[0], steps[1, :2]], "y": np.zeros(2)},
    ]
    for question in questions:
        found = one_batch(**question)
        expected = next(as_batches(**question, batch_size=99).epoch())
        assert found[4:] == expected[4:]
        for a, b in zip(found[:4], expected[:4], strict=True):
            assert (a is None) == (b is None)
            assert a is None or (a.dtype == b.dtype and np.array_equal(a, b))
    for x, y, words in [
        (steps, np.zeros(3), "y: 3 rows came, expected 4, the number of rows of x"),
        (steps, np.zeros(0), "y: is empty"),
        (np.zeros(()), np.zeros(3), "x: got a single value"),
        (steps.astype(complex), np.zeros(4), "x: dtype complex128 came"),
    ]:
        with pytest.raises(ValueError, match=words):
            one_batch(x, y)
