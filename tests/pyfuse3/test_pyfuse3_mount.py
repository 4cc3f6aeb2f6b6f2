"""The pyfuse3 session on a real mount, over a tree in memory: what programs see, and the life of the mount."""

from __future__ import annotations

import ctypes
import errno
import fcntl
import mmap
import os
import pwd
import signal
import stat
import struct
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pyfuse3
import pytest
from memory_operations import MemoryOperations
from support.procs import USER, child, in_user_namespace

from unionfs.api import ROOT_ID, MountConfig
from unionfs.errors import EXIT_MOUNTPOINT, EXIT_USAGE, MountError
from unionfs.session import mount
from unionfs.session.pyfuse3_session import Pyfuse3Session

pytestmark = pytest.mark.skipif(
    os.geteuid() != 0 or not os.access("/dev/fuse", os.R_OK | os.W_OK), reason="needs root and /dev/fuse"
)

NOBODY = 2**32 - 1  # in the entries of an ACL that name nobody
MNT_DETACH = 2
PATIENCE = 30.0  # seconds, for what happens at once on an idle machine


class Mounted:
    """A session that serves in a thread of this process."""

    def __init__(self, mountpoint: Path, ops: MemoryOperations, *words: str, **arguments: Any) -> None:
        self.path = mountpoint
        config = MountConfig(os.fsencode(mountpoint))
        config.options = dict.fromkeys(words, "")
        self.session = Pyfuse3Session(ops, config, **arguments)  # type: ignore[arg-type]
        self.failure: BaseException | None = None
        self.thread = threading.Thread(target=self._serve, daemon=True)
        self._ready = threading.Event()
        self.thread.start()
        assert self._ready.wait(PATIENCE)
        if self.failure is not None:
            raise self.failure

    def _serve(self) -> None:
        try:
            self.session.serve(self._ready.set)
        except BaseException as error:
            self.failure = error
            self._ready.set()

    def __truediv__(self, name: str) -> Path:
        return self.path / name

    def ended(self) -> None:
        self.thread.join(PATIENCE)
        assert not self.thread.is_alive()
        if self.failure is not None:
            raise self.failure


@pytest.fixture
def mountpoint(workspace: Path) -> Iterator[Path]:
    path = Path(tempfile.mkdtemp(dir=workspace))
    path.chmod(0o755)
    yield path
    subprocess.run(["umount", "-l", path], stderr=subprocess.DEVNULL, check=False, timeout=60)
    path.rmdir()


@pytest.fixture
def ops() -> MemoryOperations:
    return MemoryOperations()


@pytest.fixture
def mounted(mountpoint: Path, ops: MemoryOperations) -> Iterator[Mounted]:
    mounted = Mounted(mountpoint, ops)
    yield mounted
    mounted.session.stop()
    mounted.ended()
    assert ops.stopped == 1


def until(condition: Callable[[], object]) -> None:
    deadline = time.monotonic() + PATIENCE
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.01)


def raises(code: int, call: Callable[[], object]) -> None:
    with pytest.raises(OSError) as raised:
        call()
    assert raised.value.errno == code


# What programs see


def test_programs_see_the_unions_st_ino(mounted: Mounted, ops: MemoryOperations) -> None:
    inos = {name: ops.add_file(name.encode()).ino for name in ("a", "b", "c")}
    (mounted / "new").write_text("new")
    inos["new"] = ops.root.children[b"new"].ino
    assert {entry.name: entry.inode() for entry in os.scandir(mounted.path)} == inos
    assert {name: (mounted / name).stat().st_ino for name in inos} == inos
    assert mounted.path.stat().st_ino == ops.root.ino
    os.link(mounted / "a", mounted / "link")
    assert (mounted / "link").stat().st_ino == inos["a"]
    assert (mounted / "a").stat().st_nlink == 2


def test_files_that_share_a_st_ino_stay_apart(mounted: Mounted, ops: MemoryOperations) -> None:
    ops.next_ino = lambda nodeid: 4711
    for name in ("first", "second", "third"):
        (mounted / name).write_text(name)
    for name in ("first", "second", "third"):
        assert (mounted / name).read_text() == name
        assert (mounted / name).stat().st_ino == 4711
    with open(mounted / "first") as old:
        (mounted / "first").unlink()
        (mounted / "first").write_text("another")
        assert old.read() == "first"
        assert os.fstat(old.fileno()).st_ino == 4711
        assert (mounted / "first").read_text() == "another"


