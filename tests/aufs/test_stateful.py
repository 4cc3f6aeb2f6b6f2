"""Random operations, branch changes and remounts on three branches, two of them writable, against a model.

Two ideas of what must be seen are kept: a dictionary that POSIX operations change, and the merge of the branches as
they are on disk. The mount must agree with both after every step.
"""

from __future__ import annotations

import errno
import os
import shutil
import tempfile
import time
from pathlib import Path

from hypothesis import HealthCheck, Phase, settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    precondition,
    rule,
    run_state_machine_as_test,
)
from support.mounts import wait_for

from aufs.harness import Aufs, View, look, merge
from unionfs.errors import MountError

NAMES = ("a", "b", "c")
DIRS = st.sampled_from(("", "d/", "e/", "d/s/"))
PATHS = st.builds(lambda folder, name: folder + name, DIRS, st.sampled_from((*NAMES, "d", "e", "s")))
TREES = {
    "rw0": {"d/a": "rw0 d/a", "e/.wh.b": ""},
    "rw1": {"a": "rw1 a", "d/b": "rw1 d/b", "d/s/c": "rw1 s/c", "e/c": "rw1 e/c"},
    "ro": {"a": "ro a", "b": "ro b", "d/a": "ro d/a", "d/s/a": "ro s/a", "e/b": "ro e/b", "e/d/a": "ro", ".wh.c": ""},
    "x": {"b": "x b", "c": "x c", "d/c": "x d/c", ".wh.a": "", "e/.wh..wh..opq": "", "e/s/a": "x e/s/a"},
    "y": {"a/b": "y a/b", "d": "y d", "e/a": "y e/a"},
}
MODES = ("ro", "ro+wh", "rw", "rr")
OUTSIDE = ("write", "replace", "unlink", "mkdir", "rmdir", "whiteout", "opaque", "move")
POLICIES = ("tdp", "rr", "mfs", "pmfs", "tdmfs:1k", "pmfsrr:1k:5", "mfsrr:1k")


