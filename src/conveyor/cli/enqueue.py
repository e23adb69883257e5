"""`conveyor enqueue`: enqueue a job, and wait for its result if asked."""

from __future__ import annotations

import json
from collections.abc import Sequence
from difflib import get_close_matches
from typing import TYPE_CHECKING, Any

import click

from conveyor.cli.command import LeafCommand
from conveyor.cli.completion import complete_queues, complete_tasks
from conveyor.cli.output import Output, machine_text, parse_instant, parse_seconds
from conveyor.cli.target import Target, redis_options
from conveyor.errors import ConfigurationError, JobFailed, PayloadError, UnknownTask

if TYPE_CHECKING:
    from conveyor.payload.signature import TaskSignature

SAY_AFTER = 5.0
"""Seconds of waiting for a result after which a line says what the job waits for."""


@click.command(cls=LeafCommand, example="conveyor enqueue mail.send user=7 --wait --timeout 5s")
@click.argument("task", metavar="TASK", shell_complete=complete_tasks)
@click.argument("pairs", nargs=-1, metavar="[K=V]...")
@click.option("--args", "document", metavar="JSON", help="Arguments as JSON: a list by position, an object by name.")
@click.option("--in", "delay", metavar="10m", help="Start it after this delay.")
@click.option("--at", metavar="ISO", help="Start it at this time: 2026-05-01T09:00+02:00.")
@click.option("--queue", metavar="QUEUE", shell_complete=complete_queues, help="Use this queue instead of the task's.")
@click.option("--priority", type=click.IntRange(0, 9), help="0 to 9, higher goes first.")
@click.option("--id", "own_id", metavar="ID", help="Your own id: enqueuing it again stores nothing.")
@click.option("--tag", "tags", multiple=True, metavar="TAG", help="A word by which it is found; may be repeated.")
@click.option("--wait", is_flag=True, help="Wait for the result and print it as JSON.")
@click.option("--timeout", metavar="5s", help="With --wait: exit 124 when it takes longer.")
@redis_options
def enqueue(
    target: Target, out: Output, task: str, pairs: tuple[str, ...], document: str | None, delay: str | None,
    at: str | None, queue: str | None, priority: int | None, own_id: str | None, tags: tuple[str, ...], wait: bool,
    timeout: str | None,
) -> None:  # fmt: skip
    """
    Enqueue a job and print its id.

    Values of K=V are converted by the annotations of the task, so the app is needed: --app, CONVEYOR_APP, or
    [tool.conveyor] app in pyproject.toml. TASK is the name of a task, or its last part where that is unique.
    """
    if timeout is not None and not wait:
        raise click.UsageError("--timeout goes with --wait.")
    if delay is not None and at is not None:
        raise click.UsageError("--in and --at both say when: give one of them.")
    from conveyor.jobs.task import definition_of

    seconds = None if timeout is None else parse_seconds(timeout, name="--timeout")
    _, app = target.load_app()
    chosen = _find_task(app, task)
    args, kwargs = parse_arguments(definition_of(chosen).signature, pairs, document)
    delay_seconds = None if delay is None else parse_seconds(delay, name="--in")
    bound = chosen.options(
        delay=delay_seconds, at=parse_instant(at), queue=queue, priority=priority, id=own_id, tags=tags
    )
    job = bound.enqueue(*args, **kwargs)
    target.note("enqueue", job.id, detail=chosen.name, quiet=True)
    if not wait:
        if out.as_json:
            out.document("enqueued", id=job.id, task=chosen.name)
        else:
            out.line(job.id)
        return
    out.say(job.id)
    text = _wait_for_result(out, job, seconds)
    if out.as_json:
        out.document("result", id=job.id, task=chosen.name, result=json.loads(text))
    else:
        out.line(text)


def _wait_for_result(out: Output, job: Any, seconds: float | None) -> str:
    from conveyor.payload.formats import value_text

    try:
        if seconds is None or seconds > SAY_AFTER:
            try:
                return value_text(job.result(timeout=SAY_AFTER, bar=True))
            except TimeoutError as error:
                text = str(error).replace(" and was not cancelled: ask again later", "")
                out.say(f"Still waiting; ctrl-C ends only this. {text}")
                seconds = None if seconds is None else seconds - SAY_AFTER
        return value_text(job.result(timeout=seconds, bar=True))
    except JobFailed as error:
        if error.traceback:
            for line in error.traceback.rstrip().split("\n"):
                out.say(machine_text(line))
        raise


def _find_task(app: Any, name: str) -> Any:
    """Return the task with this name, or the only one whose name ends with it."""
    if name in app.tasks:
        return app.tasks[name]
    matches = {task.name: task for known, task in app.tasks.items() if known.endswith(f".{name}")}
    if len(matches) == 1:
        return next(iter(matches.values()))
    if matches:
        raise ConfigurationError(f"Several tasks are named {name!r}: {', '.join(sorted(matches))}. Give the full name.")
    close = get_close_matches(name, [*app.tasks, *(known.rpartition(".")[2] for known in app.tasks)], 1)
    if not app.tasks:
        raise UnknownTask(f"There is no task {name!r}: the app has none.")
    known = ", ".join(sorted(app.tasks)[:10]) + (", …" if len(app.tasks) > 10 else "")
    advice = f" Did you mean {close[0]!r}?" if close else ""
    raise UnknownTask(f"There is no task {name!r}.{advice}\nKnown: {known}. Nothing was enqueued.")


def parse_arguments(
    signature: TaskSignature, pairs: tuple[str, ...], document: str | None
) -> tuple[Sequence[Any], dict[str, Any]]:
    """Return the arguments by position and by name that a command line gives; raises PayloadError."""
    args: Sequence[Any] = []
    kwargs: dict[str, Any] = {}
    if document is not None:
        try:
            value = json.loads(document)
        except (ValueError, RecursionError) as error:
            raise PayloadError(f"--args is not JSON: {error}. Nothing was enqueued.") from error
        if isinstance(value, list):
            args = value
        elif isinstance(value, dict):
            kwargs = value
        else:
            raise PayloadError("--args takes a list or an object. Nothing was enqueued.")
        if signature.formats.writes is not None:
            args, kwargs = signature.from_json(args, kwargs)
    for pair in pairs:
        name, equals, text = pair.partition("=")
        if not equals or not name:
            raise PayloadError(
                f"Arguments are written name=value, not {pair!r}:  {signature.describe()}\n"
                "Arguments by position:  --args '[1, 2]'. Nothing was enqueued."
            )
        if name in kwargs:
            raise PayloadError(f"Argument {name!r} is given twice. Nothing was enqueued.")
        kwargs[name] = signature.convert_text(name, text)
    return args, kwargs
