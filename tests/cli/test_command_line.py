"""Behaviour that all commands share: usage errors, help, options before the command, and the completion of shells."""

from __future__ import annotations

import json
import os
import shlex
import socket
import subprocess
import sys
import tomllib
from collections.abc import Callable, Iterator
from pathlib import Path

import click
import pytest
from click.shell_completion import CompletionItem

from conveyor.cli import cli, completion, main
from conveyor.cli.command import LeafCommand
from support.shell import Shell
from support.terminal import on_terminal

pytestmark = pytest.mark.leaves_keys("messages are pushed here to be looked at")
Run = Callable[..., tuple[int, str, str]]
APP = """
print("an app may print")
from conveyor import Conveyor
app = Conveyor()

@app.task
def greet(name: str) -> str:
    return name

@app.task(queue="mail:high")
def send(name: str) -> str:
    return name
"""


@pytest.fixture
def shell(tmp_path: Path) -> Shell:
    """A shell without a URL in its environment."""
    return Shell(tmp_path)


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Run:
    """A function that runs a command in this process, which is faster, in a directory of its own."""
    monkeypatch.chdir(tmp_path)
    for name in [name for name in os.environ if name.startswith("CONVEYOR_")]:
        monkeypatch.delenv(name)

    def call(*words: str) -> tuple[int, str, str]:
        code = main(words)
        return code, *capsys.readouterr()

    return call


# -- usage errors and help ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["statsu"], "There is no command 'statsu'. Did you mean 'status'?"),
        (["nonsense"], "There is no command 'nonsense'."),
        (["queue", "ls"], "There is no command 'ls'. Did you mean 'list'?"),
        (["purge", "mail"], "There is no command 'purge'. Did you mean 'queue purge'?"),
        (
            ["show", "mail"],
            (
                "There is no command 'show'. Did you mean 'queue show' or 'job show' or 'failures show' or 'schedule show' or "
                "'workers show' or 'config show'?"
            ),
        ),
        (["status", "--ulr", "x"], "No such option '--ulr'. Did you mean '--url'?"),
        (["worker", "--concurency", "5"], "No such option '--concurency'. Did you mean '--concurrency'?"),
        (["queue", "show"], "Missing argument 'QUEUE'."),
        (["job", "list", "--limit", "0"], "Invalid value for '--limit': 0 is not in the range 1<=x<=1000000000000."),
        (["push", "mail", "1", "--priority"], "Option '--priority' requires an argument."),
        (["enqueue", "greet", "--timeout", "5s"], "--timeout goes with --wait."),
        (["--json", "worker", "jobs"], "conveyor worker takes no --json."),
        (["--url", "redis://localhost:1", "server", "status"], "conveyor server status takes no --url."),
        (["help", "statsu"], "There is no command 'statsu'. Did you mean 'status'?"),
        (["worker", "jobs", "--app", "other"], "APP is 'jobs' and --app is 'other': give one of them."),
    ],
)
def test_usage_error(run: Run, words: list[str], message: str) -> None:
    """Wrong usage is an error like any other: code, what is wrong, what to do; exit code 2, nothing on standard output."""
    code, output, said = run(*words)
    first, usage, advice = said.splitlines()

    assert (code, output) == (2, "")
    assert first == f"error E02  {message}"
    assert usage.startswith("    Usage: conveyor")
    assert advice.startswith("    Help:  conveyor")
    assert run(*shlex.split(advice.partition("conveyor")[2]))[0] == 0


@pytest.mark.parametrize("words", [[], ["queue"], ["queue", "purge"], ["worker"], ["enqueue"]])
def test_help_of_a_command(run: Run, words: list[str]) -> None:
    """`conveyor help COMMAND` prints what `conveyor COMMAND --help` prints, project settings included."""
    Path("pyproject.toml").write_text("[tool.conveyor]\nconcurrency = 7\n")

    asked = run("help", *words)

    assert asked == run(*words, "--help")
    assert (asked[0], asked[2]) == (0, "")
    assert asked[1].startswith(f"Usage: conveyor {' '.join(words)}".rstrip())


