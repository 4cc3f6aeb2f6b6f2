"""The command `unionfs`: finds the subcommand, prints what failed in one line, returns its exit code.

A subcommand is a module with `COMMAND` (its table) and `run(parsed) -> exit code`, imported when it is called.
"""

from __future__ import annotations

import sys

from unionfs.errors import EXIT_FAILURE, EXIT_OK, EXIT_USAGE, MountError, nearest

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

# name -> module under unionfs.front, one line for the overview.
COMMANDS: dict[str, tuple[str, str]] = {
    "mount": ("mount", "combine directories into one"),
    "umount": ("umount", "unmount, and wait until all is written and the server is gone"),
    "list": ("inspect_list", "what is mounted"),
    "status": ("inspect_status", "layers, caches and counters of a mount"),
    "which": ("inspect_which", "which layer a path comes from"),
    "diff": ("diff", "what was added, changed and deleted; as an OCI layer too"),
    "upgrade": ("upgrade", "replace the server of a guarded mount by the code on disk, without unmounting"),
    "branch": ("branch", "add, change or take away branches of a mounted union"),
    "snapshot": ("snapshot", "snapshots of a row mount: take, list, roll back, clone, compare, send"),
    "row": ("row", "make an upper of the row driver a plain one, or draw a block map of it"),
    "fsck": ("fsck", "check the block maps of an upper that the row driver wrote"),
    "image": ("image", "bring images in: OCI layouts, docker save archives, plain tars"),
    "images": ("images", "what images there are"),
    "rmi": ("image_rmi", "remove images"),
    "history": ("image_history", "the steps that an image was made in"),
    "save": ("image_save", "write an image as an OCI layout"),
    "create": ("container_create", "make a container: a writable layer on an image"),
    "ps": ("container_ps", "what containers there are"),
    "commit": ("container_commit", "make an image of a container"),
    "export": ("container_export", "a container's tree or changes as a tar"),
    "rm": ("container_rm", "remove containers"),
    "daemon": ("daemon", "serve layers, images and containers over a REST API"),
    "certs": ("certs", "make certificates for the daemon and its clients"),
    "info": ("info", "what a daemon keeps, and how"),
    "version": ("version", "versions of this client and of the daemon"),
    "plugin": ("plugin", "serve Docker or containerd"),
    "setup": ("setup", "tell podman, Docker or containerd to use unionfs"),
    "completion": ("completion", "completion script for a shell"),
}

EXIT_CODES = """\
Exit codes: 0 done; 1 failure; 2 wrong usage, unknown option or driver; 3 a layer is missing, overlaps or is unfit;
4 upper or work is in use; 5 mountpoint unfit; 6 not allowed; 7 no /dev/fuse or fusermount3;
8 upper of another format; 9 not a unionfs mount."""


def main(argv: Sequence[str] | None = None) -> int:
    return guarded(lambda: dispatch(sys.argv[1:] if argv is None else argv))


def guarded(action: Callable[[], int]) -> int:
    """Runs a command line: whatever it raises becomes one line on stderr and an exit code."""
    try:
        code = action()
        sys.stdout.flush()
        return code
    except MountError as error:
        print(f"unionfs: {error}", file=sys.stderr)
        return error.code
    except BrokenPipeError:  # the reader of our output has seen enough
        sys.stdout = open("/dev/null", "w")  # or the interpreter complains while it exits
        return EXIT_OK
    except OSError as error:
        print(f"unionfs: {error}", file=sys.stderr)
        return EXIT_FAILURE
    except KeyboardInterrupt:
        return 130


def dispatch(argv: Sequence[str]) -> int:
    if argv and argv[0].startswith(("-H", "--host", "--tls")):
        from unionfs.front.client import take_target

        argv = take_target(argv)
    name = argv[0] if argv else ""
    if name in COMMANDS:
        from importlib import import_module

        from unionfs.front.args import help_text, parse

        module = import_module("unionfs.front." + COMMANDS[name][0])
        parsed = parse(module.COMMAND, argv[1:])
        if "help" in parsed:
            print(help_text(module.COMMAND), end="")
            return EXIT_OK
        result: int = module.run(parsed)
        return result
    if name in ("-h", "--help", "help"):
        print(overview(), end="")
        return EXIT_OK
    if name in ("-V", "--version"):
        from unionfs import __version__

        print(f"unionfs {__version__}")
        return EXIT_OK
    if "-o" in argv and len(argv) >= 2 and not name.startswith("-"):
        # mount.fuse(8) runs `unionfs SOURCE MOUNTPOINT -o OPTIONS`.
        from unionfs.front.mount_helper import mount

        return mount(argv)
    if not name:
        raise MountError("no command given: unionfs --help", EXIT_USAGE)
    raise MountError(f"unknown command {name}{nearest(name, list(COMMANDS))}: unionfs --help", EXIT_USAGE)


def overview() -> str:
    rows = "\n".join(f"  {name:<12} {summary}" for name, (_, summary) in COMMANDS.items())
    return f"""usage: unionfs COMMAND [OPTIONS] ...

A union filesystem in user space: several directories as one, writes kept apart.

Commands (each has --help):
{rows}

  unionfs mount --lower base:more --upper changes merged
  unionfs which merged/etc/passwd
  unionfs umount merged

Those that ask a daemon take it before the command: unionfs -H tcp://build:2376 --tlsverify info; or from UNIONFS_HOST,
UNIONFS_TLS_VERIFY, UNIONFS_CERT_PATH.

{EXIT_CODES}
"""
