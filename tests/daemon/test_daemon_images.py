"""Images and containers through the daemon: with curl, and with the classes that the verbs use at a distance."""

from __future__ import annotations

import io
import json
import os
import subprocess
import tarfile
import threading
from collections.abc import Callable
from pathlib import Path

import pytest
from daemon_harness import Daemon, tar_of, unionfs

from unionfs.daemon.client import Client
from unionfs.daemon.remote import RemoteContainers, RemoteImages
from unionfs.store.api import InUse, Invalid, NotFound


@pytest.fixture
def images(running: Daemon) -> RemoteImages:
    return RemoteImages(Client(running.host))


@pytest.fixture
def containers(running: Daemon) -> RemoteContainers:
    return RemoteContainers(Client(running.host))


def names(tar: bytes) -> list[str]:
    with tarfile.open(fileobj=io.BytesIO(tar)) as archive:
        return sorted(member.name for member in archive)


def test_a_container_with_curl(running: Daemon) -> None:
    made = running.put_tar("/images/import?name=base", tar_of({"etc/issue": b"one\n", "bin/x": b"x"}), method="POST")
    assert (made.status, made.json["name"]) == (201, "base:latest")
    assert running.curl("/images").json == [made.json]
    box = running.post("/containers", {"image": "base", "name": "box"}).json
    assert (box["name"], box["image"], box["mountpoint"]) == ("box", "base:latest", "")
    tree = Path(running.post("/containers/box/mount").json["path"])
    (tree / "etc/issue").write_bytes(b"two\n")
    assert running.curl("/containers/box").json["mountpoint"] == str(tree)
    assert {"path": "/etc/issue", "kind": 0} in running.curl("/containers/box/changes").json
    assert running.curl("/images/base", "-X", "DELETE").status == 409
    assert running.curl("/containers/box", "-X", "DELETE").status == 409
    assert running.curl("/containers/box/mount", "-X", "DELETE").status == 204
    new = running.post("/containers/box/commit", {"image": "team/new:1", "comment": "two"}).json
    assert new["name"] == "team/new:1"
    history = running.curl("/images/team/new:1/history").json
    assert [step["comment"] for step in history] == ["two", "imported from a tar"]
    assert running.curl("/images/team/new:1/config").json["rootfs"]["type"] == "layers"
    assert names(running.curl("/containers/box/export").body) == ["bin", "bin/x", "etc", "etc/issue"]
    assert running.curl("/containers/box/usage").json["inodes"] > 0
    assert running.post("/images/team/new:1/tag", {"name": "newer"}).json["name"] == "newer:latest"
    info = running.curl("/info").json
    assert (info["images"], info["containers"]) == (3, 1)
    assert running.curl("/containers/box", "-X", "DELETE").status == 204
    for name in ("team/new:1", "newer", "base"):
        assert running.curl(f"/images/{name}", "-X", "DELETE").status == 200
    assert running.curl("/layers").json == []
    assert running.post("/fsck").json == []


def test_what_skopeo_makes_is_loaded_and_saved(running: Daemon, images: RemoteImages, tmp_path: Path) -> None:
    running.put_tar("/images/import?name=base:1", tar_of({"etc/issue": b"one\n"}), method="POST")
    layout, archive = tmp_path / "layout", tmp_path / "archive.tar"
    images.save("base:1", f"oci:{layout}:1")
    copy = ["skopeo", "--insecure-policy", "copy", f"oci:{layout}:1", f"docker-archive:{archive}:docker.io/team/base:2"]
    subprocess.run(copy, check=True, capture_output=True, timeout=120)

    progress: list[str] = []
    loaded = images.load(f"docker-archive:{archive}", "from-docker", lambda what, done, total: progress.append(what))
    assert [image.name for image in loaded] == ["from-docker:latest"]
    assert "upload" in progress
    assert [image.name for image in images.load(f"oci:{layout}:1", "from-oci:3")] == ["from-oci:3"]
    assert images.get("from-docker").layer == images.get("from-oci:3").layer  # shared

    answer = running.put_tar("/images?name=curl", archive.read_bytes(), method="POST")
    lines = [json.loads(line) for line in answer.body.splitlines()]
    assert lines[-1]["result"][0]["name"] == "curl:latest"
    saved = tmp_path / "saved.tar"
    saved.write_bytes(running.curl("/images/curl/save").body)
    copy = ["skopeo", "--insecure-policy", "copy", f"oci-archive:{saved}", f"dir:{tmp_path / 'dir'}"]
    subprocess.run(copy, check=True, capture_output=True, timeout=120)
    assert os.listdir(running.root / "tmp") == []


