"""`numlstm convert`: a model from one library's file to another's, by the files' endings."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from numlstm.cli.common import Json, command

if TYPE_CHECKING:
    from numlstm.models import Model

ENDINGS = ".safetensors (numlstm, or a PyTorch state_dict), .pt or .pth, .keras, .h5, .onnx"

Source = Annotated[Path, typer.Argument(metavar="SRC", help=f"A model's file: {ENDINGS}.")]
Target = Annotated[
    Path, typer.Argument(metavar="DST", help="Where to, by its ending: .safetensors is numlstm's own format.")
]


def convert(
    source: Source,
    target: Target,
    key: Annotated[
        str | None, typer.Option("--key", help="PyTorch checkpoints: the entry with the state_dict.")
    ] = None,
    prefix: Annotated[
        str, typer.Option("--prefix", help="PyTorch: only tensors whose names start so, such as 'encoder.'.")
    ] = "",
    as_json: Json = False,
) -> None:
    """Bring a model from one library's file to another's.

    PyTorch state_dicts, Keras' files, ONNX graphs and numlstm's own. What cannot be expressed is refused by its name.
    """
    with command(as_json, 0, None) as result:
        if source.exists() and target.exists() and source.samefile(target):
            raise ValueError(f"SRC and DST are the same file, {source}")
        try:
            model = read(source, key, prefix)
            write(model, target)
        except ImportError as error:
            raise ValueError(str(error)) from None
        weights = sum(w.size for w in model.weights)
        result |= {"source": source, "target": target, "layers": [type(x).__name__ for x in model.layers]}
        result |= {"weights": weights, "left_behind": []}
        if model.preprocessing and target.suffix != ".safetensors":
            result["left_behind"] = ["preprocessing"]
            print(f"Left behind, as {target.suffix} has no place for it: how inputs are prepared.")
        print(f"Written: {target} ({len(model.layers)} layers, {weights:,} weights)")


def read(path: Path, key: str | None = None, prefix: str = "") -> Model:
    """A model from a file, by its ending. Raises ValueError for one that is not known."""
    from numlstm import io

    ending = path.suffix.lower()
    is_torch = ending in (".pt", ".pth") or (ending == ".safetensors" and not _is_own(path))
    if not is_torch and (key is not None or prefix):
        raise ValueError(f"--key and --prefix are for PyTorch's files, and {path} is none")
    if is_torch:
        return io.load_torch(path, prefix, key=key)
    readers: dict[str, Any] = {
        ".safetensors": lambda: io.load_model(path),
        ".keras": lambda: io.load_keras(path),
        ".h5": lambda: io.load_keras(path),
        ".onnx": lambda: io.load_onnx(path),
    }
    if ending not in readers:
        raise ValueError(f"SRC: expected a file that ends in {ENDINGS}; got {path}")
    return readers[ending]()


def write(model: Model, path: Path) -> None:
    """A model into a file, by its ending. Raises ValueError for one that is not known."""
    from numlstm import io

    writers: dict[str, Any] = {
        ".safetensors": lambda: model.save(path),
        ".pt": lambda: io.save_torch(model, path),
        ".pth": lambda: io.save_torch(model, path),
        ".keras": lambda: io.save_keras(model, path),
        ".h5": lambda: io.save_keras(model, path),
        ".onnx": lambda: io.save_onnx(model, path),
    }
    if path.suffix.lower() not in writers:
        raise ValueError(f"DST: expected a file that ends in {ENDINGS}; got {path}")
    writers[path.suffix.lower()]()


def _is_own(path: Path) -> bool:
    """Is this a model of numlstm's own, not a PyTorch state_dict? Damaged files are for its reader to describe."""
    import safetensors

    try:
        with safetensors.safe_open(str(path), "numpy") as file:
            return "numlstm" in (file.metadata() or {})
    except safetensors.SafetensorError:
        return True
