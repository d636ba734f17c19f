"""Sequence to sequence: an encoder LSTM, a decoder LSTM that attends to what the encoder saw, two ways to decode.

Sutskever et al. 2014 with the attention of Luong et al. 2015. Sequences are integers: 0 is padding, `START` and
`END` are put around the targets by the model, and everything from `SPECIALS` on is the user's. Training teaches
by force: the decoder reads the target and predicts its next token. Decoding goes token by token, handing on the
LSTM's state; nothing that was decoded is computed again.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np

from numlstm import losses, ops, random
from numlstm.autograd import Tensor
from numlstm.backend import beside
from numlstm.callbacks import History
from numlstm.data.batches import Batch, Batches, pad
from numlstm.layers import LSTM, Attention, Dense, Dropout, Embedding
from numlstm.layers.base import Shape, fraction, positive, registry
from numlstm.models import Model

__all__ = ["END", "PAD", "SPECIALS", "START", "Seq2Seq", "bleu"]

PAD, START, END = 0, 1, 2
SPECIALS = 3  # how many numbers are taken: a vocabulary's own begin here


class _Memory(NamedTuple):
    """What the decoder may look at: the encoder's outputs (B, S, units), and which steps of them count."""

    outputs: Tensor
    mask: np.ndarray | None

    def rows(self, index: np.ndarray) -> _Memory:
        if self.mask is None:
            return _Memory(self.outputs[index], None)
        return _Memory(self.outputs[index], self.mask[beside(index, self.mask, "index")])


class _State(NamedTuple):
    """Where the decoder stands: its LSTM's states, and its last attentional vector, (B, units) each."""

    h: Tensor
    c: Tensor
    attentional: Tensor

    def rows(self, index: np.ndarray) -> _State:
        return _State(*(t[index] for t in self))


