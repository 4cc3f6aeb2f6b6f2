"""Layers and their directories, reached by descriptor, one name at a time.

`LDir` is a directory in one layer. It remembers its parent and name, so a descriptor that was closed to stay within
the limit is opened again by walking down from the nearest open ancestor, never through a symlink and never by a joined
path (so no PATH_MAX, and no way out of the layer). Descriptors close when nothing refers to them any more: a thread
that uses one holds the `Fd`.
"""

from __future__ import annotations

import errno
import os
import weakref
from collections import deque

TYPE_CHECKING = False
if TYPE_CHECKING:
    from unionfs.core.watches import Watch

_DIR_FLAGS = os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC
_PATH_FLAGS = os.O_PATH | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC


class Fd:
    """An owned descriptor: closed when the last reference goes (CPython counts them), so never under a user's feet."""

    __slots__ = ("n",)

    def __init__(self, n: int) -> None:
        self.n = n

    def __del__(self) -> None:
        try:
            os.close(self.n)
        except OSError:
            pass


class Layer:
    """One branch of the union; index 0 is the topmost."""

    __slots__ = ("attrs", "dev", "frozen", "index", "path", "permission", "root", "st_dev", "uuid", "work", "writable")

    def __init__(self, index: int, path: bytes, writable: bool, cache: FdCache) -> None:
        self.index = index
        self.path = path
        self.writable = writable
        self.permission = "rw" if writable else "ro"
        self.frozen = False  # written by a mount until a snapshot was taken; it is never written again
        self.attrs: frozenset[str] = frozenset()
        fd = Fd(os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC))
        self.root = LDir(self, None, b"", cache)
        self.root.fd = fd
        self.st_dev = os.fstat(fd.n).st_dev
        self.uuid: bytes | None = None  # read at the first use
        self.work: LDir | None = None  # where entries are built before they are published; writable layers only

    def __repr__(self) -> str:
        return f"<Layer {self.index} {os.fsdecode(self.path)}={self.permission}>"


class LDir:
    """A directory in a layer. `fd` may be None (closed); `open()` always gives one."""

    __slots__ = ("__weakref__", "cache", "fd", "impure", "layer", "name", "parent", "watch", "xwhiteouts")

    def __init__(self, layer: Layer, parent: LDir | None, name: bytes, cache: FdCache) -> None:
        self.layer = layer
        self.parent = parent
        self.name = name
        self.cache = cache
        self.fd: Fd | None = None
        self.watch: Watch | None = None  # lives as long as this object
        self.xwhiteouts = False  # may hold xattr whiteouts (overlay.opaque=x)
        self.impure: bool | None = None  # holds copied-up entries (overlay.impure); None: not read yet

    def child(self, name: bytes) -> LDir:
        return LDir(self.layer, self, name, self.cache)

    def open(self) -> Fd:
        """The directory's descriptor. ENOENT or ENOTDIR if the layer changed behind our back."""
        fd = self.fd
        if fd is not None:
            return fd
        chain = [self]
        up = self.parent
        while up is not None and up.fd is None:
            chain.append(up)
            up = up.parent
        if up is None:
            raise OSError(errno.ESTALE, "layer is gone")
        held = up.fd
        for ldir in reversed(chain):
            if held is None:  # closed by another thread between the walk up and here
                return self.open()
            try:
                n = os.open(ldir.name, _DIR_FLAGS, dir_fd=held.n)
            except PermissionError:
                n = os.open(ldir.name, _PATH_FLAGS, dir_fd=held.n)
            held = ldir.fd = Fd(n)
            self.cache.opened(ldir)
        assert held is not None
        return held

    def path(self) -> bytes:
        """The path below the layer's root, starting with a slash; for people and xattrs, not for system calls."""
        parts = []
        here: LDir | None = self
        while here is not None and here.parent is not None:
            parts.append(here.name)
            here = here.parent
        return b"/" + b"/".join(reversed(parts))


class FdCache:
    """Bounds how many layer directories are open at once: first opened, first closed. The roots are not counted."""

    def __init__(self, limit: int) -> None:
        self.limit = limit
        self.queue: deque[weakref.ref[LDir]] = deque()  # weak: a directory that nobody knows any more closes at once

    def opened(self, ldir: LDir) -> None:
        queue = self.queue
        queue.append(weakref.ref(ldir))
        while len(queue) > self.limit:
            try:
                oldest = queue.popleft()()
            except IndexError:
                return
            if oldest is not None:
                oldest.fd = None

    def __len__(self) -> int:
        return sum(1 for entry in list(self.queue) if (ldir := entry()) is not None and ldir.fd is not None)


def fd_path(fd: Fd, name: bytes = b"") -> bytes:
    """A path for the calls that know no dirfd (xattrs): resolves through the descriptor, then one name."""
    return b"/proc/self/fd/%d/%s" % (fd.n, name) if name else b"/proc/self/fd/%d" % fd.n
