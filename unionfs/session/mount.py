"""How a /dev/fuse connection gets onto a directory, and off it again.

Root, and root of a user namespace, call mount(2) and umount2(2); everybody else goes through fusermount3, which
hands the device descriptor back over a socket. Knows nothing of layers, serves no request, keeps no state.
Any thread. Raises `MountError` with what is wrong and what to do.

`_socket` and `posix_spawn` instead of `socket` and `subprocess`: 11 and 9 ms of imports, on a path of 45 ms.
"""

from __future__ import annotations

import ctypes
import errno
import os
import time

from unionfs.errors import (
    EXIT_FAILURE,
    EXIT_MOUNTPOINT,
    EXIT_NO_FUSE,
    EXIT_NOT_OURS,
    EXIT_PERMISSION,
    MountError,
)

TYPE_CHECKING = False
if TYPE_CHECKING:
    from unionfs.api import MountConfig

DEVICE = "/dev/fuse"

# Words that mount(2) takes as flags (include/uapi/linux/mount.h): word -> bits to set, bits to clear.
VFS_WORDS: dict[str, tuple[int, int]] = {
    "ro": (1, 0),
    "rw": (0, 1),
    "nosuid": (2, 0),
    "suid": (0, 2),
    "nodev": (4, 0),
    "dev": (0, 4),
    "noexec": (8, 0),
    "exec": (0, 8),
    "sync": (16, 0),
    "async": (0, 16),
    "mand": (64, 0),
    "nomand": (0, 64),
    "dirsync": (128, 0),
    "nosymfollow": (256, 0),
    "symfollow": (0, 256),
    "noatime": (1024, 0),
    "atime": (0, 1024),
    "nodiratime": (2048, 0),
    "diratime": (0, 2048),
    "relatime": (1 << 21, 0),
    "norelatime": (0, 1 << 21),
    "strictatime": (1 << 24, 0),
    "nostrictatime": (0, 1 << 24),
    "lazytime": (1 << 25, 0),
    "nolazytime": (0, 1 << 25),
}
# What fusermount3 knows of them; the rest is silently the kernel's default there (it refuses unknown words).
_HELPER_WORDS = frozenset(VFS_WORDS) - {"mand", "nomand", "relatime", "strictatime", "lazytime", "nolazytime"}
_PRIVILEGED_WORDS = frozenset({"suid", "dev"})  # fusermount3 warns about each from a user who isn't root

MS_POSIXACL = 1 << 16  # the kernel's fuse takes it as DONT_MASK, and for nothing else
MNT_DETACH = 2
UMOUNT_NOFOLLOW = 8

_libc = ctypes.CDLL(None, use_errno=True)
_libc.mount.argtypes = [ctypes.c_char_p, ctypes.c_char_p, ctypes.c_char_p, ctypes.c_ulong, ctypes.c_char_p]
_libc.umount2.argtypes = [ctypes.c_char_p, ctypes.c_int]


def filesystem_type(config: MountConfig) -> str:
    return "fuse." + config.options.get("subtype", "unionfs")


def attach(config: MountConfig, *, leave_umask: bool = False) -> int:
    """Mounts an unserved connection on `config.mountpoint` and returns its device descriptor.

    `leave_umask`: for a server that can't ask for DONT_MASK in its INIT reply. fusermount3 can't pass that on.
    """
    if os.geteuid() != 0:
        return _attach_through_helper(config)
    fd = _open_device()
    try:
        _mount_directly(fd, config, MS_POSIXACL if leave_umask else 0)
        return fd
    except PermissionError as error:
        os.close(fd)
        # Root without CAP_SYS_ADMIN (a plain container). A set-uid helper may still be allowed to.
        if find_helper() is None:
            raise MountError(
                f"cannot mount on {show(config.mountpoint)}: {error.strerror}: root here lacks CAP_SYS_ADMIN; "
                "run with it (podman: --cap-add SYS_ADMIN), or in a user namespace: unshare -Urm",
                EXIT_PERMISSION,
            ) from None
        return _attach_through_helper(config)
    except BaseException:
        os.close(fd)
        raise