@registry.register()
class Seq2Seq(Model):
    """Encoder-decoder LSTM with attention, over integer sequences.

    Called on [source (batch, S), decoder input (batch, T)], both padded with 0, it gives logits (batch, T,
    target_vocabulary): at each step of the next target token. `fit` takes sources and targets as lists of
    integer sequences; `greedy` and `beam_search` translate.

    Arguments:
        source_vocabulary: source tokens are 1 .. source_vocabulary - 1.
        target_vocabulary: target tokens are 3 .. target_vocabulary - 1; 1 and 2 are start and end.
        units: of the decoder, and of the encoder (half in each direction, if bidirectional).
        embedding_units: size of the token vectors; `units` if not given.
        bidirectional: the encoder reads in both directions.
        score_mode: how decoder and encoder steps are compared: see `Attention`.
        input_feeding: the decoder also reads its last attentional vector (Luong et al. 2015, section 3.3).
            Steps are then computed one by one in training too; without it, all at once.
        dropout: on the vectors that enter the LSTMs and on the attentional vectors.

    Raises:
        ValueError: an unknown option, odd `units` with `bidirectional`, a vocabulary without room.

    >>> model = Seq2Seq(source_vocabulary=10, target_vocabulary=8, units=4)
    >>> model.compile("adam")
    >>> history = model.fit([[4, 5, 6], [7, 8]], [[3, 4], [5]], epochs=2, verbose=0)
    >>> all(len(ids) <= 3 for ids in model.greedy([[4, 5, 6], [7]], max_length=3))
    True
    """

    bidirectional: bool
    input_feeding: bool
    score_mode: str
    dropout: float

    def __init__(
        self,
        source_vocabulary: int,
        target_vocabulary: int,
        units: int = 256,
        *,
        embedding_units: int | None = None,
        bidirectional: bool = True,
        score_mode: str = "general",
        input_feeding: bool = False,
        dropout: float = 0.0,
        **options: Any,
    ) -> None:
        super().__init__(**options)
        self.source_vocabulary: int = positive("source_vocabulary", source_vocabulary)
        self.target_vocabulary: int = positive("target_vocabulary", target_vocabulary)
        self.units: int = positive("units", units)
        self.embedding_units: int = positive("embedding_units", embedding_units or units)
        self.bidirectional, self.input_feeding = bool(bidirectional), bool(input_feeding)
        self.score_mode, self.dropout = score_mode, fraction("dropout", dropout)
        if target_vocabulary <= SPECIALS:
            raise ValueError(
                f"target_vocabulary: expected more than {SPECIALS}, which are padding, start and end, "
                f"got {target_vocabulary}"
            )
        if bidirectional and units % 2:
            raise ValueError(f"units: expected an even number, half for each direction, got {units}")
        dtype: dict[str, Any] = {"dtype": self.dtype}
        recurrent: dict[str, Any] = {"return_sequences": True, "return_state": True, **dtype}
        self.source_embedding: Embedding = Embedding(
            self.source_vocabulary, self.embedding_units, mask_zero=True, name="source_embedding", **dtype
        )
        self.target_embedding: Embedding = Embedding(
            self.target_vocabulary, self.embedding_units, mask_zero=True, name="target_embedding", **dtype
        )
        width = self.units // 2 if self.bidirectional else self.units
        self.encoder: LSTM = LSTM(width, name="encoder", **recurrent)
        if self.bidirectional:
            self.backward_encoder: LSTM = LSTM(width, go_backwards=True, name="backward_encoder", **recurrent)
        self.decoder: LSTM = LSTM(self.units, name="decoder", **recurrent)
        self.attention: Attention = Attention(score_mode=score_mode, name="attention", **dtype)
        self.combine: Dense = Dense(self.units, "tanh", use_bias=False, name="combine", **dtype)
        self.thin: Dropout = Dropout(self.dropout, name="thin", **dtype)
        self.head: Dense = Dense(self.target_vocabulary, name="head", **dtype)
        self.build([(None, None), (None, None)])

    def build(self, input_shape: Any) -> None:
        """Every size is known beforehand."""
        E, H = self.embedding_units, self.units
        self.source_embedding.build((None, None))
        self.target_embedding.build((None, None))
        self.encoder.build((None, None, E))
        if self.bidirectional:
            self.backward_encoder.build((None, None, E))
        self.decoder.build((None, None, E + H if self.input_feeding else E))
        self.attention.build([(None, None, H), (None, None, H)])
        self.combine.build((None, None, 2 * H))
        self.thin.build((None, None, H))
        self.head.build((None, None, H))

    def compute_output_shape(self, input_shape: Any) -> Shape:
        """(batch, decoder's time, target_vocabulary)."""
        return (*input_shape[1], self.target_vocabulary)

    # The computation

    def call(self, inputs: Sequence[Tensor]) -> Tensor:
        """Logits (batch, T, target_vocabulary) for [source (batch, S), decoder input (batch, T)]."""
        if not isinstance(inputs, list) or len(inputs) != 2 or any(x.ndim != 2 for x in inputs):
            raise ValueError(f"{self.name}: expected a list [source (batch, S), decoder input (batch, T)]")
        memory, state = self.encode(inputs[0])
        embedded = self.target_embedding(inputs[1])
        mask, embedded = embedded.mask, self.thin(embedded)
        if self.input_feeding:
            steps = []
            for t in range(embedded.shape[1]):
                state = self._advance(embedded[:, t : t + 1], state, memory)
                steps.append(state.attentional)
            attentional = ops.stack(steps, axis=1)
        else:
            outputs, *_ = self.decoder(embedded, initial_state=[state.h, state.c])
            attentional = self._attend(outputs, memory)
        logits = self.head(attentional)
        logits.mask = mask  # where there is a token to read, there is one to predict
        return logits

    def encode(self, source: Any) -> tuple[_Memory, _State]:
        """What the decoder starts from and looks at, for source ids (batch, S)."""
        embedded = self.source_embedding(source)
        mask, embedded = embedded.mask, self.thin(embedded)
        outputs, h, c = self.encoder(embedded, mask=mask)
        if self.bidirectional:
            back, back_h, back_c = self.backward_encoder(embedded, mask=mask)
            outputs = ops.concatenate([outputs, ops.flip(back, axis=1)])
            h, c = ops.concatenate([h, back_h]), ops.concatenate([c, back_c])
        return _Memory(outputs, mask), _State(h, c, Tensor(np.zeros_like(h.data)))

    def step(self, ids: np.ndarray, state: _State, memory: _Memory) -> tuple[np.ndarray, _State]:
        """One step of decoding: from the last tokens (batch,) to logits (batch, target_vocabulary)."""
        state = self._advance(self.target_embedding(ids[:, None]), state, memory)
        return self.head(state.attentional).numpy(), state

    def _advance(self, embedded: Tensor, state: _State, memory: _Memory) -> _State:
        """The decoder, one step on, for token vectors (batch, 1, embedding_units)."""
        if self.input_feeding:
            embedded = ops.concatenate([embedded, ops.expand_dims(state.attentional, 1)])
        outputs, h, c = self.decoder(embedded, initial_state=[state.h, state.c])
        return _State(h, c, self._attend(outputs, memory)[:, 0])

    def _attend(self, outputs: Tensor, memory: _Memory) -> Tensor:
        """Attentional vectors: tanh(W [context, output]), equation 5 of Luong et al."""
        context = self.attention([outputs, memory.outputs], mask=[None, memory.mask])
        return self.thin(self.combine(ops.concatenate([context, outputs])))

    # Training

    def compile(self, optimizer: Any = "adam", loss: Any = None, *args: Any, **options: Any) -> None:
        """As `Model.compile`; the loss is the cross-entropy of the next token, unless another is given."""
        if loss is None:
            loss = losses.SparseCategoricalCrossentropy(from_logits=True)
        super().compile(optimizer, loss, *args, **options)

    def fit(
        self,
        x: Any = None,
        y: Any = None,
        batch_size: int | None = None,
        epochs: int = 1,
        verbose: int | str = "auto",
        callbacks: Any = None,
        validation_split: float = 0.0,
        validation_data: Any = None,
        shuffle: bool = True,
        *,
        initial_epoch: int = 0,
        steps_per_epoch: int | None = None,
        validation_steps: int | None = None,
        validation_freq: int | Sequence[int] = 1,
    ) -> History:
        """Train on pairs: `x` the sources and `y` the targets, as lists of integer sequences (or padded
        arrays).

        Targets come without start and end. Batches are made of pairs of similar length. `validation_data` is
        (sources, targets); the rest as in `Model.fit`.

        Raises ValueError for what is no sequence of tokens, naming the row.
        """
        pairs = self._pairs(x, y, batch_size)
        if validation_split:
            if validation_data is not None:
                raise ValueError("give validation_split or validation_data, not both")
            pairs, validation_data = pairs.split(validation_split)
        elif validation_data is not None:
            if not isinstance(validation_data, (tuple, list)) or len(validation_data) != 2:
                raise ValueError("validation_data: expected (sources, targets)")
            validation_data = self._pairs(*validation_data, batch_size)  # type: ignore[call-arg]
        return super().fit(
            pairs, epochs=epochs, verbose=verbose, callbacks=callbacks, validation_data=validation_data,
            shuffle=shuffle, initial_epoch=initial_epoch, steps_per_epoch=steps_per_epoch,
            validation_steps=validation_steps, validation_freq=validation_freq,
        )  # fmt: skip

    def evaluate(
        self,
        x: Any = None,
        y: Any = None,
        batch_size: int | None = None,
        verbose: int | str = "auto",
        *,
        return_dict: bool = False,
    ) -> Any:
        """The loss and metrics of sources `x` and targets `y`, in the forms that `fit` takes."""
        return super().evaluate(self._pairs(x, y, batch_size), verbose=verbose, return_dict=return_dict)

    def predict(
        self, x: Any, batch_size: int | None = None, *, max_length: int | None = None
    ) -> list[np.ndarray]:
        """What the model makes of sources alone: `greedy`."""
        return self.greedy(x, max_length=max_length, batch_size=batch_size)

    def _one_batch(self, x: Any, y: Any, sample_weight: Any, mask: Any, lengths: Any) -> Batch:
        """For `train_on_batch` and its like."""
        if not (sample_weight is mask is lengths is None):
            raise ValueError(
                "sample_weight, mask, lengths: not for a Seq2Seq, whose padding says what counts"
            )
        return next(self._pairs(x, y, 2**62).epoch())

    def _pairs(self, x: Any, y: Any, batch_size: int | None) -> _Pairs:
        sources = _sequences("x", x, 1, self.source_vocabulary)
        targets = _sequences("y", y, SPECIALS, self.target_vocabulary)
        if len(sources) != len(targets):
            raise ValueError(f"y: {len(targets)} rows came, expected {len(sources)}, the number of rows of x")
        return _Pairs(sources, targets, 32 if batch_size is None else positive("batch_size", batch_size))

    # Decoding

    def greedy(
        self, x: Any, *, max_length: int | None = None, batch_size: int | None = None
    ) -> list[np.ndarray]:
        """Decode by taking the likeliest token at each step.

        Arguments:
            x: sources, as in `fit`.
            max_length: of the decoded sequences; twice the longest source of a batch and 10 more if not
                given.
            batch_size: sources decoded side by side, 32 if not given.

        Returns for each source its tokens, without start and end.
        """
        found: list[np.ndarray] = []
        for source, limit in self._sources(x, max_length, batch_size):
            with self._running(None):
                found += self._greedy(source, limit)
        return found

    def _greedy(self, source: np.ndarray, limit: int) -> list[np.ndarray]:
        memory, state = self.encode(source)
        ids = np.full(len(source), START)
        tokens = np.zeros((len(source), limit), np.int64)
        lengths = np.full(len(source), limit)
        for t in range(limit):
            logits, state = self.step(ids, state, memory)
            ids = _allowed(logits).argmax(axis=-1)
            tokens[:, t] = ids
            lengths[(ids == END) & (lengths == limit)] = t
            if (lengths <= t).all():
                break
        return [row[:n] for row, n in zip(tokens, lengths, strict=True)]

    def beam_search(
        self,
        x: Any,
        width: int = 5,
        length_penalty: float = 1.0,
        *,
        max_length: int | None = None,
        batch_size: int | None = None,
        return_scores: bool = False,
    ) -> list[Any]:
        """Decode by following the `width` likeliest beginnings.

        A sequence's score is the logarithm of its probability over ((5 + length) / 6) ** length_penalty, its
        end counted in both (Wu et al. 2016, equation 14); one cut off at `max_length` is scored as it is. A
        source is done when no beginning can overtake the `width` best complete ones.

        Arguments:
            x: sources, as in `fit`.
            width: beginnings followed; 1 is `greedy`.
            length_penalty: 0 ranks by probability alone, which favours short sequences.
            max_length, batch_size: as in `greedy`.
            return_scores: for each source a list of (tokens, score), at most `width`, the best first.

        Returns for each source the tokens of its best sequence, without start and end.

        Raises:
            ValueError: a width below 1, a negative penalty, sources that are none.
        """
        positive("width", width)
        if isinstance(length_penalty, bool) or not 0 <= length_penalty < math.inf:
            raise ValueError(f"length_penalty: expected a number >= 0, got {length_penalty!r}")
        found: list[Any] = []
        for source, limit in self._sources(x, max_length, batch_size):
            with self._running(None):
                found += self._beams(source, limit, width, float(length_penalty))
        return found if return_scores else [hypotheses[0][0] for hypotheses in found]

    def _beams(self, source: np.ndarray, limit: int, width: int, penalty: float) -> list[Any]:
        memory, state = self.encode(source)
        beams = [_Beam(width, limit, penalty) for _ in source]
        first = np.arange(len(source)).repeat(width)  # row b * width + k is beginning k of source b
        memory, state, alive = memory.rows(first), state.rows(first), list(range(len(source)))
        for t in range(limit):
            ids = np.concatenate([beams[b].last for b in alive])
            logits, state = self.step(ids, state, memory)
            steps = _log_softmax(logits).reshape(len(alive), width, -1)
            kept = [k for k, b in enumerate(alive) if beams[b].extend(steps[k], last=t == limit - 1)]
            if not kept:
                break
            # Each beginning that is followed takes over the state of the one that it extends.
            state = state.rows(np.concatenate([k * width + beams[alive[k]].parents for k in kept]))
            if len(kept) < len(alive):
                memory = memory.rows((np.array(kept)[:, None] * width + np.arange(width)).ravel())
                alive = [alive[k] for k in kept]
        return [beam.ranked() for beam in beams]

    def _sources(
        self, x: Any, max_length: int | None, batch_size: int | None
    ) -> Iterator[tuple[np.ndarray, int]]:
        """Padded sources (batch, S), and how long their translations may get."""
        sources = _sequences("x", x, 1, self.source_vocabulary)
        size = 32 if batch_size is None else positive("batch_size", batch_size)
        limit = None if max_length is None else positive("max_length", max_length)
        for k in range(0, len(sources), size):
            padded, _ = pad(sources[k : k + size])
            yield padded, limit or 2 * padded.shape[1] + 10


