"""
Odd input of people and programs: every URL, duration, option, setting and parameter is taken or refused in a sentence.

A refusal is an error of Conveyor with a code, its text is short whatever was given, and nothing is stored.
"""

from __future__ import annotations

import inspect
import io
import os
import random
import sys
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import suppress
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, get_type_hints

import click
import pytest
import redis as redis_py

from conveyor import (
    Buffer,
    Concurrency,
    ConfigurationError,
    Conveyor,
    Debounce,
    DurabilityNotReached,
    JobCancelled,
    Rate,
    Retry,
    Throttle,
    Unique,
    Webhook,
)  # fmt: skip
from conveyor.admin import Admin
from conveyor.admin.job_query import parse
from conveyor.cli import cli, main
from conveyor.cli.app import SETTINGS
from conveyor.cli.exit import ExitCode
from conveyor.errors import ConveyorError, InvalidFilter
from conveyor.messaging.declared_limits import parse_limit
from conveyor.messaging.push_options import PushManyOptions, PushOptions, TopicOptions
from conveyor.store.client.durability import DurabilityOptions
from conveyor.store.transport.topology import topology_of
from conveyor.units import LATEST_MS, instant, instant_ms, milliseconds
from conveyor.worker.supervision.autoscale import Bounds
from conveyor.worker.supervision.health import bind
from support import server_dump
from support.odd_values import LONGEST_ANSWER, ODD_TEXTS, odd_values, shown

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
SERVES = frozenset({"bench", "dashboard", "demo", "dev", "mcp", "relay", "server", "top", "watch", "worker"})
"""Commands that serve until they are stopped, or measure for a while: of these the options are parsed alone."""


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
    command: click.Command, words: tuple[str, ...] = (), but: frozenset[str] = frozenset()
) -> Iterator[tuple[tuple[str, ...], click.Command]]:
    """Yield every command *but* those, with the words that name it."""
    if isinstance(command, click.Group):
        context = click.Context(command)
        for name in command.list_commands(context):
            if name not in but:
                found = command.get_command(context, name)
                assert found is not None
                yield from leaves(found, (*words, name), but)
    else:
        yield words, command


def typed(dice: random.Random, command: click.Command) -> list[str]:
    """Return some options and the arguments of a command, with values of any kind."""
    words: list[str] = []
    for parameter in command.params:
        if isinstance(parameter, click.Argument):
            words += [dice.choice(WORDS) for _ in range(dice.choice([1, 1, 1, 0, 2]) if parameter.nargs == -1 else 1)]
        elif dice.random() < 0.2 and parameter.name not in {"help", "app_reference", "follow"}:  # a job may never end
            choice = [dice.choice(list(parameter.opts))]
            words = [*choice, *([] if getattr(parameter, "is_flag", False) else [dice.choice(WORDS)]), *words]
    return words


def test_numbers_that_nothing_holds(capsys: pytest.CaptureFixture[str]) -> None:
    """Each option that is a whole number has an upper bound, and one above it is a mistake in the call, which names the option."""
    tried = 0
    for words, command in leaves(cli):
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
    commands = list(leaves(cli, but=SERVES))
    assert len(commands) > 15
    for number in range(rounds(50_000, 2_000)):
        words, command = dice.choice(commands)
        line = [*words, *typed(dice, command)] if number else ["job", "show", "mail:abc"]
        monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(b'1\n{"a": 2}\nx\n')))
        code = main(line)
        said = capsys.readouterr().err
        assert code in set(ExitCode), line
        assert "E00" not in said, (line, said)
        ends[code] += 1
    print(ends)
    assert {ExitCode.OK, ExitCode.USAGE, ExitCode.NOT_FOUND} <= ends.keys()


MODULE = """
from conveyor import Concurrency, Conveyor, Rate
app = Conveyor()
@app.task(name="t", queue="jobs")
def t(a: int = 0): ...
@app.task(name="lim", queue="limited", limits=[Rate(10, "1m", name="r")])
def lim(a: int = 0): ...
"""
SAMPLES = {
    "schedule": "s", "limits": "limited", "workers": "host:1", "id_": "ID", "ids": "ID", "limit": "5/1m", "partitions": "1", "message": "1",
    "shell": "bash", "fingerprint": "abcd", "task": "t", "text": "hello",
}  # fmt: skip


