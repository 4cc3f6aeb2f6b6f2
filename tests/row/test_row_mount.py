"""The row driver on real mounts: what a first write costs, what survives a remount, a copy, a killed server."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from rowmount import MIB, UNIONFS, Row, content, poke

ROOT = Path(__file__).parents[2]


def test_first_write_copies_a_block(row: Row) -> None:
    with open(row.lower / "big", "wb") as f:
        f.truncate(1 << 40)
        os.pwrite(f.fileno(), b"x" * MIB, 0)
        os.pwrite(f.fileno(), b"end", (1 << 40) - 3)
    row.mount()
    big = row.merged / "big"
    poke(big, 5000, b"hello")
    poke(big, (1 << 40) - 2, b"N")
    assert big.stat().st_size == 1 << 40
    with open(big, "rb") as f:
        assert f.read(5010) == b"x" * 5000 + b"hello" + b"x" * 5
        f.seek((1 << 40) - 3)
        assert f.read() == b"eNd"
    row.umount()
    used = sum(os.lstat(p).st_blocks * 512 for p in row.upper.rglob("*") if p.is_file())
    assert used <= 64 << 10
    assert row.fsck().returncode == 0


def test_survives_remount_rename_and_reader(row: Row) -> None:
    model = content(MIB)
    (row.lower / "f").write_bytes(model)
    row.mount()
    for offset in (0, 4095, 70_000, 500_001, MIB - 3):
        poke(row.merged / "f", offset, b"abc")
        model[offset : offset + 3] = b"abc"
    os.truncate(row.merged / "f", 900_000)
    os.truncate(row.merged / "f", 950_000)
    model[900_000:] = bytes(50_000)
    os.rename(row.merged / "f", row.merged / "g")
    os.link(row.merged / "g", row.merged / "h")
    for _ in range(2):
        assert (row.merged / "g").read_bytes() == model
        assert (row.merged / "h").read_bytes() == model
        row.remount()
    row.umount()
    read = subprocess.run(
        [sys.executable, ROOT / "scripts/row-reader", row.upper, "g", row.lower / "f"], capture_output=True, check=True
    )
    assert read.stdout == model


def test_copied_upper_reads_the_same(row: Row) -> None:
    """A block of zeros is data, whatever a copying tool makes of the sparse file."""
    model = content(MIB)
    (row.lower / "f").write_bytes(model)
    row.mount()
    poke(row.merged / "f", 8192, bytes(8192))
    poke(row.merged / "f", 100_000, b"q" * 5000)
    model[8192:16384] = bytes(8192)
    model[100_000:105_000] = b"q" * 5000
    row.umount()
    for tool in ("cp", "tar"):
        copy = row.where / tool
        if tool == "cp":
            subprocess.run(["cp", "-a", "--sparse=always", row.upper, copy], check=True)
        else:
            copy.mkdir()
            tar = ["tar", "-S", "--xattrs", "--xattrs-include=*"]
            packed = subprocess.run([*tar, "-C", row.upper, "-cf", "-", "."], capture_output=True, check=True)
            subprocess.run([*tar, "-C", copy, "-xf", "-"], input=packed.stdout, check=True)
        other = Row(row.where)
        other.upper, other.work = copy, row.where / (tool + "-work")
        other.mount()
        assert (other.merged / "f").read_bytes() == model
        other.umount()


def test_becomes_plain_when_all_is_redirected(row: Row) -> None:
    (row.lower / "f").write_bytes(content(MIB))
    row.mount()
    new = os.urandom(MIB)
    fd = os.open(row.merged / "f", os.O_RDWR)
    for offset in range(0, MIB, 65536):
        os.pwrite(fd, new[offset : offset + 65536], offset)
    os.fsync(fd)
    os.close(fd)
    assert (row.merged / "f").read_bytes() == new
    row.umount()
    assert os.listdir(row.upper / ".wh..wh.row/maps") == []
    assert (row.upper / "f").read_bytes() == new
    row.mount()
    assert (row.merged / "f").read_bytes() == new
    row.umount()


def test_killed_server_loses_nothing(row: Row) -> None:
    model = content(MIB)
    (row.lower / "f").write_bytes(model)
    row.mount()
    for i in range(40):
        offset = i * 23_456 % (MIB - 100)
        poke(row.merged / "f", offset, bytes([i]) * 100)
        model[offset : offset + 100] = bytes([i]) * 100
    os.kill(row.pid(), signal.SIGKILL)
    subprocess.run(["umount", "-l", row.merged], check=True)
    row.mount()
    assert (row.merged / "f").read_bytes() == model
    row.umount()
    assert row.fsck().returncode == 0


def test_maps_go_with_their_files(row: Row) -> None:
    for name in "ab":
        (row.lower / name).write_bytes(content(MIB))
    row.mount()
    poke(row.merged / "a", 0, b"1")
    poke(row.merged / "b", 0, b"1")
    with open(row.merged / "a", "rb") as held:
        os.unlink(row.merged / "a")
        assert held.read(2) == b"1\0"
    os.rename(row.merged / "b", row.merged / "c")
    row.umount()
    assert len(os.listdir(row.upper / ".wh..wh.row/maps")) == 1
    assert row.fsck().returncode == 0


def test_bad_maps(row: Row) -> None:
    """EIO for the file whose map can't be believed, the rest works; fsck says which and why."""
    for name in ("damaged", "missing", "changed", "fine"):
        (row.lower / name).write_bytes(content(MIB))
    row.mount()
    for name in ("damaged", "missing", "changed", "fine"):
        poke(row.merged / name, 10, b"new")
    row.umount()
    maps = row.upper / ".wh..wh.row/maps"
    ids = {
        name: os.getxattr(row.upper / name, "trusted.overlay.unionfs.row").decode() for name in ("damaged", "missing")
    }
    poke(maps / ids["damaged"], 9, b"\xff")
    os.unlink(maps / ids["missing"])
    (maps / ("0" * 24)).write_bytes(b"")
    os.utime(row.lower / "changed")
    row.mount()
    for name in ("damaged", "missing", "changed"):
        with pytest.raises(OSError) as caught:
            (row.merged / name).read_bytes()
        assert caught.value.errno == 5
    assert (row.merged / "fine").read_bytes()[10:13] == b"new"
    row.remount("-o", "force")
    assert (row.merged / "changed").read_bytes()[10:13] == b"new"
    row.umount()
    found = row.fsck()
    assert found.returncode == 8
    assert "damaged" in found.stderr and "is missing" in found.stderr and "belongs to no file" in found.stderr
    assert "repaired" in row.fsck("--repair").stderr
    assert "belongs to no file" not in row.fsck().stderr


