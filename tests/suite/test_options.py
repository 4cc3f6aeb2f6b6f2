"""Mount options that change what people see."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from support.mounts import Maker
from support.procs import child, errno_of
from support.trees import D, F

pytestmark = pytest.mark.needs("ours")


def test_volatile(make_union: Maker) -> None:
    """fsync returns at once; everything works; a clean remount is allowed."""
    u = make_union([{"f": "f"}], options="volatile", compare=False)
    with open(u / "f", "a") as f:
        f.write("+")
        os.fsync(f.fileno())
    u.remount()
    assert (u / "f").read_text() == "f+"


def test_static_nlink(make_union: Maker) -> None:
    """Directories say 1 whatever they hold, as find(1) takes for `unknown`."""
    u = make_union([{"d/a/x": "", "d/b/y": ""}], options="static_nlink", compare=False)
    assert (u / "d").stat().st_nlink == 1
    os.mkdir(u / "d/c")
    assert (u / "d").stat().st_nlink == 1


def test_noxattrs(make_union: Maker) -> None:
    u = make_union([{"f": F("x", xattrs={"user.a": b"1"})}], options="noxattrs", compare=False)
    assert errno_of(os.getxattr, u / "f", "user.a") in (61, 95)
    assert errno_of(os.setxattr, u / "f", "user.b", b"") in (95, 1)
    with open(u / "f", "a") as f:
        f.write("y")
    assert (u / "f").read_text() == "xy"


def test_noatime_and_source(make_union: Maker) -> None:
    """Words for mount(2) and the name in the mount table arrive."""
    u = make_union([{"f": "x"}], options="noatime,fsname=my store")
    with open("/proc/self/mountinfo") as mounts:
        (line,) = [line for line in mounts if f" {u.merged} " in line]
    assert "noatime" in line
    assert "my\\040store" in line
    assert "fuse.unionfs" in line


def test_others_may_use_it(make_union: Maker) -> None:
    """A mount by root is for everybody, under the usual permission checks."""
    u = make_union([{"f": "x", "d": D(0o700), "open": D(0o777)}])
    assert child(lambda: (u / "f").read_text(), uid=12345) == "x"
    assert child(errno_of, os.listdir, u / "d", uid=12345) == 13
    child(lambda: (u / "open/n").write_text("n"), uid=12345)


@pytest.mark.needs("kernel_format")
def test_redirects_off(make_union: Maker) -> None:
    """redirect_dir=off: renaming a lower directory is EXDEV, which mv copes with; own directories still move."""
    u = make_union([{"d/x": "x"}], options="redirect_dir=off")
    assert errno_of(os.rename, u / "d", u / "e") == 18
    os.mkdir(u / "own")
    os.rename(u / "own", u / "moved")
    assert sorted(os.listdir(u.merged)) == ["d", "moved"]


@pytest.mark.needs("kernel_format")
def test_metacopy_off(make_union: Maker) -> None:
    u = make_union([{"f": F(b"x" * 100_000)}], options="metacopy=off")
    os.chmod(u / "f", 0o600)
    assert (u.up / "f").stat().st_blocks * 512 >= 100_000
    assert "trusted.overlay.metacopy" not in os.listxattr(u.up / "f")


def test_log_file(make_union: Maker, tmp_path: Path) -> None:
    """log=FILE takes the server's messages, of which there are none here (libfuse may have its own)."""
    u = make_union([{"f": "x"}], options=f"log={tmp_path / 'log'}")
    (u / "f").read_text()
    u.umount()
    assert [line for line in (tmp_path / "log").read_text().splitlines() if not line.startswith("fuse_")] == []
