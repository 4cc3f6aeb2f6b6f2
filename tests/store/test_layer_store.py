"""The store's contract, for each driver: layers, mounts, content, upkeep."""

from __future__ import annotations

import io
import os
import signal
import sqlite3
import subprocess
import sys
import tarfile
import threading
from pathlib import Path

import pytest

from unionfs.store import layers, servers
from unionfs.store.api import (
    Change,
    Exists,
    InUse,
    Invalid,
    NotFound,
    Precondition,
    StoreError,
    Unsupported,
    default_root,
    open_store,
    stored_drivers,
)
from unionfs.store.base import UNPACKING
from unionfs.store.db import MIGRATIONS
from unionfs.store.layers import LayerStore

from .conftest import Opener, archive


def base_layer(store: LayerStore, id: str = "base") -> None:
    store.create(id)
    files = ("etc/passwd", b"root\n"), ("etc/old", b"x"), ("bin/sh", b"s" * 70000)
    store.apply(id, archive(("etc/", None), ("bin/", None), *files))
    store.commit(id, id)


def names(data: bytes) -> list[str]:
    with tarfile.open(fileobj=io.BytesIO(data)) as tar:
        return tar.getnames()


def test_life_of_a_container_layer(store: LayerStore) -> None:
    base_layer(store)
    layer = store.create("c", "base", labels={"a": "1"})
    assert (layer.kind, layer.parent, layer.labels, layer.size) == ("active", "base", {"a": "1"}, -1)
    path = store.get("c")
    assert sorted(os.listdir(path)) == ["bin", "etc"]
    (Path(path) / "etc/new").write_text("n")
    os.unlink(path + "/etc/passwd")
    with open(path + "/bin/sh", "r+b") as stream:
        stream.write(b"changed")
    expected = [("/bin", 0), ("/bin/sh", 0), ("/etc", 0), ("/etc/new", 1), ("/etc/passwd", 2)]
    assert store.changes("c") == [Change(*row) for row in expected]
    assert store.diff_size("c") == 70001
    mounted = b"".join(store.diff("c"))
    store.put("c")
    at_rest = b"".join(store.diff("c"))
    assert mounted == at_rest
    assert names(at_rest) == ["bin", "bin/sh", "etc", "etc/new", "etc/.wh.passwd"]

    # the difference, applied to the same parent, is the same tree
    store.create("copy", "base")
    applied = store.apply("copy", io.BytesIO(at_rest))
    assert applied.size == 70001
    assert b"".join(store.diff("copy")) == at_rest
    frozen = store.commit("copy", "copied", labels={"b": "2"})
    assert (frozen.kind, frozen.labels, frozen.diff_id) == ("committed", {"b": "2"}, applied.diff_id)
    assert frozen.size > 0 and not store.exists("copy")
    whole = names(b"".join(store.diff("copied", "")))
    assert whole == ["bin", "bin/sh", "etc", "etc/new", "etc/old"]
    assert store.fsck() == []
    for id in ("c", "copied", "base"):
        store.remove(id)
    assert store.layers() == [] and os.listdir(os.path.join(store.home, "layers")) == []


def test_references(store: LayerStore) -> None:
    base_layer(store)
    store.create("c", "base")
    path = store.get("c")
    assert store.get("c") == path and store.mounted() == {"c": (path, 2)}
    store.put("c")
    assert os.listdir(path) and store.mounted() == {"c": (path, 1)}
    for refused in (lambda: store.remove("c"), lambda: store.commit("c", "x"), lambda: store.apply("c", archive())):
        with pytest.raises(InUse, match="mounted"):
            refused()
    store.put("c")
    store.put("c")
    assert store.mounted() == {}
    store.get("c")
    store.get("c")
    store.release("c")
    assert store.mounted() == {} and servers.mountpoints(store.home) == set()


def test_view_and_committed_are_read_only(open_layers: Opener) -> None:
    store = open_layers("overlay")
    base_layer(store)
    store.create("v", "base", kind="view")
    for id in ("v", "base"):
        path = store.get(id)
        assert (Path(path) / "etc/passwd").read_text() == "root\n"
        with pytest.raises(OSError):
            (Path(path) / "x").write_text("")
        store.put(id)
    with pytest.raises(Precondition):
        store.commit("v", "w")
    with pytest.raises(Invalid, match="needs a parent"):
        store.create("w", kind="view")


