"""Operations as pyfuse3 request handlers: translates arguments, results, errors and inode numbers, nothing else.

pyfuse3 gives an entry one number, which the kernel takes both for the node id and for the st_ino that programs see.
Ours differ, so `Numbers` lets the kernel know each node by the union's st_ino wherever that is free.

Threading: every handler runs in the trio thread, which is the fast lane. What the core refuses there (`WouldBlock`),
and what always waits for a disk, runs in a worker thread of a limited number. Only FUSEError may leave a handler:
anything else would end pyfuse3's loop and with it the mount.
"""

from __future__ import annotations

import errno
import functools
import os
import stat
import traceback
from collections.abc import Callable, Coroutine, Sequence
from typing import Any, Concatenate, ParamSpec, TypeVar

import pyfuse3
import trio
from pyfuse3 import FUSEError

from unionfs.api import ROOT_ID, Attr, Changes, Entry, Operations
from unionfs.errors import WouldBlock

P = ParamSpec("P")
T = TypeVar("T")

FOREVER = 1 << 31  # seconds; the mount is the only writer, what changes behind it is invalidated by name

# How much of a listing is asked of the core at a time. pyfuse3 doesn't say how much room the reply has, so the last
# batch is partly in vain: its surplus was looked up and is forgotten again. Small batches keep that small.
LISTING_BATCH = 1024
LISTING_OVERHEAD = 152  # struct fuse_direntplus before the name
DOTS = 2

_SYNTHETIC = 1 << 63  # numbers from here on stand in for a st_ino that another node of the kernel's has
_ACCESS_ACL = b"system.posix_acl_access"


class Numbers:
    """By which number the kernel knows a node: its st_ino, or a made-up one where that is taken or has a meaning.

    A node has its number for as long as the kernel remembers it, counted as the kernel counts: one per entry handed
    out, so that a late FORGET of a deleted file can't hit the file that inherited its st_ino.
    Trio thread only, except `of`.
    """

    def __init__(self) -> None:
        self._nodes = {pyfuse3.ROOT_INODE: ROOT_ID}
        self._numbers = {ROOT_ID: pyfuse3.ROOT_INODE}
        self._counts: dict[int, int] = {}
        self._made_up = 0

    def node(self, number: int) -> int:
        try:
            return self._nodes[number]
        except KeyError:
            raise OSError(errno.ESTALE, os.strerror(errno.ESTALE)) from None

    def of(self, nodeid: int) -> int | None:
        return self._numbers.get(nodeid)

    def take(self, nodeid: int, ino: int) -> int:
        number = self._numbers.get(nodeid)
        if number is None:
            number = ino
            while number in self._nodes or number <= pyfuse3.ROOT_INODE:
                number = _SYNTHETIC + self._made_up
                self._made_up += 1
            self._nodes[number] = nodeid
            self._numbers[nodeid] = number
        self._counts[number] = self._counts.get(number, 0) + 1
        return number

    def drop(self, number: int, count: int) -> int | None:
        """The node that the kernel forgets `count` entries of."""
        nodeid = self._nodes.get(number)
        if nodeid is not None:
            left = self._counts.get(number, 0) - count
            if left > 0 or nodeid == ROOT_ID:
                self._counts[number] = left
            else:
                self._counts.pop(number, None)
                del self._nodes[number], self._numbers[nodeid]
        return nodeid

    def __len__(self) -> int:
        return len(self._nodes)


Handler = Callable[Concatenate["Handlers", P], Coroutine[Any, Any, T]]


def message(handler: Handler[P, T]) -> Handler[P, T]:
    """Counts the message, under its protocol name, and lets nothing but FUSEError out."""
    name = {"readdir": "READDIRPLUS"}.get(handler.__name__, handler.__name__.upper())

    @functools.wraps(handler)
    async def guarded(self: Handlers, /, *args: P.args, **kwargs: P.kwargs) -> T:
        self.messages[name] = self.messages.get(name, 0) + 1
        try:
            return await handler(self, *args, **kwargs)
        except OSError as error:
            code = error.errno or errno.EIO
        except Exception:
            traceback.print_exc()
            code = errno.EIO
        # Out here the error is gone, with the frames that it held, and with the descriptors that those held.
        raise FUSEError(code)

    return guarded


