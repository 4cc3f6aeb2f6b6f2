"""The stream of `unionfs snapshot send`: what makes one snapshot out of another, changed blocks only.

A title line, then records; each has a checksum over all of it, the last one counts them. Paths are of the merged view,
so a stream can be applied to any mount that shows what it begins at. Format: docs/row-format.md.
"""

from __future__ import annotations

import base64
import errno
import os
import shutil
import stat
from struct import Struct
from zlib import crc32

from unionfs.core.layers import Fd
from unionfs.errors import EXIT_FORMAT, MountError

from .flat import read_range
from .snapshot_view import View, changed_ranges, compare

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from typing import IO, Any

    from unionfs.core.nodes import Node

    from .snapshot_view import Change

TITLE = b"unionfs-row-stream 1\n"
_RECORD = Struct("<cIII")  # kind, length of the JSON, length of the data, crc32 of the kind, the JSON and the data
PIECE = 1 << 20
JSON_MAX = 16 << 20

BEGIN, DELETE, ENTRY, LINK, WRITE, ZERO, END = b"B", b"D", b"M", b"L", b"W", b"Z", b"E"


# --- sending ---


class Sender:
    def __init__(self, old: View, new: View, out: IO[bytes]) -> None:
        self.old = old
        self.new = new
        self.out = out
        self.count = 0
        self.data = 0
        self._links: dict[tuple[int, int], bytes] = {}  # inodes with several names: where the first was sent

    def send(self, begin: dict[str, Any]) -> None:
        self.out.write(TITLE)
        self._put(BEGIN, begin)
        for change in compare(self.old, self.new):
            self._change(change)
        self._put(END, {"records": self.count})
        self.out.flush()

    def _put(self, kind: bytes, header: dict[str, Any], data: bytes = b"") -> None:
        import json

        text = json.dumps(header).encode()
        self.out.write(_RECORD.pack(kind, len(text), len(data), crc32(data, crc32(text, crc32(kind)))))
        self.out.write(text)
        self.out.write(data)
        self.count += 1
        self.data += len(data)

    def _change(self, change: Change) -> None:
        path = os.fsdecode(change.path)
        if change.new is None:
            self._put(DELETE, {"path": path})
            return
        st = self.new.stat(change.new)
        if stat.S_ISDIR(st.st_mode) or st.st_nlink == 1:
            self._entry(change, path, st)
            return
        first = self._links.setdefault((st.st_dev, st.st_ino), change.path)
        if first is change.path:
            self._entry(change, path, st)
        else:
            self._put(LINK, {"path": path, "to": os.fsdecode(first)})

    def _entry(self, change: Change, path: str, st: os.stat_result) -> None:
        node = change.new
        assert node is not None
        regular = stat.S_ISREG(st.st_mode)
        if regular:
            self._put(ENTRY, {"path": path, "mode": st.st_mode, "size": st.st_size, "fresh": change.old is None})
            f = self.new.open(node)
            for start, end in changed_ranges(self.old, self.new, change.old, node):
                for at in range(start, end, PIECE):
                    piece = read_range(f, at, min(PIECE, end - at))
                    if piece.strip(b"\0"):
                        self._put(WRITE, {"path": path, "at": at}, piece)
                    else:
                        self._put(ZERO, {"path": path, "at": at, "length": len(piece)})
        header = {"path": path, "mode": st.st_mode, "uid": st.st_uid, "gid": st.st_gid, "mtime": st.st_mtime_ns}
        if stat.S_ISLNK(st.st_mode):
            header["target"] = os.fsdecode(self.new.core.readlink(node.id))
        elif stat.S_ISCHR(st.st_mode) or stat.S_ISBLK(st.st_mode):
            header["rdev"] = st.st_rdev
        elif regular:
            header["size"] = st.st_size
        header["xattrs"] = self._xattrs(node)
        self._put(ENTRY, header)

    def _xattrs(self, node: Node) -> dict[str, str]:
        core = self.new.core
        found = {}
        try:
            for name in core.listxattr(node.id, 0):
                found[os.fsdecode(name)] = base64.b64encode(core.getxattr(node.id, name)).decode()
        except OSError as e:
            if e.errno not in (errno.EOPNOTSUPP, errno.ENODATA):
                raise
        return found


