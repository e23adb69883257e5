"""Redaction: secrets planted in every field of jobs and messages are found in no output of any surface."""

from __future__ import annotations

import asyncio
import json
import logging
import random
from typing import Any

import click
import pytest
from click.testing import CliRunner
from redis import Redis

from conveyor import Conveyor, Rate, Unique, current
from conveyor.admin import Admin
from conveyor.admin.job_query import parse
from conveyor.cli import COMMANDS, cli
from conveyor.dashboard import Access, dashboard
from conveyor.dashboard.routes import ENDPOINTS
from conveyor.errors import ConfigurationError, InvalidFilter
from conveyor.payload.redaction import REDACTED, Redaction
from support.dashboard_client import _client, _send, inputs_of
from support.running_worker import drain

pytestmark = pytest.mark.leaves_keys("jobs are left to be looked at, and the names of what is redacted stay")
SECRETS = {name: f"CANARY-{name}-4711" for name in ("password", "card", "token", "header", "result", "whole", "number")} | {
    "number": "471147114711"
}  # fmt: skip
_NOT_RUN = {
    "demo", "dev", "worker", "relay", "server", "push", "enqueue", "dashboard", "top", "acl", "help", "completion", "job watch",
    "queue release",
}  # fmt: skip
"""Commands that run until they are stopped, that print what they are given, or that show nothing of jobs."""


@pytest.fixture
def planted(url: str, caplog: pytest.LogCaptureFixture) -> Any:
    """Give an app, the ids of its jobs and messages, and the text of what Conveyor logged meanwhile."""
    caplog.set_level(logging.DEBUG)
    app = Conveyor(url, redact=["password", "*.token", "authorization"])
    ids = asyncio.run(asyncio.wait_for(plant(app), 60))
    ids += plant_messages(app)
    ours = [logging.Formatter().format(one) for one in caplog.records if one.name.startswith("conveyor")]
    yield app, ids, "\n".join(ours)
    app.close()


async def plant(app: Conveyor) -> list[str]:
    """Leave jobs in all states, with secrets in all of their fields."""

    @app.task(queue="mail", retry=1, sensitive=["card", "number"], unique=Unique(), logs="always")
    def pay(card: str, user: dict[str, Any], number: int, fails: bool = True) -> dict[str, Any]:
        context = current()
        context.progress(1, 2, f"card {card}")
        context.notes["card"] = card
        context.notes["password"] = user["password"]
        logging.getLogger("pay").warning("with %s for %s", card, user)
        if fails:
            raise ValueError(f"card {card!r} of {user}, {number}")
        return {"password": SECRETS["result"], "shown": "yes"}

    @app.task(queue="mail", sensitive=["return"])
    def secret() -> str:
        return SECRETS["whole"]

    @app.batch_task(size=2, within="0.05s", queue="rows", retry=1, sensitive=["rows"])
    def index(rows: list[str]) -> None:
        raise ValueError(f"cannot index {rows}")

    user = {"password": SECRETS["password"], "keys": [{"token": SECRETS["token"]}]}
    headers = {"authorization": SECRETS["header"]}
    call = pay.options(headers=headers)
    jobs = [
        await call.aenqueue(SECRETS["card"], user, int(SECRETS["number"])),
        await call.aenqueue(SECRETS["card"], user, int(SECRETS["number"]), fails=False),
        await secret.aenqueue(),
        await index.aenqueue(SECRETS["card"]),
        await index.aenqueue(SECRETS["whole"]),
    ]
    await drain(app)
    jobs.append(await pay.options(headers=headers, delay="1h").aenqueue(SECRETS["card"], user, 47114711))
    jobs.append(await secret.options(queue="later").aenqueue())
    assert (await jobs[1].aresult())["password"] == SECRETS["result"]  # the program gets what its task returned
    await app.aclose()
    return [job.id for job in jobs]


