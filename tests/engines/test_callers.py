"""Callers that are not installed here, by the exact commands that they run: containerd's fuse3 mounts, apptainer."""

from __future__ import annotations

import os
import signal
import subprocess
import time
from pathlib import Path

import pytest

from . import harness
from .conftest import needs


@pytest.fixture
def layers(scratch: Path) -> str:
    for name in ("lower", "upper", "work", "merged"):
        (scratch / name).mkdir()
    (scratch / "lower" / "file").write_text("lower\n")
    return f"lowerdir={scratch}/lower,upperdir={scratch}/upper,workdir={scratch}/work"


def use(scratch: Path) -> None:
    with open(scratch / "merged" / "file", "a") as stream:
        stream.write("upper\n")
    assert (scratch / "upper" / "file").read_text() == "lower\nupper\n"
    assert (scratch / "lower" / "file").read_text() == "lower\n"


@needs("mount.fuse3", "fusermount3")
def test_containerd_mounts_through_mount_fuse3(scratch: Path, mount_program: Path, layers: str) -> None:
    """Both outputs go into one pipe that containerd reads to its end: the server must not keep it open."""
    with subprocess.Popen(
        ["mount.fuse3", "overlay", scratch / "merged", "-o", layers, "-t", mount_program],
        stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
    ) as helper:
        out, _ = helper.communicate(timeout=60)
    assert helper.returncode == 0, out
    use(scratch)
    harness.run("fusermount3", "-u", scratch / "merged")
    harness.wait_until_clean(scratch)


def test_apptainer_keeps_it_in_the_foreground(scratch: Path, mount_program: Path, layers: str) -> None:
    merged = scratch / "merged"
    server = subprocess.Popen(
        [mount_program, "-f", "-o", f"allow_other,{layers},noacl", merged], stdin=subprocess.DEVNULL
    )
    try:
        deadline = time.monotonic() + 60
        while not os.path.ismount(merged):
            assert server.poll() is None and time.monotonic() < deadline
            time.sleep(0.02)
        use(scratch)
        harness.run("fusermount3", "-u", merged)
        assert server.wait(60) == 0
    finally:
        if server.poll() is None:
            server.send_signal(signal.SIGKILL)
            server.wait()
    harness.wait_until_clean(scratch)