def detach(mountpoint: bytes, *, lazy: bool = False) -> None:
    """Unmounts. OSError(EBUSY) while files on it are open, unless lazy; MountError for what won't change by waiting."""
    if _libc.umount2(mountpoint, UMOUNT_NOFOLLOW | (MNT_DETACH if lazy else 0)) == 0:
        return
    code = ctypes.get_errno()
    if code == errno.EBUSY:
        raise OSError(code, os.strerror(code))
    if code in (errno.EINVAL, errno.ENOENT):
        raise MountError(f"{show(mountpoint)} is not mounted", EXIT_NOT_OURS)
    if code not in (errno.EPERM, errno.EACCES):
        raise MountError(f"cannot unmount {show(mountpoint)}: {os.strerror(code)}", EXIT_FAILURE)
    helper = find_helper()
    if helper is None:
        raise MountError(
            f"cannot unmount {show(mountpoint)}: not allowed, and there is no fusermount3: install the package fuse3",
            EXIT_NO_FUSE,
        )
    argv = [helper, "-u", *(["-z"] if lazy else []), "--", os.fsdecode(mountpoint)]
    status, said = _run(argv, dict(os.environ))
    if status == 0:
        return
    if "busy" in said.lower():
        raise OSError(errno.EBUSY, said)
    if "not found in" in said or "not mounted" in said:
        raise MountError(f"cannot unmount {show(mountpoint)}: no mount of yours: {said}", EXIT_PERMISSION)
    raise MountError(f"cannot unmount {show(mountpoint)}: {said or 'fusermount3 failed'}", EXIT_PERMISSION)


def detach_patiently(mountpoint: bytes, grace: float) -> bool:
    """Unmounts, trying for `grace` seconds while it is busy, then lazily. True if it was never busy to the end."""
    deadline = time.monotonic() + grace
    while True:
        try:
            detach(mountpoint)
            return True
        except OSError:
            if time.monotonic() >= deadline:
                detach(mountpoint, lazy=True)
                return False
            time.sleep(0.05)


def find_helper() -> str | None:
    """Path of fusermount3. mount(8) empties PATH, so the usual directories count too."""
    for directory in [*os.environ.get("PATH", "").split(":"), "/usr/bin", "/bin", "/usr/local/bin", "/sbin"]:
        path = os.path.join(directory, "fusermount3")
        if directory and os.access(path, os.X_OK):
            return path
    return None


def _open_device() -> int:
    try:
        return os.open(DEVICE, os.O_RDWR | os.O_CLOEXEC)
    except OSError as error:
        if error.errno in (errno.EACCES, errno.EPERM):
            raise MountError(
                f"{DEVICE}: {error.strerror}: make it mode 666, or give the container the device "
                "(podman: --device /dev/fuse)",
                EXIT_PERMISSION,
            ) from None
        raise MountError(
            f"{DEVICE}: {error.strerror}: load the kernel's fuse module (modprobe fuse), or give the container "
            "the device (podman: --device /dev/fuse)",
            EXIT_NO_FUSE,
        ) from None


def _mount_directly(fd: int, config: MountConfig, flags: int) -> None:
    for word in config.vfs_options:
        bits, cleared = VFS_WORDS[word]
        flags = flags & ~cleared | bits
    if config.read_only:
        flags |= 1
    data = [f"fd={fd},rootmode=40000,user_id={os.geteuid()},group_id={os.getegid()},allow_other"]
    data += _kernel_words(config)
    text = os.fsencode(",".join(data))
    fstype = filesystem_type(config).encode()
    if _libc.mount(os.fsencode(config.source), config.mountpoint, fstype, flags, text) == 0:
        return
    code = ctypes.get_errno()
    where, why = show(config.mountpoint), os.strerror(code)
    if code in (errno.EPERM, errno.EACCES):
        raise PermissionError(code, why)
    if code == errno.ENODEV:
        raise MountError(f"cannot mount on {where}: this kernel has no fuse: modprobe fuse", EXIT_NO_FUSE)
    if code in (errno.ENOENT, errno.ENOTDIR, errno.ELOOP, errno.EBUSY):
        raise MountError(f"cannot mount on {where}: {why}", EXIT_MOUNTPOINT)
    raise MountError(f"cannot mount on {where}: {why} (options {os.fsdecode(text)})", EXIT_FAILURE)


def _kernel_words(config: MountConfig) -> list[str]:
    words = []
    if config.options.get("default_permissions", "") not in ("0", "off"):
        words.append("default_permissions")
    # The kernel refuses context= where SELinux isn't running, and engines send it regardless.
    if "context" in config.options and os.path.exists("/sys/fs/selinux/enforce"):
        words.append(f'context="{config.options["context"]}"')
    return words


