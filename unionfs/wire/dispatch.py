"""Request bytes × Operations → reply bytes. No I/O, no threads, no layers.

One `Dispatcher` belongs to one thread: it owns that thread's reply buffer, so a reply is valid until the next request.
Handlers take (unique, nodeid, size of the request) and read the rest from `self.request`; there is no request object,
and the hot ones pack straight into the reply buffer. Data is read behind the place of the reply's header, so that every
reply is one contiguous write.

Errors: an OSError is its errno; anything else is a traceback on stderr and EIO; `WouldBlock` goes to the caller, which
runs the same bytes in a slow thread. Every request but FORGET, BATCH_FORGET and INTERRUPT gets exactly one reply.
"""

from __future__ import annotations

import errno
import sys

from unionfs.api import Changes
from unionfs.errors import WouldBlock
from unionfs.wire import abi, listing

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable
    from typing import Protocol

    from unionfs.api import Entry, Operations
    from unionfs.wire.handshake import Negotiated

    Reply = bytes | bytearray | memoryview
else:
    Protocol = object

FAST, SLOW, SESSION = 0, 1, 2  # lanes: the dispatcher thread; always a slow thread; the session answers itself

BIG_COPY = 1 << 20  # a copy_file_range of more than this is not for the dispatcher thread


class Opens(Protocol):
    """What OPEN and RELEASE mean in the data mode in force (the noopen mode has none)."""

    def opened(self, nodeid: int, flags: int) -> tuple[int, int]: ...  # FOPEN_* flags, backing id

    def created(self, nodeid: int, flags: int) -> tuple[int, int]: ...  # the same after create and tmpfile

    def released(self, nodeid: int) -> None: ...


