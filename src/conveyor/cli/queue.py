"""`conveyor queue`: show queues, and act on whole queues."""

from __future__ import annotations

import shlex
from datetime import timedelta
from typing import TYPE_CHECKING

import click
from msgspec.structs import asdict

from conveyor.cli.command import MOST_JOBS, CommandGroup
from conveyor.cli.completion import complete_queues, complete_tasks
from conveyor.cli.filters import filter_options
from conveyor.cli.output import (
    Output,
    ProgressLine,
    clock_time,
    confirm_options,
    shortened,
    terminal_width,
)
from conveyor.cli.target import Target, redis_options
from conveyor.ids import clean, logical
from conveyor.units import iso_timestamp, quantity

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence

    from conveyor.admin.admin import Admin
    from conveyor.admin.job_query import JobQuery
    from conveyor.admin.views import FailureGroup, FailureSummary, QueueInfo
    from conveyor.admin.worker_control import Slots
    from conveyor.jobs.why import QueueCause

_HEADINGS = ("queue", "ready", "scheduled", "waiting", "leased", "dead", "workers", "oldest", "state")
_GAUGE = 10
"""Letters of a gauge."""
MOST_DEAD_LETTERS = 10_000
"""Dead letters that are read of a queue, the newest, so that a command stays quick."""
_NAME = click.argument("name", metavar="QUEUE", shell_complete=complete_queues)


def print_queues(out: Output, queues: Sequence[QueueInfo]) -> None:
    """
    Print queues as a table.

    The column of partitions comes last, and only where a queue has several.
    """
    partitioned = any(info.partitions > 1 for info in queues)
    headings = (*_HEADINGS, "partitions") if partitioned else _HEADINGS
    out.table(headings, [_row(info)[: len(headings)] for info in queues], narrow="queue")


def print_causes(out: Output, causes: Mapping[str, Sequence[QueueCause]]) -> None:
    """Print why jobs of queues wait, a line for each cause; the name of a queue, where one is given, comes first."""
    out.line("")
    out.line("Why jobs wait:")
    for name, found in causes.items():
        for cause in found:
            out.line(f"  {clean(name)}{': ' if name else ''}{cause}")


def _queue_pairs(info: QueueInfo) -> list[tuple[str, object]]:
    """Return what a queue holds."""
    return [
        ("queue", info.name),
        ("ready", info.ready),
        ("scheduled", info.scheduled),
        ("waiting", info.waiting),
        ("leased", info.leased),
        ("dead", info.dead),
        ("oldest", None if info.oldest_age is None else timedelta(seconds=info.oldest_age)),
        ("paused", info.paused),
        ("max_length", info.max_length),
        ("blocked", info.blocked),
        ("dropped", info.dropped),
        ("outbox", info.outbox),
        ("unplaced", info.unplaced),
        ("workers", info.workers),
    ]


def _slot_pairs(out: Output, slots: Slots, *, exact: bool) -> list[tuple[str, object]]:
    """Return the slots of the workers that serve a queue, as a gauge on a terminal."""
    if not out.on_terminal:
        return [("slots", slots.total), ("slots_used", slots.used)]
    if not slots.total:
        return []
    full = round(_GAUGE * slots.used / slots.total)
    return [("slots", f"{'█' * full}{'░' * (_GAUGE - full)} {'' if exact else 'at least '}{slots}")]


def say_unanswered(out: Output, admin: Admin) -> None:
    """Say on stderr which queues and partitions were left out because their server does not answer."""
    if admin.unanswered:
        names = sorted(admin.unanswered)
        out.say(
            f"{clean(', '.join(names))}: not read, because {'their' if names[1:] else 'its'} server does not answer."
        )


def _row(info: QueueInfo) -> tuple[object, ...]:
    oldest = None if info.oldest_age is None else timedelta(seconds=info.oldest_age)
    words = ["paused"] * info.paused + ["stranded"] * (info.stranded and not info.paused)
    numbers = {"outbox": info.outbox, "unplaced": info.unplaced}
    words += [f"{what} {number:,}" for what, number in numbers.items() if number]
    state = ", ".join([*words, *["not all counted"] * bool(info.unanswered)])
    counts = (info.ready, info.scheduled, info.waiting, info.leased, info.dead, info.workers)
    return (info.name, *counts, oldest, state, info.partitions)


