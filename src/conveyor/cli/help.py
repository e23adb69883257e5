"""`conveyor help`: the help of a command."""

from __future__ import annotations

from typing import TYPE_CHECKING

import click

from conveyor.cli.command import CommandGroup, LeafCommand, completions

if TYPE_CHECKING:
    from click.shell_completion import CompletionItem


def _complete_words(ctx: click.Context, _: click.Parameter, incomplete: str) -> list[CompletionItem]:
    context, group = ctx.find_root(), ctx.find_root().command
    for word in ctx.params.get("words") or ():
        command = group.get_command(context, word) if isinstance(group, click.Group) else None
        if command is None:
            return []
        group = command
    names = group.list_commands(context) if isinstance(group, CommandGroup) else []
    return completions(dict.fromkeys(names, ""), incomplete)


@click.command("help", cls=LeafCommand, example="conveyor help queue purge")
@click.argument("words", nargs=-1, metavar="[COMMAND]...", shell_complete=_complete_words)
@click.pass_context
def help_(ctx: click.Context, words: tuple[str, ...]) -> None:
    """Show the help of a command, such as `conveyor help queue purge`."""
    ctx.find_root().command.main([*words, "--help"], prog_name="conveyor", standalone_mode=False, obj=ctx.obj)
