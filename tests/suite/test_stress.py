"""Many processes at once, many names, many mounts: nothing lost, nothing twice, the tree the same afterwards."""

from __future__ import annotations

import os
import random

import pytest
from support.mounts import Maker, wait_for
from support.procs import errno_of, storm
from support.sys import EXCHANGE, renameat2
from support.trees import F, Hard


def test_parallel_creates(make_union: Maker) -> None:
    """1,000 files by ten processes in one directory and in their own."""
    u = make_union([{"d/low": "x"}])

    def work(number: int) -> None:
        os.mkdir(u / f"own{number}")
        for i in range(50):
            (u / f"d/{number}.{i}").write_text(f"{number} {i}")
            (u / f"own{number}/{i}").write_text("own")

    storm(10, work)
    assert len(os.listdir(u / "d")) == 501
    for number in range(10):
        assert len(os.listdir(u / f"own{number}")) == 50
        assert (u / f"d/{number}.49").read_text() == f"{number} 49"


def test_one_winner(make_union: Maker) -> None:
    """O_EXCL, mkdir, link, unlink and rmdir of one name by eight processes: exactly one succeeds each time."""
    u = make_union(
        [{f"low{i}": "x" for i in range(20)} | {f"dir{i}/.keep": "" for i in range(20)} | {"src": "s"}], compare=False
    )
    for i in range(20):
        os.unlink(u / f"dir{i}/.keep")

    def work(number: int) -> list[int]:
        wins = [0] * 5
        for i in range(20):
            wins[0] += not errno_of(lambda i=i: os.close(os.open(u / f"f{i}", os.O_CREAT | os.O_EXCL | os.O_WRONLY)))
            wins[1] += not errno_of(os.mkdir, u / f"d{i}")
            wins[2] += not errno_of(os.unlink, u / f"low{i}")
            wins[3] += not errno_of(os.rmdir, u / f"dir{i}")
            wins[4] += not errno_of(os.link, u / "src", u / f"l{i}")
        return wins

    results = storm(8, work)
    assert [sum(column) for column in zip(*results, strict=True)] == [20] * 5
    assert (u / "src").stat().st_nlink == 21


def test_copy_up_of_one_by_many(make_union: Maker) -> None:
    """One lower file, changed in every way by many at once: one copy, all changes in it."""
    u = make_union([{f"f{i}": F(b"-" * 1000) for i in range(5)} | {"big": F(b"-" * 3_000_000), "hard": Hard("f0")}])

    def work(number: int) -> None:
        for name in ("f0", "f1", "f2", "f3", "f4", "big", "hard"):
            fd = os.open(u / name, os.O_RDWR)
            os.pwrite(fd, b"%d" % number, number if name != "hard" else number + 20)
            os.close(fd)
            os.chmod(u / name, 0o660)
            os.setxattr(u / name, f"user.n{number}", b"%d" % number)
            os.utime(u / name, ns=(number, number))

    storm(8, work)
    for _ in range(2):
        for name in ("f1", "f2", "f3", "f4", "big"):
            assert (u / name).read_bytes()[:9] == b"01234567-", name
            assert len(os.listxattr(u / name)) == 8
        assert (u / "f0").read_bytes()[:30] == b"01234567" + b"-" * 12 + b"01234567--"
        assert (u / "hard").stat().st_ino == (u / "f0").stat().st_ino
        assert (u / "big").stat().st_size == 3_000_000
        u.remount()


def test_rename_storm(make_union: Maker) -> None:
    """Files and directories wander between directories by many hands: none is lost or doubled."""
    u = make_union(
        [{f"d{i}/f{i}.{j}": f"{i}.{j}" for i in range(4) for j in range(8)} | {f"d{i}/sub{i}/x": "x" for i in range(4)}]
    )
    before = sorted(name for i in range(4) for name in os.listdir(u / f"d{i}"))

    def work(number: int) -> int:
        rng = random.Random(number)
        done = 0
        for _ in range(150):
            source, target = rng.sample(range(4), 2)
            names = os.listdir(u / f"d{source}")
            if names:
                name = rng.choice(names)
                if rng.random() < 0.2:
                    done += not errno_of(renameat2, u / f"d{source}/{name}", u / f"d{target}/{name}", EXCHANGE)
                done += not errno_of(renameat2, u / f"d{source}/{name}", u / f"d{target}/{name}", 0)
        return done

    assert sum(storm(6, work)) > 100
    for _ in range(2):
        found = {name: u / f"d{i}" / name for i in range(4) for name in os.listdir(u / f"d{i}")}
        assert sorted(found) == before
        assert sorted(name for i in range(4) for name in os.listdir(u / f"d{i}")) == before
        for name, path in found.items():
            assert (path / "x").read_text() == "x" if name.startswith("sub") else path.read_text() == name[1:]
        u.remount()


