"""
Commands and groups of the command line.

Shared options may stand before or after the name of a command, and an unknown name is answered with the closest one.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, TypeVar

import click
from click.core import ParameterSource

from conveyor.ids import is_utf8

if TYPE_CHECKING:
    from click.shell_completion import CompletionItem

F = TypeVar("F", bound=Callable[..., Any])
MOST_JOBS = 10**12
"""The largest number of jobs that an option takes: more than a server holds, exact in Lua, and an index in Python."""
_GIVEN = "conveyor.cli.given"
"""Name in `Context.meta` of the shared options that stood before the command: parameter → (flag, value)."""


class _Inherited(click.Parameter):
    """A parameter whose value may stand before the command; nearer to the command it counts more."""

    def consume_value(self, ctx: click.Context, opts: Mapping[str, Any]) -> tuple[Any, ParameterSource]:
        """Return the value and its source: the command's own, else the one before the command, else as click has it."""
        value, source = super().consume_value(ctx, opts)
        given = ctx.meta.get(_GIVEN, {})
        if source is not ParameterSource.COMMANDLINE and self.name in given:
            return given[self.name][1], ParameterSource.COMMANDLINE
        return value, source


class SharedOption(_Inherited, click.Option):
    """An option of a command that may stand before the command too."""


class SharedArgument(_Inherited, click.Argument):
    """An argument of a command that an option before the command may give."""


def _remember(ctx: click.Context, param: click.Parameter, value: Any) -> None:
    if param.name and ctx.get_parameter_source(param.name) is ParameterSource.COMMANDLINE:
        ctx.meta.setdefault(_GIVEN, {})[param.name] = (max(param.opts, key=len), value)


def _set_verbose(ctx: click.Context, _: click.Parameter, value: bool) -> None:
    if value and isinstance(ctx.obj, dict):
        ctx.obj["verbose"] = True


_SHARED: dict[str, tuple[tuple[str, ...], dict[str, Any]]] = {
    "--url": (("--url",), {"metavar": "URL", "help": "URL of Redis.  [env: CONVEYOR_URL]"}),
    "--namespace": (
        ("--namespace",),
        {"metavar": "NAME", "help": "Prefix of all keys.  [env: CONVEYOR_NAMESPACE]"},
    ),
    "--app": (
        ("-A", "--app", "app_name"),
        {"metavar": "APP", "help": "module:object, or module.  [env: CONVEYOR_APP]"},
    ),
    "--json": (("--json", "as_json"), {"is_flag": True, "help": "Print one JSON document."}),
}
"""The options that groups and commands share: the longest name → all names and the name of the parameter, settings."""

_NUMBERS = ("integer", "float")
_VERBOSE = ("-v", "--verbose")
_VERBOSE_SETTINGS: dict[str, Any] = {
    "is_flag": True, "expose_value": False, "callback": _set_verbose, "help": "Show tracebacks of errors.",
}  # fmt: skip


def shared_option(name: str, **changes: Any) -> Callable[[F], F]:
    """Return the decorator that adds a shared option (``--url``) to a command; *changes* replace its settings."""
    names, settings = _SHARED[name]
    return click.option(*names, cls=SharedOption, **(settings | changes))


def verbose_option(function: F) -> F:
    """Add ``-v``."""
    return click.option(*_VERBOSE, **_VERBOSE_SETTINGS)(function)


def _takes_value(param: click.Parameter) -> bool:
    return isinstance(param, click.Option) and not param.is_flag and not param.count


class _ArgumentParsing(click.Command):
    """The parsing of arguments that commands and groups share."""

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        """Parse the arguments. A usage error knows the command that it is about."""
        if ctx.resilient_parsing and args and any(args[-1] in one.opts and _takes_value(one) for one in self.params):
            args = args[:-1]  # the shell completes its value; click would leave out the arguments before it too
        try:
            return super().parse_args(ctx, args)
        except click.UsageError as error:
            error.ctx = error.ctx or ctx
            raise


