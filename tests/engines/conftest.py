"""Fixtures of the engine tests. They need root and the engines; scripts/test installs those.

UNIONFS_TEST_MOUNT_PROGRAM=/usr/bin/fuse-overlayfs runs them on another mount program: that is how the tests
themselves are shown to be right.
"""

from __future__ import annotations

import os
import shutil
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from . import harness


@pytest.fixture(autouse=True)
def _as_root() -> None:
    if os.geteuid():
        pytest.skip("container engines are tested as root")


@pytest.fixture(scope="session")
def mount_program() -> Path:
    named = os.environ.get("UNIONFS_TEST_MOUNT_PROGRAM")
    program = Path(named) if named else Path(sys.executable).with_name("unionfs-fuse-overlayfs")
    assert program.exists(), f"{program} is not there: install the project first"
    return program


@pytest.fixture(scope="session")
def debian() -> Path:
    if os.geteuid():
        pytest.skip("container engines are tested as root")
    return harness.debian_tarball()


@pytest.fixture
def scratch() -> Iterator[Path]:
    """A short path (sockets live below it), on the disk: an upper on tmpfs would need user.* xattrs there."""
    root = Path(tempfile.mkdtemp(prefix="unionfs-engine-", dir="/var/tmp"))
    root.chmod(0o755)
    try:
        yield root
    finally:
        harness.sweep(root)


def needs(*programs: str) -> pytest.MarkDecorator:
    absent = [name for name in programs if not shutil.which(name)]
    return pytest.mark.skipif(bool(absent), reason=f"not installed: {', '.join(absent)}")
