"""Real mounts of a loopback, one per data mode: what programs see, and what messages that took."""

from __future__ import annotations

import ctypes
import errno
import fcntl
import json
import mmap
import os
import shutil
import signal
import stat
import struct
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from wire_loopback import mount, unmount

LOOPBACK = Path(__file__).with_name("wire_loopback.py")
MODES = ["noopen", "noopen writeback", "cached", "cached writeback", "passthrough"]
LIBC = ctypes.CDLL(None, use_errno=True)


class Mounted:
    def __init__(self, base: Path, words: str) -> None:
        self.lower, self.path = base / "lower", base / "mnt"
        self.lower.mkdir()
        self.path.mkdir()
        self.log = base / "log"
        with open(self.log, "w") as log:
            self.process = subprocess.Popen(
                [sys.executable, LOOPBACK, self.lower, self.path, *words.split()],
                stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=log, text=True,
            )  # fmt: skip
        assert self.process.stdout is not None
        assert self.process.stdout.readline() == "ready\n", self.log.read_text()

    def unmount(self) -> dict[str, Any]:
        """The session's statistics; the server must have ended by itself and have had nothing to say."""
        subprocess.run(["umount", self.path], check=True, timeout=60)
        out, _ = self.process.communicate(timeout=60)
        assert self.process.returncode == 0 and self.log.read_text() == ""
        statistics: dict[str, Any] = json.loads(out)
        assert statistics["stopped"]
        return statistics

    def end(self) -> None:
        subprocess.run(["umount", "-l", self.path], check=False, stderr=subprocess.DEVNULL, timeout=60)
        if self.process.poll() is None:
            self.process.kill()
        self.process.wait(60)
        assert self.process.stdout is not None
        self.process.stdout.close()


@pytest.fixture(autouse=True)
def can_mount() -> None:
    if not os.path.exists("/dev/fuse"):
        pytest.skip("no /dev/fuse")
    if os.geteuid():
        pytest.skip("mounting without fusermount3 needs root")


@pytest.fixture
def mounted() -> Iterator[Callable[[str], Mounted]]:
    base = Path(tempfile.mkdtemp(prefix="unionfs-wire-"))
    made: list[Mounted] = []

    def make(words: str) -> Mounted:
        directory = base / str(len(made))
        directory.mkdir()
        made.append(Mounted(directory, words))
        return made[-1]

    try:
        yield make
    finally:
        for one in made:
            one.end()
        shutil.rmtree(base)


def wait_until(condition: Callable[[], bool]) -> None:
    until = time.monotonic() + 30
    while not condition():
        assert time.monotonic() < until
        time.sleep(0.01)


def check_names(m: Path) -> None:
    (m / "d/e").mkdir(parents=True)
    os.mknod(m / "null", stat.S_IFCHR | 0o600, os.makedev(1, 3))
    assert os.stat(m / "null").st_rdev == os.makedev(1, 3)
    os.mkfifo(m / "fifo")
    (m / "link").symlink_to("d/e")
    assert os.readlink(m / "link") == "d/e"
    (m / "a").write_text("a")
    (m / "b").write_text("bb")
    os.link(m / "a", m / "d/hard")
    assert os.stat(m / "d/hard").st_nlink == 2
    os.rename(m / "a", m / "d/a")
    with pytest.raises(FileNotFoundError):
        os.stat(m / "a")
    source, target = os.fsencode(m / "b"), os.fsencode(m / "d/a")
    assert LIBC.renameat2(-100, source, -100, target, 1) == -1 and ctypes.get_errno() == errno.EEXIST  # NOREPLACE
    assert LIBC.renameat2(-100, source, -100, target, 2) == 0  # EXCHANGE
    assert (m / "b").read_text() == "a" and (m / "d/a").read_text() == "bb"
    names = [f"{number:04}-{'n' * (number % 200)}" for number in range(1000)]
    for name in names:
        (m / "d/e" / name).touch()
    assert sorted(os.listdir(m / "d/e")) == names
    with os.scandir(m / "d/e") as entries:
        assert all(entry.inode() == entry.stat().st_ino for entry in entries)
    assert sorted(os.listdir(m)) == ["b", "d", "fifo", "link", "null"]
    with pytest.raises(OSError, match="not empty"):
        os.rmdir(m / "d")
    shutil.rmtree(m / "d")
    with pytest.raises(OSError) as error:
        os.stat(m / ("x" * 256))
    assert error.value.errno == errno.ENAMETOOLONG


