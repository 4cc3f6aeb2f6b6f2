r"""The `-o` language: splitting, escaping, and the table of words that every mount knows.

Options are separated by commas, path lists by colons. A backslash before `,` `:` or `\` makes it part of the name
(any other backslash is itself). A value that begins with a double quote reaches to the quote before the next comma:
`context="a:b:c1,c2"`. Empty options are nothing. Pure functions, no I/O.
"""

from __future__ import annotations

from unionfs.errors import EXIT_LAYER, EXIT_USAGE, MountError, nearest
from unionfs.session.mount import VFS_WORDS

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Iterable

    from unionfs.api import MountConfig

MAX_LAYERS = 500  # as the engines and the kernel have it

# Words that any driver takes, beside its own `options` table and the flags of mount(2).
COMMON: dict[str, str] = {
    "lowerdir": "lower directories, topmost first, separated by colons",
    "upperdir": "the writable directory",
    "workdir": "scratch directory on the file system of upperdir (default: a hidden sibling of it)",
    "driver": "on-disk format: overlay, aufs, row, vfs or an installed one",
    "session": "transport: auto, direct or pyfuse3",
    "data": "data path of the direct session: auto, noopen, cached or passthrough",
    "writeback": "kernel writeback cache: 1 or 0",
    "timeout": "seconds that the kernel may trust names and attributes",
    "log": "file that the server's messages go to",
    "debug": "trace every request, stay in the foreground",
    "allow_other": "other users may use the mount (root: always)",
    "default_permissions": "the kernel checks permissions (default; 0: it does not)",
    "max_threads": "threads for requests that wait",
    "guard": "on: the mount outlives a killed server (default off)",
    "guard_deadline": "seconds without progress after which a guarded server is replaced (default 10)",
    "nonempty": "the mountpoint's own files may be hidden",
    "context": "SELinux context of the mount",
    "fsname": "first field of /proc/mounts",
    "subtype": "file system type of /proc/mounts, after fuse.",
}
CHOICES: dict[str, tuple[str, ...]] = {
    "session": ("auto", "direct", "pyfuse3"),
    "data": ("auto", "noopen", "cached", "passthrough"),
}
# What mount(8), systemd and mount.fuse(8) leave in the list for themselves.
_IGNORED = frozenset(
    ("defaults", "auto", "noauto", "user", "nouser", "users", "owner", "group", "nofail", "_netdev", "silent", "loud")
)


def split_options(text: str) -> list[str]:
    """Cuts at commas that are neither escaped nor quoted. Escapes stay in place: the value decides about them."""
    if '"' not in text and "\\" not in text:
        return [word for word in text.split(",") if word]
    words: list[str] = []
    start = position = 0
    while position < len(text):
        char = text[position]
        if char == "\\":
            position += 2
            continue
        if char == '"' and text[position - 1 : position] == "=":
            closing = _closing_quote(text, position)
            if closing >= 0:
                position = closing
        elif char == ",":
            words.append(text[start:position])
            start = position + 1
        position += 1
    words.append(text[start:])
    return [word for word in words if word]


def _closing_quote(text: str, opening: int) -> int:
    closing = text.find('"', opening + 1)
    while closing >= 0 and text[closing + 1 : closing + 2] not in ("", ","):
        closing = text.find('"', closing + 1)
    return closing


def unquote(value: str) -> str:
    return value[1:-1] if len(value) >= 2 and value[0] == value[-1] == '"' else value


def unescape(text: str) -> str:
    if "\\" not in text:
        return text
    out: list[str] = []
    position = 0
    while position < len(text):
        if text[position] == "\\" and text[position + 1 : position + 2] in (",", ":", "\\"):
            position += 1
        out.append(text[position : position + 1])
        position += 1
    return "".join(out)


def escape(path: str) -> str:
    """The inverse of `unescape`, for one path within a list within an option."""
    return path.replace("\\", "\\\\").replace(",", "\\,").replace(":", "\\:")


def split_paths(text: str) -> list[str]:
    """A colon-separated list of paths, unescaped. Empty ones are nothing."""
    if "\\" not in text:
        return [part for part in text.split(":") if part]
    parts: list[str] = []
    start = position = 0
    while position < len(text):
        if text[position] == "\\":
            position += 2
            continue
        if text[position] == ":":
            parts.append(text[start:position])
            start = position + 1
        position += 1
    parts.append(text[start:])
    return [unescape(part) for part in parts if part]


def split_branch(text: str) -> tuple[str, str]:
    """PATH=rw, PATH=ro+wh...: the path and the permission ("" for none; a path may itself hold a "=")."""
    path, equals, mode = text.rpartition("=")
    if equals and "/" not in mode:
        return unescape(path), mode
    return unescape(text), ""


def split_branches(text: str) -> list[tuple[str, str]]:
    """aufs's colon-separated list of branches."""
    return [split_branch(escape(part)) for part in split_paths(text)]


def is_for_others(word: str) -> bool:
    """True for what mount(8), fstab and systemd keep in an option list for themselves."""
    return word in _IGNORED or word.startswith(("x-", "X-", "comment="))


def apply_options(config: MountConfig, words: Iterable[str]) -> None:
    """Puts `-o` words into `config`; unknown ones land in `options` for `check_options` to judge."""
    from os import fsencode
    from os.path import abspath

    for word in words:
        name, has_value, value = word.partition("=")
        if not has_value and name in VFS_WORDS:
            config.vfs_options.append(name)
            if name in ("ro", "rw"):
                config.read_only = name == "ro"
        elif name == "lowerdir":
            config.lowers += [fsencode(abspath(path)) for path in split_paths(value)]
        elif name == "upperdir":
            config.upper = fsencode(abspath(unescape(value))) if value else None
        elif name == "workdir":
            config.work = fsencode(abspath(unescape(value))) if value else None
        elif word.startswith(("br:", "br=", "dirs=")):
            listed = split_branches(word[3:] if word.startswith("br") else value)
            config.branches += [(fsencode(abspath(path)), mode) for path, mode in listed]
        elif name == "driver":
            config.driver = value
        elif name in CHOICES:
            if value not in CHOICES[name]:
                raise MountError(f"-o {name}= is one of {', '.join(CHOICES[name])}, not {value!r}", EXIT_USAGE)
            setattr(config, name, value)
        elif name == "debug":
            config.debug = config.foreground = True
        elif name == "fsname":
            config.source = unescape(value)
        elif not is_for_others(word):
            config.options[name] = unquote(unescape(value))


def check_options(config: MountConfig, driver_options: Iterable[str]) -> None:
    """MountError for an option that neither the common table nor the driver knows, or for too many layers."""
    known = {*COMMON, *driver_options}
    for name in config.options:
        if name not in known:
            hint = nearest(name, sorted(known | set(VFS_WORDS)))
            raise MountError(f"unknown option -o {name}{hint} (driver {config.driver})", EXIT_USAGE)
    if config.branches and "br" not in known:
        raise MountError(
            f"branches: driver {config.driver} has none: give --lower and --upper, or --driver aufs", EXIT_USAGE
        )
    if len(config.lowers) > MAX_LAYERS:
        raise MountError(f"{len(config.lowers)} lower directories: the limit is {MAX_LAYERS}", EXIT_LAYER)
