"""`unionfs diff --tar`: the layer that comes of a list of changes."""

from __future__ import annotations

import io
import os
import socket
import tarfile
from pathlib import Path

import pytest

from unionfs.store.layertar import layer_tar
from unionfs.store.tree import DirTree


def write_layer(root: bytes, changes: list[tuple[str, bytes]], out: io.BytesIO) -> None:
    tree = DirTree(root)
    out.write(b"".join(layer_tar(tree, changes)))
    tree.close()


def layer(root: Path, *changes: tuple[str, str]) -> dict[str, tarfile.TarInfo]:
    out = io.BytesIO()
    write_layer(os.fsencode(root), [(kind, os.fsencode(path)) for kind, path in changes], out)
    out.seek(0)
    with tarfile.open(fileobj=out) as tar:
        return {info.name: info for info in tar}


def test_kinds(tmp_path: Path) -> None:
    (tmp_path / "d").mkdir(mode=0o711)
    (tmp_path / "d/f").write_bytes(b"data")
    (tmp_path / "l").symlink_to("d/f")
    os.mkfifo(tmp_path / "p")
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(tmp_path / "s"))
    out = io.BytesIO()
    changes = [("C", b"/d"), ("A", b"/d/f"), ("A", b"/l"), ("A", b"/p"), ("A", b"/s"), ("D", b"/d/gone")]
    write_layer(os.fsencode(tmp_path), changes, out)
    out.seek(0)
    with tarfile.open(fileobj=out) as tar:
        assert tar.getnames() == ["d", "d/f", "d/.wh.gone", "l", "p"]  # no socket
        assert tar.getmember("d").mode == 0o711 and tar.getmember("d").isdir()
        extracted = tar.extractfile("d/f")
        assert extracted is not None and extracted.read() == b"data"
        assert tar.getmember("l").linkname == "d/f"
        assert tar.getmember("p").isfifo()
        whiteout = tar.getmember("d/.wh.gone")
        assert whiteout.isreg() and whiteout.size == 0


def test_devices(tmp_path: Path) -> None:
    if os.geteuid() != 0:
        pytest.skip("making device nodes needs root")
    os.mknod(tmp_path / "null", 0o20666, os.makedev(1, 3))
    info = layer(tmp_path, ("A", "/null"))["null"]
    assert info.ischr() and (info.devmajor, info.devminor) == (1, 3)


def test_hard_links_stay_links(tmp_path: Path) -> None:
    (tmp_path / "a").write_text("x")
    os.link(tmp_path / "a", tmp_path / "b")
    os.link(tmp_path / "a", tmp_path / "unchanged")
    members = layer(tmp_path, ("A", "/a"), ("A", "/b"))
    assert members["a"].isreg() and members["b"].islnk()
    assert members["b"].linkname == "a"


def test_times_to_the_nanosecond_and_before_1970(tmp_path: Path) -> None:
    for name, time in (("new", 1_700_000_000_123_456_789), ("old", -1_500_000_000), ("whole", 5 * 10**9)):
        (tmp_path / name).write_text("")
        os.utime(tmp_path / name, ns=(0, time))
    members = layer(tmp_path, ("A", "/new"), ("A", "/old"), ("A", "/whole"))
    assert members["new"].pax_headers["mtime"] == "1700000000.123456789"
    assert members["old"].mtime == -1.5
    assert members["whole"].mtime == 5 and "mtime" not in members["whole"].pax_headers


def test_xattrs_and_names_that_are_not_utf8(tmp_path: Path) -> None:
    path = os.path.join(os.fsencode(tmp_path), b"n\xff")
    with open(path, "wb"):
        pass
    os.setxattr(path, "user.bin", b"\x00\xff\x01")
    out = io.BytesIO()
    write_layer(os.fsencode(tmp_path), [("A", b"/n\xff")], out)
    out.seek(0)
    with tarfile.open(fileobj=out) as tar:
        (info,) = tar.getmembers()
    assert os.fsencode(info.name) == b"n\xff"
    assert info.pax_headers["SCHILY.xattr.user.bin"].encode("utf-8", "surrogateescape") == b"\x00\xff\x01"


def test_the_same_changes_make_the_same_layer(tmp_path: Path) -> None:
    (tmp_path / "a").write_text("x")
    (tmp_path / "b").write_text("y")
    first, second = io.BytesIO(), io.BytesIO()
    write_layer(os.fsencode(tmp_path), [("A", b"/a"), ("A", b"/b"), ("D", b"/c")], first)
    (tmp_path / "a").read_text()
    write_layer(os.fsencode(tmp_path), [("D", b"/c"), ("A", b"/b"), ("A", b"/a")], second)
    assert first.getvalue() == second.getvalue()
