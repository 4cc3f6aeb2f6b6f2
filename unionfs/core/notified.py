"""Layers that others change too, and that tell us: inotify in place of looking each time.

A directory whose layer directories are all watched is `_covered`: what is remembered of it, here and in the kernel, is
good until an event says otherwise. A thread takes the events. What we did ourselves is told from what others did by its
outcome: a name that is as the core left it, a file whose ctime is the one that was last answered, cost a stat and
nothing else. The rest is looked at again behind the closed gate, and the kernel is told.

A directory is watched when an operation on it begins, before it is looked at: nothing that happens later is missed.
Directories that can't be watched (the system's limit), and inodes with several names (inotify tells of the name that
was written through only), are treated as OutsideUnion treats all.
"""

from __future__ import annotations

import errno
import os
import threading
import traceback
from _queue import SimpleQueue
from stat import S_ISREG
from time import sleep

from unionfs.api import Notifier
from unionfs.core.base import fail
from unionfs.core.layers import Layer, LDir, fd_path
from unionfs.core.nodes import Dir, Node
from unionfs.core.outside import Outdated, OutsideUnion
from unionfs.core.watches import CONTENT, NAMES, OVERFLOW, Watches
from unionfs.errors import MountError

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable
    from typing import Any

NATIVELY_READ_ONLY = "rr"  # a layer that nobody can change: not watched
OWN_KEPT = 20_000  # names changed by ourselves whose events are awaited
STOP_WAIT = 5.0  # seconds; the kernel may keep a notice waiting for a request that nobody answers any more
LINGER = 0.001  # seconds that events gather: a burst is one look


