"""Reading a directory tree by path, whatever it is made of, and comparing two of them.

`DirTree` reads plain directories, `UnionTree` the merged view of a chain of layers (with no mount: the core answers
directly). Paths are bytes from the root: b"/", b"/a/b". Symlinks are never followed, in no component. Errors are
OSError; a tree is used by one thread.
"""

from __future__ import annotations

import errno
import os
import stat
from collections.abc import Callable, Iterator
from typing import NamedTuple, Protocol

from unionfs import assemble
from unionfs.api import Attr, MountConfig

CHUNK = 1 << 18
DIRECTORY = os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC

# "A" added, "C" changed, "D" deleted, and the path: as `Operations.diff` has them
Row = tuple[str, bytes]


class Stat(NamedTuple):
    mode: int
    uid: int
    gid: int
    size: int
    mtime_ns: int
    rdev: int
    nlink: int
    identity: tuple[int, int]  # the same for names of one inode


class Tree(Protocol):
    def stat(self, path: bytes) -> Stat | None: ...  # None: no such name
    def names(self, path: bytes) -> list[bytes]: ...
    def readlink(self, path: bytes) -> bytes: ...
    def xattrs(self, path: bytes) -> dict[str, bytes]: ...
    def chunks(self, path: bytes, size: int) -> Iterator[bytes]: ...  # exactly size bytes, zeros if it has shrunk
    def close(self) -> None: ...


class Walker:
    """Directories below a root as descriptors, one name at a time; remembers the last one."""

    def __init__(self, root: int) -> None:
        self.root = root  # owned
        self._at: list[bytes] = []
        self._fd = root

    def directory(self, parts: list[bytes]) -> int:
        """A descriptor that stays good until the next call. ENOENT; ENOTDIR or ELOOP where a part is no directory."""
        if parts == self._at:
            return self._fd
        known = len(self._at)
        if known and parts[:known] == self._at:
            fd, todo = os.dup(self._fd), parts[known:]
        else:
            fd, todo = os.dup(self.root), parts
        for name in todo:
            try:
                inner = os.open(name, DIRECTORY, dir_fd=fd)
            finally:
                os.close(fd)
            fd = inner
        self.forget()
        self._at, self._fd = list(parts), fd
        return fd

    def forget(self) -> None:
        if self._fd != self.root:
            os.close(self._fd)
        self._at, self._fd = [], self.root

    def close(self) -> None:
        self.forget()
        os.close(self.root)


def split(path: bytes) -> tuple[list[bytes], bytes]:
    """b"/a/b" → ([b"a"], b"b"); b"/" → ([], b".")."""
    parts = [part for part in path.split(b"/") if part]
    return (parts[:-1], parts[-1]) if parts else ([], b".")


class DirTree:
    def __init__(self, root: str | bytes) -> None:
        self._walker = Walker(os.open(root, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC))

    def _at(self, path: bytes) -> tuple[int, bytes]:
        parts, name = split(path)
        return self._walker.directory(parts), name

    def stat(self, path: bytes) -> Stat | None:
        try:
            fd, name = self._at(path)
            st = os.stat(name, dir_fd=fd, follow_symlinks=False)
        except OSError as error:
            if error.errno in (errno.ENOENT, errno.ENOTDIR, errno.ELOOP):
                return None
            raise
        identity = (st.st_dev, st.st_ino)
        return Stat(st.st_mode, st.st_uid, st.st_gid, st.st_size, st.st_mtime_ns, st.st_rdev, st.st_nlink, identity)

    def names(self, path: bytes) -> list[bytes]:
        fd, name = self._at(path)
        inner = os.open(name, DIRECTORY, dir_fd=fd)
        try:
            return os.listdir(b"/proc/self/fd/%d" % inner)
        finally:
            os.close(inner)

    def readlink(self, path: bytes) -> bytes:
        fd, name = self._at(path)
        return os.readlink(name, dir_fd=fd)

    def xattrs(self, path: bytes) -> dict[str, bytes]:
        fd, name = self._at(path)
        here = b"/proc/self/fd/%d/%s" % (fd, name)
        try:
            names = os.listxattr(here, follow_symlinks=False)
        except OSError as error:
            if error.errno == errno.EOPNOTSUPP:
                return {}
            raise
        return {key: os.getxattr(here, key, follow_symlinks=False) for key in names}

    def chunks(self, path: bytes, size: int) -> Iterator[bytes]:
        fd, name = self._at(path)
        # O_NONBLOCK: it may have become a fifo since the stat
        file = os.open(name, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC, dir_fd=fd)
        try:
            yield from _exactly(size, lambda offset, count: os.pread(file, count, offset))
        finally:
            os.close(file)

    def close(self) -> None:
        self._walker.close()


