"""The Numenta Anomaly Benchmark: `LSTMAnomalyDetector` on its 58 series, scored by its own rules.

Lavin & Ahmad 2015, "Evaluating real-time anomaly detection algorithms: the Numenta Anomaly Benchmark", and the rules of
the repository numenta/NAB, version 1.1. A detector gives each row a score from 0 to 1, knowing only the rows before. The
first 15 % of a file (of at most 5,000 rows) are for learning and not scored. Above one threshold for all files a row is a
detection: the first one in an anomaly's window earns the more the earlier it comes, every one outside costs the more the
further behind a window it comes, a window without any costs too. A profile says what each is worth; for each the
threshold is the one with the highest total over the corpus. 0 is a detector that never speaks, 100 one that speaks at
the first row of every window and nowhere else.

Beside the LSTM stands the benchmark's own windowed Gaussian, run here by its description: its score must come out as
published, which checks the scorer. The LSTM learns on what has been seen; its errors become scores in two ways: against the
largest error of the last 1,000 rows, and by the benchmark's own way for predictors, the anomaly likelihood (Ahmad, Lavin,
Purdy & Agha 2017, section 3.2). The trivial rule, a value outside the range seen so far, is printed too, and goes far here.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from benchmarks import common
from benchmarks.papers import pictures
from numlstm.data.tables import read_csv
from numlstm.kernels.cpu import threads

# what a true positive, a false positive and a false negative are worth
PROFILES = {
    "standard": (1.0, 0.11, 1.0),
    "reward_low_FP_rate": (1.0, 0.22, 1.0),
    "reward_low_FN_rate": (1.0, 0.11, 2.0),
}

# The repository's scoreboard of version 1.1 (README.md and results/final_results.json), in the order of the profiles; no
# network of this kind is on it.
PUBLISHED = {
    "ARTime": (74.9, 65.2, 80.4),
    "Numenta HTM": (70.1, 63.1, 74.3),
    "CAD OSE": (69.9, 67.0, 73.2),
    "earthgecko Skyline": (58.2, 46.2, 63.9),
    "KNN CAD": (58.0, 43.4, 64.8),
    "Relative Entropy": (54.6, 47.6, 58.8),
    "Random Cut Forest": (51.7, 38.4, 59.7),
    "Twitter ADVec": (47.1, 33.6, 53.5),
    "Windowed Gaussian": (39.6, 20.9, 47.4),
    "Etsy Skyline": (35.7, 27.1, 44.5),
    "Bayesian Changepoint": (17.7, 3.2, 32.2),
    "EXPoSE": (16.4, 3.2, 26.9),
    "Random": (11.0, 1.2, 19.5),
}


# What is scored here: the LSTM's surprise against the largest before, by the anomaly likelihood, and with the trivial rule
# beside it; that rule alone; and a detector of the scoreboard, which checks the scorer.
OURS = ("LSTM", "LSTM, likelihood", "LSTM and range", "range alone (trivial)", "windowed Gaussian, here")


# ------------------------------------------------------------------------------------------------- the rules


class Series(NamedTuple):
    """One file: `values` (N,), `windows` of anomalies as (first row, last row), `name` as the labels have it."""

    name: str
    values: np.ndarray
    windows: list[tuple[int, int]]

    @property
    def probation(self) -> int:
        """How many rows come before the first that is scored.

        >>> Series("a", np.zeros(4032), []).probation, Series("b", np.zeros(22695), []).probation
        (604, 750)
        """
        return math.floor(0.15 * min(len(self.values), 5000))


def scaled_sigmoid(position: float) -> float:
    """What a detection is worth at `position` relative to a window: -1 its first row, 0 its end, beyond: behind it.

    >>> [round(scaled_sigmoid(p), 4) for p in (-1, -0.5, 0, 1, 3)]
    [0.9866, 0.8483, 0.0, -0.9866, -1.0]
    """
    return -1.0 if position >= 3 else 2 / (1 + math.exp(5 * position)) - 1


class Worth(NamedTuple):
    """What a detection at each scored row of a series is worth: `value` (N,), and its window (N,), -1 for none."""

    value: np.ndarray
    window: np.ndarray


def worth(series: Series) -> Worth:
    """The worth of every row, before a profile weighs it; in windows relative to that of their first row."""
    count = len(series.values)
    value, window = np.full(count, -1.0), np.full(count, -1)
    for number, (first, last) in enumerate(series.windows):
        width = last - first + 1
        for row in range(first, last + 1):
            value[row] = scaled_sigmoid(-(last - row + 1) / width) / scaled_sigmoid(-1.0)
            window[row] = number
        end = series.windows[number + 1][0] if number + 1 < len(series.windows) else count
        for row in range(last + 1, end):
            value[row] = scaled_sigmoid((row - last) / (width - 1))
    return Worth(value, window)


class Scored(NamedTuple):
    """A profile's result: the normalised score, the threshold it takes, detected windows, and false detections."""

    score: float
    threshold: float
    detected: int
    false: int


