"""What an option costs: the time of a layer with it over the time of the plain layer, and the same of Keras.

`python -m benchmarks.options` times a training step (forward and backward over the whole sequence, as benchmarks/cpu.py
does) and inference of every option of the recurrent layers, in turn with the plain layer, and where Keras (on JAX,
compiled) has the same option, in turn with Keras' layer with and without it. An option meets its goal when its
training step takes at most that many times the plain layer's at every shape: 1.5, but 2 for layer normalisation and
for a GRU whose reset gate comes first (a second product in each step), 1.4 for rematerialisation, and 1.3 for a cell
of the user's own, a minimal gated unit, against the built-in GRU. Bidirectional is taken over two plain layers. What
only acts in training is not timed in inference. Shapes are (T, B, I, H): time, batch, input, hidden.

Results go to `benchmarks/results/options.json` and `options.png`; a partial run (`--quick`, `--shapes`, `--only`,
`--no-keras`, `--threads`) writes nothing unless `--out` says where. The exit status is 1 when an option failed to run.
"""

from __future__ import annotations

import argparse
import math
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks import common
from benchmarks.cpu import agreement, paced, shape_list, thread_list
from benchmarks.peers import KERAS
from benchmarks.process import Prepared, Side

SHAPES = [(100, 32, 64, 128), (50, 64, 32, 256), (200, 1, 32, 64)]
WAIT = 90.0  # seconds that the whole run may lose waiting for other processes
LIMIT = 900.0  # seconds after which rows get no more rounds than they must have
MODES = ("training", "inference")
MARKS = "os^vD"  # one a shape


@dataclass(frozen=True)
class Option:
    """One thing to time.

    Attributes:
        layer: the layer's class, or "MGU", a cell of the user's own.
        name: what the table calls it; "plain" for the layer without options.
        options: what the constructor is given; "H/2", "sqrt(T)" stand for what depends on the shape.
        call: what the call is given: "mask" (with holes), "lengths", "state", or nothing.
        goal: the highest ratio of training steps that will do.
        base: the layer it is measured against, if not the same.
        times: over how many plain layers.
        keras: whether Keras has it too; a name when it is called otherwise there.
        trains: it only acts in training.
        draws: it draws random numbers, so that results can't be compared.
    """

    layer: str
    name: str
    options: tuple[tuple[str, Any], ...] = ()
    call: str = ""
    goal: float = 1.5
    base: str = ""
    times: int = 1
    keras: bool = False
    trains: bool = False
    draws: bool = False

    @property
    def title(self) -> str:
        return f"{self.layer} {self.name}"


def catalogue() -> list[Option]:
    """Every option, layer by layer."""

    def o(name: str, call: str = "", **options: Any) -> dict[str, Any]:
        return {"name": name, "call": call, "options": tuple(options.items())}

    masks = [{**o("mask with holes", "mask"), "keras": True}, {**o("lengths", "lengths"), "keras": True}]
    dropouts = [
        {**o("dropout", dropout=0.2), "keras": True, "trains": True, "draws": True},
        {**o("recurrent dropout", recurrent_dropout=0.2), "keras": True, "trains": True, "draws": True},
        {
            **o("recurrent dropout per step", recurrent_dropout=0.2, recurrent_dropout_per_step=True),
            "trains": True,
            "draws": True,
        },
        {**o("dropconnect", recurrent_dropconnect=0.5), "trains": True, "draws": True},
    ]
    zoneout = {**o("zoneout", zoneout=0.1), "draws": True}
    limits = [o("cell_clip", cell_clip=3.0), o("clip", clip=3.0)]
    norm = {**o("layer_norm", layer_norm=True), "goal": 2.0}
    flow = [
        {**o("initial state", "state"), "keras": True},
        {**o("return_state", return_state=True), "keras": True},
        {**o("go_backwards", go_backwards=True), "keras": True},
        o("stateful", stateful=True),
        {**o("remat_steps", remat_steps="sqrt(T)"), "goal": 1.4, "trains": True},
    ]
    both = {**o("bidirectional"), "times": 2, "keras": True}
    curves = [
        {**o("softsign", activation="softsign"), "keras": True},
        {**o("relu", activation="relu"), "keras": True},
    ]
    hard = {**o("hard_sigmoid gates", recurrent_activation="hard_sigmoid"), "keras": True}
    own = {
        "LSTM": [
            *masks, *dropouts, zoneout,
            o("peephole", peephole=True), o("coupled", coupled=True),
            *limits, o("projection", projection="H/2"), norm,
            o("return_cell_sequence", return_cell_sequence=True), *flow, both, *curves, hard,
        ],
        "GRU": [
            *masks, *dropouts, zoneout, *limits, norm, *flow, both, *curves, hard,
            {**o("reset_after=False", reset_after=False), "goal": 2.0, "keras": True},
        ],
        "SimpleRNN": [*masks, *dropouts, zoneout, *limits, norm, *flow, both, *curves],
    }  # fmt: skip
    found = [Option(layer, **fields) for layer, options in own.items() for fields in options]
    return [
        *found,
        Option("IndRNN", "plain", base="SimpleRNN"),
        Option("SLSTM", "plain", base="LSTM"),
        Option("MGU", "a user's cell", base="GRU", goal=1.3),
    ]


