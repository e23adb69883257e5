"""Random input of people: URLs, durations and command lines give a sentence and a code, never a traceback."""

from __future__ import annotations

import io
import random
from collections import Counter
from collections.abc import Callable, Iterator
from typing import Any

import click
import pytest

from conveyor import ConfigurationError
from conveyor.cli import cli, main
from conveyor.cli.exit import ExitCode
from conveyor.store.transport.topology import topology_of
from conveyor.units import milliseconds

Rounds = Callable[[int, int], int]
URLS = [
    "redis://127.0.0.1:6379/0", "rediss://user:se%40cret@host:1/2?ssl_cert_reqs=none", "unix:///tmp/x.sock?db=1",
    "redis+sentinel://:secret@h1:26379,h2:26379/mymaster?sentinel_password=secret", "redis+cluster://h1:7000,h2:7000",
    "redis://[::1]:6379/0?socket_timeout=5&health_check_interval=3",
]  # fmt: skip
PARTS = [
    *"[]:/@%?&=,#+ \x00\n\u212a\u0663\ud800", "://", "%zz", "redis", "99999999999", "-1", "db=x", "socket_timeout=zz", "ssl_ca_certs=/none",
]  # fmt: skip
WORDS = [
    "", "mail", "mail:abc", "mail/3:x", "a}b{c", "-", "-1", "0", "1", "3", "99999999999999999999", "1e400", "nan", "1h", "250ms", "2026-01-01",
    "2026-01-01T00:00:00Z", "dead", "ready", "{}", "[", '{"id":1}', "[1,2]", '"x"', "a=b", "=", "k=v", "\u202e\x1b[31m", "%s{0}", "../../x",
    "no.such:app", "x" * 5000, "[" * 500,
]  # fmt: skip
ENDLESS = frozenset({"demo", "worker", "server", "watch"})


def damaged(dice: random.Random, text: str) -> str:
    for _ in range(dice.randint(1, 4)):
        at = dice.randrange(len(text) + 1)
        kind = dice.randrange(3)
        if kind == 0:
            text = text[:at] + dice.choice(PARTS) + text[at:]
        elif kind == 1:
            text = text[:at] + text[at + dice.randint(1, 5) :]
        else:
            text = text[:at] + dice.choice(URLS)[at:]
    return text


def test_damaged_urls(rounds: Rounds) -> None:
    """A URL is understood or refused with a sentence; nothing is connected to."""
    seed = random.randrange(1 << 32)
    print(f"seed {seed}")
    dice, ends = random.Random(seed), Counter[str]()
    for _ in range(rounds(1_000_000, 10_000)):
        url = damaged(dice, dice.choice(URLS))
        try:
            found = topology_of(url)
        except ConfigurationError as error:
            ends[error.code] += 1
        else:
            assert str(found)
            ends[type(found).__name__] += 1
    print(ends)
    assert {"StandaloneServer", "Sentinel", "Cluster", "E02", "E31", "E32"} <= ends.keys()


@pytest.mark.row("I22")
@pytest.mark.parametrize("secret", ["qx[yz", "qx]yz", "qx/yz", "qx/yz[", "qx?yz", "qx#yz", "q@x[y", "qx\u2100"])
@pytest.mark.parametrize("scheme", ["redis", "redis+sentinel", "redis+cluster"])
def test_a_password_that_was_not_quoted(scheme: str, secret: str) -> None:
    """A URL that cannot be read for what stands in its password is refused without showing it."""
    with pytest.raises(ConfigurationError) as caught:
        topology_of(f"{scheme}://user:{secret}@host:6379/0")
    assert "qx" not in str(caught.value)
    assert secret not in str(caught.value)
    assert caught.value.__context__ is None


def test_damaged_durations(rounds: Rounds) -> None:
    """A duration is a whole number of milliseconds within a century, or refused."""
    seed = random.randrange(1 << 32)
    print(f"seed {seed}")
    dice, taken = random.Random(seed), 0
    for _ in range(rounds(1_000_000, 20_000)):
        text = "".join(
            dice.choice(["1", "0", "9" * 30, ".", "5s", "ms", "h", "d", "-", " ", "\u0663", "e9", "\n", "m"])
            for _ in range(dice.randint(0, 4))
        )
        try:
            assert 0 <= milliseconds(text) <= 366 * 100 * 86_400_000
            taken += 1
        except ConfigurationError:
            pass
    assert taken > 100


def leaves(
    command: click.Command, words: tuple[str, ...] = (), endless: frozenset[str] = ENDLESS
) -> Iterator[tuple[tuple[str, ...], click.Command]]:
    """Yield every command that is not *endless*, with the words that name it."""
    if isinstance(command, click.Group):
        context = click.Context(command)
        for name in command.list_commands(context):
            if name not in endless:
                found = command.get_command(context, name)
                assert found is not None
                yield from leaves(found, (*words, name), endless)
    else:
        yield words, command


def typed(dice: random.Random, command: click.Command) -> list[str]:
    """Return some options and the arguments of a command, with values of any kind."""
    words: list[str] = []
    for parameter in command.params:
        if isinstance(parameter, click.Argument):
            words += [dice.choice(WORDS) for _ in range(dice.choice([1, 1, 1, 0, 2]) if parameter.nargs == -1 else 1)]
        elif dice.random() < 0.2 and parameter.name not in {"help", "app_reference"}:
            choice = [dice.choice(list(parameter.opts))]
            words = [*choice, *([] if getattr(parameter, "is_flag", False) else [dice.choice(WORDS)]), *words]
    return words


def test_numbers_that_nothing_holds(capsys: pytest.CaptureFixture[str]) -> None:
    """Each option that is a whole number has an upper bound, and one above it is a mistake in the call, which names the option."""
    tried = 0
    for words, command in leaves(cli, endless=frozenset()):
        arguments = ["1" for one in command.params if isinstance(one, click.Argument) and one.required]
        for option in command.params:
            if not isinstance(option, click.Option) or option.type.name not in {"integer", "integer range"}:
                continue
            assert main([*words, *arguments, option.opts[-1], "99999999999999999999"]) == ExitCode.USAGE, (
                words,
                option.name,
            )
            assert option.opts[-1] in capsys.readouterr().err, (words, option.name)
            tried += 1
    assert tried > 15


@pytest.mark.leaves_keys("what was typed may have been stored")
@pytest.mark.standalone_only("types so much that one place is enough")
def test_damaged_command_lines(
    url: str, rounds: Rounds, tmp_path: Any, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Every command ends with one of the known codes whatever stands behind it, and never blames itself (E00)."""
    seed = random.randrange(1 << 32)
    print(f"seed {seed}")
    dice, ends = random.Random(seed), Counter[int]()
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("CONVEYOR_URL", url)
    commands = list(leaves(cli))
    assert len(commands) > 15
    for number in range(rounds(50_000, 2_000)):
        words, command = dice.choice(commands)
        line = [*words, *typed(dice, command)] if number else ["job", "show", "mail:abc"]
        monkeypatch.setattr("sys.stdin", io.StringIO('1\n{"a": 2}\nx\n'))
        code = main(line)
        said = capsys.readouterr().err
        assert code in set(ExitCode), line
        assert "E00" not in said, (line, said)
        ends[code] += 1
    print(ends)
    assert {ExitCode.OK, ExitCode.USAGE, ExitCode.NOT_FOUND} <= ends.keys()
