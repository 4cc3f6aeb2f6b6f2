"""Deletions: every form of whiteout in every layer, opaque in every spelling, what comes back over them."""

from __future__ import annotations

import os
import stat

import pytest
from support.mounts import Maker
from support.procs import errno_of
from support.trees import WHITEOUT, D, F, L, Node, opaque

DOT_WH = {".wh.gone": ""}
OPAQUES = {
    "trusted": {"d": opaque()},
    "user": {"d": opaque("user.overlay.")},
    "fuse-overlayfs": {"d": D(xattrs={"user.fuseoverlayfs.opaque": b"y"})},
    "dot-wh": {"d/.wh..wh..opq": ""},
}


@pytest.mark.parametrize("form", [{"gone": WHITEOUT}, DOT_WH], ids=["char", "dot-wh"])
@pytest.mark.parametrize("layer", [0, 1])
def test_in_a_lower(make_union: Maker, form: dict, layer: int) -> None:
    """A whiteout in the top or a middle lower hides what lies below it, and only that; never seen itself."""
    if form is DOT_WH:
        make_union.require("dot_wh")
    layers: list[dict] = [{"a": "a"}, {"b": "b"}, {"gone": "low", "c": "c"}]
    layers[layer].update(form)
    u = make_union(layers, compare=form is not DOT_WH)
    for _ in range(2):
        assert sorted(os.listdir(u.merged)) == ["a", "b", "c"]
        assert not (u / "gone").exists()
        assert errno_of(os.stat, u / ".wh.gone") == 2
        u.remount()
    (u / "gone").write_text("back")
    u.remount()
    assert (u / "gone").read_text() == "back"
    os.unlink(u / "gone")
    assert sorted(os.listdir(u.merged)) == ["a", "b", "c"]


def test_name_above_a_whiteout_shows(make_union: Maker) -> None:
    u = make_union([{"gone": "top"}, {"gone": WHITEOUT}, {"gone": "low"}])
    assert (u / "gone").read_text() == "top"
    os.unlink(u / "gone")
    assert not (u / "gone").exists()
    u.remount()
    assert not (u / "gone").exists()


def test_directory_under_whiteout(make_union: Maker) -> None:
    """A whiteout ends the merge: a directory above it shows nothing of one below it."""
    u = make_union([{"d/top": "1"}, {"d": WHITEOUT}, {"d/low": "2"}])
    assert os.listdir(u / "d") == ["top"]
    u2 = make_union([{"d/top": "1"}, {"d": "a file"}, {"d/low": "2"}])
    assert os.listdir(u2 / "d") == ["top"]


@pytest.mark.parametrize("spelling", OPAQUES)
@pytest.mark.parametrize("layer", ["upper", 0, 1])
def test_opaque(make_union: Maker, spelling: str, layer: str | int) -> None:
    if spelling != "trusted":
        make_union.require("spellings")
    upper: dict = {}
    layers: list[dict] = [{}, {}, {"d/low": "low", "d/sub/deep": "x"}]
    target = upper if layer == "upper" else layers[layer]  # type: ignore[index]
    target.update(OPAQUES[spelling])
    target["d/new"] = "new"
    u = make_union(layers, upper, compare=spelling == "trusted")
    for _ in range(2):
        assert os.listdir(u / "d") == ["new"]
        assert not (u / "d/low").exists()
        assert errno_of(os.stat, u / "d/sub/deep") == 2
        assert [name for name in os.listxattr(u / "d") if "overlay" in name] == []
        u.remount()
    (u / "d/low").write_text("again")
    os.unlink(u / "d/new")
    u.remount()
    assert os.listdir(u / "d") == ["low"]


@pytest.mark.needs("kernel_format")
def test_delete_lower_entries(make_union: Maker) -> None:
    """Every kind of entry of a lower can be deleted, and stays deleted; the whiteout is a 0:0 device."""
    u = make_union(
        [
            {
                "f": "x",
                "d/x": "y",
                "e": D(),
                "l": L("f"),
                "p": Node("p"),
                "c": Node("c", 1, 3),
                "s": Node("s"),
                "keep/a": "a",
                "keep/b": "b",
            }
        ]
    )
    assert errno_of(os.rmdir, u / "d") == 39
    assert errno_of(os.unlink, u / "d") == 21
    assert errno_of(os.rmdir, u / "f") == 20
    os.unlink(u / "d/x")
    os.rmdir(u / "d")
    os.rmdir(u / "e")
    for name in "flpcs":
        os.unlink(u / name)
    os.unlink(u / "keep/a")
    for _ in range(2):
        assert os.listdir(u.merged) == ["keep"]
        assert os.listdir(u / "keep") == ["b"]
        for name in ("f", "d", "e", "l", "p", "c", "s", "keep/a", "d/x"):
            assert errno_of(os.lstat, u / name) == 2, name
        assert errno_of(os.unlink, u / "f") == 2
        assert errno_of(os.rmdir, u / "d") == 2
        u.remount()
    u.umount()
    for name in ("f", "d", "e", "l", "p", "c", "s", "keep/a"):
        st = (u.up / name).lstat()
        assert stat.S_ISCHR(st.st_mode) and st.st_rdev == 0, name


def test_delete_upper_only_leaves_nothing(make_union: Maker) -> None:
    u = make_union([{"low": "x"}])
    (u / "f").write_text("x")
    (u / "d").mkdir()
    (u / "d/e").mkdir()
    os.symlink("x", u / "l")
    for name in ("f", "l"):
        os.unlink(u / name)
    os.rmdir(u / "d/e")
    os.rmdir(u / "d")
    assert os.listdir(u.merged) == ["low"]
    assert os.listdir(u.up) == []


