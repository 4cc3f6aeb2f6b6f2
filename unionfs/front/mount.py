"""`unionfs mount`: from its command line to a `MountConfig`."""

from __future__ import annotations

import os

from unionfs.api import MountConfig
from unionfs.errors import EXIT_LAYER, MountError
from unionfs.front.args import Command, Option, Parsed
from unionfs.front.options import COMMON, apply_options, split_branch, split_options, split_paths

COMMAND = Command(
    "unionfs mount",
    "Combines the lower directories (leftmost on top) and the writable upper into MOUNTPOINT.\n"
    "Without --upper the mount is read-only. Returns when the mount answers.",
    [
        Option("-l --lower", "lower directories, topmost first; may be repeated", "DIR[:DIR...]"),
        Option("-u --upper", "directory that takes all changes", "DIR"),
        Option("-w --work", "scratch directory on upper's file system (default: .UPPER.work beside upper)", "DIR"),
        Option("-b --branch", "a branch with its permission, topmost first (driver aufs); may be repeated",
               "DIR=rw|ro..."),
        Option("-D --driver", "on-disk format: overlay (default), aufs, row, vfs or an installed one", "NAME"),
        Option("-s --session", "transport (default auto: direct)", "NAME", ("auto", "direct", "pyfuse3")),
        Option("-o --options", "options, separated by commas; may be repeated", "NAME[=VALUE],..."),
        Option("-r --read-only", "mount read-only"),
        Option("-i --image", "make a container of that image and mount it (see unionfs images)", "NAME"),
        Option("-c --container", "mount that container (see unionfs ps)", "NAME"),
        Option("--data-root", "where images and containers are", "DIR"),
        Option("--storage-driver", "the driver that they are stored by", "NAME"),
        Option("--storage-opt", "an option of the store; may be repeated", "NAME=VALUE"),
        Option("-f --foreground", "serve in the foreground"),
        Option("-d --debug", "trace every request on stderr; implies -f"),
    ],
    "MOUNTPOINT",
    1,
    1,
    "Examples:\n"
    "  unionfs mount --lower base --upper changes merged\n"
    "  unionfs mount --lower app:debian --upper c --work w merged\n"
    "  unionfs mount --lower 'with\\:colon:base' -r merged\n"
    "  unionfs mount --image debian:12 merged\n"
    "  unionfs mount --driver aufs --branch /fast=rw --branch /slow=ro merged\n"
    "A backslash makes ',' ':' and '\\' part of a name. At most 500 lower directories.\n\n"
    "Options for -o, beside ro, nosuid, nodev, noexec, noatime and the like, and the driver's own:\n"
    + "\n".join(f"  {name:<22} {text}" for name, text in COMMON.items()),
)


def run(parsed: Parsed) -> int:
    if "image" in parsed or "container" in parsed:
        from unionfs.front import container_mount

        return container_mount.run(parsed)
    from unionfs.front import server

    return server.run(configure(parsed))


def configure(parsed: Parsed) -> MountConfig:
    config = MountConfig(os.fsencode(os.path.abspath(parsed.arguments[0])))
    for text in parsed.all("options"):
        apply_options(config, split_options(text))
    lowers = [path for text in parsed.all("lower") for path in split_paths(text)]
    config.lowers += [_absolute(path) for path in lowers]
    if "upper" in parsed:
        config.upper = _absolute(parsed.get("upper"))
    if "work" in parsed:
        config.work = _absolute(parsed.get("work"))
    for text in parsed.all("branch"):
        path, mode = split_branch(text)
        config.branches.append((_absolute(path), mode))
    config.driver = parsed.get("driver", config.driver)
    config.session = parsed.get("session", config.session)
    config.read_only |= "read-only" in parsed
    config.debug |= "debug" in parsed
    config.foreground |= config.debug or "foreground" in parsed
    complete(config)
    return config


def complete(config: MountConfig) -> None:
    """What the command lines have in common: at least one layer, the default work directory, ro without upper."""
    if not config.lowers and not config.branches:
        raise MountError("no layers: give --lower DIR (and --upper DIR to write)", EXIT_LAYER)
    if config.upper is None and not config.branches:
        config.read_only = True
    if config.upper is not None and config.work is None:
        parent, name = os.path.split(config.upper)
        config.work = os.path.join(parent, b"." + name + b".work")


def _absolute(path: str) -> bytes:
    return os.fsencode(os.path.abspath(path))