class UnionTree:
    """The merged view of layers as `config` has them, opened read-only. MountError if they can't be."""

    def __init__(self, config: MountConfig) -> None:
        config.read_only = True
        self.ops = assemble.prepare(config)
        self._at: list[bytes] = []
        self._node = 1
        self._last: tuple[bytes, tuple[int, Attr] | None] = (b"", None)  # stat, xattrs and data are asked in a row

    def _lookup(self, parent: int, name: bytes) -> tuple[int, Attr] | None:
        entry = self.ops.lookup(parent, name)
        return None if entry is None or entry[0] == 0 else (entry[0], entry[2])

    def _directory(self, parts: list[bytes]) -> int | None:
        if parts == self._at:
            return self._node
        known = len(self._at)
        node, todo = (self._node, parts[known:]) if parts[:known] == self._at else (1, parts)
        for name in todo:
            try:
                found = self._lookup(node, name)
            except FileNotFoundError:
                return None
            except NotADirectoryError:
                return None
            if found is None or not stat.S_ISDIR(found[1][9]):
                return None
            node = found[0]
        self._at, self._node = list(parts), node
        return node

    def _find(self, path: bytes) -> tuple[int, Attr] | None:
        if path == self._last[0] and path:
            return self._last[1]
        parts, name = split(path)
        parent = self._directory(parts)
        if parent is None:
            return None
        if name == b".":
            return 1, self.ops.getattr(1)
        try:
            found = self._lookup(parent, name)
        except FileNotFoundError:
            found = None
        self._last = path, found
        return found

    def _id(self, path: bytes) -> int:
        found = self._find(path)
        if found is None:
            raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), path)
        return found[0]

    def stat(self, path: bytes) -> Stat | None:
        found = self._find(path)
        if found is None:
            return None
        ino, size, _, _, mtime, _, _, mtime_ns, _, mode, nlink, uid, gid, rdev = found[1][:14]
        minor, major = rdev & 0xFF | rdev >> 12 & 0xFFF00, rdev >> 8 & 0xFFF  # new_encode_dev of the kernel
        mtime_ns += (mtime - (1 << 64) if mtime >> 63 else mtime) * 1_000_000_000
        return Stat(mode, uid, gid, size, mtime_ns, os.makedev(major, minor), nlink, (0, ino))

    def names(self, path: bytes) -> list[bytes]:
        node, cookie, found = self._id(path), 0, []
        while batch := self.ops.readdir(node, cookie, 1 << 16, 24):
            found += [entry[0] for entry in batch]
            cookie = batch[-1][1]
        return [name for name in found if name not in (b".", b"..")]

    def readlink(self, path: bytes) -> bytes:
        return self.ops.readlink(self._id(path))

    def xattrs(self, path: bytes) -> dict[str, bytes]:
        node = self._id(path)
        return {os.fsdecode(name): self.ops.getxattr(node, name) for name in self.ops.listxattr(node, 0)}

    def chunks(self, path: bytes, size: int) -> Iterator[bytes]:
        node = self._id(path)

        def read(offset: int, count: int) -> bytes:
            buffer = bytearray(count)
            return bytes(buffer[: self.ops.read(node, offset, memoryview(buffer))])

        yield from _exactly(size, read)

    def close(self) -> None:
        self.ops.stop()


def _exactly(size: int, read: Callable[[int, int], bytes]) -> Iterator[bytes]:
    offset = 0
    while offset < size:
        data = read(offset, min(CHUNK, size - offset))
        if not data:  # somebody cut it while we read: the member's size is already told
            data = bytes(min(CHUNK, size - offset))
        offset += len(data)
        yield data


def compare(new: Tree, old: Tree) -> list[Row]:
    """What makes `old` into `new`, by path. Files are the same if all but their content is: nobody reads them."""
    kinds: dict[bytes, str] = {}
    todo = [b""]
    while todo:
        path = todo.pop()
        names, was_there = set(new.names(path)), set(old.names(path))
        for name in was_there - names:
            kinds[path + b"/" + name] = "D"
        for name in names:
            here = path + b"/" + name
            now = new.stat(here)
            was = old.stat(here) if name in was_there else None
            if now is None:
                continue  # vanished while we looked
            if was is None or (stat.S_ISDIR(now.mode) and not stat.S_ISDIR(was.mode)):
                kinds[here] = "A" if was is None else "C"
                if stat.S_ISDIR(now.mode):
                    kinds.update((inner, kind) for kind, inner in _below(new, here))
            else:
                if _differ(new, now, old, was, here):
                    kinds[here] = "C"
                if stat.S_ISDIR(now.mode):
                    todo.append(here)
    for path in list(kinds):  # a directory with changes inside is a changed one
        while (path := path[: path.rindex(b"/")]) and path not in kinds:
            kinds[path] = "C"
    return sorted(((kind, path) for path, kind in kinds.items()), key=lambda row: row[1])


def everything(tree: Tree) -> list[Row]:
    """Each name of the tree as an addition."""
    return sorted(_below(tree, b""), key=lambda row: row[1])


def _below(tree: Tree, path: bytes) -> Iterator[Row]:
    todo = [path]
    while todo:
        directory = todo.pop()
        for name in tree.names(directory):
            here = directory + b"/" + name
            status = tree.stat(here)
            if status is not None:
                yield "A", here
                if stat.S_ISDIR(status.mode):
                    todo.append(here)


def _differ(new: Tree, a: Stat, old: Tree, b: Stat, path: bytes) -> bool:
    if (a.mode, a.uid, a.gid, a.rdev) != (b.mode, b.uid, b.gid, b.rdev):
        return True
    if not stat.S_ISDIR(a.mode) and (a.size, a.mtime_ns) != (b.size, b.mtime_ns):
        return True
    if stat.S_ISLNK(a.mode) and new.readlink(path) != old.readlink(path):
        return True
    return new.xattrs(path) != old.xattrs(path)
