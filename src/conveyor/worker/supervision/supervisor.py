"""
The supervisor keeps N children running, and does for them what a process cannot do for itself.

It never imports the app, so no code of the user can block or break it. It starts children and restarts dead ones. All
that Redis must be sent (leases renewed for a child that cannot, returned for one that is dead) goes through `LeaseGuard`.
"""

from __future__ import annotations

import os
import select
import signal
import socket
import sys
from collections import deque
from pathlib import Path
from time import monotonic
from types import FrameType
from typing import TYPE_CHECKING, Any

import msgspec

from conveyor.store.transport.credentials import LoginProvider
from conveyor.store.transport.url import masked
from conveyor.units import installed_version, quantity, span
from conveyor.worker.leasing.heartbeat import MAX_STALL
from conveyor.worker.logs import LOG, configure_log, describe_end
from conveyor.worker.recycling import megabytes
from conveyor.worker.shared_memory import ChildInfo, ChildSpec, SharedMemory
from conveyor.worker.shutdown import RECYCLE, STOPPED
from conveyor.worker.supervision.autoscale import Bounds, OldestJob, next_count
from conveyor.worker.supervision.child_main import IMPORT_FAILED, MARGIN
from conveyor.worker.supervision.child_process import NO_STACK, STALLED, ChildProcess
from conveyor.worker.supervision.health import ChildFacts, HealthServer, Report, WorkerFacts, age
from conveyor.worker.supervision.lease_guard import DeadChild, LeaseGuard
from conveyor.worker.supervision.reload import SourceWatcher
from conveyor.worker.supervision.systemd import ServiceManager

if TYPE_CHECKING:
    from collections.abc import Mapping

    from conveyor.store.keys import QueueKeys

FAILED_STARTS = 5
"""Starts that fail one after another before the supervisor gives up."""
RELOAD_GRACE = 2.0
"""Seconds that running jobs get at a reload."""
CLOSE_PATIENCE = 2.0
"""Seconds that a supervisor without children waits until Redis has their last leases back."""
_CHECK_EVERY, _CHECK_EVERY_QUICK = 0.25, 0.05


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
    health: socket.socket | None = None,
    reports: Mapping[str, Report] | None = None,
    labels: tuple[str, ...] = (),
    autoscale: Bounds | None = None,
    reload: tuple[Path, ...] = (),
    login: LoginProvider | None = None,
) -> int:
    """
    Run worker processes for ``module:attribute`` until a signal (with *burst* until all is drained); return the exit code.

    *health*: a bound socket for the health endpoints, *reports*: what answers further paths of theirs. *autoscale*: the least and
    the most processes, instead of *processes*. *reload*: folders whose source files are watched: a change replaces the processes.
    *login*: that of the app, asked at each connection.
    """
    configure_log(verbose=verbose)
    spec = ChildSpec(
        app_reference, queues, concurrency, threads, burst=burst, grace=grace, verbose=verbose, path=tuple(sys.path),
        max_jobs=max_jobs, max_memory=max_memory, labels=labels,
    )  # fmt: skip
    supervisor = Supervisor(spec, processes=processes, python=python, autoscale=autoscale, reload=reload, login=login)
    if health is not None:
        LOG.info("  health     %s", HealthServer(health, supervisor.facts, reports or {}).address)
    return supervisor.run()


