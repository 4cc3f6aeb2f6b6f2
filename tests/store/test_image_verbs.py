"""Images: exchanged with skopeo, umoci, buildah and docker's format both ways, and the verbs that people type."""

from __future__ import annotations

import hashlib
import io
import json
import os
import shutil
import subprocess
import sys
import tarfile
from pathlib import Path

import pytest

from unionfs.store import archives
from unionfs.store.api import Exists, InUse, Invalid, NotFound
from unionfs.store.containers import Containers
from unionfs.store.images import Images, chain_ids, full_name
from unionfs.store.layers import LayerStore

from .conftest import Opener, archive

UNIONFS = os.path.join(os.path.dirname(sys.executable), "unionfs")

pytestmark = pytest.mark.skipif(os.geteuid() != 0, reason="owners, devices and mounts of an image need root")


def run(*argv: object, input: bytes | None = None, **more: str) -> bytes:
    environment = {**os.environ, **more}
    done = subprocess.run([str(word) for word in argv], input=input, capture_output=True, timeout=120, env=environment)
    assert done.returncode == 0, (argv, done.stderr.decode())
    return done.stdout


def layout(directory: Path, *layers: bytes, tag: str = "one", suffix: str = "+gzip") -> str:
    """An OCI layout written by hand, so that it can be wrong where a test wants it."""
    import gzip

    blobs = directory / "blobs/sha256"
    blobs.mkdir(parents=True)

    def blob(data: bytes) -> dict[str, object]:
        digest = hashlib.sha256(data).hexdigest()
        (blobs / digest).write_bytes(data)
        return {"digest": f"sha256:{digest}", "size": len(data)}

    diff_ids = ["sha256:" + hashlib.sha256(layer).hexdigest() for layer in layers]
    config = {"architecture": "amd64", "os": "linux", "rootfs": {"type": "layers", "diff_ids": diff_ids}}
    media = "application/vnd.oci.image."
    manifest = {
        "schemaVersion": 2,
        "config": {"mediaType": media + "config.v1+json", **blob(json.dumps(config).encode())},
        "layers": [{"mediaType": f"{media}layer.v1.tar{suffix}", **blob(gzip.compress(layer))} for layer in layers],
    }
    described = {"mediaType": media + "manifest.v1+json", **blob(json.dumps(manifest).encode())}
    described["annotations"] = {archives.REF_NAME: tag}
    (directory / "index.json").write_text(json.dumps({"schemaVersion": 2, "manifests": [described]}))
    (directory / "oci-layout").write_text('{"imageLayoutVersion": "1.0.0"}')
    return f"oci:{directory}"


BASE = archive(("bin/", None), ("bin/tool", b"t" * 5000), ("etc/", None), ("etc/old", b"o")).getvalue()
SECOND = archive(("etc/", None), ("etc/.wh.old", b""), ("etc/new", b"n"), ("link", "=etc/new")).getvalue()


@pytest.fixture(params=["overlay", "aufs", "vfs"])
def library(request: pytest.FixtureRequest, open_layers: Opener) -> tuple[LayerStore, Images, Containers]:
    store = open_layers(request.param)
    images = Images(store)
    return store, images, Containers(store, images)


