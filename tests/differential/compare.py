"""Finds the first difference between the records of two file systems, apart from those that are by design.

The plain directory is the judge. DESIGNED says where a union may differ from it, and why; docs/nonstandard.md says
the same to people. After a difference that leaves the two in different states the rest of the sequence proves
nothing, and comparing stops there.
"""

from __future__ import annotations

import os
import stat
from collections.abc import Callable
from typing import Any

from .executor import FIRST, Facts, Operation

KERNEL = frozenset({"kernel"})
FUSE = frozenset({"unionfs", "fuse-overlayfs"})
OURS = frozenset({"unionfs"})
ALL = KERNEL | FUSE


class Case:
    """One fact that differs: everything that a rule may look at."""

    def __init__(self, kind: str, history: list[Operation], fact: str, expected: Any, got: Any) -> None:
        # After an interchange both implementations have had their hands in it.
        self.crossed = any(operation[0] == "interchange" for operation in history)
        self.kinds = {kind, "kernel", "unionfs"} if self.crossed else {kind}
        self.operation = history[-1]
        self.verb = self.operation[0]
        self.args = self.operation[2:]
        self.history = history
        self.fact = fact
        self.expected = expected
        self.got = got

    def got_error(self, *names: str) -> bool:
        return self.fact == "outcome" and self.got[0] == "error" and self.got[1] in names


class Rule:
    def __init__(self, kinds: frozenset[str], reason: str, match: Callable[[Case], bool]) -> None:
        self.kinds = kinds
        self.reason = reason
        self.match = match


def plainly(value: Any) -> Any:
    """A fact without the link counts of directories, and without whether their d_ino is their st_ino."""
    if isinstance(value, tuple) and len(value) == 7 and isinstance(value[0], str) and value[0].startswith("d"):
        return (*value[:4], None, *value[5:])
    if isinstance(value, tuple) and len(value) == 3 and value[1] == "d":
        return value[:2]
    return type(value)(plainly(part) for part in value) if isinstance(value, (tuple, list)) else value


def merged_directory(case: Case) -> bool:
    expected, got = case.expected, case.got
    if case.verb == "interchange" and case.fact.startswith("across"):
        expected, got = got
    return bool(plainly(expected) == plainly(got))


def only_mtime(case: Case) -> bool:
    def without(expected: Any, got: Any) -> Any:
        """`expected`, with a time of now wherever `got` has one."""
        if got == "recent" and isinstance(expected, int):
            return got
        if isinstance(expected, tuple) and isinstance(got, tuple) and len(expected) == len(got):
            return tuple(map(without, expected, got))
        return expected

    return bool(without(case.expected, case.got) == case.got)


def slot_is_read_only(case: Case) -> bool:
    """The descriptor that the operation reads by was opened for reading only."""
    number = case.args[0]
    for operation in reversed(case.history[:-1]):
        if operation[0] in ("open", "tmpfile", "reopen") and operation[2] == number:
            return operation[0] != "tmpfile" and operation[-3 if operation[0] == "open" else -1] & os.O_ACCMODE == 0
    return FIRST[number][1] == os.O_RDONLY


def whiteout_node(case: Case) -> bool:
    return case.verb == "mknod" and stat.S_ISCHR(case.args[1]) and case.args[2] == 0


