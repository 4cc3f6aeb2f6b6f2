"""Unpacking an OCI layer archive into a directory, and never outside of it, whatever the archive says.

Every name is reached from the layer's root by descriptors, one component at a time, with O_NOFOLLOW: no `..`, no
absolute name, no symlink (the archive's own or the parent's) and no hard link leads out. A component that is not a
directory and came with this archive makes the archive Invalid; one that was there before is replaced, as a union
would hide it. Whiteouts take away what was there before the archive, never what came with it (image spec).

Headers are read by `tarfile`; `Member` adds what it leaves out: damage in the middle is an error and not the end, and
extended headers have a limit. Nothing is executed. Without root, owners are left out and devices are skipped, with one
line in the log.
"""

from __future__ import annotations

import errno
import logging
import os
import stat
import tarfile
from collections.abc import Callable, Iterator
from decimal import Decimal, InvalidOperation
from typing import IO, Any, NamedTuple

from unionfs.store.api import Applied, Invalid, NoSpace, Readable, StoreError
from unionfs.store.formats import OPAQUE, WH, Format
from unionfs.store.removal import remove
from unionfs.store.streams import Digesting, Pushback, compression_errors, decompressed
from unionfs.store.tree import Stat, Tree, Walker

log = logging.getLogger("unionfs.store")

MAX_HEADER = 1 << 20  # bytes of one extended header: names and xattrs of one entry
MAX_DEPTH = 512
_BLOCK = 1 << 16
_ZEROS = bytes(_BLOCK)
_XATTR = "SCHILY.xattr."
_EXTENDED = frozenset(
    (tarfile.XHDTYPE, tarfile.XGLTYPE, tarfile.SOLARIS_XHDTYPE, tarfile.GNUTYPE_LONGNAME, tarfile.GNUTYPE_LONGLINK)
)


class Limits(NamedTuple):
    size: int = 1 << 40  # bytes of the uncompressed archive
    entries: int = 10_000_000


class Member(tarfile.TarInfo):
    """A header that is checked. tarfile makes them by `frombuf`; since Python 3.13.5 (and its like of older lines) by
    `_frombuf`."""

    @classmethod
    def frombuf(cls, buf: bytes | bytearray, encoding: str, errors: str) -> Any:
        return _checked(super().frombuf, buf, encoding, errors)

    @classmethod
    def _frombuf(cls, buf: bytes | bytearray, encoding: str, errors: str, **options: bool) -> Any:
        return _checked(super()._frombuf, buf, encoding, errors, **options)  # type: ignore[misc]


def _checked(parse: Callable[..., Any], *arguments: Any, **options: bool) -> Any:
    try:
        member = parse(*arguments, **options)
    except tarfile.HeaderError as error:
        if isinstance(error, tarfile.EmptyHeaderError | tarfile.EOFHeaderError):  # type: ignore[attr-defined]
            raise
        raise Invalid(f"damaged archive: {error}") from None
    if member.size < 0 or (member.type in _EXTENDED and member.size > MAX_HEADER):
        raise Invalid(f"entry {member.name!r}: a header of {member.size} bytes: at most {MAX_HEADER} are taken")
    return member


class NeedsParent(StoreError):
    """The archive can't be unpacked before its parent is there: it leaves out a directory, or links to a file of it."""


class Missing:
    """The tree of a parent that is not there yet."""

    def stat(self, path: bytes) -> Stat | None:
        raise NeedsParent(f"{_show(path)} is looked for in the parent")

    def names(self, path: bytes) -> list[bytes]:
        raise NotImplementedError  # whoever unpacks asks for the stat first

    def readlink(self, path: bytes) -> bytes:
        raise NotImplementedError

    def xattrs(self, path: bytes) -> dict[str, bytes]:
        raise NotImplementedError

    def chunks(self, path: bytes, size: int) -> Iterator[bytes]:
        raise NotImplementedError

    def close(self) -> None:
        pass


def unpack(root: str, stream: Readable, form: Format, below: Tree | None, limits: Limits) -> tuple[Applied, bool]:
    """Unpacks into the directory `root`. `below`: what the layers below show, for parents that the archive leaves out
    and for hard links to their files; closed at the end. Reads the stream to its end. True: the archive had an entry
    for the root."""
    try:
        plain = Digesting(decompressed(stream), limits.size)
        work = _Unpacking(root, form, below, limits)
        try:
            work.archive(plain)
        finally:
            work.close()
            if below is not None:
                below.close()
        plain.drain()
    except compression_errors() as error:
        raise Invalid(f"damaged compressed stream: {error}") from None
    except (tarfile.TarError, ValueError, OverflowError) as error:
        raise Invalid(f"damaged archive: {error}") from None
    return Applied(work.size, plain.digest), work.own_root


