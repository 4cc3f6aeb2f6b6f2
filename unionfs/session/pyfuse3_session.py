"""The pyfuse3 session: mounts, and serves `Operations` through the library under trio until unmounted.

This is a protocol adapter only: no union logic. `pyfuse3_handlers` translates the messages; here is the life of the
connection, and what the core tells the kernel. The library keeps its connection in globals: one such session at a time
in a process. Importing this module imports pyfuse3 and trio, so import it only to use it.

Threading: `serve` is called once, blocks, and is the trio thread. Signals are its caller's to arrange, as with the
direct session: where that is the main thread, trio lets Python's handlers run. The rest is for any thread.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from time import monotonic
from typing import Any

import pyfuse3
import trio

from unionfs.api import MountConfig, Operations
from unionfs.errors import EXIT_USAGE, MountError
from unionfs.session import channel, mount
from unionfs.session.lanes import Lane
from unionfs.session.pyfuse3_handlers import FOREVER, Handlers

MAX_THREADS = 16


class Pyfuse3Session:
    """Serves one connection. Implements api.Session and api.Notifier."""

    def __init__(
        self,
        ops: Operations,
        config: MountConfig,
        *,
        writeback: bool = False,
        max_threads: int = MAX_THREADS,
        timeout: int | None = None,
        careful: bool = False,
    ) -> None:
        """`careful`: others change the layers too; the kernel keeps what `ops.watch` allows."""
        if config.data not in ("auto", "cached"):
            raise MountError(f"data={config.data}: the pyfuse3 session knows data=cached only", EXIT_USAGE)
        self._ops = ops
        self._config = config
        self._handlers = Handlers(
            ops,
            acl="noacl" not in config.options,
            writeback=writeback,
            max_threads=max_threads,
            timeout=FOREVER if timeout is None else timeout,
            careful=careful,
        )
        self._fd = -1  # of the device, while it is served
        self._token: trio.lowlevel.TrioToken | None = None
        self._notices = Lane("unionfs-notify", 1, lambda: self._send)
        self._notice = 0
        self._started = monotonic()
        self._stopped = False

    def serve(self, on_ready: Callable[[], None]) -> None:
        """Mount, call `on_ready` when the mount answers, answer until unmounted or stopped.

        Starts the core with this session as its notifier, and stops it after the last request.
        """
        unmounted = True
        try:
            # libfuse has no way to ask for DONT_MASK that pyfuse3 would give us.
            fd = mount.attach(self._config, leave_umask=True)
            unmounted = False
            # To libfuse this is a connection that somebody else has mounted: no options, and no unmount, of its own.
            pyfuse3.init(self._handlers, f"/dev/fd/{fd}", {"debug"} if self._config.debug else set())
            self._fd = fd
            try:
                self._ops.start(self)
                self._ops.lanes.fast = True
                trio.run(self._serve, on_ready)
                unmounted = not self._stopped
            finally:
                self._ops.lanes.fast = False
                self._fd = -1
                if not self._notices.close(1.0):
                    print("unionfs: a notice to the kernel was left behind", file=sys.stderr)
                pyfuse3.close(unmount=False)  # what is still asked of the mount fails now, instead of waiting for us
        finally:
            self._ops.stop()
            # Never after an unmount by others: what is mounted there now may be another's.
            if not unmounted:
                self._detach()

    async def _serve(self, on_ready: Callable[[], None]) -> None:
        self._token = trio.lowlevel.current_trio_token()
        async with trio.open_nursery() as nursery:
            nursery.start_soon(self._announce, on_ready)
            try:
                await pyfuse3.main()
            except* ConnectionAbortedError:
                pass  # the mount went while a request of it was being read; libfuse knows ENODEV only
            nursery.cancel_scope.cancel()

    async def _announce(self, on_ready: Callable[[], None]) -> None:
        await trio.to_thread.run_sync(os.stat, self._config.mountpoint, abandon_on_cancel=True)
        on_ready()

    def stop(self) -> None:
        """Make `serve` return soon, and the mount go away. Safe from a signal handler too."""
        if self._token is not None:
            self._stopped = True
            try:
                self._token.run_sync_soon(pyfuse3.terminate)
            except trio.RunFinishedError:
                pass

    def _detach(self) -> None:
        try:
            mount.detach(self._config.mountpoint, lazy=True)
        except (MountError, OSError):
            pass  # gone already; or there is an error that led here, and says more

    # --- api.Notifier -----------------------------------------------------------------------------------------------

    def invalidate_entry(self, parent: int, name: bytes) -> None:
        number = self._handlers.numbers.of(parent)
        if number is not None:
            self._notify(channel.inval_entry(number, name))

    def expire_entries(self) -> bool:
        """Not for the thread that answers."""
        try:
            self._send(channel.inc_epoch())
        except OSError:
            return False
        return True

    def invalidate_inode(self, nodeid: int, offset: int = 0, length: int = 0) -> None:
        number = self._handlers.numbers.of(nodeid)
        if number is not None:
            self._notify(channel.inval_inode(number, offset, length))

    def _notify(self, message: bytes) -> None:
        if getattr(self._ops.lanes, "fast", False):  # the trio thread: the kernel may make it wait for itself
            self._notice += 1
            self._notices.submit(self._notice, message)
        else:
            self._send(message)

    def _send(self, message: bytes) -> None:
        fd = self._fd
        if fd >= 0:
            channel.notify(fd, message)

    # --- for people -------------------------------------------------------------------------------------------------

    def statistics(self) -> dict[str, Any]:
        handlers = self._handlers
        messages = dict(sorted(handlers.messages.items()))
        return {
            "session": "pyfuse3",
            "library": pyfuse3.__version__,
            "data": "cached",
            "writeback": handlers.enable_writeback_cache,
            "uptime": monotonic() - self._started,
            "messages": messages,
            "lanes": {"fast": sum(messages.values()) - handlers.moved, "slow": handlers.moved},
            "nodes": len(handlers.numbers),
        }
