"""`unionfs rm`: takes containers away, with what was changed in them."""

from __future__ import annotations

from unionfs.errors import EXIT_OK
from unionfs.front.args import Command, Option, Parsed
from unionfs.front.image_common import STORE, library

COMMAND = Command(
    "unionfs rm",
    "Removes containers and what was changed in them. One that is mounted stays, and the error says where.",
    [Option("-f --force", "unmount it first"), *STORE],
    "CONTAINER...",
    1,
    1 << 20,
    "Example:\n  unionfs rm --force work",
)


def run(parsed: Parsed) -> int:
    with library(parsed) as opened:
        for name in parsed.arguments:
            opened.containers.remove(name, force="force" in parsed)
            print(name)
    return EXIT_OK
