"""`unionfs list`: the unionfs mounts of this mount namespace."""

from __future__ import annotations

from unionfs.errors import EXIT_OK, MountError
from unionfs.front import control
from unionfs.front.args import Command, Option, Parsed
from unionfs.front.mounts import fuse_mounts
from unionfs.session.mount import show

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any

COMMAND = Command(
    "unionfs list",
    "Lists unionfs mounts: where, driver, session, how long, the server's process.",
    [Option("-j --json", "as JSON")],
    epilog="A mount whose server does not answer (dead, or another user's) shows a state instead of figures.",
)
PATIENCE = 2.0


def run(parsed: Parsed) -> int:
    rows = mounts()
    if "json" in parsed:
        import json

        print(json.dumps(rows, indent=2))
        return EXIT_OK
    table = [("MOUNTPOINT", "DRIVER", "SESSION", "UPTIME", "PID")]
    for row in rows:
        where = show(row["mountpoint"].encode("utf-8", "surrogateescape"))
        if row["state"] == "serving":
            table.append((where, row["driver"], row["session"], duration(row["uptime"]), str(row["pid"])))
        else:
            table.append((where, "-", "-", row["state"], "-"))
    widths = [max(len(row[column]) for row in table) for column in range(4)]
    for cells in table:
        print("  ".join(cell.ljust(width) for cell, width in zip(cells, [*widths, 0], strict=True)).rstrip())
    return EXIT_OK


def mounts() -> list[dict[str, Any]]:
    for directory in control.directories():
        control.sweep(directory)
    rows = []
    for mount in fuse_mounts():
        try:
            row = {**control.ask(mount, "ping", PATIENCE), "state": "serving"}
        except MountError:
            if mount.fstype != "fuse.unionfs":
                continue  # someone else's, as far as we can know
            row = {"state": "no answer"}
        # Where it is mounted *here*: another mount namespace, or a bind mount, has other paths.
        row["mountpoint"] = mount.path.decode("utf-8", "surrogateescape")
        rows.append(row)
    return rows


def duration(seconds: float) -> str:
    whole = int(seconds)
    days, hours, minutes = whole // 86400, whole // 3600 % 24, whole // 60 % 60
    if days:
        return f"{days}d{hours:02}h"
    if hours:
        return f"{hours}h{minutes:02}m"
    return f"{minutes}m{whole % 60:02}s" if minutes else f"{whole}s"