class NotifiedUnion(OutsideUnion):
    def __init__(self, driver: Any) -> None:
        self.watches = Watches()
        self._expected: dict[tuple[int, bytes], bool] = {}  # (directory, name) → is it there, as we left it
        self._thread = threading.Thread(target=self._take_events, name="unionfs-inotify", daemon=True)
        # What an operation has found is told by another thread: the kernel may hold a directory's lock for the very
        # request that the operation answers, and the notice waits for that lock.
        self._news: SimpleQueue[tuple[list[tuple[int, bytes]], list[Dir], list[Dir]] | None] = SimpleQueue()
        self._teller = threading.Thread(target=self._tell_news, name="unionfs-tell", daemon=True)
        super().__init__(driver)

    def start(self, notifier: Notifier) -> None:
        super().start(notifier)
        self._thread.start()
        self._teller.start()

    def stop(self) -> None:
        self.watches.stop()
        self._news.put(None)
        for thread in (self._thread, self._teller):
            if thread.is_alive():
                thread.join(STOP_WAIT)
        super().stop()
        if not self._thread.is_alive():
            self.watches.close()

    # --- what may be trusted ---

    def _covered(self, d: Dir) -> bool:
        live = self.watches.live
        for ldir in d.ldirs:
            watch = ldir.watch
            if (watch is None or watch.wd not in live) and ldir.layer.permission != NATIVELY_READ_ONLY:
                return False
        return True

    def watched(self, nodeid: int) -> bool:
        node = self.slots[nodeid]
        d = self._home(node)
        return d is not None and self._covered(d)

    @staticmethod
    def _home(node: Node | None) -> Dir | None:
        """The directory whose watches tell of node; None: none tells all."""
        if isinstance(node, Dir):
            return node
        if node is None or (node.more is not None and (node.more.key is not None or node.more.unlinked)):
            return None
        return node.parent

    def watch(self, nodeid: int) -> bool:
        d = self._home(self.slots[nodeid])
        return d is not None and self._cover(d)

    def _cover(self, d: Dir) -> bool:
        """Watch d and the directories above it. Outdated where something was remembered before."""
        if self._covered(d):
            return True
        if d.removed or (d.parent is not None and not self._cover(d.parent)):
            return False
        if not self._watch_all(d):
            return False
        if d.children or d.names is not None:
            raise Outdated(d, None)
        return True

    def _watch_all(self, d: Dir) -> bool:
        return all([
            ldir.layer.permission == NATIVELY_READ_ONLY or self.watches.cover(ldir, d.id) for ldir in d.ldirs
        ])  # fmt: skip

    def _copy_up_dir(self, d: Dir, into: LDir) -> LDir:
        made = super()._copy_up_dir(d, into)
        if self._covered_but(d, made) and self.watches.cover(made, d.id) and os.listdir(fd_path(made.open())):
            made.watch = None  # somebody was quicker: the next operation looks at what is there
        return made

    def _covered_but(self, d: Dir, made: LDir) -> bool:
        live = self.watches.live
        return all(
            ldir is made
            or ldir.layer.permission == NATIVELY_READ_ONLY
            or (ldir.watch is not None and ldir.watch.wd in live)
            for ldir in d.ldirs
        )

    # --- what we change ourselves ---

    def _expect(self, p: Dir, name: bytes, there: bool) -> None:
        own = self._expected
        if len(own) >= OWN_KEPT:
            own.clear()
        own[p.id, name] = there

    def _name_added(self, p: Dir, name: bytes, ldir: LDir, is_dir: bool, new: bool = True) -> None:
        super()._name_added(p, name, ldir, is_dir, new)
        self._expect(p, name, True)

    def _name_removed(self, p: Dir, name: bytes, whiteout: bool, is_dir: bool) -> None:
        super()._name_removed(p, name, whiteout, is_dir)
        self._expect(p, name, False)

    def _joined(self, p: Dir | None, name: bytes, ldir: LDir) -> None:
        super()._joined(p, name, ldir)
        if p is not None:
            self._expect(p, name, True)

    def open(self, nodeid: int, flags: int) -> None:
        """ESTALE where the kernel's size is not the file's any more and the event still on its way: it looks again."""
        if nodeid not in self.files and self._differs(self._node(nodeid)):
            raise fail(errno.ESTALE)
        super().open(nodeid, flags)

    def write(self, nodeid: int, offset: int, data: memoryview, kill_suidgid: bool) -> int:
        n = super().write(nodeid, offset, data, kill_suidgid)
        self._note(self._node(nodeid))
        return n

    def fallocate(self, nodeid: int, mode: int, offset: int, length: int) -> None:
        super().fallocate(nodeid, mode, offset, length)
        self._note(self._node(nodeid))

    def copy_file_range(self, src: int, src_off: int, dst: int, dst_off: int, length: int, flags: int) -> int:
        n = super().copy_file_range(src, src_off, dst, dst_off, length, flags)
        self._note(self._node(dst))
        return n

    def setxattr(self, nodeid: int, name: bytes, value: bytes, flags: int, kill_sgid: bool) -> None:
        super().setxattr(nodeid, name, value, flags, kill_sgid)
        self._note(self._node(nodeid))

    def removexattr(self, nodeid: int, name: bytes) -> None:
        super().removexattr(nodeid, name)
        self._note(self._node(nodeid))

    def _note(self, node: Node) -> None:
        """What we changed of node is as the kernel knows it."""
        opened = self.files.get(node.id)
        st = os.fstat(opened.n) if opened is not None else self._stat(node)
        if node.id in self.seen and self._is_file(node, st):
            self.seen[node.id] = (st.st_dev, st.st_ino, st.st_ctime_ns)

    # --- what others change ---

    def _take_events(self) -> None:
        while (told := self.watches.wait()) is not None:
            try:
                if (OVERFLOW, b"") in told:
                    self._everything()
                else:
                    self._digest(told)
            except Exception:  # what was told is lost: nothing may be trusted
                traceback.print_exc()
                self._everything()
            sleep(LINGER)

    def _digest(self, told: dict[tuple[int, bytes], int]) -> None:
        suspects: dict[tuple[Dir, bytes | None], None] = {}
        written: dict[int, None] = {}
        for (nodeid, entry), mask in told.items():
            d = self.slots[nodeid]
            name = self.driver.concerns(entry) if entry else None
            if not isinstance(d, Dir) or (entry and name is None):
                continue
            if not entry:
                if mask & CONTENT and self._differs(d):
                    written[d.id] = None
            elif name == b"":
                suspects[(d.parent, d.name) if d.parent is not None else (d, b"")] = None
            else:
                assert name is not None
                if mask & NAMES and not self._is_own(d, name):
                    suspects[d, name] = None
                if mask & CONTENT and (node := d.children.get(name)) is not None and self._differs(node):
                    written[node.id] = None
        if suspects:
            self._renew_patiently(list(suspects))
        notifier = self.notifier
        assert notifier is not None
        for nodeid in written:
            notifier.invalidate_inode(nodeid)

    def _is_own(self, d: Dir, name: bytes) -> bool:
        """The name is as our own last change of it left it."""
        there = self._expected.pop((d.id, name), None)
        if there is None:
            return False
        try:
            found = None
            for ldir in list(d.ldirs):
                st = self.driver.probe(ldir, name)
                if st is not None:
                    found = (ldir, st) if st else None
                    break
            node = d.children.get(name)
            if not there or found is None or node is None:
                return not there and found is None and node is None
            return self._still(d, node, found)
        except (OSError, RuntimeError, AttributeError):  # changed while we looked, by an operation
            return False

    def _differs(self, node: Node) -> bool:
        """Its attributes are not those that were last answered."""
        try:
            st = self._stat(node)
        except OSError:
            return False  # then its name is told of too
        return self.seen.get(node.id) != (st.st_dev, st.st_ino, st.st_ctime_ns)

    def _renew_patiently(self, suspects: list[tuple[Dir, bytes | None]]) -> None:
        while True:
            try:
                with self._one_change, self.gate:
                    news = self._renew_all(suspects)
            except MountError:  # an operation runs and runs
                continue
            self._notify_kernel(*news)
            return

    def _everything(self) -> None:
        while True:
            try:
                with self._one_change, self.gate:
                    lost = self._apply(self.driver.layers, lambda: None)
            except MountError:
                continue
            break
        self._expected.clear()
        self._tell_kernel(lost)
        assert self.notifier is not None
        for node in list(self.slots):
            if node is not None and S_ISREG(node.kind) and node.id:
                self.notifier.invalidate_inode(node.id)

    def _tell(self, lost: list[tuple[int, bytes]], touched: list[Dir], changed: list[Dir]) -> None:
        self._news.put((lost, touched, changed))

    def _tell_news(self) -> None:
        while (news := self._news.get()) is not None:
            try:
                self._notify_kernel(*news)
            except Exception:  # then the kernel may know what is not so: it has to ask again for all
                traceback.print_exc()
                self._everything()

    def _notify_kernel(self, lost: list[tuple[int, bytes]], touched: list[Dir], changed: list[Dir]) -> None:
        notifier = self.notifier
        if notifier is None:
            return
        for nodeid, name in lost:
            notifier.invalidate_entry(nodeid, name)
        for d in changed:
            if d.id:
                self._invalidate_names(d)
        for nodeid in {d.id for d in (*touched, *changed)} - {0}:
            notifier.invalidate_inode(nodeid)

    # --- the layers' own change ---

    def _apply(self, layers: list[Layer], commit: Callable[[], None]) -> list[tuple[int, bytes]]:
        """Watches stay over the change: the old directories are held until the new ones are watched."""
        held = [node.ldirs for node in self.slots if isinstance(node, Dir)]
        lost = super()._apply(layers, commit)
        del held
        return lost

    def _look_again(self, d: Dir, lost: list[tuple[int, bytes]]) -> list[Dir]:
        if d.id and not d.removed:
            self._watch_all(d)
        return super()._look_again(d, lost)

    def statistics(self) -> dict[str, Any]:
        known = super().statistics()
        watches = self.watches
        known["outside"] |= {
            "watches": len(watches.live),
            "events": watches.events,
            "overflows": watches.overflows,
            "limit_met": watches.limit_met,
            "unwatched": sorted(
                os.fsdecode(self._path_of(node))
                for node in list(self.slots)
                if isinstance(node, Dir) and node.id and not node.removed and not self._covered(node)
            ),
        }
        return known
