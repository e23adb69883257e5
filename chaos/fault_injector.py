"""The faults of a run: a schedule drawn from the seed, and the thread that carries it out."""

from __future__ import annotations

import os
import random
import signal
import threading
import time
from collections import Counter
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

from chaos.environment import Environment
from chaos.processes import Program
from chaos.proxy_connections import DIRECTIONS

PAUSE = 0.5
"""Seconds between two faults on average."""
RETRY_FOR = 10.0
"""Seconds a fault waits for somebody it can strike."""
QUEUE = 60.0
"""Seconds a fault of Redis waits for the one before it to be over, and one of a job's process for there to be one."""
NOTICED = 5.0
"""Seconds after which a program takes a reply that does not come for lost: the default of the library."""

_PROCESSES = {
    "kill child": 22, "kill program": 6, "kill supervisor": 3, "kill host": 2, "kill job process": 2, "kill producer": 3,
    "stop child": 6, "stop program": 4, "stop supervisor": 2, "restart worker": 7, "kill clients": 6, "flush scripts": 6,
}  # fmt: skip
_WAY = {
    "cut up": 4, "cut down": 5, "swallow replies": 5, "swallow and hang": 2, "delay up": 2, "delay down": 2,
    "black hole": 1, "black hole up": 1, "black hole down": 1,
}  # fmt: skip
DECKS: dict[str, dict[str, int]] = {
    "standalone": {
        **_PROCESSES, **_WAY, "kill redis": 2, "freeze redis": 2, "pause clients": 2, "squeeze memory": 2, "step clock": 1,
    },
    "cluster": {**_PROCESSES, "pause clients": 3, "move slot": 14, "fail over": 5},
    "sentinel": {**_PROCESSES, "pause clients": 2, "fail over": 5, "kill master": 3, "freeze master": 2},
}  # fmt: skip
"""Topology → how often each kind of fault comes in a deck, of about a minute. So in two minutes none is left out."""


@dataclass(frozen=True)
class Fault:
    """One entry of the schedule."""

    at: float
    kind: str
    draw: float
    """Between 0 and 1: whom it strikes."""
    size: float
    """Between 0 and 1: how hard, or how long."""

    def __str__(self) -> str:
        return f"{self.at:7.2f} s  {self.kind} ({self.draw:.3f}, {self.size:.3f})"


_LATER = object()
"""Return value of a fault that is still under way: a thread of its own counts it."""


class MissedError(Exception):
    """A fault that found no process or connection to strike."""


def schedule(seed: int, seconds: float, *, topology: str = "standalone") -> list[Fault]:
    """Return what happens when; the same for the same seed. Kinds are dealt from decks, shuffled."""
    draw = random.Random(f"nemesis {seed}")
    found: list[Fault] = []
    deck: list[str] = []
    at = 1.0
    while at < seconds:
        if not deck:
            deck = [kind for kind, times in DECKS[topology].items() for _ in range(times)]
            draw.shuffle(deck)
        found.append(Fault(at, deck.pop(), draw.random(), draw.random()))
        at += draw.uniform(0.2, 2 * PAUSE - 0.2)
    return found