class Dispatcher:
    """Answers requests in one thread."""

    __slots__ = (
        "_negative", "fast", "handlers", "noopen", "opens", "ops", "out", "passthrough", "piece", "request", "timeout",
        "view",
    )  # fmt: skip

    def __init__(self, ops: Operations, terms: Negotiated, opens: Opens, *, fast: bool) -> None:
        self.ops = ops
        self.opens = opens
        self.noopen = terms.data == "noopen"
        self.passthrough = terms.data == "passthrough"
        self.fast = fast  # the dispatcher thread's: may raise WouldBlock
        self.timeout = terms.timeout
        self.piece = listing.WHOLE  # at most so much of a listing in one reply
        self.load(b"")
        self.out = memoryview(bytearray(abi.OUT_HEADER_SIZE + terms.max_write))
        self._negative = bytearray(abi.ENTRY_REPLY.size)
        abi.ENTRY_REPLY.pack_into(
            self._negative, 0, len(self._negative), 0, 0, 0, 0, self.timeout, self.timeout, 0, 0, *(0,) * 16
        )
        self.handlers: dict[int, Callable[[int, int, int], Reply | None]] = {
            opcode: getattr(self, handler.__name__) for opcode, _, handler, _ in OPCODES
        }
        if not terms.has("SETXATTR_EXT"):
            self.handlers[abi.SETXATTR] = self.setxattr_short

    def load(self, request: bytes | bytearray) -> None:
        """Take requests from another buffer from now on."""
        self.request = request
        self.view = memoryview(request)

    def answer(self, opcode: int, unique: int, nodeid: int, size: int) -> Reply | None:
        """The reply to the request in `self.request[:size]`, None where none is owed. Raises WouldBlock only."""
        try:
            return self.handlers[opcode](unique, nodeid, size)
        except WouldBlock:
            raise
        except OSError as error:
            if opcode not in NO_REPLY:
                return error_reply(unique, error.errno)
            _report(opcode, nodeid)
        except Exception:
            if opcode not in self.handlers:
                return error_reply(unique, errno.ENOSYS)
            _report(opcode, nodeid)
            if opcode not in NO_REPLY:
                return error_reply(unique, errno.EIO)
        return None

    # --- names ------------------------------------------------------------------------------------------------------

    def lookup(self, unique: int, nodeid: int, size: int) -> Reply:
        entry = self.ops.lookup(nodeid, self.view[40 : size - 1].tobytes())
        if entry is None:
            negative = self._negative
            abi.U64.pack_into(negative, 8, unique)
            return negative
        return self._entry(unique, entry)

    def _entry(self, unique: int, entry: Entry) -> Reply:
        timeout = self.timeout
        out = self.out
        abi.ENTRY_REPLY.pack_into(out, 0, 144, 0, unique, entry[0], entry[1], timeout, timeout, 0, 0, *entry[2])
        return out[:144]

    def forget(self, unique: int, nodeid: int, size: int) -> None:
        self.ops.forget(nodeid, abi.U64.unpack_from(self.request, 40)[0])

    def batch_forget(self, unique: int, nodeid: int, size: int) -> None:
        count = abi.BATCH_FORGET_IN.unpack_from(self.request, 40)[0]
        forget = self.ops.forget
        for one in abi.U64X2.iter_unpack(self.view[48 : 48 + 16 * count]):
            forget(*one)

    def mknod(self, unique: int, nodeid: int, size: int) -> Reply:
        mode, rdev, umask, _ = abi.MKNOD_IN.unpack_from(self.request, 40)
        uid, gid = abi.CALLER.unpack_from(self.request, 24)
        name = self.view[56 : size - 1].tobytes()
        return self._entry(unique, self.ops.mknod(nodeid, name, mode, rdev, umask, uid, gid))

    def mkdir(self, unique: int, nodeid: int, size: int) -> Reply:
        mode, umask = abi.MKDIR_IN.unpack_from(self.request, 40)
        uid, gid = abi.CALLER.unpack_from(self.request, 24)
        return self._entry(unique, self.ops.mkdir(nodeid, self.view[48 : size - 1].tobytes(), mode, umask, uid, gid))

    def symlink(self, unique: int, nodeid: int, size: int) -> Reply:
        name, target, _ = self.view[40:size].tobytes().split(b"\0")
        uid, gid = abi.CALLER.unpack_from(self.request, 24)
        return self._entry(unique, self.ops.symlink(nodeid, name, target, uid, gid))

    def link(self, unique: int, nodeid: int, size: int) -> Reply:
        (source,) = abi.U64.unpack_from(self.request, 40)
        return self._entry(unique, self.ops.link(source, nodeid, self.view[48 : size - 1].tobytes()))

    def unlink(self, unique: int, nodeid: int, size: int) -> Reply:
        self.ops.unlink(nodeid, self.view[40 : size - 1].tobytes())
        return self._done(unique)

    def rmdir(self, unique: int, nodeid: int, size: int) -> Reply:
        self.ops.rmdir(nodeid, self.view[40 : size - 1].tobytes())
        return self._done(unique)

    def rename(self, unique: int, nodeid: int, size: int) -> Reply:
        (newparent,) = abi.U64.unpack_from(self.request, 40)
        name, newname, _ = self.view[48:size].tobytes().split(b"\0")
        self.ops.rename(nodeid, name, newparent, newname, 0)
        return self._done(unique)

    def rename2(self, unique: int, nodeid: int, size: int) -> Reply:
        newparent, flags, _ = abi.RENAME2_IN.unpack_from(self.request, 40)
        name, newname, _ = self.view[56:size].tobytes().split(b"\0")
        self.ops.rename(nodeid, name, newparent, newname, flags)
        return self._done(unique)

    def _done(self, unique: int) -> Reply:
        return abi.OUT_HEADER.pack(16, 0, unique)

    # --- attributes -------------------------------------------------------------------------------------------------

    def getattr(self, unique: int, nodeid: int, size: int) -> Reply:
        out = self.out
        abi.ATTR_REPLY.pack_into(out, 0, 120, 0, unique, self.timeout, 0, 0, *self.ops.getattr(nodeid))
        return out[:120]

    def setattr(self, unique: int, nodeid: int, size: int) -> Reply:
        (
            valid, _, _, length, _, atime, mtime, _, atime_ns, mtime_ns, _, mode, _, uid, gid, _,
        ) = abi.SETATTR_IN.unpack_from(self.request, 40)  # fmt: skip
        changes = Changes(kill_suidgid=bool(valid & abi.FATTR_KILL_SUIDGID))
        if valid & abi.FATTR_SIZE:
            changes.size = length
        if valid & abi.FATTR_MODE:
            changes.mode = mode
        if valid & abi.FATTR_UID:
            changes.uid = uid
        if valid & abi.FATTR_GID:
            changes.gid = gid
        if valid & abi.FATTR_ATIME:
            changes.atime_ns = NOW if valid & abi.FATTR_ATIME_NOW else _nanoseconds(atime, atime_ns)
        if valid & abi.FATTR_MTIME:
            changes.mtime_ns = NOW if valid & abi.FATTR_MTIME_NOW else _nanoseconds(mtime, mtime_ns)
        if not valid & ~_NO_CHANGE and abi.CALLER.unpack_from(self.request, 24)[0]:
            # An empty SETATTR precedes what drops privileges. A WRITE says so again, but COPY_FILE_RANGE and FALLOCATE
            # don't, and a passed-through write is never sent. For root it means that security.capability went (by
            # REMOVEXATTR), not that setuid goes.
            changes.kill_suidgid = True
        out = self.out
        abi.ATTR_REPLY.pack_into(out, 0, 120, 0, unique, self.timeout, 0, 0, *self.ops.setattr(nodeid, changes))
        return out[:120]

    def statx(self, unique: int, nodeid: int, size: int) -> Reply:
        (
            ino, length, blocks, atime, mtime, ctime, atime_ns, mtime_ns, ctime_ns, mode, nlink, uid, gid, rdev,
            blksize, _,
        ) = self.ops.getattr(nodeid)  # fmt: skip
        birth = self.ops.birth_time(nodeid)
        mask = abi.STATX_BASIC_STATS | (abi.STATX_BTIME if birth else 0)
        btime, btime_ns = birth or (0, 0)
        major, minor = rdev >> 8 & 0xFFF, rdev & 0xFF | rdev >> 12 & 0xFFF00  # the kernel's new_encode_dev()
        return abi.STATX_REPLY.pack(
            abi.STATX_REPLY.size, 0, unique, self.timeout, 0, 0, mask, blksize, 0, nlink, uid, gid, mode, 0, ino,
            length, blocks, 0, atime, atime_ns, 0, btime, btime_ns, 0, ctime, ctime_ns, 0, mtime, mtime_ns, 0,
            major, minor, 0, 0,
        )  # fmt: skip

    def readlink(self, unique: int, nodeid: int, size: int) -> Reply:
        return data_reply(unique, self.ops.readlink(nodeid))

    def getxattr(self, unique: int, nodeid: int, size: int) -> Reply:
        room, _ = abi.GETXATTR_IN.unpack_from(self.request, 40)
        return self._sized(unique, self.ops.getxattr(nodeid, self.view[48 : size - 1].tobytes()), room)

    def listxattr(self, unique: int, nodeid: int, size: int) -> Reply:
        room, _ = abi.GETXATTR_IN.unpack_from(self.request, 40)
        uid, _ = abi.CALLER.unpack_from(self.request, 24)
        return self._sized(unique, b"".join(name + b"\0" for name in self.ops.listxattr(nodeid, uid)), room)

    def _sized(self, unique: int, value: bytes, room: int) -> Reply:
        """The xattr convention: no room asks for the size, too little is ERANGE."""
        if room == 0:
            return abi.GETXATTR_REPLY.pack(24, 0, unique, len(value), 0)
        if len(value) > room:
            return error_reply(unique, errno.ERANGE)
        return data_reply(unique, value)

    def setxattr(self, unique: int, nodeid: int, size: int) -> Reply:
        length, flags, extra, _ = abi.SETXATTR_IN.unpack_from(self.request, 40)
        name, value = _split_name(self.view[56:size].tobytes())
        self.ops.setxattr(nodeid, name, value[:length], flags, bool(extra & abi.SETXATTR_ACL_KILL_SGID))
        return self._done(unique)

    def setxattr_short(self, unique: int, nodeid: int, size: int) -> Reply:
        """SETXATTR as kernels before 5.13 send it: without the second pair of fields."""
        length, flags = abi.CALLER.unpack_from(self.request, 40)
        name, value = _split_name(self.view[48:size].tobytes())
        self.ops.setxattr(nodeid, name, value[:length], flags, False)
        return self._done(unique)

    def removexattr(self, unique: int, nodeid: int, size: int) -> Reply:
        self.ops.removexattr(nodeid, self.view[40 : size - 1].tobytes())
        return self._done(unique)

    def ioctl(self, unique: int, nodeid: int, size: int) -> Reply:
        _, _, command, _, in_size, out_size = abi.IOCTL_IN.unpack_from(self.request, 40)
        answer = listing.inode_flags(self.ops, nodeid, command, self.view[72 : 72 + in_size])
        if answer is None:
            return error_reply(unique, errno.ENOTTY)
        answer = answer[:out_size].ljust(out_size, b"\0")
        return abi.IOCTL_REPLY.pack(32 + out_size, 0, unique, 0, 0, 0, 0) + answer

    # --- data -------------------------------------------------------------------------------------------------------

    def read(self, unique: int, nodeid: int, size: int) -> Reply:
        _, offset, wanted = abi.READ_IN.unpack_from(self.request, 40)
        out = self.out
        end = self.ops.read(nodeid, offset, out[16 : 16 + wanted]) + 16
        abi.OUT_HEADER.pack_into(out, 0, end, 0, unique)
        return out[:end]

    def write(self, unique: int, nodeid: int, size: int) -> Reply:
        _, offset, length, flags = abi.WRITE_IN.unpack_from(self.request, 40)
        kill = flags & abi.WRITE_KILL_SUIDGID != 0
        count = self.ops.write(nodeid, offset, self.view[80 : 80 + length], kill)
        return abi.WRITE_REPLY.pack(24, 0, unique, count, 0)

    def fsync(self, unique: int, nodeid: int, size: int) -> Reply:
        self.ops.fsync(nodeid, bool(abi.FSYNC_IN.unpack_from(self.request, 40)[1] & abi.FSYNC_FDATASYNC))
        return self._done(unique)

    def fallocate(self, unique: int, nodeid: int, size: int) -> Reply:
        _, offset, length, mode, _ = abi.FALLOCATE_IN.unpack_from(self.request, 40)
        self.ops.fallocate(nodeid, mode, offset, length)
        return self._done(unique)

    def lseek(self, unique: int, nodeid: int, size: int) -> Reply:
        _, offset, whence, _ = abi.LSEEK_IN.unpack_from(self.request, 40)
        return abi.U64_REPLY.pack(24, 0, unique, self.ops.lseek(nodeid, offset, whence))

    def copy_file_range(self, unique: int, nodeid: int, size: int) -> Reply:
        # The reply's count has 32 bits here; a shorter copy is always allowed, whole pages keep reflinks possible.
        return abi.WRITE_REPLY.pack(24, 0, unique, self._copy(nodeid, 0xFFFFF000), 0)

    def copy_file_range_64(self, unique: int, nodeid: int, size: int) -> Reply:
        return abi.U64_REPLY.pack(24, 0, unique, self._copy(nodeid, (1 << 63) - 4096))

    def _copy(self, nodeid: int, limit: int) -> int:
        _, source_at, target, _, target_at, length, flags = abi.COPY_FILE_RANGE_IN.unpack_from(self.request, 40)
        if self.fast and length > BIG_COPY:
            raise WouldBlock
        return self.ops.copy_file_range(nodeid, source_at, target, target_at, min(length, limit), flags)

    # --- open files -------------------------------------------------------------------------------------------------

    def open(self, unique: int, nodeid: int, size: int) -> Reply:
        if self.noopen:  # said once, then the kernel sends no OPEN any more and keeps every file's page cache
            return error_reply(unique, errno.ENOSYS)
        flags, backing = self.opens.opened(nodeid, abi.U32.unpack_from(self.request, 40)[0])
        return abi.OPEN_REPLY.pack(32, 0, unique, nodeid, flags, backing)

    def create(self, unique: int, nodeid: int, size: int) -> Reply:
        if self.noopen:  # the kernel turns to MKNOD for good; an open by CREATE would bring a RELEASE
            return error_reply(unique, errno.ENOSYS)
        flags, mode, umask, _ = abi.CREATE_IN.unpack_from(self.request, 40)
        uid, gid = abi.CALLER.unpack_from(self.request, 24)
        entry = self.ops.create(nodeid, self.view[56 : size - 1].tobytes(), flags, mode, umask, uid, gid)
        return self._opened_entry(unique, entry, flags)

    def tmpfile(self, unique: int, nodeid: int, size: int) -> Reply:
        flags, mode, umask, _ = abi.CREATE_IN.unpack_from(self.request, 40)
        uid, gid = abi.CALLER.unpack_from(self.request, 24)
        return self._opened_entry(unique, self.ops.tmpfile(nodeid, flags, mode, umask, uid, gid), flags)

    def _opened_entry(self, unique: int, entry: Entry, flags: int) -> Reply:
        opened, backing = self.opens.created(entry[0], flags)
        timeout = self.timeout
        return abi.CREATE_REPLY.pack(
            160, 0, unique, entry[0], entry[1], timeout, timeout, 0, 0, *entry[2], entry[0], opened, backing
        )

    def release(self, unique: int, nodeid: int, size: int) -> Reply:
        self.opens.released(nodeid)
        return self._done(unique)

    # --- directories and the whole filesystem -----------------------------------------------------------------------

    def readdir(self, unique: int, nodeid: int, size: int) -> Reply:
        _, offset, room = abi.READ_IN.unpack_from(self.request, 40)
        end = listing.plain(self.ops, nodeid, offset, self.out, room)
        abi.OUT_HEADER.pack_into(self.out, 0, end, 0, unique)
        return self.out[:end]

    def readdirplus(self, unique: int, nodeid: int, size: int) -> Reply:
        _, offset, room = abi.READ_IN.unpack_from(self.request, 40)
        end = listing.plus(self.ops, nodeid, offset, self.out, min(room, self.piece), self.timeout)
        abi.OUT_HEADER.pack_into(self.out, 0, end, 0, unique)
        return self.out[:end]

    def fsyncdir(self, unique: int, nodeid: int, size: int) -> Reply:
        self.ops.fsyncdir(nodeid, bool(abi.FSYNC_IN.unpack_from(self.request, 40)[1] & abi.FSYNC_FDATASYNC))
        return self._done(unique)

    def syncfs(self, unique: int, nodeid: int, size: int) -> Reply:
        self.ops.syncfs()
        return self._done(unique)

    def statfs(self, unique: int, nodeid: int, size: int) -> Reply:
        return abi.STATFS_REPLY.pack(96, 0, unique, *self.ops.statfs())

    def opendir(self, unique: int, nodeid: int, size: int) -> Reply:
        return error_reply(unique, errno.ENOSYS)  # said once: listings are cached, and cost nothing the second time

    def nothing(self, unique: int, nodeid: int, size: int) -> Reply:
        """DESTROY, RELEASEDIR: nothing to do, success."""
        return self._done(unique)

    def unsupported(self, unique: int, nodeid: int, size: int) -> Reply:
        """ENOSYS: the kernel does it itself (ACCESS, FLUSH, locks) or without, and asks no more."""
        return error_reply(unique, errno.ENOSYS)

    def session_only(self, unique: int, nodeid: int, size: int) -> Reply | None:
        raise RuntimeError("the session answers this itself")


