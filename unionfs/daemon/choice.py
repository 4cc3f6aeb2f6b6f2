"""Which storage driver: the named one, the one with storage already, or the first that this host can serve.

Never a silent fallback: whoever starts the daemon is told which it is and why, and a driver that can't be served is
refused with what would work instead. Reads the data root's filesystem type, opens /dev/fuse; changes nothing.
"""

from __future__ import annotations

import os
import subprocess
from typing import NamedTuple

from unionfs.errors import EXIT_NO_FUSE, EXIT_USAGE, MountError
from unionfs.store.api import DRIVERS, stored_drivers

PREFERENCE = ("overlay", "aufs", "row", "vfs")  # for a data root without storage; btrfs only by name
FUSE = "/dev/fuse"


class Choice(NamedTuple):
    driver: str
    why: str


def choose(root: str, named: str, named_by: str) -> Choice:
    """MountError for a driver that the host can't serve, and if several have storage and none is named."""
    stored = stored_drivers(root)
    if named:
        others = [driver for driver in stored if driver != named]
        hidden = f"; what {' and '.join(others)} stored there is not visible to it" if others else ""
        choice = Choice(named, f"named {named_by}{hidden}")
    elif len(stored) > 1:
        raise MountError(
            f"daemon: {root} holds storage of several drivers: {', '.join(stored)}. Name the one to use with "
            "--storage-driver, or remove what you no longer need",
            EXIT_USAGE,
        )
    elif stored:
        choice = Choice(stored[0], "it has storage there from before")
    else:
        fitting = [driver for driver in PREFERENCE if not unfit(driver, root)]
        why = "detected: the first of " + ", ".join(PREFERENCE) + " that this host can serve"
        choice = Choice(fitting[0], why)  # vfs always fits
    if reason := unfit(choice.driver, root):
        raise MountError(f"daemon: storage driver {choice.driver}: {reason}. {instead(root)}", EXIT_NO_FUSE)
    return choice


def instead(root: str) -> str:
    """What would work, for messages."""
    return f"This host can serve: {', '.join(driver for driver in DRIVERS if not unfit(driver, root))}"


def unfit(driver: str, root: str) -> str:
    """Why this host can't serve a driver; "" if it can."""
    if driver == "vfs":
        return ""
    if driver == "btrfs":
        found = filesystem(root)
        return "" if found == "btrfs" else f"the data root {root} is not on btrfs but on {found}"
    try:
        os.close(os.open(FUSE, os.O_RDWR | os.O_CLOEXEC))
    except OSError as error:
        return f"{FUSE}: {error.strerror} (load the fuse module, or give the container --device {FUSE})"
    return ""


def filesystem(path: str) -> str:
    """The type's name of the filesystem that a path is on or will be made on."""
    while not os.path.exists(path):
        path = os.path.dirname(path)
    done = subprocess.run(["stat", "-f", "-c", "%T", path], capture_output=True, text=True, timeout=10, check=True)
    return done.stdout.strip()