def test_file_contents(mounted: Mounted) -> None:
    content = os.urandom(3 << 20)
    path = mounted / "file"
    path.write_bytes(content)
    assert path.read_bytes() == content
    with open(path, "ab") as stream:
        stream.write(b"end")
    os.truncate(path, len(content) + 1)
    assert path.read_bytes() == content + b"e"
    with open(path, "r+b", buffering=0) as stream:
        assert os.pwrite(stream.fileno(), b"12345", 1 << 20) == 5
        assert os.pread(stream.fileno(), 5, 1 << 20) == b"12345"
        os.fsync(stream.fileno())
    child(write_mapped, path)
    assert path.read_bytes()[:4] == b"mmap"


def write_mapped(path: Path) -> None:
    """Not in the process that serves: a page fault keeps the interpreter lock."""
    with open(path, "r+b") as stream, mmap.mmap(stream.fileno(), 0) as mapped:
        mapped[:4] = b"mmap"
        mapped.flush()


def test_a_big_directory_is_listed_once_each_and_given_back(mounted: Mounted, ops: MemoryOperations) -> None:
    directory = mounted / "big"
    directory.mkdir()
    names = {f"{number:04d}" + "x" * (number % 200) for number in range(1500)}
    for name in names:
        (directory / name).touch()
    listed = os.listdir(directory)
    assert len(listed) == len(names)
    assert set(listed) == names
    for name in names:
        (directory / name).unlink()
    directory.rmdir()
    until(lambda: set(ops.nodes) == {ROOT_ID})
    until(lambda: mounted.session.statistics()["nodes"] == 1)


def test_special_files_and_symlinks(mounted: Mounted) -> None:
    os.mknod(mounted / "device", stat.S_IFCHR | 0o600, os.makedev(1, 300))
    os.mkfifo(mounted / "fifo")
    os.symlink(b"target-\xff", os.fsencode(mounted / "link"))
    assert (mounted / "device").stat().st_rdev == os.makedev(1, 300)
    assert stat.S_ISFIFO((mounted / "fifo").stat().st_mode)
    assert os.readlink(os.fsencode(mounted / "link")) == b"target-\xff"


def test_every_rename_flag_arrives(mounted: Mounted, ops: MemoryOperations) -> None:
    libc = ctypes.CDLL(None, use_errno=True)

    def rename(old: str, new: str, flags: int) -> None:
        if libc.renameat2(-100, os.fsencode(mounted / old), -100, os.fsencode(mounted / new), flags) != 0:
            raise OSError(ctypes.get_errno(), "renameat2")

    (mounted / "a").write_text("a")
    (mounted / "b").write_text("b")
    raises(errno.EEXIST, lambda: rename("a", "b", 1))
    rename("a", "b", 2)
    assert ((mounted / "a").read_text(), (mounted / "b").read_text()) == ("b", "a")
    rename("a", "c", 1)
    rename("c", "d", 4)
    rename("d", "b", 0)
    assert (mounted / "b").read_text() == "b"
    assert [call[4] for call in ops.named("rename")] == [2, 1, 4, 0]  # the kernel itself refuses what exists


def test_xattrs(mounted: Mounted, ops: MemoryOperations) -> None:
    path = mounted / "file"
    path.touch()
    os.setxattr(path, "user.x", b"1", os.XATTR_CREATE)
    raises(errno.EEXIST, lambda: os.setxattr(path, "user.x", b"2", os.XATTR_CREATE))
    raises(errno.ENODATA, lambda: os.setxattr(path, "user.y", b"2", os.XATTR_REPLACE))
    os.setxattr(path, "user.x", b"3", os.XATTR_REPLACE)
    assert os.getxattr(path, "user.x") == b"3"
    assert os.listxattr(path) == ["user.x"]
    os.removexattr(path, "user.x")
    assert os.listxattr(path) == []


# user::rw-, user:USER:r--, group::r--, mask::r--, other::---
ACL = struct.pack("<I" + "HHI" * 5, 2, 1, 6, NOBODY, 2, 4, USER, 4, 4, NOBODY, 16, 4, NOBODY, 32, 0, NOBODY)


