"""Translate English into French: an encoder-decoder LSTM with attention, trained on sentence pairs.

    python examples/translate.py fra.txt.gz --epochs 8

The file has a pair a line, English TAB French (and perhaps more columns, which are left aside), as the
collections of manythings.org/anki do, made from tatoeba.org. One English sentence has several French
versions: sentences, not lines, are split into training, validation and test, and all versions of a test
sentence count as right in its BLEU. Beside it stands the BLEU of the copy baseline, which gives the English
sentence back.
"""

from __future__ import annotations

import argparse
import gzip
import re
import time
import unicodedata
from collections import defaultdict
from pathlib import Path

import numpy as np

import numlstm as nl
from numlstm.data.text import Vocabulary
from numlstm.seq2seq import SPECIALS, bleu

Pairs = dict[str, list[str]]  # an English sentence and its French versions


def normalized(sentence: str) -> str:
    """Lower case; words, apostrophes and punctuation apart: the French put narrow spaces before theirs."""
    text = unicodedata.normalize("NFKC", sentence).lower().replace("’", "'")
    return " ".join(re.findall(r"\w+|[^\w\s]", text))


def read_pairs(path: Path, max_words: int) -> Pairs:
    """All sentences with at most so many words on both sides."""
    pairs: Pairs = defaultdict(list)
    with (
        gzip.open(path, "rt", encoding="utf-8")
        if path.suffix == ".gz"
        else path.open(encoding="utf-8") as file
    ):
        for number, line in enumerate(file, 1):
            columns = line.rstrip("\n").split("\t")
            if len(columns) < 2:
                raise SystemExit(f"{path}, line {number}: expected English TAB French, got {line[:60]!r}")
            english, french = normalized(columns[0]), normalized(columns[1])
            if max(len(english.split()), len(french.split())) <= max_words and french not in pairs[english]:
                pairs[english].append(french)
    return {english: versions for english, versions in pairs.items() if versions}


def split(pairs: Pairs, limit: int | None, seed: int) -> tuple[Pairs, Pairs, Pairs]:
    """90, 5 and 5 in a hundred English sentences."""
    order = np.random.default_rng(seed).permutation(sorted(pairs))[:limit].tolist()
    held = max(1, len(order) // 20)
    parts = order[2 * held :], order[:held], order[held : 2 * held]
    return tuple({english: pairs[english] for english in part} for part in parts)  # type: ignore[return-value]


class Words:
    """Words to the numbers of a `Seq2Seq`, which keeps the first three for itself, and back."""

    def __init__(self, sentences: list[str], min_count: int) -> None:
        self.vocabulary = Vocabulary.fit(" ".join(sentences), level="word", min_count=min_count)
        self.size = len(self.vocabulary) + SPECIALS

    def encode(self, sentence: str) -> np.ndarray:
        return self.vocabulary.encode(sentence) + SPECIALS

    def decode(self, ids: np.ndarray) -> list[str]:
        return [self.vocabulary.tokens[i - SPECIALS] for i in ids]


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("path", type=Path, help="English TAB French a line; .gz too")
    parser.add_argument("--epochs", type=int, default=8)
    parser.add_argument("--units", type=int, default=256)
    parser.add_argument("--batch-size", type=int, default=64)
    parser.add_argument("--max-words", type=int, default=10, help="leave longer sentences aside")
    parser.add_argument("--sentences", type=int, help="use this many English sentences only")
    parser.add_argument("--min-count", type=int, default=2, help="rarer words are unknown")
    parser.add_argument("--test-sentences", type=int, default=1000, help="at most so many are translated")
    parser.add_argument("--width", type=int, default=5, help="of the beam")
    parser.add_argument("--dropout", type=float, default=0.2)
    parser.add_argument("--minutes", type=float, help="stop training after the epoch in which they are over")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--save", type=Path, help="write the model to this .safetensors file")
    options = parser.parse_args()

    nl.set_seed(options.seed)
    train, valid, test = split(read_pairs(options.path, options.max_words), options.sentences, options.seed)
    flat = [[(en, fr) for en, versions in part.items() for fr in versions] for part in (train, valid)]
    english = Words([en for en, _ in flat[0]], options.min_count)
    french = Words([fr for _, fr in flat[0]], options.min_count)
    print(
        f"{len(train)} English sentences to train on in {len(flat[0])} pairs, {len(valid)} and {len(test)} held out"
    )
    print(f"{english.size} English and {french.size} French words")

    model = nl.Seq2Seq(english.size, french.size, options.units, dropout=options.dropout)
    model.compile(nl.optimizers.Adam(0.002, global_clipnorm=1.0))
    data, validation = (([english.encode(a) for a, _ in p], [french.encode(b) for _, b in p]) for p in flat)
    began = time.monotonic()

    def watch_the_clock(epoch: int, logs: dict[str, float]) -> None:
        if options.minutes and time.monotonic() - began > 60 * options.minutes:
            model.stop_training = True

    watcher = nl.callbacks.LambdaCallback(on_epoch_end=watch_the_clock)
    model.fit(
        *data,
        batch_size=options.batch_size,
        epochs=options.epochs,
        validation_data=validation,
        callbacks=[watcher],
    )
    if options.save:
        words = {"english": english.vocabulary.to_dict(), "french": french.vocabulary.to_dict()}
        model.save(options.save, preprocessing=words)

    sentences = list(test)[: options.test_sentences]
    sources = [english.encode(s) for s in sentences]
    greedy = [french.decode(t) for t in model.greedy(sources)]
    beam = [french.decode(t) for t in model.beam_search(sources, options.width)]
    right = [[version.split() for version in test[s]] for s in sentences]
    print(f"\nBLEU of {len(sentences)} test sentences, and of their single words:")
    for name, found in (
        ("copy", [s.split() for s in sentences]), ("greedy", greedy), (f"beam of {options.width}", beam),
    ):  # fmt: skip
        print(f"  {name:12} {bleu(found, right):5.1f} {bleu(found, right, order=1):5.1f}")
    for k in range(min(10, len(sentences))):
        print(f"\n  {sentences[k]}\n> {' '.join(beam[k])}\n= {test[sentences[k]][0]}")


if __name__ == "__main__":
    main()
