"""The row driver on real mounts: what a first write costs, what survives a remount, a copy, a killed server."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import zlib
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
    for tool in ("cp", "rsync", "tar"):
        copy = row.where / tool
        if tool == "cp":
            subprocess.run(["cp", "-a", "--sparse=always", row.upper, copy], check=True)
        elif tool == "rsync":
            subprocess.run(["rsync", "-aSX", "--super", f"{row.upper}/", copy], check=True)
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


def test_becomes_plain_at_the_next_open(row: Row) -> None:
    """Nobody synced it."""
    (row.lower / "f").write_bytes(content(MIB))
    row.mount()
    new = os.urandom(MIB)
    poke(row.merged / "f", 0, new)
    row.remount()
    assert (row.merged / "f").read_bytes() == new
    row.umount()
    assert os.listdir(row.upper / ".wh..wh.row/maps") == []
    assert (row.upper / "f").read_bytes() == new


def test_metadata_copies_no_data(row: Row) -> None:
    """Nor do renames, and cutting or growing a file."""
    with open(row.lower / "f", "wb") as f:
        for _ in range(8):
            f.write(os.urandom(MIB))
    model = (row.lower / "f").read_bytes()
    row.mount()
    f = row.merged / "f"
    os.chmod(f, 0o640)
    os.chown(f, 5, 6)
    os.utime(f, (1, 2))
    os.setxattr(f, "user.a", b"b")
    os.rename(f, row.merged / "g")
    os.truncate(row.merged / "g", 5 * MIB + 77)
    os.truncate(row.merged / "g", 1 << 40)
    assert sum(p.lstat().st_blocks * 512 for p in row.upper.rglob("*") if p.is_file()) <= 32 << 10
    row.remount()
    with open(row.merged / "g", "rb") as g:
        assert g.read(8 * MIB) == model[: 5 * MIB + 77] + bytes(3 * MIB - 77)
    st = os.stat(row.merged / "g")
    assert (st.st_mode & 0o7777, st.st_uid, st.st_gid, st.st_size) == (0o640, 5, 6, 1 << 40)
    row.umount()
    assert row.fsck().returncode == 0


def test_killed_server_loses_nothing(row: Row) -> None:
    model = content(MIB)
    (row.lower / "f").write_bytes(model)
    row.mount()
    for i in range(40):
        offset = i * 23_456 % (MIB - 100)
        poke(row.merged / "f", offset, bytes([i]) * 100)
        model[offset : offset + 100] = bytes([i]) * 100
    row.kill_server()
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


def run(*argv: str | Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run([UNIONFS, *argv], capture_output=True, text=True, timeout=60)


def test_inspect_draws_the_map(row: Row) -> None:
    (row.lower / "f").write_bytes(content(MIB))
    (row.lower / "meta").write_bytes(content(MIB))
    row.mount()
    poke(row.merged / "f", 5 * 4096 + 1, b"x" * 5000)
    subprocess.run(["fallocate", "-p", "-o", str(16 * 4096), "-l", str(16 * 4096), row.merged / "f"], check=True)
    os.chmod(row.merged / "meta", 0o600)
    for _ in range(2):  # mounted, and not
        done = run("row", "inspect", row.upper / "f")
        assert done.returncode == 0, done.stderr
        lines = [" ".join(line.split()) for line in done.stdout.splitlines()]
        assert "redirected 2, holes 16, base 238" in lines
        assert lines[3].startswith("[.+..oooo..........")
        assert lines[4:] == ["0 .. 4 base", "5 .. 6 redirected", "7 .. 15 base", "16 .. 31 hole", "32 .. 255 base"]
        assert run("row", "inspect", row.upper / "meta").stdout == "plain: no block map\n"
        if os.path.ismount(row.merged):
            assert "in the merged view" in run("row", "inspect", row.merged / "f").stderr
            row.umount()
    for path, word in ((row.upper / "none", "none"), (row.upper, "regular"), (row.lower / "f", "not in an upper")):
        done = run("row", "inspect", path)
        assert done.returncode != 0 and word in done.stderr and done.stderr.count("\n") == 1
    ident = os.getxattr(row.upper / "f", "trusted.overlay.unionfs.row").decode()
    poke(row.upper / ".wh..wh.row/maps" / ident, 20, b"\xff")
    done = run("row", "inspect", row.upper / "f")
    assert done.returncode == 8 and "fsck" in done.stderr and done.stderr.count("\n") == 1


def test_another_format_version_is_refused(row: Row) -> None:
    (row.lower / "f").write_bytes(content(MIB))
    row.mount()
    poke(row.merged / "f", 0, b"1")
    row.umount()
    path = next((row.upper / ".wh..wh.row/maps").iterdir())
    raw = bytearray(path.read_bytes())
    raw[8] = 2
    raw[56:60] = zlib.crc32(raw[:56]).to_bytes(4, "little")
    path.write_bytes(raw)
    done = row.try_mount()
    assert done.returncode == 8 and "format version 2" in done.stderr and "flatten" in done.stderr
    assert not os.path.ismount(row.merged)
    assert "format version 2" in row.fsck().stderr


def test_another_block_size_is_kept_apart(row: Row) -> None:
    """Each map has its own block size: what is mounted with another one reads and writes on in the old one."""
    models = {}
    for name in ("old", "new"):
        models[name] = content(MIB)
        (row.lower / name).write_bytes(models[name])
    row.mount("-o", "blocksize=16k")
    poke(row.merged / "old", 20_000, b"16k")
    models["old"][20_000:20_003] = b"16k"
    row.remount("-o", "blocksize=128k")
    for name in ("old", "new"):
        poke(row.merged / name, 200_001, b"128k")
        models[name][200_001:200_005] = b"128k"
    row.remount()
    for name, model in models.items():
        assert (row.merged / name).read_bytes() == model
    row.umount()
    assert "block size 16384" in run("row", "inspect", row.upper / "old").stdout
    assert "block size 131072" in run("row", "inspect", row.upper / "new").stdout
