"""
Programs of calls: generators that yield calls, receive the decoded replies, and return a value.

A program does no input or output, so a blocking and an awaitable driver carry out the same one. Where a step is more than a
call, it is a pair: what blocks, and what is awaited.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Generator
from typing import Any, Protocol, TypeVar

from conveyor.store.operations import LIST_INTAKE
from conveyor.store.script import Call

C = TypeVar("C")
V = TypeVar("V")
Run = Callable[..., Any]
"""Carries out a call; takes `deadline` (monotonic) too, the end of its time."""
Step = tuple[Callable[[], Any], Callable[[], Awaitable[Any]]]
"""A step as it blocks, and as it is awaited."""
StepProgram = Generator[Step, Any, Any]
AsyncRun = Callable[..., Awaitable[Any]]


class CallRunner(Protocol):
    """The part of a client that carries out calls."""

    retry_for: float

    def run(self, call: Call[V], *, retry_for: float | None = None, deadline: float | None = None) -> V: ...
    async def arun(self, call: Call[V], *, retry_for: float | None = None, deadline: float | None = None) -> V: ...


def run_once(
    client: CallRunner, call: Call[Any], *, retry_for: float | None = None, deadline: float | None = None
) -> Any:
    """
    Carry out *call*, repeated only when that is harmless.

    *retry_for* and *deadline* are as in `Client.run`.
    """
    return client.run(call, retry_for=_retry_for(client, call, retry_for), deadline=deadline)


async def arun_once(
    client: CallRunner, call: Call[Any], *, retry_for: float | None = None, deadline: float | None = None
) -> Any:
    """Awaitable form of `run_once`."""
    return await client.arun(call, retry_for=_retry_for(client, call, retry_for), deadline=deadline)


def _retry_for(client: CallRunner, call: Call[Any], most: float | None) -> float:
    """Return the seconds for which *call* is repeated, *most* at most."""
    # An intake is never repeated: it would store new entries over old ones.
    return 0.0 if call.script is LIST_INTAKE else client.retry_for if most is None else most


def drive(program: Generator[C, Any, V], run: Callable[[C], Any]) -> V:
    """Carry out *program* and return its value. Errors of *run* are raised inside the program."""
    try:
        call = next(program)
        while True:
            try:
                reply = run(call)
            except Exception as error:
                call = program.throw(error)
            else:
                call = program.send(reply)
    except StopIteration as stop:
        return stop.value  # type: ignore[no-any-return]


async def adrive(program: Generator[C, Any, V], run: Callable[[C], Awaitable[Any]]) -> V:
    """Awaitable form of `drive`."""
    try:
        call = next(program)
        while True:
            try:
                reply = await run(call)
            except Exception as error:
                call = program.throw(error)
            else:
                call = program.send(reply)
    except StopIteration as stop:
        return stop.value  # type: ignore[no-any-return]


def drive_steps(program: Generator[Step, Any, V]) -> V:
    """Carry out a program of steps, blocking."""
    return drive(program, lambda step: step[0]())


async def adrive_steps(program: Generator[Step, Any, V]) -> V:
    """Awaitable form of `drive_steps`."""
    return await adrive(program, lambda step: step[1]())