class _Unpacking:
    def __init__(self, root: str, form: Format, below: Tree | None, limits: Limits) -> None:
        self._walker = Walker(os.open(root, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC))
        self._form = form
        self._below = below
        self._limits = limits
        self._came: set[bytes] = set()  # paths that this archive has brought
        self._finals: dict[bytes, tuple[int, int]] = {}  # mode and time of directories, set when all is in them
        self._root = os.geteuid() == 0
        self._left_out: dict[str, int] = {}
        self.size = 0
        self.own_root = False

    def close(self) -> None:
        self._walker.close()

    def archive(self, stream: Readable) -> None:
        first = stream.read(tarfile.BLOCKSIZE)
        if not first:
            return  # an empty layer
        source = Pushback(stream, first)
        count = 0
        with tarfile.open(
            fileobj=source,
            mode="r|",
            bufsize=_BLOCK,
            tarinfo=Member,
            encoding="utf-8",
            errors="surrogateescape",
        ) as tar:
            while (member := tar.next()) is not None:
                tar.members.clear()  # type: ignore[attr-defined]  # or it remembers all of them
                count += 1
                if count > self._limits.entries:
                    raise Invalid(f"more than {self._limits.entries} entries: raise the option apply.max_entries")
                self._entry(tar, member)
        for path, (mode, mtime) in reversed(self._finals.items()):
            self._finish(path, mode, mtime)
        for what, times in self._left_out.items():
            log.warning("unpacking: %s: left out %d times", what, times)

    # --- entries ---

    def _entry(self, tar: tarfile.TarFile, member: tarfile.TarInfo) -> None:
        parts = _parts(member.name)
        try:
            if not parts:
                if member.isdir():
                    self.own_root = True
                    self._attributes(self._walker.directory([]), b".", b"", member)
                return
            name = parts[-1]
            if any(part.startswith(WH + WH) for part in parts if part is not name or part != OPAQUE):
                self._leave_out("a union filesystem's own files")  # .wh..wh.plnk and such
                return
            if any(part.startswith(WH) for part in parts[:-1]):
                raise Invalid(f"entry {member.name!r}: a whiteout is no directory")
            parent = self._parent(parts[:-1])
            if name == OPAQUE:
                self._opaque(parent, b"/".join(parts[:-1]))
            elif name.startswith(WH):
                self._whiteout(parent, name[len(WH) :], parts[:-1])
            else:
                self._make(tar, member, parent, name, b"/".join(parts))
        except OSError as error:
            if isinstance(error, compression_errors()):
                raise
            raise _refusal(member.name, error) from None

    def _make(self, tar: tarfile.TarFile, member: tarfile.TarInfo, parent: int, name: bytes, path: bytes) -> None:
        if member.isdir():
            self._directory(parent, name, path)
        else:
            gone = self._form.clear_whiteout(parent, name)
            if not gone and _exists(parent, name):
                remove(parent, name)
            if member.islnk():
                self._link(member, parent, name)
                self._came.add(path)
                return  # the inode has its attributes
            if member.issym():
                os.symlink(_bytes(member.linkname), name, dir_fd=parent)
            elif member.isfifo():
                os.mkfifo(name, 0o600, dir_fd=parent)
            elif member.ischr() or member.isblk():
                if not self._device(member, parent, name):
                    return
            elif member.isreg() or member.type not in tarfile.SUPPORTED_TYPES:
                self._file(tar, member, parent, name)
            else:
                raise Invalid(f"entry {member.name!r}: unknown type {member.type!r}")
        self._came.add(path)
        self._attributes(parent, name, path, member)

    def _directory(self, parent: int, name: bytes, path: bytes) -> None:
        hidden = self._form.clear_whiteout(parent, name)
        status = None if hidden else _lstat(parent, name)
        if status is not None and not stat.S_ISDIR(status.st_mode):
            remove(parent, name)
            status = None
        if status is None:
            os.mkdir(name, 0o700, dir_fd=parent)
            if hidden:
                self._mark_opaque(parent, name)

    def _mark_opaque(self, parent: int, name: bytes) -> None:
        inner = os.open(name, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC, dir_fd=parent)
        try:
            self._form.opaque(inner)
        finally:
            os.close(inner)

    def _file(self, tar: tarfile.TarFile, member: tarfile.TarInfo, parent: int, name: bytes) -> None:
        if member.size > self._limits.size:  # a sparse one is small in the archive
            raise Invalid(f"entry {member.name!r}: {member.size} bytes: raise the option apply.max_size")
        source = tar.extractfile(member)
        assert source is not None
        fd = os.open(name, os.O_CREAT | os.O_EXCL | os.O_WRONLY | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600, dir_fd=parent)
        try:
            _copy(source, fd, member)
        finally:
            os.close(fd)
        self.size += member.size

    def _device(self, member: tarfile.TarInfo, parent: int, name: bytes) -> bool:
        kind = stat.S_IFCHR if member.ischr() else stat.S_IFBLK
        try:
            if member.ischr() and not member.devmajor and not member.devminor:
                self._form.device_zero(parent, name, kind | 0o600)
            else:
                os.mknod(name, kind | 0o600, os.makedev(member.devmajor, member.devminor), dir_fd=parent)
        except PermissionError:
            self._leave_out("device nodes (not allowed here)")
            return False
        return True

    def _link(self, member: tarfile.TarInfo, parent: int, name: bytes) -> None:
        target = _parts(member.linkname)
        if not target or any(part.startswith(WH) for part in target):
            raise Invalid(f"entry {member.name!r}: a hard link to {member.linkname!r}")
        held = os.dup(parent)  # looking for the target moves the walker
        try:
            try:
                where = self._walker.directory(target[:-1])
                found = _exists(where, target[-1])
            except FileNotFoundError:
                found = False
            if not found:
                where = self._copy_up(member, target)
            elif stat.S_ISDIR(os.stat(target[-1], dir_fd=where, follow_symlinks=False).st_mode):
                raise Invalid(f"entry {member.name!r}: a hard link to the directory {member.linkname!r}")
            os.link(target[-1], name, src_dir_fd=where, dst_dir_fd=held, follow_symlinks=False)
        finally:
            os.close(held)

    def _copy_up(self, member: tarfile.TarInfo, target: list[bytes]) -> int:
        """A hard link to a file of the layers below: it has to be here first."""
        path = b"/" + b"/".join(target)
        status = self._below.stat(path) if self._below is not None and self._form.hides else None
        if status is None or not stat.S_ISREG(status.mode):
            raise Invalid(f"entry {member.name!r}: a hard link to {member.linkname!r}, which is not there")
        assert self._below is not None
        where = self._parent(target[:-1])
        flags = os.O_CREAT | os.O_EXCL | os.O_WRONLY | os.O_NOFOLLOW | os.O_CLOEXEC
        fd = os.open(target[-1], flags, 0o600, dir_fd=where)
        try:
            for piece in self._below.chunks(path, status.size):
                os.write(fd, piece)
        finally:
            os.close(fd)
        self._inherit(where, target[-1], path, status)
        os.chmod(target[-1], stat.S_IMODE(status.mode), dir_fd=where)
        os.utime(target[-1], ns=(status.mtime_ns, status.mtime_ns), dir_fd=where, follow_symlinks=False)
        return where

    # --- whiteouts ---

    def _whiteout(self, parent: int, name: bytes, at: list[bytes]) -> None:
        if name in (b"", b".", b".."):
            raise Invalid(f"whiteout of {name!r}")
        path = b"/".join([*at, name])
        if path in self._came:
            status = _lstat(parent, name)
            if status is not None and stat.S_ISDIR(status.st_mode):
                self._hide(parent, name, path)
            return
        self._form.clear_whiteout(parent, name)
        if _exists(parent, name):
            remove(parent, name)
        self._form.whiteout(parent, name)

    def _hide(self, parent: int, name: bytes, path: bytes) -> None:
        """A directory that came with this archive hides the one below."""
        inner = os.open(name, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC, dir_fd=parent)
        try:
            self._opaque(inner, path)
        finally:
            os.close(inner)

    def _opaque(self, directory: int, path: bytes) -> None:
        """All that was in the directory before the archive goes, at any depth."""
        for name in os.listdir(b"/proc/self/fd/%d" % directory):
            inner = path + b"/" + name if path else name
            if inner not in self._came:
                remove(directory, name)
            elif stat.S_ISDIR(os.stat(name, dir_fd=directory, follow_symlinks=False).st_mode):
                self._hide(directory, name, inner)
        self._form.opaque(directory)

    # --- parents and attributes ---

    def _parent(self, parts: list[bytes]) -> int:
        """The directory that an entry goes into, made like the one below where the archive does not bring it."""
        try:
            return self._walker.directory(parts)
        except OSError as error:
            if error.errno not in (errno.ENOENT, errno.ENOTDIR, errno.ELOOP):
                raise
        for depth in range(1, len(parts) + 1):
            here = parts[:depth]
            try:
                self._walker.directory(here)
                continue
            except OSError as error:
                if error.errno not in (errno.ENOENT, errno.ENOTDIR, errno.ELOOP):
                    raise
            path = b"/".join(here)
            parent, name = self._walker.directory(here[:-1]), here[-1]
            if path in self._came:
                raise Invalid(f"{_show(path)} is both a directory and something else")
            self._directory(parent, name, path)
            status = self._below.stat(b"/" + path) if self._below is not None and self._form.hides else None
            if status is not None and stat.S_ISDIR(status.mode):
                self._inherit(parent, name, b"/" + path, status)
                self._finals[path] = stat.S_IMODE(status.mode), status.mtime_ns
            else:
                os.chmod(name, 0o755, dir_fd=parent)
            self._came.add(path)
        return self._walker.directory(parts)

    def _inherit(self, parent: int, name: bytes, path: bytes, status: Stat) -> None:
        assert self._below is not None
        if self._root:
            os.chown(name, status.uid, status.gid, dir_fd=parent, follow_symlinks=False)
        for key, value in self._below.xattrs(path).items():
            self._xattr(parent, name, key, value)

    def _attributes(self, parent: int, name: bytes, path: bytes, member: tarfile.TarInfo) -> None:
        if self._root:
            os.chown(name, member.uid, member.gid, dir_fd=parent, follow_symlinks=False)
        for key, text in member.pax_headers.items():
            if key.startswith(_XATTR):
                self._xattr(parent, name, key[len(_XATTR) :], _bytes(text))
        mode, mtime = stat.S_IMODE(member.mode), _mtime(member)
        if member.isdir():
            self._finals[path] = mode, mtime
        else:
            if not member.issym():
                os.chmod(name, mode, dir_fd=parent)  # after chown, which drops setuid
            os.utime(name, ns=(mtime, mtime), dir_fd=parent, follow_symlinks=False)

    def _xattr(self, parent: int, name: bytes, key: str, value: bytes) -> None:
        stored = self._form.xattr(key)
        if stored is None:
            self._leave_out(f"xattr {key} (a mark of a union filesystem)")
            return
        try:
            os.setxattr(b"/proc/self/fd/%d/%s" % (parent, name), stored, value, follow_symlinks=False)
        except OSError as error:
            if error.errno not in (errno.EOPNOTSUPP, errno.EPERM):
                raise
            self._leave_out(f"xattr {key} ({error.strerror})")

    def _finish(self, path: bytes, mode: int, mtime: int) -> None:
        parts = [part for part in path.split(b"/") if part]
        try:
            fd = self._walker.directory(parts)
        except OSError as error:
            if error.errno in (errno.ENOENT, errno.ENOTDIR, errno.ELOOP):
                return  # a later entry took its place
            raise
        os.fchmod(fd, mode)
        os.utime(fd, ns=(mtime, mtime))

    def _leave_out(self, what: str) -> None:
        self._left_out[what] = self._left_out.get(what, 0) + 1


