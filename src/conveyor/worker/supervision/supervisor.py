"""
The supervisor: keeps N children alive, and does for them what a process cannot do for itself.

It never imports the app, so nothing of the user's can block or break it. It starts children and restarts dead ones.
What Redis must be told (leases renewed for a child that cannot, returned for one that is dead) the guardian tells it.
"""

from __future__ import annotations

import os
import select
import signal
import socket
import sys
from collections import deque
from importlib.metadata import PackageNotFoundError, version
from time import monotonic
from types import FrameType
from typing import Any

import msgspec

from conveyor.store.transport.url import masked
from conveyor.worker.leasing.heartbeat import MAX_STALL
from conveyor.worker.logs import LOG, configure_log, describe_end
from conveyor.worker.recycling import megabytes
from conveyor.worker.shared_memory import ChildInfo, ChildSpec, SharedMemory
from conveyor.worker.supervision.child_main import IMPORT_FAILED, MARGIN, RECYCLE
from conveyor.worker.supervision.child_process import NO_STACK, STALLED, ChildProcess
from conveyor.worker.supervision.lease_guard import DeadChild, LeaseGuard

FAILED_STARTS = 5
FAREWELL = 2.0
"""Seconds that a supervisor without children waits for Redis to take back their last leases."""
_LOOK, _QUICK_LOOK = 0.25, 0.05


def run(
    app_reference: str,
    *,
    queues: dict[str, float],
    concurrency: int,
    threads: int,
    processes: int,
    burst: bool,
    grace: float,
    max_jobs: int | None = None,
    max_memory: int | None = None,
    verbose: bool = False,
    python: str = sys.executable,
) -> int:
    """Run worker processes for ``module:attribute`` until a signal, or with *burst* until all is drained; exit code."""
    configure_log(verbose=verbose)
    spec = ChildSpec(
        app_reference, queues, concurrency, threads, burst=burst, grace=grace, verbose=verbose, path=tuple(sys.path),
        max_jobs=max_jobs, max_memory=max_memory,
    )  # fmt: skip
    return Supervisor(spec, processes=processes, python=python).run()


