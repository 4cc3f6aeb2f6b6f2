"""Running things in other processes: as another user, or many at once."""

from __future__ import annotations

import ctypes
import os
import pickle
import signal
import traceback
from collections.abc import Callable
from typing import Any

from .sys import libc, mount

CLONE_NEWNS, CLONE_NEWUSER = 0x20000, 0x10000000
PR_SET_DUMPABLE = 4
MS_REC, MS_PRIVATE = 0x4000, 0x40000
USER = 12345  # an ordinary user and group; needs no account
GROUP = 12345


class ChildFailed(AssertionError):
    pass


def _start(
    fn: Callable[..., Any], args: tuple[Any, ...], uid: int, gid: int, groups: list[int], umask: int | None
) -> tuple[int, int]:
    reader, writer = os.pipe()
    pid = os.fork()
    if pid:
        os.close(writer)
        return pid, reader
    code = 1
    try:
        os.close(reader)
        signal.alarm(120)
        if umask is not None:
            os.umask(umask)
        if uid or gid:
            os.setgroups(groups)
            os.setresgid(gid, gid, gid)
            os.setresuid(uid, uid, uid)
        try:
            answer: tuple[str, Any] = ("ok", fn(*args))
        except OSError as err:
            answer = ("errno", (err.errno, str(err)))
        except BaseException:
            answer = ("failed", traceback.format_exc())
        with os.fdopen(writer, "wb") as out:
            pickle.dump(answer, out)
        code = 0
    finally:
        os._exit(code)


def _finish(pid: int, reader: int) -> tuple[str, Any]:
    with os.fdopen(reader, "rb") as source:
        data = source.read()
    _, status = os.waitpid(pid, 0)
    if not data:
        return "failed", f"child ended with wait status {status}"
    kind, value = pickle.loads(data)
    return kind, value


def _value(answer: tuple[str, Any]) -> Any:
    kind, value = answer
    if kind == "ok":
        return value
    if kind == "errno":
        raise OSError(*value)
    raise ChildFailed(value)


def child(
    fn: Callable[..., Any],
    *args: Any,
    uid: int = 0,
    gid: int | None = None,
    groups: list[int] | None = None,
    umask: int | None = None,
) -> Any:
    """Runs fn in a forked process, as another user if asked; its OSError is raised here."""
    return _value(_finish(*_start(fn, args, uid, uid if gid is None else gid, groups or [], umask)))


def storm(count: int, fn: Callable[[int], Any]) -> list[Any]:
    """fn(0) ... fn(count-1), all at once in processes of their own; their results in order."""
    running = [_start(fn, (i,), 0, 0, [], None) for i in range(count)]
    answers = [_finish(*one) for one in running]
    return [_value(answer) for answer in answers]


def errno_of(fn: Callable[..., Any], *args: Any, **kwargs: Any) -> int:
    """The errno that the call fails with; 0 when it works."""
    try:
        fn(*args, **kwargs)
    except OSError as err:
        return err.errno or 0
    return 0


def become_namespace_root() -> None:
    """In a child: a user namespace of its own where the present user is root, and a mount namespace."""
    uid, gid = os.getuid(), os.getgid()
    libc.prctl(PR_SET_DUMPABLE, 1, 0, 0, 0)  # else /proc/self belongs to root since setuid
    if libc.unshare(CLONE_NEWUSER | CLONE_NEWNS):
        raise OSError(ctypes.get_errno(), "unshare")
    for name, text in (("setgroups", "deny"), ("uid_map", f"0 {uid} 1"), ("gid_map", f"0 {gid} 1")):
        with open(f"/proc/self/{name}", "w") as control:
            control.write(text)
    mount("none", "/", "", flags=MS_REC | MS_PRIVATE)


def in_user_namespace(fn: Callable[..., Any], *args: Any, uid: int = USER) -> Any:
    """Runs fn in a child that is root of a user namespace which an ordinary user made."""

    def enter() -> Any:
        become_namespace_root()
        return fn(*args)

    return child(enter, uid=uid)
