"""Errors that reach a person, and the exit codes that go with them.

A leaf: imports nothing of ours. Errors that reach a *process on the mount* are plain `OSError`s with the
errno that the kernel is to return; `MountError` is for the command line.
"""

from __future__ import annotations

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Sequence

EXIT_OK = 0
EXIT_FAILURE = 1  # anything not named below
EXIT_USAGE = 2  # unknown option, missing argument, unknown driver
EXIT_LAYER = 3  # a layer directory is missing, overlaps another or is unfit
EXIT_BUSY = 4  # upper or work is in use by another live mount
EXIT_MOUNTPOINT = 5  # mountpoint missing, not a directory, or already a mount of ours
EXIT_PERMISSION = 6  # not allowed: /dev/fuse, mount, xattrs
EXIT_NO_FUSE = 7  # no /dev/fuse, no fusermount3
EXIT_FORMAT = 8  # an upper of a format or version that this driver can't take
EXIT_NOT_OURS = 9  # umount/status/which on something that is not a unionfs mount


class MountError(Exception):
    """A mount that can't be made: which path, why, and what to do, in one line; `code` is the exit code."""

    def __init__(self, message: str, code: int = EXIT_FAILURE) -> None:
        super().__init__(message)
        self.code = code


class WouldBlock(Exception):
    """Raised by the core in the fast lane, before any side effect: run the same request in the slow lane."""


def nearest(word: str, known: Sequence[str]) -> str:
    """Part of a message about an unknown word: the known one that it looks like, if any does."""
    from difflib import get_close_matches

    close = get_close_matches(word, known, 1, 0.6)
    return f", did you mean {close[0]}?" if close else ""
