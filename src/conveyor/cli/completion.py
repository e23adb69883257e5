"""
Completion of commands, options, queues and tasks in bash, zsh and fish.

A completion is silent and takes at most `LIMIT` seconds: Redis may be away, and the app may do anything when it is imported.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

import click
from click.shell_completion import CompletionItem, FishComplete, ShellComplete, ZshComplete, split_arg_string

from conveyor.cli.command import LeafCommand, completions

if TYPE_CHECKING:
    from conveyor.cli.target import Target
    from conveyor.store.client.client import Client

LIMIT = 2.0
"""Seconds after which a completion gives the names that it has found by then."""
VARIABLE = "_CONVEYOR_COMPLETE"
_BASH = """\
_conveyor_completion() {
    local IFS=$'\\n' line
    COMPREPLY=()
    for line in $(COMP_LINE="$COMP_LINE" COMP_POINT="$COMP_POINT" COMP_WORDBREAKS="$COMP_WORDBREAKS" \\
            _CONVEYOR_COMPLETE=bash_complete "$1" 2>/dev/null </dev/null); do
        case "${line%%,*}" in
            dir) compopt -o dirnames ;;
            file) compopt -o default ;;
            plain) COMPREPLY+=("${line#*,}") ;;
        esac
    done
}
complete -o nosort -F _conveyor_completion conveyor 2>/dev/null || complete -F _conveyor_completion conveyor
"""


class _WithOption(ShellComplete):
    """Completion that keeps the option of ``--queue=ma``: shells replace the whole word."""

    def get_completions(self, args: list[str], incomplete: str) -> list[CompletionItem]:
        """Return the completions of the word under the cursor."""
        option, equals, _ = incomplete.partition("=")
        items = super().get_completions(args, incomplete)
        if equals and option.startswith("-"):
            for item in items:
                item.value = f"{option}={item.value}"
        return items


class _Bash(_WithOption):
    """Completion in bash, whose own words end at a colon, so that a URL and some queues are several of them."""

    name = "bash"
    source_template = _BASH.replace("%", "%%")
    incomplete = ""

    def get_completion_args(self) -> tuple[list[str], str]:
        """Return the complete words and the one under the cursor."""
        line = os.environb[b"COMP_LINE"][: int(os.environ["COMP_POINT"])].decode(errors="replace")
        words = split_arg_string(line)
        self.incomplete = "" if line[-1:].isspace() or not words else words.pop()
        return words[1:], self.incomplete

    def format_completion(self, item: CompletionItem) -> str:
        """Leave out what stands before the word that bash replaces."""
        breaks = [at for at, one in enumerate(self.incomplete) if one in ":=" and one in os.environ["COMP_WORDBREAKS"]]
        head = self.incomplete[: breaks[-1] + 1] if breaks else ""
        return f"{item.type},{item.value.removeprefix(head)}"


class _Zsh(_WithOption, ZshComplete):
    """Completion in zsh."""


class _Fish(_WithOption, FishComplete):
    """Completion in fish."""


SHELLS: dict[str, type[ShellComplete]] = {"bash": _Bash, "zsh": _Zsh, "fish": _Fish}


@click.command(cls=LeafCommand, example="conveyor completion bash")
@click.argument("shell", type=click.Choice(tuple(SHELLS)))
@click.pass_context
def completion(ctx: click.Context, shell: str) -> None:
    """
    Print the script that makes a shell complete commands, options, queues and tasks.

    \b
    bash, in ~/.bashrc:  eval "$(conveyor completion bash)"
    zsh, in ~/.zshrc:    eval "$(conveyor completion zsh)"
    fish, once:          conveyor completion fish > ~/.config/fish/completions/conveyor.fish
    """  # noqa: D301  click reads the character: these lines are not wrapped
    click.echo(SHELLS[shell](ctx.find_root().command, {}, "conveyor", VARIABLE).source(), nl=False)


def answer(cli: click.Command, instruction: str) -> NoReturn:
    """
    Answer the script of a shell and end the process, without a word from anything that runs meanwhile.

    *instruction*: ``bash_complete``, or ``bash_source`` for the script itself.
    """
    output, null = os.dup(1), os.open(os.devnull, os.O_RDWR)
    for descriptor in (0, 1, 2):
        os.dup2(null, descriptor)
    text = ""
    with suppress(Exception):
        shell, _, what = instruction.partition("_")
        complete = SHELLS[shell](cli, {}, "conveyor", VARIABLE)
        text = complete.source() if what == "source" else complete.complete() + "\n"
    with suppress(OSError):
        os.write(output, text.encode())
    os._exit(0)  # a thread may still be waiting for Redis


def complete_queues(ctx: click.Context, _: click.Parameter, incomplete: str) -> list[CompletionItem]:
    """Complete the name of a queue of the app or of Redis."""
    return _bounded(ctx, _queue_names, incomplete)


def complete_schedules(ctx: click.Context, _: click.Parameter, incomplete: str) -> list[CompletionItem]:
    """Complete the name of a schedule."""
    return _bounded(ctx, _schedule_names, incomplete)


def complete_workers(ctx: click.Context, _: click.Parameter, incomplete: str) -> list[CompletionItem]:
    """Complete the name of a worker process."""
    return _bounded(ctx, _worker_names, incomplete)


def complete_tasks(ctx: click.Context, _: click.Parameter, incomplete: str) -> list[CompletionItem]:
    """Complete the name of a task of the app, or its last part."""
    names = _bounded(ctx, _task_names, "")
    return [one for one in names if one.value.startswith(incomplete)] or [
        one for one in names if one.value.rpartition(".")[2].startswith(incomplete)
    ]


def _bounded(ctx: click.Context, names: Callable[[Target], Iterator[str]], incomplete: str) -> list[CompletionItem]:
    """Return those of *names* that are found in time."""
    found: list[str] = []

    def find() -> None:
        from conveyor.cli.target import Target

        given = ctx.params
        with suppress(BaseException), ctx.scope(cleanup=False):
            target = Target(
                given.get("url"), given.get("namespace"), given.get("app_name") or given.get("app_option"), retry_for=0
            )
            found.extend(names(target))  # which adds one at a time, for a reader that does not wait

    thread = threading.Thread(target=find, daemon=True)
    thread.start()
    thread.join(LIMIT)
    return completions(dict.fromkeys(sorted(set(found)), ""), incomplete)


def _task_names(target: Target) -> Iterator[str]:
    yield from target.load_app()[1].tasks


def _queue_names(target: Target) -> Iterator[str]:
    """Yield the queues of the app, which are known without Redis, then those of Redis."""
    from conveyor.cli.app import load, reference
    from conveyor.store.client.client import Client

    app = None
    if reference(target.app_name, target.settings) is not None:
        with suppress(Exception):
            app = load(target.app_name, target.settings)[1]
            yield from _queues_of(app)
    if _is_started(Client(target.server_url) if app is None or target.url else app.client):
        yield from target.admin().names()


def _schedule_names(target: Target) -> Iterator[str]:
    """Yield the names of the schedules in Redis."""
    from conveyor.store import schedules
    from conveyor.store.client.client import Client

    client = target.client()
    if _is_started(client if target.app is not None or target.url else Client(target.server_url)):
        index = schedules.schedule_index(client.namespace)
        names: dict[str, str] = client.run(schedules.all_names(index))
        yield from sorted(names)


def _worker_names(target: Target) -> Iterator[str]:
    """Yield the names of the worker processes that Redis knows."""
    from conveyor.store.client.client import Client

    client = target.client()
    if _is_started(client if target.app is not None or target.url else Client(target.server_url)):
        yield from (one.name for one in target.admin().worker_processes())


def _queues_of(app: Any) -> set[str]:
    from conveyor.jobs.core import core_of

    core = core_of(app)
    return {task.queue for task in app.tasks.values()} | {*core.queues, *core.plain_lists}


def _is_started(client: Client) -> bool:
    """Tell whether a call of *client* would not start an embedded server."""
    from conveyor.store.embedded import server
    from conveyor.store.transport.topology import embedded_directory

    url = client.configured_url
    if url is not None and not url.startswith("embedded:"):
        return True
    directory = embedded_directory(url) if url else ""
    state = server.inspect(Path(directory) if directory else None)
    return state is not None and state.running
