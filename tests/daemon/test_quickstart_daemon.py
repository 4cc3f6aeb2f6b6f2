"""What a newcomer runs works, and leaves nothing behind."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

SCRIPT = Path(__file__).parents[2] / "scripts" / "quickstart"


def test_quickstart_daemon(tmp_path: Path) -> None:
    environment = {**os.environ, "UNIONFS_VENV": sys.prefix, "TMPDIR": str(tmp_path)}
    done = subprocess.run([SCRIPT, "daemon"], env=environment, capture_output=True, text=True, timeout=200)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    assert done.stderr == ""
    for said in ("Storage Driver: overlay", "made by busybox", "1 mounts found serving", "oci-layout", "stopped"):
        assert said in done.stdout
    assert list(tmp_path.iterdir()) == []
    assert str(tmp_path) not in Path("/proc/self/mountinfo").read_text()
