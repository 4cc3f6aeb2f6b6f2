"""Options of the aufs driver, as aufs(5) has them: what works, what is taken and means nothing here, what is refused.

Refused is what would promise something that is not so, by name and with the reason. docs/aufs.md is the table for
people.
"""

from __future__ import annotations

from unionfs.core.idmap import OPTIONS as COMMON
from unionfs.errors import EXIT_USAGE, MountError, nearest

UDBA = ("none", "reval", "notify")
UDBA_NEVER_WITH = {
    "guard": "a successor of the server would not know what its predecessor has seen",
    "writeback": "the kernel takes its own size and times of a file for the right ones then",
}
DIROPQ = {"always": True, "a": True, "whiteouted": False, "w": False}

WORKING = {
    "br": "br:PATH=rw:PATH=ro+wh…: the branches, topmost first (also br=, dirs=)",
    "create": "tdp|tdmfs:LOW|rr|mfs|mfsrr:LOW|pmfs|pmfsrr:LOW[:SECONDS]: the branch for new files (default tdp)",
    "cpup": "tdp|bup|bu: the branch for copies of files of read-only branches (default tdp)",
    "moveonenospc": "on|off: a file on a full branch moves to another one when more is written (default off)",
    "udba": "none|reval|notify: changes made directly in a branch are seen never, when next looked at, or at once",
    "shwh": "show whiteouts (read-only mounts)",
    "sum": "free space is that of all branches together",
    "wsum": "free space is that of the writable branches together",
    "xino": "inode numbers survive copy-up and remount (default)",
    "noxino": "they need not: nothing is noted on copies",
    "plink": "hard links stay linked over copy-up (default)",
    "noplink": "a copied-up hard link becomes a file of its own",
    "dirren": "rename directories of lower branches by a redirect, noted in an xattr (else EXDEV)",
    "diropq": "always|whiteouted: when a new directory is marked opaque (default whiteouted)",
    "warn_perm": "say which branches' roots have another owner or mode than the topmost's",
    "volatile": "sync nothing: fast, and lost in a power cut",
}
# aufs's other names for the same
ALIASES = {"create_policy": "create", "cpup_policy": "cpup", "copyup": "cpup", "copyup_policy": "cpup"}
DEFAULTS = {name: "the default" for name in ("nosum", "noshwh", "nodirren", "nowarn_perm")}
NUMBERS = {
    "dirwh": "N, accepted: a removed directory goes in one step, however many whiteouts it holds",
    "rdcache": "N, accepted: listings are cached until something changes",
    "rdblk": "N, accepted, no effect",
    "rdhash": "N, accepted, no effect",
}
ALWAYS = {
    "dirperm1": "accepted: only the topmost directory's permissions count, always",
    "dio": "accepted: direct I/O always works",
    "acl": "accepted: ACLs are kept (see noacl)",
    "notrunc_xib": "accepted: there is no table file",
    "verbose": "accepted, no effect",
    "quiet": "accepted, no effect",
}
REFUSED = {
    "nodirperm1": "permissions of directories in lower branches are not asked for, ever",
    "nodio": "direct I/O can't be turned off",
    "trunc_xib": "inode numbers are kept in xattrs of the copies, there is no table file to truncate",
    "itrunc_xino": "inode numbers are kept in xattrs of the copies, there is no table file to truncate",
    "clean_plink": "hard links become real ones by themselves, when the mount ends",
    "coo": "a file is copied up by its first write, never by an open",
    "fhsm_sec": "there is no daemon that moves files between branches",
}
OPTIONS = {
    **WORKING, **DEFAULTS, **NUMBERS, **ALWAYS, **COMMON,
    **{name: f"the same as {of}" for name, of in ALIASES.items()},
    **{name: f"refused: {reason}" for name, reason in REFUSED.items()},
}  # fmt: skip


def settle(options: dict[str, str]) -> None:
    """Check what has nothing to do with branches, and put other names of an option under its own. MountError."""
    for name in [name for name in options if name in ALIASES]:
        own = ALIASES[name]
        if own in options:
            raise MountError(f"{name} and {own} are the same option: give one of them", EXIT_USAGE)
        options[own] = options.pop(name)
    for name, value in options.items():
        if name in REFUSED:
            raise MountError(f"{name}: not supported: {REFUSED[name]}; leave it out", EXIT_USAGE)
        if name in NUMBERS and not value.isdigit() and value != "def":
            raise MountError(f"{name}={value}: not a number", EXIT_USAGE)
    if options.get("xino"):
        raise MountError(
            f"xino={options['xino']}: inode numbers are kept in xattrs of the copies, there is no table file; "
            "give xino without a path, or noxino",
            EXIT_USAGE,
        )
    if options.get("diropq", "whiteouted") not in DIROPQ:
        raise MountError(f"diropq={options['diropq']}: must be always or whiteouted", EXIT_USAGE)
    udba = options.get("udba", "none")
    if udba not in UDBA:
        raise MountError(f"udba={udba}: unknown{nearest(udba, UDBA)}; one of {', '.join(UDBA)}", EXIT_USAGE)
    for name, why in UDBA_NEVER_WITH.items():
        if udba != "none" and options.get(name, "off") not in ("off", "0"):
            raise MountError(f"udba={udba}: not with {name}: {why}; leave one of them out", EXIT_USAGE)
