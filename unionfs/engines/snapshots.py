"""containerd's snapshots over a `Store`: its words, rules and errors; no gRPC (that is `snapshotter`).

The rules are those of containerd's core/snapshots/snapshotter.go and its testsuite. One space of names for active
snapshots, views and committed ones; the store knows each by a digest of its name and keeps the name as a label.

Mounts: we mount the tree and answer with a bind mount of it. So one server serves a snapshot wherever containerd
mounts it, none is started by containerd's helpers, and a containerd that dies leaves nothing of ours. Each snapshot
has one reference, taken when its mounts are first asked for and given back by Commit and Remove; after a reboot the
next Mounts call mounts it anew.

Threads: any.
"""

from __future__ import annotations

import hashlib
import threading
from collections.abc import Mapping
from typing import NamedTuple

from unionfs.engines.filters import parse_any
from unionfs.store.api import Exists, InUse, Invalid, Kind, Layer, NotFound, Precondition, Store, Usage

NAME = "unionfs.containerd.name"  # labels of ours, which containerd does not see
PARENT = "unionfs.containerd.parent"
EMPTY = "containerd-empty"  # what a view without a parent looks at
UIDS, GIDS, SIZE = (f"containerd.io/snapshot/{name}" for name in ("uidmapping", "gidmapping", "max-size"))
_STRIPES = 32


class Info(NamedTuple):
    name: str
    parent: str
    kind: Kind
    created: float  # seconds since the epoch
    updated: float
    labels: dict[str, str]

    def field(self, path: list[str]) -> str | None:
        """For filters."""
        if path[0] == "labels":
            return self.labels.get(".".join(path[1:]))
        return {"name": self.name, "parent": self.parent, "kind": self.kind}.get(path[0]) if len(path) == 1 else None


class Mount(NamedTuple):
    type: str
    source: str
    options: list[str]


