"""The layers: built once per run of the benchmark, read by every peer, never written afterwards.

Everything lies in one directory on a disk filesystem (not tmpfs: its speed would hide the peers' own).
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sysconfig
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cached_property
from pathlib import Path

from .registry import Scale

RAM_GIB = 16  # the image of --ram: sparse, a few GiB of it get used


class Stage:
    """Lazy: a layer is built when a workload first names it."""

    def __init__(self, root: Path, scale: Scale) -> None:
        self.root = root
        self.scale = scale
        self.layers = root / "layers"
        self.unions = root / "unions"  # where each sample has its upper, work and mountpoint
        self.layers.mkdir(parents=True)
        self.unions.mkdir()
        # ext4 passes over inodes that were freed within the last minute, one by one: a sample would pay for what the
        # one before has deleted. This flag gives each directory in here a block group of its own.
        subprocess.run(["chattr", "+T", self.unions], capture_output=True)  # other filesystems need it not

    def _dir(self, *parts: str) -> Path:
        path = self.layers.joinpath(*parts)
        path.mkdir(parents=True)
        return path

    @cached_property
    def empty(self) -> Path:
        return self._dir("empty")

    @cached_property
    def small(self) -> Path:
        """dirs x files of 1 KiB."""
        return self._fill(self._dir("small"), self.scale.dirs, self.scale.files)

    @cached_property
    def hundred(self) -> Path:
        """100 directories of 100 empty files (30 x 60 at the quick scale)."""
        root = self._dir("hundred")
        return self._fill(root, min(100, self.scale.dirs), min(100, self.scale.files), size=0)

    @staticmethod
    def _fill(root: Path, dirs: int, files: int, size: int = 1024) -> Path:
        data = b"d" * size
        for d in range(dirs):
            base = root / f"d{d:04d}"
            base.mkdir(exist_ok=True)
            for f in range(files):
                (base / f"f{f:04d}").write_bytes(data)
        return root

    def wide(self, count: int) -> Path:
        """One directory of `count` empty files."""
        root = self.layers / f"wide{count}"
        if not root.exists():
            (root / "wide").mkdir(parents=True)
            for i in range(count):
                os.close(os.open(f"{root}/wide/w{i:07d}", os.O_CREAT | os.O_WRONLY, 0o644))
        return root

    def million(self) -> Path:
        """Ten directories of 100,000 files."""
        root = self.layers / "million"
        if not root.exists():
            for d in range(10):
                (root / f"m{d}").mkdir(parents=True)
                for i in range(100_000):
                    os.close(os.open(f"{root}/m{d}/w{i:06d}", os.O_CREAT | os.O_WRONLY, 0o644))
        return root

    DEEP_CHAINS, DEEP_FILES, DEPTH = 10, 10, 20

    @cached_property
    def deep(self) -> Path:
        root = self._dir("deep")
        for name in self.deep_names():
            path = root / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.touch()
        return root

    def deep_names(self) -> list[str]:
        chains = ["/".join(f"c{c}l{i}" for i in range(self.DEPTH)) for c in range(self.DEEP_CHAINS)]
        return [f"{chain}/f{f}" for chain in chains for f in range(self.DEEP_FILES)]

    MANY_DIRS, MANY_FILES = 10, 200

    def many(self, count: int) -> list[Path]:
        """`count` layers that share ten directories; their 2,000 files are dealt out in turn."""
        base = self.layers / f"many{count}"
        roots = [base / str(i) for i in range(count)]
        if not base.exists():
            for root in roots:
                for d in range(self.MANY_DIRS):
                    (root / f"d{d:04d}").mkdir(parents=True)
            for d in range(self.MANY_DIRS):
                for f in range(self.MANY_FILES):
                    (roots[f % count] / f"d{d:04d}" / f"f{f:04d}").write_bytes(b"d" * 100)
        return roots

    @cached_property
    def tree(self) -> Path:
        """A real source tree: Python's library and C headers of this machine, as a git repository."""
        root = self._dir("tree", "src").parent
        left = self.scale.tree
        places = [sysconfig.get_path("stdlib"), "/usr/include", "/usr/lib/python3", "/usr/share"]
        for source in map(Path, places):
            for place, dirs, files in os.walk(source):
                dirs.sort()
                here = root / "src" / source.name / Path(place).relative_to(source)
                for name in sorted(files):
                    origin = Path(place) / name
                    if left > 0 and origin.is_file() and not origin.is_symlink() and origin.stat().st_size < 1 << 20:
                        here.mkdir(parents=True, exist_ok=True)
                        shutil.copy2(origin, here / name)
                        left -= 1
        if left:
            raise RuntimeError(f"this machine's libraries are {left} files short of the tree wanted")
        git = ["git", "-C", str(root), "-c", "user.name=bench", "-c", "user.email=bench@localhost"]
        subprocess.run([*git, "init", "-q"], check=True)
        # The index remembers ctime and inode numbers of the layer; a union may show others, and git would then
        # measure hashing instead of lstat.
        for setting in ("core.checkStat=minimal", "core.trustctime=false", "gc.auto=0", "core.excludesFile=/dev/null"):
            subprocess.run([*git, "config", *setting.split("=")], check=True)
        subprocess.run([*git, "add", "-f", "."], check=True, capture_output=True)
        subprocess.run([*git, "commit", "-q", "-m", "tree"], check=True)
        return root

    @cached_property
    def tarball(self) -> Path:
        path = self.root / "tree.tar"
        subprocess.run(["tar", "-cf", path, "-C", self.tree, "src"], check=True)
        return path

    def file(self, mib: int) -> Path:
        """A layer with one incompressible file `big`."""
        root = self.layers / f"file{mib}"
        if not root.exists():
            root.mkdir()
            block = os.urandom(1 << 20)
            with (root / "big").open("wb") as out:
                for _ in range(mib):
                    out.write(block)
                out.flush()
                os.fsync(out.fileno())
        return root

    def database(self, mib: int) -> Path:
        """A layer with a sqlite database `db` of 100,000 rows."""
        import sqlite3

        root = self.layers / f"database{mib}"
        if not root.exists():
            root.mkdir()
            db = sqlite3.connect(root / "db")
            db.execute("create table t (id integer primary key, v text)")
            db.executemany("insert into t (v) values (?)", (("x" * (mib * 9),) for _ in range(100_000)))
            db.commit()
            db.close()
            os.sync()
        return root

    @cached_property
    def stdlib(self) -> Path:
        """Python's library, to be imported from the union."""
        root = self._dir("stdlib")
        source = sysconfig.get_path("stdlib")
        skip = shutil.ignore_patterns("test", "site-packages", "dist-packages", "idlelib", "config-*")
        shutil.copytree(source, root / "lib", symlinks=True, ignore=skip)
        return root

    @cached_property
    def wheel(self) -> Path:
        """A wheel of the stdlib's own packages: real Python source, no network."""
        import zipfile

        path = self.root / "benchwheel-1.0-py3-none-any.whl"
        meta = "benchwheel-1.0.dist-info"
        wanted = ["asyncio", "email", "http", "json", "unittest", "xml", "multiprocessing", "concurrent", "logging"]
        record = []
        with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as z:
            for package in wanted:
                for source in sorted((self.stdlib / "lib" / package).rglob("*.py")):
                    name = f"benchwheel/{source.relative_to(self.stdlib / 'lib')}"
                    z.write(source, name)
                    record.append(f"{name},,")
            z.writestr(f"{meta}/METADATA", "Metadata-Version: 2.1\nName: benchwheel\nVersion: 1.0\n")
            z.writestr(f"{meta}/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n")
            record += [f"{meta}/METADATA,,", f"{meta}/WHEEL,,", f"{meta}/RECORD,,"]
            z.writestr(f"{meta}/RECORD", "\n".join(record) + "\n")
        return path

    @cached_property
    def c_project(self) -> Path | None:
        """Lua's sources from the Debian source package, through this machine's own apt set-up; None without it."""
        root, apt = self._dir("lua"), self.root / "apt"
        parts = apt / "parts"
        for path in (parts, apt / "lists" / "partial", apt / "cache" / "archives" / "partial"):
            path.mkdir(parents=True)
        for found in Path("/etc/apt").rglob("*.sources"):
            (parts / found.name).write_text(re.sub(r"(?m)^Types:.*", "Types: deb-src", found.read_text()))
        for found in Path("/etc/apt").rglob("*.list"):
            (parts / found.name).write_text(re.sub(r"(?m)^deb\b", "deb-src", found.read_text()))
        get = [
            "apt-get", "-q", "-o", f"Dir::Etc::SourceParts={parts}", "-o", "Dir::Etc::SourceList=-",
            "-o", f"Dir::State::Lists={apt}/lists", "-o", f"Dir::Cache={apt}/cache", "-o", "APT::Sandbox::User=root",
        ]  # fmt: skip
        try:
            # A third party's list may not answer: only the download below decides.
            subprocess.run([*get, "update"], capture_output=True, timeout=120)
            subprocess.run([*get, "source", "--download-only", "lua5.4"], cwd=apt, capture_output=True, timeout=120)
        except (OSError, subprocess.TimeoutExpired):
            return None
        for archive in apt.glob("*.orig.tar.*"):
            subprocess.run(["tar", "-xf", archive, "-C", root, "--strip-components=1"], check=True)
            return root
        return None

    @cached_property
    def busybox_tar(self) -> Path | None:
        """A root filesystem for podman: one static busybox."""
        busybox = shutil.which("busybox")
        if not busybox:
            return None
        root = self._dir("busybox")
        for d in ("bin", "dev", "etc", "proc", "sys", "tmp", "usr", "var"):
            (root / d).mkdir()
        shutil.copy2(busybox, root / "bin" / "busybox")
        for name in ("sh", "true", "ls"):
            (root / "bin" / name).symlink_to("busybox")
        (root / "etc" / "passwd").write_text("root:x:0:0:root:/:/bin/sh\n")
        path = self.root / "busybox.tar"
        subprocess.run(["tar", "-cf", path, "-C", root, "."], check=True)
        return path

    def merged(self, lowers: list[Path]) -> Path:
        """The lowers as one plain directory, for the native row."""
        if len(lowers) == 1:
            return lowers[0]
        path = self.layers / f"merged-{lowers[0].parent.name}-{lowers[0].name}-{lowers[-1].name}"
        if not path.exists():
            for lower in reversed(lowers):
                shutil.copytree(lower, path, symlinks=True, dirs_exist_ok=True)
        return path

    def warm(self, lowers: list[Path]) -> None:
        """Read the layers' metadata once: every peer then finds their dentries and inodes in memory."""
        for lower in lowers:
            subprocess.run(["find", str(lower), "-size", "+0c", "-name", "no such"], check=True)

    def remove(self) -> None:
        shutil.rmtree(self.root)


@contextmanager
def stage_root(wanted: Path | None, ram: bool) -> Iterator[Path]:
    """A directory to be made for the stage: on the disk, or on an ext4 of its own in memory."""
    place = wanted or Path("/var/tmp") / f"unionfs-bench-{os.getpid()}"
    if not ram:
        yield place
        return
    image = Path("/dev/shm") / f"unionfs-bench-{os.getpid()}.img"
    place.mkdir(parents=True)
    try:
        with image.open("wb") as out:
            out.truncate(RAM_GIB << 30)
        subprocess.run(["mkfs.ext4", "-q", "-F", image], check=True)
        subprocess.run(["mount", "-o", "loop", image, place], check=True)
        try:
            yield place / "stage"
        finally:
            subprocess.run(["umount", place], check=True)
    finally:
        image.unlink(missing_ok=True)
        place.rmdir()

