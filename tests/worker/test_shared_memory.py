"""The memory that a supervisor and its children share."""

from __future__ import annotations

import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from conveyor.errors import ConfigurationError
from conveyor.store.keys import QueueKeys
from conveyor.worker import shared_memory
from conveyor.worker.shared_memory import RECORD_ROOM, SLOT_BYTES, ChildInfo, ChildSlot, ChildSpec, SharedMemory
from support.waiting import until

SPEC = ChildSpec("shop:app", {"mail": 2.0}, 100, 8, burst=False, grace=30.0)


@pytest.fixture
def board() -> Iterator[SharedMemory]:
    made = SharedMemory(3)
    yield made
    made.close()


@pytest.fixture
def slot(board: SharedMemory) -> ChildSlot:
    return board.slot(1)


def keys(queue: str = "mail", foreign: str | None = None) -> QueueKeys:
    return QueueKeys("shop", queue, foreign=foreign)


def workers(slot: ChildSlot) -> list[str]:
    return [identity.worker for identity in slot.identities()]


def test_everything_written_is_read(board: SharedMemory, slot: ChildSlot) -> None:
    """The supervisor reads what a child writes, through another mapping of the same memory."""
    slot.prepare(SPEC)
    other = SharedMemory(3, os.dup(board.fd))
    child = other.slot(1)
    assert child.spec() == SPEC
    assert (slot.last_tick, slot.identities(), slot.job(), slot.info(), slot.retiring) == (0.0, [], None, None, False)

    before = time.monotonic()
    child.set_info(ChildInfo("redis://localhost", "shop", 2, ("a", "b")))
    child.set_identity(keys("mail"), "w1", 15_000)
    child.set_identity(keys("list", foreign="app:{t1}:list"), "w2", 5_000)
    child.tick()
    child.set_job("mail.send", "mail:1")
    child.retiring = True

    assert slot.info() == ChildInfo("redis://localhost", "shop", 2, ("a", "b"))
    assert before <= slot.last_tick <= time.monotonic()
    assert slot.job() == ("mail.send", "mail:1")
    assert slot.retiring
    first, second = slot.identities()
    assert (first.queue, first.worker, first.lease_ms, first.current) == ("mail", "w1", 15_000, True)
    assert first.keys.prefix == keys("mail").prefix
    assert second.keys.prefix == keys("list", foreign="app:{t1}:list").prefix
    child.clear_job()
    assert slot.job() is None
    other.close()


def test_slots_are_apart(board: SharedMemory) -> None:
    """A write in one slot shows in no other, and wiping one leaves the others as they were."""
    slots = [board.slot(number) for number in range(3)]
    for number, slot in enumerate(slots):
        slot.prepare(SPEC)
        slot.set_identity(keys(f"q{number}"), f"w{number}", 1000)
        slot.set_job("task", f"j{number}")

    slots[1].prepare(SPEC)

    assert [workers(slot) for slot in slots] == [["w0"], [], ["w2"]]
    assert [slot.job() for slot in slots] == [("task", "j0"), None, ("task", "j2")]


def test_newest_identity_of_a_queue_is_current(slot: ChildSlot) -> None:
    """A queue's earlier identity is still listed, to be reaped, and no longer current."""
    slot.prepare(SPEC)
    slot.set_identity(keys("mail"), "old", 1000)
    slot.set_identity(keys("media"), "other", 1000)
    slot.set_identity(keys("mail"), "new", 1000)

    assert [(one.worker, one.current) for one in slot.identities()] == [("old", False), ("other", True), ("new", True)]


def test_renewal_is_known_by_identity(slot: ChildSlot) -> None:
    """A turn on one queue does not make another queue's lease look renewed; without a name it renews all."""
    slot.prepare(SPEC)
    slot.set_identity(keys("a"), "wa", 1000)
    slot.set_identity(keys("b"), "wb", 1000)
    start = time.monotonic()
    while time.monotonic() == start:
        pass
    slot.note_renewal("wb")
    a, b = slot.identities()
    assert a.renewed < start < b.renewed

    slot.note_renewal()
    assert all(one.renewed >= b.renewed > start for one in slot.identities())


def test_record_cut_off_at_any_byte_hides_no_earlier_one(board: SharedMemory) -> None:
    """A child killed in the middle of writing an identity leaves all earlier ones readable, whatever was there before."""
    whole, torn = board.slot(0), board.slot(1)
    whole.prepare(SPEC)
    whole.set_identity(keys("a"), "w1", 1000)
    start = whole._tail
    whole.set_identity(keys("b"), "w2", 1000)
    assert start is not None
    assert whole._tail is not None
    area = whole._area(whole._cells[shared_memory._EPOCH])
    record = bytes(whole._view[area + start : area + whole._tail])
    for junk in (b"\0", b"\xff", b"\x01"):
        for cut in range(len(record)):
            torn.prepare(SPEC)
            torn.set_identity(keys("a"), "w1", 1000)
            at = torn._area(torn._cells[shared_memory._EPOCH]) + start
            torn._view[at : at + len(record)] = record[:cut] + junk * (len(record) - cut)
            assert workers(torn) == ["w1"], (junk, cut)
            assert torn.spec() == SPEC