def test_link_unlink_storm(make_union: Maker) -> None:
    u = make_union([{"src": "s", "low": Hard("src")}])

    def work(number: int) -> None:
        for i in range(60):
            os.link(u / "src", u / f"l{number}.{i}")
            if i % 2:
                os.unlink(u / f"l{number}.{i - 1}")
            os.chmod(u / f"l{number}.{i}", 0o600 + i % 2)

    storm(6, work)
    assert (u / "src").stat().st_nlink == 2 + 6 * 30
    assert len(os.listdir(u.merged)) == 2 + 6 * 30
    u.remount()
    assert (u / "src").stat().st_nlink == 2 + 6 * 30


def test_whiteouts_under_load(make_union: Maker) -> None:
    """Names of a lower are deleted and made anew while others list and stat."""
    u = make_union([{f"d/f{i}": "low" for i in range(40)} | {f"d/stay{i}": "low" for i in range(40)}])

    def work(number: int) -> None:
        rng = random.Random(number)
        for _ in range(120):
            name = (
                u / f"d/f{rng.randrange(number * 10, number * 10 + 10)}"
                if number < 4
                else u / f"d/f{rng.randrange(40)}"
            )
            if number < 4:
                if name.exists():
                    name.unlink()
                    assert errno_of(os.stat, name) == 2
                else:
                    name.write_text("new")
                    assert name.read_text() == "new"
            else:
                names = os.listdir(u / "d")
                assert len(names) == len(set(names))
                assert sum(n.startswith("stay") for n in names) == 40
                assert errno_of(os.stat, name) in (0, 2)

    storm(6, work)
    names = set(os.listdir(u / "d"))
    u.remount()
    assert set(os.listdir(u / "d")) == names


def test_mixed_storm_then_same_tree(make_union: Maker) -> None:
    """Everything at once in one tree; what is left is the same before and after remount, and for the kernel."""
    from support.trees import differences, snapshot

    u = make_union(
        [{f"d{i % 5}/f{i}": str(i) for i in range(60)}, {f"d{i % 5}/g{i}": str(i) for i in range(60)}], {"d0/up": "u"}
    )

    def work(number: int) -> None:
        rng = random.Random(number)
        for i in range(150):
            path = u / f"d{rng.randrange(5)}" / f"{rng.choice('fgn')}{rng.randrange(60)}"
            other = u / f"d{rng.randrange(5)}" / f"{rng.choice('fgn')}{rng.randrange(60)}"
            action = rng.randrange(9)
            calls = (
                lambda: path.write_text(f"{number}.{i}"),  # noqa: B023
                lambda: os.unlink(path),  # noqa: B023
                lambda: os.rename(path, other),  # noqa: B023
                lambda: os.link(path, other),  # noqa: B023
                lambda: os.mkdir(path),  # noqa: B023
                lambda: os.rmdir(path),  # noqa: B023
                lambda: os.chmod(path, 0o700 + rng.randrange(64)),  # noqa: B023
                lambda: os.symlink("x", path),  # noqa: B023
                lambda: renameat2(path, other, EXCHANGE),  # noqa: B023
            )
            assert errno_of(calls[action]) in (0, 2, 17, 20, 21, 22, 39, 1, 40, 18)

    storm(5, work)
    before = snapshot(u.merged)
    u.drop_caches()
    assert differences(before, snapshot(u.merged)) == []
    u.remount()
    assert differences(before, snapshot(u.merged)) == []


def test_mount_cycles(make_union: Maker) -> None:
    """Twenty cycles over one upper, each changing something."""
    u = make_union([{"f": "", "d/x": "x", "e/y": "y"}])
    for i in range(20):
        with open(u / "f", "a") as f:
            f.write(f"{i} ")
        os.rename(u / ("d" if i % 2 == 0 else "moved"), u / ("moved" if i % 2 == 0 else "d"))
        (u / f"new{i}").mkdir()
        if i > 2:
            os.rmdir(u / f"new{i - 2}")
        u.remount()
    assert (u / "f").read_text().split() == [str(i) for i in range(20)]
    assert sorted(os.listdir(u.merged)) == ["d", "e", "f", "new0", "new18", "new19"]
    assert (u / "d/x").read_text() == "x"


@pytest.mark.needs("ours")
def test_no_descriptor_leak(make_union: Maker) -> None:
    """The server's descriptors come back to where they were after thousands of operations that end."""
    u = make_union([{f"low{i}": "x" for i in range(100)}])

    def churn() -> None:
        for i in range(100):
            (u / f"f{i}").write_text("x")
            os.rename(u / f"f{i}", u / f"g{i}")
            with open(u / f"low{i}") as f:
                f.read()
            os.setxattr(u / f"g{i}", "user.x", b"")
            os.mkdir(u / f"d{i}")
            os.listdir(u / f"d{i}")
            os.rmdir(u / f"d{i}")
            os.unlink(u / f"g{i}")
            errno_of(os.stat, u / f"none{i}")
            errno_of(os.open, u / f"low{i}", os.O_CREAT | os.O_EXCL)

    before = u.server_fds()
    for _ in range(3):
        churn()
    u.drop_caches()
    wait_for(lambda: u.server_fds() <= before + 10, "FORGETs to close descriptors")
