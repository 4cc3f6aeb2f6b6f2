"""The messages of containerd's snapshots service, version 1, built at run time: there is no generated code to keep.

From containerd's api/services/snapshots/v1/snapshots.proto and api/types/mount.proto.
"""

from __future__ import annotations

import re
from typing import Any

from google.protobuf import descriptor_pb2, descriptor_pool, empty_pb2, field_mask_pb2, message_factory, timestamp_pb2

SERVICE = "containerd.services.snapshots.v1.Snapshots"
KINDS = {"view": 1, "active": 2, "committed": 3}

_PACKAGE = "containerd.services.snapshots.v1"
_TYPES = "containerd.types"
_KEY = "snapshotter=1 key=2"
# name=number is a string; `name=number:TYPE` of another type; `*` repeated; `map` of strings to strings.
_MESSAGES = {
    "PrepareSnapshotRequest": f"{_KEY} parent=3 labels=4:map",
    "PrepareSnapshotResponse": "mounts=1:Mount*",
    "ViewSnapshotRequest": f"{_KEY} parent=3 labels=4:map",
    "ViewSnapshotResponse": "mounts=1:Mount*",
    "MountsRequest": _KEY,
    "MountsResponse": "mounts=1:Mount*",
    "RemoveSnapshotRequest": _KEY,
    "CommitSnapshotRequest": "snapshotter=1 name=2 key=3 labels=4:map parent=5",
    "StatSnapshotRequest": _KEY,
    "Info": "name=1 parent=2 kind=3:Kind created_at=4:Timestamp updated_at=5:Timestamp labels=6:map",
    "StatSnapshotResponse": "info=1:Info",
    "UpdateSnapshotRequest": "snapshotter=1 info=2:Info update_mask=3:FieldMask",
    "UpdateSnapshotResponse": "info=1:Info",
    "ListSnapshotsRequest": "snapshotter=1 filters=2:string*",
    "ListSnapshotsResponse": "info=1:Info*",
    "UsageRequest": _KEY,
    "UsageResponse": "size=1:int64 inodes=2:int64",
    "CleanupRequest": "snapshotter=1",
}
_NAMED = {
    "Mount": f".{_TYPES}.Mount",
    "Info": f".{_PACKAGE}.Info",
    "Timestamp": ".google.protobuf.Timestamp",
    "FieldMask": ".google.protobuf.FieldMask",
}
_Field = descriptor_pb2.FieldDescriptorProto


def _add_message(file: Any, name: str, fields: str) -> None:
    message = file.message_type.add(name=name)
    for match in re.finditer(r"(\w+)=(\d+)(?::(\w+)(\*?))?", fields):
        field = message.field.add(name=match[1], number=int(match[2]), label=_Field.LABEL_OPTIONAL)
        kind = match[3] or "string"
        if match[4] or kind == "map":
            field.label = _Field.LABEL_REPEATED
        if kind == "string":
            field.type = _Field.TYPE_STRING
        elif kind == "int64":
            field.type = _Field.TYPE_INT64
        elif kind == "Kind":
            field.type, field.type_name = _Field.TYPE_ENUM, f".{_PACKAGE}.Kind"
        elif kind == "map":
            entry = message.nested_type.add(name=f"{match[1].title()}Entry")
            entry.options.map_entry = True
            for number, part in enumerate(("key", "value"), 1):
                entry.field.add(name=part, number=number, label=_Field.LABEL_OPTIONAL, type=_Field.TYPE_STRING)
            field.type, field.type_name = _Field.TYPE_MESSAGE, f".{_PACKAGE}.{name}.{entry.name}"
        else:
            field.type, field.type_name = _Field.TYPE_MESSAGE, _NAMED[kind]


def _build() -> dict[str, Any]:
    pool = descriptor_pool.DescriptorPool()
    for known in (empty_pb2, field_mask_pb2, timestamp_pb2):
        pool.AddSerializedFile(known.DESCRIPTOR.serialized_pb)
    types = descriptor_pb2.FileDescriptorProto(name="types/mount.proto", package=_TYPES, syntax="proto3")
    _add_message(types, "Mount", "type=1 source=2 target=3 options=4:string*")
    pool.AddSerializedFile(types.SerializeToString())
    file = descriptor_pb2.FileDescriptorProto(name="snapshots.proto", package=_PACKAGE, syntax="proto3")
    file.dependency.extend(
        ["types/mount.proto", "google/protobuf/timestamp.proto", "google/protobuf/field_mask.proto"]
    )
    enum = file.enum_type.add(name="Kind")
    for name, number in {"unknown": 0, **KINDS}.items():
        enum.value.add(name=name.upper(), number=number)
    for name, fields in _MESSAGES.items():
        _add_message(file, name, fields)
    pool.AddSerializedFile(file.SerializeToString())
    names = [*(f"{_PACKAGE}.{name}" for name in _MESSAGES), f"{_TYPES}.Mount", "google.protobuf.Empty"]
    found = [message_factory.GetMessageClass(pool.FindMessageTypeByName(name)) for name in names]
    return {message.DESCRIPTOR.name: message for message in found}


MESSAGES = _build()  # class by name: MESSAGES["Info"]

# method -> (request, response, streamed)
METHODS = {
    "Prepare": ("PrepareSnapshotRequest", "PrepareSnapshotResponse", False),
    "View": ("ViewSnapshotRequest", "ViewSnapshotResponse", False),
    "Mounts": ("MountsRequest", "MountsResponse", False),
    "Commit": ("CommitSnapshotRequest", "Empty", False),
    "Remove": ("RemoveSnapshotRequest", "Empty", False),
    "Stat": ("StatSnapshotRequest", "StatSnapshotResponse", False),
    "Update": ("UpdateSnapshotRequest", "UpdateSnapshotResponse", False),
    "List": ("ListSnapshotsRequest", "ListSnapshotsResponse", True),
    "Usage": ("UsageRequest", "UsageResponse", False),
    "Cleanup": ("CleanupRequest", "Empty", False),
}