def test_refusals(store: LayerStore) -> None:
    base_layer(store)
    with pytest.raises(Exists):
        store.create("base")
    with pytest.raises(NotFound):
        store.create("c", "nothing")
    for bad in ("", "../x", "a/b", "-x", "x" * 129, "é"):
        with pytest.raises(Invalid, match="1 to 128"):
            store.create(bad)
    store.create("c", "base")
    with pytest.raises(Precondition, match="commit that first"):
        store.create("d", "c")
    with pytest.raises(InUse, match="parent of c"):
        store.remove("base")
    with pytest.raises(Precondition):
        store.apply("base", archive())
    with pytest.raises(Exists):
        store.commit("c", "base")
    with pytest.raises(NotFound):
        store.remove("nothing")
    with pytest.raises(Invalid, match="did you mean"):
        LayerStore(os.path.dirname(store.home), "overlai", {})
    with pytest.raises(Invalid, match="option"):
        LayerStore(os.path.dirname(store.home), "overlay", {"sinc": "on"})
    with pytest.raises(Invalid, match="unknown option"):
        store.create("e", "base", options={"colour": "red"})
    with pytest.raises(Invalid, match="not a size"):
        store.create("e", "base", options={"size": "many"})
    assert [layer.id for layer in store.layers()] == ["base", "c"]


def test_quota_only_where_the_driver_has_one(open_layers: Opener) -> None:
    store = open_layers("vfs")
    with pytest.raises(Unsupported, match="quota"):
        store.create("c", options={"size": "1g"})


def test_labels(open_layers: Opener) -> None:
    store = open_layers("vfs")
    store.create("c", labels={"a": "1", "b": "2"})
    assert store.set_labels("c", {"b": "", "c": "3"}, replace=False).labels == {"a": "1", "c": "3"}
    changed = store.set_labels("c", {"d": "4"}, replace=True)
    assert changed.labels == {"d": "4"} and changed.updated > changed.created
    assert store.commit("c", "d").labels == {}  # not inherited
    store.create("e", labels={"x": "y"})
    assert store.commit("e", "e").labels == {"x": "y"}  # but kept where it is frozen in place


def test_one_process_at_a_time(open_layers: Opener) -> None:
    store = open_layers("vfs")
    with pytest.raises(InUse, match=f"in use by process {os.getpid()}"):
        open_store(os.path.dirname(store.home), "vfs")
    assert stored_drivers(os.path.dirname(store.home)) == ["vfs"]
    store.close()
    open_layers("vfs")


def test_mounts_outlive_the_process(open_layers: Opener) -> None:
    store = open_layers("overlay")
    base_layer(store)
    store.create("c", "base")
    path = store.get("c")
    (Path(path) / "kept").write_text("k")
    store.close()
    assert (Path(path) / "kept").read_text() == "k"
    again = open_layers("overlay")
    assert again.mounted() == {"c": (path, 1)}
    assert again.get("c") == path
    again.release("c")
    assert not os.path.ismount(path)


def test_references_of_lost_mounts_are_forgotten(open_layers: Opener) -> None:
    store = open_layers("overlay")
    store.create("c")
    path = store.get("c")
    store.close()
    servers.drop(path)
    assert open_layers("overlay").mounted() == {}


def test_dead_server_is_replaced(open_layers: Opener) -> None:
    store = open_layers("overlay")
    base_layer(store)
    store.create("c", "base")
    path = store.get("c")
    said = subprocess.run(
        [os.path.join(os.path.dirname(sys.executable), "unionfs"), "list", "--json"], capture_output=True, check=True
    )
    import json

    (pid,) = [row["pid"] for row in json.loads(said.stdout) if row["mountpoint"] == path]
    os.kill(pid, signal.SIGKILL)
    assert store.get("c") == path
    assert os.listdir(path)
    store.release("c")


def test_zygote_is_replaced(open_layers: Opener) -> None:
    store = open_layers("overlay")
    store.create("a")
    store.get("a")
    process = store._servers._process
    assert process is not None
    process.kill()
    process.wait()
    store.create("b")
    assert os.path.ismount(store.get("b"))


