"""`conveyor topic`: list topics, change who subscribes, publish."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING, Any

import click

from conveyor.cli.command import CommandGroup
from conveyor.cli.completion import complete_queues
from conveyor.cli.output import Output
from conveyor.cli.push import delivery_options, message_options, read_texts
from conveyor.cli.target import Target, redis_options
from conveyor.units import quantity

if TYPE_CHECKING:
    from conveyor.messaging.topic import Topic, TopicDirectory

_NAME = click.argument("name", metavar="TOPIC")
_QUEUES = click.argument("queues", metavar="QUEUE...", nargs=-1, required=True, shell_complete=complete_queues)


@click.group(cls=CommandGroup)
def topic() -> None:
    """List topics, subscribe queues to them, and publish."""


@topic.command("list", example="conveyor topic list")
@redis_options
def list_(target: Target, out: Output) -> None:
    """List every name that queues subscribe to and every topic that was published to."""
    infos = _directory(target).read_all()
    if out.as_json:
        out.document("topics", topics=infos)
    elif infos:
        rows = [
            (
                one.name or "(all others)" if out.on_terminal else one.name,
                " ".join(one.subscribers),
                one.published,
                one.nobody,
            )
            for one in infos
        ]
        out.table(("topic", "subscribers", "published", "to nobody"), rows)
    else:
        out.say("No queue subscribes to anything, and nothing was published.")


@topic.command(example="conveyor topic subscribe user.created emails audit")
@_NAME
@_QUEUES
@redis_options
def subscribe(target: Target, out: Output, name: str, queues: tuple[str, ...]) -> None:
    """
    Subscribe queues: each gets a copy of every message that is published from now on.

    TOPIC may be a pattern, in quotes: `*` stands for one word, `#` as the last for any number of words.
    """
    changed = _topic(target, name).subscribe(*queues)
    target.note("subscribe", name, count=changed, detail=", ".join(queues))
    _print_changed(out, "topic-subscribed", name, "subscribed", changed)


@topic.command(example="conveyor topic unsubscribe user.created audit")
@_NAME
@_QUEUES
@redis_options
def unsubscribe(target: Target, out: Output, name: str, queues: tuple[str, ...]) -> None:
    """
    End subscriptions to exactly this name.

    Messages that are queued stay.
    """
    changed = _topic(target, name).unsubscribe(*queues)
    target.note("unsubscribe", name, count=changed, detail=", ".join(queues))
    _print_changed(out, "topic-unsubscribed", name, "unsubscribed", changed)


@topic.command(example="conveyor topic publish user.created '{\"user\": 7}'")
@_NAME
@message_options
@redis_options
def publish(
    target: Target, out: Output, name: str, message: str | None, delay: str | None, priority: int, own_id: str | None,
    expires: str | None, headers: tuple[str, ...], tags: tuple[str, ...],
) -> None:  # fmt: skip
    """
    Publish one JSON message, or one per line of standard input (-).

    Prints the ids of the copies, those of one message on one line.
    """
    import msgspec

    texts, chosen = read_texts(message, own_id, "publish"), _topic(target, name)
    options = delivery_options(priority, headers, tags, delay, expires)
    ids: list[list[str]] = []
    for some in texts:
        values = [msgspec.json.decode(text) for text in some]
        copies = [chosen.publish(values[0], id=own_id, **options)] if own_id else chosen.publish_many(values, **options)
        ids += copies
        if not out.as_json:
            for one in copies:
                out.line(" ".join(one))
            sys.stdout.flush()
    target.note("publish", name, count=len(ids), quiet=True)
    if out.as_json:
        out.document("published", topic=name, ids=ids)
    elif (nobody := sum(not copies for copies in ids)) and out.on_terminal:
        out.say(f"Nobody subscribes to {name}: {quantity(nobody, 'message')} reached no queue, and are counted.")


def _directory(target: Target) -> TopicDirectory:
    """Return the topics of the app that the command names, or of one that declares nothing."""
    from conveyor.jobs.core import core_of

    target.client()  # loads the app
    if target.app_in_place is not None:
        return core_of(target.app_in_place).topics
    return target.core().topics


def _topic(target: Target, name: str) -> Topic[Any]:
    directory = _directory(target)
    return directory.make(name, Any, version=1, format=None)


def _print_changed(out: Output, schema: str, name: str, word: str, number: int) -> None:
    if out.as_json:
        out.document(schema, topic=name, **{word: number})
    elif not out.on_terminal:
        out.line(str(number))
    else:
        out.say(f"{quantity(number, 'queue')} {word}.")
