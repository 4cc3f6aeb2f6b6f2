"""The daemon's listening sockets: unix with its group, tcp, and those that systemd hands over.

Opened before anything else is told, closed and unlinked by `close`. What is let in is decided here: a unix socket by
its mode, a tcp socket by TLS (`secure`), or nobody's choice but the network's, which the caller warns of.
"""

from __future__ import annotations

import errno
import grp
import os
import socket
import stat

from unionfs.errors import EXIT_BUSY, EXIT_FAILURE, EXIT_USAGE, MountError

GROUP = "unionfs"
PORT, TLS_PORT = 2375, 2376
FIRST_FD = 3  # sd_listen_fds(3)
BACKLOG = 100
_LONGEST = 107  # bytes of sun_path without its NUL


class Listener:
    """One socket; `note` says in words what the person who starts the daemon should know of it."""

    def __init__(self, bound: socket.socket, label: str, secure: bool, path: str = "", note: str = "") -> None:
        self.socket = bound
        self.label = label
        self.secure = secure
        self.note = note
        self._path = path  # to unlink; "" if it isn't ours
        self._inode = os.stat(path).st_ino if path else 0

    def descriptor(self) -> str:
        """For hypercorn, which closes what it is given: one of its own."""
        return f"fd://{os.dup(self.socket.fileno())}"

    @property
    def open_to_network(self) -> bool:
        return self.socket.family != socket.AF_UNIX and not self.secure

    def close(self) -> None:
        self.socket.close()
        try:
            if self._path and os.stat(self._path).st_ino == self._inode:
                os.unlink(self._path)
        except FileNotFoundError:
            pass


def default_host() -> str:
    """Root's is the one that `unionfs` asks without -H."""
    runtime = os.environ.get("XDG_RUNTIME_DIR")
    if os.geteuid() == 0 or not runtime:
        return "unix:///run/unionfs.sock"
    return f"unix://{runtime}/unionfs.sock"


def open_listeners(hosts: tuple[str, ...], group: str, tls: bool) -> list[Listener]:
    """MountError naming the address, the reason and the way out; then nothing is left open."""
    listeners: list[Listener] = []
    try:
        for host in hosts or (default_host(),):
            listeners += _open(host, group, tls)
    except BaseException:
        for listener in listeners:
            listener.close()
        raise
    return listeners


def _open(host: str, group: str, tls: bool) -> list[Listener]:
    scheme, separator, rest = host.partition("://")
    if separator and scheme == "unix":
        return [open_unix(rest, group, f"-H {host}")]
    if separator and scheme == "tcp":
        return [_open_tcp(host, rest, tls)]
    if separator and scheme == "fd":
        return _inherited(host, rest, tls)
    raise _problem(f"-H {host}", "must be unix:///PATH, tcp://IP:PORT or fd://", EXIT_USAGE)


def open_unix(path: str, group: str, option: str) -> Listener:
    """A socket of mode 660 for a group ("": unionfs, or root alone where there is no such group). `option` is what
    messages blame."""
    if not path.startswith("/"):
        raise _problem(option, "the path must be absolute: unix:///run/unionfs.sock", EXIT_USAGE)
    if len(os.fsencode(path)) > _LONGEST:
        raise _problem(
            option, f"the path is longer than the {_LONGEST} bytes that a socket's name may have", EXIT_USAGE
        )
    gid, note = _group(group)
    bound = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    try:
        os.makedirs(os.path.dirname(path), exist_ok=True)
        _clear_away(option, path)
        old = os.umask(0o777)  # nobody may connect before the group is right
        try:
            bound.bind(path)
        finally:
            os.umask(old)
        os.chown(path, -1, gid)
        os.chmod(path, 0o660)
        bound.listen(BACKLOG)
    except OSError as error:
        bound.close()
        raise _problem(option, error.strerror or str(error)) from None
    except MountError:
        bound.close()
        raise
    return Listener(bound, f"unix://{path}", False, path, note)


