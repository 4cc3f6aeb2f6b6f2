"""The FUSE device as a channel: receive, send, notify, and the backing ids of passthrough.

One thread receives; any thread sends and notifies. Which errors mean "again", "never mind" and "over" is decided here
and nowhere else. Receiving polls without blocking for SPIN seconds after a message before it sleeps: waking a sleeping
thread costs a cold request more than answering it does. An idle mount makes no system calls.
"""

from __future__ import annotations

import errno
import fcntl
import os
import select
import sys
from time import perf_counter

from unionfs.wire import abi

TYPE_CHECKING = False
if TYPE_CHECKING:
    from unionfs.wire.dispatch import Reply

# Seconds. Longer than it takes to wake a client on another idle CPU through an interrupt (25 us in a virtual machine),
# or its next request finds us asleep: with 20 us a cold stat took 68 to 83 us, with 60 us 53 (fuse-overlayfs: 56).
SPIN = 60e-6
PATIENCE = 4  # vain attempts in a row before spinning is given up
RETRY = 16  # sleeps until it is tried again


class Channel:
    __slots__ = ("_patience", "_poll", "_sleeps", "_wake", "apart", "fd", "spin", "stopped")

    def __init__(self, fd: int, spin: float = SPIN) -> None:
        self.fd = fd
        self.spin = spin
        self.apart = False  # the last request came while we polled: the client has a CPU of its own
        self.stopped = False
        self._patience = PATIENCE if spin else 0
        self._sleeps = 0
        self._wake = os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK)
        os.set_blocking(fd, False)
        self._poll = select.poll()
        self._poll.register(fd, select.POLLIN)
        self._poll.register(self._wake, select.POLLIN)

    def receive(self, buffers: list[bytearray]) -> int:
        """The size of the next request; 0 when there will be none: unmounted, aborted, or stopped."""
        fd = self.fd
        readv = os.readv
        until = 0.0
        while not self.stopped:
            try:
                size = readv(fd, buffers)
            except BlockingIOError:
                if not until and self._patience:
                    until = perf_counter() + self.spin
                elif not until or perf_counter() > until:
                    self._sleep(until)
                    until = 0.0
            except OSError as error:
                # ECONNABORTED: the mount went while a request of it was being read.
                if error.errno in (errno.ENODEV, errno.ECONNABORTED):
                    return 0
                # ENOENT: the request was interrupted before we read it. The next one is as good.
                if error.errno not in (errno.ENOENT, errno.EINTR):
                    raise
            else:
                if until:
                    self._patience = PATIENCE
                    self.apart = True
                return size
        return 0

    def _sleep(self, spun: float) -> None:
        """Until there is something to read. Spinning pays only where client and server have a CPU each: after a few
        vain attempts it is given up, and tried again now and then."""
        if spun:
            self._patience -= 1
            self.apart = False
        else:
            self._sleeps += 1
            if self.spin and not self._sleeps % RETRY:
                self._patience = 1
        self._poll.poll()

    def send(self, reply: Reply) -> None:
        try:
            os.write(self.fd, reply)
        except OSError as error:
            # ENOENT: nobody waits any more; ENODEV: the connection is gone.
            if error.errno not in (errno.ENOENT, errno.ENODEV):
                self._refused(reply, error)

    def _refused(self, reply: Reply, error: OSError) -> None:
        """The kernel did not take a reply: a bug of ours. Its caller must not wait for ever."""
        unique = abi.OUT_HEADER.unpack_from(reply)[2]
        print(f"unionfs: the kernel refused the reply to request {unique}: {error.strerror}", file=sys.stderr)
        try:
            os.write(self.fd, abi.OUT_HEADER.pack(16, -errno.EIO, unique))
        except OSError:
            pass

    def notify(self, message: bytes) -> None:
        notify(self.fd, message)

    def open_backing(self, fd: int) -> int:
        """Register an open file for passthrough: its backing id. EPERM without CAP_SYS_ADMIN or INIT's consent."""
        # A mutable buffer is what makes fcntl.ioctl return the ioctl's own result.
        return int(fcntl.ioctl(self.fd, abi.DEV_IOC_BACKING_OPEN, bytearray(abi.BACKING_MAP.pack(fd, 0, 0)), True))

    def close_backing(self, backing_id: int) -> None:
        fcntl.ioctl(self.fd, abi.DEV_IOC_BACKING_CLOSE, bytearray(abi.U32.pack(backing_id)), True)

    def stop(self) -> None:
        """Make receive return 0, now and for ever. Safe from any thread and from a signal handler."""
        self.stopped = True
        os.eventfd_write(self._wake, 1)

    def __del__(self) -> None:
        # Not earlier: `stop` may come at any time. The device descriptor is its opener's to close.
        os.close(self._wake)


def notify(fd: int, message: bytes) -> None:
    """May wait for requests in flight on the same inode: not for the thread that answers them."""
    try:
        os.write(fd, message)
    except OSError as error:
        # ENOENT, ENOTDIR: the kernel has nothing of the kind cached.
        if error.errno not in (errno.ENOENT, errno.ENOTDIR, errno.ENODEV):
            raise


def inval_entry(parent: int, name: bytes) -> bytes:
    size = abi.NOTIFY_INVAL_ENTRY_OUT.size + len(name) + 1
    return (
        abi.NOTIFY_INVAL_ENTRY_OUT.pack(size, abi.NOTIFY_INVAL_ENTRY, 0, parent, len(name), 0) + name + b"\0"
    )


def inval_inode(nodeid: int, offset: int, length: int) -> bytes:
    return abi.NOTIFY_INVAL_INODE_OUT.pack(40, abi.NOTIFY_INVAL_INODE, 0, nodeid, offset, length)


def inc_epoch() -> bytes:
    """All entries that the kernel has are void from now on (Linux 6.16; EINVAL before)."""
    return abi.OUT_HEADER.pack(16, abi.NOTIFY_INC_EPOCH, 0)


def resend() -> bytes:
    """Asks for every request that was read and not answered (by a predecessor) once more."""
    return abi.OUT_HEADER.pack(16, abi.NOTIFY_RESEND, 0)
