"""Requests that a worker had begun and not answered: their end, decided by what is on disk.

The kernel sends them again, with UNIQUE_RESEND in their number. `settle` finishes those that change names before
anything else is answered, for their node records may be half a step behind the disk; `answers` then has their replies.
What was begun is found in the lanes' buffers of the journal. Changes that can be made twice (attributes, data) are
simply made again when they come.
"""

from __future__ import annotations

import errno
import os
import sys
from _signal import SIGKILL  # type: ignore[import-not-found]
from stat import S_IFCHR, S_ISDIR, S_ISLNK, S_ISREG

from unionfs.guard import journal as j
from unionfs.guard.dispatcher import ABSENT, NUMBER, PRESENT, XATTRS, has_xattr, rename_words
from unionfs.guard.revive import Children
from unionfs.sysio import RENAME_EXCHANGE, RENAME_WHITEOUT
from unionfs.wire import abi, dispatch

TYPE_CHECKING = False
if TYPE_CHECKING:
    from unionfs.core.nodes import Dir
    from unionfs.core.ops import UnionOperations
    from unionfs.guard.dispatcher import GuardedDispatcher
    from unionfs.guard.journal import Journal, LaneBuffers
    from unionfs.guard.revive import Revival
    from unionfs.guard.table import JournalTable

# What changes names, or what the kernel knows: answered once.
CREATES = frozenset((abi.MKNOD, abi.MKDIR, abi.SYMLINK, abi.CREATE))
RENAMES = frozenset((abi.RENAME, abi.RENAME2))
SETTLED = CREATES | RENAMES | {abi.TMPFILE, abi.LINK, abi.UNLINK, abi.RMDIR}
FORGETS = frozenset((abi.FORGET, abi.BATCH_FORGET))
KEPT = SETTLED | FORGETS | XATTRS | {
    abi.LOOKUP, abi.READDIRPLUS, abi.SETATTR, abi.WRITE, abi.FALLOCATE, abi.COPY_FILE_RANGE, abi.COPY_FILE_RANGE_64,
    abi.OPEN, abi.RELEASE, abi.IOCTL,
}  # fmt: skip
CARRIED = 128  # lanes from here on are for answers that a predecessor owed
DEADLY = 3  # workers that died in one request: it gets EIO


class Begun:
    """A request that was begun and whose reply was not complete."""

    __slots__ = ("bytes", "lane", "nodeid", "number", "opcode", "unique")

    def __init__(self, lane: LaneBuffers, opcode: int, unique: int, nodeid: int, request: bytes) -> None:
        self.lane = lane
        self.opcode = opcode
        self.unique = unique
        self.number = unique & NUMBER
        self.nodeid = nodeid
        self.bytes = request

    @property
    def prior(self) -> int | None:
        return self.lane.prior(self.number)