def check_data(m: Path) -> None:
    content = os.urandom(3 << 20)
    (m / "big").write_bytes(content)
    assert (m / "big").read_bytes() == content
    fd = os.open(m / "big", os.O_RDWR)
    assert os.pread(fd, 4096, (3 << 20) - 100) == content[-100:]
    os.pwrite(fd, b"middle", 1 << 20)
    assert os.pread(fd, 8, (1 << 20) - 1) == content[(1 << 20) - 1 : 1 << 20] + b"middle" + content[(1 << 20) + 6 :][:1]
    with mmap.mmap(fd, 0) as mapped:
        mapped[5:9] = b"mmap"
        mapped.flush()
    assert os.pread(fd, 4, 5) == b"mmap"
    os.fsync(fd)
    os.fdatasync(fd)
    os.posix_fallocate(fd, 4 << 20, 4096)
    assert os.fstat(fd).st_size == (4 << 20) + 4096
    os.ftruncate(fd, 8 << 20)
    assert os.lseek(fd, 5 << 20, os.SEEK_HOLE) == 5 << 20
    with pytest.raises(OSError) as error:
        os.lseek(fd, 5 << 20, os.SEEK_DATA)
    assert error.value.errno == errno.ENXIO
    other = os.open(m / "copy", os.O_CREAT | os.O_RDWR, 0o600)
    assert os.copy_file_range(fd, other, 1 << 20, 0, 4096) == 1 << 20
    assert os.pread(other, 4, 4096 + 5) == b"mmap"
    os.unlink(m / "copy")
    os.pwrite(other, b"still", 0)
    assert os.pread(other, 5, 0) == b"still"
    os.close(other)
    os.close(fd)
    with open(m / "big", "w") as file:
        file.write("short")
    assert (m / "big").read_text() == "short" and os.stat(m / "big").st_size == 5
    with open(m / "big", "a") as first, open(m / "big", "a") as second:
        for file in (first, second):
            file.write("+more")
            file.flush()
    assert (m / "big").read_text() == "short+more+more"


def check_attributes(m: Path) -> None:
    (m / "f").write_text("f")
    os.chmod(m / "f", 0o640)
    os.chown(m / "f", 12, 34)
    os.utime(m / "f", ns=(1_234_567_890, -5_000_000_001))
    st = os.stat(m / "f")
    assert (stat.S_IMODE(st.st_mode), st.st_uid, st.st_gid) == (0o640, 12, 34)
    assert (st.st_atime_ns, st.st_mtime_ns) == (1_234_567_890, -5_000_000_001)
    before = time.time_ns() - 10**9
    os.utime(m / "f")
    assert os.stat(m / "f").st_mtime_ns > before
    os.setxattr(m / "f", "user.a", b"value")
    assert os.getxattr(m / "f", "user.a") == b"value" and "user.a" in os.listxattr(m / "f")
    with pytest.raises(FileExistsError):
        os.setxattr(m / "f", "user.a", b"again", os.XATTR_CREATE)
    os.removexattr(m / "f", "user.a")
    with pytest.raises(OSError) as error:
        os.getxattr(m / "f", "user.a")
    assert error.value.errno == errno.ENODATA
    with open(m / "f") as file:
        flags = struct.unpack("<Q", fcntl.ioctl(file, 0x80086601, bytes(8)))[0]
        fcntl.ioctl(file, 0x40086602, struct.pack("<Q", flags | 0x40))  # nodump
        assert struct.unpack("<Q", fcntl.ioctl(file, 0x80086601, bytes(8)))[0] == flags | 0x40
        with pytest.raises(OSError) as error:
            fcntl.ioctl(file, 0x5401, bytes(64))
        assert error.value.errno == errno.ENOTTY
    buffer = ctypes.create_string_buffer(256)
    assert LIBC.statx(-100, os.fsencode(m / "f"), 0, 0xFFF, buffer) == 0
    mask, seconds, nanoseconds = struct.unpack_from("<I76xqI", buffer)
    assert mask & 0x800 and (seconds, nanoseconds) == (1_000_000_007, 42)
    assert os.statvfs(m).f_namemax == 255
    fd = os.open(m, os.O_TMPFILE | os.O_RDWR, 0o600)
    os.write(fd, b"nameless")
    os.link(f"/proc/self/fd/{fd}", m / "named", src_dir_fd=fd, follow_symlinks=True)
    os.close(fd)
    assert (m / "named").read_text() == "nameless"


