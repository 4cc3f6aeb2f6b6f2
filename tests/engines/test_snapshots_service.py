"""containerd's rules for snapshotters, asked of the gRPC service: a port of its core/snapshots/testsuite, and more.

The service is a process of its own, mounts are made as containerd makes them.
"""

from __future__ import annotations

import os
import signal
import stat
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import grpc
import pytest

from unionfs.engines.snapshots_proto import KINDS, MESSAGES, METHODS, SERVICE

from . import harness
from .test_docker_plugin import end, wait_for

UNIONFS = Path(sys.executable).with_name("unionfs")
CODE = grpc.StatusCode


class Client:
    def __init__(self, root: Path, driver: str) -> None:
        self.root, self.driver = root, driver
        self.process: subprocess.Popen[bytes] | None = None
        self.channel: Any = None

    def start(self) -> None:
        socket, log = self.root / "socket", self.root / "log"
        with log.open("a") as out:
            self.process = subprocess.Popen(
                [UNIONFS, "plugin", "containerd", "--data-root", self.root / "data", "--storage-driver", self.driver,
                 "--storage-opt", "sync=off", "--socket", socket],
                stdin=subprocess.DEVNULL, stdout=out, stderr=subprocess.STDOUT, start_new_session=True,
            )  # fmt: skip
        wait_for(lambda: harness.answers(socket), self.process, log)
        self.channel = grpc.insecure_channel(f"unix:{socket}")

    def stop(self, how: int = signal.SIGTERM) -> None:
        assert self.process is not None
        self.channel.close()
        end(self.process, how)

    def __call__(self, method: str, **fields: Any) -> Any:
        request, response, streamed = METHODS[method]
        make = self.channel.unary_stream if streamed else self.channel.unary_unary
        call = make(
            f"/{SERVICE}/{method}",
            request_serializer=MESSAGES[request].SerializeToString,
            response_deserializer=MESSAGES[response].FromString,
        )
        message = MESSAGES[request](snapshotter="unionfs", **fields)
        return list(call(message, timeout=60)) if streamed else call(message, timeout=60)

    def refused(self, code: Any, method: str, **fields: Any) -> None:
        with pytest.raises(grpc.RpcError) as raised:
            self(method, **fields)
        assert raised.value.code() == code, raised.value.details()
        assert "snap-" not in raised.value.details()  # our own names are nobody's business

    def prepare(self, key: str, parent: str = "", **labels: str) -> Any:
        return self("Prepare", key=key, parent=parent, labels=labels).mounts

    def commit(self, name: str, key: str, **labels: str) -> None:
        self("Commit", name=name, key=key, labels=labels)

    def stat(self, key: str) -> Any:
        return self("Stat", key=key).info

    def names(self, *filters: str) -> set[str]:
        return {info.name for message in self("List", filters=filters) for info in message.info}

    @contextmanager
    def mounted(self, mounts: Any) -> Iterator[Path]:
        (mount,) = mounts
        assert mount.type == "bind" and "rbind" in mount.options
        target = self.root / "target"
        target.mkdir(exist_ok=True)
        harness.run("mount", "--rbind", mount.source, target)
        if "ro" in mount.options:
            harness.run("mount", "-o", "remount,bind,ro", target)
        try:
            yield target
        finally:
            harness.run("umount", "--recursive", target)

    def layer(self, name: str, parent: str, script: str) -> None:
        """A committed snapshot in which a script ran."""
        with self.mounted(self.prepare(f"{name}-active", parent)) as root:
            harness.run("sh", "-ec", script, cwd=root)
        self.commit(name, f"{name}-active")

    def look(self, parent: str, script: str) -> str:
        """What a script says in a view of a committed snapshot."""
        with self.mounted(self("View", key="look", parent=parent).mounts) as root:
            out = harness.run("sh", "-ec", script, cwd=root)
        self("Remove", key="look")
        return out


@pytest.fixture(params=["overlay", "aufs", "row", "vfs"])
def service(scratch: Path, request: pytest.FixtureRequest) -> Iterator[Client]:
    client = Client(scratch, request.param)
    try:
        client.start()
        yield client
        for message in reversed(client("List")):  # children first
            for info in reversed(message.info):
                client("Remove", key=info.name)
        client("Cleanup")
        client.stop()
        assert len(list((scratch / "data" / client.driver / "layers").iterdir())) <= 1  # the empty base of views
    except BaseException:
        print((scratch / "log").read_text()[-4000:])
        raise
    finally:
        if client.process is not None and client.process.poll() is None:
            end(client.process, signal.SIGTERM)
    harness.wait_until_clean(scratch)


