"""Text as integers, and integers as text again.

A `Vocabulary` numbers the characters or the words of a text; `streams` lays a long text out as parallel
streams for truncated backpropagation through time (row b continues from one chunk to the next, so a
recurrent state can be carried on); `generate` draws new text from a model, one token at a time.
Shapes: ids are (N,) int32, streams are (B, T) int32, logits are (V,) float.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np

__all__ = ["BUNDLED_TEXTS", "Vocabulary", "generate", "read_text", "sample", "streams"]

Level = Literal["char", "word"]

UNKNOWN = "<unk>"
"""The token that stands for every token outside a vocabulary; always number 0."""

BUNDLED_TEXTS = {"tinyshakespeare": Path(__file__).parent / "files" / "tinyshakespeare.txt"}
"""Texts that come with the library, by name (origin and licence: data/files/SOURCES.md)."""

# Words keep inner apostrophes and hyphens; line breaks are tokens, since a text without them reads badly;
# markers such as <unk> in already prepared texts stay whole.
_WORD = re.compile(r"\n|<\w+>|\w+(?:['’\-]\w+)*|[^\w\s]")
_NO_SPACE_BEFORE = frozenset(".,;:!?)]}%’'\n")
_NO_SPACE_AFTER = frozenset("([{\n")


def read_text(source: str | Path) -> str:
    """Read a UTF-8 text file, or a bundled text by its name.

    Line ends become `\\n` whatever the platform wrote, and a byte-order mark is dropped.

    Raises:
        ValueError: the file is empty or is not UTF-8 text.
        FileNotFoundError: no such file, and no bundled text of that name.

    >>> len(read_text("tinyshakespeare"))
    1115394
    """
    path = Path(source)
    if not path.exists():
        if str(source) not in BUNDLED_TEXTS:
            raise FileNotFoundError(f"no file {str(source)!r}; bundled texts: {', '.join(BUNDLED_TEXTS)}")
        path = BUNDLED_TEXTS[str(source)]
    if path.is_dir():
        raise ValueError(f"{path} is a folder; a text file was expected")
    try:
        text = path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise ValueError(
            f"{path} is not UTF-8 text: byte {error.start} is {error.object[error.start]:#04x}"
        ) from None
    if not text:
        raise ValueError(f"{path} is empty; a text was expected")
    return text


class Vocabulary:
    """A two-way table between tokens (characters or words) and the integers 0 .. size-1.

    Number 0 is the unknown token, so that a text seen later never fails to encode; `unknown` says which
    number that is. Build one with `Vocabulary.fit`; keep it beside a model with `to_dict` and `from_dict`.

    Raises:
        ValueError: an unknown level, repeated tokens, or a first token that is not the unknown one.

    >>> vocabulary = Vocabulary.fit("to be or not to be", level="word")
    >>> vocabulary.tokens
    ('<unk>', 'be', 'to', 'not', 'or')
    >>> vocabulary.decode(vocabulary.encode("not to see"))
    'not to <unk>'
    """

    unknown = 0

    def __init__(self, tokens: Iterable[str], level: Level = "char") -> None:
        self.tokens: tuple[str, ...] = tuple(tokens)
        self.level: Level = _check_level(level)
        self._ids = {token: number for number, token in enumerate(self.tokens)}
        if len(self._ids) != len(self.tokens):
            repeated = [token for token, count in Counter(self.tokens).items() if count > 1]
            raise ValueError(f"tokens must differ from one another, got {repeated[0]!r} more than once")
        if not self.tokens or self.tokens[0] != UNKNOWN:
            raise ValueError(f"tokens must begin with {UNKNOWN!r}, got {self.tokens[:1]}")

    @classmethod
    def fit(
        cls, text: str, level: Level = "char", *, max_size: int | None = None, min_count: int = 1
    ) -> Vocabulary:
        """The vocabulary of a text: characters in code order, words by falling frequency.

        `max_size` (the unknown token included) and `min_count` keep the frequent tokens only.

        Raises:
            ValueError: an empty text, an unknown level, a limit that leaves no token.

        >>> len(Vocabulary.fit("hello"))
        5
        """
        if not text:
            raise ValueError("text is empty; a vocabulary needs at least one token")
        if max_size is not None and max_size < 2:
            raise ValueError(f"max_size must be at least 2, got {max_size}")
        if min_count < 1:
            raise ValueError(f"min_count must be at least 1, got {min_count}")
        counts = Counter(_tokens(text, _check_level(level)))
        counts.pop(UNKNOWN, None)
        # Ties in frequency are broken by the token itself: the same text gives the same numbers anywhere.
        frequent = sorted(counts, key=lambda token: (-counts[token], token))
        kept = [token for token in frequent if counts[token] >= min_count]
        kept = kept[: None if max_size is None else max_size - 1]
        if not kept:
            raise ValueError(f"no token occurs min_count={min_count} times in the text")
        return cls([UNKNOWN, *(sorted(kept) if level == "char" else kept)], level)

    def __len__(self) -> int:
        return len(self.tokens)

    def __contains__(self, token: str) -> bool:
        return token in self._ids

    def __repr__(self) -> str:
        return f"Vocabulary({len(self)} {self.level}s)"

    def encode(self, text: str) -> np.ndarray:
        """The tokens of `text` as (N,) int32; a token outside the vocabulary becomes `unknown`.

        >>> Vocabulary.fit("abc").encode("cab!").tolist()
        [3, 1, 2, 0]
        """
        ids = self._ids
        return np.fromiter((ids.get(token, 0) for token in _tokens(text, self.level)), dtype=np.int32)

    def decode(self, ids: Iterable[int]) -> str:
        """Numbers back to text. Characters come back exactly; words are joined with the usual spacing.

        Raises:
            ValueError: a number outside 0 .. size-1.

        >>> vocabulary = Vocabulary.fit("Well, yes.", level="word")
        >>> vocabulary.decode(vocabulary.encode("Well, yes."))
        'Well, yes.'
        """
        pieces: list[str] = []
        for token in self._lookup(ids):
            if self.level == "word" and pieces and _spaced(pieces[-1], token):
                pieces.append(" ")
            pieces.append(token)
        return "".join(pieces)

    def to_dict(self) -> dict[str, Any]:
        """A JSON-able description, for a model file's metadata."""
        return {"level": self.level, "tokens": list(self.tokens)}

    @classmethod
    def from_dict(cls, description: Mapping[str, Any]) -> Vocabulary:
        """The vocabulary that `to_dict` described.

        >>> Vocabulary.from_dict(Vocabulary.fit("abc").to_dict()).tokens
        ('<unk>', 'a', 'b', 'c')
        """
        missing = {"level", "tokens"} - set(description)
        if missing:
            raise ValueError(f"a vocabulary's description lacks {sorted(missing)}")
        return cls(description["tokens"], description["level"])

    def _lookup(self, ids: Iterable[int]) -> Iterator[str]:
        for number in ids:
            if not 0 <= number < len(self.tokens):
                raise ValueError(f"ids must lie in 0..{len(self.tokens) - 1}, got {number}")
            yield self.tokens[number]


