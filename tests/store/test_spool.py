"""The producer's buffer on disk: kept jobs outlive the process."""

from __future__ import annotations

import errno
import os
import random
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from conveyor import Buffer
from conveyor.errors import ConfigurationError, StoreUnavailable
from conveyor.jobs.app import Conveyor
from conveyor.store import operations
from conveyor.store.client import spool
from conveyor.store.client.spool import SpoolDirectory, SpooledPush
from conveyor.store.keys import QueueKeys
from conveyor.store.operations import Entry
from conveyor.store.script import Call
from conveyor.store.transport.url import server_name
from support.ready_ids import bare, line
from support.waiting import until
from testbed.server_process import Server

Start = Callable[..., Server]


@pytest.fixture
def server(start_server: Start) -> Server:
    """A server that may be killed and started again."""
    return start_server("--appendonly", "yes", "--appendfsync", "always")


_PROGRAM = """
import sys
from conveyor import Buffer, Conveyor
from conveyor.store.client import spool
spool.MAX_JOBS = 20  # so that a delivery takes many calls
url, directory, first, count = sys.argv[1], sys.argv[2], int(sys.argv[3]), int(sys.argv[4])
app = Conveyor(url, buffer=Buffer(directory, most=100_000))
mail = app.queue("mail")
for n in range(first, first + count):
    print(mail.push(n), flush=True)
print("done", flush=True)
import time
time.sleep(60)
"""


def program(url: str, directory: Path, first: int, count: int) -> subprocess.Popen[str]:
    """Start a process that pushes and then stays."""
    return subprocess.Popen(
        [sys.executable, "-c", _PROGRAM, url, str(directory), str(first), str(count)],
        stdout=subprocess.PIPE,
        text=True,
    )


def kill(process: subprocess.Popen[str]) -> list[str]:
    """Kill a program and return the ids it printed."""
    process.send_signal(signal.SIGKILL)
    assert process.stdout is not None
    ids = [row.strip() for row in process.stdout.read().splitlines() if row.endswith(tuple(_ID_END)) and ":" in row]
    process.wait()
    process.stdout.close()
    return ids


_ID_END = "0123456789ABCDEFGHIJKLMNOPQRSTUVWXYZ_abcdefghijklmnopqrstuvwxyz~"


def printed(process: subprocess.Popen[str], ids: list[str], word: str = "done") -> None:
    """Read the ids that a program prints until it prints *word*; one that does not come to that is killed."""
    assert process.stdout is not None
    too_late = threading.Timer(60, process.kill)
    too_late.start()
    try:
        for row in process.stdout:
            if row.strip() == word:
                return
            ids.append(row.strip())
    finally:
        too_late.cancel()
    raise AssertionError(f"it ended, or was killed after a minute, before it printed {word!r}: {ids[-3:]}")


def is_empty(directory: Path) -> bool:
    """Tell whether all that was kept in *directory* was delivered."""
    return not any(path.stat().st_size for path in directory.glob("*.log"))


def test_the_next_process_delivers(server: Server, tmp_path: Path) -> None:
    """Jobs that a killed process kept on disk are delivered by the next process that uses the directory."""
    server.kill()
    ids: list[str] = []
    process = program(server.url, tmp_path, 0, 300)
    printed(process, ids)
    kill(process)
    server.start()
    with Conveyor(server.url, buffer=Buffer(tmp_path)) as app:
        assert app.client.buffer is not None
        assert app.client.buffer.wait_empty(60)
        until(lambda: len(line(server)) == 300)
    assert line(server) == bare(ids)


def test_killed_while_it_delivers(server: Server, tmp_path: Path, rounds: Callable[[int, int], int]) -> None:
    """Processes that are killed again and again while they deliver lose nothing, double nothing, and keep the order."""
    seed = random.randrange(2**32)
    dice, ids = random.Random(seed), list[str]()
    for turn in range(rounds(30, 3)):
        server.kill()
        process = program(server.url, tmp_path, turn * 1000, 1000)
        printed(process, ids)
        server.start()
        time.sleep(dice.uniform(0.0, 0.08))  # anywhere in the delivery
        kill(process)
    with Conveyor(server.url, buffer=Buffer(tmp_path)) as app:
        until(lambda: len(line(server)) == len(ids))
        assert app.client.buffer is not None
        assert app.client.buffer.wait_empty(60)
    assert line(server) == bare(ids), f"seed {seed}"