def print_failures(out: Output, summary: FailureSummary, *, most: int, queues: bool) -> None:
    """
    Print groups of dead letters on a terminal, the *most* largest: how many, error, task, first and last seen, message.

    *queues*: each names its queue.
    """
    if not summary.total:
        return
    groups = summary.groups[:most]
    counts = [f"{group.count:,}x" for group in groups]
    whats = [_failure_name(group) for group in groups]
    whens = [f"first {clock_time(group.first)}  last {clock_time(group.last)}" for group in groups]
    homes = [f"  in {group.queue}" if queues else "" for group in groups]
    width = max(map(len, counts)) + 2
    widest = max(map(len, whats))
    out.line("")
    out.line(f"{quantity(summary.total, 'dead letter')}:")
    for group, count, what, when, home in zip(groups, counts, whats, whens, homes, strict=True):
        room = max(12, min(widest, terminal_width() - width - 4 - len(when + home)))
        out.line(f"{count.rjust(width)}  {click.style(shortened(what, room).ljust(room), fg='red')}  {when}{home}")
        if group.message:
            indent, sample = width + 2, "" if group.message == group.pattern else "e.g. "
            out.line(f"{' ' * indent}{shortened(clean(sample + group.message), terminal_width() - indent)}")
    if len(summary.groups) > most:
        rest = summary.groups[most:]
        count = quantity(sum(group.count for group in rest), "dead letter")
        out.line(f"{' ' * (width + 2)}… and {count} with {len(rest)} other errors")
    say_unread(out, summary)


def say_unread(out: Output, summary: FailureSummary) -> None:
    """Say on stderr that dead letters were left out, and which command reads all."""
    if summary.read < summary.total:
        out.say(f"Read: the newest {summary.read:,} of {summary.total:,}. All: conveyor queue show QUEUE --all")


def _failure_name(group: FailureGroup) -> str:
    """Return the class of an error, without its module, and the task."""
    kind = clean(group.type.rpartition(".")[2] or "no error")
    return f"{kind} in {clean(group.task)}" if group.task else kind


@click.group(cls=CommandGroup)
def queue() -> None:
    """List, pause, purge, redrive and delete queues."""


@queue.command("list", example="conveyor queue list")
@redis_options
def list_(target: Target, out: Output) -> None:
    """List all queues with their counts."""
    admin = target.admin()
    queues = admin.queues()
    if out.as_json:
        out.document("queues", queues=queues)
    elif queues:
        print_queues(out, queues)
    else:
        out.say("There are no queues yet.")
    say_unanswered(out, admin)


@queue.command(example="conveyor queue show mail")
@_NAME
@click.option("--all", "whole", is_flag=True, help="Read all dead letters, not only the newest 10,000.")
@filter_options
@redis_options
def show(target: Target, out: Output, name: str, whole: bool, query: JobQuery | None) -> None:
    """
    Show one queue, or one partition (orders/3), its workers, and its dead letters by what failed.

    With options that choose jobs: count these alone, by state.
    """
    admin = target.admin()
    if query is not None:
        _show_counts(out, admin, name, query)
        return
    info, found, partitions = admin.queue(name), admin.queue_workers(name), admin.partitions(name)
    workers, slots = found.registrations, found.slots
    failures = admin.failures(name, most=None if whole else MOST_DEAD_LETTERS)
    causes = admin.causes(name, info.ready + info.waiting)
    if out.as_json:
        causes_told = [{**asdict(cause), "sentence": str(cause)} for cause in causes]
        told = {**slots._asdict(), "exact": found.exact}
        out.document(
            "queue",
            queue=info,
            workers=workers,
            slots=told,
            partitions=partitions,
            failures=failures,
            causes=causes_told,
        )
        return
    say_unanswered(out, admin)
    pairs = [*_queue_pairs(info), *_slot_pairs(out, slots, exact=found.exact), ("partitions", info.partitions)]
    if not out.on_terminal:
        pairs += [*((f"why.{number}", str(one)) for number, one in enumerate(causes, 1)), *_failure_pairs(failures)]
    out.pairs(pairs)
    if causes and out.on_terminal:
        print_causes(out, {"": causes})
    if partitions and out.on_terminal:
        out.line("")
        print_queues(out, partitions)
    if workers and out.on_terminal:
        out.line("")
        rows = [(worker.id, worker.host, str(worker.pid or ""), worker.held, worker.lease_ends) for worker in workers]
        out.table(("worker", "host", "pid", "holds", "lease ends"), rows)
    if not out.on_terminal:
        say_unread(out, failures)
    else:
        print_failures(out, failures, most=10, queues=False)
        if failures.groups:
            out.line("")
            out.line("Put the first back:")
            out.line(click.style(f"    {_redrive_command(name, failures.groups)}", dim=True))


