"""Writing a file so that a reader, or a crash, never meets half of it.

The bytes go to a temporary file in the same folder, are synced to the disk, and the file is then renamed over
the old one: whoever opens the path sees all of the old content or all of the new. Every writer of the library
uses this.
"""

import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO, Any


@contextmanager
def atomic_write(path: str | os.PathLike[str], mode: str = "wb", **options: Any) -> Iterator[IO[Any]]:
    """Open `path` for writing; it appears, or is replaced, only when the block ends without an exception.

    `mode` is "wb" or "w"; `options` (`encoding`, `newline`) go to `open`. After an exception the old file
    stands as it was and nothing is left behind. The permissions of a replaced file are kept; a symbolic link
    stays one. Raises ValueError for another mode, FileNotFoundError when the folder doesn't exist.

    >>> folder = tempfile.TemporaryDirectory()
    >>> with atomic_write(Path(folder.name) / "note.txt", "w", encoding="utf-8") as file:
    ...     _ = file.write("whole or not at all")
    >>> (Path(folder.name) / "note.txt").read_text()
    'whole or not at all'
    >>> folder.cleanup()
    """
    if mode not in ("w", "wb"):
        raise ValueError(f"mode: expected 'w' or 'wb', got {mode!r}")
    target = Path(os.path.realpath(path))
    if target.is_dir():
        raise IsADirectoryError(f"{path} is a folder, not a file that can be written")
    if not target.parent.is_dir():
        raise FileNotFoundError(f"{path} can't be written: there is no folder {target.parent}")
    handle, temporary = tempfile.mkstemp(prefix=f".{target.name}.", suffix=".tmp", dir=target.parent)
    try:
        with os.fdopen(handle, mode, **options) as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.chmod(temporary, _permissions(target))
        os.replace(temporary, target)
    except BaseException:  # also Ctrl-C: the temporary file must not stay
        with suppress(FileNotFoundError):
            os.unlink(temporary)
        raise
    _sync_folder(target.parent)


def write_bytes(path: str | os.PathLike[str], content: bytes) -> None:
    """Write `content` to `path`, whole or not at all."""
    with atomic_write(path) as file:
        file.write(content)


def write_text(path: str | os.PathLike[str], content: str) -> None:
    """Write `content` to `path` as UTF-8 with the line ends as they are, whole or not at all."""
    with atomic_write(path, "w", encoding="utf-8", newline="") as file:
        file.write(content)


def _permissions(target: Path) -> int:
    """Those of the file to be replaced; for a new one, what `open` would have given (mkstemp gives 0600)."""
    if target.exists():
        return target.stat().st_mode & 0o7777
    umask = os.umask(0)
    os.umask(umask)
    return 0o666 & ~umask


def _sync_folder(folder: Path) -> None:
    """Make the rename itself survive a power cut. Some systems (Windows) can't open a folder: nothing to do
    there."""
    flags = getattr(os, "O_DIRECTORY", None)
    if flags is None:
        return
    handle = os.open(folder, flags | os.O_RDONLY)
    try:
        with suppress(OSError):  # file systems without folder sync say EINVAL
            os.fsync(handle)
    finally:
        os.close(handle)
