"""What a redirected file goes through, on real mounts: maps, direct and appending writers, holes, ranges, renames."""

from __future__ import annotations

import errno
import mmap
import os
import random
import sqlite3
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from rowmount import MIB, Row, content, poke

SIZE = 2 * MIB
PUNCH, ZERO, COLLAPSE, INSERT = 0x03, 0x10, 0x08, 0x20


@pytest.fixture(params=["direct", "pyfuse3"])
def mounted(row: Row, request: pytest.FixtureRequest) -> Iterator[tuple[Row, bytearray]]:
    """A row mount over one file `f`, and what is in it."""
    model = content(SIZE)
    (row.lower / "f").write_bytes(model)
    row.mount("--session", request.param)
    yield row, model
    assert (row.merged / "f").read_bytes() == model
    row.umount()
    assert row.fsck().returncode == 0
    row.mount("--session", request.param)
    assert (row.merged / "f").read_bytes() == model
    row.umount()
    assert (row.lower / "f").read_bytes() == content(SIZE)


@pytest.fixture
def file(row: Row) -> Iterator[tuple[Row, bytearray, int]]:
    """The same in the direct session (pyfuse3 has neither fallocate nor lseek), with a descriptor."""
    model = content(SIZE)
    (row.lower / "f").write_bytes(model)
    row.mount()
    fd = os.open(row.merged / "f", os.O_RDWR)
    yield row, model, fd
    assert os.pread(fd, len(model) + 1, 0) == model
    os.close(fd)
    row.remount()
    assert (row.merged / "f").read_bytes() == model
    row.umount()
    assert row.fsck().returncode == 0


def test_shared_mapping(mounted: tuple[Row, bytearray]) -> None:
    """Two mappings and a descriptor see one file; what a mapping wrote is redirected."""
    row, model = mounted
    with open(row.merged / "f", "r+b") as f, mmap.mmap(f.fileno(), SIZE) as one, mmap.mmap(f.fileno(), SIZE) as other:
        for offset in (5, 4094, 700_000, SIZE - 3):
            one[offset : offset + 3] = b"map"
            model[offset : offset + 3] = b"map"
            assert other[offset : offset + 3] == b"map"
        one.flush()
        assert os.pread(f.fileno(), 3, 700_000) == b"map"
        os.pwrite(f.fileno(), b"pwr", 900_000)
        model[900_000:900_003] = b"pwr"
        assert one[900_000:900_003] == b"pwr"
    blocks = os.stat(row.upper / "f").st_blocks
    assert blocks * 512 < SIZE // 4


def test_direct_io(mounted: tuple[Row, bytearray]) -> None:
    row, model = mounted
    fd = os.open(row.merged / "f", os.O_RDWR | os.O_DIRECT)
    page = mmap.mmap(-1, 16384)
    try:
        for i, offset in enumerate((0, 512 * 3, 65536, SIZE - 16384)):
            page[:] = bytes([i + 1]) * 16384
            assert os.pwrite(fd, page, offset) == 16384
            model[offset : offset + 16384] = bytes([i + 1]) * 16384
        assert os.preadv(fd, [page], 61440) == 16384
        assert page[:] == model[61440 : 61440 + 16384]
    finally:
        os.close(fd)


def test_appending_writers(mounted: tuple[Row, bytearray]) -> None:
    """Every record of several processes is there once, whole, and each writer's in its order."""
    row, model = mounted
    code = (
        "import os, sys\nfd = os.open(sys.argv[1], os.O_WRONLY | os.O_APPEND)\n"
        "for i in range(150): assert os.write(fd, (sys.argv[2] * 60 + '%04d' % i).encode()) == 64"
    )
    writers = [subprocess.Popen([sys.executable, "-c", code, row.merged / "f", letter]) for letter in "abcd"]
    assert [writer.wait(120) for writer in writers] == [0] * 4
    added = (row.merged / "f").read_bytes()[SIZE:]
    assert len(added) == 4 * 150 * 64
    records = [added[i : i + 64] for i in range(0, len(added), 64)]
    for letter in b"abcd":
        mine = [record for record in records if record[0] == letter]
        assert mine == [bytes([letter]) * 60 + b"%04d" % i for i in range(150)]
    model += added


