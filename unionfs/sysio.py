"""System calls that Python's os module lacks, each a thin function that raises OSError.

Stateless and thread-safe. Only ctypes on libc; constants from the kernel's uapi headers.
"""

from __future__ import annotations

import ctypes
import errno
import os
import struct
from fcntl import ioctl

libc = ctypes.CDLL(None, use_errno=True)

AT_FDCWD = -100
AT_EMPTY_PATH = 0x1000
AT_SYMLINK_NOFOLLOW = 0x100

RENAME_NOREPLACE = 1
RENAME_EXCHANGE = 2
RENAME_WHITEOUT = 4

FALLOC_FL_KEEP_SIZE = 0x01
FALLOC_FL_PUNCH_HOLE = 0x02

FICLONE = 0x40049409
FS_IOC_GETFLAGS = 0x80086601
FS_IOC_SETFLAGS = 0x40086602
FS_IOC_GETFSUUID = 0x80111500  # _IOR(0x15, 0, struct fsuuid2), kernel 6.9

FS_IOC_FIEMAP = 0xC020660B

SYNC_FILE_RANGE_WRITE = 2

_MAX_HANDLE = 128
_EXTENTS = 64  # that one FIEMAP asks for
_STATX_BTIME = 0x800


def _fail(name: bytes | None = None) -> OSError:
    code = ctypes.get_errno()
    return OSError(code, os.strerror(code), name)


_renameat2 = libc.renameat2
_renameat2.argtypes = [ctypes.c_int, ctypes.c_char_p, ctypes.c_int, ctypes.c_char_p, ctypes.c_uint]


def renameat2(olddir: int, old: bytes, newdir: int, new: bytes, flags: int) -> None:
    """rename(2) with RENAME_NOREPLACE, RENAME_EXCHANGE or RENAME_WHITEOUT; EINVAL where the filesystem can't."""
    if _renameat2(olddir, old, newdir, new, flags):
        raise _fail(old)


_fallocate = libc.fallocate64
_fallocate.argtypes = [ctypes.c_int, ctypes.c_int, ctypes.c_int64, ctypes.c_int64]


def fallocate(fd: int, mode: int, offset: int, length: int) -> None:
    if _fallocate(fd, mode, offset, length):
        raise _fail()


_utimensat = libc.utimensat
_utimensat.argtypes = [ctypes.c_int, ctypes.c_char_p, ctypes.c_char_p, ctypes.c_int]
_futimens = libc.futimens
_futimens.argtypes = [ctypes.c_int, ctypes.c_char_p]
_TIMES = struct.Struct("<4q")  # struct timespec[2]
_UTIME_NOW = (1 << 30) - 1
_UTIME_OMIT = (1 << 30) - 2


def set_times(fd: int, name: bytes | None, atime_ns: int | None, mtime_ns: int | None, follow: bool = False) -> None:
    """utimensat(2) of fd/name (None: of fd itself, a file open for reading or writing).

    A time that is None stays as it is, -1 is the kernel's now (its own clock tick, so order is kept).
    """
    times = _TIMES.pack(*_timespec(atime_ns), *_timespec(mtime_ns))
    if _futimens(fd, times) if name is None else _utimensat(fd, name, times, 0 if follow else AT_SYMLINK_NOFOLLOW):
        raise _fail(name)


def _timespec(ns: int | None) -> tuple[int, int]:
    if ns is None:
        return 0, _UTIME_OMIT
    return (0, _UTIME_NOW) if ns == -1 else divmod(ns, 1_000_000_000)


_sync_file_range = libc.sync_file_range
_sync_file_range.argtypes = [ctypes.c_int, ctypes.c_int64, ctypes.c_int64, ctypes.c_uint]


def start_writeback(fd: int) -> None:
    """Start writing the file's dirty pages without waiting: blocks get allocated before a rename publishes them."""
    _sync_file_range(fd, 0, 0, SYNC_FILE_RANGE_WRITE)


_M_MMAP_THRESHOLD = -3


def return_big_blocks() -> None:
    """Have blocks of 2 MiB and more given back to the system when they are freed.

    glibc raises its threshold with what it sees freed: the outgrown tables of 100,000 nodes then stay with the process,
    78 bytes for each. Other C libraries have no such call.
    """
    mallopt = getattr(libc, "mallopt", None)
    if mallopt is not None:
        mallopt(_M_MMAP_THRESHOLD, 2 << 20)