def _check_level(level: str) -> Level:
    if level not in ("char", "word"):
        raise ValueError(f"level must be 'char' or 'word', got {level!r}")
    return level  # type: ignore[return-value]


def _tokens(text: str, level: Level) -> Sequence[str]:
    return text if level == "char" else _WORD.findall(text)


def _spaced(before: str, after: str) -> bool:
    return before not in _NO_SPACE_AFTER and after not in _NO_SPACE_BEFORE


def streams(ids: np.ndarray, batch_size: int) -> tuple[np.ndarray, np.ndarray]:
    """Cut a long text into `batch_size` streams: x and y, both (B, T), where y is x one step later.

    Row b is one unbroken stretch of the text, so a state carried from chunk to chunk of a row sees what it
    would see reading on. The last `(N-1) % batch_size` tokens are left out, to make the rows equally long.

    Raises:
        ValueError: ids that are not a 1-D integer array, or fewer than batch_size + 1 of them.

    >>> x, y = streams(np.arange(8), batch_size=2)
    >>> x.tolist(), y.tolist()
    ([[0, 1, 2], [3, 4, 5]], [[1, 2, 3], [4, 5, 6]])
    """
    ids = np.asarray(ids)
    if ids.ndim != 1 or not np.issubdtype(ids.dtype, np.integer):
        raise ValueError(f"ids must be a 1-D array of integers, got shape {ids.shape}, dtype {ids.dtype}")
    if batch_size < 1:
        raise ValueError(f"batch_size must be at least 1, got {batch_size}")
    steps = (len(ids) - 1) // batch_size
    if steps < 1:
        raise ValueError(
            f"the text has {len(ids)} tokens; {batch_size} parallel streams need at least {batch_size + 1}"
        )
    used = batch_size * steps
    return ids[:used].reshape(batch_size, steps), ids[1 : used + 1].reshape(batch_size, steps)