def test_life_of_an_image(library: tuple[LayerStore, Images, Containers], tmp_path: Path) -> None:
    store, images, containers = library
    (image,) = images.load(layout(tmp_path / "in", BASE, SECOND), "app")
    assert image.name == "app:latest" and images.all() == [image] and images.get(image.id[7:15]) == image
    expected = chain_ids(["sha256:" + hashlib.sha256(layer).hexdigest() for layer in (BASE, SECOND)])
    assert sorted(layer.id for layer in store.layers()) == sorted(expected)  # unpacked side by side
    container = containers.create("app", "work")
    with pytest.raises(Exists):
        containers.create("app", "work")
    path = store.get(container.layer)
    assert sorted(os.listdir(path + "/etc")) == ["new"]
    (Path(path) / "made").write_text("here")
    assert [change.path for change in containers.changes("work")] == ["/made"]
    committed = containers.commit("work", "app:2", "a note")
    assert committed.id != image.id and images.history("app:2")[0]["comment"] == "a note"
    with pytest.raises(InUse, match="mounted"):
        containers.remove("work")
    with pytest.raises(InUse, match="container work"):
        images.remove("app")
    with tarfile.open(fileobj=io.BytesIO(b"".join(containers.export("work")))) as tar:
        assert {"bin/tool", "etc/new", "link", "made"} <= set(tar.getnames())
    containers.remove("work", force=True)

    manifest = images.save("app:2", f"oci:{tmp_path}/out")
    assert images.save("app:2", f"oci:{tmp_path}/again") == manifest  # reproducible
    images.remove("app")
    images.remove("app:2")
    assert store.layers() == [] and store.db.rows("SELECT * FROM blobs") == []
    (back,) = images.load(f"oci:{tmp_path}/out", "back:1")
    assert images.save("back:1", f"oci:{tmp_path}/third:2") == manifest
    path = store.get(containers.create("back:1", "c").layer)
    assert (Path(path) / "made").read_text() == "here" and not os.path.exists(path + "/etc/old")
    assert os.stat(path + "/link").st_ino == os.stat(path + "/etc/new").st_ino
    assert store.fsck() == [] and back.size > 0


def test_layers_are_shared_and_go_last(open_layers: Opener, tmp_path: Path) -> None:
    store = open_layers("overlay")
    images = Images(store)
    images.load(layout(tmp_path / "a", BASE), "a")
    images.load(layout(tmp_path / "b", BASE, SECOND), "b")
    assert len(store.layers()) == 2
    images.tag("b", "c")
    assert images.remove("b") == ["untagged b:latest"] and len(store.layers()) == 2
    images.load(layout(tmp_path / "d", BASE), "c")  # takes the name from the other image, whose top layer goes
    assert len(store.layers()) == 1
    images.remove("a")
    assert len(store.layers()) == 1
    assert len(images.remove("c")) == 2 and store.layers() == []


def test_fsck_finds_images_and_containers_without_layers(open_layers: Opener, tmp_path: Path) -> None:
    store = open_layers("overlay")
    images = Images(store)
    containers = Containers(store, images)
    images.load(layout(tmp_path / "in", BASE), "a")
    container = containers.create("a", "c")
    store.remove(container.layer)
    store.remove(images.get("a").layer)
    assert len(store.fsck()) == 2
    said = "\n".join(store.fsck(repair=True))
    assert "removed: image a:latest" in said and "removed: container" in said
    assert store.fsck() == [] and images.all() == [] and containers.all() == []


def test_layer_that_needs_its_parent_waits_for_it(open_layers: Opener, tmp_path: Path) -> None:
    """Unpacked side by side, a layer that leaves out a directory takes its attributes from the parent all the same."""
    store = open_layers("overlay")
    below = archive(("d/", None), ("d/x", b"x"), mode=0o751).getvalue()
    above = archive(("d/y", b"y"), ("h", "=d/x")).getvalue()
    (image,) = Images(store).load(layout(tmp_path / "in", below, above, archive(("z", b"")).getvalue()), "a")
    with tarfile.open(fileobj=io.BytesIO(b"".join(store.diff(image.layer, "")))) as tar:
        assert tar.getmember("d").mode == 0o751
        assert {"d/x", "d/y", "h", "z"} <= set(tar.getnames())


