"""Which blocks of a file are redirected, in memory: one byte a block in pages of 1,024, made where there is something.

A page of one kind is that number alone, so a run of any length costs an entry per 1,024 blocks and scattered blocks a
KiB each at most. A first write anywhere is O(1): sorted runs in a list move half of the list for it, which at 65,000
runs (a 1 GiB file, half of it written at random) took longer than the write. No locks: the file's holder has one.
"""

from __future__ import annotations

from bisect import bisect_left, insort

PAGE = 1024  # blocks
_BYTE = (b"\0", b"\1", b"\2")


class Extents:
    """Blocks by number, each 0 (the base's), DATA (1) or HOLE (2)."""

    __slots__ = ("_order", "_pages")

    def __init__(self) -> None:
        self._pages: dict[int, int | bytearray] = {}
        self._order: list[int] = []  # the pages' numbers, sorted

    def put(self, first: int, end: int, kind: int) -> None:
        """Blocks [first, end) become `kind` (0: the base's again)."""
        pages = self._pages
        while first < end:
            page, at = divmod(first, PAGE)
            count = min(end - first, PAGE - at)
            first += count
            have = pages.get(page)
            if have is None:
                if not kind:
                    continue
                insort(self._order, page)
                have = 0
            if count == PAGE:
                pages[page] = kind
                continue
            if not isinstance(have, bytearray):
                if have == kind:
                    continue
                have = pages[page] = bytearray(_BYTE[have] * PAGE)
            if count == 1:
                have[at] = kind
            else:
                have[at : at + count] = _BYTE[kind] * count
            if at + count == PAGE and have.count(kind) == PAGE:
                pages[page] = kind

    def cut(self, end: int) -> None:
        """Forget everything from block `end` on."""
        keep = bisect_left(self._order, -(-end // PAGE))
        for page in self._order[keep:]:
            del self._pages[page]
        del self._order[keep:]
        if end % PAGE:
            self.put(end, -(-end // PAGE) * PAGE, 0)

    def has(self, first: int, end: int, kind: int) -> bool:
        """All of [first, end) is of that kind."""
        while first < end:
            page, at = divmod(first, PAGE)
            count = min(end - first, PAGE - at)
            have = self._pages.get(page, 0)
            if isinstance(have, bytearray):
                if have[at] != kind or (count > 1 and have.count(kind, at, at + count) != count):
                    return False
            elif have != kind:
                return False
            first += count
        return True

    def covers(self, end: int) -> bool:
        """No block before `end` is the base's. Ends at the first that is."""
        for number in range(-(-end // PAGE)):
            have = self._pages.get(number, 0)
            if isinstance(have, bytearray):
                if have.find(0, 0, min(PAGE, end - number * PAGE)) >= 0:
                    return False
            elif not have:
                return False
        return True

    def runs(self, first: int, end: int) -> list[tuple[int, int, int]]:
        """[first, end) as (first, end, kind), kind 0 for the base's; neighbours differ."""
        out: list[tuple[int, int, int]] = []
        order = self._order
        i = bisect_left(order, first // PAGE)
        while first < end:
            start = order[i] * PAGE if i < len(order) else end
            if start > first:
                stop = min(start, end)
                _add(out, first, stop, 0)
                first = stop
                continue
            stop = min(start + PAGE, end)
            have = self._pages[order[i]]
            if isinstance(have, bytearray):
                at, last = first - start, stop - start
                while at < last:
                    upto = _same(have, at, last)
                    _add(out, start + at, start + upto, have[at])
                    at = upto
            else:
                _add(out, first, stop, have)
            first = stop
            i += 1
        return out

    def end(self) -> int:
        """The block behind the last one that is not the base's."""
        for page in reversed(self._order):
            have = self._pages[page]
            if isinstance(have, bytearray):
                length = len(have.rstrip(b"\0"))
                if length:
                    return page * PAGE + length
            elif have:
                return page * PAGE + PAGE
        return 0

    def count(self, kind: int) -> int:
        """Blocks of that kind (not 0)."""
        return sum(
            have.count(kind) if isinstance(have, bytearray) else PAGE * (have == kind) for have in self._pages.values()
        )

    def redirected(self) -> list[tuple[int, int, int]]:
        """All runs that are not the base's."""
        return [run for run in self.runs(0, self.end()) if run[2]]


def _same(have: bytearray, at: int, last: int) -> int:
    """Where the run of equal bytes that begins at `at` ends."""
    kind = have[at]
    for other in (0, 1, 2):
        if other != kind:
            found = have.find(other, at, last)
            if found >= 0:
                last = found
    return last


def _add(out: list[tuple[int, int, int]], first: int, end: int, kind: int) -> None:
    if out and out[-1][2] == kind:
        out[-1] = (out[-1][0], end, kind)
    else:
        out.append((first, end, kind))
