"""Merged directories: what they list, attributes, names of every sort, big and deep ones, listing under change."""

from __future__ import annotations

import os
import stat

import pytest
from support.mounts import Maker, Union
from support.procs import errno_of
from support.trees import OLD_NS, D, F, L, Node


def test_merge_of_layers(make_union: Maker) -> None:
    """N layers merge; the topmost wins in name, kind and attributes; a file hides the directories below it."""
    u = make_union(
        [
            {"d": D(0o701, 1, 1), "d/only0": "0", "d/same": "0", "file": "f", "mix": D(), "mix/a": "1"},
            {"d": D(0o702, 2, 2), "d/only1": "1", "d/same": "1", "file/hidden": "x", "mix": "a file"},
            {"d": D(0o703, 3, 3), "d/only2": "2", "d/same": "2", "mix/b": "2", "deep/er/x": "x"},
            {"deep/er/y": "y", "d/only3": "3"},
        ],
        {"d/up": "u", "d": D(0o700, 9, 9)},
    )
    for _ in range(2):
        assert sorted(os.listdir(u / "d")) == ["only0", "only1", "only2", "only3", "same", "up"]
        assert (u / "d/same").read_text() == "0"
        st = (u / "d").stat()
        assert (st.st_mode & 0o777, st.st_uid) == (0o700, 9)
        assert (u / "file").read_text() == "f"
        assert errno_of(os.stat, u / "file/hidden") == 20
        assert os.listdir(u / "mix") == ["a"]
        assert sorted(os.listdir(u / "deep/er")) == ["x", "y"]
        assert sorted(os.listdir(u.merged)) == ["d", "deep", "file", "mix"]
        u.remount()


def test_no_upper_is_read_only(make_union: Maker) -> None:
    u = make_union([{"a": "1", "d/x": "x", "l": L("a")}, {"b": "2", "d/y": "y"}], read_only=True)
    assert sorted(os.listdir(u / "d")) == ["x", "y"]
    assert (u / "b").read_text() == "2"
    for call, args in (
        (os.unlink, ("a",)),
        (os.mkdir, ("n",)),
        (os.rmdir, ("d",)),
        (os.chmod, ("a", 0o600)),
        (os.truncate, ("a", 0)),
        (os.mkfifo, ("p",)),
        (os.open, ("a", os.O_WRONLY)),
        (os.open, ("n", os.O_CREAT | os.O_RDWR)),
        (os.setxattr, ("a", "user.x", b"")),
        (os.chown, ("a", 1, 1)),
    ):
        name, *rest = args
        assert errno_of(call, u / str(name), *rest) == 30, call.__name__
    assert errno_of(os.rename, u / "a", u / "c") == 30
    assert errno_of(os.link, u / "a", u / "c") == 30
    assert errno_of(os.symlink, "x", u / "c") == 30
    assert (u / "a").read_text() == "1"


def test_ro_option(make_union: Maker) -> None:
    """An upper that is mounted with ro shows, and takes no change."""
    u = make_union([{"a": "1"}], {"b": "2"}, options="ro")
    assert sorted(os.listdir(u.merged)) == ["a", "b"]
    assert errno_of(os.unlink, u / "a") == 30
    assert errno_of(os.open, u / "b", os.O_RDWR) == 30


def test_numbers_agree(make_union: Maker) -> None:
    """d_ino is st_ino, d_type is the kind, all in one st_dev, all different, `.` and `..` included."""
    u = make_union(
        [{f"low{i}": "x" for i in range(20)} | {"d/sub/x": "1", "l": L("x"), "p": Node("p")}, {"d/y": "2"}],
        {"d/z": "3"},
    )
    (u / "new").write_text("n")
    os.mkdir(u / "d/made")
    dev = u.merged.stat().st_dev
    seen: dict[int, str] = {}
    for folder in (u.merged, u / "d", u / "d/sub"):
        with os.scandir(folder) as entries:
            for entry in entries:
                st = entry.stat(follow_symlinks=False)
                assert entry.inode() == st.st_ino, entry.path
                assert st.st_dev == dev, entry.path
                assert entry.is_dir(follow_symlinks=False) == stat.S_ISDIR(st.st_mode)
                assert entry.is_symlink() == stat.S_ISLNK(st.st_mode)
                assert seen.setdefault(st.st_ino, entry.path) == entry.path
    assert u.merged.stat().st_ino not in seen
    numbers = {path: ino for ino, path in seen.items()}
    u.remount()
    for path, ino in numbers.items():
        assert os.lstat(path).st_ino == ino, path


