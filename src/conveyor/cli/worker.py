"""`conveyor worker`: check the settings, then start the supervisor."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Mapping, Sequence
from difflib import get_close_matches
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click
from click.core import ParameterSource

from conveyor import ids
from conveyor.cli.app import task_modules
from conveyor.cli.command import MOST_JOBS, LeafCommand, SharedArgument, shared_option, verbose_option
from conveyor.cli.completion import complete_queues
from conveyor.cli.output import Output, parse_seconds
from conveyor.cli.target import Target
from conveyor.errors import ConfigurationError, StoreUnavailable
from conveyor.jobs.include import INCLUDE_VARIABLE
from conveyor.units import digits, size
from conveyor.worker.logs import FORMAT_VARIABLE, FORMATS

if TYPE_CHECKING:
    from conveyor.worker.supervision.health import Report

_WITH_WEIGHT = re.compile(r"(?P<name>.+):(?P<weight>\d+(\.\d+)?)")


@click.command(cls=LeafCommand, example="conveyor worker shop.app:app -q mail:3 -q default --processes 4")
@click.argument("app_name", cls=SharedArgument, required=False, metavar="[APP]")
@click.option("-A", "--app", "app_option", metavar="APP", help="The same as APP.")
@click.option(
    "--include", "include", multiple=True, metavar="MODULE", envvar=INCLUDE_VARIABLE,
    help="Import this module too, or those of a pattern such as 'shop.tasks.*', for its tasks; may be repeated.",
)  # fmt: skip
@click.option(
    "-q", "--queue", "queues", multiple=True, metavar="NAME[:WEIGHT]", envvar="CONVEYOR_QUEUES",
    shell_complete=complete_queues,
    help="Take jobs from this queue; may be repeated. Weight 3 gets three times the share.  [default: all of the app's]",
)  # fmt: skip
@click.option(
    "-c", "--concurrency", type=click.IntRange(1, 10_000), default=100, show_default=True,
    envvar="CONVEYOR_CONCURRENCY", help="Jobs at a time on each event loop.",
)  # fmt: skip
@click.option(
    "--threads", type=click.IntRange(1, 1000), default=8, show_default=True, envvar="CONVEYOR_THREADS",
    help="Threads of each process for plain functions.",
)  # fmt: skip
@click.option(
    "--processes", type=click.IntRange(1, 256), default=1, show_default=True, envvar="CONVEYOR_PROCESSES",
    help="Worker processes.",
)  # fmt: skip
@click.option(
    "--autoscale", metavar="LEAST..MOST", envvar="CONVEYOR_AUTOSCALE",
    help="Worker processes by the age of the oldest job, such as 2..8, instead of --processes.",
)  # fmt: skip
@click.option(
    "--max-jobs", type=click.IntRange(1, MOST_JOBS), metavar="N", envvar="CONVEYOR_MAX_JOBS",
    help="Replace a worker process by a new one after N jobs.  [default: never]",
)  # fmt: skip
@click.option(
    "--max-memory", metavar="SIZE", envvar="CONVEYOR_MAX_MEMORY",
    help="Replace a worker process that uses more memory than this, such as 500MB.  [default: never]",
)  # fmt: skip
@click.option("--burst", is_flag=True, help="Exit 0 when everything is drained.")
@click.option("--reload", is_flag=True, help="Start anew when a source file below the working directory changes.")
@click.option(
    "--grace", metavar="30s", default="30s", show_default=True, envvar="CONVEYOR_GRACE",
    help="How long running jobs may continue after a stop.",
)  # fmt: skip
@click.option(
    "--health-port", metavar="[HOST:]PORT", envvar="CONVEYOR_HEALTH_PORT",
    help="Serve /livez, /readyz, /metrics, /load and details at / on this port.  [default: none]",
)  # fmt: skip
@click.option(
    "--label", "labels", multiple=True, metavar="LABEL", envvar="CONVEYOR_LABELS",
    help="What tasks may require of a worker, such as gpu; may be repeated.",
)  # fmt: skip
@click.option(
    "--log-format", type=click.Choice(FORMATS), default=FORMATS[0], show_default=True, envvar=FORMAT_VARIABLE,
    help="The lines of the log: text for people, or JSON with the job of each line.",
)  # fmt: skip
@click.option("--allow-eviction", is_flag=True, help="Start although Redis may delete jobs when its memory is full.")
@shared_option("--url")
@shared_option("--namespace", help="Must match the app's namespace.  [env: CONVEYOR_NAMESPACE]")
@verbose_option
@click.pass_context
def worker(
    ctx: click.Context, app_name: str | None, app_option: str | None, include: tuple[str, ...], queues: tuple[str, ...],
    concurrency: int, threads: int, processes: int, max_jobs: int | None, max_memory: str | None, burst: bool, grace: str,
    allow_eviction: bool, url: str | None, namespace: str | None, health_port: str | None,
    autoscale: str | None, labels: tuple[str, ...], reload: bool, log_format: str,
) -> int:  # fmt: skip
    """
    Run the jobs of an app until it is stopped.

    APP is module:object, or a module with one app. Default: CONVEYOR_APP, or [tool.conveyor] app in pyproject.toml.
    SIGTERM and ctrl-C stop taking jobs, let running ones finish, hand back the rest and exit 0.
    """
    out = Output()
    if app_name and app_option and app_name != app_option:
        raise click.UsageError(f"APP is {app_name!r} and --app is {app_option!r}: give one of them.")
    if include:
        os.environ[INCLUDE_VARIABLE] = ",".join(include)  # for the processes of the worker too
    os.environ[FORMAT_VARIABLE] = log_format  # for the processes of the worker too
    name, app = Target(url, namespace, app_name or app_option).load_app()
    chosen = _parse_queues(queues) or _default_queues(app, name)
    _warn_of_unused_queues(out, app, chosen)
    seconds = parse_seconds(grace, name="--grace")
    if autoscale and (burst or ctx.get_parameter_source("processes") is ParameterSource.COMMANDLINE):
        raise click.UsageError(
            f"--autoscale sets the number of processes; leave out {'--burst' if burst else '--processes'}."
        )
    _check_server(out, app, list(chosen), allow_eviction=allow_eviction)
    from conveyor.worker.supervision import health, supervisor
    from conveyor.worker.supervision.autoscale import Bounds

    verbose = bool(ctx.obj and ctx.obj["verbose"])
    served = {} if reload and not queues else chosen  # what the changed code names
    return int(
        supervisor.run(
            name, queues=served, concurrency=concurrency, threads=threads, processes=processes, burst=burst,
            grace=seconds, max_jobs=max_jobs, max_memory=_parse_size(max_memory), verbose=verbose,
            health=None if health_port is None else health.bind(health_port), reports=_reports(app),
            reload=(Path.cwd(),) if reload else (), login=app.client.login,
            autoscale=None if autoscale is None else Bounds.parse(autoscale),
            labels=tuple(ids.label_text(one, "--label") for text in labels for one in text.split(",")),
        )
    )  # fmt: skip


def _reports(app: Any) -> Mapping[str, Report]:
    """Return what answers `/metrics` and `/load`; what they need is imported when they are asked, not before processes start."""

    def metrics(_: Sequence[str]) -> tuple[str, str]:
        from conveyor.admin.admin import Admin
        from conveyor.admin.metrics import CONTENT_TYPE

        return CONTENT_TYPE, Admin(app.client).metrics_text()

    def load(queues: Sequence[str]) -> tuple[str, str]:
        from conveyor.admin.admin import Admin
        from conveyor.admin.metrics import load_json

        return "application/json", json.dumps(load_json(Admin(app.client).load(queues)))

    return {"/metrics": metrics, "/load": load}


def _parse_size(given: str | None) -> int | None:
    return None if given is None else size(given if (number := digits(given)) is None else number, "--max-memory")


def _parse_queues(given: tuple[str, ...]) -> dict[str, float]:
    """
    Return queue → weight.

    A last part that is a number is a weight; names may hold colons.
    """
    from conveyor.ids import queue_name

    weights: dict[str, float] = {}
    for text in (part.strip() for one in given for part in one.split(",")):
        weighed = _WITH_WEIGHT.fullmatch(text)
        name, weight = (weighed["name"], float(weighed["weight"])) if weighed else (text, 1.0)
        if weight <= 0:
            raise ConfigurationError(f"The weight of queue {name!r} must be greater than 0, not {weight:g}.")
        weights[queue_name(name)] = weight
    return weights


def _warn_of_unused_queues(out: Output, app: Any, queues: dict[str, float]) -> None:
    """
    Warn of queues to which no task of the app goes by itself.

    A misspelt name would look as if there were no work.
    """
    own = _queues_of_tasks(app)
    for queue in sorted(queues.keys() - own) if own else ():
        similar = get_close_matches(queue, own, 1)
        guess = f" Did you mean {similar[0]!r}?" if similar else f" Its tasks go to: {', '.join(sorted(own))}."
        out.say(f"! No task of this app goes to queue {queue!r} unless options(queue=…) sends it there.{guess}")


def _queues_of_tasks(app: Any) -> set[str]:
    from conveyor.jobs.core import core_of

    lists = {queue for queue, plain_list in core_of(app).plain_lists.items() if plain_list.task}
    return {task.queue for task in app.tasks.values()} | lists


def _default_queues(app: Any, name: str) -> dict[str, float]:
    queues = _queues_of_tasks(app)
    if not queues:
        raise ConfigurationError(f"{name} has no tasks, so there is nothing to run. {_advice_on_tasks(name)}")
    return dict.fromkeys(sorted(queues), 1.0)


def _advice_on_tasks(name: str) -> str:
    module = name.partition(":")[0]
    beside = task_modules(module)
    if not beside:
        return "Define one with @app.task."
    flags = " ".join(f"--include {one}" for one in beside)
    listed = ", ".join(f'"{one}"' for one in beside)
    return (
        f"Modules here that define tasks: {', '.join(beside)}.\n"
        f"Name them in {module}:  Conveyor(include=[{listed}])\nor for now:  conveyor worker {name} {flags}"
    )


def _check_server(out: Output, app: Any, queues: list[str], *, allow_eviction: bool) -> None:
    """
    Refuse a server that may evict jobs, and queues with another number of partitions.

    A server that is away is no error: the worker waits for it.
    """
    from conveyor.admin import doctor
    from conveyor.jobs.core import core_of
    from conveyor.messaging.partitions import agree
    from conveyor.store.transport import eviction

    try:
        policy, evicted = doctor.eviction_policy(app.client)
        for queue in queues:
            agree(app.client, queue, core_of(app).partitioned.get(queue))
    except StoreUnavailable:
        return  # the supervisor says so, with the time, and when it answers
    if not policy:
        out.say(f"! {eviction.UNKNOWN}: see `conveyor doctor`")
    finding = doctor.eviction_finding(policy, evicted)
    if finding is not None and not allow_eviction:
        advice = f"Set:  {finding.remedy}\nStart anyway:  --allow-eviction"
        raise ConfigurationError(f"{finding.text}\n{advice}", code=finding.code)
    if finding is not None:
        out.say(f"! {finding.text}")
