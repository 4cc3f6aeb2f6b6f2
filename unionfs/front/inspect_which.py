"""`unionfs which`: which layer a path comes from, and what hides or is hidden."""

from __future__ import annotations

import os

from unionfs.errors import EXIT_OK
from unionfs.front import control
from unionfs.front.args import Command, Option, Parsed
from unionfs.front.mounts import mount_of
from unionfs.session.mount import show

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any

COMMAND = Command(
    "unionfs which",
    "Shows every layer that has something to say about PATH, topmost first: the one that is seen, shadowed copies,\n"
    "whiteouts. PATH may be deleted: its whiteout is shown.",
    [Option("-j --json", "as JSON")],
    "PATH",
    1,
    1,
    "Example:\n  unionfs which merged/etc/passwd",
)


def run(parsed: Parsed) -> int:
    mount, inside = mount_of(parsed.arguments[0])
    rows: list[dict[str, Any]] = control.ask(mount, "which", 30.0, path=os.fsdecode(inside))
    if "json" in parsed:
        import json

        print(json.dumps(rows, indent=2))
        return EXIT_OK
    for line in table(rows):
        print(line)
    return EXIT_OK


def table(rows: list[dict[str, Any]]) -> list[str]:
    """Columns are the keys of the rows: a driver may have more to tell than another."""
    columns = list(dict.fromkeys(key for row in rows for key in row))
    cells = [[column.upper() for column in columns]]
    cells += [[_cell(row.get(column)) for column in columns] for row in rows]
    widths = [max(len(line[index]) for line in cells) for index in range(len(columns))]
    return ["  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip() for line in cells]


def _cell(value: Any) -> str:
    if value is None:
        return "-"
    if isinstance(value, bool):
        return "yes" if value else "no"
    return show(os.fsencode(value)) if isinstance(value, str) else str(value)