def _parts(name: str) -> list[bytes]:
    parts = [part for part in _bytes(name).split(b"/") if part not in (b"", b".")]
    if b".." in parts:
        raise Invalid(f"entry {name!r}: '..' leads out of the layer")
    if len(parts) > MAX_DEPTH:
        raise Invalid(f"entry {name[:60]!r}…: {len(parts)} directories deep: at most {MAX_DEPTH} are taken")
    return parts


def _bytes(text: str) -> bytes:
    return text.encode("utf-8", "surrogateescape")


def _show(path: bytes) -> str:
    return repr(path.decode("utf-8", "backslashreplace"))


def _mtime(member: tarfile.TarInfo) -> int:
    """Nanoseconds, and exactly: tarfile's is a float."""
    try:
        return int(Decimal(member.pax_headers["mtime"]) * 1_000_000_000)
    except (KeyError, InvalidOperation):
        return int(member.mtime * 1_000_000_000)


def _lstat(dirfd: int, name: bytes) -> os.stat_result | None:
    try:
        return os.stat(name, dir_fd=dirfd, follow_symlinks=False)
    except FileNotFoundError:
        return None


def _exists(dirfd: int, name: bytes) -> bool:
    return _lstat(dirfd, name) is not None


def _copy(source: IO[bytes], fd: int, member: tarfile.TarInfo) -> None:
    """Blocks of zeros become holes."""
    left = member.size
    offset = 0
    while left:
        data = source.read(min(_BLOCK, left))
        if not data:
            raise Invalid(f"entry {member.name!r}: the archive ends within it")
        if data != _ZEROS:
            written = 0
            while written < len(data):
                written += os.pwrite(fd, data[written:], offset + written)
        offset += len(data)
        left -= len(data)
    os.ftruncate(fd, member.size)


def _refusal(name: str, error: OSError) -> StoreError:
    text = f"entry {name!r}: {error.strerror}"
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        return NoSpace(f"{text}: make room and apply it anew")
    if error.errno in (errno.ELOOP, errno.ENOTDIR, errno.EISDIR, errno.ENAMETOOLONG, errno.EINVAL, errno.EEXIST,
                       errno.ENOENT, errno.E2BIG, errno.EFBIG, errno.ERANGE):  # fmt: skip
        return Invalid(text)
    return StoreError(text)
