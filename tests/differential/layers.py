"""The fixed trees that sequences start from: three lowers and an upper, and the same flattened into one directory.

Each layer set is built once as a template; a sequence gets a copy of it as a top-level directory of its own, so that
one mount serves hundreds of sequences. The flattened tree is written down by what the layers mean, not read
through a union, so that no implementation under test is its own judge.
"""

from __future__ import annotations

import os
import subprocess
from collections.abc import Callable
from pathlib import Path

SETS = ("deep", "single", "mixed")
LOWERS = 3
OLD = 1_100_000_000
USER = 1000

ACL_NAMED = bytes.fromhex(  # u::rwx u:1000:rw- g::r-x m::rwx o::r--
    "02000000" "01000700ffffffff" "02000600e8030000" "04000500ffffffff" "10000700ffffffff" "20000400ffffffff"
)
ACL_DEFAULT = bytes.fromhex(  # u::rwx u:1000:rwx g::--- m::rwx o::r-x
    "02000000" "01000700ffffffff" "02000700e8030000" "04000000ffffffff" "10000700ffffffff" "20000500ffffffff"
)
CAPABILITY = bytes.fromhex("0100000200200000000000000000000000000000")  # cap_net_raw=ep, version 2


def body(seed: str, size: int) -> bytes:
    line = f"{seed} 0123456789 abcdefghijklmnopqrstuvwxyz\n".encode()
    return (line * (size // len(line) + 1))[:size]


class Writer:
    """Writes into some layer and, as the name is to be visible, into the flattened tree too."""

    def __init__(self, template: Path) -> None:
        self.layers = [template / f"l{n}" for n in range(LOWERS)] + [template / "upper"]
        self.flat = template / "flat"
        for root in [*self.layers, self.flat]:
            root.mkdir(parents=True)
            root.chmod(0o755)

    def roots(self, layer: int, seen: bool = True) -> list[Path]:
        return [self.layers[layer], *([self.flat] if seen else [])]

    def each(self, layer: int, seen: bool, name: str, make: Callable[[Path], None]) -> None:
        for root in self.roots(layer, seen):
            path = root / name
            for parent in reversed(path.relative_to(root).parents):
                if not (root / parent).exists():
                    (root / parent).mkdir(mode=0o755)
            make(path)

    def file(self, layer: int, name: str, size: int, mode: int = 0o644, uid: int = 0, gid: int = 0, *,
             seen: bool = True) -> None:  # fmt: skip
        def make(path: Path) -> None:
            path.write_bytes(body(f"{name} of {layer}", size))
            os.chown(path, uid, gid)
            path.chmod(mode)

        self.each(layer, seen, name, make)

    def directory(self, layer: int, name: str, mode: int = 0o755, uid: int = 0, *, seen: bool = True) -> None:
        def make(path: Path) -> None:
            path.mkdir(exist_ok=True)
            os.chown(path, uid, uid)
            path.chmod(mode)

        self.each(layer, seen, name, make)

    def call(self, layer: int, name: str, make: Callable[[Path], None]) -> None:
        self.each(layer, True, name, make)

    def whiteout(self, layer: int, name: str) -> None:
        self.each(layer, False, name, lambda path: os.mknod(path, 0o020000, 0))

    def opaque(self, layer: int, name: str) -> None:
        os.setxattr(self.layers[layer] / name, "trusted.overlay.opaque", b"y")

    def finish(self) -> None:
        for root in [*self.layers, self.flat]:
            for path in [*sorted(root.rglob("*"), reverse=True), root]:
                os.utime(path, (OLD, OLD), follow_symlinks=False)


def sparse(path: Path) -> None:
    with open(path, "wb") as file:
        for offset in (8192, 131072, 1 << 20):
            file.seek(offset)
            file.write(body(str(offset), 4096))
        file.truncate((1 << 20) + 300_000)


def build(template: Path, name: str) -> None:
    """`deep` has names in every layer, `single` all in the topmost lower, `mixed` an upper that has lived already."""
    low, mid, top, up = {"deep": (2, 1, 0, 0), "single": (0, 0, 0, 0), "mixed": (2, 1, 1, 3)}[name]
    w = Writer(template)
    w.file(low, "low", 5000)
    if mid != low:
        w.file(low, "mid", 300, seen=False)
    w.file(mid, "mid", 9000, 0o664, USER, USER)
    w.file(up, "top", 100)
    w.file(low, "empty", 0, 0o600)
    w.file(low, "suid", 1000, 0o6755, USER, 0)
    w.file(low, "capable", 1000, 0o755)
    w.call(low, "capable", lambda path: os.setxattr(path, "security.capability", CAPABILITY))
    w.file(low, "attrs", 2000, 0o640, 0, USER)
    w.call(low, "attrs", lambda path: os.setxattr(path, "user.one", b"1" * 200))
    w.call(low, "attrs", lambda path: os.setxattr(path, "trusted.two", b"2"))
    w.call(low, "attrs", lambda path: os.setxattr(path, "system.posix_acl_access", ACL_NAMED))
    w.call(low, "sparse", sparse)
    w.file(low, "h1", 700)
    w.directory(low, "d")
    for other in ("h2", "d/h3"):
        for root in w.roots(low):
            os.link(root / "h1", root / other)
    w.call(low, "link", lambda path: path.symlink_to("low"))
    w.call(low, "dlink", lambda path: path.symlink_to("d"))
    w.call(low, "dangling", lambda path: path.symlink_to("n1"))
    w.call(low, "fifo", lambda path: os.mkfifo(path, 0o644))
    w.call(low, "null", lambda path: os.mknod(path, 0o020666, os.makedev(1, 3)))
    w.file(low, "d/low", 400)
    w.file(mid, "d/mid", 4096)
    w.file(top, "d/top", 10)
    w.file(low, "d/sub/deep/leaf", 50)
    w.file(top, "d/sub/other", 60)
    w.directory(low, "e")
    w.directory(low, "private", 0o700, USER)
    w.file(low, "private/own", 20, 0o600, USER, USER)
    w.directory(low, "sticky", 0o1777)
    w.file(low, "sticky/roots", 30, 0o666)
    w.directory(low, "setgid", 0o2775, USER)
    w.directory(low, "acl", 0o777)
    w.call(low, "acl", lambda path: os.setxattr(path, "system.posix_acl_default", ACL_DEFAULT))
    if top != low:  # what deletions look like
        w.file(low, "gone", 100, seen=False)
        w.whiteout(top, "gone")
        w.file(low, "o/old", 100, seen=False)
        w.file(top, "o/new", 110)
        w.opaque(top, "o")
        w.directory(mid, "w")
        w.file(low, "w/a", 1, seen=False)
        w.whiteout(up, "w/a")
        w.file(low, "was_dir/a", 1, seen=False)
        w.file(up, "was_dir", 77)
        w.file(low, "was_file", 1, seen=False)
        w.file(up, "was_file/a", 78)
    w.finish()


def copy(source: Path, target: Path) -> None:
    subprocess.run(["cp", "-a", "--", source, target], check=True)
