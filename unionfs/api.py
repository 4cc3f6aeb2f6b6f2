"""The seams: value types and Protocols that sessions, core and drivers share. A leaf.

Kept free of `typing`, `dataclasses` and `enum` at run time: importing them costs more than mounting does.
"""

from __future__ import annotations

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable
    from typing import Any, Protocol
else:
    Protocol = object

ROOT_ID = 1

# The fields of struct fuse_attr (include/uapi/linux/fuse.h) in their order: ino, size, blocks, atime, mtime,
# ctime, atimensec, mtimensec, ctimensec, mode, nlink, uid, gid, rdev (kernel's 32-bit encoding), blksize, flags.
Attr = tuple[int, int, int, int, int, int, int, int, int, int, int, int, int, int, int, int]

# nodeid, generation, attributes. The receiver owes the core one `forget` per Entry it was handed.
Entry = tuple[int, int, Attr]

# name, cookie to resume after it, entry (readdirplus).
DirEntryPlus = tuple[bytes, int, Entry]

# name, cookie to resume after it, st_ino, st_mode (type bits are enough).
DirEntry = tuple[bytes, int, int, int]


class Changes:
    """What a SETATTR asks for; None means "leave as it is". Times are nanoseconds since the epoch."""

    __slots__ = ("atime_ns", "gid", "kill_suidgid", "mode", "mtime_ns", "size", "uid")

    def __init__(
        self,
        *,
        size: int | None = None,
        mode: int | None = None,
        uid: int | None = None,
        gid: int | None = None,
        atime_ns: int | None = None,
        mtime_ns: int | None = None,
        kill_suidgid: bool = False,
    ) -> None:
        self.size = size
        self.mode = mode
        self.uid = uid
        self.gid = gid
        self.atime_ns = atime_ns  # -1: now
        self.mtime_ns = mtime_ns  # -1: now
        self.kill_suidgid = kill_suidgid  # FATTR_KILL_SUIDGID: drop setuid, and setgid where group-executable

    def empty(self) -> bool:
        """Nothing to set: how the kernel asks for security.capability to go (ATTR_KILL_PRIV)."""
        return (
            self.size is None
            and self.mode is None
            and self.uid is None
            and self.gid is None
            and self.atime_ns is None
            and self.mtime_ns is None
        )


class Notifier(Protocol):
    """What a session lets the core tell the kernel. Safe from any thread; silent when there is nothing cached.

    Never called while a request on the same inode is being answered in that thread (the kernel would wait
    for itself).
    """

    def invalidate_entry(self, parent: int, name: bytes) -> None: ...

    def expire_entries(self) -> bool: ...  # every name is asked for again at its next use; False: the kernel can't

    def invalidate_inode(self, nodeid: int, offset: int = 0, length: int = 0) -> None: ...


