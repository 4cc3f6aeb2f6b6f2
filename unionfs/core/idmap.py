"""Owners and modes as users of the mount see them, where they differ from the disk's.

`uidmapping`, `gidmapping` (ID:DISK_ID:LENGTH groups), `squash_to_root`, `squash_to_uid`, `squash_to_gid` and
`xattr_permissions` as fuse-overlayfs defines them. With `xattr_permissions` owner and mode live in an xattr
(`uid:gid:mode[:type]`), so that a filesystem or user that can't chown still keeps them.
"""

from __future__ import annotations

import errno
import os
from stat import S_IFBLK, S_IFCHR, S_IFDIR, S_IFIFO, S_IFLNK, S_IFMT, S_IFREG, S_IFSOCK

from unionfs.api import MountConfig
from unionfs.core.layers import Fd, fd_path
from unionfs.errors import EXIT_USAGE, MountError

TYPE_CHECKING = False
if TYPE_CHECKING:
    from unionfs.core.base import Base
    from unionfs.core.nodes import Node

# mode → xattr; 1 needs privileges to write, 2 is containers/storage's name
_SECURITY = b"user.fuseoverlayfs.security."
_XATTRS = {"1": "security.fuseoverlayfs.override_stat", "2": "user.containers.override_stat"}
_TYPES = {
    "dir": S_IFDIR, "symlink": S_IFLNK, "pipe": S_IFIFO, "socket": S_IFSOCK, "file": S_IFREG,
}  # fmt: skip
_TYPE_NAMES = {S_IFDIR: "dir", S_IFLNK: "symlink", S_IFIFO: "pipe", S_IFSOCK: "socket", S_IFREG: "file"}

# What the core itself understands, whatever the driver: part of each driver's `options`.
OPTIONS = {
    "uidmapping": "ID:DISK_ID:LENGTH:…: owners in the mount and on disk",
    "gidmapping": "ID:DISK_ID:LENGTH:…: groups in the mount and on disk",
    "squash_to_root": "everything belongs to root",
    "squash_to_uid": "UID: everything belongs to that user",
    "squash_to_gid": "GID: everything belongs to that group",
    "static_nlink": "directories have a link count of 1 (no need to list them to know)",
    "noacl": "no POSIX ACLs",
    "noxattrs": "1: no extended attributes for users",
    "xattr_permissions": "0|1|2: owner and mode are kept in an xattr (2: user.containers.override_stat)",
}

Range = tuple[int, int, int]  # first id in the mount, first id on disk, length


def _parse(option: str, text: str) -> list[Range]:
    fields = [part for part in text.split(":") if part]
    if len(fields) % 3 or not all(part.isdigit() for part in fields):
        raise MountError(f"{option}={text}: must be groups of ID:DISK_ID:LENGTH", EXIT_USAGE)
    numbers = [int(part) for part in fields]
    return [(numbers[i], numbers[i + 1], numbers[i + 2]) for i in range(0, len(numbers), 3)]


def _number(option: str, text: str) -> int:
    if not text.isdigit():
        raise MountError(f"{option}={text}: must be a number", EXIT_USAGE)
    return int(text)


def _to_mount(ranges: list[Range], disk: int) -> int:
    for first, base, length in ranges:
        if base <= disk < base + length:
            return first + disk - base
    return 65534


def _to_disk(ranges: list[Range], shown: int) -> int:
    for first, base, length in ranges:
        if first <= shown < first + length:
            return base + shown - first
    raise OSError(errno.EINVAL, os.strerror(errno.EINVAL))


