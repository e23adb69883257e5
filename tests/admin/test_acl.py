"""The rules that `conveyor acl` prints: enough for each role, not one too many, and all else is refused."""

from __future__ import annotations

import asyncio
import json
import random
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest

from conveyor.admin import acl
from conveyor.errors import ConfigurationError
from support.role_programs import LIST, NAMESPACE, SERVER, RoleUser, furnish, look, operate, produce, shop, work
from support.shell import Shell
from testbed.server_process import Server

pytestmark = [
    pytest.mark.leaves_keys("scenarios end where a right is missing"),
    pytest.mark.standalone_only("makes users of its own; test_acl_topologies.py does so elsewhere", on=tuple(SERVER)),
]
LIFE: dict[str, Callable[[Any], Any]] = {"producer": produce, "worker": work, "dashboard": look, "operator": operate}


@pytest.fixture
def member(url: str, server: Server, request: pytest.FixtureRequest) -> Iterator[Callable[..., RoleUser]]:
    """Make users by the rules of a role; they are gone after the test, and so are their keys."""
    made: list[RoleUser] = []

    def make(role: str, **options: Any) -> RoleUser:
        options = {"lists": [LIST], "server": SERVER[server.directory.name], **options}
        made.append(RoleUser(server, acl.rules(role, NAMESPACE, **options)))
        made[-1].allow()
        return made[-1]

    yield make
    with server.client() as client:
        for one in made:
            client.execute_command("ACL", "DELUSER", one.rules.user)
        client.flushall()


def live(role: str, member: RoleUser, *, enough: bool = True) -> None:
    """Lead the life of a role; without *enough* rights until one was missed."""
    with shop(member.server.url) as owner, shop(member.url) as app:
        if role == "worker":
            owner.client.execute("FLUSHALL", "SYNC")
        else:
            furnish(owner)
        with member.server.client() as client:
            client.config_resetstat()
        life = LIFE[role]
        if not asyncio.iscoroutinefunction(life):
            with suppress(*(() if enough else (Exception,))):
                life(app)
            return

        async def lead() -> None:
            task = asyncio.create_task(life(app))
            while not enough and not task.done() and not member.denied():
                await asyncio.wait([task], timeout=0.05)
            if not enough:
                task.cancel()
            with suppress(*(() if enough else (Exception, asyncio.CancelledError))):
                await task
            await app.aclose()

        asyncio.run(lead())


@pytest.mark.redis6
@pytest.mark.redis7
@pytest.mark.parametrize("role", LIFE)
def test_rules_are_enough_and_none_too_many(role: str, member: Callable[..., RoleUser], server: Server) -> None:
    """With exactly the printed rules a role's whole life passes unrefused, and each command of them is called in it."""
    one = member(role)
    live(role, one)

    assert one.denied() == set()
    with server.client() as client:
        called = {name.removeprefix("cmdstat_") for name in client.info("commandstats")}
    unused = set(one.rules.commands) - called - {"client|setinfo", "select", "eval"}
    assert unused == set()


@pytest.mark.parametrize("role", LIFE)
def test_without_any_one_rule_something_is_refused(
    role: str, member: Callable[..., RoleUser], rounds: Callable[[int, int], int]
) -> None:
    """A role that lacks any one of its commands is refused in the course of its life."""
    one = member(role)
    seed = random.randrange(2**32)
    commands = [name for name in one.rules.commands if name != "client|setinfo"]
    for command in random.Random(seed).sample(commands, rounds(len(commands), 3)):
        one.allow(f"-{command}")
        if command == "eval":
            with one.server.client() as client:
                client.script_flush()
        live(role, one, enough=False)
        assert one.denied() == {command}, f"{role} did without {command} (seed {seed})"


FORBIDDEN = [
    ("FLUSHALL",), ("FLUSHDB",), ("KEYS", "*"), ("RANDOMKEY",), ("CONFIG", "GET", "*"),
    ("CONFIG", "SET", "maxmemory", "1"), ("ACL", "LIST"), ("SCRIPT", "FLUSH"), ("SHUTDOWN",), ("MONITOR",),
    ("CLIENT", "KILL", "TYPE", "normal"), ("HGET", "other:{mail}:jobs", "x"), ("HGET", f"{NAMESPACE}2:{{mail}}:jobs", "x"),
    ("HGET", f"{NAMESPACE}:secrets", "x"), ("PUBLISH", "other", "x"), ("SUBSCRIBE", "other"),
    ("EVAL", "return redis.call('FLUSHALL')", "0"), ("EVAL", "return redis.call('HGET', 'other', 'x')", "0"),
]  # fmt: skip
WRITES = [
    ("SET", f"{NAMESPACE}:{{mail}}:conf", "x"), ("DEL", f"{NAMESPACE}:{{mail}}:jobs"), ("LPOP", f"{NAMESPACE}:{{mail}}:ready:0"),
    ("EVAL", f"return redis.call('HSET', '{NAMESPACE}:{{mail}}:jobs', 'a', 'b')", "0"),
    ("EVAL", f"return redis.call('ZREM', '{NAMESPACE}:{{mail}}:due', 'a')", "0"),
]  # fmt: skip


