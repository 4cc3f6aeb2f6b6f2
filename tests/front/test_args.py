"""The table-driven command line."""

from __future__ import annotations

import subprocess
import sys

import pytest

from unionfs.errors import EXIT_USAGE, MountError
from unionfs.front.args import Command, Option, help_text, parse
from unionfs.front.cli import COMMANDS, main
from unionfs.front.mount import COMMAND as MOUNT
from unionfs.front.mount import configure

TABLE = Command(
    "test",
    "A test.",
    [Option("-f --fast", "fast"), Option("-d", "d"), Option("-o --options", "opts", "X"),
     Option("--kind", "kind", "K", ("a", "b"))],
    "ARG...",
    1,
    2,
)  # fmt: skip


@pytest.mark.parametrize(
    ("argv", "given", "arguments"),
    [
        (["x"], {}, ["x"]),
        (["-f", "x"], {"fast": [""]}, ["x"]),
        (["x", "-fd"], {"fast": [""], "d": [""]}, ["x"]),
        (["-ofoo", "x", "-o", "bar"], {"options": ["foo", "bar"]}, ["x"]),
        (["--options=a=b", "x"], {"options": ["a=b"]}, ["x"]),
        (["--options", "-f", "x"], {"options": ["-f"]}, ["x"]),
        (["-fo", "v", "x"], {"fast": [""], "options": ["v"]}, ["x"]),
        (["-fov", "x"], {"fast": [""], "options": ["v"]}, ["x"]),
        (["--", "-f", "x"], {}, ["-f", "x"]),
        (["--kind=a", "-"], {"kind": ["a"]}, ["-"]),
    ],
)
def test_parse(argv: list[str], given: dict[str, list[str]], arguments: list[str]) -> None:
    parsed = parse(TABLE, argv)
    assert parsed.given == given
    assert parsed.arguments == arguments


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        ([], "missing argument: test ARG..."),
        (["a", "b", "c"], "unexpected argument 'c'"),
        (["--fats", "x"], "unknown option --fats, did you mean --fast?"),
        (["-z", "x"], "unknown option -z"),
        (["x", "-o"], "-o needs a value: -o X"),
        (["--fast=1", "x"], "--fast takes no value"),
        (["--kind=c", "x"], "--kind is one of a, b, not 'c'"),
    ],
)
def test_wrong_usage(argv: list[str], message: str) -> None:
    with pytest.raises(MountError) as caught:
        parse(TABLE, argv)
    assert message in str(caught.value)
    assert caught.value.code == EXIT_USAGE


def test_help_wins_over_what_is_missing() -> None:
    assert "help" in parse(TABLE, ["-h"])
    text = help_text(TABLE)
    assert text.startswith("usage: test [OPTIONS] ARG...\n")
    assert "--kind K" in text and "(a|b)" in text


def test_mount_command_line() -> None:
    argv = ["--lower", r"/a:/b\:c", "-l", "/d", "-u", "/x/up", "-o", "ro,noexec", "-o", "timeout=3", "/m"]
    config = configure(parse(MOUNT, argv))
    assert config.lowers == [b"/a", b"/b:c", b"/d"]
    assert config.upper == b"/x/up"
    assert config.work == b"/x/.up.work"
    assert config.read_only
    assert config.options == {"timeout": "3"}
    assert not config.foreground


def test_mount_without_upper_is_read_only() -> None:
    assert configure(parse(MOUNT, ["-l/a", "/m"])).read_only


def test_debug_stays_in_the_foreground() -> None:
    assert configure(parse(MOUNT, ["-d", "-l/a", "/m"])).foreground


def test_branches() -> None:
    config = configure(parse(MOUNT, ["-D", "aufs", "-b", "/a=b=rw", "-b", "/c", "/m"]))
    assert config.branches == [(b"/a=b", "rw"), (b"/c", "")]
    assert not config.read_only


@pytest.mark.parametrize("name", COMMANDS)
def test_every_command_has_help(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([name, "--help"]) == 0
    assert capsys.readouterr().out.startswith(f"usage: unionfs {name}")


@pytest.mark.parametrize(
    ("argv", "code", "message"),
    [
        ([], EXIT_USAGE, "no command given"),
        (["mout"], EXIT_USAGE, "unknown command mout, did you mean mount?"),
        (["mount", "-l", "/a"], EXIT_USAGE, "missing argument"),
        (["mount", "/m"], 3, "no layers"),
        (["completion", "tcsh"], EXIT_USAGE, "bash, zsh, fish"),
    ],
)
def test_errors_are_one_line_and_a_code(
    argv: list[str], code: int, message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(argv) == code
    err = capsys.readouterr().err
    assert err.startswith("unionfs: ") and err.count("\n") == 1 and message in err


def test_nothing_heavy_on_the_way_to_a_mount() -> None:
    """Each of these costs more than the mount itself; see docs/architecture.md, "Start-up"."""
    heavy = {
        "argparse", "asyncio", "dataclasses", "enum", "importlib.metadata", "inspect", "json", "logging", "pathlib",
        "pyfuse3", "re", "shutil", "signal", "socket", "subprocess", "tempfile", "trio", "typing", "xattr",
    }  # fmt: skip
    code = (
        "import sys; sys.path[:0] = sys.argv[1:]; before = set(sys.modules)\n"
        "import unionfs.front.mount, unionfs.front.fuse_overlayfs, unionfs.front.mount_helper, unionfs.front.server\n"
        "import unionfs.front.control, unionfs.front.verbs, unionfs.session.direct\n"
        "print(*(set(sys.modules) - before))"
    )
    command = [sys.executable, "-I", "-S", "-c", code, *sys.path]
    loaded = set(subprocess.run(command, check=True, capture_output=True, text=True, timeout=60).stdout.split())
    assert "unionfs.front.server" in loaded
    assert loaded & heavy == set()
