"""Open files in the passthrough mode, of a worker that can be replaced.

A backing id is the connection's, not the process's: the kernel goes on using it while no worker lives. So it is written
down, with the number of opens, by node id, and a successor uses it again; an inode can't have two while it is open.
"""

from __future__ import annotations

import os

from unionfs.session.opens import PassthroughOpens, _identity, _Inode

TYPE_CHECKING = False
if TYPE_CHECKING:
    from unionfs.api import Operations
    from unionfs.guard.journal import Journal
    from unionfs.session.channel import Channel

_CACHED = 0xFFFFFFFF  # in place of a backing id: open, and not passed through


class JournalOpens(PassthroughOpens):
    def __init__(self, ops: Operations, channel: Channel, journal: Journal) -> None:
        super().__init__(ops, channel)
        self._journal = journal

    def count(self, nodeid: int) -> int:
        """How often the inode is open."""
        return self._journal.opens(nodeid)[0]

    def created(self, nodeid: int, flags: int) -> tuple[int, int]:
        self._restore(nodeid)
        answer = super().created(nodeid, flags)
        self._note(nodeid)
        return answer

    def released(self, nodeid: int) -> None:
        self._restore(nodeid)
        inode = self._open[nodeid]
        if inode.opens == 1:  # first what a successor would read: an id that is lost is better than a wrong one
            self._journal.set_opens(nodeid, 0, 0)
        super().released(nodeid)
        if nodeid in self._open:
            self._note(nodeid)

    def _note(self, nodeid: int) -> None:
        inode = self._open[nodeid]
        self._journal.set_opens(nodeid, inode.opens, inode.backing or _CACHED)

    def _restore(self, nodeid: int) -> None:
        with self._lock:
            opens, backing = self._journal.opens(nodeid)
            if not opens or nodeid in self._open:
                return
            inode = _Inode(False)
            inode.opens = opens
            if backing != _CACHED:
                inode.backing = backing
                fd = self._ops.backing_fd(nodeid, False)
                if fd is not None:
                    inode.file = _identity(fd)
                    os.close(fd)
            self._open[nodeid] = inode