def test_verbs_at_a_distance(
    running: Daemon, images: RemoteImages, containers: RemoteContainers, tmp_path: Path
) -> None:
    image = images.import_tar(io.BytesIO(tar_of({"f": b"x"})), "base", {"Cmd": ["/bin/sh"]})
    assert images.all() == [image]
    assert images.config("base")["config"] == {"Cmd": ["/bin/sh"]}
    box = containers.create("base", "box")
    assert containers.all() == [box]
    tree = Path(containers.mount("box"))
    (tree / "\udcff").write_bytes(b"y")
    with pytest.raises(InUse, match="box is mounted"):
        containers.remove("box")
    containers.unmount("box")
    assert ("/\udcff", 1) in containers.changes("box")
    assert names(b"".join(containers.export("box")))
    committed = containers.commit("box", "new", "why")
    assert images.history("new")[0]["comment"] == "why"
    assert images.tag("new", "newer").layer == committed.layer
    assert containers.usage("box").inodes > 0
    first = images.save("new", f"oci:{tmp_path / 'a'}")
    assert images.save("new", f"oci:{tmp_path / 'b'}") == first
    containers.remove("box")
    for name in ("new", "newer"):
        images.remove(name)
    with pytest.raises(NotFound, match="no image new"):
        images.get("new")


def test_archives_that_are_none(running: Daemon, images: RemoteImages, tmp_path: Path) -> None:
    junk = tmp_path / "junk"
    junk.write_bytes(b"junk" * 10000)
    with pytest.raises(Invalid, match="not an archive of an image"):
        images.load(f"docker-archive:{junk}", "x")
    (tmp_path / "tar").write_bytes(tar_of({"f": b"x"}))
    with pytest.raises(Invalid, match=r"neither an OCI layout .* nor docker's"):
        images.load(f"docker-archive:{tmp_path / 'tar'}", "x")
    outside = running.base / "outside"
    hostile = tar_of({"index.json": b"{}", "../../../outside": b"x", "blobs/sha256/../../../outside": b"x"})
    (tmp_path / "hostile").write_bytes(hostile)
    with pytest.raises(Invalid):
        images.load(f"docker-archive:{tmp_path / 'hostile'}", "x")
    assert not outside.exists()
    for source in ("docker-archive:/absent", "oci:/absent", "rsync:/x", "oci"):
        with pytest.raises((Invalid, NotFound), match=source):
            images.load(source, "x")
    assert os.listdir(running.root / "tmp") == []
    assert running.curl("/images").json == []


