"""Layers of other kinds: other filesystems, equal inode numbers, no xattrs, a layer on a dying FUSE mount."""

from __future__ import annotations

import mmap
import os
from collections.abc import Callable
from pathlib import Path

import pytest
from support.mounts import Maker, Union
from support.procs import errno_of
from support.sys import mount, umount
from support.trees import D, F, Hard, build, snapshot

Disk = Callable[..., Path]


def mounted(u: Union, *lowers: Path) -> Union:
    u.lowers = list(lowers)
    u.remember_lowers()
    u.mount()
    return u


@pytest.mark.every_data_mode
@pytest.mark.needs("ours")
def test_equal_inode_numbers(disk: Disk, make_union: Maker) -> None:
    """Files of two filesystems with equal inode numbers are different files: numbers, data, mappings, link counts."""
    first, second = disk(4) / "l", disk(4) / "l"
    build(first, {"a": F(b"A" * 5000), "b": Hard("a")})
    build(second, {"c": F(b"C" * 5000), "d": Hard("c")})
    assert (first / "a").stat().st_ino == (second / "c").stat().st_ino, "the test needs equal numbers"
    u = mounted(make_union(mount=False, compare=False), first, second)
    for _ in range(2):
        numbers = {name: (u / name).stat().st_ino for name in "abcd"}
        assert numbers["a"] == numbers["b"] != numbers["c"] == numbers["d"]
        for name, byte in (("a", b"A"), ("c", b"C"), ("d", b"C"), ("b", b"A")):
            fd = os.open(u / name, os.O_RDONLY)
            with mmap.mmap(fd, 5000, prot=mmap.PROT_READ) as view:
                assert view[:] == byte * 5000
            os.close(fd)
        u.drop_caches()
    with open(u / "a", "r+b") as f:
        f.write(b"new")
    for _ in range(2):
        assert (u / "b").read_bytes() == b"new" + b"A" * 4997
        assert (u / "c").read_bytes() == b"C" * 5000
        assert {name: (u / name).stat().st_ino for name in "abcd"} == numbers
        u.remount()


@pytest.mark.parametrize("kind", ["tmpfs", "ext4", "xfs", "btrfs"])
def test_upper_elsewhere(disk: Disk, make_union: Maker, kind: str) -> None:
    """Upper on each common filesystem: copy-up across devices, deletions, renames, numbers that stay."""
    size = {"xfs": 320, "btrfs": 120}.get(kind, 20)
    lower = {
        "f": F(os.urandom(300_000), xattrs={"user.x": b"1"}),
        "d/x": "x",
        "d/e/y": "y",
        "gone": "g",
        "h": "h",
        "i": Hard("h"),
    }
    u = make_union([lower], upper_on=disk(size, kind))
    numbers = {name: (u / name).stat().st_ino for name in ("f", "d", "d/x", "h")}
    content = (u / "f").read_bytes()
    with open(u / "f", "ab") as f:
        f.write(b"+")
    os.unlink(u / "gone")
    os.rename(u / "d", u / "moved")
    os.chmod(u / "h", 0o600)
    for _ in range(2):
        assert (u / "f").read_bytes() == content + b"+"
        assert os.getxattr(u / "f", "user.x") == b"1"
        assert sorted(os.listdir(u.merged)) == ["f", "h", "i", "moved"]
        assert sorted(os.listdir(u / "moved")) == ["e", "x"]
        assert (u / "i").stat().st_mode & 0o777 == 0o600
        if make_union.target.ours:  # the kernel's needs xino for that
            assert (u / "f").stat().st_dev == (u / "moved/x").stat().st_dev == u.merged.stat().st_dev
            assert {name: (u / name.replace("d", "moved")).stat().st_ino for name in numbers} == numbers
        u.remount()


@pytest.mark.needs("no_xattrs")
@pytest.mark.needs("ours")
def test_upper_without_xattrs(workspace: Path, make_union: Maker) -> None:
    """An upper that stores no xattrs, like ramfs and some NFS: data, deletions and replaced directories hold."""
    place = make_union.base / "ramfs"
    place.mkdir()
    mount("ramfs", place, "ramfs", "")
    try:
        u = make_union([{"f": "f", "d/x": "x", "d/y": "y", "gone": "g"}], upper_on=place, compare=False)
        with open(u / "f", "a") as f:
            f.write("+")
        os.unlink(u / "gone")
        os.unlink(u / "d/x")
        os.unlink(u / "d/y")
        os.rmdir(u / "d")
        os.mkdir(u / "d")
        (u / "d/new").write_text("n")
        assert errno_of(os.setxattr, u / "f", "user.x", b"") in (0, 95)
        for _ in range(2):
            assert (u / "f").read_text() == "f+"
            assert sorted(os.listdir(u.merged)) == ["d", "f"]
            assert os.listdir(u / "d") == ["new"]
            u.remount()
        u.umount()
    finally:
        umount(place)
        for union in make_union.unions:
            union.work = None


@pytest.mark.needs("ours")
def test_lower_that_dies(make_union: Maker) -> None:
    """A lower on a FUSE mount whose server is killed: errors for what needs it, everything else goes on."""
    inner = make_union([{"d/f": F(b"x" * 100_000), "g": "g", "e/h": "h"}], compare=False)
    outer = make_union(mount=False, compare=False)
    mounted(outer, inner.merged)
    (outer / "own").write_text("mine")
    (outer / "g").write_text("copied")
    outer.lowers = []
    inner.drop_caches("3")  # pages too: else the kernel answers for the dead server
    inner.kill()
    assert (outer / "own").read_text() == "mine"
    assert (outer / "g").read_text() == "copied"
    (outer / "more").write_text("m")
    assert errno_of(os.listdir, outer / "e") in (5, 103, 107, 116)
    assert errno_of(os.truncate, outer / "e/h", 10) in (5, 103, 107, 116)
    assert not (outer.up / "e/h").exists()
    assert (outer / "more").read_text() == "m"
    outer.umount()


@pytest.mark.needs("ours")
def test_read_only_lower(make_union: Maker, disk: Disk) -> None:
    """A lower on a filesystem that is mounted read-only serves, and its names can be changed and deleted."""
    import subprocess

    place = disk(4)
    build(place / "l", {"f": "f", "d": D(), "d/x": "x"})
    subprocess.run(["mount", "-o", "remount,ro", place], check=True)
    before = snapshot(place / "l")
    u = mounted(make_union(mount=False), place / "l")
    assert (u / "f").read_text() == "f"
    with open(u / "d/x", "a") as f:
        f.write("+")
    os.unlink(u / "f")
    u.remount()
    assert (u / "d/x").read_text() == "x+"
    assert snapshot(place / "l") == before
