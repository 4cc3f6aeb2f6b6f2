"""`unionfs snapshot`: points in time of a row mount, or of its upper while it is not mounted."""

from __future__ import annotations

import os
import time

from unionfs.errors import EXIT_LAYER, EXIT_NOT_OURS, EXIT_OK, EXIT_USAGE, MountError, nearest
from unionfs.front import control
from unionfs.front.args import Command, Option, Parsed
from unionfs.front.mounts import Mount, mount_of
from unionfs.front.options import split_paths
from unionfs.session.mount import show

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any

# verb → arguments after the mount or upper: at least, at most, and their names
VERBS = {
    "create": (0, 1, "[NAME]"),
    "list": (0, 0, ""),
    "rollback": (1, 1, "NAME"),
    "delete": (1, 1 << 10, "NAME..."),
    "clone": (2, 2, "NAME DIRECTORY"),
}
COMMAND = Command(
    "unionfs snapshot",
    "Snapshots of a union mounted with --driver row, taken while it is in use:\n"
    "  create     freeze what there is; writes go to a new layer from now on\n"
    "  list       the snapshots, oldest first\n"
    "  rollback   back to a snapshot: what changed since is dropped\n"
    "  delete     take snapshots away; what others need of them stays\n"
    "  clone      a new upper directory that stands on a snapshot: mount it with the same lowers",
    [
        Option("-j --json", "list: as JSON"),
        Option("-s --space", "list: how much each takes on the disk, which looks at every file"),
        Option("--sync", "create: return when the snapshot would survive a power cut, not seconds before that"),
    ],
    "VERB MOUNTPOINT|UPPER [NAME]...",
    2,
    1 << 10,
    "create needs a mount.\n\n"
    "Examples:\n  unionfs snapshot create merged before-upgrade\n  unionfs snapshot rollback merged before-upgrade",
)


class Target:
    """What the command was given: a mount, or an upper directory without one."""

    def __init__(self, path: str, lower: str | None) -> None:
        self.mount: Mount | None = None
        self.lowers: list[bytes] | None = None
        try:
            self.mount, rest = mount_of(path)
        except MountError as error:
            if error.code != EXIT_NOT_OURS or not os.path.isdir(path):
                raise
            rest = b""
        if self.mount is None or rest.strip(b"/"):
            self.mount = None
            self.upper = os.fsencode(os.path.abspath(path))
            if lower is not None:
                self.lowers = [os.fsencode(os.path.abspath(part)) for part in split_paths(lower)]
            return
        status = control.ask(self.mount, "status")
        if status["driver"] != "row" or status["upper"] is None:
            raise MountError(
                f"{show(self.mount.path)}: driver {status['driver']}: snapshots need --driver row with an upper",
                EXIT_USAGE,
            )
        self.upper = os.fsencode(status["upper"])
        self.lowers = [os.fsencode(path) for path in status["lowers"]]

    def change(self, action: str, **arguments: Any) -> Any:
        if self.mount is not None:
            return control.ask(self.mount, "snapshot", action=action, **arguments)
        return _rows("snapshot").Unmounted(self.upper).do(action, arguments)

    def chain(self) -> Any:
        root = os.open(self.upper, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        return _rows("chain").Chain.load(root)


def _rows(module: str) -> Any:
    from importlib import import_module

    return import_module("unionfs_drivers.row." + module)


def run(parsed: Parsed) -> int:
    verb, path, *rest = parsed.arguments
    if verb not in VERBS:
        raise MountError(
            f"snapshot: unknown verb {verb!r}{nearest(verb, list(VERBS))}; one of {', '.join(VERBS)}", EXIT_USAGE
        )
    least, most, names = VERBS[verb]
    if not least <= len(rest) <= most:
        raise MountError(f"unionfs snapshot {verb} MOUNTPOINT|UPPER {names}".rstrip(), EXIT_USAGE)
    target = Target(path, parsed.get("lower") if "lower" in parsed else None)
    result: int = globals()["_" + verb](target, rest, parsed)
    return result


def _create(target: Target, names: list[str], parsed: Parsed) -> int:
    name = names[0] if names else time.strftime("%Y-%m-%dT%H:%M:%S")
    made = target.change("create", name=name, sync="sync" in parsed)
    print(made["name"])
    return EXIT_OK


def _list(target: Target, names: list[str], parsed: Parsed) -> int:
    chain = target.chain()
    rows = []
    for s in chain.snapshots:
        row = {"name": s.name, "id": s.id, "created": s.created, "layer": s.layer}
        if "space" in parsed:
            row["bytes"], row["files"] = _rows("snapshot").space(chain.root, chain, s.layer)
        rows.append(row)
    if "json" in parsed:
        import json

        print(json.dumps(rows, indent=2))
        return EXIT_OK
    for row in rows:
        when = time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(row["created"] / 1e9))
        size = f"  {row['bytes'] / 1024:12.0f} KiB  {row['files']:8} files" if "space" in parsed else ""
        print(f"{when}{size}  {row['name']}")
    return EXIT_OK


def _rollback(target: Target, names: list[str], parsed: Parsed) -> int:
    target.change("rollback", name=names[0])
    return EXIT_OK


def _delete(target: Target, names: list[str], parsed: Parsed) -> int:
    target.change("delete", names=names)
    return EXIT_OK


def _clone(target: Target, names: list[str], parsed: Parsed) -> int:
    name, directory = names
    if target.mount is not None and os.path.abspath(directory).startswith(show(target.mount.path) + "/"):
        raise MountError(f"clone {directory}: lies in the mount; give a place outside", EXIT_LAYER)
    _rows("snapshot").clone(target.upper, name, os.fsencode(os.path.abspath(directory)))
    return EXIT_OK
