"""What a worker and its processes for single jobs say to each other, and how it is cut into frames."""

from __future__ import annotations

import struct

import msgspec

HEAD = struct.Struct("<I")
"""Before each frame: the number of its bytes."""


class Start(msgspec.Struct, tag="start"):
    """To the process, once: which app it loads, where modules are looked for, and when it has done enough."""

    app: str
    path: list[str]
    verbose: bool
    max_jobs: int
    max_memory: int | None


class Job(msgspec.Struct, tag="job"):
    """To the process: one attempt. `body` is the arguments' raw JSON; `keep_ms` None means as the task has it."""

    task: str
    body: bytes
    id: str
    queue: str
    attempt: int
    headers: dict[str, str]
    keep_ms: int | None
    enqueued_ms: int | None


class Ready(msgspec.Struct, tag="ready"):
    """From the process: the app is loaded."""


class Extend(msgspec.Struct, tag="extend"):
    """From the process: the running job asks for so many ms from now on."""

    ms: int


class Done(msgspec.Struct, tag="done"):
    """
    From the process: the job's result as JSON, or None where none is stored; and what it spawned.

    `worn` says why the process is to be replaced; empty while it is not.
    """

    result: bytes | None
    spawned: list[bytes] = []
    worn: str = ""


class Failed(msgspec.Struct, tag="failed"):
    """
    From the process: what the job raised.

    `kinds` are its class and all above it as ``module:qualified.name``; `delay` is a Snooze's; `worn` as in Done.
    """

    kinds: list[str]
    message: str
    traceback: str
    code: str | None = None
    delay: float | str | None = None
    worn: str = ""


Order = Start | Job
Report = Ready | Extend | Done | Failed

_encode = msgspec.msgpack.Encoder().encode
_orders: msgspec.msgpack.Decoder[Order] = msgspec.msgpack.Decoder(Order)
_reports: msgspec.msgpack.Decoder[Report] = msgspec.msgpack.Decoder(Report)
read_order, read_report = _orders.decode, _reports.decode


def pack(message: Order | Report) -> bytes:
    """Return *message* as one frame."""
    data = _encode(message)
    return HEAD.pack(len(data)) + data
