"""Formats of a program's own, values for them, and tasks that take anything."""

from __future__ import annotations

import struct
from dataclasses import dataclass
from datetime import datetime
from typing import Any

from conveyor.jobs.app import Conveyor
from conveyor.jobs.context import current


@dataclass
class Point:
    """A value that the format below stores, and msgspec knows as well."""

    x: int
    y: int


class Packed:
    """A binary format of a team's own: two numbers of four bytes, and a type that has to be known."""

    name = "points.v1"

    def encode(self, value: Any, /) -> bytes:
        return struct.pack("<ii", value.x, value.y)

    def decode(self, data: bytes, type: Any, /) -> Any:  # noqa: A002
        x, y = struct.unpack("<ii", data)
        return Point(x, y) if type is Any else type(x, y)


class Opaque:
    """A value that only its own format can store, like a message of protobuf."""

    def __init__(self, words: str) -> None:
        self.words = words

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Opaque) and other.words == self.words

    __hash__ = None  # type: ignore[assignment]


class OpaqueFormat:
    name = "opaque"

    def encode(self, value: Any, /) -> bytes:
        return str(value.words).encode()

    def decode(self, data: bytes, type: Any, /) -> Any:  # noqa: A002
        return Opaque(data.decode())


def declare(app: Conveyor, **options: Any) -> None:
    @app.task(name="echo", **options)
    async def echo(a: Any, b: bytes = b"\x00", *rest: int, **more: datetime):
        return [a, b, list(rest), more]

    @app.task(name="move", **options)
    def move(point: Point, by: Point = Point(1, 1)) -> Point:  # noqa: B008
        return Point(point.x + by.x, point.y + by.y)

    @app.task(name="spawn", **options)
    async def spawn(word: bytes) -> None:
        current().spawn(echo.s(word))

    @app.task(name="early", ack="early", **options)
    async def early(word: bytes) -> None: ...
