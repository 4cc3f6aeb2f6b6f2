"""A worker dies at every point of an operation: its caller sees no error, and what is there is right."""

from __future__ import annotations

import errno
import os
import stat
import subprocess
import sys
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from killpoints import ARM, COUNT, DEATHS, LINE, SIZE, Control
from support.mounts import UNIONFS

from unionfs.sysio import AT_FDCWD, renameat2
from unionfs.wire import abi

HERE = Path(__file__).parent
BIG = 100_000  # bytes: a change of its metadata is a metacopy
USER = 12345
STEP = int(os.environ.get("UNIONFS_POINTS_STEP", "3"))  # 1: every point; in CI a third of them is enough
DIRECTORIES = 6000 // STEP  # each death takes one


class Union:
    def __init__(self, base: Path, *options: str) -> None:
        self.base = base
        self.lower, self.upper, self.merged = base / "lower", base / "upper", base / "merged"
        for path in (self.lower, self.upper, self.merged):
            path.mkdir()
        control = base / "control"
        control.write_bytes(bytes(SIZE))
        self.control = Control(control)
        for i in range(DIRECTORIES):
            _fill(self.lower / f"d{i}")
        self.used = 0
        layers = ["--lower", str(self.lower), "--upper", str(self.upper)]
        command = [sys.executable, str(HERE / "killpoints.py"), str(control), "mount", *layers]
        command += ["-o", f"guard=on,log={base}/log", *options, str(self.merged)]
        result = subprocess.run(command, capture_output=True, text=True, timeout=30)
        assert result.returncode == 0, result.stderr

    def fresh(self) -> Path:
        """A directory of the lower layer that nobody has used yet."""
        self.used += 1
        return self.merged / f"d{self.used}"

    def log(self) -> str:
        """Its last lines, without those that every death makes."""
        lines = (self.base / "log").read_text().splitlines()
        return "\n".join([line for line in lines if not line.endswith("killed by signal 9")][:40])

    def unmount(self) -> None:
        subprocess.run([UNIONFS, "umount", "--lazy", str(self.merged)], capture_output=True, timeout=30)


def _fill(d: Path) -> None:
    (d / "sub").mkdir(parents=True)
    for name, data in (("sub/leaf", b"leaf"), ("low", b"low"), ("big", b"b" * BIG), ("one", b"links")):
        fd = os.open(d / name, os.O_CREAT | os.O_WRONLY, 0o644)
        os.write(fd, data)
        os.close(fd)
    os.setxattr(d / "low", "user.old", b"old")
    os.link(d / "one", d / "two")


@pytest.fixture(scope="module")
def union(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Union]:
    made = Union(tmp_path_factory.mktemp("points"))
    try:
        yield made
    finally:
        made.unmount()


def as_user(d: Path, action: Callable[[], object]) -> None:
    """With d as the working directory: what leads to it is root's alone."""
    before = os.getcwd()
    os.chdir(d)
    os.setegid(USER)
    os.seteuid(USER)
    try:
        action()
    finally:
        os.seteuid(0)
        os.setegid(0)
        os.chdir(before)


def refused(action: Callable[[], object]) -> int:
    try:
        action()
    except OSError as error:
        assert error.errno is not None
        return error.errno
    return 0


def rename(old: Path, new: Path, flags: int) -> None:
    renameat2(AT_FDCWD, bytes(old), AT_FDCWD, bytes(new), flags)


def append(path: Path, data: bytes) -> None:
    fd = os.open(path, os.O_WRONLY | os.O_APPEND)
    try:
        assert os.write(fd, data) == len(data)
    finally:
        os.close(fd)


def create(path: Path, mode: int = 0o644) -> None:
    os.close(os.open(path, os.O_CREAT | os.O_EXCL | os.O_WRONLY, mode))


class Case:
    """One operation: what is there before, the call during which the worker dies, what has to be true after it."""

    opcode = 0

    def before(self, d: Path) -> None:
        pass

    def call(self, d: Path) -> None:
        raise NotImplementedError

    def after(self, d: Path) -> None:
        raise NotImplementedError


class Create(Case):
    opcode = abi.MKNOD

    def before(self, d: Path) -> None:
        os.chmod(d, 0o777)

    def call(self, d: Path) -> None:
        as_user(d, lambda: create(Path("new"), 0o640))

    def after(self, d: Path) -> None:
        st = (d / "new").stat()
        assert (st.st_uid, st.st_gid, st.st_mode, st.st_nlink, st.st_size) == (USER, USER, 0o100640, 1, 0)
        (d / "new").write_text("text")
        assert (d / "new").read_text() == "text"


