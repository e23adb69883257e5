"""A program that pushes: it writes down each call before it makes it, and afterwards how it ended.

``python -m chaos.producer_program NUMBER SEED RATE COUNT [MIX]``: RATE jobs a second (0: as fast as it can) until COUNT were
attempted or SIGTERM comes. MIX is JSON, kind → weight.
"""

from __future__ import annotations

import asyncio
import functools
import itertools
import json
import os
import random
import signal
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

from chaos import tested_app
from chaos.run_log import RunLog
from chaos.tested_app import CONFIRM, LEASE, SPOOL, app, mail, post, topic
from conveyor import ConfigurationError, ConveyorError, DurabilityNotReached, JobNotFound, PayloadError, QueueFull

MIX: dict[str, float] = {
    "quick": 30, "steady": 6, "boxed": 3, "message": 10, "bulk": 0.4, "messages": 0.4, "slow": 7, "slow_steady": 2,
    "blocking": 0.1, "flaky": 5, "delayed": 5, "unique": 3, "own": 3, "cancel": 3, "poison": 0.2, "boxed_poison": 0.3,
    "spread": 12, "spread_message": 6, "spread_messages": 0.2, "parent": 4, "batched": 8, "batched_apart": 1,
    "batched_beside": 1, "batched_poison": 0.1, "ordered": 6, "pair": 4, "scarce": 3, "paced": 2, "costly": 1.5,
    "grouped_message": 4, "rerun": 4, "debounced": 4, "narrow": 3, "narrow_bulk": 0.2, "published_message": 3, "tagged": 3,
    "told": 4, "told_steady": 1, "told_boxed": 0.5,
}  # fmt: skip
STEADFAST = {
    kind: MIX[kind]
    for kind in ("quick", "steady", "message", "bulk", "slow", "delayed", "spread", "spread_message", "parent", "told")
}
"""Of producers that ask for replicas, or have a buffer: kinds whose id is known to be theirs, however the call ends."""
LEVELLED = {"ordered", "pair", "scarce", "paced", "costly", "grouped_message"}
TOLD = {"told", "told_steady", "told_boxed"}
FANNED = {"rerun", "debounced", "narrow", "narrow_bulk", "published_message", "tagged"}
BULK = 60


