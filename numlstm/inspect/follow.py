"""What a unit seems to follow: things that can be told of a text or a series at each step, and how far a unit goes along.

A feature is a float array (time,), known at its step: nothing looks ahead. The score is Pearson's correlation over the
steps. (The idea: Karpathy, Johnson & Fei-Fei 2015, Visualizing and Understanding Recurrent Networks, who found units for
quotes, brackets and the position in a line.)
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import numpy as np

__all__ = ["correlations", "series_features", "strongest", "text_features"]

OPENING, CLOSING = "([{⟨«", ")]}⟩»"
ENDS = ".!?…"


def text_features(tokens: Sequence[str]) -> dict[str, np.ndarray]:
    """Features of a text, given as characters or words; those that never change are left out.

    >>> found = text_features(list("One (two)\\nis 3"))
    >>> found["position in line"].astype(int).tolist()
    [0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 0, 1, 2, 3]
    >>> found["depth of brackets"].astype(int).tolist()
    [0, 0, 0, 0, 1, 1, 1, 1, 0, 0, 0, 0, 0, 0]
    """
    words = any(len(t) > 1 for t in tokens)
    of: dict[str, Callable[[str], bool]] = {
        "line ends": lambda t: t == "\n",
        "spaces": lambda t: t.isspace() and t != "\n",
        "capitals": lambda t: t[0].isupper(),
        "digits": lambda t: t[0].isdigit(),
        "punctuation": lambda t: not (t[0].isalnum() or t.isspace()),
        "sentence ends": lambda t: t in ENDS,
    }
    if words:
        of["long words"] = lambda t: len(t) > 6
    else:
        of["vowels"] = lambda t: t.lower() in "aeiouäöüáéíóúàèù"
    found = {name: np.array([float(test(t)) for t in tokens]) for name, test in of.items()}
    found["after a line end"] = np.concatenate([[1.0], found["line ends"][:-1]])
    found["position in line"] = _since(found["after a line end"])
    found["position in sentence"] = _since(np.concatenate([[1.0], found["sentence ends"][:-1]]))
    if not words:
        letters = np.array([float(t.isalpha()) for t in tokens])
        found["inside words"] = letters
        found["position in word"] = _since(1 - letters)
    found["position in line (log)"] = np.log1p(found["position in line"])
    found["indentation"] = _indentation(tokens)
    found["depth of brackets"] = _depth(tokens)
    found["inside quotes"] = _quotes(tokens)
    found["position in text"] = np.arange(len(tokens), dtype=np.float64)
    return _changing(found)


def series_features(series: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Features of series (time,) by name: the values, their changes, the size of these, and the step.

    >>> found = series_features({"level": np.array([1.0, 3.0, 2.0])})
    >>> {name: values.tolist() for name, values in found.items()}["level: change"]
    [0.0, 2.0, -1.0]
    """
    found: dict[str, np.ndarray] = {}
    for name, values in series.items():
        values = np.asarray(values, np.float64)
        change = np.diff(values, prepend=values[:1])
        found |= {name: values, f"{name}: change": change, f"{name}: size of change": np.abs(change)}
    length = len(next(iter(found.values()), ()))
    return _changing(found | {"position": np.arange(length, dtype=np.float64)})


def correlations(features: Mapping[str, np.ndarray], values: np.ndarray) -> np.ndarray:
    """Pearson's r of each feature (time,) with each unit of `values` (time, units): (features, units).

    Steps where either is NaN are left out; r is 0 where one of them does not change.

    >>> up = np.arange(4.0)
    >>> correlations({"up": up}, np.stack([up, -up, up * 0], axis=1)).round(6).tolist()
    [[1.0, -1.0, 0.0]]
    """
    out = np.zeros((len(features), values.shape[1]))
    here = ~np.isnan(values).all(axis=1)
    together: dict[bytes, list[int]] = {}  # features known at the same steps share a product
    stacked = np.array([np.asarray(f, np.float64) for f in features.values()]).reshape(
        len(features), len(values)
    )
    known = here & ~np.isnan(stacked)
    for k, steps in enumerate(known):
        together.setdefault(steps.tobytes(), []).append(k)
    for places in together.values():
        steps = known[places[0]]
        if steps.sum() < 2:
            continue
        f, v = stacked[places][:, steps], values[steps].astype(np.float64)
        f -= f.mean(axis=1, keepdims=True)
        v -= v.mean(axis=0)
        scale = np.sqrt((f * f).sum(axis=1)[:, None] * np.einsum("tu,tu->u", v, v))
        # a unit that stands still but for rounding follows nothing
        still = scale <= 1e-12 * steps.sum()
        out[places] = np.where(still, 0.0, (f @ v) / np.where(still, 1.0, scale))
    return out


def strongest(
    features: Mapping[str, np.ndarray], values: np.ndarray, count: int
) -> list[tuple[int, str, float]]:
    """The units of `values` (time, units) that go along most with any feature: unit, feature and r, the strongest first.

    >>> up = np.arange(4.0)
    >>> strongest({"up": up, "even": up % 2}, np.stack([up * 0, 2 - up], axis=1), 2)
    [(1, 'up', -1.0)]
    """
    if not features:
        return []
    r = correlations(features, values)
    best = np.abs(r).argmax(axis=0)
    of = r[best, np.arange(r.shape[1])]
    order = np.argsort(-np.abs(of), kind="stable")[:count]
    names = list(features)
    return [(int(u), names[best[u]], round(float(of[u]), 6)) for u in order if of[u]]


def _changing(features: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    return {
        name: f
        for name, f in features.items()
        if np.nanmax(f, initial=-np.inf) > np.nanmin(f, initial=np.inf)
    }


def _since(starts: np.ndarray) -> np.ndarray:
    """How many steps ago `starts` was last nonzero; counted from the beginning before that."""
    steps = np.arange(len(starts))
    return (steps - np.maximum.accumulate(np.where(starts != 0, steps, 0))).astype(np.float64)


def _indentation(tokens: Sequence[str]) -> np.ndarray:
    """How many blanks the line begins with, so far."""
    found, count, leading = np.zeros(len(tokens)), 0, True
    for k, token in enumerate(tokens):
        if token == "\n":
            count, leading = 0, True
        elif leading and token.isspace():
            count += 1
        else:
            leading = False
        found[k] = count
    return found


def _depth(tokens: Sequence[str]) -> np.ndarray:
    """Open brackets, never below none."""
    found, depth = np.zeros(len(tokens)), 0
    for k, token in enumerate(tokens):
        depth = max(0, depth + (token in OPENING) - (token in CLOSING))
        found[k] = depth
    return found


def _quotes(tokens: Sequence[str]) -> np.ndarray:
    """1 between an opening and a closing double quote; an empty line closes what was left open."""
    found, inside, before = np.zeros(len(tokens)), False, ""
    for k, token in enumerate(tokens):
        if token == '"':
            inside = not inside
        elif token in "“„":
            inside = True
        elif token == "”" or (token == "\n" and before == "\n"):
            inside = False
        found[k], before = inside, token
    return found