def _show_counts(out: Output, admin: Admin, name: str, query: JobQuery) -> None:
    admin.queue(name)  # an unknown name is an error
    from conveyor.store.job_filter import LIVE

    counts = dict.fromkeys(map(str, LIVE), 0) | admin.count_matching(query.joined(name)).states
    say_unanswered(out, admin)
    if out.as_json:
        out.document("queue-counts", queue=name, counts=counts)
    else:
        out.pairs([("queue", name), *counts.items()])


def _failure_pairs(failures: FailureSummary) -> Iterator[tuple[str, object]]:
    for number, group in enumerate(failures.groups, 1):
        seen = f"first {iso_timestamp(group.first)} last {iso_timestamp(group.last)}"
        what = f"{group.type or 'no error'} in {group.task}" if group.task else group.type or "no error"
        yield f"failure.{number}", f"{group.count}x {what} {seen}: {group.pattern}"


def _redrive_command(name: str, groups: Sequence[FailureGroup]) -> str:
    """
    Return the command that puts the first of *groups* back, quoted for a shell.

    The start of its message is named too where another group has the same error and task.
    """
    group = groups[0]
    error, start = group.type.rpartition(".")[2], group.pattern.partition("…")[0].rstrip()
    if start and any((one.type, one.task) == (group.type, group.task) for one in groups[1:]):
        error += f": {start}"
    words = ["conveyor", "queue", "redrive", logical(name)]
    words += ["--error", error] if group.type else []
    words += ["--task", group.task] if group.task else []
    return clean(shlex.join(words))


_OPTIONAL_NAME = click.argument("name", metavar="[QUEUE]", required=False, shell_complete=complete_queues)
_TASK = click.option(
    "--task", metavar="TASK", shell_complete=complete_tasks, help="Only jobs of this task; without QUEUE in all queues."
)
_EVERY = click.option("--all", "every", is_flag=True, help="All queues that exist.")
_GROUP = click.option("--group", metavar="KEY", help="Only jobs of this group of QUEUE, or of this key of a limit.")


@queue.command(example="conveyor queue pause mail")
@_OPTIONAL_NAME
@_TASK
@_GROUP
@_EVERY
@redis_options
def pause(
    target: Target, out: Output, name: str | None, task: str | None, group: str | None, every: bool
) -> None:  # fmt: skip
    """
    Stop workers from taking jobs of a queue, of all queues, of a task or of a group; pushing still works.

    Jobs that workers have leased already are not affected.
    """
    _pause(target, out, name, task, group, every=every, paused=True)


@queue.command(example="conveyor queue resume mail")
@_OPTIONAL_NAME
@_TASK
@_GROUP
@_EVERY
@redis_options
def resume(
    target: Target, out: Output, name: str | None, task: str | None, group: str | None, every: bool
) -> None:  # fmt: skip
    """Resume a paused queue, task or group, or all queues: its jobs go first, in their order."""
    _pause(target, out, name, task, group, every=every, paused=False)


