"""The server dies, forgets, or comes back with part of its file: rows C1, C2, C3 and C15 of docs/reliability.md."""

from __future__ import annotations

import random
import shutil
from collections.abc import Callable
from pathlib import Path
from time import monotonic

import pytest

from conveyor.jobs.app import Conveyor
from conveyor.store import inspection
from conveyor.store.operations import WorkerUnregistered
from support.job_load import JobLoad
from support.manual_worker import ManualWorker
from support.waiting import auntil
from testbed.server_process import Server

Rounds = Callable[[int, int], int]
Start = Callable[..., Server]
UNWRITTEN = 3.0
"""Seconds before a kill in which an answer may have been without a write: Redis puts a write off for two at most."""


@pytest.mark.row("C1", "I2")
@pytest.mark.parametrize("fsync", ["everysec", "always"])
async def test_kills_of_a_server_with_a_file_lose_nothing(start_server: Start, rounds: Rounds, fsync: str) -> None:
    """
    With an append-only file, a server killed under load loses nothing it acknowledged, and work goes on by itself.

    Under `everysec` it answers before it writes while a sync is under way: on a slow disk what came then is gone.
    """
    server = start_server("--appendonly", "yes", "--appendfsync", fsync)
    back, kills = [], []
    async with JobLoad(server.url, forgetful=fsync == "everysec") as load:
        for _ in range(rounds(100, 4)):
            await load.more(20)
            kills.append(monotonic())
            server.kill()
            server.start()
            back.append(await load.more(5))
    lost = [n for n in load.accepted if n not in load.ran]
    print(
        f"{fsync}: {len(load.accepted)} accepted, lost {len(lost)}, again {len(load.again)}, back after at most {max(back):.2f} s"
    )
    assert load.errors == []
    if fsync == "always":  # what was answered was written, so no lease and no end is forgotten
        assert (lost, load.lost, load.again) == ([], [], [])
    calls = {n: load.accepted_at[n] for n in lost}
    excused = {n for n, (began, ended) in calls.items() if any(began < kill < ended + UNWRITTEN for kill in kills)}
    assert calls.keys() - excused == set()


@pytest.mark.row("C2", "C15")
@pytest.mark.parametrize("way", ["restart", "flush"])
async def test_a_server_that_forgot_everything_takes_new_work(start_server: Start, rounds: Rounds, way: str) -> None:
    """After a restart without a file, or FLUSHALL, jobs are gone; the same workers run new ones and nothing is left in halves."""
    server = start_server()
    async with JobLoad(server.url, forgetful=True) as load:
        for _ in range(rounds(50, 3) if way == "restart" else rounds(50, 10)):
            await load.more(20)
            if way == "restart":
                server.kill()
                server.start()
            else:
                with server.client() as client:
                    client.flushall()
            marker = len(load.accepted)
            await auntil(lambda marker=marker: len(load.accepted) >= marker + 10)
            await load.more(20)
    assert load.errors == []
    with server.client() as client:  # nothing but what every queue keeps
        names = {key.decode().rpartition(":")[2] for key in client.scan_iter() if client.ttl(key) == -1}
    assert names <= {"queues", "conf", "recent"}


@pytest.mark.row("C2")
def test_an_outcome_told_to_a_server_that_forgot_leaves_nothing(start_server: Start) -> None:
    """The end of a job that the server forgot is refused with an error, and no partial record is created."""
    server = start_server()
    with Conveyor(server.url) as app:
        app.task(name="note")(lambda n: None).enqueue(1)
        manual = ManualWorker(app)
        [id_] = manual.take()
        with server.client() as client:
            client.flushall()
            with pytest.raises(WorkerUnregistered):
                manual.done(id_, 1)
            assert client.keys() == []


def _mixed_life(server: Server) -> None:
    """Leave a file with every kind of step in it: pushes of all kinds, turns, ends, reaps, cancels, purges."""
    with Conveyor(server.url) as app:
        note, other = app.task(name="note")(lambda n: None), app.task(name="other", queue="other")(lambda n: None)
        for round_ in range(12):
            note.enqueue(round_)
            app.enqueue_many([note.s(n) for n in range(10)])
            note.options(priority=3, unique=f"key{round_}").enqueue(1)
            later = note.options(delay="1h").enqueue(2)
            gone = note.options(priority=2).enqueue(3)
            other.enqueue(round_)
            manual = ManualWorker(app)
            ids = manual.take(8)
            manual.done(ids[0], {"value": round_})
            manual.dead(ids[1], None)
            manual.plainly_done(*ids[2:5])
            gone.cancel()
            if round_ % 3 == 0:
                later.cancel()
            if round_ % 2:
                manual.leave()  # finishes what it holds; the others keep theirs
            if round_ == 8:
                app.queue("other").purge()


@pytest.mark.row("C3", "I1")
@pytest.mark.parametrize("name", ["valkey", "redis7", "redis6"])
def test_a_file_cut_anywhere_is_sound(start_server: Start, tmp_path: Path, rounds: Rounds, name: str) -> None:
    """An append-only file that ends at any byte, as after a power cut, loads into queues with every job in exactly one place."""
    options = ("--appendonly", "yes", "--appendfsync", "always", "--aof-load-truncated", "yes")
    server = start_server(*options, name=name)
    _mixed_life(server)
    server.kill()
    kept = tmp_path / "kept"
    shutil.copytree(server.directory, kept, ignore=shutil.ignore_patterns("s"))
    [file] = [*kept.glob("appendonlydir/*.incr.aof"), *kept.glob("appendonly.aof")]
    whole, seed, seen = file.read_bytes(), random.randrange(2**32), set()
    print(f"seed {seed}, {len(whole)} bytes")
    draw = random.Random(seed)
    cuts = rounds(200, 12) if name == "valkey" else rounds(200, 4)
    for number in range(cuts):  # one in each part of the file
        at = draw.randrange(max(1, number * len(whole) // cuts), (number + 1) * len(whole) // cuts)
        shutil.rmtree(server.directory)
        shutil.copytree(kept, server.directory)
        (server.directory / file.relative_to(kept)).write_bytes(whole[:at])
        server.start()
        with Conveyor(server.url) as app:
            for queue in app.client.queues():
                assert app.client.run(inspection.audit(app.client.keys(queue))) == [], f"cut at byte {at}"
                counts = app.client.run(inspection.counts(app.client.keys(queue)))
                seen.add((counts.ready, counts.leased, counts.dead))
        server.kill()
    assert len(seen) > 3  # the cuts did fall into the life of the queues
