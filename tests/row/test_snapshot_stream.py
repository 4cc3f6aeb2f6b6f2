"""Differences between snapshots: listed, and sent from one mount to another."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

import pytest
from rowmount import MIB, UNIONFS, content, poke
from snapshots import Union, differences, populate, seen, snapshot, stages


@pytest.fixture
def pair(tmp_path: Path):  # type: ignore[no-untyped-def]
    """A mount to send from, and one to receive in: other uppers, the same lower."""
    source = Union(tmp_path)
    populate(source.lower)
    target = Union(tmp_path)
    target.session = "pyfuse3"
    target.upper, target.work, target.merged = (tmp_path / ("b-" + n) for n in ("upper", "work", "merged"))
    for path in (target.upper, target.merged):
        path.mkdir()
    source.mount()
    target.mount()
    yield source, target
    for union in (source, target):
        if os.path.ismount(union.merged):
            subprocess.run(["umount", "-l", union.merged], check=True)


def send(*words: object) -> bytes:
    return subprocess.run(
        [UNIONFS, "snapshot", "send", *map(str, words)], capture_output=True, check=True, timeout=60
    ).stdout


def receive(data: bytes, *words: object) -> subprocess.CompletedProcess[bytes]:
    return subprocess.run(
        [UNIONFS, "snapshot", "receive", *map(str, words)], input=data, capture_output=True, timeout=60
    )


def test_incremental_backup(pair: tuple[Union, Union]) -> None:
    source, target = pair
    states = stages(source)
    since: tuple[str, ...] = ()
    for name in ("s1", "s2", "s3"):
        done = receive(send(source.merged, *since, name), target.merged)
        assert done.returncode == 0, done.stderr
        assert not differences(seen(target.merged), states[name]), name
        since = (name,)
    for name in ("s1", "s2", "s3"):
        snapshot("rollback", target.merged, name)
        assert not differences(seen(target.merged), states[name]), name
    target.umount()
    assert target.fsck().returncode == 0


def test_only_changed_blocks_are_sent(pair: tuple[Union, Union]) -> None:
    source, target = pair
    big = source.merged / "big"
    poke(big, 0, b"1")
    snapshot("create", source.merged, "a")
    poke(big, 100_000, b"2")
    os.chmod(big, 0o600)
    snapshot("create", source.merged, "b")
    poke(big, 200_000, b"3")
    poke(big, 100_100, b"3")
    os.truncate(big, MIB - 10)
    snapshot("create", source.merged, "c")
    for words, most in ((("a",), 6000), (("a", "b"), 6000), (("b", "c"), 11_000), (("a", "c"), 11_000)):
        assert len(send(source.merged, *words)) < most + 1500, words
    for words in (("a",), ("a", "c")):
        assert receive(send(source.merged, *words), target.merged).returncode == 0
    model = content(MIB)
    model[0:1], model[100_000:100_001], model[200_000:200_001], model[100_100:100_101] = b"1", b"2", b"3", b"3"
    assert (target.merged / "big").read_bytes() == model[:-10]
    assert (target.merged / "big").stat().st_mode & 0o777 == 0o600


def test_listed(pair: tuple[Union, Union]) -> None:
    source, _ = pair
    m = source.merged
    stages(source)
    (m / "late").write_text("x")
    assert snapshot("diff", m, "s1", "s2").splitlines() == [
        "C /big", "D /dir", "A /dir2", "A /dir2/x", "A /dir2/y", "C /h1", "C /h2", "A /link", "C /new", "A /newlink",
        "D /small",
    ]  # fmt: skip
    assert snapshot("diff", m, "s3", "now").splitlines() == ["A /late"]
    assert snapshot("diff", m, "s3").splitlines() == ["A /late"]
    assert snapshot("diff", m, "s2", "s2") == ""
    against_lowers = subprocess.run([UNIONFS, "diff", m], capture_output=True, text=True, check=True, timeout=60).stdout
    assert "A /late" in against_lowers and "D /small" in against_lowers and "A /new" in against_lowers
    source.umount()
    assert snapshot("diff", source.upper, "s3", "now").splitlines() == ["A /late"]
    source.mount()


def test_damaged_streams_change_nothing(pair: tuple[Union, Union]) -> None:
    source, target = pair
    stages(source)
    whole = send(source.merged, "s1")
    before = seen(target.merged)
    for data, words in (
        (whole[: len(whole) // 2], b"ends too early"),
        (whole[:200] + bytes([whole[200] ^ 1]) + whole[201:], b"damaged"),
        (b"something else", b"ends too early"),
        (b"something else, that is long enough", b"no stream"),
        (whole.replace(b"stream 1", b"stream 2", 1), b"version 2"),
    ):
        done = receive(data, target.merged)
        assert done.returncode != 0 and words in done.stderr, done.stderr
        assert not differences(seen(target.merged), before)
        assert snapshot("list", target.merged) == ""
    assert b"send that first" in receive(send(source.merged, "s1", "s2"), target.merged).stderr
    assert receive(whole, target.merged).returncode == 0
    assert b"here already" in receive(whole, target.merged).stderr
    (target.merged / "own").write_text("x")
    step = send(source.merged, "s1", "s2")
    assert b"--force" in receive(step, target.merged).stderr
    assert receive(step, target.merged, "--force").returncode == 0
    assert not (target.merged / "own").exists()


def test_no_way_out_of_the_mount(pair: tuple[Union, Union], tmp_path: Path) -> None:
    from unionfs_drivers.row import stream

    _, target = pair
    os.symlink(tmp_path, target.merged / "link")
    receiver = stream.Receiver(os.fsencode(target.merged))
    for path in ("/../x", "/link/x", "x", "/a//b", "/."):
        with pytest.raises(Exception):  # noqa: B017 - MountError or OSError
            receiver.apply(stream.ENTRY, {"path": path, "mode": 0o100644, "size": 0, "fresh": True}, b"")
    assert not (tmp_path / "x").exists()
