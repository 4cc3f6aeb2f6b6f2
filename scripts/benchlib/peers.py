"""The union filesystems compared: how each is found, named, mounted and unmounted.

Every FUSE peer gets the options that make it fastest while the mount is the only writer of its layers (which is
what we assume of ourselves too); they are printed with the results. All run as root.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
import time
from pathlib import Path

from .registry import Skip

ROOT = Path(__file__).resolve().parents[2]


class Peer:
    """One way of making a union. Subclasses say how it is mounted."""

    key = ""
    label = ""
    options = ""
    cow = True  # copies up and whites out
    fuse = True
    session = ""

    def missing(self) -> str | None:
        """Why it cannot be measured here, or None."""
        return None

    def version(self) -> str:
        return ""

    def mount(self, lowers: list[Path], upper: Path | None, work: Path, mnt: Path, log: Path) -> float:
        """Mount; return the seconds from exec to a mount that answers."""
        before = os.stat(mnt).st_dev
        cwd, argv = self.command(lowers, upper, work, mnt)
        with log.open("wb") as sink:
            start = time.perf_counter()
            done = subprocess.run(argv, cwd=cwd, stdin=subprocess.DEVNULL, stdout=sink, stderr=sink, timeout=60)
            while done.returncode == 0 and os.stat(mnt).st_dev == before:
                if time.perf_counter() - start > 30:
                    raise RuntimeError(f"{self.key}: mount command returned 0 but nothing is mounted")
                time.sleep(0.0005)
            took = time.perf_counter() - start
        if done.returncode:
            raise RuntimeError(f"{self.key}: exit {done.returncode}: {log.read_text(errors='replace').strip()[-300:]}")
        return took

    def command(self, lowers: list[Path], upper: Path | None, work: Path, mnt: Path) -> tuple[Path, list[str]]:
        raise NotImplementedError

    def messages(self, mnt: Path) -> dict[str, int]:
        """Requests that the kernel has sent so far, by name, where the peer counts them."""
        return {}

    def unmount(self, mnt: Path) -> None:
        for _ in range(40):
            done = subprocess.run(["umount", str(mnt)], capture_output=True, text=True)
            if done.returncode == 0:
                return
            time.sleep(0.1)
        subprocess.run(["umount", "-l", str(mnt)], capture_output=True)
        raise RuntimeError(f"{self.key}: {done.stderr.strip()}")


class Native(Peer):
    """No union at all: the merged tree as a plain directory of the same filesystem (the layer itself, or a copy of the
    lowers where the workload changes files). The limit."""

    key, label, fuse = "native", "native directory", False
    options = "ext4 or whatever holds the layers; no cold state of its own"

    def version(self) -> str:
        return f"Linux {os.uname().release}"


class Kernel(Peer):
    key, label, fuse = "kernel", "kernel overlayfs", False
    options = "defaults of the kernel"

    def missing(self) -> str | None:
        if shutil.which("modprobe"):
            subprocess.run(["modprobe", "-q", "overlay"], capture_output=True)
        return None if "\toverlay\n" in Path("/proc/filesystems").read_text() else "not in this kernel"

    def version(self) -> str:
        return f"Linux {os.uname().release}"

    def command(self, lowers: list[Path], upper: Path | None, work: Path, mnt: Path) -> tuple[Path, list[str]]:
        # mount(2) takes one page of options: relative names make 128 lowers fit.
        base = Path(os.path.commonpath([*map(str, lowers), str(work)]))
        text = "lowerdir=" + ":".join(os.path.relpath(p, base) for p in lowers)
        if upper:
            text += f",upperdir={os.path.relpath(upper, base)},workdir={os.path.relpath(work, base)}"
        return base, ["mount", "-t", "overlay", "overlay", "-o", text, str(mnt)]


class FuseOverlayfs(Peer):
    key = label = "fuse-overlayfs"
    options = "defaults (timeout=1e9, writeback, default_permissions)"

    def __init__(self, binary: str = "fuse-overlayfs", key: str = "fuse-overlayfs") -> None:
        self.binary, self.key, self.label = binary, key, key

    def missing(self) -> str | None:
        return None if shutil.which(self.binary) else "not installed"

    def version(self) -> str:
        text = subprocess.run([self.binary, "--version"], capture_output=True, text=True).stdout
        found = re.search(r"fuse-overlayfs:? (?:version )?([\w.-]+)", text)
        return found[1] if found else text.strip().splitlines()[0]

    def command(self, lowers: list[Path], upper: Path | None, work: Path, mnt: Path) -> tuple[Path, list[str]]:
        text = "lowerdir=" + ":".join(map(str, lowers))
        if upper:
            text += f",upperdir={upper},workdir={work}"
        return Path("/"), [self.binary, "-o", text, str(mnt)]


class Mergerfs(Peer):
    key = label = "mergerfs"
    cow = False
    options = (
        "cache.files=auto-full,cache.entry=86400,cache.attr=86400,cache.negative_entry=86400,cache.readdir=true,"
        "cache.symlinks=true,category.create=ff,category.search=ff,func.getattr=ff"
    )

    def missing(self) -> str | None:
        return None if shutil.which("mergerfs") else "not installed"

    def version(self) -> str:
        text = subprocess.run(["mergerfs", "--version"], capture_output=True, text=True).stdout
        found = re.search(r"mergerfs (?:version: |v)?([\w.-]+)", text)
        return found[1] if found else "?"

    def command(self, lowers: list[Path], upper: Path | None, work: Path, mnt: Path) -> tuple[Path, list[str]]:
        branches = [f"{upper}=RW"] if upper else []
        branches += [f"{p}=RO" for p in lowers]
        return Path("/"), ["mergerfs", "-o", self.options, ":".join(branches), str(mnt)]


class UnionfsFuse(Peer):
    key = label = "unionfs-fuse"
    options = "cow,kernel_cache,entry_timeout=86400,attr_timeout=86400,negative_timeout=86400"

    def missing(self) -> str | None:
        return None if self._binary() else "not installed"

    def version(self) -> str:
        done = subprocess.run([self._binary() or "", "--version"], capture_output=True, text=True)
        found = re.search(r"unionfs-fuse version: ([\w.-]+)", done.stdout + done.stderr)
        return found[1] if found else "?"

    @staticmethod
    def _binary() -> str | None:
        # Debian installs it as `unionfs`, which is our own name too: ask for the place, not for the PATH.
        return next((p for p in ("/usr/bin/unionfs", "/usr/bin/unionfs-fuse") if os.access(p, os.X_OK)), None)

    def command(self, lowers: list[Path], upper: Path | None, work: Path, mnt: Path) -> tuple[Path, list[str]]:
        branches = [f"{upper}=RW"] if upper else []
        branches += [f"{p}=RO" for p in lowers]
        return Path("/"), [self._binary() or "", "-o", self.options, ":".join(branches), str(mnt)]


class Ours(Peer):
    """`unionfs mount` of this tree, in one session and data mode."""

    def __init__(self, key: str, session: str, data: str, command: str | None = None) -> None:
        self.key, self.session, self.data = key, session, data
        self.unionfs = Path(command) if command else self.binary()
        self.label = "unionfs" if key == "ours" else f"unionfs {data if session == 'direct' else session}"
        if command:
            self.label = key
        self.options = f"--session {session}" + (f" -o data={data}" if session == "direct" else "")

    @staticmethod
    def binary(name: str = "unionfs") -> Path:
        for place in (Path(sys.executable).parent, ROOT / ".venv" / "bin"):
            if (place / name).exists() and place != Path("/usr/bin"):
                return place / name
        return ROOT / ".venv" / "bin" / name

    def missing(self) -> str | None:
        return None if self.unionfs.exists() else f"{self.unionfs} is not there"

    def version(self) -> str:
        if self.unionfs != self.binary():
            return str(self.unionfs)
        git = ["git", "-C", str(ROOT), "describe", "--always", "--dirty"]
        done = subprocess.run(git, capture_output=True, text=True)
        return f"this tree ({done.stdout.strip() or 'no git'})"

    def messages(self, mnt: Path) -> dict[str, int]:
        done = subprocess.run([self.unionfs, "status", "--json", mnt], capture_output=True, text=True, timeout=30)
        if done.returncode:
            raise RuntimeError(f"unionfs status: {done.stderr.strip()}")
        return dict(json.loads(done.stdout)["statistics"]["session"].get("messages", {}))

    def command(self, lowers: list[Path], upper: Path | None, work: Path, mnt: Path) -> tuple[Path, list[str]]:
        argv = [str(self.unionfs), "mount", "--session", self.session]
        if self.session == "direct":
            argv += ["-o", f"data={self.data}"]
        argv += ["--lower", ":".join(map(str, lowers))]
        if upper:
            argv += ["--upper", str(upper), "--work", str(work)]
        return Path("/"), [*argv, str(mnt)]


class OursRow(Ours):
    """The row driver: blocks are redirected, nothing is copied."""

    def __init__(self) -> None:
        super().__init__("ours-row", "direct", "auto")
        self.label = "unionfs row"
        self.options = "--driver row"

    def command(self, lowers: list[Path], upper: Path | None, work: Path, mnt: Path) -> tuple[Path, list[str]]:
        cwd, argv = super().command(lowers, upper, work, mnt)
        return cwd, [*argv[:2], "--driver", "row", *argv[2:]]


class OursGuarded(Ours):
    """What it costs that the mount outlives its server."""

    def __init__(self) -> None:
        super().__init__("ours-guard", "direct", "auto")
        self.label = "unionfs guard"
        self.options = "-o guard=on"

    def command(self, lowers: list[Path], upper: Path | None, work: Path, mnt: Path) -> tuple[Path, list[str]]:
        place, argv = super().command(lowers, upper, work, mnt)
        return place, [*argv[:-1], "-o", "guard=on", argv[-1]]


class OursAufs(Ours):
    """The aufs driver; with `create` two branches are writable (the second one is the work directory)."""

    def __init__(self, key: str, create: str = "") -> None:
        super().__init__(key, "direct", "auto")
        self.create = create
        self.label = f"unionfs aufs {create}".rstrip()
        self.options = "--driver aufs" + (f" -o create={create}, two writable branches" if create else "")

    def command(self, lowers: list[Path], upper: Path | None, work: Path, mnt: Path) -> tuple[Path, list[str]]:
        argv = [str(self.unionfs), "mount", "--driver", "aufs"]
        if upper:
            argv += ["--branch", f"{upper}=rw"]
            if self.create:
                argv += ["-o", f"create={self.create}", "--branch", f"{work}=rw"]
        for lower in lowers:
            argv += ["--branch", f"{lower}=ro+wh"]
        return Path("/"), [*argv, str(mnt)]


def known() -> list[Peer]:
    return [
        Native(), Kernel(), FuseOverlayfs(), Mergerfs(), UnionfsFuse(),
        Ours("ours", "direct", "auto"),
        Ours("ours-noopen", "direct", "noopen"),
        Ours("ours-cached", "direct", "cached"),
        Ours("ours-passthrough", "direct", "passthrough"),
        Ours("ours-pyfuse3", "pyfuse3", "-"),
        OursGuarded(),
        OursAufs("ours-aufs"),
        OursAufs("ours-aufs-mfs", "mfs"),
        OursRow(),
    ]  # fmt: skip


QUICK_PEERS = ["native", "kernel", "fuse-overlayfs", "mergerfs", "unionfs-fuse", "ours", "ours-aufs"]


def need_cow(peer: Peer) -> None:
    if not peer.cow:
        raise Skip("no copy-on-write")
