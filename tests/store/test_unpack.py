"""Unpacking: the image spec's rules, and that no archive leads out of its directory or takes the host down."""

from __future__ import annotations

import gzip
import io
import os
import stat
import tarfile
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from unionfs.store.api import Invalid, StoreError, Unsupported
from unionfs.store.formats import Format, OverlayFormat, PlainFormat
from unionfs.store.streams import compressed
from unionfs.store.tree import DirTree, everything
from unionfs.store.unpack import Limits, unpack

from .conftest import Opener, archive

LIMITS = Limits(64 << 20, 1000)


@pytest.fixture(params=["overlay", "aufs", "plain"])
def form(request: pytest.FixtureRequest, tmp_path: Path) -> Format:
    (tmp_path / "layer").mkdir()
    (tmp_path / "outside").mkdir()
    if request.param == "overlay":
        return OverlayFormat(str(tmp_path))
    return Format() if request.param == "aufs" else PlainFormat()


def put(tmp_path: Path, form: Format, stream: io.BytesIO, limits: Limits = LIMITS) -> Path:
    unpack(str(tmp_path / "layer"), stream, form, None, limits)
    return tmp_path / "layer"


# --- what it makes ---


def test_kinds_and_attributes(tmp_path: Path, form: Format) -> None:
    fifo = tarfile.TarInfo("p")
    fifo.type, fifo.mode = tarfile.FIFOTYPE, 0o640
    owned = tarfile.TarInfo("owned")
    owned.mode, owned.mtime = 0o4755, 0
    owned.pax_headers = {"mtime": "1234567890.123456789", "SCHILY.xattr.user.note": "\udcff\0x"}
    if os.geteuid() == 0:
        owned.uid, owned.gid = 70000, 70001
    layer = put(
        tmp_path,
        form,
        archive(("d/", None), ("d/f", b"data"), ("l", "->/etc/passwd"), ("h", "=d/f"), ("p", fifo), ("o", owned)),
    )
    assert (layer / "d/f").read_bytes() == b"data"
    assert os.readlink(layer / "l") == "/etc/passwd"
    assert os.stat(layer / "h").st_ino == os.stat(layer / "d/f").st_ino
    assert stat.S_ISFIFO(os.stat(layer / "p").st_mode) and os.stat(layer / "p").st_mode & 0o777 == 0o640
    status = os.stat(layer / "owned")
    assert status.st_mode & 0o7777 == 0o4755 and status.st_mtime_ns == 1234567890123456789
    assert os.getxattr(layer / "owned", "user.note") == b"\xff\x00x"
    if os.geteuid() == 0:
        assert (status.st_uid, status.st_gid) == (70000, 70001)


def test_directory_times_and_modes_hold_although_files_come_later(tmp_path: Path, form: Format) -> None:
    layer = put(tmp_path, form, archive(("d/", None), ("d/f", b"x"), mtime=1000, mode=0o500))
    assert os.stat(layer / "d").st_mtime == 1000 and os.stat(layer / "d").st_mode & 0o777 == 0o500


def test_names_that_are_not_utf8(tmp_path: Path, form: Format) -> None:
    layer = put(tmp_path, form, archive(("caf\udce9", b"1"), ("new\nline", b"2"), ("é" * 120, b"3")))
    assert sorted(os.listdir(os.fsencode(layer))) == sorted([b"caf\xe9", b"new\nline", "é".encode() * 120])


def test_zeros_become_holes(tmp_path: Path, form: Format) -> None:
    layer = put(tmp_path, form, archive(("f", b"a" + bytes(8 << 20) + b"b")))
    assert (layer / "f").stat().st_size == (8 << 20) + 2
    assert (layer / "f").stat().st_blocks * 512 < 1 << 20


@pytest.mark.parametrize("how", ["", "gzip", "zstd"])
def test_compressions_and_digest(tmp_path: Path, form: Format, how: str) -> None:
    import hashlib

    plain = archive(("f", b"x" * 100000)).getvalue()
    packed = b"".join(compressed(iter([plain]), how))
    applied, _ = unpack(str(tmp_path / "layer"), io.BytesIO(packed), form, None, LIMITS)
    assert applied.diff_id == "sha256:" + hashlib.sha256(plain).hexdigest() and applied.size == 100000


