"""The control socket of a mount: one JSON line in, one JSON line out.

Server: a plain thread that blocks in accept(2), and one short-lived thread per request. Not trio: an idle mount
must not wake up and must stay under 20 MiB, and trio alone would take a third of that (and 100 ms of start).
`_socket` is used as it is: `socket` costs 11 ms of imports, mostly its enums, before the mount answers.

Client: `ask`. A socket is named by the device number of its mount, so it is found from /proc/self/mountinfo
without touching the mount. Answers: {"ok": true, "result": ...} or {"ok": false, "error": text, "code": exit code}.
Paths travel as JSON strings with surrogate escapes.

Other parts of the product add verbs: `register(name, handler)`, or `ops.control_verbs()`.
"""

from __future__ import annotations

import _socket
import os
import stat
import sys
import threading
import time

from unionfs.errors import EXIT_FAILURE, EXIT_NOT_OURS, EXIT_USAGE, MountError
from unionfs.front.mounts import Mount, fuse_mounts
from unionfs.session.mount import show

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable
    from typing import Any

    Handler = Callable[..., Any]

MAX_REQUEST = 1 << 20
MAX_DIRECTORY = 70  # struct sockaddr_un takes 107 bytes
CONNECT_WAIT = 5  # seconds that a client stands in the queue of a server that may have been stopped
UNFINISHED_FOR = 60.0  # seconds after which a socket that has not got its name yet is a dead server's
CLIENT_TIMEOUT = 30.0  # a stuck client holds no more than one thread, and not for ever


def directories() -> list[str]:
    """Where sockets may be, best first."""
    found = ["/run/unionfs"] if os.geteuid() == 0 else []
    runtime = os.environ.get("XDG_RUNTIME_DIR")
    if runtime:
        found.append(os.path.join(runtime, "unionfs"))
    found.append(f"/tmp/unionfs-{os.geteuid()}")
    return found


def make_directory() -> str:
    """The first of `directories` that can be made ours: owned by us, closed to others."""
    reasons = []
    for path in directories():
        try:
            try:
                os.mkdir(path, 0o700)
            except FileExistsError:
                pass
            if not _is_ours(path):
                raise PermissionError(1, "belongs to someone else")
            if len(path) > MAX_DIRECTORY:
                raise OSError(36, "too long for a socket")
            os.chmod(path, 0o700)
            if os.access(path, os.W_OK):
                return path
            raise PermissionError(1, "read-only")
        except OSError as error:
            reasons.append(f"{path}: {error.strerror}")
    raise MountError(f"no place for the control socket: {'; '.join(reasons)}: set XDG_RUNTIME_DIR", EXIT_FAILURE)


def _is_ours(path: str) -> bool:
    """/tmp is everybody's: what another user put there under our name is not ours to trust or clean."""
    try:
        status = os.lstat(path)
    except FileNotFoundError:
        return False
    return stat.S_ISDIR(status.st_mode) and status.st_uid == os.geteuid()


def socket_path(directory: str, device: int) -> str:
    return f"{directory}/{os.major(device)}-{os.minor(device)}.sock"


class ControlServer:
    """Answers verbs for one mount. `handlers` may be extended at any time; each runs in a thread of its own."""

    def __init__(self) -> None:
        self._handlers: dict[str, Handler] = {}
        self._socket: _socket.socket | None = None
        self.path = ""
        self._inode = 0  # of our socket

    def register(self, name: str, handler: Handler) -> None:
        """`handler(**arguments)` returns what JSON can carry, or raises MountError, OSError or ValueError."""
        self._handlers[name] = handler

    def bind(self, directory: str, device: int) -> None:
        self.path = socket_path(directory, device)
        # Renamed into place when it listens, or `sweep` could take it for a dead one. The device number is ours alone
        # while we are mounted: whatever has the name was left by a dead server.
        unfinished = f"{self.path}.{os.getpid()}"
        listener = _socket.socket(_socket.AF_UNIX, _socket.SOCK_STREAM | _socket.SOCK_CLOEXEC)
        listener.bind(unfinished)
        os.chmod(unfinished, 0o600)
        listener.listen(16)
        self._inode = os.stat(unfinished).st_ino
        os.rename(unfinished, self.path)
        self._socket = listener

    def serve(self) -> None:
        """Blocks in the calling thread until `close`."""
        listener = self._socket
        assert listener is not None
        while True:
            try:
                fd, _ = listener._accept()  # type: ignore[attr-defined]
            except OSError:
                return
            threading.Thread(target=self._answer, args=(fd,), daemon=True).start()

    def close(self) -> None:
        if self._socket is not None:
            try:
                # After the unmount the device number may be another mount's already, and the socket its.
                if os.stat(self.path).st_ino == self._inode:
                    os.unlink(self.path)
            except FileNotFoundError:
                pass
            try:
                self._socket.shutdown(_socket.SHUT_RDWR)  # wakes accept
            except OSError:
                pass
            self._socket.close()

    def _answer(self, fd: int) -> None:
        import json  # 3 ms and 0.5 MiB that a mount nobody asks does not pay

        connection = _socket.socket(fileno=fd)
        connection.settimeout(CLIENT_TIMEOUT)
        try:
            line = _read_line(connection, MAX_REQUEST)
            if not line:
                return  # a look whether we are there
            reply = self._call(line)
            connection.sendall(json.dumps(reply).encode() + b"\n")
        except OSError:
            pass  # the client went away
        finally:
            connection.close()

    def _call(self, line: bytes) -> dict[str, Any]:
        import json

        try:
            request = json.loads(line)
            verb = request.pop("verb")
            handler = self._handlers.get(verb)
        except (ValueError, AttributeError, KeyError, TypeError):
            return {"ok": False, "error": "malformed request", "code": EXIT_USAGE}
        if handler is None:
            return {"ok": False, "error": f"this mount knows no {verb!r}", "code": EXIT_USAGE}
        try:
            return {"ok": True, "result": handler(**request)}
        except MountError as error:
            return {"ok": False, "error": str(error), "code": error.code}
        except OSError as error:
            return {"ok": False, "error": error.strerror or str(error), "code": EXIT_FAILURE}
        except (ValueError, TypeError) as error:
            return {"ok": False, "error": str(error), "code": EXIT_USAGE}
        except Exception as error:  # a bug in a handler must reach the person who asked, and the log
            import traceback

            traceback.print_exc()
            return {"ok": False, "error": f"internal error: {error!r}", "code": EXIT_FAILURE}


