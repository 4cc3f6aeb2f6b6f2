"""Workers that serve a mount, one after the other, and the process that outlives them.

A worker is cloned with the supervisor's descriptor table: what it opens stays open when it dies, under the same number.
Its memory is a copy of the supervisor's, which has the layers open and has never answered a request. The supervisor has
one thread, as cloning without Python's own fork demands. docs/recovery.md says what is guaranteed.
"""

from __future__ import annotations

import _signal  # type: ignore[import-not-found]  # `signal` wraps it in enums: 3.5 ms
import ctypes
import os
import select
import sys
from time import monotonic, sleep

from unionfs.assemble import session_settings
from unionfs.errors import EXIT_FAILURE, EXIT_USAGE, MountError
from unionfs.guard import journal as j
from unionfs.guard import state, systemd
from unionfs.guard.failed import FailedSession
from unionfs.guard.journal import Journal
from unionfs.guard.redo import CARRIED
from unionfs.guard.revive import Revival
from unionfs.guard.session import GuardedSession
from unionfs.guard.table import JournalTable
from unionfs.session import mount
from unionfs.wire.handshake import Negotiated

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable
    from typing import Any

    from unionfs.api import MountConfig, Session

    Serve = Callable[["Supervisor"], int]  # the life of a worker: its exit code

_CLONE = {"x86_64": 56, "aarch64": 220}
_CLONE_FILES = 0x400
_PR_SET_PDEATHSIG = 1
EXIT_UPGRADE = 75  # of a worker that makes place for one of other code
RESUME = ("-P", "-m", "unionfs.front.resume")  # what a supervisor becomes then

DRIVERS = ("overlay", "aufs", "row")
LIVED = 0.1  # seconds; a worker that did nothing and died younger than that counts as a vain attempt
ATTEMPTS = 10  # vain ones in a row before giving up
CRASHES, CRASH_TIME = 30, 60.0  # so many workers that fail by themselves in so many seconds are enough, too
KILL_GRACE = 1.0  # seconds that a killed worker gets to end
MAX_DELAY = 1.0  # seconds between vain attempts; the first ones have none
DEADLINE = 10.0  # seconds in which requests wait and none is taken up


def check(config: MountConfig) -> bool:
    """Whether the mount is to be guarded. MountError where that can't be."""
    word = config.options.get("guard", "off")
    if word in ("off", "0"):
        return False
    if word not in ("on", "1", ""):
        raise MountError(f"-o guard={word}: on or off", EXIT_USAGE)
    if config.session == "pyfuse3":
        raise MountError("guard=on: only with the direct session", EXIT_USAGE)
    if config.driver not in DRIVERS:
        raise MountError(f"guard=on: not with driver {config.driver}: {', '.join(DRIVERS)}", EXIT_USAGE)
    if os.uname().machine not in _CLONE:
        raise MountError("guard=on: only on x86_64 and aarch64", EXIT_USAGE)
    _deadline(config)
    return True


def _deadline(config: MountConfig) -> float:
    word = config.options.get("guard_deadline", str(DEADLINE))
    try:
        seconds = float(word)
    except ValueError:
        seconds = 0.0
    if not 0.1 <= seconds <= 3600:
        raise MountError(f"-o guard_deadline={word}: seconds, from 0.1 to 3600", EXIT_USAGE)
    return seconds


