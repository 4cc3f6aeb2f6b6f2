"""The direct session of a worker that can be replaced: requests and replies lie in the journal while they matter.

A reply is kept before it is sent: the kernel takes it by that one write, and asks a successor only for what it has not
taken. Threads as in the direct session, but for the dispatcher: it has a thread of its own, so that signals always find
the main one free, and where a layer does not answer it another thread takes its place (handover.py).
"""

from __future__ import annotations

import errno
import sys
import threading
from os import abort
from time import monotonic

from unionfs.errors import EXIT_FAILURE, MountError, WouldBlock
from unionfs.guard import journal as j
from unionfs.guard.dispatcher import NUMBER, GuardedDispatcher
from unionfs.guard.handover import HandOver, WatchedChannel
from unionfs.guard.opens import JournalOpens
from unionfs.guard.redo import KEPT, Redo
from unionfs.session import channel as wire_channel
from unionfs.session.direct import SPECIAL, DirectSession
from unionfs.wire import abi, dispatch

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable
    from typing import Any

    from unionfs.core.ops import UnionOperations
    from unionfs.guard.journal import Journal
    from unionfs.guard.table import JournalTable
    from unionfs.wire.handshake import Negotiated

_UNORDERED = frozenset((abi.FORGET, abi.BATCH_FORGET, abi.INTERRUPT))  # overtake other requests
# What changes nothing: its caller may be let go while it still runs.
_READS = frozenset((
    abi.LOOKUP, abi.GETATTR, abi.READLINK, abi.READ, abi.STATFS, abi.GETXATTR, abi.LISTXATTR, abi.READDIR,
    abi.READDIRPLUS, abi.STATX, abi.LSEEK, abi.FSYNC, abi.FSYNCDIR, abi.SYNCFS,
))  # fmt: skip
INTERRUPT_AFTER = 1.0  # seconds that a running request has after its caller was interrupted


