"""Disks that fill up or turn read-only, layers that change: the right errno, nothing lost, the mount alive."""

from __future__ import annotations

import os
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest
from support.mounts import Maker, Union
from support.procs import errno_of, storm
from support.trees import F

ENOSPC, EROFS = 28, 30
Disk = Callable[..., Path]


def poke(path: Path) -> None:
    fd = os.open(path, os.O_RDWR)
    try:
        os.pwrite(fd, b"new", 0)
    finally:
        os.close(fd)


def alive(u: Union) -> None:
    (u / "alive").write_text("yes")
    assert (u / "alive").read_text() == "yes"
    os.unlink(u / "alive")


@pytest.mark.needs("whole_copies")
@pytest.mark.every_data_mode
@pytest.mark.parametrize("kind", ["tmpfs", "ext4"])
def test_full_in_copy_up(disk: Disk, make_union: Maker, kind: str) -> None:
    """A file that does not fit: ENOSPC, the lower's bytes still shown, no trace in upper; smaller ones still work."""
    content = os.urandom(20 << 20)
    u = make_union(
        [{"big": F(content), "d/big2": F(content), "small": F(b"small")}], upper_on=disk(12, kind), compare=False
    )
    assert errno_of(poke, u / "big") == ENOSPC
    assert errno_of(os.truncate, u / "d/big2", (20 << 20) - 1) == ENOSPC
    for _ in range(2):
        assert (u / "big").read_bytes() == content
        assert (u / "d/big2").read_bytes() == content
        assert not (u.up / "big").exists()
        assert not (u.up / "d/big2").exists()
        u.remount()
    poke(u / "small")
    assert (u / "small").read_bytes() == b"newll"
    if make_union.target.ours:  # the kernel's copies what is then thrown away
        os.truncate(u / "big", 0)
        assert (u / "big").read_bytes() == b""
    alive(u)


@pytest.mark.needs("whole_copies")
def test_full_in_copy_up_by_many(disk: Disk, make_union: Maker) -> None:
    content = os.urandom(6 << 20)
    u = make_union([{f"f{i}": F(content) for i in range(6)}], upper_on=disk(16), compare=False)
    results = storm(6, lambda i: errno_of(poke, u / f"f{i}"))
    assert set(results) <= {0, ENOSPC}
    assert ENOSPC in results
    for i, result in enumerate(results):
        assert (u / f"f{i}").read_bytes() == (content if result else b"new" + content[3:]), i
    alive(u)


@pytest.mark.every_data_mode
def test_full_in_write(disk: Disk, make_union: Maker) -> None:
    """Writes until the disk is full: what was accepted is there; after deletion there is room again."""
    u = make_union([{"low": F(b"a" * 1000)}], upper_on=disk(4), compare=False)
    fd = os.open(u / "f", os.O_CREAT | os.O_RDWR)
    written = 0
    block = os.urandom(100_000)
    number = 0
    while not number:
        try:
            written += os.pwrite(fd, block, written)
        except OSError as err:
            number = err.errno or -1
    assert number == ENOSPC
    assert written > 3_000_000
    os.fsync(fd)
    data = os.pread(fd, written + 100, 0)
    assert data[:written] == (block * (written // len(block) + 1))[:written]
    os.close(fd)
    assert (u / "low").read_bytes() == b"a" * 1000
    os.unlink(u / "f")
    u.drop_caches()
    (u / "g").write_bytes(block * 10)
    assert (u / "g").read_bytes() == block * 10
    alive(u)


def test_no_inodes_left(disk: Disk, make_union: Maker) -> None:
    """Out of inodes: every kind of creation says ENOSPC and leaves nothing; deletion of upper files still works."""
    u = make_union([{"low": "l", "d/x": "x", "moving/y": "y"}], upper_on=disk(8, inodes=40), compare=False)
    made = 0
    while not errno_of(os.mknod, u / f"f{made}"):
        made += 1
        assert made < 100
    before = sorted(os.listdir(u.merged))
    assert errno_of(os.mkdir, u / "nd") == ENOSPC
    assert errno_of(os.symlink, "x", u / "nl") == ENOSPC
    assert errno_of(os.mkfifo, u / "np") == ENOSPC
    assert errno_of(poke, u / "low") == ENOSPC
    assert errno_of(os.chmod, u / "d/x", 0o600) == ENOSPC
    assert sorted(os.listdir(u.merged)) == before
    assert (u / "low").read_text() == "l"
    assert (u / "d/x").stat().st_mode & 0o777 == 0o644
    errno_of(os.rename, u / "moving", u / "moved")
    assert sum((u / name / "y").exists() for name in ("moving", "moved")) == 1
    for i in range(made):
        os.unlink(u / f"f{i}")
    poke(u / "low")
    assert (u / "low").read_text() == "new"
    alive(u)


def test_upper_turns_read_only(disk: Disk, make_union: Maker) -> None:
    there = disk(4)
    u = make_union([{"low": "l", "d/x": "x"}], {"up": "u"}, upper_on=there, compare=False)
    assert (u / "low").read_text() == "l"
    subprocess.run(["mount", "-o", "remount,ro", there], check=True)
    for call, name, *rest in (
        (os.unlink, "low"),
        (os.unlink, "up"),
        (os.mkdir, "n"),
        (os.chmod, "low", 0o600),
        (os.chmod, "up", 0o600),
        (os.truncate, "up", 0),
        (os.rmdir, "none"),
        (poke, "low"),
        (poke, "up"),
    ):
        assert errno_of(call, u / str(name), *rest) == (2 if name == "none" else EROFS), (call, name)
    assert errno_of(os.rename, u / "low", u / "new") == EROFS
    assert ((u / "low").read_text(), (u / "up").read_text()) == ("l", "u")
    assert sorted(os.listdir(u.merged)) == ["d", "low", "up"]
    subprocess.run(["mount", "-o", "remount,rw", there], check=True)
    alive(u)


def test_layers_change_behind(make_union: Maker) -> None:
    """Deleting and changing lower files under a live mount is undefined: errors at worst, and the rest is served."""
    make_union.require("ours")
    u = make_union([{f"d/f{i}": str(i) for i in range(10)} | {"keep": "k"}], compare=False)
    assert (u / "d/f1").read_text() == "1"
    for i in range(0, 10, 2):
        os.unlink(u.lower / f"d/f{i}")
    os.rename(u.lower / "d/f1", u.lower / "d/renamed")
    for i in range(10):
        errno_of(lambda i=i: (u / f"d/f{i}").read_text())
        assert errno_of(poke, u / f"d/f{i}") in (0, 2, 5, 116)
    errno_of(os.listdir, u / "d")
    assert (u / "keep").read_text() == "k"
    alive(u)
    u._lowers_before, u._ctimes_before = [], []


def test_file_size_limit(make_union: Maker) -> None:
    """RLIMIT_FSIZE is the caller's: EFBIG for it and not for the server."""
    import resource
    import signal

    u = make_union([{"f": F(b"x" * 100)}])

    def limited(number: int) -> int:
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (1000, 1000))
        fd = os.open(u / "f", os.O_WRONLY)
        os.pwrite(fd, b"y" * 1000, 0)
        return errno_of(os.pwrite, fd, b"z", 1000)

    assert storm(1, limited) == [27]
    assert (u / "f").stat().st_size == 1000
    with open(u / "f", "ab") as f:
        f.write(b"+" * 5000)
    assert (u / "f").stat().st_size == 6000
