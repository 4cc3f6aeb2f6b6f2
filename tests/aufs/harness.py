"""Aufs unions served by the real command in a process of its own, and an independent idea of what they must show."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

from support.mounts import UNIONFS, is_mounted, wait_for
from support.sys import umount
from support.trees import Tree, build

from unionfs.errors import MountError
from unionfs.front import control
from unionfs.front.mounts import mount_of

HELPER = os.path.join(os.path.dirname(sys.executable), "mount.fuse.unionfs")


def command(*argv: object, check: bool = True) -> subprocess.CompletedProcess[str]:
    done = subprocess.run([UNIONFS, *map(str, argv)], capture_output=True, text=True, timeout=60)
    assert not check or done.returncode == 0, done.stderr
    return done


class Aufs:
    """A base directory with branches in it by name, and the mount over some of them."""

    def __init__(self, base: Path, session: str = "direct", data: str = "") -> None:
        self.base = base
        self.session = session
        self.data = data
        self.merged = base / "merged"
        self.merged.mkdir(parents=True)
        self.log = base / "log"
        self.process: subprocess.Popen[bytes] | None = None

    def __truediv__(self, name: str) -> Path:
        return self.merged / name

    def branch_dir(self, name: str, tree: Tree | None = None) -> Path:
        build(str(self.base / name), tree or {})
        return self.base / name

    def mount(self, *branches: str, options: str = "") -> Aufs:
        """`branches`: like "a=rw"; a name is a directory of the base, made if missing."""
        argv = [UNIONFS, "mount", "-f", "--driver", "aufs", "--session", self.session]
        for branch in branches:
            name = branch.partition("=")[0]
            (self.base / name).mkdir(exist_ok=True)
            argv += ["--branch", f"{self.base}/{branch}"]
        joined = ",".join(filter(None, [f"data={self.data}" if self.data else "", options]))
        if joined:
            argv += ["-o", joined]
        with open(self.log, "ab") as log:
            self.process = subprocess.Popen([*argv, str(self.merged)], stdin=subprocess.DEVNULL, stdout=log, stderr=log)
        wait_for(lambda: self.process.poll() is not None or (is_mounted(self.merged) and self.answers()), "the mount")
        assert self.process.poll() is None, f"mount ended with {self.process.returncode}: {self.log.read_text()}"
        return self

    def answers(self) -> bool:
        """The server's own first look at its mount is over: before it, an unmount would find it busy."""
        try:
            return bool(self.ask("ping"))
        except MountError:
            return False

    def ask(self, verb: str, **arguments: Any) -> Any:
        mount, _ = mount_of(str(self.merged))
        return control.ask(mount, verb, 60.0, **arguments)

    def change(self, *rows: tuple[str, int | None, str, str]) -> list[str]:
        """Rows of (verb, position, branch name, permission)."""
        answer = self.ask("branch", changes=[[v, at, str(self.base / name), mode] for v, at, name, mode in rows])
        return [Path(branch.rpartition("=")[0]).name + "=" + branch.rpartition("=")[2] for branch in answer]

    def umount(self) -> None:
        umount(self.merged)
        assert self.process is not None
        code = self.process.wait(60)
        self.process = None
        log = self.log.read_text()
        assert code == 0 and "Traceback" not in log, f"server ended with {code}: {log}"

    def drop_caches(self) -> None:
        with open("/proc/sys/vm/drop_caches", "w") as control_file:
            control_file.write("2")

    def discard(self) -> None:
        if self.process is not None and self.process.poll() is None:
            self.process.kill()
            self.process.wait()
        while is_mounted(self.merged):
            umount(self.merged, 2)


View = dict[str, bytes | None]  # path below the root → content, None: a directory


def merge(branches: list[tuple[Path, str]]) -> View:
    """What the branches (topmost first, with permissions) show together, by the format's rules, by no code of ours."""
    view: View = {}

    def descend(path: str, levels: list[tuple[Path, str]]) -> None:
        names: dict[str, list[tuple[Path, str]] | None] = {}
        closed: set[str] = set()
        opaque = False
        for folder, mode in levels:
            if opaque:
                break
            honoured = mode.startswith("rw") or "wh" in mode.split("+")
            listed = sorted(os.listdir(folder / path))
            for name in listed:
                if name.startswith(".wh.") or name in closed:
                    continue
                if (folder / path / name).is_dir():
                    names.setdefault(name, [])
                    names[name].append((folder, mode))
                else:
                    if name not in names:
                        names[name] = None
                        view[path + name] = (folder / path / name).read_bytes()
                    closed.add(name)
            if honoured:
                closed |= {name[4:] for name in listed if name.startswith(".wh.") and not name.startswith(".wh..wh.")}
                opaque = ".wh..wh..opq" in listed
        for name, below in names.items():
            if below is not None:
                view[path + name] = None
                descend(path + name + "/", below)

    descend("", branches)
    return view


def look(top: Path) -> View:
    view: View = {}
    for folder, dirs, files in os.walk(top):
        here = os.path.relpath(folder, top)
        prefix = "" if here == "." else here + "/"
        view.update({prefix + name: None for name in dirs})
        view.update({prefix + name: Path(folder, name).read_bytes() for name in files})
    return view
