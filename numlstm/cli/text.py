"""`numlstm demo`, `numlstm train text` and `numlstm generate`: language models of characters or words.

The text is laid out as parallel streams; each epoch walks along them in chunks, carrying the state from chunk
to chunk and sending gradients back through one chunk (truncated backpropagation). Losses are nats a token:
the mean of -ln p(next token). The learning rate falls along a cosine over a number of steps that is fixed
beforehand, so that the same seed gives the same bits however fast the machine is.
"""

from __future__ import annotations

import math
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import numpy as np
import typer

from numlstm.cli.common import (
    Backend,
    Json,
    Out,
    Overwrite,
    Resume,
    Run,
    Seed,
    command,
    duration,
    load_model,
    picture,
    resumed_or_new,
    train_run,
)

if TYPE_CHECKING:
    from numlstm.data.text import Vocabulary
    from numlstm.models import Model

KIND = "text"
"""How a model file's preprocessing says that it is one of these."""

UNIT = {"char": "character", "word": "word"}

FIVE_GRAM = ("5-gram (Witten-Bell)", 1.669)
"""Nats a character of a 5-gram model on the last tenth of tiny Shakespeare: data/files/SOURCES.md."""


DEMO: dict[str, Any] = {"units": 256, "embedding": 64, "streams": 48, "steps": 48, "dropout": 0.25}
"""The demo's network and batches; docs/decisions.md has the figures that chose them."""


@dataclass(frozen=True)
class TextSettings:
    """Everything that decides what a text model becomes; `run.json` keeps it."""

    file: str
    level: str = "char"
    valid: str = "0.1"
    test: str = "0"
    units: int = 256
    layers: int = 1
    embedding: int = 64
    dropout: float = 0.0
    max_words: int = 10_000
    streams: int = 48
    steps: int = 96
    epochs: int = 10
    learning_rate: float = 4e-3
    clip: float = 1.0
    seed: int = 0


def demo(
    out: Annotated[
        Path, typer.Option(help="Folder for the model and the picture; an older demo's is replaced.")
    ] = Path("runs/demo"),
    epochs: Annotated[
        int, typer.Option(min=1, help="Passes over the text; fewer is quicker and worse.")
    ] = 11,
    seed: Seed = 0,
    backend: Backend = None,
    as_json: Json = False,
) -> None:
    """Train an LSTM on Shakespeare and read it.

    A character LSTM on the bundled tiny Shakespeare, about a minute and a half on two cores; it writes as it learns,
    is saved, reloaded, and writes again.
    """
    settings = TextSettings(file="tinyshakespeare", epochs=epochs, seed=seed, **DEMO)
    with command(as_json, seed, backend) as result:
        print("An LSTM learns to write like Shakespeare, one character at a time.\n")
        corpus = _Corpus(settings)
        model = _build(corpus, settings)
        run = Run.start("demo", asdict(settings), [], out=out, stem="demo", overwrite=True)
        result |= _train(run, settings, corpus, model, prompt="ROMEO:\n")
        model, vocabulary = _load(run.model)
        print(f"\nReloaded from {run.model}, it writes:\n")
        result["sample"] = _write(model, vocabulary, "ROMEO:\n", 500, temperature=0.7, seed=seed)
        print(f"\nMore: numlstm generate {run.model} --prompt 'JULIET:' --temperature 0.9")


def train_text(
    context: typer.Context,
    file: Annotated[
        str | None, typer.Argument(help="A UTF-8 text file, or the bundled tinyshakespeare.")
    ] = None,
    level: Annotated[str, typer.Option(help="char or word.")] = "char",
    valid: Annotated[str, typer.Option(help="Share of the text for validation, or a file.")] = "0.1",
    test: Annotated[str, typer.Option(help="Share of the text (its end) for a final test, or a file.")] = "0",
    units: Annotated[int, typer.Option(min=1, help="Units of each LSTM layer.")] = 256,
    layers: Annotated[int, typer.Option(min=1, help="Number of LSTM layers.")] = 1,
    embedding: Annotated[int, typer.Option(min=1, help="Size of a token's vector.")] = 64,
    dropout: Annotated[float, typer.Option(min=0, max=0.95, help="Dropout after each LSTM layer.")] = 0.0,
    max_words: Annotated[
        int, typer.Option(min=2, help="Words to tell apart; the rarer ones are <unk>.")
    ] = 10_000,
    streams: Annotated[int, typer.Option(min=1, help="Stretches of the text read side by side.")] = 48,
    steps: Annotated[int, typer.Option(min=1, help="Tokens that gradients flow back through.")] = 96,
    epochs: Annotated[int, typer.Option(min=1, help="Passes over the text.")] = 10,
    learning_rate: Annotated[
        float, typer.Option(min=1e-9, help="Adam's, at the start of its cosine.")
    ] = 4e-3,
    clip: Annotated[float, typer.Option(min=1e-9, help="Largest norm of the whole gradient.")] = 1.0,
    out: Out = None,
    overwrite: Overwrite = False,
    resume: Resume = None,
    seed: Seed = 0,
    backend: Backend = None,
    as_json: Json = False,
) -> None:
    """Train a language model on a text.

    The epoch that is best on the validation part is kept.
    """
    from numlstm.data.text import BUNDLED_TEXTS

    settings, run = resumed_or_new("train text", TextSettings, context, context.params, resume)
    with command(as_json, settings.seed, backend) as result:
        corpus = _Corpus(settings)
        model = _build(corpus, settings)  # bad input is refused before anything is written
        if run is None:
            named = (settings.file, *(part for part in (valid, test) if _share(part) is None))
            inputs = [Path(name) if Path(name).exists() else BUNDLED_TEXTS[name] for name in named]
            stem = Path(settings.file).stem
            run = Run.start("train text", asdict(settings), inputs, out=out, stem=stem, overwrite=overwrite)
        result |= _train(run, settings, corpus, model)