class Supervisor:
    """The children of one command and their guardian. `run` belongs into the main thread: it takes the signals."""

    def __init__(
        self,
        spec: ChildSpec,
        *,
        processes: int,
        python: str = sys.executable,
        child_module: str = "conveyor.worker.supervision.child_main",
        max_stall: float = MAX_STALL,
    ) -> None:
        """Prepare; nothing starts before `run`. *child_module* is what each child executes."""
        self._spec = spec
        self._command = [python, "-m", child_module, spec.app]
        self._max_stall = max_stall
        self._processes = processes
        self._board = SharedMemory(2 * processes)
        slots = [self._board.slot(number) for number in range(2 * processes)]
        self._children = [ChildProcess(number + 1, slots[number]) for number in range(processes)]
        self._spare = slots[processes:]  # for successors, while those that are to be replaced drain
        self._guardian = LeaseGuard()
        self._life = os.pipe()  # children read it: when we are gone, however, it ends
        self._signals: deque[int] = deque()
        self._stops = 0
        self._stop_at: float | None = None
        self._exit_code = 0
        self._introduced = False
        self._looked = self._resumed = monotonic()

    def run(self) -> int:
        """Start the children and look after them; return the exit code when all have ended."""
        waker, wakes = socket.socketpair()
        waker.setblocking(False)
        wakes.setblocking(False)
        before = self._take_over_signals(waker.fileno())
        try:
            while not self._all_ended():
                self._look()
                select.select([wakes], [], [], self._pause())
                try:
                    wakes.recv(4096)
                except BlockingIOError:
                    pass
            self._say_goodbye()
            return self._exit_code
        finally:
            signal.set_wakeup_fd(-1)
            for number, handler in before.items():
                signal.signal(number, handler)
            waker.close()
            wakes.close()
            for descriptor in self._life:
                os.close(descriptor)

    # -- signals --------------------------------------------------------------------------------------------------

    def _take_over_signals(self, waker: int) -> dict[int, Any]:
        def note(number: int, _: FrameType | None) -> None:
            self._signals.append(number)

        numbers = [signal.SIGTERM, signal.SIGINT, signal.SIGUSR1, signal.SIGUSR2, signal.SIGCHLD]
        if signal.getsignal(signal.SIGHUP) is not signal.SIG_IGN:  # nohup
            numbers.append(signal.SIGHUP)
        before: dict[int, Any] = {number: signal.signal(number, note) for number in numbers}
        signal.set_wakeup_fd(waker, warn_on_full_buffer=False)
        return before

    def _obey(self) -> None:
        while self._signals:
            number = self._signals.popleft()
            if number in {signal.SIGTERM, signal.SIGINT, signal.SIGHUP}:
                self._stop()
            elif number == signal.SIGUSR1:
                LOG.info("Quiet: what is running goes on, nothing new is taken")
                self._spec = msgspec.structs.replace(self._spec, quiet=True)
            elif number == signal.SIGUSR2:
                for child in self._children:
                    child.ask_stacks("person")

    def _stop(self) -> None:
        """First drain, then hurry, then kill."""
        self._stops += 1
        patience = {1: self._spec.grace + MARGIN, 2: MARGIN}.get(self._stops, 0.0)
        end = monotonic() + patience
        self._stop_at = end if self._stop_at is None else min(self._stop_at, end)
        if self._stops == 1:
            LOG.info("Stopping: what runs has %g s to end; a second signal hurries", self._spec.grace)
        elif self._stops == 2:
            LOG.info("Hurrying: what runs is handed back; a third signal kills")
        self._tell(signal.SIGTERM if self._stops == 1 else signal.SIGINT)

    def _tell(self, number: int) -> None:
        for child in self._children:
            child.signal(number)

    # -- looking after children -----------------------------------------------------------------------------------

    def _all_ended(self) -> bool:
        if any(child.alive for child in self._children):
            return False
        return self._stop_at is not None or all(child.finished for child in self._children)

    def _pause(self) -> float:
        calm = all((child.up and child.stalled_since is None) or child.finished for child in self._children)
        return _LOOK if calm and self._stop_at is None and self._introduced else _QUICK_LOOK

    def _look(self) -> None:
        now = monotonic()
        if now - self._looked > STALLED:
            self._resumed = now  # we were frozen, and so perhaps were they: nobody is to blame for that time
        self._looked = now
        self._obey()
        for child in list(self._children):
            if child.alive:
                code = child.exit_code()
                self._introduce(child)  # a short burst may be over by now
                if code is not None:
                    self._bury(child, code)
                else:
                    self._watch(child, now)
            if child.is_due(now) and self._stop_at is None and self._settled(child):
                self._start(child)

    def _start(self, child: ChildProcess) -> None:
        descriptors = (self._board.fd, self._life[0])
        place = f"{child.slot.number}/{self._board.slots}"
        try:
            child.start(self._spec, [*self._command, place, *map(str, descriptors)], descriptors)
        except OSError as error:
            LOG.error("Cannot start worker child %d, trying again: %s", child.number, error)
            child.bury()
            return
        self._guardian.watch(child.slot)
        LOG.debug("Started worker child %d (pid %d)", child.number, child.pid)

    def _succeed(self, child: ChildProcess) -> None:
        """Start a successor beside a child that takes no more work; in a burst not before all that it hands back is back."""
        if self._spare and not self._spec.burst:
            child.succeeded = True
            successor = ChildProcess(child.number, self._spare.pop())
            self._children.append(successor)
            self._start(successor)

    def _settled(self, child: ChildProcess) -> bool:
        # A burst ends when nothing is left: its last child must not look before a dead one's jobs are back.
        return not self._spec.burst or child.estate is None or child.estate.settled.is_set()

    def _watch(self, child: ChildProcess, now: float) -> None:
        stacks = child.stacks_ready("person", now)
        if stacks is not None:
            print(f"worker child {child.number} (pid {child.pid}):\n{stacks}", file=sys.stderr, flush=True)
        if self._stop_at is not None and now >= self._stop_at:
            child.kill("stop")
            return
        if not child.up:
            return
        if self._spec.quiet and not child.quiet:
            child.quiet = True
            child.signal(signal.SIGUSR1)
        if child.slot.retiring and not child.succeeded and self._stop_at is None:
            self._succeed(child)
        since = max(child.slot.last_tick, self._resumed)
        if now - since < STALLED:
            if child.stalled_since is not None:
                stood = child.slot.last_tick - child.stalled_since
                LOG.info("Worker child %d (pid %d) goes on after %.1f s", child.number, child.pid, stood)
                child.stalled_since = None
        elif child.stalled_since is None:
            child.stalled_since = since
            child.ask_stacks("stall")
        stacks = child.stacks_ready("stall", now)
        if stacks is not None:
            self._tell_stall(child, now - (child.stalled_since or since), stacks)
        if now - since > self._max_stall:
            child.kill(f"was killed after blocking its event loop for {now - since:.0f} s{_in_job(child)}")

    def _tell_stall(self, child: ChildProcess, seconds: float, stacks: str) -> None:
        if stacks == NO_STACK:
            LOG.warning(
                "Worker child %d (pid %d) has not run for %.1f s: is it stopped? It keeps its jobs for now, and is killed "
                "after %g s.",
                child.number, child.pid, seconds, self._max_stall,
            )  # fmt: skip
            return
        job = _in_job(child)
        advice = " Make the task a plain def, so that it runs in a thread." if job else ""
        LOG.warning(
            "E11 Worker child %d (pid %d) has blocked its event loop for %.1f s%s; it keeps its jobs for now, and is "
            "killed after %g s.%s\n%s",
            child.number, child.pid, seconds, job, self._max_stall, advice, stacks,
        )  # fmt: skip

    # -- deaths ---------------------------------------------------------------------------------------------------

    def _bury(self, child: ChildProcess, code: int) -> None:
        ours = {"": describe_end(code), "stop": "was ended after its grace"}
        what = f"Worker child {child.number} (pid {child.pid}) {ours.get(child.kill_reason, child.kill_reason)}"
        by_itself = code in {0, RECYCLE} and child.slot.finished  # else a job ended it, with whatever code
        orderly = by_itself or (self._stop_at is not None and code == -signal.SIGTERM)
        crashed = not orderly and child.kill_reason != "stop"
        about, identities = child.slot.about(), child.slot.identities()
        self._guardian.forget(child.slot)
        was_up = child.bury()
        if about is not None and identities:
            # A kill strikes whoever executes something just then; anything else was the doing of what was executed.
            fault = code != -signal.SIGKILL or bool(child.kill_reason)
            child.estate = DeadChild(what, about, identities, crashed, child.slot.running_snapshot(), fault)
            self._guardian.settle(child.estate)
        elif crashed:
            LOG.warning("%s; it had leased nothing", what)
        if code == 0 and by_itself and self._spec.burst:
            child.finished = True
        elif code == RECYCLE and by_itself and self._stop_at is None:
            LOG.info("%s to be replaced by a fresh one", what)
        elif self._stop_at is None and not was_up:
            self._give_up_if_hopeless(child, code)
        if child.succeeded:
            self._children.remove(child)
            self._spare.append(child.slot)
            child.close()

    def _give_up_if_hopeless(self, child: ChildProcess, code: int) -> None:
        if child.failed_starts < FAILED_STARTS or any(other.up for other in self._children):
            return
        why = "importing it failed" if code == IMPORT_FAILED else f"the last one {describe_end(code)}"
        LOG.error(
            "Giving up: %d worker processes for '%s' ended one after another before they were up; %s. The reason is "
            "above. Nothing was leased.", child.failed_starts, self._spec.app, why,
        )  # fmt: skip
        self._exit_code = 1
        self._stop()

    # -- the first and the last words ------------------------------------------------------------------------------

    def _introduce(self, child: ChildProcess) -> None:
        if self._introduced or not child.up or (about := child.slot.about()) is None:
            return
        self._introduced = True
        for line in banner(about, self._spec, self._processes):
            LOG.info("%s", line)

    def _say_goodbye(self) -> None:
        if not self._guardian.close(FAREWELL):
            LOG.warning("Redis does not answer: the last jobs of this worker return when their leases end")
        for child in self._children:
            child.close()
        self._board.close()
        if self._stop_at is not None and not self._exit_code:
            LOG.info("Stopped")


