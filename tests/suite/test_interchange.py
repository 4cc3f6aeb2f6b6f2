"""One upper, several filesystems: written by us, changed by the kernel's overlayfs and by fuse-overlayfs, and back."""

from __future__ import annotations

import os
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from support.mounts import Maker, Union, escape, is_mounted, wait_for
from support.sys import EXCHANGE, renameat2, umount
from support.targets import KERNEL_OPTIONS
from support.trees import D, F, Hard, L, Node, Tree, differences, snapshot

pytestmark = pytest.mark.needs("ours", "kernel_format")

LOWERS: list[Tree] = [
    {
        "d/a": F("a", 0o640, 1, 2, {"user.k": b"v"}),
        "d/sub/b": "b",
        "big": F(os.urandom(200_000)),
        "h1": "hard",
        "h2": Hard("h1"),
        "gone": "x",
        "l": L("d/a"),
        "p": Node("p"),
        "o/x": "x",
        "r/s/t": "t",
    },
    {
        "d/a": "below",
        "d/c": "c",
        "d/sub/deep/e": "e",
        "gone": "y",
        "low": "low",
        "o/y": "y",
        "c": Node("c", 1, 3),
        "e": D(0o700),
    },
]


def change(top: Path) -> None:
    """Everything that leaves a mark in the format."""
    with open(top / "d/a", "a") as f:
        f.write("+")
    os.chmod(top / "big", 0o600)
    os.unlink(top / "gone")
    os.rename(top / "d/sub", top / "moved")
    (top / "moved/new").write_text("n")
    os.unlink(top / "moved/b")
    with open(top / "h1", "a") as f:
        f.write("+")
    os.link(top / "low", top / "low2")
    for name in ("x", "y"):
        os.unlink(top / "o" / name)
    os.rmdir(top / "o")
    os.mkdir(top / "o")
    (top / "o/fresh").write_text("f")
    os.symlink("nowhere", top / "link")
    os.mknod(top / "fifo", 0o010600)
    os.setxattr(top / "e", "user.e", b"1")
    renameat2(top / "l", top / "low2", EXCHANGE)
    os.rename(top / "r/s", top / "s")


def change_again(top: Path) -> None:
    with open(top / "moved/deep/e", "a") as f:
        f.write("+2")
    os.rename(top / "moved", top / "e/again")
    with open(top / "big", "r+b") as f:
        f.write(b"now data")
    os.unlink(top / "h2")
    os.unlink(top / "o/fresh")
    os.rmdir(top / "o")
    os.mkdir(top / "d/sub")
    os.rename(top / "s", top / "r/s")
    (top / "gone").mkdir()
    (top / "gone/back").write_text("b")


@contextmanager
def fuse_overlayfs(u: Union) -> Iterator[Path]:
    """The layers as Debian's fuse-overlayfs mounts them."""
    view = u.base / "fuse"
    view.mkdir(exist_ok=True)
    layers = f"lowerdir={':'.join(escape(lower) for lower in u.lowers)},upperdir={u.upper},workdir={u.work}"
    with subprocess.Popen(["fuse-overlayfs", "-f", "-o", layers, str(view)], stderr=subprocess.DEVNULL) as process:
        wait_for(lambda: is_mounted(view) or process.poll() is not None, "fuse-overlayfs")
        assert process.poll() is None
        try:
            yield view
        finally:
            umount(view)


def check_numbers(u: Union) -> None:
    for path in u.merged.rglob("*"):
        assert path.parent.is_dir()


@pytest.mark.parametrize(
    "options",
    [KERNEL_OPTIONS, "index=off,metacopy=on,redirect_dir=on", KERNEL_OPTIONS + ",xino=on"],
    ids=["all", "noindex", "xino"],
)
def test_ours_then_kernel_then_ours(make_union: Maker, options: str) -> None:
    u = make_union(LOWERS)
    change(u.merged)
    ours = snapshot(u.merged)
    u.umount()
    with u.kernel_view(options) as view:
        if "index=off" in options:  # then the kernel does not look where links of a lower inode meet
            for name in (b"h1", b"h2"):
                del ours[name]
            found = {name: entry for name, entry in snapshot(view).items() if name not in (b"h1", b"h2")}
        else:
            found = snapshot(view)
        assert differences(ours, found) == []
        change_again(view)
        kernels = snapshot(view)
    u.mount()
    assert differences(kernels, snapshot(u.merged)) == []
    os.rename(u / "e/again", u / "last")
    assert (u / "last/deep/e").read_text() == "e+2"


@pytest.mark.parametrize("options", [KERNEL_OPTIONS, "index=off,metacopy=off,redirect_dir=on"], ids=["all", "redirect"])
def test_kernel_then_ours_then_kernel(make_union: Maker, options: str) -> None:
    u = make_union(LOWERS, mount=False)
    with u.kernel_view(options) as view:
        change(view)
        kernels = snapshot(view)
    u.mount()
    assert differences(kernels, snapshot(u.merged)) == []
    change_again(u.merged)
    ours = snapshot(u.merged)
    u.umount()
    with u.kernel_view(options.replace("metacopy=off", "metacopy=on")) as view:
        assert differences(ours, snapshot(view)) == []
    u.mount()


