"""The placement policies by themselves: which of the branches that fit, and what words are refused."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
from unionfs_drivers import aufs_branches
from unionfs_drivers.aufs_policy import CreatePolicy, copyup_policy, size

from unionfs.errors import EXIT_USAGE, MountError


class Branch:
    """As much of a layer as a policy looks at."""

    def __init__(self, index: int) -> None:
        self.index = index


A, B, C, RO = (Branch(i) for i in range(4))


def parent(*layers: Branch) -> Any:
    return SimpleNamespace(ldirs=[SimpleNamespace(layer=layer) for layer in layers])


def policy(text: str, **free: int) -> CreatePolicy:
    made = CreatePolicy(text)
    by_layer = {A: free.get("a", 0), B: free.get("b", 0), C: free.get("c", 0)}
    made.space.free = by_layer.__getitem__  # type: ignore[method-assign, assignment]
    return made


def chosen(
    made: CreatePolicy, where: Any, count: int = 1, is_dir: bool = False, fit: tuple[Branch, ...] = (A, B, C)
) -> str:
    return "".join("abc"[made.choose(where, fit, is_dir).index] for _ in range(count))  # type: ignore[arg-type]


def test_tdp() -> None:
    assert chosen(policy("tdp"), parent(B, C)) == "b"
    assert chosen(policy("tdp"), parent(A, B, C)) == "a"
    assert chosen(policy("tdp"), parent(RO)) == "c"  # nobody has the parent: the nearest above it
    assert chosen(policy("tdp"), parent(RO), fit=(A,)) == "a"


def test_rr() -> None:
    assert chosen(policy("rr"), parent(RO), 7) == "abcabca"
    assert chosen(policy("rr"), parent(RO), 3, is_dir=True) == "aaa"


def test_mfs_and_its_kin() -> None:
    assert chosen(policy("mfs", a=1, b=3, c=2), parent(A)) == "b"
    assert chosen(policy("mfs:5", a=2, b=2, c=2), parent(A)) == "a"
    assert chosen(policy("mfsrr:1k", a=1, b=2000, c=2), parent(A), 2) == "bb"
    assert chosen(policy("mfsrr:1k", a=1, b=3, c=2), parent(A), 4) == "abca"
    assert chosen(policy("tdmfs:1k", a=1024, b=5000, c=2), parent(C)) == "a"
    assert chosen(policy("tdmfs:1k", a=1023, b=5000, c=2), parent(C)) == "b"


def test_pmfs_and_its_kin() -> None:
    assert chosen(policy("pmfs", a=9, b=1, c=3), parent(B, C)) == "c"
    assert chosen(policy("pmfs", a=9, b=1, c=3), parent(RO)) == "c"
    assert chosen(policy("pmfsrr:2", a=9, b=1, c=3), parent(B, C)) == "c"
    assert chosen(policy("pmfsrr:5", a=9, b=1, c=3), parent(B, C)) == "a"
    assert chosen(policy("pmfsrr:1m", a=9, b=1, c=3), parent(B, C), 3) == "abc"


def test_copyup() -> None:
    fit = [A, B, C]
    for text, where, wanted in (
        ("tdp", parent(A, C, RO), A), ("tdp", parent(B, RO), B), ("tdp", parent(RO), C),
        ("bup", parent(A, B, RO), B), ("bup", parent(RO), C),
        ("bu", parent(A, RO), C),
    ):  # fmt: skip
        assert copyup_policy(text)(where, fit) is wanted, text  # type: ignore[arg-type]


def test_sizes() -> None:
    assert [size(text, "") for text in ("7", "2k", "3M", "1g")] == [7, 2048, 3 << 20, 1 << 30]


@pytest.mark.parametrize("text", ["mfx", "mfsrr", "tdmfs:x", "tdmfs:1t", "mfs:soon", "tdp:1", "mfs:1:2", "rr:3", ""])
def test_create_refused(text: str) -> None:
    with pytest.raises(MountError) as caught:
        CreatePolicy(text)
    assert caught.value.code == EXIT_USAGE and f"create={text}" in str(caught.value)


def test_copyup_refused() -> None:
    with pytest.raises(MountError, match="did you mean bup"):
        copyup_policy("bupp")


def test_permissions() -> None:
    parse = aufs_branches.parse_permission
    assert parse("", b"/x", "rw") == ("rw", frozenset())
    assert parse("ro+wh", b"/x", "rw") == ("ro", {"wh"})
    assert parse("rr+wh", b"/x", "rw") == ("rr", {"wh"})
    assert parse("rw+nolwh", b"/x", "ro") == ("rw", {"nolwh"})
    for text, said in (
        ("wr", "one of rw"), ("rw+wh", "ro and rr"), ("ro+nolwh", "rw only"), ("ro+wx", "wx"),
        ("rw+coo_reg", "coo_reg"), ("ro+icexsec", "icexsec"), ("rw+fhsm", "fhsm"), ("rw+moo", "moo"), ("ro+", "known"),
    ):  # fmt: skip
        with pytest.raises(MountError, match=said) as caught:
            parse(text, b"/x", "rw")
        assert caught.value.code == EXIT_USAGE and "/x" in str(caught.value)