class GuardedSession(DirectSession):
    def __init__(
        self, fd: int, ops: Any, *, core: UnionOperations, journal: Journal, table: JournalTable, **options: Any
    ) -> None:
        super().__init__(fd, ops, **options)
        self._channel: WatchedChannel = WatchedChannel(fd)
        self._core = core
        self._journal = journal
        self._table = table
        self._over = threading.Event()
        self._hand_over = HandOver(self._channel, journal.words, self._relieve, self._interrupt_late)
        self._turn = 0
        self._idle = list(range(j.FAST_LANES - 1, -1, -1))  # fast lanes that no thread has
        self._interrupts: dict[int, float] = {}  # by the request: when its caller is let go
        self._let_go: set[int] = set()  # requests that run, and nobody waits for
        threading.excepthook = _die

    def _handshake(self) -> Negotiated:
        terms = super()._handshake()
        if not terms.has("HAS_RESEND"):
            raise MountError("guard=on: this kernel can't send requests again: Linux 6.9 or newer", EXIT_FAILURE)
        self._journal.terms = terms.to_bytes()
        return terms

    # --- the dispatcher, and those who take its place ---

    def _loop(self, dispatcher: dispatch.Dispatcher, terms: Negotiated) -> None:
        """In the main thread, which does nothing but wait."""
        self.ops.lanes.fast = False
        if terms.data == "passthrough":
            self._opens = JournalOpens(self.ops, self._channel, self._journal)
        try:
            redo = self._resume(terms)
        except BaseException:
            # Not further up: who ends in good order closes the layers, and the descriptors are the successor's too.
            from traceback import print_exc

            print_exc()
            abort()
        threading.Thread(target=self._dispatch, args=(0, redo), name="unionfs-fast", daemon=True).start()
        self._hand_over.start()
        self._over.wait()
        self._hand_over.stop()

    def _resume(self, terms: Negotiated) -> Redo | None:
        revival = self._table.revival
        if revival is None:
            return None
        lane = self._journal.lane(j.SLOW_LANES - 1)
        slow = GuardedDispatcher(self._core, self.ops, terms, self._opens, lane, False)
        redo = Redo(self._core, self._table, self._journal, revival, slow)
        redo.settle()
        self._channel.notify(wire_channel.resend())
        return redo

    def _relieve(self) -> bool:
        """The thread whose turn it is does not come back: another one answers from now on."""
        if not self._idle:
            return False
        self._turn += 1
        name = f"unionfs-fast-{self._turn}"
        threading.Thread(target=self._dispatch, args=(self._turn, None), name=name, daemon=True).start()
        return True

    def _dispatch(self, turn: int, redo: Redo | None) -> None:
        assert self.terms is not None
        at = self._idle.pop()
        lane = self._journal.fast[at]
        request: Any = lane.request
        dispatcher = GuardedDispatcher(self._core, self.ops, self.terms, self._opens, lane, True)
        dispatcher.load(request)
        lanes = self.ops.lanes
        lanes.fast, lanes.journal = True, lane
        buffers = [request]
        channel = self._channel
        receive, send = channel.receive, channel.send
        answer, read_ahead = dispatcher.answer, self.ops.read_ahead
        head = abi.IN_HEAD.unpack_from
        counts, words = self._counts, self._journal.words
        lane.words[j.LENGTH] = 1
        while self._turn == turn and (size := receive(buffers)):
            words[j.BEAT] += 1
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
                lane.words[j.DONE] = unique
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
            if self._let_go and unique in self._let_go:
                self._take_back(opcode, unique, reply)
                continue
            send(reply)
            self._sent += len(reply)
            if opcode == abi.READDIRPLUS and channel.apart:
                read_ahead()
        lane.words[j.LENGTH] = 0
        self._idle.append(at)
        if self._turn == turn:
            self._over.set()

    def _slow_worker(self) -> Callable[[bytes], None]:
        assert self.terms is not None
        sent = [0]
        self._slow_sent.append(sent)
        lane = self._journal.lane(len(self._slow_sent) - 1)
        lanes = self.ops.lanes
        lanes.fast, lanes.journal = False, lane
        dispatcher = GuardedDispatcher(self._core, self.ops, self.terms, self._opens, lane, False)

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
                if unique in self._let_go:
                    self._take_back(opcode, unique, reply)
                else:
                    self._channel.send(reply)
                    sent[0] += len(reply)
            lane.words[j.LENGTH] = 0

        return work

    # --- callers that were interrupted ---

    def _special(self, opcode: int, unique: int, request: bytearray, size: int) -> None:
        super()._special(opcode, unique, request, size)
        if opcode == abi.INTERRUPT:
            (target,) = abi.U64.unpack_from(request, abi.IN_HEADER_SIZE)
            if self._running(target):
                self._interrupts[target] = monotonic() + INTERRUPT_AFTER
                self._hand_over.wake()

    def _running(self, target: int) -> bool:
        """Some thread is at work on that request, and it changes nothing."""
        for lane in self._journal.lanes():
            if lane.words[j.LENGTH] and lane.words[j.DONE] != target:
                _, opcode, unique, _ = abi.IN_HEAD.unpack_from(lane.request)
                if unique == target:
                    return opcode in _READS
        return False

    def _interrupt_late(self) -> bool:
        """Let go whose requests have not ended since; whether there are others."""
        now = monotonic()
        for target, when in list(self._interrupts.items()):
            if when <= now:
                del self._interrupts[target]
                if self._running(target):
                    self._let_go.add(target)
                    self._interrupted += 1
                    self._channel.send(dispatch.error_reply(target, errno.EINTR))
        return bool(self._interrupts)

    def _take_back(self, opcode: int, unique: int, reply: dispatch.Reply) -> None:
        """Nobody gets that reply: the kernel does not know the nodes in it."""
        self._let_go.discard(unique)
        if len(reply) < 24 or abi.OUT_HEADER.unpack_from(reply)[1]:
            return
        if opcode == abi.LOOKUP:
            (nodeid,) = abi.U64.unpack_from(reply, 16)
            if nodeid:
                self.ops.forget(nodeid, 1)
        elif opcode == abi.READDIRPLUS:
            at = 16
            while at < len(reply):
                (nodeid,) = abi.U64.unpack_from(reply, at)
                (length,) = abi.U32.unpack_from(reply, at + 128 + 16)
                if nodeid:
                    self.ops.forget(nodeid, 1)
                at += 128 + (24 + length + 7 & ~7)

    def statistics(self) -> dict[str, Any]:
        revival = self._table.revival
        return {
            **super().statistics(),
            "guard": {
                "deaths": self._journal.words[j.DEATHS],
                "revived": revival.revived if revival is not None else 0,
                "hand_overs": self._turn,
            },
        }


def _die(args: threading.ExceptHookArgs) -> None:
    """A thread of ours failed: what it held is lost with it, so the worker goes as a whole, and another one comes."""
    from traceback import print_exception

    print_exception(args.exc_type, args.exc_value, args.exc_traceback)
    abort()