def test_failed_mount_takes_its_reference_back(open_layers: Opener) -> None:
    store = open_layers("overlay", mountopt="no_such_option")
    store.create("a")
    with pytest.raises(StoreError, match="no_such_option"):
        store.get("a")
    assert store.mounted() == {}
    store.remove("a")


def test_busy_mount_is_let_go(open_layers: Opener) -> None:
    store = open_layers("overlay")
    store.create("a")
    path = store.get("a")
    with open(path + "/f", "w") as stream:
        store.put("a")
        assert not os.path.ismount(path)
        stream.write("still there")
    store.remove("a")
    assert store.layers() == [] and store.fsck() == []


def test_commit_waits_for_a_server_that_still_writes(open_layers: Opener, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(layers, "SERVER_WAIT", 0.2)
    store = open_layers("overlay")
    store.create("a")
    path = store.get("a")
    stream = open(path + "/f", "w")
    store.put("a")  # let go lazily: the server is there as long as the file is open
    with pytest.raises(InUse, match="still at work"):
        store.commit("a", "b")
    assert store.layer("a").kind == "active"
    stream.write("the end")
    stream.close()
    monkeypatch.setattr(layers, "SERVER_WAIT", 60)
    store.commit("a", "b")
    assert Path(store.branches("b")[0][0], "f").read_text() == "the end"


def test_many_threads(open_layers: Opener) -> None:
    store = open_layers("overlay")
    base_layer(store)
    failures: list[BaseException] = []

    def work(number: int) -> None:
        try:
            for turn in range(3):
                id = f"c{number}-{turn}"
                store.create(id, "base")
                path = store.get(id)
                (Path(path) / "f").write_text(id)
                store.put(id)
                store.commit(id, f"{id}-done")
                assert [change.path for change in store.changes(f"{id}-done")] == ["/f"]
                store.remove(f"{id}-done")
        except BaseException as error:
            failures.append(error)

    threads = [threading.Thread(target=work, args=(number,)) for number in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert failures == []
    assert [layer.id for layer in store.layers()] == ["base"] and store.fsck() == []


def test_commit_onto_a_parent(open_layers: Opener) -> None:
    store = open_layers("overlay")
    store.create("base")
    store.apply("base", archive(("./", None), ("a", b"a"), mode=0o711))
    store.commit("base", "base")
    store.create("apart")
    store.apply("apart", archive(("b", b"b")))
    assert store.commit("apart", "top", parent="base").parent == "base"
    path = store.get("top")
    assert sorted(os.listdir(path)) == ["a", "b"]
    assert os.stat(path).st_mode & 0o777 == 0o711  # the root as the parent has it: the archive had none
    store.put("top")


def test_branches_and_metadata(open_layers: Opener) -> None:
    store = open_layers("overlay")
    base_layer(store)
    store.create("c", "base")
    lowers, upper, work = store.branches("c")
    assert lowers == [store.branches("base")[0][0]] and upper.endswith("/diff") and os.path.isdir(work)
    data = store.metadata("c")
    assert data["LowerDir"] == lowers[0] and data["UpperDir"] == upper and data["MergedDir"] == store.get("c")
    store.put("c")
    status = dict(store.status())
    assert status["Layers"] == "2" and status["Supports d_type"] == "true"


def test_cleanup_takes_what_no_row_names(open_layers: Opener) -> None:
    store = open_layers("overlay")
    base_layer(store)
    stray = Path(store.home) / "layers" / "0123456789ab"
    (stray / "diff").mkdir(parents=True)
    deep = stray / "diff"
    fd = os.open(deep, os.O_RDONLY)
    for _ in range(1500):  # deeper than a path, or Python's stack, can be
        os.mkdir("d", dir_fd=fd)
        inner = os.open("d", os.O_RDONLY, dir_fd=fd)
        os.close(fd)
        fd = inner
    os.close(fd)
    store.create("half", labels={UNPACKING: "1"})  # an unpacking of another process
    assert len(store.fsck()) == 1
    assert len(store.cleanup()) == 2
    assert not stray.exists() and not store.exists("half") and store.exists("base")
    assert store.fsck() == []


def test_fsck_finds_a_lost_layer(open_layers: Opener) -> None:
    store = open_layers("overlay")
    base_layer(store)
    store.create("c", "base")
    os.rename(store.branches("c")[1], store.home + "/elsewhere")
    (found,) = store.fsck()
    assert "layer c: its content" in found
    assert any("removed: layer c" in text for text in store.fsck(repair=True))
    assert store.fsck() == [] and not store.exists("c")


def test_old_database_is_brought_up_to_date(open_layers: Opener, tmp_path: Path) -> None:
    """A store as the first version wrote it, with one layer in it."""
    home = tmp_path / "data" / "overlay"
    (home / "layers/aa/diff").mkdir(parents=True)
    (home / "layers/aa/merged").mkdir()
    old = sqlite3.connect(home / "store.db")
    old.executescript(f"{MIGRATIONS[0]}; PRAGMA user_version=1;")
    old.execute(
        "INSERT INTO layers (id, kind, directory, created, updated) VALUES ('old', 'committed', 'aa', 1.0, 2.0)"
    )
    old.commit()
    old.close()
    store = open_layers("overlay")
    assert [layer.id for layer in store.layers()] == ["old"]
    assert store.db.rows("SELECT * FROM images") == [] and store.fsck() == []


def test_newer_database_is_refused(open_layers: Opener, tmp_path: Path) -> None:
    open_layers("vfs").close()
    newer = sqlite3.connect(tmp_path / "data/vfs/store.db")
    newer.execute("PRAGMA user_version=99")
    newer.close()
    with pytest.raises(Unsupported, match="newer unionfs"):
        open_layers("vfs")


def test_damaged_database_is_named(open_layers: Opener, tmp_path: Path) -> None:
    open_layers("vfs").close()
    for name in ("store.db-wal", "store.db-shm"):
        (tmp_path / "data/vfs" / name).unlink(missing_ok=True)
    (tmp_path / "data/vfs/store.db").write_bytes(b"not a database" * 100)
    with pytest.raises(StoreError, match=r"store\.db: .*backup"):
        open_layers("vfs")


def test_full_disk(open_layers: Opener, tmp_path: Path) -> None:
    if os.geteuid() != 0:
        pytest.skip("mounting a small tmpfs needs root")
    from unionfs.store.api import NoSpace

    (tmp_path / "data").mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=4m", "none", tmp_path / "data"], check=True)
    try:
        store = open_layers("overlay")
        store.create("a")
        with pytest.raises(NoSpace, match="entry 'big'"):
            store.apply("a", archive(("big", os.urandom(8 << 20))))
        store.remove("a")
        assert store.fsck() == []
        store.close()
    finally:
        subprocess.run(["umount", tmp_path / "data"], check=True)


def test_default_root(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "geteuid", lambda: 0)
    assert default_root() == "/var/lib/unionfs"
    monkeypatch.setattr(os, "geteuid", lambda: 1000)
    monkeypatch.setenv("XDG_DATA_HOME", "/home/u/data")
    assert default_root() == "/home/u/data/unionfs"


@pytest.mark.parametrize("driver", ["overlay", "row"])
def test_quota_of_a_container(open_layers: Opener, driver: str) -> None:
    store = open_layers(driver)
    base_layer(store)
    store.create("c", "base", options={"size": "4m"})
    path = Path(store.get("c"))
    with pytest.raises(OSError, match="No space left"):
        (path / "big").write_bytes(bytes(range(256)) * (8 << 12))
    (path / "big").unlink()
    (path / "small").write_bytes(b"s" * 100_000)
    assert (path / "bin/sh").read_bytes() == b"s" * 70000
    store.put("c")
    assert store.usage("c").size < 4 << 20
    store.commit("c", "c")
    store.create("free", "c")  # what a container was held to does not bind those above it
    path = Path(store.get("free"))
    (path / "big").write_bytes(bytes(range(256)) * (8 << 12))
    store.put("free")


def test_quota_for_all(open_layers: Opener) -> None:
    store = open_layers("overlay", size="2m")
    store.create("c")
    with pytest.raises(OSError, match="No space left"):
        Path(store.get("c"), "big").write_bytes(bytes(range(256)) * (4 << 12))
    store.put("c")
