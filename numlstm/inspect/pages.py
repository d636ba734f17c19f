"""A model's gates over its input, as one HTML page that needs nothing else: no network, no script from elsewhere.

The page's own files are viewer/page.html, .css, .js and diagrams.html; here they are put together with what was traced.
Numbers go in as a byte each, in steps of 1/191 of what each unit ranges over, packed by zlib, in base64. Whatever comes
from the input or the model is escaped, and a content security policy allows the page's one script (by its hash) and
nothing from outside, so that a text can't bring code along.
"""

from __future__ import annotations

import base64
import hashlib
import html
import json
import re
import zlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from numlstm.inspect import follow
from numlstm.inspect.tracing import LayerTrace, Trace
from numlstm.io.atomic import write_text
from numlstm.kernels.derive import SIGN, Cell, Node
from numlstm.kernels.gates import gate_nodes

__all__ = ["page", "read_block"]

LEVELS, MISSING = (
    191,
    255,
)  # 192 values of a byte, so that even noise packs to 7.7 bits: see `page`'s size in the tests
EXPECTED = 5  # likeliest tokens shown

TITLES = {
    "lstm": {"i": "input gate i", "f": "forget gate f", "g": "candidate g", "o": "output gate o",
             "h": "output h", "c": "cell state c"},
    "gru": {"r": "reset gate r", "z": "update gate z", "n": "candidate n", "h": "output h"},
    "simple": {"h": "output h"},
}  # fmt: skip


def page(
    found: Trace,
    path: str | Path | None = None,
    *,
    tokens: Sequence[str] | None = None,
    series: Mapping[str, np.ndarray] | None = None,
    vocabulary: Sequence[str] | None = None,
    row: int = 0,
    title: str = "What the gates do",
    notes: str = "",
) -> str:
    """The HTML page for one row of a trace: the input coloured by any gate or state of any unit.

    Beside it are the units, sorted by what they seem to follow (`follow`), and the flow diagram of the cell with
    the numbers of the chosen step. Gradients are shown like gates, where the trace has them. Only layers that
    run over as many steps as the input has are shown.

    Arguments:
        found: from `trace`.
        path: where to write it, whole or not at all; nowhere if not given.
        tokens: the input as text, a character or word for each step; or else
        series: the input as numbers, (time,) arrays by name.
        vocabulary: with `tokens`, the tokens that the model's outputs stand for, if these are logits: then the
            page also tells what the model expects next.
        row: of the batch.
        title, notes: what stands above.

    Returns the page's text.

    Raises:
        ValueError: both or neither of tokens and series, a length that is not that of any layer, no such row.

    >>> import numlstm as nl
    >>> model = nl.Sequential([nl.LSTM(4, name="lstm", return_sequences=True)])
    >>> x = np.sin(np.arange(30.0))
    >>> text = page(nl.inspect.trace(model, x[None, :, None]), series={"wave": x})
    >>> "<script" in text, "http:" in text, "https:" in text
    (True, False, False)
    """
    if (tokens is None) == (series is None):
        raise ValueError("tokens, series: expected one of them, to show the input by")
    if series is not None:
        series = {name: np.asarray(v, np.float64) for name, v in series.items()}
        if not series or any(v.ndim != 1 for v in series.values()):
            raise ValueError("series: expected at least one array of shape (time,)")
    lengths = {len(tokens)} if tokens is not None else {len(v) for v in (series or {}).values()}
    steps = next(iter(lengths))
    layers = {
        name: layer
        for name, layer in found.layers.items()
        if next(iter(layer.states.values())).shape[1] == steps
    }
    if len(lengths) > 1 or not layers or not steps:
        have = ", ".join(
            f"{n}: {next(iter(layer.states.values())).shape[1]}" for n, layer in found.layers.items()
        )
        raise ValueError(
            f"{'series' if tokens is None else 'tokens'}: expected as many steps as a layer has ({have}), got "
            f"{', '.join(map(str, sorted(lengths)))}"
        )
    batch = len(next(iter(next(iter(layers.values())).states.values())))
    if not 0 <= row < batch:
        raise ValueError(f"row: expected a number from 0 to {batch - 1}, got {row!r}")
    blocks = _Blocks()
    about: dict[str, Any] = {"steps": steps, "levels": LEVELS}
    if tokens is not None:
        about |= {"tokens": list(tokens), "level": "word" if any(len(t) > 1 for t in tokens) else "char"}
        features = follow.text_features(tokens)
        if vocabulary is not None:
            expects, surprise = _expectations(np.asarray(found.outputs)[row], tokens, vocabulary, blocks)
            about |= {"expects": expects, "vocabulary": list(vocabulary)}
            features |= {"surprise": surprise}
    else:
        about["series"] = [
            {"name": name, "values": [float(f"{v:.6g}") if np.isfinite(v) else None for v in values]}
            for name, values in (series or {}).items()
        ]
        features = follow.series_features(series or {})
    about["features"] = list(features)
    about["layers"] = [_layer(name, layer, row, features, blocks) for name, layer in layers.items()]
    text = _assembled(about, blocks, title, notes)
    if path is not None:
        write_text(Path(path), text)
    return text


