"""Files and directories that have lost their name while somebody has them open."""

from __future__ import annotations

import mmap
import os

import pytest
from support.mounts import Maker
from support.procs import errno_of
from support.sys import link_fd
from support.trees import F, Hard

pytestmark = pytest.mark.every_data_mode


@pytest.mark.parametrize("layer", ["upper", "lower", "copied"])
def test_open_unlinked(make_union: Maker, layer: str) -> None:
    """Everything works by descriptor: fstat says nlink 0, data, size, mode and times can be read and changed."""
    u = make_union(
        [{} if layer == "upper" else {"f": F("content", 0o640)}], {"f": F("content", 0o640)} if layer == "upper" else {}
    )
    if layer == "copied":
        os.chmod(u / "f", 0o640)
    fd = os.open(u / "f", os.O_RDWR)
    number = os.fstat(fd).st_ino
    os.unlink(u / "f")
    assert os.listdir(u.merged) == []
    assert os.fstat(fd).st_nlink == 0
    assert os.fstat(fd).st_ino == number
    assert os.pread(fd, 100, 0) == b"content"
    os.pwrite(fd, b"C", 0)
    os.ftruncate(fd, 3)
    os.fchmod(fd, 0o600)
    os.fchown(fd, 3, 4)
    os.utime(fd, ns=(5, 6))
    os.setxattr(fd, "user.gone", b"1")
    st = os.fstat(fd)
    assert (st.st_size, st.st_mode & 0o777, st.st_uid, st.st_gid, st.st_mtime_ns) == (3, 0o600, 3, 4, 6)
    assert os.getxattr(fd, "user.gone") == b"1"
    again = os.open(f"/proc/self/fd/{fd}", os.O_RDWR)
    assert os.read(again, 100) == b"Con"
    os.pwrite(again, b"again", 0)
    assert os.pread(fd, 100, 0) == b"again"
    os.fsync(again)
    (u / "f").write_text("another")
    assert os.pread(fd, 100, 0) == b"again"
    assert (u / "f").stat().st_ino != number
    os.close(fd)
    os.close(again)
    assert (u / "f").read_text() == "another"


@pytest.mark.needs("coherent_fd")
def test_read_only_descriptor_of_unlinked_lower(make_union: Maker) -> None:
    """A lower file that was only read and is then deleted: it can still become writable."""
    u = make_union([{"f": "content"}])
    fd = os.open(u / "f", os.O_RDONLY)
    os.unlink(u / "f")
    assert os.read(fd, 100) == b"content"
    assert os.fstat(fd).st_nlink == 0
    os.fchmod(fd, 0o600)
    assert os.fstat(fd).st_mode & 0o777 == 0o600
    writable = os.open(f"/proc/self/fd/{fd}", os.O_RDWR)
    os.write(writable, b"CON")
    assert os.pread(fd, 100, 0)[3:] == b"tent"
    os.close(fd)
    os.close(writable)
    assert os.listdir(u.merged) == []


def test_replaced_by_rename(make_union: Maker) -> None:
    u = make_union([{"old": "old", "new": "new"}])
    fd = os.open(u / "old", os.O_RDWR)
    os.rename(u / "new", u / "old")
    assert os.fstat(fd).st_nlink == 0
    assert os.pread(fd, 10, 0) == b"old"
    os.pwrite(fd, b"OLD", 0)
    assert (u / "old").read_text() == "new"
    assert os.pread(fd, 10, 0) == b"OLD"
    os.close(fd)


def test_one_of_two_names(make_union: Maker) -> None:
    u = make_union([{"a": "x", "b": Hard("a")}])
    fd = os.open(u / "a", os.O_RDWR)
    os.unlink(u / "a")
    assert os.fstat(fd).st_nlink == 1
    os.pwrite(fd, b"y", 0)
    assert (u / "b").read_text() == "y"
    os.unlink(u / "b")
    assert os.fstat(fd).st_nlink == 0
    assert os.pread(fd, 1, 0) == b"y"
    os.close(fd)


def test_mapped(make_union: Maker) -> None:
    u = make_union([{"f": F(b"m" * 8192)}])
    fd = os.open(u / "f", os.O_RDWR)
    with mmap.mmap(fd, 8192) as shared:
        os.unlink(u / "f")
        os.close(fd)
        shared[0:3] = b"NEW"
        shared.flush()
        assert shared[0:4] == b"NEWm"


def test_no_leftover(make_union: Maker) -> None:
    """Once the last descriptor closes nothing of the file remains in upper or work, and nothing open in the server."""
    u = make_union([{f"low{i}": "x" for i in range(50)}])
    first = os.open(u / "low0", os.O_RDWR)
    os.close(first)
    for i in range(50):
        fd = os.open(u / f"low{i}", os.O_RDWR)
        os.unlink(u / f"low{i}")
        os.write(fd, b"data" * 1000)
        assert os.fstat(fd).st_nlink == 0
        os.close(fd)
    u.umount()
    left = [path for path in u.up.rglob("*") if path.is_file() and not path.name.startswith(".wh.")]
    assert left == []


def test_disk_space_comes_back(make_union: Maker) -> None:
    u = make_union([{}])
    fd = os.open(u / "big", os.O_RDWR | os.O_CREAT)
    os.write(fd, os.urandom(1 << 20))
    os.fsync(fd)
    number = (u.up / "big").stat().st_ino
    os.unlink(u / "big")
    assert len(os.pread(fd, 1 << 20, 0)) == 1 << 20
    os.close(fd)
    u.drop_caches()
    held = [
        path
        for path in u.base.rglob("*")
        if path.parent != u.merged and path.is_file() and path.stat().st_ino == number
    ]
    assert held == []


def test_removed_directory(make_union: Maker) -> None:
    """A directory that is somebody's working directory goes: `..` and attributes still answer."""
    u = make_union([{"d/e/x": "x"}])
    fd = os.open(u / "d/e", os.O_RDONLY)
    os.unlink(u / "d/e/x")
    os.rmdir(u / "d/e")
    os.fchmod(fd, 0o711)
    assert os.fstat(fd).st_mode & 0o777 == 0o711
    assert errno_of(os.stat, "x", dir_fd=fd) == 2
    os.close(fd)


@pytest.mark.needs("tmpfile")
def test_tmpfile(make_union: Maker) -> None:
    """O_TMPFILE: no name, then perhaps one by linkat; O_EXCL forbids that; umask and owner as for any file."""
    u = make_union([{"d/x": "x"}])
    os.umask(0o027)
    fd = os.open(u / "d", os.O_TMPFILE | os.O_RDWR, 0o666)
    os.write(fd, b"nameless")
    st = os.fstat(fd)
    assert (st.st_nlink, st.st_size, st.st_mode & 0o777) == (0, 8, 0o640)
    assert os.listdir(u / "d") == ["x"]
    link_fd(fd, u / "d/named")
    assert os.fstat(fd).st_nlink == 1
    os.pwrite(fd, b"N", 0)
    assert (u / "d/named").read_text() == "Nameless"
    assert (u / "d/named").stat().st_ino == st.st_ino
    link_fd(fd, u / "second")
    assert (u / "second").stat().st_nlink == 2
    os.close(fd)
    closed = os.open(u.merged, os.O_TMPFILE | os.O_EXCL | os.O_RDWR, 0o600)
    assert errno_of(link_fd, closed, u / "never") == 2
    os.close(closed)
    u.remount()
    assert (u / "d/named").read_text() == "Nameless"
    assert sorted(os.listdir(u.merged)) == ["d", "second"]
