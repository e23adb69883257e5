"""The program under test: an app of tasks that write down each of their runs, and what they told, outside the queue.

It uses nothing but the public interface. `CHAOS_DIR` is the run's directory, `CHAOS_LEASE` the lease in seconds,
`CHAOS_SPOOL` a producer's buffer on disk, `CHAOS_CONFIRM` how many replicas must have what it pushes.
"""

from __future__ import annotations

import asyncio
import functools
import os
import signal
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from chaos.run_log import RunLog
from conveyor import BatchFailed, Buffer, Concurrency, Context, Conveyor, Debounce, Rate, Retry, Unique, current

LEASE = float(os.environ.get("CHAOS_LEASE", "2"))
NAMESPACE = "chaos"
MAX_CRASHES = 3
PATIENT = Retry(attempts=40, backoff="50ms", cap="500ms", max_crashes=1_000_000)
"""Jobs that cause no crash, beside others that do: none of them may become a dead letter. Nor may a message, though its
worker is killed from outside more often than a queue lets pass by default."""

PARTITIONS = 3
SPOOL = os.environ.get("CHAOS_SPOOL")

CONFIRM = int(os.environ.get("CHAOS_CONFIRM", "0"))
ASKED: dict[str, Any] = {"wait_replicas": CONFIRM} if CONFIRM else {}

app = Conveyor(namespace=NAMESPACE, lease=LEASE, buffer=Buffer(SPOOL, linger="60s") if SPOOL else None)
if ASKED:
    app.queue("default", **ASKED)  # undeclared it takes the shortest way in
box = app.queue("box")  # for `conveyor worker` only: a program with a worker inside runs no processes
mail = app.queue("mail", max_attempts=40, max_crashes=PATIENT.max_crashes, **ASKED)
wide = app.queue("wide", partitions=PARTITIONS, **ASKED)
narrow = app.queue("narrow", max_length=40, full="block", **ASKED)
copies = [app.queue(name, max_attempts=40, max_crashes=PATIENT.max_crashes) for name in ("left", "right")]
topic = app.topic("chaos.made")
post = app.queue("post", partitions=PARTITIONS, max_attempts=40, max_crashes=PATIENT.max_crashes, **ASKED)
app.queue("told", events=200_000, **ASKED)


@functools.cache
def runs() -> RunLog:
    """Return this process's hold on the file of runs."""
    return RunLog(Path(os.environ["CHAOS_DIR"]) / "runs")


@functools.cache
def told_lines() -> RunLog:
    """Return this process's hold on the file of what jobs told and noted."""
    return RunLog(Path(os.environ["CHAOS_DIR"]) / "told")


@contextmanager
def noted(token: str, id_: str, attempt: int) -> Iterator[None]:
    """Write down that a run began, and how it ended, if it lives to see that."""
    facts = {"token": token, "id": id_, "attempt": attempt, "pid": os.getpid()}
    runs().write(phase="start", **facts)
    try:
        yield
    except BaseException as error:
        runs().write(phase="failed", why=type(error).__name__, **facts)
        raise
    runs().write(phase="ok", **facts)


def answer(token: str, context: Context) -> dict[str, Any]:
    """Return what a job leaves behind: whose it is and which attempt made it, in which process."""
    return {"token": token, "attempt": context.attempt, "pid": os.getpid()}


@app.task(name="quick", retry=PATIENT)
async def quick(token: str, ms: float, context: Context = current()) -> dict[str, Any]:
    """Sleep on the loop."""
    with noted(token, context.job_id, context.attempt):
        await asyncio.sleep(ms / 1000)
        return answer(token, context)


@app.task(name="steady", retry=PATIENT)
def steady(token: str, ms: float, context: Context = current()) -> dict[str, Any]:
    """Sleep on a thread."""
    with noted(token, context.job_id, context.attempt):
        time.sleep(ms / 1000)
        return answer(token, context)


@app.task(name="spread", queue="wide", retry=PATIENT)
async def spread(token: str, ms: float, context: Context = current()) -> dict[str, Any]:
    """Do as `quick` does, on a queue in partitions."""
    with noted(token, context.job_id, context.attempt):
        await asyncio.sleep(ms / 1000)
        return answer(token, context)


