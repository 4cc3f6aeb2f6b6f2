"""`unionfs commit`: an image of what a container is now."""

from __future__ import annotations

from unionfs.errors import EXIT_OK
from unionfs.front.args import Command, Option, Parsed
from unionfs.front.image_common import STORE, library

COMMAND = Command(
    "unionfs commit",
    "Makes an image of a container: its image's layers and one more with what was changed. The container goes on.",
    [Option("-m --message", "a comment for the image's history", "TEXT"), *STORE],
    "CONTAINER IMAGE",
    2,
    2,
    "Example:\n  unionfs commit --message 'with curl' work debian-curl:12",
)


def run(parsed: Parsed) -> int:
    container, image = parsed.arguments
    with library(parsed) as opened:
        print(opened.containers.commit(container, image, parsed.get("message")).id)
    return EXIT_OK
