"""A redirected file against a model in memory, its map read again from the disk at any point; no mount involved."""

from __future__ import annotations

import os
import random
from itertools import pairwise
from pathlib import Path

import pytest
from unionfs_drivers.row.blockmap import DATA, HEADER, HOLE, RECORD, Base, BlockMap, MapError
from unionfs_drivers.row.extents import PAGE, Extents
from unionfs_drivers.row.file import ZERO_RANGE, RowFile

from unionfs.core.base import OpenFile
from unionfs.sysio import FALLOC_FL_KEEP_SIZE, FALLOC_FL_PUNCH_HOLE

BS = 4096


class Files:
    """A base, a sparse upper file and a map in a directory."""

    def __init__(self, where: Path, content: bytes) -> None:
        self.where = where
        (where / "base").write_bytes(content)
        (where / "upper").touch()
        os.truncate(where / "upper", len(content))
        st = (where / "base").stat()
        self.dir = os.open(where, os.O_RDONLY)
        self.file = self._open(BlockMap.create(self.dir, "map", BS, Base(st.st_size, st.st_mtime_ns, st.st_ino)))

    def _open(self, blockmap: BlockMap) -> RowFile:
        base = OpenFile(os.open(self.where / "base", os.O_RDONLY), False)
        return RowFile(os.open(self.where / "upper", os.O_RDWR), True, base, blockmap, "map")

    def again(self) -> RowFile:
        self.file = self._open(BlockMap.load(self.dir, "map", True))
        return self.file

    def read(self) -> bytes:
        size = os.fstat(self.file.n).st_size
        buffer = memoryview(bytearray(size + 10))
        assert self.file.read_at(0, buffer) == size
        return bytes(buffer[:size])


def step(f: RowFile, model: bytearray, rng: random.Random) -> None:
    offset, size = rng.randrange(90_000), rng.randrange(1, 20_000)
    kind = rng.randrange(8)
    if kind <= 2:
        data = rng.randbytes(size)
        assert f.write_at(offset, data) == size
        if offset > len(model):
            model.extend(bytes(offset - len(model)))
        model[offset : offset + size] = data
    elif kind == 3:
        f.truncate(offset)
        del model[offset:]
        model.extend(bytes(offset - len(model)))
    elif kind in (4, 5):
        mode = FALLOC_FL_PUNCH_HOLE | FALLOC_FL_KEEP_SIZE if kind == 4 else ZERO_RANGE
        f.fallocate(mode, offset, size)
        if kind == 5 and offset + size > len(model):
            model.extend(bytes(offset + size - len(model)))
        end = min(offset + size, len(model))
        if end > offset:
            model[offset:end] = bytes(end - offset)
    elif kind == 6:
        f.sync(True)
    else:
        buffer = memoryview(bytearray(size))
        got = f.read_at(offset, buffer)
        assert bytes(buffer[:got]) == bytes(model[offset : offset + size])


@pytest.mark.parametrize("seed", range(25))
def test_against_a_model(tmp_path: Path, seed: int) -> None:
    rng = random.Random(seed)
    model = bytearray(rng.randbytes(70_001))
    files = Files(tmp_path, bytes(model))
    for _ in range(60):
        step(files.file, model, rng)
        assert files.read() == bytes(model)
        if rng.random() < 0.15:
            files.again()
            assert files.read() == bytes(model)


@pytest.mark.parametrize("seed", range(5))
def test_extents_against_a_list(seed: int) -> None:
    rng = random.Random(seed)
    size = 3 * PAGE + 200
    extents, model = Extents(), [0] * size
    for _ in range(400):
        first = rng.randrange(size)
        end = rng.randrange(first, size + 1) if rng.random() < 0.3 else min(first + rng.randrange(5), size)
        kind = rng.choice((0, DATA, HOLE))
        if rng.random() < 0.05:
            extents.cut(end)
            model[end:] = [0] * (size - end)
        extents.put(first, end, kind)
        model[first:end] = [kind] * (end - first)
        runs = extents.runs(0, size)
        assert [kind for a, b, kind in runs for _ in range(a, b)] == model
        assert all(left[1] == right[0] and left[2] != right[2] for left, right in pairwise(runs))
        assert [kind for a, b, kind in extents.runs(first, end) for _ in range(a, b)] == model[first:end]
        assert extents.redirected() == [run for run in runs if run[2]]
        assert extents.end() == max((i + 1 for i in range(size) if model[i]), default=0)
        assert extents.covers(first) == (0 not in model[:first])
        assert [extents.count(kind) for kind in (DATA, HOLE)] == [model.count(kind) for kind in (DATA, HOLE)]
        if first < end:
            assert extents.has(first, end, DATA) == (set(model[first:end]) == {DATA})