def plant_messages(app: Conveyor) -> list[str]:
    """Leave a dead message and a waiting one, with secrets."""
    queue = app.queue("orders", max_attempts=1)
    body = {"user": "ada", "password": SECRETS["password"], "login": {"token": [SECRETS["token"], SECRETS["card"]]}}
    ids = [queue.push(body, headers={"authorization": SECRETS["header"]}) for _ in range(3)]
    for message, how in zip(queue.consume(), ("error", "dead"), strict=False):
        if how == "error":
            with message as order:
                raise ValueError(f"{order}")
        else:
            message.dead(f"password {SECRETS['password']!r}")
    return ids


def found_in(text: str) -> list[str]:
    """Return the names of the secrets in a text, also of those that it has in escaped form."""
    return [name for name, secret in SECRETS.items() if secret in text]


def leaves(command: click.Command, words: tuple[str, ...] = ()) -> list[tuple[tuple[str, ...], click.Command]]:
    """Return all commands below one, with their words."""
    if not isinstance(command, click.Group):
        return [(words, command)]
    context = click.Context(command)
    names = COMMANDS if not words else command.list_commands(context)
    return [
        leaf
        for name in names
        if " ".join((*words, name)) not in _NOT_RUN
        for leaf in leaves(command.get_command(context, name) or command, (*words, name))
    ]


def lines_of(words: tuple[str, ...], command: click.Command, ids: list[str]) -> list[list[str]]:
    """Return the command lines by which a command shows all that it can, and changes nothing."""
    options = {name for one in command.params for name in one.opts}
    tail = ["--dry-run", "--yes"] if "--dry-run" in options else []
    tail += ["--jobs", "1000"] if words == ("bench",) else []
    targets = {"id_": ids, "ids": ids}.get(
        next((one.name for one in command.params if one.name in {"id_", "ids"}), ""), []
    )
    if targets and words != ("job", "update"):
        return [[*words, one, *tail] for one in targets]
    needed = [one for one in command.params if isinstance(one, click.Argument) and one.required]
    base = [*words, *("mail" for _ in needed), *tail]
    return [base, [*words, "orders", *tail]] if needed else [base]


def test_a_secret_is_on_no_surface(planted: Any, url: str, redis: Redis, tmp_path: Any, monkeypatch: Any) -> None:
    """Neither a log, nor a route of the API, nor a command, nor an error shows what is redacted; each shows the mark instead."""
    app, ids, logged = planted
    assert found_in(logged) == []
    assert logged.count(REDACTED) > 4
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("conveyor.cli.bench.SINGLE", 5)
    outputs: dict[str, str] = {}
    outputs |= asyncio.run(ask_everything(app, ids))
    for words, command in leaves(cli):
        for line in lines_of(words, command, ids):
            for more in ([], ["--json"]):
                if more and not any("--json" in one.opts for one in command.params):
                    continue
                done = CliRunner().invoke(cli, [*line, *more, "--url", url], prog_name="conveyor")
                outputs[" ".join([*line, *more])] = f"{done.output}{done.exception!r}"
    assert {name: secrets for name, text in outputs.items() if (secrets := found_in(text))} == {}
    marked = [name for name, text in outputs.items() if REDACTED in text]
    for wanted in ("GET jobs", "GET job ", "job list", "job show", "job logs", "job why"):
        assert wanted == "job why" or any(name.startswith(wanted) for name in marked), (wanted, marked)
    assert len(outputs) > 60
    errors = [line for key in redis.keys("*state") for state in redis.hvals(key) for line in state.split(b"\n")[1:]]
    assert len(errors) >= 4  # nor do the errors as they are stored
    assert found_in(str(errors)) == []


async def ask_everything(app: Conveyor, ids: list[str]) -> dict[str, str]:
    """Return the answers of all routes that change nothing, by their names and inputs."""
    site = dashboard(app, lambda _: Access.ALL)
    found = {}
    async with _client(site, None) as client:
        for one in ENDPOINTS:
            if one.method != "GET":
                continue
            inputs = [inputs_of(one)]
            inputs += [{"id": id_} for id_ in ids] if one.path == "job" else []
            inputs += [{"name": name} for name in ("mail", "orders", "rows")] if one.path == "queue" else []
            inputs += (
                [{"filter": f"state:{state}"} for state in ("dead", "done", "scheduled", "ready")]
                if one.path == "jobs"
                else []
            )
            for each in inputs:
                answer = await _send(client, "GET", one.path, each, None)
                assert answer.status_code < 500, answer.text
                found[f"GET {one.path} {each}"] = answer.text
        found["GET metrics"] = (await client.get("/metrics")).text
    await app.aclose()
    return found