_DELIVERS_WITHOUT_MARK = """
import os, signal, sys, time
from conveyor import Buffer, Conveyor
from conveyor.store.client import spool
url, directory, portion, fault = sys.argv[1:]
spool.MAX_JOBS = int(portion)
def die(*_):
    os.kill(os.getpid(), signal.SIGKILL)
spool.DiskSpool._write_delivered = die if fault == "killed" else lambda *_: None
buffer = Buffer(directory)
app = Conveyor(url, buffer=buffer)
while buffer._own is None or buffer._own:
    time.sleep(0.001)
die()
"""


@pytest.mark.row("D181")
@pytest.mark.parametrize("fault", ["killed", "not written"])
@pytest.mark.parametrize("portions", [(1000, 1), (5, 2), (1, 1000), (2, 3)], ids=str)
def test_what_was_delivered_without_a_mark(
    server: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, portions: tuple[int, int], fault: str
) -> None:
    """
    A record that Redis took is stored once though no mark says so on disk, whatever the portions are afterwards.

    Its deliverer died between the reply and the mark, or could not write the mark.
    """
    server.kill()
    app = Conveyor(server.url, buffer=Buffer(tmp_path, linger=0))
    ids = [app.queue(name).push(n) for n in range(9) for name in ("mail", "other")]
    app.close()
    server.start()
    for _ in range(2):
        arguments = [server.url, str(tmp_path), str(portions[0]), fault]
        done = subprocess.run([sys.executable, "-c", _DELIVERS_WITHOUT_MARK, *arguments], check=False)
        assert done.returncode == -signal.SIGKILL
        assert line(server)
    monkeypatch.setattr(spool, "MAX_JOBS", portions[1])
    with Conveyor(server.url, buffer=Buffer(tmp_path)):
        until(lambda: is_empty(tmp_path))
    assert line(server) == bare(ids[::2])
    assert line(server, "other") == bare(ids[1::2])


@pytest.mark.row("D181")
def test_a_push_that_was_withdrawn_is_delivered(server: Server, tmp_path: Path) -> None:
    """A failed attempt that was withdrawn, though nobody was told, was not stored: the push is delivered, and once."""
    keys = QueueKeys("conveyor", "mail")
    for _ in range(2):  # the second time its deliverer died before it could write down what was delivered
        left = SpoolDirectory(tmp_path, server_name(server.url), fsync=False).claim()
        entry = Entry("0" * 22, b"\nmessage\n{}")
        left.add(
            SpooledPush(
                "conveyor", "mail", [entry], time.time(), lane="attempt+", number=7, server=server_name(server.url)
            )
        )
        left.close()
        app = Conveyor(server.url)
        app.client.run(Call(operations.WITHDRAW, (keys.lane("attempt+"),), (7,), bytes))
        app.close()
        with Conveyor(server.url, buffer=Buffer(tmp_path)):
            until(lambda: is_empty(tmp_path))
    assert line(server) == ["0" * 22]


@pytest.mark.row("D181")
def test_a_late_copy_of_a_call_that_was_cut(server: Server, tmp_path: Path) -> None:
    """A call that a dead process sent arrives after its successor, for which there was no room, has sent a half: nothing is stored twice."""
    left = SpoolDirectory(tmp_path, server_name(server.url), fsync=False).claim()
    ids = [f"{n:022}" for n in range(4)]
    for id_ in ids:
        entry = Entry(id_, b"\nmessage\n{}")
        left.add(SpooledPush("conveyor", "mail", [entry], time.time(), server=server_name(server.url)))
    batch = left.next_batch(lambda _: True)
    assert batch is not None
    left.close()
    keys = QueueKeys("conveyor", "mail")
    late = operations.push_numbered(keys, batch.first.lane, range(1, 5), batch.entries(time.time()))
    with server.client() as client:
        client.hset(keys.conf, mapping={"max_length": 2, "schema": 1})
    with server.client() as client, Conveyor(server.url, buffer=Buffer(tmp_path)), Conveyor(server.url) as dead:
        until(lambda: line(server) == ids[:2])
        client.hset(keys.conf, "max_length", 100)
        dead.client.run(late)
        until(lambda: is_empty(tmp_path))
        assert line(server) == ids
        dead.client.run(late)
        assert line(server) == ids


