"""What goes wrong in a run: a schedule drawn from the seed, and the hand that carries it out."""

from __future__ import annotations

import os
import random
import signal
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

from chaos.crew import Program
from chaos.stage import Stage

PAUSE = 0.5
"""Seconds between two faults on average."""

WEIGHTS = {
    "kill worker": 40, "stop worker": 10, "restart worker": 8, "kill redis": 2, "kill clients": 8, "flush scripts": 8,
    "squeeze memory": 2, "freeze redis": 1.5, "pause clients": 2, "cut": 10, "swallow replies": 8, "delay": 3, "black hole": 2,
    "step clock": 1,
}  # fmt: skip
_WORKERS = {"kill worker": 40, "stop worker": 10, "restart worker": 8, "kill clients": 8, "flush scripts": 8}
ELSEWHERE = {
    "cluster": {**_WORKERS, "move slot": 10, "fail over": 3},
    "sentinel": {**_WORKERS, "fail over": 4, "kill master": 2},
}
"""What happens where Redis is more than one server."""


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


def schedule(seed: int, seconds: float, *, topology: str = "standalone") -> list[Fault]:
    """Return what happens when; the same for the same seed."""
    draw = random.Random(f"nemesis {seed}")
    table = ELSEWHERE.get(topology, WEIGHTS)
    kinds, weights = list(table), list(table.values())
    found: list[Fault] = []
    at = 1.0
    while at < seconds:
        found.append(Fault(at, draw.choices(kinds, weights)[0], draw.random(), draw.random()))
        at += draw.uniform(0.2, 2 * PAUSE - 0.2)
    return found


