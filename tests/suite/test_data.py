"""Reading and writing: sizes, modes of opening, mappings, holes, ranges, durability, locks; in each data mode."""

from __future__ import annotations

import fcntl
import mmap
import os
import random

import pytest
from support import sys as sc
from support.mounts import Maker, Union
from support.procs import child, errno_of, storm
from support.sys import KEEP_SIZE, PUNCH_HOLE, ZERO_RANGE, fallocate, segments
from support.trees import F

pytestmark = pytest.mark.every_data_mode
SIZES = (0, 1, 4095, 4096, 4097, 131072, 1048577, 5_000_000)


def test_sizes_and_offsets(make_union: Maker) -> None:
    """Files of many sizes from a lower and from upper read back exactly, in odd pieces too."""
    contents = {f"f{size}": random.Random(size).randbytes(size) for size in SIZES}
    u = make_union([{name: F(content) for name, content in contents.items()}])
    for name, content in contents.items():
        (u / ("new" + name)).write_bytes(content)
    for _ in range(2):
        for name, content in contents.items():
            for path in (u / name, u / ("new" + name)):
                assert path.read_bytes() == content
                fd = os.open(path, os.O_RDONLY)
                for offset in (
                    0,
                    1,
                    4095,
                    len(content) // 2,
                    max(len(content) - 3, 0),
                    len(content),
                    len(content) + 10,
                ):
                    assert os.pread(fd, 5000, offset) == content[offset : offset + 5000]
                os.close(fd)
        u.remount()


@pytest.mark.needs("whole_copies")
def test_random_writes(make_union: Maker) -> None:
    """Random reads, writes, truncations and appends against a model, on a file that starts in a lower."""
    rng = random.Random(7)
    model = bytearray(rng.randbytes(300_000))
    u = make_union([{"f": F(bytes(model))}])
    fd = os.open(u / "f", os.O_RDWR)
    for _ in range(300):
        kind, offset, size = rng.random(), rng.randrange(350_000), rng.randrange(1, 40_000)
        if kind < 0.45:
            data = rng.randbytes(size)
            os.pwrite(fd, data, offset)
            if offset > len(model):
                model.extend(bytes(offset - len(model)))
            model[offset : offset + size] = data
        elif kind < 0.9:
            assert os.pread(fd, size, offset) == bytes(model[offset : offset + size])
        elif kind < 0.97:
            os.ftruncate(fd, offset)
            if offset > len(model):
                model.extend(bytes(offset - len(model)))
            del model[offset:]
        else:
            os.fsync(fd)
        assert os.fstat(fd).st_size == len(model)
    os.close(fd)
    assert (u / "f").read_bytes() == bytes(model)
    assert (u.up / "f").read_bytes() == bytes(model)
    u.remount()
    assert (u / "f").read_bytes() == bytes(model)


def test_open_flags(make_union: Maker) -> None:
    u = make_union([{"f": "content"}])
    assert errno_of(os.open, u / "f", os.O_CREAT | os.O_EXCL | os.O_RDWR) == 17
    assert errno_of(os.open, u / "f", os.O_DIRECTORY) == 20
    assert errno_of(os.open, u / "none", os.O_RDWR) == 2
    assert errno_of(os.open, u.merged, os.O_RDWR) == 21
    fd = os.open(u / "f", os.O_RDONLY)
    assert errno_of(os.write, fd, b"x") == 9
    os.close(fd)
    fd = os.open(u / "f", os.O_WRONLY)
    assert errno_of(os.read, fd, 1) == 9
    os.close(fd)
    fd = os.open(u / "f", os.O_CREAT | os.O_RDWR | os.O_TRUNC)
    assert os.fstat(fd).st_size == 0
    os.close(fd)
    fd = os.open(u / "n", os.O_CREAT | os.O_RDONLY, 0o400)
    assert os.read(fd, 1) == b""
    os.close(fd)
    fd = os.open(u / "readonly", os.O_CREAT | os.O_RDWR, 0o444)
    os.write(fd, b"ok")
    os.close(fd)
    assert (u / "readonly").read_text() == "ok"
    fd = os.open(u / "f", os.O_PATH)
    assert os.fstat(fd).st_size == 0
    os.close(fd)


