"""The direct session: reads /dev/fuse itself and answers by the core. See docs/architecture.md, "Two lanes".

Threads: `serve` is the dispatcher, in the thread that calls it (the main one, so that signals are its caller's to
arrange); it answers inline whatever takes microseconds. What would wait (WouldBlock, FSYNC, ...) is copied to the slow
lane. Notifications that the dispatcher thread itself wants to send go through a lane of their own: the kernel may make
them wait for the very requests that this thread is to answer.

Order: a request that went to the slow lane is overtaken by later ones. The kernel allows that: what must be ordered, it
orders by not sending the second request before the first is answered. FORGET comes only for inodes that no unanswered
request refers to.
"""

from __future__ import annotations

import errno
import gc
import os
import sys
from time import monotonic

from unionfs import sysio
from unionfs.errors import EXIT_FAILURE, EXIT_PERMISSION, MountError, WouldBlock
from unionfs.session import channel as wire_channel
from unionfs.session.lanes import Lane
from unionfs.session.opens import CachedOpens, PassthroughOpens
from unionfs.wire import abi, dispatch, handshake, listing

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable
    from typing import Any

    from unionfs.api import Operations
    from unionfs.wire.handshake import Negotiated

MAX_THREADS = 16
SWITCH_INTERVAL = 0.0005  # a slow thread that computes must not keep the dispatcher waiting 5 ms for the GIL
CLOSE_TIMEOUT = 30.0

SPECIAL = frozenset(opcode for opcode, lane in dispatch.LANES.items() if lane != dispatch.FAST)


