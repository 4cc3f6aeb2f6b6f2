"""What the engine tests share: running commands, a cached Debian tree, and the proof that nothing was left behind.

Every engine gets a data root of its own below one temporary directory, so that its mounts and servers can be told
from anything else on the machine by that path.
"""

from __future__ import annotations

import fcntl
import os
import shutil
import signal
import socket
import subprocess
import tarfile
import tempfile
import time
from collections.abc import Mapping
from pathlib import Path

# Where rlimits can't be raised (no CAP_SYS_RESOURCE) podman's own defaults make every container fail.
LIMITS = ["--ulimit", "nofile=1024:1024", "--ulimit", "nproc=1000:1000"]

# Small packages that exercise what installing means: alternatives (symlinks), a shared library (the ldconfig trigger).
PACKAGES = ["less", "cpio", "libsigsegv2"]
BULK = ["var/cache/apt/archives", "var/lib/apt/lists", "usr/share/doc", "usr/share/locale", "usr/share/man"]


def run(
    *argv: str | Path,
    env: Mapping[str, str] | None = None,
    check: bool = True,
    timeout: float = 180,
    cwd: Path | None = None,
) -> str:
    """Standard output, stripped. A failure shows the command with both its outputs."""
    with subprocess.Popen(
        [str(part) for part in argv],
        env=dict(env) if env is not None else None,
        cwd=cwd,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        errors="surrogateescape",
        start_new_session=True,
    ) as process:
        try:
            out, err = process.communicate(timeout=timeout)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            out, err = process.communicate()
            raise AssertionError(f"{argv} took over {timeout} s\n{out}\n{err}") from None
    if check and process.returncode:
        raise AssertionError(f"{' '.join(map(str, argv))}\nexited {process.returncode}\n{out}\n{err}")
    return out.strip()


def answers(path: Path) -> bool:
    """Whether somebody listens on the unix socket."""
    with socket.socket(socket.AF_UNIX) as probe:
        try:
            probe.connect(str(path))
        except OSError:
            return False
    return True


def mounts_below(root: Path) -> list[str]:
    prefix = f"{root}/"
    with open("/proc/self/mountinfo") as table:
        return [line.split()[4] for line in table if f"{line.split()[4]}/".startswith(prefix)]


def processes_about(root: Path) -> list[tuple[int, str]]:
    """Processes that name the directory in their command line, this one and its like aside."""
    found = []
    for entry in os.listdir("/proc"):
        if not entry.isdigit() or int(entry) == os.getpid():
            continue
        try:
            words = Path("/proc", entry, "cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace")
        except OSError:
            continue
        if f"{root}/" in words or words.endswith(str(root)):
            found.append((int(entry), words))
    return found


def wait_until_clean(root: Path, timeout: float = 20) -> None:
    """Engines unmount and go on without waiting; a server has until `timeout` to notice and leave."""
    deadline = time.monotonic() + timeout
    while (left := mounts_below(root)) or (running := processes_about(root)):
        if time.monotonic() > deadline:
            running = processes_about(root)
            raise AssertionError(f"left behind:\nmounts {left}\nprocesses {running}")
        time.sleep(0.05)


def sweep(root: Path) -> None:
    """Leaves the machine as it was, whatever a failed test left; then removes the directory."""
    for pid, _ in processes_about(root):
        try:
            os.kill(pid, signal.SIGTERM)
        except ProcessLookupError:
            pass
    for mountpoint in reversed(mounts_below(root)):
        subprocess.run(["umount", "-l", mountpoint], stderr=subprocess.DEVNULL, check=False)
    shutil.rmtree(root, ignore_errors=True)


def debian_release() -> str:
    fields = dict(line.rstrip("\n").split("=", 1) for line in open("/etc/os-release") if "=" in line)
    return fields.get("VERSION_CODENAME", "bookworm").strip('"')


def debian_mirror(release: str) -> str | None:
    """Where this machine's apt gets the release from; None leaves it to debootstrap."""
    rows = run("apt-get", "indextargets", "--format", "$(CODENAME) $(COMPONENT) $(REPO_URI)", "Created-By: Packages")
    for row in rows.splitlines():
        codename, component, uri = row.split(" ", 2)
        if codename == release and component == "main":
            return uri
    return None


def debian_tarball() -> Path:
    """A tar of a minimal Debian of this machine's own release with PACKAGES waiting in /opt/debs.

    Made once and kept in a cache directory: the bootstrap takes half a minute.
    """
    cache = Path(os.environ.get("XDG_CACHE_HOME") or "/var/cache") / "unionfs-tests"
    cache.mkdir(parents=True, exist_ok=True)
    release = debian_release()
    tarball = cache / f"{release}-2.tar"
    with open(cache / "lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not tarball.exists():
            for last_try in (False, True):
                try:
                    _bootstrap(release, tarball)
                    break
                except AssertionError:
                    if last_try:
                        raise
    return tarball


def _bootstrap(release: str, tarball: Path) -> None:
    work = Path(tempfile.mkdtemp(prefix="bootstrap-", dir=tarball.parent))
    tree = work / "tree"
    try:
        mirror = debian_mirror(release)
        run("debootstrap", "--variant=minbase", release, tree, *([mirror] if mirror else []), timeout=600)
        debs = tree / "opt" / "debs"
        debs.mkdir()
        # As the user who runs this: apt's sandbox user has no way into the directory.
        run("apt-get", "-o", "APT::Sandbox::User=root", "download", *PACKAGES, cwd=debs, timeout=300)
        for name in BULK:
            for child in (tree / name).iterdir():
                if child.is_dir() and not child.is_symlink():
                    shutil.rmtree(child)
                else:
                    child.unlink()
        with tarfile.open(work / "tar", "w") as archive:
            archive.add(tree, arcname=".")
        (work / "tar").rename(tarball)
    finally:
        shutil.rmtree(work, ignore_errors=True)


def containers_environment(root: Path, program: Path, data: Path | None = None, mountopt: str = "") -> dict[str, str]:
    """The environment in which podman, buildah and skopeo mount with `program` and keep everything below `data`
    (`root` unless told); their configuration lies in `root`.
    """
    data = data or root
    (root / "storage.conf").write_text(
        f'[storage]\ndriver = "overlay"\nrunroot = "{data}/run"\n'
        f'graphroot = "{data}/graph"\nrootless_storage_path = "{data}/graph"\n'
        f'[storage.options.overlay]\nmount_program = "{program}"\nmountopt = "{mountopt}"\n'
    )
    (root / "containers.conf").write_text(
        f'[engine]\nruntime = "runc"\ncgroup_manager = "cgroupfs"\nevents_logger = "none"\n'
        f'tmp_dir = "{data}/tmp"\nlock_type = "file"\n'
        '[containers]\nnetns = "none"\ndefault_ulimits = ["nofile=1024:1024", "nproc=1000:1000"]\n'
    )
    return {
        **os.environ,
        "CONTAINERS_STORAGE_CONF": f"{root}/storage.conf",
        "CONTAINERS_CONF": f"{root}/containers.conf",
        "BUILDAH_ISOLATION": "chroot",
        "TMPDIR": str(data),
    }
