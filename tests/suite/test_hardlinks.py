"""Hard links: one inode under all its names, before and after copy-up, whichever is used first, and after remount."""

from __future__ import annotations

import os

import pytest
from support.mounts import Maker
from support.procs import errno_of
from support.trees import F, Hard, L, Node

LINKED = {"a": F("data", xattrs={"user.k": b"v"}), "d/b": Hard("a"), "d/e/c": Hard("a")}
NAMES = ("a", "d/b", "d/e/c")


def test_lower_links(make_union: Maker) -> None:
    u = make_union([LINKED])
    stats = [(u / name).stat() for name in NAMES]
    assert {st.st_ino for st in stats} == {stats[0].st_ino}
    assert {st.st_nlink for st in stats} == {3}


@pytest.mark.parametrize("first", NAMES)
@pytest.mark.parametrize("change", ["write", "chmod", "setxattr"])
def test_stay_linked_over_copy_up(make_union: Maker, first: str, change: str) -> None:
    u = make_union([LINKED])
    number = (u / "a").stat().st_ino
    others = [name for name in NAMES if name != first]
    if change == "write":
        (u / first).write_text("changed")
    elif change == "chmod":
        os.chmod(u / first, 0o604)
    else:
        os.setxattr(u / first, "user.k", b"w")
    for _ in range(2):
        for name in NAMES:
            st = (u / name).stat()
            assert (st.st_ino, st.st_nlink) == (number, 3), name
            assert (u / name).read_text() == ("changed" if change == "write" else "data")
            assert st.st_mode & 0o777 == (0o604 if change == "chmod" else 0o644)
            assert os.getxattr(u / name, "user.k") == (b"w" if change == "setxattr" else b"v")
        u.remount()
    with open(u / others[0], "a") as f:
        f.write("+1")
    with open(u / others[1], "a") as f:
        f.write("+2")
    u.remount()
    assert len({(u / name).read_text() for name in NAMES}) == 1
    assert (u / first).read_text().endswith("+1+2")
    assert {(u / name).stat().st_ino for name in NAMES} == {number}


@pytest.mark.parametrize("changed", [False, True], ids=["lower", "copied"])
def test_survivors(make_union: Maker, changed: bool) -> None:
    """Names go one by one; the others keep data and count; the last takes all."""
    u = make_union([LINKED])
    number = (u / "a").stat().st_ino
    if changed:
        (u / "d/b").write_text("new")
    content = "new" if changed else "data"
    os.unlink(u / "a")
    for _ in range(2):
        for name in NAMES[1:]:
            st = (u / name).stat()
            assert (st.st_nlink, st.st_ino) == (2, number)
            assert (u / name).read_text() == content
        u.remount()
    os.rename(u / "d/b", u / "moved")
    os.unlink(u / "d/e/c")
    for _ in range(2):
        assert ((u / "moved").stat().st_nlink, (u / "moved").stat().st_ino) == (1, number)
        assert (u / "moved").read_text() == content
        u.remount()
    os.unlink(u / "moved")
    u.remount()
    assert os.listdir(u / "d/e") == []
    u.umount()
    assert os.listdir(u.work / "index") == [] if (u.work / "index").exists() else True  # type: ignore[operator]


def test_new_link_to_lower(make_union: Maker) -> None:
    u = make_union([{"f": "data", "d/x": "x", "l": L("f"), "p": Node("p")}])
    numbers = {name: (u / name).lstat().st_ino for name in ("f", "l", "p")}
    os.link(u / "f", u / "d/g")
    os.link(u / "l", u / "l2", follow_symlinks=False)
    os.link(u / "p", u / "p2")
    for _ in range(2):
        for old, new in (("f", "d/g"), ("l", "l2"), ("p", "p2")):
            first, second = (u / old).lstat(), (u / new).lstat()
            assert (first.st_ino, first.st_nlink) == (second.st_ino, second.st_nlink) == (numbers[old], 2), old
        assert os.readlink(u / "l2") == "f"
        u.remount()
    with open(u / "d/g", "a") as f:
        f.write("+")
    assert (u / "f").read_text() == "data+"
    os.unlink(u / "f")
    u.remount()
    assert (u / "d/g").read_text() == "data+"
    assert (u / "d/g").stat().st_nlink == 1
    assert errno_of(os.link, u / "d/g", u / "d/x") == 17
    assert errno_of(os.link, u / "d", u / "d2") == 1
    assert errno_of(os.link, u / "none", u / "d2") == 2