@pytest.mark.parametrize("named", [True, False])
def test_a_filter_does_not_find_what_is_redacted(planted: Any, url: str, named: bool) -> None:
    """A filter that names a redacted field is refused, with the place; one that names none compares with the mark."""
    app, _, _ = planted
    with Conveyor(url) as other:  # another program of the namespace, which knows the names from Redis
        admin = Admin.of_app(app if named else other)
        for text, column in {"args.card:4*": 1, "state:dead args.user.password:x": 12, "body.login.token:x": 1, "-args.card:x": 1,
                             "header.authorization:x": 1}.items():  # fmt: skip
            for act in (admin.search, admin.count_matching, lambda query: list(admin.act_on_matching("delete", query))):
                with pytest.raises(InvalidFilter, match=f"Column {column} .*redacted"):
                    act(parse(text))
        for text in ("args:CANARY", "body:CANARY", "CANARY", "error:CANARY", "unique:*CANARY*", '"47114711"'):
            assert admin.search(parse(text)).jobs == [], text
        assert admin.search(parse("error:redacted")).jobs
        assert list(admin.each_job(error="CANARY")) == []
        assert admin.count_jobs() > 4


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ('{"password":"x","a":[1,2.50,1e400]}', '{"password":"[redacted]","a":[1,2.50,1e400]}'),
        ('{"a":{"PassWord":{"b":[{"c":"}"}]}},"d":12345678901234567890}', '{"a":{"PassWord":"[redacted]"},"d":12345678901234567890}'),
        ('{"token":1,"a":[{"token":"b\\"c"}]}', '{"token":1,"a":[{"token":"[redacted]"}]}'),
        ('{"card":{"n":1},"a":{"card":1}}', '{"card":"[redacted]","a":{"card":1}}'),
        ('{"user":{"email":"x","name":"y"}}', '{"user":{"email":"[redacted]","name":"y"}}'),
        ('{"p\\u0061ssword":"x"}', '{"p\\u0061ssword":"[redacted]"}'),
        ('{"password":"cut of', '{"password":"[redacted]"'),
        ('{"password":{"a":[1,', '{"password":"[redacted]"'),
        ('{"a":"cut of', '{"a":"cut of'),
        ("{'password': 'x'}", '"[redacted]"'),
        ('{"a":1]', '"[redacted]"'),
        ('"password"', '"password"'),
        ("1,234 bytes. It is in a format", "1,234 bytes. It is in a format"),
    ],
)  # fmt: skip
def test_what_is_not_redacted_stays_to_the_last_digit(text: str, shown: str) -> None:
    """Values of named fields are replaced by the mark, in texts that are cut off too, and all else stays as it was."""
    assert Redaction(["password", "*.token"], {"t": ["card", "user.email"]}).body(text, "t") == shown


def test_a_payload_of_16_mb_stays_calm() -> None:
    """A long payload keeps its length and loses its secrets; a text about it loses the values too, whatever their quotes."""
    redaction = Redaction(["password"])
    text = json.dumps({"rows": ["x" * 1000] * 16_000, "password": "it's a \n secret", "short": "ab"})
    assert len(redaction.body(text, "")) == len(text) - len(json.dumps("it's a \n secret")) + len(f'"{REDACTED}"')
    hide = redaction.hider(text, "")
    assert hide(f"{'it' + chr(39) + 's a ' + chr(10) + ' secret'!r} or it's a \n secret, {json.dumps({'a': 1})}") == (
        f'"{REDACTED}" or {REDACTED}, {{"a": 1}}'
    )
    assert Redaction(["pin"]).hider('{"pin":"12"}', "")("pin '12' of 120") == f"pin '{REDACTED}' of 120"
    many = json.dumps({"password": [str(n) * 5 for n in range(1000)]})
    assert redaction.hider(many, "")("anything") == REDACTED
    assert redaction.hider(json.dumps({"password": "s" * 16_000_000}), "")("anything") == REDACTED


