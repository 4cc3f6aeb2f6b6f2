"""The direct session against a scripted kernel: handshake, lanes, interrupts, notifications, the end."""

from __future__ import annotations

import errno
import os
import struct
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

import pytest
from wire_fakes import ATTR, ENTRY, ENTRY_BYTES, FakeOps, Kernel, failed, init, ok, request, terms

from unionfs.errors import MountError, WouldBlock
from unionfs.session.direct import DirectSession
from unionfs.session.lanes import Lane

GETATTR = bytes(16)


class Served:
    """A session that serves in a thread, and the kernel it serves."""

    def __init__(self, ops: FakeOps, **options: Any) -> None:
        self.kernel = Kernel()
        self.ops = ops
        self.session = DirectSession(self.kernel.device, ops, **options)
        self.ready = threading.Event()
        self.error: BaseException | None = None
        self.thread = threading.Thread(target=self._serve, daemon=True)
        self.thread.start()

    def _serve(self) -> None:
        try:
            self.session.serve(self.ready.set)
        except BaseException as error:
            self.error = error

    def shake_hands(self) -> None:
        assert self.kernel.ask(init())[:16] == ok(bytes(64), 2)[:16]
        assert self.ready.wait(30)

    def ended(self) -> bool:
        self.thread.join(30)
        return not self.thread.is_alive()

    def calls(self, name: str) -> list[tuple[Any, ...]]:
        return [call for call in self.ops.calls if call[0] == name]


@pytest.fixture
def serve() -> Iterator[Callable[..., Served]]:
    made: list[Served] = []

    def make(ops: FakeOps, **options: Any) -> Served:
        made.append(Served(ops, **options))
        return made[-1]

    yield make
    for served in made:
        served.kernel.unmount()
        assert served.ended()
        os.close(served.kernel.device)


def eventually(condition: Callable[[], bool]) -> None:
    until = time.monotonic() + 30
    while not condition():
        assert time.monotonic() < until
        time.sleep(0.005)


def blocking_in_fast(ops: FakeOps, then: Callable[[], Any]) -> Callable[..., Any]:
    """An operation that will not run in the dispatcher thread."""

    def operation(*_: Any) -> Any:
        if ops.lanes.fast:
            raise WouldBlock
        return then()

    return operation


def test_serves_until_unmounted(serve: Callable[..., Served]) -> None:
    served = serve(FakeOps(lookup=ENTRY, getattr=ATTR))
    assert not served.ready.is_set()
    served.shake_hands()
    assert served.kernel.ask(request(1, 1, b"n\0", 4)) == ok(ENTRY_BYTES, 4)
    served.kernel.send(request(2, 77, struct.pack("<Q", 1), 6))
    assert served.kernel.ask(request(99, 1, b"", 8)) == failed(errno.ENOSYS, 8)
    assert served.kernel.silent()
    served.kernel.unmount()
    assert served.ended() and served.error is None
    assert [call[0] for call in served.ops.calls] == ["start", "lookup", "forget", "stop"]
    statistics = served.session.statistics()
    assert statistics["messages"] == {"LOOKUP": 1, "FORGET": 1, "opcode 99": 1}
    assert statistics["lanes"] == {"fast": 3, "slow": 0} and statistics["slow_threads"] == 0
    assert statistics["data"] == "noopen" and "DONT_MASK" in statistics["negotiated"]["flags"]
    assert statistics["bytes"] == {"received": 42 + 48 + 40, "sent": 144 + 16}


def test_adopts_a_connection_without_init(serve: Callable[..., Served]) -> None:
    served = serve(FakeOps(lookup=None), negotiated=terms(timeout=9))
    assert served.ready.wait(30)
    assert struct.unpack_from("<QQQQ", served.kernel.ask(request(1, 1, b"n\0")), 16) == (0, 0, 9, 9)


def test_stop_leaves_the_device_open(serve: Callable[..., Served]) -> None:
    served = serve(FakeOps())
    served.shake_hands()
    served.session.stop()
    assert served.ended() and served.error is None and served.calls("stop") == [("stop",)]
    os.fstat(served.kernel.device)
    served.session.stop()  # once more does no harm


def test_stop_before_init(serve: Callable[..., Served]) -> None:
    served = serve(FakeOps())
    served.session.stop()
    assert served.ended() and isinstance(served.error, MountError) and served.ops.calls == []


def test_later_major_version_shakes_hands_twice(serve: Callable[..., Served]) -> None:
    served = serve(FakeOps())
    assert struct.unpack_from("<II", served.kernel.ask(init(major=8)), 16) == (7, 45)
    served.shake_hands()


