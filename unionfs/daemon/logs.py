"""The daemon's log: to stderr for people, as JSON lines in a rotated file, or to the journal."""

from __future__ import annotations

import json
import logging
import os
import socket
import time
from logging.handlers import RotatingFileHandler

from unionfs.errors import MountError

LOG = logging.getLogger("unionfs.daemon")
JOURNAL = "/run/systemd/journal/socket"
LARGEST, KEPT = 10 << 20, 3  # bytes of a log file, and how many old ones stay
_PRIORITY = {logging.DEBUG: 7, logging.INFO: 6, logging.WARNING: 4, logging.ERROR: 3, logging.CRITICAL: 2}


class Text(logging.Formatter):
    def formatTime(self, record: logging.LogRecord, datefmt: str | None = None) -> str:
        return time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(record.created)) + f".{int(record.msecs):03}Z"


class Json(Text):
    def format(self, record: logging.LogRecord) -> str:
        row = {"time": self.formatTime(record), "level": record.levelname.lower(), "message": record.getMessage()}
        if record.exc_info:
            row["traceback"] = self.formatException(record.exc_info)
        return json.dumps(row)


class Journal(logging.Handler):
    """The journal's native protocol (systemd.io/JOURNAL_NATIVE_PROTOCOL): one datagram an entry."""

    def __init__(self, path: str) -> None:
        super().__init__()
        self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
        self._socket.connect(path)

    def emit(self, record: logging.LogRecord) -> None:
        try:
            fields = {
                "MESSAGE": self.format(record),
                "PRIORITY": str(_PRIORITY.get(record.levelno, 6)),
                "SYSLOG_IDENTIFIER": "unionfs",
            }
            self._socket.send(b"".join(self._field(name, value) for name, value in fields.items()))
        except Exception:
            self.handleError(record)

    @staticmethod
    def _field(name: str, value: str) -> bytes:
        data = value.encode("utf-8", "backslashreplace")
        if b"\n" in data:
            return name.encode() + b"\n" + len(data).to_bytes(8, "little") + data + b"\n"
        return name.encode() + b"=" + data + b"\n"


def start(level: str, driver: str, path: str) -> None:
    """Sends what `LOG` and the servers' libraries log from `level` on where `driver` says."""
    handler: logging.Handler
    try:
        if driver == "json-file":
            os.makedirs(os.path.dirname(path), exist_ok=True)
            handler = RotatingFileHandler(path, maxBytes=LARGEST, backupCount=KEPT)
            handler.setFormatter(Json())
        elif driver == "journald":
            handler = Journal(JOURNAL)
            handler.setFormatter(logging.Formatter("%(message)s"))
        else:
            handler = logging.StreamHandler()
            handler.setFormatter(Text("%(asctime)s %(levelname)-7s %(message)s"))
    except OSError as error:
        where = path if driver == "json-file" else JOURNAL
        raise MountError(f"daemon: --log-driver {driver}: {where}: {error.strerror}") from None
    logging.basicConfig(handlers=[handler], level=logging.WARNING, force=True)
    logging.getLogger("unionfs").setLevel(level.upper())
