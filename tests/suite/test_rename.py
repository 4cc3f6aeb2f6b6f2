"""rename in all its forms: layers the two names come from, what is overwritten, flags, directories."""

from __future__ import annotations

import os
import stat

import pytest
from support.mounts import Maker
from support.procs import child, errno_of
from support.sys import EXCHANGE, NOREPLACE, RENAME_WHITEOUT, renameat2
from support.trees import WHITEOUT, D, F, L, Node


def test_files(make_union: Maker) -> None:
    u = make_union(
        [{"low": "low", "d/low2": "low2", "over": "old", "over2": "old2", "x/y": "y", "l": L("low"), "p": Node("p")}],
        {"up": "up"},
    )
    numbers = {name: (u / name).lstat().st_ino for name in ("low", "d/low2", "up", "l", "p")}
    os.rename(u / "low", u / "low.new")
    os.rename(u / "d/low2", u / "x/low2.new")
    os.rename(u / "up", u / "over")
    os.rename(u / "l", u / "x/l.new")
    os.rename(u / "p", u / "over2")
    for _ in range(2):
        assert sorted(os.listdir(u.merged)) == ["d", "low.new", "over", "over2", "x"]
        assert sorted(os.listdir(u / "x")) == ["l.new", "low2.new", "y"]
        assert os.listdir(u / "d") == []
        assert (u / "low.new").read_text() == "low"
        assert (u / "x/low2.new").read_text() == "low2"
        assert (u / "over").read_text() == "up"
        assert os.readlink(u / "x/l.new") == "low"
        assert stat.S_ISFIFO((u / "over2").lstat().st_mode)
        for old, new in {"low": "low.new", "d/low2": "x/low2.new", "up": "over", "l": "x/l.new", "p": "over2"}.items():
            assert (u / new).lstat().st_ino == numbers[old], new
        u.remount()
    (u / "low").write_text("again")
    os.rename(u / "low", u / "low.new")
    os.rename(u / "low.new", u / "low")
    u.remount()
    assert (u / "low").read_text() == "again"
    assert not (u / "low.new").exists()


def test_over_and_back(make_union: Maker) -> None:
    """Names that keep swapping between layers and whiteouts."""
    u = make_union([{"a": "A", "b": "B", "c": "C"}])
    os.rename(u / "a", u / "b")
    os.rename(u / "b", u / "a")
    assert sorted(os.listdir(u.merged)) == ["a", "c"]
    os.unlink(u / "a")
    os.rename(u / "c", u / "a")
    os.rename(u / "a", u / "b")
    u.remount()
    assert os.listdir(u.merged) == ["b"]
    assert (u / "b").read_text() == "C"
    os.unlink(u / "b")
    u.remount()
    assert os.listdir(u.merged) == []


def test_same_file(make_union: Maker) -> None:
    """rename onto another name of the same inode does nothing."""
    u = make_union([{"a": "A"}])
    os.rename(u / "a", u / "a")
    os.link(u / "a", u / "b")
    os.rename(u / "a", u / "b")
    assert sorted(os.listdir(u.merged)) == ["a", "b"]
    assert (u / "a").stat().st_nlink == 2


def test_wrong_kinds(make_union: Maker) -> None:
    u = make_union([{"f": "f", "d/x": "x", "e": D(), "g/y": "y"}])
    for first, second, wanted in (
        ("f", "d", 21),
        ("d", "f", 20),
        ("d", "g", 39),
        ("d", "d/sub", 22),
        ("none", "f", 2),
        ("f", "none/x", 2),
        ("f", "f/x", 20),
    ):
        assert errno_of(os.rename, u / first, u / second) == wanted, (first, second)
    assert errno_of(renameat2, u / "d", u / "d/x", EXCHANGE) == 22
    assert errno_of(renameat2, u / "f", u / "d", NOREPLACE) == 17
    assert errno_of(renameat2, u / "f", u / "none", EXCHANGE) == 2
    assert errno_of(renameat2, u / "f", u / "e", NOREPLACE | EXCHANGE) == 22
    os.rename(u / "d", u / "e")
    assert (u / "e/x").read_text() == "x"
    assert {name.removeprefix(".wh.") for name in os.listdir(u.up)} == {"d", "e"}


DIRS = {
    "lower": ([{"d/a": "a", "d/sub/b": "b", "d/sub/deep/c": "c"}], {}),
    "merged": ([{"d/a": "0", "d/sub/b": "b"}, {"d/a": "1", "d/sub/deep/c": "c"}], {"d/a": "a", "d/sub": D()}),
    "upper": ([{"other": "x"}], {"d/a": "a", "d/sub/b": "b", "d/sub/deep/c": "c"}),
    "middle": ([{"other": "x"}, {"d/a": "a"}, {"d/sub/b": "b", "d/sub/deep/c": "c"}], {}),
}


