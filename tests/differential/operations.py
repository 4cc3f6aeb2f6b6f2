"""What a sequence may consist of: hypothesis strategies for operations as plain tuples (verb, uid, arguments...).

Names come from a small pool, so that operations meet on the same objects; most exist in every layer set
(see layers.py), some in none. A name begins with "./", which is how the executor tells names from other arguments.
"""

from __future__ import annotations

import os
from typing import Any

from hypothesis import strategies as st

from .layers import ACL_DEFAULT, ACL_NAMED, CAPABILITY, SETS, USER

FILES = [
    "./low", "./mid", "./top", "./empty", "./suid", "./capable", "./attrs", "./sparse", "./h1", "./h2", "./d/h3",
    "./d/low", "./d/mid", "./d/top", "./d/sub/other", "./private/own", "./sticky/roots", "./o/new",
]  # fmt: skip
DIRECTORIES = [
    "./d", "./d/sub", "./d/sub/deep", "./e", "./o", "./w", "./private", "./sticky", "./setgid", "./acl", "./was_file"
]
ODD = ["./link", "./dlink", "./dangling", "./fifo", "./null", "./gone", "./was_dir", "./w/a", "./o/old"]
NEW = [
    "./n1", "./n2", "./d/n1", "./e/n1", "./o/n1", "./n1/a", "./n2/low", "./d/sub/n1", "./sticky/n1", "./setgid/n1",
    "./acl/n1", "./acl/n1/a", "./dlink/n1", "./n2/sub/deep", "./e/n1/low", "./low/n1", "./" + "l" * 255,
    "./" + "l" * 256, "./\udcff\n\\", "./.wh.n1",
]  # fmt: skip

file_name = st.sampled_from(FILES)
directory_name = st.sampled_from(DIRECTORIES)
new_name = st.sampled_from(NEW)
name = st.one_of(file_name, file_name, directory_name, new_name, new_name, st.sampled_from(ODD))
target = st.one_of(new_name, new_name, file_name, directory_name, st.sampled_from(ODD))

slot = st.sampled_from([0, 1, 2])
uid = st.sampled_from([0, 0, 0, 0, 0, 0, USER])
offset = st.sampled_from([0, 0, 1, 100, 4095, 4096, 5000, 8192, 65536, 131077, 1 << 20])
length = st.sampled_from([0, 1, 10, 300, 4096, 5000, 70000])
size = st.sampled_from([0, 0, 1, 100, 4096, 5000, 100_000])
fill = st.integers(65, 90)
mode = st.sampled_from([0o644, 0o600, 0o000, 0o755, 0o777, 0o4755, 0o2755, 0o6711, 0o2644, 0o1777])
umask = st.sampled_from([0o022, 0, 0o077])
owner = st.sampled_from([-1, 0, USER, 2000])
seconds = st.sampled_from([0, 1_000_000_000, 1_234_567_890])
flags = st.builds(
    lambda access, extra: access | extra,
    st.sampled_from([os.O_RDONLY, os.O_WRONLY, os.O_RDWR, os.O_RDWR]),
    st.sampled_from([
        0, 0, 0, 0, os.O_CREAT, os.O_CREAT | os.O_EXCL, os.O_CREAT | os.O_TRUNC, os.O_TRUNC, os.O_APPEND,
        os.O_CREAT | os.O_APPEND, os.O_APPEND | os.O_TRUNC, os.O_NOFOLLOW, os.O_DIRECTORY, os.O_SYNC,
        os.O_CREAT | os.O_NOFOLLOW, os.O_CREAT | os.O_DIRECTORY, os.O_PATH, os.O_PATH | os.O_NOFOLLOW,
    ]),
)  # fmt: skip
xattr = st.sampled_from([
    ("user.one", b"one"), ("user.one", b""), ("user.two", b"2" * 300), ("trusted.two", b"x"),
    ("security.capability", CAPABILITY), ("system.posix_acl_access", ACL_NAMED),
    ("system.posix_acl_access", ACL_DEFAULT), ("system.posix_acl_default", ACL_DEFAULT),
    ("system.posix_acl_access", b"bad"), ("trusted.overlay.opaque", b"y"), ("user.overlay.opaque", b"y"),
    ("nospace.x", b""), ("user." + "n" * 251, b"x"),
])  # fmt: skip
xattr_key = xattr.map(lambda pair: pair[0])
node = st.sampled_from([
    (0o100644, 0), (0o100000, 0), (0o010666, 0), (0o140777, 0), (0o020644, os.makedev(1, 3)), (0o020644, 0),
    (0o060600, os.makedev(259, 9999)), (0o104755, 0),
])  # fmt: skip


