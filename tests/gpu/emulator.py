"""Runs the text of persistent kernels without a GPU: all blocks at once, the 32 lanes of a warp as NumPy vectors.

A warp is a generator: the kernel's text with a `yield` where it would wait (a barrier, a look at words that are not there
yet). A scheduler, seeded, picks which warp goes on; what a warp has published reaches memory word by word and late, in an
order of the scheduler's choosing, as relaxed stores may. It raises where a GPU would hang or read nonsense: no warp can
go on, a barrier that part of a block has left behind, an index out of bounds, memory read that nothing has written,
shared memory that two threads use without a barrier between them. Time is not modelled, and a warp's lanes move in step:
where one has to look for its words again, all do.
"""

from __future__ import annotations

import types
from collections.abc import Callable, Iterable
from typing import Any

import numpy as np

from numlstm.kernels.cuda.persistent.places import left, multiplied, polled
from numlstm.kernels.cuda.persistent.product import ABSENT, numbers

__all__ = ["Device", "Hang", "Misuse", "run"]

POISON = 0x7FA5A5A5  # the word of memory that nothing has written; a NaN that arithmetic never makes
LANES = np.arange(32)
G, Q = LANES // 4, LANES % 4


class Hang(AssertionError):
    """No warp can go on."""


class Misuse(AssertionError):
    """A kernel did what has no meaning on a GPU."""


class Global:
    """A flat array in the device's memory; plain loads and stores take effect at once."""

    def __init__(self, array: np.ndarray, name: str) -> None:
        assert array.ndim == 1 and array.flags.c_contiguous
        self.array, self.name = array, name
        self.words = array.view(np.uint32) if array.dtype.itemsize == 4 else None

    def at(self, index: Any, count: int = 1) -> Any:
        index = np.asarray(index)
        if index.min() < 0 or index.max() + count > self.array.size:
            raise Misuse(f"{self.name}[{index.min()}..{index.max()}] of {self.array.size}")
        if count > 1 and (index % count).any():
            raise Misuse(f"{self.name}: a load or store of {count} words at {index[index % count != 0][0]}")
        return index

    def load(self, index: Any, count: int, dtype: Any) -> list[np.ndarray]:
        index = self.at(index, count)
        words = [self.words[index + k] for k in range(count)]
        if any((w == POISON).any() for w in words):
            raise Misuse(f"{self.name}: memory that nothing has written was read")
        return [w.view(dtype) for w in words]

    def __getitem__(self, index: Any) -> Any:
        return self.array[self.at(index)].astype(np.int64)


class Shared:
    """A block's shared memory, which knows who used which word since the last barrier."""

    def __init__(self, words: int) -> None:
        self.values = np.zeros(words, np.float32)
        self.epoch = 0
        self.wrote, self.writer = np.full(words, -1), np.full(words, -1)
        self.read, self.reader = np.full(words, -1), np.full(words, -1)


class SharedView:
    """Shared memory as one warp's threads see it."""

    def __init__(self, shared: Shared, warp: int) -> None:
        self.shared, self.threads = shared, warp * 32 + LANES

    def __getitem__(self, index: Any) -> np.ndarray:
        s, index = self.shared, np.broadcast_to(index, 32)
        if index.min() < 0 or index.max() >= s.values.size:
            raise Misuse(f"shared memory [{index.min()}..{index.max()}] of {s.values.size}")
        if (s.wrote[index] < 0).any():
            raise Misuse("shared memory that nothing has written was read")
        if ((s.wrote[index] == s.epoch) & (s.writer[index] != self.threads)).any():
            raise Misuse("shared memory is read without a barrier after another thread's write")
        several = (s.read[index] == s.epoch) & (s.reader[index] != self.threads)
        s.reader[index] = np.where(several, -2, self.threads)
        s.read[index] = s.epoch
        return s.values[index]

    def __setitem__(self, index: Any, value: Any) -> None:
        s, index = self.shared, np.broadcast_to(index, 32)
        if index.min() < 0 or index.max() >= s.values.size:
            raise Misuse(f"shared memory [{index.min()}..{index.max()}] of {s.values.size}")
        if np.unique(index).size < 32:
            raise Misuse("two lanes write one word of shared memory")
        for when, who, what in ((s.wrote, s.writer, "write"), (s.read, s.reader, "read")):
            if ((when[index] == s.epoch) & (who[index] != self.threads)).any():
                raise Misuse(f"shared memory is written without a barrier after another thread's {what}")
        s.wrote[index], s.writer[index] = s.epoch, self.threads
        s.values[index] = value


