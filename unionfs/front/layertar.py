"""An OCI layer from a list of changes: AUFS whiteouts, hard links, PAX records for what ustar can't hold.

A directory that hides the one below is written with a whiteout for each name that it hides: the image spec asks for
explicit whiteouts. Reproducible: members in path order, no user names, no access times. No sockets, as everywhere.
"""

from __future__ import annotations

import os
import stat
import tarfile
from collections.abc import Sequence
from typing import IO

WHITEOUT = b".wh."
# The host's own labels; the next host has others.
SKIPPED_XATTRS = frozenset({"security.selinux", "security.ima", "security.evm"})
_NS = 10**9


def write_layer(root: bytes, changes: Sequence[tuple[str, bytes]], out: IO[bytes]) -> None:
    """`changes`: ("A" | "C" | "D", b"/path") as `Operations.diff` has them, below the directory `root`."""
    links: dict[tuple[int, int], str] = {}
    with tarfile.open(fileobj=out, mode="w|", format=tarfile.PAX_FORMAT, encoding="utf-8") as tar:
        for kind, path in sorted(changes, key=lambda change: change[1]):
            if kind == "D":
                parent, name = os.path.split(path)
                info = tarfile.TarInfo(_member(os.path.join(parent, WHITEOUT + name)))
                info.mode = 0o600
                tar.addfile(info)
            else:
                _add(tar, root, path, links)


def _member(path: bytes) -> str:
    return path.lstrip(b"/").decode("utf-8", "surrogateescape")


def _add(tar: tarfile.TarFile, root: bytes, path: bytes, links: dict[tuple[int, int], str]) -> None:
    full = root.rstrip(b"/") + path
    status = os.lstat(full)
    mode = status.st_mode
    if stat.S_ISSOCK(mode):
        return
    info = tarfile.TarInfo(_member(path) or ".")
    info.mode = stat.S_IMODE(mode)
    info.uid, info.gid = status.st_uid, status.st_gid
    headers: dict[str, str] = {}
    info.pax_headers = headers
    info.mtime = status.st_mtime_ns // _NS
    if status.st_mtime_ns % _NS:
        seconds, fraction = divmod(abs(status.st_mtime_ns), _NS)
        headers["mtime"] = f"{'-' if status.st_mtime_ns < 0 else ''}{seconds}.{fraction:09}"
    identity = (status.st_dev, status.st_ino)
    if not stat.S_ISDIR(mode) and status.st_nlink > 1:
        first = links.setdefault(identity, info.name)
        if first != info.name:
            info.type, info.linkname = tarfile.LNKTYPE, first
            tar.addfile(info)
            return
    for name in sorted(os.listxattr(full, follow_symlinks=False)):
        if name not in SKIPPED_XATTRS:
            value = os.getxattr(full, name, follow_symlinks=False)
            headers["SCHILY.xattr." + name] = value.decode("utf-8", "surrogateescape")
    if stat.S_ISREG(mode):
        with open(os.open(full, os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC), "rb") as stream:
            info.size = os.fstat(stream.fileno()).st_size
            tar.addfile(info, stream)
        return
    if stat.S_ISDIR(mode):
        info.type = tarfile.DIRTYPE
    elif stat.S_ISLNK(mode):
        info.type = tarfile.SYMTYPE
        info.linkname = os.readlink(full).decode("utf-8", "surrogateescape")
    elif stat.S_ISFIFO(mode):
        info.type = tarfile.FIFOTYPE
    else:
        info.type = tarfile.CHRTYPE if stat.S_ISCHR(mode) else tarfile.BLKTYPE
        info.devmajor, info.devminor = os.major(status.st_rdev), os.minor(status.st_rdev)
    tar.addfile(info)
