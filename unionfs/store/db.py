"""The database of a store: SQLite in WAL mode, one connection behind a lock.

What is in it is what there is; directories that it does not name are garbage. A transaction that must survive a power
cut is `durable` (fsynced before it returns); the others survive a kill, and after a power cut it is as if they had not
been (they are never half there).

`user_version` counts the migrations that a database has seen: `MIGRATIONS` is only ever appended to.
"""

from __future__ import annotations

import sqlite3
import threading
from collections.abc import Iterator
from contextlib import contextmanager

from unionfs.store.api import NoSpace, StoreError, Unsupported

MIGRATIONS = (
    """
    CREATE TABLE layers (
        num INTEGER PRIMARY KEY AUTOINCREMENT,
        id TEXT NOT NULL UNIQUE,
        parent INTEGER REFERENCES layers (num),
        kind TEXT NOT NULL CHECK (kind IN ('committed', 'active', 'view')),
        directory TEXT NOT NULL UNIQUE,
        created REAL NOT NULL,
        updated REAL NOT NULL,
        labels TEXT NOT NULL DEFAULT '{}',
        options TEXT NOT NULL DEFAULT '{}',
        size INTEGER NOT NULL DEFAULT -1,
        inodes INTEGER NOT NULL DEFAULT -1,
        diff_id TEXT NOT NULL DEFAULT '',
        refs INTEGER NOT NULL DEFAULT 0
    );
    CREATE INDEX layers_parent ON layers (parent);
    """,
    """
    CREATE TABLE blobs (digest TEXT PRIMARY KEY, data BLOB NOT NULL);
    CREATE TABLE images (
        name TEXT PRIMARY KEY,
        config TEXT NOT NULL REFERENCES blobs (digest),
        layer TEXT NOT NULL,
        created REAL NOT NULL
    );
    CREATE TABLE containers (
        id TEXT PRIMARY KEY,
        name TEXT NOT NULL UNIQUE,
        image TEXT NOT NULL,
        config TEXT NOT NULL REFERENCES blobs (digest),
        layer TEXT NOT NULL,
        created REAL NOT NULL,
        mountpoint TEXT NOT NULL DEFAULT ''
    );
    """,
)


class Database:
    """Rows are `sqlite3.Row`. Any thread."""

    def __init__(self, path: str) -> None:
        self._path = path
        self._lock = threading.RLock()
        self._connection = sqlite3.connect(path, check_same_thread=False, isolation_level=None, timeout=30)
        try:
            self._connection.row_factory = sqlite3.Row
            self._connection.execute("PRAGMA journal_mode=WAL")
            self._connection.execute("PRAGMA foreign_keys=ON")
            self._migrate(path)
        except sqlite3.DatabaseError as error:
            self._connection.close()
            raise StoreError(f"{path}: {error}: restore it from a backup, or move it away to start anew") from None
        except BaseException:
            self._connection.close()
            raise

    def _migrate(self, path: str) -> None:
        (version,) = self._connection.execute("PRAGMA user_version").fetchone()
        if version > len(MIGRATIONS):
            raise Unsupported(f"{path}: written by a newer unionfs (schema {version}): use that one")
        for number, script in enumerate(MIGRATIONS[version:], version + 1):
            # executescript commits what is open first, so the transaction is part of the script
            self._connection.executescript(f"BEGIN IMMEDIATE; {script}; PRAGMA user_version={number}; COMMIT;")

    @contextmanager
    def transaction(self, *, durable: bool = False) -> Iterator[sqlite3.Connection]:
        with self._lock:
            try:
                self._connection.execute("PRAGMA synchronous=FULL" if durable else "PRAGMA synchronous=NORMAL")
                self._connection.execute("BEGIN IMMEDIATE")
                try:
                    yield self._connection
                    self._connection.execute("COMMIT")
                except BaseException:
                    if self._connection.in_transaction:
                        self._connection.execute("ROLLBACK")
                    raise
            except sqlite3.OperationalError as error:
                problem = NoSpace if error.sqlite_errorcode == sqlite3.SQLITE_FULL else StoreError
                raise problem(f"{self._path}: {error}") from None

    def rows(self, sql: str, *arguments: object) -> list[sqlite3.Row]:
        with self._lock:
            return self._connection.execute(sql, arguments).fetchall()

    def row(self, sql: str, *arguments: object) -> sqlite3.Row | None:
        found = self.rows(sql, *arguments)
        return found[0] if found else None

    def problems(self) -> list[str]:
        """What SQLite's own check finds."""
        with self._lock:
            said = [row[0] for row in self._connection.execute("PRAGMA integrity_check")]
            said += [f"{row[0]}: no such {row[2]}" for row in self._connection.execute("PRAGMA foreign_key_check")]
        return [text for text in said if text != "ok"]

    def close(self) -> None:
        with self._lock:
            self._connection.close()