def test_append_by_many(make_union: Maker) -> None:
    """O_APPEND: no record of parallel writers is lost or torn, on a file that is copied up by the first of them."""
    u = make_union([{"log": "start\n"}])

    def write(number: int) -> None:
        fd = os.open(u / "log", os.O_WRONLY | os.O_APPEND)
        for i in range(50):
            os.write(fd, b"%02d:%03d:%s\n" % (number, i, b"x" * 90))
        os.close(fd)

    storm(8, write)
    lines = (u / "log").read_bytes().splitlines()
    assert lines[0] == b"start"
    assert sorted(lines[1:]) == sorted(b"%02d:%03d:%s" % (n, i, b"x" * 90) for n in range(8) for i in range(50))


def test_shared_mapping(make_union: Maker) -> None:
    """A shared mapping, read and write see one another at once, across processes; munmap needs no msync."""
    u = make_union([{"f": F(b"a" * 10000)}])
    fd = os.open(u / "f", os.O_RDWR)
    other = os.open(u / "f", os.O_RDONLY)
    with mmap.mmap(fd, 10000) as shared, mmap.mmap(other, 10000, prot=mmap.PROT_READ) as view:
        shared[5000:5003] = b"map"
        assert os.pread(other, 3, 5000) == b"map"
        assert view[5000:5003] == b"map"
        os.pwrite(fd, b"write", 100)
        assert shared[100:105] == b"write"
        assert view[100:105] == b"write"
        child(lambda: shared.__setitem__(slice(0, 5), b"child"))
        assert os.pread(fd, 5, 0) == b"child"
        shared[9990:9995] = b"final"
    os.close(fd)
    os.close(other)
    assert (u / "f").read_bytes()[9990:9995] == b"final"
    u.remount()
    content = (u / "f").read_bytes()
    assert (content[:5], content[100:105], content[5000:5003], content[9990:9995]) == (
        b"child",
        b"write",
        b"map",
        b"final",
    )


@pytest.mark.needs("coherent_fd")
def test_mapping_from_before_copy_up(make_union: Maker) -> None:
    """A read-only mapping made before a copy-up shows what is written after it."""
    u = make_union([{"f": F(b"a" * 8192)}])
    fd = os.open(u / "f", os.O_RDONLY)
    with mmap.mmap(fd, 8192, prot=mmap.PROT_READ) as view:
        assert view[4096:4099] == b"aaa"
        with open(u / "f", "r+b") as f:
            f.seek(4096)
            f.write(b"new")
        assert view[4096:4099] == b"new"
    os.close(fd)


def test_private_mapping(make_union: Maker) -> None:
    u = make_union([{"f": F(b"a" * 8192)}])
    fd = os.open(u / "f", os.O_RDONLY)
    with mmap.mmap(fd, 8192, flags=mmap.MAP_PRIVATE, prot=mmap.PROT_READ | mmap.PROT_WRITE) as private:
        private[0:3] = b"own"
        assert os.pread(fd, 3, 0) == b"aaa"
    os.close(fd)
    assert os.listdir(u.up) == []


def test_direct_io(make_union: Maker) -> None:
    """O_DIRECT reads and writes are coherent with buffered ones."""
    u = make_union([{"f": F(b"a" * 16384)}])
    buffer = mmap.mmap(-1, 4096)
    fd = os.open(u / "f", os.O_RDWR | os.O_DIRECT)
    buffer[:] = b"d" * 4096
    assert os.pwritev(fd, [buffer], 4096) == 4096
    plain = os.open(u / "f", os.O_RDWR)
    assert os.pread(plain, 2, 4095) == b"ad"
    os.pwrite(plain, b"b" * 4096, 8192)
    assert os.preadv(fd, [buffer], 8192) == 4096
    assert buffer[:] == b"b" * 4096
    os.close(fd)
    os.close(plain)
    assert (u.up / "f").read_bytes() == b"a" * 4096 + b"d" * 4096 + b"b" * 4096 + b"a" * 4096


