"""`conveyor enqueue`: a job from the command line, and its result if one waits."""

from __future__ import annotations

import json
from collections.abc import Sequence
from difflib import get_close_matches
from typing import TYPE_CHECKING, Any

import click

from conveyor.cli.output import Output, machine
from conveyor.cli.output import seconds as duration
from conveyor.cli.target import Target, redis_options
from conveyor.errors import ConfigurationError, JobFailed, PayloadError, UnknownTask

if TYPE_CHECKING:
    from conveyor.payload.signature import TaskSignature


@click.command()
@click.argument("task", metavar="TASK")
@click.argument("pairs", nargs=-1, metavar="[K=V]...")
@click.option("--args", "document", metavar="JSON", help="Arguments as JSON: a list by position, an object by name.")
@click.option("--in", "delay", metavar="10m", help="Start it after this.")
@click.option("--at", metavar="ISO", help="Start it then: 2026-05-01T09:00+02:00.")
@click.option("--queue", metavar="QUEUE", help="Another queue than the task's.")
@click.option("--priority", type=click.IntRange(0, 9), help="0 to 9, higher goes first.")
@click.option("--id", "own_id", metavar="ID", help="An id of your own: enqueuing it again stores nothing.")
@click.option("--wait", is_flag=True, help="Wait for the result and print it as JSON.")
@click.option("--timeout", metavar="5s", help="With --wait: exit 124 when it takes longer.")
@redis_options
def enqueue(
    target: Target, out: Output, task: str, pairs: tuple[str, ...], document: str | None, delay: str | None,
    at: str | None, queue: str | None, priority: int | None, own_id: str | None, wait: bool, timeout: str | None,
) -> None:  # fmt: skip
    """
    Enqueue a job and print its id alone.

    Values of K=V are read by the annotations of the task, so the app is needed: --app, CONVEYOR_APP, or
    [tool.conveyor] app in pyproject.toml. TASK is a task's name, or its last part where that says enough.
    """
    if timeout is not None and not wait:
        raise click.UsageError("--timeout goes with --wait.")
    if delay is not None and at is not None:
        raise click.UsageError("--in and --at both say when: give one of them.")
    from conveyor.jobs.task import definition_of

    seconds = None if timeout is None else duration(timeout, name="--timeout")
    _, app = target.load_app()
    chosen = _task(app, task)
    args, kwargs = _arguments(definition_of(chosen).signature, pairs, document)
    later = None if delay is None else duration(delay, name="--in")
    bound = chosen.options(delay=later, at=_instant(at), queue=queue, priority=priority, id=own_id)
    job = bound.enqueue(*args, **kwargs)
    if not wait:
        if out.as_json:
            out.document("enqueued", id=job.id, task=chosen.name)
        else:
            out.line(job.id)
        return
    out.say(job.id)
    text = _result(out, job, seconds)
    if out.as_json:
        out.document("result", id=job.id, task=chosen.name, result=json.loads(text))
    else:
        out.line(text)


def _result(out: Output, job: Any, seconds: float | None) -> str:
    from conveyor.payload.formats import display

    try:
        return display(job.result(timeout=seconds))
    except TimeoutError:
        raise TimeoutError(f"Job {job.id} has not ended after {seconds:g} s. It goes on.") from None
    except JobFailed as error:
        if error.traceback:
            for line in error.traceback.rstrip().splitlines():
                out.say(machine(line))
        raise


def _task(app: Any, name: str) -> Any:
    """Return the task of that name, or the only one whose last parts are that."""
    if name in app.tasks:
        return app.tasks[name]
    found = {task.name: task for known, task in app.tasks.items() if known.endswith(f".{name}")}
    if len(found) == 1:
        return next(iter(found.values()))
    if found:
        raise ConfigurationError(f"Several tasks are named {name!r}: {', '.join(sorted(found))}. Give the whole name.")
    close = get_close_matches(name, [*app.tasks, *(known.rpartition(".")[2] for known in app.tasks)], 1)
    if not app.tasks:
        raise UnknownTask(f"There is no task {name!r}: the app has none.")
    known = ", ".join(sorted(app.tasks)[:10]) + (", …" if len(app.tasks) > 10 else "")
    advice = f" Did you mean {close[0]!r}?" if close else ""
    raise UnknownTask(f"There is no task {name!r}.{advice}\nKnown: {known}. Nothing was enqueued.")


def _arguments(
    signature: TaskSignature, pairs: tuple[str, ...], document: str | None
) -> tuple[Sequence[Any], dict[str, Any]]:
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
                "By position they go into --args '[1, 2]'. Nothing was enqueued."
            )
        if name in kwargs:
            raise PayloadError(f"Argument {name!r} is given twice. Nothing was enqueued.")
        kwargs[name] = signature.convert_text(name, text)
    return args, kwargs


def _instant(text: str | None) -> Any:
    if text is None:
        return None
    from datetime import datetime

    try:
        instant = datetime.fromisoformat(text)
    except ValueError as error:
        raise ConfigurationError(f"--at {text!r} is not an ISO 8601 instant such as 2026-05-01T09:00+02:00.") from error
    if instant.tzinfo is None:
        raise ConfigurationError(
            f"--at {text!r} has no time zone. Write it behind: 2026-05-01T09:00+02:00, or Z for UTC.", code="E18"
        )
    return instant
