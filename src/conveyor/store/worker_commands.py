"""
Commands to a worker: quiet, stop, stack, logs.

A command travels as an element of the list on which the worker blocks anyway, and is answered in a key of its own. It is
data: a worker knows four of them, and runs nothing that it reads.
"""

from __future__ import annotations

from typing import Any, Literal, NamedTuple, get_args

import msgspec

from conveyor.ids import new_identity
from conveyor.payload.records import read_leniently
from conveyor.store.keys import QueueKeys
from conveyor.store.script import Call, Command, Script

COMMAND_WORKER, DESCRIBE_WORKER, LEASED_JOBS = (
    Script("command_worker"), Script("describe_worker"), Script("leased_jobs"),
)  # fmt: skip
RELEASE_BUILD = Script("release_build")
SET, GET = Script("SET"), Script("GET")
FOLLOWED = 15.0
"""Seconds for which the lines of a job are sent at once, after somebody asked for it."""
ANSWER_MS = 60_000
"""For how long an answer is kept, in ms."""
MOST_STACK = 256 * 1024
"""Bytes of the stacks that a worker sends, at most."""

WorkerAction = Literal["quiet", "stop", "stack", "logs"]
ACTIONS: tuple[WorkerAction, ...] = get_args(WorkerAction)


class WorkerCommand(msgspec.Struct, frozen=True, rename={"action": "do"}):
    """One command, and the key that gets the answer; *logs* is about a job that the worker holds, and is not answered."""

    action: WorkerAction
    answer: str
    job: str = ""


class LeasedRow(NamedTuple):
    """A job that a worker holds, and since when (ms; 0: not known)."""

    id: str
    task: str
    since_ms: int


_DECODER = msgspec.json.Decoder(WorkerCommand)


def new_command(keys: QueueKeys, action: WorkerAction, job: str = "") -> WorkerCommand:
    """Return a command to a worker of that queue, with an answer of its own; *job*: what it is about."""
    return WorkerCommand(action, keys.answer(new_identity()), job)


def read_command(keys: QueueKeys, data: bytes) -> WorkerCommand | None:
    """Return the command that a worker read in that queue; None for what is no command of ours."""
    try:
        command = _DECODER.decode(data)
    except (msgspec.MsgspecError, UnicodeDecodeError):
        return None
    # No command makes a worker write to any other key.
    return command if command.answer.startswith(keys.answer("")) and len(command.answer) < 1000 else None


def send(keys: QueueKeys, worker: str, command: WorkerCommand) -> Call[bool]:
    """Return the call that sends a command to a worker; it yields False when the worker is gone."""
    return Call(COMMAND_WORKER, (keys.wake_of(worker), keys.leased(worker)), (msgspec.json.encode(command),), bool)


def answer(command: WorkerCommand, text: bytes) -> Call[Any]:
    """Return the call that answers a command."""
    return Command(SET, (command.answer,), (text, "PX", str(ANSWER_MS)), bool)


def read_answer(command: WorkerCommand) -> Call[bytes | None]:
    """Return the call that reads the answer to a command; it yields None before there is one."""
    return Command(GET, (command.answer,), (), lambda reply: reply)


def describe(keys: QueueKeys, worker: str, about: bytes) -> Call[bool]:
    """Return the call that replaces what a worker said of itself when it registered."""
    return Call(DESCRIBE_WORKER, (keys.leased(worker),), (about.ljust(65),), bool)


def release_build(keys: QueueKeys, cursor: str, build: str) -> Call[tuple[str, int]]:
    """Return the call that releases a page of the jobs pinned to *build*; it yields the next cursor ("0": the end) and how many."""
    return Call(
        RELEASE_BUILD, (keys.jobs, keys.due, keys.wake, keys.none), (cursor, build, "1000"),
        lambda reply: (reply[0].decode(), int(reply[1])),
    )  # fmt: skip


def leased_jobs(keys: QueueKeys, worker: str, most: int) -> Call[list[LeasedRow]]:
    """Return the call that lists up to *most* jobs that a worker holds, the longest first."""

    def decode(reply: list[Any]) -> list[LeasedRow]:
        return [
            LeasedRow(reply[i].decode(), read_leniently(reply[i + 2], None)[0].task, int(reply[i + 1] or 0))
            for i in range(0, len(reply), 3)
        ]

    return Call(LEASED_JOBS, (keys.leased(worker), keys.jobs), (str(most),), decode)
