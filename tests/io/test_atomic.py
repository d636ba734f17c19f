"""The writer that leaves all of the old file or all of the new: also when it is interrupted."""

import os
import stat

import pytest

from numlstm.io.atomic import atomic_write, write_bytes, write_text


def names(folder):
    return sorted(os.listdir(folder))


def test_writes_and_replaces(tmp_path):
    path = tmp_path / "a.bin"
    write_bytes(path, b"one")
    write_bytes(path, b"two")
    assert path.read_bytes() == b"two" and names(tmp_path) == ["a.bin"]
    write_text(tmp_path / "b.txt", "zwölf\n")
    assert (tmp_path / "b.txt").read_bytes() == "zwölf\n".encode()


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
def test_an_interruption_leaves_the_old_file_and_nothing_else(tmp_path, error):
    path = tmp_path / "a.txt"
    write_text(path, "old")
    with pytest.raises(error), atomic_write(path, "w") as file:
        file.write("half of the n")
        file.flush()
        assert (
            len(names(tmp_path)) == 2
        )  # the temporary file is beside it, so that renaming stays on one disk
        raise error
    assert path.read_text() == "old" and names(tmp_path) == ["a.txt"]


def test_an_interruption_before_there_was_a_file_leaves_none(tmp_path):
    with pytest.raises(RuntimeError), atomic_write(tmp_path / "a.txt", "w") as file:
        file.write("half")
        raise RuntimeError
    assert names(tmp_path) == []


@pytest.mark.parametrize("step", ["fsync", "replace", "chmod"])
def test_a_failing_disk_leaves_the_old_file(tmp_path, monkeypatch, step):
    path = tmp_path / "a.txt"
    write_text(path, "old")

    def fail(*_arguments, **_options):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, step, fail)
    with pytest.raises(OSError, match="No space"):
        write_text(path, "new")
    monkeypatch.undo()
    assert path.read_text() == "old" and names(tmp_path) == ["a.txt"]


def test_the_content_is_synced_before_it_is_renamed(tmp_path, monkeypatch):
    order = []
    fsync, replace = os.fsync, os.replace
    monkeypatch.setattr(os, "fsync", lambda fd: (order.append("sync"), fsync(fd)))
    monkeypatch.setattr(os, "replace", lambda a, b: (order.append("rename"), replace(a, b)))
    write_bytes(tmp_path / "a", b"x")
    assert order[:2] == ["sync", "rename"]


def test_permissions(tmp_path):
    path = tmp_path / "a.txt"
    umask = os.umask(0o022)
    try:
        write_text(path, "new")
    finally:
        os.umask(umask)
    assert stat.S_IMODE(path.stat().st_mode) == 0o644  # as open() gives, not mkstemp's 0600
    path.chmod(0o640)
    write_text(path, "newer")
    assert stat.S_IMODE(path.stat().st_mode) == 0o640


def test_a_symbolic_link_stays_one(tmp_path):
    real, link = tmp_path / "real.txt", tmp_path / "link.txt"
    write_text(real, "old")
    link.symlink_to(real)
    write_text(link, "new")
    assert link.is_symlink() and real.read_text() == "new"


def test_bad_targets(tmp_path):
    with pytest.raises(FileNotFoundError, match="no folder"):
        write_text(tmp_path / "missing" / "a.txt", "x")
    with pytest.raises(IsADirectoryError, match="is a folder"):
        write_text(tmp_path, "x")
    with (
        pytest.raises(ValueError, match="mode: expected 'w' or 'wb', got 'a'"),
        atomic_write(tmp_path / "a", "a"),
    ):
        pass