def test_kernel_numbers_after_us(make_union: Maker) -> None:
    """The origin that we record gives the kernel the same st_ino for copied-up files as before."""
    u = make_union([{"d/f": "x", "g": "y"}], mount=False)
    with u.kernel_view() as view:
        before = {name: (view / name).stat().st_ino for name in ("d", "d/f", "g")}
    u.mount()
    u.remount()
    with open(u / "d/f", "a") as f:
        f.write("+")
    os.chmod(u / "g", 0o600)
    ours = {name: (u / name).stat().st_ino for name in ("d", "d/f", "g")}
    u.umount()
    with u.kernel_view() as view:
        assert {name: (view / name).stat().st_ino for name in ("d", "d/f", "g")} == before
    u.mount()
    assert {name: (u / name).stat().st_ino for name in ("d", "d/f", "g")} == ours


def test_fuse_overlayfs_reads_ours(make_union: Maker) -> None:
    """What fuse-overlayfs has no notion of (redirects, metacopy) left out, it shows the same tree."""
    u = make_union(LOWERS, compare=False)
    with open(u / "d/a", "a") as f:
        f.write("+")
    os.unlink(u / "gone")
    for name in ("x", "y"):
        os.unlink(u / "o" / name)
    os.rmdir(u / "o")
    os.mkdir(u / "o")
    (u / "o/fresh").write_text("f")
    with open(u / "h1", "r+") as f:
        f.write("H")
    os.unlink(u / "h2")
    (u / "new").mkdir()
    ours = snapshot(u.merged)
    u.umount()
    with fuse_overlayfs(u) as view:
        assert differences(ours, snapshot(view), ignore=("mtime_ns", "nlink")) == []
    u.mount()


def test_ours_reads_fuse_overlayfs(make_union: Maker) -> None:
    u = make_union(LOWERS, mount=False, compare=False)
    with fuse_overlayfs(u) as view:
        with open(view / "d/a", "a") as f:
            f.write("+")
        os.chmod(view / "big", 0o600)
        os.unlink(view / "gone")
        for name in ("x", "y"):
            os.unlink(view / "o" / name)
        os.rmdir(view / "o")
        os.mkdir(view / "o")
        (view / "o/fresh").write_text("f")
        os.rename(view / "low", view / "lower")
        os.setxattr(view / "e", "user.e", b"1")
        theirs = snapshot(view)
    u.mount()
    assert differences(theirs, snapshot(u.merged), ignore=("mtime_ns", "nlink")) == []
    (u / "gone").write_text("back")
    u.remount()
    assert os.listdir(u / "o") == ["fresh"]


def test_stacked_on_kernel_and_below(make_union: Maker) -> None:
    """Our mount as a lower of the kernel's overlayfs, and the kernel's as a lower of ours."""
    u = make_union([{"a": "1", "d/x": "x"}])
    (u / "new").write_text("n")
    outer = make_union([{}], mount=False, compare=False)
    outer.lowers[0] = u.merged
    with outer.kernel_view("index=off") as view:
        assert sorted(os.listdir(view)) == ["a", "d", "new"]
        with open(view / "new", "a") as f:
            f.write("+")
        os.unlink(view / "d/x")
        assert (view / "new").read_text() == "n+"
        assert os.listdir(view / "d") == []
    assert (u / "new").read_text() == "n"
    outer.lowers, outer.work = [], None  # the kernel leaves a whiteout to link from in work


def test_nested_ours(make_union: Maker) -> None:
    """A union whose lower and upper are in another union."""
    inner = make_union(
        [{"low/a": "1", "low/d/x": "x", "low/e/y": "y"}], compare=False
    )  # holds whiteouts of the outer one
    for name in ("upper", "work"):
        (inner / name).mkdir()
    outer = make_union([{}], mount=False, compare=False)
    outer.lowers, outer.upper, outer.work = [inner / "low"], inner / "upper", inner / "work"
    outer.remember_lowers()
    outer.mount()
    numbers = {name: (outer / name).stat().st_ino for name in ("a", "d", "d/x")}
    with open(outer / "a", "a") as f:
        f.write("+")
    os.unlink(outer / "d/x")
    os.rename(outer / "e", outer / "moved")
    (outer / "n").mkdir()
    for _ in range(2):
        assert (outer / "a").read_text() == "1+"
        assert sorted(os.listdir(outer.merged)) == ["a", "d", "moved", "n"]
        assert os.listdir(outer / "d") == []
        assert os.listdir(outer / "moved") == ["y"]
        assert (outer / "a").stat().st_ino == numbers["a"]
        outer.remount()
    assert (inner / "low/a").read_text() == "1"
    assert (inner / "low/d/x").read_text() == "x"