class CreateInLowerDirectory(Create):
    def call(self, d: Path) -> None:
        create(d / "sub" / "new")

    def after(self, d: Path) -> None:
        assert sorted(os.listdir(d / "sub")) == ["leaf", "new"]
        assert (d / "sub" / "leaf").read_text() == "leaf"


class CreateOverWhiteout(Create):
    def before(self, d: Path) -> None:
        super().before(d)
        (d / "low").unlink()

    def call(self, d: Path) -> None:
        as_user(d, lambda: create(Path("low"), 0o640))

    def after(self, d: Path) -> None:
        st = (d / "low").stat()
        assert (st.st_uid, st.st_mode, st.st_nlink, st.st_size) == (USER, 0o100640, 1, 0)


class Mkfifo(Case):
    opcode = abi.MKNOD

    def call(self, d: Path) -> None:
        os.mkfifo(d / "fifo", 0o600)

    def after(self, d: Path) -> None:
        assert stat.S_ISFIFO((d / "fifo").stat().st_mode)


class Mkdir(Case):
    opcode = abi.MKDIR

    def before(self, d: Path) -> None:
        os.chmod(d, 0o777)

    def call(self, d: Path) -> None:
        as_user(d, lambda: os.mkdir("made", 0o750))

    def after(self, d: Path) -> None:
        st = (d / "made").stat()
        assert (st.st_uid, st.st_mode, st.st_nlink) == (USER, 0o040750, 2)
        assert os.listdir(d / "made") == []
        create(d / "made" / "inside")
        assert os.listdir(d / "made") == ["inside"]


class MkdirOverWhiteout(Mkdir):
    def before(self, d: Path) -> None:
        super().before(d)
        (d / "sub" / "leaf").unlink()
        (d / "sub").rmdir()

    def call(self, d: Path) -> None:
        os.mkdir(d / "sub")

    def after(self, d: Path) -> None:
        assert os.listdir(d / "sub") == []


class Symlink(Case):
    opcode = abi.SYMLINK

    def call(self, d: Path) -> None:
        os.symlink("target", d / "link")

    def after(self, d: Path) -> None:
        assert os.readlink(d / "link") == "target"


class Link(Case):
    opcode = abi.LINK

    def before(self, d: Path) -> None:
        (d / "file").write_text("text")

    def call(self, d: Path) -> None:
        os.link(d / "file", d / "linked")

    def after(self, d: Path) -> None:
        assert (d / "file").stat().st_nlink == 2
        assert (d / "file").stat().st_ino == (d / "linked").stat().st_ino
        append(d / "linked", b"!")
        assert (d / "file").read_text() == "text!"


class LinkOfLower(Case):
    opcode = abi.LINK

    def call(self, d: Path) -> None:
        os.link(d / "low", d / "linked")

    def after(self, d: Path) -> None:
        assert (d / "low").stat().st_nlink == 2
        append(d / "linked", b"!")
        assert (d / "low").read_text() == "low!"


class LinkOfTmpfile(Case):
    opcode = abi.LINK

    def before(self, d: Path) -> None:
        self.fd = os.open(d, os.O_TMPFILE | os.O_RDWR, 0o600)
        os.write(self.fd, b"nameless")

    def call(self, d: Path) -> None:
        os.link(f"/proc/self/fd/{self.fd}", d / "named", src_dir_fd=self.fd, follow_symlinks=True)

    def after(self, d: Path) -> None:
        os.write(self.fd, b"!")
        assert (d / "named").read_bytes() == b"nameless!"
        assert os.fstat(self.fd).st_nlink == 1
        os.close(self.fd)


class Tmpfile(Case):
    opcode = abi.TMPFILE

    def call(self, d: Path) -> None:
        self.fd = os.open(d, os.O_TMPFILE | os.O_RDWR, 0o600)

    def after(self, d: Path) -> None:
        assert os.fstat(self.fd).st_nlink == 0
        assert os.write(self.fd, b"x") == 1
        os.close(self.fd)


class Unlink(Case):
    opcode = abi.UNLINK

    def before(self, d: Path) -> None:
        (d / "file").write_text("text")

    def call(self, d: Path) -> None:
        os.unlink(d / "file")

    def after(self, d: Path) -> None:
        assert not (d / "file").exists()
        create(d / "file")


class UnlinkOfLower(Unlink):
    def before(self, d: Path) -> None:
        pass

    def call(self, d: Path) -> None:
        os.unlink(d / "low")

    def after(self, d: Path) -> None:
        assert not (d / "low").exists()
        assert "low" not in os.listdir(d)


