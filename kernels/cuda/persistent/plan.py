"""How a sequence is laid out on a GPU's multiprocessors, whether it fits there, and whether it pays.

H units are split over `blocks` thread blocks of U units; the batch over `groups` of such blocks, each with its own copy of
the weights, and two directions stand side by side. Every block's warps split the recurrent product's K words (a word is a
float32, or two bfloat16) in chunks of 16, and keep their part of the weights in registers for all steps. The limits are
registers (255 a thread), shared memory (the warps' partial sums, twice) and that all blocks are resident at once, one a
multiprocessor.

The cost of a step follows studies of the LSTM on such machines: an exchange between blocks, the matrix units' time, and
what all blocks together read from L2. The figures in MODEL were assumed or computed, not measured; docs/decisions.md has the
rule that follows.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from typing import Any

from ...derive import Cell, Stage
from .places import CHUNK

__all__ = ["BATCHES", "MODEL", "SIZES", "Plan", "choose", "costs", "supports", "table"]

WARP, MAX_WARPS = 32, 8
REGISTERS = 255  # a thread, at 256 threads a block
OTHER_REGISTERS = 52  # indices and addresses, beside what `Plan` counts
APART = 22  # more where the gradients for x are not those for h (a GRU): some kernels that were counted at 234 spilled
UNITS = (8, 16, 32)  # a block's units; 8 columns or rows is a matrix instruction's
WORDS = {"bfloat16": 2, "tf32": 1, "float32": 1}  # elements a word
SHARED_PER_BLOCK = 227 << 10  # compute capability 9.0; 163 KB on 8.0
SIZES, BATCHES = (128, 256, 512, 650, 768, 1024, 2048), (1, 8, 16, 32, 64, 128, 256)  # of the table

# Seconds and bytes a second. Rates are of one multiprocessor: an H200's published or once measured ones over its 132.
MODEL = {
    "exchange": 1.3e-6,  # a word's way from a block to another through L2, and its polling
    "l2_bytes": 5.5e12 / 132,
    "l2_share": 64 * 1.755e9,  # bytes a second that one multiprocessor can take from L2
    "bfloat16": 790e12
    / 132
    / 2,  # operations a second, halved: warp-level instructions reach about half the peak
    "tf32": 450e12 / 132 / 2,
    "float32": 450e12 / 132 / 2 / 3,  # three tf32 products
    "kernel": 1.5e-6,  # from a kernel to the next, where steps are kernels of their own
    "pointwise": 1.0e-6,
    "float32_cores": 67e12,
    "l2_all": 5.5e12,
}


@dataclass(frozen=True)
class Plan:
    """The numbers of one launch: what kernels are written for, and how large its arrays are.

    Attributes:
        precision: of the product's operands: "bfloat16", "tf32" or "float32" (three tf32 products).
        nh, nx, states, saved: of the cell: recurrent gates, gates, states, values saved for the backward pass.
        params, inputs: of the cell: per-unit parameters, and step inputs with the recurrent mask.
        H: units; U: units a block; blocks: blocks that share the units.
        tile: rows of the batch a group of blocks has; groups: how many of them.
        directions: independent sequences side by side.
        warps, chunks: forward: warps a block, and each one's chunks of K words.
        back_warps, back_chunks: the same of the backward pass, whose K is nh times as long.
        in_flight, back_in_flight: loads of 16 bytes a thread that wait for other blocks at once.
    """

    precision: str
    nh: int
    nx: int
    states: int
    saved: int
    params: int
    inputs: int
    H: int
    U: int
    tile: int
    groups: int
    directions: int
    warps: int
    chunks: int
    back_warps: int
    back_chunks: int
    in_flight: int
    back_in_flight: int

    @property
    def blocks(self) -> int:
        return -(-self.H // self.U)

    @property
    def grid(self) -> int:
        return self.blocks * self.groups * self.directions

    @property
    def padded(self) -> int:
        """Units, in whole blocks."""
        return self.blocks * self.U

    @property
    def rows(self) -> int:
        """Rows of the batch, in whole tiles."""
        return self.tile * self.groups

    @property
    def M(self) -> int:
        """Rows of weights that a block has forward: its units' recurrent gates, in whole tiles of 16."""
        return -(-self.nh * self.U // 16) * 16

    @property
    def row_words(self) -> int:
        """Words of a row of what the blocks exchange forward."""
        return self.warps * self.chunks * CHUNK

    @property
    def back_row_words(self) -> int:
        """Words of a row of gate gradients, which the blocks exchange backward."""
        return self.back_warps * self.back_chunks * CHUNK

    @property
    def half(self) -> bool:
        """Whether the backward pass uses 8 of a matrix tile's 16 rows."""
        return self.tile == 8

    @property
    def back_tiles(self) -> int:
        return -(-self.tile // 16)

    @property
    def shared(self) -> int:
        """Bytes of shared memory, forward."""
        return 2 * 4 * self.warps * self.M * (self.tile + 1) if self.nh else 0

    @property
    def back_shared(self) -> int:
        return 2 * 4 * self.back_warps * self.tile * (self.U + 1) if self.nh else 0

    def pairs(self, warps: int) -> int:
        """How many pairs of units, each in one row, a thread has."""
        return -(-self.U // 2 * self.tile // (WARP * warps))

    def groups_of_loads(self) -> tuple[int, int]:
        """(tiles of 8 rows, chunks) that are loaded, and waited for, at once: forward."""
        return _split(self.tile // 8, self.chunks, self.in_flight)

    def back_groups_of_loads(self) -> tuple[int, int]:
        """(tiles of 16 rows, chunks), backward; a chunk of a tile is two loads, or one of a half tile."""
        return _split(self.back_tiles, self.back_chunks, self.back_in_flight // (1 if self.half else 2))

    def registers(self) -> int:
        """About how many a thread needs, forward."""
        tiles, chunks = self.groups_of_loads()
        ahead = 2 if tiles * chunks < self.tile // 8 * self.chunks else 1
        weights = self.M // 16 * 8 * self.chunks
        sums = self.M // 16 * tiles * 4
        cells = self.pairs(self.warps) * 2 * (self.states + self.nx + self.inputs) + 2 * (
            self.nx + self.params
        )
        split = 16 if self.precision == "float32" else 0
        return OTHER_REGISTERS + weights + sums + ahead * tiles * chunks * 4 + cells + split

    def back_registers(self) -> int:
        """About how many a thread needs, backward."""
        tiles, chunks = self.back_groups_of_loads()
        loads = tiles * chunks * (1 if self.half else 2)
        ahead = 2 if tiles * chunks < self.back_tiles * self.back_chunks else 1
        weights = self.back_chunks * self.U // 8 * 4
        sums = tiles * self.U // 8 * 4
        each = self.saved + 2 * self.states + self.nx + self.inputs + self.params
        cells = self.pairs(self.back_warps) * 2 * each + 2 * self.params
        split = 16 if self.precision == "float32" else 0
        return OTHER_REGISTERS + weights + sums + ahead * loads * 4 + cells + split


def _split(tiles: int, chunks: int, most: int) -> tuple[int, int]:
    """The largest divisors (tiles, chunks) with at most `most` loads; whole tiles before parts of one."""
    most = max(1, most)
    if chunks <= most:
        return max(n for n in range(1, tiles + 1) if tiles % n == 0 and n * chunks <= most), chunks
    return 1, max(n for n in range(1, most + 1) if chunks % n == 0)


def _warps(words: int) -> tuple[int, int]:
    """Warps, and chunks a warp: as few chunks as there can be, then as few warps."""
    chunks = max(1, -(-words // CHUNK))
    each = -(-chunks // MAX_WARPS)
    return -(-chunks // each), each


def _layout(
    cell: Cell, H: int, U: int, tile: int, groups: int, directions: int, precision: str
) -> Plan | str:
    """The plan of these choices with as many loads in flight as registers allow, or why there is none."""
    stage, per = cell.stages[0], WORDS[precision]
    nh, padded = len(stage.h_gates), -(-H // U) * U
    warps, chunks = _warps(-(-padded // per))
    back_warps, back_chunks = _warps(-(-nh * padded // per))
    most = REGISTERS - (APART if stage.x_gates != stage.h_gates else 0)
    short = "registers"
    for in_flight in (16, 8, 4, 2):
        for back in (16, 8, 4, 2):
            plan = Plan(
                precision, nh, len(stage.x_gates), len(cell.state), stage.saved, len(cell.params),
                len(stage.aux) + 1, H, U, tile, groups, directions,
                warps, chunks, back_warps, back_chunks, in_flight, back,
            )  # fmt: skip
            if plan.registers() <= most and plan.back_registers() <= most:
                return plan
            short = f"{max(plan.registers(), plan.back_registers())} registers a thread, of {most}"
    return short


def costs(plan: Plan) -> tuple[float, float]:
    """Seconds a step takes forward and backward, by the model."""
    m, per = MODEL, WORDS[plan.precision]
    size = 4 // per

    def step(weights: int, read: int) -> float:
        share = min(m["l2_share"], m["l2_bytes"] * 132 / plan.grid)
        return m["exchange"] + 2 * weights * plan.tile / m[plan.precision] + plan.tile * read * size / share

    forward = step(plan.M * plan.padded, plan.padded)
    backward = step(plan.nh * plan.padded * plan.U, plan.nh * plan.padded)
    return forward, backward


def per_step_costs(plan: Plan, B: int) -> tuple[float, float]:
    """Seconds a step takes, forward and backward, where each is a product and a pointwise kernel: what is compared with."""
    m, size = MODEL, 4 // WORDS[plan.precision]
    weights = plan.nh * plan.H * plan.H
    peak = m["float32_cores"] if plan.precision == "float32" else m[plan.precision] * 2 * 132
    product = max(weights * size / m["l2_all"], 2 * weights * B / peak)
    step = 2 * m["kernel"] + m["pointwise"] + product + 3 * B * plan.nh * plan.H * 4 / m["l2_all"]
    return plan.directions * step, plan.directions * step


@cache
def choose(
    cell: Cell, B: int, H: int, *, precision: str, sms: int, shared_per_block: int = SHARED_PER_BLOCK, directions: int = 1
) -> Plan | str:  # fmt: skip
    """The plan with the least cost of a forward and a backward step, or why there is none."""
    best: Plan | None = None
    reasons: list[str] = []
    for U in UNITS:
        blocks = -(-H // U)
        if blocks * directions > sms:
            reasons.append(f"{U} units a block: {blocks * directions} blocks, of {sms} multiprocessors")
            continue
        for groups in range(1, sms // (blocks * directions) + 1):
            rows = -(-B // groups)
            tile = 8 if rows <= 8 else -(-rows // 16) * 16
            if groups > 1 and (groups - 1) * tile >= B:
                continue  # fewer groups do
            plan = _layout(cell, H, U, tile, groups, directions, precision)
            if isinstance(plan, str):
                reasons.append(f"{U} units a block, {tile} rows: {plan}")
                continue
            if max(plan.shared, plan.back_shared) > shared_per_block:
                need = max(plan.shared, plan.back_shared)
                reasons.append(f"{U} units a block, {tile} rows: {need} bytes of shared memory")
                continue
            if best is None or sum(costs(plan)) < sum(costs(best)):
                best = plan
    if best is None:
        return f"does not fit on chip ({'; '.join(dict.fromkeys(reasons))})"
    return best


def stage_of(cell: Cell) -> Stage:
    return cell.stages[0]


def supports(
    cell: Cell, T: int, B: int, I: int, H: int, *, dtype: Any = "float32", precision: str = "float32", sms: int,
    shared_per_block: int = SHARED_PER_BLOCK, directions: int = 1, capability: tuple[int, int] = (9, 0),
) -> str | None:  # fmt: skip
    """None if the persistent kernels serve such a sequence and the cost model says that they pay; else why not, for people.

    Arguments:
        dtype: of the arrays; precision: of the product's operands, "float32", "tf32" or "bfloat16".
        sms: the device's multiprocessors; shared_per_block: bytes of shared memory that a block may have.
        directions: sequences of this shape that run in one launch.
        capability: the device's compute capability.

    >>> from numlstm.kernels import cells
    >>> supports(cells.lstm(), 100, 16, 64, 256, precision="bfloat16", sms=132) is None
    True
    >>> supports(cells.gru(reset_after=False), 100, 16, 64, 256, sms=132)
    'gru_before: a cell of 2 stages has products within a step'
    """
    if len(cell.stages) > 1:
        return f"{cell.name}: a cell of {len(cell.stages)} stages has products within a step"
    if not stage_of(cell).h_gates:
        return f"{cell.name}: a cell without a recurrent product has no weights to keep on chip"
    if str(getattr(dtype, "name", dtype)) != "float32":
        return f"arrays of {getattr(dtype, 'name', dtype)}: the kernels compute in float32"
    if precision not in WORDS:
        return f"precision {precision}: the kernels have {', '.join(WORDS)}"
    if capability < (8, 0):
        return f"compute capability {capability[0]}.{capability[1]}: the matrix instructions need 8.0"
    if min(T, B, I, H) < 1:
        return f"nothing to compute at T={T}, B={B}, I={I}, H={H}"
    plan = choose(
        cell, B, H, precision=precision, sms=sms, shared_per_block=shared_per_block, directions=directions
    )
    if isinstance(plan, str):
        return f"H={H}, B={B}, {precision}: {plan}"
    ours, steps = sum(costs(plan)), sum(per_step_costs(plan, B))
    if ours > steps:
        return (
            f"H={H}, B={B}, {precision}: by the cost model {ours * 1e6:.1f} us a step forward and backward, "
            f"a kernel for each step {steps * 1e6:.1f}"
        )
    return None


def table(
    cell: Cell, *, sms: int = 132, shared_per_block: int = SHARED_PER_BLOCK, directions: int = 1,
    sizes: tuple[int, ...] = SIZES, batches: tuple[int, ...] = BATCHES,
) -> str:  # fmt: skip
    """The dispatch table as text: for each H and precision the largest batch that fits, the largest that pays, and a plan.

    >>> from numlstm.kernels import cells
    >>> print(table(cells.lstm(), sizes=(512,)).splitlines()[0])
       H  precision  fits B  pays B  units  blocks  groups  rows  warps  registers  shared KB  us forward  us backward
    """
    lines = [
        "   H  precision  fits B  pays B  units  blocks  groups  rows  warps  registers  shared KB  us forward  us backward"
    ]
    for H in sizes:
        for precision in WORDS:
            fits = pays = 0
            shown: Plan | None = None
            for B in batches:
                plan = choose(
                    cell, B, H, precision=precision, sms=sms, shared_per_block=shared_per_block, directions=directions
                )  # fmt: skip
                if isinstance(plan, str):
                    break
                fits = B
                if sum(costs(plan)) <= sum(per_step_costs(plan, B)):
                    pays, shown = B, plan
            if shown is None:
                lines.append(f"{H:4}  {precision:9}  {fits:6}  {pays:6}")
                continue
            forward, backward = (1e6 * c for c in costs(shown))
            place = f"{shown.U:5}  {shown.blocks:6}  {shown.groups:6}  {shown.tile:4}  {shown.warps:2}/{shown.back_warps:2}"
            lines.append(
                f"{H:4}  {precision:9}  {fits:6}  {pays:6}  {place}    {shown.registers():3}/{shown.back_registers():3}  "
                f"{max(shown.shared, shown.back_shared) / 1024:9.1f}  {forward:10.2f}  {backward:11.2f}"
            )
    return "\n".join(lines)
