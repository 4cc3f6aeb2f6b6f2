"""Snapshots of a mounted row union: each is what was there, whatever happens afterwards."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
from pathlib import Path

import pytest
from rowmount import MIB, UNIONFS, content, poke
from snapshots import SESSIONS, Union, differences, populate, seen, snapshot, stages


@pytest.fixture(params=SESSIONS)
def row(tmp_path: Path, request: pytest.FixtureRequest):  # type: ignore[no-untyped-def]
    r = Union(tmp_path)
    r.session = request.param
    populate(r.lower)
    yield r
    for name in ("merged", "other"):
        if os.path.ismount(tmp_path / name):
            subprocess.run(["umount", "-l", tmp_path / name], check=True)


def test_each_shows_what_was_there(row: Union) -> None:
    row.mount()
    states = stages(row)
    row.remount()
    assert not differences(seen(row.merged), states["s3"])
    assert [s["name"] for s in json.loads(snapshot("list", "--json", row.merged))] == ["s1", "s2", "s3"]
    for name in ("s1", "s3", "s2"):
        poke(row.merged / next(n for n in ("big", "dir3/moved") if (row.merged / n).exists()), 9000, b"garbage")
        (row.merged / "garbage").write_text("1")
        snapshot("rollback", row.merged, name)
        assert not differences(seen(row.merged), states[name]), name
    row.remount()
    assert not differences(seen(row.merged), states["s2"])
    row.umount()
    assert row.fsck().returncode == 0, row.fsck()


def test_read_only_mount_of_a_snapshot(row: Union) -> None:
    row.mount()
    states = stages(row)
    row.umount()
    for name in ("s1", "s2", "s3"):
        row.mount("-o", f"ro,snapshot={name}")
        assert not differences(seen(row.merged), states[name]), name
        row.umount()


def test_clones_share_and_keep(row: Union) -> None:
    """A clone is what the snapshot was, changes by itself, and outlives the snapshot's deletion."""
    row.mount()
    states = stages(row)
    clone = Union(row.where)
    clone.upper, clone.work, clone.merged = row.where / "clone", row.where / "clone-work", row.where / "other"
    clone.merged.mkdir()
    clone.session = row.session
    snapshot("clone", row.merged, "s2", clone.upper)
    clone.mount()
    assert not differences(seen(clone.merged), states["s2"])
    poke(clone.merged / "big", 20, b"clone")
    (clone.merged / "dir2/new").write_text("n")
    changed = seen(clone.merged)
    assert not differences(seen(row.merged), states["s3"])
    snapshot("delete", row.merged, "s1", "s2", "s3")
    assert snapshot("list", row.merged) == ""
    snapshot("create", clone.merged, "own")
    poke(clone.merged / "big", 20, b"CLONE")
    snapshot("rollback", clone.merged, "own")
    clone.remount()
    assert not differences(seen(clone.merged), changed)
    assert not differences(seen(row.merged), states["s3"])
    row.umount()
    clone.umount()
    assert row.fsck().returncode == 0
    assert clone.fsck().returncode == 0
    shutil.rmtree(clone.upper)
    assert "not there any more" in row.fsck("--repair").stderr
    assert row.fsck().returncode == 0


def test_open_files_of_what_a_rollback_drops(row: Union) -> None:
    """They go on without a name, and nothing that is written to them comes back."""
    row.mount()
    snapshot("create", row.merged, "s")
    poke(row.merged / "big", 0, b"dropped")
    (row.merged / "fresh").write_text("fresh")
    with open(row.merged / "fresh", "r+b") as fresh, open(row.merged / "big", "r+b", buffering=0) as big:
        os.unlink(row.merged / "small")
        snapshot("rollback", row.merged, "s")
        assert not (row.merged / "fresh").exists()
        assert (row.merged / "small").read_text() == "small"
        assert (row.merged / "big").read_bytes() == content(MIB)
        assert fresh.read() == b"fresh"
        assert big.read(7) == b"dropped"
        big.seek(0)
        big.write(b"later")
        assert (row.merged / "big").read_bytes() == content(MIB)


def test_what_is_open_without_a_name_goes_on(row: Union) -> None:
    row.mount()
    (row.merged / "f").write_text("here")
    with open(row.merged / "f", "r+b", buffering=0) as plain, open(row.merged / "big", "r+b", buffering=0) as big:
        big.write(b"changed")
        os.unlink(row.merged / "f")
        os.unlink(row.merged / "big")
        snapshot("create", row.merged, "s")
        plain.write(b"HE")
        big.seek(8000)
        big.write(b"more")
        plain.seek(0)
        big.seek(0)
        assert plain.read() == b"HEre"
        model = content(MIB)
        model[:7], model[8000:8004] = b"changed", b"more"
        assert big.read() == model
    assert sorted(os.listdir(row.merged)) == ["dir", "h1", "h2", "small"]