class LeafCommand(_ArgumentParsing):
    """
    A command that refuses a shared option before its name when it has none of that name.

    Its help ends with one *example*, a whole line for a shell. Numbers are shown as N, not as the type that reads them.
    """

    def __init__(self, *args: Any, example: str = "", **settings: Any) -> None:
        super().__init__(*args, **settings)
        self.example = example
        for param in self.params:
            if isinstance(param, click.Option) and param.metavar is None and param.type.name.startswith(_NUMBERS):
                param.metavar = "N"

    def format_epilog(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """Write the example, on one line however narrow the terminal is: it is there to be copied."""
        if self.example:
            formatter.write_paragraph()
            formatter.write(f"Example:\n  {self.example}\n")

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        """Parse the arguments; bytes that are no text, and an option before the command that would be ignored, are errors."""
        rest = super().parse_args(ctx, args)
        for param in self.params:
            given = ctx.params.get(param.name or "")
            texts = given if isinstance(given, tuple) else (given,)
            if not isinstance(param.type, click.Path) and not all(
                is_utf8(one) for one in texts if isinstance(one, str)
            ):
                raise click.BadParameter("it has bytes that are not UTF-8.", ctx, param)
        names = {param.name for param in self.params}
        for name, (flag, _) in ctx.meta.get(_GIVEN, {}).items():
            if name not in names and not ctx.resilient_parsing:
                ctx.fail(f"{ctx.command_path} takes no {flag}.")
        return rest


class CommandGroup(_ArgumentParsing, click.Group):
    """A group that takes the shared options for its commands."""

    command_class = LeafCommand

    def __init__(self, *args: Any, shared: Sequence[str] = tuple(_SHARED), **settings: Any) -> None:
        """*shared*: the shared options that its commands have."""
        super().__init__(*args, **settings)
        for name in shared:
            names, option = _SHARED[name]
            self.params.append(click.Option(names, expose_value=False, callback=_remember, **option))
        self.params.append(click.Option(_VERBOSE, **_VERBOSE_SETTINGS))

    def resolve_command(
        self, ctx: click.Context, args: list[str]
    ) -> tuple[str | None, click.Command | None, list[str]]:
        """Return the command to call. For an unknown one, fail with the closest name."""
        name = args[0]
        if not ctx.resilient_parsing and self.get_command(ctx, name) is None and not name.startswith("-"):
            ctx.fail(f"There is no command {name!r}.{did_you_mean(self._similar(ctx, name))}")
        return super().resolve_command(ctx, args)

    def _similar(self, ctx: click.Context, name: str) -> list[str]:
        """Return the commands of nested groups with this name, else the command with the closest one."""
        from difflib import get_close_matches

        names = self.list_commands(ctx)
        groups = {group: self.get_command(ctx, group) for group in names}
        nested = [f"{group} {name}" for group, one in groups.items() if name in getattr(one, "commands", ())]
        return nested or get_close_matches(name, names, 1)


def did_you_mean(names: list[str]) -> str:
    """Return `` Did you mean 'a' or 'b'?``, and "" without names."""
    return f" Did you mean {' or '.join(map(repr, names))}?" if names else ""


def usage_message(error: click.ClickException) -> str:
    """Return the text of a usage error: what is wrong, the form of the command, and the command that shows its help."""
    text = error.format_message()
    if isinstance(error, click.NoSuchOption):
        text = f"No such option {error.option_name!r}.{did_you_mean([*(error.possibilities or ())][:1])}"
    context = getattr(error, "ctx", None)
    if context is None:
        return text
    usage = " ".join(context.get_usage().split())
    return f"{text}\n{usage}\nHelp:  {context.command_path} --help"


def completions(names: Mapping[str, str], incomplete: str) -> list[CompletionItem]:
    """Return those of *names* (name → help) that begin with *incomplete*, for the completion of a shell."""
    from click.shell_completion import CompletionItem

    return [CompletionItem(name, help=text or None) for name, text in names.items() if name.startswith(incomplete)]