class UnlinkOfOpen(Unlink):
    def before(self, d: Path) -> None:
        (d / "file").write_text("text")
        self.fd = os.open(d / "file", os.O_RDWR)

    def after(self, d: Path) -> None:
        assert not (d / "file").exists()
        assert os.fstat(self.fd).st_nlink == 0
        assert os.pwrite(self.fd, b"T", 0) == 1
        assert os.pread(self.fd, 9, 0) == b"Text"
        os.close(self.fd)


class UnlinkOfOpenLower(UnlinkOfLower):
    def before(self, d: Path) -> None:
        self.fd = os.open(d / "low", os.O_RDONLY)

    def after(self, d: Path) -> None:
        super().after(d)
        assert os.fstat(self.fd).st_nlink == 0
        assert os.pread(self.fd, 9, 0) == b"low"
        os.close(self.fd)


class UnlinkOfOneLink(Case):
    opcode = abi.UNLINK

    def before(self, d: Path) -> None:
        (d / "file").write_text("text")
        os.link(d / "file", d / "other")

    def call(self, d: Path) -> None:
        os.unlink(d / "file")

    def after(self, d: Path) -> None:
        assert not (d / "file").exists()
        assert (d / "other").stat().st_nlink == 1
        append(d / "other", b"!")
        assert (d / "other").read_text() == "text!"


class UnlinkOfLowerLink(Case):
    opcode = abi.UNLINK

    def call(self, d: Path) -> None:
        os.unlink(d / "one")

    def after(self, d: Path) -> None:
        assert not (d / "one").exists()
        assert (d / "two").stat().st_nlink == 1
        append(d / "two", b"!")
        assert (d / "two").read_text() == "links!"


class UnlinkOfLastLowerLink(Case):
    opcode = abi.UNLINK

    def before(self, d: Path) -> None:
        os.unlink(d / "one")
        self.fd = os.open(d / "two", os.O_RDWR)

    def call(self, d: Path) -> None:
        os.unlink(d / "two")

    def after(self, d: Path) -> None:
        assert not (d / "two").exists()
        assert os.fstat(self.fd).st_nlink == 0
        assert os.pread(self.fd, 9, 0) == b"links"
        os.close(self.fd)


class Rmdir(Case):
    opcode = abi.RMDIR

    def before(self, d: Path) -> None:
        (d / "made").mkdir()
        self.fd = os.open(d / "made", os.O_RDONLY)

    def call(self, d: Path) -> None:
        os.rmdir(d / "made")

    def after(self, d: Path) -> None:
        assert not (d / "made").exists()
        assert os.fstat(self.fd).st_nlink == 0
        assert os.listdir(self.fd) == []
        os.close(self.fd)
        assert d.stat().st_nlink == 3


class RmdirOfMerged(Case):
    opcode = abi.RMDIR

    def before(self, d: Path) -> None:
        os.unlink(d / "sub" / "leaf")

    def call(self, d: Path) -> None:
        os.rmdir(d / "sub")

    def after(self, d: Path) -> None:
        assert not (d / "sub").exists()
        os.mkdir(d / "sub")
        assert os.listdir(d / "sub") == []


class Rename(Case):
    opcode = abi.RENAME2

    def before(self, d: Path) -> None:
        (d / "file").write_text("text")
        self.ino = (d / "file").stat().st_ino

    def call(self, d: Path) -> None:
        rename(d / "file", d / "sub" / "new", 1)

    def after(self, d: Path) -> None:
        assert not (d / "file").exists()
        assert (d / "sub" / "new").read_text() == "text"
        assert (d / "sub" / "new").stat().st_ino == self.ino
        create(d / "file")


class RenameOver(Case):
    opcode = abi.RENAME

    def before(self, d: Path) -> None:
        (d / "file").write_text("text")
        (d / "old").write_text("old")
        self.fd = os.open(d / "old", os.O_RDONLY)

    def call(self, d: Path) -> None:
        os.rename(d / "file", d / "old")

    def after(self, d: Path) -> None:
        assert not (d / "file").exists()
        assert (d / "old").read_text() == "text"
        assert os.pread(self.fd, 9, 0) == b"old"
        assert os.fstat(self.fd).st_nlink == 0
        os.close(self.fd)


class RenameOfLower(Case):
    opcode = abi.RENAME

    def call(self, d: Path) -> None:
        os.rename(d / "big", d / "low")

    def after(self, d: Path) -> None:
        assert not (d / "big").exists()
        assert (d / "low").read_bytes() == b"b" * BIG
        create(d / "big")