@app.task(name="parent", retry=PATIENT)
async def parent(token: str, children: int, failures: int, context: Context = current()) -> dict[str, Any]:
    """Spawn jobs for this queue and for partitions of another; fail at the first attempts, which must spawn none."""
    with noted(token, context.job_id, context.attempt):
        for number in range(children):
            context.spawn((spread if number % 2 else quick).s(f"{token}/{number}", 5))
        await asyncio.sleep(0.005)
        if context.attempt <= failures:
            raise RuntimeError(f"attempt {context.attempt} of {token} fails")
        return answer(token, context)


@app.task(name="boxed", queue="box", run_in="process", retry=PATIENT)
def boxed(token: str, ms: float, context: Context = current()) -> dict[str, Any]:
    """Sleep in a process of its own."""
    with noted(token, context.job_id, context.attempt):
        time.sleep(ms / 1000)
        return answer(token, context)


@app.task(name="blocking", retry=PATIENT)
async def blocking(token: str, ms: float, context: Context = current()) -> dict[str, Any]:
    """Sleep on the loop and let nobody else run there."""
    with noted(token, context.job_id, context.attempt):
        time.sleep(ms / 1000)
        return answer(token, context)


@app.task(name="flaky", retry=PATIENT)
async def flaky(token: str, failures: int, context: Context = current()) -> dict[str, Any]:
    """Fail at the first attempts."""
    with noted(token, context.job_id, context.attempt):
        if context.attempt <= failures:
            raise RuntimeError(f"attempt {context.attempt} of {token} fails")
        return answer(token, context)


@app.task(name="hopeless", retry=1)
async def hopeless(token: str, context: Context = current()) -> dict[str, Any]:
    """Fail once, and for good; succeed when somebody puts it back."""
    with noted(token, context.job_id, context.attempt):
        if context.attempt == 1:
            raise RuntimeError(f"{token} fails")
        return answer(token, context)


@app.task(name="poison", retry=Retry(attempts=40, max_crashes=MAX_CRASHES))
async def poison(token: str, how: str, context: Context = current()) -> None:
    """End the worker process, with the exit code or the signal that *how* names."""
    with noted(token, context.job_id, context.attempt):
        die(how)


@app.task(name="boxed_poison", queue="box", run_in="process", retry=Retry(attempts=40, max_crashes=MAX_CRASHES))
def boxed_poison(token: str, how: str, context: Context = current()) -> None:
    """End the job's own process."""
    with noted(token, context.job_id, context.attempt):
        die(how)


@app.task(name="bystander", retry=Retry(attempts=40, max_crashes=MAX_CRASHES))
async def bystander(token: str, ms: float, context: Context = current()) -> dict[str, Any]:
    """Run beside poison jobs: as it causes no crash, it must never become a dead letter for one."""
    with noted(token, context.job_id, context.attempt):
        await asyncio.sleep(ms / 1000)
        return answer(token, context)


@dataclass
class Item:
    """One item of a batch: *key* is that of the batches it may be in, *fails* how often it fails, *how* ends its process."""

    token: str
    key: str = ""
    ms: float = 0.0
    fails: int = 0
    how: str = ""


@contextmanager
def noted_batch(items: list[Item], contexts: tuple[Context, ...]) -> Iterator[dict[int, BaseException]]:
    """Write down that the runs of all items began, and how each ended; yield the errors of items to be filled in."""
    if len({item.key for item in items}) != 1:
        raise AssertionError(f"a batch of several keys: {items}")
    facts = [
        {"token": item.token, "id": one.job_id, "attempt": one.attempt, "pid": os.getpid()}
        for item, one in zip(items, contexts, strict=True)
    ]
    for fact in facts:
        runs().write(phase="start", **fact)
    failed: dict[int, BaseException] = {}
    try:
        yield failed
    except BaseException as error:
        for fact in facts:
            runs().write(phase="failed", why=type(error).__name__, **fact)
        raise
    for at, fact in enumerate(facts):
        runs().write(phase="failed" if at in failed else "ok", **fact)