def test_passthrough_that_is_refused_is_an_error(serve: Callable[..., Served]) -> None:
    """Offered by the kernel, but the ioctl is not for this device: no silent fallback, and the core never starts."""
    served = serve(FakeOps(), data="passthrough")
    served.kernel.ask(init())
    assert served.ended() and isinstance(served.error, MountError) and "data=passthrough" in str(served.error)
    assert not served.ready.is_set() and served.ops.calls == []


def test_what_would_block_is_overtaken(serve: Callable[..., Served]) -> None:
    gate = threading.Event()
    ops = FakeOps(getattr=ATTR)
    ops.results["lookup"] = blocking_in_fast(ops, lambda: gate.wait(30) and ENTRY)
    served = serve(ops)
    served.shake_hands()
    served.kernel.send(request(1, 1, b"slow\0", 4))
    reply = served.kernel.ask(request(3, 1, GETATTR, 6))
    assert struct.unpack_from("<IiQ", reply) == (120, 0, 6)
    gate.set()
    assert served.kernel.receive() == ok(ENTRY_BYTES, 4)
    assert served.calls("lookup") == [("lookup", 1, b"slow")] * 2
    assert served.session.statistics()["lanes"] == {"fast": 1, "slow": 1}


@pytest.mark.parametrize(("opcode", "name"), [(20, "fsync"), (30, "fsyncdir"), (50, "syncfs")])
def test_sync_is_always_slow(serve: Callable[..., Served], opcode: int, name: str) -> None:
    ops = FakeOps()
    ops.results[name] = blocking_in_fast(ops, lambda: None)
    served = serve(ops)
    served.shake_hands()
    assert served.kernel.ask(request(opcode, 7, bytes(16), 4)) == ok(unique=4)
    assert len(served.calls(name)) == 1


def test_slow_lane_grows_to_its_limit_and_no_further(serve: Callable[..., Served]) -> None:
    gate = threading.Event()
    running: list[str] = []

    def wait() -> Any:
        running.append(threading.current_thread().name)
        gate.wait(30)
        return ENTRY

    ops = FakeOps(getattr=ATTR)
    ops.results["lookup"] = blocking_in_fast(ops, wait)
    served = serve(ops, max_threads=3)
    served.shake_hands()
    for unique in range(10, 20, 2):
        served.kernel.send(request(1, 1, b"slow\0", unique))
    eventually(lambda: len(running) == 3)
    assert struct.unpack_from("<Ii", served.kernel.ask(request(3, 1, GETATTR, 4))) == (120, 0)
    assert served.session.statistics()["slow_threads"] == 3 and len(set(running)) == 3
    gate.set()
    assert sorted(served.kernel.receive() for _ in range(5)) == [ok(ENTRY_BYTES, unique) for unique in range(10, 20, 2)]


def test_interrupt(serve: Callable[..., Served]) -> None:
    """A request that waits for a thread is given up; one that runs goes on; no INTERRUPT is answered."""
    gate, begun = threading.Event(), threading.Event()

    def wait() -> Any:
        begun.set()
        gate.wait(30)
        return ENTRY

    ops = FakeOps(getattr=ATTR)
    ops.results["lookup"] = blocking_in_fast(ops, wait)
    served = serve(ops, max_threads=1)
    served.shake_hands()
    served.kernel.send(request(1, 1, b"running\0", 10))
    assert begun.wait(30)
    served.kernel.send(request(1, 1, b"waiting\0", 12))
    for target in (10, 999):
        served.kernel.send(request(36, 0, struct.pack("<Q", target), target + 1))
    assert served.kernel.ask(request(36, 0, struct.pack("<Q", 12), 13)) == failed(errno.EINTR, 12)
    served.kernel.send(request(36, 0, struct.pack("<Q", 12), 13))  # a second time: nothing left to interrupt
    assert struct.unpack_from("<Q", served.kernel.ask(request(3, 1, GETATTR, 14)), 8) == (14,)
    assert served.kernel.silent()
    gate.set()
    assert served.kernel.receive() == ok(ENTRY_BYTES, 10)
    assert served.kernel.ask(request(20, 7, bytes(16), 16)) == ok(unique=16)  # the lane is whole
    assert [call[2] for call in served.calls("lookup")].count(b"waiting") == 1  # the dispatcher's try only
    assert served.session.statistics()["interrupted"] == 1


