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
from stat import S_IFCHR, S_ISDIR, S_ISLNK, S_ISREG

from unionfs.guard import journal as j
from unionfs.guard.revive import Children
from unionfs.sysio import RENAME_EXCHANGE, RENAME_WHITEOUT
from unionfs.wire import abi, dispatch

TYPE_CHECKING = False
if TYPE_CHECKING:
    from unionfs.core.nodes import Dir
    from unionfs.core.ops import UnionOperations
    from unionfs.guard.journal import Journal
    from unionfs.guard.revive import Revival
    from unionfs.guard.table import JournalTable

# What changes names, or what the kernel knows: answered once.
CREATES = frozenset((abi.MKNOD, abi.MKDIR, abi.SYMLINK, abi.CREATE))
SETTLED = CREATES | {abi.TMPFILE, abi.LINK, abi.UNLINK, abi.RMDIR, abi.RENAME, abi.RENAME2}
FORGETS = frozenset((abi.FORGET, abi.BATCH_FORGET))
KEPT = SETTLED | FORGETS | {
    abi.LOOKUP, abi.READDIRPLUS, abi.SETXATTR, abi.REMOVEXATTR, abi.SETATTR, abi.WRITE, abi.FALLOCATE,
    abi.COPY_FILE_RANGE, abi.COPY_FILE_RANGE_64, abi.OPEN, abi.RELEASE, abi.IOCTL,
}  # fmt: skip
NUMBER = abi.UNIQUE_RESEND - 1
CARRIED = 128  # lanes from here on are for answers that a predecessor owed