# -- options before the command -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "template",
    [
        "--url URL queue show mail --json",
        "queue --url URL show mail --json",
        "queue show mail --url URL --json",
        "--json --url URL queue show mail",
        "--namespace conveyor queue --json --url URL show mail",
        "--url redis://localhost:1 queue show mail --url URL --json",
    ],
)
def test_options_stand_before_or_after_the_command(run: Run, url: str, template: str) -> None:
    """Shared options mean the same before the group, before the command and after it; the last place counts most."""
    assert run("--url", url, "push", "mail", "1")[0] == 0

    code, output, said = run(*template.replace("URL", url).split())

    assert (code, said) == (0, "")
    assert json.loads(output)["queue"]["ready"] == 1


def test_namespace_before_the_command(run: Run, url: str) -> None:
    """`--namespace` before a command is that of the command."""
    run("--url", url, "--namespace", "shop", "push", "mail", "1")

    assert run("--url", url, "queue", "list")[1] == ""
    assert run("--url", url, "queue", "list", "--namespace", "shop")[1].startswith("mail\t1\t")


@pytest.mark.parametrize(
    "words", [["--app", "jobs", "worker"], ["-A", "jobs:app", "worker"], ["worker", "-A", "jobs"], ["worker", "jobs"]]
)
def test_app_of_a_worker(shell: Shell, url: str, words: list[str]) -> None:
    """A worker takes its app as argument, as option, and as option before the command."""
    shell.write("jobs.py", APP)

    done = shell.run("--url", url, *words, "--burst")

    assert done.returncode == 0, done.stderr
    assert "works for jobs:app" in done.stderr


def test_verbose_before_the_command(run: Run) -> None:
    """`-v` before a command shows the traceback of its error."""
    assert "Traceback" in run("-v", "queue", "list", "--url", "redis://localhost:1")[2]


# -- completion ---------------------------------------------------------------------------------------------------


def variables(kind: str, line: str) -> dict[str, str]:
    """Return what a shell tells a program that completes the last word of *line*."""
    if kind == "bash":
        return {"COMP_LINE": line, "COMP_POINT": str(len(line)), "COMP_WORDBREAKS": " :="}
    last = "" if line.endswith(" ") else line.rsplit(maxsplit=1)[-1]
    number = str(len(line.split()) - bool(last))
    return {"COMP_WORDS": line, "COMP_CWORD": number if kind == "zsh" else last}


def offered(kind: str, text: str) -> list[str]:
    """Return the words in an answer to a shell."""
    lines = text.splitlines()
    return lines[1::3] if kind == "zsh" else [one.partition(",")[2].partition("\t")[0] for one in lines if one]


def complete(shell: Shell, line: str, **extra: str) -> list[str]:
    """Return the words that bash is offered for the last one of *line*; nothing else may be written meanwhile."""
    done = shell.run(_CONVEYOR_COMPLETE="bash_complete", **variables("bash", line), **extra)

    assert (done.returncode, done.stderr) == (0, "")
    return offered("bash", done.stdout)


@pytest.mark.parametrize("kind", ["bash", "zsh", "fish"])
def test_completion_of_names(shell: Shell, url: str, kind: str) -> None:
    """Commands, options, choices, tasks of the app, and queues of the app and of Redis are completed."""
    behind_colon, whole = ("high", "mail:high") if kind == "bash" else ("orders:high", "--queue=mail:high")
    expected = {
        "conveyor sta": ["status"],
        "conveyor queue re": ["redrive", "release", "repair", "resume"],
        "conveyor help queue pu": ["purge"],
        "conveyor status --ur": ["--url"],
        "conveyor completion f": ["fish"],
        "conveyor -A jobs enqueue ": ["jobs.greet", "jobs.send"],
        "conveyor -A jobs enqueue gre": ["jobs.greet"],
        "conveyor enqueue -A jobs jobs.s": ["jobs.send"],
        f"conveyor --url {url} queue show ord": ["orders", "orders:high"],
        f"conveyor --url {url} -A jobs push ": ["default", "mail:high", "orders", "orders:high"],
        f"conveyor queue purge --url {url} orders:": [behind_colon],  # bash replaces what stands behind the colon
        "conveyor worker jobs --queue=ma": [whole],
        "conveyor worker jobs --queue ma": ["mail:high"],
    }
    shell.write("jobs.py", APP)
    for queue in ("orders", "orders:high"):
        assert main(["--url", url, "push", queue, "1"]) == 0
    code = (
        "import json, os, sys; from conveyor.cli import cli, completion; from conveyor.cli.completion import SHELLS\n"
        "completion.LIMIT = 60; answers = []\n"  # the machine may be busy
        f"for variables in json.load(sys.stdin):\n"
        f"    os.environ.update(variables); answers.append(SHELLS[{kind!r}](cli, {{}}, 'conveyor', 'X').complete())\n"
        "print(json.dumps(answers), file=sys.stderr)"
    )

    done = subprocess.run(
        [sys.executable, "-c", code], cwd=shell.directory, env=shell.environment(), capture_output=True, text=True,
        input=json.dumps([variables(kind, line) for line in expected]), timeout=60, check=True,
    )  # fmt: skip

    assert {line: offered(kind, text) for line, text in zip(expected, json.loads(done.stderr), strict=True)} == expected