class RenameOfOneLowerLink(Case):
    opcode = abi.RENAME

    def call(self, d: Path) -> None:
        os.rename(d / "one", d / "new")

    def after(self, d: Path) -> None:
        assert not (d / "one").exists()
        assert (d / "two").stat().st_ino == (d / "new").stat().st_ino
        assert (d / "two").stat().st_nlink == 2
        append(d / "new", b"!")
        assert (d / "two").read_text() == "links!"


class RenameOfDirectory(Case):
    opcode = abi.RENAME

    def before(self, d: Path) -> None:
        self.fd = os.open(d / "sub", os.O_RDONLY)
        (d / "sub" / "leaf").stat()

    def call(self, d: Path) -> None:
        os.rename(d / "sub", d / "moved")

    def after(self, d: Path) -> None:
        assert not (d / "sub").exists()
        assert (d / "moved" / "leaf").read_text() == "leaf"
        assert os.listdir(self.fd) == ["leaf"]
        os.close(self.fd)
        os.mkdir(d / "sub")
        assert os.listdir(d / "sub") == []


class RenameOverDirectory(RenameOfDirectory):
    def before(self, d: Path) -> None:
        super().before(d)
        (d / "moved").mkdir()


class Exchange(Case):
    opcode = abi.RENAME2

    def before(self, d: Path) -> None:
        (d / "a").write_text("a")
        self.inos = {name: (d / name).stat().st_ino for name in ("a", "low")}

    def call(self, d: Path) -> None:
        rename(d / "a", d / "low", 2)

    def after(self, d: Path) -> None:
        assert (d / "a").read_text() == "low"
        assert (d / "low").read_text() == "a"
        assert {"low": (d / "a").stat().st_ino, "a": (d / "low").stat().st_ino} == self.inos
        append(d / "a", b"!")
        assert (d / "a").read_text() == "low!"


class ExchangeOfLinks(Case):
    opcode = abi.RENAME2

    def before(self, d: Path) -> None:
        (d / "a").write_text("a")
        os.link(d / "a", d / "b")
        (d / "c").write_text("c")

    def call(self, d: Path) -> None:
        rename(d / "b", d / "c", 2)

    def after(self, d: Path) -> None:
        assert (d / "b").read_text() == "c"
        assert (d / "c").read_text() == "a"
        append(d / "c", b"!")
        assert (d / "a").read_text() == "a!"
        assert (d / "a").stat().st_nlink == 2


class ExchangeOfDirectories(Case):
    opcode = abi.RENAME2

    def before(self, d: Path) -> None:
        (d / "other").mkdir()
        (d / "sub" / "leaf").stat()

    def call(self, d: Path) -> None:
        rename(d / "sub", d / "other", 2)

    def after(self, d: Path) -> None:
        assert os.listdir(d / "sub") == []
        assert (d / "other" / "leaf").read_text() == "leaf"


class Chmod(Case):
    opcode = abi.SETATTR

    def call(self, d: Path) -> None:
        os.chmod(d / "big", 0o600)

    def after(self, d: Path) -> None:
        assert (d / "big").stat().st_mode == 0o100600
        assert (d / "big").read_bytes() == b"b" * BIG


class ChmodOfDirectory(Case):
    opcode = abi.SETATTR

    def call(self, d: Path) -> None:
        os.chmod(d / "sub", 0o700)

    def after(self, d: Path) -> None:
        assert (d / "sub").stat().st_mode == 0o040700
        assert os.listdir(d / "sub") == ["leaf"]
        assert (d / "sub" / "leaf").read_text() == "leaf"


class ChmodOfLink(Case):
    opcode = abi.SETATTR

    def before(self, d: Path) -> None:
        (d / "two").stat()

    def call(self, d: Path) -> None:
        os.chmod(d / "one", 0o600)

    def after(self, d: Path) -> None:
        assert (d / "one").stat().st_mode == 0o100600
        assert (d / "one").stat().st_nlink == 2
        assert (d / "two").stat().st_mode == 0o100600
        assert (d / "two").stat().st_ino == (d / "one").stat().st_ino


class Truncate(Case):
    opcode = abi.SETATTR

    def call(self, d: Path) -> None:
        os.truncate(d / "big", 10)

    def after(self, d: Path) -> None:
        assert (d / "big").read_bytes() == b"b" * 10


class Append(Case):
    opcode = abi.WRITE

    def before(self, d: Path) -> None:
        (d / "file").write_text("text")

    def call(self, d: Path) -> None:
        append(d / "file", b"more")

    def after(self, d: Path) -> None:
        assert (d / "file").read_text() == "textmore"


