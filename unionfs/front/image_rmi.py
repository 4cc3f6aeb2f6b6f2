"""`unionfs rmi`: takes images away."""

from __future__ import annotations

from unionfs.errors import EXIT_OK
from unionfs.front.args import Command, Parsed
from unionfs.front.image_common import STORE, library

COMMAND = Command(
    "unionfs rmi",
    "Removes images, and the layers that no other image and no container uses.",
    STORE,
    "NAME...",
    1,
    1 << 20,
    "Example:\n  unionfs rmi debian:12",
)


def run(parsed: Parsed) -> int:
    with library(parsed) as opened:
        for name in parsed.arguments:
            for line in opened.images.remove(name):
                print(line)
    return EXIT_OK