@pytest.mark.parametrize(
    ("path", "method", "body", "status"),
    [
        ("/images/import?name=Up", "POST", None, 400),
        ("/images/import?name=..", "POST", None, 400),
        ("/images/import", "POST", None, 400),
        ("/images/import?name=a&config=[]", "POST", None, 400),
        ("/images/absent", "DELETE", None, 404),
        ("/images/absent/history", "GET", None, 404),
        ("/images/absent/save", "GET", None, 404),
        ("/images/absent/save?compression=rar", "GET", None, 400),
        ("/images/../../etc/passwd/config", "GET", None, 400),
        ("/images/absent/tag", "POST", {"name": "../x"}, 404),
        ("/containers", "POST", {"image": "absent"}, 404),
        ("/containers", "POST", {"image": "a", "name": "../x"}, 400),
        ("/containers", "POST", {}, 400),
        ("/containers/absent", "GET", None, 404),
        ("/containers/absent/mount", "POST", None, 404),
        ("/containers/absent/commit", "POST", {"image": "x"}, 404),
    ],
)
def test_refused_names(rest: Daemon, path: str, method: str, body: object, status: int) -> None:
    answer = rest.post(path, body, method)
    assert answer.status == status, answer.body
    assert "\n" not in answer.message


def test_many_loads_at_once(running: Daemon, images: RemoteImages, tmp_path: Path) -> None:
    images.import_tar(io.BytesIO(tar_of({str(number): os.urandom(1000) for number in range(100)})), "base")
    images.save("base", f"oci:{tmp_path / 'layout'}")
    images.remove("base")
    failures: list[BaseException] = []

    def guarded(action: Callable[[], object]) -> None:
        try:
            action()
        except BaseException as error:
            failures.append(error)

    threads = [
        threading.Thread(target=guarded, args=(lambda n=n: images.load(f"oci:{tmp_path / 'layout'}", f"copy:{n}"),))
        for n in range(8)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(120)
    assert failures == []
    assert len({image.layer for image in images.all()}) == 1
    assert len(running.curl("/layers").json) == 1
    assert running.post("/fsck").json == []


def test_verbs_that_people_type(running: Daemon, tmp_path: Path) -> None:
    """The same command lines as on a data root, with the daemon in the environment or before the verb."""

    def say(*argv: object) -> str:
        return unionfs(*argv, UNIONFS_HOST=running.host).stdout

    (tmp_path / "tree.tar").write_bytes(tar_of({"etc/issue": b"one\n"}))
    assert say("image", "import", tmp_path / "tree.tar", "base:1").startswith("base:1 ")
    assert unionfs("-H", running.host, "images").stdout.splitlines()[1].startswith("base:1 ")
    assert say("create", "--name", "box", "base:1") == "box\n"
    tree = Path(running.post("/containers/box/mount").json["path"])
    (tree / "etc/issue").write_bytes(b"two\n")
    assert json.loads(say("ps", "--json", "--size"))[0]["mountpoint"] == str(tree)
    assert say("commit", "--message", "why", "box", "base:2").startswith("sha256:")
    assert json.loads(say("history", "--json", "base:2"))[0]["comment"] == "why"
    say("export", "--output", tmp_path / "whole.tar", "box")
    say("export", "--changes", "--output", tmp_path / "changes.tar", "box")
    assert "etc/issue" in names((tmp_path / "whole.tar").read_bytes())
    assert "etc/issue" in names((tmp_path / "changes.tar").read_bytes())
    say("save", "base:2", f"oci:{tmp_path / 'out'}:2")
    say("image", "tag", "base:2", "other:2")
    assert say("image", "load", f"oci:{tmp_path / 'out'}:2", "again:2").startswith("again:2 ")
    refused = unionfs("rmi", "base:1", check=False, UNIONFS_HOST=running.host)
    assert refused.returncode == 4
    assert "used by the container box" in refused.stderr
    refused = unionfs("images", "--data-root", "/x", check=False, UNIONFS_HOST=running.host)
    assert "--data-root is the daemon's to choose" in refused.stderr
    assert say("rm", "--force", "box") == "box\n"
    say("rmi", "base:1", "base:2", "other:2", "again:2")
    assert running.curl("/layers").json == []


def test_the_data_root_of_a_daemon_is_not_for_others(running: Daemon) -> None:
    done = unionfs("images", "--data-root", running.root, check=False)
    assert done.returncode == 4
    assert "if that is the daemon, go through it (unionfs -H" in done.stderr
