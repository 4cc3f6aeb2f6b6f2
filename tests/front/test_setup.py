"""`unionfs setup podman`: what becomes of a storage.conf."""

from __future__ import annotations

import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

from unionfs.errors import MountError
from unionfs.front.setup import OVERLAY, with_values

UNIONFS = Path(sys.executable).with_name("unionfs")
PROGRAM = Path(sys.executable).with_name("unionfs-fuse-overlayfs")
WANTED = {"storage": {"driver": "overlay"}, OVERLAY: {"mount_program": "/p"}}


def setup(config: Path, *words: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [UNIONFS, "setup", "podman", "--config", config, *words],
        stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=60,
    )  # fmt: skip


def test_shows_first_and_writes_when_told(tmp_path: Path) -> None:
    config = tmp_path / "containers" / "storage.conf"
    config.parent.mkdir()
    before = '# mine\n[storage]\ndriver = "vfs" # old\ngraphroot = "/g"\n\n[storage.options]\npull_options = {}\n'
    config.write_text(before)
    asked = setup(config)
    assert asked.returncode == 1 and '+driver = "overlay"' in asked.stdout and "--yes" in asked.stderr
    assert config.read_text() == before
    done = setup(config, "--yes")
    assert done.returncode == 0, done.stderr
    after = tomllib.loads(config.read_text())
    assert after["storage"]["driver"] == "overlay" and after["storage"]["graphroot"] == "/g"
    assert after["storage"]["options"] == {"pull_options": {}, "overlay": {"mount_program": str(PROGRAM)}}
    assert config.read_text().startswith("# mine\n")
    assert Path(f"{config}.orig").read_text() == before
    assert "already" in setup(config).stdout


def test_bad_input(tmp_path: Path) -> None:
    config = tmp_path / "storage.conf"
    config.write_text("[storage\n")
    broken = setup(config, "--yes")
    assert broken.returncode == 1 and "by hand" in broken.stderr and config.read_text() == "[storage\n"
    absent = setup(config, "--mount-program", f"{tmp_path}/none")
    assert absent.returncode == 1 and "--mount-program" in absent.stderr


@pytest.mark.parametrize(
    "text",
    [
        "",
        '[storage]\ndriver="x"',
        '[storage.options.overlay]\nmount_program = "/old"\n[storage]\ndriver = "vfs"\n',
        '[ storage . options . "overlay" ] # here\nmountopt = "nodev"\n',
        '[[other]]\ndriver = "mine"\n',
    ],
)
def test_keeps_everything_else(text: str) -> None:
    result = tomllib.loads(with_values("storage.conf", text, WANTED))
    expected = tomllib.loads(text)
    expected.setdefault("storage", {})["driver"] = "overlay"
    expected["storage"].setdefault("options", {}).setdefault("overlay", {})["mount_program"] = "/p"
    assert result == expected


def test_a_form_that_lines_cannot_change_is_left_to_people() -> None:
    with pytest.raises(MountError, match="by hand"):
        with_values("storage.conf", 'storage = { driver = "vfs" }\n', WANTED)