class AppendToLower(Case):
    opcode = abi.WRITE

    def call(self, d: Path) -> None:
        append(d / "low", b"more")

    def after(self, d: Path) -> None:
        assert (d / "low").read_text() == "lowmore"
        assert os.getxattr(d / "low", "user.old") == b"old"


class WriteToLink(Case):
    opcode = abi.WRITE

    def before(self, d: Path) -> None:
        (d / "two").stat()

    def call(self, d: Path) -> None:
        append(d / "one", b"!")

    def after(self, d: Path) -> None:
        assert (d / "one").read_text() == (d / "two").read_text() == "links!"
        assert (d / "one").stat().st_nlink == 2
        os.unlink(d / "one")
        assert (d / "two").stat().st_nlink == 1
        assert (d / "two").read_text() == "links!"


class SetXattr(Case):
    opcode = abi.SETXATTR

    def call(self, d: Path) -> None:
        os.setxattr(d / "low", "user.new", b"value", os.XATTR_CREATE)

    def after(self, d: Path) -> None:
        assert os.getxattr(d / "low", "user.new") == b"value"


class SetXattrThatExists(Case):
    opcode = abi.SETXATTR

    def call(self, d: Path) -> None:
        assert refused(lambda: os.setxattr(d / "low", "user.old", b"value", os.XATTR_CREATE)) == errno.EEXIST

    def after(self, d: Path) -> None:
        assert os.getxattr(d / "low", "user.old") == b"old"


class ReplaceXattr(Case):
    opcode = abi.SETXATTR

    def call(self, d: Path) -> None:
        os.setxattr(d / "low", "user.old", b"value", os.XATTR_REPLACE)
        assert refused(lambda: os.setxattr(d / "low", "user.none", b"value", os.XATTR_REPLACE)) == errno.ENODATA

    def after(self, d: Path) -> None:
        assert os.getxattr(d / "low", "user.old") == b"value"


class RemoveXattr(Case):
    opcode = abi.REMOVEXATTR

    def call(self, d: Path) -> None:
        os.removexattr(d / "low", "user.old")

    def after(self, d: Path) -> None:
        assert os.listxattr(d / "low") == []


class RemoveXattrThatIsNotThere(Case):
    opcode = abi.REMOVEXATTR

    def call(self, d: Path) -> None:
        assert refused(lambda: os.removexattr(d / "low", "user.none")) == errno.ENODATA

    def after(self, d: Path) -> None:
        assert os.listxattr(d / "low") == ["user.old"]


CASES = [case for base in Case.__subclasses__() for case in (base, *base.__subclasses__())]


@pytest.mark.parametrize("make", CASES, ids=lambda case: case.__name__)
def test_death_at_every_point(union: Union, make: type[Case]) -> None:
    words = union.control.words
    point = 1 + zlib.crc32(make.__name__.encode()) % STEP
    while True:
        case = make()
        home = union.fresh()
        case.before(home)
        deaths = words[DEATHS]
        union.control.arm(point, make.opcode)
        try:
            case.call(home)
            died = words[DEATHS] > deaths
            words[ARM] = 0
            case.after(home)
        except (OSError, AssertionError) as error:
            error.add_note(f"killed at point {point}, line {words[LINE]}; the log ends: {union.log()}")
            raise
        if not died:
            assert words[COUNT] > 2, "the request never came"
            break
        point += STEP


@pytest.mark.parametrize(
    "make", [Create, MkdirOverWhiteout, LinkOfLower, UnlinkOfLowerLink, RenameOver, Exchange, RemoveXattr, WriteToLink]
)
@pytest.mark.parametrize("point", [6, 16])
def test_death_in_the_recovery(union: Union, make: type[Case], point: int) -> None:
    """The successor dies too while it takes over; the one after it settles all."""
    words = union.control.words
    # Inodes with several names are looked at in each recovery, so that the rounds before make it longer.
    for again in range(1 + zlib.crc32(make.__name__.encode()) % STEP, 40, STEP):
        case = make()
        home = union.fresh()
        case.before(home)
        deaths = words[DEATHS]
        union.control.arm(point, make.opcode, again)
        try:
            case.call(home)
            died = words[DEATHS] - deaths
            words[ARM] = 0
            case.after(home)
        except (OSError, AssertionError) as error:
            error.add_note(f"killed at {point}, then at {again}, line {words[LINE]}; the log begins: {union.log()}")
            raise
        if died < 2:
            break
