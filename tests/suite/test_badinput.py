"""Mounts that can't be made: one line on stderr that names the path, an exit code by class, nothing changed."""

from __future__ import annotations

import os
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest
from support.mounts import Maker, Union, is_mounted, unionfs
from support.procs import USER
from support.trees import F, build, snapshot

pytestmark = pytest.mark.needs("ours")


@pytest.fixture
def place(make_union: Maker) -> Union:
    """Layers, not mounted."""
    return make_union([{"a": "1"}, {"b": "2"}], mount=False)


def refused(u: Union, code: int | tuple[int, ...], *argv: object, names: object = None, user: int | None = None) -> str:
    before = snapshot(u.base)
    as_user = {} if user is None else {"user": user, "group": user, "extra_groups": []}
    done = unionfs("mount", "--session", u.target.session, *argv, **as_user)
    codes = (code,) if isinstance(code, int) else code
    assert done.returncode in codes, done
    assert len(done.stderr.splitlines()) == 1, done.stderr
    assert "Traceback" not in done.stderr
    if names is not None:
        assert str(names) in done.stderr
    assert not is_mounted(u.merged)
    after = snapshot(u.base)
    assert after == before, "something was changed"
    return done.stderr


def test_missing_layers(place: Union) -> None:
    u = place
    none = u.base / "none"
    refused(u, 3, "--lower", none, "--upper", u.upper, "--work", u.work, u.merged, names=none)
    refused(u, 3, "--lower", f"{u.lowers[0]}:{none}", u.merged, names=none)
    refused(u, 3, "--lower", u.lowers[0], "--upper", none, "--work", u.work, u.merged, names=none)
    refused(u, 3, "--lower", u.lowers[0] / "a", "--upper", u.upper, "--work", u.work, u.merged, names=u.lowers[0] / "a")
    refused(u, 3, "--lower", u.lowers[0], "--upper", u.lowers[0] / "a", "--work", u.work, u.merged)
    refused(u, (2, 3), "--upper", u.upper, "--work", u.work, u.merged)
    refused(u, (2, 3), u.merged)


def test_overlapping_layers(place: Union) -> None:
    u = place
    low, other = u.lowers
    build(low, {"in/side/x": "x", "w": F("")})
    (low / "up").mkdir()
    (u.up / "low").mkdir()
    for lower, upper, work in (
        (low, low, u.work),
        (low, low / "up", u.work),
        (u.up / "low", u.upper, u.work),
        (low, u.upper, u.upper),
        (low, u.upper, u.up / "low"),
        (low, u.upper, low / "up"),
        (f"{low}:{low}", u.upper, u.work),
        (f"{low}:{low / 'in'}", u.upper, u.work),
        (f"{other}:{u.upper}", u.upper, u.work),
    ):
        refused(u, 3, "--lower", lower, "--upper", upper, "--work", work, u.merged)
    u.remember_lowers()


def test_overlap_through_symlink(place: Union) -> None:
    u = place
    (u.base / "alias").symlink_to(u.lowers[0])
    refused(u, 3, "--lower", u.lowers[0], "--upper", u.base / "alias", "--work", u.work, u.merged)


def test_work_elsewhere(disk: Callable[..., Path], place: Union) -> None:
    work = disk(4) / "work"
    work.mkdir()
    refused(place, 3, "--lower", place.lowers[0], "--upper", place.upper, "--work", work, place.merged)


def test_read_only_upper(disk: Callable[..., Path], place: Union) -> None:
    there = disk(4)
    for name in ("upper", "work"):
        (there / name).mkdir()
    subprocess.run(["mount", "-o", "remount,ro", there], check=True)
    refused(
        place, (3, 6), "--lower", place.lowers[0], "--upper", there / "upper", "--work", there / "work", place.merged
    )


def test_mountpoints(place: Union) -> None:
    u = place
    layers = ["--lower", u.lowers[0], "--upper", u.upper, "--work", u.work]
    refused(u, 5, *layers, u.base / "none", names=u.base / "none")
    refused(u, 5, *layers, u.lowers[0] / "a")
    (u.base / "full").mkdir()
    (u.base / "full/x").touch()
    refused(u, 5, *layers, u.base / "full", names=u.base / "full")
    refused(u, (3, 5), *layers, u.lowers[0])
    (u.up / "inside").mkdir()
    refused(u, (3, 5), *layers, u.up / "inside")


def test_unknown_words(place: Union) -> None:
    u = place
    layers = ["--lower", u.lowers[0], "--upper", u.upper, "--work", u.work]
    refused(u, 2, *layers, "--driver", "ovelray", u.merged, names="ovelray")
    refused(u, 2, *layers, "-o", "no_such_option", u.merged, names="no_such_option")
    refused(u, 2, *layers, "-o", "data=none", u.merged)
    refused(u, 2, *layers, "--session", "none", u.merged)
    refused(u, 2, *layers, "--frobnicate", u.merged)
    refused(u, 2, *layers)
    refused(u, 2, *layers, u.merged, u.merged)
    refused(u, 2, *layers, "-o", "uidmapping=nonsense", u.merged)


def test_too_many_lowers(place: Union) -> None:
    refused(place, (2, 3), "--lower", ":".join([str(place.lowers[0])] * 501), place.merged)


def test_no_permission(place: Union, ordinary_user: int) -> None:
    """An ordinary user with layers that are not theirs, or a mountpoint that is not."""
    u = place
    refused(u, (3, 6), "--lower", u.lowers[0], "--upper", u.upper, "--work", u.work, u.merged, user=ordinary_user)
    refused(u, (5, 6), "--lower", u.lowers[0], u.merged, user=ordinary_user)
    u.lowers[0].chmod(0o700)
    os.chown(u.merged, ordinary_user, ordinary_user)
    refused(u, (3, 6), "--lower", u.lowers[0], u.merged, user=ordinary_user, names=u.lowers[0])
    u.remember_lowers()


def test_no_fuse_device(place: Union) -> None:
    """In a mount namespace without /dev/fuse: exit code 7, and it says what to do."""
    script = 'mount -t tmpfs none /dev && mknod -m 666 /dev/null c 1 3 && exec "$@"'
    from support.mounts import UNIONFS

    u = place
    done = subprocess.run(
        [
            "unshare",
            "-m",
            "sh",
            "-c",
            script,
            "sh",
            UNIONFS,
            "mount",
            "--session",
            u.target.session,
            "--lower",
            u.lowers[0],
            "--upper",
            u.upper,
            "--work",
            u.work,
            u.merged,
        ],
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert done.returncode == 7, done
    assert len(done.stderr.splitlines()) == 1
    assert "/dev/fuse" in done.stderr


@pytest.mark.usefixtures("ordinary_user")
def test_user_without_account(place: Union) -> None:
    """A uid that no account has gets a clear refusal, no traceback."""
    done = unionfs("mount", "--lower", place.lowers[0], place.merged, user=USER, group=USER, extra_groups=[])
    assert "Traceback" not in done.stderr
    assert done.returncode in (5, 6), done
    assert not is_mounted(place.merged)
