"""From a `MountConfig` to a mount that answers: open the layers, mount, go to the background, serve, clean up.

The caller's process returns 0 only when the mount has answered a statfs, and names what failed otherwise. The
serving process keeps nothing of the caller: no terminal, no working directory, no descriptor (an engine waits for
the end of its stderr pipe). Threads there: the session's, and one that blocks on the control socket. `unionfs.front`
never touches the mount from the session's own threads: that would wait for itself.

SIGTERM, SIGINT: unmount, lazily if still busy after a grace. SIGUSR1: stacks of all threads to the log.
"""

from __future__ import annotations

import _signal  # type: ignore[import-not-found]  # `signal` wraps it in enums: 3.5 ms
import errno
import os
import stat
import sys
import time

from unionfs import assemble
from unionfs.errors import EXIT_FAILURE, EXIT_MOUNTPOINT, EXIT_OK, EXIT_PERMISSION, MountError
from unionfs.front.options import check_options
from unionfs.session import mount
from unionfs.session.mount import show

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable
    from types import FrameType
    from typing import Any

    from unionfs.api import MountConfig, Operations, Session
    from unionfs.front.control import ControlServer

UNMOUNT_GRACE = 5.0  # seconds that SIGTERM waits for open files before it unmounts lazily


def run(config: MountConfig) -> int:
    """Mounts and, unless in the foreground, leaves a server behind. Returns the exit code or raises MountError."""
    if config.foreground and "guard" in config.options:
        from unionfs.guard import systemd

        kept = systemd.kept()
        if kept is not None:  # the last supervisor of this unit died, and its mount lives on
            return resume(config, *kept, pins=False)
    inherited = _open_descriptors()
    check_options(config, getattr(assemble.load_driver(config.driver), "options", {}))
    guarded = _guarded(config)
    check_mountpoint(config)
    log = _open_log(config)
    work_before = _names_in(config.work)
    ops = assemble.prepare(config)
    fd = None
    try:
        if assemble.session_kind(config) == "direct":
            fd = mount.attach(config)
    except BaseException:
        ops.stop()
        _tidy_work(config.work, work_before)
        raise
    serve = _serve_guarded if guarded else _serve
    if config.foreground:
        if log is not None:
            os.dup2(log, 2)
        return serve(config, ops, fd, _notify_systemd)

    reader, writer = os.pipe()
    child = os.fork()
    if child:
        os.close(writer)
        if fd is not None:
            os.close(fd)  # else a server that dies would leave requests waiting for us
        _wait_until_ready(reader, child, config)
        return EXIT_OK
    os.close(reader)
    code = EXIT_FAILURE
    try:
        os.setsid()
        os.chdir("/")
        _detach_from_caller(log, inherited)
        code = serve(config, ops, fd, _Teller(writer))
    finally:
        os._exit(code)  # never back into the caller's code


def _guarded(config: MountConfig) -> bool:
    if "guard" not in config.options:
        return False
    from unionfs.guard.supervisor import check

    return check(config)


def _serve(config: MountConfig, ops: Operations, fd: int | None, tell: Callable[[MountError | None], None]) -> int:
    return Server(config, ops, fd, tell).run()


def _serve_guarded(
    config: MountConfig,
    ops: Operations,
    fd: int | None,
    tell: Callable[[MountError | None], None],
    journal_fd: int | None = None,
    state_fd: int | None = None,
) -> int:
    from unionfs.front.worker import Worker
    from unionfs.guard.supervisor import Supervisor

    assert fd is not None

    def serve(supervisor: Supervisor) -> int:
        return Worker(supervisor, _tell_nobody if supervisor.device else tell).run()

    code = Supervisor(config, ops, fd, serve, journal_fd, state_fd).run()
    if code != EXIT_OK:
        mount.detach(config.mountpoint, lazy=True)
    return code


def resume(config: MountConfig, fd: int, journal: int, state: int, *, pins: bool) -> int:
    """In place of a supervisor that is no more: the mount is there, and so is all that its workers wrote down.

    `pins`: the descriptors of nameless files are ours, too.
    """
    from unionfs.guard.journal import Journal

    if not pins:
        Journal(journal).drop_pins()
    ops = assemble.prepare(config)
    if config.foreground:
        _notify_systemd(None)
    return _serve_guarded(config, ops, fd, _tell_nobody, journal, state)


def _tell_nobody(problem: MountError | None) -> None:
    """The mount has been reported as ready long ago."""