class Supervisor:
    """`run` until a worker ends by itself: its exit code."""

    def __init__(
        self, config: MountConfig, ops: Any, fd: int, serve: Serve, journal: int | None = None,
        kept_state: int | None = None,
    ) -> None:  # fmt: skip
        """`journal`, `kept_state`: descriptors of a supervisor that made place for this one."""
        self.config = config
        self.ops = ops
        self.fd = fd
        self.journal = Journal.create() if journal is None else Journal(journal)
        self._serve = serve
        self._libc = ctypes.CDLL(None)
        self._pid = os.getpid()
        self._worker = 0
        self._vain = 0
        self._crashes: list[float] = []
        self._failed = ""
        self._deadline = _deadline(config)
        # systemd keeps the mount when we die, and starts the next one of us
        self._has_heir = config.foreground and "NOTIFY_SOCKET" in os.environ
        self._watchdog = systemd.watchdog() if self._has_heir else None
        self.state = -1 if kept_state is None else kept_state
        if self.state < 0 and (self._has_heir or getattr(self._core.driver, "live", False)):
            self.state = state.save(config)

    @property
    def _core(self) -> Any:
        return getattr(self.ops, "union", self.ops)

    @property
    def device(self) -> int:
        """The mount's device number; 0 before it is known."""
        return self.journal.words[j.DEVICE]

    def mounted(self, device: int) -> None:
        self.journal.words[j.DEVICE] = device

    def layers_change(self) -> None:
        """Told by a worker that is about to change its layers: a successor must not take those of this process."""
        self.journal.words[j.STALE] = 1

    def layers_changed(self) -> None:
        """Told by the worker that has: where a successor finds them."""
        if self.state >= 0:
            state.save(self.config, self.state)

    def run(self) -> int:
        for number in (_signal.SIGTERM, _signal.SIGINT):
            _signal.signal(number, self._forward)
        _signal.signal(_signal.SIGHUP, _signal.SIG_IGN)
        words = self.journal.words
        words[j.STALE] = 0
        ours = _descriptors() - self._pins()
        if self._has_heir:
            systemd.keep(self.fd, self.journal.fd, self.state)
        while True:
            born, beat = monotonic(), words[j.BEAT]
            self._worker = self._libc.syscall(_CLONE[os.uname().machine], _CLONE_FILES | _signal.SIGCHLD, 0, 0, 0, 0)
            if self._worker < 0:
                print("unionfs: no new worker can be made", file=sys.stderr)
                return EXIT_FAILURE
            if not self._worker:
                self._work()
            code = self._wait()
            worker, self._worker = self._worker, 0
            if code == EXIT_UPGRADE:
                self._become()
                return EXIT_FAILURE  # that worker has closed the layers
            if code >= 0:
                return code
            words[j.DEATHS] += 1
            words[j.SIGNAL] = -code
            print(f"unionfs: worker {worker} was killed by signal {-code}", file=sys.stderr)
            if not self.journal.terms:
                return EXIT_FAILURE  # before the kernel said hello: nobody waits for anything
            self._clean(ours)
            if words[j.STALE]:
                self._become()
            self._judge(-code, monotonic() - born < LIVED and words[j.BEAT] == beat)

    def _pins(self) -> set[int]:
        """Descriptors that the journal has."""
        self.journal.mend()
        return {record.pin for record in self.journal.marked() if record.pin >= 0}

    def _clean(self, ours: set[int]) -> None:
        """Close what a dead worker had open."""
        for fd in _descriptors() - ours - self._pins():
            try:
                os.close(fd)
            except OSError:
                pass  # the one that did the listing

    def _become(self) -> None:
        """Make this process the program on disk, with what it needs to go on. Returns where that fails."""
        self.state = state.save(self.config) if self.state < 0 else self.state
        kept = (self.state, self.fd, self.journal.fd)
        for fd in (*kept, *self._pins()):
            os.set_inheritable(fd, True)
        for number in (_signal.SIGTERM, _signal.SIGINT):
            _signal.signal(number, _signal.SIG_IGN)  # until the next program has its handlers
        try:
            os.execv(sys.executable, [sys.executable, *RESUME, *map(str, kept)])
        except OSError as error:
            print(f"unionfs: {sys.executable}: {error.strerror}: the old code goes on", file=sys.stderr)
            for number in (_signal.SIGTERM, _signal.SIGINT):
                _signal.signal(number, self._forward)

    def _judge(self, signal: int, vain: bool) -> None:
        """After a death: wait before the next worker where the last ones did not get anywhere, or give up."""
        self._vain = self._vain + 1 if vain else 0
        now = monotonic()
        if signal != _signal.SIGKILL:
            self._crashes = [then for then in self._crashes if now - then < CRASH_TIME] + [now]
        if not self._failed and (self._vain >= ATTEMPTS or len(self._crashes) >= CRASHES):
            how = f"{self._vain} at once" if self._vain >= ATTEMPTS else f"{len(self._crashes)} in {CRASH_TIME:.0f} s"
            self._failed = (
                f"workers died again and again ({how}, the last one by signal {signal}): every call fails with EIO; "
                "unmount it, and see the log"
            )
            print(f"unionfs: given up: {self._failed}", file=sys.stderr)
        if self._vain > 2:
            sleep(min(MAX_DELAY, 0.01 * 2 ** min(self._vain, 10)))

    def _forward(self, signal: int, frame: object) -> None:
        if self._worker:
            os.kill(self._worker, signal)

    def _wait(self) -> int:
        """The worker's exit code; minus the signal that killed it. One that hangs is killed."""
        words = self.journal.words
        process = os.pidfd_open(self._worker)
        ended, waiting = select.poll(), select.poll()
        ended.register(process, select.POLLIN)
        waiting.register(self.fd, select.POLLIN)
        beat = -1
        look = self._deadline / 2
        if self._watchdog is not None:
            look = min(look, self._watchdog / 2)
        looked = monotonic()
        while not ended.poll(look * 1000):
            if self._watchdog is not None:
                systemd.notify(b"WATCHDOG=1")
            if monotonic() - looked < self._deadline / 2:
                continue
            looked = monotonic()
            was, beat = beat, words[j.BEAT]
            if beat == was and any(event == select.POLLIN for _, event in waiting.poll(0)):
                print(f"unionfs: worker {self._worker} hangs: it takes up no requests", file=sys.stderr)
                os.kill(self._worker, _signal.SIGKILL)
                ended.poll(KILL_GRACE * 1000)
            if _half_dead(self._worker):
                break
        over = ended.poll(0)
        os.close(process)
        # One that waits for a layer that does not answer can't end before it does; it will do nothing any more.
        status = os.waitpid(self._worker, 0)[1] if over else _signal.SIGKILL
        self._reap()
        return os.waitstatus_to_exitcode(status)

    @staticmethod
    def _reap() -> None:
        try:
            while os.waitpid(-1, os.WNOHANG)[0]:
                pass
        except ChildProcessError:
            pass

    def _work(self) -> None:
        """The life of a worker; does not return."""
        code = EXIT_FAILURE
        try:
            self._libc.prctl(_PR_SET_PDEATHSIG, _signal.SIGKILL if self._has_heir else _signal.SIGTERM)
            for number in (_signal.SIGTERM, _signal.SIGINT):
                _signal.signal(number, self._abandon)  # until the server has its own
            if os.getppid() != self._pid:
                self._abandon()  # it died before it could be watched
            code = self._serve(self)
        except BaseException:
            import traceback

            traceback.print_exc()
            os.abort()  # replaced, or given up, as any other that died
        finally:
            os._exit(code)

    def _abandon(self, *_: object) -> None:
        mount.detach(self.config.mountpoint, lazy=True)
        os._exit(EXIT_FAILURE)

    def make_session(self) -> Callable[..., Session]:
        """In a worker: adopts what its predecessor left."""
        journal, core = self.journal, self._core
        terms = Negotiated.from_bytes(journal.terms) if journal.terms else None
        failed, deaths = self._failed, journal.words[j.DEATHS]
        if failed:
            return lambda fd, ops, config: FailedSession(fd, failed, deaths)
        table = JournalTable(core.root, journal, core.lanes)
        core.table, core.slots = table, table.slots
        if terms is not None:
            core.take_over()
            table.reserve()
            table.revival = Revival(core, table, journal)

        def make(fd: int, ops: Any, config: MountConfig) -> GuardedSession:
            settings = session_settings(config)
            settings["max_threads"] = min(settings["max_threads"], CARRIED - 1)
            return GuardedSession(
                fd, ops, core=core, journal=journal, table=table, negotiated=terms, data=config.data,
                acl="noacl" not in config.options, **settings,
            )  # fmt: skip

        return make


def _half_dead(pid: int) -> bool:
    """Killed, but a thread of it is still in a system call that can't be left."""
    try:
        with open(f"/proc/{pid}/stat", "rb") as stat:
            return stat.read().rpartition(b") ")[2][:1] == b"Z"
    except FileNotFoundError:
        return False


def _descriptors() -> set[int]:
    return {int(name) for name in os.listdir("/proc/self/fd")}
