"""Workers that serve a mount, one after the other, and the process that outlives them.

A worker is cloned with the supervisor's descriptor table: what it opens stays open when it dies, under the same number.
Its memory is a copy of the supervisor's, which has the layers open and has never answered a request. The supervisor has
one thread, as cloning without Python's own fork demands. Experimental: docs/recovery.md says what is guaranteed.
"""

from __future__ import annotations

import _signal  # type: ignore[import-not-found]  # `signal` wraps it in enums: 3.5 ms
import ctypes
import os
import sys
from time import monotonic

from unionfs.assemble import session_settings
from unionfs.errors import EXIT_FAILURE, EXIT_USAGE, MountError
from unionfs.guard.journal import Journal
from unionfs.guard.redo import CARRIED
from unionfs.guard.revive import Revival
from unionfs.guard.session import GuardedSession
from unionfs.guard.table import JournalTable
from unionfs.wire.handshake import Negotiated

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable
    from typing import Any

    from unionfs.api import MountConfig

    Serve = Callable[[Callable[..., GuardedSession], bool], int]  # (maker of the session, the first worker?)

_CLONE = {"x86_64": 56, "aarch64": 220}
_CLONE_FILES = 0x400
LIVED = 0.1  # seconds; a worker that died younger than that counts as a vain attempt
ATTEMPTS = 10  # vain ones in a row before giving up


def check(config: MountConfig) -> bool:
    """Whether the mount is to be guarded. MountError where that can't be."""
    word = config.options.get("guard", "off")
    if word in ("off", "0"):
        return False
    if word not in ("on", "1", ""):
        raise MountError(f"-o guard={word}: on or off", EXIT_USAGE)
    if config.driver != "overlay" or config.session == "pyfuse3" or config.data == "passthrough":
        raise MountError("guard=on: only with driver overlay, the direct session, and not passthrough", EXIT_USAGE)
    if config.foreground or os.uname().machine not in _CLONE:
        raise MountError("guard=on: only in the background, on x86_64 and aarch64", EXIT_USAGE)
    return True


def supervise(config: MountConfig, ops: Any, serve: Serve) -> int:
    """Until a worker ends by itself: its exit code. Gives up, with the mount broken, when workers die at once."""
    journal = Journal.create()
    libc = ctypes.CDLL(None)
    number = _CLONE[os.uname().machine]
    ours = _descriptors()
    worker = 0

    def forward(signal: int, frame: object) -> None:
        if worker:
            os.kill(worker, signal)

    for signal in (_signal.SIGTERM, _signal.SIGINT):
        _signal.signal(signal, forward)
    _signal.signal(_signal.SIGHUP, _signal.SIG_IGN)
    deaths = vain = 0
    while True:
        born = monotonic()
        worker = libc.syscall(number, _CLONE_FILES | _signal.SIGCHLD, 0, 0, 0, 0)
        if worker < 0:
            print("unionfs: no new worker can be made", file=sys.stderr)
            return EXIT_FAILURE
        if not worker:
            _work(config, ops, journal, deaths, serve)
        code = os.waitstatus_to_exitcode(os.waitpid(worker, 0)[1])
        if code >= 0:
            return code
        deaths += 1
        vain = 0 if monotonic() - born > LIVED else vain + 1
        print(f"unionfs: worker {worker} was killed by signal {-code}", file=sys.stderr)
        worker = 0
        if vain >= ATTEMPTS or not journal.terms:
            print(f"unionfs: given up after {deaths} deaths, {vain} of them at once", file=sys.stderr)
            return EXIT_FAILURE
        pins = {record.pin for record in journal.marked()}
        for fd in _descriptors() - ours - pins:
            try:
                os.close(fd)
            except OSError:
                pass  # the one that did the listing


def _descriptors() -> set[int]:
    return {int(name) for name in os.listdir("/proc/self/fd")}


def _work(config: MountConfig, ops: Any, journal: Journal, deaths: int, serve: Serve) -> None:
    """The life of a worker; does not return."""
    code = EXIT_FAILURE
    try:
        table = JournalTable(ops.root, journal)
        ops.table, ops.slots = table, table.slots
        ops._tmp = deaths << 20  # scratch names of predecessors may be there still
        terms = None
        if journal.terms:
            journal.mend()
            table.reserve()
            table.revival = Revival(ops, table, journal)
            terms = Negotiated.from_bytes(journal.terms)

        def make(fd: int, ops: Any, config: MountConfig) -> GuardedSession:
            settings = session_settings(config)
            settings["max_threads"] = min(settings["max_threads"], CARRIED)
            data, acl = config.data, "noacl" not in config.options
            return GuardedSession(
                fd, ops, journal=journal, table=table, deaths=deaths, negotiated=terms, data=data, acl=acl, **settings
            )

        code = serve(make, not deaths)
    except BaseException:
        import traceback

        traceback.print_exc()
        os.kill(os.getpid(), _signal.SIGKILL)  # replaced, or given up, as any other that died
    finally:
        os._exit(code)