def banner(about: ChildInfo, spec: ChildSpec, processes: int) -> list[str]:
    """Return what a worker says of itself when it is up, at most eight lines."""
    try:
        release = version("conveyor")
    except PackageNotFoundError:
        release = "(not installed)"
    weights = {queue: spec.queues.get(queue, 1.0) for queue in about.queues or spec.queues}
    queues = ", ".join(name if weight == 1 else f"{name} (weight {weight:g})" for name, weight in weights.items())
    names = f": {', '.join(about.names)}" if about.tasks <= len(about.names) else ""
    limits = [f"{spec.max_jobs:,} jobs"] if spec.max_jobs else []
    limits += [megabytes(spec.max_memory)] if spec.max_memory else []
    return [
        f"Conveyor {release} works for {spec.app}" + (" until everything is drained" if spec.burst else ""),
        f"  Redis      {masked(about.url)}, namespace {about.namespace}",
        f"  queues     {queues}",
        f"  tasks      {about.tasks}{names}",
        f"  processes  {processes}, each with {spec.concurrency} jobs at a time and {spec.threads} threads",
        *([f"  replaced   after {' or '.join(limits)}"] if limits else []),
    ]


def _in_job(child: ChildProcess) -> str:
    job = child.slot.job()
    return f" in {job[0]} ({job[1]})" if job is not None else ""
