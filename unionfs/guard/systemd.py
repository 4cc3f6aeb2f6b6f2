"""sd_notify(3): readiness, the watchdog, and descriptors that systemd keeps for the next one of us.

Nothing of systemd's libraries: it is a datagram on a socket. Without NOTIFY_SOCKET nothing happens.
"""

from __future__ import annotations

import os
import sys

DEVICE, JOURNAL, STATE = "unionfs-device", "unionfs-journal", "unionfs-state"
_FIRST = 3  # SD_LISTEN_FDS_START


def notify(state: bytes, fds: tuple[int, ...] = ()) -> None:
    address = os.environ.get("NOTIFY_SOCKET")
    if not address:
        return
    import _socket
    from struct import pack

    where = "\0" + address[1:] if address.startswith("@") else address
    notifier = _socket.socket(_socket.AF_UNIX, _socket.SOCK_DGRAM | _socket.SOCK_CLOEXEC)
    rights = [(_socket.SOL_SOCKET, _socket.SCM_RIGHTS, pack(f"{len(fds)}i", *fds))] if fds else []
    try:
        notifier.sendmsg([state], rights, 0, where)
    except OSError as error:
        print(f"unionfs: NOTIFY_SOCKET {address}: {error.strerror}", file=sys.stderr)
    finally:
        notifier.close()


def keep(device: int, journal: int, state: int) -> None:
    """Have them kept, and given to the next process of the unit."""
    for name, fd in ((DEVICE, device), (JOURNAL, journal), (STATE, state)):
        notify(f"FDSTORE=1\nFDNAME={name}".encode(), (fd,))


def kept() -> tuple[int, int, int] | None:
    """(device, journal, state) of a supervisor of this unit that died; None where there was none."""
    if os.environ.get("LISTEN_PID") != str(os.getpid()):
        return None
    names = [name for name in os.environ.get("LISTEN_FDNAMES", "").split(":") if name]
    found = {name: _FIRST + i for i, name in enumerate(names)}
    for fd in found.values():
        os.set_inheritable(fd, False)
    if not all(name in found for name in (DEVICE, JOURNAL, STATE)):
        return None
    return found[DEVICE], found[JOURNAL], found[STATE]


def watchdog() -> float | None:
    """Seconds within which systemd wants to hear of us; None: it does not."""
    if os.environ.get("WATCHDOG_PID", str(os.getpid())) != str(os.getpid()):
        return None
    interval = os.environ.get("WATCHDOG_USEC", "")
    return int(interval) / 1e6 if interval.isdigit() and int(interval) else None
