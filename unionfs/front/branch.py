"""`unionfs branch`: other branches under a mounted union, with files open; and the same by `mount -o remount`."""

from __future__ import annotations

import os
import time

from unionfs.errors import EXIT_BUSY, EXIT_OK, EXIT_USAGE, MountError, nearest
from unionfs.front import control
from unionfs.front.args import Command, Option, Parsed
from unionfs.front.mounts import Mount, mount_of
from unionfs.front.options import is_for_others, split_branch
from unionfs.session.mount import VFS_WORDS

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Sequence
    from typing import Any

VERBS = ("add", "insert", "append", "prepend", "mod", "del")
RETRY = 0.25  # seconds between two looks of --wait
# What mount(8) adds to the options of a remount by itself: those of the mount that is there.
_PRESENT = ("user_id=", "group_id=", "rootmode=", "fd=", "max_read=", "blksize=", "default_permissions", "allow_other")
_REMOUNT_VERBS = {"add": "insert", "ins": "insert", **{verb: verb for verb in ("append", "prepend", "del", "mod")}}

COMMAND = Command(
    "unionfs branch",
    "Changes the branches of a mounted union (driver aufs) while files are open:\n"
    "  add [N]       new branches at position N (0 is topmost; default: below all others)\n"
    "  insert N      the same, N required\n"
    "  append        below all others\n"
    "  prepend       on top of all others\n"
    "  mod           another permission\n"
    "  del           take branches away; refused while something that only they have is in use",
    [
        Option("-w --wait", "del: wait until nothing is in use"),
        Option("-j --json", "print the branches as JSON"),
    ],
    "VERB [N] MOUNTPOINT PATH[=PERMISSION]...",
    3,
    1 << 10,
    "Several branches are changed in one step. The permission is rw, ro (default) or rr, with attributes: ro+wh.\n\n"
    "Examples:\n  unionfs branch add merged /data=ro\n  unionfs branch insert 1 merged /more=rw\n"
    "  unionfs branch mod merged /more=ro\n  unionfs branch del --wait merged /data",
)


def run(parsed: Parsed) -> int:
    verb, *rest = parsed.arguments
    if verb not in VERBS:
        raise MountError(f"branch: unknown verb {verb!r}{nearest(verb, VERBS)}; one of {', '.join(VERBS)}", EXIT_USAGE)
    position: int | None = None
    if verb == "insert" or (verb == "add" and rest[0].isdigit()):
        if not rest[0].isdigit():
            raise MountError("branch insert: needs a position: insert N MOUNTPOINT PATH=PERM", EXIT_USAGE)
        position = int(rest.pop(0))
    if len(rest) < 2:
        raise MountError(f"branch {verb}: needs a mountpoint and a branch", EXIT_USAGE)
    mount, _ = mount_of(rest[0])
    changes = [_row(verb, None if position is None else position + i, text) for i, text in enumerate(rest[1:])]
    if verb == "prepend":
        changes.reverse()  # the first one named ends on top
    branches = change(mount, changes, "wait" in parsed)
    if "json" in parsed:
        import json

        print(json.dumps(branches, indent=2))
    else:
        for branch in branches:
            print(branch)
    return EXIT_OK


def change(mount: Mount, changes: list[list[Any]], wait: bool = False) -> list[str]:
    while True:
        try:
            branches: list[str] = control.ask(mount, "branch", changes=changes)
            return branches
        except MountError as error:
            if not wait or error.code != EXIT_BUSY:
                raise
        time.sleep(RETRY)


def _row(verb: str, position: int | None, text: str) -> list[Any]:
    path, mode = split_branch(text)
    if verb == "del" and mode:
        raise MountError(f"branch del: {text}: give the path without a permission", EXIT_USAGE)
    return [verb, position, os.path.abspath(path), mode]


def remount(mountpoint: str, words: Sequence[str]) -> int:
    """`mount -o remount,add:1:/x=ro merged`; aufs's older spelling with ":" and its newer one with "="."""
    changes: list[list[Any]] = []
    for word in words:
        if word in VFS_WORDS or word == "remount" or is_for_others(word) or word.startswith(_PRESENT):
            continue
        name = word.split(":", 1)[0].split("=", 1)[0]
        if name not in _REMOUNT_VERBS:
            hint = nearest(name, list(_REMOUNT_VERBS))
            verbs = ", ".join(_REMOUNT_VERBS)
            raise MountError(f"remount: {word}: only branches can be changed ({verbs}){hint}", EXIT_USAGE)
        text = word[len(name) + 1 :]
        position: int | None = None
        if name in ("add", "ins"):
            number, colon, text = text.partition(":")
            if not colon or not number.isdigit():
                raise MountError(f"remount: {word}: must be {name}:POSITION:PATH=PERMISSION", EXIT_USAGE)
            position = int(number)
        changes.append(_row(_REMOUNT_VERBS[name], position, text))
    if not changes:
        raise MountError("remount: nothing to change: only branches do (add:N:PATH=PERM, del:PATH ...)", EXIT_USAGE)
    mount, _ = mount_of(mountpoint)
    change(mount, changes)
    return EXIT_OK
