"""Options, targets, the fixtures `make_union` and `union`, and CI's check that nothing was skipped for a new reason."""

from __future__ import annotations

import os
import pwd
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from support import limits
from support.mounts import Maker, Union
from support.procs import USER, child, errno_of
from support.sys import ACL_ACCESS, mount, umount
from support.targets import DATA_MATRIX, MATRIX, ORACLES, Target


def pytest_addoption(parser: pytest.Parser) -> None:
    group = parser.getgroup("unionfs")
    group.addoption("--driver", help="drivers to test, comma-separated (default: the matrix in support/targets.py)")
    group.addoption("--session", help="sessions to test, comma-separated")
    group.addoption("--data", help="data modes of the direct session, comma-separated")
    group.addoption("--against", choices=sorted(ORACLES), help="run the suite on an oracle instead of ours")


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line(
        "markers", "needs(*features): skip on a target that lacks one of them (see support/limits.py)"
    )
    config.addinivalue_line("markers", "every_data_mode: by default also run with DATA_MATRIX of support/targets.py")


def targets(config: pytest.Config, every_data_mode: bool) -> list[Target]:
    if against := config.getoption("--against"):
        return [Target(against)]
    drivers, sessions, data = (config.getoption(f"--{name}") for name in ("driver", "session", "data"))
    if not (drivers or sessions or data):
        return MATRIX + DATA_MATRIX if every_data_mode else MATRIX
    found = []
    for driver in (drivers or "overlay").split(","):
        for session in (sessions or "direct").split(","):
            modes = (data or "noopen").split(",") if session == "direct" else [""]
            found += [Target(driver, session, mode) for mode in modes]
    return found


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    if "target" in metafunc.fixturenames:
        every = metafunc.definition.get_closest_marker("every_data_mode") is not None
        metafunc.parametrize("target", targets(metafunc.config, every), ids=str, scope="session")


@pytest.hookimpl(hookwrapper=True)
def pytest_runtest_makereport(item: pytest.Item, call: pytest.CallInfo[None]) -> Iterator[None]:
    outcome = yield
    report = outcome.get_result()  # type: ignore[attr-defined]
    if call.when == "call":
        item.stash[FAILED] = report.failed
    if report.failed and (maker := item.stash.get(MAKER, None)) is not None:
        report.sections.append(("unions", "\n\n".join(union.describe() for union in maker.unions)))


FAILED = pytest.StashKey[bool]()
MAKER = pytest.StashKey[Maker]()


@pytest.fixture(scope="session")
def workspace() -> Iterator[Path]:
    """A directory on a real filesystem that every user may traverse."""
    base = Path(tempfile.mkdtemp(prefix="unionfs-test-", dir=os.environ.get("UNIONFS_TEST_DIR", "/var/tmp")))
    base.chmod(0o755)
    yield base
    shutil.rmtree(base, ignore_errors=True)


@pytest.fixture
def make_union(
    request: pytest.FixtureRequest, target: Target, workspace: Path, disk: Callable[..., Path]
) -> Iterator[Maker]:
    """Makes unions and checks them after the test, before the disks of that test go."""
    old_umask = os.umask(0o022)
    base = Path(tempfile.mkdtemp(dir=workspace))
    base.chmod(0o755)
    maker = request.node.stash[MAKER] = Maker(base, target)
    try:
        maker.require(*(feature for marker in request.node.iter_markers("needs") for feature in marker.args))
        yield maker
        if not request.node.stash.get(FAILED, True):
            maker.finish()
    finally:
        maker.discard()
        os.umask(old_umask)


@pytest.fixture
def union(make_union: Maker) -> Union:
    """An empty lower and an empty upper."""
    return make_union([{}])


def knows_filesystem(kind: str) -> bool:
    """Asked after a mount, which loads the module if there is one."""
    with open("/proc/filesystems") as known:
        return any(line.split()[-1] == kind for line in known)


@pytest.fixture
def disk(workspace: Path) -> Iterator[Callable[..., Path]]:
    """disk(megabytes, kind="tmpfs", inodes=...): a small filesystem of its own."""
    made: list[Path] = []

    def make(megabytes: int, kind: str = "tmpfs", inodes: int = 0) -> Path:
        path = Path(tempfile.mkdtemp(prefix="disk", dir=workspace))
        if kind == "tmpfs":
            mount("tmpfs", path, "tmpfs", f"size={megabytes}m" + (f",nr_inodes={inodes}" if inodes else ""))
        else:
            image = path.with_suffix(".img")
            with open(image, "wb") as f:
                f.truncate(megabytes << 20)
            subprocess.run([f"mkfs.{kind}", "-q", *(["-F"] if kind == "ext4" else ["-f"]), image], check=True)
            done = subprocess.run(["mount", "-o", "loop", image, path], capture_output=True, text=True)
            if done.returncode and not knows_filesystem(kind):
                pytest.skip(limits.HOST["filesystem"])
            assert done.returncode == 0, done.stderr
        made.append(path)
        path.chmod(0o777)
        return path

    yield make
    for path in reversed(made):
        umount(path)


@pytest.fixture(scope="session")
def ordinary_user() -> Iterator[int]:
    """The uid of a user with an account, which fusermount3 asks for, who can run our command; made if missing."""
    try:
        uid = pwd.getpwnam("unionfs-test").pw_uid
    except KeyError:
        subprocess.run(["useradd", "--no-create-home", "--shell", "/bin/sh", "unionfs-test"], check=True)
        uid = pwd.getpwnam("unionfs-test").pw_uid
    # The interpreter and the checkout may lie below a closed directory, like /root: lend the user a way through.
    needed = [Path(path) for path in (sys.prefix, sys.base_prefix, os.path.realpath(sys.executable), __file__)]
    lent: list[tuple[Path, bytes | None, int]] = []
    parents = {above for path in needed for above in path.parents}
    for path in sorted(parents, key=lambda above: len(above.parts)):
        if any(errno_of(child, os.stat, f"{path}/.", uid=user) for user in (uid, USER)):
            acl = os.getxattr(path, ACL_ACCESS) if ACL_ACCESS in os.listxattr(path) else None
            lent.append((path, acl, path.stat().st_mode & 0o7777))
            subprocess.run(["setfacl", "-m", f"u:{uid}:x,u:{USER}:x", path], check=True)
    yield uid
    for path, acl, mode in lent:
        if acl is None:
            os.removexattr(path, ACL_ACCESS)
            path.chmod(mode)
        else:
            os.setxattr(path, ACL_ACCESS, acl)


_skipped: dict[str, set[str]] = {}


def pytest_runtest_logreport(report: pytest.TestReport) -> None:
    if report.skipped and not hasattr(report, "wasxfail"):
        reason = report.longrepr[2] if isinstance(report.longrepr, tuple) else str(report.longrepr)
        _skipped.setdefault(reason.removeprefix("Skipped: "), set()).add(report.nodeid)


def pytest_sessionfinish(session: pytest.Session) -> None:
    """In CI nothing is skipped silently: a reason that support/limits.py doesn't list fails the run."""
    if os.environ.get("CI") != "true":
        return
    new = {reason: tests for reason, tests in _skipped.items() if reason not in limits.accepted()}
    if new:
        for reason, tests in new.items():
            print(f"\nskipped for a reason that tests/support/limits.py does not list: {reason!r}: {sorted(tests)}")
        session.exitstatus = pytest.ExitCode.TESTS_FAILED