class _Beam:
    """The search for one source: `width` beginnings, and the complete sequences found so far."""

    def __init__(self, width: int, limit: int, penalty: float) -> None:
        self.width, self.limit, self.penalty = width, limit, penalty
        self.tokens = np.zeros((width, 0), np.int64)
        self.scores = np.full(width, -np.inf)  # logarithms of probabilities
        self.scores[0] = 0  # there is one beginning, the empty one
        self.last = np.full(width, START)
        self.parents = np.arange(width)
        self.complete: list[tuple[float, np.ndarray]] = []

    def extend(self, steps: np.ndarray, last: bool) -> bool:
        """Extend by log probabilities (width, vocabulary) of the next token; is there reason to go on?"""
        totals: Any = (self.scores[:, None] + steps).ravel()
        order = np.argsort(-totals, kind="stable")[: 2 * self.width]  # at most `width` of these can be ends
        order = order[np.isfinite(totals[order])]
        parents, ids = order // steps.shape[1], order % steps.shape[1]
        length = self.tokens.shape[1] + 1
        for rank in np.flatnonzero(ids == END):
            if rank < self.width:
                self._add(totals[order[rank]], length, self.tokens[parents[rank]])
        going = np.flatnonzero(ids != END)[: self.width]
        count = len(going)
        self.parents = np.zeros(self.width, np.int64)
        self.last, scores = np.full(self.width, START), np.full(self.width, -np.inf)
        self.parents[:count], self.last[:count] = parents[going], ids[going]
        scores[:count] = totals[order[going]]
        self.scores = scores
        self.tokens = np.concatenate([self.tokens[self.parents], self.last[:, None]], axis=1)
        if last:
            for k in range(count):
                self._add(scores[k], length, self.tokens[k])
            return False
        return count > 0 and not self._settled()

    def _add(self, score: float, length: int, tokens: np.ndarray) -> None:
        self.complete.append((score / self._divisor(length), tokens))

    def _divisor(self, length: int) -> float:
        return ((5 + length) / 6) ** self.penalty

    def _settled(self) -> bool:
        """Can no beginning overtake the `width` best? It only gets less likely, up to the limit."""
        if len(self.complete) < self.width:
            return False
        standing = sorted((score for score, _ in self.complete), reverse=True)[self.width - 1]
        return bool(standing >= self.scores.max() / self._divisor(self.limit))

    def ranked(self) -> list[tuple[np.ndarray, float]]:
        """The complete sequences and their scores, the best first."""
        best = sorted(self.complete, key=lambda found: -found[0])[: self.width]
        return [(tokens, float(score)) for score, tokens in best]


