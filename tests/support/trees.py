"""Directory trees as values: `build` makes one on disk from a compact description, `snapshot` reads one back.

A description maps a relative path to what is there: str or bytes (a file with that content) or one of the
node types below. Missing parents are made. Every entry gets a fixed old mtime, so that a test sees at once when
somebody touched it. Names reach the disk one at a time through directory descriptors: a tree may be
deeper than PATH_MAX.
"""

from __future__ import annotations

import hashlib
import os
import socket
import stat
from dataclasses import dataclass, field
from typing import NamedTuple

OLD_NS = 1_500_000_000_123_456_789  # mtime of everything that `build` makes
BIG = 64 << 20  # of larger files, snapshots read the first and the last MiB


@dataclass
class F:
    """A regular file. `holes` is its length, with `content` at the start and the rest never allocated."""

    content: str | bytes = b""
    mode: int = 0o644
    uid: int = 0
    gid: int = 0
    xattrs: dict[str, bytes] = field(default_factory=dict)
    holes: int = 0


@dataclass
class D:
    mode: int = 0o755
    uid: int = 0
    gid: int = 0
    xattrs: dict[str, bytes] = field(default_factory=dict)


@dataclass
class L:
    """A symbolic link."""

    target: str | bytes
    uid: int = 0
    gid: int = 0


@dataclass
class Hard:
    """A further name of another entry of the same tree."""

    of: str


@dataclass
class Node:
    """A device, fifo or socket: `kind` is one of c b p s."""

    kind: str = "p"
    major: int = 0
    minor: int = 0
    mode: int = 0o644
    uid: int = 0
    gid: int = 0
    xattrs: dict[str, bytes] = field(default_factory=dict)


WHITEOUT = Node("c", 0, 0, 0)
Spec = str | bytes | F | D | L | Hard | Node
Tree = dict[str, Spec]
PREFIXES = ("trusted.", "user.")
KINDS = {"c": stat.S_IFCHR, "b": stat.S_IFBLK, "p": stat.S_IFIFO, "s": stat.S_IFSOCK}


def opaque(prefix: str = "trusted.overlay.", mode: int = 0o755) -> D:
    return D(mode, xattrs={prefix + "opaque": b"y"})


def in_aufs_format(tree: Tree) -> Tree:
    """The same tree with its whiteouts and opaque directories as aufs writes them."""
    out: Tree = {}
    for path, spec in tree.items():
        folder, slash, name = path.rpartition("/")
        if spec == WHITEOUT:
            out[f"{folder}{slash}.wh.{name}"] = F("", 0o444)
        elif isinstance(spec, D) and b"y" in (spec.xattrs.get(prefix + "overlay.opaque") for prefix in PREFIXES):
            kept = {key: value for key, value in spec.xattrs.items() if not key.endswith(".overlay.opaque")}
            out[path] = D(spec.mode, spec.uid, spec.gid, kept)
            out[f"{path}/.wh..wh..opq"] = F("", 0o444)
        else:
            out[path] = spec
    return out


def proc_path(dirfd: int, name: bytes | str) -> bytes:
    """A path that calls without a dir_fd parameter take."""
    return b"/proc/self/fd/%d/%s" % (dirfd, os.fsencode(name))


def open_dir(path: bytes | str, dirfd: int | None = None) -> int:
    return os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC, dir_fd=dirfd)


def build(root: str | bytes, tree: Tree, mtime_ns: int = OLD_NS) -> None:
    os.makedirs(root, exist_ok=True)
    made: list[bytes] = []
    for path, spec in tree.items():
        raw = os.fsencode(path).strip(b"/")
        made.append(raw)
        _make(os.fsencode(root), raw, spec)
    parents = {p.rsplit(b"/", i)[0] for p in made for i in range(p.count(b"/") + 1)} | {b"."}
    for raw in sorted(set(made) | parents, key=lambda p: (-p.count(b"/"), p == b".")):
        with _parent(os.fsencode(root), raw) as (dirfd, name):
            os.utime(name, ns=(mtime_ns, mtime_ns), dir_fd=dirfd, follow_symlinks=False)


class _parent:
    """Opens the directory that holds `path`, making what is missing, one name at a time."""

    def __init__(self, root: bytes, path: bytes) -> None:
        self.root, self.path = root, path

    def __enter__(self) -> tuple[int, bytes]:
        *dirs, name = self.path.split(b"/")
        fd = open_dir(self.root)
        for part in dirs:
            try:
                os.mkdir(part, 0o755, dir_fd=fd)
            except FileExistsError:
                pass
            below = open_dir(part, fd)
            os.close(fd)
            fd = below
        self.fd = fd
        return fd, name

    def __exit__(self, *_: object) -> None:
        os.close(self.fd)