class IdMap:
    def __init__(self, config: MountConfig) -> None:
        o = config.options
        self.uids = _parse("uidmapping", o["uidmapping"]) if "uidmapping" in o else []
        self.gids = _parse("gidmapping", o["gidmapping"]) if "gidmapping" in o else []
        root = "squash_to_root" in o
        # As fuse-overlayfs has it: squash_to_uid, squash_to_gid win over squash_to_root.
        self.squash_uid = _number("squash_to_uid", o["squash_to_uid"]) if "squash_to_uid" in o else 0 if root else None
        self.squash_gid = _number("squash_to_gid", o["squash_to_gid"]) if "squash_to_gid" in o else 0 if root else None
        self.xattr = _XATTRS.get(o.get("xattr_permissions", "0"))
        if self.xattr is None and o.get("xattr_permissions", "0") not in ("0", ""):
            raise MountError(f"xattr_permissions={o['xattr_permissions']}: must be 0, 1 or 2", EXIT_USAGE)
        self.noacl = "noacl" in o
        self.noxattrs = o.get("noxattrs", "0") != "0"
        self.squash = self.squash_uid is not None or self.squash_gid is not None
        self.active = bool(self.uids or self.gids or self.squash or self.xattr)

    # --- disk to mount ---

    def show(self, core: Base, node: Node, mode: int, uid: int, gid: int, rdev: int) -> tuple[int, int, int, int]:
        if self.xattr is not None:
            at, path, follow = core._at(node)
            stored = self._read(path, follow)
            del at
            if stored is not None:
                uid, gid, bits, kind, device = stored
                mode = (kind or S_IFMT(mode)) | bits
                rdev = device or rdev
        if self.uids:
            uid = _to_mount(self.uids, uid)
        if self.gids:
            gid = _to_mount(self.gids, gid)
        return (
            mode,
            uid if self.squash_uid is None else self.squash_uid,
            gid if self.squash_gid is None else self.squash_gid,
            rdev,
        )

    def _read(self, path: bytes | int, follow: bool) -> tuple[int, int, int, int, int] | None:
        assert self.xattr is not None
        try:
            text = os.getxattr(path, self.xattr, follow_symlinks=follow).decode("ascii", "replace")
        except OSError:
            return None
        fields = text.split(":")
        try:
            uid, gid, bits = int(fields[0]), int(fields[1]), int(fields[2], 8)
            kind = device = 0
            if len(fields) > 3:
                word, _, rest = fields[3].partition("-")
                if word in ("block", "char"):
                    kind = S_IFBLK if word == "block" else S_IFCHR
                    major, _, minor = rest.partition("-")
                    device = (int(minor) & 0xFF) | int(major) << 8 | (int(minor) & ~0xFF) << 12
                else:
                    kind = _TYPES.get(word, 0)
            return uid, gid, bits & 0o7777, kind, device
        except (ValueError, IndexError):
            return None  # not ours: the disk's own values stand

    # --- mount to disk ---

    def owner(self, uid: int | None, gid: int | None) -> tuple[int, int]:
        """What to store on disk; -1: leave as it is."""
        if uid is not None and self.uids:
            uid = _to_disk(self.uids, uid)
        if gid is not None and self.gids:
            gid = _to_disk(self.gids, gid)
        return (-1 if uid is None else uid), (-1 if gid is None else gid)

    def chown(self, path: bytes | int, uid: int | None, gid: int | None, follow: bool) -> None:
        if self.squash:
            return  # all files belong to one owner: the change would not show
        disk_uid, disk_gid = self.owner(uid, gid)
        stored = self._stored(path, follow)
        if stored is None:
            os.chown(path, disk_uid, disk_gid, follow_symlinks=follow)
            return
        old_uid, old_gid, bits, kind, rdev = stored
        self._write(
            path, follow,
            old_uid if disk_uid < 0 else disk_uid, old_gid if disk_gid < 0 else disk_gid,
            bits & 0o1777 if kind == S_IFREG else bits, kind, rdev,
        )  # fmt: skip

    def chmod(self, path: bytes | int, bits: int, follow: bool) -> None:
        stored = self._stored(path, follow)
        if stored is None:
            os.chmod(path, bits)
            return
        uid, gid, _, kind, rdev = stored
        self._write(path, follow, uid, gid, bits, kind, rdev)

    def _stored(self, path: bytes | int, follow: bool) -> tuple[int, int, int, int, int] | None:
        """What the xattr says or is to say of an inode that keeps it there; None for one that does not."""
        if self.xattr is None:
            return None
        st = os.stat(path, follow_symlinks=follow)
        kind = S_IFMT(st.st_mode)
        if not self._storable(kind):
            return None
        uid, gid, bits, stored_kind, rdev = self._read(path, follow) or (
            st.st_uid, st.st_gid, st.st_mode & 0o7777, kind, 0,
        )  # fmt: skip
        return uid, gid, bits, stored_kind or kind, rdev

    def _storable(self, kind: int) -> bool:
        """An inode of this kind can hold the xattr: only files and directories have user.* ones."""
        return self.xattr is not None and (kind in (S_IFREG, S_IFDIR) or not self.xattr.startswith("user."))

    def disk_mode(self, kind: int, bits: int) -> int:
        """The mode to make a new inode with: ours must be able to work with it where the real one is in the xattr."""
        if not self._storable(kind):
            return bits
        return 0o755 if kind == S_IFDIR else 0o644 | bits & 0o111

    def created(
        self, core: Base, fd: Fd, name: bytes, kind: int, bits: int, rdev: int, uid: int, gid: int, group: int
    ) -> bool:
        """Give a new inode its owner; `group`: inherited from the directory (a disk id), or -1."""
        path, follow = (fd_path(fd, name), False) if name else (fd_path(fd), True)
        if self.squash and self.xattr is None:
            return True
        disk_uid, disk_gid = self.owner(uid, gid)
        if group >= 0:
            disk_gid = group
        if self.xattr is not None and kind == S_IFLNK:
            return True
        if self._storable(kind):
            self._write(path, follow, disk_uid, disk_gid, bits, kind, rdev)
            return True
        os.chown(path, disk_uid, disk_gid, follow_symlinks=follow)
        if kind != S_IFLNK and bits & 0o7000:
            os.chmod(path, bits)
        return True

    def _write(self, path: bytes | int, follow: bool, uid: int, gid: int, bits: int, kind: int, rdev: int) -> None:
        assert self.xattr is not None
        text = f"{uid}:{gid}:{bits:o}"
        if kind in (S_IFBLK, S_IFCHR):
            text += f":{'block' if kind == S_IFBLK else 'char'}-{os.major(rdev)}-{os.minor(rdev)}"
        elif kind in _TYPE_NAMES:
            text += f":{_TYPE_NAMES[kind]}"
        os.setxattr(path, self.xattr, text.encode(), follow_symlinks=follow)

    # --- xattr names ---

    def xattr_in(self, name: bytes) -> bytes | None:
        """With xattr_permissions=2 the container's security xattrs are kept apart, and ours is out of reach."""
        if self.noxattrs or name.startswith(_SECURITY):  # nobody writes there directly: it would be believed later
            return None
        if self.xattr is None:
            return name
        if name == self.xattr.encode():
            return None
        if name.startswith(b"security.") and self.xattr.startswith("user."):
            return b"user.fuseoverlayfs." + name
        return name

    def xattr_out(self, name: bytes) -> bytes | None:
        if name.startswith(_SECURITY):
            apart = self.xattr is not None and self.xattr.startswith("user.")
            return name[len(b"user.fuseoverlayfs.") :] if apart else None
        if self.xattr is not None and name == self.xattr.encode():
            return None
        return name
