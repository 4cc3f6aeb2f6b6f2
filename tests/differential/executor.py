"""Runs one sequence of operations in one directory and records everything a program could see of the outcome.

A record is a list with one dict per operation, fact name to value; two file systems behave alike when their records
are equal. Facts are made comparable here: numbers that differ for good reason (st_ino, st_dev, times of now) become
relations ("the same as before", "equal to its other name", "recent"). Inode relations are only ever taken between
objects that exist at the same moment or across an operation that keeps the object, since numbers may be reused.

Runs in a worker process of one thread that it owns: it changes credentials and umask and may die of SIGBUS.
"""

from __future__ import annotations

import ctypes
import errno
import fcntl
import hashlib
import mmap
import os
import stat
from collections.abc import Callable
from typing import Any

Operation = tuple[Any, ...]  # verb, uid, arguments
Facts = dict[str, Any]

ANCIENT = 1_600_000_000  # times before this were set on purpose; later ones are "recent"
LIBC = ctypes.CDLL(None, use_errno=True)
AT_FDCWD = -100
AT_SYMLINK_FOLLOW = 0x400

# What a descriptor is opened on when an operation needs it and the sequence did not say: no operation is idle.
FIRST = {0: ("./low", os.O_RDWR), 1: ("./sparse", os.O_RDONLY), 2: ("./h1", os.O_RDWR)}

# Verbs after which the object named by their first argument is still the same object.
KEEPING = {
    "chmod", "chown", "utimens", "truncate", "setxattr", "removexattr", "stat", "getxattr", "listxattr", "readdir",
    "readlink", "cat", "open",
}


class Unavailable(Exception):
    """The operation has nothing to act on (an empty slot); recorded alike everywhere."""


def digest(data: bytes) -> Any:
    if len(data) <= 32:
        return data
    return (len(data), hashlib.blake2b(data, digest_size=6).hexdigest())


def attributes(st: os.stat_result) -> tuple[Any, ...]:
    kind = stat.S_IFMT(st.st_mode)
    return (
        stat.filemode(st.st_mode), st.st_uid, st.st_gid,
        st.st_size if kind in (stat.S_IFREG, stat.S_IFLNK) else None,
        st.st_nlink,
        st.st_rdev if kind in (stat.S_IFCHR, stat.S_IFBLK) else None,
        st.st_mtime_ns if st.st_mtime < ANCIENT else "recent",
    )  # fmt: skip


class Slot:
    def __init__(self, fd: int, ino: int) -> None:
        self.fd = fd
        self.ino = ino
        self.map: mmap.mmap | None = None

    def close(self) -> None:
        if self.map is not None:
            self.map.close()
        os.close(self.fd)