@pytest.mark.parametrize("words", MODES)
def test_mount(mounted: Callable[[str], Mounted], words: str) -> None:
    mount = mounted(words)
    check_names(mount.path)
    check_data(mount.path)
    check_attributes(mount.path)
    statistics = mount.unmount()
    messages = statistics["messages"]
    mode = words.split()[0]
    assert statistics["data"] == mode
    assert statistics["writeback"] == ("writeback" in words)
    assert messages["OPENDIR"] == 1 and "RELEASEDIR" not in messages  # said once, never again
    assert "READDIR" not in messages and "ACCESS" not in messages
    if mode == "noopen":
        assert messages["OPEN"] == messages["CREATE"] == messages["FLUSH"] == 1
        assert "RELEASE" not in messages
    else:
        assert messages["RELEASE"] == messages["OPEN"] + messages["CREATE"] + messages["TMPFILE"]
        assert statistics["opens_left"] == 0
    if mode == "passthrough":
        assert "READ" not in messages and "WRITE" not in messages
        assert statistics["passthrough_opens"] > 1000 and statistics["passthrough_inodes"] == 0
        assert statistics["cached_opens"] == statistics["passthrough_refused"] == 0


def test_page_cache_is_kept_over_opens(mounted: Callable[[str], Mounted]) -> None:
    for words in ("noopen", "cached"):
        mount = mounted(words)
        (mount.lower / "f").write_bytes(b"x" * 100_000)
        for _ in range(20):
            assert (mount.path / "f").read_bytes() == b"x" * 100_000
        assert mount.unmount()["messages"]["READ"] <= 3


def test_inode_keeps_one_mode_while_open(mounted: Callable[[str], Mounted]) -> None:
    """Passthrough where the core gives a descriptor, cached where not, both for as long as any open lives."""
    mount = mounted("passthrough")
    for name in ("plain", "other.cached"):
        path = mount.path / name
        path.write_text("one")
        with open(path) as reader, open(path, "r+") as writer, open(path, "a") as appender:
            writer.write("two")
            writer.flush()
            appender.write("+three")
            appender.flush()
            assert reader.read() == "two+three"
            os.rename(path, mount.path / f"{name}.moved.cached")  # the core's answer changes: the open ones stay
            with open(mount.path / f"{name}.moved.cached", "r+") as late:
                assert late.read() == "two+three"
    statistics = mount.unmount()
    assert statistics["passthrough_opens"] >= 5 and statistics["cached_opens"] >= 5
    assert statistics["passthrough_inodes"] == 0


def test_cached_pages_do_not_outlive_passthrough(mounted: Callable[[str], Mounted]) -> None:
    mount = mounted("passthrough")
    path, moved = mount.path / "f", mount.path / "f.cached"
    path.write_text("passed")
    os.rename(path, moved)
    assert moved.read_text() == "passed"
    os.rename(moved, path)
    path.write_text("PASSED")
    os.rename(path, moved)
    assert moved.read_text() == "PASSED"
    mount.unmount()


