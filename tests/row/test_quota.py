"""A limit on the upper (`-o size=`), and a host filesystem that runs full: ENOSPC, nothing earlier lost, space back."""

from __future__ import annotations

import errno
import os
import subprocess
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from rowmount import MIB, UNIONFS, Row, poke

PIECE = os.urandom(MIB)


def eventually(true: Callable[[], bool]) -> None:
    """The kernel forgets a deleted file a moment after the unlink."""
    deadline = time.monotonic() + 20
    while not true():
        assert time.monotonic() < deadline
        time.sleep(0.02)


def fill(path: Path) -> int:
    """Append until the disk is full; how many bytes went in."""
    fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    total = 0
    try:
        while total < 1 << 30:
            total += os.write(fd, PIECE)
    except OSError as e:
        assert e.errno == errno.ENOSPC
    finally:
        os.close(fd)
    return total


def free(path: Path) -> int:
    s = os.statvfs(path)
    return s.f_bavail * s.f_frsize


@pytest.mark.parametrize("driver", ["row", "overlay"])
def test_limit(row: Row, driver: str) -> None:
    """ENOSPC at the limit; what was written stays; deleting, punching and truncating give room; a remount agrees."""
    (row.lower / "small").write_bytes(b"s" * 5000)
    row.driver = driver
    row.mount("-o", "size=16m")
    assert free(row.merged) == os.statvfs(row.merged).f_blocks * os.statvfs(row.merged).f_frsize == 16 * MIB
    total = fill(row.merged / "a")
    assert 16 * MIB - 64 * 1024 <= total <= 16 * MIB
    assert free(row.merged) < 64 * 1024
    for action in (
        lambda: os.mkdir(row.merged / "d"),
        lambda: (row.merged / "b").write_bytes(PIECE),
        lambda: poke(row.merged / "small", 0, b"x"),
    ):
        with pytest.raises(OSError) as caught:
            for _ in range(20):  # a last block may be left
                action()
                os.rmdir(row.merged / "d") if (row.merged / "d").is_dir() else None
        assert caught.value.errno in (errno.ENOSPC, errno.EEXIST)
    poke(row.merged / "a", 3 * MIB, b"rewritten in place")
    content = (row.merged / "a").read_bytes()
    assert len(content) == total and content[3 * MIB : 3 * MIB + 18] == b"rewritten in place"
    fd = os.open(row.merged / "a", os.O_RDWR)
    subprocess.run(["fallocate", "-p", "-o", "0", "-l", str(4 * MIB), row.merged / "a"], check=True)
    assert free(row.merged) >= 4 * MIB - 65536
    (row.merged / "b").write_bytes(PIECE * 2)
    os.ftruncate(fd, 8 * MIB)
    os.close(fd)
    before = free(row.merged)
    assert before >= 9 * MIB
    os.unlink(row.merged / "b")
    eventually(lambda: free(row.merged) >= before + 2 * MIB - 65536)
    seen = free(row.merged)
    row.remount("-o", "size=16m")
    assert abs(free(row.merged) - seen) <= 128 * 1024
    assert (row.merged / "a").read_bytes()[4 * MIB :] == content[4 * MIB : 8 * MIB]
    row.umount()


def test_an_open_deleted_file_counts(row: Row) -> None:
    row.mount("-o", "size=8m")
    with open(row.merged / "held", "wb") as held:
        held.write(PIECE * 6)
        held.flush()
        os.unlink(row.merged / "held")
        with pytest.raises(OSError) as caught:
            (row.merged / "more").write_bytes(PIECE * 4)
        assert caught.value.errno == errno.ENOSPC
    eventually(lambda: free(row.merged) >= 4 * MIB)
    (row.merged / "more").write_bytes(PIECE * 4)
    row.umount()


def test_a_big_lower_file_in_a_small_quota(row: Row) -> None:
    """Only the redirected blocks count; preallocated ones can be written later."""
    with open(row.lower / "big", "wb") as f:
        for _ in range(64):
            f.write(PIECE)
    row.mount("-o", "size=4m")
    for i in range(100):
        poke(row.merged / "big", i * 600_000, b"block")
    assert free(row.merged) >= 2 * MIB
    subprocess.run(["fallocate", "-l", str(2 * MIB), row.merged / "reserved"], check=True)
    with pytest.raises(OSError):
        for i in range(2000):
            poke(row.merged / "big", 100 + i * 30_000, b"more!")
    (row.merged / "reserved").open("r+b").write(PIECE * 2)
    with open(row.merged / "big", "rb") as f:
        for i in range(100):
            f.seek(i * 600_000)
            assert f.read(5) == b"block"
    status = subprocess.run([UNIONFS, "status", row.merged], capture_output=True, text=True, check=True).stdout
    for words in ("quota size", "quota used", "block size", "data space used", "map space", "redirected blocks"):
        assert words in status
    row.umount()
    assert row.fsck().returncode == 0


def test_bad_sizes(row: Row) -> None:
    for size in ("ten", "", "10q", "-5m", "100k", "1.5g"):
        done = row.try_mount("-o", f"size={size}")
        assert done.returncode == 2 and "size=" in done.stderr and done.stderr.count("\n") == 1
        assert not os.path.ismount(row.merged)


@pytest.mark.parametrize("kind", ["ext4", "tmpfs"])
def test_full_host(row: Row, kind: str, filesystem: Callable[[str, int], Path]) -> None:
    """The filesystem under the upper is full: ENOSPC to the writer, what was written before reads back, also after a
    remount, and there is room again when something is deleted."""
    model = bytearray(os.urandom(4 * MIB))
    (row.lower / "f").write_bytes(model)
    place = filesystem(kind, 24)
    row.upper, row.work = place / "upper", place / "work"
    row.upper.mkdir()
    row.mount()
    poke(row.merged / "f", 10, b"first")
    model[10:15] = b"first"
    fill(row.merged / "fill")
    fd = os.open(row.merged / "f", os.O_RDWR)
    refused = 0
    for i in range(900):
        offset, data = i * 4200 + 77, bytes([i % 255 + 1]) * 200
        try:
            done = os.pwrite(fd, data, offset)
        except OSError as e:
            assert e.errno == errno.ENOSPC
            refused += 1
            done = 0
        model[offset : offset + done] = data[:done]
    os.close(fd)
    assert refused
    assert (row.merged / "f").read_bytes() == model
    os.unlink(row.merged / "fill")
    eventually(lambda: free(row.merged) > 8 * MIB)
    poke(row.merged / "f", 2 * MIB, b"room again")
    model[2 * MIB : 2 * MIB + 10] = b"room again"
    row.remount()
    assert (row.merged / "f").read_bytes() == model
    row.umount()
    assert row.fsck().returncode == 0