def test_block_in_the_slow_lane_is_a_bug(serve: Callable[..., Served], capfd: pytest.CaptureFixture[str]) -> None:
    served = serve(FakeOps(lookup=WouldBlock()))
    served.shake_hands()
    assert served.kernel.ask(request(1, 1, b"n\0", 4)) == failed(errno.EIO, 4)
    assert "LOOKUP would block" in capfd.readouterr().err


def test_unmount_waits_for_the_slow_lane(serve: Callable[..., Served]) -> None:
    gate = threading.Event()
    ops = FakeOps()
    ops.results["fsync"] = lambda *_: gate.wait(30)
    served = serve(ops)
    served.shake_hands()
    served.kernel.send(request(20, 7, bytes(16), 4))
    eventually(lambda: bool(served.calls("fsync")))
    served.kernel.unmount()
    time.sleep(0.05)
    assert served.calls("stop") == []
    gate.set()
    assert served.ended() and served.ops.calls[-1] == ("stop",)


def test_notifications(serve: Callable[..., Served]) -> None:
    served = serve(FakeOps())
    served.shake_hands()
    served.session.invalidate_entry(7, b"name")
    assert served.kernel.receive() == struct.pack("<IiQQII", 37, 3, 0, 7, 4, 0) + b"name\0"
    served.session.invalidate_inode(7)
    assert served.kernel.receive() == struct.pack("<IiQQqq", 40, 2, 0, 7, 0, 0)
    served.session.invalidate_inode(7, 4096, 512)
    assert served.kernel.receive() == struct.pack("<IiQQqq", 40, 2, 0, 7, 4096, 512)


def test_dispatcher_never_notifies_itself(serve: Callable[..., Served]) -> None:
    """The kernel may let a notification wait for a request that only the dispatcher can answer."""
    ops = FakeOps()
    notifying: list[str] = []

    def unlink(*_: Any) -> None:
        served.session.invalidate_entry(1, b"x")

    ops.results["unlink"] = unlink
    served = serve(ops)
    served.shake_hands()
    notify = served.session._channel.notify
    served.session._notices._make_worker = lambda: lambda job: (
        notifying.append(threading.current_thread().name),
        notify(job),
    )[1]
    served.kernel.send(request(10, 1, b"x\0", 4))
    notice = struct.pack("<IiQQII", 34, 3, 0, 1, 1, 0) + b"x\0"
    assert {served.kernel.receive(), served.kernel.receive()} == {ok(unique=4), notice}
    assert notifying == ["unionfs-notify-0"]


def test_trace(serve: Callable[..., Served], capfd: pytest.CaptureFixture[str]) -> None:
    served = serve(FakeOps(lookup=ENTRY), debug=True)
    served.shake_hands()
    served.kernel.ask(request(1, 1, b"n\0", 4))
    served.kernel.ask(request(20, 7, bytes(16), 6))
    served.kernel.unmount()
    assert served.ended()
    said = capfd.readouterr().err.splitlines()
    assert [line.split(" uid")[0] for line in said] == [
        "#4 LOOKUP nodeid=1", f"#4 LOOKUP -> nodeid=77 mode=100640 nlink=111 for {1 << 31} s",
        "#6 FSYNC nodeid=7", "#6 FSYNC -> 0 bytes",
    ]  # fmt: skip


def test_idle_session_sleeps(serve: Callable[..., Served]) -> None:
    """No wake-ups: the dispatcher's voluntary switches stand still while nothing is asked."""
    served = serve(FakeOps(getattr=ATTR))
    served.shake_hands()
    served.kernel.ask(request(3, 1, GETATTR, 4))
    status = f"/proc/self/task/{served.thread.native_id}/status"

    def switches() -> list[str]:
        with open(status) as file:
            return [line for line in file if "voluntary_ctxt_switches" in line]

    def asleep() -> bool:
        before = switches()
        time.sleep(0.1)
        return switches() == before

    eventually(asleep)
    before = switches()
    time.sleep(0.3)
    assert switches() == before


def test_lane_takes_back_what_has_not_begun() -> None:
    gate, done = threading.Event(), []

    def worker(job: bytes) -> None:
        gate.wait(30)
        done.append(job)

    lane = Lane("test", 1, lambda: worker)
    for number in range(3):
        lane.submit(number, b"%d" % number)
    eventually(lambda: 0 not in lane._waiting)
    assert not lane.take_back(0) and lane.take_back(1) and not lane.take_back(1) and not lane.take_back(7)
    assert not lane.close(0.01)
    gate.set()
    assert lane.close(30) and done == [b"0", b"2"] and lane.submitted == 3