def test_acls_are_enforced_by_the_kernel(mounted: Mounted) -> None:
    path = mounted / "file"
    path.write_text("secret")
    path.chmod(0o640)
    os.setxattr(path, "system.posix_acl_access", ACL)
    assert child(path.read_text, uid=USER) == "secret"
    raises(errno.EACCES, lambda: child(path.read_text, uid=USER + 1))


def test_noacl(mountpoint: Path, ops: MemoryOperations) -> None:
    mounted = Mounted(mountpoint, ops, "noacl")
    path = mounted / "file"
    path.write_text("secret")
    path.chmod(0o640)
    os.setxattr(path, "system.posix_acl_access", ACL)
    raises(errno.EACCES, lambda: child(path.read_text, uid=USER))
    mounted.session.stop()
    mounted.ended()


def test_the_umask_is_left_to_the_core(mounted: Mounted, ops: MemoryOperations) -> None:
    def make() -> None:
        (mounted / "d").mkdir()
        os.mkfifo(mounted / "f")
        os.close(os.open(mounted / "c", os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o666))

    child(make, umask=0o027)
    assert ops.named("mkdir")[0][2:4] == (0o777, 0o027)
    assert ops.named("mknod")[0][2:5] == (stat.S_IFIFO | 0o666, 0, 0o027)
    assert ops.named("create")[0][3:5] == (stat.S_IFREG | 0o666, 0o027)


def umask_seen_by_the_core(mountpoint: Path) -> int:
    """In a process of its own, with a mount of its own: the mode of a directory made 0777 under umask 027."""
    ops = MemoryOperations()
    mounted = Mounted(mountpoint, ops)
    ops.root.uid = os.getuid()
    mounted.session.invalidate_inode(ROOT_ID)
    os.umask(0o027)
    (mounted / "d").mkdir()
    mounted.session.stop()
    mounted.ended()
    (arguments,) = ops.named("mkdir")
    return int(arguments[2])


def test_the_umask_is_left_to_the_core_in_a_user_namespace(mountpoint: Path) -> None:
    os.chown(mountpoint, USER, USER)
    assert in_user_namespace(umask_seen_by_the_core, mountpoint) == 0o777


def test_the_umask_of_a_mount_through_fusermount3_is_the_kernels(mountpoint: Path) -> None:
    nobody = pwd.getpwnam("nobody").pw_uid  # fusermount3 wants users to have names
    os.chown(mountpoint, nobody, nobody)
    assert child(umask_seen_by_the_core, mountpoint, uid=nobody) == 0o750


CHANGES: dict[str, Callable[[Path], object]] = {
    "write": lambda path: write(path, os.O_WRONLY),
    "append": lambda path: write(path, os.O_WRONLY | os.O_APPEND),
    "truncate and write": lambda path: write(path, os.O_WRONLY | os.O_TRUNC),
    "truncating open": lambda path: os.close(os.open(path, os.O_WRONLY | os.O_TRUNC)),
    "truncate": lambda path: os.truncate(path, 1),
}


def write(path: Path, flags: int) -> None:
    fd = os.open(path, flags)
    os.write(fd, b"changed")
    os.close(fd)


@pytest.mark.parametrize("change", CHANGES)
def test_a_change_by_others_clears_setuid(change: str, mounted: Mounted) -> None:
    path = mounted / "program"
    path.write_text("program")
    path.chmod(0o4777)
    child(CHANGES[change], path, uid=USER)
    assert stat.S_IMODE(path.stat().st_mode) == 0o777
    assert path.read_text() != "program"


def test_chown_clears_setuid(mounted: Mounted, ops: MemoryOperations) -> None:
    path = mounted / "program"
    path.touch()
    path.chmod(0o6755)
    os.chown(path, 12, 34)
    assert stat.S_IMODE(path.stat().st_mode) == 0o755
    node = ops.root.children[b"program"]
    assert (node.uid, node.gid) == (12, 34)