@pytest.mark.needs("fallocate", "whole_copies")
def test_fallocate(make_union: Maker) -> None:
    u = make_union([{"low": F(b"a" * 65536)}])
    for name in ("low", "up"):
        if name == "up":
            (u / "up").write_bytes(b"a" * 65536)
        fd = os.open(u / name, os.O_RDWR)
        fallocate(fd, 0, 65536, 4096)
        assert os.fstat(fd).st_size == 69632
        fallocate(fd, KEEP_SIZE, 1 << 20, 65536)
        assert os.fstat(fd).st_size == 69632
        fallocate(fd, PUNCH_HOLE | KEEP_SIZE, 4096, 8192)
        assert os.pread(fd, 12290, 4095) == b"a" + bytes(8192) + b"a" * 4097
        fallocate(fd, ZERO_RANGE, 20000, 100)
        assert os.pread(fd, 102, 19999) == b"a" + bytes(100) + b"a"
        os.ftruncate(fd, 65536)
        assert errno_of(fallocate, fd, 0, 0, 0) == 22
        assert errno_of(fallocate, fd, PUNCH_HOLE, 0, 4096) in (22, 95)
        read_only = os.open(u / name, os.O_RDONLY)
        assert errno_of(fallocate, read_only, 0, 0, 10) == 9
        os.close(read_only)
        os.close(fd)
        assert (u.up / name).read_bytes() == (u / name).read_bytes()


@pytest.mark.needs("fallocate")
def test_collapse_and_insert(make_union: Maker) -> None:
    """What the kernel lets FUSE carry of the range-moving modes: either done right or refused, nothing in between."""
    u = make_union([{"f": F(b"a" * 4096 + b"b" * 4096 + b"c" * 4096)}])
    fd = os.open(u / "f", os.O_RDWR)
    number = errno_of(fallocate, fd, sc.COLLAPSE_RANGE, 4096, 4096)
    assert number in (0, 95)
    expected = b"a" * 4096 + (b"b" * 4096 if number else b"") + b"c" * 4096
    assert os.pread(fd, 20000, 0) == expected
    number = errno_of(fallocate, fd, sc.INSERT_RANGE, 0, 4096)
    assert number in (0, 95)
    assert os.pread(fd, 30000, 0) == (b"" if number else bytes(4096)) + expected
    os.close(fd)


@pytest.mark.needs("lseek")
def test_seek_data_and_hole(make_union: Maker) -> None:
    u = make_union([{"f": F(b"head", holes=1 << 20)}])
    fd = os.open(u / "f", os.O_RDONLY)
    assert segments(fd) == [(0, 4096)]
    assert os.lseek(fd, 0, os.SEEK_HOLE) == 4096
    assert errno_of(os.lseek, fd, 8192, os.SEEK_DATA) == 6
    assert errno_of(os.lseek, fd, 1 << 21, os.SEEK_HOLE) == 6
    assert os.lseek(fd, 1 << 19, os.SEEK_HOLE) == 1 << 19
    os.close(fd)


@pytest.mark.needs("lseek", "fine_holes")
def test_seek_after_copy_up(make_union: Maker) -> None:
    u = make_union([{"f": F(b"head", holes=1 << 20)}])
    with open(u / "f", "r+b") as f:
        f.seek(500_000)
        f.write(b"tail")
    fd = os.open(u / "f", os.O_RDONLY)
    assert [start // 4096 for start, _ in segments(fd)] == [0, 500_000 // 4096]
    os.close(fd)


def test_copy_file_range(make_union: Maker) -> None:
    """Between lower, upper and the same file; a copy to a lower file copies it up."""
    content = random.Random(1).randbytes(200_000)
    u = make_union([{"src": F(content), "dst": F(b"z" * 1000)}])
    src = os.open(u / "src", os.O_RDONLY)
    for name in ("dst", "new"):
        dst = os.open(u / name, os.O_RDWR | os.O_CREAT)
        done = 0
        while done < len(content):
            count = os.copy_file_range(src, dst, len(content) - done, done, done + 10)
            assert count > 0
            done += count
        assert os.pread(dst, 300_000, 10) == content
        assert os.pread(dst, 10, 0) == (b"z" * 10 if name == "dst" else bytes(10))
        assert os.copy_file_range(dst, dst, 100, 10, 200_010) == 100
        assert os.pread(dst, 200, 200_010) == content[:100]
        assert os.copy_file_range(src, dst, 100, 200_000, 0) == 0
        os.close(dst)
    os.close(src)
    assert (u / "src").read_bytes() == content
    assert (u.up / "new").read_bytes()[10:200_010] == content


def test_fsync_family(union: Union) -> None:
    fd = os.open(union / "f", os.O_CREAT | os.O_RDWR)
    os.write(fd, b"data")
    os.fsync(fd)
    os.fdatasync(fd)
    sc.syncfs(fd)
    os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)
    assert (union.up / "f").read_bytes() == b"data"
    directory = os.open(union.merged, os.O_RDONLY)
    os.fsync(directory)
    sc.syncfs(directory)
    assert os.pread(fd, 4, 0) == b"data"
    os.close(fd)
    os.close(directory)


