"""Products of float32 matrices: right at every size and stride, the same bits whatever the threads."""

from __future__ import annotations

import numpy as np
import pytest

from numlstm.kernels.cpu import gemm, threads
from numlstm.kernels.cpu.gemm import matmul
from numlstm.kernels.cpu.isa import LANES
from numlstm.kernels.rounding import operand

SIZES = [
    (1, 1, 1), (3, 5, 2), (1, 300, 1000), (7, 1000, 1), (33, 100, 17), (500, 3, 500), (65, 700, 63),
    (6, 513, 64), (100, 256, 65), (257, 257, 33), (1000, 1, 70),
    (9, 300, 3 * gemm.WIDTH * LANES // 2),  # B is packed in several blocks each way
]  # fmt: skip


def draw(*shape: int) -> np.ndarray:
    return np.random.default_rng(shape).standard_normal(shape).astype("f")


def assert_close(c: np.ndarray, a: np.ndarray, b: np.ndarray, bias: np.ndarray | None = None) -> None:
    right = a.astype("d") @ b.astype("d") + (0 if bias is None else bias)
    assert c.shape == right.shape and c.dtype == np.float32
    assert np.max(np.abs(c - right), initial=0) <= 2e-6 * max(np.max(np.abs(right), initial=0), 1e-3)


@pytest.mark.parametrize("size", SIZES, ids=lambda s: "x".join(map(str, s)))
@pytest.mark.parametrize("transposed", ["", "a", "b", "ab"])
def test_sizes_and_transposes(size, transposed: str, keep_threads: None, monkeypatch) -> None:
    monkeypatch.setattr(gemm, "ONE_THREAD_BELOW", 0)
    monkeypatch.setattr(gemm, "SMALL", 0)
    M, K, N = size
    a = draw(K, M).T if "a" in transposed else draw(M, K)
    b = draw(N, K).T if "b" in transposed else draw(K, N)
    bias, found = draw(N), []
    for n in (1, 2, 3):
        threads.set_num_threads(n)
        found.append(matmul(a, b, bias=bias))
    assert_close(found[0], a, b, bias)
    assert all(np.array_equal(c, found[0]) for c in found)
    assert_close(matmul(a, b), a, b)


@pytest.mark.parametrize("size", SIZES, ids=lambda s: "x".join(map(str, s)))
@pytest.mark.parametrize("transposed", ["", "a", "b", "ab"])
@pytest.mark.parametrize("small", [0, gemm.SMALL], ids=["kernel", "as it is"])
def test_bfloat16(size, transposed: str, small: int, keep_threads: None, monkeypatch) -> None:
    monkeypatch.setattr(gemm, "ONE_THREAD_BELOW", 0)
    monkeypatch.setattr(gemm, "SMALL", small)
    M, K, N = size
    a = draw(K, M).T if "a" in transposed else draw(M, K)
    b = draw(N, K).T if "b" in transposed else draw(K, N)
    bias, found = draw(N), []
    for n in (1, 2, 3):
        threads.set_num_threads(n)
        found.append(matmul(a, b, bias=bias, precision="bfloat16"))
    assert_close(found[0], operand(a, "bfloat16"), operand(b, "bfloat16"), bias)
    assert all(np.array_equal(c, found[0]) for c in found)


def misaligned(a: np.ndarray) -> np.ndarray:
    out = np.zeros(a.nbytes + 2, np.uint8)[2:].view(a.dtype).reshape(a.shape)
    out[...] = a
    return out


@pytest.mark.parametrize(
    "lay",
    [
        lambda a: a.astype("d"),
        lambda a: a.astype(a.dtype.newbyteorder()),
        lambda a: np.repeat(a, 3, 1)[:, ::3],
        lambda a: np.repeat(a, 2, 0)[::2],
        lambda a: a[::-1].copy()[::-1],
        lambda a: a[:, ::-1].copy()[:, ::-1],
        misaligned,
    ],
    ids=["float64", "byte order", "columns apart", "rows apart", "rows back", "columns back", "misaligned"],
)
def test_layouts(lay) -> None:
    a, b, bias = draw(40, 70), draw(70, 37), draw(37)
    right = matmul(a, b, bias=bias)
    assert_close(right, a, b, bias)
    rounded = matmul(a, b, precision="bfloat16")
    for left in (a, lay(a)):
        assert np.array_equal(matmul(left, lay(b), bias=bias), right)
        assert np.array_equal(matmul(left, lay(b), precision="bfloat16"), rounded)
    assert np.array_equal(matmul(lay(a), b, bias=lay(bias[None])[0]), right)


def test_broadcast_operand() -> None:
    row = np.broadcast_to(draw(1, 60), (50, 60))
    assert_close(matmul(row, draw(60, 20)), row, draw(60, 20))
    column = np.broadcast_to(draw(60, 1), (60, 20))
    assert_close(matmul(draw(50, 60), column), draw(50, 60), column)


@pytest.mark.parametrize("size", [(0, 3, 4), (3, 0, 4), (3, 4, 0), (0, 0, 0), (2000, 0, 30)])
def test_empty(size) -> None:
    M, K, N = size
    c = matmul(np.zeros((M, K), "f"), np.zeros((K, N), "f"), bias=np.ones(N, "f"))
    assert c.shape == (M, N) and np.all(c == 1)
    c = matmul(np.zeros((M, K), "f"), np.zeros((K, N), "f"), bias=np.ones(N, "f"), precision="bfloat16")
    assert c.shape == (M, N) and np.all(c == 1)


def test_nan_stays_in_its_row_and_column() -> None:
    a, b = draw(60, 100), draw(100, 50)
    clean = matmul(a, b)
    a[7, 3] = np.nan
    b[5, 9] = np.inf
    found = matmul(a, b)
    others = np.ix_(np.arange(60) != 7, np.arange(50) != 9)
    assert np.isnan(found[7]).all() and np.isinf(np.delete(found[:, 9], 7)).all()
    assert np.array_equal(found[others], clean[others])


def test_a_row_does_not_depend_on_the_other_rows() -> None:
    """Predictions have the same bits whatever else is in the batch, as long as the product is not tiny."""
    a, b = draw(100, 300), draw(300, 64)
    whole = matmul(a, b)
    for rows in (1, 2, 7, 50):
        assert np.array_equal(matmul(a[:rows], b), whole[:rows])


@pytest.mark.parametrize(
    ("a", "b", "bias", "message"),
    [
        ((3,), (3, 2), None, r"expected \(M, K\) and \(K, N\), got \(3,\) and \(3, 2\)"),
        ((2, 3), (2, 3), None, r"got \(2, 3\) and \(2, 3\)"),
        ((2, 2, 2), (2, 2), None, r"got \(2, 2, 2\)"),
        ((2, 3), (3, 2), (3,), r"bias of shape \(2,\), got \(3,\)"),
        ((2, 3), (3, 2), (2, 2), r"bias of shape \(2,\), got \(2, 2\)"),
    ],
)
def test_shapes_refused(a, b, bias, message) -> None:
    with pytest.raises(ValueError, match=message):
        matmul(draw(*a), draw(*b), bias=None if bias is None else draw(*bias))


def test_an_unknown_precision_is_named() -> None:
    with pytest.raises(ValueError, match="precision: expected float32 or bfloat16, got 'int8'"):
        matmul(draw(2, 3), draw(3, 2), precision="int8")