def test_times(mounted: Mounted) -> None:
    path = mounted / "file"
    path.touch()
    os.utime(path, ns=(-1_000_000_007, 4 * 10**18 + 9))
    assert (path.stat().st_atime_ns, path.stat().st_mtime_ns) == (-1_000_000_007, 4 * 10**18 + 9)
    before = time.time_ns() - 10**9
    os.utime(path)
    assert path.stat().st_mtime_ns > before


def test_statfs(mounted: Mounted) -> None:
    found = os.statvfs(mounted.path)
    assert (found.f_blocks, found.f_bfree, found.f_bavail, found.f_files, found.f_ffree) == (1000, 600, 500, 400, 300)
    assert (found.f_frsize, found.f_namemax) == (1024, 255)


def test_a_warm_path_costs_no_message(mounted: Mounted, ops: MemoryOperations) -> None:
    path = mounted / "file"
    path.write_text("content")
    path.read_text()
    path.stat()
    assert not (mounted / "absent").exists()
    count = len(ops.calls)
    for _ in range(20):
        path.stat()
        assert not (mounted / "absent").exists()
    assert len(ops.calls) == count
    assert path.read_text() == "content"
    assert not [call for call in ops.calls[count:] if call[0] == "read"]


def test_without_timeouts_every_stat_asks(mountpoint: Path, ops: MemoryOperations) -> None:
    mounted = Mounted(mountpoint, ops, timeout=0)
    assert not (mounted / "file").exists()
    node = ops.add_file(b"file")
    assert (mounted / "file").stat().st_size == 0
    node.data += b"grown"
    assert (mounted / "file").stat().st_size == 5
    mounted.session.stop()
    mounted.ended()


def test_writeback(mountpoint: Path, ops: MemoryOperations) -> None:
    mounted = Mounted(mountpoint, ops, writeback=True)
    with open(mounted / "file", "wb", buffering=0) as stream:
        for number in range(1000):
            stream.write(b"%07d\n" % number)
        assert not ops.named("write")
        os.fsync(stream.fileno())
    assert ops.root.children[b"file"].data == b"".join(b"%07d\n" % number for number in range(1000))
    assert len(ops.named("write")) < 10
    mounted.session.stop()
    mounted.ended()


# What the library can't carry: what the caller gets instead (docs/sessions.md)


def test_what_pyfuse3_can_not_carry(mounted: Mounted) -> None:
    libc = ctypes.CDLL(None, use_errno=True)
    path = mounted / "file"
    path.write_bytes(b"data" + bytes(1 << 16))
    with open(path, "r+b", buffering=0) as stream:
        fd = stream.fileno()
        assert libc.fallocate(fd, 0, ctypes.c_long(0), ctypes.c_long(1 << 20)) == -1
        assert ctypes.get_errno() == errno.EOPNOTSUPP
        assert os.lseek(fd, 0, os.SEEK_HOLE) == 4 + (1 << 16)
        assert os.lseek(fd, 10, os.SEEK_DATA) == 10
        raises(errno.ENOTTY, lambda: fcntl.ioctl(fd, 0x80086601, bytes(8)))
        with open(mounted / "copy", "wb", buffering=0) as copy:
            assert os.copy_file_range(fd, copy.fileno(), 4, 0, 0) == 4
        assert (mounted / "copy").read_bytes() == b"data"
        assert libc.syncfs(fd) == 0
    raises(errno.EOPNOTSUPP, lambda: os.open(mounted.path, os.O_TMPFILE | os.O_RDWR, 0o600))


# Errors and lanes


def test_errors_and_bugs_reach_the_caller_and_the_mount_lives(
    mounted: Mounted, ops: MemoryOperations, capfd: pytest.CaptureFixture[str]
) -> None:
    ops.faults = {"mkdir": OSError(errno.EDQUOT, "over quota"), "mknod": ZeroDivisionError("a bug")}
    raises(errno.EDQUOT, lambda: (mounted / "d").mkdir())
    raises(errno.EIO, lambda: os.mkfifo(mounted / "f"))
    assert "ZeroDivisionError: a bug" in capfd.readouterr().err
    ops.faults = {}
    (mounted / "d").mkdir()
    assert os.listdir(mounted.path) == ["d"]


