"""What a worker leaves to its successor, in memory that both map: a memfd that the supervisor keeps.

Three things: what the kernel knows (a record and a count of lookups per node id), the requests being answered (each
lane's request and reply buffers lie here, so that they need no writing down), and a page of words. Nothing is allocated
or moved: everything has its place by node id or lane, in a sparse file that grows by the pages touched. Layout, no
policy. Written by one worker at a time, from any of its threads; the supervisor reads words.

A process can be killed between any two stores: whatever takes more than one is made valid by a last one.
"""

from __future__ import annotations

import mmap
import os
from struct import Struct

from unionfs.wire.handshake import MAX_PAGES, PAGE

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any

MAX_NODES = 1 << 22
SLOW_LANES = 256
FAST_LANES = 8  # of the dispatcher, and of those who took its place while it was held up
INLINE = 35  # bytes of a name in its record; longer ones have a place of their own

VERSION = 2  # of this layout: a successor of another one is refused

# Words of the first page: the next new node id; the record being rewritten; slow lanes in use; the layout; requests
# taken up so far; the device number of the mount; deaths of workers; the signal that killed the last one;
# whether the layers are others than the supervisor's.
NEXT, TORN, LAST_LANE, LAYOUT, BEAT, DEVICE, DEATHS, SIGNAL, STALE = range(9)

# States of a node id; 0: free.
LIVE, UNLINKED, ORPHAN, REMOVED, LINKED, LOWER = 1, 2, 4, 8, 16, 32

RECORD = Struct(f"<QQIiHHB{INLINE}s")  # parent, ino, generation, pin, kind, layer, length of the name, its beginning
PIN = Struct("<i")
OPENS = Struct("<II")
assert RECORD.size == 64

_SCRATCH, _TERMS, _LANES = 3072, 3840, 4096
_SLOW_REQUEST, _SLOW_REPLY = 12 << 10, 4 << 10
_LANE_WORDS = 64
# Words of a lane: the request whose reply is complete; the length of a slow one; what was there before a request and
# which request that is; the node whose link count is being corrected and both counts; the request that its last
# worker died in and how many did.
DONE, LENGTH, PRIOR, PRIOR_OF, LINKS_NODE, LINKS, SUSPECT, TRIES = range(8)


class Record:
    """A node as its predecessor left it."""

    __slots__ = ("generation", "id", "ino", "kind", "layer", "name", "parent", "pin", "state")

    def __init__(self, nodeid: int, state: int, fields: tuple[int, int, int, int, int, int], name: bytes) -> None:
        self.id = nodeid
        self.state = state
        self.parent, self.ino, self.generation, self.pin, self.kind, self.layer = fields
        self.name = name


class LaneBuffers:
    """Where one thread's request and reply are. `words[DONE]`: the request whose reply is complete."""

    __slots__ = ("reply", "request", "words")

    def __init__(self, view: memoryview, at: int, request: int, reply: int) -> None:
        self.words = view[at : at + _LANE_WORDS].cast("Q")
        at += _LANE_WORDS
        self.request = view[at : at + request]
        self.reply = view[at + request : at + request + reply]

    def begin(self, request: bytes) -> None:
        """A slow thread's: its request lies elsewhere, and of its data a successor gets another copy."""
        head = request[:_SLOW_REQUEST]
        self.words[LENGTH] = 0
        self.request[: len(head)] = head
        self.words[LENGTH] = len(head)

    def keep(self, unique: int, reply: Any) -> None:
        """The reply is made; it is sent next. Whoever answers that request again gives the same."""
        if reply is not None and len(reply) <= len(self.reply):
            self.reply[: len(reply)] = reply
        self.words[LINKS_NODE] = 0
        self.words[DONE] = unique

    def note(self, unique: int, prior: int) -> None:
        """What decides, if this worker dies, whether that request has happened."""
        self.words[PRIOR] = prior
        self.words[PRIOR_OF] = unique

    def prior(self, unique: int) -> int | None:
        return self.words[PRIOR] if self.words[PRIOR_OF] == unique else None

    def correcting(self, nodeid: int, before: int, after: int) -> None:
        self.words[LINKS] = before << 32 | after
        self.words[LINKS_NODE] = nodeid


