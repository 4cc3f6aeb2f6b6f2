"""The client's side of the REST API, on the standard library alone. One connection a request; not for sharing.

Where the daemon is: `-H`, else UNIONFS_HOST, else the default socket. TLS, for tcp: UNIONFS_TLS_VERIFY=1, with ca.pem,
cert.pem and key.pem from UNIONFS_CERT_PATH (~/.unionfs).
"""

from __future__ import annotations

import http.client
import json
import os
import socket
import ssl
from collections.abc import Iterable, Iterator, Mapping
from typing import Any, NamedTuple
from urllib.parse import quote, urlencode

from unionfs.daemon.listen import PORT, TLS_PORT, default_host, split_tcp
from unionfs.errors import EXIT_FAILURE, EXIT_PERMISSION, EXIT_USAGE, MountError
from unionfs.store.api import InUse, Invalid, NoSpace, NotFound, Precondition, StoreError, Unsupported

API = "/v1"
PATIENCE = 10.0  # seconds for a connection; an answer may take as long as the work does
_CHUNK = 1 << 16
_ERRORS: dict[int, type[StoreError]] = {
    error.status: error for error in (Invalid, NotFound, InUse, Precondition, Unsupported, NoSpace)
}


class Tls(NamedTuple):
    cacert: str
    cert: str
    key: str


class Refused(StoreError):
    """An answer of the daemon that is no store's error: its words, and `status`."""

    def __init__(self, message: str, status: int) -> None:
        super().__init__(message)
        self.status = status


def named_host() -> str:
    """The daemon that the environment names, "" for none."""
    return os.environ.get("UNIONFS_HOST", "")


def connect() -> Client:
    """To the daemon that the environment names, or to the default one. Nothing is sent yet."""
    tls = None
    if os.environ.get("UNIONFS_TLS_VERIFY"):
        directory = os.environ.get("UNIONFS_CERT_PATH") or os.path.expanduser("~/.unionfs")
        tls = Tls(
            os.environ.get("UNIONFS_TLS_CACERT") or os.path.join(directory, "ca.pem"),
            os.environ.get("UNIONFS_TLS_CERT") or os.path.join(directory, "cert.pem"),
            os.environ.get("UNIONFS_TLS_KEY") or os.path.join(directory, "key.pem"),
        )
    return Client(named_host() or default_host(), tls)


