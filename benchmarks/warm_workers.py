"""
A supervisor whose worker processes are forked from it: ``python -m benchmarks.warm_workers APP QUEUE PROCESSES CONCURRENCY``.

A worker process takes about a second of processor time to import what it needs. Where one is killed each second, a
machine of few cores does little else, and a measurement says how fast Python imports. Here all is imported before. The
supervisor, its guard of leases, the signals, and what a process does once it runs are those of ``conveyor worker``.
"""

from __future__ import annotations

import argparse
import importlib
import os
import random
import signal
import sys
from contextlib import suppress

from conveyor.worker.supervision import child_main, child_process, supervisor


class ForkedProcess:
    """A child process, with what a supervisor uses of `subprocess.Popen`."""

    def __init__(self, command: list[str], *, pass_fds: tuple[int, ...], **_: object) -> None:
        self._code: int | None = None
        self.pid = os.fork()
        if self.pid == 0:
            try:
                self._become(command, pass_fds)
            finally:
                os._exit(1)

    @staticmethod
    def _become(command: list[str], pass_fds: tuple[int, ...]) -> None:
        """Run a worker in the forked process."""
        signal.set_wakeup_fd(-1)
        for number in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1, signal.SIGUSR2, signal.SIGCHLD, signal.SIGHUP):
            signal.signal(number, signal.SIG_DFL)
        os.setpgid(0, 0)
        first = 3
        for kept in sorted(pass_fds):
            os.closerange(first, kept)
            first = kept + 1
        os.closerange(first, 4096)
        random.seed()
        sys.argv[:] = command[2:]
        child_main.main()

    def poll(self) -> int | None:
        """Return the exit code, or minus the number of a signal; None while the process runs."""
        if self._code is None:
            pid, status = os.waitpid(self.pid, os.WNOHANG)
            if pid:
                self._code = os.waitstatus_to_exitcode(status)
        return self._code

    def send_signal(self, number: int) -> None:
        """Send a signal, unless the process has ended."""
        if self.poll() is None:
            with suppress(ProcessLookupError):
                os.kill(self.pid, number)


def main() -> int:
    """Run the supervisor."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.warm_workers", description=__doc__)
    parser.add_argument("app", help="module:object")
    parser.add_argument("queue")
    parser.add_argument("processes", type=int)
    parser.add_argument("concurrency", type=int)
    options = parser.parse_args()
    for module in ("hiredis", "redis.asyncio", "uvloop", "conveyor.worker.worker", options.app.partition(":")[0]):
        with suppress(ModuleNotFoundError):
            importlib.import_module(module)
    child_process.subprocess.Popen = ForkedProcess  # type: ignore[attr-defined]
    return supervisor.run(
        options.app,
        queues={options.queue: 1.0},
        concurrency=options.concurrency,
        threads=1,
        processes=options.processes,
        burst=False,
        grace=1.0,
    )


if __name__ == "__main__":
    sys.exit(main())