class CarefulDispatcher(Dispatcher):
    """For layers that others change too: what the kernel may keep is asked of the core, for each answer."""

    __slots__ = ("_longest",)

    def __init__(self, ops: Operations, terms: Negotiated, opens: Opens, *, fast: bool) -> None:
        super().__init__(ops, terms, opens, fast=fast)
        self._longest = terms.timeout

    def answer(self, opcode: int, unique: int, nodeid: int, size: int) -> Reply | None:
        if nodeid and opcode not in NO_REPLY:
            assert self.ops.watch is not None
            try:
                self.timeout = self._longest if self.ops.watch(nodeid) else 0
            except OSError:
                self.timeout = 0
        return super().answer(opcode, unique, nodeid, size)

    def lookup(self, unique: int, nodeid: int, size: int) -> Reply:
        entry = self.ops.lookup(nodeid, self.view[40 : size - 1].tobytes())
        if entry is not None:
            return self._entry(unique, entry)
        if not self.timeout:
            return error_reply(unique, errno.ENOENT)
        abi.U64.pack_into(self._negative, 8, unique)
        return self._negative

    def _entry(self, unique: int, entry: Entry) -> Reply:
        of_name = self.timeout
        of_node = of_name if self.ops.watched(entry[0]) else 0
        out = self.out
        abi.ENTRY_REPLY.pack_into(out, 0, 144, 0, unique, entry[0], entry[1], of_name, of_node, 0, 0, *entry[2])
        return out[:144]

    def _opened_entry(self, unique: int, entry: Entry, flags: int) -> Reply:
        opened, backing = self.opens.created(entry[0], flags)
        of_node = self.timeout if self.ops.watched(entry[0]) else 0
        return abi.CREATE_REPLY.pack(
            160, 0, unique, entry[0], entry[1], self.timeout, of_node, 0, 0, *entry[2], entry[0], opened, backing
        )

    def opendir(self, unique: int, nodeid: int, size: int) -> Reply:
        flags = abi.FOPEN_KEEP_CACHE | abi.FOPEN_CACHE_DIR if self.timeout else 0
        return abi.OPEN_REPLY.pack(32, 0, unique, nodeid, flags, 0)

    def readdirplus(self, unique: int, nodeid: int, size: int) -> Reply:
        _, offset, room = abi.READ_IN.unpack_from(self.request, 40)
        end = listing.plus(self.ops, nodeid, offset, self.out, min(room, self.piece), self.timeout, self.ops.watched)
        abi.OUT_HEADER.pack_into(self.out, 0, end, 0, unique)
        return self.out[:end]