def _allowed(logits: np.ndarray) -> np.ndarray:
    """Padding and start are never decoded."""
    logits = logits.copy()
    logits[:, [PAD, START]] = -np.inf
    return logits


def _log_softmax(logits: np.ndarray) -> np.ndarray:
    """Of all tokens, in float64, with those that are never decoded at -inf."""
    logits = logits.astype(np.float64)
    logits -= logits.max(axis=-1, keepdims=True)
    return _allowed(logits - np.log(np.exp(logits).sum(axis=-1, keepdims=True)))


# Data


class _Pairs(Batches):
    """Batches of sources and targets, similar lengths together: padding is work for nothing."""

    rows: int

    POOL = 50  # batches among which lengths are sorted

    def __init__(self, sources: list[np.ndarray], targets: list[np.ndarray], batch_size: int) -> None:
        self.sources, self.targets, self.batch_size = sources, targets, batch_size
        self.rows = len(sources)
        self.steps = math.ceil(self.rows / batch_size)

    def split(self, part: float) -> tuple[_Pairs, _Pairs]:
        """The first rows, and the last `part` of them."""
        at = math.floor(self.rows * (1 - part)) if 0 < part < 1 else 0
        if not 0 < at < self.rows:
            raise ValueError(f"validation_split: {part!r} of {self.rows} rows leaves none on one side")
        return (
            _Pairs(self.sources[:at], self.targets[:at], self.batch_size),
            _Pairs(self.sources[at:], self.targets[at:], self.batch_size),
        )

    def epoch(
        self, *, shuffle: bool = False, chunk: int | None = None, timed: bool = True
    ) -> Iterator[Batch]:
        if chunk is not None:
            raise ValueError("bptt_steps: a Seq2Seq reads its sequences whole")
        order, size = np.arange(self.rows), self.batch_size
        batches = [order[k : k + size] for k in range(0, self.rows, size)]
        if shuffle:
            batches = self._similar(random.generator())
        for rows in batches:
            source, _ = pad([self.sources[r] for r in rows])
            target, lengths = pad([np.append(self.targets[r], END) for r in rows])
            read = np.concatenate([np.full((len(rows), 1), START), target[:, :-1]], axis=1)
            read[np.arange(target.shape[1]) >= lengths[:, None]] = PAD
            yield Batch([source, read], target, timed=True)  # type: ignore[arg-type]

    def _similar(self, draw: np.random.Generator) -> list[np.ndarray]:
        """The rows in a random order; within pools of batches by length; the batches in a random order."""
        order, size = draw.permutation(self.rows), self.batch_size
        lengths = np.array([(len(self.targets[r]), len(self.sources[r])) for r in range(self.rows)])
        batches = []
        for start in range(0, self.rows, size * self.POOL):
            pool = order[start : start + size * self.POOL]
            pool = pool[np.lexsort(lengths[pool].T)]
            batches += [pool[k : k + size] for k in range(0, len(pool), size)]
        return [batches[k] for k in draw.permutation(len(batches))]