@pytest.mark.parametrize("kind", DIRS)
def test_directory(make_union: Maker, kind: str) -> None:
    """A directory of any origin moves, with all that is below it, stays itself, and moves again after remount."""
    lowers, upper = DIRS[kind]
    u = make_union(lowers, upper)

    def check(top: str) -> None:
        assert sorted(os.listdir(u / top)) == ["a", "sub"]
        assert (u / top / "a").read_text() == "a"
        assert (u / top / "sub/b").read_text() == "b"
        assert (u / top / "sub/deep/c").read_text() == "c"
        assert [(u / top / p).stat().st_ino for p in (".", "a", "sub", "sub/b", "sub/deep/c")] == numbers
        assert [name for name in os.listxattr(u / top) if "overlay" in name] == []

    numbers = [(u / "d" / p).stat().st_ino for p in (".", "a", "sub", "sub/b", "sub/deep/c")]
    os.rename(u / "d", u / "moved")
    check("moved")
    assert errno_of(os.stat, u / "d") == 2
    u.remount()
    check("moved")
    assert errno_of(os.stat, u / "d") == 2
    os.mkdir(u / "in")
    os.rename(u / "moved", u / "in/again")
    check("in/again")
    u.remount()
    check("in/again")
    os.mkdir(u / "d")
    assert os.listdir(u / "d") == []
    os.rename(u / "in/again/sub", u / "d/out")
    assert (u / "d/out/deep/c").read_text() == "c"
    os.rename(u / "d/out", u / "in/again/sub")
    check("in/again")
    with open(u / "in/again/sub/deep/c", "a") as f:
        f.write("+")
    os.unlink(u / "in/again/sub/b")
    (u / "in/again/sub/new").write_text("n")
    for _ in range(2):
        assert sorted(os.listdir(u / "in/again/sub")) == ["deep", "new"]
        assert (u / "in/again/sub/deep/c").read_text() == "c+"
        u.remount()
    os.rename(u / "in", u / "d/in")
    u.remount()
    assert (u / "d/in/again/sub/deep/c").read_text() == "c+"
    assert sorted(os.listdir(u / "d/in/again")) == ["a", "sub"]


def test_directory_over_directory(make_union: Maker) -> None:
    """Onto an empty directory that hides names of a lower: those stay hidden."""
    u = make_union([{"d/x": "x", "t/gone": "g", "o/q": "q"}])
    os.unlink(u / "t/gone")
    os.rename(u / "d", u / "t")
    for _ in range(2):
        assert os.listdir(u / "t") == ["x"]
        assert sorted(os.listdir(u.merged)) == ["o", "t"]
        u.remount()
    os.mkdir(u / "n")
    os.unlink(u / "o/q")
    os.rename(u / "n", u / "o")
    u.remount()
    assert os.listdir(u / "o") == []


def test_moved_then_replaced(make_union: Maker) -> None:
    """After a lower directory moved away, its old name is free for anything, and nothing of it shines through."""
    u = make_union([{"d/x": "x", "d/y": "y"}, {"d/z": "z"}])
    os.rename(u / "d", u / "e")
    os.mkdir(u / "d")
    (u / "d/x").write_text("other")
    for _ in range(2):
        assert os.listdir(u / "d") == ["x"]
        assert (u / "d/x").read_text() == "other"
        assert sorted(os.listdir(u / "e")) == ["x", "y", "z"]
        assert (u / "e/x").read_text() == "x"
        u.remount()
    os.rename(u / "d", u / "f")
    os.rename(u / "e", u / "d")
    os.rename(u / "f", u / "e")
    for _ in range(2):
        assert sorted(os.listdir(u / "d")) == ["x", "y", "z"]
        assert os.listdir(u / "e") == ["x"]
        u.remount()


def test_swap_parent_and_child_names(make_union: Maker) -> None:
    """Nested redirects: a child moves out, the parent moves into it."""
    u = make_union([{"p/c/f": "f", "p/g": "g"}])
    os.rename(u / "p/c", u / "c")
    os.rename(u / "p", u / "c/p")
    for _ in range(2):
        assert sorted(os.listdir(u / "c")) == ["f", "p"]
        assert os.listdir(u / "c/p") == ["g"]
        assert (u / "c/f").read_text() == "f"
        assert os.listdir(u.merged) == ["c"]
        u.remount()
    os.rename(u / "c", u / "p")
    u.remount()
    assert (u / "p/p/g").read_text() == "g"
    assert (u / "p/f").read_text() == "f"


