"""The pyfuse3 handlers called as the library calls them, over a tree in memory: no mount."""

from __future__ import annotations

import errno
import gc
import os
import stat
import weakref
from collections import Counter
from types import SimpleNamespace
from typing import Any

import pyfuse3
import pytest
from hypothesis import given
from hypothesis import strategies as st
from memory_operations import MemoryOperations

from unionfs.api import ROOT_ID
from unionfs.errors import WouldBlock
from unionfs.session.pyfuse3_handlers import FOREVER, Handlers, Numbers

ROOT = pyfuse3.ROOT_INODE
CALLER: Any = SimpleNamespace(uid=1234, gid=1234, pid=os.getpid(), umask=0o027)
TOKEN: Any = object()


@pytest.fixture
def ops() -> Any:  # it leaves out what pyfuse3 can't call
    ops = MemoryOperations()
    ops.lanes.fast = True
    return ops


@pytest.fixture
def handlers(ops: Any) -> Handlers:
    return Handlers(ops, acl=True)


class Reply:
    """What `readdir_reply` would fill, with room for so many entries."""

    def __init__(self, room: int) -> None:
        self.room = room
        self.entries: list[tuple[bytes, int, int]] = []

    def __call__(self, token: object, name: bytes, attr: pyfuse3.EntryAttributes, next_id: int) -> bool:
        assert token is TOKEN
        if len(self.entries) == self.room:
            return False
        self.entries.append((name, attr.st_ino, next_id))
        return True


def fields(**wanted: int) -> tuple[pyfuse3.EntryAttributes, Any]:
    attr = pyfuse3.EntryAttributes()
    for name, value in wanted.items():
        setattr(attr, name, value)
    names = ("atime", "mtime", "ctime", "mode", "uid", "gid", "size")
    return attr, SimpleNamespace(**{"update_" + n: bool({"st_" + n, f"st_{n}_ns"} & wanted.keys()) for n in names})


# Errors

# Every handler that must turn errors into FUSEError: its arguments, and the operation that fails.
HANDLED: dict[str, tuple[tuple[Any, ...], str]] = {
    "lookup": ((ROOT, b"file", CALLER), "lookup"),
    "getattr": ((ROOT, CALLER), "getattr"),
    "setattr": ((ROOT, *fields(st_mode=0o700), None, CALLER), "setattr"),
    "readlink": ((ROOT, CALLER), "readlink"),
    "mknod": ((ROOT, b"new", stat.S_IFIFO | 0o600, 0, CALLER), "mknod"),
    "mkdir": ((ROOT, b"new", 0o700, CALLER), "mkdir"),
    "create": ((ROOT, b"new", stat.S_IFREG | 0o600, os.O_RDWR, CALLER), "create"),
    "symlink": ((ROOT, b"new", b"target", CALLER), "symlink"),
    "link": ((ROOT, ROOT, b"new", CALLER), "link"),
    "unlink": ((ROOT, b"file", CALLER), "unlink"),
    "rmdir": ((ROOT, b"dir", CALLER), "rmdir"),
    "rename": ((ROOT, b"file", ROOT, b"new", 0, CALLER), "rename"),
    "open": ((ROOT, os.O_RDONLY, CALLER), "open"),
    "release": ((ROOT_ID,), "release"),
    "read": ((ROOT_ID, 0, 10), "read"),
    "write": ((ROOT_ID, 0, b"data"), "write"),
    "fsync": ((ROOT_ID, True), "fsync"),
    "fsyncdir": ((ROOT_ID, True), "fsyncdir"),
    "readdir": ((ROOT_ID, 2, TOKEN), "readdirplus"),
    "statfs": ((CALLER,), "statfs"),
    "getxattr": ((ROOT, b"user.x", CALLER), "getxattr"),
    "listxattr": ((ROOT, CALLER), "listxattr"),
    "setxattr": ((ROOT, b"user.x", b"value", CALLER), "setxattr"),
    "removexattr": ((ROOT, b"user.x", CALLER), "removexattr"),
}