def test_times(make_union: Maker) -> None:
    """A write moves mtime and ctime, a read does not; explicit times hold to the nanosecond and beyond 2038."""
    u = make_union([{"f": "x"}])
    (u / "f").read_text()
    before = (u / "f").stat()
    with open(u / "f", "a") as f:
        f.write("y")
    after = (u / "f").stat()
    assert after.st_mtime_ns > before.st_mtime_ns
    assert after.st_ctime_ns > before.st_ctime_ns
    for mtime in (1, 4_400_000_000_123_456_789, 999_999_999):
        os.utime(u / "f", ns=(mtime + 1, mtime))
        assert (u / "f").stat().st_mtime_ns == mtime
        assert (u / "f").stat().st_atime_ns == mtime + 1
    os.utime(u / "f", ns=(7, 8))
    u.remount()
    assert (u / "f").stat().st_mtime_ns == 8


def test_locks_between_processes(make_union: Maker) -> None:
    """flock and fcntl locks hold between processes, before and after the file is copied up."""
    u = make_union([{"f": "lock"}])

    def taken(kind: str) -> bool:
        with open(u / "f", "r+") as f:
            call = fcntl.flock if kind == "flock" else fcntl.lockf
            return errno_of(call, f, fcntl.LOCK_EX | fcntl.LOCK_NB) == 11

    for kind in ("flock", "fcntl"):
        with open(u / "f", "r+") as f:
            call = fcntl.flock if kind == "flock" else fcntl.lockf
            call(f, fcntl.LOCK_EX)
            assert child(taken, kind) is True
            f.write("copied")
            f.flush()
            assert child(taken, kind) is True
            call(f, fcntl.LOCK_UN)
            assert child(taken, kind) is False
    with open(u / "f") as reader:
        fcntl.flock(reader, fcntl.LOCK_SH)
        assert child(taken, "flock") is True


def test_lock_from_before_copy_up(make_union: Maker) -> None:
    u = make_union([{"f": "lock"}])
    with open(u / "f") as early:
        fcntl.flock(early, fcntl.LOCK_EX)
        assert child(lambda: errno_of(fcntl.flock, os.open(u / "f", os.O_RDWR), fcntl.LOCK_EX | fcntl.LOCK_NB)) == 11


def test_execute(make_union: Maker) -> None:
    """A program runs from the mount, from a lower and copied up; writing to it while it runs is ETXTBSY."""
    with open("/bin/sleep", "rb") as source:
        program = source.read()
    u = make_union([{"low": F(program, 0o755)}])
    (u / "up").write_bytes(program)
    os.chmod(u / "up", 0o755)
    os.chmod(u / "low", 0o711)
    for name in ("low", "up"):
        pid = os.posix_spawn(u / name, [name, "60"], {})
        number = errno_of(os.open, u / name, os.O_WRONLY)
        os.kill(pid, 9)
        os.waitpid(pid, 0)
        assert number == 26, name


def test_copy_up_under_readers(make_union: Maker) -> None:
    """64 MiB are copied up while others read: they see old bytes or new ones where written, never anything else."""
    block = random.Random(3).randbytes(1 << 20)
    u = make_union([{"big": F(block * 64)}], compare=False)

    def work(number: int) -> None:
        if number == 0:
            with open(u / "big", "r+b") as f:
                f.write(b"first")
            return
        fd = os.open(u / "big", os.O_RDONLY)
        for i in range(number, 64, 3):
            assert os.pread(fd, 1000, (i << 20) + 100) == block[100:1100]
        assert os.pread(fd, 5, 0) in (block[:5], b"first")
        os.close(fd)

    storm(4, work)
    assert (u / "big").stat().st_size == 64 << 20
    with open(u / "big", "rb") as f:
        assert f.read(10) == b"first" + block[5:10]