class SampleQueues:
    """A server on which there is something of every kind."""

    def __init__(self, url: str, client: redis_py.Redis) -> None:
        self.redis = client
        self.app = Conveyor(url, timeout="2s")
        self.task = self.app.task(name="t", queue="jobs")(_call)
        self.limited = self.app.task(name="lim", queue="limited", limits=[Rate(10, "1m", name="r")])(_call)

    def fill(self) -> str:
        """Empty the server, and store two messages, a schedule, and two jobs; return the id of one that waits."""
        self.redis.flushall(asynchronous=False)
        self.app.queue("q").push({"a": 1}, delay="1h")
        self.app.queue("q").push({"a": 2})
        self.app.schedules.put("s", self.task.s(1), every="1h")
        self.limited.enqueue(1)
        return self.task.options(delay="1h").enqueue(1).id

    def look(self, *_: Any) -> None:
        """Read all that is stored, as pages and commands do."""
        admin = Admin(self.app.client)
        for job in admin.jobs(limit=100):
            admin.job(job.id)
            admin.why(job.id)
            admin.history_of(job.id)
        admin.queues()


def _call(a: int = 0) -> None: ...


@pytest.fixture
def sample(url: str, redis: redis_py.Redis) -> Iterator[SampleQueues]:
    found = SampleQueues(url, redis)
    yield found
    redis.flushall(asynchronous=False)
    found.app.close()


def changes(before: dict[str, Any], client: redis_py.Redis) -> list[str]:
    """Return the keys that changed, but for what says who is there and what code declares: a refused call may have said that."""
    found = server_dump.difference(before, server_dump.exact(client))
    return [
        key for key in found if not key.endswith((":workers", "conveyor:queues", ":conf")) and ":leased:" not in key
    ]


def options_of(
    words: tuple[str, ...], command: click.Command, job: str, target: click.Parameter, text: str
) -> list[str]:
    """Return the command line that gives *text* for one parameter, and something that means something for those that are needed."""
    name = max(target.opts, key=len)
    line = [
        *words,
        *([] if isinstance(target, click.Argument) else [f"{name}={text}"] if name.startswith("--") else [name, text]),
    ]
    flags = {one for other in command.params for one in other.opts}
    line += (
        ["--yes"] * ("--yes" in flags)
        + ["-A", "odd_app"] * ("--app" in flags and name not in {"--app", "--namespace"})
        + ["--"]
    )
    for one in command.params:
        if one is target and isinstance(one, click.Argument):
            line.append(text)
        elif isinstance(one, click.Argument) and (one.required or words[0] in {"push", "topic", "enqueue"}):
            known = SAMPLES.get(words[0] if one.name in {"name", "queue", "owner"} else one.name or "", "q")
            line.append(job if known == "ID" else known)
    return line


def run_line(line: list[str], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> tuple[int, str]:
    """Return the exit code of a command line and what it said, which is never that Conveyor has a fault."""
    monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(b"1\n")))
    code, said = main(line), capsys.readouterr().err
    assert code in set(ExitCode), shown(line)
    assert "E00" not in said, (shown(line), said[:500])
    assert "Traceback" not in said, shown(line)
    assert len(said) < LONGEST_ANSWER, shown(line)
    return code, said


