"""`unionfs save`: an image as an OCI layout."""

from __future__ import annotations

from unionfs.errors import EXIT_OK
from unionfs.front.args import Command, Option, Parsed
from unionfs.front.image_common import STORE, library, progress

COMMAND = Command(
    "unionfs save",
    "Writes an image into an OCI layout, a new directory or one that has images already: skopeo, umoci, buildah and\n"
    "podman read it. Prints the manifest's digest.",
    [Option("-c --compression", "of the layers", "NAME", ("gzip", "zstd", "none")), *STORE],
    "NAME oci:DIR[:TAG]",
    2,
    2,
    "Layers are packed anew: an image that another tool packed gets another id, the same one each time.\n\n"
    "Examples:\n  unionfs save app:1 oci:out\n  unionfs save --compression zstd app:1 oci:out:latest",
)


def run(parsed: Parsed) -> int:
    name, target = parsed.arguments
    with library(parsed) as opened, progress() as report:
        print(opened.images.save(name, target, parsed.get("compression", "gzip"), report))
    return EXIT_OK