only_overlay = pytest.mark.parametrize("service", ["overlay"], indirect=True)


def test_basic(service: Client) -> None:
    with service.mounted(service.prepare("one")) as root:
        (root / "foo").write_text("foo\n")
        (root / "a" / "b" / "c").mkdir(parents=True)
    service.commit("committed", "one")
    assert service.stat("committed").kind == KINDS["committed"]
    assert service.stat("committed").parent == ""
    with service.mounted(service.prepare("next", "committed")) as root:
        (root / "bar").write_text("bar\n")
        (root / "foo").unlink()
        (root / "a" / "b" / "c").rmdir()
    service.commit("second", "next")
    assert service.stat("second").parent == "committed"
    assert service.look("committed", "find . | sort") == ".\n./a\n./a/b\n./a/b/c\n./foo"
    assert service.look("second", "find . | sort") == ".\n./a\n./a/b\n./bar"


def test_stat_and_kinds(service: Client) -> None:
    service.prepare("active", "", x="1")
    info = service.stat("active")
    assert (info.name, info.parent, info.kind, dict(info.labels)) == ("active", "", KINDS["active"], {"x": "1"})
    assert info.created_at.ToSeconds() > 1 << 30 and info.updated_at.ToSeconds() >= info.created_at.ToSeconds()
    service.commit("done", "active", y="2")
    after = service.stat("done")
    assert (after.kind, dict(after.labels)) == (KINDS["committed"], {"y": "2"})  # replaced, not inherited
    assert after.created_at.ToNanoseconds() >= info.created_at.ToNanoseconds()
    service.refused(CODE.NOT_FOUND, "Stat", key="active")
    service("View", key="view", parent="done")
    assert service.stat("view").kind == KINDS["view"]
    service("View", key="of nothing", parent="")
    with service.mounted(service("Mounts", key="of nothing").mounts) as root:
        assert list(root.iterdir()) == []


@only_overlay
def test_what_is_refused(service: Client) -> None:
    service.prepare("active")
    service.layer("base", "", "touch file")
    service("View", key="view", parent="base")
    for method in ("Prepare", "View"):
        service.refused(CODE.NOT_FOUND, method, key="new", parent="missing")
        service.refused(CODE.INVALID_ARGUMENT, method, key="new", parent="active")
        service.refused(CODE.INVALID_ARGUMENT, method, key="new", parent="view")
        service.refused(CODE.INVALID_ARGUMENT, method, key="", parent="base")
        for key in ("active", "base", "view"):
            service.refused(CODE.ALREADY_EXISTS, method, key=key, parent="base")
    for method in ("Mounts", "Stat", "Remove", "Usage"):
        service.refused(CODE.NOT_FOUND, method, key="missing")
        service.refused(CODE.INVALID_ARGUMENT, method, key="")
    service.refused(CODE.FAILED_PRECONDITION, "Mounts", key="base")
    service.refused(CODE.NOT_FOUND, "Commit", name="new", key="missing")
    service.refused(CODE.ALREADY_EXISTS, "Commit", name="base", key="active")
    service.refused(CODE.INVALID_ARGUMENT, "Commit", name="", key="active")
    service.refused(CODE.FAILED_PRECONDITION, "Commit", name="new", key="view")
    service.refused(CODE.FAILED_PRECONDITION, "Commit", name="new", key="base")
    service.refused(CODE.FAILED_PRECONDITION, "Remove", key="base")
    service.refused(CODE.NOT_FOUND, "Update", info=MESSAGES["Info"](name="missing"))
    service.refused(CODE.INVALID_ARGUMENT, "Prepare", key="new", labels={"containerd.io/snapshot/uidmapping": "0:1"})
    service.refused(CODE.INVALID_ARGUMENT, "Prepare", key="new", labels={"containerd.io/snapshot/max-size": "much"})
    assert service.names() == {"active", "base", "view"}


def test_keys_may_be_anything(service: Client) -> None:
    for key in ("test/12/extract-1-ab sha256:0f", "../../etc", "ü" * 300, "-", "\n"):
        service.prepare(key)
        assert service.stat(key).name == key
        service.commit(f"{key}!", key)
        service("Remove", key=f"{key}!")