def test_completion_ends_whatever_happens(shell: Shell) -> None:
    """
    A completion ends in silence with what is known: no server, one that never answers, an app that hangs or exits.

    Where nothing ends the wait, the command here is killed after a minute.
    """
    shell.write("jobs.py", APP)
    shell.write("hangs.py", "import time\ntime.sleep(3600)\n")
    shell.write("leaves.py", "import sys\nprint('bye', file=sys.stderr)\nsys.exit('no')\n")

    assert complete(shell, "conveyor --url redis://127.0.0.1:1 queue show ") == []
    with socket.create_server(("127.0.0.1", 0)) as mute:
        away = f"redis://127.0.0.1:{mute.getsockname()[1]}"
        assert complete(shell, f"conveyor --app jobs --url {away} queue show ") == ["default", "mail:high"]
    assert complete(shell, "conveyor --app hangs enqueue ") == []
    assert complete(shell, "conveyor --app leaves enqueue ") == []


def test_completion_starts_no_server(shell: Shell) -> None:
    """Without a URL and without a running embedded server, a completion leaves nothing behind."""
    shell.write("jobs.py", APP)

    assert complete(shell, "conveyor --app jobs queue show ") == ["default", "mail:high"]
    assert complete(shell, "conveyor queue show ") == []
    assert sorted(path.name for path in shell.directory.iterdir()) == ["jobs.py"]


def test_script_for_bash(shell: Shell) -> None:
    """The printed script makes bash complete: here its function is called as bash calls it."""
    program = shell.directory / "conveyor"
    program.write_text(f'#!/bin/sh\nexec {shlex.quote(sys.executable)} -m conveyor "$@"\n')
    program.chmod(0o755)
    line = "conveyor --url redis://localhost:1 queue pa"
    script = f"""
    set -e
    eval "$(conveyor completion bash)"
    complete -p conveyor
    COMP_LINE={line!r} COMP_POINT={len(line)}
    _conveyor_completion conveyor pa queue
    printf '%s\\n' "${{COMPREPLY[@]}}"
    """
    path = f"{shell.directory}{os.pathsep}{os.environ['PATH']}"
    done = subprocess.run(
        ["bash", "-c", script],
        env=shell.environment(PATH=path),
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )

    assert (done.returncode, done.stderr) == (0, "")
    defined, *words = done.stdout.splitlines()
    assert defined.endswith("-F _conveyor_completion conveyor")
    assert words == ["partition", "pause"]


@pytest.mark.parametrize(("kind", "word"), [("zsh", "compdef"), ("fish", "complete --no-files")])
def test_scripts_of_other_shells(run: Run, kind: str, word: str) -> None:
    """`completion` prints a script for zsh and fish too."""
    code, script, said = run("completion", kind)

    assert (code, said) == (0, "")
    assert word in script
    assert f"_CONVEYOR_COMPLETE={kind}_complete" in script


# -- what holds for every command ---------------------------------------------------------------------------------


def leaves(group: click.Group, words: tuple[str, ...] = ()) -> Iterator[tuple[tuple[str, ...], click.Command]]:
    """Yield all commands that are no groups, with their words."""
    for name in group.list_commands(click.Context(group)):
        command = group.get_command(click.Context(group), name)
        if isinstance(command, click.Group):
            yield from leaves(command, (*words, name))
        elif command is not None:
            yield (*words, name), command