@pytest.mark.redis6
@pytest.mark.redis7
def test_all_else_is_refused(member: Callable[..., RoleUser]) -> None:
    """No role reads foreign keys or does anything to the server; a dashboard writes nothing, a producer takes nothing."""
    for role in LIFE:
        one = member(role)
        # An operator removes large bodies that no job needs, and must miss no job: it may see the names of all keys.
        for command in [*FORBIDDEN, *([("SCAN", "0")] if role != "operator" else [])]:
            assert "permission" in (refused := one.refuse(*command)) or "executing the script" in refused, (
                role,
                command,
            )
    for command in WRITES:
        assert member("dashboard").refuse(*command)
    assert member("producer").refuse("LPOP", f"{NAMESPACE}:{{mail}}:ready:0")
    assert member("operator").refuse("BLPOP", f"{NAMESPACE}:{{mail}}:wake", "0.01")


@pytest.mark.redis6
@pytest.mark.redis7
def test_a_refused_role_is_told_what_to_print(member: Callable[..., RoleUser]) -> None:
    """A call that the ACL refuses, in a script or before it, raises E17, which names `conveyor acl`."""
    for act in ("push", "pause"):
        with shop(member("dashboard").url) as app, pytest.raises(ConfigurationError, match="conveyor acl") as caught:
            getattr(app.queue("mail"), act)(*([1] if act == "push" else []))
        assert caught.value.code == "E17"


@pytest.mark.redis6
@pytest.mark.redis7
def test_neutral_rules_are_understood_by_every_server(member: Callable[..., RoleUser]) -> None:
    """The rules for 6.2 are taken by all servers, and are enough there."""
    one = member("producer", server="6.2", database=2, topology="cluster")
    assert {"select", "cluster|slots"} <= set(one.rules.commands)
    live("producer", one)
    assert one.denied() == set()


@pytest.mark.parametrize("name", ["valkey", "redis7"])
def test_durable_pushes_need_a_little_more(name: str, start_server: Callable[..., Server]) -> None:
    """With `--durable` a producer may ask for a sync; without it is told so."""
    server = start_server("--appendonly", "yes", "--appendfsync", "always", name=name)
    for durable in (True, False):
        one = RoleUser(server, acl.rules("producer", NAMESPACE, server=SERVER[name], durable=durable))
        one.allow()
        with shop(one.url) as app:
            if durable:
                app.queue("orders").push(1, fsync=True)
                assert one.denied() == set()
            else:
                with pytest.raises(ConfigurationError, match="conveyor acl"):
                    app.queue("orders").push(1, fsync=True)


@pytest.mark.parametrize("name", ["valkey", "redis6"])
def test_lines_make_a_file_of_users(name: str, start_server: Callable[..., Server], tmp_path: Path) -> None:
    """The text printed for users.acl is a file that a server starts with once passwords are in; as printed the server refuses it."""
    printed = Shell(tmp_path).run("acl", "--namespace", NAMESPACE, "--format", "users.acl")
    assert printed.returncode == 0
    place = tmp_path / "users.acl"
    place.write_text(printed.stdout)
    with pytest.raises(RuntimeError, match="did not start"):
        start_server("--aclfile", str(place), name=name)
    place.write_text(printed.stdout.replace(acl.PASSWORD, "#" + "0" * 64))
    with start_server("--aclfile", str(place), name=name).client() as client:
        assert {"shop-producer", "shop-worker", "shop-dashboard", "shop-operator"} <= set(client.acl_users())


def test_command_knows_the_app(tmp_path: Path) -> None:
    """Namespace and plain lists come from the app, names and forms from the flags, and no server is asked."""
    (tmp_path / "jobs.py").write_text(
        "from conveyor import Conveyor\napp = Conveyor('redis://:s3cr3t@127.0.0.1:1/5', namespace='shop')\napp.plain_list('my list')\n"
    )
    shell = Shell(tmp_path)
    done = shell.run("acl", "worker", "--user", "bob", "--app", "jobs:app", "--json")
    (user,) = json.loads(done.stdout)["users"]
    assert (user["user"], user["keys"]) == (
        "bob",
        ["shop:queues", "shop:expiring", "shop:outboxes", "shop:schedules", "shop:redaction", "shop:{*}:*", "my?list"],
    )
    assert "select" in user["commands"]

    line = shell.run("acl", "worker", "--user", "bob", "--app", "jobs:app").stdout
    assert line == f"ACL SETUSER bob {user['rules']}\n"
    assert "s3cr3t" not in done.stdout + done.stderr + line
    assert shell.run("acl", "--user", "bob", "--namespace", "shop").returncode == 2
    assert shell.run("acl", "worker", "--user", "two words", "--namespace", "shop").returncode == 2


def test_unfit_names_are_refused() -> None:
    """A role that is not there and a namespace that could widen a pattern make no rules."""
    for role, namespace in (("root", "shop"), ("worker", "*"), ("worker", "")):
        with pytest.raises(ConfigurationError):
            acl.rules(role, namespace)
    assert acl.rules("worker", "s", lists=["a*b é'"]).keys[6] == "a?b????"
