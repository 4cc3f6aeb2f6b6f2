"""The -o language: commas, colons, quotes and backslashes, and what the tables make of it."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from unionfs.api import MountConfig
from unionfs.errors import EXIT_LAYER, EXIT_USAGE, MountError
from unionfs.front.options import apply_options, check_options, escape, split_options, split_paths, unescape, unquote


def applied(text: str) -> MountConfig:
    config = MountConfig(b"/m")
    apply_options(config, split_options(text))
    return config


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("", []),
        ("a", ["a"]),
        ("a,,b,", ["a", "b"]),
        (",a", ["a"]),
        (r"a=1\,2,b", [r"a=1\,2", "b"]),
        (r"a=\\,b", [r"a=\\", "b"]),
        ('context="s:c1,c2",b', ['context="s:c1,c2"', "b"]),
        ('b,context="s:c1,c2"', ["b", 'context="s:c1,c2"']),
        ('upperdir=/a"b,workdir=/c"d', ['upperdir=/a"b', 'workdir=/c"d']),
        ('upperdir="/a,workdir=/b', ['upperdir="/a', "workdir=/b"]),
        ('x="a"b,c"', ['x="a"b,c"']),
        ("a\\", ["a\\"]),
    ],
)
def test_split_options(text: str, words: list[str]) -> None:
    assert split_options(text) == words


@pytest.mark.parametrize(
    ("text", "paths"),
    [
        ("a:b", ["a", "b"]),
        (":a::b:", ["a", "b"]),
        (r"a\:b:c", ["a:b", "c"]),
        (r"a\\:b", ["a\\", "b"]),
        (r"a\,b", ["a,b"]),
        (r"a\040b", [r"a\040b"]),
        ("a\\", ["a\\"]),
    ],
)
def test_split_paths(text: str, paths: list[str]) -> None:
    assert split_paths(text) == paths


@given(st.lists(st.text(st.characters(exclude_characters="\0", codec="utf-8"), min_size=1), min_size=1, max_size=5))
def test_escaped_paths_come_back(paths: list[str]) -> None:
    word = "lowerdir=" + ":".join(map(escape, paths))
    if not paths[0].startswith('"'):
        assert split_options(f"x,{word},y") == ["x", word, "y"]
    assert split_paths(word.removeprefix("lowerdir=")) == paths
    assert unescape(escape(paths[0])) == paths[0]


def test_unquote_takes_a_pair_only() -> None:
    assert [unquote(text) for text in ('"a"', '"a', 'a"', '"', '""')] == ["a", '"a', 'a"', '"', ""]


def test_layers_and_their_options() -> None:
    config = applied(
        r"lowerdir=/a:/b\:c,upperdir=/u\,v,workdir=w,driver=row,session=direct,data=cached,fsname=x,ro,nodev"
    )
    assert config.lowers == [b"/a", b"/b:c"]
    assert config.upper == b"/u,v"
    assert config.work == os.fsencode(Path.cwd() / "w")
    assert (config.driver, config.session, config.data, config.source) == ("row", "direct", "cached", "x")
    assert config.read_only
    assert config.vfs_options == ["ro", "nodev"]


def test_rw_after_ro() -> None:
    assert not applied("ro,rw").read_only


def test_what_fstab_and_systemd_keep_for_themselves_is_let_pass() -> None:
    words = "defaults,noauto,user,_netdev,nofail,x-systemd.automount,x-systemd.requires=/a,comment=z,X-mount.mkdir"
    assert applied(words).options == {}


def test_unknown_option_names_the_nearest() -> None:
    with pytest.raises(MountError, match=r"unknown option -o writebak, did you mean writeback\?") as caught:
        check_options(applied("writebak=1"), {})
    assert caught.value.code == EXIT_USAGE


def test_options_of_the_driver_are_known() -> None:
    check_options(applied("metacopy=on,timeout=1"), {"metacopy": "help"})


def test_wrong_choice() -> None:
    with pytest.raises(MountError, match="auto, direct, pyfuse3"):
        applied("session=raw")


def test_500_lowers_are_the_limit() -> None:
    config = applied("lowerdir=" + ":".join(f"/l{i}" for i in range(500)))
    check_options(config, {})
    config.lowers.append(b"/one-more")
    with pytest.raises(MountError, match="limit is 500") as caught:
        check_options(config, {})
    assert caught.value.code == EXIT_LAYER