class DirectSession:
    """Serves one connection. Implements api.Session and api.Notifier."""

    def __init__(
        self,
        fd: int,
        ops: Operations,
        *,
        data: str = "auto",
        writeback: bool = False,
        debug: bool = False,
        max_threads: int = MAX_THREADS,
        timeout: int | None = None,
        stack_depth: int = 1,
        acl: bool = True,
        careful: bool = False,
        negotiated: Negotiated | None = None,
    ) -> None:
        """`negotiated`: adopt a connection whose INIT was answered before, by another process.

        `careful`: others change the layers too; the kernel keeps what `ops.watch` allows.

        `stack_depth` (passthrough): 1 where no layer lies on a stacking filesystem, and then one can be stacked on
        ours; 2 to pass through to layers that are themselves on an overlay.
        """
        self.ops = ops
        self.terms = negotiated
        self._asked: dict[str, Any] = {
            "data": data, "writeback": writeback, "timeout": timeout, "stack_depth": stack_depth, "acl": acl,
            "careful": careful,
        }  # fmt: skip
        self._debug = debug
        self._channel = wire_channel.Channel(fd)
        self._opens: CachedOpens | PassthroughOpens = CachedOpens(ops)
        self._slow = Lane("unionfs-slow", max_threads, self._slow_worker)
        self._notices = Lane("unionfs-notify", 1, lambda: self._channel.notify)
        self._notice = 0
        self._counts: dict[int, int] = {}
        self._received = 0
        self._sent = 0
        self._slow_sent: list[list[int]] = []  # one counter for each slow thread
        self._interrupted = 0
        self._started = monotonic()

    # --- serving ----------------------------------------------------------------------------------------------------

    def serve(self, on_ready: Callable[[], None]) -> None:
        """Answer until unmounted or stopped. `on_ready` is called when the kernel has its INIT reply.

        Starts the core with this session as its notifier, and stops it after the last request.
        """
        if self.terms is None:
            self.terms = self._handshake()
        _widen_descriptor_table()
        if self.terms.data == "passthrough":
            self._opens = PassthroughOpens(self.ops, self._channel)
        self.ops.start(self)
        try:
            self.ops.lanes.fast = True
            on_ready()
            _tune_interpreter()
            self._loop(dispatch.dispatcher(self.ops, self.terms, self._opens, fast=True), self.terms)
        finally:
            self.ops.lanes.fast = False
            if not self._slow.close(CLOSE_TIMEOUT) or not self._notices.close(1.0):
                print("unionfs: requests still running at the end of the mount were left behind", file=sys.stderr)
            self.ops.stop()

    def _loop(self, dispatcher: dispatch.Dispatcher, terms: Negotiated) -> None:
        request = bytearray(terms.max_write + 4096)
        dispatcher.load(request)
        buffers = [request]
        channel = self._channel
        receive, send = channel.receive, channel.send
        answer = dispatcher.answer
        read_ahead = self.ops.read_ahead
        head = abi.IN_HEAD.unpack_from
        counts = self._counts
        while size := receive(buffers):
            _, opcode, unique, nodeid = head(request)
            counts[opcode] = counts.get(opcode, 0) + 1
            self._received += size
            if self._debug:
                self._trace_request(bytes(request[:size]))
            if opcode in SPECIAL:
                self._special(opcode, unique, request, size)
                continue
            if opcode == abi.READDIRPLUS:
                dispatcher.piece = listing.PIECE if channel.apart else listing.WHOLE
            try:
                reply = answer(opcode, unique, nodeid, size)
            except WouldBlock:
                self._slow.submit(unique, bytes(dispatcher.view[:size]))
                continue
            if reply is not None:
                send(reply)
                self._sent += len(reply)
                if opcode == abi.READDIRPLUS and channel.apart:
                    read_ahead()
                if self._debug:
                    self._trace_reply(opcode, reply)

    def _special(self, opcode: int, unique: int, request: bytearray, size: int) -> None:
        """Requests that are not answered by a handler in this thread."""
        if dispatch.LANES[opcode] == dispatch.SLOW:
            self._slow.submit(unique, bytes(request[:size]))
        elif opcode == abi.INTERRUPT:
            # Only a request that has not begun can be given up: one that runs may have changed something already.
            # Never ENOSYS: the kernel would send no INTERRUPT any more.
            (target,) = abi.U64.unpack_from(request, abi.IN_HEADER_SIZE)
            if self._slow.take_back(target):
                self._interrupted += 1
                self._channel.send(dispatch.error_reply(target, errno.EINTR))
        elif opcode == abi.INIT:
            self._channel.send(dispatch.error_reply(unique, errno.EIO))

    def _slow_worker(self) -> Callable[[bytes], None]:
        assert self.terms is not None
        self.ops.lanes.fast = False
        dispatcher = dispatch.dispatcher(self.ops, self.terms, self._opens, fast=False)
        sent = [0]
        self._slow_sent.append(sent)

        def work(request: bytes) -> None:
            _, opcode, unique, nodeid = abi.IN_HEAD.unpack_from(request)
            dispatcher.load(request)
            try:
                reply = dispatcher.answer(opcode, unique, nodeid, len(request))
            except WouldBlock:
                print(f"unionfs: {dispatch.NAMES[opcode]} would block in the slow lane", file=sys.stderr)
                reply = dispatch.error_reply(unique, errno.EIO)
            if reply is not None:
                self._channel.send(reply)
                sent[0] += len(reply)
                if self._debug:
                    self._trace_reply(opcode, reply)

        return work

    def _handshake(self) -> Negotiated:
        buffer = bytearray(handshake.MAX_PAGES * handshake.PAGE + 4096)
        for _ in range(2):  # a kernel of a later major version asks a second time
            size = self._channel.receive([buffer])
            if not size:
                raise MountError("the mount went away before the kernel said hello", EXIT_FAILURE)
            try:
                terms, reply = handshake.negotiate(bytes(buffer[:size]), **self._asked)
            except handshake.Refused as refusal:
                self._channel.send(refusal.reply)
                continue
            self._channel.send(reply)
            if terms.data == "passthrough":
                self._probe_passthrough()
            return terms
        raise MountError("the kernel's FUSE protocol is not version 7", EXIT_FAILURE)

    def _probe_passthrough(self) -> None:
        """That the kernel offers passthrough does not say that we may use it: ask now, not at the first open."""
        fd = os.memfd_create("unionfs-probe", os.MFD_CLOEXEC)
        try:
            self._channel.close_backing(self._channel.open_backing(fd))
        except OSError as error:
            raise MountError(
                f"data=passthrough: the kernel refuses it here ({error.strerror}): it needs CAP_SYS_ADMIN in the "
                "initial user namespace; use data=noopen or data=cached",
                EXIT_PERMISSION,
            ) from error
        finally:
            os.close(fd)

    def stop(self) -> None:
        """Make `serve` return soon, with the mount still there. Safe from any thread and from a signal handler."""
        self._channel.stop()

    # --- api.Notifier -----------------------------------------------------------------------------------------------

    def invalidate_entry(self, parent: int, name: bytes) -> None:
        self._notify(wire_channel.inval_entry(parent, name))

    def expire_entries(self) -> bool:
        """Not for the thread that answers."""
        try:
            self._channel.notify(wire_channel.inc_epoch())
        except OSError:
            return False
        return True

    def invalidate_inode(self, nodeid: int, offset: int = 0, length: int = 0) -> None:
        self._notify(wire_channel.inval_inode(nodeid, offset, length))

    def _notify(self, message: bytes) -> None:
        if getattr(self.ops.lanes, "fast", False):
            self._notice += 1
            self._notices.submit(self._notice, message)
        else:
            self._channel.notify(message)

    # --- for people -------------------------------------------------------------------------------------------------

    def statistics(self) -> dict[str, Any]:
        counts = sorted(self._counts.items())
        total = sum(count for _, count in counts)
        return {
            "session": "direct",
            "data": self.terms.data if self.terms else None,
            "writeback": self.terms.has("WRITEBACK_CACHE") if self.terms else None,
            "negotiated": self.terms.as_dict() if self.terms else None,
            "uptime": monotonic() - self._started,
            "messages": {dispatch.NAMES.get(opcode, f"opcode {opcode}"): count for opcode, count in counts},
            "lanes": {"fast": total - self._slow.submitted, "slow": self._slow.submitted},
            "slow_threads": self._slow.threads,
            "interrupted": self._interrupted,
            "bytes": {"received": self._received, "sent": self._sent + sum(sent for (sent,) in self._slow_sent)},
            **self._opens.statistics(),
        }

    def _trace_request(self, request: bytes) -> None:
        from unionfs.wire import trace

        print(trace.request(request), file=sys.stderr, flush=True)

    def _trace_reply(self, opcode: int, reply: dispatch.Reply) -> None:
        from unionfs.wire import trace

        print(trace.reply(opcode, bytes(reply)), file=sys.stderr, flush=True)


def _widen_descriptor_table() -> None:
    """Grow the process's descriptor table while it has one thread.

    With two, each doubling waits for an RCU grace period (expand_fdtable() in fs/file.c): tens of milliseconds in the
    middle of some open(2), which made a cold read of 1 KiB cost 137 us instead of 27.
    """
    for size in (8192, 1024):  # the core keeps up to 4,600 open
        try:
            os.close(os.dup2(0, size - 1, inheritable=False))
            return
        except OSError:  # above the limit
            continue


def _tune_interpreter() -> None:
    """For a process that does nothing but serve.

    The old generation is never searched for cycles: the core makes none that live long, and looking at a million nodes
    would stop every request for most of a second.
    """
    gc.freeze()
    gc.set_threshold(10_000, 10, 1 << 30)
    sysio.return_big_blocks()
    sys.setswitchinterval(SWITCH_INTERVAL)