def _sequences(name: str, given: Any, first: int, vocabulary: int) -> list[np.ndarray]:
    """Integer sequences; a padded array's rows lose the zeros behind their ends.

    Raises:
        ValueError: none at all, or something else than tokens, naming the row.
    """
    padded = isinstance(given, np.ndarray) and given.ndim == 2
    if not (padded or isinstance(given, (list, tuple))) or not len(given):
        raise ValueError(f"{name}: expected a list of integer sequences, or a padded array (rows, time)")
    found = []
    for row, sequence in enumerate(given):
        ids = np.asarray(sequence if len(np.shape(sequence)) else [sequence])
        ids = ids if ids.size else ids.astype(np.int64)
        if ids.ndim != 1 or ids.dtype.kind not in "iu" or np.ndim(sequence) != 1:
            raise ValueError(f"{name}[{row}]: expected a sequence of integers, got {sequence!r}")
        if padded and (ids != PAD).any():
            ids = ids[: np.flatnonzero(ids)[-1] + 1]
        elif padded:
            ids = ids[:0]
        bad = ids[(ids < first) | (ids >= vocabulary)]
        if bad.size:
            raise ValueError(f"{name}[{row}]: expected tokens from {first} to {vocabulary - 1}, got {bad[0]}")
        found.append(ids.astype(np.int64))
    return found


