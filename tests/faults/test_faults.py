"""Every system call that an operation makes fails once, with every error that a layer's filesystem may give.

In process, over real directories, without FUSE: an operation is run once to count the calls that it makes through
`os` and `unionfs.sysio`, and then once for each of them on a fresh tree, with that call failing. After that
- the operation raised that very error (or did without the call, and then all is done),
- the merged view is the old one or the new one, nothing in between,
- no lower has changed,
- doing it again works, in the same mount or (every other time) in a new one, and
- the work directory is empty when a mount has been opened again.
"""

from __future__ import annotations

import errno
import os
import stat
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from support.trees import F, Hard, L, Tree, build, snapshot

from unionfs import sysio
from unionfs.api import ROOT_ID, Changes, MountConfig
from unionfs.assemble import prepare

pytestmark = pytest.mark.skipif(os.geteuid() != 0, reason="needs root: whiteouts and trusted xattrs")

WRITING = (errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EIO)
READING = (errno.EIO,)
CALLS = {
    os: {
        WRITING: (
            "open", "mkdir", "mknod", "symlink", "link", "rename", "replace", "unlink", "rmdir", "chmod", "fchmod",
            "chown", "fchown", "utime", "setxattr", "removexattr", "ftruncate", "truncate", "pwrite", "write",
            "copy_file_range", "fsync", "fdatasync",
        ),
        READING: ("pread", "preadv", "readlink", "getxattr", "listxattr", "listdir", "scandir", "lseek"),
    },
    sysio: {WRITING: ("renameat2", "set_times", "fallocate", "clone"), READING: ("start_writeback", "name_to_handle")},
}  # fmt: skip

LOWER: Tree = {
    "small": F("small file\n", 0o640, 1000, 1000, {"user.one": b"1"}),
    "big": F("0123456789abcde\n" * 20_000),
    "sparse": F("start", holes=1 << 20),
    "other": F("other"),
    "link": L("small"),
    "h1": F("linked", 0o600),
    "h2": Hard("h1"),
    "d/h3": Hard("h1"),
    "d/low": F("in d"),
    "d/sub/deep/leaf": F("leaf"),
    "empty/x": F("x"),
    "gone": F("gone"),
}


class Faults:
    """Counts the calls of the thread that made it, while `armed`; the one numbered `at` fails."""

    def __init__(self) -> None:
        self.thread = threading.get_ident()
        self.armed = False
        self.made: list[tuple[str, tuple[int, ...]]] = []
        self.at = -1
        self.error = 0

    def wrap(self, name: str, original: Callable[..., Any], errors: tuple[int, ...]) -> Callable[..., Any]:
        def call(*args: Any, **kwargs: Any) -> Any:
            if self.armed and threading.get_ident() == self.thread:
                number = len(self.made)
                self.made.append((name, errors))
                if number == self.at:
                    raise OSError(self.error, f"injected into {name}")
            return original(*args, **kwargs)

        return call


@pytest.fixture
def faults(monkeypatch: pytest.MonkeyPatch) -> Faults:
    injector = Faults()
    for module, sorts in CALLS.items():
        for errors, names in sorts.items():
            for name in names:
                monkeypatch.setattr(module, name, injector.wrap(name, getattr(module, name), errors))
    return injector


class Silent:
    """The kernel of a mount that is not mounted: it has nothing cached."""

    def invalidate_entry(self, parent: int, name: bytes) -> None: ...
    def invalidate_inode(self, nodeid: int, offset: int = 0, length: int = 0) -> None: ...


class Mount:
    """The core over base/{low,upper,work}, and the requests that a kernel would send."""

    def __init__(self, base: Path, options: dict[str, str]) -> None:
        config = MountConfig(os.fsencode(base / "merged"))
        config.lowers = [os.fsencode(base / "low")]
        config.upper = os.fsencode(base / "upper")
        config.work = os.fsencode(base / "work")
        config.options = dict(options)
        self.ops = prepare(config)
        self.ops.start(Silent())

    def stop(self) -> None:
        self.ops.stop()

    @contextmanager
    def node(self, path: str) -> Iterator[int]:
        """The node id of a path, looked up as the kernel does and forgotten afterwards."""
        held = []
        here = ROOT_ID
        try:
            for part in filter(None, path.split("/")):
                entry = self.ops.lookup(here, part.encode())
                if entry is None:
                    raise OSError(errno.ENOENT, path)
                here = entry[0]
                held.append(here)
            yield here
        finally:
            for nodeid in reversed(held):
                self.ops.forget(nodeid, 1)

    @contextmanager
    def parent(self, path: str) -> Iterator[tuple[int, bytes]]:
        folder, _, name = path.rpartition("/")
        with self.node(folder) as nodeid:
            yield nodeid, name.encode()

    def made(self, entry: Any) -> None:
        self.ops.forget(entry[0], 1)

    def view(self, path: str = "") -> dict[str, Any]:
        """All that the mount shows. Times of now are not told apart; a directory's are left out."""
        with self.node(path) as nodeid:
            attr = self.ops.getattr(nodeid)
            mode, nlink, uid, gid = attr[9:13]
            xattrs = {name: self.ops.getxattr(nodeid, name) for name in sorted(self.ops.listxattr(nodeid, 0))}
            if stat.S_ISDIR(mode):
                found: dict[str, Any] = {path or "/": (oct(mode), nlink, uid, gid, xattrs)}
                for name, *_ in self.ops.readdir(nodeid, 0, 1 << 16, 24):
                    if name not in (b".", b".."):
                        found.update(self.view(f"{path}/{name.decode()}"))
                return found
            content = b""
            if stat.S_ISREG(mode):
                buffer = memoryview(bytearray(attr[1] + 1))
                content = bytes(buffer[: self.ops.read(nodeid, 0, buffer)])
            elif stat.S_ISLNK(mode):
                content = self.ops.readlink(nodeid)
            mtime: Any = attr[4] if attr[4] < 1_700_000_000 else "recent"
            return {path: (oct(mode), nlink, uid, gid, attr[1], mtime, content, xattrs)}