@pytest.mark.parametrize("name", HANDLED)
@pytest.mark.trio
async def test_every_handler_answers_errors_with_the_cores_errno(
    name: str, handlers: Handlers, ops: MemoryOperations
) -> None:
    arguments, operation = HANDLED[name]
    ops.faults[operation] = OSError(errno.EDQUOT, "over quota")
    with pytest.raises(pyfuse3.FUSEError) as raised:
        await getattr(handlers, name)(*arguments)
    assert raised.value.errno == errno.EDQUOT
    assert handlers.messages == {{"readdir": "READDIRPLUS"}.get(name, name.upper()): 1}


@pytest.mark.parametrize("name", HANDLED)
@pytest.mark.trio
async def test_every_handler_answers_bugs_with_eio_and_a_traceback(
    name: str, handlers: Handlers, ops: MemoryOperations, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments, operation = HANDLED[name]
    ops.faults[operation] = ZeroDivisionError("a bug")
    with pytest.raises(pyfuse3.FUSEError) as raised:
        await getattr(handlers, name)(*arguments)
    assert raised.value.errno == errno.EIO
    assert "ZeroDivisionError: a bug" in capsys.readouterr().err


@pytest.mark.trio
async def test_forget_never_raises(
    handlers: Handlers, ops: MemoryOperations, capsys: pytest.CaptureFixture[str]
) -> None:
    ops.add_file(b"file")
    entry = await handlers.lookup(ROOT, b"file", CALLER)
    ops.faults["forget"] = ZeroDivisionError("a bug")
    await handlers.forget([(424242, 1), (entry.st_ino, 1)])
    assert "ZeroDivisionError" in capsys.readouterr().err


@pytest.mark.trio
async def test_a_number_that_the_kernel_was_never_told_is_stale(handlers: Handlers) -> None:
    with pytest.raises(pyfuse3.FUSEError) as raised:
        await handlers.getattr(424242, CALLER)
    assert raised.value.errno == errno.ESTALE


def test_what_is_left_to_the_kernel_is_not_implemented() -> None:
    for name in ("flush", "access", "poll"):
        assert name not in vars(Handlers)


# Lanes


@pytest.mark.parametrize("name", HANDLED)
@pytest.mark.trio
async def test_what_would_wait_moves_to_a_worker(name: str, handlers: Handlers, ops: MemoryOperations) -> None:
    arguments, operation = HANDLED[name]
    ops.slow.add(operation)
    ops.faults[operation] = OSError(errno.EDQUOT, "over quota")
    with pytest.raises(pyfuse3.FUSEError) as raised:
        await getattr(handlers, name)(*arguments)
    assert raised.value.errno == errno.EDQUOT
    assert [(n, fast) for n, fast, _ in ops.calls if n == operation] == [(operation, False)]
    assert handlers.moved == 1


@pytest.mark.trio
async def test_only_syncs_go_to_a_worker_unasked(handlers: Handlers, ops: MemoryOperations) -> None:
    for name, (arguments, operation) in HANDLED.items():
        ops.faults[operation] = OSError(errno.EDQUOT, "over quota")
        with pytest.raises(pyfuse3.FUSEError):
            await getattr(handlers, name)(*arguments)
    assert {name for name, fast, _ in ops.calls if not fast} == {"fsync", "fsyncdir"}


@pytest.mark.trio
@pytest.mark.parametrize("slow", [False, True])
async def test_what_a_failed_operation_held_is_let_go_at_once(
    slow: bool, handlers: Handlers, ops: MemoryOperations, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The core closes descriptors when the last reference goes: a full disk must not stay full until the next gc."""

    class Held:
        pass

    held: list[weakref.ref[Held]] = []

    def failing(nodeid: int, flags: int) -> None:
        if slow and ops.lanes.__dict__.get("fast"):
            raise WouldBlock
        local = Held()
        held.append(weakref.ref(local))
        raise OSError(errno.ENOSPC, "full")

    monkeypatch.setattr(ops, "open", failing)
    gc.disable()
    try:
        with pytest.raises(pyfuse3.FUSEError):
            await handlers.open(ROOT, os.O_RDWR, CALLER)
        assert [one() for one in held] == [None]
    finally:
        gc.enable()


# Numbers


@pytest.mark.trio
async def test_the_kernel_knows_a_node_by_the_unions_st_ino(handlers: Handlers, ops: MemoryOperations) -> None:
    node = ops.add_file(b"file", b"content")
    entry = await handlers.lookup(ROOT, b"file", CALLER)
    assert entry.st_ino == node.ino != node.nodeid
    assert entry.entry_timeout == entry.attr_timeout == FOREVER
    assert (await handlers.open(entry.st_ino, os.O_RDONLY, CALLER)).fh == node.nodeid
    assert bytes(await handlers.read(node.nodeid, 3, 100)) == b"tent"
    await handlers.forget([(entry.st_ino, 1)])
    assert node.lookups == 0
    assert len(handlers.numbers) == 1


@pytest.mark.trio
async def test_a_taken_st_ino_is_told_by_getattr(handlers: Handlers, ops: MemoryOperations) -> None:
    ops.next_ino = lambda nodeid: 77
    first, second = ops.add_file(b"first"), ops.add_file(b"second")
    assert (await handlers.lookup(ROOT, b"first", CALLER)).st_ino == 77
    entry = await handlers.lookup(ROOT, b"second", CALLER)
    assert entry.st_ino != 77
    assert entry.attr_timeout == 0  # the kernel must ask before it shows the made-up number
    assert entry.entry_timeout == FOREVER
    assert (await handlers.getattr(entry.st_ino, CALLER)).st_ino == 77
    await handlers.setattr(entry.st_ino, *fields(st_mode=0o600), None, CALLER)
    assert stat.S_IMODE(second.mode) == 0o600
    assert stat.S_IMODE(first.mode) == 0o644


@pytest.mark.trio
async def test_root_shows_its_own_st_ino_and_nobody_gets_its_number(handlers: Handlers, ops: MemoryOperations) -> None:
    assert (await handlers.getattr(ROOT, CALLER)).st_ino == ops.root.ino
    for ino in (0, ROOT):
        ops.next_ino = lambda nodeid, ino=ino: ino  # type: ignore[misc]
        ops.add_file(b"%d" % ino)
        assert (await handlers.lookup(ROOT, b"%d" % ino, CALLER)).st_ino > ROOT


@pytest.mark.trio
async def test_a_deleted_file_that_the_kernel_still_knows_keeps_its_number(
    handlers: Handlers, ops: MemoryOperations
) -> None:
    ops.next_ino = lambda nodeid: 77  # a filesystem that gives the inode number of the deleted file to the next one
    _, old = await handlers.create(ROOT, b"file", stat.S_IFREG | 0o600, os.O_RDWR, CALLER)
    await handlers.unlink(ROOT, b"file", CALLER)
    _, new = await handlers.create(ROOT, b"file", stat.S_IFREG | 0o644, os.O_RDWR, CALLER)
    assert old.st_ino == 77 != new.st_ino
    assert stat.S_IMODE((await handlers.getattr(old.st_ino, CALLER)).st_mode) == 0o600
    await handlers.forget([(old.st_ino, 1)])
    assert stat.S_IMODE((await handlers.getattr(new.st_ino, CALLER)).st_mode) == 0o640
    assert len(ops.nodes) == 2


@given(st.lists(st.tuples(st.booleans(), st.integers(2, 6), st.integers(0, 4), st.integers(1, 3)), max_size=60))
def test_numbers_stay_one_to_one_and_are_given_back(steps: list[tuple[bool, int, int, int]]) -> None:
    numbers = Numbers()
    known: dict[int, int] = {}  # node id -> number
    counts: Counter[int] = Counter()
    for take, nodeid, ino, count in steps:
        if take:
            number = numbers.take(nodeid, ino)
            assert known.setdefault(nodeid, number) == number
            counts[nodeid] += 1
        elif nodeid in known:
            assert numbers.drop(known[nodeid], min(count, counts[nodeid])) == nodeid
            counts[nodeid] -= min(count, counts[nodeid])
            if not counts[nodeid]:
                del known[nodeid]
        assert len(set(known.values()) | {ROOT}) == len(known) + 1 == len(numbers)
        for nodeid, number in known.items():
            assert numbers.node(number) == nodeid
            assert numbers.of(nodeid) == number
    assert numbers.node(ROOT) == ROOT_ID


# Names


@pytest.mark.trio
async def test_absence_is_cached(handlers: Handlers) -> None:
    absent = await handlers.lookup(ROOT, b"nothing", CALLER)
    assert absent.st_ino == 0
    assert absent.entry_timeout == FOREVER
    assert len(handlers.numbers) == 1


@pytest.mark.trio
async def test_creations_pass_type_mode_umask_and_owner(handlers: Handlers, ops: MemoryOperations) -> None:
    await handlers.mkdir(ROOT, b"d", stat.S_IFDIR | 0o1777, CALLER)
    await handlers.mknod(ROOT, b"n", stat.S_IFCHR | 0o666, os.makedev(1, 3), CALLER)
    await handlers.symlink(ROOT, b"s", b"to\xff", CALLER)
    info, entry = await handlers.create(ROOT, b"c", stat.S_IFREG | 0o666, os.O_WRONLY, CALLER)
    assert ops.named("mkdir") == [(ROOT_ID, b"d", 0o1777, 0o027, 1234, 1234)]
    assert ops.named("mknod") == [(ROOT_ID, b"n", stat.S_IFCHR | 0o666, os.makedev(1, 3), 0o027, 1234, 1234)]
    assert ops.named("symlink") == [(ROOT_ID, b"s", b"to\xff", 1234, 1234)]
    assert ops.named("create") == [(ROOT_ID, b"c", os.O_WRONLY, stat.S_IFREG | 0o666, 0o027, 1234, 1234)]
    assert ops.nodes[info.fh].ino == entry.st_ino
    assert info.keep_cache
    assert not info.direct_io
    link = await handlers.link(entry.st_ino, ROOT, b"l", CALLER)
    assert (link.st_ino, link.st_nlink) == (entry.st_ino, 2)
    await handlers.rename(ROOT, b"l", ROOT, b"m", 5, CALLER)
    assert ops.named("rename") == [(ROOT_ID, b"l", ROOT_ID, b"m", 5)]


# Attributes


@pytest.mark.trio
async def test_attributes_are_carried_whole(handlers: Handlers, ops: MemoryOperations) -> None:
    node = ops.add_file(b"file", b"x" * 1000, 0o4755)
    node.uid, node.gid, node.rdev, node.nlink = 2**32 - 2, 5, os.makedev(8, 300), 3
    node.atime, node.mtime, node.ctime = -1_500_000_000, 2 * 10**18 + 7, 10**18 + 9
    entry = await handlers.lookup(ROOT, b"file", CALLER)
    state = {name: value for name, value in entry.__getstate__().items() if "timeout" not in name}
    assert state == {
        "st_ino": node.ino, "generation": 0, "st_mode": node.mode, "st_nlink": 3, "st_uid": 2**32 - 2, "st_gid": 5,
        "st_rdev": os.makedev(8, 300), "st_size": 1000, "st_blksize": 4096, "st_blocks": 2,
        "st_atime_ns": node.atime, "st_mtime_ns": node.mtime, "st_ctime_ns": node.ctime, "st_birthtime_ns": 0,
    }  # fmt: skip


@pytest.mark.trio
async def test_setattr_passes_what_is_asked_and_no_more(handlers: Handlers, ops: MemoryOperations) -> None:
    wanted = {"st_size": 5, "st_mode": stat.S_IFREG | 0o4711, "st_uid": 3, "st_gid": 4}
    wanted |= {"st_atime_ns": 11, "st_mtime_ns": 12}
    await handlers.setattr(ROOT, *fields(**wanted), None, CALLER)
    for name, value in wanted.items():
        await handlers.setattr(ROOT, *fields(**{name: value}), None, CALLER)
    asked = [
        (c.size, c.mode, c.uid, c.gid, c.atime_ns, c.mtime_ns, c.kill_suidgid) for _, c in ops.named("setattr")
    ]
    values = (5, 0o4711, 3, 4, 11, 12)
    assert asked[0] == (*values, False)
    for position, one in enumerate(asked[1:]):
        expected: list[Any] = [None] * 6
        expected[position] = values[position]
        assert one == (*expected, False)


@pytest.mark.trio
async def test_truncating_open_clears_setuid_except_for_root(handlers: Handlers, ops: MemoryOperations) -> None:
    for uid, cleared in ((1234, True), (0, False)):
        node = ops.add_file(b"file%d" % uid, b"content", 0o4755)
        entry = await handlers.lookup(ROOT, b"file%d" % uid, CALLER)
        caller: Any = SimpleNamespace(**{**vars(CALLER), "uid": uid})
        await handlers.open(entry.st_ino, os.O_WRONLY | os.O_TRUNC, caller)
        assert node.data == b""
        assert bool(node.mode & stat.S_ISUID) is not cleared
        assert ops.named("open")[-1] == (node.nodeid, os.O_WRONLY)
        assert node.opens == 1
        await handlers.release(node.nodeid)
        assert node.opens == 0


# Data and directories


@pytest.mark.trio
async def test_reads_and_writes_by_handle(handlers: Handlers, ops: MemoryOperations) -> None:
    node = ops.add_file(b"file")
    assert await handlers.write(node.nodeid, 3, b"abc") == 3
    assert bytes(await handlers.read(node.nodeid, 0, 4096)) == b"\0\0\0abc"
    assert bytes(await handlers.read(node.nodeid, 6, 4096)) == b""


@pytest.mark.parametrize("room", [1, 3, 7, 50])
@pytest.mark.trio
async def test_a_listing_is_complete_and_owes_nothing_for_what_did_not_fit(
    room: int, handlers: Handlers, ops: MemoryOperations, monkeypatch: pytest.MonkeyPatch
) -> None:
    nodes = [ops.add_file(b"file-%02d" % number) for number in range(23)]
    fh = await handlers.opendir(ROOT, CALLER)
    listed: list[tuple[bytes, int]] = []
    cookie = 0
    while True:
        reply = Reply(room)
        monkeypatch.setattr(pyfuse3, "readdir_reply", reply)
        await handlers.readdir(fh, cookie, TOKEN)
        if not reply.entries:
            break
        listed += [(name, ino) for name, ino, _ in reply.entries]
        cookie = reply.entries[-1][2]
    await handlers.releasedir(fh)
    dots = [(b".", ops.root.ino), (b"..", ops.root.ino)]
    assert listed == dots + [(b"file-%02d" % number, node.ino) for number, node in enumerate(nodes)]
    assert [node.lookups for node in nodes] == [1] * 23  # as the kernel counts
    await handlers.forget([(node.ino, 1) for node in nodes])
    assert len(handlers.numbers) == 1


# The filesystem, and extended attributes


@pytest.mark.trio
async def test_statfs(handlers: Handlers) -> None:
    state = (await handlers.statfs(CALLER)).__getstate__()
    assert {name: value for name, value in state.items() if name.startswith("f_")} == {
        "f_blocks": 1000, "f_bfree": 600, "f_bavail": 500, "f_files": 400, "f_ffree": 300, "f_favail": 300,
        "f_bsize": 4096, "f_namemax": 255, "f_frsize": 1024,
    }  # fmt: skip


@pytest.mark.trio
async def test_xattrs(handlers: Handlers, ops: MemoryOperations) -> None:
    await handlers.setxattr(ROOT, b"user.a", b"1", CALLER)
    await handlers.setxattr(ROOT, b"user.b", b"", CALLER)
    assert await handlers.getxattr(ROOT, b"user.b", CALLER) == b""
    assert await handlers.listxattr(ROOT, CALLER) == [b"user.a", b"user.b"]
    await handlers.removexattr(ROOT, b"user.a", CALLER)
    with pytest.raises(pyfuse3.FUSEError) as raised:
        await handlers.getxattr(ROOT, b"user.a", CALLER)
    assert raised.value.errno == errno.ENODATA


@pytest.mark.parametrize(
    ("caller", "group", "kept"),
    [
        ({"uid": 0}, 9, True),
        ({"gid": 9}, 9, True),
        ({}, os.getgroups()[0] if os.getgroups() else os.getgid(), bool(os.getgroups())),
        ({}, 4242, False),
        ({"pid": 0}, 9, False),  # a process that we can't see
    ],
)
@pytest.mark.trio
async def test_an_acl_of_a_stranger_to_the_group_clears_setgid(
    caller: dict[str, int], group: int, kept: bool, handlers: Handlers, ops: MemoryOperations
) -> None:
    node = ops.add_file(b"file", mode=0o2755)
    node.gid = group
    entry = await handlers.lookup(ROOT, b"file", CALLER)
    who: Any = SimpleNamespace(**{**vars(CALLER), **caller})
    await handlers.setxattr(entry.st_ino, b"user.x", b"", who)
    assert node.mode & stat.S_ISGID
    await handlers.setxattr(entry.st_ino, b"system.posix_acl_access", b"", who)
    assert bool(node.mode & stat.S_ISGID) is kept
