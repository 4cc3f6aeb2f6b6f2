"""Completion scripts and man pages keep up with the tables."""

from __future__ import annotations

import re
import shutil
import subprocess
from importlib import import_module
from pathlib import Path

import pytest

from unionfs.front import fuse_overlayfs
from unionfs.front.cli import COMMANDS
from unionfs.front.completion import SHELLS, script
from unionfs.front.options import COMMON

MAN = Path(__file__).parents[2] / "docs" / "man"


def plain(page: str) -> str:
    text = (MAN / page).read_text().replace("\\-", "-").replace("\\e", "\\")
    return re.sub(r"\\f[A-Z]", "", text)


@pytest.mark.parametrize("name", COMMANDS)
def test_man_page_names_every_command_and_option(name: str) -> None:
    text = plain("unionfs.1")
    assert f"unionfs {name}" in text
    for option in import_module("unionfs.front." + COMMANDS[name][0]).COMMAND.options:
        for flag in option.flags:
            assert re.search(rf"(^|[\s]){flag}\b", text), flag


def test_man_page_names_every_common_option() -> None:
    text = plain("unionfs.1")
    for name in COMMON:
        assert re.search(rf"\b{name}\b", text), name


def test_man_page_of_fuse_overlayfs() -> None:
    text = plain("unionfs-fuse-overlayfs.1")
    for name in [*fuse_overlayfs.CORE_OPTIONS, "lowerdir", "upperdir", "workdir", "fsync", "sync", "debug"]:
        assert re.search(rf"\b{name}\b", text), name


@pytest.mark.parametrize("shell", SHELLS)
def test_completion_knows_all_commands(shell: str) -> None:
    text = script(shell)
    for name, (module, _) in COMMANDS.items():
        assert name in text
        for option in import_module("unionfs.front." + module).COMMAND.options:
            assert option.name in text
    if shutil.which(shell):
        subprocess.run([shell, "-n"], input=text, text=True, check=True, timeout=60)


@pytest.mark.parametrize(
    ("words", "offered"),
    [
        ("unionfs mou", ["mount"]),
        ("unionfs mount --dri", ["--driver"]),
        ("unionfs mount --session d", ["direct"]),
        ("unionfs mount -o noat", ["noatime"]),
        ("unionfs mount -o ro,lowerd", ["ro,lowerdir="]),
        ("unionfs completion z", ["zsh"]),
        ("unionfs umount /et", ["/etc"]),
        ("unionfs mount --lower /et", ["/etc"]),
        ("unionfs umount --timeout 1", []),
    ],
)
def test_bash_completes(words: str, offered: list[str]) -> None:
    driver = (
        "compopt() { :; }\n" + script("bash") + f"\nCOMP_WORDS=({words}); COMP_CWORD=$((${{#COMP_WORDS[@]}} - 1))\n"
        '_unionfs; printf "%s\\n" "${COMPREPLY[@]}"'
    )
    done = subprocess.run(["bash", "-c", driver], capture_output=True, text=True, check=True, timeout=60)
    assert done.stderr == ""
    assert done.stdout.split() == offered