class Redo:
    def __init__(
        self, ops: UnionOperations, table: JournalTable, journal: Journal, revival: Revival,
        dispatcher: GuardedDispatcher,
    ) -> None:  # fmt: skip
        self._ops = ops
        self._table = table
        self._journal = journal
        self._revival = revival
        self._dispatcher = dispatcher
        self.answers: dict[int, bytes] = {}  # by the request's number

    def settle(self) -> None:
        begun: dict[int, Begun] = {}
        requests: dict[int, bytes] = {}
        for lane in self._journal.lanes():
            length, opcode, unique, nodeid = abi.IN_HEAD.unpack_from(lane.request)
            if not length or not lane.words[j.LENGTH]:
                continue
            request = bytes(lane.request[: min(length, len(lane.request))])
            requests[unique & NUMBER] = request
            if lane.words[j.DONE] == unique:
                if opcode in KEPT:
                    self._keep(unique & NUMBER, bytes(lane.reply[: abi.U32.unpack_from(lane.reply)[0]]))
                continue
            begun[unique & NUMBER] = Begun(lane, opcode, unique, nodeid, request)
        # Renames first: the others' names are looked up in directories that they may have moved.
        for one in sorted(begun.values(), key=lambda one: (one.opcode not in RENAMES, one.number)):
            if one.number not in self.answers:
                self._settle(one)
        self._revival.revive_marked()
        self._carry(requests)
        self._revival.prune()

    def _carry(self, requests: dict[int, bytes]) -> None:
        """This worker may die too before it has given these answers: they have lanes of their own."""
        free: list[LaneBuffers] = []
        carried: set[int] = set()
        for at in range(CARRIED, j.SLOW_LANES):
            lane = self._journal.lane(at)
            number = abi.IN_HEAD.unpack_from(lane.request)[2] if lane.words[j.LENGTH] else None
            if number is not None and number in self.answers and lane.words[j.DONE] == number:
                carried.add(number)
            else:
                free.append(lane)
            if len(free) >= len(self.answers):
                break
        for number, answer in self.answers.items():
            if number in carried or not free:
                continue
            request, reply = bytearray(requests[number]), bytearray(answer)
            for message in (request, reply):
                abi.U64.pack_into(message, 8, number)
            lane = free.pop()
            lane.keep(number, reply)
            lane.begin(bytes(request))
        for at in range(min(CARRIED, self._journal.words[j.LAST_LANE])):
            self._journal.lane(at).words[j.LENGTH] = 0
        for fast in self._journal.fast:
            fast.words[j.LENGTH] = 0

    def clear(self) -> None:
        """All that was sent again has come."""
        for at in range(CARRIED, self._journal.words[j.LAST_LANE]):
            self._journal.lane(at).words[j.LENGTH] = 0

    def _keep(self, number: int, reply: bytes) -> None:
        if len(reply) >= 16 and abi.OUT_HEADER.unpack_from(reply)[2] & NUMBER == number:
            self.answers[number] = reply

    def _settle(self, one: Begun) -> None:
        if one.opcode in FORGETS:
            self._forget(one.opcode, one.nodeid, one.bytes)
            return
        if self._deadly(one):
            self.answers[one.number] = dispatch.error_reply(one.unique, errno.EIO)
            return
        done: bytes | None = None
        try:
            done = self._outcome(one)
            self._correct_links(one, done is not None)
        except OSError as error:
            if error.errno != errno.ESTALE:
                print(f"unionfs: {dispatch.NAMES[one.opcode]} can't be settled: {error}", file=sys.stderr)
                self.answers[one.number] = dispatch.error_reply(one.unique, errno.EIO)
                return
        if done is None and one.opcode in SETTLED:
            done = self.run(one.opcode, one.unique, one.nodeid, one.bytes)
        if done is not None:
            self.answers[one.number] = done

    def _deadly(self, one: Begun) -> bool:
        """It has been one worker's crash after the other: nobody else shall die of it."""
        if self._journal.words[j.SIGNAL] == SIGKILL:  # from outside
            return False
        words = one.lane.words
        words[j.TRIES] = words[j.TRIES] + 1 if words[j.SUSPECT] == one.number else 1
        words[j.SUSPECT] = one.number
        if words[j.TRIES] < DEADLY:
            return False
        name = dispatch.NAMES.get(one.opcode, f"opcode {one.opcode}")
        print(f"unionfs: {DEADLY} workers died in {name} of node {one.nodeid}: it is answered EIO", file=sys.stderr)
        return True

    def _outcome(self, one: Begun) -> bytes | None:
        """The reply to what has happened; None: it has to be run, again or at all."""
        opcode, nodeid, request = one.opcode, one.nodeid, one.bytes
        if opcode in CREATES:
            self._create(opcode, nodeid, request)
            return None
        if opcode == abi.LINK:
            return self._link(one.unique, nodeid, request)
        if opcode in (abi.UNLINK, abi.RMDIR):
            happened = self._ops._find(self._revival.directory(nodeid), request[40:-1]) is None
        elif opcode in RENAMES:
            happened = self._renamed(one)
        elif opcode in XATTRS:
            happened = self._xattr(one)
        else:
            if opcode in (abi.OPEN, abi.RELEASE) and one.prior is not None:
                self._journal.set_opens(nodeid, one.prior, self._journal.opens(nodeid)[1])
            return None
        return abi.OUT_HEADER.pack(16, 0, one.unique) if happened else None

    def _correct_links(self, one: Begun, happened: bool) -> None:
        """The count of links of an inode in the index: between a change of its names and that of its mark."""
        nodeid = one.lane.words[j.LINKS_NODE]
        if not nodeid or self._journal.read(nodeid) is None:
            return
        before, after = divmod(one.lane.words[j.LINKS], 1 << 32)
        node = self._ops._node(nodeid)
        more = node.extra()
        links = after if happened else before
        change = links - self._ops._stat(node).st_nlink - more.nlink_delta
        self._ops._add_nlink_delta(node, change)
        one.lane.words[j.LINKS_NODE] = 0
        if links <= 0:
            self._ops._last_name_gone(node)

    def _xattr(self, one: Begun) -> bool:
        prior = one.prior
        if prior is None:
            return False
        start = 40 if one.opcode == abi.REMOVEXATTR else self._dispatcher.setxattr_start
        name = one.bytes[start : one.bytes.index(b"\0", start)]
        there = has_xattr(self._ops, one.nodeid, name)
        if one.opcode == abi.REMOVEXATTR:
            return prior == PRESENT and not there
        if prior != ABSENT or not there:
            return False
        # Made again, whether all of it was written or not: but it must not be "new" any more.
        request = bytearray(one.bytes)
        abi.U32.pack_into(request, 44, 0)
        self.answers[one.number] = self.run(one.opcode, one.unique, one.nodeid, bytes(request))
        return False

    def run(self, opcode: int, unique: int, nodeid: int, request: bytes) -> bytes:
        self._dispatcher.load(request)
        reply = self._dispatcher.answer(opcode, unique, nodeid, len(request))
        assert reply is not None
        return bytes(reply)

    # --- forgets: never sent again ---

    def _forget(self, opcode: int, nodeid: int, request: bytes) -> None:
        if opcode == abi.FORGET:
            pairs = [(nodeid, abi.U64.unpack_from(request, 40)[0])]
        else:
            count = abi.BATCH_FORGET_IN.unpack_from(request, 40)[0]
            pairs = list(abi.U64X2.iter_unpack(request[48 : 48 + 16 * count]))
        for forgotten, nlookup in pairs:
            # Done already: the count is 0, the id free. Anything else is not clear, and a node too many is harmless.
            if self._journal.states[forgotten] and self._journal.counts[forgotten] == nlookup:
                self._ops.forget(forgotten, nlookup)

    # --- names ---

    @staticmethod
    def _name(opcode: int, request: bytes) -> bytes:
        start = {abi.MKNOD: 56, abi.MKDIR: 48, abi.CREATE: 56}.get(opcode, 40)
        return request[start : request.index(b"\0", start)]

    def _create(self, opcode: int, parent: int, request: bytes) -> None:
        """Take back what was made, to make it once more: it may lack its owner or mode, and nobody has seen it."""
        name = self._name(opcode, request)
        p = self._revival.directory(parent)
        nodeid = self._revival.find(parent, name)
        if nodeid is not None:
            self._unborn(nodeid)
            if isinstance(p.children, Children):
                p.children.waiting.pop(name, None)
        found = self._ops._find(p, name)
        if found is None:
            return
        st = found[1]
        if S_ISDIR(st.st_mode):
            if opcode == abi.MKDIR:
                self._ops.rmdir(parent, name)
        elif st.st_nlink == 1 and (not S_ISREG(st.st_mode) or st.st_size == 0):
            if S_ISLNK(st.st_mode) and opcode != abi.SYMLINK:
                return
            self._ops.unlink(parent, name)

    def _unborn(self, nodeid: int) -> None:
        """The kernel was never told of that node."""
        record = self._journal.read(nodeid)
        if record is None or self._ops.slots[nodeid] is not None:
            return
        self._journal.states[nodeid] = 0
        self._journal.counts[nodeid] = 0
        if record.pin >= 0:
            os.close(record.pin)
        self._table.free.append(nodeid)

    def _link(self, unique: int, parent: int, request: bytes) -> bytes | None:
        """Linking is one step: where the name is, it is done."""
        (source,) = abi.U64.unpack_from(request, 40)
        name = request[48:-1]
        p = self._revival.directory(parent)
        found = self._ops._find(p, name)
        if found is None:
            return None
        node = self._ops._node(source)
        st = self._ops._stat(node)
        if (st.st_dev, st.st_ino) != (found[1].st_dev, found[1].st_ino):
            return None
        more = node.extra()
        if more.orphan:
            more.orphan = more.unlinked = False
            pin, more.pin = more.pin, None
            node.parent, node.name, node.ldir = p, name, found[0]
            p.children[name] = node
            self._table.changed(node)
            del pin
        if more.key is None:
            self._ops._register_link(node, st)
        entry = self._ops.lookup(parent, name)
        return None if entry is None else bytes(self._dispatcher._entry(unique, entry))

    # --- rename ---

    def _renamed(self, one: Begun) -> bool:
        """Whether it happened; then the records say so too."""
        newparent, flags, name, newname = rename_words(one.opcode, one.bytes)
        p, q = self._revival.directory(one.nodeid), self._revival.directory(newparent)
        if flags & RENAME_EXCHANGE:
            return self._exchanged(one, p, name, q, newname)
        source, target = self._ops._find(p, name), self._ops._find(q, newname)
        if target is None or (source is not None and not self._is_new(source)):
            return False
        for record in self._journal.claiming(p.id, name):
            if isinstance(p.children, Children):
                p.children.waiting.pop(name, None)
            self._put(record, q, newname)
        if flags & RENAME_WHITEOUT and source is None:
            made = self._ops.mknod(one.nodeid, name, S_IFCHR, 0, 0, self._ops.fsuid, self._ops.fsgid)
            self._ops.forget(made[0], 1)
        return True

    def _is_new(self, found: tuple[object, os.stat_result]) -> bool:
        """What is at the old name is the whiteout that a stacked overlay asked for, made after the move."""
        return bool(S_ISREG(found[1].st_mode) and found[1].st_size == 0 and found[1].st_mode & 0o777 == 0)

    def _put(self, record: j.Record, q: Dir, newname: bytes) -> None:
        """The node is known by that name from now on."""
        self._journal.rewrite(
            record.id, record.state, q.id, record.ino, record.generation, record.pin, record.kind, record.layer, newname
        )
        if not isinstance(q.children, Children):
            children = Children({}, self._revival)
            children.update(q.children)
            q.children = children
        q.children.waiting[newname] = record.id

    def _exchanged(self, one: Begun, p: Dir, name: bytes, q: Dir, newname: bytes) -> bool:
        """The names tell nothing of a swap; what was at the first one before it was begun does."""
        here = self._ino_at(p, name)
        happened = one.prior is not None and here != one.prior
        if not happened:
            return False
        places = {one.prior: (q, newname), here: (p, name)}
        records = self._journal.claiming(p.id, name) + self._journal.claiming(q.id, newname)
        for d, its_name in places.values():
            if isinstance(d.children, Children):
                d.children.waiting.pop(its_name, None)
        for record in records:
            if record.ino in places:
                self._put(record, *places[record.ino])
        return True

    def _ino_at(self, d: Dir, name: bytes) -> int:
        found = self._ops._find(d, name)
        if found is None:
            raise OSError(errno.ENOENT, os.strerror(errno.ENOENT), name)
        return self._revival.build(d, name, *found).ino