@pytest.mark.needs("dir_nlink")
def test_directory_nlink(make_union: Maker) -> None:
    """2 + subdirectories over all layers, and it follows changes."""
    u = make_union([{"d/a/x": "", "d/f": ""}, {"d/b/x": "", "d/a/y": ""}], {"d/c": D()})
    assert (u / "d").stat().st_nlink == 5
    os.mkdir(u / "d/n")
    assert (u / "d").stat().st_nlink == 6
    os.rmdir(u / "d/c")
    assert (u / "d").stat().st_nlink == 5
    os.rename(u / "d/n", u / "n")
    assert (u / "d").stat().st_nlink == 4
    assert (u / "n").stat().st_nlink == 2
    u.remount()
    assert (u / "d").stat().st_nlink == 4


ODD_NAMES = [
    b"\xff\xfe\x80bytes",
    b"new\nline",
    b" ",
    b"tab\t",
    b"quote\"'",
    b"back\\slash",
    b"colon:comma,",
    b"...",
    b".hidden",
    b"-rf",
    b"*?[",
    "ünï¢ode ☃".encode(),
    b"%s%n",
    b"a" * 255,
    b"\x01\x7f",
    b".wh",
    b"trailing ",
    b"#work",
]


@pytest.mark.needs("long_names")
def test_odd_names(make_union: Maker) -> None:
    lower = {os.fsdecode(b"d/" + name): F(name) for name in ODD_NAMES}
    u = make_union([lower])
    d = os.fsencode(u / "d")
    for name in ODD_NAMES:
        with open(d + b"/" + name, "ab") as f:
            f.write(b"+")
        with open(os.fsencode(u.merged) + b"/" + name, "xb") as f:
            f.write(name)
    for _ in range(2):
        assert sorted(os.listdir(d)) == sorted(ODD_NAMES)
        assert sorted(set(os.listdir(os.fsencode(u.merged))) - {b"d"}) == sorted(ODD_NAMES)
        for name in ODD_NAMES:
            with open(d + b"/" + name, "rb") as f:
                assert f.read() == name + b"+"
        u.remount()
    for name in ODD_NAMES:
        os.rename(d + b"/" + name, d + b"/moved")
        os.unlink(d + b"/moved")
    assert os.listdir(d) == []
    u.remount()
    assert os.listdir(d) == []


def test_deep_tree(make_union: Maker) -> None:
    """200 levels; a file at the bottom is copied up, moved to the top and back; paths beyond PATH_MAX by steps."""
    deep = "/".join(f"level{i:03}" for i in range(200))
    u = make_union([{deep + "/f": "bottom"}])
    with open(u / deep / "f", "a") as f:
        f.write("+")
    assert (u / deep / "f").read_text() == "bottom+"
    os.rename(u / deep / "f", u / "top")
    os.rename(u / "top", u / deep / "g")
    os.mkdir(u / deep / "new")
    u.remount()
    assert sorted(os.listdir(u / deep)) == ["g", "new"]
    assert (u / deep / "g").read_text() == "bottom+"


def test_beyond_path_max(make_union: Maker) -> None:
    """A tree whose paths are longer than PATH_MAX is reached by relative steps, in lower and upper."""
    part = "p" * 250
    u = make_union([{"/".join([part] * 18) + "/f": "low"}])
    fd = os.open(u.merged, os.O_RDONLY)
    for _ in range(18):
        below = os.open(part, os.O_RDONLY, dir_fd=fd)
        os.close(fd)
        fd = below
    f = os.open("f", os.O_RDWR | os.O_APPEND, dir_fd=fd)
    os.write(f, b"+")
    assert os.pread(f, 10, 0) == b"low+"
    os.close(f)
    os.mkdir("made", dir_fd=fd)
    os.rename("f", "made/g", src_dir_fd=fd, dst_dir_fd=fd)
    os.symlink("x" * 4095, "longest", dir_fd=fd)
    assert len(os.readlink("longest", dir_fd=fd)) == 4095
    assert sorted(os.listdir(fd)) == ["longest", "made"]
    g = os.open("made/g", os.O_RDONLY, dir_fd=fd)
    assert os.read(g, 10) == b"low+"
    os.close(g)
    os.close(fd)