class Union(RuleBasedStateMachine):
    def __init__(self) -> None:
        super().__init__()
        self.base = Path(tempfile.mkdtemp(prefix="unionfs-aufs-", dir="/var/tmp"))
        self.union = Aufs(self.base)
        self.branches: list[list[str]] = []
        self.view: View = {}
        self.open: dict[str, tuple[int, bytes]] = {}

    @initialize(create=st.sampled_from(POLICIES), cpup=st.sampled_from(("tdp", "bup", "bu")),
                wh=st.sampled_from(("ro", "ro+wh")), udba=st.sampled_from(("none", "none", "reval", "notify")),
                how=st.sampled_from((("direct", "noopen"), ("direct", "cached"), ("pyfuse3", "cached"))))  # fmt: skip
    def begin(self, create: str, cpup: str, wh: str, udba: str, how: tuple[str, str]) -> None:
        for name, tree in TREES.items():
            self.union.branch_dir(name, tree)
        self.branches = [["rw0", "rw"], ["rw1", "rw"], ["ro", wh]]
        self.union.session = how[0]
        self.udba = udba
        self.options = f"create={create},cpup={cpup},udba={udba},data={how[1]}"
        self.mount()

    def mount(self) -> None:
        self.union.mount(*(f"{name}={mode}" for name, mode in self.branches), options=self.options)
        self.view = self.merged_on_disk()

    def merged_on_disk(self) -> View:
        return merge([(self.base / name, mode) for name, mode in self.branches])

    # --- operations: `wanted` is the errno by the model, None for success ---

    def parent_error(self, path: str) -> int | None:
        folder = path.rpartition("/")[0]
        while folder:
            if folder in self.view and self.view[folder] is not None:
                return errno.ENOTDIR
            folder = folder.rpartition("/")[0]
        folder = path.rpartition("/")[0]
        return errno.ENOENT if folder and folder not in self.view else None

    def attempt(self, wanted: int | None, operation, *also: int) -> bool:  # type: ignore[no-untyped-def]
        """Whether it succeeded; `also`: errors of a union that are right where the model has none."""
        try:
            operation()
        except OSError as error:
            allowed = {wanted, *(also if wanted is None else ())}
            if wanted is None and self.branches[0][1] != "rw":
                allowed.add(errno.EROFS)  # nothing writable above what would change
            elif self.branches[0][1] != "rw":
                allowed.add(errno.EROFS)
            assert error.errno in allowed, (error, wanted)
            return False
        assert wanted is None, f"succeeded, should be {wanted}"
        return True

    @rule(path=PATHS, text=st.sampled_from((b"one", b"three", b"")))
    def write(self, path: str, text: bytes) -> None:
        wanted = self.parent_error(path) or (errno.EISDIR if self.view.get(path, b"") is None else None)
        if self.attempt(wanted, lambda: (self.union / path).write_bytes(text)):
            self.view[path] = text

    @rule(path=PATHS)
    def append(self, path: str) -> None:
        wanted = self.parent_error(path) or (errno.ENOENT if path not in self.view else None)
        wanted = wanted or (errno.EISDIR if self.view[path] is None else None)

        def operation() -> None:
            fd = os.open(self.union / path, os.O_WRONLY | os.O_APPEND)
            try:
                os.write(fd, b"+")
            finally:
                os.close(fd)

        if self.attempt(wanted, operation):
            self.view[path] += b"+"  # type: ignore[operator]

    @rule(path=PATHS)
    def mkdir(self, path: str) -> None:
        wanted = self.parent_error(path) or (errno.EEXIST if path in self.view else None)
        if self.attempt(wanted, lambda: os.mkdir(self.union / path)):
            self.view[path] = None

    @rule(path=PATHS)
    def unlink(self, path: str) -> None:
        wanted = self.parent_error(path) or (errno.ENOENT if path not in self.view else None)
        wanted = wanted or (errno.EISDIR if self.view[path] is None else None)
        if self.attempt(wanted, lambda: os.unlink(self.union / path)):
            del self.view[path]

    @rule(path=PATHS)
    def rmdir(self, path: str) -> None:
        wanted = self.parent_error(path) or (errno.ENOENT if path not in self.view else None)
        wanted = wanted or (errno.ENOTDIR if self.view[path] is not None else None)
        wanted = wanted or (errno.ENOTEMPTY if any(name.startswith(path + "/") for name in self.view) else None)
        if self.attempt(wanted, lambda: os.rmdir(self.union / path)):
            del self.view[path]

    @rule(path=PATHS)
    def remove_tree(self, path: str) -> None:
        if self.view.get(path, b"") is None:
            inside = [name for name in self.view if name == path or name.startswith(path + "/")]
            if self.attempt(None, lambda: shutil.rmtree(self.union / path)):
                for name in inside:
                    del self.view[name]
            else:
                self.view = self.merged_on_disk()  # part of it may be gone

    @rule(old=PATHS, new=PATHS)
    def rename(self, old: str, new: str) -> None:
        if old == new or new.startswith(old + "/") or old.startswith(new + "/"):
            return
        wanted = self.parent_error(old) or self.parent_error(new) or (errno.ENOENT if old not in self.view else None)
        if wanted is None and new in self.view:
            if self.view[old] is None and self.view[new] is not None:
                wanted = errno.ENOTDIR
            elif self.view[old] is not None and self.view[new] is None:
                wanted = errno.EISDIR
            elif self.view[new] is None and any(name.startswith(new + "/") for name in self.view):
                wanted = errno.ENOTEMPTY
        also = (errno.EXDEV,) if wanted is None and self.view[old] is None else ()
        if self.attempt(wanted, lambda: os.rename(self.union / old, self.union / new), *also):
            for name in [name for name in self.view if name == old or name.startswith(old + "/")]:
                self.view[new + name[len(old) :]] = self.view.pop(name)

    # --- by others, in the branches ---

    @precondition(lambda self: self.udba != "none")
    @rule(path=PATHS, kind=st.sampled_from(OUTSIDE), data=st.data())
    def outside(self, path: str, kind: str, data: st.DataObject) -> None:
        top = self.base / data.draw(st.sampled_from(self.branches))[0]
        at = top / path
        time.sleep(0.005)  # a clock tick: what is written now has another mtime
        try:
            if kind == "write":
                at.write_bytes(b"from outside")
            elif kind == "replace":
                (self.base / "new").write_bytes(b"another, from outside")
                os.rename(self.base / "new", at)
            elif kind == "unlink":
                at.unlink()
            elif kind == "mkdir":
                at.mkdir()
            elif kind == "rmdir":
                at.rmdir()
            elif kind == "move":
                os.rename(at, top / data.draw(PATHS))
            else:
                (at / ".wh..wh..opq" if kind == "opaque" else at.parent / f".wh.{at.name}").touch()
        except OSError:
            pass  # not as the branch is
        wanted = self.merged_on_disk()
        gone = [name for name, content in self.view.items() if wanted.get(name, b"") != content]
        for name in gone:
            if name in self.open:  # taken away while open: its bytes may be gone with it
                os.close(self.open.pop(name)[0])
        self.view = wanted

    # --- open files ---

    @rule(path=PATHS)
    def keep_open(self, path: str) -> None:
        content = self.view.get(path)
        if content is not None and path not in self.open:
            self.open[path] = os.open(self.union / path, os.O_RDONLY), content

    @rule()
    def close_all(self) -> None:
        for fd, _ in self.open.values():
            os.close(fd)
        self.open.clear()

    # --- the branches ---

    @rule(name=st.sampled_from(("x", "y", "rw1", "ro")), at=st.integers(0, 4), mode=st.sampled_from(MODES))
    def add(self, name: str, at: int, mode: str) -> None:
        if name not in [branch for branch, _ in self.branches] and at <= len(self.branches):
            self.union.change(("insert", at, name, mode))
            self.branches.insert(at, [name, mode])
            self.view = self.merged_on_disk()

    @precondition(lambda self: len(self.branches) > 1)
    @rule(data=st.data())
    def delete(self, data: st.DataObject) -> None:
        name, _ = branch = data.draw(st.sampled_from(self.branches))
        try:
            self.union.change(("del", None, name, ""))
        except MountError as error:
            assert error.code == 4 and self.open, error  # in use
            return
        self.branches.remove(branch)
        self.view = self.merged_on_disk()

    @rule(data=st.data(), mode=st.sampled_from(("rw", "ro", "ro+wh", "rr+wh")))
    def modify(self, data: st.DataObject, mode: str) -> None:
        branch = data.draw(st.sampled_from(self.branches))
        self.union.change(("mod", None, branch[0], mode))
        branch[1] = mode
        self.view = self.merged_on_disk()

    @rule()
    def remount(self) -> None:
        self.close_all()
        self.union.umount()
        for name, mode in self.branches:
            if mode == "rw":
                left = [entry for entry in os.listdir(self.base / name) if entry in (".wh..wh.orph", ".wh..wh.plnk")]
                assert left == [], f"left in {name}: {left}"
        self.mount()

    # --- what holds after every step ---

    @invariant()
    def agrees(self) -> None:
        if self.union.process is not None:
            if self.udba == "notify":
                wait_for(lambda: look_calmly(self.union.merged) == self.view, "the events to be taken", 10)
            seen = look(self.union.merged)
            assert seen == self.view, "the mount and the model"
            assert seen == self.merged_on_disk(), "the mount and the branches on disk"

    @invariant()
    def descriptors_stay(self) -> None:
        """What is open keeps its bytes, whatever branch comes or goes (writes by name are not followed here)."""
        for path, (fd, _) in self.open.items():
            assert os.fstat(fd).st_size == len(os.pread(fd, 1000, 0)), path

    def teardown(self) -> None:
        try:
            self.close_all()
            if self.union.process is not None:
                self.union.umount()
        finally:
            self.union.discard()
            shutil.rmtree(self.base, ignore_errors=True)


def look_calmly(top: Path) -> View | None:
    """None: what the kernel had listed is gone when it is opened."""
    try:
        return look(top)
    except OSError:
        return None


def test_random_histories() -> None:
    examples = int(os.environ.get("UNIONFS_AUFS_EXAMPLES", "40"))
    run_state_machine_as_test(
        Union,
        settings=settings(
            max_examples=examples, stateful_step_count=30, deadline=None, derandomize=True, database=None,
            suppress_health_check=list(HealthCheck), phases=(Phase.generate,),
        ),
    )
