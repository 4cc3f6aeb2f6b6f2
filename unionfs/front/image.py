"""`unionfs image`: brings images in, and names them."""

from __future__ import annotations

import sys

from unionfs.errors import EXIT_OK
from unionfs.front.args import Command, Parsed, usage_error
from unionfs.front.image_common import JSON, STORE, library, print_json, progress, size

COMMAND = Command(
    "unionfs image",
    "Brings images in. `load` (or `pull-from`) takes oci:DIR[:TAG] or docker-archive:FILE[:NAME], made by skopeo,\n"
    "umoci, buildah, podman or docker save; `import` the tar of a whole tree, plain, gzip or zstd (- is standard\n"
    "input); `tag` gives an image another name.",
    [JSON, *STORE],
    "load|pull-from|import|tag SOURCE [NAME]",
    2,
    3,
    "Examples:\n"
    "  unionfs image load oci:debian:12 debian:12\n"
    "  unionfs image load docker-archive:saved.tar\n"
    "  debootstrap stable tree && tar -C tree -c . | unionfs image import - debian:stable\n"
    "  unionfs image tag debian:12 base",
)


def run(parsed: Parsed) -> int:
    action, source, *rest = parsed.arguments
    name = rest[0] if rest else ""
    if action not in ("load", "pull-from", "import", "tag"):
        raise usage_error(f"unionfs image: load, pull-from, import or tag, not {action!r}")
    if action in ("import", "tag") and not name:
        raise usage_error(f"unionfs image {action}: give the image's name: unionfs image {action} {source} NAME")
    with library(parsed) as opened, progress() as report:
        if action == "tag":
            found = [opened.images.tag(source, name)]
        elif action == "import":
            with sys.stdin.buffer if source == "-" else open(source, "rb") as stream:
                found = [opened.images.import_tar(stream, name)]
        else:
            found = opened.images.load(source, name, report)
    if "json" in parsed:
        print_json([image._asdict() for image in found])
    else:
        for image in found:
            print(f"{image.name}  {image.id[7:19]}  {size(image.size)}")
    return EXIT_OK
