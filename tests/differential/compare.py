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
CAPABILITY = "security.capability"
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

    def past(self) -> list[Operation]:
        """The operation itself; once the other implementation has had the layers, all before it too."""
        return self.history if self.crossed else self.history[-1:]

    def got_error(self, *names: str) -> bool:
        return self.fact == "outcome" and self.got[0] == "error" and self.got[1] in names


class Rule:
    """`ends`: after it the two are in different states for good."""

    def __init__(
        self, kinds: frozenset[str], reason: str, match: Callable[[Case], bool], ends: bool = False
    ) -> None:
        self.kinds = kinds
        self.reason = reason
        self.match = match
        self.ends = ends


def plainly(value: Any) -> Any:
    """A fact without the link counts of directories, and without whether their d_ino is their st_ino."""
    if isinstance(value, tuple) and len(value) == 7 and isinstance(value[0], str) and value[0].startswith("d"):
        return (*value[:4], None, *value[5:])
    if isinstance(value, tuple) and len(value) == 3 and value[1] == "d":
        return value[:2]
    return type(value)(plainly(part) for part in value) if isinstance(value, (tuple, list)) else value


def merged_directory(case: Case) -> bool:
    expected, got = case.expected, case.got
    if case.fact.startswith("across"):
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
    return any(op[0] == "mknod" and stat.S_ISCHR(op[3]) and op[4] == 0 for op in case.past())


def mentions(case: Case, text: str) -> bool:
    return any(text in str(operation) for operation in case.past())


def mapped_write(case: Case) -> bool:
    """Only times or capabilities differ, and a mapping was written."""

    def strip(value: Any) -> Any:
        if isinstance(value, tuple) and len(value) == 7 and isinstance(value[0], str):
            return value[:6]
        if isinstance(value, (tuple, list)):
            return [strip(part) for part in value if not (isinstance(part, tuple) and part[:1] == (CAPABILITY,))]
        return value

    return any(op[0] == "mapwrite" for op in case.history) and bool(strip(case.expected) == strip(case.got))


def setgid_alone(case: Case) -> bool:
    if not (isinstance(case.got, tuple) and isinstance(case.expected, tuple) and len(case.got) == 7):
        return False
    mode = case.got[0]
    return bool(mode[6:7] == "S" and case.expected == (mode[:6] + "-" + mode[7:], *case.got[1:]))


DESIGNED = [
    # the kernel's overlayfs, where ours is as the plain directory
    Rule(
        KERNEL, "a merged directory's link count is 1 in the kernel's overlayfs, and its d_ino not always its st_ino",
        merged_directory,
    ),
    Rule(KERNEL, "copying up the data of what was copied up without them (metacopy) changes mtime", only_mtime),
    Rule(
        KERNEL, "a descriptor opened read-only before a copy-up goes on reading the lower file",
        lambda case: case.verb in ("pread", "read", "map", "mapread", "seek", "copyrange") and slot_is_read_only(case),
    ),
    Rule(
        KERNEL, "copying up may fill the holes of a file",
        lambda case: case.verb == "seek" and case.args[2] in (os.SEEK_DATA, os.SEEK_HOLE),
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
    # every union
    Rule(
        ALL, "a character device 0:0 is a whiteout: the kernel's overlayfs refuses to make one, ours keeps it escaped",
        whiteout_node, ends=True,
    ),
    Rule(
        ALL, "trusted.overlay.* and user.overlay.* are the union's own, and are escaped",
        lambda case: mentions(case, ".overlay."), ends=True,
    ),
    Rule(
        ALL, "RENAME_WHITEOUT: the kernel's overlayfs refuses it, ours keeps the whiteout escaped",
        lambda case: any(op[0] == "rename" and op[4] & 4 for op in case.past()), ends=True,
    ),
    # ours
    Rule(
        OURS, "names that begin with .wh. are whiteouts of the other spelling: they can't be made",
        lambda case: mentions(case, "./.wh."), ends=True,
    ),
    Rule(
        FUSE, "the kernel's FUSE client passes no other fallocate mode than keep-size, punch and zero",
        lambda case: case.verb == "fallocate" and case.args[1] & ~0x13 != 0 and case.got_error("ENOTSUP"), ends=True,
    ),
    Rule(
        OURS, "chown that changes neither owner nor group keeps set-id bits: the kernel tells FUSE nothing",
        lambda case: case.verb in ("chown", "fchown") and case.args[1:] == (-1, -1), ends=True,
    ),
    Rule(
        FUSE, "setgid without group execution stays when somebody else writes: FUSE's flag is for executables",
        setgid_alone, ends=True,
    ),
    Rule(
        OURS, "a write through a mapping changes mtime, and drops capabilities, when its page is written back",
        mapped_write,
    ),
]  # fmt: skip


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
            if rule.ends or (fact == "outcome" and want[fact][0] != have[fact][0]):
                return
