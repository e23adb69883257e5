"""
A script and a call of it: every step in Redis is one value, and two small runners carry it out.

A program of calls is a generator that yields calls, receives the decoded replies, and returns a value. It does no input or
output, so `drive` and `adrive` carry out the same one. Where a step is more than a call, it is a pair: what blocks, and what
is awaited.
"""

from __future__ import annotations

import re
from collections.abc import Awaitable, Callable, Generator, Sequence
from hashlib import sha1
from pkgutil import get_data
from typing import Any, Generic, TypeVar

import msgspec
from msgspec.structs import replace

from conveyor.store.fork_safety import lazy_property

T = TypeVar("T")
S = TypeVar("S")
C = TypeVar("C")
Run = Callable[..., Any]
"""Carries out a call; takes `deadline` (monotonic) too, the end of its time."""
AsyncRun = Callable[..., Awaitable[Any]]
Step = tuple[Callable[[], Any], Callable[[], Awaitable[Any]]]
"""A step as it blocks, and as it is awaited."""
CallProgram = Generator["Call[Any]", Any, T]
"""Yields calls, gets their replies, returns a value."""
StepProgram = Generator[Step, Any, Any]

_NEEDS = re.compile(r"^-- needs: (.+)$", re.MULTILINE)
_LAZY = re.compile(r"^-- lazy: (.+)$", re.MULTILINE)
_LAZY_CALL = re.compile(r"\blazy\(\)\.(\w+)")
_COMMENT = re.compile(r"^ *--.*\n| +-- .*$", re.MULTILINE)
_INDENTATION = re.compile(r"^\s+", re.MULTILINE)


class Script:
    """
    One atomic step, kept in ``scripts/<name>.lua``.

    Its header may name parts that several steps share, as in ``-- needs: numbers keys``. They stand in ``scripts/lib/``
    and come before the file's own text, in the order of that line. A part may call a part that is named before it.

    A server makes each function of a text anew at every call: 132 of them were three quarters of what a turn of one job cost. So
    parts that most calls do without may stand behind ``-- lazy:`` instead. Their functions are made when one is asked for, as in
    ``lazy().settle_other(…)``; among themselves they call each other as usual.
    """

    def __init__(self, name: str) -> None:
        self.name = name

    @property
    def code(self) -> str:
        """The parts, then the file, without comments: each function ends with the first line that is a plain ``end``."""
        own = _read(f"{self.name}.lua")
        parts, late = _parts(_NEEDS, own), _parts(_LAZY, own)
        if late:
            asked = sorted(set(_LAZY_CALL.findall(parts + own)))
            made = ", ".join(f"{name} = {name}" for name in asked)
            # Kept in KEYS, a table of this call: a local that the function sets would cost each call as much as four functions.
            parts = f"local lazy\n{parts}function lazy()\nif KEYS.lazy then return KEYS.lazy end\n"
            parts += f"{late}local made = {{{made}}}\nKEYS.lazy = made\nreturn made\nend\n"
        return _COMMENT.sub("", parts + own)

    @lazy_property
    def text(self) -> str:
        """The text for the server, put together once in a process: the code without its indentation and empty lines."""
        return _INDENTATION.sub("", self.code)

    @lazy_property
    def sha(self) -> str:
        """The digest by which the server knows the script."""
        return sha1(self.text.encode(), usedforsecurity=False).hexdigest()

    def __repr__(self) -> str:
        return f"<Script {self.name}>"


def _parts(header: re.Pattern[str], own: str) -> str:
    """Return the text of the parts that a line of a script's header names, "" without such a line."""
    named = header.search(own)
    return "".join(_read(f"lib/{part}.lua") for part in (named[1].split() if named else ()))


def _read(path: str) -> str:
    # Also from a zip file; importlib.resources would load a dozen modules for it.
    data = get_data("conveyor.store", f"scripts/{path}")
    assert data is not None
    return data.decode()


Argument = str | bytes
"""A word of a command. No int: hiredis 3.5.0 ends the process when a signal handler raises while it packs one."""


class WrongReply(ConnectionError):
    """The reply belongs to another call. The connection is of no use any more, and the call is repeated on another."""


class Call(msgspec.Struct, Generic[T]):
    """
    One step in Redis: the script, its inputs, how to read the reply.

    Every call may be sent again with the same inputs when its reply was lost: a push is
    recognised by its sequence, a turn by its number, and the rest change nothing the second time.
    """

    script: Script
    keys: Sequence[str]
    args: Sequence[Argument]
    decode: Callable[[Any], T]
    withdraw: Script | None = None
    """Of a push: what keeps a late copy out once a repeat was refused. None where the caller pushes again what was."""

    def withdrawal(self) -> Call[bytes | None] | None:
        """Return the call that does so; it yields None, or the reply of a copy that was accepted meanwhile."""
        if self.withdraw is None:
            return None
        withdrawn = f"{self.args[0]!s}\nwithdrawn".encode()
        return Call(self.withdraw, self.keys[:1], self.args[:1], lambda reply: None if reply == withdrawn else reply)

    def command(self) -> tuple[Argument, ...]:
        """Return the words sent to the server."""
        return ("EVALSHA", self.script.sha, str(len(self.keys)), *self.keys, *self.args)

    def load(self) -> tuple[Argument, ...]:
        """Return the same with the script's text, for a server that does not know it yet."""
        return ("EVAL", self.script.text, str(len(self.keys)), *self.keys, *self.args)

    def then(self, convert: Callable[[T], S]) -> Call[S]:
        """Return the same step with its decoded reply converted further."""
        decode = self.decode
        return replace(self, decode=lambda reply: convert(decode(reply)))  # type: ignore[arg-type]


class Command(Call[T]):
    """A step that is one plain command, named where others have their script. It changes nothing the second time either."""

    def command(self) -> tuple[Argument, ...]:
        """Return the words sent to the server."""
        return (self.script.name, *self.keys, *self.args)

    load = command


def drive(program: Generator[C, Any, T], run: Callable[[C], Any]) -> T:
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


async def adrive(program: Generator[C, Any, T], run: Callable[[C], Awaitable[Any]]) -> T:
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


def drive_steps(program: Generator[Step, Any, T]) -> T:
    """Carry out a program of steps, blocking."""
    return drive(program, lambda step: step[0]())


async def adrive_steps(program: Generator[Step, Any, T]) -> T:
    """Awaitable form of `drive_steps`."""
    return await adrive(program, lambda step: step[1]())