def test_gnu_and_sparse_archives(tmp_path: Path, form: Format) -> None:
    import subprocess

    source = tmp_path / "source"
    source.mkdir()
    with open(source / "sparse", "wb") as stream:
        stream.truncate(4 << 20)
        stream.seek(2 << 20)
        stream.write(b"middle")
    (source / ("long" * 60)).write_text("l")
    for style in ("gnu", "posix"):
        made = subprocess.run(
            ["tar", "-S", f"--format={style}", "-C", source, "-cf", "-", "."], capture_output=True, check=True
        )
        layer = put(tmp_path, form, io.BytesIO(made.stdout))
        assert (layer / "sparse").read_bytes() == (source / "sparse").read_bytes()
        assert (layer / ("long" * 60)).read_text() == "l"


def test_empty_layers(tmp_path: Path, form: Format) -> None:
    for data in (b"", bytes(1024)):
        put(tmp_path, form, io.BytesIO(data))
    assert list((tmp_path / "layer").iterdir()) == []


# --- whiteouts (image spec, layer.md) ---


def merged(open_layers: Opener, driver: str, *archives: io.BytesIO) -> list[str]:
    """The paths of the tree that the archives make on one another."""
    store = open_layers(driver)
    parent = ""
    for number, stream in enumerate(archives):
        store.create(f"l{number}", parent)
        store.apply(f"l{number}", stream)
        parent = store.commit(f"l{number}", f"l{number}").id
    with tarfile.open(fileobj=io.BytesIO(b"".join(store.diff(parent, "")))) as tar:
        return tar.getnames()


@pytest.mark.parametrize("driver", ["overlay", "aufs", "row", "vfs"])
class TestWhiteouts:
    def test_a_file_a_directory_and_all_of_one(self, open_layers: Opener, driver: str) -> None:
        below = archive(("a", b""), ("d/", None), ("d/x", b""), ("o/", None), ("o/old", b""), ("k", b""))
        above = archive((".wh.a", b""), (".wh.d", b""), ("o/", None), ("o/.wh..wh..opq", b""), ("o/new", b""))
        assert merged(open_layers, driver, below, above) == ["k", "o", "o/new"]

    def test_order_does_not_matter(self, open_layers: Opener, driver: str) -> None:
        below = archive(("d/", None), ("d/old", b""), ("o/", None), ("o/old", b""), ("f", b"1"))
        above = archive(
            ("o/", None), ("o/new", b""), ("o/.wh..wh..opq", b""),
            ("d/", None), ("d/new", b""), (".wh.d", b""),
            (".wh.f", b""), ("f", b"2"),
        )  # fmt: skip
        assert merged(open_layers, driver, below, above) == ["d", "d/new", "f", "o", "o/new"]

    def test_replaced_directory_does_not_come_back(self, open_layers: Opener, driver: str) -> None:
        below = archive(("d/", None), ("d/old", b""))
        above = archive((".wh.d", b""), ("d/", None), ("d/new", b""))
        assert merged(open_layers, driver, below, above) == ["d", "d/new"]

    def test_of_nothing(self, open_layers: Opener, driver: str) -> None:
        assert merged(open_layers, driver, archive(("a", b"")), archive((".wh.b", b""), ("c/.wh.d", b""))) == ["a", "c"]

    def test_file_becomes_directory_and_back(self, open_layers: Opener, driver: str) -> None:
        below = archive(("a", b""), ("b/", None), ("b/x", b""))
        above = archive(("a/", None), ("a/y", b""), ("b", b""))
        assert merged(open_layers, driver, below, above) == ["a", "a/y", "b"]

    def test_parent_that_is_left_out_keeps_its_attributes(self, open_layers: Opener, driver: str) -> None:
        store = open_layers(driver)
        store.create("a")
        store.apply("a", archive(("d/", None), ("d/x", b""), mode=0o750, mtime=5000))
        store.commit("a", "a")
        store.create("b", "a")
        store.apply("b", archive(("d/y", b"")))
        with tarfile.open(fileobj=io.BytesIO(b"".join(store.diff("b", "")))) as tar:
            assert tar.getnames() == ["d", "d/x", "d/y"] and tar.getmember("d").mode == 0o750

    def test_hard_link_to_a_file_of_the_parent(self, open_layers: Opener, driver: str) -> None:
        store = open_layers(driver)
        store.create("a")
        store.apply("a", archive(("d/", None), ("d/x", b"content"), mode=0o640))
        store.commit("a", "a")
        store.create("b", "a")
        store.apply("b", archive(("link", "=d/x")))
        with tarfile.open(fileobj=io.BytesIO(b"".join(store.diff("b", "")))) as tar:
            extracted = tar.extractfile("link")
            assert extracted is not None and extracted.read() == b"content"