def _group(name: str) -> tuple[int, str]:
    """The socket's group and, if it isn't the wanted one, what to say about that."""
    if os.geteuid() != 0 and not name:
        return os.getegid(), ""
    try:
        return grp.getgrnam(name or GROUP).gr_gid, ""
    except KeyError:
        if name:
            raise MountError(f"daemon: --group {name}: there is no such group (groupadd {name})", EXIT_USAGE) from None
        return 0, f"there is no group {GROUP}: only root may connect (groupadd --system {GROUP}, then start again)"


def _clear_away(option: str, path: str) -> None:
    """Removes a socket that a killed daemon left; a living one, or anything else, stays and is an error."""
    try:
        if not stat.S_ISSOCK(os.lstat(path).st_mode):
            raise _problem(option, "something that is not a socket is there: move it away or choose another path")
    except FileNotFoundError:
        return
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as probe:
        probe.settimeout(5)
        try:
            probe.connect(path)
        except ConnectionRefusedError:
            os.unlink(path)
            return
        except OSError as error:
            raise _problem(option, f"in use, by whom can't be told ({error})", EXIT_BUSY) from None
    raise _problem(option, "another process listens there: stop it or choose another path", EXIT_BUSY)


def split_tcp(rest: str, default_port: int) -> tuple[str, int]:
    """HOST and PORT of what stands behind tcp://; ValueError for nonsense."""
    if rest.startswith("["):
        name, bracket, port = rest[1:].partition("]")
        if not bracket or (port and not port.startswith(":")):
            raise ValueError("an IPv6 address is written tcp://[::1]:PORT")
        port = port[1:]
    else:
        name, _, port = rest.rpartition(":") if ":" in rest else (rest, "", "")
        if ":" in name:
            raise ValueError("an IPv6 address is written tcp://[::1]:PORT")
    if port and not (port.isascii() and port.isdigit() and int(port) < 65536):
        raise ValueError(f"{port!r} is not a port")
    return name or "127.0.0.1", int(port) if port else default_port


def _open_tcp(host: str, rest: str, tls: bool) -> Listener:
    try:
        name, port = split_tcp(rest, TLS_PORT if tls else PORT)
    except ValueError as error:
        raise _problem(f"-H {host}", str(error), EXIT_USAGE) from None
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(name, port, type=socket.SOCK_STREAM)[0]
        bound = socket.socket(family, kind, protocol)
    except OSError as error:
        raise _problem(f"-H {host}", error.strerror or str(error)) from None
    try:
        bound.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        bound.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        bound.bind(address)
        bound.listen(BACKLOG)
    except OSError as error:
        bound.close()
        busy = error.errno == errno.EADDRINUSE
        raise _problem(f"-H {host}", error.strerror or str(error), EXIT_BUSY if busy else EXIT_FAILURE) from None
    return Listener(bound, _tcp_label(bound), tls)


def _tcp_label(bound: socket.socket) -> str:
    name, port = bound.getsockname()[:2]
    return f"tcp://[{name}]:{port}" if ":" in name else f"tcp://{name}:{port}"


def _inherited(host: str, name: str, tls: bool) -> list[Listener]:
    """systemd's sockets: all, or those with a FileDescriptorName."""
    count = int(os.environ.get("LISTEN_FDS") or 0) if os.environ.get("LISTEN_PID") == str(os.getpid()) else 0
    if not count:
        raise _problem(
            f"-H {host}", "systemd handed over no socket: start it with unionfs.socket, or use -H unix:///PATH"
        )
    names = os.environ.get("LISTEN_FDNAMES", "").split(":")
    found = []
    for index in range(count):
        if name and name not in (names[index : index + 1] or [""]):
            continue
        bound = socket.socket(fileno=FIRST_FD + index)
        bound.set_inheritable(False)
        if bound.family == socket.AF_UNIX:
            found.append(Listener(bound, f"fd://{FIRST_FD + index} (unix://{bound.getsockname()})", False))
        else:
            found.append(Listener(bound, f"fd://{FIRST_FD + index} ({_tcp_label(bound)})", tls))
    if not found:
        raise _problem(f"-H {host}", f"systemd handed over {', '.join(names)}, not {name}")
    return found


def _problem(option: str, reason: str, code: int = EXIT_FAILURE) -> MountError:
    return MountError(f"daemon: {option}: {reason}", code)
