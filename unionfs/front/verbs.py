"""What every mount answers on its control socket: ping, status, which, diff."""

from __future__ import annotations

import os
import time

from unionfs import assemble

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any

    from unionfs.api import MountConfig, Operations, Session
    from unionfs.front.control import Handler


def common_verbs(
    config: MountConfig, ops: Operations, session: Session | None, started: float
) -> dict[str, Handler]:
    def ping() -> dict[str, Any]:
        return {
            "mountpoint": os.fsdecode(config.mountpoint),
            "driver": config.driver,
            "session": assemble.session_kind(config),
            "read_only": config.read_only,
            "pid": os.getpid(),
            "uptime": round(time.time() - started, 3),
        }

    def status() -> dict[str, Any]:
        return {
            **ping(),
            "lowers": [os.fsdecode(path) for path in config.lowers],
            "upper": None if config.upper is None else os.fsdecode(config.upper),
            "work": None if config.work is None else os.fsdecode(config.work),
            "branches": [[os.fsdecode(path), mode] for path, mode in config.branches],
            "data": config.data,
            "options": config.options,
            "statistics": {"core": ops.statistics(), "session": session.statistics() if session else {}},
        }

    def which(path: str) -> list[dict[str, Any]]:
        return [_jsonable(found) for found in ops.which(os.fsencode(path))]

    def diff() -> list[list[str]]:
        return [[kind, os.fsdecode(path)] for kind, path in ops.diff()]

    return {"ping": ping, "status": status, "which": which, "diff": diff}


def _jsonable(row: dict[str, Any]) -> dict[str, Any]:
    return {key: os.fsdecode(value) if isinstance(value, bytes) else value for key, value in row.items()}
