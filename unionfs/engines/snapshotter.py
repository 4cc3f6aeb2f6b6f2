"""containerd's proxy snapshotter: `Snapshots` as the gRPC service containerd.services.snapshots.v1 on a unix socket.

Only translates: messages to arguments, errors to status codes. grpcio's own threads run the calls.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import Any

import grpc

from unionfs.engines.snapshots import Info, Mount, Snapshots
from unionfs.engines.snapshots_proto import KINDS, MESSAGES, METHODS, SERVICE
from unionfs.errors import MountError
from unionfs.store.api import Exists, InUse, Invalid, NoSpace, NotFound, Precondition, Store, StoreError, Unsupported

THREADS = 16
BATCH = 100  # snapshots in a message of List

CODES = {
    NotFound: grpc.StatusCode.NOT_FOUND,
    Exists: grpc.StatusCode.ALREADY_EXISTS,
    InUse: grpc.StatusCode.FAILED_PRECONDITION,
    Precondition: grpc.StatusCode.FAILED_PRECONDITION,
    Invalid: grpc.StatusCode.INVALID_ARGUMENT,
    Unsupported: grpc.StatusCode.UNIMPLEMENTED,
    NoSpace: grpc.StatusCode.RESOURCE_EXHAUSTED,
}

log = logging.getLogger("unionfs.containerd")


def serve(store: Store, socket: str) -> Any:
    """A started grpc.Server on a new unix socket, mode 600. `stop(grace).wait()` ends it; the store stays open.

    The socket's directory must be there; a dead socket of that name is replaced.
    """
    server = grpc.server(ThreadPoolExecutor(THREADS, "containerd"))
    server.add_generic_rpc_handlers((_Service(Snapshots(store)).handler(),))
    old = os.umask(0o177)
    try:
        server.add_insecure_port(f"unix:{socket}")
    except RuntimeError as error:
        raise MountError(f"socket {socket}: {error}") from None
    finally:
        os.umask(old)
    server.start()
    return server


class _Service:
    def __init__(self, snapshots: Snapshots) -> None:
        self._snapshots = snapshots

    def handler(self) -> Any:
        handlers = {}
        for name, (request, _, streamed) in METHODS.items():
            make = grpc.unary_stream_rpc_method_handler if streamed else grpc.unary_unary_rpc_method_handler
            run = _stream if streamed else _call
            handlers[name] = make(
                partial(run, getattr(self, f"_{name.lower()}")),
                request_deserializer=MESSAGES[request].FromString,
                response_serializer=lambda message: message.SerializeToString(),
            )
        return grpc.method_handlers_generic_handler(SERVICE, handlers)

    def _prepare(self, request: Any) -> Any:
        mounts = self._snapshots.prepare(request.key, request.parent, dict(request.labels))
        return MESSAGES["PrepareSnapshotResponse"](mounts=map(_mount, mounts))

    def _view(self, request: Any) -> Any:
        mounts = self._snapshots.view(request.key, request.parent, dict(request.labels))
        return MESSAGES["ViewSnapshotResponse"](mounts=map(_mount, mounts))

    def _mounts(self, request: Any) -> Any:
        return MESSAGES["MountsResponse"](mounts=map(_mount, self._snapshots.mounts(request.key)))

    def _commit(self, request: Any) -> Any:
        self._snapshots.commit(request.name, request.key, dict(request.labels), request.parent)
        return MESSAGES["Empty"]()

    def _remove(self, request: Any) -> Any:
        self._snapshots.remove(request.key)
        return MESSAGES["Empty"]()

    def _stat(self, request: Any) -> Any:
        return MESSAGES["StatSnapshotResponse"](info=_info(self._snapshots.stat(request.key)))

    def _update(self, request: Any) -> Any:
        info = self._snapshots.update(request.info.name, dict(request.info.labels), list(request.update_mask.paths))
        return MESSAGES["UpdateSnapshotResponse"](info=_info(info))

    def _list(self, request: Any) -> Iterator[Any]:
        found = self._snapshots.list(list(request.filters))
        for start in range(0, len(found), BATCH):
            yield MESSAGES["ListSnapshotsResponse"](info=map(_info, found[start : start + BATCH]))

    def _usage(self, request: Any) -> Any:
        usage = self._snapshots.usage(request.key)
        return MESSAGES["UsageResponse"](size=usage.size, inodes=usage.inodes)

    def _cleanup(self, request: Any) -> Any:
        self._snapshots.cleanup()
        return MESSAGES["Empty"]()


def _call(method: Callable[[Any], Any], request: Any, context: Any) -> Any:
    try:
        return method(request)
    except Exception as error:
        _refuse(error, context)


def _stream(method: Callable[[Any], Iterator[Any]], request: Any, context: Any) -> Iterator[Any]:
    try:
        yield from method(request)
    except Exception as error:
        _refuse(error, context)


def _refuse(error: Exception, context: Any) -> None:
    """Ends the call with the status of the error (`abort` raises)."""
    if isinstance(error, StoreError):
        log.debug("%s", error)
        context.abort(CODES.get(type(error), grpc.StatusCode.INTERNAL), str(error))
    log.exception("a call failed")
    context.abort(grpc.StatusCode.INTERNAL, f"{type(error).__name__}: {error}")


def _mount(mount: Mount) -> Any:
    return MESSAGES["Mount"](type=mount.type, source=mount.source, options=mount.options)


def _info(info: Info) -> Any:
    message = MESSAGES["Info"](name=info.name, parent=info.parent, kind=KINDS[info.kind], labels=info.labels)
    for stamp, seconds in ((message.created_at, info.created), (message.updated_at, info.updated)):
        stamp.FromNanoseconds(int(seconds * 1e9))
    return message
