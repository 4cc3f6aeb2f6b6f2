"""`unionfs-fuse-overlayfs`: exactly fuse-overlayfs's command line, for engines that call it.

    fuse-overlayfs [-f] [-d] -o lowerdir=A:B,upperdir=C,workdir=W[,...] [SOURCE] MOUNTPOINT

Engines depend on its quirks: empty options, maps that begin with a colon, unknown options (warned about, skipped),
lowers that are symlinks and are unmounted as soon as we return (they are opened before), and on stderr being closed
when we return. Where fuse-overlayfs has an option that means nothing here, a warning names it.
"""

from __future__ import annotations

import os
import sys

from unionfs.api import MountConfig
from unionfs.assemble import load_driver
from unionfs.errors import EXIT_LAYER, EXIT_OK, EXIT_USAGE, MountError
from unionfs.front.options import CHOICES, COMMON, split_options, split_paths, unescape, unquote
from unionfs.session.mount import VFS_WORDS

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable, Container, Sequence

HELP = """\
usage: fuse-overlayfs [options] [source] mountpoint

The fuse-overlayfs command line, served by unionfs.

    -o lowerdir=DIR[:DIR...]     lower directories, topmost first (required)
    -o upperdir=DIR              upper directory; without it the mount is read-only
    -o workdir=DIR               work directory
    -o uidmapping=ID:HOST:LEN... user mapping        -o gidmapping=ID:HOST:LEN... group mapping
    -o squash_to_root            everything belongs to root
    -o squash_to_uid=UID         everything belongs to UID      -o squash_to_gid=GID
    -o xattr_permissions=0|1|2   owners and modes in extended attributes
    -o static_nlink              link count 1 for directories
    -o noacl                     no POSIX ACLs       -o noxattrs=1    no extended attributes at all
    -o timeout=SECONDS           how long the kernel may trust names and attributes
    -o xino=off|auto|on          inode numbers       -o ino32_t       of 32 bits
    -o fsync=0, -o volatile      ignore fsync
    -o writeback=0|1             kernel writeback cache
    -o redirect_dir=on|off       renamed lower directories    -o metacopy=on|off, index=on|off
    -f                           foreground          -d --debug       trace requests, foreground
    -h --help                    this help           -V --version     version
"""

# Options that are handed to the core as they are: name -> what a bare word means (None: it needs a value).
CORE_OPTIONS: dict[str, str | None] = {
    "uidmapping": None,
    "gidmapping": None,
    "squash_to_root": "1",
    "squash_to_uid": None,
    "squash_to_gid": None,
    "static_nlink": "1",
    "noacl": "1",
    "xattr_permissions": None,
    "volatile": "1",
    "noxattrs": "1",
    "timeout": None,
    "redirect_dir": None,
    "metacopy": None,
    "index": None,
    "xino": None,
    "ino32_t": "1",
    "writeback": None,
    "max_threads": None,
    "context": None,
    "log": None,
    "data": None,
    "session": None,
    "default_permissions": "1",
    "allow_other": "1",
}
_NUMBERS = frozenset({"squash_to_uid", "squash_to_gid", "xattr_permissions", "noxattrs", "writeback", "fsync", "sync"})

# fuse-overlayfs's and libfuse's options that change nothing here: name -> why.
_WITHOUT_EFFECT = {
    "threaded": "always threaded",
    "fast_ino": "inode numbers need no check",
    "fast_ino_check": "inode numbers need no check",
    "plugins": "plugins are not supported",
    "allow_root": "only allow_other exists",
    "splice_read": "not used",
    "splice_write": "not used",
    "splice_move": "not used",
    "kernel_cache": "always on",
    "auto_cache": "always on",
    "max_write": "1 MiB",
    "max_read": "1 MiB",
    "max_idle_threads": "see max_threads",
    "clone_fd": "not needed",
    "auto_unmount": "unmount with fusermount3 -u",
    "max_background": "chosen by the session",
    "congestion_threshold": "chosen by the session",
    "big_writes": "always on",
    "async_read": "always on",
    "sync_read": "reads are asynchronous",
}
# What engines send as a matter of course and what has an obvious meaning: not worth a line each time.
_SILENT = frozenset({"defaults", "nonempty", "private", "rprivate", "shared", "rshared", "slave", "rslave", "threaded"})


def main() -> int:
    from unionfs.front.cli import guarded

    return guarded(lambda: run(sys.argv[1:]))


def run(argv: Sequence[str]) -> int:
    if "-h" in argv or "--help" in argv:
        print(HELP, end="")
        return EXIT_OK
    if "-V" in argv or "--version" in argv:
        from unionfs import __version__

        print(f"fuse-overlayfs: version {__version__} (unionfs)\nFUSE protocol spoken directly")
        return EXIT_OK
    from unionfs.front import server

    config = configure(argv, _warn)
    drop_unknown(config, load_driver(config.driver).options, _warn)
    return server.run(config)


def _warn(text: str) -> None:
    print(f"unionfs: {text}", file=sys.stderr)


