"""Copy-up: what triggers it, what it keeps, and that nobody sees the seam."""

from __future__ import annotations

import os
import stat
import struct

import pytest
from support.mounts import Maker
from support.sys import ACL_ACCESS, ACL_GROUP_OBJ, ACL_MASK, ACL_OTHER, ACL_USER, ACL_USER_OBJ, NO_ID, acl, segments
from support.trees import OLD_NS, D, F, L, Node

XATTRS = {"user.note": b"kept", "user.empty": b"", "trusted.deep": bytes(range(256)), "user.big": b"x" * 3000}


def test_data_writes_copy_up(make_union: Maker) -> None:
    names = ["append", "plus", "trunc", "truncate", "trunc0", "grow", "write"]
    u = make_union([{f"d/{name}": F("0123456789", 0o640, 1, 2, {"user.k": b"v"}) for name in names} | {"d/rest": "r"}])
    with open(u / "d/append", "a") as f:
        f.write("++")
    with open(u / "d/plus", "r+") as f:
        f.write("AB")
    with open(u / "d/trunc", "w") as f:
        f.write("new")
    os.truncate(u / "d/truncate", 4)
    os.truncate(u / "d/trunc0", 0)
    os.truncate(u / "d/grow", 5000)
    fd = os.open(u / "d/write", os.O_WRONLY)
    os.pwrite(fd, b"XY", 20)
    os.close(fd)
    expected = {
        "append": b"0123456789++",
        "plus": b"AB23456789",
        "trunc": b"new",
        "truncate": b"0123",
        "trunc0": b"",
        "grow": b"0123456789" + bytes(4990),
        "write": b"0123456789" + bytes(10) + b"XY",
    }
    for _ in range(2):
        for name, content in expected.items():
            assert (u / f"d/{name}").read_bytes() == content, name
            st = (u / f"d/{name}").stat()
            assert (st.st_mode & 0o7777, st.st_uid, st.st_gid, st.st_size) == (0o640, 1, 2, len(content)), name
            assert os.getxattr(u / f"d/{name}", "user.k") == b"v"
            assert st.st_mtime_ns > OLD_NS
        assert sorted(os.listdir(u / "d")) == sorted([*names, "rest"])
        u.remount()
    assert sorted(os.listdir(u.up / "d")) == sorted(names)


def test_opening_alone(make_union: Maker) -> None:
    """O_TRUNC truncates and copies up even if nothing is written; reading copies nothing."""
    u = make_union([{"a": "data", "b": "data", "d/c": "data"}])
    assert (u / "a").read_text() == "data"
    assert os.listdir(u / "d") == ["c"]
    os.close(os.open(u / "b", os.O_WRONLY | os.O_TRUNC))
    assert (u / "b").stat().st_size == 0
    assert os.listdir(u.up) == ["b"]


def test_metadata_kept(make_union: Maker) -> None:
    """Mode bits, owner, times, xattrs and ACLs of the file and of the directories above it come along."""
    rights = acl(
        (ACL_USER_OBJ, 6, NO_ID),
        (ACL_USER, 4, 1000),
        (ACL_GROUP_OBJ, 4, NO_ID),
        (ACL_MASK, 4, NO_ID),
        (ACL_OTHER, 0, NO_ID),
    )
    u = make_union(
        [
            {
                "p": D(0o1751, 11, 12, {"user.p": b"1"}),
                "p/q": D(0o2770, 13, 14, {"trusted.q": b"2", ACL_ACCESS: rights}),
                "p/q/f": F("body", 0o644, 15, 16, XATTRS | {ACL_ACCESS: rights}),
            }
        ]
    )
    before = {name: (u / name).stat() for name in ("p", "p/q", "p/q/f")}
    os.setxattr(u / "p/q/f", "user.new", b"!")
    for name, old in before.items():
        new = (u / name).stat()
        for key in ("st_mode", "st_uid", "st_gid", "st_size", "st_mtime_ns", "st_ino", "st_dev"):
            assert getattr(new, key) == getattr(old, key), (name, key)
    assert {k: os.getxattr(u / "p/q/f", k) for k in XATTRS} == XATTRS
    assert os.getxattr(u / "p/q/f", ACL_ACCESS) == rights
    assert os.getxattr(u / "p/q", ACL_ACCESS) == rights
    assert os.getxattr(u / "p/q", "trusted.q") == b"2"
    assert os.getxattr(u / "p", "user.p") == b"1"
    assert sorted(os.listxattr(u / "p/q/f")) == sorted([*XATTRS, "user.new", ACL_ACCESS])