class FaultInjector:
    """A thread that carries a schedule out on an environment; faults that last end on another thread."""

    def __init__(self, environment: Environment, faults: list[Fault]) -> None:
        self.environment, self.faults = environment, faults
        self.struck: Counter[str] = Counter()
        """Kind → how often it was carried out to the end."""
        self.missed: Counter[str] = Counter()
        self.reasons: dict[str, str] = {}
        """Kind → why it missed, the last time."""
        self._stopped = threading.Event()
        self._books = threading.Lock()
        self._server = threading.Lock()  # one fault of Redis itself at a time
        self._clock = threading.Lock()  # one step of it at a time
        self._later: list[threading.Thread] = []
        self._thread = threading.Thread(target=self._run, name="fault injector", daemon=True)

    def start(self) -> None:
        """Begin."""
        self._thread.start()

    def finish(self) -> None:
        """Wait for the end of the schedule and of everything that lasts."""
        self._thread.join()
        for thread in self._later:
            thread.join(100)

    def stop(self) -> None:
        """End early."""
        self._stopped.set()
        self.finish()

    def idle(self) -> list[str]:
        """Return the kinds that came more than once, never struck, and could have."""
        planned = Counter(fault.kind for fault in self.faults)
        able = planned.keys() - (set() if self.environment.server.has_clock else {"step clock"})
        return sorted(kind for kind in able if planned[kind] > 1 and not self.struck[kind])

    def _run(self) -> None:
        began = time.monotonic()
        for fault in self.faults:
            if self._stopped.wait(max(0.0, began + fault.at - time.monotonic())):
                return
            self._carry_out(fault.kind, lambda fault=fault: self._act(fault))  # type: ignore[misc]

    def _act(self, fault: Fault) -> Any:
        words = [word for word in fault.kind.split() if word not in DIRECTIONS]
        return getattr(self, "_" + "_".join(words))(fault)

    def _carry_out(self, kind: str, act: Callable[[], Any]) -> None:
        # Whatever it meets: an error here would end the schedule, and nobody would know.
        try:
            if act() is _LATER:
                return
        except Exception as error:
            with self._books:
                self.missed[kind] += 1
                self.reasons[kind] = f"{type(error).__name__}: {error}"[:120]
        else:
            with self._books:
                self.struck[kind] += 1

    def _after(self, act: Callable[[], Any], seconds: float) -> None:
        def wait_and_act() -> None:
            self._stopped.wait(seconds)
            with suppress(ProcessLookupError):
                act()

        self._start(wait_and_act)

    def _start(self, act: Callable[[], Any]) -> None:
        thread = threading.Thread(target=act, daemon=True)
        self._later.append(thread)
        thread.start()

    # -- processes -------------------------------------------------------------------------------------------------

    def _pick(self, fault: Fault, find: Callable[[], list[Any]], retry_for: float = RETRY_FOR) -> Any:
        """Draw one of those there are; one that has just died is back in a moment."""
        found = self.environment.wait(find, retry_for)
        if not found:
            raise MissedError("there was none")
        return found[int(fault.draw * len(found))]

    def _supervisors(self) -> list[Program]:
        return [one for one in self.environment.process_group.workers() if one.supervised and one.children()]

    def _programs(self) -> list[Program]:
        return [one for one in self.environment.process_group.workers() if not one.supervised and one.alive()]

    def _children(self) -> list[int]:
        return [child for one in self._supervisors() for child in one.children()]

    def _job_processes(self) -> list[int]:
        workers = {one.pid for one in self.environment.process_group.workers()} | set(self._children())
        return [pid for one in self.environment.process_group.workers() for pid in one.family() if pid not in workers]

    def _kill(
        self, fault: Fault, pids: list[int], *, struck: list[int] | None = None, supervised: bool = False
    ) -> None:
        self.environment.fault(fault.kind, pids=struck or pids, supervised=supervised)
        for pid in pids:
            os.kill(pid, signal.SIGKILL)

    def _kill_child(self, fault: Fault) -> None:
        self._kill(fault, [self._pick(fault, self._children)], supervised=True)

    def _kill_program(self, fault: Fault) -> None:
        program = self._pick(fault, self._programs)
        self._kill(fault, [program.pid], struck=program.family())

    def _kill_supervisor(self, fault: Fault) -> None:
        program = self._pick(fault, self._supervisors)
        self._kill(fault, [program.pid], struck=program.family())  # its children drain and end by themselves

    def _kill_host(self, fault: Fault) -> None:
        self._kill(fault, self._pick(fault, self._supervisors).family())

    def _kill_job_process(self, fault: Fault) -> object:
        return self._beside(fault, lambda: self._kill(fault, [self._pick(fault, self._job_processes, QUEUE)]))

    def _kill_producer(self, fault: Fault) -> None:
        killable = lambda: [one for one in self.environment.process_group.producers() if one.killable and one.alive()]  # noqa: E731
        self._kill(fault, [self._pick(fault, killable).pid])

    def _stop(self, fault: Fault, pid: int, struck: list[int]) -> None:
        seconds = self.environment.lease * (1.2 + 1.8 * fault.size)
        self.environment.fault(fault.kind, pids=struck, lasting=seconds)
        os.kill(pid, signal.SIGSTOP)
        self._after(lambda: os.kill(pid, signal.SIGCONT), seconds)

    def _stop_child(self, fault: Fault) -> None:
        child = self._pick(fault, self._children)
        self._stop(fault, child, [child])

    def _stop_program(self, fault: Fault) -> None:
        program = self._pick(fault, self._programs)
        self._stop(fault, program.pid, program.family())

    def _stop_supervisor(self, fault: Fault) -> None:
        program = self._pick(fault, self._supervisors)
        self._stop(fault, program.pid, program.family())

    def _restart_worker(self, fault: Fault) -> None:
        program = self._pick(fault, lambda: [*self._supervisors(), *self._programs()])
        self.environment.fault(fault.kind, pids=program.family(), lasting=10)
        program.signal(signal.SIGTERM)

    # -- Redis -----------------------------------------------------------------------------------------------------

    def _hold(self) -> None:
        if not self._server.acquire(timeout=QUEUE):
            raise MissedError("another fault held the server")

    def _command(self, *parts: Any) -> None:
        if self.environment.server.command(*parts) is None:
            raise MissedError("the server did not answer")

    def _apart(self, fault: Fault, act: Callable[[], Any], lasting: float) -> object:
        """Do what takes its time, and nobody else may do to the server meanwhile, beside the schedule."""

        def alone() -> None:
            self._hold()
            try:
                self.environment.fault(fault.kind, lasting=lasting)
                act()
            finally:
                self._server.release()

        return self._beside(fault, alone)

    def _beside(self, fault: Fault, act: Callable[[], Any]) -> object:
        """Let the schedule go on; what comes of *act* is known when it is over."""
        self._start(lambda: self._carry_out(fault.kind, act))
        return _LATER

    def _lasting(
        self, fault: Fault, begin: Callable[[], Any], end: Callable[[], Any], seconds: float, after: float
    ) -> None:
        """Begin what holds the server for some time, and end it then; *after* that it may still be felt."""
        self._hold()
        self.environment.fault(fault.kind, lasting=seconds + after)

        def over() -> None:
            end()
            self._server.release()

        try:
            begin()
        finally:
            self._after(over, seconds)

    def _kill_redis(self, fault: Fault) -> object:
        return self._apart(fault, lambda: self.environment.server.restart(fault.size), 2 + fault.size)

    def _freeze_redis(self, fault: Fault) -> None:
        server, lease = self.environment.server, self.environment.lease
        self._lasting(fault, server.freeze, server.thaw, lease * (0.5 + 2.5 * fault.size), lease)

    def _pause_clients(self, fault: Fault) -> None:
        seconds = self.environment.lease * (0.3 + 1.2 * fault.size)
        self._lasting(
            fault,
            lambda: self._command("CLIENT", "PAUSE", int(seconds * 1000), "ALL"),
            lambda: None,
            seconds,
            self.environment.lease,
        )

    def _kill_clients(self, fault: Fault) -> None:
        self.environment.fault(fault.kind)
        self._command("CLIENT", "KILL", "TYPE", "normal")

    def _flush_scripts(self, fault: Fault) -> None:
        self.environment.fault(fault.kind)
        self._command("SCRIPT", "FLUSH")

    def _squeeze_memory(self, fault: Fault) -> None:
        server = self.environment.server
        self._lasting(fault, lambda: server.squeeze(0.9), lambda: server.squeeze(0), 1 + 3 * fault.size, 0)

    def _step_clock(self, fault: Fault) -> None:
        server = self.environment.server
        if not server.has_clock:
            raise MissedError("libfaketime is not installed")
        if not self._clock.acquire(blocking=False):  # from an hour behind to an hour ahead is more than is promised
            raise MissedError("the clock was off already")
        hours = 3600 if fault.draw < 0.5 else -3600
        self.environment.fault(fault.kind, lasting=5, by=hours)
        server.set_clock(hours)

        def right() -> None:
            server.set_clock(0)
            self._clock.release()

        self._after(right, 2 + 3 * fault.size)

    # -- more than one server --------------------------------------------------------------------------------------

    def _move_slot(self, fault: Fault) -> object:
        server = self.environment.server
        return self._apart(fault, lambda: server.move(fault.draw, whole=fault.size < 0.5), 2)

    def _fail_over(self, fault: Fault) -> object:
        return self._apart(fault, lambda: self.environment.server.fail_over(fault.draw), 3)

    def _kill_master(self, fault: Fault) -> object:
        return self._apart(fault, self.environment.server.kill_master, 5)

    def _freeze_master(self, fault: Fault) -> object:
        return self._apart(fault, self.environment.server.freeze_master, 5)

    # -- the way between -------------------------------------------------------------------------------------------

    @staticmethod
    def _ways(fault: Fault) -> tuple[str, ...]:
        last = fault.kind.split()[-1]
        return (last,) if last in DIRECTIONS else DIRECTIONS

    def _cut(self, fault: Fault) -> None:
        count = 1 + int(10 * fault.size)
        self.environment.fault(fault.kind, connections=count)
        seed = int(fault.draw * 1e9)
        self.environment.proxy.cut_randomly(mean=2000, times=count, seed=seed, directions=self._ways(fault))

    def _swallow_replies(self, fault: Fault, *, hang: bool = False) -> None:
        self.environment.fault(fault.kind, lasting=NOTICED if hang else 0.0)
        for n in range(1, 2 + int(5 * fault.size)):
            self.environment.proxy.swallow_reply(3 * n, "EVALSHA", hang=hang)

    def _swallow_and_hang(self, fault: Fault) -> None:
        self._swallow_replies(fault, hang=True)

    def _delay(self, fault: Fault) -> None:
        seconds, ways = 1 + 4 * fault.size, self._ways(fault)
        self.environment.fault(fault.kind, lasting=seconds)
        self.environment.proxy.delay(0.2, 0.15, ways)
        self._after(lambda: self.environment.proxy.delay(0, 0, ways), seconds)

    def _black_hole(self, fault: Fault) -> None:
        seconds = self.environment.lease * (0.5 + 2 * fault.size)
        self.environment.fault(fault.kind, lasting=seconds + self.environment.lease)
        self.environment.proxy.black_hole(self._ways(fault))
        self._after(self.environment.proxy.heal, seconds)
