"""INIT: what is taken of what is offered, the exact reply, and the terms as bytes."""

from __future__ import annotations

import struct

import pytest
from wire_fakes import INIT_FLAGS, init

from unionfs.errors import MountError
from unionfs.wire import abi, handshake
from unionfs.wire.handshake import Negotiated, Refused, negotiate

BIT = abi.INIT_FLAGS


def test_reply_bytes() -> None:
    terms, reply = negotiate(init())
    wanted = sum(BIT[name] for name in handshake.WANTED)
    assert terms.flags == wanted
    assert reply == struct.pack(
        "<IiQIIIIHHIIHHII", 80, 0, 2, 7, 45, 131072, wanted & 0xFFFFFFFF, 64, 48, 1 << 20, 1, 256, 0, wanted >> 32, 0
    ) + bytes(24)
    assert (terms.data, terms.timeout, terms.stack_depth) == ("noopen", 1 << 31, 0)


def test_only_what_is_offered_is_taken() -> None:
    offered = BIT["BIG_WRITES"] | BIT["DONT_MASK"] | BIT["ASYNC_READ"] | BIT["SPLICE_READ"]
    terms, reply = negotiate(init(minor=31, flags=offered, flags2=0xFFFFFFFF))  # no INIT_EXT: flags2 is noise
    assert terms.flags == BIT["BIG_WRITES"] | BIT["DONT_MASK"] | BIT["ASYNC_READ"]
    assert (terms.minor, terms.data, terms.max_write) == (31, "cached", 128 << 10)
    assert struct.unpack_from("<HH", reply, 44) == (32, 0)


def test_careful() -> None:
    """Where others change the layers the kernel asks before it lists or reads a link, and drops pages by itself."""
    terms, _ = negotiate(init(), careful=True)
    usual, _ = negotiate(init())
    assert terms.careful and not usual.careful
    assert terms.flags ^ usual.flags == BIT["AUTO_INVAL_DATA"] | BIT["NO_OPENDIR_SUPPORT"] | BIT["CACHE_SYMLINKS"]
    assert terms.data == "noopen"
    assert Negotiated.from_bytes(terms.to_bytes()).careful


@pytest.mark.parametrize("mode", ["noopen", "cached"])
def test_writeback(mode: str) -> None:
    terms, _ = negotiate(init(), data=mode, writeback=True)
    assert terms.has("WRITEBACK_CACHE") and terms.data == mode
    assert not negotiate(init(), data=mode)[0].has("WRITEBACK_CACHE")


@pytest.mark.parametrize("depth", [1, 2])
def test_passthrough(depth: int) -> None:
    terms, reply = negotiate(init(), data="passthrough", stack_depth=depth)
    assert terms.has("PASSTHROUGH") and not terms.has("WRITEBACK_CACHE")
    assert struct.unpack_from("<II", reply, 48) == (1 << 5 | 1 << 7, depth)
    assert negotiate(init(), data="cached", stack_depth=depth)[0].stack_depth == 0


@pytest.mark.parametrize(
    ("request_", "options", "says"),
    [
        (init(flags2=0), {"data": "passthrough"}, "FUSE_PASSTHROUGH"),
        (init(flags=INIT_FLAGS & ~BIT["INIT_EXT"]), {"data": "passthrough"}, "FUSE_PASSTHROUGH"),
        (init(), {"data": "passthrough", "writeback": True}, "exclude"),
        (init(flags=INIT_FLAGS & ~BIT["NO_OPEN_SUPPORT"]), {"data": "noopen"}, "NO_OPEN"),
        (init(flags=INIT_FLAGS & ~BIT["DONT_MASK"]), {}, "DONT_MASK"),
        (init(minor=22), {}, "7.22"),
        (init(major=6), {}, "6.45"),
        (init(), {"data": "quick"}, "data=quick"),
    ],
)
def test_what_cannot_be_had_is_named(request_: bytes, options: dict[str, object], says: str) -> None:
    with pytest.raises(MountError, match=says):
        negotiate(request_, **options)  # type: ignore[arg-type]


def test_later_major_is_asked_for_ours() -> None:
    with pytest.raises(Refused) as refused:
        negotiate(init(major=8, unique=6))
    assert refused.value.reply == struct.pack("<IiQII", 80, 0, 6, 7, 45) + bytes(56)


def test_terms_survive_as_bytes() -> None:
    terms, _ = negotiate(init(), data="passthrough", timeout=5)
    again = Negotiated.from_bytes(terms.to_bytes())
    assert {name: getattr(again, name) for name in again.__slots__} == {
        name: getattr(terms, name) for name in terms.__slots__
    }
    assert "PASSTHROUGH" in again.as_dict()["flags"] and again.as_dict()["protocol"] == "7.45"
