"""`python -m benchmarks.ladder`: check every rung against the reference, then time them in turn.

Each round times every rung for a short window, so that all share the machine's moods; a rung's time is the median of its
windows, its step the median over the rounds of the ratio to the rung below. A full run (no `--shape`) writes
`benchmarks/results/ladder.json` and `ladder.png` and the figures into this folder's README; a partial one writes nothing
unless `--out` names a folder.
"""

from __future__ import annotations

import argparse
import json
import re
import statistics
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks import common, ladder
from numlstm.kernels.cpu import isa, threads

SHAPE = (
    50,
    48,
    64,
    256,
)  # time, batch, input, hidden: 1.3 MB of weights, a little more than a core's second cache
README = Path(__file__).with_name("README.md")
BETWEEN = re.compile(r"(<!-- figures -->\n).*?(<!-- end -->)", re.DOTALL)


def checked(names: Sequence[str], asked: ladder.Question) -> tuple[list[dict[str, Any]], list[str]]:
    """A row for each rung with its error, and what is wrong."""
    right, rows, wrong = ladder.right_answer(asked), [], []
    for name in names:
        rung = ladder.rung(name)
        row = {"rung": name, "title": rung.TITLE, "tolerance": rung.TOLERANCE, "skipped": rung.unusable()}
        if row["skipped"] is None:
            row["error"] = ladder.error(rung.forward(*asked), right)
            if not row["error"] <= rung.TOLERANCE:
                wrong.append(f"{name}: off by {row['error']:.2g}, more than {rung.TOLERANCE:.2g}")
        rows.append(row)
    return rows, wrong


def timed(rows: list[dict[str, Any]], asked: ladder.Question, rounds: int, window: float) -> None:
    """Add to each row its time, its ratio to the rung below and its rate."""
    rows = [row for row in rows if row["skipped"] is None]
    windows: list[list[float]] = [[] for _ in rows]
    for _ in range(rounds):
        for row, found in zip(rows, windows, strict=True):
            forward = ladder.rung(row["rung"]).forward
            found.append(common.measure(lambda forward=forward: forward(*asked), window).seconds)
    below = None
    for row, found in zip(rows, windows, strict=True):
        row["threads"] = threads.get_num_threads() if ladder.rung(row["rung"]).THREADED else 1
        row["seconds"], row["spread"] = statistics.median(found), common.relative_spread(found)
        row["gflops"] = asked.operations / row["seconds"] / 1e9
        row["of_below"] = below and statistics.median(a / b for a, b in zip(found, below, strict=True))
        below = found


def table(rows: list[dict[str, Any]], peaks: dict[str, dict[str, float]] | None) -> str:
    """The figures in Markdown."""
    lines = [
        "| rung | threads | ms | of the rung below | GFLOP/s | of the FMA peak | error |",
        "|" + "---|" * 7,
    ]
    for row in rows:
        if row["skipped"]:
            lines.append(f"| {row['title']} | | not run: {row['skipped']} | | | | |")
            continue
        peak = peaks and peaks[str(row["threads"])]["fma_gflops"]
        share = f"{row['gflops'] / peak:.0%}" if peak else ""
        step = f"{row['of_below']:.2f}" if row["of_below"] else ""
        lines.append(
            f"| {row['title']} | {row['threads']} | {row['seconds'] * 1e3:.2f} | {step} | {row['gflops']:.1f} | {share} "
            f"| {row['error']:.0e} |"
        )
    return "\n".join(lines) + "\n"


def picture(path: Path, rows: list[dict[str, Any]], title: str) -> None:
    """GFLOP/s by rung, on a logarithmic axis."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    run = [row for row in rows if row["skipped"] is None]
    figure, panel = plt.subplots(figsize=(7.5, 0.8 + 0.45 * len(run)))
    bars = panel.barh([f"{r['title']} ({r['threads']})" for r in run], [r["gflops"] for r in run], color="C0")
    panel.bar_label(bars, [f" {r['gflops']:.3g}" for r in run])
    panel.set_xscale("log")
    panel.margins(x=0.15)
    panel.invert_yaxis()
    panel.set_xlabel("GFLOP/s (threads in brackets)")
    panel.set_title(title, fontsize=10)
    figure.tight_layout()
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=110)
    plt.close(figure)


def main(argv: Sequence[str] | None = None) -> int:
    """0, or 1 when a rung is wrong."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.ladder", description=__doc__.split("\n\n")[0])
    parser.add_argument("--shape", help="T,B,I,H in place of " + ",".join(map(str, SHAPE)))
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--window", type=float, default=0.1, help="seconds a rung and round")
    parser.add_argument("--json", action="store_true", help="print the results as JSON")
    parser.add_argument("--out", type=Path, help="folder for ladder.json and ladder.png")
    options = parser.parse_args(argv)
    shape = SHAPE if options.shape is None else tuple(int(n) for n in options.shape.split(","))
    if len(shape) != 4 or min(shape) < 1 or options.rounds < 1:
        parser.error(
            f"--shape: expected four sizes of at least 1, --rounds at least 1, got {shape}, {options.rounds}"
        )
    full = options.shape is None and options.out is None
    asked = ladder.question(*shape)
    rows, wrong = checked(ladder.RUNGS, asked)
    if wrong:
        print("\n".join(wrong), file=sys.stderr)
        return 1
    timed(rows, asked, options.rounds, options.window)
    peaks = common.peaks({row["threads"] for row in rows if row["skipped"] is None}) if full else None
    amx = "amx-bf16" in isa.FEATURES
    report = common.plain(
        {"shape": shape, "rungs": rows, "amx": amx, "peaks": peaks, "machine": common.machine()}
    )
    out = common.RESULTS if full else options.out
    if out is not None:
        common.write_json(out / "ladder.json", report)
        picture(out / "ladder.png", rows, f"LSTM forward, T, B, I, H = {shape}, {report['machine']['cpu']}")
    figures = table(rows, peaks)
    if full:
        where = f"(T, B, I, H) = {shape}, {report['machine']['cpu']}{', with AMX' if amx else ''}:\n\n"
        text = BETWEEN.sub(
            lambda found: found[1] + where + figures + found[2], README.read_text(encoding="utf-8")
        )
        README.write_text(text, encoding="utf-8")
    print(json.dumps(report) if options.json else figures)
    return 0


if __name__ == "__main__":
    sys.exit(main())