class Local:
    """An array in a thread's registers: one row of lanes an element, handed out by value."""

    def __init__(self, count: int, dtype: Any) -> None:
        self.rows = np.zeros((count, 32), dtype)
        self.written = np.zeros(count, bool)

    def __getitem__(self, i: int) -> np.ndarray:
        if not 0 <= i < len(self.rows) or not self.written[i]:
            raise Misuse(f"register {i} of {len(self.rows)} is read, which nothing has written")
        return self.rows[i].copy()

    def __setitem__(self, i: int, value: Any) -> None:
        if not 0 <= i < len(self.rows):
            raise Misuse(f"register {i} of {len(self.rows)}")
        self.rows[i], self.written[i] = value, True


def _bf16(word: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    return (word << np.uint32(16)).view(np.float32), (word & np.uint32(0xFFFF0000)).view(np.float32)


def _mma(multiply: Callable[..., np.ndarray]) -> Callable[..., None]:
    """What a warp's matrix instruction does to its registers; see ptx.py for the arguments."""

    def mma(sums: Local, weights: Local, words: Local, *shape: int) -> None:
        x, y = (words, weights) if shape[-1] else (weights, words)
        for o, first, second in multiplied(*shape):
            a = [x[i] if i >= 0 else np.zeros(32, np.uint32) for i in first]
            D = multiply(a, [y[k] for k in second]).astype(np.float32)
            for k in range(4):
                sums[o + k] = sums[o + k] + D[G + 8 * (k // 2), 2 * Q + k % 2]

    return mma


def _bfloat16_tile(a: list[np.ndarray], b: list[np.ndarray]) -> np.ndarray:
    """PTX ISA 9.7.14, the figures of m16n8k16 with 16-bit elements."""
    A, B = np.zeros((16, 16), np.float32), np.zeros((16, 8), np.float32)
    for word, row, k in zip(a, (0, 8, 0, 8), (0, 0, 8, 8), strict=True):
        A[G + row, 2 * Q + k], A[G + row, 2 * Q + k + 1] = _bf16(word)
    for word, k in zip(b, (0, 8), strict=True):
        B[2 * Q + k, G], B[2 * Q + k + 1, G] = _bf16(word)
    return A @ B


def _tf32_tile(a: list[np.ndarray], b: list[np.ndarray]) -> np.ndarray:
    """PTX ISA 9.7.14, the figures of m16n8k8 with tf32 elements."""
    A, B = np.zeros((16, 8), np.float32), np.zeros((8, 8), np.float32)
    for word, row, k in zip(a, (0, 8, 0, 8), (0, 0, 4, 4), strict=True):
        A[G + row, Q + k] = _as_tf32(word)
    for word, k in zip(b, (0, 4), strict=True):
        B[Q + k, G] = _as_tf32(word)
    return A @ B


def _float32_tile(a: list[np.ndarray], b: list[np.ndarray]) -> np.ndarray:
    """Three products of tf32 parts, as ptx.py has them."""
    high = lambda words: [w & np.uint32(0xFFFFE000) for w in words]
    low = lambda words: [_low(w) for w in words]
    return _tf32_tile(low(a), high(b)) + _tf32_tile(high(a), low(b)) + _tf32_tile(high(a), high(b))


def _as_tf32(word: Any) -> np.ndarray:
    word = np.broadcast_to(word, 32)
    value = word.view(np.float32)
    if ((word & 0x1FFF != 0) & ~np.isnan(value)).any():
        raise Misuse("a tf32 operand with more digits than tf32 has")
    return value


def _pack_bf16(low: Any, high: Any) -> np.ndarray:
    def half(x: Any) -> np.ndarray:
        w = np.broadcast_to(np.float32(x), 32).copy().view(np.uint32)
        w = np.where(np.isnan(x), np.uint32(0x7FFF0000), w + (0x7FFF + (w >> 16 & 1)))
        return w.astype(np.uint32) >> np.uint32(16)

    return half(low) | half(high) << np.uint32(16)


def _tf32(x: Any) -> np.ndarray:
    w = np.broadcast_to(np.float32(x), 32).copy().view(np.uint32)
    return np.where(np.isnan(x), np.uint32(0x7FFFFFFF), (w + 0x1000) & 0xFFFFE000).astype(np.uint32)


def _bits(x: Any) -> np.ndarray:
    return np.broadcast_to(np.float32(x), 32).copy().view(np.uint32)


def _low(word: Any) -> np.ndarray:
    value = word.view(np.float32) - (word & np.uint32(0xFFFFE000)).view(np.float32)
    return value.view(np.uint32) & np.uint32(0xFFFFE000)


def _weights(registers: Local, count: int, pointer: Global, at: Any) -> None:
    _loads(registers, pointer, at, range(0, 128 * count, 128))


def _poll(registers: Local, pointer: Global, at: Any, *shape: int) -> None:
    _loads(registers, pointer, at, polled(*shape))


def _loads(registers: Local, pointer: Global, at: Any, offsets: Iterable[int]) -> None:
    for n, offset in enumerate(offsets):
        for k, word in enumerate(pointer.load(at + offset, 4, np.uint32)):
            registers[4 * n + k] = word


def _zero(registers: Local, count: int) -> None:
    for k in range(count):
        registers[k] = 0


def _leave(pool: SharedView, at: Any, sums: Local, *shape: int) -> None:
    for offset, k in left(*shape):
        pool[at + offset] = sums[k]


def _f32(function: Callable[..., Any]) -> Callable[..., Any]:
    return lambda *a: np.asarray(function(*a), np.float32)


def _store2(pointer: Global, index: Any, *values: Any) -> None:
    index = np.broadcast_to(pointer.at(index, 2), 32)
    if np.unique(index).size < 32:
        raise Misuse(f"{pointer.name}: two lanes store to one place")
    for k, v in enumerate(values):
        pointer.array[index + k] = v


NAMES: dict[str, Any] = {
    "float32": np.float32,
    "uint32": np.uint32,
    "K": np.float32,
    "weights": _weights,
    "load1": lambda p, i: p.load(i, 1, np.float32)[0],
    "load2": lambda p, i: p.load(i, 2, np.float32),
    "load4": lambda p, i: p.load(i, 4, np.float32),
    "poll": _poll,
    "zero": _zero,
    "leave": _leave,
    "store2": _store2,
    "weary": lambda spins, limit, failed, errors: int(
        spins >= limit or (spins % 64 == 0 and (failed != 0 or errors.array[0] != 0))
    ),
    "mma_bfloat16": _mma(_bfloat16_tile),
    "mma_tf32": _mma(_tf32_tile),
    "mma_float32": _mma(_float32_tile),
    "pack_bf16": _pack_bf16,
    "tf32": _tf32,
    "bits": _bits,
    "clean": lambda w: np.where(w == ABSENT, np.uint32(0x7FFF7FFF), w),
    "clamp": lambda i, n: np.minimum(i, n - 1),
    "quotient": lambda i, n: i // n,
    "absent": lambda r, count: int(
        (r.rows[:count] == ABSENT).any()
    ),  # the warp looks again for the sake of one lane
    "ex2": _f32(np.exp2),
    "lg2": _f32(np.log2),
    "rcp": _f32(lambda x: np.float32(1) / x),
    "sqrt": _f32(np.sqrt),
    "divide": _f32(lambda a, b: a / b),
    "fma": _f32(lambda a, b, c: np.float64(a) * b + c),
    "absolute": _f32(np.abs),
    "maximum": _f32(np.maximum),
    "minimum": _f32(np.minimum),
    "where": _f32(np.where),
}


class _Warp:
    """One warp: its generator, the words it has published that have not arrived, and what it waits for."""

    def __init__(self, run: _Run, block: int, number: int, source: Any) -> None:
        self.block, self.number = block, number
        self.late: list[tuple[Global, int, int]] = []
        self.barrier: int | None = None  # what it brought to the barrier it waits at
        self.done = False
        scope = dict(NAMES)
        scope["cuda"] = types.SimpleNamespace(
            threadIdx=types.SimpleNamespace(x=LANES, y=number),
            blockIdx=types.SimpleNamespace(x=block),
            shared=types.SimpleNamespace(array=lambda _, dtype: SharedView(run.shared[block], number)),
            local=types.SimpleNamespace(array=Local),
        )
        for count in (1, 2, 4):
            scope[f"publish{count}"] = self._publish
        exec(source, scope)
        self.steps = scope["kernel"](*run.arguments)

    def _publish(self, pointer: Global, index: Any, *values: Any) -> None:
        if np.ndim(index) == 0:
            self.late.append((pointer, int(pointer.at(index)), int(np.asarray(values[0]).flat[0])))
            return
        index = pointer.at(index, len(values))
        for k, v in enumerate(values):
            for i, word in zip(index + k, np.broadcast_to(v, 32), strict=True):
                self.late.append((pointer, int(i), int(word)))


class _Run:
    def __init__(
        self, text: str, arguments: list[Any], grid: int, warps: int, shared: int, seed: int
    ) -> None:
        text = text.replace("dead = cuda.syncthreads_or(failed)", "dead = yield failed").replace(
            "# spin", "yield -1"
        )
        assert "cuda.sync" not in text and "yield" in text
        source = compile(text, "<kernel>", "exec")
        self.arguments, self.draw = arguments, np.random.default_rng(seed)
        self.shared = [Shared(shared // 4) for _ in range(grid)]
        self.warps = [_Warp(self, b, w, source) for b in range(grid) for w in range(warps)]
        self.warps_of = [[w for w in self.warps if w.block == b] for b in range(grid)]
        self.stalled: dict[str, set[int]] = {}

    def deliver(self, warp: _Warp, count: int) -> bool:
        """Let some of a warp's published words arrive, any of them first."""
        if not warp.late:
            return False
        for k in sorted(
            self.draw.choice(len(warp.late), min(count, len(warp.late)), replace=False), reverse=True
        ):
            pointer, index, word = warp.late.pop(k)
            if pointer.name in ("F", "DG") and pointer.words[index] != ABSENT:
                raise Misuse(f"{pointer.name}[{index}] is published twice")
            pointer.words[index] = word
        return True

    def go(self, patience: int, hold: float) -> None:
        """Until all warps are done. `hold`: how often a warp's words stay on their way when it is looked at."""
        fruitless = 0
        live = list(self.warps)
        while live:
            warp = live[self.draw.integers(len(live))]
            moved = False
            if warp.barrier is None:
                try:
                    waits = next(warp.steps) if not hasattr(warp, "answer") else warp.steps.send(warp.answer)
                    warp.__dict__.pop("answer", None)
                    if waits != -1:
                        warp.barrier, moved = int(waits), True
                except StopIteration:
                    warp.done, moved = True, True
                    live.remove(warp)
                if moved:
                    self.meet(warp.block)
            if self.draw.random() >= hold:
                moved |= self.deliver(warp, int(self.draw.integers(1, 257)))
            fruitless = 0 if moved else fruitless + 1
            if fruitless > patience * len(live):
                if not any([self.deliver(w, len(w.late)) for w in self.warps]):
                    where = sorted({(w.block, w.number) for w in live})[:6]
                    raise Hang(
                        f"{len(live)} warps wait for words that nobody publishes: (block, warp) {where}"
                    )
                fruitless = 0
        for warp in self.warps:
            self.deliver(warp, len(warp.late))

    def meet(self, block: int) -> None:
        """Open the block's barrier if all its warps are there."""
        warps = self.warps_of[block]
        there = [w for w in warps if w.barrier is not None]
        if there and any(w.done for w in warps):
            raise Misuse(f"block {block}: some warps are at a barrier, others have left the kernel")
        if len(there) == len(warps):
            answer = int(any(w.barrier for w in warps))
            for w in warps:
                w.barrier, w.answer = None, answer
            self.shared[block].epoch += 1


@np.errstate(all="ignore")
def run(
    text: str, arguments: list[tuple[str, Any]], grid: int, warps: int, shared: int, seed: int = 0, *,
    patience: int = 40, hold: float = 0.3,
) -> None:  # fmt: skip
    """Run the kernel in `text` on `grid` blocks of `warps` warps; arrays among the arguments are flat and written in place.

    Raises:
        Hang: the warps wait for each other. Misuse: see the module's first lines.
    """
    values = [Global(a, n) if isinstance(a, np.ndarray) else a for n, a in arguments]
    _Run(text, values, grid, warps, shared, seed).go(patience, hold)


class Device:
    """What `Sequences` asks of a device, on NumPy arrays and emulated launches; `launches` counts them."""

    xp = np
    capability = (9, 0)

    def __init__(
        self, sms: int = 8, seed: int = 0, shared_per_block: int = 227 << 10, **options: Any
    ) -> None:
        self.sms, self.seed, self.shared_per_block, self.options = sms, seed, shared_per_block, options
        self.launches: list[str] = []

    def empty(self, shape: tuple[int, ...], dtype: str) -> np.ndarray:
        return np.full(shape, POISON, np.uint32).view(dtype)

    def finish(self) -> None:
        """Launches are over when they return."""

    def product(self, a: np.ndarray, b: np.ndarray, out: np.ndarray, precision: str) -> None:
        for x in (a, b):
            assert x.dtype == (np.uint16 if precision == "bfloat16" else np.float32)
            if precision != "bfloat16" and (np.ascontiguousarray(x).view(np.uint32) == POISON).any():
                raise Misuse("memory that nothing has written enters a product")
        if precision == "bfloat16":
            a, b = (numbers(np.ascontiguousarray(x), precision, np).reshape(x.shape) for x in (a, b))
        elif precision == "tf32":
            a, b = (_tf32_of(x) for x in (a, b))
        with np.errstate(all="ignore"):
            out[...] = a.astype("d") @ b.astype("d")

    def launch(
        self, text: str, arguments: list[tuple[str, Any]], grid: int, warps: int, shared: int, label: str,
        look: Callable[[np.ndarray], None],
    ) -> None:  # fmt: skip
        assert grid <= self.sms
        self.launches.append(label)
        run(text, arguments, grid, warps, shared, self.seed, **self.options)
        look(dict(arguments)["E"])


def _tf32_of(x: np.ndarray) -> np.ndarray:
    w = np.ascontiguousarray(x).view(np.uint32)
    rounded = ((w + 0x1000) & 0xFFFFE000).astype(np.uint32).view(np.float32)
    return np.where(np.isnan(x), x, rounded).astype(np.float32).reshape(x.shape)