def test_path_max_edge(union: Union) -> None:
    """A whole path of exactly 4,095 bytes works, one more is ENAMETOOLONG."""
    base = os.fsencode(union.merged)
    room = 4095 - len(base)
    parts: list[bytes] = []
    while room > 0:
        size = min(200, room - 1)
        if 0 < room - 1 - size < 2:
            size -= 2
        parts.append(b"p" * size)
        room -= size + 1
    path = base + b"/" + b"/".join(parts)
    assert len(path) == 4095
    os.makedirs(os.path.dirname(path))
    with open(path, "xb") as f:
        f.write(b"edge")
    assert os.stat(path).st_size == 4
    os.chmod(path, 0o600)
    assert errno_of(os.stat, path + b"x") == 36
    os.unlink(path)


def test_big_directory(make_union: Maker) -> None:
    """5,000 entries from three layers with overlap: each once, in any read size; rewinding; one level of removal."""
    u = make_union(
        [{f"d/f{i:04}": "" for i in range(0, 3000)}, {f"d/f{i:04}": "x" for i in range(2000, 5000)}], compare=False
    )
    expected = sorted(f"f{i:04}" for i in range(5000))
    assert sorted(os.listdir(u / "d")) == expected
    for i in range(0, 5000, 10):
        os.unlink(u / f"d/f{i:04}")
    for i in range(5, 5000, 500):
        (u / f"d/f{i:04}").write_text("changed")
    expected = sorted(f"f{i:04}" for i in range(5000) if i % 10)
    for _ in range(2):
        with os.scandir(u / "d") as entries:
            assert sorted(entry.name for entry in entries) == expected
        assert (u / "d/f0005").read_text() == "changed"
        assert (u / "d/f4999").read_text() == "x"
        u.remount()


def test_listing_while_names_come_and_go(make_union: Maker) -> None:
    """readdir under mutation: a name that nobody touches is listed exactly once."""
    stay = {f"d/stay{i:03}" for i in range(600)}
    u = make_union([dict.fromkeys(stay, "") | {f"d/go{i:03}": "" for i in range(300)}], compare=False)
    for round_number in range(3):
        seen = []
        with os.scandir(u / "d") as entries:
            for count, entry in enumerate(entries):
                seen.append(entry.name)
                if count % 3 == 0:
                    (u / f"d/come{round_number}.{count}").touch()
                    victim = u / f"d/go{(count // 3 + round_number * 100) % 300:03}"
                    if victim.exists():
                        victim.unlink()
                if count > 5000:
                    break
        steady = [name for name in seen if name.startswith("stay")]
        assert len(steady) == len(set(steady)) == 600


def test_attributes_changed_in_the_middle_of_a_listing(make_union: Maker) -> None:
    """A listing comes in pieces, made ready before they are asked for: what changed in between must show."""
    count = 150
    u = make_union([{"d": D(), **{f"d/f{i:03d}": "old" for i in range(count)}}])
    with os.scandir(u / "d") as listing:
        first = next(listing).name  # the first piece is here, the second made ready
        for i in range(count):
            path = u / f"d/f{i:03d}"
            if i % 5 == 0:
                path.write_text("longer than it was")
            elif i % 5 == 1:
                path.chmod(0o600)
            elif i % 5 == 2:
                path.unlink()
            elif i % 5 == 3:
                path.rename(u / f"d/g{i:03d}")
            else:
                os.link(path, u / f"d/h{i:03d}")
        names = {first, *(entry.name for entry in listing)}
    assert len(names) >= 48
    for i in range(count):
        path, renamed, linked = (u / f"d/{letter}{i:03d}" for letter in "fgh")
        if i % 5 == 2:
            assert errno_of(os.stat, path) == 2
            continue
        st = os.stat(renamed if i % 5 == 3 else path)
        assert st.st_size == (len("longer than it was") if i % 5 == 0 else 3)
        assert (stat.S_IMODE(st.st_mode) == 0o600) == (i % 5 == 1)
        if i % 5 == 4:
            assert (st.st_nlink, st.st_ino) == (2, os.stat(linked).st_ino)
    expected = {"f": {0, 1, 4}, "g": {3}, "h": {4}}
    assert sorted(os.listdir(u / "d")) == sorted(
        f"{letter}{i:03d}" for letter, kinds in expected.items() for i in range(count) if i % 5 in kinds
    )


