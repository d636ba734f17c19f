"""Every rung of the ladder gives the reference's answer, at sizes that are multiples of nothing."""

from __future__ import annotations

import json
import re
from pathlib import Path

import numpy as np
import pytest

ROOT = Path(__file__).parents[1]
RUNGS = sorted(p.stem for p in (ROOT / "benchmarks" / "ladder").glob("rung*.py"))


@pytest.fixture(autouse=True)
def _root(monkeypatch: pytest.MonkeyPatch) -> None:
    """The repository on the path: benchmarks/ is not part of the installed library."""
    monkeypatch.syspath_prepend(ROOT)


@pytest.mark.parametrize("name", RUNGS)
def test_a_rung_is_right(name: str) -> None:
    from benchmarks import ladder

    rung = ladder.rung(name)
    if (why := rung.unusable()) is not None:
        pytest.skip(why)
    for shape in ((4, 8, 3, 21), (3, 1, 6, 16), (2, 14, 1, 1)):
        asked = ladder.question(*shape)
        right = ladder.right_answer(asked)
        assert ladder.error(rung.forward(*asked), right) <= rung.TOLERANCE
        assert ladder.error(rung.forward(*asked._replace(bias=asked.bias + 0.1)), right) > rung.TOLERANCE / 10


def test_threads_change_no_bit(monkeypatch: pytest.MonkeyPatch) -> None:
    from benchmarks import ladder
    from numlstm.kernels.cpu import threads

    asked = ladder.question(4, 15, 3, 21)
    for name in ("rung5_threads", "rung6_bfloat16"):
        rung = ladder.rung(name)
        if rung.unusable() is None:
            monkeypatch.setattr(threads, "_num_threads", 1)
            one = rung.forward(*asked)
            monkeypatch.setattr(threads, "_num_threads", 3)
            assert np.array_equal(one, rung.forward(*asked))


def test_the_readme_names_every_rung() -> None:
    from benchmarks.ladder import RUNGS as listed

    readme = (ROOT / "benchmarks" / "ladder" / "README.md").read_text(encoding="utf-8")
    assert sorted(listed) == RUNGS == sorted(set(re.findall(r"\((rung\w+)\.py\)", readme)))


def test_a_small_run(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from benchmarks.ladder.__main__ import main

    assert (
        main(["--shape", "3,7,4,20", "--rounds", "2", "--window", "0.002", "--json", "--out", str(tmp_path)])
        == 0
    )
    report = json.loads(capsys.readouterr().out)
    assert report == json.loads((tmp_path / "ladder.json").read_text())
    assert [row["rung"] for row in report["rungs"]] == RUNGS
    assert all(
        row["seconds"] > 0 and row["error"] <= row["tolerance"]
        for row in report["rungs"]
        if not row["skipped"]
    )


def test_a_wrong_rung_is_not_timed(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from benchmarks import ladder
    from benchmarks.ladder.__main__ import main

    monkeypatch.setattr(
        ladder.rung("rung1_numpy"), "forward", lambda x, k, r, b: np.zeros((*x.shape[:2], len(r)))
    )
    assert main(["--shape", "3,7,4,20", "--rounds", "1", "--window", "0.002"]) == 1
    assert "rung1_numpy: off by" in capsys.readouterr().err