def syncfs(fd: int) -> None:
    if libc.syncfs(fd):
        raise _fail()


_HANDLE_HEAD = struct.Struct("<Ii")  # struct file_handle: size, type; the handle follows
_HandleBuffer = ctypes.c_char * (_HANDLE_HEAD.size + _MAX_HANDLE)
_mount_id = ctypes.byref(ctypes.c_int())  # written by every call, read by none
_name_to_handle_at = libc.name_to_handle_at
_name_to_handle_at.argtypes = [ctypes.c_int, ctypes.c_char_p, ctypes.c_char_p, ctypes.c_void_p, ctypes.c_int]


class _Handle(ctypes.Structure):
    _fields_ = [("size", ctypes.c_uint), ("type", ctypes.c_int), ("data", ctypes.c_ubyte * _MAX_HANDLE)]


def name_to_handle(dirfd: int, name: bytes) -> tuple[int, bytes]:
    """The file handle (type, bytes) of dirfd/name, symlinks not followed; b"": dirfd itself. EOPNOTSUPP: none."""
    buf = _HandleBuffer()
    _HANDLE_HEAD.pack_into(buf, 0, _MAX_HANDLE, 0)
    if _name_to_handle_at(dirfd, name, buf, _mount_id, AT_EMPTY_PATH if not name else 0):
        raise _fail(name)
    size, kind = _HANDLE_HEAD.unpack_from(buf)
    return kind, buf.raw[8 : 8 + size]


def open_by_handle(mount_fd: int, kind: int, data: bytes) -> int:
    """An O_PATH descriptor for a file handle; needs CAP_DAC_READ_SEARCH. ESTALE: no such file."""
    handle = _Handle(size=len(data), type=kind)
    ctypes.memmove(handle.data, data, len(data))
    fd = libc.open_by_handle_at(mount_fd, ctypes.byref(handle), os.O_PATH | os.O_CLOEXEC | os.O_NOFOLLOW)
    if fd < 0:
        raise _fail()
    return int(fd)


def fs_uuid(fd: int) -> bytes:
    """The filesystem's 16-byte UUID, zeros where it has none or the kernel (before 6.9) can't tell."""
    buf = bytearray(17)
    try:
        ioctl(fd, FS_IOC_GETFSUUID, buf)
    except OSError:
        return bytes(16)
    return bytes(buf[1 : 1 + buf[0]]).ljust(16, b"\0")


def get_flags(fd: int) -> int:
    """The inode flags of FS_IOC_GETFLAGS (chattr). ENOTTY where the filesystem has none."""
    buf = bytearray(8)
    ioctl(fd, FS_IOC_GETFLAGS, buf)
    return int.from_bytes(buf[:4], "little")


def set_flags(fd: int, flags: int) -> None:
    ioctl(fd, FS_IOC_SETFLAGS, struct.pack("<Q", flags))


_statx = libc.statx
_statx.argtypes = [ctypes.c_int, ctypes.c_char_p, ctypes.c_int, ctypes.c_uint, ctypes.c_void_p]


def birth_time(dirfd: int, name: bytes) -> tuple[int, int] | None:
    """Creation time (seconds, ns) of dirfd/name (b"": dirfd itself), None where the filesystem keeps none."""
    buf = ctypes.create_string_buffer(256)
    flags = AT_SYMLINK_NOFOLLOW | (0 if name else AT_EMPTY_PATH)
    if _statx(dirfd, name, flags, _STATX_BTIME, buf):
        raise _fail(name)
    if not struct.unpack_from("<I", buf, 0)[0] & _STATX_BTIME:
        return None
    sec, nsec = struct.unpack_from("<qI", buf, 80)
    return sec, nsec


def allocated(fd: int, offset: int, length: int) -> int:
    """Bytes of [offset, offset + length) that have blocks, preallocated and not yet written out ones too (FIEMAP; where
    the filesystem has none, what is not a hole)."""
    end = offset + length
    try:
        return _mapped(fd, offset, end)
    except OSError as e:
        if e.errno not in (errno.EOPNOTSUPP, errno.ENOTTY, errno.EINVAL):
            raise
    total, at = 0, offset
    while at < end:
        try:
            data = os.lseek(fd, at, os.SEEK_DATA)
        except OSError as e:
            if e.errno != errno.ENXIO:
                raise
            break
        at = os.lseek(fd, data, os.SEEK_HOLE)
        total += max(0, min(at, end) - data)
    return total


