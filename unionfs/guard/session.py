"""The direct session of a worker that can be replaced: requests and replies lie in the journal while they matter.

Threads as in the direct session. A reply is kept before it is sent: the kernel takes it by that one write, and asks a
successor only for what it has not taken.
"""

from __future__ import annotations

import errno
import sys

from unionfs.errors import EXIT_FAILURE, MountError, WouldBlock
from unionfs.guard import journal as j
from unionfs.guard.redo import KEPT, NUMBER, Redo
from unionfs.session import channel as wire_channel
from unionfs.session.direct import SPECIAL, DirectSession
from unionfs.wire import abi, dispatch

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable
    from typing import Any

    from unionfs.guard.journal import Journal
    from unionfs.guard.table import JournalTable
    from unionfs.wire.handshake import Negotiated

_UNORDERED = frozenset((abi.FORGET, abi.BATCH_FORGET, abi.INTERRUPT))  # overtake other requests


class GuardedSession(DirectSession):
    def __init__(self, *args: Any, journal: Journal, table: JournalTable, deaths: int, **options: Any) -> None:
        super().__init__(*args, **options)
        self._journal = journal
        self._table = table
        self._deaths = deaths

    def _handshake(self) -> Negotiated:
        terms = super()._handshake()
        if not terms.has("HAS_RESEND"):
            raise MountError("guard=on: this kernel can't send requests again: Linux 6.9 or newer", EXIT_FAILURE)
        self._journal.terms = terms.to_bytes()
        return terms

    def _resume(self, terms: Negotiated) -> Redo | None:
        revival = self._table.revival
        if revival is None:
            return None
        self.ops.lanes.fast = False
        slow = dispatch.Dispatcher(self.ops, terms, self._opens, fast=False)
        redo = Redo(self.ops, self._table, self._journal, revival, slow)  # type: ignore[arg-type]
        redo.settle()
        self.ops.lanes.fast = True
        self._channel.notify(wire_channel.resend())
        return redo

    def _loop(self, dispatcher: dispatch.Dispatcher, terms: Negotiated) -> None:
        redo = self._resume(terms)
        lane = self._journal.fast
        request: Any = lane.request
        dispatcher.load(request)
        buffers = [request]
        receive, send = self._channel.receive, self._channel.send
        answer = dispatcher.answer
        head = abi.IN_HEAD.unpack_from
        counts = self._counts
        while size := receive(buffers):
            _, opcode, unique, nodeid = head(request)
            counts[opcode] = counts.get(opcode, 0) + 1
            self._received += size
            if redo is not None:
                if unique & abi.UNIQUE_RESEND:
                    kept = redo.answers.get(unique & NUMBER)
                    if kept is not None:
                        reply: Any = bytearray(kept)
                        abi.U64.pack_into(reply, 8, unique)
                        lane.keep(unique, reply)
                        send(reply)
                        continue
                elif opcode not in _UNORDERED:  # the kernel puts what it sends again before all that is new
                    redo.clear()
                    redo = None
            if opcode in SPECIAL:
                self._special(opcode, unique, request, size)
                continue
            try:
                reply = answer(opcode, unique, nodeid, size)
            except WouldBlock:
                self._slow.submit(unique, bytes(dispatcher.view[:size]))
                continue
            if reply is None:
                lane.words[j.DONE] = unique
                continue
            if opcode in KEPT:
                lane.keep(unique, reply)
            send(reply)
            self._sent += len(reply)

    def _slow_worker(self) -> Callable[[bytes], None]:
        assert self.terms is not None
        self.ops.lanes.fast = False
        dispatcher = dispatch.Dispatcher(self.ops, self.terms, self._opens, fast=False)
        sent = [0]
        self._slow_sent.append(sent)
        lane = self._journal.lane(len(self._slow_sent) - 1)

        def work(request: bytes) -> None:
            _, opcode, unique, nodeid = abi.IN_HEAD.unpack_from(request)
            lane.begin(request)
            dispatcher.load(request)
            try:
                reply = dispatcher.answer(opcode, unique, nodeid, len(request))
            except WouldBlock:
                print(f"unionfs: {dispatch.NAMES[opcode]} would block in the slow lane", file=sys.stderr)
                reply = dispatch.error_reply(unique, errno.EIO)
            if reply is not None:
                if opcode in KEPT:
                    lane.keep(unique, reply)
                self._channel.send(reply)
                sent[0] += len(reply)
            lane.words[j.LENGTH] = 0

        return work

    def statistics(self) -> dict[str, Any]:
        revival = self._table.revival
        return {
            **super().statistics(),
            "guard": {"deaths": self._deaths, "revived": revival.revived if revival is not None else 0},
        }