@pytest.fixture
def odd_project(url: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A directory with an app, which is the working one."""
    (tmp_path / "odd_app.py").write_text(MODULE)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("CONVEYOR_URL", url)
    monkeypatch.delitem(sys.modules, "odd_app", raising=False)
    return tmp_path


@pytest.mark.standalone_only("types so much that one place is enough")
def test_every_option_of_every_command(
    sample: SampleQueues,
    odd_project: Path,
    rounds: Rounds,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """An odd value of an option is taken, or refused with exit code 2 and nothing stored; those of commands that serve are parsed."""
    seed = random.randrange(1 << 32)
    print(f"seed {seed}")
    cases = [
        (words, command, target, text)
        for words, command in leaves(cli)
        for target in command.params
        if not getattr(target, "is_flag", False) and target.name != "help"
        for text in ODD_TEXTS
        if can_be_typed(text)
    ]
    dice, ends = random.Random(seed), Counter[int]()
    for words, command, target, text in dice.sample(cases, min(len(cases), rounds(len(cases), 700))):
        line = options_of(words, command, sample.fill(), target, text)
        if SERVES & set(words):
            with suppress(click.ClickException, click.exceptions.Exit, ConveyorError):
                command.make_context(words[-1], line[len(words) :])
            continue
        before = server_dump.exact(sample.redis)
        code, _ = run_line(line, capsys, monkeypatch)
        if code == ExitCode.USAGE:
            assert changes(before, sample.redis) == [], shown(line)
        ends[code] += 1
    print(ends)
    assert ends[ExitCode.USAGE] > 50


def can_be_typed(text: str) -> bool:
    """Return whether a command line or a variable can hold a text: any bytes but zero."""
    try:
        return b"\0" not in os.fsencode(text)
    except UnicodeEncodeError:
        return False


SETTINGS_OF_TOML = [
    "5", "-5", "1.5", "nan", "inf", "true", '""', '"x"', '"\\u0000"', "[]", "[1]", '["a"]', '["a:0"]', "{}", "{a=1}", "{a=0}", '{a="x"}', "{a={b=1}}",
    "{a=nan}", "2026-01-01", "12:00:00", '[[["a"]]]', "9" * 30, '"\u00b2"', '"9999999999h"', "[{a=1}]", "[" * 300 + "]" * 300,
]  # fmt: skip
FILES = [
    "tool = 5", "tool = []", "[tool]\nconveyor=5", "[tool]\nconveyor=[1]", "[[tool.conveyor]]\napp='x'", "\ufeff[tool.conveyor]", "x", "a=" + "[" * 9999,
]  # fmt: skip


@pytest.mark.standalone_only("reads settings, which is the same everywhere")
def test_settings_that_mean_nothing(
    odd_project: Path, rounds: Rounds, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """A file of settings, or a variable of the environment, is understood or refused by every command that reads it."""
    seed = random.randrange(1 << 32)
    print(f"seed {seed}")
    tables = [f"[tool.conveyor]\n{name} = {value}\n" for name in (*SETTINGS, "unknown") for value in SETTINGS_OF_TOML]
    for text in [*FILES, *random.Random(seed).sample(tables, min(len(tables), rounds(len(tables), 60)))]:
        (odd_project / "pyproject.toml").write_text(text)
        for line in (["config", "show"], ["config", "check"], ["worker", "--help"]):
            run_line(line, capsys, monkeypatch)
    (odd_project / "pyproject.toml").unlink()
    of_worker = {one.envvar for one in dict(leaves(cli))[("worker",)].params if isinstance(one.envvar, str)}
    names = sorted(
        of_worker | {"CONVEYOR_URL", "CONVEYOR_APP", "CONVEYOR_NAMESPACE", "CONVEYOR_BUILD", "CONVEYOR_INCLUDE"}
    )
    texts = [text for text in ODD_TEXTS if can_be_typed(text)]
    cases = [(name, text) for name in names for text in texts]
    for name, text in random.Random(seed).sample(cases, min(len(cases), rounds(len(cases), 100))):
        with pytest.MonkeyPatch.context() as patch:
            patch.setenv(name, text)
            for line in (["config", "show"], ["config", "check"]):
                run_line(line, capsys, patch)


Calls = dict[str, tuple[Callable[..., Any], dict[str, Any], Any]]
"""Public calls by name: the function, the options that it has to have, and where its parameters are declared besides."""
SOON = {"wait_timeout": "10ms"}


def declarations(sample: SampleQueues) -> Calls:
    """Return what declares something, with the first push that follows."""
    app, secret = sample.app, "whsec_" + "a" * 40

    def declared(method: str, *pushed: Any) -> Callable[..., Any]:
        def declare(*args: Any, **options: Any) -> Any:
            made = getattr(Conveyor(app.client.configured_url), method)(*args, **options)
            if method in {"queue", "plain_list"}:
                return made.push(1)
            return made(_call).enqueue(1) if pushed else made(_call) if method == "cron" else made

        declare.__signature__ = inspect.signature(getattr(app, method))  # type: ignore[attr-defined]
        return declare

    return {
        "Rate": (Rate, {"n": 1, "per": "1s"}, ()), "Concurrency": (Concurrency, {"n": 1}, ()), "Retry": (Retry, {}, ()), "Unique": (Unique, {}, ()),
        "Debounce": (Debounce, {"wait": "1s"}, ()), "Throttle": (Throttle, {"per": "1s"}, ()),
        "Webhook": (Webhook, {"url": "https://example.org", "secret": secret}, ()), "Buffer": (Buffer, {"directory": "spool"}, ()),
        "Conveyor": (Conveyor, {}, ()), "queue": (declared("queue"), {"name": "q", **SOON}, DurabilityOptions),
        "plain_list": (declared("plain_list"), {"name": "q"}, ()), "topic": (app.topic, {"name": "x"}, ()),
        "task": (declared("task", 1), {}, ()), "batch_task": (declared("batch_task", 1), {"size": 5, "within": "1s"}, ()),
        "cron": (declared("cron"), {"expression": "0 9 * * *"}, ()),
    }  # fmt: skip


def calls(sample: SampleQueues, job: str) -> Calls:
    """Return all calls; *job* is one that waits."""
    app, queue, admin = sample.app, sample.app.queue("q"), Admin(sample.app.client)

    def settled(method: str) -> Callable[[Any], None]:
        def settle(value: Any) -> None:
            getattr(queue.pull()[0], method)(value)

        return settle

    def ended() -> Any:
        handle = app.job(job)
        handle.cancel()
        return handle

    def put(**timing: Any) -> Any:
        return app.schedules.put(**{"name": "s2", "call": sample.task.s(1), **timing}).next(3)

    return declarations(sample) | {
        "push": (queue.push, {"value": 1, **SOON}, PushOptions),
        "push_many": (queue.push_many, {"values": [1], **SOON}, PushManyOptions),
        "publish": (app.topic("x").publish, {"value": 1, **SOON}, TopicOptions),
        "options": (lambda **options: sample.task.options(**options).enqueue(1), SOON, sample.task.options),
        "enqueue_many": (app.enqueue_many, {"calls": [sample.task.s(1)]}, ()), "external_task": (app.external_task, {"name": "x"}, ()),
        "enqueue": (app.enqueue, {"name": "t"}, ()), "consume": (lambda **o: next(queue.consume(**o)), {}, queue.consume),
        "batches": (lambda **o: next(queue.batches(**o)), {"size": 1, "within": "10ms"}, queue.batches), "pull": (queue.pull, {}, ()),
        "app.pull": (app.pull, {"queues": ["q"]}, ()), "nack": (settled("nack"), {}, {"value"}),
        "extend": (settled("extend"), {}, {"value"}),
        "dead": (settled("dead"), {}, {"value"}), "redrive": (queue.redrive, {}, ()), "purge": (queue.purge, {}, ()),
        "repartition": (queue.repartition, {"partitions": 1}, ()), "update": (lambda **o: app.job(job).update(**o), {}, app.job(job).update),
        "result": (lambda **o: ended().result(**o), {}, app.job(job).result), "watch": (lambda **o: next(ended().watch(**o)), {}, {"after"}),
        "stream": (lambda **o: next(ended().stream(**o), None), {}, {"after"}), "job": (lambda one: app.job(one).status(), {}, {"one"}),
        "jobs": (lambda **o: list(app.jobs(**o)), {}, app.jobs), "count_jobs": (app.count_jobs, {}, ()), "cancel": (app.cancel, {"tag": "x"}, ()),
        "app.redrive": (app.redrive, {"queue": "q"}, ()), "pause_task": (app.pause_task, {"task": "t"}, ()), "worker": (app.worker, {}, ()),
        "put": (put, {"every": "1h"}, {"name", "call", "every", "overlap", "missed", "jitter"}), "put at": (put, {}, {"at"}),
        "put cron": (put, {"cron": "0 9 * * *"}, {"cron", "tz"}), "schedule": (app.schedules.get, {"name": "s"}, ()),
        "next": (lambda count: app.schedules.get("s").next(count), {}, {"count"}), "limits.list": (app.limits.list, {"queue": "limited"}, ()),
        "limits.set": (app.limits.set, {"queue": "limited", "limit": Rate(5, "1m", name="r")}, ()),
        "limits.reset": (app.limits.reset, {"queue": "limited"}, ()), "groups.set": (app.groups.set, {"queue": "q", "key": "x", "weight": 1}, ()),
        "groups.list": (app.groups.list, {"queue": "q"}, ()), "subscribe": (lambda queue: app.topic("x").subscribe(queue), {}, {"queue"}),
        "audit": (admin.audit, {}, ()), "mark": (admin.mark, {"text": "x"}, ()), "search": (admin.search, {"query": parse("")}, {"cursor", "offset", "limit"}),
        "admin.jobs": (admin.jobs, {}, ()), "admin.pause": (admin.pause, {"name": "q"}, ()), "admin.retry": (admin.retry, {"ids": []}, ()),
        "admin.job": (admin.job, {"public_id": job}, ()), "ping": (app.ping, {}, ()),
    }  # fmt: skip


def parameters(function: Callable[..., Any], more: Any) -> list[str]:
    """Return the names of what a function takes. *more*: those that its signature does not have, or what declares them."""
    if isinstance(more, set):
        return sorted(more)
    signature = inspect.signature(more if inspect.isroutine(more) else function)
    named = [
        one.name for one in signature.parameters.values() if one.kind is not one.VAR_KEYWORD and one.name != "function"
    ]
    return [*named, *(get_type_hints(more) if inspect.isclass(more) else ())]


REFUSED = (ConveyorError, TimeoutError)
BEGUN = {"nack", "extend", "dead", "result", "watch", "stream"}
"""Calls that begin with a pull or a cancel, which is stored."""
STORED_ALL_THE_SAME = (DurabilityNotReached, JobCancelled)
"""Errors that say what became of what was stored."""


@pytest.mark.standalone_only("calls so much that one place is enough")
def test_every_parameter_of_the_public_calls(
    sample: SampleQueues, rounds: Rounds, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An odd argument is taken, and what was stored can be looked at; or it is an error of Conveyor, and nothing is stored."""
    seed = random.randrange(1 << 32)
    print(f"seed {seed}")
    monkeypatch.chdir(tmp_path)
    names = [
        (name, parameter)
        for name, (function, _, more) in calls(sample, "x").items()
        for parameter in parameters(function, more)
    ]
    cases = [(*one, number) for one in names for number in range(len(odd_values()))]
    ends = Counter[str]()
    for name, parameter, number in random.Random(seed).sample(cases, min(len(cases), rounds(len(cases), 1_500))):
        value = odd_values()[number]
        function, needed, _ = calls(sample, sample.fill())[name]
        before, case = server_dump.exact(sample.redis), f"{name}({parameter}={shown(value)})"
        try:
            call_with(function, needed, parameter, value)
        except STORED_ALL_THE_SAME as error:
            ends[error.code] += 1
        except REFUSED as error:
            ends[check_refusal(error, case)] += 1
            if name not in BEGUN:
                assert changes(before, sample.redis) == [], case
        except BaseException as error:
            error.add_note(case)
            raise
        else:
            ends["taken"] += 1
            sample.look()
    print(ends)
    assert ends["taken"] > 100
    assert ends["E02"] > 500


def check_refusal(error: BaseException, case: str) -> str:
    """Return the code of an error, which is short and says that somebody else than Conveyor has a fault."""
    code: str = getattr(error, "code", "TimeoutError")
    assert code != "E00", case
    assert len(str(error)) < LONGEST_ANSWER, case
    return code


def call_with(function: Callable[..., Any], needed: dict[str, Any], parameter: str, value: Any) -> None:
    """Call a function with an odd value, by position where it takes the parameter so."""
    given = {**needed, parameter: value}
    taken = inspect.signature(function).parameters.values()
    by_position = [given.pop(one.name) for one in taken if one.kind is one.POSITIONAL_ONLY and one.name in given]
    several = next((one.name for one in taken if one.kind is one.VAR_POSITIONAL), None)
    function(*by_position, *([given.pop(several)] if several in given else []), **given)


def test_instants_of_every_year(app: Conveyor) -> None:
    """A job of the last year of all can be looked at in every zone; a time that an older release stored behind it, too."""
    last = datetime(9999, 12, 31, 23, 59, tzinfo=UTC)
    assert instant_ms(last) == LATEST_MS
    app.queue("q").push(1, at=last)
    [job] = Admin(app.client).jobs()
    assert job.due == instant(LATEST_MS) == instant(10**17)


def test_digits_of_other_scripts_are_no_numbers(app: Conveyor) -> None:
    """Digits that Redis does not know, and more of them than `int` takes, are no number of a place, a port or a page."""
    admin = Admin(app.client)
    app.queue("q").push({"a": [1]})
    for filter_ in ("args.a.\xb2:1", f"body.{'9' * 5000}:1"):
        with suppress(ConfigurationError):
            admin.search(parse(filter_))
    admin.search(parse(""), cursor="q\nready\n\xb2\n")
    for call in (
        lambda: admin.audit(before="\u0661-\u0661"), lambda: app.events("q", after="\u0661-\u0661"),
        lambda: topology_of(f"redis://host:1/{'9' * 5000}"), lambda: topology_of(f"redis+cluster://host:{'9' * 5000}"),
        lambda: parse_limit("9" * 5000), lambda: Bounds.parse("\xb2..\xb2"), lambda: bind("127.0.0.1:\xb2"),
    ):  # fmt: skip
        with pytest.raises(ConfigurationError):
            call()


FILTERS = [
    "state:dead task:mail.* queue:mail", 'error:Timeout tag:vip "no such" -state:done', "args.a.b:42 age:>1h attempt:>=3", "header.trace:t*",
    "since:1h older:0s", "body.a.0:x", "fingerprint:abcd", "priority:<3 (state:dead)",
]  # fmt: skip


@pytest.mark.leaves_keys("a queue is left to be searched")
def test_damaged_filters(app: Conveyor, rounds: Rounds) -> None:
    """A filter finds what it finds, or is refused with the column at which it cannot be read."""
    seed = random.randrange(1 << 32)
    print(f"seed {seed}")
    dice, ends, admin = random.Random(seed), Counter[str](), Admin(app.client)
    app.queue("mail").push({"a": [{"b": 42}], "n": None}, headers={"trace": "t1"}, tags=["vip"])
    app.queue("mail").push([[["x"]]], delay="1h")
    for _ in range(rounds(100_000, 1_500)):
        text = dice.choice(FILTERS)
        for _ in range(dice.randint(1, 4)):
            at, some = dice.randrange(len(text) + 1), dice.choice([*PARTS, *ODD_TEXTS])[:200]
            text = text[:at] + dice.choice([some, ""]) + text[at + dice.choice([0, 0, 1, 4]) :]
        try:
            query = parse(text)
        except InvalidFilter as error:
            ends["refused" if 0 <= error.position <= len(text) else shown(text)] += 1
            continue
        try:
            admin.search(query, limit=10)
            ends["searched"] += 1
        except ConveyorError as error:
            ends[error.code] += 1
        except BaseException as error:
            error.add_note(shown(text))
            raise
    print(ends)
    assert ends.keys() <= {"refused", "searched", "E02", "E30", "E58"}
    assert min(ends["refused"], ends["searched"]) > 100
