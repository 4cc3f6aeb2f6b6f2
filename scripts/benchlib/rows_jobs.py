"""Rows about whole jobs: what a person waits for."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

from .peers import FuseOverlayfs, Kernel, Ours
from .registry import Skip, workload
from .run import Run, timed

# Standard modules in pure Python, big ones first; imported from the union by path.
IMPORTS = (
    "asyncio, email.mime.multipart, http.server, xml.dom.minidom, unittest.mock, multiprocessing.pool, logging.config, "
    "concurrent.futures, json, argparse, decimal, fractions, statistics, ipaddress, urllib.request, ftplib, smtplib, "
    "imaplib, zipfile, tarfile, pydoc, inspect, ast, dis, tokenize, pickletools, difflib, doctest, pdb, cProfile, "
    "configparser, csv, sqlite3, ctypes, plistlib, xmlrpc.client, wsgiref.simple_server, turtledemo, uuid, typing"
)


@workload("whole jobs", [
    ("python.cold", "python start and 40 imports from the union, first", "ms"),
    ("python.warm", "python start and 40 imports from the union, again", "ms"),
])  # fmt: skip
def python_start(run: Run) -> dict[str, float]:
    with run.union([run.stage.stdlib], copy=False) as mnt:
        lib = mnt / "lib"
        code = f"import sys; sys.path[:] = [{str(lib)!r}, {str(lib / 'lib-dynload')!r}]; import {IMPORTS}"
        argv = [sys.executable, "-B", "-I", "-S", "-c", code]
        cold = timed(argv)
        return {"python.cold": 1000 * cold, "python.warm": 1000 * min(timed(argv) for _ in range(2))}


@workload("whole jobs", [("pip", "pip install of a local wheel", "ms")])
def pip_install(run: Run) -> dict[str, float]:
    wheel = run.stage.wheel
    if subprocess.run([sys.executable, "-m", "pip", "--version"], capture_output=True).returncode:
        raise Skip("this Python has no pip")
    with run.union([run.stage.empty]) as mnt:
        argv = [
            sys.executable, "-m", "pip", "install", "--no-index", "--no-deps", "--disable-pip-version-check",
            "--no-cache-dir", "--target", str(mnt / "site"), str(wheel),
        ]  # fmt: skip
        return {"pip": 1000 * timed(argv, env={**os.environ, "TMPDIR": str(run.stage.root)})}


@workload("whole jobs", [("gcc", "gcc of Lua, sources and objects on the union", "ms")])
def gcc(run: Run) -> dict[str, float]:
    project = run.stage.c_project
    if project is None:
        raise Skip("Debian's source package of Lua cannot be had here")
    with run.union([project]) as mnt:
        sources = sorted(p.name for p in (mnt / "src").glob("*.c"))[: run.scale.sources]
        return {"gcc": 1000 * timed(["gcc", "-O0", "-c", *sources], cwd=mnt / "src")}


@workload("whole jobs", [("podman", "podman run --rm, start to exit", "ms")])
def podman(run: Run) -> dict[str, float]:
    if not shutil.which("podman"):
        raise Skip("podman is not installed")
    tarball = run.stage.busybox_tar
    if tarball is None:
        raise Skip("busybox-static is not installed")
    options: list[str] = []
    if isinstance(run.peer, FuseOverlayfs):
        options = ["--storage-opt", f"overlay.mount_program={shutil.which(run.peer.binary)}"]
    elif isinstance(run.peer, Ours):
        if run.peer.key != "ours":
            raise Skip("mount_program has no data mode of its own")
        options = ["--storage-opt", f"overlay.mount_program={run.peer.binary('unionfs-fuse-overlayfs')}"]
    elif not isinstance(run.peer, Kernel):
        raise Skip("no storage driver of an engine")
    state = Path(tempfile.mkdtemp(prefix="p", dir=run.stage.root))
    # Paths of sockets under runroot must stay short.
    runroot = Path(tempfile.mkdtemp(prefix="ub"))
    base = ["podman", "--root", str(state), "--runroot", str(runroot), "--storage-driver", "overlay", *options]
    limits = ["--ulimit", "nofile=1024:1024", "--ulimit", "nproc=1000:1000"]
    start = [
        *base, "--cgroup-manager=cgroupfs", "--runtime", "runc", "run", "--rm", "--network=none",
        *limits, "bench", "true",
    ]  # fmt: skip
    try:
        timed([*base, "import", str(tarball), "bench"])
        timed(start)  # the first run sets the store up
        return {"podman": 1000 * min(timed(start) for _ in range(2))}
    finally:
        subprocess.run([*base, "unmount", "--all", "--force"], capture_output=True)
        subprocess.run(["umount", "-R", str(state / "overlay")], capture_output=True)
        shutil.rmtree(state, ignore_errors=True)
        shutil.rmtree(runroot, ignore_errors=True)
