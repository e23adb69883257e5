"""One child process on the side of its supervisor: start, signals, stacks, kill, and restart."""

from __future__ import annotations

import fcntl
import os
import random
import signal
import subprocess
from time import monotonic

import msgspec

from conveyor.worker.shared_memory import ChildSlot, ChildSpec, anonymous_file
from conveyor.worker.supervision.lease_guard import DeadChild

QUICK_DEATH = 1.0
"""Seconds: a child that dies sooner is started again only after a pause, which doubles each time."""
STALLED = 1.0
"""Seconds without a turn of the event loop after which a child counts as stalled."""
STACK_TIME = 0.2
"""Seconds that a child has to write its stacks."""
NO_STACK = "(no stack: the process does not run; is it stopped?)"
_LONGEST_PAUSE = 5.0
_LONGEST_PAUSE_UP = 1.0  # it came up, so a job killed it, and that ends by max_crashes


class ChildProcess:
    """The process of one slot of the shared memory, and those that are started after it."""

    def __init__(self, number: int, slot: ChildSlot) -> None:
        """
        Args:
            number: its number in the log, from 1.
            slot: its slot.
        """
        self.number = number
        self.slot = slot
        self.finished = False  # it has drained its queues, and is not started again
        self.dead_child: DeadChild | None = None  # of the last process, when it had leases
        self.kill_reason = ""
        self.quiet = False  # it was told to lease nothing more
        self.has_successor = False  # it drains, and another process already works in its place
        self.leaving_since = 0.0  # it is not needed any more: it takes nothing, and ends when it holds nothing
        self.reloading_since = 0.0  # it ends, and is started again with changed code
        self.failed_starts = 0
        self.stalled_since: float | None = None
        self._await_until = 0.0
        self._quick_deaths = 0
        self._start_at = 0.0
        self._started = 0.0
        self._process: subprocess.Popen[bytes] | None = None
        self._stacks = anonymous_file("conveyor-stacks", 0)
        fcntl.fcntl(self._stacks, fcntl.F_SETFL, fcntl.fcntl(self._stacks, fcntl.F_GETFL) | os.O_APPEND)
        self._stacks_due_at: dict[str, float] = {}

    @property
    def has_process(self) -> bool:
        """Whether there is a process: running, or dead and not yet noticed by `exit_code`."""
        return self._process is not None

    @property
    def is_up(self) -> bool:
        """Whether it has come up: it handles signals, and its loop turns."""
        return self._process is not None and self.slot.last_tick > 0

    @property
    def pid(self) -> int:
        """The id of the process; 0 without one."""
        return self._process.pid if self._process is not None else 0

    def start(self, spec: ChildSpec, command: list[str], descriptors: tuple[int, ...]) -> None:
        """Start a process with *command*, to which the number of the slot and the descriptors were added."""
        self._await_until = max(self._await_until, self.slot.await_until)
        self.slot.prepare(msgspec.structs.replace(spec, await_until=self._await_until))
        self.kill_reason, self.stalled_since, self.dead_child, self.reloading_since = "", None, None, 0.0
        self._stacks_due_at.clear()
        self.quiet = spec.quiet
        self._started = monotonic()
        self._process = subprocess.Popen(  # noqa: S603  our own interpreter
            [*command, str(self._stacks)],
            stdin=subprocess.DEVNULL,
            pass_fds=(*descriptors, self._stacks),
            process_group=0,  # ctrl-c at a terminal reaches the supervisor alone, which passes it on
        )

    def hold(self) -> None:
        """Do not start again before `release`: its code has to be changed first."""
        self._start_at = float("inf")

    def release(self) -> None:
        """Start at once, with what has been changed."""
        self._start_at, self.failed_starts, self._quick_deaths = 0.0, 0, 0

    def is_due(self, now: float) -> bool:
        """Tell whether a (new) process may start."""
        return self._process is None and not self.finished and now >= self._start_at

    def exit_code(self) -> int | None:
        """Return the exit code, or minus the number of a signal; None while the process runs."""
        assert self._process is not None
        return self._process.poll()

    def note_exit(self) -> bool:
        """Note that the process is dead, and when the next one may start; return whether this one had come up."""
        was_up, lived = self.is_up, monotonic() - self._started
        self._process = None
        self.failed_starts = 0 if was_up else self.failed_starts + 1
        self._quick_deaths = self._quick_deaths + 1 if lived < QUICK_DEATH or not was_up else 0
        longest = _LONGEST_PAUSE_UP if was_up else _LONGEST_PAUSE
        pause = min(longest, 0.1 * 2 ** (self._quick_deaths - 1)) if self._quick_deaths else 0.0
        self._start_at = monotonic() + pause * random.uniform(0.5, 1.5)  # noqa: S311  no secret
        return was_up

    def signal(self, number: int) -> None:
        """Send a signal. A process that is not up yet gets only those that it may die of."""
        if self._process is not None and (self.is_up or number in {signal.SIGTERM, signal.SIGKILL}):
            self._process.send_signal(number)

    def kill(self, reason: str) -> None:
        """Kill the process; the first *reason* is logged at its end."""
        if not self.kill_reason:
            self.kill_reason = reason
            self.signal(signal.SIGKILL)

    # -- its stacks -----------------------------------------------------------------------------------------------

    def ask_stacks(self, purpose: str) -> None:
        """Ask for the stacks of all threads; `stacks_ready` returns them a moment later."""
        if self.is_up:
            os.ftruncate(self._stacks, 0)
            self.signal(signal.SIGUSR2)
            self._stacks_due_at[purpose] = monotonic() + STACK_TIME

    def stacks_ready(self, purpose: str, now: float) -> str | None:
        """Return the stacks that were asked for, once there was time to write them; None before."""
        if now < self._stacks_due_at.get(purpose, float("inf")):
            return None
        del self._stacks_due_at[purpose]
        text = os.pread(self._stacks, 100_000, 0).decode(errors="replace").rstrip()
        return text or NO_STACK

    def close(self) -> None:
        """Close the file for stacks."""
        os.close(self._stacks)