def handle(items: list[Item], contexts: tuple[Context, ...], failed: dict[int, BaseException]) -> list[dict[str, Any]]:
    """Return what each item leaves behind; end the process for an item that says so."""
    for item in items:
        if item.how:
            die(item.how)
    for at, (item, one) in enumerate(zip(items, contexts, strict=True)):
        if one.attempt <= item.fails:
            failed[at] = RuntimeError(f"attempt {one.attempt} of {item.token} fails")
    return [answer(item.token, one) for item, one in zip(items, contexts, strict=True)]


@app.batch_task(name="batched", size=8, within="100ms", group_by="key", retry=PATIENT)
async def batched(items: list[Item], context: Context = current()) -> list[dict[str, Any]]:
    """Do as `quick` does with several at once; some items fail at first, alone."""
    contexts = context.items
    with noted_batch(items, contexts) as failed:
        await asyncio.sleep(max(item.ms for item in items) / 1000)
        results = handle(items, contexts, failed)
    if failed:
        raise BatchFailed(failed, results=results)
    return results


@app.batch_task(name="batched_apart", queue="box", run_in="process", size=4, within="100ms", retry=PATIENT)
def batched_apart(items: list[Item], context: Context = current()) -> list[dict[str, Any]]:
    """Handle the items of a batch in a process of its own."""
    contexts = context.items
    with noted_batch(items, contexts) as failed:
        time.sleep(max(item.ms for item in items) / 1000)
        results = handle(items, contexts, failed)
    if failed:
        raise BatchFailed(failed, results=results)
    return results


@app.batch_task(name="batched_poison", size=8, within="100ms", retry=Retry(attempts=40, max_crashes=MAX_CRASHES))
async def batched_poison(items: list[Item], context: Context = current()) -> list[dict[str, Any]]:
    """Run items of which one may end the process; the others must never become dead letters for it."""
    contexts = context.items
    with noted_batch(items, contexts) as failed:
        return handle(items, contexts, failed)


# -- limits and groups ------------------------------------------------------------------------------------------------


async def level(token: str, ms: float, failures: int, context: Context) -> dict[str, Any]:
    """Do as `flaky` does, and take a while."""
    with noted(token, context.job_id, context.attempt):
        await asyncio.sleep(ms / 1000)
        if context.attempt <= failures:
            raise RuntimeError(f"attempt {context.attempt} of {token} fails")
        return answer(token, context)


@app.task(name="ordered", group_by="lane", retry=PATIENT)
async def ordered(token: str, lane: str, ms: float, failures: int, context: Context = current()) -> dict[str, Any]:
    """Run one at a time and in order within a lane, also over retries."""
    return await level(token, ms, failures, context)


@app.task(name="pair", group_by="lane", limits=[Concurrency(2, by="lane")], retry=PATIENT)
async def pair(token: str, lane: str, ms: float, failures: int, context: Context = current()) -> dict[str, Any]:
    """Run two at a time within a lane."""
    return await level(token, ms, failures, context)


@app.task(name="scarce", limits=[Concurrency(3)], retry=PATIENT)
def scarce(token: str, ms: float, context: Context = current()) -> dict[str, Any]:
    """Run three at a time, on threads."""
    with noted(token, context.job_id, context.attempt):
        time.sleep(ms / 1000)
        return answer(token, context)


@app.task(name="paced", limits=[Rate(8, "4s")], retry=PATIENT)
async def paced(token: str, failures: int, context: Context = current()) -> dict[str, Any]:
    """Start eight times in any four seconds, retries included."""
    return await level(token, 5, failures, context)


@app.task(name="costly", limits=[Rate(60, "4s", by="lane", cost="tokens")], retry=PATIENT)
async def costly(token: str, lane: str, tokens: int, context: Context = current()) -> dict[str, Any]:
    """Start for sixty tokens in any four seconds, of each lane."""
    return await level(token, 5, 0, context)


# -- calls that become one job, full queues, topics -------------------------------------------------------------------