Action = Callable[[Mount], None]


def write(path: str, offset: int, data: bytes) -> Action:
    def act(mount: Mount) -> None:
        with mount.node(path) as nodeid:
            mount.ops.write(nodeid, offset, memoryview(data), False)

    return act


def change(path: str, **changes: Any) -> Action:
    def act(mount: Mount) -> None:
        with mount.node(path) as nodeid:
            mount.ops.setattr(nodeid, Changes(**changes))

    return act


def setxattr(path: str) -> Action:
    def act(mount: Mount) -> None:
        with mount.node(path) as nodeid:
            mount.ops.setxattr(nodeid, b"user.new", b"value", 0, False)

    return act


def unlink(path: str) -> Action:
    def act(mount: Mount) -> None:
        with mount.parent(path) as (nodeid, name), mount.node(path):
            mount.ops.unlink(nodeid, name)

    return act


def rmdir(path: str) -> Action:
    def act(mount: Mount) -> None:
        with mount.parent(path) as (nodeid, name), mount.node(path):
            mount.ops.rmdir(nodeid, name)

    return act


def rename(old: str, new: str, flags: int = 0) -> Action:
    def act(mount: Mount) -> None:
        with mount.parent(old) as (nodeid, name), mount.parent(new) as (newparent, newname), mount.node(old):
            mount.ops.rename(nodeid, name, newparent, newname, flags)

    return act


def link(old: str, new: str) -> Action:
    def act(mount: Mount) -> None:
        with mount.node(old) as nodeid, mount.parent(new) as (parent, name):
            mount.made(mount.ops.link(nodeid, parent, name))

    return act


def mkdir(path: str) -> Action:
    def act(mount: Mount) -> None:
        with mount.parent(path) as (nodeid, name):
            mount.made(mount.ops.mkdir(nodeid, name, 0o2755, 0o022, 1000, 1000))

    return act


def mknod(path: str, kind: int) -> Action:
    def act(mount: Mount) -> None:
        with mount.parent(path) as (nodeid, name):
            mount.made(mount.ops.mknod(nodeid, name, kind | 0o640, 0, 0o022, 1000, 1000))

    return act


def symlink(path: str) -> Action:
    def act(mount: Mount) -> None:
        with mount.parent(path) as (nodeid, name):
            mount.made(mount.ops.symlink(nodeid, name, b"target", 1000, 1000))

    return act


def several(*actions: Action) -> Action:
    def act(mount: Mount) -> None:
        for action in actions:
            action(mount)

    return act


def nothing(mount: Mount) -> None:
    pass


