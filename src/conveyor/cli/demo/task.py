"""
The app of the demo, with the tasks that its workers run.

It is an ordinary app: `conveyor worker conveyor.cli.demo.task:app` works too. Every run writes to a journal, because
the demo proves its counts without asking the queue.
"""

from __future__ import annotations

import asyncio
import hashlib
import hmac
import os
import re
import time
from collections import Counter
from collections.abc import AsyncIterator
from dataclasses import dataclass
from datetime import UTC, datetime
from email.message import EmailMessage
from pathlib import Path

from conveyor import Conveyor, Retry, current
from conveyor.cli.demo import image
from conveyor.cli.demo.journal import Journal
from conveyor.events import JobDead, JobRetried
from conveyor.jobs.task import definition_of

JOURNAL, NAMESPACE, PICTURES = "CONVEYOR_DEMO_JOURNAL", "CONVEYOR_DEMO_NAMESPACE", "CONVEYOR_DEMO_PICTURES"
"""Environment variables that tell workers where to write."""
KEEP = "1d"  # every outcome is looked up at the end of the demo, however long it lasts
FACTOR = 4

app = Conveyor(namespace=os.environ.get(NAMESPACE, "conveyor-demo"))
journal = Journal(os.environ.get(JOURNAL))


@dataclass
class Order:
    """A message of the queue `orders`."""

    number: int
    customer: str
    cents: int


@dataclass
class Statistics:
    """The result of `text.statistics`."""

    words: int
    longest_line: int
    frequent: dict[str, int]


orders = app.queue("orders", Order)


@app.task(name="text.statistics", queue="files", keep_result=KEEP)
def statistics(path: str) -> Statistics:
    """
    Count words, the longest line and the most frequent identifiers of a source file.

    A plain function: it runs on a thread.
    """
    with journal.run() as run:
        text = Path(path).read_text("utf-8", "replace")
        names = Counter(re.findall(r"[A-Za-z_]\w{3,}", text))
        result = Statistics(len(text.split()), max(map(len, text.splitlines()), default=0), dict(names.most_common(5)))
        run.note = f"{Path(path).name}: {result.words:,} words, mostly {next(iter(result.frequent), 'none')}"
        return result


@app.task(name="picture.thumbnail", queue="files", keep_result=KEEP)
def thumbnail(number: int, side: int = 96) -> int:
    """
    Draw an image, write it as PNG, read it back and shrink it.

    Returns the size of the thumbnail's file in bytes.
    """
    with journal.run() as run:
        original = image.encode(image.draw(number, side, side))
        small = image.encode(image.shrink(image.decode(original), FACTOR))
        folder = os.environ.get(PICTURES)
        if folder:
            (Path(folder) / f"{number % 100}.png").write_bytes(small)
        run.note = f"{side}×{side} → {side // FACTOR}×{side // FACTOR}, {len(small):,} bytes of PNG"
        return len(small)


@app.task(name="payment.charge", queue="payments", keep_result=KEEP, retry=Retry(attempts=5, backoff="400ms", cap="2s"))
async def charge(number: int, cents: int) -> str:
    """
    Sign a receipt, after a bank that is sometimes away.

    It is away once for every fourth payment, twice for every twelfth.
    """
    with journal.run() as run:
        await asyncio.sleep(0.02)
        fails = 2 if number % 12 == 0 else 1 if number % 4 == 0 else 0
        if current().attempt <= fails:
            raise ConnectionError("the bank does not answer")
        receipt = hmac.new(b"demo", f"{number}:{cents}".encode(), hashlib.sha256).hexdigest()[:12]
        run.note = f"{cents / 100:,.2f} €, receipt {receipt}"
        return receipt


@app.task(
    name="number.factor", queue="numbers", keep_result=KEEP, timeout="700ms", retry=Retry(attempts=3, backoff="200ms")
)
async def factor(number: int) -> int:
    """
    Find the smallest factor by trial division.

    The product of two large primes takes longer than the timeout.
    """
    with journal.run() as run:
        candidate, slice_ends = 2, time.perf_counter() + 0.002
        while number % candidate and candidate * candidate <= number:
            candidate += 1
            if time.perf_counter() > slice_ends:
                await asyncio.sleep(0.006)  # leaves the loop, and most of the processor, to other jobs
                slice_ends = time.perf_counter() + 0.002
        smallest = candidate if number % candidate == 0 else number
        run.note = f"{number} = {smallest} × {number // smallest}"
        return smallest


@app.task(name="mail.reminder", queue="mail", keep_result=KEEP)
async def remind(customer: str, due: datetime) -> int:
    """Compose a mail at the instant it is scheduled for; return its size in bytes."""
    with journal.run() as run:
        late = (datetime.now(UTC) - due).total_seconds()
        mail = EmailMessage()
        mail["To"], mail["Subject"] = f"{customer}@example.org", "Your order"
        mail.set_content(f"Dear {customer},\nthis was to be sent at {due:%H:%M:%S}.\n")
        run.note = f"to {customer}, {1000 * late:,.0f} ms after its due time"
        return len(bytes(mail))


@app.task(name="reading.average", queue="files", keep_result=KEEP)
def average(id: int, values: list[float]) -> float:  # noqa: A002  the name that the producer uses
    """Average the values of a reading that another program put on a plain list."""
    with journal.run(key=reading_key(id)) as run:
        mean = sum(values) / len(values)
        run.note = f"reading {id}: {mean:.2f} from a plain RPUSH"
        return mean


# The list is outside the namespace, where the other program expects it, so its name contains the namespace.
readings = app.plain_list(f"{app.namespace}-readings", task=average)


def reading_key(number: int) -> str:
    """
    Return the key of a reading in the report.

    A reading has no id before it is taken from its list.
    """
    return f"reading:{number}"


@app.lifespan
async def record_start() -> AsyncIterator[None]:
    """Record that this worker process has started."""
    journal.write("up")
    yield


@app.on(JobRetried)
def record_retry(event: JobRetried) -> None:
    """Record that a run failed and another one follows."""
    attempts = definition_of(app.tasks[event.task]).settings.retry.attempts
    note = f"{event.attempt}/{attempts} {_error_name(event)}"
    journal.write("retry", event.task, event.job_id, event.attempt, event.delay, note)


@app.on(JobDead)
def record_dead(event: JobDead) -> None:
    """Record that a job was given up."""
    journal.write("dead", event.task, event.job_id, event.attempt, 0.0, _error_name(event))


def _error_name(event: JobRetried | JobDead) -> str:
    return type(event.error).__name__ if event.error is not None else "crashed"
