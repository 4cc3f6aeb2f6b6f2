"""The marks that overlayfs and its relatives leave in xattrs: read in every spelling, written in the kernel's.

Directories: opaque, redirect, impure. Files: origin, metacopy, redirect, nlink; and two of our own, for what the
kernel has no mark for. `OverlayMarks` is the part of the overlay driver that knows them.
"""

from __future__ import annotations

import errno
import os

from unionfs.api import MountConfig
from unionfs.core.driver import NO_MARKS, Driver, FileMarks, Marks
from unionfs.core.layers import Fd, Layer, LDir, fd_path

from . import origin

WH_OPAQUE = b".wh..wh..opq"
PREFIXES = ("trusted.overlay.", "user.overlay.")
_FUSE_OVERLAYFS = "user.fuseoverlayfs."
_INO = "unionfs.ino"
_NESTED = "unionfs.whiteout"


class OverlayMarks(Driver):
    def __init__(self, config: MountConfig) -> None:
        super().__init__(config)
        self.prefix = PREFIXES[0]
        self.has_xattrs = True
        self.redirects = False
        self.ino_bases: dict[int, int] = {}
        self.index_entries: set[bytes] = set()
        self._index: LDir | None = None

    # --- reading ---

    def marks(self, ldir: LDir) -> Marks:
        fd = ldir.open()
        opaque = False
        redirect: bytes | None = None
        impure = False
        for name in self._dir_xattrs(fd):
            key = _key(name)
            if key == "opaque":
                value = os.getxattr(fd_path(fd), name)
                if value == b"x":
                    ldir.xwhiteouts = True
                elif value == b"y":
                    opaque = True
            elif key == "redirect":
                redirect = os.getxattr(fd_path(fd), name)
            elif key == "impure":
                impure = True
        ldir.impure = impure
        if not opaque and os.access(WH_OPAQUE, os.F_OK, dir_fd=fd.n, follow_symlinks=False):
            opaque = True
        return Marks(opaque, redirect) if opaque or redirect is not None else NO_MARKS

    def _dir_xattrs(self, fd: Fd) -> list[str]:
        """By descriptor, a quarter of the cost of a path through /proc, which an O_PATH one needs."""
        try:
            return os.listxattr(fd.n)
        except OSError as e:
            if e.errno == errno.EBADF:
                return self._listxattr(fd_path(fd), True)
            if e.errno in (errno.EOPNOTSUPP, errno.ENOSYS):
                return []
            raise

    @staticmethod
    def _listxattr(path: bytes, follow: bool) -> list[str]:
        try:
            return os.listxattr(path, follow_symlinks=follow)
        except OSError as e:
            if e.errno in (errno.EOPNOTSUPP, errno.ENOSYS):
                return []
            raise

    def file_marks(self, ldir: LDir, name: bytes) -> FileMarks | None:
        if ldir.impure is None:
            self.marks(ldir)
        if not ldir.impure:
            return None
        fd = ldir.open()
        path = fd_path(fd, name)
        marks: FileMarks | None = None
        entry: bytes | None = None
        for xattr in self._listxattr(path, False):
            key = _key(xattr)
            if key is None:
                continue
            if marks is None:
                marks = FileMarks()
            value = os.getxattr(path, xattr, follow_symlinks=False)
            if key == _INO:
                marks.ino = int(value)
            elif key == "origin":
                entry = value.hex().encode()
                if marks.ino is None:
                    marks.ino = origin.shown_ino(value, self.layers, self.ino_bases)
            elif key == "metacopy":
                marks.metacopy = True
            elif key == "redirect":
                marks.redirect = value
            elif key == "nlink":
                marks.index_delta = _nlink_delta(value, b"U")
                marks.lower_delta = _nlink_delta(value, b"L")
            elif key == _NESTED:
                marks.nested_whiteout = True
        if marks is not None and entry in self.index_entries_of(ldir.layer):
            marks.index = entry
        return marks

    @staticmethod
    def _xattr_whiteout(ldir: LDir, name: bytes) -> bool:
        names = os.listxattr(fd_path(ldir.open(), name), follow_symlinks=False)
        return any(prefix + "whiteout" in names for prefix in PREFIXES)

    # --- writing ---

    def set_opaque(self, ldir: LDir, name: bytes) -> None:
        path = fd_path(ldir.open(), name)
        if self.has_xattrs:
            os.setxattr(path, self.prefix + "opaque", b"y", follow_symlinks=False)
        else:
            os.close(os.open(path + b"/" + WH_OPAQUE, os.O_CREAT | os.O_WRONLY | os.O_CLOEXEC, 0o600))

    def set_redirect(self, ldir: LDir, name: bytes, path: bytes) -> None:
        if not self.redirects:
            super().set_redirect(ldir, name, path)
        os.setxattr(fd_path(ldir.open(), name), self.prefix + "redirect", path, follow_symlinks=False)

    def mark_copy(self, path: bytes | int, source: LDir, name: bytes, ino: int, follow: bool) -> None:
        if not self.has_xattrs:
            return
        shown: int | None = None
        try:
            value = origin.encode(source, name)
            os.setxattr(path, self.prefix + "origin", value, follow_symlinks=follow)
            shown = origin.shown_ino(value, self.layers, self.ino_bases)
        except OSError as e:
            if e.errno not in (errno.EOPNOTSUPP, errno.EPERM, errno.EOVERFLOW):
                raise
            if not follow:  # a symlink or device of an ordinary user can't have user.* xattrs
                return
        if shown != ino:
            os.setxattr(path, self.prefix + _INO, b"%d" % ino, follow_symlinks=follow)

    def mark_impure(self, ldir: LDir) -> None:
        if self.has_xattrs:
            os.setxattr(fd_path(ldir.open()), self.prefix + "impure", b"y")
            ldir.impure = True

    def mark_metacopy(self, path: bytes | int, redirect: bytes, follow: bool) -> None:
        os.setxattr(path, self.prefix + "redirect", redirect, follow_symlinks=follow)
        os.setxattr(path, self.prefix + "metacopy", b"", follow_symlinks=follow)

    def clear_metacopy(self, fd: int) -> None:
        for prefix in PREFIXES:
            for key in ("metacopy", "redirect"):
                try:
                    os.removexattr(fd, prefix + key)
                except OSError as e:
                    if e.errno not in (errno.ENODATA, errno.EPERM, errno.EOPNOTSUPP):
                        raise

    def mark_nested_whiteout(self, fd: int) -> None:
        os.setxattr(fd, self.prefix + _NESTED, b"y")

    # --- hard links over copy-up ---

    def index_dir(self, layer: Layer) -> LDir | None:
        return self._index

    def index_entries_of(self, layer: Layer) -> set[bytes]:
        return self.index_entries

    def index_name(self, source: LDir, name: bytes, st: os.stat_result) -> bytes | None:
        return origin.index_name(source, name)

    def index_find(self, source: LDir, name: bytes, st: os.stat_result) -> tuple[LDir, bytes] | None:
        if not self.index_entries or self._index is None:
            return None
        entry = self.index_name(source, name, st)
        return (self._index, entry) if entry is not None and entry in self.index_entries else None

    def index_added(self, index: LDir, entry: bytes) -> None:
        self.index_entries.add(entry)

    def index_removed(self, index: LDir, entry: bytes) -> None:
        self.index_entries.discard(entry)

    def set_nlink_delta(self, path: bytes, delta: int, of_lower: bool = False) -> None:
        value = (b"L%+d" if of_lower else b"U%+d") % delta
        os.setxattr(path, self.prefix + "nlink", value, follow_symlinks=b"/" not in path[14:])

    # --- users' xattrs ---

    def xattr_in(self, name: bytes) -> bytes | None:
        """A user's own overlay marks (of an overlay stacked on this mount) are escaped as the kernel does it."""
        for prefix in (b"trusted.overlay.", b"user.overlay."):
            if name.startswith(prefix):
                return prefix + b"overlay." + name[len(prefix) :]
        return None if _foreign(name) else name

    def xattr_out(self, name: str) -> bytes | None:
        for prefix in PREFIXES:
            if name.startswith(prefix):
                rest = name[len(prefix) :]
                return os.fsencode(prefix + rest[8:]) if rest.startswith("overlay.") else None
        shown = os.fsencode(name)
        return None if _foreign(shown) else shown


def _key(name: str) -> str | None:
    """The overlay mark that an xattr is, None for users' own."""
    for prefix in (*PREFIXES, _FUSE_OVERLAYFS):
        if name.startswith(prefix):
            key = name[len(prefix) :]
            return None if key.startswith(("overlay.", "security.")) else key
    return None


def _nlink_delta(value: bytes, kind: bytes) -> int | None:
    text = value[1:].decode("ascii", "replace")
    if value[:1] == kind and text[:1] in "+-" and text[1:].isdigit():
        return int(text)
    return None


def _foreign(name: bytes) -> bool:
    """fuse-overlayfs's own marks, but not the container xattrs that it keeps apart under its name."""
    prefix = _FUSE_OVERLAYFS.encode()
    return name.startswith(prefix) and not name.startswith(prefix + b"security.")