def _attach_through_helper(config: MountConfig) -> int:
    import _socket

    helper = find_helper()
    if helper is None:
        raise MountError(
            "mounting without root needs fusermount3: install the package fuse3, or mount in a user namespace: "
            "unshare -Urm",
            EXIT_NO_FUSE,
        )
    if not os.path.exists(DEVICE):
        os.close(_open_device())  # says what is missing better than fusermount3 does
    words = [w for w in config.vfs_options if w in _HELPER_WORDS and w not in _PRIVILEGED_WORDS]
    if config.read_only:
        words.append("ro")
    words += _kernel_words(config)
    if "allow_other" in config.options:
        words.append("allow_other")
    words.append("fsname=" + _escape(config.source))
    words.append("subtype=" + filesystem_type(config).removeprefix("fuse."))

    ours, theirs = _socket.socketpair(_socket.AF_UNIX, _socket.SOCK_STREAM)
    try:
        os.set_inheritable(theirs.fileno(), True)
        argv = [helper, "-o", ",".join(words), "--", os.fsdecode(config.mountpoint)]
        status, said = _run(argv, {**os.environ, "_FUSE_COMMFD": str(theirs.fileno())})
        theirs.close()
        if status != 0:
            raise _helper_error(config.mountpoint, said)
        _, ancillary, _, _ = ours.recvmsg(1, _socket.CMSG_SPACE(4))
        for level, kind, payload in ancillary:
            if level == _socket.SOL_SOCKET and kind == _socket.SCM_RIGHTS:
                fd = int.from_bytes(payload[:4], "little")
                os.set_inheritable(fd, False)
                return fd
        raise MountError(f"fusermount3 mounted {show(config.mountpoint)} but sent no descriptor", EXIT_FAILURE)
    finally:
        ours.close()
        theirs.close()


# What fusermount3 says, what to do about it, and the exit code: the first that fits.
_HELPER_SAYS = (
    ("user_allow_other", "put user_allow_other into /etc/fuse.conf, or leave out allow_other", EXIT_PERMISSION),
    ("could not determine username", "give the user an entry in /etc/passwd", EXIT_PERMISSION),
    ("no write access", "mount on a directory of your own", EXIT_PERMISSION),
    ("mounting over filesystem type", "mount on a directory of an ordinary file system", EXIT_MOUNTPOINT),
    ("too many FUSE filesystems", "unmount some, or raise mount_max in /etc/fuse.conf", EXIT_FAILURE),
    ("fuse device not found", "modprobe fuse", EXIT_NO_FUSE),
    ("Operation not permitted", "fusermount3 must be set-uid root, or mount in a user namespace: unshare -Urm",
     EXIT_PERMISSION),
    ("Permission denied", "check the owner and mode of it and of /dev/fuse", EXIT_PERMISSION),
    ("bad mount point", "", EXIT_MOUNTPOINT),
)  # fmt: skip


def _helper_error(mountpoint: bytes, said: str) -> MountError:
    for words, advice, code in _HELPER_SAYS:
        if words in said:
            return MountError(f"cannot mount on {show(mountpoint)}: {said}" + (advice and f": {advice}"), code)
    return MountError(f"cannot mount on {show(mountpoint)}: {said or 'fusermount3 failed'}", EXIT_FAILURE)


def _run(argv: list[str], environment: dict[str, str]) -> tuple[int, str]:
    """Runs a helper; its exit status and what it said on stderr, as one line without its name."""
    reader, writer = os.pipe()
    actions = [(os.POSIX_SPAWN_DUP2, writer, 2), (os.POSIX_SPAWN_OPEN, 1, "/dev/null", os.O_WRONLY, 0)]
    try:
        pid = os.posix_spawn(argv[0], argv, environment, file_actions=actions)
    finally:
        os.close(writer)
    with open(reader, encoding="utf-8", errors="replace") as stream:
        lines = [line.strip().removeprefix(f"{argv[0]}: ") for line in stream]
    _, status = os.waitpid(pid, 0)
    return os.waitstatus_to_exitcode(status), "; ".join(line for line in lines if line)


def _escape(value: str) -> str:
    return value.replace("\\", "\\\\").replace(",", "\\,")


def show(path: bytes) -> str:
    """A path as one line of a message: whatever can't be printed is escaped."""
    text = path.decode("utf-8", "backslashreplace")
    return text if text.isprintable() else "".join(c if c.isprintable() else ascii(c)[1:-1] for c in text)