def test_of_a_payload_with_millions_of_values_the_beginning_is_searched() -> None:
    """The search ends after 100,000 tokens: what stands behind is not shown, and said so; without a hidden name all is shown."""
    redaction = Redaction(["password", "*.token"])
    numbers = list(range(2_000_000))
    text = json.dumps({"password": "one", "rows": numbers, "again": {"token": "two"}})
    shown = redaction.body(text, "")
    head, _, rest = shown.partition("… [")
    assert head.startswith(f'{{"password": "{REDACTED}", "rows": [0, 1, 2')
    assert len(head) < 1_000_000
    left = int(rest.partition(" ")[0].replace(",", ""))
    assert len(head) - len(f'"{REDACTED}"') + len('"one"') + left == len(text)
    assert "two" not in shown
    assert redaction.hider(text, "")("anything") == REDACTED
    inside = redaction.body(json.dumps({"password": numbers}), "")
    assert inside.startswith(f'{{"password": "{REDACTED}"… [')
    harmless = json.dumps({"rows": numbers, "passwords": "token"})
    assert redaction.body(harmless, "") is harmless
    assert redaction.hider(harmless, "")("token") == "token"


def test_a_glance_tells_what_the_search_does(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whether a name of a hidden field stands in a text is told as the search would: whatever its case, its escapes, its depth."""
    names = [
        "password", "PassWord", "pa\u0073sword", "pa\u017f\u017fword", 'to"ken', "token", "\u212aey", "key", "a", "card", "x-y", "\u00fcser",
    ]  # fmt: skip
    pick = random.Random(7)

    def value(depth: int) -> str:
        kind = pick.randrange(4 if depth else 2)
        if kind == 3:
            members = [
                f"{json.dumps(pick.choice(names), ensure_ascii=pick.random() < 0.5)}{pick.choice(['', ' '])}:{value(depth - 1)}"
                for _ in range(pick.randrange(4))
            ]
            return "{" + ",".join(members) + "}"
        if kind == 2:
            return "[" + ",".join(value(depth - 1) for _ in range(pick.randrange(3))) + "]"
        return json.dumps(pick.choice(["v", 'password":', "token", 12, None]), ensure_ascii=False)

    redactions = [
        Redaction(["password"]),
        Redaction(["*.token", "key"]),
        Redaction(["üser"], {"t": ["card", "a.*"]}),
        Redaction(["x-*"]),
    ]
    texts = ["[" + value(4) + pick.choice(["]", "]", ""]) for _ in range(600)]
    told = [(one.body(text, "t"), one.hider(text, "t")("v and token")) for one in redactions for text in texts]
    assert any(one._names_nothing(text, "t") for one in redactions for text in texts)
    monkeypatch.setattr(Redaction, "_names_nothing", lambda *_: False)
    assert told == [(one.body(text, "t"), one.hider(text, "t")("v and token")) for one in redactions for text in texts]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"sensitive": ["none"]}, "no argument 'none'"), ({"sensitive": [""]}, "names of fields"), ({"sensitive": [5]}, "names of fields"),
        ({"sensitive": "card", "group_by": "card"}, "would be keys"), ({"sensitive": "card", "unique": Unique(by=("card",))}, "would be keys"),
        ({"sensitive": "card", "limits": [Rate(1, "1s", by="card.id")]}, "would be keys"), ({"group_by": "password"}, "would be keys"),
    ],
)  # fmt: skip
def test_names_that_cannot_be_redacted(app: Conveyor, options: dict[str, Any], message: str) -> None:
    """A sensitive name must be an argument, and none by whose values people see jobs grouped, limited or compared."""
    app.client.redaction.add_patterns(["password"])

    def pay(card: str, password: str = "") -> None: ...

    with pytest.raises(ConfigurationError, match=message):
        app.task(**options)(pay)
