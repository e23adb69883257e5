"""`conveyor dev`: everything that a developer needs, in one command: server, worker with reload, dashboard."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.util import find_spec

import click

from conveyor.cli.command import LeafCommand, SharedArgument, shared_option, verbose_option
from conveyor.cli.completion import complete_queues
from conveyor.cli.output import Output
from conveyor.cli.worker import worker


@click.command(cls=LeafCommand, example="conveyor dev shop.app")
@click.argument("app_name", cls=SharedArgument, required=False, metavar="[APP]")
@click.option("-q", "--queue", "queues", multiple=True, metavar="NAME", shell_complete=complete_queues,
              help="Take jobs from this queue; may be repeated.  [default: all of the app's]")  # fmt: skip
@click.option(
    "-c", "--concurrency", type=click.IntRange(1, 10_000), default=10, show_default=True, help="Jobs at a time."
)
@click.option(
    "--port", type=click.IntRange(1, 65535), default=7070, show_default=True, help="The port of the dashboard."
)
@click.option("--no-dashboard", is_flag=True, help="Leave the dashboard out.")
@shared_option("--url")
@shared_option("--namespace", help="Must match the app's namespace.  [env: CONVEYOR_NAMESPACE]")
@verbose_option
@click.pass_context
def dev(
    ctx: click.Context, app_name: str | None, queues: tuple[str, ...], concurrency: int, port: int, no_dashboard: bool,
    url: str | None, namespace: str | None,
) -> int:  # fmt: skip
    """
    Run an app while it is written: the embedded server, a worker that reloads on change, and the dashboard.

    APP is module:object, or a module with one app. Default: CONVEYOR_APP, or [tool.conveyor] app in pyproject.toml. An app, or
    CONVEYOR_URL, that names a server uses that one. Ctrl-C ends all; jobs that run then are handed back.
    """
    arguments = [app_name] if app_name else []
    arguments += [f"--{name}={value}" for name, value in (("url", url), ("namespace", namespace)) if value]
    with _dashboard(Output(), arguments, port, wanted=not no_dashboard):
        return int(
            ctx.invoke(
                worker, app_name=app_name, queues=queues, concurrency=concurrency, grace="1s", reload=True, url=url,
                namespace=namespace, allow_eviction=True,
            )
        )  # fmt: skip


@contextmanager
def _dashboard(out: Output, arguments: list[str], port: int, *, wanted: bool) -> Iterator[None]:
    """Run the dashboard beside the block, in a process of its own, where its extra is installed."""
    if not wanted:
        yield
        return
    if find_spec("conveyor.cli.dashboard") is None or find_spec("starlette") is None or find_spec("uvicorn") is None:
        out.say('No dashboard: it needs its extra.  Install it:  pip install "conveyor[web]"')
        yield
        return
    command = [sys.executable, "-m", "conveyor", "dashboard", *arguments, "--port", str(port)]
    # A group of its own: ctrl-C reaches this process alone, which ends it.
    process = subprocess.Popen(command, stdin=subprocess.DEVNULL, process_group=0, env=os.environ)  # noqa: S603
    try:
        yield
    finally:
        process.terminate()
        try:
            process.wait(5)
        except subprocess.TimeoutExpired:
            process.kill()