def test_a_request_that_waits_holds_up_no_other(mounted: Mounted, ops: MemoryOperations) -> None:
    ops.waiting.add("write")
    written = threading.Thread(target=lambda: (mounted / "slow").write_text("slow"))
    written.start()
    assert ops.in_wait.wait(PATIENCE)
    (mounted / "d").mkdir()
    assert sorted(os.listdir(mounted.path)) == ["d", "slow"]
    ops.gate.set()
    written.join(PATIENCE)
    assert (mounted / "slow").read_text() == "slow"
    assert ops.calls[[call[0] for call in ops.calls].index("write")][1] is False


def test_statistics(mounted: Mounted, ops: MemoryOperations) -> None:
    before = mounted.session.statistics()
    (mounted / "a").mkdir()
    (mounted / "b").mkdir()
    after = mounted.session.statistics()
    assert after["session"] == "pyfuse3"
    assert after["messages"]["MKDIR"] - before["messages"].get("MKDIR", 0) == 2
    assert after["nodes"] - before["nodes"] == 2


# Notices to the kernel


def test_invalidated_names_and_contents_are_asked_for_again(mounted: Mounted, ops: MemoryOperations) -> None:
    assert ops.notifier is mounted.session
    assert not (mounted / "name").exists()
    node = ops.add_file(b"name", b"before")
    assert not (mounted / "name").exists()  # the kernel believes what it knows
    mounted.session.invalidate_entry(ROOT_ID, b"name")
    assert (mounted / "name").read_text() == "before"
    node.data[:] = b"behind"
    assert (mounted / "name").read_text() == "before"
    mounted.session.invalidate_inode(node.nodeid)
    assert (mounted / "name").read_text() == "behind"
    node.mode = stat.S_IFREG | 0o600
    mounted.session.invalidate_inode(node.nodeid, -1)
    assert stat.S_IMODE((mounted / "name").stat().st_mode) == 0o600


def test_invalidating_what_is_not_cached_is_silent(
    mounted: Mounted, ops: MemoryOperations, capfd: pytest.CaptureFixture[str]
) -> None:
    node = ops.add_file(b"name")
    mounted.session.invalidate_entry(ROOT_ID, b"nothing")
    mounted.session.invalidate_entry(node.nodeid, b"nothing")
    mounted.session.invalidate_inode(node.nodeid)
    assert capfd.readouterr().err == ""


@pytest.mark.parametrize("slow", [False, True], ids=["trio thread", "worker"])
def test_the_core_may_invalidate_while_it_answers(slow: bool, mounted: Mounted, ops: MemoryOperations) -> None:
    """With a request on the same directory waiting for its turn, and holding the directory's lock in the kernel."""
    (mounted / "known").touch()
    assert not (mounted / "other").exists()
    maker = threading.Thread(target=(mounted / "new").touch)
    statfs = ops.statfs

    def invalidating() -> tuple[int, int, int, int, int, int, int, int]:
        result = statfs()
        maker.start()
        time.sleep(0.3)  # for the maker to get into the kernel; if that takes longer, this test proves less
        ops.root.children[b"other"] = ops.root.children[b"known"]
        mounted.session.invalidate_entry(ROOT_ID, b"other")
        mounted.session.invalidate_inode(ops.root.children[b"known"].nodeid)
        return result

    ops.statfs = invalidating  # type: ignore[method-assign]
    if slow:
        ops.slow.add("statfs")
    os.statvfs(mounted.path)
    maker.join(PATIENCE)
    assert not maker.is_alive()
    until((mounted / "other").exists)


# Life and death


def test_umount_ends_the_session(mounted: Mounted, ops: MemoryOperations) -> None:
    mount.detach(os.fsencode(mounted.path))
    mounted.ended()
    assert ops.stopped == 1
    assert not os.path.ismount(mounted.path)
    mounted.session.invalidate_entry(ROOT_ID, b"name")  # nobody to tell