class _Blocks:
    """Arrays as text: zlib in base64, each with an id."""

    def __init__(self) -> None:
        self.texts: dict[str, str] = {}

    def add(self, *parts: np.ndarray) -> str:
        raw = b"".join(np.ascontiguousarray(p).astype(p.dtype.newbyteorder("<")).tobytes() for p in parts)
        name = f"block-{len(self.texts)}"
        self.texts[name] = base64.b64encode(zlib.compress(raw, 6)).decode("ascii")
        return name


def read_block(text: str, block: str) -> bytes:
    """The bytes of a block of a page: what its script reads. Raises ValueError where there is none of that id.

    >>> read_block('<script type="text/plain" id="block-0">eJxLBAAAYgBi</script>', "block-0")
    b'a'
    """
    form = re.search(rf'<script type="text/plain" id="{re.escape(block)}">([A-Za-z0-9+/=]*)</script>', text)
    if form is None:
        raise ValueError(f"block: the page has no {block!r}")
    return zlib.decompress(base64.b64decode(form[1]))


def quantized(values: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """(time, units) as levels: for each unit its lowest value and the width of a level, float32, and (units, time) uint8.

    A value is at most half a level, 1/382 of the unit's range, from what it was; NaN and infinity are level 255.
    """
    values = np.asarray(values, np.float64).T
    known = np.isfinite(values)
    low = np.where(known, values, np.inf).min(axis=1, initial=np.inf)
    high = np.where(known, values, -np.inf).max(axis=1, initial=-np.inf)
    low, high = (np.where(np.isfinite(a), a, 0.0).astype(np.float32) for a in (low, high))
    width = ((high.astype(np.float64) - low) / LEVELS).astype(np.float32)
    divisor = np.where(width > 0, width, 1).astype(np.float64)[:, None]
    with np.errstate(invalid="ignore"):
        levels = np.clip(np.rint((np.where(known, values, 0) - low[:, None]) / divisor), 0, LEVELS)
    return low, width, np.where(known, levels, MISSING).astype(np.uint8)


def _layer(
    path: str, layer: LayerTrace, row: int, features: Mapping[str, np.ndarray], blocks: _Blocks
) -> dict[str, Any]:
    """What the page's script reads of a layer."""
    kind = _kind(layer.cell)
    titles = TITLES.get(kind, {})
    arrays = []
    for name, values in layer.arrays().items():
        values = values[row]
        finite = values[np.isfinite(values)]
        gradient = name.startswith("d_") and name.removeprefix("d_") in layer.gradients
        of = name.removeprefix("d_")
        what = "state" if name in layer.states else "gate" if name in layer.cell.gates else "value"
        scores = np.rint(100 * follow.correlations(features, values)).astype(np.int8)
        arrays.append(
            {
                "name": name,
                "title": f"gradient of the loss by {of}" if gradient else titles.get(name, f"{what} {name}"),
                "units": values.shape[1],
                "unipolar": not gradient
                and name in layer.gates
                and bool(finite.size and finite.min() >= 0 and finite.max() <= 1),
                "block": blocks.add(*quantized(values)),
                "follows": blocks.add(scores),
            }
        )
    return {
        "path": path,
        "cell": layer.cell.name,
        "kind": kind,
        "backwards": layer.backwards,
        "gates": list(layer.cell.gates),
        "states": list(layer.states),
        "first": layer.memory,
        "initial": {n: [float(f"{v:.5g}") for v in s[row]] for n, s in layer.initial.items()},
        "equations": equations(layer.cell),
        "arrays": arrays,
    }


def _expectations(
    outputs: np.ndarray, tokens: Sequence[str], vocabulary: Sequence[str], blocks: _Blocks
) -> tuple[dict[str, Any], np.ndarray]:
    """The likeliest tokens after each step, as a block; and -ln p of each step's token, NaN at the first."""
    if outputs.shape != (len(tokens), len(vocabulary)) or len(vocabulary) > 65536:
        raise ValueError(
            f"vocabulary: expected outputs of shape {(len(tokens), len(vocabulary))}, a logit for each of at most "
            f"65,536 tokens, got {outputs.shape}"
        )
    logits = outputs.astype(np.float64)
    logs = logits - logits.max(axis=1, keepdims=True)
    logs -= np.log(np.exp(logs).sum(axis=1, keepdims=True))
    top = min(EXPECTED, len(vocabulary))
    likeliest = np.argsort(-logs, axis=1, kind="stable")[:, :top]
    chances = np.exp(np.take_along_axis(logs, likeliest, axis=1))
    number = {token: k for k, token in enumerate(vocabulary)}
    ids = np.array([number.get(token, 0) for token in tokens])
    surprise = np.full(len(tokens), np.nan)
    surprise[1:] = -logs[np.arange(len(tokens) - 1), ids[1:]]
    block = blocks.add(likeliest.astype(np.uint16), np.rint(65535 * chances).astype(np.uint16))
    return {"top": top, "block": block}, surprise


def _kind(cell: Cell) -> str:
    """Which diagram is true of a cell, by its equations: "lstm", "gru", "simple" or "other"."""
    gates, (output, *rest) = gate_nodes(cell), cell.new
    get = gates.get

    def held(n: Node) -> Node:  # without limits
        while n.op in ("minimum", "maximum") and any(a.op == "const" for a in n.args):
            n = next(a for a in n.args if a.op != "const")
        return n

    def sum_of(n: Node, *products: set[Node | None]) -> bool:
        found = [set(a.args) for a in n.args if a.op == "mul"]
        return n.op == "add" and len(found) == 2 and all(p in found for p in products)

    old = {n.value: n for n in cell.graph.nodes if n.op == "leaf"}
    if cell.gates == ("i", "f", "g", "o") and cell.state == ("h", "c"):
        out = output.args[0] if output.op == "project" else output
        written = sum_of(held(rest[0]), {get("f"), old.get("c")}, {get("i"), get("g")})
        return "lstm" if written and out.op == "mul" and get("o") in out.args else "other"
    if cell.gates == ("r", "z", "n") and cell.state == ("h",):
        z = get("z")
        rest_of_z = next(
            (n for n in cell.graph.nodes if n.op == "sub" and n.args[1] is z and n.args[0].value == 1), None
        )
        return "gru" if sum_of(held(output), {z, old.get("h")}, {rest_of_z, get("n")}) else "other"
    if len(cell.gates) == 1 and cell.state == ("h",) and held(output) is held(get(cell.gates[0])):
        return "simple"
    return "other"


def equations(cell: Cell) -> str:
    """A cell's equations for people: each gate from its pre-activation `~i`, each new state from gates and old states.

    >>> from numlstm.kernels import cells
    >>> print(equations(cells.lstm()))
    i = sigmoid(~i)
    f = sigmoid(~f)
    g = tanh(~g)
    o = sigmoid(~o)
    c = (c_old * f) + (i * g)
    h = o * tanh(c)
    """
    names = gate_nodes(cell)
    # What the equations use of the past carries "_old"; pre-activations a tilde.
    leaves = {
        n: f"{n.value}_old" if n.value in cell.state else n.value for n in cell.graph.nodes if n.op == "leaf"
    }
    others = (*cell.state, *cell.params, *cell.aux)
    pre = {
        n: f"~{n.value if n.op == 'leaf' else name}"
        for n, name in cell.known.items()
        if n.op == "preactivation" or (n.op == "leaf" and n.value not in others)
    }
    given = leaves | pre
    lines = []

    def text(n: Node, top: bool = False) -> str:
        if not top and n in given:
            return given[n]
        if n.op == "leaf" or n in pre:
            return (leaves | pre)[n]
        if n.op == "const":
            return f"{n.value:g}"
        if n.op in SIGN:
            inner = f"{text(n.args[0])} {SIGN[n.op]} {text(n.args[1])}"
            return inner if top else f"({inner})"
        if n.op == "neg":
            return f"-{text(n.args[0])}"
        return f"{n.op}({', '.join(_bare(text(a)) for a in n.args)})"

    for name, n in names.items():
        lines.append(f"{name} = {text(n, top=True)}")
        given[n] = name
    for name, n in reversed(list(zip(cell.state, cell.new, strict=True))):
        lines.append(f"{name} = {text(n, top=n not in names.values())}")
        given[n] = name
    products = {
        n.value if n.op == "preactivation" else None: n for n in cell.graph.nodes if n.op == "preactivation"
    }
    for gate, n in products.items():
        lines.insert(list(names).index(gate), f"~{gate} = W x + R {text(n.args[0])} + b")
    return "\n".join(lines)


def _bare(s: str) -> str:
    """`(a + b)` without its outer parentheses, where they enclose the whole."""
    depth = 0
    for k, ch in enumerate(s):
        depth += (ch == "(") - (ch == ")")
        if depth == 0 and k < len(s) - 1:
            return s
    return s[1:-1] if s.startswith("(") else s


def _assembled(about: Mapping[str, Any], blocks: _Blocks, title: str, notes: str) -> str:
    """The parts as one page. What is put in is never looked at again, so that it can't ask for more."""
    from importlib import resources

    folder = resources.files("numlstm.inspect") / "viewer"
    files = {
        name: (folder / name).read_text(encoding="utf-8") for name in ("page.html", "page.css", "page.js")
    }
    parts = {
        "title": html.escape(title),
        "notes": html.escape(notes),
        "style": files["page.css"],
        "script": files["page.js"],
        "diagrams": (folder / "diagrams.html").read_text(encoding="utf-8"),
        "about": _in_script(json.dumps(about, ensure_ascii=True, allow_nan=False, separators=(",", ":"))),
        "blocks": "\n".join(
            f'<script type="text/plain" id="{name}">{text}</script>' for name, text in blocks.texts.items()
        ),
        "policy": (
            f"default-src 'none'; script-src '{_hash(files['page.js'])}'; style-src '{_hash(files['page.css'])}'"
        ),
    }
    return re.sub(r"\$([a-z]+)", lambda form: parts[form[1]], files["page.html"])


def _in_script(text: str) -> str:
    """JSON that can stand in a script element: nothing in it ends or opens one."""
    return text.replace("&", "\\u0026").replace("<", "\\u003c").replace(">", "\\u003e")


def _hash(text: str) -> str:
    return "sha256-" + base64.b64encode(hashlib.sha256(text.encode()).digest()).decode("ascii")