def test_recreate_over_whiteout(make_union: Maker) -> None:
    """Whatever is made where something was deleted is new: a directory shows nothing of the old one."""
    u = make_union([{"f": "old", "d/x": "old", "d/sub/y": "old", "k": "old", "m/z": "old", "r": "old"}])
    os.unlink(u / "f")
    os.unlink(u / "k")
    for name in ("d/x", "d/sub/y", "m/z"):
        os.unlink(u / name)
    for name in ("d/sub", "d", "m"):
        os.rmdir(u / name)
    os.unlink(u / "r")
    (u / "f").write_text("new")
    (u / "d").mkdir()
    (u / "k").mkdir()
    os.symlink("f", u / "m")
    os.mkfifo(u / "r")
    for _ in range(2):
        assert (u / "f").read_text() == "new"
        assert os.listdir(u / "d") == []
        assert os.listdir(u / "k") == []
        assert os.readlink(u / "m") == "f"
        assert stat.S_ISFIFO((u / "r").lstat().st_mode)
        assert sorted(os.listdir(u.merged)) == ["d", "f", "k", "m", "r"]
        u.remount()
    (u / "d/sub").mkdir()
    assert os.listdir(u / "d/sub") == []


def test_remove_merged_tree(make_union: Maker) -> None:
    """rm -rf of a directory that exists in upper and lowers; then whatever is put there is alone."""
    u = make_union([{"d/a/1": "x", "d/b": "y"}, {"d/a/2": "z", "d/c/3": "w"}], {"d/a/4": "u", "d/e": "v"})
    assert sorted(os.listdir(u / "d/a")) == ["1", "2", "4"]
    for folder, dirs, files in os.walk(u / "d", topdown=False):
        for name in files:
            os.unlink(os.path.join(folder, name))
        for name in dirs:
            os.rmdir(os.path.join(folder, name))
    assert os.listdir(u / "d") == []
    os.rmdir(u / "d")
    assert errno_of(os.stat, u / "d") == 2
    u.remount()
    assert errno_of(os.stat, u / "d") == 2
    os.mkdir(u / "d", 0o710)
    (u / "d/b").write_text("fresh")
    u.remount()
    assert os.listdir(u / "d") == ["b"]
    assert (u / "d").stat().st_mode & 0o777 == 0o710


@pytest.mark.needs("long_names")
def test_long_name_deleted(make_union: Maker) -> None:
    """255-byte names, deletion of one from a lower included: a whiteout must not need a longer name."""
    name, other = "n" * 255, "é" * 127 + "x"
    u = make_union([{name: "x", other: "y", "d" * 255 + "/" + name: "z"}])
    assert (u / name).read_text() == "x"
    os.unlink(u / name)
    os.unlink(u / ("d" * 255) / name)
    os.rename(u / other, u / name)
    for _ in range(2):
        assert (u / name).read_text() == "y"
        assert not (u / other).exists()
        assert os.listdir(u / ("d" * 255)) == []
        u.remount()
    assert errno_of(os.stat, u / ("n" * 256)) == 36
    assert errno_of(os.mkdir, u / ("n" * 256)) == 36
    assert errno_of(os.rename, u / name, u / ("n" * 256)) == 36


@pytest.mark.needs("kernel_format")
def test_whiteout_like_entries(make_union: Maker) -> None:
    """A char 0:0 of a layer is never shown. Made through the mount, as a stacked overlay does, it hides nothing."""
    u = make_union([{"real": Node("c", 1, 5), "w": WHITEOUT}, {"w": "hidden"}], compare=False)
    assert os.listdir(u.merged) == ["real"]
    assert (u / "real").lstat().st_rdev == os.makedev(1, 5)
    number = errno_of(os.mknod, u / "zero", stat.S_IFCHR | 0o600, 0)
    assert number in (0, 1)
    for _ in range(2):
        assert sorted(os.listdir(u.merged)) == (["real"] if number else ["real", "zero"])
        if not number:
            assert (u / "zero").lstat().st_rdev == 0
            assert stat.S_ISCHR((u / "zero").lstat().st_mode)
        u.remount()


def test_many_deleted_and_back(make_union: Maker) -> None:
    names = [f"f{i}" for i in range(200)]
    u = make_union([{f"d/{name}": name for name in names}])
    for name in names[:150]:
        os.unlink(u / "d" / name)
    assert sorted(os.listdir(u / "d")) == sorted(names[150:])
    for name in names[:50]:
        (u / "d" / name).write_text("new")
    for _ in range(2):
        assert sorted(os.listdir(u / "d")) == sorted(names[:50] + names[150:])
        assert (u / "d/f0").read_text() == "new"
        assert (u / "d/f199").read_text() == "f199"
        u.remount()


@pytest.mark.needs("spellings")
def test_whiteout_xattr_form(make_union: Maker) -> None:
    """The kernel's other form: an empty file with the whiteout xattr in a directory whose opaque xattr is x."""
    u = make_union(
        [
            {
                "d": D(xattrs={"trusted.overlay.opaque": b"x"}),
                "d/gone": F("", xattrs={"trusted.overlay.whiteout": b""}),
                "d/new": "n",
            },
            {"d/gone": "low", "d/stays": "s"},
        ]
    )
    assert sorted(os.listdir(u / "d")) == ["new", "stays"]
    assert not (u / "d/gone").exists()
    (u / "d/gone").write_text("back")
    u.remount()
    assert sorted(os.listdir(u / "d")) == ["gone", "new", "stays"]
    assert (u / "d/gone").read_text() == "back"