def test_a_mount_that_goes_while_a_request_is_read_has_ended(
    mountpoint: Path, ops: MemoryOperations, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The race itself can't be arranged: the kernel's answer to it stands in for it."""

    async def main() -> None:
        raise ExceptionGroup("a task of the library's", [ConnectionAbortedError(errno.ECONNABORTED, "aborted")])

    monkeypatch.setattr(pyfuse3, "main", main)
    Pyfuse3Session(ops, MountConfig(os.fsencode(mountpoint))).serve(lambda: None)  # type: ignore[arg-type]
    assert ops.stopped == 1


def test_open_files_are_served_after_a_lazy_umount(mounted: Mounted, ops: MemoryOperations) -> None:
    with open(mounted / "file", "w+") as stream:
        # Not umount(8): starting a program holds the GIL while the child closes the descriptor, which asks the server,
        # which is a thread of this process.
        assert ctypes.CDLL(None).umount2(os.fsencode(mounted.path), MNT_DETACH) == 0
        assert not os.path.ismount(mounted.path)
        stream.write("still served")
        stream.flush()
        assert ops.root.children[b"file"].data == b"still served"
        assert ops.stopped == 0
    mounted.ended()
    assert ops.stopped == 1


def test_stop_waits_for_nobody_and_leaves_nothing_mounted(mounted: Mounted, ops: MemoryOperations) -> None:
    fd = os.open(mounted / "file", os.O_CREAT | os.O_WRONLY)
    mounted.session.stop()
    mounted.ended()
    assert not os.path.ismount(mounted.path)
    raises(errno.ENOTCONN, lambda: os.fsync(fd))
    raises(errno.ENOTCONN, lambda: os.close(fd))


def test_ranges_of_an_inode_are_invalidated(mounted: Mounted, ops: MemoryOperations) -> None:
    page = mmap.PAGESIZE
    (mounted / "file").write_bytes(b"a" * 4 * page)
    node = ops.root.children[b"file"]
    assert (mounted / "file").read_bytes() == b"a" * 4 * page
    node.data[:] = b"b" * 4 * page
    mounted.session.invalidate_inode(node.nodeid, page, page)
    assert (mounted / "file").read_bytes() == b"a" * page + b"b" * page + b"a" * 2 * page


@pytest.mark.parametrize("data", ["noopen", "passthrough"])
def test_data_modes_that_the_library_has_not(data: str, mountpoint: Path, ops: MemoryOperations) -> None:
    config = MountConfig(os.fsencode(mountpoint))
    config.data = data
    with pytest.raises(MountError, match=f"data={data}") as raised:
        Pyfuse3Session(ops, config)  # type: ignore[arg-type]
    assert raised.value.code == EXIT_USAGE


def test_a_mountpoint_that_is_none(workspace: Path, ops: MemoryOperations) -> None:
    session = Pyfuse3Session(ops, MountConfig(os.fsencode(workspace / "nowhere")))  # type: ignore[arg-type]
    with pytest.raises(MountError) as raised:
        session.serve(lambda: None)
    assert raised.value.code == EXIT_MOUNTPOINT
    assert ops.stopped == 1


def test_a_failing_on_ready_leaves_nothing_mounted(mountpoint: Path, ops: MemoryOperations) -> None:
    session = Pyfuse3Session(ops, MountConfig(os.fsencode(mountpoint)))  # type: ignore[arg-type]
    with pytest.raises(ExceptionGroup):
        session.serve(lambda: 1 // 0)  # type: ignore[arg-type]
    assert not os.path.ismount(mountpoint)
    assert ops.stopped == 1


SERVER = """
import os, signal, sys
sys.path.insert(0, sys.argv[2])
from memory_operations import MemoryOperations
from unionfs.api import MountConfig
from unionfs.session import mount
from unionfs.session.pyfuse3_session import Pyfuse3Session
ops = MemoryOperations()
session = Pyfuse3Session(ops, MountConfig(os.fsencode(sys.argv[1])))
signal.signal(signal.SIGTERM, lambda number, frame: session.stop())
session.serve(lambda: print("ready", flush=True))
print("stopped", ops.stopped, flush=True)
"""


def test_signal_handlers_of_the_serving_thread_run(mountpoint: Path) -> None:
    with subprocess.Popen(
        [sys.executable, "-c", SERVER, mountpoint, Path(__file__).parent],
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
    ) as server:  # fmt: skip
        assert server.stdout is not None
        assert server.stdout.readline() == "ready\n"
        (mountpoint / "file").write_text("content")
        server.send_signal(signal.SIGTERM)
        assert server.communicate(timeout=60) == ("stopped 1\n", "")
    assert server.returncode == 0
    assert not os.path.ismount(mountpoint)