class Supervisor:
    """The children of one command and the guard of their leases. `run` must be called in the main thread: it handles signals."""

    def __init__(
        self,
        spec: ChildSpec,
        *,
        processes: int,
        python: str = sys.executable,
        child_module: str = "conveyor.worker.supervision.child_main",
        max_stall: float = MAX_STALL,
        autoscale: Bounds | None = None,
        reload: tuple[Path, ...] = (),
        login: LoginProvider | None = None,
    ) -> None:
        """
        Args:
            spec: what each child is to run.
            processes: how many children.
            python: the interpreter.
            child_module: the module that each child executes.
            max_stall: seconds that a child may block its event loop before it is killed.
            autoscale: the least and the most children, instead of *processes*.
            reload: folders whose source files are watched; a change replaces the children.
            login: asked for user and password at each connection; None: the URL has them.
        """
        self._sources = SourceWatcher(reload) if reload else None
        processes, most = (processes, processes) if autoscale is None else (autoscale.lower, autoscale.upper)
        self._bounds, self._scaled_at = autoscale, 0.0
        self._oldest: OldestJob | None = None
        self._spec = spec
        self._command = [python, "-m", child_module, spec.app]
        self._max_stall = max_stall
        self._processes = processes
        self._memory = SharedMemory(2 * most)
        slots = [self._memory.slot(number) for number in range(2 * most)]
        self._children = [ChildProcess(number + 1, slots[number]) for number in range(processes)]
        self._spare = slots[processes:]  # for successors, while the children that they replace drain
        self._login = login
        self._lease_guard = LeaseGuard(login)
        self._alive_pipe = os.pipe()  # children read it: it ends with this process, however that dies
        self._signals: deque[int] = deque()
        self._stop_signals = 0
        self._stop_at: float | None = None
        self._exit_code = 0
        self._banner_printed = False
        self._reloads = False  # until a process with the changed code has imported it
        self._checked_at = self._resumed_at = monotonic()
        self._begun: set[int] = set()  # numbers of the children that were started once

    def run(self) -> int:
        """Start the children and watch them; return the exit code when all have ended."""
        waker, wakes = socket.socketpair()
        waker.setblocking(False)
        wakes.setblocking(False)
        before = self._take_over_signals(waker.fileno())
        manager = ServiceManager.of_environment(self._spec.grace + 2 * MARGIN)
        try:
            while not self._all_ended():
                self._check_children()
                if manager is not None:
                    manager.update(self.facts())
                select.select([wakes], [], [], self._pause())
                try:
                    wakes.recv(4096)
                except BlockingIOError:
                    pass
            self._close()
            return self._exit_code
        finally:
            signal.set_wakeup_fd(-1)
            for number, handler in before.items():
                signal.signal(number, handler)
            waker.close()
            wakes.close()
            if manager is not None:
                manager.close()
            for descriptor in self._alive_pipe:
                os.close(descriptor)

    def facts(self) -> WorkerFacts:
        """Return what is known of the worker now; any thread may ask."""
        state = "stopping" if self._stop_at is not None else "quiet" if self._spec.quiet else "running"
        children = [one for one in list(self._children) if one.is_up]
        return WorkerFacts(
            self._spec.app,
            installed_version(),
            state,
            monotonic() - self._checked_at,
            [_facts_of(one) for one in children],
        )

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

    def _handle_signals(self) -> None:
        while self._signals:
            number = self._signals.popleft()
            if number in {signal.SIGTERM, signal.SIGINT, signal.SIGHUP}:
                self._stop()
            elif number == signal.SIGUSR1:
                LOG.info("Quiet: running jobs continue, and no new ones are leased")
                self._spec = msgspec.structs.replace(self._spec, quiet=True)
            elif number == signal.SIGUSR2:
                for child in self._children:
                    child.ask_stacks("person")

    def _stop(self) -> None:
        """Drain at the first signal, hand running jobs back at the second, kill at the third."""
        self._stop_signals += 1
        end = monotonic() + {1: self._spec.grace + MARGIN, 2: MARGIN}.get(self._stop_signals, 0.0)
        self._stop_at = end if self._stop_at is None else min(self._stop_at, end)
        if self._stop_signals == 1:
            LOG.info("Stopping: running jobs have %g s to finish; press ctrl-C again to stop now", self._spec.grace)
        elif self._stop_signals == 2:
            LOG.info("Stopping now: running jobs are handed back; a third signal kills their processes")
        self._signal_children(signal.SIGTERM if self._stop_signals == 1 else signal.SIGINT)

    def _signal_children(self, number: int) -> None:
        for child in self._children:
            child.signal(number)

    # -- children ------------------------------------------------------------------------------------------------

    def _all_ended(self) -> bool:
        if any(child.has_process for child in self._children):
            return False
        return self._stop_at is not None or all(child.finished for child in self._children)

    def _pause(self) -> float:
        calm = all((child.is_up and child.stalled_since is None) or child.finished for child in self._children)
        return _CHECK_EVERY if calm and self._stop_at is None and self._banner_printed else _CHECK_EVERY_QUICK

    def _check_children(self) -> None:
        now = monotonic()
        if now - self._checked_at > STALLED:
            # This process was frozen, and so perhaps were they: no job is to blame for that time.
            self._resumed_at = now
        self._checked_at = now
        self._handle_signals()
        if self._bounds is not None and self._stop_at is None:
            self._scale(self._bounds, now)
        if self._sources is not None and self._stop_at is None and (changed := self._sources.changed()):
            self._reload(changed, now)
        for child in list(self._children):
            if child.has_process:
                code = child.exit_code()
                self._print_banner(child)  # a short burst may be over by now
                if code is not None:
                    self._on_exit(child, code)
                else:
                    self._watch(child, now)
            if child.is_due(now) and not child.leaving_since and self._stop_at is None and self._may_restart(child):
                self._start(child)

    def _reload(self, changed: list[str], now: float) -> None:
        """Replace all children: their code has changed. Running jobs get a moment, and are handed back then."""
        more = f" and {len(changed) - 1} more" if len(changed) > 1 else ""
        LOG.info("Reload: %s%s changed", os.path.relpath(changed[0]), more)
        self._reloads = self._banner_printed
        for child in self._children:
            child.release()
            if child.has_process:
                child.reloading_since = now
                child.signal(signal.SIGTERM)

    def _scale(self, bounds: Bounds, now: float) -> None:
        """Change the number of children by the age of the oldest job, and end those that are not needed and hold nothing."""
        staying = [one for one in self._children if not one.leaving_since and not one.has_successor]
        for child in list(self._children):
            if child.leaving_since and not child.has_process:
                self._drop(child)
            elif 0.0 < child.leaving_since < child.slot.last_tick - STALLED and child.slot.held == 0:
                child.signal(signal.SIGTERM)
        if self._oldest is None:
            if (info := next((info for one in staying if (info := one.slot.info()) is not None), None)) is None:
                return
            self._oldest = OldestJob(info, self._served_queues, self._login)
            self._scaled_at = now
        oldest = self._oldest
        wanted = next_count(bounds, len(staying), oldest.age, oldest.read_at - oldest.calm_since, now - self._scaled_at)
        if wanted == len(staying):
            return
        self._scaled_at = now
        LOG.info("Autoscale: %d processes, %s", wanted, _age_text(oldest.age))
        numbers = {child.number for child in self._children}
        for number in (one for one in range(1, 2 * bounds.upper + 1) if one not in numbers):
            if len(staying) >= wanted or not self._spare:
                break
            staying.append(ChildProcess(number, self._spare.pop()))
            self._children.append(staying[-1])
        # Those that hold the fewest jobs leave first.
        for child in sorted(staying, key=lambda one: (one.is_up, one.slot.held))[: len(staying) - wanted]:
            child.leaving_since = now

    def _served_queues(self) -> list[QueueKeys]:
        """Return the keys of the queues and partitions that the children serve; any thread may ask."""
        served = (one for child in list(self._children) for one in child.slot.identities() if one.current)
        return list({one.keys.prefix: one.keys for one in served}.values())

    def _start(self, child: ChildProcess) -> None:
        descriptors = (self._memory.fd, self._alive_pipe[0])
        slot_place = f"{child.slot.number}/{self._memory.slots}"
        try:
            # A child that is started again may run older code than the last deployment, and changes no schedule.
            spec = msgspec.structs.replace(self._spec, declares=child.number not in self._begun)
            self._begun.add(child.number)
            child.start(spec, [*self._command, slot_place, *map(str, descriptors)], descriptors)
        except OSError as error:
            LOG.error("Cannot start worker child %d, trying again: %s", child.number, error)
            child.note_exit()
            return
        self._lease_guard.watch(child.slot)
        LOG.debug("Started worker child %d (pid %d)", child.number, child.pid)

    def _start_successor(self, child: ChildProcess) -> None:
        """Start a successor beside a child that takes no more work. In a burst it starts after the child's end."""
        if self._spare and not self._spec.burst:
            child.has_successor = True
            successor = ChildProcess(child.number, self._spare.pop())
            self._children.append(successor)
            self._start(successor)

    def _may_restart(self, child: ChildProcess) -> bool:
        # A burst ends when nothing is left: its last child must not look before the jobs of a dead one are back.
        return not self._spec.burst or child.dead_child is None or child.dead_child.all_returned.is_set()

    def _watch(self, child: ChildProcess, now: float) -> None:
        stacks = child.stacks_ready("person", now)
        if stacks is not None:
            print(f"worker child {child.number} (pid {child.pid}):\n{stacks}", file=sys.stderr, flush=True)
        if self._stop_at is not None and now >= self._stop_at:
            child.kill("stop")
            return
        if child.reloading_since and now - child.reloading_since > RELOAD_GRACE:
            child.reloading_since = now
            child.signal(signal.SIGINT)
        if not child.is_up:
            return
        if (self._spec.quiet or child.leaving_since) and not child.quiet:
            child.quiet = True
            child.signal(signal.SIGUSR1)
        if child.slot.retiring and not child.has_successor and not child.leaving_since and self._stop_at is None:
            self._start_successor(child)
        since = max(child.slot.last_tick, self._resumed_at)
        if now - since < STALLED:
            if child.stalled_since is not None:
                stood = child.slot.last_tick - child.stalled_since
                LOG.info("Worker child %d (pid %d) runs again after %.1f s", child.number, child.pid, stood)
                child.stalled_since = None
        elif child.stalled_since is None:
            child.stalled_since = since
            child.ask_stacks("stall")
        stacks = child.stacks_ready("stall", now)
        if stacks is not None:
            self._log_stall(child, now - (child.stalled_since or since), stacks)
        if now - since > self._max_stall:
            child.kill(f"was killed after blocking its event loop for {now - since:.0f} s{_in_job(child)}")

    def _log_stall(self, child: ChildProcess, seconds: float, stacks: str) -> None:
        if stacks == NO_STACK:
            LOG.warning(
                "Worker child %d (pid %d) has not run for %.1f s: is it stopped? Its leases are kept; the process is killed "
                "if this lasts %g s.",
                child.number, child.pid, seconds, self._max_stall,
            )  # fmt: skip
            return
        job = _in_job(child)
        advice = " Make the task a plain def, so that it runs in a thread." if job else ""
        LOG.warning(
            "E11 Worker child %d (pid %d) has blocked its event loop for %.1f s%s. Its leases are kept; the process is "
            "killed if this lasts %g s.%s\n%s",
            child.number, child.pid, seconds, job, self._max_stall, advice, stacks,
        )  # fmt: skip

    # -- deaths ---------------------------------------------------------------------------------------------------

    def _on_exit(self, child: ChildProcess, code: int) -> None:
        reloading = child.reloading_since > 0
        reasons = {"": describe_end(code), "stop": "was ended after its grace"}
        ended = reasons.get(child.kill_reason, child.kill_reason)
        event, cause = f"Worker child {child.number} (pid {child.pid}) {ended}", f"its worker {ended}"
        by_itself = code in {0, RECYCLE, STOPPED} and child.slot.finished  # otherwise a job ended it, with any code
        orderly = by_itself or (
            (self._stop_at is not None or child.leaving_since > 0 or reloading) and code == -signal.SIGTERM
        )
        crashed = not orderly and child.kill_reason != "stop"
        info, identities = child.slot.info(), child.slot.identities()
        self._lease_guard.forget(child.slot)
        was_up = child.note_exit()
        if info is not None and identities:
            # A kill hits any job that executes something just then; any other end was caused by what was executed.
            fault = code != -signal.SIGKILL or bool(child.kill_reason)
            child.dead_child = DeadChild(event, info, identities, crashed, child.slot.running_snapshot(), fault, cause)
            self._lease_guard.return_jobs(child.dead_child)
        elif crashed:
            LOG.warning("%s; it had leased nothing", event)
        if code == 0 and by_itself and self._spec.burst:
            child.finished = True
        elif code == STOPPED and by_itself:
            child.finished = True
            LOG.info("%s by a command, and is not started again", event.replace(ended, "was stopped"))
        elif code == RECYCLE and by_itself and self._stop_at is None:
            LOG.info("%s to be replaced by a fresh one", event)
        elif self._stop_at is None and not was_up and self._sources is not None:
            if not reloading:
                child.hold()
                LOG.info("Reload: the next change of a source file starts it again")
        elif self._stop_at is None and not was_up:
            self._give_up_if_none_starts(child, code)
        if child.has_successor or child.leaving_since:
            self._drop(child)

    def _drop(self, child: ChildProcess) -> None:
        self._children.remove(child)
        self._spare.append(child.slot)
        child.close()

    def _give_up_if_none_starts(self, child: ChildProcess, code: int) -> None:
        if child.failed_starts < FAILED_STARTS or any(other.is_up for other in self._children):
            return
        why = "importing it failed" if code == IMPORT_FAILED else f"the last one {describe_end(code)}"
        LOG.error(
            "Giving up: %d worker processes for '%s' ended one after another before they were up; %s. The reason is "
            "above. Nothing was leased.", child.failed_starts, self._spec.app, why,
        )  # fmt: skip
        self._exit_code = 1
        self._stop()

    # -- the first and the last lines of the log -------------------------------------------------------------------

    def _print_banner(self, child: ChildProcess) -> None:
        due = self._reloads and not child.reloading_since if self._banner_printed else True
        if not due or (info := child.slot.info()) is None:  # before the first job, where it can be
            return
        if self._banner_printed:
            self._reloads = False
            LOG.info("Reload: done, %s%s", quantity(info.tasks, "task"), _task_names(info))
            return
        self._banner_printed = True
        for line in banner(info, self._spec, self._processes, self._bounds):
            LOG.info("%s", line)

    def _close(self) -> None:
        if self._oldest is not None:
            self._oldest.close()
        if not self._lease_guard.close(CLOSE_PATIENCE):
            LOG.warning("Redis does not answer: the last jobs of this worker come back when their leases end")
        for child in self._children:
            child.close()
        self._memory.close()
        if self._stop_at is not None and not self._exit_code:
            LOG.info("Stopped")