class Executor:
    """One sequence at one place. `remount` and `interchange` are what the file system does for those verbs."""

    def __init__(self, root: str, remount: Callable[[], None], interchange: Callable[[], None]) -> None:
        self.root = root
        self.slots: dict[int, Slot] = {}
        self.extra: Facts = {}  # what an operation wants recorded besides its result
        self._remount = remount
        self._interchange = interchange

    def run(self, operations: list[Operation]) -> list[Facts]:
        try:
            return [self.step(operation) for operation in operations]
        finally:
            self.close_all()

    def step(self, operation: Operation) -> Facts:
        verb, uid, *args = operation
        watched = [a for a in args if isinstance(a, str) and a.startswith("./")]
        before = {name: self.lstat(name) for name in watched}
        facts: Facts = {}
        self.extra = {}
        method = getattr(self, "do_" + verb)
        try:
            if uid:
                os.setgroups([])
                os.setresgid(uid, uid, 0)
                os.setresuid(uid, uid, 0)
            try:
                facts["outcome"] = ("ok", method(*args))
            finally:
                if uid:
                    os.setresuid(0, 0, 0)
                    os.setresgid(0, 0, 0)
        except Unavailable as nothing:
            facts["outcome"] = ("unavailable", str(nothing))
        except OSError as error:
            facts["outcome"] = ("error", errno.errorcode.get(error.errno or 0, error.errno))
        after = {name: self.lstat(name) for name in watched}
        for name in watched:
            st = after[name]
            facts[name] = None if st is None else attributes(st)
        for number, slot in sorted(self.slots.items()):
            if verb in ("open", "tmpfile", "close") or number not in args:
                continue
            st = os.fstat(slot.fd)
            facts[f"fd{number}"] = attributes(st)
            facts[f"fd{number} inode kept"] = st.st_ino == slot.ino
        facts.update(self.extra)
        if facts["outcome"][0] == "ok":
            facts.update(self.identities(verb, args, before, after))
        return facts

    @staticmethod
    def identities(verb: str, args: list[Any], before: dict[str, Any], after: dict[str, Any]) -> Facts:
        def same(a: os.stat_result | None, b: os.stat_result | None) -> bool | None:
            return None if a is None or b is None else (a.st_ino, a.st_dev) == (b.st_ino, b.st_dev)

        if verb in KEEPING:
            names = [a for a in args if a in before]
            return {f"{name} inode kept": same(before[name], after[name]) for name in names}
        if verb == "rename":
            facts: Facts = {"renamed inode kept": same(before[args[0]], after[args[1]])}
            if args[2] == 2:  # RENAME_EXCHANGE
                facts["exchanged inode kept"] = same(before[args[1]], after[args[0]])
            return facts
        if verb == "link":
            return {"linked inode same": same(after[args[0]], after[args[1]])}
        return {}

    def lstat(self, name: str) -> os.stat_result | None:
        try:
            return os.lstat(self.path(name))
        except OSError:
            return None

    def path(self, name: str) -> str:
        return os.path.join(self.root, name)

    def slot(self, number: int) -> Slot:
        if number not in self.slots:
            name, flags = FIRST[number]
            try:
                self.keep(number, os.open(self.path(name), flags | os.O_CLOEXEC))
            except OSError:
                raise Unavailable("no descriptor") from None
        return self.slots[number]

    def keep(self, number: int, fd: int) -> None:
        if number in self.slots:
            self.slots.pop(number).close()
        self.slots[number] = Slot(fd, os.fstat(fd).st_ino)

    def close_all(self) -> None:
        for slot in self.slots.values():
            slot.close()
        self.slots.clear()

    # ---- descriptors
    def do_open(self, number: int, name: str, flags: int, mode: int, umask: int) -> None:
        old = os.umask(umask)
        try:
            self.keep(number, os.open(self.path(name), flags | os.O_NONBLOCK | os.O_CLOEXEC, mode))
        finally:
            os.umask(old)

    def do_tmpfile(self, number: int, name: str, flags: int, mode: int) -> None:
        self.keep(number, os.open(self.path(name), flags | os.O_TMPFILE | os.O_CLOEXEC, mode))

    def do_close(self, number: int) -> None:
        self.slot(number)
        self.slots.pop(number).close()

    def do_linkfd(self, number: int, name: str) -> None:
        source = f"/proc/self/fd/{self.slot(number).fd}".encode()
        if LIBC.linkat(AT_FDCWD, source, AT_FDCWD, os.fsencode(self.path(name)), AT_SYMLINK_FOLLOW):
            raise OSError(ctypes.get_errno(), "linkat")

    def do_reopen(self, number: int, flags: int) -> None:
        source = f"/proc/self/fd/{self.slot(number).fd}"
        self.keep(number, os.open(source, flags | os.O_NONBLOCK | os.O_CLOEXEC))

    def do_pread(self, number: int, offset: int, length: int) -> Any:
        return digest(os.pread(self.slot(number).fd, length, offset))

    def do_read(self, number: int, length: int) -> Any:
        return digest(os.read(self.slot(number).fd, length))

    def do_pwrite(self, number: int, offset: int, length: int, fill: int) -> int:
        return os.pwrite(self.slot(number).fd, bytes([fill]) * length, offset)

    def do_write(self, number: int, length: int, fill: int) -> tuple[int, int]:
        fd = self.slot(number).fd
        return os.write(fd, bytes([fill]) * length), os.lseek(fd, 0, os.SEEK_CUR)

    def do_seek(self, number: int, offset: int, whence: int) -> int:
        fd = self.slot(number).fd
        if stat.S_ISDIR(os.fstat(fd).st_mode):
            raise Unavailable("positions in directories are anybody's own")
        return os.lseek(fd, offset, whence)

    def do_ftruncate(self, number: int, size: int) -> None:
        os.ftruncate(self.slot(number).fd, size)

    def do_fallocate(self, number: int, mode: int, offset: int, length: int) -> None:
        fd = self.slot(number).fd
        if LIBC.fallocate(fd, mode, ctypes.c_long(offset), ctypes.c_long(length)):
            raise OSError(ctypes.get_errno(), "fallocate")

    def do_copyrange(self, source: int, source_offset: int, target: int, target_offset: int, length: int) -> int:
        return os.copy_file_range(
            self.slot(source).fd, self.slot(target).fd, length, source_offset, target_offset
        )

    def do_fsync(self, number: int) -> None:
        os.fsync(self.slot(number).fd)

    def do_fstat(self, number: int) -> None:
        self.slot(number)  # the facts that are recorded for every slot say it all

    def do_fchmod(self, number: int, mode: int) -> None:
        os.fchmod(self.slot(number).fd, mode)

    def do_fchown(self, number: int, uid: int, gid: int) -> None:
        os.fchown(self.slot(number).fd, uid, gid)

    def do_futimens(self, number: int, seconds: int) -> None:
        os.utime(self.slot(number).fd, ns=(seconds * 10**9 + 123456789, seconds * 10**9 + 987654321))

    def do_fsetxattr(self, number: int, name: str, value: bytes) -> None:
        os.setxattr(self.slot(number).fd, name, value)

    def do_fgetxattr(self, number: int, name: str) -> bytes:
        return os.getxattr(self.slot(number).fd, name)

    def do_map(self, number: int, writable: bool) -> int:
        slot = self.slot(number)
        if slot.map is not None:
            slot.map.close()
            slot.map = None
        st = os.fstat(slot.fd)
        if not stat.S_ISREG(st.st_mode) or not st.st_size:
            raise Unavailable("nothing to map")
        protection = mmap.PROT_READ | (mmap.PROT_WRITE if writable else 0)
        slot.map = mmap.mmap(slot.fd, min(st.st_size, 200_000), mmap.MAP_SHARED, protection)
        return len(slot.map)

    def mapping(self, number: int, offset: int, length: int) -> mmap.mmap:
        slot = self.slot(number)
        if slot.map is None:
            self.do_map(number, fcntl.fcntl(slot.fd, fcntl.F_GETFL) & os.O_ACCMODE == os.O_RDWR)
        if slot.map is None or offset + length > min(len(slot.map), os.fstat(slot.fd).st_size):
            raise Unavailable("not mapped")  # beyond the end it would be SIGBUS
        return slot.map

    def do_mapread(self, number: int, offset: int, length: int) -> Any:
        return digest(self.mapping(number, offset, length)[offset : offset + length])

    def do_mapwrite(self, number: int, offset: int, length: int, fill: int) -> None:
        try:
            self.mapping(number, offset, length)[offset : offset + length] = bytes([fill]) * length
        except TypeError:
            raise Unavailable("mapped read-only") from None

    # ---- names
    def do_stat(self, name: str) -> tuple[Any, ...]:
        return attributes(os.stat(self.path(name)))

    def do_cat(self, name: str) -> Any:
        fd = os.open(self.path(name), os.O_RDONLY | os.O_NONBLOCK)
        try:
            return digest(os.read(fd, 4 << 20))
        finally:
            os.close(fd)

    def do_truncate(self, name: str, size: int) -> None:
        os.truncate(self.path(name), size)

    def do_mkdir(self, name: str, mode: int, umask: int) -> None:
        old = os.umask(umask)
        try:
            os.mkdir(self.path(name), mode)
        finally:
            os.umask(old)

    def do_mknod(self, name: str, mode: int, device: int, umask: int) -> None:
        old = os.umask(umask)
        try:
            os.mknod(self.path(name), mode, device)
        finally:
            os.umask(old)

    def do_rmdir(self, name: str) -> None:
        os.rmdir(self.path(name))

    def do_unlink(self, name: str) -> None:
        os.unlink(self.path(name))

    def do_rename(self, old: str, new: str, flags: int) -> None:
        if LIBC.renameat2(AT_FDCWD, os.fsencode(self.path(old)), AT_FDCWD, os.fsencode(self.path(new)), flags):
            raise OSError(ctypes.get_errno(), "renameat2")

    def do_link(self, name: str, new: str) -> None:
        os.link(self.path(name), self.path(new), follow_symlinks=False)

    def do_symlink(self, target: bytes, name: str) -> None:
        os.symlink(target, os.fsencode(self.path(name)))

    def do_readlink(self, name: str) -> str:
        return os.readlink(self.path(name))

    def do_chmod(self, name: str, mode: int) -> None:
        os.chmod(self.path(name), mode)

    def do_chown(self, name: str, uid: int, gid: int) -> None:
        os.lchown(self.path(name), uid, gid)

    def do_utimens(self, name: str, seconds: int | None) -> Any:
        path = self.path(name)
        if seconds is None:
            os.utime(path, follow_symlinks=False)
            return None
        os.utime(path, ns=(seconds * 10**9 + 5, seconds * 10**9 + 123456789), follow_symlinks=False)
        return os.lstat(path).st_atime_ns

    def do_setxattr(self, name: str, key: str, value: bytes, flags: int) -> None:
        os.setxattr(self.path(name), key, value, flags, follow_symlinks=False)

    def do_getxattr(self, name: str, key: str) -> bytes:
        return os.getxattr(self.path(name), key, follow_symlinks=False)

    def do_removexattr(self, name: str, key: str) -> None:
        os.removexattr(self.path(name), key, follow_symlinks=False)

    def do_listxattr(self, name: str) -> list[str]:
        return sorted(os.listxattr(self.path(name), follow_symlinks=False))

    def do_readdir(self, name: str) -> list[Any]:
        return listing(self.path(name))

    # ---- the whole file system
    def do_remount(self) -> None:
        self.across(self._remount, numbers=True)

    def do_interchange(self) -> None:
        """Continue on the same layers under the other implementation of the format."""
        self.across(self._interchange, numbers=False)

    def across(self, action: Callable[[], None], numbers: bool) -> None:
        """Records what of the tree is not what it was."""
        self.close_all()
        before = tree(self.root, numbers)
        action()
        after = tree(self.root, numbers)
        names = [name for name in {**before, **after} if before.get(name) != after.get(name)]
        self.extra = {f"across {name}": (before.get(name), after.get(name)) for name in names}

    def do_tree(self) -> None:
        self.extra = {f"tree {name}": value for name, value in tree(self.root).items()}


