"""The processes of a run: workers under `conveyor worker`, programs with a worker inside, producers."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
from contextlib import suppress
from pathlib import Path
from typing import Any

from chaos.recording_server import HOME
from testbed.fork_server import ForkServer

_FORK_SERVER = ForkServer()


class Program:
    """One process that is started again when it ends, as an operator's system would do."""

    def __init__(
        self,
        process_group: ProcessGroup,
        name: str,
        command: list[str],
        *,
        url: str,
        keep: bool = True,
        env: dict[str, str] | None = None,
    ) -> None:
        """Start *command*, a module and its arguments, with Redis at *url*; *keep* it running."""
        self.process_group, self.name, self.command, self.url, self.keep = process_group, name, command, url, keep
        self.starts = 0
        self.env = env or {}
        self.process: Any = None
        self.start()

    @property
    def supervised(self) -> bool:
        """Whether children of it do the work."""
        return "conveyor" in self.command

    @property
    def killable(self) -> bool:
        """Whether it is a producer that may be killed: it keeps what it pushes in a buffer on disk."""
        return "CHAOS_SPOOL" in self.env

    @property
    def pid(self) -> int:
        """The process itself."""
        return int(self.process.pid)

    def start(self) -> None:
        """Start it."""
        self.starts += 1
        env = {**self.process_group.env, **self.env, "CONVEYOR_URL": self.url}
        name = self.process_group.directory / f"{self.name}.log"
        with name.open("ab") as log, Path(os.devnull).open("rb") as nothing:
            streams = [nothing.fileno(), log.fileno(), log.fileno()]
            forks = self.process_group.fork_server
            self.process = forks.start(self.command, cwd=HOME, env=env, streams=streams, new_session=True)
            self.process = self.process or subprocess.Popen(
                [sys.executable, "-m", *self.command],
                env=env, cwd=HOME, stdin=nothing, stdout=log, stderr=log, start_new_session=True,
            )  # fmt: skip

    def children(self) -> list[int]:
        """Return the pids of its children: those that lease and run jobs."""
        return _children(self.pid)

    def family(self) -> list[int]:
        """Return the pids of the process and all below it."""
        found = [self.pid]
        for pid in found:
            found += _children(pid)
        return found

    def alive(self) -> bool:
        """Tell whether it runs."""
        return self.process.poll() is None

    def signal(self, number: int) -> None:
        """Send a signal to the process itself."""
        with suppress(ProcessLookupError):
            self.process.send_signal(number)

    def end(self) -> None:
        """End it and everything below it."""
        self.keep = False
        for pid in reversed(self.family()):
            for number in (signal.SIGKILL, signal.SIGCONT):
                with suppress(ProcessLookupError):
                    os.kill(pid, number)
        self.process.wait(10)


ROLES = ("worker", "producer")
PASSWORD = "chaos"
"""Of servers on loopback that live for a run."""


def role_rules(topology: str) -> list[list[str]]:
    """Return the user and the rules of each role as `conveyor acl` prints them, as the words of an ACL line."""
    rules = []
    for role in ROLES:
        printed = subprocess.run(
            [sys.executable, "-m", "conveyor", "acl", role, "--namespace", "chaos", "--user", role, "--server", "7.2",
             "--format", "users.acl", "--topology", topology, "--durable"],
            env={**os.environ, "PYTHONPATH": str(HOME / "src")}, capture_output=True, text=True, check=True,
        ).stdout.splitlines()  # fmt: skip
        [line] = [line for line in printed if line.startswith("user ")]
        rules.append([f">{PASSWORD}" if word.startswith("#SHA256") else word for word in line.split()[1:]])
    return rules


def _children(pid: int) -> list[int]:
    """Return the pids of the children of a process, whichever of its threads started them."""
    found: list[int] = []
    for thread in Path(f"/proc/{pid}/task").glob("*"):
        with suppress(OSError):
            found += map(int, (thread / "children").read_text().split())
    return found


