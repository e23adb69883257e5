"""`conveyor job`: list single jobs, and act on them."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING

import click

from conveyor.cli.command import CommandGroup
from conveyor.cli.completion import complete_queues, complete_tasks
from conveyor.cli.exit import ExitCode
from conveyor.cli.output import Output, confirm_options, machine_text, quantity
from conveyor.cli.queue import say_unanswered
from conveyor.cli.target import Target, redis_options
from conveyor.units import span

if TYPE_CHECKING:
    from datetime import datetime

    from conveyor.admin.admin import Admin
    from conveyor.admin.views import ActionResult, JobInfo

STATES = ("leased", "ready", "scheduled", "dead", "done")
SHOWN = 50
"""Jobs that a terminal shows unless another number is asked for."""
HEADINGS = ("id", "queue", "task", "state", "attempt", "when", "about")


@click.group(cls=CommandGroup)
def job() -> None:
    """List, show, retry, cancel and delete jobs and messages."""


@job.command("list")
@click.option("--queue", "queue", metavar="QUEUE", shell_complete=complete_queues, help="Only jobs of this queue.")
@click.option(
    "--state", type=click.Choice(STATES), help="Only jobs in this state.  [default: all that have not ended, and dead ones]"
)  # fmt: skip
@click.option("--task", metavar="TASK", shell_complete=complete_tasks, help="Only jobs of this task.")
@click.option("--limit", type=click.IntRange(min=1), help="At most so many.  [default: 50 on a terminal, else all]")
@click.option("--offset", type=click.IntRange(min=0), default=0, help="Skip so many first.")
@click.option("-q", "--ids", "ids_only", is_flag=True, help="Print ids only.")
@redis_options
def list_(
    target: Target, out: Output, queue: str | None, state: str | None, task: str | None, limit: int | None, offset: int,
    ids_only: bool,
) -> None:  # fmt: skip
    """
    List jobs, in the order in which they are leased.

    Dead and done ones come newest first.
    """
    admin = target.admin()
    if out.on_terminal and not out.as_json:
        _show_page(out, admin, queue, state, task, offset, limit or SHOWN, ids_only)
        say_unanswered(out, admin)
        return
    jobs = admin.each_job(queue, state, task=task, offset=offset, limit=limit)
    if out.as_json:
        out.document("jobs", jobs=list(jobs))
        say_unanswered(out, admin)
        return
    for info in jobs:
        out.line(info.id if ids_only else "\t".join(map(machine_text, _row(info))))
    say_unanswered(out, admin)


def _show_page(
    out: Output, admin: Admin, queue: str | None, state: str | None, task: str | None, offset: int, limit: int,
    ids_only: bool,
) -> None:  # fmt: skip
    jobs = admin.jobs(queue, state, task=task, offset=offset, limit=limit + 1)  # one more tells if that is all
    more, jobs = len(jobs) > limit, jobs[:limit]
    if ids_only:
        for info in jobs:
            out.line(info.id)
    elif jobs:
        out.table(HEADINGS, [_row(info) for info in jobs])
    else:
        out.say("No jobs match.")
    if more:
        of = "" if task else f" of {admin.count_jobs(queue, state):,}"
        out.say(f"Showing {limit}{of}. More: --limit {2 * limit}, or --offset {offset + limit}")


@job.command()
@click.argument("id_", metavar="ID")
@redis_options
def show(target: Target, out: Output, id_: str) -> None:
    """
    Show everything about a job.

    Its payload, errors with tracebacks, and result.
    """
    info = target.admin().job(id_)
    if out.as_json:
        out.document("job", job=info)
        return
    out.pairs(
        [
            ("id", info.id),
            ("queue", info.queue),
            ("task", info.task),
            ("state", info.status),
            ("reason", info.reason),
            ("attempt", info.attempt),
            ("failures", info.failures),
            ("crashes", info.crashes),
            ("priority", info.priority),
            ("enqueued", info.enqueued),
            ("due", info.due),
            ("expires", info.expires),
            ("ended", info.ended),
            ("ran_ms", info.ran_ms),
            ("unique", info.unique),
            ("worker", info.worker),
            ("headers", ", ".join(f"{key}={value}" for key, value in info.headers.items())),
            ("payload", info.payload),
            ("result", info.result),
            *((f"error.{error.attempt}", f"{error.type}: {error.message}") for error in info.errors),
        ]
    )
    if info.errors and info.errors[-1].traceback and out.on_terminal:
        out.line("")
        for line in info.errors[-1].traceback.rstrip().split("\n"):
            out.line(f"  {machine_text(line)}")


@job.command()
@click.argument("ids", nargs=-1, required=True, metavar="ID... | -")
@redis_options
def retry(target: Target, out: Output, ids: tuple[str, ...]) -> int:
    """
    Make dead and scheduled jobs ready now.

    Dead ones get a new budget of attempts.
    """
    return _print_results(out, "retry", target.admin().retry(_read_ids(ids)))


@job.command()
@click.argument("ids", nargs=-1, required=True, metavar="ID... | -")
@confirm_options
@redis_options
def cancel(target: Target, out: Output, ids: tuple[str, ...], yes: bool, dry_run: bool) -> int:
    """
    Cancel jobs that have not ended.

    A running job is stopped by its worker.
    """
    chosen = _read_ids(ids)
    needs_confirmation = len(chosen) > 1 or dry_run
    if needs_confirmation and not out.confirm(f"Cancel {_describe_ids(chosen)}?", yes=yes, dry_run=dry_run):
        return ExitCode.OK
    return _print_results(out, "cancel", target.admin().cancel(chosen))


@job.command()
@click.argument("ids", nargs=-1, required=True, metavar="ID... | -")
@confirm_options
@redis_options
def delete(target: Target, out: Output, ids: tuple[str, ...], yes: bool, dry_run: bool) -> int:
    """Remove jobs and dead letters completely; leased ones are refused."""
    chosen = _read_ids(ids)
    if not chosen or not out.confirm(f"Delete {_describe_ids(chosen)} permanently?", yes=yes, dry_run=dry_run):
        return ExitCode.OK
    return _print_results(out, "delete", target.admin().delete(chosen))


def _row(info: JobInfo) -> tuple[object, ...]:
    when: datetime | None = info.due or info.ended or info.enqueued
    about = ""
    if info.errors:
        about = f"{info.errors[-1].type}: {info.errors[-1].message}"
    elif info.worker:
        about = f"worker {info.worker}"
    elif info.payload:
        about = info.payload[:200]
    elif info.ran_ms is not None:
        about = f"ran {span(info.ran_ms / 1000)}"
    attempt = None if info.payload is None else info.attempt  # not kept for a job that has ended
    return (info.id, info.queue, info.task or None, info.status, attempt, when, about)


def _read_ids(ids: Sequence[str]) -> list[str]:
    """Return the ids, each once; ``-`` stands for the ids on standard input."""
    read: list[str] = []
    for one in ids:
        read += (line.split("\t")[0].strip() for line in sys.stdin) if one == "-" else [one]
    return [one for one in dict.fromkeys(read) if one]


def _describe_ids(ids: Sequence[str]) -> str:
    if len(ids) == 1:
        return ids[0]
    return f"{quantity(len(ids), 'job')} ({', '.join(ids[:3])}{', …' if len(ids) > 3 else ''})"


def _print_results(out: Output, schema: str, results: Sequence[ActionResult]) -> int:
    if out.as_json:
        out.document(schema, jobs=results)
    else:
        out.table(("id", "outcome", "detail"), [(one.id, one.outcome, one.detail) for one in results])
    if any(one.outcome == "not found" for one in results):
        return ExitCode.NOT_FOUND
    return ExitCode.OK if all(one.done for one in results) else ExitCode.REFUSED
