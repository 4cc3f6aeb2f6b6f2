"""Layers from strangers: nothing in them makes the union show, change or trust anything outside its layers."""

from __future__ import annotations

import os
import stat

import pytest
from support.mounts import Maker
from support.procs import errno_of
from support.trees import D, F, L, Node, build, opaque, snapshot

pytestmark = pytest.mark.needs("ours")


def test_symlink_where_a_directory_is_elsewhere(make_union: Maker) -> None:
    """A symlink in an upper layer over a directory of a lower: it is a symlink, and no path of ours goes through it."""
    u = make_union([{"d": L("../../../../../../etc"), "k/x": "x"}, {"d/passwd": "mine", "d/sub/y": "y"}])
    assert os.readlink(u / "d") == "../../../../../../etc"
    assert os.lstat(u / "d").st_mode & stat.S_IFLNK
    u2 = make_union([{"d/a": "a"}, {"d": L("/etc")}, {"d/b": "b"}])
    assert os.listdir(u2 / "d") == ["a"]
    u3 = make_union([{"d/passwd": "low"}], {"d": L("/etc")})
    before = os.stat("/etc/passwd").st_mtime_ns
    os.unlink(u3 / "d")
    os.mkdir(u3 / "d")
    (u3 / "d/passwd").write_text("new")
    assert (u3 / "d/passwd").read_text() == "new"
    assert os.stat("/etc/passwd").st_mtime_ns == before


@pytest.mark.parametrize(
    "redirect",
    [
        "../secret",
        "/../secret",
        "..",
        "a/b",
        "/a/../../secret",
        "",
        "/",
        ".",
        "\0",
        "x" * 300,
        "/none",
        "nested//x",
        "/secret\0/x",
    ],
)
def test_redirects_out_of_the_layer(make_union: Maker, redirect: str) -> None:
    """A forged redirect shows nothing that is not in a lower at that path, and the mount lives on."""
    u = make_union(
        [{"d/x": "x", "a/b/inside": "i"}],
        {"e": D(xattrs={"trusted.overlay.redirect": redirect.encode()}), "e/own": "o"},
        compare=False,
        mount=False,
    )
    build(u.base / "secret", {"hidden": "outside"})
    u.mount()
    number = errno_of(os.listdir, u / "e")
    assert number in (0, 5, 36, 116)
    if not number:
        names = set(os.listdir(u / "e"))
        assert "hidden" not in names
        assert names <= {"own", "d", "a", "inside", "x", "b", "e"}
    assert (u / "d/x").read_text() == "x"


def test_redirect_loop(make_union: Maker) -> None:
    u = make_union(
        [
            {"a": D(xattrs={"trusted.overlay.redirect": b"/b"}), "b": D(xattrs={"trusted.overlay.redirect": b"/a"})},
            {"a/x": "x", "b/y": "y"},
        ],
        compare=False,
    )
    for name in ("a", "b"):
        assert errno_of(os.listdir, u / name) in (0, 5, 40)
    assert sorted(os.listdir(u.merged)) == ["a", "b"]


def test_forged_metacopy(make_union: Maker) -> None:
    """A metacopy file whose data is nowhere, or whose redirect leads astray: an error, no data of others."""
    meta = {"trusted.overlay.metacopy": b""}
    u = make_union(
        [{"dir/x": "x"}],
        {
            "nowhere": F("", xattrs=meta, holes=100),
            "dir2": F("", xattrs=meta | {"trusted.overlay.redirect": b"/dir"}, holes=100),
            "out": F("", xattrs=meta | {"trusted.overlay.redirect": b"/../secret/hidden"}, holes=100),
        },
        compare=False,
        mount=False,
    )
    build(u.base / "secret", {"hidden": "outside"})
    u.mount()
    for name in ("nowhere", "dir2", "out"):
        number = errno_of(lambda name=name: (u / name).read_bytes())
        assert number in (2, 5, 21, 116) or b"outside" not in (u / name).read_bytes(), name
    assert (u / "dir/x").read_text() == "x"


