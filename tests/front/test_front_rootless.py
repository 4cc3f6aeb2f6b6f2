"""Without root: through fusermount3, and as root of a user namespace."""

from __future__ import annotations

import os
import subprocess
import tempfile

from support.commands import Place, User
from support.mounts import is_mounted


def mount_argv(place: Place) -> list[object]:
    return ["mount", "--lower", place.lower, "--upper", place.upper, "--work", place.work]


def test_through_fusermount(place: Place, user: User) -> None:
    os.chown(place.lower / "a", user.uid, user.gid)
    done = user.run(*mount_argv(place), "-o", "noexec", place.merged)
    assert (done.returncode, done.stderr) == (0, "")
    with open("/proc/self/mounts") as mounts:
        line = next(line.split() for line in mounts if line.split()[1] == str(place.merged))
    assert line[2] == "fuse.unionfs"
    words = line[3].split(",")
    assert {"nosuid", "nodev", "noexec", f"user_id={user.uid}"} <= set(words) and "allow_other" not in words
    listed = [line.split() for line in user.run("list").stdout.splitlines()]
    assert [str(place.merged), "overlay", "direct"] in [row[:3] for row in listed]
    write = subprocess.run(
        ["sh", "-c", 'echo more >> "$0/a"', place.merged], user=user.uid, group=user.gid, extra_groups=[], timeout=60
    )
    assert write.returncode == 0
    assert user.run("diff", place.merged).stdout == "C /a\n"
    done = user.run("umount", place.merged)
    assert (done.returncode, done.stderr) == (0, "")
    assert (place.upper / "a").read_text() == "lower amore\n"


def test_the_control_socket_is_the_users(place: Place, user: User) -> None:
    with tempfile.TemporaryDirectory(dir="/tmp") as directory:
        os.chmod(directory, 0o755)
        runtime = os.path.join(directory, "runtime")
        os.mkdir(runtime)
        os.chown(runtime, user.uid, user.gid)
        done = user.run(*mount_argv(place), place.merged, XDG_RUNTIME_DIR=runtime)
        assert (done.returncode, done.stderr) == (0, "")
        assert len([name for name in os.listdir(runtime + "/unionfs") if name.endswith(".sock")]) == 1
        assert user.run("umount", place.merged, XDG_RUNTIME_DIR=runtime).returncode == 0
        assert os.listdir(runtime + "/unionfs") == []


def test_allow_other_needs_fuse_conf(place: Place, user: User) -> None:
    with open("/etc/fuse.conf") as conf:
        allowed = any(line.strip() == "user_allow_other" for line in conf)
    done = user.run(*mount_argv(place), "-o", "allow_other", place.merged)
    if allowed:
        assert done.returncode == 0
        assert user.run("umount", place.merged).returncode == 0
    else:
        assert done.returncode == 6
        assert "user_allow_other into /etc/fuse.conf" in done.stderr and done.stderr.count("\n") == 1
        assert not is_mounted(place.merged)


def test_mountpoint_of_somebody_else(place: Place, user: User) -> None:
    os.chown(place.merged, 0, 0)
    done = user.run(*mount_argv(place), place.merged)
    assert done.returncode == 6
    assert "directory of your own" in done.stderr and done.stderr.count("\n") == 1
    assert sorted(os.listdir(place.work)) == []


def test_umount_of_another_users_mount(place: Place, user: User) -> None:
    place.mount()
    done = user.run("umount", place.merged)
    assert done.returncode == 6, done
    assert is_mounted(place.merged)
    place.umount()


def test_without_fusermount(place: Place, user: User) -> None:
    """A mount namespace in which there is none: exit code 7, and what to install."""
    script = (
        "mount --bind /dev/null /usr/bin/fusermount3 && "
        'exec setpriv --reuid "$0" --regid "$1" --clear-groups /usr/bin/python3 -B -c "${@:2}"'
    )
    command = ["unshare", "-m", "bash", "-c", script, user.uid, user.gid, user.start]
    done = subprocess.run(
        [str(word) for word in [*command, *mount_argv(place), place.merged]],
        capture_output=True, text=True, timeout=60, env={"PATH": "/usr/bin:/bin"},
    )  # fmt: skip
    assert done.returncode == 7, done
    assert "install the package fuse3" in done.stderr and done.stderr.count("\n") == 1


def test_root_of_a_user_namespace(place: Place, user: User) -> None:
    os.chown(place.lower, user.uid, user.gid)
    os.chown(place.lower / "a", user.uid, user.gid)
    script = (
        'u() { /usr/bin/python3 -B -c "$1" "${@:2}"; }; start=$1; merged=$2; shift 2\n'
        'u "$start" "$@" && echo new >> "$merged/a" && rm -r "$merged/d"\n'
        'mkdir "$merged/n" && mv "$merged/n" "$merged/o"\n'
        'cat "$merged/a"; u "$start" diff "$merged"; u "$start" umount "$merged"; echo "$?"'
    )
    (place.lower / "d").mkdir()
    os.chown(place.lower / "d", user.uid, user.gid)
    command = ["unshare", "-Urm", "bash", "-c", script, "bash", user.start, place.merged]
    command += [*mount_argv(place), place.merged]
    done = subprocess.run(
        [str(word) for word in command], user=user.uid, group=user.gid, extra_groups=[], capture_output=True, text=True,
        timeout=60, env={"PATH": "/usr/bin:/bin", "HOME": str(user.home)}, cwd=user.home,
    )  # fmt: skip
    assert done.stderr == ""
    assert done.stdout == "lower anew\nC /a\nD /d\nA /o\n0\n"