def listing(path: str) -> list[Any]:
    with os.scandir(path) as entries:
        found = []
        for entry in entries:
            st = entry.stat(follow_symlinks=False)
            kind = "d" if entry.is_dir(follow_symlinks=False) else "l" if entry.is_symlink() else "-"
            found.append((entry.name, kind, entry.inode() == st.st_ino))
    return sorted(found)


def tree(root: str, numbers: bool = False) -> dict[str, Any]:
    """Everything below root: attributes, xattrs, contents, which names are one inode; with `numbers` st_ino itself."""
    found: dict[str, Any] = {}
    groups: dict[tuple[int, int], list[str]] = {}

    def visit(path: str, name: str) -> None:
        st = os.lstat(path)
        kind = stat.S_IFMT(st.st_mode)
        xattrs = [(key, os.getxattr(path, key, follow_symlinks=False))
                  for key in sorted(os.listxattr(path, follow_symlinks=False))]  # fmt: skip
        content: Any = None
        if kind == stat.S_IFREG:
            with open(path, "rb") as file:
                content = digest(file.read())
        elif kind == stat.S_IFLNK:
            content = os.readlink(os.fsencode(path))
        elif kind == stat.S_IFDIR:
            content = listing(path)
        found[name] = (attributes(st), xattrs, content, st.st_ino if numbers else None)
        if kind != stat.S_IFDIR:
            groups.setdefault((st.st_dev, st.st_ino), []).append(name)
        else:
            for entry in content:
                visit(os.path.join(path, entry[0]), f"{name}/{entry[0]}")

    visit(root, ".")
    found["links"] = sorted(sorted(names) for names in groups.values() if len(names) > 1)
    return found
