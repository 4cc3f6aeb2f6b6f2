"""The FUSE kernel ABI, protocol 7.45, as numbers and `struct.Struct`s.

Layouts and values are those of include/uapi/linux/fuse.h; names keep the kernel's where they have one. Everything is
little-endian without padding: the kernel pads every struct to 8 bytes itself, and every machine that FUSE servers
written in Python run on is little-endian (the big-endian ones would need "=" here and nothing else).
"""

from __future__ import annotations

from struct import Struct

MAJOR = 7
MINOR = 45
ROOT_ID = 1

IN_HEADER_SIZE = 40
OUT_HEADER_SIZE = 16

# --- opcodes ---------------------------------------------------------------------------------------------------------
LOOKUP, FORGET, GETATTR, SETATTR, READLINK, SYMLINK = 1, 2, 3, 4, 5, 6
MKNOD, MKDIR, UNLINK, RMDIR, RENAME, LINK, OPEN = 8, 9, 10, 11, 12, 13, 14
READ, WRITE, STATFS, RELEASE, FSYNC = 15, 16, 17, 18, 20
SETXATTR, GETXATTR, LISTXATTR, REMOVEXATTR, FLUSH = 21, 22, 23, 24, 25
INIT, OPENDIR, READDIR, RELEASEDIR, FSYNCDIR = 26, 27, 28, 29, 30
GETLK, SETLK, SETLKW, ACCESS, CREATE, INTERRUPT, BMAP, DESTROY = 31, 32, 33, 34, 35, 36, 37, 38
IOCTL, POLL, NOTIFY_REPLY, BATCH_FORGET, FALLOCATE = 39, 40, 41, 42, 43
READDIRPLUS, RENAME2, LSEEK, COPY_FILE_RANGE = 44, 45, 46, 47
SYNCFS, TMPFILE, STATX, COPY_FILE_RANGE_64 = 50, 51, 52, 53

# --- INIT flags; bits 32 and up travel in flags2 ---------------------------------------------------------------------
INIT_FLAGS = {
    "ASYNC_READ": 1 << 0,
    "POSIX_LOCKS": 1 << 1,
    "FILE_OPS": 1 << 2,
    "ATOMIC_O_TRUNC": 1 << 3,
    "EXPORT_SUPPORT": 1 << 4,
    "BIG_WRITES": 1 << 5,
    "DONT_MASK": 1 << 6,
    "SPLICE_WRITE": 1 << 7,
    "SPLICE_MOVE": 1 << 8,
    "SPLICE_READ": 1 << 9,
    "FLOCK_LOCKS": 1 << 10,
    "HAS_IOCTL_DIR": 1 << 11,
    "AUTO_INVAL_DATA": 1 << 12,
    "DO_READDIRPLUS": 1 << 13,
    "READDIRPLUS_AUTO": 1 << 14,
    "ASYNC_DIO": 1 << 15,
    "WRITEBACK_CACHE": 1 << 16,
    "NO_OPEN_SUPPORT": 1 << 17,
    "PARALLEL_DIROPS": 1 << 18,
    "HANDLE_KILLPRIV": 1 << 19,
    "POSIX_ACL": 1 << 20,
    "ABORT_ERROR": 1 << 21,
    "MAX_PAGES": 1 << 22,
    "CACHE_SYMLINKS": 1 << 23,
    "NO_OPENDIR_SUPPORT": 1 << 24,
    "EXPLICIT_INVAL_DATA": 1 << 25,
    "MAP_ALIGNMENT": 1 << 26,
    "SUBMOUNTS": 1 << 27,
    "HANDLE_KILLPRIV_V2": 1 << 28,
    "SETXATTR_EXT": 1 << 29,
    "INIT_EXT": 1 << 30,
    "SECURITY_CTX": 1 << 32,
    "HAS_INODE_DAX": 1 << 33,
    "CREATE_SUPP_GROUP": 1 << 34,
    "HAS_EXPIRE_ONLY": 1 << 35,
    "DIRECT_IO_ALLOW_MMAP": 1 << 36,
    "PASSTHROUGH": 1 << 37,
    "NO_EXPORT_SUPPORT": 1 << 38,
    "HAS_RESEND": 1 << 39,
    "ALLOW_IDMAP": 1 << 40,
    "OVER_IO_URING": 1 << 41,
    "REQUEST_TIMEOUT": 1 << 42,
}
INIT_EXT = INIT_FLAGS["INIT_EXT"]

# --- other flags -----------------------------------------------------------------------------------------------------
FATTR_MODE, FATTR_UID, FATTR_GID, FATTR_SIZE, FATTR_ATIME, FATTR_MTIME = 1, 2, 4, 8, 16, 32
FATTR_FH, FATTR_ATIME_NOW, FATTR_MTIME_NOW, FATTR_LOCKOWNER = 1 << 6, 1 << 7, 1 << 8, 1 << 9
FATTR_KILL_SUIDGID = 1 << 11
FOPEN_KEEP_CACHE, FOPEN_CACHE_DIR, FOPEN_NOFLUSH, FOPEN_PASSTHROUGH = 1 << 1, 1 << 3, 1 << 5, 1 << 7
WRITE_KILL_SUIDGID = 1 << 2
FSYNC_FDATASYNC = 1 << 0
SETXATTR_ACL_KILL_SGID = 1 << 0
UNIQUE_RESEND = 1 << 63  # set in `unique` of a request that the kernel sends a second time

