"""The serving process of a guarded mount: another one takes its place when it dies (unionfs/guard)."""

from __future__ import annotations

import os
import sys
import threading
from time import sleep

from unionfs.errors import EXIT_FAILURE, EXIT_OK, MountError
from unionfs.front.server import Server
from unionfs.guard import supervisor as guard
from unionfs.guard.journal import VERSION

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable
    from typing import Any

CHECK_TIMEOUT = 30.0


class Worker(Server):
    """What it closes is closed for its successors too: only who ends in good order may clean up."""

    def __init__(self, supervisor: guard.Supervisor, tell: Callable[[MountError | None], None]) -> None:
        super().__init__(supervisor.config, supervisor.ops, supervisor.fd, tell, supervisor.make_session())
        self._supervisor = supervisor
        self._upgrading = False
        if supervisor.device:
            self._new_log = 0  # why the last worker died is in it

    def run(self) -> int:
        try:
            code = super().run()
        except MountError as error:
            print(f"unionfs: {error}", file=sys.stderr)
            return error.code
        return guard.EXIT_UPGRADE if code == EXIT_OK and self._upgrading else code

    def _device(self) -> int:
        """Found and told to the supervisor by the first worker."""
        if not self._supervisor.device:
            self._supervisor.mounted(super()._device())
        return self._supervisor.device

    def _on_failure(self, error: Exception) -> None:
        """Leave the mount alone: the supervisor sends another."""
        if not self._supervisor.device:
            super()._on_failure(error)
            return
        raise error

    def _verbs(self) -> dict[str, Any]:
        verbs = super()._verbs()
        verbs["upgrade"] = self._upgrade
        for name in ("branch", "snapshot"):
            if name in verbs:
                verbs[name] = self._noted(verbs[name])
        return verbs

    def _noted(self, change: Callable[..., Any]) -> Callable[..., Any]:
        def run(**arguments: Any) -> Any:
            self._supervisor.layers_change()
            result = change(**arguments)
            self._supervisor.layers_changed()
            return result

        return run

    def _upgrade(self) -> dict[str, Any]:
        """Make place for a worker of the code on disk, if that starts and reads our journal. Its answer comes first."""
        import subprocess

        command = [sys.executable, *guard.RESUME, "--check"]
        result = subprocess.run(command, capture_output=True, text=True, timeout=CHECK_TIMEOUT, cwd="/")
        if result.returncode:
            reason = (result.stderr.strip().splitlines() or [f"exit code {result.returncode}"])[-1]
            raise MountError(f"the code on disk does not start ({reason}): nothing was changed", EXIT_FAILURE)
        theirs = result.stdout.strip()
        if theirs != str(VERSION):
            raise MountError(
                f"the code on disk reads journals of version {theirs}, the running server's is of version {VERSION}: "
                "nothing was changed; unmount and mount again",
                EXIT_FAILURE,
            )
        threading.Thread(target=self._make_place, name="upgrade", daemon=True).start()
        return {"pid": os.getpid()}

    def _make_place(self) -> None:
        sleep(0.05)  # our answer is on its way
        self._upgrading = True
        assert self._session is not None
        self._session.stop()  # type: ignore[attr-defined]