class Nemesis:
    """Carries a schedule out on a stage, on a thread of its own; what lasts ends on another."""

    def __init__(self, stage: Stage, faults: list[Fault]) -> None:
        """Take the stage and the schedule; a server whose clock cannot be set skips those steps visibly."""
        self.stage, self.faults = stage, faults
        self.skipped: list[str] = []
        self._stopped = threading.Event()
        self._server = threading.Lock()  # one fault of Redis itself at a time
        self._later: list[threading.Thread] = []
        self._thread = threading.Thread(target=self._run, name="nemesis", daemon=True)

    def start(self) -> None:
        """Begin."""
        self._thread.start()

    def finish(self) -> None:
        """Wait for the end of the schedule and of everything that lasts."""
        self._thread.join()
        for thread in self._later:
            thread.join(60)

    def stop(self) -> None:
        """End early."""
        self._stopped.set()
        self.finish()

    def _run(self) -> None:
        began = time.monotonic()
        for fault in self.faults:
            if self._stopped.wait(max(0.0, began + fault.at - time.monotonic())):
                return
            act = getattr(self, "_" + fault.kind.replace(" ", "_"))
            with suppress(ProcessLookupError):
                act(fault)

    def _after(self, act: Callable[[], Any], seconds: float) -> None:
        def wait_and_act() -> None:
            self._stopped.wait(seconds)
            with suppress(ProcessLookupError):
                act()

        thread = threading.Thread(target=wait_and_act, daemon=True)
        self._later.append(thread)
        thread.start()

    # -- workers ---------------------------------------------------------------------------------------------------

    def _worker(self, fault: Fault) -> Program:
        workers = self.stage.crew.workers()
        return workers[int(fault.draw * len(workers))]

    def _victim(self, fault: Fault) -> tuple[int, list[int], bool]:
        """Return whom to strike, who suffers from it, and whether a supervisor sees it: mostly children, sometimes all."""
        program = self._worker(fault)
        children = program.children() if program.supervised else []
        if not children or fault.draw * 7 % 1 < 0.15:
            return program.pid, program.family(), False
        child = children[int(fault.draw * 31) % len(children)]
        return child, [child], True

    def _kill_worker(self, fault: Fault) -> None:
        pid, struck, supervised = self._victim(fault)
        orphans = not supervised and len(struck) > 1  # children of a killed supervisor drain and end by themselves
        self.stage.fault("kill supervisor" if orphans else "kill worker", pids=struck, supervised=supervised)
        os.kill(pid, signal.SIGKILL)

    def _stop_worker(self, fault: Fault) -> None:
        pid, struck, _ = self._victim(fault)
        seconds = self.stage.lease * (1.2 + 1.8 * fault.size)
        self.stage.fault("stop worker", pids=struck, lasting=seconds)
        os.kill(pid, signal.SIGSTOP)
        self._after(lambda: os.kill(pid, signal.SIGCONT), seconds)

    def _restart_worker(self, fault: Fault) -> None:
        program = self._worker(fault)
        self.stage.fault("restart worker", pids=program.family(), lasting=10)
        program.signal(signal.SIGTERM)

    # -- Redis -----------------------------------------------------------------------------------------------------

    def _kill_redis(self, fault: Fault) -> None:
        if self._server.acquire(timeout=5):
            self.stage.fault("kill redis", lasting=2 + fault.size)
            self.stage.ground.restart(fault.size)
            self._server.release()

    def _freeze_redis(self, fault: Fault) -> None:
        if not self._server.acquire(timeout=5):
            return
        seconds = self.stage.lease * (0.5 + 2.5 * fault.size)
        self.stage.fault("freeze redis", lasting=seconds + self.stage.lease)
        self.stage.ground.freeze()

        def thaw() -> None:
            self.stage.ground.thaw()
            self._server.release()

        self._after(thaw, seconds)

    def _pause_clients(self, fault: Fault) -> None:
        seconds = self.stage.lease * (0.3 + 1.2 * fault.size)
        self.stage.fault("pause clients", lasting=seconds)
        self.stage.ground.command("CLIENT", "PAUSE", int(seconds * 1000), "ALL")

    def _kill_clients(self, fault: Fault) -> None:
        self.stage.fault("kill clients")
        self.stage.ground.command("CLIENT", "KILL", "TYPE", "normal")

    def _flush_scripts(self, fault: Fault) -> None:
        self.stage.fault("flush scripts")
        self.stage.ground.command("SCRIPT", "FLUSH")

    def _squeeze_memory(self, fault: Fault) -> None:
        if not self._server.acquire(timeout=5):
            return
        seconds = 1 + 3 * fault.size
        self.stage.fault("squeeze memory", lasting=seconds)
        with suppress(Exception):
            self.stage.ground.squeeze(0.9)

        def lift() -> None:
            self.stage.ground.squeeze(0)
            self._server.release()

        self._after(lift, seconds)

    def _step_clock(self, fault: Fault) -> None:
        if not self.stage.ground.has_clock:
            self.skipped.append("step clock: libfaketime is not installed")
            return
        hours = 3600 if fault.draw < 0.5 else -3600
        self.stage.fault("clock stepped", lasting=5, by=hours)
        self.stage.ground.set_clock(hours)
        self._after(lambda: self.stage.ground.set_clock(0), 2 + 3 * fault.size)

    # -- more than one server --------------------------------------------------------------------------------------

    def _move_slot(self, fault: Fault) -> None:
        self.stage.fault("move slot", lasting=2)
        self.stage.ground.move(whole=fault.draw < 0.5)

    def _fail_over(self, fault: Fault) -> None:
        self.stage.fault("fail over", lasting=3)
        self.stage.ground.fail_over()

    def _kill_master(self, fault: Fault) -> None:
        self.stage.fault("kill master", lasting=5)
        self.stage.ground.kill_master()

    # -- the way between -------------------------------------------------------------------------------------------

    def _cut(self, fault: Fault) -> None:
        count = 1 + int(20 * fault.size)
        self.stage.fault("cut", connections=count)
        self.stage.proxy.cut_randomly(mean=2000, times=count, seed=int(fault.draw * 1e9))

    def _swallow_replies(self, fault: Fault) -> None:
        self.stage.fault("swallow replies")
        for n in range(1, 2 + int(5 * fault.size)):
            self.stage.proxy.swallow_reply(3 * n, "EVALSHA", hang=fault.draw < 0.2)

    def _delay(self, fault: Fault) -> None:
        seconds = 1 + 4 * fault.size
        self.stage.fault("delay", lasting=seconds)
        self.stage.proxy.delay(0.2, 0.15)
        self._after(lambda: self.stage.proxy.delay(0), seconds)

    def _black_hole(self, fault: Fault) -> None:
        seconds = self.stage.lease * (0.5 + 2 * fault.size)
        self.stage.fault("black hole", lasting=seconds + self.stage.lease)
        which = (("up",), ("down",), ("up", "down"))[int(fault.draw * 3)]
        self.stage.proxy.black_hole(which)
        self._after(self.stage.proxy.heal, seconds)
