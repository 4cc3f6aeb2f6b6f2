from __future__ import annotations

import os
import subprocess
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest
from rowmount import Row


@pytest.fixture
def filesystem(tmp_path: Path) -> Iterator[Callable[[str, int], Path]]:
    """filesystem("xfs", MIB): a fresh filesystem of that kind and size, mounted."""
    with ExitStack() as stack:

        def make(kind: str, size: int) -> Path:
            place = tmp_path / f"fs-{kind}"
            place.mkdir()
            if kind == "tmpfs":
                argv = ["mount", "-t", "tmpfs", "-o", f"size={size}m", "tmpfs", place]
            else:
                image = tmp_path / f"{kind}.image"
                with open(image, "wb") as f:
                    f.truncate(size << 20)
                subprocess.run([f"mkfs.{kind}", "-q", image], check=True, timeout=120, capture_output=True)
                argv = ["mount", "-o", "loop", image, place]
            subprocess.run(argv, check=True, timeout=60)
            stack.callback(subprocess.run, ["umount", "-l", place], check=True, timeout=60)
            return place

        yield make


@pytest.fixture
def row(tmp_path: Path, filesystem: object) -> Iterator[Row]:
    """Unmounted before the filesystems that it may lie on."""
    r = Row(tmp_path)
    yield r
    if os.path.ismount(r.merged):
        subprocess.run(["umount", "-l", r.merged], check=True)
