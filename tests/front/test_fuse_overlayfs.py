"""fuse-overlayfs's command line with every trap that engines were seen to set."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from unionfs.api import MountConfig
from unionfs.errors import EXIT_LAYER, EXIT_USAGE, MountError
from unionfs.front import fuse_overlayfs


def configure(*argv: str) -> tuple[MountConfig, list[str]]:
    warnings: list[str] = []
    return fuse_overlayfs.configure(argv, warnings.append), warnings


def test_podmans_container_mount() -> None:
    """As captured from podman 4.3.1: an empty option, and maps that begin with a colon."""
    config, warnings = configure(
        "-o",
        "lowerdir=/s/overlay/l/AB:/s/overlay/l/CD,upperdir=/s/overlay/x/diff,workdir=/s/overlay/x/work,,volatile,"
        'context="system_u:object_r:container_file_t:s0:c1,c2",uidmapping=:0:100000:1000,gidmapping=:0:5:1:1:9:2',
        "/s/overlay/x/merged",
    )
    assert warnings == []
    assert config.lowers == [b"/s/overlay/l/AB", b"/s/overlay/l/CD"]
    assert config.upper == b"/s/overlay/x/diff"
    assert config.work == b"/s/overlay/x/work"
    assert config.mountpoint == b"/s/overlay/x/merged"
    assert config.options["volatile"] == "1"
    assert config.options["context"] == "system_u:object_r:container_file_t:s0:c1,c2"
    assert config.options["uidmapping"] == "0:100000:1000"
    assert config.options["gidmapping"] == "0:5:1:1:9:2"
    assert not config.read_only and not config.foreground


def test_read_only_without_upper() -> None:
    config, _ = configure("-o", "lowerdir=/a:/b", "/m")
    assert config.read_only and config.upper is None and config.work is None


def test_our_own_words() -> None:
    """An engine's mountopt can choose the session and the data mode."""
    config, warnings = configure("-o", "lowerdir=/a,upperdir=/u,workdir=/w,session=pyfuse3,data=cached", "/m")
    assert (config.session, config.data, warnings) == ("pyfuse3", "cached", [])
    with pytest.raises(MountError, match="session=fast: it is one of auto, direct, pyfuse3"):
        configure("-o", "lowerdir=/a,session=fast", "/m")


def test_buildahs_overlay_volume() -> None:
    config, warnings = configure("-o", r"lowerdir=/src\:1,upperdir=/u,workdir=/w,private", "/m")
    assert config.lowers == [b"/src:1"]
    assert warnings == []


def test_apptainer_stays_in_the_foreground() -> None:
    config, warnings = configure("-f", "-o", "allow_other,ro,lowerdir=/a,upperdir=/u,workdir=/w,noacl", "/m")
    assert config.foreground and config.read_only
    assert config.options["noacl"] == "1" and "allow_other" in config.options
    assert warnings == []


def test_mount_fuse3_puts_the_source_first() -> None:
    config, warnings = configure("overlay", "/m", "-o", "lowerdir=/a,dev,suid")
    assert config.mountpoint == b"/m"
    assert config.vfs_options[-2:] == ["dev", "suid"]
    assert warnings == []


def test_relative_paths_are_taken_from_here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    config, _ = configure("-olowerdir=l/X", "merged")
    assert config.lowers == [os.fsencode(tmp_path / "l/X")]
    assert config.mountpoint == os.fsencode(tmp_path / "merged")


def test_the_last_of_an_option_counts() -> None:
    config, _ = configure("-o", "lowerdir=/a", "-o", "lowerdir=/b,squash_to_uid=5", "-o", "squash_to_uid=6", "/m")
    assert config.lowers == [b"/b"]
    assert config.options["squash_to_uid"] == "6"