def check_mountpoint(config: MountConfig) -> None:
    """MountError unless `config.mountpoint` is a directory that may be covered."""
    path, where = config.mountpoint, show(config.mountpoint)
    try:
        status = os.stat(path)
        covered = os.path.ismount(path)
        if covered:
            os.statvfs(path)  # stat may be answered by the kernel's cache alone: is the server alive?
    except FileNotFoundError:
        raise MountError(f"mountpoint {where} does not exist: mkdir -p {where}", EXIT_MOUNTPOINT) from None
    except OSError as error:
        if error.errno == errno.ENOTCONN:
            raise MountError(
                f"mountpoint {where}: a mount whose server died is in the way: unionfs umount {where}", EXIT_MOUNTPOINT
            ) from None
        code = EXIT_PERMISSION if error.errno == errno.EACCES else EXIT_MOUNTPOINT
        raise MountError(f"mountpoint {where}: {error.strerror}", code) from None
    if not stat.S_ISDIR(status.st_mode):
        raise MountError(f"mountpoint {where} is not a directory", EXIT_MOUNTPOINT)
    if covered:
        _refuse_own_mount(path, status.st_dev)
    _refuse_inside_layer(config)
    if "nonempty" not in config.options:
        try:
            empty = next(iter(os.scandir(path)), None) is None
        except PermissionError:
            raise MountError(f"mountpoint {where} is not readable", EXIT_PERMISSION) from None
        if not empty:
            raise MountError(
                f"mountpoint {where} is not empty: its files would be hidden: use an empty directory or -o nonempty",
                EXIT_MOUNTPOINT,
            )


def _refuse_own_mount(path: bytes, device: int) -> None:
    from unionfs.front.control import Connection

    try:
        Connection(device).close()
    except MountError:
        return
    raise MountError(f"{show(path)} is already a unionfs mount: unionfs umount {show(path)}", EXIT_MOUNTPOINT)


def _refuse_inside_layer(config: MountConfig) -> None:
    """A layer that holds the mountpoint would be read through the mount itself, which waits for itself.

    To cover a layer is possible (its descriptor is open already), but has to be asked for by `nonempty`.
    """
    above = set()
    path = os.path.realpath(config.mountpoint)
    if "nonempty" in config.options and path != b"/":
        path = os.path.dirname(path)
    while True:
        status = os.stat(path)
        above.add((status.st_dev, status.st_ino))
        if path == b"/":
            break
        path = os.path.dirname(path)
    layers = config.lowers + [branch for branch, _ in config.branches]
    for layer in layers + [path for path in (config.upper, config.work) if path]:
        try:
            status = os.stat(layer)
        except OSError:
            continue  # the driver says it better
        if (status.st_dev, status.st_ino) in above:
            raise MountError(
                f"mountpoint {show(config.mountpoint)} is, or is inside of, the layer {show(layer)}: choose another",
                EXIT_MOUNTPOINT,
            )


class Server:
    """The serving process: its session, its control socket, its signals. `tell` gets what `_Teller` describes."""

    def __init__(
        self,
        config: MountConfig,
        ops: Operations,
        fd: int | None,
        tell: Callable[[MountError | None], None],
        make_session: Callable[..., Session] = assemble.make_session,
    ) -> None:
        self._make_session = make_session
        self._config = config
        self._ops = ops
        self._fd = fd
        self._tell = tell
        self._session: Session | None = None
        self._control: ControlServer | None = None
        self._started = time.time()
        self._stopping = False
        self._problem: MountError | None = None
        self._own_log = ""
        self._new_log = os.O_TRUNC  # what a dead server left there is not ours

    def run(self) -> int:
        os.umask(0)  # the core applies each request's own
        import faulthandler

        faulthandler.register(_signal.SIGUSR1, file=2, all_threads=True)
        for number in (_signal.SIGTERM, _signal.SIGINT):
            _signal.signal(number, self._on_signal)
        if not self._config.foreground:
            _signal.signal(_signal.SIGHUP, _signal.SIG_IGN)
        try:
            self._session = self._make_session(self._fd, self._ops, self._config)
            self._session.serve(self._on_ready)
        except MountError as error:
            self._problem = error
        except Exception as error:
            self._on_failure(error)
        finally:
            if self._problem is not None:
                self._drop_mount()
            if self._control is not None:
                self._control.close()
            if self._own_log:
                os.unlink(self._own_log)
        if self._problem is not None:
            self._tell(self._problem)
            if self._config.foreground:
                raise self._problem
            return self._problem.code
        return EXIT_OK

    def _on_failure(self, error: Exception) -> None:
        import traceback

        traceback.print_exc()
        self._problem = MountError(f"the server failed: {error!r}", EXIT_FAILURE)

    def _on_ready(self) -> None:
        """Called by the session, maybe in the thread that answers: everything else happens in another one."""
        import threading

        threading.Thread(target=self._answer_control, name="control", daemon=True).start()

    def _answer_control(self) -> None:
        from unionfs.front.control import sweep

        try:
            device = self._device()
        except OSError as error:
            self._problem = MountError(
                f"mounted on {show(self._config.mountpoint)}, but it does not answer: {error.strerror}", EXIT_FAILURE
            )
            self._drop_mount()  # ends the session, whose thread reports the problem
            return
        try:
            self._open_control(device)
        except (MountError, OSError) as error:
            print(f"unionfs: no control socket: {error}", file=sys.stderr)  # the mount is good without it
        self._tell(None)
        if self._control is not None:
            sweep(os.path.dirname(self._control.path))
            self._control.serve()

    def _device(self) -> int:
        """The mount's device number, when it answers."""
        os.statvfs(self._config.mountpoint)
        return os.stat(self._config.mountpoint).st_dev

    def _open_control(self, device: int) -> None:
        from unionfs.front.control import ControlServer, make_directory

        directory = make_directory()
        control = ControlServer()
        for name, handler in self._verbs().items():
            control.register(name, handler)
        control.bind(directory, device)
        self._control = control
        if not self._config.foreground and "log" not in self._config.options:
            log = control.path + ".log"
            fd = os.open(log, os.O_WRONLY | os.O_CREAT | self._new_log | os.O_APPEND | os.O_CLOEXEC, 0o600)
            os.dup2(fd, 2)
            os.close(fd)
            self._own_log = log

    def _verbs(self) -> dict[str, Any]:
        from unionfs.front.verbs import common_verbs

        verbs: dict[str, Any] = common_verbs(self._config, self._ops, self._session, self._started)
        verbs.update(getattr(self._ops, "control_verbs", dict)())
        return verbs

    def _on_signal(self, number: int, frame: FrameType | None) -> None:
        """In the main thread, which may be the one that answers: the unmount waits for answers, so not here."""
        import threading

        if self._stopping:
            return
        self._stopping = True
        threading.Thread(target=self._unmount, name="unmount", daemon=True).start()

    def _unmount(self) -> None:
        try:
            mount.detach_patiently(self._config.mountpoint, UNMOUNT_GRACE)
        except MountError as error:
            print(f"unionfs: {error}", file=sys.stderr)
            self._stopping = False

    def _drop_mount(self) -> None:
        try:
            mount.detach(self._config.mountpoint, lazy=True)
        except (MountError, OSError):
            pass  # it was not there any more