def _mapped(fd: int, at: int, end: int) -> int:
    total = 0
    while at < end:
        buf = bytearray(struct.pack("<QQIIII", at, end - at, 0, 0, _EXTENTS, 0) + bytes(56 * _EXTENTS))
        ioctl(fd, FS_IOC_FIEMAP, buf)
        found = struct.unpack_from("<I", buf, 20)[0]
        for i in range(found):
            logical, _, size = struct.unpack_from("<QQQ", buf, 32 + 56 * i)
            total += max(0, min(logical + size, end) - max(logical, at))
        if found < _EXTENTS:
            break
        at = logical + size
    return total


IN_MODIFY, IN_ATTRIB, IN_CLOSE_WRITE, IN_MOVED_FROM, IN_MOVED_TO, IN_CREATE, IN_DELETE = 2, 4, 8, 64, 128, 256, 512
IN_Q_OVERFLOW, IN_IGNORED, IN_ONLYDIR, IN_EXCL_UNLINK = 1 << 14, 1 << 15, 1 << 24, 1 << 26

_inotify_add_watch = libc.inotify_add_watch
_inotify_add_watch.argtypes = [ctypes.c_int, ctypes.c_char_p, ctypes.c_uint32]


def inotify_init() -> int:
    """A non-blocking inotify descriptor. EMFILE: fs.inotify.max_user_instances is reached."""
    fd = libc.inotify_init1(os.O_NONBLOCK | os.O_CLOEXEC)
    if fd < 0:
        raise _fail()
    return int(fd)


def inotify_add_watch(fd: int, path: bytes, mask: int) -> int:
    """The number of the watch; a second one on the same inode is the same. ENOSPC: max_user_watches is reached."""
    wd = _inotify_add_watch(fd, path, mask)
    if wd < 0:
        raise _fail(path)
    return int(wd)


def inotify_rm_watch(fd: int, wd: int) -> None:
    """EINVAL: it has gone by itself."""
    if libc.inotify_rm_watch(fd, wd):
        raise _fail()


def clone(dst: int, src: int) -> bool:
    """FICLONE: share src's extents with dst. False where the filesystems can't."""
    try:
        ioctl(dst, FICLONE, src)
    except OSError as e:
        if e.errno in (
            errno.EOPNOTSUPP,
            errno.EXDEV,
            errno.EINVAL,
            errno.ENOTTY,
            errno.ENOSYS,
            errno.EPERM,
            errno.EBADF,
        ):
            return False
        raise
    return True


def copy_small(src: int, dst: int, size: int) -> None:
    """copy_data for a few pages without holes: reading and writing costs a fifth of what cloning or asking for holes
    does."""
    pos = 0
    while pos < size:
        data = os.pread(src, size - pos, pos)
        if not data:
            raise OSError(errno.EIO, "file shrank while it was copied")
        pos += os.pwrite(dst, data, pos)


def copy_data(src: int, dst: int, size: int) -> None:
    """Copy size bytes from src to dst (all hole so far), holes kept: FICLONE, copy_file_range, or read and write.

    dst is at least size long afterwards, also where its tail is a hole; it is never cut.
    """
    if size == 0 or clone(dst, src):
        return
    pos = 0
    in_kernel = True
    while pos < size:
        try:
            start = os.lseek(src, pos, os.SEEK_DATA)
        except OSError as e:
            if e.errno == errno.ENXIO:  # nothing but hole up to the end
                break
            start, end = pos, size  # SEEK_DATA unsupported: all is data
        else:
            end = min(os.lseek(src, start, os.SEEK_HOLE), size)
        while start < end:
            n = 0
            if in_kernel:
                try:
                    n = os.copy_file_range(src, dst, min(end - start, 1 << 30), start, start)
                except OSError as e:
                    if e.errno not in (errno.EXDEV, errno.EINVAL, errno.EOPNOTSUPP, errno.ENOSYS, errno.EBADF):
                        raise
                    in_kernel = False
            if n == 0:
                data = os.pread(src, min(end - start, 1 << 20), start)
                if not data:
                    raise OSError(errno.EIO, "file shrank while it was copied")
                n = os.pwrite(dst, data, start)
            start += n
        pos = max(end, pos)
    if os.fstat(dst).st_size < size:
        os.ftruncate(dst, size)