# name: what happens before, undisturbed; the operation that is disturbed
OPERATIONS: dict[str, tuple[Action, Action]] = {
    "write a small file": (nothing, write("small", 3, b"XYZ")),
    "write a big file": (nothing, write("big", 100_000, b"XYZ")),
    "write a sparse file": (nothing, write("sparse", 0, b"XYZ")),
    "write in a deep directory": (nothing, write("d/sub/deep/leaf", 0, b"XYZ")),
    "write a hard link": (nothing, write("h1", 0, b"XYZ")),
    "write what was copied up without data": (change("big", mode=0o600), write("big", 0, b"XYZ")),
    "cut a big file": (nothing, change("big", size=100)),
    "empty a small file": (nothing, change("small", size=0)),
    "chmod a small file": (nothing, change("small", mode=0o600)),
    "chmod a big file": (nothing, change("big", mode=0o600)),
    "chmod a hard link": (nothing, change("d/h3", mode=0o644)),
    "chown a big file": (nothing, change("big", uid=1, gid=2)),
    "chmod a directory": (nothing, change("d/sub", mode=0o700)),
    "set an xattr": (nothing, setxattr("small")),
    "unlink a lower file": (nothing, unlink("d/low")),
    "unlink a copied-up file": (write("small", 0, b"new"), unlink("small")),
    "unlink a new file": (mknod("new", stat.S_IFREG), unlink("new")),
    "unlink a lower hard link": (nothing, unlink("h2")),
    "unlink a copied-up hard link": (write("h1", 0, b"new"), unlink("h1")),
    "remove a lower directory": (unlink("empty/x"), rmdir("empty")),
    "remove a new directory": (mkdir("new"), rmdir("new")),
    "rename a lower file": (nothing, rename("small", "d/small")),
    "rename a big lower file": (nothing, rename("big", "d/big")),
    "rename over a lower file": (nothing, rename("small", "other")),
    "rename a new file over a lower one": (mknod("new", stat.S_IFREG), rename("new", "other")),
    "rename over a hard link": (nothing, rename("small", "h2")),
    "rename a hard link": (nothing, rename("h1", "d/h1")),
    "rename a lower directory": (nothing, rename("d/sub", "sub")),
    "rename a merged directory": (write("d/sub/deep/leaf", 0, b"new"), rename("d", "e")),
    "rename a directory over an empty one": (unlink("empty/x"), rename("d/sub", "empty")),
    "rename a new directory over an emptied one": (several(unlink("empty/x"), mkdir("new")), rename("new", "empty")),
    "exchange files": (nothing, rename("small", "d/low", 2)),
    "exchange a file and a directory": (nothing, rename("small", "d", 2)),
    "link a lower file": (nothing, link("small", "d/linked")),
    "link over a whiteout": (unlink("gone"), link("other", "gone")),
    "make a file": (nothing, mknod("d/sub/new", stat.S_IFREG)),
    "make a file over a whiteout": (unlink("gone"), mknod("gone", stat.S_IFREG)),
    "make a fifo": (nothing, mknod("new", stat.S_IFIFO)),
    "make a directory": (nothing, mkdir("d/new")),
    "make a directory over a whiteout": (unlink("gone"), mkdir("gone")),
    "make a symlink": (nothing, symlink("d/new")),
    "make a symlink over a whiteout": (unlink("gone"), symlink("gone")),
}


def leftovers(base: Path) -> list[str]:
    return [str(path.relative_to(base)) for path in (base / "work" / "work").rglob("*")]


def prepared(base: Path, before: Action) -> Mount:
    build(base / "low", LOWER)
    for name in ("upper", "work"):
        (base / name).mkdir()
    mount = Mount(base, {})
    before(mount)
    return mount


@pytest.mark.parametrize("name", OPERATIONS)
def test_every_call_may_fail(name: str, faults: Faults, tmp_path: Path) -> None:
    before, action = OPERATIONS[name]
    mount = prepared(tmp_path / "reference", before)
    lower = snapshot(tmp_path / "reference/low")
    old = mount.view()
    faults.armed = True
    action(mount)
    faults.armed = False
    new = mount.view()
    mount.stop()
    calls = list(faults.made)
    assert new != old and calls

    for number, (call, errors) in enumerate(calls):
        for error in errors:
            where = f"{name}: call {number} ({call}) fails with {errno.errorcode[error]}"
            base = tmp_path / f"{number}-{error}"
            mount = prepared(base, before)
            faults.made, faults.at, faults.error, faults.armed = [], number, error, True
            raised: int | None = None
            try:
                action(mount)
            except OSError as problem:
                raised = problem.errno  # not the exception: its frames hold descriptors
            finally:
                faults.armed = False
            assert raised in (None, error), f"{where}: raised {raised}"
            seen = mount.view()
            assert seen == new or (raised is not None and seen == old), f"{where}: {apart(old, new, seen)}"
            assert snapshot(base / "low") == lower, f"{where}: a lower changed"
            if (number + error) % 2:
                mount.stop()
                mount = Mount(base, {})
                assert not leftovers(base), where
                assert mount.view() == seen, f"{where}: after opening again: {apart(seen, seen, mount.view())}"
            if seen != new:
                action(mount)
                assert mount.view() == new, f"{where}: done again: {apart(new, new, mount.view())}"
            mount.stop()
            mount = Mount(base, {})
            assert not leftovers(base), where
            assert mount.view() == new, f"{where}: in the end: {apart(new, new, mount.view())}"
            mount.stop()


def apart(old: dict[str, Any], new: dict[str, Any], seen: dict[str, Any]) -> dict[str, Any]:
    names = {**old, **new, **seen}
    return {
        name: {"old": old.get(name), "new": new.get(name), "seen": seen.get(name)}
        for name in names
        if seen.get(name) != old.get(name) or seen.get(name) != new.get(name)
    }
