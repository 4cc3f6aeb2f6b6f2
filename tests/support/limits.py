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
    "syncfs": "pyfuse3 has no syncfs handler",
    "rename_whiteout": "pyfuse3 refuses rename flags other than NOREPLACE and EXCHANGE",
    "birth_time": "pyfuse3 has no statx handler",
    "default_acl": "pyfuse3 cannot negotiate DONT_MASK and POSIX_ACL",
    "suid_clearing": "pyfuse3 does not pass the kernel's request to drop setuid and setgid on write",
    "noopen": "pyfuse3 cannot answer OPEN with ENOSYS",
}

ROOTLESS = {
    "mknod": "an ordinary user may not make device nodes",
}

HOST = {
    "network": "no package index can be reached",
}

# Oracles are other people's filesystems: they run only by hand (--against), never in CI.
KERNEL = {
    "coherent_fd": "the kernel's overlayfs does not show a later write to a descriptor opened before copy-up",
    "ours": "checks something that only our own mount has",
    "user_metacopy": "the kernel's overlayfs has no metacopy in a user namespace",
    "metacopy_xattr": "the kernel's overlayfs copies data up for setxattr",
}
FUSE_OVERLAYFS = {
    "coherent_fd": "fuse-overlayfs does not keep descriptors coherent",
    "ours": "checks something that only our own mount has",
}


def accepted() -> set[str]:
    return {reason for table in (PYFUSE3, ROOTLESS, HOST) for reason in table.values()}
