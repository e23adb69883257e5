"""`conveyor config`: the settings that commands would use, where each comes from, and whether they hold."""

from __future__ import annotations

import os
from collections.abc import Mapping
from difflib import get_close_matches
from typing import Any, NamedTuple

import click
from click.core import ParameterSource

from conveyor.cli.app import Settings, reference
from conveyor.cli.command import CommandGroup, did_you_mean
from conveyor.cli.exit import ExitCode
from conveyor.cli.output import MARKS, Output, machine_text
from conveyor.cli.target import Target, redis_options
from conveyor.cli.worker import worker
from conveyor.errors import ConveyorError
from conveyor.store.transport.url import masked
from conveyor.units import quantity

_SHARED = {"app": "CONVEYOR_APP", "url": "CONVEYOR_URL", "namespace": "CONVEYOR_NAMESPACE"}
_SECRETS = ("CONVEYOR_DASHBOARD_AUTH", "CONVEYOR_DASHBOARD_TOKENS")
_OTHERS = {"build": "CONVEYOR_BUILD", "embedded server": "CONVEYOR_SERVER_BIN"}


class Setting(NamedTuple):
    """One setting: `source` is a flag, a variable, a file, the code of the app, or "default"."""

    name: str
    value: str
    source: str


@click.group(cls=CommandGroup)
def config() -> None:
    """Show where the settings of commands come from, and check them."""


@config.command(example="conveyor config show")
@redis_options
def show(target: Target, out: Output) -> None:
    """
    Show each setting of this directory and environment, and where it comes from; passwords are masked.

    The order is: flag, environment, [tool.conveyor] in pyproject.toml, code of the app, default.
    """
    settings = [*_shared(target, target.load_app()[1] if _names_app(target) else None), *_of_worker(target), *_others()]
    if out.as_json:
        out.document("config", settings=[one._asdict() for one in settings])
        return
    out.table(("SETTING", "VALUE", "FROM"), settings)


@config.command(example="conveyor config check")
@redis_options
def check(target: Target, out: Output) -> int:
    """
    Check the settings: names and values, that the app can be imported, and that the server answers.

    Exits 0 when all hold, else 8.
    """
    findings = [*_misspelt(os.environ), *_examine(target)]
    holds = all(level != "problem" for level, _ in findings)
    if out.as_json:
        out.document("config-check", holds=holds, findings=[{"level": level, "text": text} for level, text in findings])
    for level, text in () if out.as_json else findings:
        mark, colour = MARKS[level]
        out.line(f"{click.style(mark, fg=colour)} {text}" if out.on_terminal else f"{level}\t{machine_text(text)}")
    return ExitCode.OK if holds else ExitCode.UNHEALTHY


def _names_app(target: Target) -> bool:
    return reference(target.app_name, target.settings) is not None


def _shared(target: Target, app: Any) -> list[Setting]:
    """Return the settings of every command. *app*: that of the settings, None without one."""
    given = {"app": target.app_name, "url": target.url, "namespace": target.namespace}
    in_file = {"app": target.settings.app, "url": target.settings.url, "namespace": target.settings.namespace}
    in_code = {} if app is None else {"url": app.client.configured_url, "namespace": app.client.namespace}
    defaults = {"app": "", "url": "embedded:", "namespace": "conveyor"}
    found = []
    for name, variable in _SHARED.items():
        layers = (
            (f"--{name}", given[name]), (variable, os.environ.get(variable)), (_place(target.settings), in_file[name]),
        )  # fmt: skip
        source, value = next(((source, value) for source, value in layers if value), ("default", defaults[name]))
        code = in_code.get(name)
        if code and code not in {value, defaults[name]}:  # the code decides: a command must not use another server
            source, value = f"code of {reference(target.app_name, target.settings)}", code
        found.append(Setting(name, masked(value) if name == "url" else value, source))
    return found


def _place(settings: Settings) -> str:
    """Return the file of the settings, from here; "" without one."""
    return "" if settings.file is None else os.path.relpath(settings.file)


def _of_worker(target: Target) -> list[Setting]:
    """Return the settings of `conveyor worker`, as that command reads them without flags."""
    context = _worker_context(target.settings)
    found = []
    for parameter in worker.params:
        variable = parameter.envvar
        if not isinstance(parameter, click.Option) or not isinstance(variable, str) or parameter.name is None:
            continue
        value, source = context.params.get(parameter.name), context.get_parameter_source(parameter.name)
        text = ", ".join(map(str, value)) if isinstance(value, tuple) else "" if value is None else str(value)
        if source is ParameterSource.DEFAULT_MAP:
            place = _place(target.settings)
        else:
            place = variable if source is ParameterSource.ENVIRONMENT else "default"
        found.append(Setting(f"worker {max(parameter.opts, key=len)}", text, place))
    return found


def _worker_context(settings: Settings) -> click.Context:
    """Return what `conveyor worker` would make of the environment and the file; raises click.UsageError for a wrong value."""
    options = settings.worker | ({"include": settings.include} if settings.include else {})
    return worker.make_context("worker", [], default_map=options)


def _others() -> list[Setting]:
    given = [
        Setting(name, os.environ[variable], variable) for name, variable in _OTHERS.items() if variable in os.environ
    ]
    return given + [Setting("dashboard", "•••", variable) for variable in _SECRETS if variable in os.environ]


def _known_variables() -> set[str]:
    of_worker = {one.envvar for one in worker.params if isinstance(one.envvar, str)}
    return of_worker | {*_SHARED.values(), *_SECRETS, *_OTHERS.values()}


def _misspelt(environment: Mapping[str, str]) -> list[tuple[str, str]]:
    """Return a warning for each variable of the environment that looks like one of ours and is none."""
    known = _known_variables()
    unknown = sorted(name for name in environment if name.startswith("CONVEYOR_") and name not in known)
    return [
        ("warning", f"{name} is no setting of Conveyor.{did_you_mean(get_close_matches(name, known, 1))}")
        for name in unknown
    ]


def _examine(target: Target) -> list[tuple[str, str]]:
    """Return what was found, one (level, sentence) a step: the file, the options of a worker, the app, the server."""
    findings = []
    try:
        file = target.settings.file
        findings.append(("ok", f"{file} can be read." if file else "There is no pyproject.toml with [tool.conveyor]."))
        _worker_context(target.settings)
        findings.append(("ok", "The options of a worker are valid."))
        if _names_app(target):
            name, app = target.load_app()
            tasks = len(app.tasks)
            findings.append(
                ("ok" if tasks else "warning", f"{name} can be imported; it has {quantity(tasks, 'task')}.")
            )
        else:
            findings.append(("note", "No app is named: commands see queues and jobs, and no tasks."))
        client = target.client()
        seconds = client.ping(1.0)
        findings.append(
            ("ok", f"{client.address} answers in {seconds * 1000:.1f} ms; the namespace is {client.namespace!r}.")
        )
    except click.UsageError as error:
        findings.append(("problem", error.format_message()))
    except ConveyorError as error:
        findings.append(("problem", f"{error.code}  {error}"))
    return findings