class _Teller:
    """Tells the waiting caller, once, over a pipe: "R" for ready, or "E<exit code> <message>"."""

    def __init__(self, pipe: int) -> None:
        self._pipe = pipe

    def __call__(self, problem: MountError | None) -> None:
        if self._pipe < 0:
            return
        text = "R" if problem is None else f"E{problem.code} {problem}"
        try:
            os.write(self._pipe, text.encode("utf-8", "surrogateescape"))
        except BrokenPipeError:
            pass  # the caller was killed: serve on, the mount is there
        os.close(self._pipe)
        self._pipe = -1


def _notify_systemd(problem: MountError | None) -> None:
    """In the foreground: for units of Type=notify."""
    if problem is None and "NOTIFY_SOCKET" in os.environ:
        from unionfs.guard import systemd

        systemd.notify(b"READY=1")


def _wait_until_ready(reader: int, child: int, config: MountConfig) -> None:
    try:
        with open(reader, "rb") as stream:
            said = stream.read(1)
            if said == b"R":
                return
            said += stream.read()
    except KeyboardInterrupt:
        os.kill(child, _signal.SIGTERM)
        os.waitpid(child, 0)
        raise
    _, status = os.waitpid(child, 0)
    if said.startswith(b"E"):
        code, _, message = said[1:].decode("utf-8", "surrogateescape").partition(" ")
        raise MountError(message, int(code))
    try:
        mount.detach(config.mountpoint, lazy=True)
    except (MountError, OSError):
        pass
    result = os.waitstatus_to_exitcode(status)
    how = f"killed by signal {-result}" if result < 0 else f"exit code {result}"
    raise MountError(f"the server died while starting ({how}): mount with -f to see why", EXIT_FAILURE)


def _names_in(work: bytes | None) -> set[bytes] | None:
    try:
        return None if work is None else set(os.listdir(work))
    except OSError:
        return None


def _tidy_work(work: bytes | None, before: set[bytes] | None) -> None:
    """After a mount that failed: the directories that were made for it go, if they are empty."""
    if work is None:
        return
    made = [os.path.join(work, name) for name in (_names_in(work) or set()) - (before or set())]
    for path in [*made, work] if before is None else made:
        try:
            os.rmdir(path)
        except OSError:
            pass  # somebody uses it, or has already removed it


def _open_log(config: MountConfig) -> int | None:
    path = config.options.get("log")
    if path is None:
        return None
    try:
        return os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC, 0o600)
    except OSError as error:
        raise MountError(f"log {path}: {error.strerror}", EXIT_FAILURE) from None


def _open_descriptors() -> list[int]:
    """What the caller left open for us, beside the standard streams."""
    try:
        listed = [int(name) for name in os.listdir("/proc/self/fd")]
    except OSError:
        return []  # no /proc: such descriptors stay open in the server
    found = []
    for fd in listed:
        try:
            os.fstat(fd)
        except OSError:
            continue  # the one that did the listing: its number is about to be something else's
        if fd > 2:
            found.append(fd)
    return found


def _detach_from_caller(log: int | None, inherited: list[int]) -> None:
    null = os.open("/dev/null", os.O_RDWR)
    os.dup2(null, 0)
    os.dup2(null, 1)
    os.dup2(null if log is None else log, 2)
    os.close(null)
    for fd in inherited:
        os.close(fd)