def test_seekdir(make_union: Maker) -> None:
    """telldir positions stay good: lseek on the directory descriptor to 0 lists anew what is there now."""
    u = make_union([{f"d/f{i:03}": "" for i in range(400)}])
    fd = os.open(u / "d", os.O_RDONLY)
    first = os.listdir(fd)
    (u / "d/new").touch()
    os.unlink(u / "d/f000")
    os.lseek(fd, 0, os.SEEK_SET)
    assert sorted(os.listdir(fd)) == sorted({*first, "new"} - {"f000"})
    os.close(fd)


def test_removed_directory_still_open(make_union: Maker) -> None:
    u = make_union([{"d/x": "x"}])
    fd = os.open(u / "d", os.O_RDONLY)
    os.unlink(u / "d/x")
    os.rmdir(u / "d")
    assert os.fstat(fd).st_mode & stat.S_IFDIR
    assert os.listdir(fd) == []
    assert errno_of(os.open, "n", os.O_CREAT | os.O_WRONLY, dir_fd=fd) == 2
    assert errno_of(os.mkdir, "n", dir_fd=fd) == 2
    os.close(fd)


def test_parent_times_follow_changes(make_union: Maker) -> None:
    u = make_union([{"a/f": "", "b/f": "", "c/f": "", "d/f": "", "e/f": "", "g/f": "", "t/f": ""}])
    (u / "a/new").touch()
    os.unlink(u / "b/f")
    os.rename(u / "c/f", u / "d/moved")
    os.mkdir(u / "e/sub")
    os.link(u / "t/f", u / "g/link")
    for _ in range(2):
        for name in "abcdeg":
            assert (u / name).stat().st_mtime_ns > OLD_NS, name
        assert (u / "t").stat().st_mtime_ns == OLD_NS
        u.remount()


@pytest.mark.needs("many_lowers")
def test_500_lowers(make_union: Maker) -> None:
    """As many layers as engines use; lookups of the deepest and of nothing work, merged lists are complete."""
    u = make_union([{f"f{i}": str(i), "d": D(), f"d/g{i}": str(i)} for i in range(500)], compare=False)
    assert len(os.listdir(u / "d")) == 500
    assert (u / "f499").read_text() == "499"
    assert errno_of(os.stat, u / "none") == 2
    with open(u / "d/g499", "a") as f:
        f.write("+")
    os.unlink(u / "d/g250")
    assert (u / "d/g499").read_text() == "499+"
    assert len(os.listdir(u / "d")) == 499


def test_restricted_directories(make_union: Maker) -> None:
    """Modes 0 and odd do not stop the server itself from serving root."""
    u = make_union([{"d": D(0), "d/f": F("x", 0), "e": D(0o111), "e/f": "y"}])
    assert (u / "d/f").read_text() == "x"
    with open(u / "d/f", "a") as f:
        f.write("+")
    (u / "d/new").touch()
    assert sorted(os.listdir(u / "d")) == ["f", "new"]
    assert (u / "d").stat().st_mode & 0o7777 == 0
    assert (u / "d/f").stat().st_mode & 0o7777 == 0
    assert (u / "d/f").read_text() == "x+"


@pytest.mark.needs("long_names")
def test_statfs_and_root(union: Union) -> None:
    info = os.statvfs(union.merged)
    real = os.statvfs(union.up)
    assert info.f_namemax == 255
    assert (info.f_bsize, info.f_blocks, info.f_files) == (real.f_bsize, real.f_blocks, real.f_files)
    assert 0 < info.f_bfree <= info.f_blocks
    fd = os.open(union.merged, os.O_RDONLY)
    os.fsync(fd)
    os.close(fd)
    os.chmod(union.merged, 0o711)
    os.setxattr(union.merged, "user.root", b"1")
    union.remount()
    assert union.merged.stat().st_mode & 0o777 == 0o711
    assert os.getxattr(union.merged, "user.root") == b"1"
    assert errno_of(os.rmdir, union.merged) == 16
