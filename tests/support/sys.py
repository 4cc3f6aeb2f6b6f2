"""System calls that the standard library lacks, for tests. Independent of the product's own on purpose."""

from __future__ import annotations

import ctypes
import ctypes.util
import fcntl
import os
import struct

libc = ctypes.CDLL(None, use_errno=True)

NOREPLACE, EXCHANGE, RENAME_WHITEOUT = 1, 2, 4
KEEP_SIZE, PUNCH_HOLE, COLLAPSE_RANGE, ZERO_RANGE, INSERT_RANGE, UNSHARE_RANGE = 1, 2, 8, 16, 32, 64
MNT_DETACH = 2
AT_FDCWD = -100
AT_EMPTY_PATH, AT_SYMLINK_FOLLOW = 0x1000, 0x400
FS_IOC_GETFLAGS, FS_IOC_SETFLAGS = 0x80086601, 0x40086602
FS_IMMUTABLE_FL, FS_APPEND_FL, FS_NODUMP_FL, FS_NOATIME_FL = 0x10, 0x20, 0x40, 0x80


def _check(result: int) -> int:
    if result < 0:
        number = ctypes.get_errno()
        raise OSError(number, os.strerror(number))
    return result


def renameat2(
    old: str | bytes, new: str | bytes, flags: int, *, olddir: int = AT_FDCWD, newdir: int = AT_FDCWD
) -> None:
    _check(libc.renameat2(olddir, os.fsencode(old), newdir, os.fsencode(new), flags))


def fallocate(fd: int, mode: int, offset: int, length: int) -> None:
    _check(libc.fallocate(fd, mode, ctypes.c_long(offset), ctypes.c_long(length)))


def umount(path: str | bytes, flags: int = 0) -> None:
    _check(libc.umount2(os.fsencode(path), flags))


def mount(source: str, target: str | bytes, kind: str, options: str = "", flags: int = 0) -> None:
    _check(libc.mount(source.encode(), os.fsencode(target), kind.encode(), flags, os.fsencode(options)))


def linkat(olddir: int, old: str | bytes, newdir: int, new: str | bytes, flags: int) -> None:
    _check(libc.linkat(olddir, os.fsencode(old), newdir, os.fsencode(new), flags))


def link_fd(fd: int, path: str | bytes) -> None:
    """Gives a name to an O_TMPFILE."""
    linkat(AT_FDCWD, f"/proc/self/fd/{fd}", AT_FDCWD, path, AT_SYMLINK_FOLLOW)


def syncfs(fd: int) -> None:
    _check(libc.syncfs(fd))


def getflags(fd: int) -> int:
    return int(struct.unpack("l", fcntl.ioctl(fd, FS_IOC_GETFLAGS, bytes(8)))[0])


def setflags(fd: int, flags: int) -> None:
    fcntl.ioctl(fd, FS_IOC_SETFLAGS, struct.pack("l", flags))


def birth_time_ns(path: str | bytes) -> int | None:
    """stx_btime by statx(2), None when the filesystem has none."""
    buffer = ctypes.create_string_buffer(256)
    _check(libc.statx(AT_FDCWD, os.fsencode(path), 0x100, 0x800, buffer))
    if not struct.unpack_from("I", buffer, 0)[0] & 0x800:
        return None
    seconds, nanoseconds = struct.unpack_from("qI", buffer, 80)
    return int(seconds * 1_000_000_000 + nanoseconds)


ACL_USER_OBJ, ACL_USER, ACL_GROUP_OBJ, ACL_GROUP, ACL_MASK, ACL_OTHER = 1, 2, 4, 8, 0x10, 0x20
NO_ID = 0xFFFFFFFF
ACL_ACCESS, ACL_DEFAULT = "system.posix_acl_access", "system.posix_acl_default"


def acl(*entries: tuple[int, int, int]) -> bytes:
    """The xattr form of a POSIX ACL: (tag, permissions, id) each, in order."""
    return struct.pack("<I", 2) + b"".join(struct.pack("<HHI", *entry) for entry in entries)


def capability(permitted: int) -> bytes:
    """A version 2 security.capability value with the effective bit."""
    return struct.pack("<IIIII", 0x02000001, permitted, 0, 0, 0)


def segments(fd: int) -> list[tuple[int, int]]:
    """The data segments of a file, by SEEK_DATA and SEEK_HOLE."""
    end, offset, found = os.fstat(fd).st_size, 0, []
    while offset < end:
        try:
            start = os.lseek(fd, offset, os.SEEK_DATA)
        except OSError:
            break
        offset = os.lseek(fd, start, os.SEEK_HOLE)
        found.append((start, offset))
    return found