@only_overlay
def test_update(service: Client) -> None:
    service.prepare("s", "", a="1", b="2")

    def update(labels: dict[str, str], *paths: str) -> dict[str, str]:
        mask = {"update_mask": {"paths": paths}} if paths else {}
        info = service("Update", info={"name": "s", "labels": labels}, **mask).info
        assert info == service.stat("s")
        return dict(info.labels)

    assert update({"b": "3", "c": "4"}, "labels.b") == {"a": "1", "b": "3"}
    assert update({"x.y/z": "5"}, "labels.x.y/z") == {"a": "1", "b": "3", "x.y/z": "5"}
    assert update({}, "labels.a") == {"b": "3", "x.y/z": "5"}
    assert update({"n": "6"}, "labels") == {"n": "6"}
    assert update({"m": "7"}) == {"m": "7"}
    for path in ("parent", "kind", "name", "labels."):
        service.refused(CODE.INVALID_ARGUMENT, "Update", info={"name": "s"}, update_mask={"paths": [path]})
    service.commit("done", "s", k="v")
    info = service("Update", info={"name": "done", "labels": {"k": "w"}}).info
    assert (dict(info.labels), info.kind) == ({"k": "w"}, KINDS["committed"])


@only_overlay
def test_list_and_filters(service: Client) -> None:
    service.prepare("base-active")
    service.commit("base", "base-active", **{"a/b": "one"})
    service.prepare("top", "base", colour="red")
    service("View", key="look", parent="base")
    assert service.names() == {"base", "top", "look"}
    assert service.names("kind==active") == {"top"}
    assert service.names("kind==active", "kind==view") == {"top", "look"}
    assert service.names("parent==base,kind!=view") == {"top"}
    assert service.names("labels.colour") == {"top"}
    assert service.names('labels."a/b"==one') == {"base"}
    assert service.names('name~="^(to|lo)"') == {"top", "look"}
    assert service.names("name~=/o+k/") == {"look"}
    assert service.names("nothing") == set()
    for bad in ("kind=", "kind==", ",", "name~=(", 'a."', "kind==active,", "kind==active name==x"):
        service.refused(CODE.INVALID_ARGUMENT, "List", filters=[bad])
    for number in range(105):
        service("View", key=f"view-{number}", parent="base")
    assert len(service.names()) == 108
    assert [len(message.info) for message in service("List")] == [100, 8]


def test_usage(service: Client) -> None:
    service.layer("base", "", "head -c 1000000 /dev/urandom > big; mkdir dir; touch dir/small")
    base = service("Usage", key="base")
    assert 1000000 <= base.size < 1200000
    assert base.inodes == 4
    with service.mounted(service.prepare("top", "base")) as root:
        (root / "more").write_bytes(os.urandom(100000))
        (root / "dir" / "small").write_text("changed")
    top = service("Usage", key="top")
    if service.driver != "vfs":  # which copies its parent
        assert 100000 <= top.size < 200000
    service.commit("done", "top")
    assert service("Usage", key="done") == service("Usage", key="done")
    assert service("Usage", key="base") == base


def test_layers_of_all_kinds_of_changes(service: Client) -> None:
    service.layer(
        "1", "",
        "mkdir -p dir/sub lower gone; echo 1 > dir/file; echo 1 > dir/sub/file; echo low > lower/file; touch gone/x;"
        "chmod 750 dir; chown 1:2 dir; ln dir/file dir/link; ln -s file dir/symlink",
    )  # fmt: skip
    service.layer("2", "1", "echo 2 > dir/file; rm -r gone; mv lower renamed; chown 7:8 dir/sub; chmod 711 dir/sub")
    service.layer("3", "2", "mkdir gone; mv dir/sub dir/moved; rm dir/symlink; echo back > gone/y")
    look = "ls -R . | grep -v '^$'; cat dir/file dir/moved/file renamed/file; stat -c '%n %a %u:%g' dir dir/moved"
    assert service.look("3", look).splitlines() == [
        ".:", "dir", "gone", "renamed", "./dir:", "file", "link", "moved", "./dir/moved:", "file", "./gone:", "y",
        "./renamed:", "file", "2", "1", "low", "dir 750 1:2", "dir/moved 711 7:8",
    ]  # fmt: skip
    assert service.look("1", "ls; cat dir/file lower/file") == "dir\ngone\nlower\n1\nlow"


def test_removal_of_an_intermediate(service: Client) -> None:
    for name, parent in (("a", ""), ("b", "a"), ("c", "b")):
        service.layer(name, parent, f"touch {name}")
    service.refused(CODE.FAILED_PRECONDITION, "Remove", key="b")
    assert service.look("c", "ls") == "a\nb\nc"
    service("Remove", key="c")
    service("Remove", key="b")
    service("Remove", key="a")
    assert service.names() == set()