@app.task(name="rerun", unique=Unique(by=("page",), conflict="rerun"), retry=PATIENT)
async def rerun(token: str, page: str, ms: float, failures: int, context: Context = current()) -> dict[str, Any]:
    """Run for a page, one at a time, and once more when it was asked for meanwhile."""
    return await level(token, ms, failures, context)


@app.task(name="debounced", debounce=Debounce("300ms", by="page", max_wait="2s"), retry=PATIENT)
async def debounced(token: str, page: str, context: Context = current()) -> dict[str, Any]:
    """Run for a page when nobody has asked for a while, with the latest call."""
    return await level(token, 5, 0, context)


@app.task(name="narrow", queue="narrow", retry=PATIENT)
async def through(token: str, ms: float, context: Context = current()) -> dict[str, Any]:
    """Run in a queue that takes few jobs, and whose producers wait for room."""
    return await level(token, ms, 0, context)


# -- what jobs tell while they run, and what is started by the clock ---------------------------------------------------


class Teller:
    """Lines of one attempt on what it tells, each written down before it is told. Its notes count on from where it found them."""

    def __init__(self, context: Context, parts: int) -> None:
        """Write down which notes the attempt found."""
        self.context, self.parts, self.number = context, parts, 0
        self.mark = int(context.notes.get("mark", 0))
        self.facts = {"id": context.job_id, "attempt": context.attempt, "pid": os.getpid()}
        told_lines().write(phase="found", mark=self.mark, **self.facts)

    def part(self) -> list[int]:
        """Note and tell one step, and return what is to be emitted."""
        self.number, self.mark = self.number + 1, self.mark + 1
        told_lines().write(phase="told", number=self.number, mark=self.mark, **self.facts)
        self.context.notes["mark"] = self.mark
        self.context.progress(self.number, self.parts, f"{self.context.attempt}/{self.number}")
        return [self.context.attempt, self.number]

    def fail_at_first(self, failures: int) -> None:
        """Raise in the first attempts."""
        if self.context.attempt <= failures:
            raise RuntimeError(f"attempt {self.context.attempt} of {self.context.job_id} fails")


@app.task(name="told", queue="told", retry=PATIENT)
async def told(token: str, parts: int, ms: float, failures: int, context: Context = current()) -> dict[str, Any]:
    """Emit parts, tell the progress, and keep notes, on the loop."""
    with noted(token, context.job_id, context.attempt):
        teller = Teller(context, parts)
        for _ in range(parts):
            await context.emit(teller.part())
            await asyncio.sleep(ms / 1000)
        teller.fail_at_first(failures)
        return answer(token, context)


def tell(token: str, parts: int, ms: float, failures: int, context: Context) -> dict[str, Any]:
    """Run as the coroutine does, in a plain function."""
    with noted(token, context.job_id, context.attempt):
        teller = Teller(context, parts)
        for _ in range(parts):
            context.emit(teller.part())
            time.sleep(ms / 1000)
        teller.fail_at_first(failures)
        return answer(token, context)


@app.task(name="told_steady", queue="told", retry=PATIENT)
def told_steady(token: str, parts: int, ms: float, failures: int, context: Context = current()) -> dict[str, Any]:
    """Run as the coroutine does, on a thread."""
    return tell(token, parts, ms, failures, context)


@app.task(name="told_boxed", queue="box", run_in="process", retry=PATIENT)
def told_boxed(token: str, parts: int, ms: float, failures: int, context: Context = current()) -> dict[str, Any]:
    """Run as the coroutine does, in a process of its own."""
    return tell(token, parts, ms, failures, context)


@app.task(name="tick", queue="told", retry=PATIENT)
async def tick(schedule: str, context: Context = current()) -> dict[str, Any]:
    """Run for an instant of a schedule; its token says which."""
    planned = context.scheduled_for
    assert planned is not None
    token = f"tick/{schedule}/{round(planned.timestamp() * 1000)}"
    with noted(token, context.job_id, context.attempt):
        await asyncio.sleep(0.02)
        return answer(token, context)


def die(how: str) -> None:
    """End this process at once."""
    if how.isdigit():
        os._exit(int(how))
    os.kill(os.getpid(), getattr(signal, how))
    time.sleep(10)