def test_ten_thousand_extents_in_a_tebibyte() -> None:
    """What a look-up touches does not grow with the number of extents, nor memory with the length of a run."""
    extents = Extents()
    total = 1 << 28
    for i in range(10_000):
        extents.put(i * 26_843, i * 26_843 + 1, DATA)
    assert len(extents.redirected()) == 10_000
    assert extents.runs(26_840, 26_848) == [(26_840, 26_843, 0), (26_843, 26_844, DATA), (26_844, 26_848, 0)]
    assert not extents.covers(total)
    extents.put(0, total, HOLE)
    assert extents.runs(0, total) == [(0, total, HOLE)]
    assert extents.covers(total) and extents.has(5, total - 5, HOLE) and extents.end() == total


def test_first_write_costs_a_block(tmp_path: Path) -> None:
    files = Files(tmp_path, b"x" * (64 << 20))
    files.file.write_at(10 << 20, b"y")
    files.file.sync(False)
    assert (tmp_path / "upper").stat().st_blocks * 512 <= 16384
    assert (tmp_path / "map").stat().st_size < 512


def test_growing_again_shows_zeros(tmp_path: Path) -> None:
    files = Files(tmp_path, b"x" * 50_000)
    files.file.truncate(10_001)
    files.file.truncate(50_000)
    assert files.read() == b"x" * 10_001 + bytes(39_999)
    files.again()
    assert files.read() == b"x" * 10_001 + bytes(39_999)


# --- power cuts -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("seed", range(20))
def test_power_cut_at_every_record(tmp_path: Path, seed: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """The map's log cut after each record, and in the middle of one, read after a reboot: what was synced is there,
    every other block is as it was or as it became, never anything else."""
    rng = random.Random(seed)
    blocks = 12
    base = b"".join(bytes([65 + i]) * BS for i in range(blocks))
    files = Files(tmp_path, base)
    synced = [base[i * BS : (i + 1) * BS] for i in range(blocks)]
    current = list(synced)
    synced_length = 0
    ever: list[set[bytes]] = [{block} for block in synced]
    for number in range(30):
        if rng.random() < 0.2:
            files.file.sync(True)
            synced = list(current)
            ever = [{block} for block in synced]
            synced_length = (tmp_path / "map").stat().st_size
            continue
        block = rng.randrange(blocks)
        if rng.random() < 0.25:
            files.file.fallocate(FALLOC_FL_PUNCH_HOLE | FALLOC_FL_KEEP_SIZE, block * BS, BS)
            current[block] = bytes(BS)
        else:
            current[block] = bytes([97 + number % 26]) * BS
            files.file.write_at(block * BS, current[block])
        ever[block].add(current[block])
    whole = (tmp_path / "map").read_bytes()
    upper = (tmp_path / "upper").read_bytes()
    monkeypatch.setattr("unionfs_drivers.row.blockmap.boot_hash", lambda: 7)
    cuts = [n for n in range(HEADER.size, len(whole) + 1, RECORD.size) if n >= synced_length]
    cuts += [n - 5 for n in cuts[1:]]
    for cut in cuts:
        (tmp_path / "map").write_bytes(whole[:cut])
        files.again()
        seen = files.read()
        for i in range(blocks):
            shown = seen[i * BS : (i + 1) * BS]
            # a block whose redirection is not believed shows what was synced; one that is, what the disk has of it
            assert shown in ever[i] | {base[i * BS : (i + 1) * BS]} if synced_length == 0 else shown in ever[i]
        (tmp_path / "upper").write_bytes(upper)


def test_damage_is_never_data(tmp_path: Path) -> None:
    files = Files(tmp_path, b"x" * 40_000)
    files.file.write_at(0, b"y" * 8192)
    files.file.sync(True)
    raw = bytearray((tmp_path / "map").read_bytes())
    for at in range(HEADER.size):
        damaged = bytearray(raw)
        damaged[at] ^= 0x40
        (tmp_path / "map").write_bytes(damaged)
        with pytest.raises(MapError):
            BlockMap.load(files.dir, "map", False)
    for at in range(HEADER.size, len(raw)):
        damaged = bytearray(raw)
        damaged[at] ^= 0x40
        (tmp_path / "map").write_bytes(damaged)
        found = BlockMap.load(files.dir, "map", False)
        assert not found.trusted
        assert {(a, b) for a, b, kind in found.extents.runs(0, 10) if kind} <= {(0, 2)}
        found.close()