def test_slow_request_holds_up_nobody_and_can_be_interrupted(mounted: Callable[[str], Mounted]) -> None:
    """With its one slow thread taken, everything else is served, and who waits for the thread can be interrupted."""
    mount = mounted("noopen one held queued")
    (mount.lower / "d").mkdir()  # of their own: a lookup in flight keeps its directory from changing
    (mount.lower / "d/held").touch()
    stats: list[subprocess.Popen[bytes]] = []

    def start(name: str) -> subprocess.Popen[bytes]:
        stats.append(subprocess.Popen(["stat", "-c", "%n", mount.path / "d" / name], stdout=subprocess.PIPE))
        return stats[-1]

    try:
        held = start("held")
        wait_until(Path(f"{mount.lower}.begun-held").exists)
        queued = start("queued")
        wait_until(lambda: "fuse" in Path(f"/proc/{queued.pid}/stack").read_text())
        for number in range(50):
            (mount.path / str(number)).write_text("served")
            assert (mount.path / str(number)).read_text() == "served"
        queued.send_signal(signal.SIGINT)
        assert queued.wait(30) == -signal.SIGINT
        assert held.poll() is None
        mount.process.send_signal(signal.SIGUSR1)
        assert held.communicate(timeout=30)[0].strip() == os.fsencode(mount.path / "d/held")
    finally:
        for process in stats:
            process.kill()
            process.communicate()
    statistics = mount.unmount()
    assert statistics["slow_threads"] == 1 and statistics["interrupted"] == 1


def test_lazy_unmount_while_open(mounted: Callable[[str], Mounted]) -> None:
    mount = mounted("cached")
    with open(mount.path / "f", "w") as file:
        file.write("written")
        file.flush()
        subprocess.run(["umount", "-l", mount.path], check=True, timeout=60)
        file.write(" on")
    assert mount.process.wait(60) == 0
    assert (mount.lower / "f").read_text() == "written on"


ADOPT = """
import os, sys
sys.path.insert(0, sys.argv[1])
from wire_loopback import Loopback
from unionfs.session.channel import resend
from unionfs.session.direct import DirectSession
from unionfs.wire.handshake import Negotiated
fd, lower, terms = int(sys.argv[2]), os.fsencode(sys.argv[3]), bytes.fromhex(sys.argv[4])
session = DirectSession(fd, Loopback(lower), negotiated=Negotiated.from_bytes(terms) if terms else None)
def ready():
    if terms:
        os.write(fd, resend())
    print(session.terms.to_bytes().hex(), flush=True)
session.serve(ready)
"""


def test_connection_is_adopted(tmp_path: Path) -> None:
    """A server killed with SIGKILL is followed by another on the same device: INIT is not asked for again, and a
    request that the first one had taken is answered by the second. (What nodes it knew, the core has to keep.)"""
    lower, path = tmp_path / "lower", tmp_path / "mnt"
    lower.mkdir()
    path.mkdir()
    device = os.open("/dev/fuse", os.O_RDWR)
    mount(device, os.fsencode(path))
    servers: list[subprocess.Popen[str]] = []

    def serve(terms: str) -> str:
        argv = [sys.executable, "-c", ADOPT, str(LOOPBACK.parent), str(device), str(lower), terms]
        servers.append(subprocess.Popen(argv, stdout=subprocess.PIPE, text=True, pass_fds=[device]))
        output = servers[-1].stdout
        assert output is not None
        return output.readline().strip()

    reader: subprocess.Popen[str] | None = None
    try:
        terms = serve("")
        assert not os.path.exists(path / "none")
        servers[0].send_signal(signal.SIGSTOP)
        reader = subprocess.Popen(["cat", path / "new"], stdout=subprocess.PIPE, text=True)
        wait_until(lambda: "fuse" in Path(f"/proc/{reader.pid}/stack").read_text())
        servers[0].kill()
        servers[0].wait(60)
        (lower / "new").write_text("content")
        assert serve(terms) == terms
        assert reader.communicate(timeout=60)[0] == "content"
    finally:
        unmount(os.fsencode(path), lazy=True)
        os.close(device)
        for process in [*servers, *([reader] if reader else [])]:
            process.kill()
            process.wait(60)
            assert process.stdout is not None
            process.stdout.close()
