"""How a layer directory says that a lower name is gone: the whiteout forms that an unpacked archive is turned into.

A format acts on one directory, given by descriptor, and one name in it. The drivers' own forms are theirs (see
`unionfs_drivers`); what is written here is what they, and the kernel's overlayfs, read.
"""

from __future__ import annotations

import os
import stat

WH = b".wh."
OPAQUE = b".wh..wh..opq"


class Format:
    """`.wh.NAME` files, as aufs and the image spec have them. Every union driver of ours reads them."""

    hides = True  # a missing name shows the parent's; False: the directory is the whole tree

    def whiteout(self, dirfd: int, name: bytes) -> None:
        _touch(dirfd, WH + name)

    def clear_whiteout(self, dirfd: int, name: bytes) -> bool:
        """Removes the whiteout of `name`; False if there was none."""
        try:
            os.unlink(WH + name, dir_fd=dirfd)
        except FileNotFoundError:
            return False
        return True

    def opaque(self, dirfd: int) -> None:
        """The directory `dirfd` hides what the layers below have there."""
        _touch(dirfd, OPAQUE)

    def xattr(self, name: str) -> str | None:
        """The name that an archive's xattr is stored under; None: not at all (it would be a mark of ours)."""
        return None if name.startswith(_MARKS) else name

    def device_zero(self, dirfd: int, name: bytes, mode: int) -> None:
        """A character device 0:0 that is data, not a whiteout."""
        os.mknod(name, mode, 0, dir_fd=dirfd)


_MARKS = ("trusted.unionfs.", "user.unionfs.", "user.fuseoverlayfs.", "trusted.overlay.", "user.overlay.")


class OverlayFormat(Format):
    """Character devices 0:0 and `overlay.opaque`, where the host lets us make them; `.wh.` files where not."""

    def __init__(self, scratch: str) -> None:
        """`scratch`: a directory on the layers' filesystem to try it in."""
        self.devices = True
        self.prefix = ""
        probe = os.path.join(scratch, f"probe-{os.urandom(4).hex()}")
        try:
            os.mknod(probe, stat.S_IFCHR, 0)
            os.unlink(probe)
        except OSError:
            self.devices = False
        os.mkdir(probe)
        for prefix in ("trusted.overlay.", "user.overlay."):
            try:
                os.setxattr(probe, prefix + "opaque", b"y")
                self.prefix = prefix
                break
            except OSError:
                continue
        os.rmdir(probe)

    def whiteout(self, dirfd: int, name: bytes) -> None:
        if self.devices:
            os.mknod(name, stat.S_IFCHR, 0, dir_fd=dirfd)
        else:
            super().whiteout(dirfd, name)

    def clear_whiteout(self, dirfd: int, name: bytes) -> bool:
        if not self.devices:
            return super().clear_whiteout(dirfd, name)
        try:
            status = os.stat(name, dir_fd=dirfd, follow_symlinks=False)
        except FileNotFoundError:
            return False
        if not stat.S_ISCHR(status.st_mode) or status.st_rdev:
            return False
        os.unlink(name, dir_fd=dirfd)
        return True

    def opaque(self, dirfd: int) -> None:
        if self.prefix:
            os.setxattr(dirfd, self.prefix + "opaque", b"y")
        else:
            super().opaque(dirfd)

    def xattr(self, name: str) -> str | None:
        for prefix in ("trusted.overlay.", "user.overlay."):  # escaped as the kernel does it for a stacked overlay's
            if name.startswith(prefix):
                return f"{prefix}overlay.{name[len(prefix) :]}"
        return super().xattr(name)

    def device_zero(self, dirfd: int, name: bytes, mode: int) -> None:
        """As the overlay driver keeps it: an empty file with a mark, in a directory whose files are to be asked."""
        if not self.prefix:
            raise PermissionError(1, "a device 0:0 needs xattrs here")
        fd = os.open(name, os.O_CREAT | os.O_EXCL | os.O_WRONLY | os.O_CLOEXEC, stat.S_IMODE(mode), dir_fd=dirfd)
        try:
            os.setxattr(fd, self.prefix + "unionfs.whiteout", b"y")
        finally:
            os.close(fd)
        os.setxattr(dirfd, self.prefix + "impure", b"y")


class PlainFormat(Format):
    """The directory is the whole tree: what is gone is removed."""

    hides = False

    def whiteout(self, dirfd: int, name: bytes) -> None:
        pass  # whoever unpacks has removed it

    def clear_whiteout(self, dirfd: int, name: bytes) -> bool:
        return False

    def opaque(self, dirfd: int) -> None:
        pass

    def xattr(self, name: str) -> str | None:
        return name


def _touch(dirfd: int, name: bytes) -> None:
    os.close(os.open(name, os.O_CREAT | os.O_WRONLY | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600, dir_fd=dirfd))