# --- what it refuses ---

EVIL = {
    "dots": [("../outside/f", b"x")],
    "dots inside": [("d/", None), ("d/../../outside/f", b"x")],
    "dots in a link": [("h", "=../outside/secret")],
    "through its own symlink": [("s", "->../outside"), ("s/f", b"x")],
    "through an absolute symlink": [("s", "->OUTSIDE"), ("s/f", b"x")],
    "through a symlink to itself": [("s", "->s"), ("s/f", b"x")],
    "hard link through a symlink": [("s", "->../outside"), ("h", "=s/secret")],
    "hard link to nothing": [("h", "=nothing")],
    "hard link to the root": [("h", "=.")],
    "hard link to a directory": [("d/", None), ("h", "=d")],
    "directory in a file": [("f", b""), ("f/g", b"")],
    "whiteout through a symlink": [("s", "->../outside"), ("s/.wh.secret", b"")],
    "opaque through a symlink": [("s", "->../outside"), ("s/.wh..wh..opq", b"")],
    "whiteout of dots": [("..", b"")],
    "whiteout of the parent": [("d/", None), ("d/.wh...", b"")],
    "deep": [("/".join(["d"] * 600), b"")],
    "long component": [("x" * 300, b"")],
}


@pytest.mark.parametrize("what", EVIL)
def test_evil_archives(tmp_path: Path, form: Format, what: str) -> None:
    (tmp_path / "outside/secret").write_text("s")
    members = [
        (name, data.replace("OUTSIDE", str(tmp_path / "outside")) if isinstance(data, str) else data)
        for name, data in EVIL[what]
    ]
    with pytest.raises(Invalid):
        put(tmp_path, form, archive(*members))
    assert [path.name for path in (tmp_path / "outside").iterdir()] == ["secret"]
    assert (tmp_path / "outside/secret").stat().st_nlink == 1
    assert {path.name for path in tmp_path.iterdir()} == {"layer", "outside"}


def test_absolute_names_stay_inside(tmp_path: Path, form: Format) -> None:
    target = str(tmp_path / "outside/f")
    layer = put(tmp_path, form, archive((target, b"x"), ("h", "=" + target)))
    assert list((tmp_path / "outside").iterdir()) == []
    assert (layer / target.lstrip("/")).read_bytes() == b"x"


def test_symlink_of_the_parent_is_not_followed(open_layers: Opener, tmp_path: Path) -> None:
    (tmp_path / "outside").mkdir()
    (tmp_path / "outside/secret").write_text("s")
    for driver in ("overlay", "vfs"):
        store = open_layers(driver)
        store.create("a")
        store.apply("a", archive(("s", f"->{tmp_path}/outside")))
        store.commit("a", "a")
        store.create("b", "a")
        store.apply("b", archive(("s/f", b"x"), ("s/.wh.secret", b"")))
        assert [path.name for path in (tmp_path / "outside").iterdir()] == ["secret"]
        store.close()


def test_marks_of_union_filesystems_are_data_or_nothing(open_layers: Opener) -> None:
    """An archive can't plant whiteouts, redirects or block maps for the driver to believe."""
    evil = tarfile.TarInfo("d")
    evil.type, evil.mode = tarfile.DIRTYPE, 0o755
    evil.pax_headers = {
        f"SCHILY.xattr.{key}": value
        for key, value in {
            "trusted.overlay.opaque": "y",
            "trusted.overlay.redirect": "/etc",
            "user.overlay.opaque": "y",
            "user.fuseoverlayfs.opaque": "y",
            "trusted.unionfs.redirect": "/etc",
        }.items()
    }
    zero = tarfile.TarInfo("gone")
    zero.type = tarfile.CHRTYPE
    for driver in ("overlay", "aufs"):
        store = open_layers(driver)
        store.create("a")
        store.apply("a", archive(("d/", None), ("d/below", b""), ("etc/", None), ("etc/x", b""), ("gone", b"")))
        store.commit("a", "a")
        store.create("b", "a")
        store.apply("b", archive(("d", evil), ("gone", zero), (".wh..wh.row/", None), (".wh..wh.row/maps", b"")))
        path = store.get("b")
        assert os.listdir(path + "/d") == ["below"]
        if driver == "overlay":
            status = os.lstat(path + "/gone")
            assert stat.S_ISCHR(status.st_mode) and status.st_rdev == 0
            assert os.getxattr(path + "/d", "trusted.overlay.opaque") == b"y"  # data of an overlay stacked on it
        assert ".wh..wh.row" not in os.listdir(store.branches("b")[1])
        store.put("b")


