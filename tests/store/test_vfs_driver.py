"""`unionfs mount --driver vfs`: a plain copy of the lowers, made by the first mount."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

UNIONFS = os.path.join(os.path.dirname(sys.executable), "unionfs")

pytestmark = pytest.mark.skipif(os.geteuid() != 0, reason="owners and devices need root")

Mount = Callable[..., "subprocess.CompletedProcess[str]"]


@pytest.fixture
def mount(tmp_path: Path) -> Iterator[Mount]:
    """mount("--read-only", upper="other"): lowers `top` over `base` on `merged`."""
    for name in ("top", "base", "upper", "merged"):
        (tmp_path / name).mkdir()

    def do(*options: str, upper: str = "upper", lower: str = "top:base") -> subprocess.CompletedProcess[str]:
        lowers = ":".join(str(tmp_path / name) for name in lower.split(":"))
        argv = [UNIONFS, "mount", "--driver", "vfs", "--lower", lowers, "--upper", tmp_path / upper, *options]
        return subprocess.run([*argv, tmp_path / "merged"], capture_output=True, text=True, timeout=120)

    yield do
    if os.path.ismount(tmp_path / "merged"):
        subprocess.run(["umount", tmp_path / "merged"], check=True)


def umount(tmp_path: Path) -> None:
    subprocess.run([UNIONFS, "umount", tmp_path / "merged"], check=True, timeout=60)


def test_copy_is_whole_and_then_alone(mount: Mount, tmp_path: Path) -> None:
    base, top, merged = tmp_path / "base", tmp_path / "top", tmp_path / "merged"
    (base / "d").mkdir(mode=0o751)
    (base / "d/old").write_text("o")
    (base / "d/gone").write_text("g")
    os.link(base / "d/old", base / "link")
    os.setxattr(base / "link", "user.note", b"n")
    (top / "d").mkdir(mode=0o750)
    os.mknod(top / "d/gone", 0o020000, 0)
    os.mknod(top / "null", 0o020666, os.makedev(1, 3))
    os.symlink("d/old", top / "sym")
    (top / "su").write_text("s")
    os.chown(top / "su", 1234, 4321)
    os.chmod(top / "su", 0o4755)
    with open(top / "hole", "wb") as stream:
        stream.truncate(8 << 20)
    os.utime(base / "d/old", ns=(10**18 + 5, 10**18 + 7))
    assert mount().returncode == 0
    assert sorted(os.listdir(merged)) == ["d", "hole", "link", "null", "su", "sym"]
    assert os.listdir(merged / "d") == ["old"] and (merged / "d").stat().st_mode & 0o777 == 0o750
    status = (merged / "d/old").stat()
    assert status.st_mtime_ns == 10**18 + 7 and status.st_ino == (merged / "link").stat().st_ino
    assert os.getxattr(merged / "d/old", "user.note") == b"n"
    assert (merged / "null").stat().st_rdev == os.makedev(1, 3) and os.readlink(merged / "sym") == "d/old"
    assert (merged / "su").stat().st_uid == 1234 and (merged / "su").stat().st_mode & 0o7777 == 0o4755
    assert (tmp_path / "upper/hole").stat().st_blocks < 100

    (merged / "d/old").unlink()
    (merged / "new").write_text("n")
    umount(tmp_path)
    (base / "late").write_text("too late")
    assert mount().returncode == 0
    assert sorted(os.listdir(merged)) == ["d", "hole", "link", "new", "null", "su", "sym"]
    assert os.listdir(merged / "d") == [] and (merged / "link").read_text() == "o"
    umount(tmp_path)
    assert sorted(os.listdir(tmp_path / "upper/d")) == []  # no whiteouts: nothing is below
    assert mount("--read-only").returncode == 0
    with pytest.raises(OSError, match="Read-only"):
        (merged / "x").write_text("")


def test_interrupted_copy_is_begun_anew(mount: Mount, tmp_path: Path) -> None:
    for number in range(40):
        (tmp_path / f"base/{number}").mkdir()
        (tmp_path / f"base/{number}/f").write_bytes(b"x" * 100_000)
    argv = [UNIONFS, "mount", "--driver", "vfs", "--lower", tmp_path / "base", "--upper", tmp_path / "upper"]
    with subprocess.Popen([*argv, tmp_path / "merged"], stderr=subprocess.DEVNULL) as process:
        while process.poll() is None and len(os.listdir(tmp_path / "upper")) < 5:
            time.sleep(0.001)
        process.kill()
    if os.path.ismount(tmp_path / "merged"):  # it was quicker
        umount(tmp_path)
    else:
        (tmp_path / "upper/half").mkdir()
        assert (tmp_path / "upper/.wh..wh.vfs").read_text() == "copying\n"
    assert mount().returncode == 0
    assert len(os.listdir(tmp_path / "merged")) == 40
    assert all((tmp_path / f"merged/{number}/f").stat().st_size == 100_000 for number in range(40))


def test_refusals(mount: Mount, tmp_path: Path) -> None:
    (tmp_path / "other").mkdir()
    (tmp_path / "other/file").write_text("mine")
    said = mount(upper="other")
    assert said.returncode == 8 and "not empty" in said.stderr
    said = mount("--read-only")
    assert said.returncode == 8 and "not copied yet" in said.stderr
    (tmp_path / "base/inside").mkdir()
    said = mount(upper="base/inside")
    assert said.returncode == 3 and "lies inside lower" in said.stderr
    assert os.listdir(tmp_path / "other") == ["file"] and os.listdir(tmp_path / "base/inside") == []
    argv = [UNIONFS, "mount", "--driver", "vfs", "--lower", tmp_path / "base", tmp_path / "merged"]
    said = subprocess.run(argv, capture_output=True, text=True, timeout=60)
    assert said.returncode == 2 and "give --upper" in said.stderr
