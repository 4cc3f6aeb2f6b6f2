"""Why a test may be skipped: the only reasons that CI accepts, one row each. docs/sessions.md lists them.

A test names what it needs with `@pytest.mark.needs("fallocate")`; a target (session or driver) that has that word
in its table skips the test with the reason written here.
"""

from __future__ import annotations

PYFUSE3 = {
    "fallocate": "pyfuse3 has no fallocate handler",
    "lseek": "pyfuse3 has no lseek handler: SEEK_DATA and SEEK_HOLE see no holes",
    "tmpfile": "pyfuse3 has no tmpfile handler",
    "ioctl": "pyfuse3 has no ioctl handler",
    "birth_time": "pyfuse3 has no statx handler",
}

AUFS = {
    "kernel_format": "aufs's own format: the kernel's overlayfs does not read it",
    "spellings": "aufs's whiteouts and marks are .wh. files, no others are read",
    "metacopy": "aufs's format has no copies without data",
    "long_names": "aufs's names are at most 251 bytes long: .wh. goes before them",
}

ROW = {
    "no_xattrs": "row keeps the name of a file's block map in an xattr",
    "whole_copies": "row's upper file holds the redirected blocks only",
    "kernel_format": "a redirected file's bytes are where the block map says: the kernel's overlayfs sees the old ones",
}

PASSTHROUGH = {
    "rootless": "passthrough needs CAP_SYS_ADMIN in the initial user namespace",
}

HOST = {
    "filesystem": "the kernel does not know this filesystem",
    "network": "no package index can be reached",
}

# Oracles are other people's filesystems: they run only by hand (--against), never in CI.
KERNEL = {
    "coherent_fd": "the kernel's overlayfs does not show a later write to a descriptor opened before copy-up",
    "ours": "checks something that only our own mount has",
    "dot_wh": "the kernel's overlayfs knows no .wh. files",
    "spellings": "the kernel's overlayfs reads one xattr namespace at a time",
    "many_lowers": "mount(2) takes one page of options",
    "fine_holes": "the kernel's overlayfs looks for holes once a MiB when it copies up",
    "dir_nlink": "the kernel's overlayfs reports 1 as the link count of a merged directory",
}
FUSE_OVERLAYFS = {
    "coherent_fd": "fuse-overlayfs does not keep descriptors coherent",
    "ours": "checks something that only our own mount has",
}


def accepted() -> set[str]:
    return {reason for table in (PYFUSE3, AUFS, ROW, PASSTHROUGH, HOST) for reason in table.values()}