def test_every_command_keeps_the_rules(monkeypatch: pytest.MonkeyPatch) -> None:
    """No command ignores an option before its name, and whatever takes a queue or a task completes it."""
    marked = [CompletionItem("marked")]
    monkeypatch.setattr(completion, "_bounded", lambda *_: marked)
    commands = dict(leaves(cli))
    assert len(commands) > 20

    assert [words for words, command in commands.items() if not isinstance(command, LeafCommand)] == []
    without = [
        (words, param.name)
        for words, command in commands.items()
        for param in command.params
        if str(param.metavar).partition("[")[0] in {"QUEUE", "TASK"} or param.name in {"queue", "queues"}
        if param.shell_complete(click.Context(command), "mar") != marked
    ]
    assert without == []


@pytest.mark.parametrize("words", list(leaves(cli)), ids=lambda one: " ".join(one[0]))
def test_every_help_ends_with_an_example_that_parses(words: tuple[tuple[str, ...], LeafCommand]) -> None:
    """The help of a command shows one example, on a line of its own, which is a right use of that command."""
    name, command = words
    program, *given = shlex.split(command.example)
    assert (program, tuple(given[: len(name)])) == ("conveyor", name)
    with command.make_context(" ".join(name), given[len(name) :]) as context:
        assert context.get_help().endswith(f"\n\nExample:\n  {command.example}")


# -- streams and signals ------------------------------------------------------------------------------------------

_INTERRUPTED = """
import runpy, sys

class Interrupt:
    def find_spec(self, name, *_):
        if name == "click":
            raise KeyboardInterrupt

sys.meta_path.insert(0, Interrupt())
sys.argv[:] = ["conveyor", "status"]
runpy.run_module("conveyor", run_name="__main__", alter_sys=True)
"""


def test_ctrl_c_while_a_command_is_imported_is_calm(shell: Shell) -> None:
    """An interrupt that comes while modules are still imported ends a command with 130 and without a traceback."""
    done = subprocess.run(
        [sys.executable, "-c", _INTERRUPTED], env=shell.environment(), capture_output=True, text=True, timeout=60, check=False,
    )  # fmt: skip
    assert (done.returncode, done.stdout, done.stderr) == (130, "", "")
    project = tomllib.loads((Path(__file__).parents[2] / "pyproject.toml").read_text())["project"]
    assert project["scripts"]["conveyor"] == "conveyor.__main__:run"  # which is what was interrupted


def test_closed_streams_are_as_the_null_device(shell: Shell, url: str) -> None:
    """A command whose standard streams are closed does its work, and no connection takes the number of one of them."""
    words = f"{shlex.quote(sys.executable)} -m conveyor push mail 1 --url {shlex.quote(url)} <&- >&- 2>&-"
    assert subprocess.run(["sh", "-c", words], env=shell.environment(), timeout=60, check=False).returncode == 0
    listed = subprocess.run(
        ["sh", "-c", f"{shlex.quote(sys.executable)} -m conveyor queue list --url {shlex.quote(url)} 2>&-"],
        env=shell.environment(), capture_output=True, text=True, timeout=60, check=False,
    )  # fmt: skip
    assert (listed.returncode, listed.stdout.split("\t")[:2]) == (0, ["mail", "1"])


@pytest.mark.parametrize(
    ("variables", "coloured"),
    [
        ({"TERM": "xterm"}, True),
        ({"TERM": "dumb"}, False),
        ({"TERM": "xterm", "NO_COLOR": "1"}, False),
        ({"TERM": "dumb", "FORCE_COLOR": "1"}, True),
        ({"TERM": "xterm", "FORCE_COLOR": "1", "NO_COLOR": "1"}, False),
    ],
)
def test_colours_are_for_terminals_that_know_them(
    shell: Shell, url: str, variables: dict[str, str], coloured: bool
) -> None:
    """A terminal gets colours unless TERM=dumb or NO_COLOR says otherwise; errors keep to the same rule."""
    shell.url = url
    for words, code in ((["status"], {0, 8}), (["job", "show", "mail:none"], {5})):
        printed = on_terminal(shell, *words, expected=code, **variables)
        assert ("\x1b[" in printed) is coloured, printed


def test_nothing_is_drawn_on_a_terminal_that_only_prints(shell: Shell, url: str) -> None:
    """`conveyor top` refuses a terminal on which a line cannot be drawn again, and names what programs use."""
    pytest.importorskip("textual", reason="needs textual, which the extra dev installs")
    shell.url = url
    assert "conveyor status --json" in on_terminal(shell, "top", expected={2}, TERM="dumb")