def test_view_is_read_only(service: Client) -> None:
    service.layer("base", "", "echo x > file")
    with service.mounted(service("View", key="view", parent="base").mounts) as root:
        assert (root / "file").read_text() == "x\n"
        with pytest.raises(OSError, match="Read-only"):
            (root / "new").touch()


def test_root_permissions(service: Client) -> None:
    with service.mounted(service.prepare("active")) as root:
        assert stat.S_IMODE(root.stat().st_mode) == 0o755
        root.chmod(0o1777)
        os.chown(root, 5, 6)
    service.commit("base", "active")
    assert service.look("base", "stat -c '%a %u:%g' .") == "1777 5:6"
    service.prepare("next", "base")
    service.commit("next-done", "next")
    assert service.look("next-done", "stat -c '%a %u:%g' .") == "1777 5:6"


@only_overlay
def test_128_layers(service: Client) -> None:
    parent = ""
    for number in range(128):
        with service.mounted(service.prepare("active", parent)) as root:
            (root / f"file-{number}").write_text(str(number))
            (root / "all").write_text(f"{number}\n")
        parent = f"layer-{number}"
        service.commit(parent, "active")
    assert service.look(parent, "ls | wc -l; cat all file-0 file-127") == "129\n127\n0127"


@only_overlay
def test_owners_by_label(service: Client) -> None:
    service.layer("base", "", "touch file; chown 5:6 file")
    maps = {f"containerd.io/snapshot/{kind}mapping": "0:100000:65536" for kind in ("uid", "gid")}
    with service.mounted(service("Prepare", key="remapped", parent="base", labels=maps).mounts) as root:
        assert ((root / "file").stat().st_uid, (root / "file").stat().st_gid) == (100005, 100006)
    assert dict(service.stat("remapped").labels) == maps


@pytest.mark.parametrize("service", ["overlay", "row"], indirect=True)
def test_quota_by_label(service: Client) -> None:
    service.layer("base", "", "touch file")
    labels = {"containerd.io/snapshot/max-size": "2m"}
    with service.mounted(service("Prepare", key="small", parent="base", labels=labels).mounts) as root:
        (root / "fits").write_bytes(bytes(1 << 20))
        with pytest.raises(OSError, match=r"No space left|quota"), open(root / "more", "wb", buffering=0) as stream:
            for _ in range(64):
                stream.write(os.urandom(1 << 16))
            os.fsync(stream.fileno())


@only_overlay
def test_rebase_at_commit(service: Client) -> None:
    service.layer("base", "", "touch below")
    with service.mounted(service.prepare("alone")) as root:
        (root / "above").touch()
    service("Commit", name="joined", key="alone", parent="base")
    assert service.stat("joined").parent == "base"
    assert service.look("joined", "ls") == "above\nbelow"
    service.prepare("top", "base")
    service.refused(CODE.FAILED_PRECONDITION, "Commit", name="x", key="top", parent="joined")
    service("Commit", name="x", key="top", parent="base")


@only_overlay
def test_mounts_are_found_and_made_again(service: Client) -> None:
    service.layer("base", "", "echo x > file")
    (mount,) = service.prepare("active", "base")
    (Path(mount.source) / "mine").touch()
    service.stop(signal.SIGKILL)
    assert (Path(mount.source) / "file").read_text() == "x\n"
    service.start()
    assert service("Mounts", key="active").mounts[0] == mount
    harness.run("umount", mount.source)  # as a reboot does
    assert service("Mounts", key="active").mounts[0] == mount
    assert sorted(os.listdir(mount.source)) == ["file", "mine"]
    service.stop()
    harness.run("umount", mount.source)
    service.start()
    assert service("Mounts", key="active").mounts[0] == mount
    assert sorted(os.listdir(mount.source)) == ["file", "mine"]


@only_overlay
def test_socket_is_its_owners(service: Client) -> None:
    assert stat.S_IMODE((service.root / "socket").stat().st_mode) == 0o600
    again = subprocess.run(
        [UNIONFS, "plugin", "containerd", "--data-root", service.root / "other", "--socket", service.root / "socket"],
        capture_output=True, text=True, timeout=60,
    )  # fmt: skip
    assert again.returncode == 4 and "another process serves it" in again.stderr
    again = subprocess.run(
        [UNIONFS, "plugin", "containerd", "--data-root", service.root / "data", "--socket", service.root / "s2"],
        capture_output=True, text=True, timeout=60,
    )  # fmt: skip
    assert again.returncode == 4 and "in use" in again.stderr
    assert not (service.root / "s2").exists()
