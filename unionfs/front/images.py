"""`unionfs images`: the images that there are."""

from __future__ import annotations

from unionfs.errors import EXIT_OK
from unionfs.front.args import Command, Parsed
from unionfs.front.image_common import JSON, STORE, age, library, print_json, print_table, size

COMMAND = Command(
    "unionfs images",
    "Lists images: name, id, when it came, size with all its layers.",
    [JSON, *STORE],
    epilog="Example:\n  unionfs images",
)


def run(parsed: Parsed) -> int:
    with library(parsed) as opened:
        found = opened.images.all()
    if "json" in parsed:
        print_json([image._asdict() for image in found])
    else:
        rows = [(image.name, image.id[7:19], age(image.created), size(image.size)) for image in found]
        print_table([("NAME", "ID", "CREATED", "SIZE"), *rows])
    return EXIT_OK