def test_damaged_images_leave_nothing(open_layers: Opener, tmp_path: Path) -> None:
    store = open_layers("overlay")
    images = Images(store)
    source = layout(tmp_path / "in", BASE, SECOND)
    for path in (tmp_path / "in/blobs/sha256").iterdir():
        good = path.read_bytes()
        for bad in (good[:-9] + bytes([good[-9] ^ 1]) + good[-8:], good[: len(good) // 2]):
            path.write_bytes(bad)
            with pytest.raises(Invalid):
                images.load(source, "a")
        path.unlink()
        with pytest.raises(NotFound, match="missing"):
            images.load(source, "a")
        path.write_bytes(good)
        assert store.layers() == [] and images.all() == []
    assert len(images.load(source, "a")) == 1 and store.fsck() == []


def test_configuration_that_lies(open_layers: Opener, tmp_path: Path) -> None:
    """The manifest's digests are right, but the configuration is another image's."""
    images = Images(open_layers("overlay"))
    layout(tmp_path / "other", SECOND)
    source = layout(tmp_path / "in", BASE)
    index = json.loads((tmp_path / "in/index.json").read_text())
    blobs = tmp_path / "in/blobs/sha256"
    for path in (tmp_path / "other/blobs/sha256").iterdir():
        shutil.copy(path, blobs)
    manifest = json.loads((blobs / index["manifests"][0]["digest"][7:]).read_text())
    other = json.loads((tmp_path / "other/index.json").read_text())["manifests"][0]["digest"][7:]
    manifest["config"] = json.loads((blobs / other).read_text())["config"]
    data = json.dumps(manifest).encode()
    digest = hashlib.sha256(data).hexdigest()
    (blobs / digest).write_bytes(data)
    index["manifests"][0]["digest"] = f"sha256:{digest}"
    (tmp_path / "in/index.json").write_text(json.dumps(index))
    with pytest.raises(Invalid, match="damaged"):
        images.load(source, "a")
    assert images.store.layers() == []


def test_hostile_documents(open_layers: Opener, tmp_path: Path) -> None:
    images = Images(open_layers("vfs"))
    for number, index in enumerate(
        (
            "[]",
            "{}",
            '{"manifests": [{"digest": "sha256:../../../../etc/passwd"}]}',
            '{"manifests": [{"digest": "md5:00"}]}',
            '{"manifests": [5]}',
            "not json",
        )
    ):
        directory = tmp_path / str(number)
        directory.mkdir()
        (directory / "index.json").write_text(index)
        with pytest.raises(Invalid):
            images.load(f"oci:{directory}", "a")
    for bad in ("", "Upper", "a b", "-x", "../x", "a:", "a:b c", "x" * 300):
        with pytest.raises(Invalid, match="image name"):
            full_name(bad)
    assert full_name("localhost:5000/a/b") == "localhost:5000/a/b:latest"
    for bad in ("x", "oci", "docker://a"):
        with pytest.raises(Invalid, match="oci:DIR"):
            images.load(bad, "a")
    with pytest.raises(NotFound):
        images.load(f"oci:{tmp_path}/nothing", "a")
    (tmp_path / "full").mkdir()
    (tmp_path / "full/file").write_text("")
    with pytest.raises(Invalid, match="neither empty"):
        images.import_tar(io.BytesIO(BASE), "x")
        images.save("x", f"oci:{tmp_path}/full")


# --- other tools ---


@pytest.fixture
def rootfs(tmp_path: Path) -> Path:
    """A tree with what gets lost between tools: owners, setuid, xattrs, links, holes, odd names."""
    tree = tmp_path / "rootfs"
    for name in ("bin", "etc", "d/empty"):
        (tree / name).mkdir(parents=True)
    shutil.copy("/bin/busybox", tree / "bin/busybox")
    os.link(tree / "bin/busybox", tree / "bin/sh")
    (tree / "bin/su").write_bytes(b"s")
    os.chown(tree / "bin/su", 12345, 54321)
    os.chmod(tree / "bin/su", 0o4755)
    os.symlink("busybox", tree / "bin/ls")
    (tree / "etc/é\n").write_text("odd")
    with open(tree / "hole", "wb") as stream:
        stream.truncate(3 << 20)
    for path in tree.rglob("*"):  # whole seconds: some tools round
        os.utime(path, (10**9, 10**9), follow_symlinks=False)
    return tree


def listing(tree: Path) -> list[tuple[object, ...]]:
    found = []
    for path in sorted(tree.rglob("*")):
        status = path.lstat()
        content = os.readlink(path) if path.is_symlink() else path.read_bytes() if path.is_file() else b""
        found.append(
            (str(path.relative_to(tree)), status.st_mode, status.st_uid, status.st_gid, content, int(status.st_mtime))
        )
    return found


def test_umoci_both_ways(open_layers: Opener, rootfs: Path, tmp_path: Path) -> None:
    theirs = tmp_path / "theirs"
    run("umoci", "init", "--layout", theirs)
    run("umoci", "new", "--image", f"{theirs}:x")
    run("umoci", "unpack", "--image", f"{theirs}:x", tmp_path / "bundle")
    run("cp", "-a", "--sparse=always", f"{rootfs}/.", tmp_path / "bundle/rootfs")
    run("umoci", "repack", "--image", f"{theirs}:x", tmp_path / "bundle")
    store = open_layers("overlay")
    images = Images(store)
    containers = Containers(store, images)
    images.load(f"oci:{theirs}:x", "x")
    path = store.get(containers.create("x", "c").layer)
    assert listing(Path(path)) == listing(rootfs)
    (Path(path) / "etc/more").write_text("m")
    os.unlink(path + "/bin/su")
    containers.commit("c", "y")
    expected = listing(Path(path))
    images.save("y", f"oci:{tmp_path}/ours:y")
    run("umoci", "unpack", "--image", f"{tmp_path}/ours:y", tmp_path / "back")
    assert listing(tmp_path / "back/rootfs") == expected


def test_skopeo_both_ways(open_layers: Opener, rootfs: Path, tmp_path: Path) -> None:
    store = open_layers("overlay")
    images = Images(store)
    images.import_tar(io.BytesIO(run("tar", "-C", rootfs, "-c", ".")), "x")
    layers = set()
    for tag, compression in (("x", "gzip"), ("z", "zstd"), ("n", "none")):
        images.save("x", f"oci:{tmp_path}/ours:{tag}", compression)
        run("skopeo", "copy", "--insecure-policy", f"oci:{tmp_path}/ours:{tag}", f"oci:{tmp_path}/theirs:{tag}")
        (again,) = images.load(f"oci:{tmp_path}/theirs:{tag}", "again")
        layers.add(again.layer)
    run("skopeo", "copy", "--insecure-policy", f"oci:{tmp_path}/ours:x", f"docker-archive:{tmp_path}/x.tar:app:9")
    (oci,) = images.load(f"oci:{tmp_path}/theirs:x", "back")
    (docker,) = images.load(f"docker-archive:{tmp_path}/x.tar")
    assert docker.name == "app:9" and layers == {oci.layer} == {docker.layer}  # the same content each time
    path = store.get(Containers(store, images).create("app:9", "c").layer)
    assert listing(Path(path)) == listing(rootfs)


def test_buildah_both_ways(open_layers: Opener, rootfs: Path, tmp_path: Path) -> None:
    storage = ["--storage-driver", "vfs", "--root", tmp_path / "storage", "--runroot", tmp_path / "run"]
    made = run("buildah", *storage, "from", "scratch").decode().strip()
    run("buildah", *storage, "copy", made, rootfs, "/")
    run("buildah", *storage, "config", "--cmd", "/bin/sh", made)
    run("buildah", *storage, "commit", made, f"oci:{tmp_path}/theirs:x")
    store = open_layers("overlay")
    images = Images(store)
    images.load(f"oci:{tmp_path}/theirs:x", "x")
    assert images.config("x")["config"]["Cmd"] == ["/bin/sh"]
    containers = Containers(store, images)
    path = store.get(containers.create("x", "c").layer)
    (Path(path) / "ours").write_text("o")
    containers.commit("c", "y")
    images.save("y", f"oci:{tmp_path}/ours:y")
    back = run("buildah", *storage, "from", f"oci:{tmp_path}/ours:y").decode().strip()
    mounted = Path(run("buildah", *storage, "mount", back).decode().strip())
    assert (mounted / "ours").read_text() == "o"
    assert listing(mounted) == listing(Path(path))
    run("buildah", *storage, "rm", "--all")


# --- verbs ---


class Verbs:
    def __init__(self, tmp_path: Path, driver: str) -> None:
        self.where = ["--data-root", str(tmp_path / "root"), "--storage-driver", driver]

    def __call__(self, verb: str, *argv: object, code: int = 0, input: bytes | None = None) -> str:
        done = subprocess.run(
            [UNIONFS, verb, *self.where, *map(str, argv)], capture_output=True, input=input, timeout=120
        )
        assert done.returncode == code, (verb, argv, done.stdout, done.stderr)
        return (done.stderr if code else done.stdout).decode()


@pytest.mark.parametrize("driver", ["overlay", "row", "vfs"])
def test_verbs(tmp_path: Path, driver: str) -> None:
    unionfs = Verbs(tmp_path, driver)
    merged = tmp_path / "merged"
    merged.mkdir()
    assert unionfs("image", "import", "-", "base", input=BASE).startswith("base:latest")
    assert json.loads(unionfs("images", "--json"))[0]["name"] == "base:latest"
    assert unionfs("images").splitlines()[1].startswith("base:latest")
    assert "imported" in unionfs("history", "base")
    assert unionfs("create", "--name", "work", "base") == "work\n"
    unionfs("mount", "--container", "work", merged)
    try:
        assert (merged / "etc/old").read_text() == "o"
        (merged / "new").write_text("n")
        assert str(merged) in unionfs("ps")
        assert "mounted" in unionfs("rm", "work", code=4)
        assert unionfs("commit", "-m", "with new", "work", "next:1").startswith("sha256:")
    finally:
        run("umount", merged)
    with tarfile.open(fileobj=io.BytesIO(_bytes(unionfs, "export", "--changes", "work"))) as tar:
        assert tar.getnames() == ["new"]
    unionfs("export", "--output", tmp_path / "whole.tar", "work")
    with tarfile.open(tmp_path / "whole.tar") as tar:
        assert {"bin/tool", "etc/old", "new"} <= set(tar.getnames())
    assert unionfs("save", "next:1", f"oci:{tmp_path}/out").startswith("sha256:")
    name = unionfs("mount", "--image", "next:1", merged).strip()
    assert (merged / "new").read_text() == "n"
    assert unionfs("rm", "--force", name, "work").split() == [name, "work"]
    assert list(merged.iterdir()) == []
    unionfs("rmi", "base", "next:1")
    assert json.loads(unionfs("images", "--json")) == [] and json.loads(unionfs("ps", "--json")) == []
    assert list((tmp_path / "root" / driver / "layers").iterdir()) == []


def _bytes(unionfs: Verbs, verb: str, *argv: str) -> bytes:
    return run(UNIONFS, verb, *unionfs.where, *argv)


def test_verbs_refuse_in_words(tmp_path: Path) -> None:
    unionfs = Verbs(tmp_path, "overlay")
    assert "no image nope" in unionfs("create", "nope", code=1)
    assert "oci:DIR" in unionfs("image", "load", "nowhere", code=2)
    assert "load, pull-from, import or tag" in unionfs("image", "push", "x", code=2)
    assert "give the image's name" in unionfs("image", "import", "-", code=2)
    assert "storage option" in unionfs("images", "--storage-opt", "sinc=off", code=2)
    assert "NAME=VALUE" in unionfs("images", "--storage-opt", "sync", code=2)
    unionfs("image", "import", "-", "base", input=BASE)
    (tmp_path / "m").mkdir()
    assert "leave it out" in unionfs("mount", "--image", "base", "--lower", "/", tmp_path / "m", code=2)
    # a mount that fails leaves no container behind
    unionfs("mount", "--image", "base", "-o", "no_such_option", tmp_path / "m", code=2)
    assert json.loads(unionfs("ps", "--json")) == []


def test_store_that_a_daemon_holds(tmp_path: Path) -> None:
    store = LayerStore(str(tmp_path / "root"), "overlay", {})
    try:
        said = Verbs(tmp_path, "overlay")("images", code=4)
        assert f"in use by process {os.getpid()}" in said and "-H unix://" in said
    finally:
        store.close()


def test_rootless(tmp_path: Path) -> None:
    """In a user namespace of its own, in the default place: import, mount, change, commit, save."""
    import tempfile

    home = Path(tempfile.mkdtemp())
    script = f"""set -e
        U="{sys.executable} -m unionfs.front.cli"
        [ "$XDG_DATA_HOME" = {home} ]
        cat {home}/base.tar | {UNIONFS} image import --data-root {home}/unionfs - base
        mkdir {home}/m
        name=$({UNIONFS} mount --data-root {home}/unionfs --image base {home}/m)
        rm {home}/m/etc/old; echo new > {home}/m/etc/new
        {UNIONFS} commit --data-root {home}/unionfs $name next
        {UNIONFS} umount {home}/m
        {UNIONFS} save --data-root {home}/unionfs next oci:{home}/out
        {UNIONFS} rm --data-root {home}/unionfs $name
    """
    try:
        (home / "base.tar").write_bytes(BASE)
        run("unshare", "-Urm", "sh", "-c", script, XDG_DATA_HOME=str(home))
        run("umoci", "unpack", "--rootless", "--image", f"{home}/out:latest", home / "b")
        assert sorted(os.listdir(home / "b/rootfs/etc")) == ["new"]
    finally:
        run("rm", "-rf", home)


def test_wrong_platform_and_foreign_layers(open_layers: Opener, tmp_path: Path) -> None:
    images = Images(open_layers("vfs"))
    layout(tmp_path / "in", BASE)
    index = json.loads((tmp_path / "in/index.json").read_text())
    index["manifests"][0]["platform"] = {"os": "plan9", "architecture": "mips"}
    inner = json.dumps({"schemaVersion": 2, "manifests": index["manifests"]}).encode()
    digest = hashlib.sha256(inner).hexdigest()
    (tmp_path / "in/blobs/sha256" / digest).write_bytes(inner)
    listed = {"mediaType": "application/vnd.oci.image.index.v1+json", "digest": f"sha256:{digest}", "size": len(inner)}
    (tmp_path / "in/index.json").write_text(json.dumps({"schemaVersion": 2, "manifests": [listed]}))
    with pytest.raises(NotFound, match="no image for linux"):
        images.load(f"oci:{tmp_path}/in", "a")


def test_progress_on_a_terminal_only(tmp_path: Path) -> None:
    """Bars go to stderr, and only if that is a terminal: standard output is for programs."""
    import pty

    source = layout(tmp_path / "in", BASE, SECOND)
    ours, theirs = pty.openpty()
    argv = [UNIONFS, "image", "load", "--data-root", tmp_path / "root", "--json", source, "app"]
    done = subprocess.run(
        argv, stdout=subprocess.PIPE, stderr=theirs, timeout=60, env={**os.environ, "TERM": "xterm", "COLUMNS": "80"}
    )
    os.close(theirs)
    shown = b""
    while True:
        try:
            piece = os.read(ours, 65536)
        except OSError:  # how a terminal ends
            break
        if not piece:
            break
        shown += piece
    os.close(ours)
    assert done.returncode == 0 and json.loads(done.stdout)[0]["name"] == "app:latest"
    assert b"layer " in shown and b"bytes" in shown
    quiet = subprocess.run([*argv[:-2], source, "again"], capture_output=True, timeout=60)
    assert quiet.returncode == 0 and quiet.stderr == b""