def _make(root: bytes, path: bytes, spec: Spec) -> None:
    if isinstance(spec, str | bytes):
        spec = F(spec)
    with _parent(root, path) as (dirfd, name):
        if isinstance(spec, Hard):
            with _parent(root, os.fsencode(spec.of)) as (other, other_name):
                os.link(other_name, name, src_dir_fd=other, dst_dir_fd=dirfd, follow_symlinks=False)
            return
        if isinstance(spec, L):
            os.symlink(os.fsencode(spec.target), name, dir_fd=dirfd)
            os.chown(name, spec.uid, spec.gid, dir_fd=dirfd, follow_symlinks=False)
            return
        if isinstance(spec, F):
            fd = os.open(name, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o600, dir_fd=dirfd)
            content = spec.content.encode() if isinstance(spec.content, str) else spec.content
            os.write(fd, content)
            if spec.holes:
                os.ftruncate(fd, spec.holes)
            os.close(fd)
        elif isinstance(spec, D):
            try:
                os.mkdir(name, 0o700, dir_fd=dirfd)
            except FileExistsError:
                pass
        elif spec.kind == "s":
            with socket.socket(socket.AF_UNIX) as sock:
                sock.bind(proc_path(dirfd, name))
        else:
            os.mknod(name, KINDS[spec.kind] | 0o600, os.makedev(spec.major, spec.minor), dir_fd=dirfd)
        os.chown(name, spec.uid, spec.gid, dir_fd=dirfd)
        os.chmod(name, spec.mode, dir_fd=dirfd)
        for key, value in spec.xattrs.items():
            os.setxattr(proc_path(dirfd, name), key, value, follow_symlinks=False)


class Entry(NamedTuple):
    mode: int
    uid: int
    gid: int
    size: int  # 0 for directories: their size is the filesystem's own business
    nlink: int  # 0 for directories
    rdev: int
    mtime_ns: int
    xattrs: tuple[tuple[str, bytes], ...]
    content: str  # a digest, or a link's target


Snapshot = dict[bytes, Entry]


def snapshot(root: str | bytes, limit: int | None = None) -> Snapshot:
    """The whole tree below root, root itself as b".". More than `limit` entries raise OverflowError."""
    found: Snapshot = {}
    fd = open_dir(os.fsencode(root))
    try:
        found[b"."] = _entry(fd, b".")
        _walk(fd, b"", found, limit)
    finally:
        os.close(fd)
    return found


def _walk(dirfd: int, prefix: bytes, found: Snapshot, limit: int | None) -> None:
    for name in sorted(map(os.fsencode, os.listdir(dirfd))):
        entry = found[prefix + name] = _entry(dirfd, name)
        if limit is not None and len(found) > limit:
            raise OverflowError(f"more than {limit} entries")
        if stat.S_ISDIR(entry.mode):
            fd = open_dir(name, dirfd)
            try:
                _walk(fd, prefix + name + b"/", found, limit)
            finally:
                os.close(fd)


def _entry(dirfd: int, name: bytes) -> Entry:
    st = os.stat(name, dir_fd=dirfd, follow_symlinks=False)
    path = proc_path(dirfd, name)
    xattrs = []
    for key in sorted(os.listxattr(path, follow_symlinks=False)):
        xattrs.append((key, os.getxattr(path, key, follow_symlinks=False)))
    content = ""
    if stat.S_ISREG(st.st_mode):
        content = _digest(dirfd, name, st.st_size)
    elif stat.S_ISLNK(st.st_mode):
        content = os.fsdecode(os.readlink(name, dir_fd=dirfd))
    is_dir = stat.S_ISDIR(st.st_mode)
    return Entry(
        st.st_mode,
        st.st_uid,
        st.st_gid,
        0 if is_dir else st.st_size,
        0 if is_dir else st.st_nlink,
        st.st_rdev if stat.S_ISCHR(st.st_mode) or stat.S_ISBLK(st.st_mode) else 0,
        st.st_mtime_ns,
        tuple(xattrs),
        content,
    )


def _digest(dirfd: int, name: bytes, size: int) -> str:
    digest = hashlib.blake2b(digest_size=12)
    fd = os.open(name, os.O_RDONLY | os.O_NOFOLLOW, dir_fd=dirfd)
    try:
        if size > BIG:
            digest.update(os.pread(fd, 1 << 20, 0) + os.pread(fd, 1 << 20, size - (1 << 20)))
        else:
            while chunk := os.read(fd, 1 << 20):
                digest.update(chunk)
    finally:
        os.close(fd)
    return digest.hexdigest()


def differences(a: Snapshot, b: Snapshot, ignore: tuple[str, ...] = ()) -> list[str]:
    """What differs, one line each, at most twenty."""
    lines = []
    for path in sorted(a.keys() | b.keys()):
        left, right = a.get(path), b.get(path)
        if left is None or right is None:
            lines.append(f"{path!r}: only in {'the second' if left is None else 'the first'}")
            continue
        for key in Entry._fields:
            x, y = getattr(left, key), getattr(right, key)
            if x != y and key not in ignore:
                lines.append(f"{path!r}: {key}: {_show(key, x)} != {_show(key, y)}")
    return lines[:20]


def _show(key: str, value: object) -> str:
    return oct(value) if key == "mode" and isinstance(value, int) else repr(value)


def same_tree(a: str | bytes, b: str | bytes, ignore: tuple[str, ...] = ()) -> None:
    """Asserts that two trees agree in names, content, mode, owner, size, mtime, xattrs, targets, rdev and nlink."""
    found = differences(snapshot(a), snapshot(b), ignore)
    assert not found, "trees differ:\n" + "\n".join(found)
