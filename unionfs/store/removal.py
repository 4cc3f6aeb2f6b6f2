"""Deleting a tree of any depth and with any modes, following no symlink.

Each directory met is first moved up into the tree's root: no recursion, two descriptors, no path longer than a name.
Stopped in between, what is left can be deleted by the same call.
"""

from __future__ import annotations

import os
import stat

_FLAGS = os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC


def remove(dirfd: int | None, name: bytes) -> None:
    """Whatever has the name goes. FileNotFoundError if nothing has it."""
    status = os.stat(name, dir_fd=dirfd, follow_symlinks=False)
    if not stat.S_ISDIR(status.st_mode):
        os.unlink(name, dir_fd=dirfd)
        return
    _open_up(dirfd, name)
    top = os.open(name, _FLAGS, dir_fd=dirfd)
    try:
        _empty(top)
    finally:
        os.close(top)
    os.rmdir(name, dir_fd=dirfd)


def _open_up(dirfd: int | None, name: bytes) -> None:
    """Root needs no permission."""
    if os.geteuid():
        os.chmod(name, 0o700, dir_fd=dirfd)


def _empty(top: int) -> None:
    prefix = os.urandom(6).hex().encode()
    moved = 0
    todo = [b"."]
    while todo:
        directory = todo.pop()
        fd = os.open(directory, _FLAGS, dir_fd=top)
        try:
            for entry in os.listdir(b"/proc/self/fd/%d" % fd):
                try:
                    os.unlink(entry, dir_fd=fd)
                except IsADirectoryError:
                    moved += 1
                    place = b"%s-%d" % (prefix, moved)
                    _open_up(fd, entry)
                    os.rename(entry, place, src_dir_fd=fd, dst_dir_fd=top)
                    todo.append(place)
        finally:
            os.close(fd)
        if directory != b".":
            os.rmdir(directory, dir_fd=top)