def test_write_keeps_parent_times(make_union: Maker) -> None:
    """Writing a file changes no directory, though its directories are made in upper for it."""
    u = make_union([{"a/b/c/f": "x", "a/g": "y"}])
    with open(u / "a/b/c/f", "a") as f:
        f.write("z")
    for _ in range(2):
        for name in ("", "a", "a/b", "a/b/c"):
            assert (u / name).stat().st_mtime_ns == OLD_NS, name
        u.remount()
    (u / "a/new").touch()
    assert (u / "a").stat().st_mtime_ns > OLD_NS
    assert (u / "a/b").stat().st_mtime_ns == OLD_NS


def test_each_metadata_change(make_union: Maker) -> None:
    u = make_union(
        [
            {name: F("body", 0o644) for name in ("chmod", "chown", "utime", "setx", "rmx")}
            | {
                "rmx": F("body", xattrs={"user.a": b"1", "user.b": b"2"}),
                "d": D(),
                "d/x": "x",
                "l": L("chmod"),
                "p": Node("p"),
                "s": Node("s"),
                "c": Node("c", 1, 3),
                "b": Node("b", 7, 200),
            }
        ]
    )
    os.chmod(u / "chmod", 0o4711)
    os.chown(u / "chown", 7, 8)
    os.utime(u / "utime", ns=(5, 1_000_000_007))
    os.setxattr(u / "setx", "user.z", b"9")
    os.removexattr(u / "rmx", "user.a")
    os.chmod(u / "d", 0o700)
    os.chown(u / "d", 3, 4)
    os.utime(u / "d", ns=(1, 2))
    os.chown(u / "l", 5, 6, follow_symlinks=False)
    os.utime(u / "l", ns=(3, 4), follow_symlinks=False)
    for name in "psc":
        os.chown(u / name, 9, 10)
        os.chmod(u / name, 0o606)
    os.utime(u / "b", ns=(7, 8))
    for _ in range(2):
        assert (u / "chmod").stat().st_mode == stat.S_IFREG | 0o4711
        assert ((u / "chown").stat().st_uid, (u / "chown").stat().st_gid) == (7, 8)
        assert (u / "utime").stat().st_mtime_ns == 1_000_000_007
        assert os.listxattr(u / "setx") == ["user.z"]
        assert os.listxattr(u / "rmx") == ["user.b"]
        assert (u / "d").stat().st_mode == stat.S_IFDIR | 0o700
        assert ((u / "d").stat().st_uid, (u / "d").stat().st_mtime_ns) == (3, 2)
        assert (u / "d/x").read_text() == "x"
        link = (u / "l").lstat()
        assert (link.st_uid, link.st_gid, link.st_mtime_ns, os.readlink(u / "l")) == (5, 6, 4, "chmod")
        kinds = {"p": stat.S_IFIFO, "s": stat.S_IFSOCK, "c": stat.S_IFCHR}
        for name, kind in kinds.items():
            st = (u / name).lstat()
            assert (st.st_mode, st.st_uid, st.st_gid) == (kind | 0o606, 9, 10), name
        assert (u / "c").lstat().st_rdev == os.makedev(1, 3)
        assert (u / "b").lstat().st_rdev == os.makedev(7, 200)
        assert (u / "b").lstat().st_mtime_ns == 8
        for name in ("chmod", "chown", "utime", "setx", "rmx"):
            assert (u / name).read_text() == "body"
        u.remount()


