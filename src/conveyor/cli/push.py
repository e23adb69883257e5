"""`conveyor push`: push messages from the command line or from standard input."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING, Any

import click

from conveyor.cli.command import F, LeafCommand
from conveyor.cli.completion import complete_queues
from conveyor.cli.output import Output, parse_seconds
from conveyor.cli.target import Target, redis_options
from conveyor.units import quantity

if TYPE_CHECKING:
    from conveyor.jobs.hooks import Middleware
    from conveyor.messaging.declared_limits import LoadKeyReader
    from conveyor.messaging.push_options import PreparedPush
    from conveyor.payload.formats import FormatCodec
    from conveyor.store.operations import Entry

_CHUNK = 1 << 16
_MAX_LINE = 1 << 24


def message_options(function: F) -> F:
    """Add the message and its options, which are the same for a queue and for a topic."""
    for add in reversed(
        (
            click.argument("message", required=False, metavar="[JSON | -]"),
            click.option("--delay", metavar="5m", help="Deliver it after this delay."),
            click.option("--priority", type=click.IntRange(0, 9), default=0, help="0 to 9, higher goes first."),
            click.option("--id", "own_id", metavar="ID", help="Your own id: a queue that has it stores nothing."),
            click.option("--expires", metavar="1h", help="Drop it where no consumer has taken it by then."),
            click.option("--header", "headers", multiple=True, metavar="K=V", help="A header; may be repeated."),
            click.option(
                "--tag", "tags", multiple=True, metavar="TAG", help="A word by which it is found; may be repeated."
            ),
        )
    ):
        function = add(function)
    return function


@click.command(cls=LeafCommand, example='conveyor push orders \'{"id": "o1", "total": 10}\'')
@click.argument("queue", metavar="QUEUE", shell_complete=complete_queues)
@message_options
@click.option("--front", is_flag=True, help="Put it before the messages that wait.")
@redis_options
def push(
    target: Target, out: Output, queue: str, message: str | None, delay: str | None, priority: int, own_id: str | None,
    expires: str | None, headers: tuple[str, ...], tags: tuple[str, ...], front: bool,
) -> None:  # fmt: skip
    """
    Push one JSON message to a queue, or one per line of standard input (-).

    Prints the ids, one per line.
    """
    texts = read_texts(message, own_id, "push")
    client, app = target.client(), target.app  # in this order: `client` loads the app
    options = {"id": own_id, "front": front, **delivery_options(priority, headers, tags, delay, expires)}
    send = _sender(client, app, queue, options)
    ids, stored = list[str](), 0
    for bodies in texts:
        # Each message goes to the front: reversed, so that the first line is leased first.
        chunk = send(bodies[::-1] if front else bodies)
        chunk = chunk[::-1] if front else chunk
        stored += len(bodies)
        ids += chunk if out.as_json else []
        _print_ids(out, chunk)
    target.note("push", queue, count=stored, quiet=True)
    if out.as_json:
        out.document("pushed", queue=queue, ids=ids)


def _sender(client: Any, app: Any, queue: str, options: dict[str, Any]) -> Callable[[list[bytes]], list[str]]:
    """Return the function that pushes bodies and returns their ids; a plain list gives none."""
    from conveyor.ids import queue_name
    from conveyor.jobs.core import core_of

    plain_list = None if app is None else core_of(app).plain_lists.get(queue)
    if plain_list is not None:
        given = {name: value for name, value in options.items() if value and name != "id"}
        given |= {} if options["id"] is None else {"id": options["id"]}
        if given:
            plain_list.push(None, **given)  # which refuses them
        return lambda bodies: [id_ for id_ in plain_list.push_many(map(plain_list.codec.decode, bodies)) if id_]
    if app is not None:
        core_of(app).admit_message(queue)
    prepared, codec = _prepare(app, queue, **options), _queue_codec(app, queue)
    declared = None if app is None else core_of(app).queues.get(queue)
    load_keys = None if declared is None else declared._publisher.load_keys  # noqa: SLF001
    entry = partial(_entry, prepared, codec, [] if app is None else core_of(app).push_middlewares, load_keys, queue)
    keys = client.keys(queue_name(queue))
    partitions = _recorded_partitions(client, keys.queue)
    return lambda bodies: _push_entries(client, keys, partitions, [entry(body) for body in bodies])


def _recorded_partitions(client: Any, queue: str) -> Any:
    """Return the partitions of a queue as Redis records them; None without partitions."""
    from conveyor.messaging.partitions import Partitions, partition_count

    number = partition_count(client, queue)
    return None if number == 1 else Partitions(client, queue, number)


def _push_entries(client: Any, keys: Any, partitions: Any, entries: list[Entry]) -> list[str]:
    from conveyor.ids import public

    if partitions is None:
        return [public(keys.queue, id_) for id_ in client.push(keys, entries)]
    placed = [partitions.partition_of(entry) for entry in entries]
    ids: dict[str, Iterator[str]] = {}
    for partition in dict.fromkeys(placed):
        chosen = [entry for entry, where in zip(entries, placed, strict=True) if where == partition]
        ids[partition] = iter(partitions.send(partition, chosen))
    return [public(partition, next(ids[partition])) for partition in placed]


def _print_ids(out: Output, ids: list[str]) -> None:
    if not out.as_json:
        for id_ in ids:
            out.line(id_)
        sys.stdout.flush()


def delivery_options(
    priority: int, headers: tuple[str, ...], tags: tuple[str, ...], delay: str | None, expires: str | None
) -> dict[str, Any]:
    """Return the options of `message_options` as a push and a publish take them."""
    return {
        "priority": priority, "headers": parse_headers(headers), "tags": tags,
        "delay": 0 if delay is None else parse_seconds(delay, name="--delay"),
        "expires": None if expires is None else parse_seconds(expires, name="--expires"),
    }  # fmt: skip


def read_texts(message: str | None, own_id: str | None, verb: str) -> Iterator[list[bytes]]:
    """Return the checked JSON texts, in lists, of one message or of the lines of standard input. Raises click.UsageError."""
    from_stdin = message == "-" or (message is None and not sys.stdin.isatty())
    if message is None and not from_stdin:
        raise click.UsageError(f"Nothing to {verb}: give JSON, or - to read one message per line.")
    if from_stdin and own_id:
        raise click.UsageError("--id names one message; lines from standard input get ids of their own.")
    if message is None or from_stdin:
        return _stdin_texts()
    return iter([[_checked_body(message.encode("utf-8", "surrogateescape"), "")]])


def _stdin_texts() -> Iterator[list[bytes]]:
    """Yield the texts of the lines of standard input. A file is checked as a whole first, so that a bad line stores nothing."""
    if sys.stdin.seekable():
        start = sys.stdin.buffer.tell()
        for lines in _read_lines(sys.stdin.buffer):
            for number, line in lines:
                _checked_body(line, _line_position(number, 0))
        sys.stdin.buffer.seek(start)
    stored = 0
    for lines in _read_lines(sys.stdin.buffer):
        yield [_checked_body(line, _line_position(number, stored)) for number, line in lines]
        stored += len(lines)


def _line_position(number: int, stored: int) -> str:
    before = f" (after {quantity(stored, 'message')} that {'was' if stored == 1 else 'were'} stored)" if stored else ""
    return f" in line {number} of standard input{before}"


def _read_lines(stream: Any) -> Iterator[list[tuple[int, bytes]]]:
    """
    Yield lines as (number from 1, text), in lists.

    Lines of a slow pipe come one by one, those of a file in large parts.
    """
    rest, number = b"", 0
    while chunk := stream.read1(_CHUNK):
        *lines, rest = (rest + chunk).split(b"\n")
        if len(rest) > _MAX_LINE:
            break  # too large whatever follows; the check of this part reports it
        numbered = list(enumerate(lines, number + 1))
        number += len(lines)
        if kept := [(n, line) for n, line in numbered if line.strip()]:
            yield kept
    if rest.strip():
        yield [(number + 1, rest)]


def _checked_body(raw: bytes, where: str) -> bytes:
    import msgspec

    from conveyor.errors import PayloadError
    from conveyor.payload.codec import MAX_PAYLOAD, exceeded_limit

    body = raw.strip()
    if excess := exceeded_limit(body, MAX_PAYLOAD):
        raise PayloadError(f"The message{where} {excess[1]}", code=excess[0])
    try:
        msgspec.json.decode(body)
    except (msgspec.DecodeError, ValueError) as error:
        shown = body[:60].decode("utf-8", "backslashreplace") + ("…" if len(body) > 60 else "")
        raise PayloadError(
            f"The message{where} is not JSON: {error}. It begins: {shown}\n"
            "A text needs its quotes: conveyor push mail '\"hello\"'"
        ) from error
    except RecursionError as error:
        raise PayloadError(f"The message{where} is nested too deeply.", code="E22") from error
    return body


def parse_headers(given: tuple[str, ...]) -> dict[str, str]:
    from conveyor.errors import ConfigurationError

    headers = {}
    for header in given:
        name, equals, value = header.partition("=")
        if not equals or not name:
            raise ConfigurationError(f"--header takes name=value, not {header!r}. Nothing was pushed.")
        headers[name] = value
    return headers


def _prepare(app: Any, queue: str, **options: Any) -> PreparedPush:
    """Return the options for every message of this call, with the sealing of the app."""
    from conveyor.jobs.core import core_of
    from conveyor.messaging.push_options import prepare_push, with_sealing

    declared = None if app is None else core_of(app).queues.get(queue)
    version = 1 if declared is None else declared.version
    prepared = prepare_push(**options, version=version)
    if declared is not None:
        prepared = replace(prepared, limits=declared._fixed_limits)  # noqa: SLF001
    return with_sealing(prepared, None if app is None else app.sealing, queue, version)


def _queue_codec(app: Any, queue: str) -> FormatCodec[Any] | None:
    """Return the codec of the queue where bodies are decoded: for another format than JSON, and for middlewares; else None."""
    from conveyor.jobs.core import core_of
    from conveyor.payload.formats import codec_for

    if app is None:
        return None
    core = core_of(app)
    declared = core.queues.get(queue)
    if declared is None and core.push_middlewares:
        return codec_for(Any, formats=core.formats, max_payload=core.max_whole, what=f"A message of queue '{queue}'")
    plain = declared is None or (declared._publisher.load_keys is None and declared.codec.formats.writes is None)  # noqa: SLF001
    if declared is None or (plain and not core.push_middlewares):
        return None
    return declared.codec


def _entry(
    prepared: PreparedPush, codec: FormatCodec[Any] | None, middlewares: Sequence[Middleware],
    load_keys: LoadKeyReader | None, queue: str, body: bytes,
) -> Entry:  # fmt: skip
    from conveyor.ids import new_id
    from conveyor.messaging.push_options import pass_through

    if codec is not None:
        value = codec.decode(body)
        if middlewares or load_keys is not None:
            value, prepared = pass_through(middlewares, queue, value, prepared, load_keys)
        body = codec.encode(value)
    return prepared.entry(new_id(), prepared.head + body)