def _pause(
    target: Target, out: Output, name: str | None, task: str | None, group: str | None, *, every: bool, paused: bool
) -> None:
    if every and (name, task, group) != (None, None, None):
        raise click.UsageError("--all means all queues: it goes without QUEUE, --task and --group.")
    if name is None and task is None and not every:
        raise click.UsageError("Name a queue, or a task: --task NAME. All queues: --all.")
    if group is not None and (name is None or task is not None):
        raise click.UsageError("--group goes with a QUEUE, and without --task.")
    admin = target.admin()
    if group is not None:
        assert name is not None
        _pause_group(admin, out, name, group, paused=paused)
        return
    if task is None:
        queues = (admin.pause if paused else admin.resume)(name)
        _print_paused(out, name, queues, paused=paused)
        return
    queues = (admin.pause_task if paused else admin.resume_task)(task, name)
    if out.as_json:
        out.document("task-paused", task=task, queues=queues, paused=paused)
    else:
        where = f"in {', '.join(queues)}" if queues else "in no queue: there are none yet"
        out.say(f"{clean(task)} is {'paused' if paused else 'resumed'} {clean(where)}.")


def _pause_group(admin: Admin, out: Output, name: str, group: str, *, paused: bool) -> None:
    from conveyor.messaging.limit_control import GroupControl

    admin.queue(name)  # an unknown name is an error
    GroupControl(admin.client).set(name, group, paused=paused)
    word = "paused" if paused else "resumed"
    admin.note("set group", name, detail=f"{group} {word}")
    if out.as_json:
        out.document("group-paused", queue=name, group=group, paused=paused)
    else:
        out.say(f"Group {clean(group)} of {clean(name)} is {word}.")


@queue.command(example="conveyor queue purge mail --dead")
@_NAME
@click.option("--dead", is_flag=True, help="Remove the dead letters instead.")
@confirm_options
@redis_options
def purge(target: Target, out: Output, name: str, dead: bool, yes: bool, dry_run: bool) -> None:
    """Remove all jobs that are not leased."""
    admin = target.admin()
    info = admin.queue(name)
    available = info.dead if dead else info.ready + info.waiting + info.scheduled
    what = quantity(available, "dead letter" if dead else "job")
    removed = 0
    if available and out.confirm(f"Remove {what} from {name} permanently?", yes=yes, dry_run=dry_run):
        removed = admin.purge(name, dead=dead)
    elif not available:
        out.say(f"There is nothing to remove in {name}.")
    _print_count(out, "purge", name, "removed", available if dry_run else removed, dry_run=dry_run)


@queue.command(example="conveyor queue redrive mail --error TimeoutError --rate 100/s")
@_NAME
@click.option("--limit", type=click.IntRange(1, MOST_JOBS), help="At most so many, the oldest.")
@click.option("--rate", metavar="N/s", help="No faster than this, evenly: 100/s, 5/m.")
@filter_options
@confirm_options
@redis_options
def redrive(
    target: Target, out: Output, name: str, limit: int | None, rate: str | None, query: JobQuery | None, yes: bool,
    dry_run: bool,
) -> None:  # fmt: skip
    """
    Put dead letters back, oldest first: all, or those that the options choose.

    They get a new budget of attempts. What is interrupted has put back what it has put back; the same command goes on.
    """
    from conveyor.admin.job_query import JobQuery
    from conveyor.messaging.selection import Pace

    Pace(rate)  # a wrong one is refused before anybody is asked
    admin = target.admin()
    available = admin.queue(name).dead
    chooses_all, query = query is None, (query or JobQuery()).joined(name, "dead")
    found = available if chooses_all else admin.count_matching(query).count
    chosen = found if limit is None else min(limit, found)
    moved = 0
    if chosen and out.confirm(f"Put {quantity(chosen, 'dead letter')} back into {name}?", yes=yes, dry_run=dry_run):
        if chooses_all and rate is None:
            moved = admin.redrive(name, limit=limit)
        else:
            progress = ProgressLine(out, "put back", chosen)
            try:
                with progress:
                    for results in admin.act_on_matching("redrive", query, limit=limit, rate=rate):
                        progress.add(sum(one.done for one in results))
            finally:  # what was put back when it was interrupted stays
                admin.note("redrive", name, chosen_by=query.text, count=progress.count)
            moved = progress.count
    elif not chosen:
        out.say(f"{name} has no dead letters." if not available else "No dead letters match.")
    _print_count(out, "redrive", name, "redriven", chosen if dry_run else moved, dry_run=dry_run)


