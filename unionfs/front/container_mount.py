"""`unionfs mount --image`, `--container`: a container's tree on a directory of the user's choice."""

from __future__ import annotations

import os

from unionfs.api import MountConfig
from unionfs.errors import EXIT_OK, EXIT_PERMISSION, EXIT_USAGE, MountError
from unionfs.front.args import Parsed
from unionfs.front.image_common import library
from unionfs.front.options import apply_options, split_options

TYPE_CHECKING = False
if TYPE_CHECKING:
    from unionfs.store.library import Library

REFUSED = ("lower", "upper", "work", "branch", "driver")


def run(parsed: Parsed) -> int:
    """Makes the container if an image is named, notes where it is mounted, and leaves the store before it serves."""
    from unionfs.front import server

    for name in REFUSED:
        if name in parsed:
            raise MountError(f"--{name}: the layers are the image's: leave it out", EXIT_USAGE)
    if os.environ.get("UNIONFS_HOST"):
        raise MountError("mount --image works here, not in a daemon: leave out -H", EXIT_USAGE)
    mountpoint = os.path.realpath(parsed.arguments[0])
    with library(parsed) as opened:
        made = "image" in parsed
        if made and "container" in parsed:
            raise MountError("--image makes a container, --container names one: give one of them", EXIT_USAGE)
        name = opened.containers.create(parsed.get("image")).name if made else parsed.get("container")
        container = opened.containers.get(name)
        if container.mountpoint:
            raise MountError(f"container {container.name} is mounted on {container.mountpoint}", EXIT_USAGE)
        opened.containers.note_mountpoint(name, mountpoint)
        if opened.store.backend.whole:
            return _bind(opened.store.branches(container.layer)[1], mountpoint, container.name)
        config = _config(opened, container.layer, mountpoint)
    for text in parsed.all("options"):
        apply_options(config, split_options(text))
    config.session = parsed.get("session", config.session)
    config.read_only |= "read-only" in parsed
    config.debug |= "debug" in parsed
    config.foreground |= config.debug or "foreground" in parsed
    try:
        code = server.run(config)
    except MountError:
        if made:
            with library(parsed) as opened:
                opened.containers.remove(name)
        raise
    if made and code == EXIT_OK:
        print(name)
    return code


def _config(opened: Library, layer: str, mountpoint: str) -> MountConfig:
    lowers, upper, work = opened.store.branches(layer)
    config = MountConfig(os.fsencode(mountpoint), driver=opened.store.driver)
    config.lowers = [os.fsencode(path) for path in lowers]
    config.source = layer
    config.upper, config.work = os.fsencode(upper), os.fsencode(work)
    apply_options(config, split_options(opened.store.mount_options(layer)))
    return config


def _bind(tree: str, mountpoint: str, name: str) -> int:
    import subprocess

    done = subprocess.run(["mount", "--bind", "--", tree, mountpoint], capture_output=True, text=True)
    if done.returncode:
        raise MountError(f"{mountpoint}: {done.stderr.strip()}: the tree itself is {tree}", EXIT_PERMISSION)
    print(name)
    return EXIT_OK