@pytest.mark.row("D182")
def test_a_torn_tail(server: Server, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """Of a file whose end was not written whole, all before that is delivered, and the loss is said."""
    ids = kept(server, tmp_path, 3)
    path = tmp_path / "0.log"
    os.truncate(path, path.read_bytes().index(bare(ids)[2].encode()) + 10)
    server.start()
    with Conveyor(server.url, buffer=Buffer(tmp_path)):
        until(lambda: len(line(server)) == 2)
    assert line(server) == bare(ids[:2])
    assert "cannot be read" in caplog.text
    assert path.stat().st_size == 0


def kept(server: Server, directory: Path, count: int) -> list[str]:
    """Stop the server, and leave *count* jobs in *directory*."""
    server.kill()
    app = Conveyor(server.url, buffer=Buffer(directory, linger=0))
    ids = [app.queue("mail").push(n) for n in range(count)]
    app.close()
    return ids


@pytest.mark.row("D182")
def test_one_damaged_bit(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """A bit that flips anywhere costs the one record that it is in: the others are kept, and what is damaged is set aside."""
    spools, now = SpoolDirectory(tmp_path, "here", fsync=False), time.time()

    def record(n: int) -> SpooledPush:
        return SpooledPush("conveyor", "mail", [Entry(f"{n:022}", b"\n" + bytes([n]))], now, server="here")

    left = spools.claim()
    for n in range(3):
        left.add(record(n))
    left.close()
    path, damaged = tmp_path / "0.log", tmp_path / "0.damaged"
    whole = path.read_bytes()
    ends = [whole.index(f"{n:022}".encode()) for n in range(3)]
    last = len(whole.rstrip(b"\0"))
    seen = set()
    for at in range(0, last, 2):
        path.write_bytes(whole[:at] + bytes([whole[at] ^ (1 << at % 8)]) + whole[at + 1 :])
        damaged.unlink(missing_ok=True)
        again = spools.claim()
        found = [int(one.entries[0].id) for one in again.records()]
        (lost,) = {0, 1, 2} - set(found)
        seen.add(lost)
        assert found == [n for n in range(3) if n != lost]
        assert damaged.read_bytes()
        assert f"{lost:022}".encode() in damaged.read_bytes() or at in range(ends[lost], ends[lost] + 22)
        again.close()
        reread = spools.claim()  # the damaged part is in it no more
        assert [int(one.entries[0].id) for one in reread.records()] == found
        reread.close()
    assert seen == {0, 1, 2}
    assert caplog.text.count("cannot be read") == len(range(0, last, 2))


@pytest.mark.row("D182")
def test_a_frame_within_a_damaged_one_is_no_record(tmp_path: Path) -> None:
    """Bytes of a payload are not taken for a record of the file, when the record that holds them is damaged."""
    spools, now = SpoolDirectory(tmp_path, "here", fsync=False), time.time()
    inner = spool._frame(("P", SpooledPush("conveyor", "mail", [Entry("inner", b"")], now, lane="x+", server="here")))
    left = spools.claim()
    for name, payload in (("one", b""), ("two", inner), ("three", b"")):
        left.add(SpooledPush("conveyor", "mail", [Entry(name, payload)], now, server="here"))
    left.close()
    path = tmp_path / "0.log"
    path.write_bytes(path.read_bytes().replace(b"two", b"tvo"))
    again = spools.claim()
    assert [one.entries[0].id for one in again.records()] == ["one", "three"]
    again.close()


@pytest.mark.row("D182")
def test_damage_on_a_full_disk_changes_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where what is damaged cannot be set aside, it stays, and what is added behind it is read again."""
    spools, now = SpoolDirectory(tmp_path, "here", fsync=False), time.time()
    left = spools.claim()
    for name in ("one", "two", "three"):
        left.add(SpooledPush("conveyor", "mail", [Entry(name, b"")], now, server="here"))
    left.close()
    path = tmp_path / "0.log"
    path.write_bytes(path.read_bytes().rstrip(b"\0").replace(b"three", b"thrae"))
    with monkeypatch.context() as full:
        full.setattr(spool, "open", _no_space, raising=False)
        again = spools.claim()
        again.add(SpooledPush("conveyor", "mail", [Entry("four", b"")], now, server="here"))
        again.close()
    last = spools.claim()
    assert [one.entries[0].id for one in last.records()] == ["one", "two", "four"]
    assert b"thrae" in (tmp_path / "0.damaged").read_bytes()
    last.close()


def _no_space(*_: object, **__: object) -> None:
    raise OSError(28, "No space left on device")


@pytest.mark.row("D183")
def test_a_living_process_delivers_for_a_dead_one(server: Server, tmp_path: Path) -> None:
    """Records of a process that dies while another lives, with the same directory, are delivered by that one."""
    with Conveyor(server.url, buffer=Buffer(tmp_path)) as app:
        first = app.queue("mail").push("it has nothing else to deliver")
        away = Path(server.url.removeprefix("unix://").partition("?")[0])
        away.rename(away.with_suffix(".away"))  # for new connections only
        ids: list[str] = []
        other = program(server.url, tmp_path, 0, 20)
        printed(other, ids)
        kill(other)
        away.with_suffix(".away").rename(away)
        until(lambda: len(line(server)) == 21)
        assert line(server) == bare([first, *ids])
        until(lambda: is_empty(tmp_path))


@pytest.mark.row("D185")
def test_what_is_for_another_server_is_left_to_it(
    server: Server, start_server: Start, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Jobs kept for one server are not delivered to another, whose programs use the same directory; the log says so."""
    ids, another = kept(server, tmp_path, 3), start_server()
    with Conveyor(another.url, buffer=Buffer(tmp_path)) as app:
        until(lambda: "holds 3 jobs for the server" in caplog.text)
        another.kill()
        app.client.retry_for = 0.2
        waits = app.queue("mail").push("for the other")
        another.start()
        until(lambda: line(another) == bare([waits]))
    server.start()
    with Conveyor(server.url, buffer=Buffer(tmp_path)):
        until(lambda: is_empty(tmp_path))
    assert line(server) == bare(ids)
    assert line(another) == bare([waits])
    assert caplog.text.count("holds 3 jobs for the server") == 1


@pytest.mark.row("D185")
def test_a_server_under_another_address(server: Server, start_server: Start, tmp_path: Path) -> None:
    """A server that has moved gets what was kept for it when it is named."""
    ids, moved = kept(server, tmp_path, 3), start_server()
    with Conveyor(moved.url, buffer=Buffer(tmp_path, server=server_name(server.url))):
        until(lambda: is_empty(tmp_path))
    assert line(moved) == bare(ids)
    with pytest.raises(ConfigurationError, match="name of the server"):
        Buffer(tmp_path, server="")


@pytest.mark.row("D185")
@pytest.mark.parametrize(
    ("address", "name"),
    [
        (None, "embedded:"),
        ("embedded:///here", "embedded:///here"),
        ("redis://", "redis://localhost:6379/0"),
        ("rediss://:secret@Host:6379", "redis://host:6379/0"),
        ("redis://user:secret@host/3?socket_timeout=1", "redis://host:6379/3"),
        ("redis://host:7?db=3", "redis://host:7/3"),
        ("unix:///run/s?db=2", "unix:///run/s/2"),
        ("unix://:secret@/run/s", "unix:///run/s/0"),
        ("redis+sentinel://:secret@b,a:1/orders?db=1", "redis+sentinel://a:1,b:26379/orders/1"),
        ("redis+cluster://b:2,a:1", "redis+cluster://a:1,b:2/0"),
        ("redis://[::1]:6380/0", "redis://[::1]:6380/0"),
    ],
)
def test_the_name_of_a_server(address: str | None, name: str) -> None:
    """The name of a server says where it is, and neither who asks nor how: no login, no option."""
    assert server_name(address) == name


@pytest.mark.row("D186")
def test_fsync_includes_names(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With fsync, the names of the directory and of each file that is made there are on the disk before a push returns."""
    synced: list[str] = []
    real = os.fsync

    def fsync(descriptor: int) -> None:
        synced.append(os.readlink(f"/proc/self/fd/{descriptor}"))
        real(descriptor)

    monkeypatch.setattr(os, "fsync", fsync)
    place = tmp_path / "deep" / "er"
    app = Conveyor("redis://127.0.0.1:1", buffer=Buffer(place, fsync=True, linger=0))
    assert synced == [str(tmp_path), str(tmp_path / "deep")]
    synced.clear()
    app.queue("mail").push(1)
    assert synced == [str(place)]
    app.close()
    monkeypatch.setattr(spool, "_REWRITE_ABOVE", -1)
    synced.clear()
    left = SpoolDirectory(place, server_name("redis://127.0.0.1:1"), fsync=True).claim()
    left.add(SpooledPush("conveyor", "mail", [Entry("two", b"")], time.time()))
    left._rewrite()
    assert synced[-2:] == [str(place / "0.new"), str(place)]
    left.close()


def test_a_full_disk_refuses_and_delivers(server: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """On a disk that is full to the last byte pushes are refused (E37), and accepted jobs are delivered, with nothing freed."""
    server.kill()
    with Conveyor(server.url, buffer=Buffer(tmp_path)) as app:
        mail = app.queue("mail")
        ids = [mail.push(n) for n in range(30)]
        most, real = (tmp_path / "0.log").stat().st_size, os.pwrite
        monkeypatch.setattr(os, "pwrite", lambda file, data, at: real(file, data[: max(0, most - at)], at))
        with pytest.raises(StoreUnavailable, match="cannot be written") as caught:
            ids.extend(mail.push(n) for n in range(1000))
        assert caught.value.code == "E37"
        server.start()
        assert app.client.buffer is not None
        assert app.client.buffer.wait_empty(60)
    assert line(server) == bare(ids)


@pytest.mark.row("D188")
def test_a_rewrite_that_fails_takes_no_room(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A file that cannot be written anew, as on a full disk, stays as it was, and nothing of the new one stays beside it."""
    left = SpoolDirectory(tmp_path, server_name("redis://127.0.0.1:1"), fsync=False).claim()
    left.add(SpooledPush("conveyor", "mail", [Entry("one", b"")], time.time()))
    before = (tmp_path / "0.log").read_bytes()

    def fail(*_: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "replace", fail)
    with pytest.raises(OSError, match="No space"):
        left._rewrite()
    assert (tmp_path / "0.log").read_bytes() == before
    assert sorted(path.name for path in tmp_path.iterdir()) == ["0.lock", "0.log"]
    left.close()


@pytest.mark.parametrize("place", ["file", "file/below", "/proc/nowhere"])
def test_a_directory_that_cannot_be_is_refused_at_once(tmp_path: Path, place: str) -> None:
    """A buffer whose directory cannot be used is refused when the app is made, not when Redis is away."""
    (tmp_path / "file").touch()
    with pytest.raises(ConfigurationError, match="cannot be used"):
        Conveyor("redis://127.0.0.1:1", buffer=Buffer(tmp_path / place))


def test_a_directory_that_goes_is_said(server: Server, tmp_path: Path) -> None:
    """When the directory is no more as it is needed, the push raises as without a buffer, and nothing is half kept."""
    app = Conveyor(server.url, buffer=Buffer(tmp_path / "spool", linger=0))
    (tmp_path / "spool").rmdir()
    (tmp_path / "spool").touch()
    server.kill()
    with pytest.raises(StoreUnavailable) as caught:
        app.queue("mail").push(1)
    assert isinstance(caught.value.__cause__, OSError)
    assert len(app.client.buffer or ()) == 0
    app.close()


def test_two_processes_share_a_directory(server: Server, tmp_path: Path) -> None:
    """Each process has a file of its own there; one that lives is left alone, and that of a dead one is taken over."""
    server.kill()
    first, second = list[str](), list[str]()
    one, two = program(server.url, tmp_path, 0, 50), program(server.url, tmp_path, 1000, 50)
    printed(one, first)
    printed(two, second)
    assert sorted(path.name for path in tmp_path.glob("*.log")) == ["0.log", "1.log"]
    kill(one)
    server.start()
    until(lambda: len(line(server)) == 100)  # the one that lives delivers for both
    found = line(server)
    assert [id_ for id_ in found if id_ in bare(first)] == bare(first)
    assert [id_ for id_ in found if id_ in bare(second)] == bare(second)
    kill(two)


def test_a_long_life_does_not_grow_the_file(server: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A file that never empties is written anew when most of it was delivered, and reads the same afterwards."""
    monkeypatch.setattr(spool, "_REWRITE_ABOVE", 10_000)
    server.kill()
    app = Conveyor(server.url, buffer=Buffer(tmp_path, linger=0))
    mail, other = app.queue("mail"), app.queue("other", max_length=1)
    ids = [mail.push("x" * 100) for _ in range(500)]
    blocked = [other.push(n) for n in range(2)]  # the second waits for ever, so the file never empties
    server.start()
    until(lambda: len(line(server)) == 500 and len(line(server, "other")) == 1)
    until(lambda: (tmp_path / "0.log").stat().st_size < 12_000)
    app.close()
    with server.client() as client:
        client.delete("conveyor:{other}:jobs", "conveyor:{other}:ready:0")
    with Conveyor(server.url, buffer=Buffer(tmp_path)):
        until(lambda: line(server, "other") == bare(blocked[1:]))
    assert line(server) == bare(ids)
