"""Real mounts through the two other command lines: fuse-overlayfs's, and mount(8)'s helper."""

from __future__ import annotations

import errno
import os
import subprocess

import pytest
from support import sys as syscalls
from support.commands import BIN, Place
from support.mounts import is_mounted, wait_for


def fstype(place: Place) -> str:
    with open("/proc/self/mounts") as mounts:
        return next(line.split()[2] for line in mounts if line.split()[1] == str(place.merged))


def test_as_podman_calls_it(place: Place) -> None:
    """Lowers are symlinks, relative to the caller's directory, and are gone when the command has returned."""
    (place.base / "l").mkdir()
    (place.base / "l" / "AB").symlink_to("../lower")
    (place.base / "bound").mkdir()
    subprocess.run(["mount", "--bind", place.lower, place.base / "bound"], check=True)
    try:
        done = place.fuse_overlayfs("-o", "lowerdir=l/AB:bound,upperdir=upper,workdir=work,,volatile", "merged")
        # `bound` is the same directory as `lower`: only the overlap may be refused, never the form.
        if done.returncode:
            assert "lower" in done.stderr
            done = place.fuse_overlayfs("-o", "lowerdir=bound,upperdir=upper,workdir=work,,volatile", "merged")
        assert (done.returncode, done.stderr) == (0, "")
    finally:
        syscalls.umount(place.base / "bound", syscalls.MNT_DETACH)
    os.unlink(place.base / "l" / "AB")
    assert (place.merged / "a").read_text() == "lower a"
    (place.merged / "a").write_text("new")
    assert (place.upper / "a").read_text() == "new"
    assert fstype(place) == "fuse.fuse-overlayfs"
    subprocess.run(["fusermount3", "-u", place.merged], check=True)


def test_read_only(place: Place) -> None:
    done = place.fuse_overlayfs("-o", f"lowerdir={place.lower}", place.merged)
    assert (done.returncode, done.stderr) == (0, "")
    with pytest.raises(OSError) as caught:
        (place.merged / "x").touch()
    assert caught.value.errno == errno.EROFS
    place.umount()


def test_warnings_and_success(place: Place) -> None:
    done = place.fuse_overlayfs("-o", place.options + ",plugins=x,frobnicate=1,ino32_t", place.merged)
    assert done.returncode == 0
    lines = done.stderr.splitlines()
    assert any("plugins=x" in line for line in lines) and any("frobnicate=1" in line for line in lines)
    place.umount()


def test_source_first(place: Place) -> None:
    done = place.fuse_overlayfs("overlay", place.merged, "-o", place.options + ",dev,suid")
    assert (done.returncode, done.stderr) == (0, "")
    assert is_mounted(place.merged)
    place.umount()


def test_foreground(place: Place) -> None:
    argv = [BIN / "unionfs-fuse-overlayfs", "-f", "-o", "allow_other," + place.options + ",noacl", place.merged]
    server = subprocess.Popen([str(word) for word in argv], stderr=subprocess.PIPE, text=True)
    wait_for(lambda: is_mounted(place.merged) or server.poll() is not None, "the mount")
    assert (place.merged / "a").read_text() == "lower a"
    subprocess.run(["fusermount3", "-u", place.merged], check=True)
    _, err = server.communicate(timeout=60)
    assert (server.returncode, err) == (0, "")


def test_failure_is_one_line_and_a_code(place: Place) -> None:
    done = place.fuse_overlayfs("-o", f"lowerdir={place.base}/none", place.merged)
    assert done.returncode == 3
    assert done.stderr.startswith("unionfs: ") and done.stderr.count("\n") == 1 and f"{place.base}/none" in done.stderr


def test_under_its_other_name(place: Place) -> None:
    link = place.base / "fuse-overlayfs"
    link.symlink_to(BIN / "unionfs-fuse-overlayfs")
    done = subprocess.run([link, "-o", place.options, place.merged], capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stderr) == (0, "")
    place.umount()


def test_over_a_directory_that_is_not_empty(place: Place) -> None:
    (place.merged / "hidden").touch()
    assert place.run("mount", "--lower", place.lower, place.merged).returncode == 5
    assert place.fuse_overlayfs("-o", place.options, place.merged).returncode == 0
    assert os.listdir(place.merged) == ["a"]
    place.umount()


def test_mount_helper_without_an_environment(place: Place) -> None:
    """mount(8) empties PATH; fstab's and systemd's words are in the list."""
    options = place.options + ",dev,suid,noatime,_netdev,nofail,x-systemd.automount"
    done = place.helper("src", place.merged, "-o", options, "-t", "fuse.unionfs", env={})
    assert (done.returncode, done.stderr) == (0, "")
    with open("/proc/self/mounts") as mounts:
        line = next(line.split() for line in mounts if line.split()[1] == str(place.merged))
    assert line[0] == "src" and line[2] == "fuse.unionfs" and "noatime" in line[3].split(",")
    place.umount()


def test_mount_8(place: Place) -> None:
    """`mount -t fuse.unionfs`, with the helper where mount(8) looks for it, in a mount namespace of its own."""
    script = (
        'mount -t tmpfs none /usr/local/sbin && ln -s "$1" /usr/local/sbin/mount.fuse.unionfs && '
        'mount --bind /usr/local/sbin "$4" && '
        'mount -t overlay -o "lowerdir=$4:/sbin" none /sbin && '
        'mount -t fuse.unionfs -o "$2" none "$3" && cat "$3/a" && umount "$3" && findmnt "$3"; echo " $?"'
    )
    (place.base / "helper").mkdir()
    argv = ["unshare", "-m", "sh", "-c", script, "sh", BIN / "mount.fuse.unionfs", place.options, place.merged]
    argv.append(place.base / "helper")
    done = subprocess.run([str(word) for word in argv], capture_output=True, text=True, timeout=60)
    assert done.stdout == "lower a 1\n", done


def test_unionfs_called_by_mount_fuse(place: Place) -> None:
    done = place.run("none", place.merged, "-o", place.options + ",dev,suid")
    assert (done.returncode, done.stderr) == (0, "")
    assert (place.merged / "a").read_text() == "lower a"
    place.umount()


def test_remount_is_refused(place: Place) -> None:
    done = place.helper("none", place.merged, "-o", "remount,ro")
    assert done.returncode == 2 and "remount" in done.stderr


def test_fake_mounts_nothing(place: Place) -> None:
    assert place.helper("none", place.merged, "-f", "-o", place.options).returncode == 0
    assert not is_mounted(place.merged)


def test_debug_through_mount_8_goes_to_the_log(place: Place) -> None:
    log = place.base / "log"
    done = place.helper("none", place.merged, "-o", f"{place.options},debug,log={log}")
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
    (place.merged / "a").read_text()
    wait_for(lambda: "LOOKUP" in log.read_text(), "the trace")
    place.umount()


def test_log_by_environment(place: Place) -> None:
    log = place.base / "log"
    environment = {**os.environ, "FUSE_OVERLAYFS_DEBUG_LOG": str(log), "FUSE_OVERLAYFS_NO_PASSTHROUGH": "1"}
    done = place.fuse_overlayfs("-o", place.options, place.merged, env=environment)
    assert done.returncode == 0
    assert done.stderr == "unionfs: environment variable ignored: FUSE_OVERLAYFS_NO_PASSTHROUGH\n"
    assert log.exists()
    place.umount()
