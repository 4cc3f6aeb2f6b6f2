"""What is mounted: /proc/self/mountinfo, and which of it is ours. Reads /proc only: a dead server can't hang it."""

from __future__ import annotations

import os

from unionfs.errors import EXIT_NOT_OURS, MountError
from unionfs.session.mount import show


class Mount:
    """One line of mountinfo that a FUSE server stands behind."""

    __slots__ = ("device", "fstype", "path", "source")

    def __init__(self, path: bytes, device: int, fstype: str, source: bytes) -> None:
        self.path = path
        self.device = device
        self.fstype = fstype
        self.source = source


def fuse_mounts() -> list[Mount]:
    """Every FUSE mount of this mount namespace, in mounting order."""
    found = []
    for line in _read_mountinfo():
        fields = line.split()
        separator = fields.index(b"-", 6)
        fstype = fields[separator + 1]
        if not fstype.startswith(b"fuse.") or fields[3] != b"/":
            continue
        major, _, minor = fields[2].partition(b":")
        device = os.makedev(int(major), int(minor))
        found.append(Mount(_decode(fields[4]), device, fstype.decode(), _decode(fields[separator + 2])))
    return found


def mount_of(path: str) -> tuple[Mount, bytes]:
    """The FUSE mount that holds `path`, and the path within it ("/" for the mountpoint itself).

    Symlinks are followed up to the last name, never there: `which` asks about links too. The mount is found by its
    path, so a name that a whiteout hides, or a server that is gone, is no obstacle.
    """
    full = os.fsencode(os.path.abspath(path))
    parent, name = os.path.split(full)
    full = os.path.join(os.path.realpath(parent), name) if name else full
    for candidate in (full, os.path.realpath(full)):
        best: Mount | None = None
        for mount in fuse_mounts():  # of mounts on one path the last covers the others
            inside = candidate == mount.path or candidate.startswith(mount.path.rstrip(b"/") + b"/")
            if inside and (best is None or len(mount.path) >= len(best.path)):
                best = mount
        if best is not None:
            return best, b"/" + candidate[len(best.path.rstrip(b"/")) :].lstrip(b"/")
    raise MountError(f"{show(os.fsencode(path))} is not on a unionfs mount (see unionfs list)", EXIT_NOT_OURS)


def _read_mountinfo() -> list[bytes]:
    with open("/proc/self/mountinfo", "rb") as stream:
        return stream.readlines()


def _decode(field: bytes) -> bytes:
    """Undoes mountinfo's octal escapes (space, tab, newline, backslash)."""
    if b"\\" not in field:
        return field
    first, *rest = field.split(b"\\")
    return first + b"".join(bytes([int(part[:3], 8)]) + part[3:] for part in rest)
