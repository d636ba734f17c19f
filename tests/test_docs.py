"""Every example on the pages under docs/ is run."""

import doctest
from pathlib import Path

import pytest

DOCS = Path(__file__).resolve().parents[1] / "docs"


@pytest.mark.parametrize("page", sorted(p.name for p in DOCS.glob("*.md")))
def test_examples(page: str) -> None:
    text = (DOCS / page).read_text(encoding="utf-8").replace("```\n", "\n")  # a fence is not an answer
    test = doctest.DocTestParser().get_doctest(text, {}, page, page, 0)
    report: list[str] = []
    runner = doctest.DocTestRunner(verbose=False)
    runner.run(test, out=report.append)
    assert runner.summarize(verbose=False).failed == 0, "".join(report)


def test_the_page_on_cells_has_examples() -> None:
    examples = doctest.DocTestParser().get_examples((DOCS / "cells.md").read_text(encoding="utf-8"))
    assert len(examples) > 8
