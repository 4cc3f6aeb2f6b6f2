"""`unionfs history`: the steps that an image was made in."""

from __future__ import annotations

from unionfs.errors import EXIT_OK
from unionfs.front.args import Command, Parsed
from unionfs.front.image_common import JSON, STORE, library, print_json, print_table, size

COMMAND = Command(
    "unionfs history",
    "Shows the steps of an image, newest first, with the size of each one's layer.",
    [JSON, *STORE],
    "NAME",
    1,
    1,
    "Example:\n  unionfs history debian:12",
)


def run(parsed: Parsed) -> int:
    with library(parsed) as opened:
        steps = opened.images.history(parsed.arguments[0])
    if "json" in parsed:
        print_json(steps)
        return EXIT_OK
    rows = [("LAYER", "CREATED", "SIZE", "BY", "COMMENT")]
    for step in steps:
        by = step["created_by"].replace("\n", " ")
        shown = by if len(by) <= 60 else by[:59] + "…"
        rows.append((step["layer"][:12] or "-", step["created"][:19], size(step["size"]), shown, step["comment"]))
    print_table(rows)
    return EXIT_OK
