"""The order in which a directory is listed.

A position is a function of the name (a hash), so any cookie ever handed out resumes after its name whatever was added
or removed meanwhile, without a handle, and after a restart of the server too. Safe from any thread.
"""

from __future__ import annotations

import threading
from array import array
from bisect import bisect_left, bisect_right
from zlib import crc32

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Iterator

_SHIFT = 24  # names with the same hash: up to 2**24 in a row
_FIRST = 3 << _SHIFT  # cookies 1 and 2 are "." and ".."


class Order:
    """The names of a directory by position. Two sequences side by side: 16 bytes a name."""

    __slots__ = ("cookies", "lock", "names")

    def __init__(self, names: list[bytes]) -> None:
        self.lock = threading.Lock()
        by_cookie = {_FIRST + (crc32(name) << _SHIFT): name for name in names}
        if len(by_cookie) == len(names):
            order = sorted(by_cookie)
            self.names = [by_cookie[cookie] for cookie in order]
            self.cookies = array("Q", order)
            return
        pairs = sorted([(_FIRST + (crc32(name) << _SHIFT), name) for name in names])
        self.names = [name for _, name in pairs]
        self.cookies = cookies = array("Q", [cookie for cookie, _ in pairs])
        last = -1
        for i, cookie in enumerate(cookies):
            if cookie <= last:
                cookie = cookies[i] = last + 1
            last = cookie

    def after(self, cookie: int, count: int) -> Iterator[tuple[int, bytes]]:
        """The positions and names behind a cookie; taken `count` at a time, which is what the caller will want."""
        while True:
            with self.lock:
                at = bisect_right(self.cookies, cookie)
                some = list(zip(self.cookies[at : at + count], self.names[at : at + count], strict=True))
            if not some:
                return
            yield from some
            cookie = some[-1][0]

    def insert(self, name: bytes) -> None:
        base = _FIRST + (crc32(name) << _SHIFT)
        cookies, names = self.cookies, self.names
        with self.lock:
            at = bisect_left(cookies, base)
            while at < len(cookies) and cookies[at] >> _SHIFT == base >> _SHIFT:
                if names[at] == name:
                    return  # it was there before and its place is still good
                base = cookies[at] + 1
                at += 1
            cookies.insert(at, base)
            names.insert(at, name)
