"""Names, ids and headers that mean harm, and commands that an old server lacks: rows C24 and C28 of docs/reliability.md."""

from __future__ import annotations

import random
import re
import string
from collections.abc import Callable
from pathlib import Path

import pytest
import redis as redis_py
from redis.crc import key_slot

import conveyor
from conveyor.errors import ConfigurationError
from conveyor.jobs.app import Conveyor
from conveyor.store import inspection
from support.manual_worker import ManualWorker
from testbed.server_process import Server

Rounds = Callable[[int, int], int]
SOURCE = Path(conveyor.__file__).parent

HOSTILE = ("{", "}", "{}", "a}b{c", "{a}b", "a{b}c", "*", "?", "[a-z]", "\\", "'", '"', "\r\n", "\0", "\t", "%s", "$(x)",
           "../x", "a b", "é", "\u202e", "\ud800", "x" * 129, "", "a\nDEL b", "orders:lane:x", "0", "--", ":", ".")  # fmt: skip


def _draw(draw: random.Random) -> str:
    """Return a piece of mischief: hostile parts, ordinary ones, any characters."""
    alphabet = string.ascii_letters + string.digits + "_.:-" * 4 + "{}\n\t\0 é/\\"
    parts = [draw.choice(HOSTILE), "".join(draw.choices(alphabet, k=draw.randrange(6)))]
    return "".join(draw.sample(parts, draw.randrange(1, 3)))


@pytest.mark.row("C24", "I21")
def test_no_name_reaches_beyond_its_queue(app: Conveyor, redis: redis_py.Redis, rounds: Rounds) -> None:
    """A queue or task name is refused, with nothing stored, or all keys of its queue lie in one slot and no other queue's."""
    seed = random.randrange(2**32)
    print(f"seed {seed}")
    draw, owners = random.Random(seed), dict[str, str]()
    accepted = refused = 0
    for name in [*HOSTILE, *(_draw(draw) for _ in range(rounds(100_000, 2000)))]:
        if not re.fullmatch(r"[A-Za-z0-9_.:-]{1,128}", name):
            refused += 1
            with pytest.raises(ConfigurationError):
                app.queue(name)
            with pytest.raises(ConfigurationError):
                app.task(name=name)(lambda: None)
            continue
        accepted += 1
        keys = app.queue(name).keys
        names = [keys.jobs, keys.state, keys.due, keys.conf, keys.wake, keys.lane("x"), keys.leased("y"), *keys.ready,
                 keys.result("a}b{c"), keys.result("{x}")]  # fmt: skip
        assert len({key_slot(one.encode()) for one in names}) == 1
        assert all(owners.setdefault(one, name) == name for one in names)
    assert min(accepted, refused) > 100
    assert redis.keys() == []


@pytest.mark.row("C24")
def test_ids_keys_and_headers_that_mean_harm(app: Conveyor, redis: redis_py.Redis, rounds: Rounds) -> None:
    """Any id, unique key or header is refused with nothing stored, or comes back unchanged, in its job only."""
    seed = random.randrange(2**32)
    print(f"seed {seed}")
    draw, manual = random.Random(seed), ManualWorker(app)
    task = app.task(name="note", keep_result="1m")(lambda n: n)
    marks = ("x", "\nx", "p9", "u", "e1 d1 i uk", "i", "1 2 3", "\tturn", "0 0 0w")
    texts = {*HOSTILE, *marks, *(_draw(draw) for _ in range(rounds(10_000, 200)))}
    served = 0
    for text in sorted(texts):
        try:
            text.encode()
            bound = task.options(id=text, unique=text, headers={"h": text, text: "v"})
        except (ConfigurationError, UnicodeEncodeError):
            continue
        handle = bound.enqueue(served)
        assert bound.enqueue(-1).id == handle.id == text
        assert manual.take(2) == [text]
        assert manual.envelopes[text].unique == text
        assert manual.envelopes[text].extra.headers == {"h": text, text: "v"}
        assert app.client.run(inspection.audit(app.client.keys("default"))) == []
        manual.done(text, served)
        assert handle.result(timeout=60) == served
        served += 1
    assert served > 20
    manual.leave()
    redis.flushall()


def _commands() -> set[str]:
    """Return every command that our scripts and our Python send."""
    lua = {name for path in SOURCE.rglob("*.lua") for name in re.findall(r"redis\.p?call\('(\w+)'", path.read_text())}
    conditional = {"LPUSH", "RPUSH", "HEXISTS", "HDEL", "HLEN", "ZCARD", "LLEN"}  # chosen by an expression
    python = {
        word
        for path in SOURCE.rglob("*.py")
        for word in re.findall(r"(?:execute|send|Script|_allowed)\(\s*\(?(?:\w+, )?\"([A-Z]{3,})\"", path.read_text())
    }
    return lua | conditional | python | {"EVALSHA", "EVAL", "SUBSCRIBE", "PUBLISH", "BLPOP", "BLMOVE"}


@pytest.mark.row("C26")
def test_no_command_asks_a_replica() -> None:
    """Nothing we send lets a node of a cluster answer for its primary, and no connection is opened in search of a replica."""
    assert _commands() & {"READONLY", "EVALSHA_RO", "EVAL_RO", "FCALL_RO"} == set()
    asked = {word for path in SOURCE.rglob("*.py") for word in re.findall(r"SENTINEL\", \"([A-Z-]+)", path.read_text())}
    assert asked == {"GET-MASTER-ADDR-BY-NAME", "MASTERS"}


@pytest.mark.row("C28")
@pytest.mark.redis6
@pytest.mark.redis7
def test_every_command_is_known_to_each_server(server: Server) -> None:
    """No script and no program of ours sends a command that one of the supported servers lacks."""
    wanted = sorted(_commands())
    with server.client() as client:
        known = client.execute_command("COMMAND", "INFO", *wanted)
    unknown = [
        name
        for name, found in zip(wanted, known.values() if isinstance(known, dict) else known, strict=False)
        if not found
    ]
    assert len(wanted) > 30
    assert unknown == []