def test_bad_options(row: Row) -> None:
    (row.lower / "f").write_bytes(b"x")
    for option, word in (
        ("blocksize=5k", "blocksize"),
        ("metacopy=off", "metacopy"),
        ("redirect_dir=off", "redirect_dir"),
    ):
        argv = [
            UNIONFS,
            "mount",
            "--driver",
            "row",
            "--lower",
            row.lower,
            "--upper",
            row.upper,
            "-o",
            option,
            row.merged,
        ]
        done = subprocess.run(argv, capture_output=True, text=True, timeout=60)
        assert done.returncode in (2, 8) and word in done.stderr
        assert not os.path.ismount(row.merged)


@pytest.mark.parametrize("size", ["4k", "64k"])
def test_sqlite_in_the_lower(row: Row, size: str) -> None:
    import sqlite3

    db = sqlite3.connect(row.lower / "db")
    db.execute("create table t (n integer primary key, x text)")
    db.executemany("insert into t values (?, ?)", [(i, "x" * 200) for i in range(3000)])
    db.commit()
    db.close()
    before = shutil.copyfile(row.lower / "db", row.where / "before")
    row.mount("-o", f"blocksize={size}")
    db = sqlite3.connect(row.merged / "db")
    db.execute("pragma journal_mode=wal")
    for i in range(100):
        db.execute("update t set x = ? where n = ?", (f"new {i}", i * 29))
        db.commit()
    db.close()
    row.remount()
    db = sqlite3.connect(row.merged / "db")
    assert db.execute("pragma integrity_check").fetchone() == ("ok",)
    assert db.execute("select count(*) from t where x like 'new %'").fetchone() == (100,)
    db.close()
    row.umount()
    assert (row.lower / "db").read_bytes() == Path(before).read_bytes()


def test_flatten_makes_a_plain_upper(row: Row) -> None:
    """Other drivers refuse an upper with maps; flattened, the kernel's overlayfs shows what the mount showed."""
    model = content(MIB)
    (row.lower / "f").write_bytes(model)
    row.mount()
    poke(row.merged / "f", 500_001, b"abc")
    model[500_001:500_004] = b"abc"
    os.rename(row.merged / "f", row.merged / "g")
    os.link(row.merged / "g", row.merged / "h")
    os.truncate(row.merged / "g", 2 * MIB)
    model += bytes(MIB)
    row.umount()
    for argv in (
        ["--lower", row.lower, "--upper", row.upper, "--work", row.work],
        ["--lower", row.upper],
        ["--driver", "row", "--lower", row.upper],
    ):
        done = subprocess.run([UNIONFS, "mount", *argv, row.merged], capture_output=True, text=True, timeout=60)
        assert done.returncode == 8, done
        assert "row flatten" in done.stderr
    subprocess.run([UNIONFS, "row", "flatten", "--lower", row.lower, row.upper], check=True, timeout=60)
    assert sorted(os.listdir(row.where)) == ["lower", "merged", "upper", "work"]
    for path in (row.upper / "g", row.upper / "h"):
        assert path.read_bytes() == model
    shutil.rmtree(row.work)
    row.work.mkdir()
    layers = f"lowerdir={row.lower},upperdir={row.upper},workdir={row.work}"
    subprocess.run(["mount", "-t", "overlay", "overlay", "-o", layers, row.merged], check=True)
    try:
        assert sorted(os.listdir(row.merged)) == ["g", "h"]
        assert (row.merged / "h").read_bytes() == model
    finally:
        subprocess.run(["umount", row.merged], check=True)