class Producer:
    """A producer that draws calls at random, makes them, and logs each one."""

    def __init__(self, number: int, seed: int) -> None:
        """*number* tells the tokens of this producer from those of the others."""
        self.random = random.Random(f"{seed}/{number}")
        self.calls = RunLog(Path(os.environ["CHAOS_DIR"]) / "calls")
        self.prefix = f"{number}.{os.getpid()}."
        self.count = itertools.count()
        self.made = 0
        self.loop = asyncio.new_event_loop()
        self.stopped = False

    def call(self, kind: str, act: Callable[[list[str]], Any], count: int = 1, **facts: Any) -> Any:
        """Write the intent, act with fresh tokens, write the outcome: `ok` and the ids, `refused`, or `unknown`."""
        first = next(self.count)
        for _ in range(count - 1):
            next(self.count)
        self.made += count
        tokens = [f"{self.prefix}{first + i}" for i in range(count)]
        name = f"{self.prefix}{first}"
        facts.update({"wait_replicas": CONFIRM} if CONFIRM else {"buffered": True} if SPOOL else {})
        self.calls.write(call=name, phase="intent", kind=kind, prefix=self.prefix, first=first, count=count, **facts)
        try:
            found = act(tokens)
        except (QueueFull, PayloadError, ConfigurationError) as error:
            # Of a bulk push to partitions some may have taken their part, and of one to a full queue some found room.
            phase = "unknown" if kind in {"spread_messages", "narrow_bulk"} else "refused"
            self.calls.write(call=name, phase=phase, why=type(error).__name__)
        except DurabilityNotReached as error:
            # Stored, and no more than that.
            phase = "ok" if len(error.job_ids) == count else "unknown"
            self.calls.write(call=name, phase=phase, ids=error.job_ids, existing=[], unconfirmed=True)
        except ConveyorError as error:
            self.calls.write(call=name, phase="unknown", why=repr(error)[:200])
        else:
            listed = found if isinstance(found, list) else [found]
            ids = [one if isinstance(one, str) else one.id for one in listed]
            existing = [i for i, one in enumerate(listed) if getattr(one, "duplicate", False)]
            self.calls.write(call=name, phase="ok", ids=ids, existing=existing)
            return found
        return None

    def task(self, kind: str, task: Any, *args: Any, facts: dict[str, Any] | None = None, **options: Any) -> Any:
        """Enqueue one job by one of the ways there are."""
        bound = task.options(**options) if options else task
        if self.random.random() < 0.5:
            return self.call(kind, lambda tokens: bound.enqueue(tokens[0], *args), **(facts or {}))
        return self.call(
            kind, lambda tokens: self.loop.run_until_complete(bound.aenqueue(tokens[0], *args)), **(facts or {})
        )

    def one(self, kind: str) -> None:
        """Make one call of *kind*; `quick:1500` is a quick one that takes 1,500 ms, `bulk:15` one of 15 jobs."""
        draw = self.random
        kind, _, fixed = kind.partition(":")
        ms = float(fixed) if fixed else draw.uniform(1, 10)
        long = (1 + min(4, draw.expovariate(1.5))) * LEASE * 1000
        if kind in {"quick", "steady", "boxed", "bystander", "spread"}:
            self.task(kind, getattr(tested_app, kind), ms)
        elif kind in LEVELLED:
            self.levelled(kind, ms)
        elif kind in FANNED:
            self.fanned(kind, ms)
        elif kind in TOLD:
            pause = float(fixed) if fixed else draw.choice((5, 20, 60))
            self.task(kind, getattr(tested_app, kind), draw.randint(3, 25), pause, draw.choice((0, 0, 1, 2)))
        elif "bulk" in kind or "message" in kind:
            self.many(kind, int(fixed) if fixed else BULK, ms)
        elif kind in {"slow", "slow_steady", "blocking"}:
            self.long(kind, long)
        elif kind in {"delayed", "unique", "own"}:
            self.special(kind, ms)
        elif kind == "flaky":
            self.task(kind, tested_app.flaky, draw.randint(1, 3))
        elif kind.startswith("batched"):
            self.batched(kind, ms)
        elif kind == "parent":
            children, failures = draw.randint(1, 4), draw.choice((0, 0, 1))
            self.task(kind, tested_app.parent, children, failures, facts={"spawns": children})
        elif kind == "poison":
            self.task(kind, tested_app.poison, draw.choice(["0", "1", "75", "SIGKILL", "SIGSEGV"]))
        elif kind == "boxed_poison":
            self.task(kind, tested_app.boxed_poison, draw.choice(["1", "SIGKILL"]))
        elif kind == "cancel":
            self.cancel(draw.uniform(0, 1) < 0.5)
        elif kind == "keys":
            self.keys(f"story{self.made}")
        else:
            raise ValueError(kind)

    def long(self, kind: str, ms: float) -> None:
        """Enqueue a job that takes a lease or several."""
        if kind == "slow":
            self.task(kind, tested_app.quick, ms)
        elif kind == "slow_steady":
            self.task(kind, tested_app.steady, ms / 2)
        else:
            self.task(kind, tested_app.blocking, self.random.uniform(0.5, 1.5) * LEASE * 1000)

    def special(self, kind: str, ms: float) -> None:
        """Enqueue a job for later, or one that may be there already."""
        draw = self.random
        if kind == "delayed":
            delay = round(draw.uniform(0.2, 3), 3)
            self.task(kind, tested_app.quick, ms, facts={"delay": delay}, delay=delay)
        elif kind == "unique":
            key = f"key{draw.randint(0, 20)}"
            self.task(kind, tested_app.quick, draw.uniform(50, 1500), facts={"key": key}, unique=key)
        else:
            name = f"own-{self.prefix}{draw.randint(0, self.made // 2)}"
            self.task(kind, tested_app.quick, ms, facts={"own": name}, id=name)

    def many(self, kind: str, size: int, ms: float) -> None:
        """Push a message, to a queue in one piece or to partitions, or many jobs or messages in one call."""
        if kind == "bulk":
            self.call(kind, lambda tokens: app.enqueue_many(tested_app.quick.s(token, 5) for token in tokens), size)
        elif kind == "messages":
            self.call(kind, lambda tokens: mail.push_many([{"token": t, "ms": ms} for t in tokens]), size)
        elif kind == "spread_messages":
            self.call(kind, lambda tokens: post.push_many([{"token": t, "ms": ms} for t in tokens]), size)
        elif kind == "spread_message":
            self.call(kind, lambda tokens: post.push({"token": tokens[0], "ms": ms}))
        else:
            self.call(kind, lambda tokens: mail.push({"token": tokens[0], "ms": ms}))

    def batched(self, kind: str, ms: float) -> None:
        """Enqueue an item of a batch: of one of three keys, one that fails at first, one beside others that end the process."""
        draw = self.random
        item = functools.partial(tested_app.Item, ms=ms)
        if kind == "batched_poison":
            item = functools.partial(item, how=draw.choice(["1", "SIGKILL", "SIGSEGV"]))
        elif kind in {"batched", "batched_apart"}:
            item = functools.partial(item, fails=draw.choice((0, 0, 0, 2)))
        if kind == "batched":
            item = functools.partial(item, key=draw.choice("abc"))
        name = {"batched_beside": "batched_poison"}.get(kind, kind)
        self.call(kind, lambda tokens: getattr(tested_app, name).enqueue(item(tokens[0])))

    def levelled(self, kind: str, ms: float) -> None:
        """Enqueue a job with a limit or a group, or push a message of a group; the facts say what the checker is to hold."""
        draw = self.random
        lane, failures = f"{kind} {self.prefix}{draw.randrange(4)}", draw.choice((0, 0, 0, 0, 1, 2))
        facts: dict[str, Any]
        if kind == "ordered":
            facts = {"group": lane}
            self.task(kind, tested_app.ordered, lane, ms, failures, facts=facts)
        elif kind == "pair":
            facts = {"slots": [[lane, 2]]}
            self.task(kind, tested_app.pair, lane, 10 * ms, failures, facts=facts)
        elif kind == "scarce":
            facts = {"slots": [["scarce", 3]]}
            self.task(kind, tested_app.scarce, 10 * ms, facts=facts)
        elif kind == "paced":
            facts = {"rates": [["paced", 8, 4.0, 1]]}
            self.task(kind, tested_app.paced, failures, facts=facts)
        elif kind == "costly":
            lane, tokens = f"lane{draw.randrange(2)}", draw.randint(5, 30)
            self.task(kind, tested_app.costly, lane, tokens, facts={"rates": [[f"costly {lane}", 60, 4.0, tokens]]})
        else:
            self.call(kind, lambda tokens: mail.push({"token": tokens[0], "ms": ms}, group=lane), group=lane)

    def fanned(self, kind: str, ms: float) -> None:
        """Make a call that may become one job with others, that may wait for room, or that becomes several messages."""
        draw = self.random
        page, failures = f"{kind} {self.prefix}{draw.randrange(3)}", draw.choice((0, 0, 0, 1))
        if kind == "rerun":
            self.task(kind, tested_app.rerun, page, 20 * ms, failures, facts={"covers": page, "slots": [[page, 1]]})
        elif kind == "debounced":
            self.task(kind, tested_app.debounced, page, facts={"covers": page})
        elif kind == "narrow":
            self.task(kind, tested_app.through, ms, room_timeout="3s")
        elif kind == "narrow_bulk":
            job = tested_app.through.options(room_timeout="5s")
            self.call(kind, lambda tokens: app.enqueue_many(job.s(token, ms) for token in tokens), BULK)
        elif kind == "tagged":
            self.task(kind, tested_app.quick, ms, tags=[f"tag{draw.randrange(5)}", "all"])
        else:
            self.call(
                kind, lambda tokens: topic.publish({"token": tokens[0], "ms": ms})[:1], copies=len(tested_app.copies)
            )

    def cancel(self, later: bool) -> None:
        """Push a job and cancel it at once: before it is due, or while it may already run."""
        delay = self.random.uniform(1, 2) if later else 0
        job = self.task("cancel", tested_app.quick, 500, facts={"delay": delay}, **({"delay": delay} if later else {}))
        if job is not None:
            name = f"cancel-{job.id}"
            self.calls.write(call=name, phase="cancel", id=job.id)
            try:
                gone = job.cancel()
            except ConveyorError as error:
                self.calls.write(call=name, phase="unknown", why=repr(error)[:200])
            else:
                self.calls.write(call=name, phase="cancelled", id=job.id, gone=bool(gone))

    def keys(self, key: str) -> None:
        """Ask for a dead letter back while another job holds its key, which is refused, and when that has ended."""
        first = self.task("hopeless", tested_app.hopeless, facts={"key": key}, unique=key)
        _until(lambda: first.status() == "dead")
        second = self.task("quick", tested_app.quick, 2000, facts={"key": key}, unique=key)
        app.queue("default").redrive()
        _until(lambda: second is None or second.status() == "done")
        app.queue("default").redrive()
        _until(lambda: first.status() == "done")
        self.task("quick", tested_app.quick, 10, facts={"key": key}, unique=key)

    def run(self, rate: float, count: int, mix: dict[str, float]) -> None:
        """Push until *count* were attempted or somebody stops us."""
        kinds, weights = list(mix), list(mix.values())
        began = time.monotonic()
        while self.made < count and not self.stopped:
            self.one(self.random.choices(kinds, weights)[0])
            while rate and not self.stopped and (ahead := self.made / rate - (time.monotonic() - began)) > 0:
                time.sleep(min(ahead, 0.2))


def _until(condition: Callable[[], bool], seconds: float = 10.0) -> None:
    deadline = time.monotonic() + seconds
    with suppress(JobNotFound):  # it was lost with its server, or ended long ago
        while not condition() and time.monotonic() < deadline:
            time.sleep(0.01)


def main() -> None:
    """Read the command line and push."""
    number, seed, rate, count, *rest = sys.argv[1:]
    producer = Producer(int(number), int(seed))

    def stop(*_: object) -> None:
        producer.stopped = True

    signal.signal(signal.SIGTERM, stop)
    topic.subscribe(*tested_app.copies)
    usual = STEADFAST if CONFIRM or SPOOL else MIX
    producer.run(float(rate), int(count), json.loads(rest[0]) if rest else usual)
    app.close()  # delivers what an earlier process left in the buffer, too
    producer.calls.write(call=producer.prefix, phase="end", made=producer.made)


if __name__ == "__main__":
    main()