def score(
    corpus: Sequence[Series], scores: Sequence[np.ndarray], profile: tuple[float, float, float]
) -> Scored:
    """The corpus' score at the best threshold.

    Walking down the scores, every false detection adds its cost, and a window's worth rises to that of the best of its
    detected rows.
    """
    true, false, missed = profile
    rows: list[tuple[np.ndarray, ...]] = []
    windows = 0
    for series, given in zip(corpus, scores, strict=True):
        if given.shape != series.values.shape or not ((given >= 0) & (given <= 1)).all():
            raise ValueError(f"scores of {series.name}: expected {len(series.values)} numbers from 0 to 1")
        value, window = worth(series)
        kept = slice(series.probation, None)
        inside = window[kept] >= 0
        # a window of which no row is scored counts for nobody
        numbers = {n: windows + k for k, n in enumerate(np.unique(window[kept][inside]).tolist())}
        rows.append((given[kept], value[kept], np.array([numbers.get(n, -1) for n in window[kept].tolist()])))
        windows += len(numbers)
    given, value, window = (np.concatenate(column) for column in zip(*rows, strict=True))
    order = np.argsort(-given, kind="stable")
    best = np.full(windows, -missed)
    total = nothing = -missed * windows
    found, errors = Scored(0.0, 1.1, 0, 0), 0
    highest = total
    for place, row in enumerate(order):
        number = window[row]
        if number < 0:
            total += false * value[row]
            errors += 1
        elif true * value[row] > best[number]:
            total += true * value[row] - best[number]
            best[number] = true * value[row]
        last_of_its_score = place + 1 == len(order) or given[order[place + 1]] != given[row]
        if last_of_its_score and total > highest:
            highest = total
            found = Scored(0.0, float(given[row]), int((best > -missed).sum()), errors)
    return found._replace(score=float(100 * (highest - nothing) / (true * windows - nothing)))


def read_corpus(folder: Path) -> list[Series]:
    """The corpus in `folder`: <group>/<name>.csv or .csv.gz, and combined_windows.json.

    Raises ValueError when labels and files don't fit.
    """
    labels = json.loads((folder / "combined_windows.json").read_text(encoding="utf-8"))
    corpus = []
    for name in sorted(labels):
        path = folder / name
        path = path if path.exists() else path.with_name(path.name + ".gz")
        table = read_csv(path)
        times = table["timestamp"]
        windows = []
        for limits in labels[name]:
            first, last = (
                np.flatnonzero(times == np.datetime64(limit[:19].replace(" ", "T"), "s")) for limit in limits
            )
            if not len(first) or not len(last):
                raise ValueError(f"{path}: no row at an end of the window {limits}")
            windows.append((int(first[0]), int(last[0])))
        corpus.append(Series(name, table.numbers("value"), windows))
    return corpus


# --------------------------------------------------------------------------------------------- the detectors


def windowed_gaussian(values: np.ndarray, size: int = 6400, step: int = 100) -> np.ndarray:
    """The benchmark's detector of that name: one less the tail of the normal distribution of the `size` rows before, which
    move on by `step` rows at a time. Scores have twelve digits, as in the benchmark's files of results: so many are 1."""
    scores = np.zeros(len(values))
    mean = deviation = 0.0
    for row, value in enumerate(values):
        if row:
            scores[row] = 1 - 0.5 * math.erfc(abs(value - mean) / deviation / math.sqrt(2))
        seen = row + 1
        if seen <= size or (seen - size) % step == 0:
            window = values[max(0, seen - size) : seen]
            mean, deviation = float(window.mean()), float(window.std()) or 1e-6
    return np.array([float(f"{one:.12g}") for one in scores])