def operation(verb: str, *arguments: st.SearchStrategy[Any], as_user: bool = True) -> st.SearchStrategy[Any]:
    def flatten(args: tuple[Any, ...]) -> tuple[Any, ...]:
        flat: list[Any] = []
        for arg in args:
            flat.extend(arg) if isinstance(arg, tuple) else flat.append(arg)
        return (verb, *flat)

    return st.tuples(uid if as_user else st.just(0), *arguments).map(flatten)


COMMON = [
    operation("open", slot, name, flags, mode, umask),
    operation("open", slot, file_name, st.sampled_from([os.O_RDONLY, os.O_RDWR, os.O_WRONLY | os.O_APPEND]),
              st.just(0), st.just(0), as_user=False),
    operation("pread", slot, offset, length),
    operation("pwrite", slot, offset, length, fill),
    operation("write", slot, length, fill),
    operation("truncate", name, size),
    operation("ftruncate", slot, size),
    operation("mkdir", target, mode, umask),
    operation("unlink", name),
    operation("rmdir", st.one_of(directory_name, new_name)),
    operation("rename", name, target, st.just(0)),
    operation("rename", st.one_of(directory_name, name), st.one_of(new_name, target), st.sampled_from([0, 0, 1, 2, 2])),
    operation("link", name, target),
    operation("chmod", name, mode),
    operation("chown", name, owner, owner),
    operation("setxattr", name, xattr, st.sampled_from([0, 0, os.XATTR_CREATE, os.XATTR_REPLACE])),
    operation("readdir", directory_name),
]  # fmt: skip
RARE = [
    operation("read", slot, length),
    operation("close", slot),
    operation("tmpfile", slot, directory_name, st.sampled_from([os.O_RDWR, os.O_WRONLY, os.O_RDWR | os.O_EXCL]), mode),
    operation("linkfd", slot, new_name),
    operation("reopen", slot, st.sampled_from([os.O_RDONLY, os.O_RDWR, os.O_WRONLY | os.O_TRUNC])),
    operation("seek", slot, offset, st.sampled_from([os.SEEK_SET, os.SEEK_END, os.SEEK_DATA, os.SEEK_HOLE])),
    operation("fallocate", slot, st.sampled_from([0, 1, 3, 3, 16, 17, 2, 8, 32]), offset, length),
    operation("copyrange", slot, offset, slot, offset, length),
    operation("fsync", slot),
    operation("fstat", slot),
    operation("fchmod", slot, mode),
    operation("fchown", slot, owner, owner),
    operation("futimens", slot, seconds),
    operation("fsetxattr", slot, xattr),
    operation("fgetxattr", slot, xattr_key),
    operation("map", slot, st.booleans()),
    operation("mapread", slot, offset, length),
    operation("mapwrite", slot, offset, length, fill),
    operation("stat", name),
    operation("cat", name),
    operation("mknod", target, node, umask),
    operation("symlink", st.sampled_from([b"low", b"../x", b"d/sub", b"\xff" * 100]), target),
    operation("readlink", name),
    operation("utimens", name, st.one_of(seconds, st.none())),
    operation("getxattr", name, xattr_key),
    operation("removexattr", name, xattr_key),
    operation("listxattr", name),
    operation("readdir", name),
    operation("rename", name, target, st.sampled_from([4, 3, 8])),
]
WHOLE = [operation("remount", as_user=False), operation("interchange", as_user=False)]

common = st.one_of(COMMON)
step = st.one_of(common, common, st.one_of(RARE), st.one_of(RARE))
LONGEST = 28


@st.composite
def sequences(draw: st.DrawFn, interchange: bool = True) -> tuple[str, list[tuple[Any, ...]]]:
    """A layer set and the operations. One in eight remounts on the way (it costs as much as forty operations)."""
    layers = draw(st.sampled_from(SETS))
    # Places that may be empty, not a list: each shrinks away by itself.
    places = draw(st.tuples(*[st.one_of(st.none(), step, step, step)] * LONGEST))
    steps = [place for place in places if place is not None]
    if draw(st.integers(0, 7)) == 7:
        whole = draw(st.one_of(WHOLE if interchange else WHOLE[:1]))
        steps.insert(draw(st.integers(0, len(steps))), whole)
    return layers, [*steps, ("tree", 0)]
