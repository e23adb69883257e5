"""Worker processes that are killed with SIGKILL under load: is a job lost, and when do those they ran start again?"""

from __future__ import annotations

import os
import signal
import statistics
import time

from benchmarks.drain import live_jobs
from benchmarks.harness import Bench, Worker, wait_for
from benchmarks.job_notes import Record

_LOAD = 1000  # jobs that wait, at least, while processes are killed
_SECONDS = 20  # the longest wait for the jobs of one killed process


class Watch:
    """The state of each job, read from the notes that the jobs write."""

    def __init__(self, record: Record) -> None:
        """Know of no job yet."""
        self._record = record
        self.enqueued = 0
        self.running: dict[int, int] = {}  # job → the process that runs it
        self.ended: set[int] = set()
        self.waiting: dict[int, int] = {}  # job of a killed process → the instant of the kill, in ns
        self.delays: list[float] = []  # from the kill to the next start, in ms

    def look(self) -> None:
        """Read the new notes."""
        for line in self._record.read():
            if line.kind == "start":
                self.running[line.number] = line.pid
                if (killed := self.waiting.get(line.number)) is not None and line.value > killed:
                    self.delays.append((line.value - killed) / 1e6)
                    del self.waiting[line.number]
            elif line.kind == "end":
                self.running.pop(line.number, None)
                self.ended.add(line.number)

    def fill(self, count: int) -> None:
        """Enqueue *count* more jobs."""
        from benchmarks.measured_jobs import app, hold

        app.enqueue_many(hold.s(number) for number in range(self.enqueued, self.enqueued + count))
        self.enqueued += count

    def kill_one(self) -> bool:
        """Kill a process that runs jobs, and mark these as waiting; False when none does."""
        self.look()
        if not self.running:
            return False
        victim = next(iter(self.running.values()))
        killed = time.monotonic_ns()
        os.kill(victim, signal.SIGKILL)
        time.sleep(0.001)  # what it was writing is in the file now
        self.look()
        for number in [number for number, pid in self.running.items() if pid == victim]:
            del self.running[number]
            self.waiting[number] = killed
        return True


def crash(bench: Bench) -> None:
    """Kill one of two worker processes under load, again and again, each time when all is as before."""
    bench.flush()
    watch = Watch(Record(bench.record_path))
    kills = max(1, bench.kills // 10) if bench.quick else bench.kills

    with Worker(bench, "-q", "hold", "--processes", "2", "-c", "10") as worker, bench.client() as client:

        def under_load() -> bool:
            worker.check()
            if (live := live_jobs(client, "hold")) < _LOAD:
                watch.fill(2 * _LOAD - live)
            watch.look()
            # No job is killed twice: three crashes would rightly make it a dead letter.
            return not watch.waiting and len(set(watch.running.values())) == 2

        def all_ended() -> bool:
            worker.check()
            watch.look()
            return len(watch.ended) + len(watch.waiting) == watch.enqueued

        done = 0
        try:
            while done < kills:
                wait_for(under_load, "two processes at work and the killed jobs to start again", within=_SECONDS)
                done += watch.kill_one()
        except TimeoutError as error:  # jobs that do not start again are a figure too
            print(f"  {error}")
        try:
            wait_for(all_ended, "the other jobs to end", within=60)
        except TimeoutError as error:
            print(f"  {error}")
    bench.note("ours kills", done)
    bench.note("ours jobs killed", len(watch.delays) + len(watch.waiting))
    bench.note("ours jobs not ended after kills", watch.enqueued - len(watch.ended))
    # A job that never started again counts with the time it was waited for.
    if delays := watch.delays + [_SECONDS * 1e3] * len(watch.waiting):
        bench.note("ours re-run p50 ms", statistics.median(delays))
        bench.note("ours re-run max ms", max(delays))
    bench.flush()