def test_without_a_mount(row: Union) -> None:
    row.mount()
    states = stages(row)
    assert (
        "in use"
        in subprocess.run(
            [UNIONFS, "snapshot", "rollback", row.upper, "s1"], capture_output=True, text=True, timeout=60
        ).stderr
    )
    row.umount()
    snapshot("rollback", row.upper, "s1")
    snapshot("delete", row.upper, "s3")
    assert "mount it" in snapshot("create", row.upper, "x", ok=False)
    row.mount()
    assert not differences(seen(row.merged), states["s1"])
    snapshot("rollback", row.merged, "s2")
    assert not differences(seen(row.merged), states["s2"])
    row.umount()
    assert row.fsck().returncode == 0


def test_killed_server(row: Union) -> None:
    row.mount()
    states = stages(row)
    poke(row.merged / "dir3/moved", 40_000, b"after")
    last = seen(row.merged)
    os.kill(row.pid(), signal.SIGKILL)
    subprocess.run(["umount", "-l", row.merged], check=True)
    row.mount()
    assert not differences(seen(row.merged), last)
    for name, state in states.items():
        snapshot("rollback", row.merged, name)
        assert not differences(seen(row.merged), state), name
    row.umount()


def test_leftovers_of_a_crash(row: Union) -> None:
    """A layer that no chain names is of a snapshot that was not finished, or of one that was dropped."""
    row.mount()
    states = stages(row)
    row.umount()
    store = row.upper / ".wh..wh.row"
    (store / "layers/99/d").mkdir(parents=True)
    (store / "layers/99/d/f").write_text("x")
    (store / "chain.new").write_text("half")
    assert "belongs to no snapshot" in row.fsck().stderr
    row.mount()
    assert not differences(seen(row.merged), states["s3"])
    row.umount()
    (store / "layers/99").mkdir(exist_ok=True)
    row.fsck("--repair")
    assert row.fsck().returncode == 0
    assert not (store / "layers/99").exists()


def test_bad_input(row: Union) -> None:
    row.mount()
    snapshot("create", row.merged, "s")
    for words, expected in (
        (("create", row.merged, "s"), "exists already"),
        (("create", row.merged, "a/b"), "without /"),
        (("rollback", row.merged, "t"), "no snapshot 't'"),
        (("delete", row.merged, "t"), "no snapshot 't'"),
        (("clone", row.merged, "s", row.merged / "c"), "lies in the mount"),
        (("clone", row.merged, "s", row.upper / "c"), "inside the upper"),
        (("clone", row.merged, "s", row.lower), "give a new directory"),
        (("frobnicate", row.merged), "unknown verb"),
    ):
        assert expected in snapshot(*words, ok=False), words
    row.umount()
    chain = row.upper / ".wh..wh.row/chain"
    good = chain.read_bytes()
    for change, driver, words in (
        (good, "overlay", "row driver"),
        (good.replace(b'"top": 1', b'"top": 7'), "row", "checksum"),
        (good.replace(b" 1 ", b" 2 ", 1), "row", "version"),
        (b"garbage", "row", "no chain file"),
    ):
        chain.write_bytes(change)
        row.driver = driver
        done = row.try_mount()
        assert done.returncode == 8 and words in done.stderr, done
        assert row.fsck().returncode == (0 if change is good else 8)
    chain.write_bytes(good)
    row.mount()
    row.umount()


def test_a_read_only_mount_takes_none(row: Union) -> None:
    row.mount("-o", "ro")
    assert "read-only" in snapshot("create", row.merged, "s", ok=False)


def test_sparse_copy_of_an_upper_with_snapshots(row: Union) -> None:
    """Copied with its inode numbers, and a tool that knows nothing of us, each snapshot reads the same."""
    row.mount()
    states = stages(row)
    row.umount()
    copy = row.where / "copy"
    subprocess.run(["cp", "-a", "--sparse=always", row.upper, copy], check=True)
    shutil.move(row.upper, row.where / "away")
    shutil.move(copy, row.upper)
    row.mount()
    for name in ("s3", "s2", "s1"):
        snapshot("rollback", row.merged, name)
        shown = seen(row.merged)
        lost = differences(shown, states[name])
        assert lost <= {"h1", "h2", "new", "newlink"}, name  # hard links of lower files are known by inode numbers