def likelihood(errors: np.ndarray, probation: int, short: int = 10, long: int = 8000) -> np.ndarray:
    """How unlikely the mean of the last `short` errors is, from 0 to 1, on the benchmark's logarithmic scale.

    Against the normal distribution of such means in the `long` rows before; nothing is said in the probation.
    """
    sums = np.cumsum(np.concatenate([[0.0], errors]))
    ends = np.arange(1, len(errors) + 1)
    means = (sums[ends] - sums[np.maximum(0, ends - short)]) / np.minimum(ends, short)
    totals, squares = np.cumsum(means), np.cumsum(means**2)
    scores = np.zeros(len(errors))
    for row in range(probation, len(errors)):
        first = max(0, row - long)
        count = row - first
        before = (totals[first - 1], squares[first - 1]) if first else (0.0, 0.0)
        mean = (totals[row - 1] - before[0]) / count
        deviation = math.sqrt(max((squares[row - 1] - before[1]) / count - mean**2, 1e-12))
        tail = 0.5 * math.erfc((means[row] - mean) / deviation / math.sqrt(2))
        scores[row] = math.log(tail + 1e-10) / math.log(1e-10)
    return np.clip(scores, 0, 1)


def out_of_range(values: np.ndarray, tolerance: float = 0.05) -> np.ndarray:
    """The trivial detector: 1 where a value lies outside those seen so far by a twentieth of their range, else 0. The
    benchmark's own detectors use this rule beside their networks ("spatial anomaly").

    >>> out_of_range(np.array([0.0, 1.0, 1.04, 1.2, 0.5])).tolist()
    [0.0, 0.0, 0.0, 1.0, 0.0]
    """
    highest, lowest = np.maximum.accumulate(values)[:-1], np.minimum.accumulate(values)[:-1]
    slack = tolerance * (highest - lowest)
    beyond = (values[1:] > highest + slack) | (values[1:] < lowest - slack)
    return np.concatenate([[0.0], np.where((highest > lowest) & beyond, 1.0, 0.0)])


def against_the_largest(surprise: np.ndarray, probation: int, memory: int = 1000) -> np.ndarray:
    """A row's surprise r over the largest of the `memory` rows before it, as r / (1 + r); 0 in the probation.

    >>> against_the_largest(np.array([1.0, 1.0, 3.0, 1.0]), 1, memory=2).tolist()
    [0.0, 0.5, 0.75, 0.25]
    """
    padded = np.concatenate([np.zeros(memory), surprise[:-1]])
    largest = np.lib.stride_tricks.sliding_window_view(padded, memory).max(axis=1)
    ratio = surprise / np.maximum(largest, 1e-3)
    return np.where(np.arange(len(surprise)) >= probation, ratio / (1 + ratio), 0.0)


