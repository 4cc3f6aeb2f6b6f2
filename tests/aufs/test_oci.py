"""Branches as OCI layers and OCI layers as branches; Docker's classic layout of layers by hand, with a container on it.

A branch is packed with tar(1) and nothing else; umoci, skopeo and podman must make of it what the mount shows.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import stat
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from engines.harness import containers_environment, run, wait_until_clean
from support.mounts import UNIONFS, is_mounted
from support.sys import umount
from support.trees import F, Hard, L, Node, Snapshot, Tree, build, differences, snapshot

from aufs.harness import Aufs, command

Make = Callable[..., Aufs]
BASE: Tree = {
    "bin/sh": F("#!", 0o755),
    "etc/conf": "base conf",
    "etc/gone": "gone",
    "etc/sub/a": "a",
    "etc/sub/b": "b",
    "data/x": F("x" * 5000, 0o640, 1, 2),
    "data/y": "y",
    "data/h1": "hard",
    "data/h2": Hard("data/h1"),
    "link": L("etc/conf"),
    "file to dir": "f",
    "dir to file/inner": "i",
    "kept/deep/er": "kept",
    "fifo": Node("p"),
}
IGNORED = ("mtime_ns", "xattrs")  # tools that unpack a layer touch directories; tar(1) packs no xattrs


def change(top: Path) -> None:
    """Everything that leaves a mark in a layer."""
    with open(top / "etc/conf", "a") as f:
        f.write(", changed")
    os.unlink(top / "etc/gone")
    shutil.rmtree(top / "etc/sub")
    os.mkdir(top / "etc/sub")  # opaque
    (top / "etc/sub/fresh").write_text("fresh")
    os.rename(top / "data/y", top / "data/moved")
    os.chmod(top / "data/x", 0o4755)
    os.chown(top / "kept/deep/er", 7, 8)
    os.unlink(top / "link")
    os.symlink("data/x", top / "link")
    os.unlink(top / "file to dir")
    os.mkdir(top / "file to dir")
    (top / "file to dir/new").write_text("n")
    shutil.rmtree(top / "dir to file")
    (top / "dir to file").write_text("a file")
    os.mkdir(top / "made", 0o1777)
    os.mknod(top / "made/null", 0o666 | stat.S_IFCHR, os.makedev(1, 3))
    (top / "made/one").write_text("one")
    os.link(top / "made/one", top / "made/two")


def pack(branch: Path) -> bytes:
    """With tar(1), as it is."""
    argv = ["tar", "-C", str(branch), "--format=pax", "--numeric-owner", "-cf", "-", "."]
    return subprocess.run(argv, check=True, capture_output=True, timeout=60).stdout


def write_image(where: Path, layers: list[bytes]) -> None:
    """An OCI layout with one image `x`, its layers bottom first."""
    blobs = where / "blobs/sha256"
    blobs.mkdir(parents=True)

    def blob(data: bytes, media: str) -> dict[str, Any]:
        digest = hashlib.sha256(data).hexdigest()
        (blobs / digest).write_bytes(data)
        return {"mediaType": f"application/vnd.oci.image.{media}", "digest": f"sha256:{digest}", "size": len(data)}

    rows = [blob(layer, "layer.v1.tar") for layer in layers]
    config = {
        "architecture": "amd64", "os": "linux", "config": {},
        "rootfs": {"type": "layers", "diff_ids": [row["digest"] for row in rows]},
    }  # fmt: skip
    manifest = {"schemaVersion": 2, "config": blob(json.dumps(config).encode(), "config.v1+json"), "layers": rows}
    manifest["mediaType"] = "application/vnd.oci.image.manifest.v1+json"
    index = blob(json.dumps(manifest).encode(), "manifest.v1+json")
    index["annotations"] = {"org.opencontainers.image.ref.name": "x"}
    (where / "oci-layout").write_text('{"imageLayoutVersion": "1.0.0"}')
    (where / "index.json").write_text(json.dumps({"schemaVersion": 2, "manifests": [index]}))


def same(wanted: Snapshot, found: Snapshot) -> None:
    """The roots aside: their mode is the tools' own."""
    differing = differences({**wanted, b".": found[b"."]}, found, IGNORED)
    assert not differing, "\n".join(differing)


@pytest.fixture
def written(make_aufs: Make) -> tuple[Aufs, Snapshot]:
    """A union of two branches, changed; unmounted, with what it showed."""
    u = make_aufs()
    build(u.base / "img", BASE)
    u.mount("top=rw", "img=ro+wh")
    change(u.merged)
    seen = snapshot(u.merged)
    u.umount()
    assert not [name for name in os.listdir(u.base / "top") if name.startswith(".wh..wh.")]
    return u, seen


def test_umoci_and_skopeo_take_a_branch(written: tuple[Aufs, Snapshot]) -> None:
    u, seen = written
    write_image(u.base / "oci", [pack(u.base / "img"), pack(u.base / "top")])
    run("skopeo", "copy", "--quiet", f"oci:{u.base}/oci:x", f"oci:{u.base}/copied:x")
    run("umoci", "unpack", "--image", f"{u.base}/copied:x", u.base / "bundle")
    same(seen, snapshot(u.base / "bundle/rootfs"))