class Journal:
    def __init__(self, fd: int) -> None:
        self.fd = fd
        max_write = MAX_PAGES * PAGE
        lanes = _LANES
        fast = _LANE_WORDS + 2 * _page(max_write + 4096)
        slow = _LANE_WORDS + _SLOW_REQUEST + _SLOW_REPLY
        at = _page(lanes + FAST_LANES * fast + SLOW_LANES * slow)
        self._counts_at = at
        self._states_at = at + 4 * MAX_NODES
        self.records_at = self._states_at + MAX_NODES
        self._names_at = self.records_at + 64 * MAX_NODES
        self._opens_at = self._names_at + 256 * MAX_NODES
        size = self._opens_at + OPENS.size * MAX_NODES
        if os.fstat(fd).st_size < size:
            os.ftruncate(fd, size)
        self.map = mmap.mmap(fd, size)
        view = memoryview(self.map)
        self.words = view[:_SCRATCH].cast("Q")
        self.counts = view[self._counts_at : self._states_at].cast("i")
        self.states = view[self._states_at : self.records_at]
        self.fast = [
            LaneBuffers(view, lanes + i * fast, max_write + 4096, max_write + 4096) for i in range(FAST_LANES)
        ]
        lanes += FAST_LANES * fast
        self._slow = [(lanes + i * slow) for i in range(SLOW_LANES)]
        self._view = view

    @classmethod
    def create(cls) -> Journal:
        journal = cls(os.memfd_create("unionfs-journal", os.MFD_CLOEXEC))
        journal.words[NEXT] = 2
        journal.words[LAYOUT] = VERSION
        journal.states[1] = LIVE
        journal.counts[1] = 1
        return journal

    @property
    def terms(self) -> bytes:
        """What was negotiated with the kernel; empty before."""
        return bytes(self.map[_TERMS + 1 : _TERMS + 1 + self.map[_TERMS]])

    @terms.setter
    def terms(self, state: bytes) -> None:
        self.map[_TERMS + 1 : _TERMS + 1 + len(state)] = state
        self.map[_TERMS] = len(state)

    def lane(self, number: int) -> LaneBuffers:
        """The buffers of a slow thread."""
        if number >= self.words[LAST_LANE]:
            self.words[LAST_LANE] = number + 1
        return LaneBuffers(self._view, self._slow[number], _SLOW_REQUEST, _SLOW_REPLY)

    def lanes(self) -> list[LaneBuffers]:
        return [*self.fast, *(self.lane(i) for i in range(self.words[LAST_LANE]))]

    # --- nodes ---

    def write(
        self, nodeid: int, parent: int, ino: int, generation: int, pin: int, kind: int, layer: int, name: bytes
    ) -> None:
        """The record of an id that is free; its state, set next, makes it valid."""
        length = len(name)
        RECORD.pack_into(
            self.map, self.records_at + (nodeid << 6), parent, ino, generation, pin, kind, layer, length, name
        )
        if length > INLINE:
            at = self._names_at + (nodeid << 8)
            self.map[at : at + length] = name

    def rewrite(
        self, nodeid: int, state: int, parent: int, ino: int, generation: int, pin: int, kind: int, layer: int,
        name: bytes,
    ) -> None:  # fmt: skip
        """Change a valid record, by way of a copy. The caller holds a lock."""
        RECORD.pack_into(self.map, _SCRATCH, parent, ino, generation, pin, kind, layer, len(name), name)
        self.map[_SCRATCH + 64] = state
        self.map[_SCRATCH + 65 : _SCRATCH + 65 + len(name)] = name
        self.words[TORN] = nodeid
        self._copy_scratch(nodeid)

    def _copy_scratch(self, nodeid: int) -> None:
        at = self.records_at + (nodeid << 6)
        self.map[at : at + 64] = self.map[_SCRATCH : _SCRATCH + 64]
        length = self.map[_SCRATCH + 28]
        if length > INLINE:
            at = self._names_at + (nodeid << 8)
            self.map[at : at + length] = self.map[_SCRATCH + 65 : _SCRATCH + 65 + length]
        self.states[nodeid] = self.map[_SCRATCH + 64]
        self.words[TORN] = 0

    def mend(self) -> None:
        """Finish a `rewrite` that was cut short."""
        if self.words[TORN]:
            self._copy_scratch(self.words[TORN])

    def read(self, nodeid: int) -> Record | None:
        state = self.states[nodeid] if 0 < nodeid < MAX_NODES else 0
        if not state:
            return None
        *fields, length, name = RECORD.unpack_from(self.map, self.records_at + (nodeid << 6))
        if length > INLINE:
            at = self._names_at + (nodeid << 8)
            name = self.map[at : at + length]
        return Record(nodeid, state, tuple(fields), name[:length])

    def set_pin(self, nodeid: int, pin: int) -> None:
        """One aligned store."""
        PIN.pack_into(self.map, self.records_at + (nodeid << 6) + 20, pin)

    def drop_pins(self) -> None:
        """The descriptors died with their process: files that had no name are gone."""
        self.mend()
        for record in self.marked():
            if record.pin >= 0:
                self.set_pin(record.id, -1)

    def opens(self, nodeid: int) -> tuple[int, int]:
        """How often it is open, and by which backing id (passthrough)."""
        count, backing = OPENS.unpack_from(self.map, self._opens_at + OPENS.size * nodeid)
        return count, backing

    def set_opens(self, nodeid: int, count: int, backing: int) -> None:
        OPENS.pack_into(self.map, self._opens_at + OPENS.size * nodeid, count, backing)

    def generations(self, size: int) -> list[int]:
        """Each id's last one, whether free or not."""
        return self._view[self.records_at : self.records_at + 64 * size].cast("I")[4::16].tolist()

    def parents(self) -> dict[int, list[int]]:
        """All ids in use but the root's, by the id of their parent."""
        size = self.words[NEXT]
        states = bytes(self.states[:size])
        parents = self._view[self.records_at : self.records_at + 64 * size].cast("Q")[::8].tolist()
        found: dict[int, list[int]] = {}
        for nodeid in range(2, size):
            if states[nodeid]:
                found.setdefault(parents[nodeid], []).append(nodeid)
        return found

    def claiming(self, parent: int, name: bytes) -> list[Record]:
        """The records with that name: more than one where a rename was cut short."""
        size = self.words[NEXT]
        parents = self._view[self.records_at : self.records_at + 64 * size].cast("Q")[::8].tolist()
        ids = (nodeid for nodeid in range(2, size) if parents[nodeid] == parent)
        found = (record for nodeid in ids if (record := self.read(nodeid)) is not None)
        return [record for record in found if record.name == name and not record.state & (UNLINKED | REMOVED | ORPHAN)]

    def marked(self) -> list[Record]:
        """Those that have a descriptor, several names or none: few."""
        states = bytes(self.states[: self.words[NEXT]])
        pins = self._view[self.records_at : self.records_at + 64 * len(states)].cast("i")[5::16].tolist()
        ids = (i for i in range(2, len(states)) if states[i] > LIVE or (states[i] and pins[i] >= 0))
        return [record for nodeid in ids if (record := self.read(nodeid)) is not None]


def _page(offset: int) -> int:
    return (offset + 4095) & ~4095