# --- receiving ---


def records(stream: IO[bytes]) -> Iterator[tuple[bytes, dict[str, Any], bytes]]:
    """Checked one by one; MountError for what is damaged, cut off, or no stream."""
    import json

    title = _exactly(stream, len(TITLE))
    if title != TITLE:
        words = title.split()
        if words[:1] == TITLE.split()[:1]:
            raise MountError(f"receive: stream version {os.fsdecode(words[1])}, this program knows 1", EXIT_FORMAT)
        raise MountError("receive: this is no stream of `unionfs snapshot send`", EXIT_FORMAT)
    count = 0
    while True:
        kind, length, size, crc = _RECORD.unpack(_exactly(stream, _RECORD.size))
        if length > JSON_MAX or size > PIECE:
            raise MountError(f"receive: record {count} is damaged", EXIT_FORMAT)
        text, data = _exactly(stream, length), _exactly(stream, size)
        if crc32(data, crc32(text, crc32(kind))) != crc:
            raise MountError(f"receive: record {count} is damaged: its checksum is wrong", EXIT_FORMAT)
        header = json.loads(text)
        if kind == END:
            if header["records"] != count:
                raise MountError(f"receive: {count} of {header['records']} records came", EXIT_FORMAT)
            return
        yield kind, header, data
        count += 1


def _exactly(stream: IO[bytes], length: int) -> bytes:
    data = stream.read(length)
    if len(data) != length:
        raise MountError("receive: the stream ends too early; nothing was changed", EXIT_FORMAT)
    return data