NOTIFY_INVAL_INODE, NOTIFY_INVAL_ENTRY, NOTIFY_RESEND, NOTIFY_INC_EPOCH = 2, 3, 7, 8

# --- device ioctls ---------------------------------------------------------------------------------------------------
DEV_IOC_BACKING_OPEN = 0x4010E501
DEV_IOC_BACKING_CLOSE = 0x4004E502

# --- requests: structs that follow the 40-byte header ----------------------------------------------------------------
IN_HEADER = Struct("<IIQQIIIHH")  # len, opcode, unique, nodeid, uid, gid, pid, total_extlen, padding
IN_HEAD = Struct("<IIQQ")  # the part of it that every request needs
CALLER = Struct("<II")  # uid, gid; at offset 24
INIT_IN = Struct("<IIII")  # major, minor, max_readahead, flags; then flags2 where INIT_EXT is set
U32 = Struct("<I")
U64 = Struct("<Q")
U64X2 = Struct("<QQ")
SETATTR_IN = Struct("<IIQQQqqqIIIIIIII")  # valid, _, fh, size, owner, a/m/ctime, a/m/ctimensec, mode, _, uid, gid, _
MKNOD_IN = Struct("<IIII")  # mode, rdev, umask, padding
MKDIR_IN = Struct("<II")  # mode, umask
CREATE_IN = Struct("<IIII")  # flags, mode, umask, open_flags
RENAME2_IN = Struct("<QII")  # newdir, flags, padding
READ_IN = Struct("<QQI")  # fh, offset, size; then read_flags, lock_owner, flags, padding
WRITE_IN = Struct("<QQII")  # fh, offset, size, write_flags; then lock_owner, flags, padding
WRITE_DATA = IN_HEADER_SIZE + 40
FSYNC_IN = Struct("<QII")  # fh, fsync_flags, padding
SETXATTR_IN = Struct("<IIII")  # size, flags, setxattr_flags, padding (the first two where SETXATTR_EXT is off)
GETXATTR_IN = Struct("<II")  # size, padding
FALLOCATE_IN = Struct("<QQQII")  # fh, offset, length, mode, padding
LSEEK_IN = Struct("<QQII")  # fh, offset, whence, padding
COPY_FILE_RANGE_IN = Struct("<QQQQQQQ")  # fh_in, off_in, nodeid_out, fh_out, off_out, len, flags
IOCTL_IN = Struct("<QIIQII")  # fh, flags, cmd, arg, in_size, out_size
BATCH_FORGET_IN = Struct("<II")  # count, dummy; then count times nodeid, nlookup

# --- replies; those of the hot opcodes include the 16-byte header ----------------------------------------------------
OUT_HEADER = Struct("<IiQ")  # len, error, unique
ATTR = "QQQqqqIIIIIIIIII"  # the kernel declares the seconds unsigned and reads them signed
ENTRY = "QQQQII" + ATTR  # nodeid, generation, entry_valid, attr_valid, their nanoseconds, attributes
ENTRY_REPLY = Struct("<IiQ" + ENTRY)
ATTR_REPLY = Struct("<IiQQII" + ATTR)  # header, attr_valid, its nanoseconds, dummy, attributes
OPEN_OUT = Struct("<QIi")  # fh, open_flags, backing_id
OPEN_REPLY = Struct("<IiQQIi")
CREATE_REPLY = Struct("<IiQ" + ENTRY + "QIi")
WRITE_REPLY = Struct("<IiQII")  # header, size, padding
GETXATTR_REPLY = WRITE_REPLY  # header, size, padding
STATFS_REPLY = Struct("<IiQQQQQQIII4x24x")  # header, struct fuse_kstatfs
U64_REPLY = Struct("<IiQQ")
IOCTL_REPLY = Struct("<IiQiIII")  # header, result, flags, in_iovs, out_iovs; then out_size bytes
DIRENT = Struct("<QQII")  # ino, off, namelen, type; then the name, padded to 8 bytes
DIRENTPLUS = Struct("<" + ENTRY + "QQII")
STATX_REPLY = Struct("<IiQQII16x" + "IIQIIIHHQQQQ" + "qIi" * 4 + "IIII112x")
INIT_REPLY = Struct("<IiQIIIIHHIIHHIIH22x")
# ^ header, major, minor, max_readahead, flags, max_background, congestion_threshold, max_write, time_gran, max_pages,
#   map_alignment, flags2, max_stack_depth, request_timeout

NOTIFY_INVAL_INODE_OUT = Struct("<IiQQqq")  # header (unique 0, error: the code), nodeid, offset, length
NOTIFY_INVAL_ENTRY_OUT = Struct("<IiQQII")  # header, parent, namelen, flags; then the name and a zero
BACKING_MAP = Struct("<iIQ")  # fd, flags, padding

# --- inode flags (FS_IOC_GETFLAGS and FS_IOC_FSGETXATTR speak of the same things in two ways) ------------------------
FS_IOC_GETFLAGS, FS_IOC_SETFLAGS = 0x80086601, 0x40086602
FS_IOC_GETFLAGS_32, FS_IOC_SETFLAGS_32 = 0x80046601, 0x40046602
FS_IOC_FSGETXATTR, FS_IOC_FSSETXATTR = 0x801C581F, 0x401C5820
FSXATTR = Struct("<IIIII8x")  # xflags, extsize, nextents, projid, cowextsize
STATX_BASIC_STATS, STATX_BTIME = 0x7FF, 0x800