def test_concurrent_blocks(mounted: tuple[Row, bytearray]) -> None:
    """Threads that write parts of the same blocks at once lose nothing of each other's."""
    row, model = mounted

    def work(number: int) -> None:
        fd = os.open(row.merged / "f", os.O_RDWR)
        for at in range(number * 100, 200_000, 400):
            os.pwrite(fd, bytes([65 + number]) * 100, at)
        os.fsync(fd)
        os.close(fd)

    threads = [threading.Thread(target=work, args=(n,)) for n in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for number in range(4):
        for at in range(number * 100, 200_000, 400):
            model[at : at + 100] = bytes([65 + number]) * 100


def test_rename_over_and_links(mounted: tuple[Row, bytearray]) -> None:
    row, model = mounted
    other = bytes(SIZE)
    (row.merged / "g").write_bytes(other)
    poke(row.merged / "f", 4090, b"across a block")
    model[4090:4104] = b"across a block"
    with open(row.merged / "g", "rb") as held:
        os.rename(row.merged / "f", row.merged / "g")
        assert held.read() == other
    os.link(row.merged / "g", row.merged / "h")
    os.rename(row.merged / "g", row.merged / "f")
    poke(row.merged / "h", SIZE - 1, b"!")
    model[-1:] = b"!"
    os.unlink(row.merged / "h")


def fallocate(fd: int, mode: int, offset: int, length: int) -> None:
    from unionfs import sysio

    sysio.fallocate(fd, mode, offset, length)


def test_punch_and_zero(file: tuple[Row, bytearray, int]) -> None:
    _, model, fd = file
    rng = random.Random(5)
    for _ in range(60):
        offset, length = rng.randrange(len(model)), rng.randrange(1, 100_000)
        kind = rng.choice((PUNCH, ZERO, ZERO | 1, 0, "write"))
        if kind == "write":
            data = rng.randbytes(length)
            assert os.pwrite(fd, data, offset) == length
            model.extend(bytes(max(0, offset + length - len(model))))
            model[offset : offset + length] = data
            continue
        assert isinstance(kind, int)
        fallocate(fd, kind, offset, length)
        if kind in (ZERO, 0):
            model.extend(bytes(max(0, offset + length - len(model))))
        if kind:
            end = min(offset + length, len(model))
            model[offset:end] = bytes(end - offset)
        assert os.fstat(fd).st_size == len(model)
    for mode in (COLLAPSE, INSERT):
        with pytest.raises(OSError) as caught:
            fallocate(fd, mode, 0, 4096)
        assert caught.value.errno == errno.EOPNOTSUPP


def islands(fd: int) -> list[tuple[int, int]]:
    """What SEEK_DATA and SEEK_HOLE call data."""
    out: list[tuple[int, int]] = []
    at, size = 0, os.fstat(fd).st_size
    while at < size:
        try:
            start = os.lseek(fd, at, os.SEEK_DATA)
        except OSError as e:
            assert e.errno == errno.ENXIO
            break
        at = os.lseek(fd, start, os.SEEK_HOLE)
        out.append((start, at))
    return out


def test_holes_are_told_truthfully(row: Row) -> None:
    """A sparse lower, redirected and punched: all that is not zero is data, a punched block is none."""
    size = 4 * MIB
    model = bytearray(size)
    with open(row.lower / "f", "wb") as f:
        f.truncate(size)
        for at in (MIB, 2 * MIB + 65536):
            f.seek(at)
            f.write(b"d" * 131072)
            model[at : at + 131072] = b"d" * 131072
    row.mount()
    fd = os.open(row.merged / "f", os.O_RDWR)
    assert islands(fd) == [(MIB, MIB + 131072), (2 * MIB + 65536, 2 * MIB + 65536 + 131072)]
    os.pwrite(fd, b"new", 3 * MIB + 10)
    os.pwrite(fd, bytes(4096), 65536)  # zeros that were written are data
    fallocate(fd, PUNCH, MIB + 4096, 8192)
    model[3 * MIB + 10 : 3 * MIB + 13] = b"new"
    model[MIB + 4096 : MIB + 12288] = bytes(8192)
    os.ftruncate(fd, 5 * MIB)
    model += bytes(MIB)
    assert islands(fd) == [
        (65536, 69632), (MIB, MIB + 4096), (MIB + 12288, MIB + 131072), (2 * MIB + 65536, 2 * MIB + 65536 + 131072),
        (3 * MIB, 3 * MIB + 4096),
    ]  # fmt: skip
    copy = row.where / "copy"
    subprocess.run(["cp", "--sparse=auto", row.merged / "f", copy], check=True)
    assert copy.read_bytes() == model == (row.merged / "f").read_bytes()
    os.close(fd)
    row.umount()


def test_a_tebibyte_is_sought_quickly(row: Row) -> None:
    """Ten thousand redirected blocks in a sparse file of 1 TiB: data is found wherever one asks, a remount agrees."""
    total = 1 << 40
    with open(row.lower / "huge", "wb") as f:
        f.truncate(total)
    row.mount()
    fd = os.open(row.merged / "huge", os.O_RDWR)
    step = total // 10_000 // 4096 * 4096
    for i in range(10_000):
        os.pwrite(fd, b"%08d" % i, i * step)
    for i in (0, 1, 4_999, 9_998):
        assert os.lseek(fd, i * step + 4096, os.SEEK_DATA) == (i + 1) * step
        assert os.lseek(fd, i * step, os.SEEK_HOLE) == i * step + 4096
    with pytest.raises(OSError) as caught:
        os.lseek(fd, 9_999 * step + 4096, os.SEEK_DATA)
    assert caught.value.errno == errno.ENXIO
    os.close(fd)
    row.remount()
    fd = os.open(row.merged / "huge", os.O_RDONLY)
    assert all(os.pread(fd, 8, i * step) == b"%08d" % i for i in range(0, 10_000, 7))
    assert os.pread(fd, 4096, step + 4096) == bytes(4096)
    os.close(fd)
    row.umount()


def test_copy_file_range(file: tuple[Row, bytearray, int]) -> None:
    """From and to redirected files, within one, and to a new file."""
    row, model, fd = file
    poke(row.merged / "f", 100_000, b"here")
    model[100_000:100_004] = b"here"
    new = os.open(row.merged / "new", os.O_RDWR | os.O_CREAT)
    copied = 0
    while copied < SIZE:
        done = os.copy_file_range(fd, new, SIZE - copied, copied, copied)
        assert done
        copied += done
    assert (row.merged / "new").read_bytes() == model
    os.pwrite(new, b"other" * 1000, 0)
    left, at_from, at_to = 50_000, 0, 1_000_001
    while left:
        done = os.copy_file_range(new, fd, left, at_from, at_to)
        left, at_from, at_to = left - done, at_from + done, at_to + done
    model[1_000_001:1_050_001] = os.pread(new, 50_000, 0)
    left, at_from, at_to = 8192, 100_000, 1_500_000
    while left:
        done = os.copy_file_range(fd, fd, left, at_from, at_to)
        left, at_from, at_to = left - done, at_from + done, at_to + done
    model[1_500_000:1_508_192] = model[100_000:108_192]
    os.close(new)


@pytest.mark.parametrize("kind", ["btrfs", "xfs"])
def test_reflink_needs_no_map(row: Row, kind: str, filesystem: Callable[[str, int], Path]) -> None:
    """Upper and lower on one filesystem that shares extents: the first write makes the plain file at once."""
    place = filesystem(kind, 400)
    row.lower, row.upper, row.work = (place / name for name in ("lower", "upper", "work"))
    row.lower.mkdir()
    row.upper.mkdir()
    model = bytearray(os.urandom(32 * MIB))
    (row.lower / "f").write_bytes(model)
    os.sync()
    before = os.statvfs(place)
    row.mount()
    poke(row.merged / "f", MIB + 5, b"shared")
    model[MIB + 5 : MIB + 11] = b"shared"
    os.truncate(row.merged / "f", 33 * MIB)
    model += bytes(MIB)
    assert (row.merged / "f").read_bytes() == model
    row.umount()
    after = os.statvfs(place)
    assert (before.f_bfree - after.f_bfree) * before.f_bsize < 8 * MIB  # the 32 MiB are shared
    assert not (row.upper / ".wh..wh.row").exists()
    assert (row.upper / "f").read_bytes() == model  # plain: the bytes are all in it
    row.driver = "overlay"
    row.mount()
    assert (row.merged / "f").read_bytes() == model
    row.umount()


def test_killed_server_in_the_middle_of_transactions(row: Row) -> None:
    """sqlite on a database of the lower, the server killed while it commits: every commit that was acknowledged is
    there and the database is whole, several times in a row."""
    db = sqlite3.connect(row.lower / "db")
    db.execute("create table t (n integer primary key, x text)")
    db.executemany("insert into t values (?, ?)", [(i, "x" * 500) for i in range(4000)])
    db.execute("create table log (n integer primary key)")
    db.commit()
    db.close()
    code = (
        "import sqlite3, sys\ndb = sqlite3.connect(sys.argv[1])\n"
        "db.execute('pragma journal_mode=' + sys.argv[2])\n"
        "first = db.execute('select coalesce(max(n), 0) from log').fetchone()[0] + 1\n"
        "for i in range(first, first + 100000):\n"
        "    db.execute('update t set x = ? where n = ?', (str(i) * 80, i * 37 % 4000))\n"
        "    db.execute('insert into log values (?)', (i,))\n"
        "    db.commit()\n    print(i, flush=True)"
    )
    last = 0
    for round_, mode in enumerate(("delete", "wal", "delete", "wal")):
        row.mount()
        client = subprocess.Popen(
            [sys.executable, "-c", code, row.merged / "db", mode],
            stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True,
        )  # fmt: skip
        assert client.stdout is not None
        for _ in range(15 + 7 * round_):
            last = int(client.stdout.readline())
        row.kill_server()
        rest = [int(line) for line in client.stdout.read().split()]
        assert client.wait(60) != 0
        last = max([last, *rest])
        row.mount()
        db = sqlite3.connect(row.merged / "db")
        assert db.execute("pragma integrity_check").fetchone() == ("ok",)
        found = db.execute("select max(n), count(*) from log").fetchone()
        assert found[0] == found[1] and last <= found[0] <= last + 1
        for i in range(max(1, last - 20), last + 1):
            assert db.execute("select x from t where n = ?", (i * 37 % 4000,)).fetchone() == (str(i) * 80,)
        db.close()
        row.umount()
        assert row.fsck().returncode == 0