def generate(
    model: Annotated[Path, typer.Argument(help="A model that 'numlstm train text' or 'demo' saved.")],
    prompt: Annotated[
        str | None, typer.Option(help="The beginning that the model goes on from (a line break if left out).")
    ] = None,
    length: Annotated[int, typer.Option(min=0, help="Tokens to write.")] = 500,
    temperature: Annotated[float, typer.Option(min=0, help="0 takes the likeliest; above 1 is wild.")] = 0.8,
    top_k: Annotated[
        int, typer.Option(min=0, help="Draw from the k likeliest tokens only; 0: from all.")
    ] = 0,
    seed: Seed = 0,
    backend: Backend = None,
    as_json: Json = False,
) -> None:
    """Let a language model write on from a prompt."""
    with command(as_json, seed, backend) as result:
        trained, vocabulary = _load(model)
        prompt = _opening(vocabulary) if prompt is None else prompt
        result |= {"prompt": prompt, "temperature": temperature, "top_k": top_k}
        result["text"] = _write(
            trained, vocabulary, prompt, length, temperature=temperature, top_k=top_k, seed=seed
        )


def _share(part: str) -> float | None:
    """The number that `part` spells, or None when it names a file."""
    try:
        return float(part)
    except ValueError:
        return None


def _parts(settings: TextSettings) -> dict[str, str]:
    """The texts to train on, to validate on and to test on (the last may be empty)."""
    from numlstm.data.text import read_text

    text = read_text(settings.file)
    parts = {"valid": "", "test": ""}
    shares = {"valid": 0.0, "test": 0.0}
    for name in parts:
        value = getattr(settings, name)
        share = _share(value)
        if share is None:
            parts[name] = read_text(value)
        elif not 0 <= share < 1:
            raise ValueError(f"--{name} must be a share in [0, 1) or a file, got {value}")
        else:
            shares[name] = share
    if sum(shares.values()) >= 1:
        raise ValueError(f"--valid {settings.valid} and --test {settings.test} leave nothing to train on")
    # In order: training, validation, test.
    test_at = len(text) - int(len(text) * shares["test"])
    valid_at = test_at - int(len(text) * shares["valid"])
    if shares["valid"]:
        parts["valid"] = text[valid_at:test_at]
    if shares["test"]:
        parts["test"] = text[test_at:]
    if not parts["valid"]:
        raise ValueError(
            f"--valid {settings.valid} leaves no text to validate on; the best model is chosen by it"
        )
    return {"train": text[:valid_at], **parts}


class _Corpus:
    """A text in its parts, as streams of integers, checked: what a model is trained on and judged by."""

    def __init__(self, settings: TextSettings) -> None:
        from numlstm.data.text import Vocabulary, streams

        parts = _parts(settings)
        limit = settings.max_words if settings.level == "word" else None
        self.vocabulary = Vocabulary.fit(parts["train"], settings.level, max_size=limit)  # type: ignore[arg-type]
        self.ids = {name: self.vocabulary.encode(text) for name, text in parts.items() if text}
        needed = settings.streams * settings.steps + 1
        if len(self.ids["train"]) < needed:
            raise ValueError(
                f"the training part has {len(self.ids['train']):,} {settings.level}s; --streams "
                f"{settings.streams} of at least --steps {settings.steps} take {needed:,}: lower one of them"
            )
        self.training = streams(self.ids["train"], settings.streams)
        self.judged = {name: judging_streams(ids) for name, ids in self.ids.items() if name != "train"}
        # The 5-gram's figure holds for the bundled text in its usual split only.
        usual = (settings.file, settings.level, settings.valid, settings.test)
        self.reference = FIVE_GRAM if usual == ("tinyshakespeare", "char", "0.1", "0") else None