def test_job_in_the_middle_of_being_written_is_not_read(slot: ChildSlot) -> None:
    """A half-written job name is never shown: nothing is."""
    slot.prepare(SPEC)
    slot.set_job("mail.send", "mail:1")
    slot._cells[shared_memory._JOB_MARK] += 1
    slot._job[:4] = b"spam"

    assert slot.job() is None


def test_wiped_slot_shows_nothing_of_its_last_owner(slot: ChildSlot) -> None:
    """Records of a dead child behind the new child's records are never taken for its own."""
    for generation in range(5):
        slot.prepare(SPEC)
        assert workers(slot) == []
        for number in range(3 if generation % 2 else 20):
            slot.set_identity(keys(f"q{number}"), f"{generation}-{number}", 1000)
        assert workers(slot) == [f"{generation}-{number}" for number in range(3 if generation % 2 else 20)]


def test_records_never_run_out_of_room(slot: ChildSlot) -> None:
    """Identities may change for ever: when an area is full only what counts is carried over."""
    slot.prepare(SPEC)
    slot.set_info(ChildInfo("unix:///s", "shop"))
    epoch = slot._cells[shared_memory._EPOCH]
    for number in range(5 * RECORD_ROOM // 100):
        slot.set_identity(keys("mail" if number % 2 else "media"), f"w{number}", 1000)
        if number % 97 == 0:
            assert slot.identities()[-1].worker == f"w{number}"

    assert slot._cells[shared_memory._EPOCH] > epoch + 2
    assert [one.worker for one in slot.identities() if one.current] == [f"w{number - 1}", f"w{number}"]
    assert slot.spec() == SPEC
    assert slot.info() == ChildInfo("unix:///s", "shop")


def test_too_many_queues_are_refused_and_the_memory_stays_whole(slot: ChildSlot) -> None:
    """Names that do not fit are refused with a sentence, and the names written before remain."""
    slot.prepare(SPEC)
    names = [f"{number:04}".ljust(128, "x") for number in range(2000)]

    def fill() -> None:
        for name in names:
            slot.set_identity(keys(name), name, 1000)

    with pytest.raises(ConfigurationError, match="do not fit"):
        fill()
    found = workers(slot)
    assert len(found) > 200
    assert found == names[: len(found)]


_WRITER = """
import os, sys
from conveyor.store.keys import QueueKeys
from conveyor.worker.shared_memory import SharedMemory
slot = SharedMemory(2, int(sys.argv[1])).slot(1)
number = 0
while True:
    keys = QueueKeys("shop", f"q{number % 7}")
    slot.set_identity(keys, f"w{number}", 1000)
    slot.set_job(f"task{number}", f"id{number}" * 40)
    os.write(1, b"%d\\n" % number)
    number += 1
"""


def test_killed_writer_loses_nothing_it_had_written(tmp_path: Path) -> None:
    """A process killed with SIGKILL at a random moment leaves each queue's last identity readable, and no broken job."""
    for _ in range(5):
        board = SharedMemory(2)
        slot = board.slot(1)
        slot.prepare(SPEC)
        with (tmp_path / "out").open("wb") as out:
            writer = subprocess.Popen([sys.executable, "-c", _WRITER, str(board.fd)], stdout=out, pass_fds=[board.fd])
        until(slot.identities, what="the writer's first identity")
        watching = time.monotonic() + random.uniform(0, 0.1)
        while time.monotonic() < watching:
            job = slot.job()
            assert job is None or job[1] == f"id{job[0].removeprefix('task')}" * 40
            assert len(slot.identities()) > 0
        os.kill(writer.pid, signal.SIGKILL)
        assert writer.wait(60) == -signal.SIGKILL
        lines = (tmp_path / "out").read_bytes().split(b"\n")
        last = int(lines[-2]) if len(lines) > 1 else -1

        current = {one.queue: int(one.worker[1:]) for one in slot.identities() if one.current}
        assert all(current[f"q{number % 7}"] >= number for number in range(max(0, last - 6), last + 1))
        board.close()


def test_one_slot_fits_where_it_should() -> None:
    """Slots are page-aligned, so cells never straddle a cache line and a store of eight bytes is whole."""
    assert SLOT_BYTES % 4096 == 0