class Snapshots:
    def __init__(self, store: Store) -> None:
        self.store = store
        self._locks = [threading.Lock() for _ in range(_STRIPES)]
        self._empty = threading.Lock()

    def prepare(self, key: str, parent: str, labels: Mapping[str, str], kind: Kind = "active") -> list[Mount]:
        """A new active snapshot, or view, and how to mount it. Gone again if it can't be mounted."""
        if not key:
            raise Invalid("a snapshot needs a key")
        id = _id(key)
        if self.store.exists(id):
            raise Exists(f"snapshot {key!r} exists")
        own = {NAME: key, PARENT: parent}
        try:
            self.store.create(
                id, self._parent_id(parent, kind), kind=kind, labels={**labels, **own}, options=_options(labels, kind)
            )
        except Exists:
            raise Exists(f"snapshot {key!r} exists") from None
        try:
            return self.mounts(key)
        except BaseException:
            self.store.remove(id)
            raise

    def view(self, key: str, parent: str, labels: Mapping[str, str]) -> list[Mount]:
        return self.prepare(key, parent, labels, "view")

    def mounts(self, key: str) -> list[Mount]:
        layer = self._layer(key)
        if layer.kind == "committed":
            raise Precondition(f"snapshot {key!r} is committed: prepare one on it to mount it")
        with self._lock(layer.id):
            path = self.store.get(layer.id)  # also mounts anew what a dead server left
            if self.store.mounted()[layer.id][1] > 1:
                self.store.put(layer.id)
        return [Mount("bind", path, ["rbind", "rw" if layer.kind == "active" else "ro"])]

    def commit(self, name: str, key: str, labels: Mapping[str, str], parent: str = "") -> None:
        if not name:
            raise Invalid("a committed snapshot needs a name")
        layer = self._layer(key)
        if layer.kind != "active":
            raise Precondition(f"snapshot {key!r} is {_called(layer)}: only an active one can be committed")
        if self.store.exists(_id(name)):
            raise Exists(f"snapshot {name!r} exists")
        own = layer.labels.get(PARENT, "")
        if own and parent not in ("", own):
            raise Precondition(f"snapshot {key!r} stands on {own!r}: it can't be put on {parent!r}")
        rebased = self._parent_id(parent, "active") if parent and not own else ""
        with self._lock(layer.id):
            self.store.release(layer.id)
            try:
                self.store.commit(
                    layer.id, _id(name), labels={**labels, NAME: name, PARENT: own or parent}, parent=rebased
                )
            except Exists:
                raise Exists(f"snapshot {name!r} exists") from None

    def remove(self, key: str) -> None:
        layer = self._layer(key)
        with self._lock(layer.id):
            self.store.release(layer.id)
            try:
                self.store.remove(layer.id)
            except InUse:
                raise InUse(f"snapshot {key!r} has children: remove those first") from None

    def stat(self, key: str) -> Info:
        return _info(self._layer(key))

    def update(self, name: str, labels: Mapping[str, str], paths: list[str]) -> Info:
        """`paths`: "labels" and "labels.X"; none: all that can change. An empty value takes the label away."""
        layer = self._layer(name)
        changed = dict(layer.labels)
        for path in paths or ["labels"]:
            if path == "labels":
                changed = dict(labels)
            elif path.startswith("labels.") and path != "labels.":
                label = path.removeprefix("labels.")
                changed[label] = labels.get(label, "")
            else:
                raise Invalid(f"snapshot {name!r}: field {path!r} can't be changed: labels can")
        own = {NAME: name, PARENT: layer.labels.get(PARENT, "")}
        return _info(self.store.set_labels(layer.id, {**changed, **own}, replace=True))

    def list(self, filters: list[str]) -> list[Info]:
        passes = parse_any(filters)
        found = [_info(layer) for layer in self.store.layers() if NAME in layer.labels]
        return [info for info in found if passes(info.field)]

    def usage(self, key: str) -> Usage:
        return self.store.usage(self._layer(key).id)

    def cleanup(self) -> None:
        self.store.cleanup()

    def _layer(self, key: str) -> Layer:
        if not key:
            raise Invalid("no key given")
        try:
            return self.store.layer(_id(key))
        except NotFound:
            raise NotFound(f"snapshot {key!r} does not exist") from None

    def _parent_id(self, parent: str, kind: Kind) -> str:
        if parent:
            layer = self._layer(parent)
            if layer.kind != "committed":
                raise Invalid(f"parent {parent!r} is {_called(layer)}: commit it first")
            return layer.id
        if kind == "active":
            return ""
        with self._empty:
            if not self.store.exists(EMPTY):
                self.store.create(EMPTY)
            if self.store.layer(EMPTY).kind == "active":
                self.store.commit(EMPTY, EMPTY)
        return EMPTY

    def _lock(self, id: str) -> threading.Lock:
        return self._locks[hash(id) % _STRIPES]


def _id(name: str) -> str:
    return "snap-" + hashlib.sha256(name.encode("utf-8", "surrogatepass")).hexdigest()[:40]


def _called(layer: Layer) -> str:
    return "a view" if layer.kind == "view" else layer.kind


def _info(layer: Layer) -> Info:
    labels = {key: value for key, value in layer.labels.items() if key not in (NAME, PARENT)}
    name, parent = layer.labels[NAME], layer.labels.get(PARENT, "")
    return Info(name, parent, layer.kind, layer.created, layer.updated, labels)


def _options(labels: Mapping[str, str], kind: Kind) -> dict[str, str]:
    """The store's options that the labels ask for. containerd's maps are CONTAINER:HOST:LENGTH with commas between;
    the mount's are ID:DISK_ID:LENGTH: the host's id is what the mount shows, the container's what is on disk."""
    options = {}
    for label, option in ((UIDS, "uidmapping"), (GIDS, "gidmapping")):
        if text := labels.get(label):
            ranges = [part.split(":") for part in text.split(",")]
            if not all(len(part) == 3 for part in ranges):
                raise Invalid(f"label {label}={text}: must be CONTAINER:HOST:LENGTH, with commas between")
            options[option] = ":".join(f"{host}:{container}:{length}" for container, host, length in ranges)
    if kind == "active" and labels.get(SIZE):
        options["size"] = labels[SIZE]
    return options
