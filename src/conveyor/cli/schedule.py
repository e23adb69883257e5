"""`conveyor schedule`: show schedules, and act on one."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import click

from conveyor.cli.command import CommandGroup
from conveyor.cli.completion import complete_schedules
from conveyor.cli.output import Output, confirm_options, short_time
from conveyor.cli.target import Target, redis_options
from conveyor.units import iso_timestamp, quantity

if TYPE_CHECKING:
    from conveyor.jobs.schedules import Schedules

_NAME = click.argument("name", metavar="NAME", shell_complete=complete_schedules)


@click.group(cls=CommandGroup)
def schedule() -> None:
    """List, show, run, pause and delete schedules."""


@schedule.command("list", example="conveyor schedule list")
@redis_options
def list_(target: Target, out: Output) -> None:
    """List all schedules: when each is due, what it enqueues, and its last instant."""
    from conveyor.admin.views import schedule_view

    found = schedules_of(target).list()
    if out.as_json:
        out.document("schedules", schedules=[schedule_view(one) for one in found])
        return
    rows = []
    for one in found:
        due = "paused" if one.paused else "over" if one.due is None else _when(out, one.due)
        last = next(iter(one.runs()), None)
        rows.append(
            (one.name, one.when, one.task, due, "" if last is None else f"{last.outcome} {_when(out, last.instant)}")
        )
    if rows:
        out.table(("schedule", "when", "task", "next", "last"), rows, narrow="when")
    else:
        out.say("There are no schedules. Put one with app.schedules.put(…) or @app.cron(…).")


@schedule.command(example="conveyor schedule show report")
@_NAME
@redis_options
def show(target: Target, out: Output, name: str) -> None:
    """Show a schedule, its next instants, and what became of the last."""
    from conveyor.admin.views import schedule_view

    one = schedules_of(target).get(name)
    if out.as_json:
        out.document("schedule", schedule=schedule_view(one))
        return
    out.pairs(
        [
            ("schedule", one.name), ("when", one.when), ("task", one.task), ("queue", one.queue), ("origin", one.origin),
            ("state", "paused" if one.paused else "over" if one.due is None else "active"), ("overlap", one.overlap),
            ("missed", one.missed), ("fired", one.fired), ("skipped", one.skipped),
            *((f"next.{n}", _when(out, at)) for n, at in enumerate(one.next(5), 1)),
        ]
    )  # fmt: skip
    if runs := one.runs():
        out.line("")
        rows = [
            (
                iso_timestamp(run.instant), run.outcome if run.job else f"skipped: {run.outcome}", run.job or run.skipped,
                run.drift,
            )
            for run in runs
        ]  # fmt: skip
        out.table(("instant", "outcome", "job, or how many", "drift"), rows)


@schedule.command("next", example="conveyor schedule next report -n 20")
@_NAME
@click.option("-n", "--count", type=click.IntRange(1, 1000), default=5, show_default=True, help="How many.")
@redis_options
def next_(target: Target, out: Output, name: str, count: int) -> None:
    """Print the next instants of a schedule."""
    one = schedules_of(target).get(name)
    instants = one.next(count)
    if out.as_json:
        out.document("schedule-next", schedule=name, next=instants)
        return
    for at in instants:
        out.line(at.isoformat())
    if not instants:
        out.say(f"{name} is paused." if one.paused else f"{name} is over: no instant comes any more.")


@schedule.command(example="conveyor schedule run report")
@_NAME
@redis_options
def run(target: Target, out: Output, name: str) -> None:
    """Enqueue a job of a schedule now, beside its instants; print its id."""
    owner = schedules_of(target)
    job = owner.get(name).run()
    target.note("run schedule", name, detail=job.id)
    if out.as_json:
        out.document("enqueued", id=job.id, schedule=name)
    else:
        out.line(job.id)


@schedule.command(example="conveyor schedule pause report")
@_NAME
@redis_options
def pause(target: Target, out: Output, name: str) -> None:
    """Let a schedule stand still until it is resumed."""
    owner = schedules_of(target)
    owner.get(name).pause()
    target.note("pause schedule", name)
    _changed(
        out, name, "paused", f"{name} is paused: its instants are skipped until `conveyor schedule resume {name}`."
    )


@schedule.command(example="conveyor schedule resume report")
@_NAME
@redis_options
def resume(target: Target, out: Output, name: str) -> None:
    """Let a schedule go on with its next instant."""
    owner = schedules_of(target)
    owner.get(name).resume()
    target.note("resume schedule", name)
    due = owner.get(name).due
    _changed(out, name, "resumed", f"{name} goes on{'' if due is None else f' {short_time(due)}'}.")


@schedule.command(example="conveyor schedule delete report")
@_NAME
@confirm_options
@redis_options
def delete(target: Target, out: Output, name: str, yes: bool, dry_run: bool) -> None:
    """Remove a schedule. Jobs that it has enqueued stay; a decorator puts it again when a worker starts."""
    owner = schedules_of(target)
    one = owner.get(name)
    question = f"Delete schedule {name} ({one.when}), which has run {quantity(one.fired, 'time')}?"
    deleted = out.confirm(question, yes=yes, dry_run=dry_run)
    if deleted:
        owner.delete(name)
        target.note("delete schedule", name)
    if out.as_json:
        out.document("schedule-deleted", schedule=name, deleted=deleted, dry_run=dry_run)
    elif deleted:
        out.say(f"{name} is deleted.")


def schedules_of(target: Target) -> Schedules:
    """Return the schedules of the namespace that a command is about; of an app its keys open sealed ones."""
    from conveyor.jobs.schedules import Schedules

    return Schedules(target.core())


def _changed(out: Output, name: str, what: str, text: str) -> None:
    if out.as_json:
        out.document(f"schedule-{what}", schedule=name)
    else:
        out.say(text)


def _when(out: Output, at: Any) -> str:
    """Return an instant: with its distance on a terminal, ISO 8601 in UTC elsewhere."""
    return f"{at:%Y-%m-%d %H:%M:%S} ({short_time(at)})" if out.on_terminal else iso_timestamp(at)