DESIGNED = [
    Rule(
        KERNEL, "a merged directory's link count is 1 in the kernel's overlayfs, and its d_ino not always its st_ino",
        merged_directory,
    ),
    Rule(
        KERNEL, "copying up the data of what was copied up without them (metacopy) changes mtime",
        only_mtime,
    ),
    Rule(
        KERNEL, "a descriptor opened read-only before a copy-up goes on reading the lower file",
        lambda case: case.verb in ("pread", "read", "map", "mapread", "seek", "copyrange") and slot_is_read_only(case),
    ),
    Rule(
        KERNEL, "a lower file that is removed while open keeps a link count of 1",
        lambda case: case.fact.startswith("fd") and case.expected[4] == 0 and case.got[4] == 1
        and case.expected[:4] == case.got[:4],
    ),
    Rule(
        KERNEL, "removing an ACL that is not there is ENODATA",
        lambda case: case.verb == "removexattr" and "posix_acl" in case.args[1] and case.got_error("ENODATA"),
    ),
    Rule(ALL, "a character device 0:0 is a whiteout: it can't be made", lambda case: whiteout_node(case)),
    Rule(
        OURS, "names that begin with .wh. are whiteouts of the other spelling: they can't be made",
        lambda case: (case.got_error("EPERM") and any(isinstance(a, str) and a.startswith("./.wh.") for a in case.args))
        or (case.crossed and any("./.wh." in str(op) for op in case.history)),
    ),
    Rule(
        FUSE, "the kernel's FUSE client passes no other fallocate mode than keep-size, punch and zero",
        lambda case: case.verb == "fallocate" and case.args[1] & ~0x13 != 0 and case.got_error("ENOTSUP"),
    ),
    Rule(
        ALL, "trusted.overlay.* and user.overlay.* are the union's own, and are escaped",
        lambda case: any(isinstance(arg, str) and ".overlay." in arg for arg in case.args)
        or (case.crossed and case.fact.startswith("tree") and any(".overlay." in str(op) for op in case.history)),
    ),
    Rule(
        ALL, "RENAME_WHITEOUT makes what a union can't show, or shows in its own way",
        lambda case: (case.verb == "rename" and bool(case.args[2] & 4))
        or (case.crossed and any(op[0] == "rename" and op[4] & 4 for op in case.history)),
    ),
    Rule(
        OURS, "chown that changes neither owner nor group keeps set-id bits: the kernel tells FUSE nothing",
        lambda case: case.verb in ("chown", "fchown") and case.args[1:] == (-1, -1),
    ),
]


def narrow(expected: Any, got: Any) -> tuple[Any, Any]:
    """Down to the innermost values that differ."""
    for kind in (tuple, list):
        if isinstance(expected, kind) and isinstance(got, kind):
            apart = [(a, b) for a, b in zip(expected, got, strict=False) if a != b]
            if len(expected) == len(got) and len(apart) == 1:
                return narrow(*apart[0])
            only = [x for x in expected if x not in got], [x for x in got if x not in expected]
            return only if kind is list else (expected, got)
    return expected, got


class Difference(Exception):
    def __init__(self, kind: str, operations: list[Operation], index: int, fact: str, expected: Any, got: Any) -> None:
        self.kind = kind
        self.layers = ""  # filled in by who knows
        self.operations = operations
        self.when = f"at operation {index}: {operations[index]}"
        self.fact = fact
        self.expected = expected
        self.got = got
        self.sort = f"{kind} {operations[index][0]} {fact.split()[0] if ' ' in fact else fact[:2]} {got!s:.20}"
        super().__init__(kind)

    def __str__(self) -> str:
        inner = narrow(self.expected, self.got)
        return (
            f"{self.kind} differs {self.when}\n"
            f"  fact:     {self.fact}\n  expected: {inner[0]}\n  got:      {inner[1]}"
        )


def compare(
    kind: str, operations: list[Operation], expected: list[Facts], got: list[Facts], used: set[str] | None = None
) -> None:
    """Raises Difference for the first one that no rule allows; adds the reasons of rules that were needed to `used`."""
    for index, (want, have) in enumerate(zip(expected, got, strict=True)):
        for fact in {**want, **have}:
            if want.get(fact) == have.get(fact):
                continue
            case = Case(kind, operations[: index + 1], fact, want.get(fact), have.get(fact))
            rule = next((rule for rule in DESIGNED if case.kinds & rule.kinds and rule.match(case)), None)
            if rule is None:
                raise Difference(kind, operations, index, fact, want.get(fact), have.get(fact))
            if used is not None:
                used.add(rule.reason)
            if fact == "outcome" and (want[fact][0] != have[fact][0] or operations[index][0] == "fallocate"):
                return