class ProcessGroup:
    """All programs of a run."""

    def __init__(self, directory: Path, *, lease: float, source: Path | None = None, roles: bool = False) -> None:
        """
        Programs write into *directory*; *source* is another `src` than this tree's, for sabotaged builds.

        With *roles* workers and producers log in as users that have the rights of their roles and no more (`role_rules`).
        """
        self.directory = directory
        self.roles = roles
        ours = HOME / "src"
        self.fork_server = _FORK_SERVER if source is None else ForkServer(_FORK_SERVER, ours=ours, source=source)
        """Forks the programs, so that none imports the library. That of another `src` is forked by ours, and imports it once."""
        self.queues: tuple[str, ...] = ("default",)
        """Queues that workers serve; a program with one inside leaves `box` alone, whose jobs have processes of their own."""
        path = os.pathsep.join([str(source or HOME / "src"), str(HOME)])
        self.env = {
            **{key: value for key, value in os.environ.items() if not key.startswith("CONVEYOR_")},
            "CHAOS_DIR": str(directory), "CHAOS_LEASE": str(lease), "PYTHONPATH": path, "PYTHONFAULTHANDLER": "1",
        }  # fmt: skip
        self.programs: list[Program] = []
        self.restarts = 0
        self._lock = threading.Lock()
        self._stop = threading.Event()
        self._watch = threading.Thread(target=self._keep_running, name="process group", daemon=True)
        self._watch.start()

    def supervised(
        self, name: str, url: str, *, processes: int = 2, grace: str = "3s", concurrency: int = 50
    ) -> Program:
        """Start `conveyor worker` with that many children."""
        return self._add(
            name, "conveyor", "worker", "chaos.tested_app:app", "--processes", str(processes), "--concurrency",
            str(concurrency), "--threads", "4", "--grace", grace, *(f"--queue={queue}" for queue in self.queues), url=url,
        )  # fmt: skip

    def embedded(self, name: str, url: str) -> Program:
        """Start a program with a worker inside and a consumer of messages."""
        return self._add(
            name,
            "chaos.embedded_worker",
            url=url,
            env={"CHAOS_QUEUES": " ".join(queue for queue in self.queues if queue != "box")},
        )

    def producer(
        self, number: int, url: str, *, seed: int, rate: float, count: int, mix: str = "", confirm: int = 0
    ) -> Program:
        """Start a producer that is never killed, and not started again; *confirm* replicas must have what it pushes."""
        command = ["chaos.producer_program", str(number), str(seed), str(rate), str(count), *([mix] if mix else [])]
        return self._add(f"producer{number}", *command, url=url, keep=False, env={"CHAOS_CONFIRM": str(confirm)})

    def killable(self, number: int, url: str, *, seed: int, rate: float) -> Program:
        """Start a producer that may be killed: it has a buffer on disk, and its successor delivers what lies there."""
        command = ["chaos.producer_program", str(number), str(seed), str(rate), str(10**9)]
        return self._add(
            f"producer{number}", *command, url=url, env={"CHAOS_SPOOL": str(self.directory / f"spool{number}")}
        )

    def reader(self, url: str, *, seed: int) -> Program:
        """Start the program that reads what jobs tell, and that puts schedules; faults strike its connections alone."""
        return self._add("reader", "chaos.reader_program", str(seed), url=url, keep=False)

    def drain_buffers(self) -> None:
        """Kill the producers that may be killed, for good; a last one each delivers what is left in its buffer."""
        with self._lock:
            for program in [program for program in self.producers() if program.killable]:
                program.end()
                program.command[-1] = "0"
                program.start()

    def _add(self, name: str, *command: str, url: str, keep: bool = True, env: dict[str, str] | None = None) -> Program:
        if self.roles:
            user = ROLES[name.startswith("producer")]
            url = url.replace("://", f"://{user}:{PASSWORD}@", 1)
        with self._lock:
            program = Program(self, name, [*command], url=url, keep=keep, env=env)
            self.programs.append(program)
        return program

    def workers(self) -> list[Program]:
        """Return the programs that work."""
        return [program for program in self.programs if not program.name.startswith(("producer", "reader"))]

    def readers(self) -> list[Program]:
        """Return the programs that read."""
        return [program for program in self.programs if program.name == "reader"]

    def producers(self) -> list[Program]:
        """Return the programs that push."""
        return [program for program in self.programs if program.name.startswith("producer")]

    def _keep_running(self) -> None:
        while not self._stop.wait(0.05):
            with self._lock:
                for program in self.programs:
                    if program.keep and not program.alive():
                        program.start()
                        self.restarts += 1

    def close(self) -> None:
        """End everything that is still running."""
        self._stop.set()
        self._watch.join(5)
        with self._lock:
            for program in self.programs:
                program.end()
        if self.fork_server is not _FORK_SERVER:
            self.fork_server.close()

    def retire(self, retry_for: float = 15.0) -> bool:
        """Ask the workers to end in order; tell whether all did in time."""
        self._stop.set()
        self._watch.join(5)
        for program in self.programs:
            program.keep = False
            program.signal(signal.SIGTERM)
        deadline = time.monotonic() + retry_for
        for program in self.programs:
            with suppress(subprocess.TimeoutExpired):
                program.process.wait(max(0.1, deadline - time.monotonic()))
        return all(not program.alive() for program in self.programs)