@dataclass(frozen=True)
class Question:
    """An option at a shape, in a mode."""

    option: Option
    mode: str
    shape: tuple[int, int, int, int]


def plain_of(option: Option) -> Option:
    """What an option is measured against."""
    return Option(option.base or option.layer, "plain", keras=option.keras)


# ---------------------------------------------------------------------------------------- the numbers

GATES = {"LSTM": 4, "GRU": 3, "SimpleRNN": 1}


@dataclass
class Numbers:
    """Input (B, T, I), weights in Keras' layout and gate order, mask (B, T), states (B, H)."""

    x: np.ndarray
    weights: list[np.ndarray]
    mask: np.ndarray
    lengths: np.ndarray
    states: list[np.ndarray]


def numbers(question: Question) -> Numbers:
    """The same for both sides."""
    T, B, I, H = question.shape
    draw = np.random.default_rng(0)
    option = question.option
    layers = 2 if option.times == 2 else 1
    weights = []
    for _ in range(layers if option.layer in GATES else 0):
        width = GATES[option.layer] * H
        bias = (
            (2, width)
            if option.layer == "GRU" and dict(option.options).get("reset_after", True)
            else (width,)
        )
        weights += [
            draw.uniform(-1, 1, s).astype(np.float32) * H**-0.5 for s in ((I, width), (H, width), bias)
        ]
    mask = draw.random((B, T)) < 0.8
    lengths = draw.integers(max(1, T // 2), T + 1, B)
    states = [
        draw.standard_normal((B, H)).astype(np.float32) for _ in range(2 if option.layer == "LSTM" else 1)
    ]
    return Numbers(draw.standard_normal((B, T, I)).astype(np.float32), weights, mask, lengths, states)


def constructor(option: Option, shape: tuple[int, int, int, int]) -> dict[str, Any]:
    """The constructor's arguments at a shape."""
    T, _, _, H = shape
    meant = {"H/2": H // 2, "sqrt(T)": round(math.sqrt(T))}
    return {k: meant[v] if isinstance(v, str) and v in meant else v for k, v in option.options}


def ours(question: Question) -> Prepared:
    """numlstm through its public layers."""
    import numlstm as nl
    from numlstm.autograd import apply_joint

    option, (T, _, I, H) = question.option, question.shape
    n = numbers(question)
    nl.set_seed(0)
    given = {"return_sequences": True, **constructor(option, question.shape)}
    if option.layer == "MGU":
        layer = nl.RNN(minimal_gated_unit(), H, **given)
    else:
        layer = getattr(nl, option.layer)(H, **given)
    if option.times == 2:
        layer = nl.Bidirectional(layer)
    layer.build((None, T, I))
    weights = n.weights
    if option.layer == "GRU":  # z r h there, r z n here
        weights = [w[..., np.r_[H : 2 * H, :H, 2 * H : 3 * H]] for w in weights]
    if [w.shape for w in weights] == [w.shape for w in layer.weights]:
        layer.set_weights(weights)
    call: dict[str, Any] = {}
    if option.call == "mask":
        call["mask"] = n.mask
    elif option.call == "lengths":
        call["lengths"] = n.lengths
    elif option.call == "state":
        call["initial_state"] = [nl.Variable(s) for s in n.states]

    def outputs(training: bool) -> list[Any]:
        found = layer(x, training=training, **call)
        return found if isinstance(found, list) else [found]

    if question.mode == "inference":
        x = nl.Tensor(n.x)
        return Prepared(lambda: outputs(False), lambda: outputs(False)[0].numpy()[:, -1])
    x = nl.Variable(n.x)
    sources = [x, *layer.trainable_weights, *call.get("initial_state", ())]
    upstream = [gradient(k, y.shape) for k, y in enumerate(outputs(True))]

    def step() -> list[np.ndarray]:
        with nl.GradientTape() as tape:
            # a loss whose gradients are these arrays, so that no other work is timed
            (loss,) = apply_joint((np.zeros((), np.float32),), outputs(True), lambda _: upstream)
        return tape.gradient(loss, sources)

    return Prepared(step, lambda: np.asarray(step()[0])[:, 0])


def minimal_gated_unit() -> Any:
    """Zhou et al. 2016, as a user would write it, the gate applied after the product as in `nl.GRU`."""
    import numlstm as nl

    @nl.cell(gates="fn", state=("h",), split="n")
    def mgu(f, n_x, n_h, h):  # type: ignore[no-untyped-def]
        f = nl.sigmoid(f)
        return (1.0 - f) * h + f * nl.tanh(n_x + f * n_h)

    return mgu


def keras(question: Question) -> Prepared:
    """Keras' own layer, its pure function compiled by JAX as Keras' trainer does, gradients of the same arrays."""
    import jax
    import keras as k

    option, (T, B, I, H) = question.option, question.shape
    n = numbers(question)
    k.utils.set_random_seed(0)
    layer = getattr(k.layers, option.layer)(H, return_sequences=True, **constructor(option, question.shape))
    if option.times == 2:
        layer = k.layers.Bidirectional(layer)
    layer.build((B, T, I))
    layer.set_weights(n.weights + layer.get_weights()[len(n.weights) :])  # what follows: the dropout's seed
    fixed = [v.value for v in layer.non_trainable_variables]
    weights = [v.value for v in layer.trainable_variables]
    call: dict[str, Any] = {}
    if option.call == "mask":
        call["mask"] = jax.numpy.asarray(n.mask)
    elif option.call == "lengths":
        call["mask"] = jax.numpy.asarray(np.arange(T) < n.lengths[:, None])
    states = [jax.numpy.asarray(s) for s in n.states] if option.call == "state" else None
    x = jax.numpy.asarray(n.x)

    def outputs(weights: Any, x: Any, states: Any, training: bool) -> tuple[list[Any], Any]:
        more = call if states is None else {**call, "initial_state": states}
        found, after = layer.stateless_call(weights, fixed, x, training=training, **more)
        return (list(found) if isinstance(found, (list, tuple)) else [found]), after

    if question.mode == "inference":
        infer = jax.jit(lambda weights, x, states: outputs(weights, x, states, False)[0])
        run = lambda: jax.block_until_ready(infer(weights, x, states))
        return Prepared(run, lambda: np.asarray(run()[0])[:, -1])
    shapes = jax.eval_shape(lambda: outputs(weights, x, states, True)[0])
    upstream = [jax.numpy.asarray(gradient(i, s.shape)) for i, s in enumerate(shapes)]

    def backward(weights: Any, x: Any, states: Any, upstream: Any) -> Any:
        # the new seeds are an output too, as in training
        _, pull, after = jax.vjp(lambda *a: outputs(*a, True), weights, x, states, has_aux=True)
        return pull(upstream), after

    compiled = jax.jit(backward)
    step = lambda: jax.block_until_ready(compiled(weights, x, states, upstream))
    return Prepared(step, lambda: np.asarray(step()[0][1])[:, 0])


def gradient(number: int, shape: tuple[int, ...]) -> np.ndarray:
    """What arrives at an output of this shape in the backward pass; the same on both sides."""
    return (np.random.default_rng(1 + number).standard_normal(shape) / shape[0]).astype(np.float32)


SIDES = {"ours": ours, "keras": keras}

# -------------------------------------------------------------------------------------------- the rows


def questions(options: list[Option], shapes: list[tuple[int, ...]]) -> Iterator[Question]:
    """Shape by shape, mode by mode, so that few calls are kept ready at a time."""
    for shape in shapes:
        for mode in MODES:
            for option in options:
                if mode == "training" or not option.trains:
                    yield Question(option, mode, tuple(shape))  # type: ignore[arg-type]


def row(
    question: Question,
    sides: dict[str, Side],
    ready: dict[str, dict[str, np.ndarray]],
    patience: common.Patience,
    settings: dict[str, Any],
) -> dict[str, Any]:
    """Prepare what is not ready, check that both sides compute the same, then time all in turn."""
    option = question.option
    base = plain_of(option)
    asked = ["ours", *(["keras"] if option.keras and "keras" in sides else [])]
    turns: dict[str, Callable[[], common.Window]] = {}
    for side in asked:
        for part, kind in (("plain", base), ("option", option)):
            key = kind.title
            if key not in ready[side]:
                question_of = Question(kind, question.mode, question.shape)
                ready[side][key] = sides[side].prepare(key, question_of)
            turns[f"{side} {part}"] = sides[side].turn(key)
    found: dict[str, Any] = {
        "layer": option.layer,
        "option": option.name,
        "mode": question.mode,
        "label": ",".join(map(str, question.shape)),
        "goal": option.goal if question.mode == "training" else None,
        "against": f"{option.times} x {base.title}" if option.times > 1 else base.title,
    }
    if len(asked) == 2:
        compared = [base] if option.draws else [base, option]
        error = max(agreement(ready["ours"][o.title], ready["keras"][o.title]) for o in compared)
        if not error < 2e-3:
            raise RuntimeError(
                f"{question}: ours and Keras' results differ by {error:.1e} of the largest value"
            )
        found["difference"] = error
    samples, noisy = common.interleave(turns, patience, **settings)
    by_round = {
        side: [r / option.times for r in common.ratios(samples[f"{side} option"], samples[f"{side} plain"])]
        for side in asked
    }
    found |= {
        "plain_ms": samples["ours plain"].seconds * 1e3,
        "option_ms": samples["ours option"].seconds * 1e3,
        "ratio": statistics.median(by_round["ours"]),
        "spread": common.relative_spread(by_round["ours"]),
        "rounds": len(by_round["ours"]),
        "noisy": noisy,
    }
    if found["goal"] is not None:
        found["met"] = found["ratio"] <= found["goal"]
    if len(asked) == 2:
        absolute = common.ratios(samples["ours option"], samples["keras option"])
        found |= {
            "keras_plain_ms": samples["keras plain"].seconds * 1e3,
            "keras_option_ms": samples["keras option"].seconds * 1e3,
            "keras_ratio": statistics.median(by_round["keras"]),
            "ours_over_keras": statistics.median(absolute),
        }
    return found


def summary(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """For each option: geometric mean and worst of the training ratios over the shapes, and Keras' mean.

    Rows that other processes disturbed are left out, unless there are no others.
    """
    found = []
    for key in dict.fromkeys((r["layer"], r["option"]) for r in rows):
        training = [
            r for r in rows if (r["layer"], r["option"]) == key and r["mode"] == "training" and "ratio" in r
        ]
        if not training:
            continue
        counted = [r for r in training if not r["noisy"]] or training
        worst = max(counted, key=lambda r: r["ratio"])
        theirs = [r for r in counted if "keras_ratio" in r]
        found.append(
            {
                "layer": key[0],
                "option": key[1],
                "against": worst["against"],
                "goal": worst["goal"],
                "geometric_mean": common.geometric_mean(r["ratio"] for r in counted),
                "worst": worst["ratio"],
                "worst_shape": worst["label"],
                "met": worst["ratio"] <= worst["goal"],
                "left_out": len(training) - len(counted),
                "keras_geometric_mean": common.geometric_mean(r["keras_ratio"] for r in theirs)
                if theirs
                else None,
                "ours_over_keras": common.geometric_mean(r["ours_over_keras"] for r in theirs)
                if theirs
                else None,
            }
        )
    return found


HEADER = (
    f"{'layer':10}{'option':27}{'mode':10}{'T,B,I,H':>14}{'plain ms':>10}{'with ms':>9}{'ratio':>7}{'goal':>6}"
    f"{'':5}{'Keras':>7}{'ours/Keras':>11}"
)


def line(r: dict[str, Any]) -> str:
    start = f"{r['layer']:10}{r['option']:27}{r['mode']:10}{r['label']:>14}"
    if "error" in r:
        return f"{start}  failed: {r['error']}"
    goal = "" if r["goal"] is None else f"{r['goal']:.1f}"
    met = "" if r["goal"] is None else " met" if r["met"] else " MISS"
    theirs = f"{r['keras_ratio']:>7.2f}{r['ours_over_keras']:>11.2f}" if "keras_ratio" in r else ""
    return (
        f"{start}{r['plain_ms']:>10.3f}{r['option_ms']:>9.3f}{r['ratio']:>7.2f}{goal:>6}{met:5}{theirs}"
        f"{' noisy' if r['noisy'] else ''}"
    )


def summary_line(s: dict[str, Any]) -> str:
    theirs = ""
    if s["keras_geometric_mean"] is not None:
        theirs = f"; Keras' {s['keras_geometric_mean']:.2f}, ours/Keras {s['ours_over_keras']:.2f}"
    return (
        f"{s['layer']:10}{s['option']:27}geometric mean {s['geometric_mean']:.2f}, worst {s['worst']:.2f} at "
        f"{s['worst_shape']} (goal {s['goal']:.1f}: {'met' if s['met'] else 'MISSED'}){theirs}"
    )


def run(
    options: list[Option],
    shapes: list[tuple[int, ...]],
    threads: int,
    with_keras: bool,
    window: float,
    settings: dict[str, Any],
    say: Callable[[str], None],
) -> dict[str, Any]:
    """Measure everything; `say` gets each line as it is known."""
    started = time.perf_counter()
    about = common.machine()
    say(
        f"{about['cpu']}, {threads} of {about['cores']} cores, {' '.join(about['features'])}, load {about['load']}"
    )
    say(", ".join(f"{k} {v}" for k, v in about["packages"].items()) + f", Python {about['python']}")
    say(
        "\nratio: time with the option over the plain layer's; Keras: the same of Keras; below 1 is faster\n"
        + HEADER
    )
    rows: list[dict[str, Any]] = []
    todo = list(questions(options, shapes))
    patience = common.Patience(WAIT)
    with ExitStack() as stack:
        names = ["ours", *(["keras"] if with_keras else [])]
        sides = {
            name: stack.enter_context(
                Side(name, SIDES[name], threads, window, KERAS if name == "keras" else None)
            )
            for name in names
        }
        ready: dict[str, dict[str, np.ndarray]] = {name: {} for name in names}
        place: Any = None
        for question in todo:
            if place != (place := (question.shape, question.mode)):
                for name, side in sides.items():
                    side.forget()
                    ready[name].clear()
            left = LIMIT - (time.perf_counter() - started)
            pace = paced(settings, left / (len(todo) - len(rows)))
            try:
                rows.append(row(question, sides, ready, patience, pace))
            except RuntimeError as error:  # one option that fails must not cost the others' figures
                option = question.option
                rows.append(
                    {
                        "layer": option.layer,
                        "option": option.name,
                        "mode": question.mode,
                        "label": ",".join(map(str, question.shape)),
                        "error": str(error),
                    }
                )
            say(line(rows[-1]))
    summaries = summary(rows)
    say("\n" + "\n".join(summary_line(s) for s in summaries))
    seconds, failed = time.perf_counter() - started, sum("error" in r for r in rows)
    disturbed = sum(r.get("noisy", False) for r in rows)
    say(
        f"{sum(s['met'] for s in summaries)} of {len(summaries)} options meet their goal; {len(rows)} rows in "
        f"{seconds:.0f} s, {disturbed} disturbed by other processes, {failed} failed"
    )
    return {
        "what": "time of a recurrent layer with an option over the plain layer's, float32, CPU",
        "machine": about,
        "threads": threads,
        "settings": {"window_s": window, **settings},
        "seconds": seconds,
        "summary": summaries,
        "rows": rows,
    }


# ----------------------------------------------------------------------------------------- the picture


def picture(report: dict[str, Any], path: Path) -> Path:
    """One panel a layer: each option's training ratio, a dot a shape, its goal as a bar, Keras' mean as a ring."""
    from benchmarks.papers import pictures

    summaries = report["summary"]
    layers = ["LSTM", "GRU", "SimpleRNN"]
    groups = [[s for s in summaries if s["layer"] == layer] for layer in layers]
    groups[-1] += [s for s in summaries if s["layer"] not in layers]
    groups = [g for g in groups if g]
    figure, axes = pictures.panels(len(groups), 5.2 * len(groups), 1.8 + 0.27 * max(map(len, groups)))
    shapes = list(dict.fromkeys(r["label"] for r in report["rows"]))
    colours = (pictures.BLUE, pictures.GREEN, pictures.PURPLE, "#56B4E9", "#E69F00")
    for panel, group in zip(axes, groups, strict=True):
        for at, s in enumerate(group):
            panel.plot([s["goal"]] * 2, [at - 0.38, at + 0.38], color=pictures.ORANGE, linewidth=2.5)
            if s["keras_geometric_mean"] is not None:
                ring = {"color": pictures.GREY, "markersize": 9, "fillstyle": "none"}
                panel.plot(s["keras_geometric_mean"], at, "o", **ring)
            for r in report["rows"]:
                if (r["layer"], r["option"], r["mode"]) == (
                    s["layer"],
                    s["option"],
                    "training",
                ) and "ratio" in r:
                    number = shapes.index(r["label"])
                    panel.plot(
                        r["ratio"], at, MARKS[number % 5], color=colours[number % 5], markersize=5,
                        fillstyle="none" if r["noisy"] else "full",
                    )  # fmt: skip
        names = [
            s["option"] if s["layer"] in layers else f"{s['layer']} / {s['against'].removesuffix(' plain')}"
            for s in group
        ]
        panel.set_yticks(range(len(group)), names)
        panel.invert_yaxis()
        panel.axvline(1, color="black", linewidth=1)
        title = ", ".join(dict.fromkeys(s["layer"] for s in group))
        panel.set(title=title, xlabel="time of a training step / the plain layer's")
    handles = [
        axes[0].plot([], [], MARKS[k % 5], color=colours[k % 5], markersize=5, label=label)[0]
        for k, label in enumerate(shapes)
    ]
    handles += [
        axes[0].plot([], [], color=pictures.ORANGE, linewidth=2.5, label="goal")[0],
        axes[0].plot([], [], "o", color=pictures.GREY, markersize=9, fillstyle="none", label="Keras, mean")[
            0
        ],
    ]
    figure.legend(handles=handles, loc="outside upper center", ncols=len(handles), frameon=False, fontsize=9)
    return pictures.save(figure, path, report["machine"], (*pictures.OWN, "keras", "jax"))


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.options", description=__doc__.split("\n\n")[0]
    )
    parser.add_argument("--json", action="store_true", help="print the report as JSON instead of lines")
    parser.add_argument("--quick", action="store_true", help="one shape, three rounds, no Keras")
    parser.add_argument("--shapes", type=shape_list, help="T,B,I,H;... in place of the set ones")
    parser.add_argument(
        "--only", help="options whose title (such as 'GRU dropout') contains this, in any case"
    )
    parser.add_argument("--no-keras", action="store_true", help="do not time Keras beside it")
    parser.add_argument("--threads", type=thread_list, help="cores given to both sides (default: all)")
    parser.add_argument("--out", type=Path, help="folder for options.json and options.png")
    options = parser.parse_args(argv)
    chosen = [o for o in catalogue() if options.only is None or options.only.lower() in o.title.lower()]
    if not chosen:
        parser.error(
            f"--only: no option contains {options.only!r}; try one of {[o.title for o in catalogue()]}"
        )
    if options.threads and len(options.threads) > 1:
        parser.error(f"--threads: expected one count, got {options.threads}")
    with_keras = not (options.no_keras or options.quick)
    if with_keras and (common.version("keras") is None or common.version("jax") is None):
        parser.error("Keras and JAX are missing: pip install keras jax, or pass --no-keras")
    partial = options.quick or options.shapes or options.only or options.no_keras or options.threads
    settings: dict[str, Any] = {"rounds": 7, "least": 3, "budget": 2.0}
    if options.quick:
        settings = {"rounds": 3, "least": 3, "budget": 1.0}
    say = common.speaker(options.json)
    shapes = options.shapes or (SHAPES[:1] if options.quick else SHAPES)
    threads = options.threads[0] if options.threads else common.cores()
    report = run(chosen, shapes, threads, with_keras, 0.02 if options.quick else 0.05, settings, say)
    common.deliver("options", report, picture, whole=not partial, out=options.out, as_json=options.json)
    return int(any("error" in r for r in report["rows"]))


if __name__ == "__main__":
    sys.exit(main())