class Receiver:
    """Applies records under a directory: through a mount, with the system calls that any program has. No path of a
    stream leads outside, nor through a symlink."""

    def __init__(self, top: bytes) -> None:
        self.top = Fd(os.open(top, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC))
        self._open: tuple[str, Fd] | None = None
        self._handlers: dict[bytes, Callable[[dict[str, Any], bytes], None]] = {
            DELETE: self._delete, ENTRY: self._entry, LINK: self._link, WRITE: self._write, ZERO: self._zero,
        }  # fmt: skip

    def apply(self, kind: bytes, header: dict[str, Any], data: bytes) -> None:
        handler = self._handlers.get(kind)
        if handler is None:
            raise MountError(f"receive: unknown record {kind!r}: it needs a newer unionfs", EXIT_FORMAT)
        handler(header, data)

    def _at(self, path: str) -> tuple[Fd, str]:
        """The directory that holds a path's last name, and that."""
        parts = path.split("/")[1:]
        if path[:1] != "/" or any(part in ("", ".", "..") for part in parts):
            raise MountError(f"receive: {path!r}: not a path of a mount", EXIT_FORMAT)
        here = self.top
        for part in parts[:-1]:
            here = Fd(os.open(part, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC, dir_fd=here.n))
        return here, parts[-1]

    def _delete(self, header: dict[str, Any], data: bytes) -> None:
        d, name = self._at(header["path"])
        if stat.S_ISDIR(os.stat(name, dir_fd=d.n, follow_symlinks=False).st_mode):
            shutil.rmtree(name, dir_fd=d.n)
        else:
            os.unlink(name, dir_fd=d.n)

    def _link(self, header: dict[str, Any], data: bytes) -> None:
        d, name = self._at(header["path"])
        source, first = self._at(header["to"])
        wanted = os.stat(first, dir_fd=source.n, follow_symlinks=False)
        try:
            st = os.stat(name, dir_fd=d.n, follow_symlinks=False)
        except FileNotFoundError:
            pass
        else:
            if (st.st_dev, st.st_ino) == (wanted.st_dev, wanted.st_ino):
                return
            os.unlink(name, dir_fd=d.n)
        os.link(first, name, src_dir_fd=source.n, dst_dir_fd=d.n, follow_symlinks=False)

    def _entry(self, header: dict[str, Any], data: bytes) -> None:
        self._open = None
        if header["path"] == "/":
            self._looks(self.top.n, header)
            return
        d, name = self._at(header["path"])
        mode = header["mode"]
        fresh = header.get("fresh", True)
        exists = os.access(name, os.F_OK, dir_fd=d.n, follow_symlinks=False)
        if stat.S_ISDIR(mode):
            if not exists:
                os.mkdir(name, 0o700, dir_fd=d.n)
        elif stat.S_ISREG(mode):
            if "uid" not in header:  # its content comes next
                if fresh and exists:
                    os.unlink(name, dir_fd=d.n)
                flags = os.O_RDWR | os.O_NOFOLLOW | os.O_CLOEXEC | (os.O_CREAT | os.O_EXCL if fresh else 0)
                fd = Fd(os.open(name, flags, 0o600, dir_fd=d.n))
                os.ftruncate(fd.n, header["size"])
                self._open = header["path"], fd
                return
        else:
            if exists:
                os.unlink(name, dir_fd=d.n)
            if stat.S_ISLNK(mode):
                os.symlink(header["target"], name, dir_fd=d.n)
            else:
                os.mknod(name, mode & 0o170000 | 0o600, header.get("rdev", 0), dir_fd=d.n)
            self._owner(name, d.n, header)
            if not stat.S_ISLNK(mode):
                os.chmod(name, mode & 0o7777, dir_fd=d.n)
            os.utime(name, ns=(header["mtime"], header["mtime"]), dir_fd=d.n, follow_symlinks=False)
            return
        kind = os.O_DIRECTORY if stat.S_ISDIR(mode) else 0
        fd = Fd(os.open(name, os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC | kind, dir_fd=d.n))
        self._looks(fd.n, header)

    @staticmethod
    def _owner(target: str | int, dirfd: int | None, header: dict[str, Any]) -> None:
        try:
            os.chown(target, header["uid"], header["gid"], dir_fd=dirfd, follow_symlinks=isinstance(target, int))
        except PermissionError:
            if os.geteuid() == 0:
                raise
            # an ordinary user's copy belongs to that user, as with cp

    def _looks(self, fd: int, header: dict[str, Any]) -> None:
        self._owner(fd, None, header)
        wanted = header["xattrs"]
        for name in os.listxattr(fd):
            if name not in wanted:
                os.removexattr(fd, name)
        for name, value in wanted.items():
            raw = base64.b64decode(value)
            try:
                if os.getxattr(fd, name) == raw:
                    continue
            except OSError:
                pass
            os.setxattr(fd, name, raw)
        os.fchmod(fd, header["mode"] & 0o7777)
        os.utime(fd, ns=(header["mtime"], header["mtime"]))

    def _file(self, path: str) -> int:
        if self._open is None or self._open[0] != path:
            raise MountError(f"receive: data for {path!r}, which was not opened", EXIT_FORMAT)
        return self._open[1].n

    def _write(self, header: dict[str, Any], data: bytes) -> None:
        fd, at, view = self._file(header["path"]), header["at"], memoryview(data)
        while view:
            done = os.pwrite(fd, view, at)
            view, at = view[done:], at + done

    def _zero(self, header: dict[str, Any], data: bytes) -> None:
        from unionfs import sysio

        fd, at, length = self._file(header["path"]), header["at"], header["length"]
        try:
            sysio.fallocate(fd, sysio.FALLOC_FL_PUNCH_HOLE | sysio.FALLOC_FL_KEEP_SIZE, at, length)
        except OSError as e:
            if e.errno not in (errno.EOPNOTSUPP, errno.ENOSYS):
                raise
            os.pwrite(fd, bytes(length), at)