class Connection:
    """A client's side of one mount's socket. `server_pid` is as seen from here."""

    def __init__(self, device: int) -> None:
        self._socket = _connect(device)
        self.server_pid = _peer_pid(self._socket)

    def ask(self, verb: str, timeout: float | None = None, **arguments: Any) -> Any:
        import json

        self._socket.settimeout(timeout)
        try:
            self._socket.sendall(json.dumps({"verb": verb, **arguments}).encode() + b"\n")
            line = _read_line(self._socket, None)
        except OSError as error:
            raise MountError(f"the server does not answer: {error}", EXIT_FAILURE) from None
        if not line:
            raise MountError("the server closed the connection without an answer", EXIT_FAILURE)
        reply = json.loads(line)
        if not reply["ok"]:
            raise MountError(reply["error"], reply["code"])
        return reply["result"]

    def close(self) -> None:
        self._socket.close()


def ask(mount: Mount, verb: str, timeout: float | None = None, **arguments: Any) -> Any:
    connection = Connection(mount.device)
    try:
        return connection.ask(verb, timeout, **arguments)
    except MountError as error:
        raise MountError(f"{show(mount.path)}: {error}", error.code) from None
    finally:
        connection.close()


def sweep(directory: str) -> None:
    """Removes what dead servers left: sockets and logs of a device that is mounted nowhere that we can see, and that
    nobody listens on."""
    if not _is_ours(directory):
        return
    live = {socket_path(directory, mount.device) for mount in fuse_mounts()}
    for name in os.listdir(directory):
        path = f"{directory}/{name}"
        socket, suffix, rest = path.partition(".sock")
        socket += suffix
        if not suffix or (rest in ("", ".log") and socket in live):
            continue
        try:
            if rest in ("", ".log"):
                if not _is_refused(socket):
                    continue
            elif time.time() - os.lstat(path).st_mtime < UNFINISHED_FOR:
                continue
            os.unlink(path)
        except FileNotFoundError:
            pass  # its server, or another sweep, was quicker


def _is_refused(path: str) -> bool:
    try:
        _connect_path(path, wait=False).close()
    except (ConnectionRefusedError, FileNotFoundError):
        return True
    except OSError:
        pass  # busy, not dead
    return False


def _connect(device: int) -> _socket.socket:
    refused = ""
    for directory in directories():
        path = socket_path(directory, device)
        if not _is_ours(directory):
            continue
        try:
            return _connect_path(path)
        except FileNotFoundError:
            continue
        except OSError as error:
            refused = f": {path}: {error.strerror}"
    raise MountError(f"no unionfs server of yours answers for it{refused}", EXIT_NOT_OURS)


def _connect_path(path: str, wait: bool = True) -> _socket.socket:
    """BlockingIOError where a server does not take up those who ask already: at once, or after CONNECT_WAIT."""
    connection = _socket.socket(_socket.AF_UNIX, _socket.SOCK_STREAM | _socket.SOCK_CLOEXEC)
    connection.setblocking(wait)
    connection.setsockopt(_socket.SOL_SOCKET, _socket.SO_SNDTIMEO, CONNECT_WAIT.to_bytes(8, sys.byteorder) + bytes(8))
    try:
        connection.connect(path)
    except BaseException:
        connection.close()
        raise
    return connection


def _peer_pid(connection: _socket.socket) -> int:
    raw = connection.getsockopt(_socket.SOL_SOCKET, _socket.SO_PEERCRED, 12)
    return int.from_bytes(raw[:4], "little")


def _read_line(connection: _socket.socket, limit: int | None) -> bytes:
    chunks = bytearray()
    while not chunks.endswith(b"\n"):
        chunk = connection.recv(1 << 16)
        if not chunk:
            break
        chunks += chunk
        if limit is not None and len(chunks) > limit:
            raise OSError(7, "request too long")
    return bytes(chunks)