def dispatcher(ops: Operations, terms: Negotiated, opens: Opens, *, fast: bool) -> Dispatcher:
    return (CarefulDispatcher if terms.careful else Dispatcher)(ops, terms, opens, fast=fast)


_NO_CHANGE = abi.FATTR_FH | abi.FATTR_LOCKOWNER
NOW = -1  # api.Changes: the time of the change
NO_REPLY = frozenset((abi.FORGET, abi.BATCH_FORGET, abi.INTERRUPT, abi.NOTIFY_REPLY))

# The protocol, one row per opcode: number, name, handler, lane.
OPCODES = (
    (abi.LOOKUP, "LOOKUP", Dispatcher.lookup, FAST),
    (abi.FORGET, "FORGET", Dispatcher.forget, FAST),
    (abi.GETATTR, "GETATTR", Dispatcher.getattr, FAST),
    (abi.SETATTR, "SETATTR", Dispatcher.setattr, FAST),
    (abi.READLINK, "READLINK", Dispatcher.readlink, FAST),
    (abi.SYMLINK, "SYMLINK", Dispatcher.symlink, FAST),
    (abi.MKNOD, "MKNOD", Dispatcher.mknod, FAST),
    (abi.MKDIR, "MKDIR", Dispatcher.mkdir, FAST),
    (abi.UNLINK, "UNLINK", Dispatcher.unlink, FAST),
    (abi.RMDIR, "RMDIR", Dispatcher.rmdir, FAST),
    (abi.RENAME, "RENAME", Dispatcher.rename, FAST),
    (abi.LINK, "LINK", Dispatcher.link, FAST),
    (abi.OPEN, "OPEN", Dispatcher.open, FAST),
    (abi.READ, "READ", Dispatcher.read, FAST),
    (abi.WRITE, "WRITE", Dispatcher.write, FAST),
    (abi.STATFS, "STATFS", Dispatcher.statfs, FAST),
    (abi.RELEASE, "RELEASE", Dispatcher.release, FAST),
    (abi.FSYNC, "FSYNC", Dispatcher.fsync, SLOW),
    (abi.SETXATTR, "SETXATTR", Dispatcher.setxattr, FAST),
    (abi.GETXATTR, "GETXATTR", Dispatcher.getxattr, FAST),
    (abi.LISTXATTR, "LISTXATTR", Dispatcher.listxattr, FAST),
    (abi.REMOVEXATTR, "REMOVEXATTR", Dispatcher.removexattr, FAST),
    (abi.FLUSH, "FLUSH", Dispatcher.unsupported, FAST),
    (abi.INIT, "INIT", Dispatcher.session_only, SESSION),
    (abi.OPENDIR, "OPENDIR", Dispatcher.opendir, FAST),
    (abi.READDIR, "READDIR", Dispatcher.readdir, FAST),
    (abi.RELEASEDIR, "RELEASEDIR", Dispatcher.nothing, FAST),
    (abi.FSYNCDIR, "FSYNCDIR", Dispatcher.fsyncdir, SLOW),
    (abi.GETLK, "GETLK", Dispatcher.unsupported, FAST),
    (abi.SETLK, "SETLK", Dispatcher.unsupported, FAST),
    (abi.SETLKW, "SETLKW", Dispatcher.unsupported, FAST),
    (abi.ACCESS, "ACCESS", Dispatcher.unsupported, FAST),
    (abi.CREATE, "CREATE", Dispatcher.create, FAST),
    (abi.INTERRUPT, "INTERRUPT", Dispatcher.session_only, SESSION),
    (abi.BMAP, "BMAP", Dispatcher.unsupported, FAST),
    (abi.DESTROY, "DESTROY", Dispatcher.nothing, FAST),
    (abi.IOCTL, "IOCTL", Dispatcher.ioctl, FAST),
    (abi.POLL, "POLL", Dispatcher.unsupported, FAST),
    (abi.NOTIFY_REPLY, "NOTIFY_REPLY", Dispatcher.session_only, SESSION),
    (abi.BATCH_FORGET, "BATCH_FORGET", Dispatcher.batch_forget, FAST),
    (abi.FALLOCATE, "FALLOCATE", Dispatcher.fallocate, FAST),
    (abi.READDIRPLUS, "READDIRPLUS", Dispatcher.readdirplus, FAST),
    (abi.RENAME2, "RENAME2", Dispatcher.rename2, FAST),
    (abi.LSEEK, "LSEEK", Dispatcher.lseek, FAST),
    (abi.COPY_FILE_RANGE, "COPY_FILE_RANGE", Dispatcher.copy_file_range, FAST),
    (abi.SYNCFS, "SYNCFS", Dispatcher.syncfs, SLOW),
    (abi.TMPFILE, "TMPFILE", Dispatcher.tmpfile, FAST),
    (abi.STATX, "STATX", Dispatcher.statx, FAST),
    (abi.COPY_FILE_RANGE_64, "COPY_FILE_RANGE_64", Dispatcher.copy_file_range_64, FAST),
)
NAMES = {row[0]: row[1] for row in OPCODES}
LANES = {row[0]: row[3] for row in OPCODES}


def error_reply(unique: int, error: int | None) -> bytes:
    """The kernel takes errnos of 1 to 511 only; an OSError without one is EIO."""
    return abi.OUT_HEADER.pack(16, -error if error and 0 < error < 512 else -errno.EIO, unique)


def data_reply(unique: int, data: bytes) -> bytes:
    return abi.OUT_HEADER.pack(16 + len(data), 0, unique) + data


def _nanoseconds(seconds: int, nanoseconds: int) -> int:
    """The core's -1 means "now": the one instant of the epoch that can't be asked for moves by a nanosecond."""
    moment = seconds * 1_000_000_000 + nanoseconds
    return 0 if moment == NOW else moment


def _split_name(data: bytes) -> tuple[bytes, bytes]:
    name, _, value = data.partition(b"\0")
    return name, value


def _report(opcode: int, nodeid: int) -> None:
    import traceback

    print(f"unionfs: internal error in {NAMES[opcode]} of node {nodeid} (EIO)", file=sys.stderr)
    traceback.print_exc(file=sys.stderr)