def sample(
    logits: np.ndarray,
    generator: np.random.Generator,
    *,
    temperature: float = 1.0,
    top_k: int = 0,
    banned: Sequence[int] = (),
) -> int:
    """Draw one token from `logits` (V,): the higher the temperature, the bolder; 0 takes the likeliest.

    `top_k` keeps the k likeliest tokens only (0 keeps all); `banned` tokens are never drawn.

    Raises:
        ValueError: a negative temperature or top_k, logits that are not 1-D, or none left to draw.

    >>> sample(np.array([0.0, 3.0, 1.0]), np.random.default_rng(0), temperature=0.0)
    1
    """
    scores = np.array(logits, dtype=np.float64)
    if scores.ndim != 1:
        raise ValueError(f"logits must have shape (V,), got {scores.shape}")
    if not temperature >= 0 or not np.isfinite(temperature):
        raise ValueError(f"temperature must be a finite number >= 0, got {temperature}")
    if top_k < 0:
        raise ValueError(f"top_k must be >= 0, got {top_k}")
    scores[list(banned)] = -np.inf
    if not np.isfinite(scores.max(initial=-np.inf)):
        raise ValueError("no token is left to draw: every logit is banned or not finite")
    if temperature == 0:
        return int(scores.argmax())
    if 0 < top_k < len(scores):
        # A stable sort, so that ties at the k-th place are cut the same way on every platform.
        scores[np.argsort(-scores, kind="stable")[top_k:]] = -np.inf
    with np.errstate(over="ignore"):  # a tiny temperature sends the others to -inf, and their weight to 0
        weights = np.exp((scores - scores.max()) / temperature)
    # The inverse of the cumulative distribution: one uniform number a token.
    cumulative = np.cumsum(weights)
    return int(np.searchsorted(cumulative, generator.random() * cumulative[-1], side="right"))


def generate(
    model: Any,
    vocabulary: Vocabulary,
    prompt: str,
    length: int,
    *,
    temperature: float = 0.8,
    top_k: int = 0,
    seed: int = 0,
) -> Iterator[str]:
    """Read `prompt` into a model's state, then write on, giving `length` pieces of text one at a time.

    `model` is anything with `stream(1).step(ids (1,)) -> logits (1, V)`. The unknown token is never written.
    Randomness comes from `seed` alone: the same model, prompt and seed give the same text. Word-level
    pieces carry the space before them.

    Raises:
        ValueError: an empty prompt, a prompt token outside the vocabulary, or a negative length.

    >>> class Alphabet:                       # after each letter, the next one
    ...     def stream(self, batch_size):
    ...         return self
    ...     def step(self, ids):
    ...         return np.eye(5)[(ids + 1) % 5] * 50
    >>> "".join(generate(Alphabet(), Vocabulary.fit("abcd"), "a", 3))
    'bcd'
    """
    if length < 0:
        raise ValueError(f"length must be >= 0, got {length}")
    tokens = _tokens(prompt, vocabulary.level)
    if not tokens:
        raise ValueError("prompt is empty; give at least one token to begin with")
    strangers = sorted({token for token in tokens if token not in vocabulary})
    if strangers:
        shown = ", ".join(repr(token) for token in strangers[:5])
        raise ValueError(f"prompt holds {vocabulary.level}s that the model has never seen: {shown}")

    def write() -> Iterator[str]:
        random = np.random.Generator(np.random.Philox(seed))
        stream = model.stream(1)
        for number in vocabulary.encode(prompt):
            logits = np.asarray(stream.step(np.array([number], dtype=np.int32)))[0]
        before = tokens[-1]
        for _ in range(length):
            number = sample(
                logits, random, temperature=temperature, top_k=top_k, banned=(Vocabulary.unknown,)
            )
            token = vocabulary.tokens[number]
            yield f" {token}" if vocabulary.level == "word" and _spaced(before, token) else token
            before = token
            logits = np.asarray(stream.step(np.array([number], dtype=np.int32)))[0]

    return write()