@pytest.mark.parametrize(
    ("option", "name", "value"),
    [
        ("squash_to_root", "squash_to_root", "1"),
        ("squash_to_uid=12", "squash_to_uid", "12"),
        ("squash_to_gid=13", "squash_to_gid", "13"),
        ("xattr_permissions=2", "xattr_permissions", "2"),
        ("static_nlink", "static_nlink", "1"),
        ("noacl", "noacl", "1"),
        ("volatile", "volatile", "1"),
        ("fsync=0", "volatile", "1"),
        ("sync=0", "volatile", "1"),
        ("fsync=1", "volatile", "0"),
        ("noxattrs=1", "noxattrs", "1"),
        ("timeout=1000000000.0", "timeout", "1000000000.0"),
        ("redirect_dir=off", "redirect_dir", "off"),
        ("metacopy=on", "metacopy", "on"),
        ("index=off", "index", "off"),
        ("xino=auto", "xino", "auto"),
        ("ino32_t", "ino32_t", "1"),
        ("writeback=0", "writeback", "0"),
    ],
)
def test_honoured(option: str, name: str, value: str) -> None:
    config, warnings = configure("-o", f"lowerdir=/a,{option}", "/m")
    assert config.options[name] == value
    assert warnings == []


@pytest.mark.parametrize("option", ["fast_ino=1", "plugins=/x.so", "splice_read", "kernel_cache", "max_write=4096",
                                    "allow_root", "clone_fd", "auto_unmount", "max_idle_threads=4"])  # fmt: skip
def test_without_effect_is_named(option: str) -> None:
    _, warnings = configure("-o", f"lowerdir=/a,{option}", "/m")
    assert len(warnings) == 1 and warnings[0].startswith(f"option ignored: {option} (")


@pytest.mark.parametrize("argv", ["-o lowerdir=/a,frobnicate=7 /m", "--frobnicate=7 -o lowerdir=/a /m"])
def test_unknown_to_both_is_warned_about_and_skipped(argv: str) -> None:
    config, warnings = configure(*argv.split())
    assert config.lowers == [b"/a"] and config.mountpoint == b"/m"
    assert len(warnings) == 1 and "unknown argument ignored" in warnings[0] and "frobnicate=7" in warnings[0]


@pytest.mark.parametrize(
    ("argv", "code", "message"),
    [
        (("/m",), EXIT_USAGE, "no lowerdir"),
        (("-o", "lowerdir=/a"), EXIT_USAGE, "no mountpoint"),
        (("/m", "-o"), EXIT_USAGE, "missing argument"),
        (("-o", "lowerdir=/a,upperdir=/b", "/m"), EXIT_USAGE, "workdir not specified"),
        (("-o", "lowerdir=/a,uidmapping=1:2", "/m"), EXIT_USAGE, "invalid mapping"),
        (("-o", "lowerdir=/a,gidmapping=1:2:x", "/m"), EXIT_USAGE, "invalid mapping"),
        (("-o", "lowerdir=/a,squash_to_uid=root", "/m"), EXIT_USAGE, "not a number"),
        (("-o", "lowerdir=/a,squash_to_uid", "/m"), EXIT_USAGE, "needs a value"),
        (("-o", "lowerdir=//plugin/data/p", "/m"), EXIT_LAYER, "plugins are not supported"),
    ],
)
def test_errors(argv: tuple[str, ...], code: int, message: str) -> None:
    with pytest.raises(MountError, match=message) as caught:
        configure(*argv)
    assert caught.value.code == code


def test_debug_means_foreground() -> None:
    for argv in (("-d",), ("--debug",), ("-o", "debug")):
        config, _ = configure(*argv, "-o", "lowerdir=/a", "/m")
        assert config.debug and config.foreground


def test_version_is_for_podman_info(capsys: pytest.CaptureFixture[str]) -> None:
    for flag in ("--version", "-V"):
        assert fuse_overlayfs.run([flag]) == 0
        out, err = capsys.readouterr()
        assert out.startswith("fuse-overlayfs: version ") and "unionfs" in out and err == ""


def test_help_names_every_option_of_the_man_page(capsys: pytest.CaptureFixture[str]) -> None:
    assert fuse_overlayfs.run(["-h"]) == 0
    out = capsys.readouterr().out
    options = "lowerdir upperdir workdir uidmapping gidmapping squash_to_root squash_to_uid squash_to_gid static_nlink"
    for name in [*options.split(), "noacl", "xino", "ino32_t", "-f", "--debug", "--version"]:
        assert name in out