def test_exchange(make_union: Maker) -> None:
    u = make_union([{"a": "A", "b": "B", "d/x": "x", "e/y": "y", "l": L("a"), "f": "F", "dir/in": "in"}], {"up": "U"})
    numbers = {name: (u / name).lstat().st_ino for name in ("a", "b", "d", "e", "up", "f", "dir")}
    for first, second in (("a", "b"), ("d", "e"), ("up", "l"), ("f", "dir")):
        renameat2(u / first, u / second, EXCHANGE)
    for _ in range(2):
        assert ((u / "a").read_text(), (u / "b").read_text()) == ("B", "A")
        assert (os.listdir(u / "d"), os.listdir(u / "e")) == (["y"], ["x"])
        assert (u / "e/x").read_text() == "x"
        assert os.readlink(u / "up") == "a"
        assert (u / "l").read_text() == "U"
        assert (u / "dir").read_text() == "F"
        assert os.listdir(u / "f") == ["in"]
        for first, second in (("a", "b"), ("d", "e"), ("f", "dir")):
            assert (u / first).stat().st_ino == numbers[second]
            assert (u / second).stat().st_ino == numbers[first]
        u.remount()
    renameat2(u / "a", u / "d/y", EXCHANGE)
    assert (u / "a").read_text() == "y"
    assert (u / "d/y").read_text() == "B"


def test_noreplace(make_union: Maker) -> None:
    u = make_union([{"a": "A", "b": "B", "d/x": "x", "w": WHITEOUT}, {"w": "hidden"}])
    assert errno_of(renameat2, u / "a", u / "b", NOREPLACE) == 17
    assert errno_of(renameat2, u / "d", u / "b", NOREPLACE) == 17
    renameat2(u / "a", u / "w", NOREPLACE)
    renameat2(u / "d", u / "e", NOREPLACE)
    os.unlink(u / "b")
    renameat2(u / "e", u / "b", NOREPLACE)
    for _ in range(2):
        assert sorted(os.listdir(u.merged)) == ["b", "w"]
        assert (u / "w").read_text() == "A"
        assert (u / "b/x").read_text() == "x"
        u.remount()


@pytest.mark.needs("rename_whiteout")
def test_whiteout_flag(make_union: Maker) -> None:
    """RENAME_WHITEOUT leaves what a stacked overlay takes for a whiteout; here it may not hide anything else."""
    u = make_union([{"a": "A", "b": "B"}], {"c": "C"}, compare=False)
    number = errno_of(renameat2, u / "c", u / "moved", RENAME_WHITEOUT)
    if not make_union.target.ours and number:
        pytest.skip("the oracle does not take RENAME_WHITEOUT")
    assert number == 0
    assert (u / "moved").read_text() == "C"
    assert errno_of(renameat2, u / "a", u / "b", RENAME_WHITEOUT) == 0
    assert (u / "b").read_text() == "A"
    u.remount()
    assert (u / "b").read_text() == "A"


def test_sticky_and_permission(make_union: Maker) -> None:
    """An ordinary user may not move what the sticky bit or a directory's mode protects."""
    u = make_union(
        [
            {
                "tmp": D(0o1777),
                "tmp/roots": "r",
                "mine": D(0o755, 12345, 12345),
                "mine/f": F("f", uid=12345),
                "closed": D(0o755),
                "closed/x": "x",
            }
        ]
    )
    assert child(errno_of, os.rename, u / "tmp/roots", u / "mine/roots", uid=12345) == 1
    assert child(errno_of, os.unlink, u / "tmp/roots", uid=12345) == 1
    assert child(errno_of, os.rename, u / "closed/x", u / "mine/x", uid=12345) == 13
    assert child(errno_of, os.rename, u / "mine/f", u / "tmp/f", uid=12345) == 0
    assert child(errno_of, os.rename, u / "tmp/f", u / "mine/g", uid=12345) == 0
    assert os.listdir(u / "mine") == ["g"]


@pytest.mark.needs("coherent_fd")
def test_open_over_rename(make_union: Maker) -> None:
    """Descriptors follow their files through renames of them and of what is above them."""
    u = make_union([{"d/e/f": "old", "victim": "victim"}])
    fd = os.open(u / "d/e/f", os.O_RDWR)
    dirfd = os.open(u / "d/e", os.O_RDONLY)
    victim = os.open(u / "victim", os.O_RDONLY)
    os.rename(u / "d", u / "moved")
    os.pwrite(fd, b"new", 0)
    os.rename(u / "moved/e/f", u / "victim")
    assert os.pread(fd, 3, 0) == b"new"
    assert os.read(victim, 10) == b"victim"
    assert os.fstat(victim).st_nlink == 0
    assert (u / "victim").read_text() == "new"
    os.close(os.open("made", os.O_CREAT | os.O_WRONLY, dir_fd=dirfd))
    assert os.listdir(u / "moved/e") == ["made"]
    for one in (fd, dirfd, victim):
        os.close(one)