def test_wh_tricks(make_union: Maker) -> None:
    """Odd `.wh.` names: an empty one, one of a dot, of dot-dot, aufs's own files, a directory with such a name."""
    u = make_union(
        [
            {
                ".wh.": "",
                ".wh..": "",
                ".wh...": "",
                ".wh..wh.aufs": "",
                ".wh..wh.plnk": D(),
                ".wh..wh.orph": D(),
                "d/.wh.x": D(),
                "ok": "1",
            },
            {"d/x": "x", "keep": "k"},
        ],
        compare=False,
    )
    names = os.listdir(u.merged)
    assert {"d", "keep", "ok"} <= set(names)
    assert errno_of(os.stat, u / "keep") == 0
    assert (u.merged / "..").resolve() == u.base
    assert errno_of(os.stat, u / "." / "ok") == 0


def test_wh_names_through_the_mount(make_union: Maker) -> None:
    """A user who makes a `.wh.` name can't hide anything by it: it is refused, or plain also after remount."""
    u = make_union([{"victim": "v", "d/victim": "v"}], compare=False)
    for name in (".wh.victim", "d/.wh..wh..opq"):
        number = errno_of(lambda name=name: (u / name).touch())
        assert number in (0, 1, 22), name
    for _ in range(2):
        assert (u / "victim").read_text() == "v"
        assert (u / "d/victim").read_text() == "v"
        u.remount()


def test_huge_and_odd_xattrs(make_union: Maker) -> None:
    u = make_union(
        [
            {
                "a": F("x", xattrs={"user.long": b"v" * 3500}),
                "d": D(xattrs={"trusted.overlay.opaque": b"yes please"}),
                "d/x": "x",
                "e": D(xattrs={"trusted.overlay.origin": b"\0" * 200, "trusted.overlay.nlink": b"garbage"}),
                "e/y": "y",
            },
            {"d/below": "b", "e/below": "c"},
        ],
        compare=False,
    )
    assert os.getxattr(u / "a", "user.long") == b"v" * 3500
    assert "x" in os.listdir(u / "d")
    assert sorted(os.listdir(u / "e")) == ["below", "y"]
    with open(u / "e/y", "a") as f:
        f.write("+")
    assert (u / "e/y").read_text() == "y+"


def test_forged_origin_and_nlink(make_union: Maker) -> None:
    """An upper with made-up origins and link counts still serves its files, with numbers that do not collide."""
    bad = {
        "trusted.overlay.origin": bytes.fromhex("00fb1d00010000000000000000000000000000000000000000000000ff"),
        "trusted.overlay.nlink": b"L+9999",
    }
    u = make_union([{"low": "l"}], {"a": F("a", xattrs=bad), "b": F("b", xattrs=bad)}, compare=False)
    assert ((u / "a").read_text(), (u / "b").read_text()) == ("a", "b")
    assert (u / "a").stat().st_ino != (u / "b").stat().st_ino
    os.unlink(u / "a")
    assert (u / "b").stat().st_nlink >= 1
    assert (u / "b").read_text() == "b"


def test_devices_are_only_devices(make_union: Maker) -> None:
    """A device node among layers is passed on as such and never opened by the server (a fifo would hang it)."""
    u = make_union(
        [{"dev": Node("c", 5, 99), "pipe": Node("p", xattrs={"trusted.overlay.metacopy": b""}), "x": "x"}],
        compare=False,
    )
    assert errno_of(os.open, u / "dev", os.O_RDONLY) in (6, 19)
    assert stat.S_ISFIFO((u / "pipe").lstat().st_mode)
    os.chmod(u / "pipe", 0o600)
    assert errno_of(os.open, u / "pipe", os.O_WRONLY | os.O_NONBLOCK) == 6
    assert os.listdir(u.up) == ["pipe"]


def test_opaque_root_and_file_as_directory(make_union: Maker) -> None:
    u = make_union([{".": opaque(), "top": "t"}, {"below": "b"}], compare=False)
    assert "top" in os.listdir(u.merged)
    before = snapshot(u.lowers[1])
    (u / "below").write_text("mine")
    assert (u / "below").read_text() == "mine"
    assert snapshot(u.lowers[1]) == before