class Client:
    def __init__(self, host: str, tls: Tls | None = None) -> None:
        self.host = host
        scheme, separator, rest = host.partition("://")
        self._path, self._address, self._context = "", ("", 0), None
        if separator and scheme == "unix" and rest.startswith("/"):
            self._path = rest
        elif separator and scheme == "tcp":
            try:
                self._address = split_tcp(rest, TLS_PORT if tls else PORT)
            except ValueError as error:
                raise MountError(f"-H {host}: {error}", EXIT_USAGE) from None
            self._context = _context(tls) if tls else None
        else:
            raise MountError(f"-H {host}: must be unix:///PATH or tcp://HOST:PORT", EXIT_USAGE)

    def call(
        self, method: str, path: str, body: Mapping[str, Any] | None = None, query: Mapping[str, str] | None = None
    ) -> Any:
        """The JSON that the daemon answers; None for an empty answer."""
        data = None if body is None else json.dumps(body).encode()
        with self._ask(method, path, query, data, "application/json") as answer:
            content = self._read(answer)
        return json.loads(content) if content else None

    def send(self, method: str, path: str, body: Iterable[bytes], query: Mapping[str, str] | None = None) -> Any:
        """As `call`, with a body that is streamed."""
        with self._ask(method, path, query, body, "application/x-tar") as answer:
            content = self._read(answer)
        return json.loads(content) if content else None

    def work(
        self, method: str, path: str, body: Iterable[bytes], query: Mapping[str, str] | None = None
    ) -> Iterator[dict[str, Any]]:
        """As `send`, for answers that are JSON lines: each as it comes."""
        with self._ask(method, path, query, body, "application/x-tar") as answer:
            while line := self._readline(answer):
                yield json.loads(line)

    def receive(self, path: str, query: Mapping[str, str] | None = None) -> Iterator[bytes]:
        """What the daemon streams as an answer; StoreError if it ends before its end."""
        with self._ask("GET", path, query, None, "") as answer:
            while chunk := self._read(answer, _CHUNK):
                yield chunk

    def _read(self, answer: http.client.HTTPResponse, size: int | None = None) -> bytes:
        try:
            return answer.read(size)
        except (OSError, http.client.HTTPException) as error:
            raise self._broken_off(error) from None

    def _readline(self, answer: http.client.HTTPResponse) -> bytes:
        try:
            return answer.readline()
        except (OSError, http.client.HTTPException) as error:
            raise self._broken_off(error) from None

    def _broken_off(self, error: Exception) -> StoreError:
        return Refused(f"the daemon on {self.host} broke off its answer ({error}): see its log", 502)

    def _ask(
        self, method: str, path: str, query: Mapping[str, str] | None, body: bytes | Iterable[bytes] | None, kind: str
    ) -> http.client.HTTPResponse:
        connection = self._connect()
        target = API + path + (f"?{urlencode(query)}" if query else "")
        headers = {"Host": "unionfs", "Content-Type": kind} if kind else {"Host": "unionfs"}
        try:
            try:
                connection.request(method, target, body, headers, encode_chunked=not isinstance(body, bytes | None))
            except (BrokenPipeError, ConnectionResetError):
                pass  # it answers before it has read all: why is in the answer
            answer = connection.getresponse()
        except (OSError, http.client.HTTPException) as error:
            connection.close()
            raise self._unreachable(error) from None
        if answer.status >= 400:
            with answer:
                raise store_error(answer.status, _message(answer.status, self._read(answer)))
        return answer

    def _connect(self) -> http.client.HTTPConnection:
        try:
            if self._path:
                connection = http.client.HTTPConnection("unionfs")
                connection.sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
                connection.sock.connect(self._path)
                return connection
            name, port = self._address
            if self._context:
                connection = http.client.HTTPSConnection(name, port, timeout=PATIENCE, context=self._context)
            else:
                connection = http.client.HTTPConnection(name, port, timeout=PATIENCE)
            connection.connect()
            connection.sock.settimeout(None)
            return connection
        except OSError as error:
            raise self._unreachable(error) from None

    def _unreachable(self, error: Exception) -> MountError:
        if isinstance(error, PermissionError):
            return MountError(
                f"{self.host}: permission denied: it is for root and the socket's group (usermod -aG unionfs YOU)",
                EXIT_PERMISSION,
            )
        if isinstance(error, ssl.SSLError):
            hint = "check UNIONFS_CERT_PATH: both sides need certificates of one CA (unionfs certs create)"
            return MountError(f"{self.host}: TLS: {error.reason or error}: {hint}", EXIT_PERMISSION)
        reason = getattr(error, "strerror", None) or str(error) or type(error).__name__
        return MountError(
            f"no daemon answers on {self.host} ({reason}): start one with `unionfs daemon`, or name another with -H",
            EXIT_FAILURE,
        )


def segment(text: str) -> str:
    """An id or a name as one segment of a path."""
    return quote(text, safe="")


def _context(tls: Tls) -> ssl.SSLContext:
    try:
        context = ssl.create_default_context(cafile=tls.cacert)
        context.minimum_version = ssl.TLSVersion.TLSv1_2
        context.load_cert_chain(tls.cert, tls.key)
    except (OSError, ssl.SSLError) as error:
        files = f"{tls.cacert}, {tls.cert}, {tls.key}"
        raise MountError(f"TLS files {files}: {error.strerror or error} (set UNIONFS_CERT_PATH)") from None
    return context


def store_error(status: int, message: str) -> StoreError:
    """What the daemon's store raised, raised here."""
    known = _ERRORS.get(status)
    return known(message) if known else Refused(message, status)


def _message(status: int, content: bytes) -> str:
    try:
        return str(json.loads(content)["message"])
    except (ValueError, KeyError, TypeError):
        return f"the daemon answered {status}"