def surprise(series: Series, settings: dict[str, Any]) -> np.ndarray:
    """What an LSTM did not expect of each row: first one that learned from the probation, and then, whenever the rows seen
    have doubled, one that learned from all of these."""
    from numlstm.estimators import LSTMAnomalyDetector

    count = len(series.values)
    found, first = np.zeros(count), 0
    while first < count:
        seen = max(first, series.probation)
        # the same number of steps of training, however many rows there are; a piece begins every half window
        pieces = max(1, seen // max(1, settings["window"] // 2))
        epochs = min(100, max(2, round(settings["steps"] * 32 / pieces)))
        detector = LSTMAnomalyDetector(
            settings["window"],
            units=settings["units"],
            epochs=epochs,
            rows="steps",
            random_state=settings["seed"],
        ).fit(series.values[:seen])
        stop = min(count, 2 * seen)
        # the rows at once give what they would give one by one: a forecast reads only the rows before
        found[first:stop] = -detector.score_samples(series.values[:stop])[first:]
        first = stop
    return found


# ------------------------------------------------------------------------------------------------- the script


def examined(series: Series, settings: dict[str, Any]) -> tuple[np.ndarray, ...]:
    """The scores of `OURS` for one file. A small network is quickest on one thread; files share out the cores."""
    threads.set_num_threads(1)
    errors = surprise(series, settings)
    ratio, beyond = against_the_largest(errors, series.probation), out_of_range(series.values)
    likely = likelihood(errors, series.probation)
    return ratio, likely, np.maximum(beyond, ratio), beyond, windowed_gaussian(series.values)


def run(
    folder: Path,
    settings: dict[str, Any],
    say: Callable[[str], None],
    files: int | None = None,
    jobs: int = 1,
) -> dict[str, Any]:
    """All detectors over the corpus (or its first `files`), in `jobs` processes; the report."""
    import joblib

    started, about = time.perf_counter(), common.machine()
    corpus = read_corpus(folder)[:files]
    scores: dict[str, list[np.ndarray]] = {name: [] for name in OURS}
    work = joblib.Parallel(jobs, return_as="generator")(joblib.delayed(examined)(s, settings) for s in corpus)
    for number, (series, made) in enumerate(zip(corpus, work, strict=True), 1):
        for name, one in zip(OURS, made, strict=True):
            scores[name].append(one)
        say(
            f"{number:3} of {len(corpus)}  {series.name}: {len(series.values):,} rows, {len(series.windows)} anomalies"
        )
    draw = np.random.default_rng(0)
    scores["random, here"] = [draw.random(len(series.values)) for series in corpus]
    scores["null"] = [np.zeros(len(series.values)) for series in corpus]
    results = []
    for name, given in scores.items():
        found = {profile: score(corpus, given, weights) for profile, weights in PROFILES.items()}
        results.append({"name": name, **{profile: one._asdict() for profile, one in found.items()}})
        line = "  ".join(f"{profile} {one.score:5.1f}" for profile, one in found.items())
        say(f"{name:26} {line}  ({found['standard'].detected} windows, {found['standard'].false} false rows)")
    for name, published in PUBLISHED.items():
        say(
            f"{name:26} "
            + "  ".join(f"{p} {v:5.1f}" for p, v in zip(PROFILES, published, strict=True))
            + "  published"
        )
    return {
        "what": "NAB 1.1 scores, by the benchmark's rules, threshold chosen over the corpus for each profile",
        "machine": about,
        "settings": {**settings, "files": len(corpus)},
        "windows": sum(len(series.windows) for series in corpus),
        "seconds": time.perf_counter() - started,
        "results": results,
        "published": {name: dict(zip(PROFILES, v, strict=True)) for name, v in PUBLISHED.items()},
    }


def picture(report: dict[str, Any], path: Path) -> Path:
    """Our scores among the published ones, one panel a profile."""
    figure, panels = pictures.panels(3, 12, 4.8)
    for axes, profile in zip(panels, PROFILES, strict=True):
        rows = [(name, values[profile], False) for name, values in report["published"].items()]
        rows += [(r["name"], r[profile]["score"], True) for r in report["results"] if r["name"] != "null"]
        rows.sort(key=lambda row: row[1])
        names, values, ours = zip(*rows, strict=True)
        colours = [pictures.ORANGE if n.startswith("LSTM") else pictures.BLUE if o else pictures.GREY
                   for n, o in zip(names, ours, strict=True)]  # fmt: skip
        axes.barh(range(len(rows)), values, color=colours)
        axes.set_axisbelow(True)
        axes.set_yticks(range(len(rows)), names, fontsize=7)
        for place, value in enumerate(values):
            axes.text(value + 1, place, f"{value:.1f}", va="center", fontsize=7)
        axes.set(xlim=(0, 100), title=profile.replace("_", " "), xlabel="NAB score (grey: published)")
    return pictures.save(figure, path, report["machine"])


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.papers.nab", description=__doc__.split("\n\n")[0]
    )
    parser.add_argument(
        "data", type=Path, help="the benchmark's data: <group>/<name>.csv[.gz], combined_windows.json"
    )
    parser.add_argument("--json", action="store_true", help="print the report as JSON instead of lines")
    settings = {"window": 24, "units": 32, "steps": 600, "seed": 0}
    for name, value in settings.items():
        parser.add_argument(f"--{name}", type=int, default=value)
    parser.add_argument("--files", type=int, help="only the first so many files")
    parser.add_argument(
        "--jobs", type=int, default=2, help="processes at once; the scores don't depend on it"
    )
    parser.add_argument("--out", type=Path, help="folder for nab.json and nab.png")
    options = parser.parse_args(argv)
    chosen = {name: getattr(options, name) for name in settings}
    if (
        min(chosen["window"], chosen["units"], chosen["steps"], options.files or 1, options.jobs) < 1
        or chosen["seed"] < 0
    ):
        parser.error("expected sizes of at least 1")
    if not (options.data / "combined_windows.json").is_file():
        parser.error(
            f"no combined_windows.json in {options.data}; the data are those of github.com/numenta/NAB"
        )
    report = run(options.data, chosen, common.speaker(options.json), options.files, options.jobs)
    whole = chosen == settings and options.files is None
    common.deliver("nab", report, picture, whole=whole, out=options.out, as_json=options.json)
    return 0


if __name__ == "__main__":
    sys.exit(main())
