"""A disk that can lose power: records every write, truncation, hole and sync that the row driver makes, and rebuilds
what may be on the platter if the power goes at any of these points.

What was synced is there. Of what was not, any subset may be: each write in units of a page, each truncation or hole
as a whole, and later ones without earlier ones.
"""

from __future__ import annotations

import os
import random
from pathlib import Path
from typing import Any

from unionfs import sysio

PAGE = 4096


class RecordingOs:
    """The os module, with what changes a file recorded too. Put in place of `os` in the driver's modules."""

    def __init__(self) -> None:
        self.trace: list[tuple[str, str, Any]] = []  # (operation, file, arguments)

    def __getattr__(self, name: str) -> Any:
        return getattr(os, name)

    def _note(self, operation: str, fd: int, arguments: Any) -> None:
        self.trace.append((operation, os.path.basename(os.readlink(f"/proc/self/fd/{fd}")), arguments))

    def write(self, fd: int, data: bytes) -> int:
        at = os.fstat(fd).st_size  # maps are appended to
        done = os.write(fd, data)
        self._note("write", fd, (at, bytes(data[:done])))
        return done

    def pwrite(self, fd: int, data: bytes | memoryview, offset: int) -> int:
        done = os.pwrite(fd, data, offset)
        self._note("write", fd, (offset, bytes(data[:done])))
        return done

    def ftruncate(self, fd: int, size: int) -> None:
        os.ftruncate(fd, size)
        self._note("truncate", fd, size)

    def fsync(self, fd: int) -> None:
        os.fsync(fd)
        self._note("sync", fd, None)

    def fdatasync(self, fd: int) -> None:
        os.fdatasync(fd)
        self._note("sync", fd, None)


class RecordingSysio:
    """unionfs.sysio, likewise."""

    def __init__(self, recorder: RecordingOs) -> None:
        self._recorder = recorder

    def __getattr__(self, name: str) -> Any:
        return getattr(sysio, name)

    def fallocate(self, fd: int, mode: int, offset: int, length: int) -> None:
        sysio.fallocate(fd, mode, offset, length)
        if mode & sysio.FALLOC_FL_PUNCH_HOLE:
            self._recorder._note("zero", fd, (offset, min(offset + length, os.fstat(fd).st_size)))


def _apply(image: bytearray, operation: str, arguments: Any) -> None:
    if operation == "write":
        offset, data = arguments
        if len(image) < offset + len(data):
            image.extend(bytes(offset + len(data) - len(image)))
        image[offset : offset + len(data)] = data
    elif operation == "truncate":
        size = arguments
        del image[size:]
        image.extend(bytes(size - len(image)))
    else:
        start, stop = arguments
        stop = min(stop, len(image))
        if start < stop:
            image[start:stop] = bytes(stop - start)


def _pages(operation: str, arguments: Any) -> list[tuple[str, Any]]:
    """The parts of an operation that may reach the platter one without the other."""
    if operation != "write":
        return [(operation, arguments)]
    offset, data = arguments
    out: list[tuple[str, Any]] = []
    at = 0
    while at < len(data):
        n = min(PAGE - (offset + at) % PAGE, len(data) - at)
        out.append(("write", (offset + at, data[at : at + n])))
        at += n
    return out


def after_power_cut(
    start: dict[str, bytes], trace: list[tuple[str, str, Any]], rng: random.Random, keep: float
) -> dict[str, bytearray]:
    """The files as they may be after a cut at the end of `trace`; `keep`: the share of unsynced parts that survives."""
    images = {name: bytearray(data) for name, data in start.items()}
    for name, image in images.items():
        mine = [(operation, arguments) for operation, file, arguments in trace if file == name]
        synced = max((i for i, (operation, _) in enumerate(mine) if operation == "sync"), default=-1)
        for i, (operation, arguments) in enumerate(mine):
            if operation == "sync":
                continue
            for part in _pages(operation, arguments):
                if i < synced or rng.random() < keep:
                    _apply(image, *part)
    return images


def write_files(where: Path, images: dict[str, bytearray]) -> None:
    for name, image in images.items():
        (where / name).write_bytes(image)