def test_damage_is_an_error_and_not_the_end(tmp_path: Path, form: Format) -> None:
    data = bytearray(archive(("a", b"x" * 600), ("b", b"y")).getvalue())
    data[512 + 1024 + 148] ^= 0xFF  # the second header's checksum
    with pytest.raises(Invalid, match="damaged"):
        put(tmp_path, form, io.BytesIO(bytes(data)))
    whole = archive(("a", b"x" * 600), ("b", b"y")).getvalue()
    for cut in (700, 512 + 1024 + 100):
        with pytest.raises(Invalid):
            put(tmp_path, form, io.BytesIO(whole[:cut]))
    for packed in (gzip.compress(whole), b"".join(compressed(iter([whole]), "zstd"))):
        with pytest.raises(Invalid):
            put(tmp_path, form, io.BytesIO(packed[: len(packed) // 2]))
        if packed[0] == 0x1F:
            broken = bytearray(packed)
            broken[-6] ^= 0xFF  # gzip's own checksum
            with pytest.raises(Invalid, match="compressed"):
                put(tmp_path, form, io.BytesIO(bytes(broken)))


def test_not_an_archive(tmp_path: Path, form: Format) -> None:
    with pytest.raises(Invalid):
        put(tmp_path, form, io.BytesIO(b"GET / HTTP/1.1\r\n" * 100))
    with pytest.raises(Unsupported, match="bzip2"):
        put(tmp_path, form, io.BytesIO(b"BZh91AY"))


def test_bombs(tmp_path: Path, form: Format) -> None:
    """Size, number of entries, extended headers, claimed sizes: limits, reached with little memory and disk."""
    zeros = gzip.compress(archive(("f", bytes(96 << 20))).getvalue())
    assert len(zeros) < 200_000
    with pytest.raises(Invalid, match=r"apply\.max_size"):
        put(tmp_path, form, io.BytesIO(zeros))
    with pytest.raises(Invalid, match=r"apply\.max_entries"):
        put(tmp_path, form, archive(*((f"f{number}", b"") for number in range(1001))))
    header = tarfile.TarInfo("x")
    header.pax_headers = {"SCHILY.xattr.user.bomb": "b" * (2 << 20)}
    with pytest.raises(Invalid, match="header"):
        put(tmp_path, form, archive(("x", header)))
    sparse = tarfile.TarInfo("huge")
    sparse.pax_headers = {"GNU.sparse.map": "0,0", "GNU.sparse.size": str(1 << 60), "GNU.sparse.name": "huge"}
    with pytest.raises(StoreError):
        put(tmp_path, form, archive(("huge", sparse)))


def test_rootless_leaves_out_what_it_may_not(open_layers: Opener, tmp_path: Path) -> None:
    """As an ordinary user: no owners, no devices; whiteouts as files; modes that lock the user out come last."""
    if os.geteuid() != 0:
        pytest.skip("becoming another user needs root")
    import subprocess
    import sys

    device = tarfile.TarInfo("null")
    device.type, device.devmajor, device.devminor = tarfile.CHRTYPE, 1, 3
    locked = tarfile.TarInfo("locked")
    locked.type, locked.mode = tarfile.DIRTYPE, 0
    rest = ("null", device), (".wh.gone", b""), ("s/", None)
    stream = archive(("locked", locked), ("locked/f", b"x"), *rest, uid=70000)
    (tmp_path / "layer.tar").write_bytes(stream.getvalue())
    program = (
        "import os, sys\n"
        "from unionfs.store.unpack import unpack, Limits; from unionfs.store.formats import OverlayFormat\n"
        "from unionfs.store.removal import remove\n"
        "os.setgroups([]); os.setgid(65534); os.setuid(65534)\n"
        "form = OverlayFormat(sys.argv[1]); print(form.devices, form.prefix)\n"
        "unpack(sys.argv[1] + '/l', open(sys.argv[2], 'rb'), form, None, Limits())\n"
        "print(sorted(os.listdir(sys.argv[1] + '/l')))\n"
        "remove(None, os.fsencode(sys.argv[1] + '/l'))\n"
    )
    import shutil
    import tempfile

    own = tempfile.mkdtemp()
    try:
        os.mkdir(own + "/l")
        os.chown(own, 65534, 65534)
        os.chown(own + "/l", 65534, 65534)
        shutil.copy(tmp_path / "layer.tar", own + "/layer.tar")
        os.chmod(own + "/layer.tar", 0o644)
        done = subprocess.run(
            [sys.executable, "-c", program, own, own + "/layer.tar"], capture_output=True, text=True, timeout=60
        )
        assert done.returncode == 0, done.stderr
        marks, found = done.stdout.splitlines()  # the kernel lets anybody make whiteout devices since 5.8
        assert (marks, found) in (
            ("True user.overlay.", "['gone', 'locked', 's']"),
            ("False user.overlay.", "['.wh.gone', 'locked', 's']"),
        )
        assert not os.path.exists(own + "/l")
    finally:
        shutil.rmtree(own)


# --- anything at all ---

_parts = st.sampled_from(["a", "b", "..", ".", "", ".wh.a", ".wh..wh..opq", ".wh.", ".wh...", "s", "\udcff", "x" * 254])
_names = st.lists(_parts, min_size=1, max_size=4).map("/".join)


@st.composite
def _members(draw: st.DrawFn) -> tarfile.TarInfo:
    info = tarfile.TarInfo(draw(_names))
    kinds = [tarfile.REGTYPE, tarfile.DIRTYPE, tarfile.SYMTYPE, tarfile.LNKTYPE, tarfile.FIFOTYPE]
    info.type = draw(st.sampled_from(kinds))
    info.linkname = draw(st.one_of(_names, st.sampled_from(["/", "../outside", "/tmp", "../outside/secret", "a"])))
    info.mode = draw(st.integers(0, 0o7777))
    info.mtime = draw(st.integers(0, 1 << 33))
    return info


_FUZZ = {"deadline": None, "derandomize": True, "suppress_health_check": [HealthCheck.function_scoped_fixture]}


@settings(max_examples=250, **_FUZZ)
@given(st.lists(_members(), max_size=8), st.booleans(), st.sampled_from(["overlay", "aufs", "plain"]))
def test_no_archive_leaves_its_directory(
    tmp_path: Path, members: list[tarfile.TarInfo], absolute: bool, form_name: str
) -> None:
    """It unpacks or is refused by a StoreError; what is outside is as it was; the rest can be removed."""
    from unionfs.store.removal import remove

    world = tmp_path / "world"
    (world / "layer").mkdir(parents=True)
    (world / "outside").mkdir()
    (world / "outside/secret").write_text("s")
    form = {"overlay": lambda: OverlayFormat(str(tmp_path)), "aufs": Format, "plain": PlainFormat}[form_name]()
    for member in members:
        if absolute:
            member.name = "/" + member.name
    try:
        unpack(str(world / "layer"), archive(*((m.name, m) for m in members)), form, None, LIMITS)
    except StoreError:
        pass
    secret = os.stat(world / "outside/secret")
    assert (secret.st_nlink, secret.st_size) == (1, 1)
    assert sorted(os.listdir(world)) == ["layer", "outside"] and os.listdir(world / "outside") == ["secret"]
    tree = DirTree(world / "layer")
    for _, path in everything(tree):
        assert b".." not in path.split(b"/")
    tree.close()
    remove(None, os.fsencode(world))


@settings(max_examples=150, **_FUZZ)
@given(st.data())
def test_no_bytes_crash_it(tmp_path: Path, data: st.DataObject) -> None:
    """A good archive with some bytes changed, cut or repeated: unpacked or refused, nothing else."""
    from unionfs.store.removal import remove

    good = archive(("d/", None), ("d/f", b"x" * 700), ("é" * 80, b"1"), ("l", "->d"), ("h", "=d/f"))
    raw = bytearray(good.getvalue())
    for _ in range(data.draw(st.integers(1, 6))):
        position = data.draw(st.integers(0, len(raw) - 1))
        raw[position] = data.draw(st.integers(0, 255))
        block = position // 512 * 512  # half of the time the header's checksum is made right again
        if data.draw(st.booleans()):
            total = sum(raw[block : block + 148]) + 8 * 32 + sum(raw[block + 156 : block + 512])
            raw[block + 148 : block + 156] = b"%06o\0 " % (total % (1 << 18))
    cut = data.draw(st.integers(0, len(raw)))
    (tmp_path / "layer").mkdir()
    try:
        unpack(str(tmp_path / "layer"), io.BytesIO(bytes(raw[:cut] if cut % 3 == 0 else raw)), Format(), None, LIMITS)
    except StoreError:
        pass
    remove(None, os.fsencode(tmp_path / "layer"))
    assert list(tmp_path.iterdir()) == []