def configure(argv: Sequence[str], warn: Callable[[str], None]) -> MountConfig:
    config = MountConfig(b"")
    config.source = "fuse-overlayfs"
    config.options = {"subtype": "fuse-overlayfs", "nonempty": ""}
    if os.geteuid() != 0:
        config.vfs_options = ["noatime"]
    else:
        config.vfs_options = ["suid", "noatime"]
    if "FUSE_OVERLAYFS_DEBUG_LOG" in os.environ:
        config.options["log"] = os.environ["FUSE_OVERLAYFS_DEBUG_LOG"]
    for name in ("FUSE_OVERLAYFS_DISABLE_OVL_WHITEOUT", "FUSE_OVERLAYFS_NO_PASSTHROUGH"):
        if name in os.environ:
            warn(f"environment variable ignored: {name}")
    words: list[str] = []
    arguments: list[str] = []
    position = 0
    while position < len(argv):
        word = argv[position]
        position += 1
        if word == "-f":
            config.foreground = True
        elif word in ("-d", "--debug"):
            config.debug = config.foreground = True
        elif word == "-s":
            warn("option ignored: -s (always threaded)")
        elif word.startswith("-o"):
            text = word[2:]
            if not text:
                if position == len(argv):
                    raise MountError("missing argument for -o", EXIT_USAGE)
                text = argv[position]
                position += 1
            words += split_options(text)
        elif word.startswith("-") and word != "-":
            warn(f"unknown argument ignored: {word}")
        else:
            arguments.append(word)
    for word in words:
        _apply(config, word, warn)
    _finish(config, arguments)
    return config


def drop_unknown(config: MountConfig, known: Container[str], warn: Callable[[str], None]) -> None:
    """An option that fuse-overlayfs has and the driver doesn't is no reason for an engine to fail."""
    for name in list(config.options):
        if name not in known and name not in COMMON:
            value = config.options.pop(name)
            warn(f"option ignored: {name}={value} (driver {config.driver} has no such option)")


def _apply(config: MountConfig, word: str, warn: Callable[[str], None]) -> None:
    name, has_value, value = word.partition("=")
    value = unquote(value)
    if name == "lowerdir":
        config.lowers = [_layer(path) for path in split_paths(value)]
    elif name == "upperdir":
        config.upper = _absolute(unescape(value)) if value else None
    elif name == "workdir":
        config.work = _absolute(unescape(value)) if value else None
    elif name in CORE_OPTIONS:
        _apply_core(config, name, value if has_value else CORE_OPTIONS[name], word)
    elif name in ("fsync", "sync") and has_value:
        config.options["volatile"] = "0" if _number(name, value) else "1"
    elif name in VFS_WORDS and not has_value:
        if name in ("ro", "rw"):
            config.read_only = name == "ro"
        config.vfs_options.append(name)
    elif name == "debug":
        config.debug = config.foreground = True
    elif name == "fsname":
        config.source = unescape(value)
    elif name == "subtype":
        config.options["subtype"] = value
    elif name in _SILENT or name.startswith(("x-", "X-", "comment")):
        pass
    elif name in _WITHOUT_EFFECT:
        warn(f"option ignored: {word} ({_WITHOUT_EFFECT[name]})")
    else:
        warn(f"unknown argument ignored: {word}")


def _apply_core(config: MountConfig, name: str, value: str | None, word: str) -> None:
    if value is None:
        raise MountError(f"-o {word} needs a value: {name}=...", EXIT_USAGE)
    if name in _NUMBERS:
        number = _number(name, value)
        if name == "noxattrs" and not number:
            config.options.pop(name, None)
            return
    elif name in ("uidmapping", "gidmapping"):
        value = _mapping(name, value)
    elif name in ("data", "session"):
        if value not in CHOICES[name]:
            raise MountError(f"-o {name}={value}: it is one of {', '.join(CHOICES[name])}", EXIT_USAGE)
        setattr(config, name, value)
        return
    config.options[name] = value


def _number(name: str, value: str) -> int:
    try:
        return int(value)
    except ValueError:
        raise MountError(f"-o {name}={value}: not a number", EXIT_USAGE) from None


def _mapping(name: str, value: str) -> str:
    """ID:HOST:LEN triples. Engines send a leading colon; empty parts are nothing."""
    parts = [part for part in value.split(":") if part]
    if len(parts) % 3 or not all(part.isdigit() for part in parts):
        raise MountError(f"invalid mapping specified: {name}={value}: it is ID:MAPPED:LEN, repeated", EXIT_USAGE)
    return ":".join(parts)


def _layer(path: str) -> bytes:
    if path.startswith("//"):
        raise MountError(f"lowerdir {path}: fuse-overlayfs plugins are not supported", EXIT_LAYER)
    return _absolute(path)


def _absolute(path: str) -> bytes:
    return os.fsencode(os.path.abspath(path))


def _finish(config: MountConfig, arguments: Sequence[str]) -> None:
    if not config.lowers:
        raise MountError("no lowerdir specified: -o lowerdir=DIR[:DIR...]", EXIT_USAGE)
    if not arguments:
        raise MountError("no mountpoint specified", EXIT_USAGE)
    config.mountpoint = _absolute(arguments[-1])  # `SOURCE MOUNTPOINT` from mount.fuse(8): the last one counts
    if config.upper is None:
        config.read_only = True
    elif config.work is None:
        raise MountError("workdir not specified: -o workdir=DIR", EXIT_USAGE)
