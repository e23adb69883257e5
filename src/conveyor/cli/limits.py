"""`conveyor limits`: show and change the rate and concurrency limits of queues while programs run."""

from __future__ import annotations

from typing import TYPE_CHECKING

import click

from conveyor.cli.command import CommandGroup
from conveyor.cli.completion import complete_queues
from conveyor.cli.output import Output
from conveyor.cli.target import Target, redis_options
from conveyor.errors import ConfigurationError, QueueNotFound
from conveyor.units import quantity

if TYPE_CHECKING:
    from conveyor.messaging.limit_control import LimitControl, LimitState
    from conveyor.messaging.limits import Concurrency, Rate

_HEADINGS = ("queue", "limit", "key", "value", "declared", "used", "waiting", "opens")
_QUEUE = click.argument("queue", metavar="QUEUE", shell_complete=complete_queues)
_KEY = click.option("--key", metavar="KEY", help="Only for this key of the limit, such as one tenant.")


@click.group(cls=CommandGroup)
def limits() -> None:
    """List, set and reset limits; running workers follow at once."""


@limits.command("list", example="conveyor limits list mail")
@click.argument("queue", metavar="[QUEUE]", required=False, shell_complete=complete_queues)
@redis_options
def list_(target: Target, out: Output, queue: str | None) -> None:
    """List the limits of a queue, or of all, with the keys that are in use."""
    control, names = _control(target, queue)
    states = [state for name in names for state in control.list(name)]
    if out.as_json:
        from conveyor.admin.views import limit_view

        out.document("limits", limits=[limit_view(state) for state in states])
    elif states:
        out.table(_HEADINGS, [_row(state) for state in states])
    else:
        out.say("No limits are declared: limits=[…] of app.queue and @app.task does.")


@limits.command("set", example="conveyor limits set mail 500/1m")
@_QUEUE
@click.argument("limit", metavar="LIMIT")
@_KEY
@click.option("--name", metavar="NAME", help="The limit's name, as `limits list` shows it.")
@click.option("--smooth", is_flag=True, help="Space the starts of a rate evenly.")
@redis_options
def set_(target: Target, out: Output, queue: str, limit: str, key: str | None, name: str | None, smooth: bool) -> None:
    """
    Change a limit until it is reset: 500/1m is a rate, 50 a concurrency.

    QUEUE may be a task of the app too.
    """
    from conveyor.messaging.declared_limits import parse_limit

    control, _ = _control(target, queue)
    value = parse_limit(limit, smooth=smooth)
    known = {state.name: state for state in control.list(queue)}
    if name is not None and name not in known:
        listed = f"It has: {', '.join(sorted(known))}." if known else "It has none."
        raise ConfigurationError(f"Queue {queue!r} has no limit {name!r}. {listed} Nothing was changed.")
    control.set(queue, _named(value, name), key)
    target.note("set limit", queue, detail=", ".join(filter(None, (name, key, limit))))
    if out.as_json:
        out.document("limit-set", queue=queue, limit_name=name, key=key, limit=limit, smooth=smooth)
    else:
        of = f" of {key}" if key is not None else ""
        out.say(f"{queue}: the limit{of} is {limit} until it is reset:  conveyor limits reset {queue}")


@limits.command(example="conveyor limits reset mail")
@_QUEUE
@click.argument("name", metavar="[NAME]", required=False)
@_KEY
@redis_options
def reset(target: Target, out: Output, queue: str, name: str | None, key: str | None) -> None:
    """Give the limits of a queue, one of them, or one key of it back to what code declares."""
    control, _ = _control(target, queue)
    count = control.reset(queue, name, key)
    target.note("reset limit", queue, count=count, detail=", ".join(filter(None, (name, key))))
    if out.as_json:
        out.document("limits-reset", queue=queue, limit_name=name, key=key, reset=count)
    elif not out.on_terminal:
        out.line(str(count))
    else:
        out.say(
            f"{queue}: {quantity(count, 'change')} taken back." if count else f"{queue}: nothing was changed before."
        )


def _control(target: Target, queue: str | None) -> tuple[LimitControl, list[str]]:
    """Return the limits of the app, or of the client alone, and the queues that are meant. Raises QueueNotFound."""
    from conveyor.messaging.limit_control import LimitControl

    admin = target.admin()
    if target.app is None:
        if queue is None:
            return LimitControl(admin.client), admin.queues_with_limits()
        admin.queue(queue)  # raises
        return LimitControl(admin.client), [queue]
    from conveyor.jobs.core import core_of

    core = core_of(target.app)
    control = LimitControl(admin.client, core.find_limits)  # the app's own client may be of another server or namespace
    if queue is None:
        return control, sorted({*admin.queues_with_limits(), *core.limits} - {*core.plain_lists})
    if queue not in core.limits and queue not in core.definitions and queue not in admin.names():
        raise QueueNotFound(f"No queue or task {queue!r}, in Redis or in the app.")
    return control, [queue]


def _named(limit: Rate | Concurrency, name: str | None) -> Rate | Concurrency:
    from dataclasses import replace

    return limit if name is None else replace(limit, name=name)


def _row(state: LimitState) -> tuple[object, ...]:
    from conveyor.messaging.declared_limits import short_limit

    declared = short_limit(state.declared) if state.declared is not None and state.overridden else ""
    return (
        state.queue,
        state.name,
        state.key or "",
        short_limit(state.limit),
        declared,
        state.used,
        state.waiting,
        state.opens_at,
    )
