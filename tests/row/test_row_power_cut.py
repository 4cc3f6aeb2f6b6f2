"""After a power cut at any point: what was synced is there, the rest is old or new byte by byte, never garbage.

Unlike test_rowfile.py's, these cuts lose any subset of the pages that were not synced, of the file and of its map.
"""

from __future__ import annotations

import os
import random
from pathlib import Path
from typing import Any

import pytest
from simulated_disk import RecordingOs, RecordingSysio, after_power_cut, write_files
from unionfs_drivers.row import blockmap, file
from unionfs_drivers.row.blockmap import Base, BlockMap
from unionfs_drivers.row.file import RowFile

from unionfs.core.base import OpenFile

BLOCK = 4096
SEEDS = int(os.environ.get("ROW_POWER_CUTS", "60"))


@pytest.fixture
def disk(monkeypatch: pytest.MonkeyPatch) -> RecordingOs:
    recorder = RecordingOs()
    monkeypatch.setattr(blockmap, "os", recorder)
    monkeypatch.setattr(file, "os", recorder)
    monkeypatch.setattr(file, "sysio", RecordingSysio(recorder))
    return recorder


def opened(where: Path, fresh: bool) -> RowFile:
    own = os.open(where / "own", os.O_RDWR)
    base = OpenFile(os.open(where / "base", os.O_RDONLY), False)
    st = os.fstat(base.n)
    below = Base(st.st_size, 0, 0)
    folder = os.open(where, os.O_RDONLY)
    try:
        if fresh:
            made = BlockMap.create(folder, "map", BLOCK, below)
        else:
            made = BlockMap.load(folder, "map", True, (BLOCK, below))
    finally:
        os.close(folder)
    return RowFile(own, True, base, made, "map")


def whole(f: RowFile) -> bytes:
    buffer = bytearray(os.fstat(f.n).st_size)
    assert f.read_at(0, memoryview(buffer)) == len(buffer)
    return bytes(buffer)


def mutate(f: RowFile, model: bytearray, rng: random.Random) -> None:
    """One random operation, on the file and on the model."""
    size = len(model)
    what = rng.randrange(10)
    if what < 6:
        offset = rng.randrange(size + 6000)
        data = bytes([rng.randrange(1, 256)]) * rng.choice((1, 100, BLOCK, 5000, 3 * BLOCK))
        if rng.random() < 0.4:
            offset = offset // BLOCK * BLOCK
        assert f.write_at(offset, memoryview(data)) == len(data)
        model.extend(bytes(max(0, offset + len(data) - size)))
        model[offset : offset + len(data)] = data
    elif what < 8:
        cut = rng.randrange(size + 9000)
        f.truncate(cut)
        del model[cut:]
        model.extend(bytes(cut - len(model)))
    else:
        start = rng.randrange(size + 1)
        stop = start + rng.randrange(1, 4 * BLOCK)
        f.fallocate(3, start, stop - start)
        stop = min(stop, size)
        model[start:stop] = bytes(max(0, stop - start))


@pytest.mark.parametrize("seed", range(SEEDS))
def test_power_cut(tmp_path: Path, disk: RecordingOs, monkeypatch: pytest.MonkeyPatch, seed: int) -> None:
    rng = random.Random(seed)
    base = rng.randbytes(rng.choice((70_000, 65_536, 81_921)))
    live = tmp_path / "live"
    live.mkdir()
    start = {"own": bytes(len(base)), "map": b"", "base": base}
    write_files(live, {name: bytearray(data) for name, data in start.items() if name != "map"})
    f = opened(live, True)
    model = bytearray(base)
    history = [bytes(model)]
    synced = 0  # index into history
    for _ in range(rng.randrange(1, 25)):
        if rng.random() < 0.25:
            f.sync(rng.random() < 0.5)
            synced = len(history) - 1
        else:
            mutate(f, model, rng)
            history.append(bytes(model))
            assert whole(f) == model
    trace = list(disk.trace)
    last_sync = max((i + 1 for i, row in enumerate(trace) if row[0] == "sync"), default=0)
    monkeypatch.setattr(blockmap, "boot_hash", lambda: 1)
    for cut in {len(trace), rng.randrange(last_sync, len(trace) + 1)}:
        for keep in (0.0, 0.5, 0.9, 1.0):
            check_cut(tmp_path, start, trace[:cut], history[synced:], random.Random(f"{seed} {cut} {keep}"), keep)
            monkeypatch.setattr(blockmap, "boot_hash", lambda: 1)


def check_cut(
    tmp_path: Path, start: dict[str, bytes], trace: list[Any], states: list[bytes], rng: random.Random, keep: float
) -> None:
    dead = tmp_path / f"dead{rng.randrange(1 << 60)}"
    dead.mkdir()
    write_files(dead, after_power_cut(start, trace, rng, keep))
    f = opened(dead, False)
    found = whole(f)
    if len(states) == 1:
        assert found == states[0]
    resized = len({len(state) for state in states}) > 1
    for at, byte in enumerate(found):
        allowed = {state[at] if at < len(state) else 0 for state in states}
        if resized:  # a length in between may have cut it, or grown over it
            allowed |= {0, *start["base"][at : at + 1]}
        assert byte in allowed, (at, byte, allowed, keep)
    model = bytearray(found)
    for _ in range(3):  # and it goes on from there
        mutate(f, model, rng)
        assert whole(f) == model
    f.sync(True)
    again = opened(dead, False)
    assert whole(again) == model
    again.write_at(0, memoryview(model))  # all of it redirected: the upper file alone is to show the same
    assert not again.needs_base()
    again.sync(True)
    again.truncate(len(model) + 5 * BLOCK)
    again.bare()
    assert (dead / "own").read_bytes() == model + bytes(5 * BLOCK)
