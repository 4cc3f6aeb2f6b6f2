"""An OCI layer from a list of changes: AUFS whiteouts, hard links, PAX records for what ustar can't hold.

A directory that hides the one below is written with a whiteout for each name that it hides: the image spec asks for
explicit whiteouts. Reproducible: members in path order, no user names, no access times. No sockets, as everywhere.
"""

from __future__ import annotations

import os
import stat
import tarfile
from collections.abc import Iterable, Iterator

from unionfs.store.tree import Row, Stat, Tree

WHITEOUT = b".wh."
# The host's own labels; the next host has others.
SKIPPED_XATTRS = frozenset({"security.selinux", "security.ima", "security.evm"})
_NS = 10**9
_END = bytes(1024)


def layer_tar(tree: Tree, changes: Iterable[Row]) -> Iterator[bytes]:
    """The uncompressed archive in pieces. A name that vanished since it was listed is left out."""
    links: dict[tuple[int, int], str] = {}
    for kind, path in sorted(changes, key=lambda change: change[1]):
        if kind == "D":
            parent, name = os.path.split(path)
            info = tarfile.TarInfo(_member(os.path.join(parent, WHITEOUT + name)))
            info.mode = 0o600
            yield _header(info)
        else:
            status = tree.stat(path)
            if status is not None and not stat.S_ISSOCK(status.mode):
                yield from _entry(tree, path, status, links)
    yield _END


def tar_size(tree: Tree, changes: Iterable[Row]) -> int:
    """Bytes of the regular files that `layer_tar` would write."""
    total, seen = 0, set()
    for kind, path in changes:
        status = tree.stat(path) if kind != "D" else None
        if status is not None and stat.S_ISREG(status.mode) and status.identity not in seen:
            seen.add(status.identity)
            total += status.size
    return total


def _member(path: bytes) -> str:
    return path.lstrip(b"/").decode("utf-8", "surrogateescape") or "."


def _header(info: tarfile.TarInfo) -> bytes:
    return info.tobuf(tarfile.PAX_FORMAT, "utf-8", "surrogateescape")


def _entry(tree: Tree, path: bytes, status: Stat, links: dict[tuple[int, int], str]) -> Iterator[bytes]:
    mode = status.mode
    info = tarfile.TarInfo(_member(path))
    info.mode = stat.S_IMODE(mode)
    info.uid, info.gid = status.uid, status.gid
    headers: dict[str, str] = {}
    info.pax_headers = headers
    info.mtime = status.mtime_ns // _NS
    if status.mtime_ns % _NS:
        seconds, fraction = divmod(abs(status.mtime_ns), _NS)
        headers["mtime"] = f"{'-' if status.mtime_ns < 0 else ''}{seconds}.{fraction:09}"
    if not stat.S_ISDIR(mode) and status.nlink > 1:
        first = links.setdefault(status.identity, info.name)
        if first != info.name:
            info.type, info.linkname = tarfile.LNKTYPE, first
            yield _header(info)
            return
    for name, value in sorted(tree.xattrs(path).items()):
        if name not in SKIPPED_XATTRS:
            headers["SCHILY.xattr." + name] = value.decode("utf-8", "surrogateescape")
    if stat.S_ISREG(mode):
        info.size = status.size
        yield _header(info)
        yield from tree.chunks(path, info.size)
        if info.size % tarfile.BLOCKSIZE:
            yield bytes(-info.size % tarfile.BLOCKSIZE)
        return
    if stat.S_ISDIR(mode):
        info.type = tarfile.DIRTYPE
    elif stat.S_ISLNK(mode):
        info.type = tarfile.SYMTYPE
        info.linkname = tree.readlink(path).decode("utf-8", "surrogateescape")
    elif stat.S_ISFIFO(mode):
        info.type = tarfile.FIFOTYPE
    else:
        info.type = tarfile.CHRTYPE if stat.S_ISCHR(mode) else tarfile.BLKTYPE
        info.devmajor, info.devminor = os.major(status.rdev), os.minor(status.rdev)
    yield _header(info)
