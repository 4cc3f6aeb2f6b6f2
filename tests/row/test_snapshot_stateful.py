"""Random operations, snapshots, rollbacks, clones and remounts on a real row mount, against a model in memory.

After every step each file is read whole and compared block for block, with its link count and mode; every snapshot
that is rolled back to, or cloned, is compared too.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import tempfile
from pathlib import Path

import pytest
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
from snapshots import SESSIONS, Union

from unionfs import sysio
from unionfs.front import control
from unionfs.front.mounts import mount_of

BLOCK = 4096
BIG = 40 * BLOCK + 100  # above what is copied rather than redirected
FOLDERS = st.sampled_from(("", "d/", "e/"))
NAMES = st.sampled_from(("a", "b", "c"))
PATHS = st.builds(lambda folder, name: folder + name, FOLDERS, NAMES)
OFFSETS = st.one_of(st.integers(0, 41).map(lambda n: n * BLOCK), st.integers(0, BIG + BLOCK))
LENGTHS = st.sampled_from((1, 100, BLOCK, 3 * BLOCK, 20 * BLOCK))
SIZES = st.one_of(st.sampled_from((0, 10, BLOCK, 70_000, BIG)), st.integers(0, BIG + 3 * BLOCK))


class File:
    def __init__(self, data: bytes = b"", mode: int = 0o644) -> None:
        self.data = bytearray(data)
        self.mode = mode


class State:
    """`files`: path → File, shared by hard links. `folders`: those that exist."""

    def __init__(self) -> None:
        self.files: dict[str, File] = {}
        self.folders: set[str] = set()

    def copy(self) -> State:
        made, twins = State(), {f: File(f.data, f.mode) for f in set(self.files.values())}
        made.files = {path: twins[f] for path, f in self.files.items()}
        made.folders = set(self.folders)
        return made

    def fits(self, path: str) -> bool:
        folder = path.rpartition("/")[0]
        return not folder or folder in self.folders

    def links(self, f: File) -> int:
        return sum(other is f for other in self.files.values())


def compare(top: Path, state: State) -> None:
    found = {str(path.relative_to(top)): path for path in top.rglob("*")}
    assert set(found) == set(state.files) | state.folders
    for name, f in state.files.items():
        fd = os.open(found[name], os.O_RDONLY)
        try:
            here = os.fstat(fd)
            assert (here.st_size, here.st_nlink, here.st_mode & 0o777) == (len(f.data), state.links(f), f.mode), name
            data = os.pread(fd, len(f.data) + 1, 0)
        finally:
            os.close(fd)
        if data != f.data:
            wrong = [at // BLOCK for at in range(0, len(f.data), BLOCK) if data[at:][:BLOCK] != f.data[at:][:BLOCK]]
            raise AssertionError(f"{name}: blocks {wrong} differ")


class Snapshots(RuleBasedStateMachine):
    session = "direct"

    @initialize(blocksize=st.sampled_from(("4k", "16k")))
    def begin(self, blocksize: str) -> None:
        self.where = Path(tempfile.mkdtemp(prefix="snapshots-"))
        self.union = Union(self.where)
        self.union.session = self.session
        self.options = ("-o", f"blocksize={blocksize}")
        self.state = State()
        self.state.folders = {"d", "e"}
        for name in ("a", "d/a", "d/b"):
            data = b"".join(b"%s%07d" % (name[-1:].encode(), i) for i in range(BIG // 8 + 1))[:BIG]
            (self.union.lower / name).parent.mkdir(exist_ok=True)
            (self.union.lower / name).write_bytes(data)
            self.state.files[name] = File(data)
        (self.union.lower / "e").mkdir()
        os.link(self.union.lower / "d/b", self.union.lower / "e/b")
        self.state.files["e/b"] = self.state.files["d/b"]
        self.saved: dict[str, State] = {}
        self.held: dict[int, File] = {}
        self.count = 0
        self.union.mount(*self.options)

    def teardown(self) -> None:
        if not hasattr(self, "union"):
            return
        self.let_go()
        try:
            if os.path.ismount(self.union.merged):
                self.union.umount()
            found = self.union.fsck()
            assert found.returncode == 0, found.stderr
        finally:
            if os.path.ismount(self.union.merged):
                subprocess.run(["umount", "-l", self.union.merged], check=True)
            shutil.rmtree(self.where, ignore_errors=True)

    def at(self, path: str) -> Path:
        return self.union.merged / path

    def verb(self, action: str, **arguments: object) -> None:
        mount, _ = mount_of(str(self.union.merged))
        control.ask(mount, "snapshot", action=action, **arguments)

    def let_go(self) -> None:
        for fd in self.held:
            os.close(fd)
        self.held.clear()

    # --- files ---

    def change(self, fd: int, f: File, offset: int, length: int, fill: int) -> None:
        data = bytes([fill]) * length
        assert os.pwrite(fd, data, offset) == length
        if len(f.data) < offset + length:
            f.data.extend(bytes(offset + length - len(f.data)))
        f.data[offset : offset + length] = data

    @rule(path=PATHS, offset=OFFSETS, length=LENGTHS, fill=st.integers(0, 255), sync=st.booleans())
    def write(self, path: str, offset: int, length: int, fill: int, sync: bool) -> None:
        if not self.state.fits(path) or path in self.state.folders:
            return
        f = self.state.files.get(path)
        fd = os.open(self.at(path), os.O_RDWR | os.O_CREAT, 0o644)
        try:
            if f is None:
                f = self.state.files[path] = File()
            self.change(fd, f, offset, length, fill)
            if sync:
                os.fsync(fd)
        finally:
            os.close(fd)

    @rule(path=PATHS)
    def hold(self, path: str) -> None:
        f = self.state.files.get(path)
        if f is not None and len(self.held) < 3:
            self.held[os.open(self.at(path), os.O_RDWR)] = f

    @precondition(lambda self: self.held)
    @rule(which=st.integers(0, 2), offset=OFFSETS, length=LENGTHS, fill=st.integers(0, 255))
    def write_held(self, which: int, offset: int, length: int, fill: int) -> None:
        fd, f = list(self.held.items())[which % len(self.held)]
        self.change(fd, f, offset, length, fill)
        assert os.pread(fd, len(f.data) + 1, 0) == f.data

    @rule(path=PATHS, size=SIZES)
    def truncate(self, path: str, size: int) -> None:
        f = self.state.files.get(path)
        if f is not None:
            os.truncate(self.at(path), size)
            f.data = f.data[:size] + bytes(max(0, size - len(f.data)))

    @precondition(lambda self: self.session == "direct")  # pyfuse3 has no fallocate
    @rule(path=PATHS, offset=OFFSETS, length=LENGTHS)
    def punch(self, path: str, offset: int, length: int) -> None:
        f = self.state.files.get(path)
        if f is None:
            return
        fd = os.open(self.at(path), os.O_RDWR)
        try:
            sysio.fallocate(fd, sysio.FALLOC_FL_PUNCH_HOLE | sysio.FALLOC_FL_KEEP_SIZE, offset, length)
        finally:
            os.close(fd)
        end = min(offset + length, len(f.data))
        if offset < end:
            f.data[offset:end] = bytes(end - offset)

    @rule(path=PATHS, mode=st.sampled_from((0o600, 0o640, 0o644)))
    def chmod(self, path: str, mode: int) -> None:
        f = self.state.files.get(path)
        if f is not None:
            os.chmod(self.at(path), mode)
            f.mode = mode

    # --- names ---

    @rule(path=PATHS)
    def unlink(self, path: str) -> None:
        if self.state.files.pop(path, None) is not None:
            os.unlink(self.at(path))

    @rule(path=PATHS, to=PATHS)
    def link(self, path: str, to: str) -> None:
        f = self.state.files.get(path)
        if f is not None and to not in self.state.files and self.state.fits(to):
            os.link(self.at(path), self.at(to))
            self.state.files[to] = f

    @rule(path=PATHS, to=PATHS)
    def rename(self, path: str, to: str) -> None:
        f = self.state.files.get(path)
        if f is None or not self.state.fits(to):
            return
        os.rename(self.at(path), self.at(to))
        if self.state.files.get(to) is not f:  # two names of one inode: rename does nothing
            del self.state.files[path]
            self.state.files[to] = f

    @rule(folder=st.sampled_from(("d", "e")), to=st.sampled_from(("d", "e")))
    def rename_folder(self, folder: str, to: str) -> None:
        if folder not in self.state.folders or to in self.state.folders:
            return
        os.rename(self.at(folder), self.at(to))
        self.state.folders = self.state.folders - {folder} | {to}
        moved = {p: f for p, f in self.state.files.items() if p.startswith(folder + "/")}
        for path, f in moved.items():
            del self.state.files[path]
            self.state.files[to + path[len(folder) :]] = f

    @rule(folder=st.sampled_from(("d", "e")))
    def make_or_remove_folder(self, folder: str) -> None:
        if folder not in self.state.folders:
            self.at(folder).mkdir()
            self.state.folders.add(folder)
            return
        shutil.rmtree(self.at(folder))
        self.state.folders.discard(folder)
        self.state.files = {p: f for p, f in self.state.files.items() if not p.startswith(folder + "/")}

    # --- snapshots ---

    @rule()
    def take(self) -> None:
        self.count += 1
        self.verb("create", name=f"s{self.count}")
        self.saved[f"s{self.count}"] = self.state.copy()

    @precondition(lambda self: self.saved)
    @rule(which=st.integers(0, 9))
    def roll_back(self, which: int) -> None:
        name = list(self.saved)[which % len(self.saved)]
        self.let_go()
        self.verb("rollback", name=name)
        self.state = self.saved[name].copy()

    @precondition(lambda self: self.saved)
    @rule(which=st.integers(0, 9))
    def delete(self, which: int) -> None:
        name = list(self.saved)[which % len(self.saved)]
        self.verb("delete", names=[name])
        del self.saved[name]

    @precondition(lambda self: self.saved)
    @rule(which=st.integers(0, 9))
    def clone(self, which: int) -> None:
        from unionfs_drivers.row.snapshot import clone

        name = list(self.saved)[which % len(self.saved)]
        other = Union(self.where)
        self.count += 1
        other.upper = self.where / f"clone{self.count}"
        other.work, other.merged = self.where / f"work{self.count}", self.where / "other"
        other.session = self.session
        clone(os.fsencode(self.union.upper), name, os.fsencode(other.upper))
        other.merged.mkdir(exist_ok=True)
        other.mount(*self.options)
        try:
            expected = self.saved[name].copy()
            for path, f in expected.files.items():
                fd = os.open(other.merged / path, os.O_RDWR)
                try:
                    self.change(fd, f, 5000, 10, 7)
                finally:
                    os.close(fd)
                break
            compare(other.merged, expected)
        finally:
            other.umount()

    @rule()
    def remount(self) -> None:
        self.let_go()
        self.union.remount(*self.options)

    @invariant()
    def shows_the_model(self) -> None:
        if hasattr(self, "union"):
            compare(self.union.merged, self.state)


@pytest.mark.parametrize("session", SESSIONS)
def test_against_a_model(session: str) -> None:
    machine = type("Machine", (Snapshots,), {"session": session})
    examples = 14 if session == "direct" else 5
    run_state_machine_as_test(
        machine,
        settings=settings(
            max_examples=int(os.environ.get("UNIONFS_SNAPSHOT_EXAMPLES", examples)),
            stateful_step_count=30,
            deadline=None,
            derandomize="UNIONFS_SNAPSHOT_EXAMPLES" not in os.environ,
            database=None,
            phases=[Phase.generate, Phase.shrink] if "UNIONFS_SNAPSHOT_EXAMPLES" in os.environ else [Phase.generate],
            suppress_health_check=list(HealthCheck),
        ),
    )