def bleu(
    candidates: Sequence[Sequence[Any]], references: Sequence[Sequence[Sequence[Any]]], order: int = 4
) -> float:
    """The BLEU of a corpus, from 0 to 100: Papineni et al. 2002, without smoothing.

    Arguments:
        candidates: one sequence of tokens for each sentence.
        references: for each sentence one or several right ones.
        order: the longest n-grams counted.

    Raises:
        ValueError: no sentence, or another number of candidates than of references.

    >>> round(bleu([["the", "cat", "sat", "on", "it"]], [[["the", "cat", "sat", "on", "mats"]]]), 2)
    66.87
    """
    if len(candidates) != len(references) or not len(candidates):
        raise ValueError(f"candidates: {len(candidates)} came for {len(references)} lists of references")
    hits, totals = np.zeros(order), np.zeros(order)
    length = closest = 0
    for candidate, right in zip(candidates, references, strict=True):
        size = len(candidate)
        length += size
        closest += min((abs(len(r) - size), len(r)) for r in right)[1]
        for n in range(1, order + 1):
            allowed: Counter[Any] = Counter()
            for reference in right:
                allowed |= _ngrams(reference, n)
            ours = _ngrams(candidate, n)
            hits[n - 1] += sum((ours & allowed).values())
            totals[n - 1] += max(0, size - n + 1)
    if not hits.all():
        return 0.0
    brevity = min(0.0, 1 - closest / length)
    return float(100 * np.exp(np.log(hits / totals).mean() + brevity))


def _ngrams(tokens: Sequence[Any], n: int) -> Counter[Any]:
    return Counter(tuple(tokens[k : k + n]) for k in range(len(tokens) - n + 1))