class Handlers(pyfuse3.Operations):
    """One instance serves one mount. Not overridden, and so answered ENOSYS, which the kernel remembers: `flush` (there
    is nothing to flush at a close), `access` (the kernel checks permissions itself) and `poll`."""

    # "." and ".." as names would only come from handles of NFS clients that outlived the kernel's own cache.
    supports_dot_lookup = False

    def __init__(
        self, ops: Operations, *, acl: bool, writeback: bool = False, max_threads: int = 16, timeout: int = FOREVER,
        careful: bool = False,
    ) -> None:  # fmt: skip
        super().__init__()
        self.enable_acl = acl
        self.enable_writeback_cache = writeback
        self.ops = ops
        self.numbers = Numbers()
        self.messages: dict[str, int] = {}
        self.moved = 0  # messages that left the trio thread for a worker
        self._limiter = trio.CapacityLimiter(max_threads)
        self._timeout = timeout
        self._careful = careful  # others change the layers too: what the kernel may keep is asked for each answer

    async def _run(self, operation: Callable[..., T], *args: Any) -> T:
        """Here if that takes microseconds, else in a worker."""
        try:
            return operation(*args)
        except WouldBlock:
            return await self._run_slowly(operation, *args)

    async def _run_slowly(self, operation: Callable[..., T], *args: Any) -> T:
        self.moved += 1
        code, result = await trio.to_thread.run_sync(_settle, operation, args, limiter=self._limiter)
        if code:
            raise OSError(code, os.strerror(code))
        return result  # type: ignore[return-value]  # T, where there is no code

    async def _trusted(self, nodeid: int) -> bool:
        """Before an operation on the node: whether the kernel may keep the answer."""
        if not self._careful:
            return True
        assert self.ops.watch is not None
        try:
            return await self._run(self.ops.watch, nodeid)
        except OSError:
            return False

    def _entry(self, entry: Entry, trusted: bool) -> pyfuse3.EntryAttributes:
        """For a reply that makes the kernel count the entry."""
        nodeid, generation, attr = entry
        result = self._attributes(attr, trusted)
        if trusted and self._careful and not self.ops.watched(nodeid):
            result.attr_timeout = 0
        number = self.numbers.take(nodeid, attr[0])
        result.generation = generation
        if number != attr[0]:
            # This reply can't say both; the one to GETATTR can, so make the kernel ask before it answers a stat.
            result.st_ino = number
            result.attr_timeout = 0
        return result

    def _attributes(self, attr: Attr, trusted: bool = True) -> pyfuse3.EntryAttributes:
        result = pyfuse3.EntryAttributes()
        (
            result.st_ino, result.st_size, result.st_blocks, atime, mtime, ctime, atime_ns, mtime_ns, ctime_ns,
            result.st_mode, result.st_nlink, result.st_uid, result.st_gid, result.st_rdev, result.st_blksize, _flags,
        ) = attr  # fmt: skip
        result.st_atime_ns = atime * 1_000_000_000 + atime_ns
        result.st_mtime_ns = mtime * 1_000_000_000 + mtime_ns
        result.st_ctime_ns = ctime * 1_000_000_000 + ctime_ns
        result.entry_timeout = result.attr_timeout = self._timeout if trusted else 0
        return result

    # Names and nodes

    @message
    async def lookup(
        self, parent_inode: int, name: bytes, ctx: pyfuse3.RequestContext
    ) -> pyfuse3.EntryAttributes:
        parent = self.numbers.node(parent_inode)
        trusted = await self._trusted(parent)
        entry = await self._run(self.ops.lookup, parent, name)
        if entry is not None:
            return self._entry(entry, trusted)
        absent = pyfuse3.EntryAttributes()  # st_ino 0: no such name, and the kernel may remember that
        absent.entry_timeout = self._timeout if trusted else 0
        return absent

    async def forget(self, inode_list: Sequence[tuple[int, int]]) -> None:
        self.messages["FORGET"] = self.messages.get("FORGET", 0) + 1
        for number, count in inode_list:
            nodeid = self.numbers.drop(number, count)
            if nodeid is not None:
                try:
                    await self._run(self.ops.forget, nodeid, count)
                except Exception:  # nobody waits for an answer that could say so
                    traceback.print_exc()

    @message
    async def mknod(
        self, parent_inode: int, name: bytes, mode: int, rdev: int, ctx: pyfuse3.RequestContext
    ) -> pyfuse3.EntryAttributes:
        parent = self.numbers.node(parent_inode)
        trusted = await self._trusted(parent)
        entry = await self._run(self.ops.mknod, parent, name, mode, rdev, ctx.umask, ctx.uid, ctx.gid)
        return self._entry(entry, trusted)

    @message
    async def mkdir(
        self, parent_inode: int, name: bytes, mode: int, ctx: pyfuse3.RequestContext
    ) -> pyfuse3.EntryAttributes:
        parent = self.numbers.node(parent_inode)
        mode = stat.S_IMODE(mode)  # pyfuse3 adds the type
        trusted = await self._trusted(parent)
        return self._entry(await self._run(self.ops.mkdir, parent, name, mode, ctx.umask, ctx.uid, ctx.gid), trusted)

    @message
    async def create(
        self, parent_inode: int, name: bytes, mode: int, flags: int, ctx: pyfuse3.RequestContext
    ) -> tuple[pyfuse3.FileInfo, pyfuse3.EntryAttributes]:
        parent = self.numbers.node(parent_inode)
        trusted = await self._trusted(parent)
        entry = await self._run(self.ops.create, parent, name, flags, mode, ctx.umask, ctx.uid, ctx.gid)
        return pyfuse3.FileInfo(fh=entry[0], keep_cache=True), self._entry(entry, trusted)

    @message
    async def symlink(
        self, parent_inode: int, name: bytes, target: bytes, ctx: pyfuse3.RequestContext
    ) -> pyfuse3.EntryAttributes:
        parent = self.numbers.node(parent_inode)
        trusted = await self._trusted(parent)
        return self._entry(await self._run(self.ops.symlink, parent, name, target, ctx.uid, ctx.gid), trusted)

    @message
    async def link(
        self, inode: int, new_parent_inode: int, new_name: bytes, ctx: pyfuse3.RequestContext
    ) -> pyfuse3.EntryAttributes:
        source, parent = self.numbers.node(inode), self.numbers.node(new_parent_inode)
        trusted = await self._trusted(parent)
        return self._entry(await self._run(self.ops.link, source, parent, new_name), trusted)

    @message
    async def unlink(self, parent_inode: int, name: bytes, ctx: pyfuse3.RequestContext) -> None:
        await self._run(self.ops.unlink, self.numbers.node(parent_inode), name)

    @message
    async def rmdir(self, parent_inode: int, name: bytes, ctx: pyfuse3.RequestContext) -> None:
        await self._run(self.ops.rmdir, self.numbers.node(parent_inode), name)

    @message
    async def rename(
        self,
        parent_inode_old: int,
        name_old: bytes,
        parent_inode_new: int,
        name_new: bytes,
        flags: int,
        ctx: pyfuse3.RequestContext,
    ) -> None:
        node = self.numbers.node
        await self._run(
            self.ops.rename, node(parent_inode_old), name_old, node(parent_inode_new), name_new, flags
        )

    @message
    async def readlink(self, inode: int, ctx: pyfuse3.RequestContext) -> bytes:
        return await self._run(self.ops.readlink, self.numbers.node(inode))

    # Attributes

    @message
    async def getattr(self, inode: int, ctx: pyfuse3.RequestContext) -> pyfuse3.EntryAttributes:
        nodeid = self.numbers.node(inode)
        trusted = await self._trusted(nodeid)
        return self._attributes(await self._run(self.ops.getattr, nodeid), trusted)

    @message
    async def setattr(
        self,
        inode: int,
        attr: pyfuse3.EntryAttributes,
        fields: pyfuse3.SetattrFields,
        fh: int | None,
        ctx: pyfuse3.RequestContext,
    ) -> pyfuse3.EntryAttributes:
        changes = Changes(
            size=attr.st_size if fields.update_size else None,
            mode=stat.S_IMODE(attr.st_mode) if fields.update_mode else None,
            uid=attr.st_uid if fields.update_uid else None,
            gid=attr.st_gid if fields.update_gid else None,
            atime_ns=attr.st_atime_ns if fields.update_atime else None,
            mtime_ns=attr.st_mtime_ns if fields.update_mtime else None,
        )
        nodeid = self.numbers.node(inode)
        trusted = await self._trusted(nodeid)
        return self._attributes(await self._run(self.ops.setattr, nodeid, changes), trusted)

    # Data. A file's handle is its node id: pyfuse3 gives `read` and the like the handle only.

    @message
    async def open(self, inode: int, flags: int, ctx: pyfuse3.RequestContext) -> pyfuse3.FileInfo:
        nodeid = self.numbers.node(inode)
        if flags & os.O_TRUNC:
            # libfuse asks the kernel for O_TRUNC in the open, and the kernel then leaves setuid to the server.
            # (It asks for CAP_FSETID where we can only see the uid.)
            changes = Changes(size=0, kill_suidgid=ctx.uid != 0)
            await self._run(self.ops.setattr, nodeid, changes)
        await self._run(self.ops.open, nodeid, flags & ~os.O_TRUNC)
        return pyfuse3.FileInfo(fh=nodeid, keep_cache=True)

    @message
    async def release(self, fh: int) -> None:
        await self._run(self.ops.release, fh)

    @message
    async def read(self, fh: int, off: int, size: int) -> bytes:
        buffer = memoryview(bytearray(size))
        count = await self._run(self.ops.read, fh, off, buffer)
        return buffer[:count]  # type: ignore[return-value]  # any buffer will do, and this one is not copied

    @message
    async def write(self, fh: int, off: int, buf: bytes) -> int:
        # The kernel strips setuid by a SETATTR of its own before the write.
        return await self._run(self.ops.write, fh, off, memoryview(buf), False)

    @message
    async def fsync(self, fh: int, datasync: bool) -> None:
        await self._run_slowly(self.ops.fsync, fh, datasync)

    # Directories

    @message
    async def opendir(self, inode: int, ctx: pyfuse3.RequestContext) -> int:
        return self.numbers.node(inode)

    @message
    async def releasedir(self, fh: int) -> None:
        pass

    @message
    async def fsyncdir(self, fh: int, datasync: bool) -> None:
        await self._run_slowly(self.ops.fsyncdir, fh, datasync)

    @message
    async def readdir(self, fh: int, start_id: int, token: pyfuse3.ReaddirToken) -> None:
        # The dots are made here, at 1 and 2; the core's names come after 2.
        cookie = max(start_id, DOTS)
        trusted = await self._trusted(fh)
        if start_id < DOTS:
            attributes = self._attributes(await self._run(self.ops.getattr, fh))  # the kernel counts no dots
            for position in range(start_id, DOTS):
                if not pyfuse3.readdir_reply(token, b".." if position else b".", attributes, position + 1):
                    return
        while batch := await self._run(self.ops.readdirplus, fh, cookie, LISTING_BATCH, LISTING_OVERHEAD):
            for position, (name, cookie, entry) in enumerate(batch):
                attributes = self._entry(entry, trusted)
                if not pyfuse3.readdir_reply(token, name, attributes, cookie):
                    self.numbers.drop(attributes.st_ino, 1)
                    for _, _, (nodeid, _, _) in batch[position:]:
                        await self._run(self.ops.forget, nodeid, 1)
                    return

    # The filesystem, and extended attributes

    @message
    async def statfs(self, ctx: pyfuse3.RequestContext) -> pyfuse3.StatvfsData:
        result = pyfuse3.StatvfsData()
        (
            result.f_blocks,
            result.f_bfree,
            result.f_bavail,
            result.f_files,
            result.f_ffree,
            result.f_bsize,
            result.f_namemax,
            result.f_frsize,
        ) = await self._run(self.ops.statfs)
        result.f_favail = result.f_ffree
        return result

    @message
    async def getxattr(self, inode: int, name: bytes, ctx: pyfuse3.RequestContext) -> bytes:
        return await self._run(self.ops.getxattr, self.numbers.node(inode), name)

    @message
    async def listxattr(self, inode: int, ctx: pyfuse3.RequestContext) -> list[bytes]:
        return await self._run(self.ops.listxattr, self.numbers.node(inode), ctx.uid)

    @message
    async def setxattr(self, inode: int, name: bytes, value: bytes, ctx: pyfuse3.RequestContext) -> None:
        # pyfuse3 has done what XATTR_CREATE and XATTR_REPLACE ask for, by a getxattr, and doesn't pass them.
        nodeid = self.numbers.node(inode)
        kill_sgid = name == _ACCESS_ACL and not _in_group(ctx, (await self._run(self.ops.getattr, nodeid))[12])
        await self._run(self.ops.setxattr, nodeid, name, value, 0, kill_sgid)

    @message
    async def removexattr(self, inode: int, name: bytes, ctx: pyfuse3.RequestContext) -> None:
        await self._run(self.ops.removexattr, self.numbers.node(inode), name)


def _settle(operation: Callable[..., T], args: tuple[Any, ...]) -> tuple[int, T | None]:
    """An errno or a result. An OSError that travelled through trio would live on, in a cycle with its frames."""
    try:
        return 0, operation(*args)
    except OSError as error:
        return error.errno or errno.EIO, None


def _in_group(ctx: pyfuse3.RequestContext, gid: int) -> bool:
    """Whether the caller may keep setgid on a file of that group: libfuse doesn't ask the kernel to tell us."""
    if ctx.uid == 0 or ctx.gid == gid:
        return True
    try:
        return gid in pyfuse3.get_sup_groups(ctx.pid)
    except (OSError, RuntimeError):  # gone already, or of a pid namespace that we can't see
        return False