def test_new_link_to_linked_lower(make_union: Maker) -> None:
    """A fourth name for a lower inode that has three."""
    u = make_union([LINKED])
    number = (u / "a").stat().st_ino
    os.link(u / "d/b", u / "fourth")
    for _ in range(2):
        for name in (*NAMES, "fourth"):
            assert ((u / name).stat().st_ino, (u / name).stat().st_nlink) == (number, 4), name
        u.remount()
    os.unlink(u / "d/e/c")
    (u / "fourth").write_text("w")
    u.remount()
    assert (u / "a").read_text() == "w"
    assert (u / "a").stat().st_nlink == 3


def test_chown_unlink_link_both_ways(make_union: Maker) -> None:
    u = make_union([{"a": "x", "b": Hard("a")}])
    number = (u / "a").stat().st_ino
    os.chown(u / "a", 5, 5)
    os.unlink(u / "a")
    os.link(u / "b", u / "a")
    os.unlink(u / "b")
    os.link(u / "a", u / "b")
    for _ in range(2):
        for name in "ab":
            st = (u / name).stat()
            assert (st.st_ino, st.st_nlink, st.st_uid) == (number, 2, 5)
        u.remount()


def test_upper_links(make_union: Maker) -> None:
    u = make_union([{"d/x": "x"}])
    (u / "a").write_text("1")
    for i in range(100):
        os.link(u / "a", u / f"d/link{i}")
    assert (u / "a").stat().st_nlink == 101
    os.rename(u / "d/link7", u / "seven")
    for i in range(0, 100, 10):
        os.unlink(u / f"d/link{i}")
    with open(u / "seven", "a") as f:
        f.write("2")
    for _ in range(2):
        assert (u / "d/link99").stat().st_nlink == 91
        assert (u / "d/link99").read_text() == "12"
        assert len({(u / "d" / name).stat().st_ino for name in os.listdir(u / "d") if name != "x"}) == 1
        u.remount()


def test_same_number_on_two_layers(make_union: Maker) -> None:
    """Equal lower inode numbers in different layers are different files, and links of two layers never mix."""
    u = make_union([{"a": "0", "b": Hard("a")}, {"c": "1", "d": Hard("c")}])
    (u / "a").write_text("A")
    (u / "d").write_text("D")
    for _ in range(2):
        assert [(u / name).read_text() for name in "abcd"] == ["A", "A", "D", "D"]
        assert (u / "a").stat().st_ino == (u / "b").stat().st_ino != (u / "c").stat().st_ino == (u / "d").stat().st_ino
        u.remount()


def test_hidden_name_of_linked_inode(make_union: Maker) -> None:
    """One of the names is hidden by an upper file of its own: the others stay linked, that one is apart."""
    u = make_union([LINKED], {"a": "mine"})
    (u / "d/b").write_text("changed")
    for _ in range(2):
        assert (u / "a").read_text() == "mine"
        assert (u / "d/e/c").read_text() == "changed"
        assert (u / "d/b").stat().st_ino == (u / "d/e/c").stat().st_ino != (u / "a").stat().st_ino
        u.remount()


def test_rename_over_link(make_union: Maker) -> None:
    u = make_union([LINKED | {"n": "new"}])
    os.rename(u / "n", u / "d/b")
    for _ in range(2):
        assert (u / "d/b").read_text() == "new"
        assert (u / "a").stat().st_nlink == 2
        assert (u / "d/e/c").stat().st_nlink == 2
        assert (u / "d/b").stat().st_nlink == 1
        u.remount()
