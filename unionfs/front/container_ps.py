"""`unionfs ps`: the containers that there are."""

from __future__ import annotations

from unionfs.errors import EXIT_OK
from unionfs.front.args import Command, Option, Parsed
from unionfs.front.image_common import JSON, STORE, age, library, print_json, print_table, size

COMMAND = Command(
    "unionfs ps",
    "Lists containers, newest first: name, image, age, where it is mounted.",
    [JSON, Option("-s --size", "with the space that its changes take"), *STORE],
    epilog="Example:\n  unionfs ps --size",
)


def run(parsed: Parsed) -> int:
    sizes = {}
    with library(parsed) as opened:
        found = opened.containers.all()
        if "size" in parsed:
            sizes = {container.id: opened.containers.usage(container.id).size for container in found}
    if "json" in parsed:
        print_json(
            [{**one._asdict(), **({"size": sizes[one.id]} if one.id in sizes else {})} for one in found]
        )
        return EXIT_OK
    heading = ["NAME", "ID", "IMAGE", "CREATED", *(["SIZE"] if sizes else []), "MOUNTED ON"]
    rows = [
        [one.name, one.id[:12], one.image, age(one.created), *([size(sizes[one.id])] if sizes else []), one.mountpoint]
        for one in found
    ]
    print_table([heading, *rows])
    return EXIT_OK
