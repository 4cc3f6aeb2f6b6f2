"""Devices, fifos, sockets, symlinks, inode flags, birth times."""

from __future__ import annotations

import os
import socket
import stat

import pytest
from support.mounts import Maker, Union
from support.procs import USER, child, errno_of, storm
from support.sys import FS_NODUMP_FL, birth_time_ns, getflags, setflags
from support.trees import D, F, L, Node


def test_mknod_all_kinds(union: Union) -> None:
    cases = {
        "c": (stat.S_IFCHR, os.makedev(1, 3)),
        "b": (stat.S_IFBLK, os.makedev(259, 70000)),
        "p": (stat.S_IFIFO, 0),
        "s": (stat.S_IFSOCK, 0),
        "r": (stat.S_IFREG, 0),
        "big": (stat.S_IFCHR, os.makedev(4000, 1048575)),
    }
    for name, (kind, device) in cases.items():
        os.mknod(union / name, kind | 0o640, device)
        assert errno_of(os.mknod, union / name, kind | 0o600, device) == 17
    for _ in range(2):
        for name, (kind, device) in cases.items():
            st = (union / name).lstat()
            assert st.st_mode == kind | 0o640, name
            assert st.st_rdev == device, name
        union.remount()
    assert child(errno_of, os.mknod, union / "no", stat.S_IFCHR | 0o600, os.makedev(1, 3), uid=USER) in (1, 13)
    os.chmod(union.merged, 0o777)
    assert child(errno_of, os.mknod, union / "no", stat.S_IFCHR | 0o600, os.makedev(1, 3), uid=USER) == 1
    assert child(errno_of, os.mknod, union / "yes", stat.S_IFIFO | 0o600, uid=USER) == 0


def test_devices_work(make_union: Maker) -> None:
    u = make_union([{"null": Node("c", 1, 3, 0o666), "zero": Node("c", 1, 5, 0o666)}])
    with open(u / "zero", "rb") as f:
        assert f.read(5) == bytes(5)
    with open(u / "null", "wb") as f:
        f.write(b"gone")
    os.chmod(u / "zero", 0o600)
    with open(u / "zero", "rb") as f:
        assert f.read(5) == bytes(5)


def test_fifo_between_processes(make_union: Maker) -> None:
    u = make_union([{"low": Node("p")}])
    os.mkfifo(u / "up")
    for name in ("low", "up"):

        def side(number: int, name: str = name) -> bytes:
            with open(u / name, "wb" if number else "rb") as f:
                return b"" if number and f.write(b"through") else f.read()

        assert storm(2, side)[0] == b"through"


def test_socket(make_union: Maker) -> None:
    u = make_union([{"d/x": "x", "old": Node("s")}])
    with socket.socket(socket.AF_UNIX) as server, socket.socket(socket.AF_UNIX) as client:
        server.bind(str(u / "d/s"))
        server.listen()
        client.connect(str(u / "d/s"))
        client.sendall(b"hello")
        peer, _ = server.accept()
        with peer:
            assert peer.recv(5) == b"hello"
    assert stat.S_ISSOCK((u / "d/s").lstat().st_mode)
    with socket.socket(socket.AF_UNIX) as client:
        assert errno_of(client.connect, str(u / "old")) == 111
    os.unlink(u / "d/s")
    assert os.listdir(u / "d") == ["x"]


def test_symlinks(make_union: Maker) -> None:
    u = make_union(
        [
            {
                "l": L("target"),
                "abs": L("/etc/passwd", 5, 6),
                "loop": L("loop"),
                "d/up": L("../f"),
                "f": "f",
                "bytes": L(b"\xff\n"),
            }
        ]
    )
    long = "x" * 4095
    os.symlink(long, u / "long")
    assert errno_of(os.symlink, "", u / "empty") == 2
    assert errno_of(os.symlink, "x", u / "l") == 17
    for _ in range(2):
        assert os.readlink(u / "l") == "target"
        assert os.readlink(os.fsencode(u / "bytes")) == b"\xff\n"
        assert os.readlink(u / "long") == long
        assert (u / "long").lstat().st_size == 4095
        assert (u / "l").lstat().st_size == 6
        assert (u / "d/up").read_text() == "f"
        assert errno_of(os.stat, u / "loop") == 40
        assert (u / "abs").lstat().st_uid == 5
        assert (u / "l").lstat().st_mode & 0o7777 == 0o777
        u.remount()
    assert errno_of(os.readlink, u / "f") == 22
    os.unlink(u / "l")
    os.symlink("other", u / "l")
    assert os.readlink(u / "l") == "other"


@pytest.mark.needs("ioctl")
def test_inode_flags(make_union: Maker) -> None:
    """FS_IOC_GETFLAGS works on files and directories; SETFLAGS copies up and holds, or is refused as a whole."""
    u = make_union([{"f": "x", "d": D()}], compare=False)
    for name in ("f", "d"):
        fd = os.open(u / name, os.O_RDONLY)
        before = getflags(fd)
        number = errno_of(setflags, fd, before | FS_NODUMP_FL)
        assert number in (0, 25, 95)
        assert getflags(fd) & FS_NODUMP_FL == (0 if number else FS_NODUMP_FL)
        os.close(fd)


@pytest.mark.needs("birth_time")
def test_birth_time(make_union: Maker) -> None:
    """A new file was born about when it was changed; an old one has a birth time after copy-up if it had one before."""
    u = make_union([{"f": "x"}])
    (u / "new").write_text("n")
    if (made := birth_time_ns(u / "new")) is not None:
        assert abs(made - (u / "new").stat().st_ctime_ns) < 10_000_000_000
    old = birth_time_ns(u / "f")
    (u / "f").write_text("y")
    assert old is None or birth_time_ns(u / "f") is not None


def test_device_on_nodev(make_union: Maker) -> None:
    u = make_union([{"zero": Node("c", 1, 5, 0o666), "x": F("x")}], options="nodev")
    assert errno_of(os.open, u / "zero", os.O_RDONLY) == 13
    assert (u / "zero").lstat().st_rdev == os.makedev(1, 5)


def test_mount_flags(make_union: Maker) -> None:
    """noexec and nosuid arrive."""
    u = make_union([{"run": F("#!/bin/sh\n", 0o4755)}], options="noexec,nosuid")
    assert errno_of(os.posix_spawn, str(u / "run"), ["run"], {}) == 13
    flags = os.statvfs(u.merged).f_flag
    assert flags & os.ST_NOEXEC
    assert flags & os.ST_NOSUID