class Operations(Protocol):
    """The core as a session sees it. Synchronous; any thread; errors are OSError(errno).

    Lanes: a session sets `lanes.fast = True` (a threading.local) in its dispatcher thread. There, an operation
    that would have to wait (a big copy-up, an inode that a slow request holds, a read that misses the page
    cache) raises `WouldBlock` before it has changed anything, and the session runs it again in a slow thread.
    Handles are the node ids: no operation needs anything that only an earlier `open` knew.
    """

    lanes: Any

    def start(self, notifier: Notifier) -> None: ...
    def stop(self) -> None: ...  # flush, close descriptors, release locks; after the last request
    def statistics(self) -> dict[str, Any]: ...

    # None: nobody else changes the layers, the kernel may keep what it is told. Else asked before an operation on a
    # node: whether the kernel will be told when what the answer says is no longer so. `watched`: the same, of another
    # node that the answer speaks of; it does nothing to make it so.
    watch: Callable[[int], bool] | None
    def watched(self, nodeid: int) -> bool: ...

    def lookup(self, parent: int, name: bytes) -> Entry | None: ...  # None: no such name (cacheable)
    def forget(self, nodeid: int, nlookup: int) -> None: ...
    def getattr(self, nodeid: int) -> Attr: ...
    def setattr(self, nodeid: int, changes: Changes) -> Attr: ...
    def readlink(self, nodeid: int) -> bytes: ...
    # mode as the caller gave it; umask is applied by the core (a default ACL replaces it).
    def mknod(self, parent: int, name: bytes, mode: int, rdev: int, umask: int, uid: int, gid: int) -> Entry: ...
    def mkdir(self, parent: int, name: bytes, mode: int, umask: int, uid: int, gid: int) -> Entry: ...
    def create(self, parent: int, name: bytes, flags: int, mode: int, umask: int, uid: int, gid: int) -> Entry: ...
    def tmpfile(self, parent: int, flags: int, mode: int, umask: int, uid: int, gid: int) -> Entry: ...
    def symlink(self, parent: int, name: bytes, target: bytes, uid: int, gid: int) -> Entry: ...
    def link(self, nodeid: int, parent: int, name: bytes) -> Entry: ...
    def unlink(self, parent: int, name: bytes) -> None: ...
    def rmdir(self, parent: int, name: bytes) -> None: ...
    def rename(self, parent: int, name: bytes, newparent: int, newname: bytes, flags: int) -> None: ...

    # Data. `open` is called only by sessions that get OPEN: it copies up for a writing open.
    def open(self, nodeid: int, flags: int) -> None: ...
    def release(self, nodeid: int) -> None: ...  # once per open/create/tmpfile of a session that gets RELEASE
    # One plain descriptor with these bytes, the caller's to close; None: there is none that stays the right one.
    def backing_fd(self, nodeid: int, write: bool) -> int | None: ...
    def read(self, nodeid: int, offset: int, buffer: memoryview) -> int: ...  # fills buffer, returns the count
    def write(self, nodeid: int, offset: int, data: memoryview, kill_suidgid: bool) -> int: ...
    def fsync(self, nodeid: int, datasync: bool) -> None: ...
    def fallocate(self, nodeid: int, mode: int, offset: int, length: int) -> None: ...
    def lseek(self, nodeid: int, offset: int, whence: int) -> int: ...  # SEEK_DATA, SEEK_HOLE only
    def copy_file_range(self, src: int, src_off: int, dst: int, dst_off: int, length: int, flags: int) -> int: ...

    # Directories. Positions are stateless: any cookie ever handed out resumes after its name.
    # `overhead` is the fixed size of a record before its name; records are padded to 8 bytes.
    def readdir(self, nodeid: int, cookie: int, size: int, overhead: int) -> list[DirEntry]: ...
    def readdirplus(self, nodeid: int, cookie: int, size: int, overhead: int) -> list[DirEntryPlus]: ...
    def read_ahead(self) -> None: ...  # after a readdirplus that was answered: make ready what follows it
    def fsyncdir(self, nodeid: int, datasync: bool) -> None: ...
    def syncfs(self) -> None: ...

    def statfs(self) -> tuple[int, int, int, int, int, int, int, int]: ...
    # ^ blocks, bfree, bavail, files, ffree, bsize, namelen, frsize (struct fuse_kstatfs order)
    def getxattr(self, nodeid: int, name: bytes) -> bytes: ...
    def listxattr(self, nodeid: int, uid: int) -> list[bytes]: ...  # trusted.* for root only
    def setxattr(self, nodeid: int, name: bytes, value: bytes, flags: int, kill_sgid: bool) -> None: ...
    def removexattr(self, nodeid: int, name: bytes) -> None: ...
    def ioctl_getflags(self, nodeid: int) -> int: ...  # FS_IOC_GETFLAGS
    def ioctl_setflags(self, nodeid: int, flags: int) -> None: ...  # FS_IOC_SETFLAGS
    def birth_time(self, nodeid: int) -> tuple[int, int] | None: ...  # seconds, ns, for STATX

    # For people: which layer a path comes from, and what changed against the lowers.
    def which(self, path: bytes) -> list[dict[str, Any]]: ...
    def diff(self) -> list[tuple[str, bytes]]: ...  # ("A" | "C" | "D", b"/path"), sorted by path


class MountConfig:
    """Everything a mount is made of, as the command lines parsed it. Paths are bytes, absolute."""

    __slots__ = (
        "branches",
        "data",
        "debug",
        "driver",
        "foreground",
        "lowers",
        "mountpoint",
        "options",
        "read_only",
        "session",
        "source",
        "upper",
        "vfs_options",
        "work",
    )

    def __init__(self, mountpoint: bytes, *, driver: str = "overlay") -> None:
        self.mountpoint = mountpoint
        self.driver = driver
        self.lowers: list[bytes] = []  # topmost first
        self.upper: bytes | None = None  # None: read-only
        self.work: bytes | None = None  # None with an upper: a sibling of upper
        self.branches: list[tuple[bytes, str]] = []  # aufs: (path, "rw" | "ro+wh" ...), topmost first
        self.options: dict[str, str] = {}  # driver and core options by name, value "" for a bare word
        self.vfs_options: list[str] = []  # ro, nosuid, nodev, noexec, noatime ...: for mount(2)
        self.session = "auto"  # auto | direct | pyfuse3
        self.data = "auto"  # auto | noopen | cached | passthrough
        self.read_only = False
        self.foreground = False
        self.debug = False
        self.source = "unionfs"  # first field of /proc/mounts


class Session(Protocol):
    """A transport that serves one mounted connection."""

    def serve(self, on_ready: Callable[[], None]) -> None: ...  # returns when unmounted
    def statistics(self) -> dict[str, Any]: ...
