"""`unionfs create`: a container, which is a name for a writable layer on an image."""

from __future__ import annotations

from unionfs.errors import EXIT_OK
from unionfs.front.args import Command, Option, Parsed
from unionfs.front.image_common import STORE, library

COMMAND = Command(
    "unionfs create",
    "Makes a container of an image and prints its name. Nothing runs: mount it with unionfs mount --container NAME.",
    [
        Option("-n --name", "the container's name (default: made up)", "NAME"),
        Option("-s --size", "how much it may hold beyond the image (10g); drivers overlay and row", "SIZE"),
        *STORE,
    ],
    "IMAGE",
    1,
    1,
    "Example:\n  unionfs create --name work debian:12 && unionfs mount --container work merged",
)


def run(parsed: Parsed) -> int:
    with library(parsed) as opened:
        print(opened.containers.create(parsed.arguments[0], parsed.get("name"), parsed.get("size")).name)
    return EXIT_OK