class Redo:
    def __init__(
        self, ops: UnionOperations, table: JournalTable, journal: Journal, revival: Revival,
        dispatcher: dispatch.Dispatcher,
    ) -> None:  # fmt: skip
        self._ops = ops
        self._table = table
        self._journal = journal
        self._revival = revival
        self._dispatcher = dispatcher
        self.answers: dict[int, bytes] = {}  # by the request's number

    def settle(self) -> None:
        begun: dict[int, tuple[int, bytes]] = {}
        requests: dict[int, bytes] = {}
        lanes = [self._journal.fast, *(self._journal.lane(i) for i in range(self._journal.words[j.LAST_LANE]))]
        for at, lane in enumerate(lanes):
            length, opcode, unique, _ = abi.IN_HEAD.unpack_from(lane.request)
            if not length or (at and not lane.words[j.LENGTH]):
                continue
            number = unique & NUMBER
            requests[number] = bytes(lane.request[: min(length, len(lane.request))])
            if lane.words[j.DONE] == unique:
                self._keep(number, bytes(lane.reply[: abi.U32.unpack_from(lane.reply)[0]]))
                continue
            if opcode in SETTLED or opcode in FORGETS:
                begun[number] = (opcode, bytes(lane.request[:length]))
        # Renames first: the others' names are looked up in directories that they may have moved.
        for number, (opcode, request) in sorted(
            begun.items(), key=lambda item: (item[1][0] not in (abi.RENAME, abi.RENAME2), item[0])
        ):
            if number not in self.answers:
                self._settle(number, opcode, request)
        self._revival.revive_marked()
        self._carry(requests)

    def _carry(self, requests: dict[int, bytes]) -> None:
        """This worker may die too before it has given these answers: they have lanes of their own."""
        for at in range(CARRIED):
            self._journal.lane(at).words[j.LENGTH] = 0
        for at, (number, answer) in enumerate([*self.answers.items()][: j.MAX_LANES - 1 - CARRIED]):
            request, reply = bytearray(requests[number]), bytearray(answer)
            for message in (request, reply):
                abi.U64.pack_into(message, 8, number)
            lane = self._journal.lane(CARRIED + at)
            lane.begin(bytes(request))
            lane.keep(number, reply)

    def clear(self) -> None:
        """All that was sent again has come."""
        for at in range(CARRIED, self._journal.words[j.LAST_LANE]):
            self._journal.lane(at).words[j.LENGTH] = 0

    def _keep(self, number: int, reply: bytes) -> None:
        if len(reply) >= 16 and abi.OUT_HEADER.unpack_from(reply)[2] & NUMBER == number:
            self.answers[number] = reply

    def _settle(self, number: int, opcode: int, request: bytes) -> None:
        _, _, unique, nodeid = abi.IN_HEAD.unpack_from(request)
        if opcode in FORGETS:
            self._forget(opcode, nodeid, request)
            return
        done: bytes | None = None
        try:
            if opcode in CREATES:
                self._create(opcode, nodeid, request)
            elif opcode == abi.LINK:
                done = self._link(unique, nodeid, request)
            elif opcode in (abi.UNLINK, abi.RMDIR):
                if self._ops._find(self._revival.directory(nodeid), request[40:-1]) is None:
                    done = abi.OUT_HEADER.pack(16, 0, unique)
            elif self._renamed(opcode, nodeid, request):
                done = abi.OUT_HEADER.pack(16, 0, unique)
        except OSError as error:
            if error.errno != errno.ESTALE:
                print(f"unionfs: {dispatch.NAMES[opcode]} can't be settled: {error}", file=sys.stderr)
                self.answers[number] = dispatch.error_reply(unique, errno.EIO)
                return
        self.answers[number] = done or self.run(opcode, unique, nodeid, request)

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
            more.pin = None
            node.parent, node.name, node.ldir = p, name, found[0]
            p.children[name] = node
            self._table.changed(node)
        if more.key is None:
            self._ops._register_link(node, st)
        entry = self._ops.lookup(parent, name)
        return None if entry is None else bytes(self._dispatcher._entry(unique, entry))

    # --- rename ---

    def _renamed(self, opcode: int, parent: int, request: bytes) -> bool:
        """Whether it happened; then the records say so too."""
        if opcode == abi.RENAME:
            (newparent,), flags, start = abi.U64.unpack_from(request, 40), 0, 48
        else:
            (newparent, flags, _), start = abi.RENAME2_IN.unpack_from(request, 40), 56
        name, newname, _ = request[start:].split(b"\0")
        p, q = self._revival.directory(parent), self._revival.directory(newparent)
        source, target = self._ops._find(p, name), self._ops._find(q, newname)
        if flags & RENAME_EXCHANGE:
            return self._exchanged(p, name, q, newname)
        nodeid = self._revival.find(parent, name)
        moved = self._revival.find(newparent, newname)
        if target is None or (source is not None and not self._is_new(source)):
            return False
        if nodeid is not None:
            self._put(nodeid, p, name, q, newname)
        elif moved is None:
            return False
        if flags & RENAME_WHITEOUT and source is None:
            made = self._ops.mknod(parent, name, S_IFCHR, 0, 0, self._ops.fsuid, self._ops.fsgid)
            self._ops.forget(made[0], 1)
        return True

    def _is_new(self, found: tuple[object, os.stat_result]) -> bool:
        """What is at the old name is the whiteout that a stacked overlay asked for, made after the move."""
        return bool(S_ISREG(found[1].st_mode) and found[1].st_size == 0 and found[1].st_mode & 0o777 == 0)

    def _put(self, nodeid: int, p: Dir, name: bytes, q: Dir, newname: bytes) -> None:
        record = self._journal.read(nodeid)
        if record is None:
            return
        self._journal.rewrite(
            nodeid, record.state, q.id, record.ino, record.generation, record.pin, record.kind, record.layer, newname
        )
        if isinstance(p.children, Children) and p.children.waiting.get(name) == nodeid:
            del p.children.waiting[name]
        if not isinstance(q.children, Children):
            children = Children({}, self._revival)
            children.update(q.children)
            q.children = children
        q.children.waiting[newname] = nodeid

    def _exchanged(self, p: Dir, name: bytes, q: Dir, newname: bytes) -> bool:
        """The names tell nothing of a swap, and the records may be a step behind: they are put right, but whether it
        was this request that swapped is not known."""
        ids = [self._revival.find(p.id, name), self._revival.find(q.id, newname)]
        records = [record for nodeid in ids if nodeid and (record := self._journal.read(nodeid)) is not None]
        for d, its_name in ((p, name), (q, newname)):
            found = self._ops._find(d, its_name)
            if found is None:
                continue
            ino = self._revival.build(d, its_name, *found).ino
            for record in records:
                if record.ino == ino and (record.parent, record.name) != (d.id, its_name):
                    origin = self._revival.directory(record.parent)
                    self._put(record.id, origin, record.name, d, its_name)
        raise OSError(errno.EIO, "interrupted exchange")