def judging_streams(ids: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Streams to judge a model on: up to 32, but of 1,000 tokens or more, as each begins knowing nothing."""
    from numlstm.data.text import streams

    if len(ids) < 2:
        raise ValueError(f"a text to judge by needs at least 2 tokens, got {len(ids)}")
    return streams(ids, max(1, min(32, len(ids) // 1000)))


def _build(corpus: _Corpus, settings: TextSettings) -> Model:
    """The model, compiled."""
    import numlstm as nl

    size = len(corpus.vocabulary)
    # Vectors of unit variance: from Keras' small uniform ones the first epoch learns next to nothing (on tiny
    # Shakespeare 2.6 nats after it in place of 1.9).
    vectors = nl.initializers.RandomNormal(stddev=1.0)
    layers: list[Any] = [
        nl.layers.Embedding(size, settings.embedding, embeddings_initializer=vectors, input_shape=(None,))
    ]
    for _ in range(settings.layers):
        layers.append(nl.layers.LSTM(settings.units, return_sequences=True))
        if settings.dropout:
            layers.append(nl.layers.Dropout(settings.dropout))
    model = nl.Sequential([*layers, nl.layers.Dense(size)])
    updates = settings.epochs * math.ceil(corpus.training[0].shape[1] / settings.steps)
    model.compile(
        optimizer=nl.optimizers.Adam(
            nl.schedules.CosineDecay(settings.learning_rate, updates),
            epsilon=1e-8,  # the first gradients of a recurrent layer are about as small as Keras' 1e-7
            global_clipnorm=settings.clip,
        ),
        loss=nl.losses.SparseCategoricalCrossentropy(from_logits=True),
    )
    return model


def _train(
    run: Run, settings: TextSettings, corpus: _Corpus, model: Model, *, prompt: str | None = None
) -> dict[str, Any]:
    """Train, keep the best epoch, judge it, save it with its vocabulary, and the picture of its curve."""
    from numlstm.data import plots

    began = time.perf_counter()
    vocabulary, (x, y) = corpus.vocabulary, corpus.training
    _introduce(model, settings, corpus)
    history = train_run(
        run,
        model,
        preprocessing={"kind": KIND, "vocabulary": vocabulary.to_dict()},
        callbacks=[_sampler(vocabulary, prompt or _opening(vocabulary), settings.seed)],
        x=x,
        y=y,
        validation_data=corpus.judged["valid"],
        batch_size=settings.streams,
        bptt_steps=settings.steps,
        epochs=settings.epochs,
        shuffle=False,
        backup_every=250,
    )
    seconds = time.perf_counter() - began
    model, _ = _load(run.model)
    best = int(np.argmin(history["val_loss"])) + 1
    losses = {name: _loss(model, streams, settings.steps) for name, streams in corpus.judged.items()}
    print(f"\nTrained in {duration(seconds)}; epoch {best} of {len(history['loss'])} was best on validation.")
    for name, loss in losses.items():
        print(f"{name:<6} {_figure(loss, settings.level)}")
    if corpus.reference:
        name, level = corpus.reference
        print(f"to beat {level:.4f} nats: {name}, same split, from the data's source note")
    drawn = picture(
        lambda: plots.learning_curve(
            history, title="Learning curve", unit=f"nats a {UNIT[settings.level]}", reference=corpus.reference
        ),
        run.folder / "curve.png",
    )
    print("Written: " + ", ".join(str(path) for path in (run.model, drawn) if path))
    result = {
        "model": run.model,
        "picture": drawn,
        "vocabulary": len(vocabulary),
        "parameters": model.count_params(),
        "epochs": len(history["loss"]),
        "best_epoch": best,
        "seconds": seconds,
        "nats": losses,
        "trivial": dict([corpus.reference]) if corpus.reference else None,
    }
    run.finish(result)
    return result


def _introduce(model: Model, settings: TextSettings, corpus: _Corpus) -> None:
    """What will be learned from what."""
    unit = UNIT[settings.level]
    sizes = {"train": "to train on", "valid": "to validate on", "test": "to test on"}
    counts = ", ".join(f"{len(ids):,} {sizes[name]}" for name, ids in corpus.ids.items())
    print(f"Text       {settings.file}: {unit}s: {counts}; {len(corpus.vocabulary)} different")
    for name, ids in corpus.ids.items():
        unknown = float(np.mean(ids == corpus.vocabulary.unknown))
        if unknown:
            print(f"           {unknown:.2%} of the {unit}s {sizes[name]} are not in the vocabulary (<unk>)")
    name = f"LSTM({settings.units})"
    layers = name if settings.layers == 1 else f"{settings.layers} x {name}"
    print(f"Model      {layers}, {model.count_params():,} parameters")
    print(
        f"Training   {settings.epochs} epochs, {settings.streams} streams, "
        f"gradients through {settings.steps} steps"
    )
    if corpus.reference:
        print(f"To beat    {corpus.reference[0]}: {corpus.reference[1]} nats a character on the same split")
    print()


def _sampler(vocabulary: Vocabulary, prompt: str, seed: int) -> Any:
    """A callback that lets the model write a little after each epoch: to watch it learn."""
    from numlstm.callbacks import LambdaCallback
    from numlstm.data import text

    length = 160 if vocabulary.level == "char" else 40

    def write(*_: Any) -> None:
        pieces = text.generate(callback.model, vocabulary, prompt, length, temperature=0.7, seed=seed)
        sample = (prompt + "".join(pieces)).strip("\n")
        print("".join(f"    | {line}\n" for line in sample.split("\n")), flush=True)

    # At the start of the next epoch rather than at the end: below the line with the epoch's figures.
    callback = LambdaCallback(on_epoch_begin=lambda epoch, logs: epoch and write(), on_train_end=write)
    return callback


def _opening(vocabulary: Vocabulary) -> str:
    """A prompt when none is given: a line break if the text has any, else its first token."""
    return "\n" if "\n" in vocabulary else vocabulary.tokens[1]


def _load(path: Path) -> tuple[Model, Vocabulary]:
    from numlstm.data.text import Vocabulary

    model, preprocessing = load_model(path, KIND)
    return model, Vocabulary.from_dict(preprocessing["vocabulary"])


def _write(model: Model, vocabulary: Vocabulary, prompt: str, length: int, **options: Any) -> str:
    """Print a text while it is being written, and give it."""
    from numlstm.data import text

    pieces = text.generate(model, vocabulary, prompt, length, **options)
    print(prompt, end="", flush=True)
    written = [prompt]
    for piece in pieces:
        print(piece, end="", flush=True)
        written.append(piece)
    print()
    return "".join(written)


def _loss(model: Model, streams: tuple[np.ndarray, np.ndarray], steps: int) -> float:
    """Mean nats a token over all streams, the state carried from the first to the last step."""
    return float(model.evaluate(*streams, batch_size=len(streams[0]), bptt_steps=steps, verbose=0))


def _figure(loss: float, level: str) -> str:
    extra = (
        f", perplexity {math.exp(min(loss, 700)):.1f}"
        if level == "word"
        else f", {loss / math.log(2):.3f} bits"
    )
    return f"{loss:.4f} nats a {UNIT[level]}{extra}"


def judge_file(model: Model, preprocessing: dict[str, Any], file: str) -> dict[str, Any]:
    """`numlstm evaluate`: nats a token over a whole text."""
    from numlstm.data.text import Vocabulary, read_text

    vocabulary = Vocabulary.from_dict(preprocessing["vocabulary"])
    ids = vocabulary.encode(read_text(file))
    loss = _loss(model, judging_streams(ids), steps=256)
    unknown = float(np.mean(ids == vocabulary.unknown))
    print(f"{file}: {len(ids):,} {UNIT[vocabulary.level]}s, {unknown:.2%} of them unknown to the model")
    print(_figure(loss, vocabulary.level))
    return {"tokens": len(ids), "unknown": unknown, "nats": loss}


def next_tokens(model: Model, preprocessing: dict[str, Any], file: str) -> list[dict[str, Any]]:
    """`numlstm predict`: the ten likeliest tokens after a text, with their probabilities."""
    from numlstm.data.text import Vocabulary, read_text

    vocabulary = Vocabulary.from_dict(preprocessing["vocabulary"])
    ids = vocabulary.encode(read_text(file))[-4096:]  # no model here remembers further back
    stream = model.stream(1)
    for number in ids:
        logits = np.asarray(stream.step(np.array([number], dtype=np.int32)), dtype=np.float64)[0]
    weights = np.exp(logits - logits.max())
    probabilities = weights / weights.sum()
    likeliest = np.argsort(-probabilities, kind="stable")[:10]
    found = [{"token": vocabulary.tokens[i], "probability": float(probabilities[i])} for i in likeliest]
    for entry in found:
        print(f"{entry['probability']:8.2%}  {entry['token']!r}")
    return found
