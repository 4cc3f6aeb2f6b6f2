"""`unionfs snapshot`: points in time of a row mount, or of its upper while it is not mounted."""

from __future__ import annotations

import os
import sys
import time

from unionfs.errors import EXIT_FORMAT, EXIT_LAYER, EXIT_NOT_OURS, EXIT_OK, EXIT_USAGE, MountError, nearest
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
    "diff": (1, 2, "NAME [NAME]"),
    "clone": (2, 2, "NAME DIRECTORY"),
    "send": (1, 2, "[FROM] NAME"),
    "receive": (0, 1, "[NAME]"),
}
COMMAND = Command(
    "unionfs snapshot",
    "Snapshots of a union mounted with --driver row, taken while it is in use:\n"
    "  create     freeze what there is; writes go to a new layer from now on\n"
    "  list       the snapshots, oldest first\n"
    "  rollback   back to a snapshot: what changed since is dropped\n"
    "  delete     take snapshots away; what others need of them stays\n"
    "  diff       what changed between a snapshot and another one, or now\n"
    "  clone      a new upper directory that stands on a snapshot: mount it with the same lowers\n"
    "  send       write a snapshot, or what changed since FROM, to standard output: changed blocks only\n"
    "  receive    apply what was sent to a mount that has FROM as its newest snapshot, and take the snapshot there",
    [
        Option("-j --json", "list, diff: as JSON"),
        Option("-s --space", "list: how much each takes on the disk, which looks at every file"),
        Option("--sync", "create: return when the snapshot would survive a power cut, not seconds before that"),
        Option("-f --force", "receive: drop what changed here since FROM"),
        Option("-l --lower", "lowers of an upper that is not mounted, for diff and send", "DIR[:DIR...]"),
    ],
    "VERB MOUNTPOINT|UPPER [NAME]...",
    2,
    1 << 10,
    "create and receive need a mount.\n\n"
    "Examples:\n  unionfs snapshot create merged before-upgrade\n  unionfs snapshot rollback merged before-upgrade\n"
    "  unionfs snapshot send merged monday tuesday | ssh host unionfs snapshot receive /backup/merged",
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


def _view(target: Target, snapshot: str | None) -> Any:
    lowers = target.lowers if target.lowers is not None else target.chain().lowers
    return _rows("snapshot_view").View(target.upper, lowers, None if snapshot == "now" else snapshot)


def _diff(target: Target, names: list[str], parsed: Parsed) -> int:
    old, new = _view(target, names[0]), _view(target, names[1] if len(names) > 1 else "now")
    rows = _rows("snapshot_view").rows(old, new)
    if "json" in parsed:
        import json

        print(json.dumps([{"kind": kind, "path": os.fsdecode(path)} for kind, path in rows], indent=2))
    else:
        for kind, path in rows:
            print(kind, show(path))
    return EXIT_OK


def _send(target: Target, names: list[str], parsed: Parsed) -> int:
    if sys.stdout.isatty():
        raise MountError("snapshot send: not to a terminal: redirect it")
    chain = target.chain()
    to = chain.find(names[-1])
    begin: dict[str, Any] = {"to": {"id": to.id, "name": to.name, "created": to.created}, "from": None}
    if len(names) > 1:
        since = chain.find(names[0])
        begin["from"] = {"id": since.id, "name": since.name}
        old = _view(target, since.name)
    else:
        lowers = target.lowers if target.lowers is not None else chain.lowers
        if not lowers:
            raise MountError("snapshot send: the lowers are not known: name them: --lower", EXIT_USAGE)
        old = _rows("snapshot_view").View(None, lowers, None)
    _rows("stream").Sender(old, _view(target, to.name), sys.stdout.buffer).send(begin)
    return EXIT_OK


def _receive(target: Target, names: list[str], parsed: Parsed) -> int:
    """All of the stream, and the snapshot it is of; or nothing."""
    if target.mount is None:
        raise MountError(f"receive: {show(target.upper)} is not mounted: mount it", EXIT_NOT_OURS)
    stream = _rows("stream")
    records = stream.records(sys.stdin.buffer)
    kind, begin, _ = next(records)
    if kind != stream.BEGIN:
        raise MountError("receive: the stream has no beginning", EXIT_FORMAT)
    start, temporary = _starting_point(target, begin, "force" in parsed)
    try:
        receiver = stream.Receiver(target.mount.path)
        for kind, header, data in records:
            receiver.apply(kind, header, data)
        to = begin["to"]
        made = target.change("create", name=names[0] if names else to["name"], ident=to["id"])
    except BaseException:
        target.change("rollback", name=start)
        raise
    finally:
        if temporary:
            target.change("delete", names=[start])
    print(made["name"])
    return EXIT_OK


def _starting_point(target: Target, begin: dict[str, Any], force: bool) -> tuple[str, bool]:
    """The snapshot that the mount shows now and the stream begins at; whether it was made for this."""
    assert target.mount is not None
    chain = target.chain()
    if any(s.id == begin["to"]["id"] for s in chain.snapshots):
        raise MountError(f"receive: snapshot {begin['to']['name']!r} is here already", EXIT_USAGE)
    if begin["from"] is None:
        if control.ask(target.mount, "diff"):
            raise MountError("receive: a whole snapshot goes to a mount that shows only its lowers", EXIT_USAGE)
        name = "receiving " + begin["to"]["id"]
        target.change("create", name=name)
        return name, True
    since = next((s for s in chain.snapshots if s.id == begin["from"]["id"]), None)
    if since is None:
        raise MountError(
            f"receive: the stream begins at snapshot {begin['from']['name']!r}, which is not here: send that first",
            EXIT_LAYER,
        )
    if force:
        target.change("rollback", name=since.name)
    elif _rows("snapshot_view").rows(_view(target, since.name), _view(target, "now")):
        raise MountError(f"receive: changed here since snapshot {since.name!r}: --force drops that", EXIT_USAGE)
    return since.name, False
