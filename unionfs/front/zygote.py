"""A process that has imported what a mount needs and forks for each command line that it is sent.

The servers of a hundred containers share the pages of one interpreter: each has a few MiB of its own instead of 15,
and a mount starts without an interpreter's start. Run as `python -m unionfs.front.zygote FD LOCK`: FD is a
SOCK_SEQPACKET socket; one message is a command line (JSON list, below MAX_REQUEST) with the descriptor of a pipe; the
answer on that pipe is `EXIT_CODE MESSAGE`. It ends when the other side of FD is closed; the servers that it started go
on. LOCK is only held, until what was asked for is done (servers let go of it): nobody else takes the store while a
mount is still being made in it.

Single-threaded, for it forks.
"""

from __future__ import annotations

import _signal  # type: ignore[import-not-found]
import _socket
import gc
import json
import os
import sys

from unionfs.errors import EXIT_FAILURE, EXIT_OK, MountError

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Sequence

MAX_REQUEST = 1 << 20

# What a server imports on its way and at its first requests: one copy for all.
PRELOAD = (
    "faulthandler",
    "threading",
    "traceback",
    "select",
    "unionfs.core.ops",
    "unionfs.core.live",
    "unionfs.front.cli",
    "unionfs.front.control",
    "unionfs.front.mount",
    "unionfs.front.server",
    "unionfs.front.umount",
    "unionfs.front.verbs",
    "unionfs.session.direct",
    "unionfs_drivers.aufs",
    "unionfs_drivers.overlay",
    "unionfs_drivers.row",
)


def main() -> int:
    from importlib import import_module

    for name in PRELOAD:
        import_module(name)
    requests = _socket.socket(fileno=int(sys.argv[1]))
    for fd in (requests.fileno(), int(sys.argv[2])):
        os.set_inheritable(fd, False)
    requests.setsockopt(_socket.SOL_SOCKET, _socket.SO_RCVBUF, MAX_REQUEST)
    _signal.signal(_signal.SIGINT, _signal.SIG_IGN)  # Ctrl+C is for whoever started us
    _signal.signal(_signal.SIGCHLD, _signal.SIG_IGN)  # nobody waits for the children: the pipe says how it went
    gc.collect()
    gc.freeze()  # a collection in a child would write to every page
    while True:
        message, ancillary, _, _ = requests.recvmsg(MAX_REQUEST, _socket.CMSG_SPACE(4))
        if not message:
            return EXIT_OK
        pipe = int.from_bytes(ancillary[0][2][:4], "little")
        try:
            child = os.fork()
        except OSError as error:
            os.write(pipe, f"{EXIT_FAILURE} cannot fork: {error.strerror}".encode())
            child = 1
        if child == 0:
            try:
                _run(json.loads(message), pipe)
            finally:
                os._exit(EXIT_FAILURE)  # never back into the loop
        os.close(pipe)


def _run(argv: Sequence[str], pipe: int) -> None:
    from unionfs.front.cli import dispatch

    os.set_inheritable(pipe, False)
    for number in (_signal.SIGINT, _signal.SIGCHLD):
        _signal.signal(number, _signal.SIG_DFL)
    said = ""
    try:
        code = dispatch(argv)
    except MountError as error:
        code, said = error.code, str(error)
    except Exception as error:
        code, said = EXIT_FAILURE, str(error) or repr(error)
    os.write(pipe, f"{code} {said}".encode("utf-8", "surrogateescape"))
    os._exit(code)


if __name__ == "__main__":
    sys.exit(main())
