"""`unionfs diff`: what the mount changed against its lowers, as lines or as an OCI layer.

The server says which paths; their contents are read through the mount, as any process sees them.
"""

from __future__ import annotations

import os

from unionfs.errors import EXIT_OK, MountError
from unionfs.front import control
from unionfs.front.args import Command, Option, Parsed
from unionfs.front.mounts import Mount, mount_of
from unionfs.session.mount import show

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import IO

COMMAND = Command(
    "unionfs diff",
    "Lists what was added (A), changed (C) and deleted (D) against the lower directories.",
    [
        Option("-j --json", "as JSON"),
        Option("-t --tar", "write the changes as an uncompressed OCI layer to FILE, or - for standard output", "FILE"),
    ],
    "MOUNTPOINT",
    1,
    1,
    "The layer holds deletions as .wh. files, keeps hard links, owners, times to the nanosecond and extended\n"
    "attributes, and is the same for the same changes.\n\n"
    "Examples:\n  unionfs diff merged\n  unionfs diff --tar - merged | gzip > layer.tar.gz",
)


def run(parsed: Parsed) -> int:
    mount, _ = mount_of(parsed.arguments[0])
    changes: list[list[str]] = control.ask(mount, "diff")
    if "tar" in parsed:
        _write_layer(mount, changes, parsed.get("tar"))
    elif "json" in parsed:
        import json

        print(json.dumps([{"kind": kind, "path": path} for kind, path in changes], indent=2))
    else:
        for kind, path in changes:
            print(kind, show(os.fsencode(path)))
    return EXIT_OK


def _write_layer(mount: Mount, changes: list[list[str]], target: str) -> None:
    found = [(kind, os.fsencode(path)) for kind, path in changes]
    if target == "-":
        import sys

        if sys.stdout.isatty():
            raise MountError("diff --tar -: not to a terminal: redirect it")
        _write(mount.path, found, sys.stdout.buffer)
        return
    unfinished = f"{target}.{os.getpid()}.tmp"
    try:
        with open(unfinished, "xb") as stream:
            _write(mount.path, found, stream)
        os.replace(unfinished, target)
    except OSError as error:
        _remove(unfinished)
        raise MountError(f"diff --tar {target}: {error.strerror or error}") from None
    except BaseException:
        _remove(unfinished)
        raise


def _write(root: bytes, changes: list[tuple[str, bytes]], out: IO[bytes]) -> None:
    from unionfs.store.layertar import layer_tar
    from unionfs.store.tree import DirTree

    tree = DirTree(root)
    try:
        for piece in layer_tar(tree, changes):
            out.write(piece)
    finally:
        tree.close()


def _remove(path: str) -> None:
    try:
        os.unlink(path)
    except FileNotFoundError:
        pass