def test_podman_takes_a_branch(written: tuple[Aufs, Snapshot]) -> None:
    u, seen = written
    write_image(u.base / "oci", [pack(u.base / "img"), pack(u.base / "top")])
    data = u.base / "containers"
    data.mkdir()
    env = containers_environment(data, Path(UNIONFS).with_name("unionfs-fuse-overlayfs"))
    try:
        run("podman", "pull", "--quiet", f"oci:{u.base}/oci:x", env=env)
        image = run("podman", "images", "--quiet", env=env).split()[0]
        mounted = run("podman", "image", "mount", image, env=env)
        same(seen, snapshot(mounted))
        run("podman", "image", "unmount", image, env=env)
    finally:
        run("podman", "rmi", "--all", "--force", env=env, check=False)
    wait_until_clean(data)


def test_layers_are_branches(written: tuple[Aufs, Snapshot]) -> None:
    """Layers unpacked as they are, by tar, in branches that are read only; and one more on top."""
    u, seen = written
    for name in ("top", "img"):
        layer = u.branch_dir(f"layer {name}")
        subprocess.run(["tar", "-C", str(layer), "-xpf", "-"], input=pack(u.base / name), check=True, timeout=60)
    u.mount("layer top=ro+wh", "layer img=ro+wh")
    same(seen, snapshot(u.merged))
    u.umount()
    u.mount("own=rw", "layer top=ro+wh", "layer img=ro+wh")
    same(seen, snapshot(u.merged))
    os.unlink(u / "data/moved")
    (u / "etc/sub/fresh").write_text("again")
    u.umount()
    u.mount("own=ro+wh", "layer top=ro+wh", "layer img=ro+wh")
    assert not (u / "data/moved").exists() and (u / "etc/sub/fresh").read_text() == "again"


def test_hard_links_in_a_branch(make_aufs: Make) -> None:
    """Names that nobody touched are linked at the end: the branch stands on its own, and is not another on remount."""
    u = make_aufs()
    build(u.base / "img", {**BASE, "far/away/h3": Hard("data/h1"), "data/h4": Hard("data/h1")})
    u.mount("top=rw", "b=rw", "img=ro+wh")
    with open(u / "data/h1", "a") as f:
        f.write("+")
    os.unlink(u / "data/h4")
    names = ("data/h1", "data/h2", "far/away/h3")
    number = (u / "data/h2").stat().st_ino
    seen = snapshot(u.merged)
    assert not (u.base / "b/far").exists()
    u.umount()
    assert not [name for name in os.listdir(u.base / "b") if name.startswith(".wh..wh.")]
    assert len({(u.base / "b" / name).stat().st_ino for name in names}) == 1
    write_image(u.base / "oci", [pack(u.base / name) for name in ("img", "b", "top")])
    run("umoci", "unpack", "--image", f"{u.base}/oci:x", u.base / "bundle")
    same(seen, snapshot(u.base / "bundle/rootfs"))
    u.mount("top=rw", "b=rw", "img=ro+wh")
    same(seen, snapshot(u.merged))
    assert {((u / name).stat().st_ino, (u / name).stat().st_nlink) for name in names} == {(number, 3)}


BUSYBOX: Tree = {
    **{f"bin/{name}": L("busybox") for name in ("sh", "cat", "ls", "rm")},
    "etc/passwd": "root:x:0:0::/:/bin/sh\n",
}


def test_container_on_dockers_classic_layout(make_aufs: Make) -> None:
    """Layers in diff/, a container's branch on top of them, the union on mnt/, a container on that with runc."""
    u = make_aufs()
    root = u.base / "aufs"
    build(root / "diff/base", {**BUSYBOX, "etc/issue": "base", "srv/old/f": "old"})
    shutil.copy("/bin/busybox", root / "diff/base/bin/busybox")
    build(root / "diff/app", {"app/run": F("#!/bin/sh\necho ran >> /srv/log\n", 0o755), "etc/.wh.issue": F("", 0o444)})
    build(root / "diff/c1-init", {"etc/hostname": "", "dev/console": "", "proc/.keep": "", "sys/.keep": ""})
    (root / "diff/c1").mkdir()
    mnt = root / "mnt/c1"
    mnt.mkdir(parents=True)
    branches = ":".join(f"{root}/diff/{name}" for name in ("c1=rw", "c1-init=ro+wh", "app=ro+wh", "base=ro+wh"))
    command("mount", "--driver", "aufs", "-o", f"br:{branches},dirperm1", mnt)
    try:
        bundle = u.base / "bundle"
        bundle.mkdir()
        run("runc", "spec", cwd=bundle)
        config = json.loads((bundle / "config.json").read_text())
        script = "test ! -e /etc/issue; /app/run; /app/run; cat /srv/log; rm -r /srv/old; echo c1 > /etc/hostname;"
        script += "ls /srv"
        config["process"] |= {"terminal": False, "args": ["sh", "-ec", script]}
        config["process"].pop("rlimits", None)
        config["root"] = {"path": str(mnt), "readonly": False}
        (bundle / "config.json").write_text(json.dumps(config))
        name = f"unionfs-{os.getpid()}"
        out = run("runc", "--root", u.base / "state", "run", "--bundle", bundle, name)
        assert out.split() == ["ran", "ran", "log"]
        diff = command("diff", mnt).stdout.split("\n")
        assert {"A /srv/log", "D /srv/old", "C /etc/hostname"} <= set(diff), diff
    finally:
        if is_mounted(mnt):
            umount(mnt)
    assert (root / "diff/c1/srv/log").read_text() == "ran\nran\n"
    assert (root / "diff/c1/srv/.wh.old").exists()
    assert (root / "diff/c1/etc/hostname").read_text() == "c1\n"
    assert (root / "diff/c1-init/etc/hostname").read_text() == ""
    wait_until_clean(root)