@pytest.mark.needs("metacopy")
@pytest.mark.parametrize("change", ["chmod", "chown", "utime", "setxattr", "rename", "link"])
def test_metadata_change_copies_no_data(make_union: Maker, change: str) -> None:
    size = 4 << 20
    u = make_union([{"big": F(os.urandom(size), xattrs={"user.a": b"b"})}])
    before = (u / "big").read_bytes()
    old = (u / "big").stat()
    name = "big"
    if change == "chmod":
        os.chmod(u / "big", 0o600)
    elif change == "chown":
        os.chown(u / "big", 5, 5)
    elif change == "utime":
        os.utime(u / "big", ns=(1, 2))
    elif change == "setxattr":
        os.setxattr(u / "big", "user.n", b"1")
    elif change == "rename":
        os.rename(u / "big", u / "moved")
        name = "moved"
    else:
        os.link(u / "big", u / "moved")
        name = "moved"
    assert (u.up / name).stat().st_size == size
    assert (u.up / name).stat().st_blocks * 512 < size // 4, "data was copied"
    assert (u / name).read_bytes() == before
    assert (u / name).stat().st_ino == old.st_ino
    assert (u / name).stat().st_blocks == old.st_blocks
    u.remount()
    assert (u / name).read_bytes() == before
    with open(u / name, "r+b") as f:
        f.seek(size // 2)
        f.write(b"written")
    expected = before[: size // 2] + b"written" + before[size // 2 + 7 :]
    assert (u / name).read_bytes() == expected
    u.remount()
    assert (u / name).read_bytes() == expected
    assert (u / name).stat().st_ino == old.st_ino


@pytest.mark.every_data_mode
@pytest.mark.needs("coherent_fd")
def test_descriptor_from_before_sees_later_writes(make_union: Maker) -> None:
    u = make_union([{"f": "old content", "big": F(b"a" * (2 << 20))}])
    for name in ("f", "big"):
        early = os.open(u / name, os.O_RDONLY)
        assert os.pread(early, 3, 0) in (b"old", b"aaa")
        with open(u / name, "r+b") as f:
            f.write(b"NEW")
        assert os.pread(early, 3, 0) == b"NEW"
        os.truncate(u / name, 5)
        assert os.fstat(early).st_size == 5
        assert len(os.pread(early, 100, 0)) == 5
        assert os.fstat(early).st_ino == (u / name).stat().st_ino
        os.close(early)


def test_through_symlink(make_union: Maker) -> None:
    u = make_union([{"real/f": "data", "link": L("real/f"), "dir": L("real"), "abs": L("/nowhere")}])
    with open(u / "link", "a") as f:
        f.write("+")
    with open(u / "dir/f", "a") as f:
        f.write("+")
    assert (u / "real/f").read_text() == "data++"
    assert os.readlink(u / "link") == "real/f"
    assert os.path.islink(u / "abs")
    assert os.listdir(u.up) == ["real"]


@pytest.mark.needs("whole_copies")
def test_holes_stay_holes(make_union: Maker) -> None:
    size = 256 << 20
    u = make_union([{"sparse": F(b"head", holes=size)}])
    with open(u.lower / "sparse", "r+b") as f:
        f.seek(100 << 20)
        f.write(b"middle")
    u.remember_lowers()
    u.remount()
    with open(u / "sparse", "r+b") as f:
        f.seek(200 << 20)
        f.write(b"new")
    assert (u.up / "sparse").stat().st_blocks * 512 < 4 << 20
    with open(u.up / "sparse", "rb") as f:
        assert [start for start, _ in segments(f.fileno())] == [0, 100 << 20, 200 << 20]
    with open(u / "sparse", "rb") as f:
        for offset, content in ((0, b"head"), (100 << 20, b"middle"), (200 << 20, b"new"), (50 << 20, bytes(10))):
            f.seek(offset)
            assert f.read(len(content)) == content
    assert (u / "sparse").stat().st_size == size


def test_terabyte(make_union: Maker) -> None:
    size = 1 << 40
    u = make_union([{"huge": F(b"first", holes=size)}])
    assert (u / "huge").stat().st_size == size
    with open(u / "huge", "r+b") as f:
        f.seek(size - 4)
        f.write(b"last")
        f.seek(0)
        assert f.read(5) == b"first"
    fd = os.open(u / "new", os.O_RDWR | os.O_CREAT)
    os.pwrite(fd, b"end", size)
    assert os.fstat(fd).st_size == size + 3
    assert os.pread(fd, 10, size - 2) == b"\0\0end"
    os.close(fd)
    with open(u / "huge", "rb") as f:
        f.seek(size - 4)
        assert f.read() == b"last"


def test_capability_survives(make_union: Maker) -> None:
    """File capabilities come along with a metadata copy-up."""
    value = struct.pack("<IIIII", 0x02000001, 1 << 10, 0, 0, 0)
    u = make_union([{"tool": F("#!/bin/true", 0o755, xattrs={"security.capability": value})}])
    os.utime(u / "tool", ns=(1, 1))
    assert os.getxattr(u / "tool", "security.capability") == value
    u.remount()
    assert os.getxattr(u / "tool", "security.capability") == value


def test_from_middle_layer(make_union: Maker) -> None:
    u = make_union([{"top": "t"}, {"d/mid": "m", "d": D(0o711)}, {"d/low": "l", "d": D(0o777)}])
    for name in ("d/mid", "d/low", "top"):
        with open(u / name, "a") as f:
            f.write("+")
    assert {name: (u / name).read_text() for name in ("d/mid", "d/low", "top")} == {
        "d/mid": "m+",
        "d/low": "l+",
        "top": "t+",
    }
    assert (u.up / "d").stat().st_mode & 0o777 == 0o711