def _task_names(info: ChildInfo) -> str:
    return f": {', '.join(info.names)}" if info.tasks <= len(info.names) else ""


def banner(info: ChildInfo, spec: ChildSpec, processes: int, bounds: Bounds | None = None) -> list[str]:
    """Return the lines that a worker logs when its app is imported, at most eight."""
    weights = {queue: spec.queues.get(queue, 1.0) for queue in info.queues or spec.queues}
    queues = ", ".join(name if weight == 1 else f"{name} (weight {weight:g})" for name, weight in weights.items())
    number = str(processes) if bounds is None else f"{bounds.lower} to {bounds.upper}, by the age of the oldest job"
    limits = [f"{spec.max_jobs:,} jobs"] if spec.max_jobs else []
    limits += [megabytes(spec.max_memory)] if spec.max_memory else []
    return [
        f"Conveyor {installed_version()} works for {spec.app}" + (" until everything is drained" if spec.burst else ""),
        f"  Redis      {masked(info.url)}, namespace {info.namespace}",
        f"  queues     {queues}",
        f"  tasks      {info.tasks}{_task_names(info)}",
        f"  processes  {number}, each with {quantity(spec.concurrency, 'job')} at a time and {quantity(spec.threads, 'thread')}",
        *([f"  labels     {', '.join(spec.labels)}"] if spec.labels else []),
        *([f"  replaced   after {' or '.join(limits)}"] if limits else []),
    ]


def _age_text(age: float | None) -> str:
    return "no job waits" if age is None else f"the oldest job has waited for {span(age)}"


def _facts_of(child: ChildProcess) -> ChildFacts:
    slot = child.slot
    leases = [one for one in slot.identities() if one.current]
    lease = min((one.lease_ms for one in leases), default=0) / 1000
    turned = min((one.renewed for one in leases), default=0.0)
    takes = not (slot.retiring or slot.quiet)
    return ChildFacts(child.number, child.pid, age(slot.last_tick), age(turned), lease, takes, slot.job())


def _in_job(child: ChildProcess) -> str:
    job = child.slot.job()
    return f" in {job[0]} ({job[1]})" if job is not None else ""