@queue.command(example="conveyor queue repair mail")
@_NAME
@redis_options
def repair(target: Target, out: Output, name: str) -> None:
    """
    Put jobs back that have a record and are neither ready, scheduled, leased nor dead.

    `doctor` reports such jobs. Workers may keep running meanwhile. A start is counted for each job, since it may have begun.
    """
    admin = target.admin()
    admin.queue(name)  # an unknown name is an error
    repaired = admin.repair(name)
    if not repaired and out.on_terminal and not out.as_json:
        out.say(f"Every job of {name} is in its place.")
    _print_count(out, "repair", name, "repaired", repaired, dry_run=False)


@queue.command(example="conveyor queue release mail --build 2026-05-01")
@_NAME
@click.option("--build", required=True, metavar="BUILD", help="The build that the jobs are pinned to.")
@redis_options
def release(target: Target, out: Output, name: str, build: str) -> None:
    """Release the jobs that are pinned to a build (@app.task(pin="build")): any worker runs them then."""
    admin = target.admin()
    admin.queue(name)  # an unknown name is an error
    released = admin.release_build(name, build)
    if not released and out.on_terminal and not out.as_json:
        out.say(f"No job of {name} is pinned to build {build}.")
    _print_count(out, "release", name, "released", released, dry_run=False)


@queue.command(example="conveyor queue delete mail")
@_NAME
@confirm_options
@redis_options
def delete(target: Target, out: Output, name: str, yes: bool, dry_run: bool) -> None:
    """
    Delete a queue that holds nothing.

    Refused while it holds anything, dead letters included, and while workers or consumers serve it. The results of its
    ended jobs are deleted too. A job that is enqueued later begins the queue anew.
    """
    admin = target.admin()
    admin.refuse_in_use(name)
    question = f"{name} is empty. Delete it permanently, with the results of its ended jobs?"
    deleted = out.confirm(question, yes=yes, dry_run=dry_run)
    if deleted:
        admin.delete_queue(name)
    if out.as_json:
        out.document("queue-deleted", queue=name, deleted=deleted, dry_run=dry_run)
    elif deleted:
        out.say(f"{name} is deleted.")


@queue.command("partition", example="conveyor queue partition orders 4")
@_NAME
@click.argument("partitions", type=click.IntRange(1, 256), metavar="N")
@confirm_options
@redis_options
def partition(target: Target, out: Output, name: str, partitions: int, yes: bool, dry_run: bool) -> None:
    """
    Change the number of partitions of an empty queue to N.

    Refused while the queue holds anything, dead letters included. From then on, programs that declare another number are
    refused, running workers included: restart them with the new number.
    """
    admin = target.admin()
    before = admin.queue(name).partitions
    admin.refuse_full(name)
    after = before
    # Also when it has N already: that completes a change which was interrupted.
    question = f"{name} is empty and has {quantity(before, 'partition')}. Change that to {partitions}?"
    if out.confirm(question, yes=yes, dry_run=dry_run):
        admin.repartition(name, partitions)
        after = partitions
    if out.as_json:
        out.document("queue-partitioned", queue=name, before=before, partitions=after, dry_run=dry_run)
    elif not dry_run and after != before:
        out.say(f"{name} has {quantity(after, 'partition')} now. Restart its programs with partitions={after}.")
    elif after == before == partitions and not dry_run:
        out.say(f"{name} has {quantity(after, 'partition')} already.")


def _print_paused(out: Output, name: str | None, queues: Sequence[str], *, paused: bool) -> None:
    if out.as_json:
        out.document("queue-paused", queue=name, queues=queues, paused=paused)
    elif name is None:
        verb = "is" if len(queues) == 1 else "are"
        rest = "paused: workers take nothing more from them." if paused else "resumed."
        out.say(f"{quantity(len(queues), 'queue')} {verb} {rest}")
    else:
        out.say(f"{name} is paused: workers take nothing more from it." if paused else f"{name} is resumed.")


def _print_count(out: Output, schema: str, name: str, word: str, number: int, *, dry_run: bool) -> None:
    if out.as_json:
        out.document(schema, queue=name, dry_run=dry_run, **{word: number})
    elif not out.on_terminal:
        out.line(str(number))
    elif not dry_run and number:
        out.line(f"{quantity(number, 'job')} {word}.")
